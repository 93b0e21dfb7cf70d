"""What torch.compile leaves of the kernels between products, counted without a GPU.

A compiled layer and a compiled decode step of this project run once on a CPU, at their real widths and with few tokens.
Inductor plans which loops it generates and what each of them reads and writes; that is counted here. Products and
attention are only called by it (ledger.py has them). On a GPU it fuses by other rules, but what lies between two
products becomes one or two kernels there as well: take it as an estimate.

The loss is not taken from that plan, in which a CPU's loop over a row of logits goes round several times and counts
once: `paper_rows` notes what a GPU would read.
"""
from collections import Counter
from types import SimpleNamespace
from unittest import mock

from common import Transformer, compile_extra, random_model, with_layers  # isort: skip

import torch

from extras.fast import flash as flash_file, merged
from extras.fast.flash import Packed
from ledger import Kernel, Ledger, size
from rollout import Request, Slots

FEW, MORE = 64, 128         # rows or tokens; what kernels move grows evenly with them
PASSES = 3                  # readings of both sides' logits before that for the gradient, an estimate: one for the sums
                            # of the softmax, one for the divergence and what is noted of it, and one to spare


# Attention that inductor calls and does not look into; what it answers is of no account

@torch.library.custom_op("budget::flash", mutates_args=())
def flash_operator(q_NQH: torch.Tensor, k_MRH: torch.Tensor, v_MRH: torch.Tensor) -> torch.Tensor:
    return q_NQH.clone()


@torch.library.custom_op("budget::flash_backward", mutates_args=())
def flash_gradients(grad_NQH: torch.Tensor, k_MRH: torch.Tensor) -> list[torch.Tensor]:
    return [grad_NQH.clone(), k_MRH.clone(), k_MRH.clone()]


flash_operator.register_fake(lambda q_NQH, k_MRH, v_MRH: torch.empty_like(q_NQH))
flash_gradients.register_fake(lambda grad_NQH, k_MRH: [torch.empty_like(x) for x in (grad_NQH, k_MRH, k_MRH)])
flash_operator.register_autograd(lambda ctx, grad_NQH: tuple(flash_gradients(grad_NQH, *ctx.saved_tensors)),
                                 setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[1]))


# Layers

def generated(call) -> list[int]:
    """Bytes that each kernel moves which inductor generates for what is compiled during the call."""
    from torch._inductor import compile_fx, config, metrics     # slow to import
    listening = SimpleNamespace(isEnabledFor=lambda level: True, info=lambda *_: None)
    torch._dynamo.reset()
    metrics.reset()
    with mock.patch.object(compile_fx, "inductor_metrics_log", listening), config.patch(force_disable_caches=True), \
            mock.patch.object(flash_file, "flash", lambda q_NQH, k_MRH, v_MRH, at: flash_operator(q_NQH, k_MRH, v_MRH)):
        call()
    return [4 * words for node, words in metrics.nodes_num_elem if words and not node.is_extern()]


def small(raw: dict, layers: int, dtype: torch.dtype):
    """On the CPU; of the vocabulary little is needed."""
    with mock.patch.object(flash_file, "flash_ready", lambda *_: True):
        return random_model({**with_layers(raw, layers), "vocab_size": 256}, dtype, torch.bfloat16,
                            torch.device("cpu"))


def slots(actor: Transformer, rows: int, prompt: int, new: int) -> Slots:
    return Slots(actor, [Request([0] * prompt, new, n) for n in range(rows)], rows, (0,), 1.0, 0)


def decode_kernels(raw: dict, rows: list[int]) -> list[Counter]:
    """Of one layer in a decode step, for each number of rows."""
    one, two = (Counter(decode_bytes(raw, layers)) for layers in (1, 2))
    return [Counter({Kernel("fused", bytes * n // FEW, 0, 1, "other"): two[bytes] - one[bytes] for bytes in one | two})
            for n in rows]


def decode_bytes(raw: dict, layers: int) -> list[int]:
    """For FEW rows."""
    model = small(raw, layers, torch.bfloat16).requires_grad_(False)
    merged.merge(model)
    compile_extra.compile_model(model)
    pool = slots(model, FEW, prompt=1, new=1)
    pool.cache.longest = 1
    with torch.no_grad():
        return generated(lambda: model(pool.last_S[:, None], pool.cache))


def layer_kernels(raw: dict, tokens: list[int], trained: bool) -> list[Counter]:
    """Of one layer, for each micro-batch of so many tokens: with its backward pass, or of a teacher that is read."""
    few, more = (layer_bytes(raw, count, trained) for count in (FEW, MORE))
    return [Counter(Kernel("fused", a + (b - a) * (n - FEW) // (MORE - FEW), 0, 1, "other")
                    for a, b in zip(few, more, strict=True)) for n in tokens]


def layer_bytes(raw: dict, tokens: int, trained: bool) -> list[int]:
    model = small(raw, 1, torch.float32 if trained else torch.bfloat16).requires_grad_(trained)
    if not trained:
        merged.merge(model)
    layer, keys = compile_extra.compiled_layer(model.model.layers[0]), Packed([tokens])
    at_BT, seen = keys.begin(torch.zeros(1, tokens, dtype=torch.int64))
    x_BTD = torch.zeros(1, tokens, raw["hidden_size"], dtype=torch.bfloat16, requires_grad=trained)

    def read_and_learn():
        with torch.set_grad_enabled(trained):
            y_BTD = layer(x_BTD, model.rope(at_BT), keys, seen)
        if trained:
            y_BTD.sum().backward()
    return generated(read_and_learn)


# The loss

class FusedRows(torch.autograd.Function):
    """losses.few_rows of the vocabulary, fused, on paper."""

    @staticmethod
    def forward(ctx, logits_NV: torch.Tensor, teacher_NV: torch.Tensor, ledger: Ledger) -> torch.Tensor:
        ctx.save_for_backward(logits_NV, teacher_NV)
        ctx.ledger = ledger
        for _ in range(PASSES):
            ledger.note("fused loss", size(logits_NV) + size(teacher_NV))
        return logits_NV.new_empty(len(logits_NV), dtype=torch.float32)

    @staticmethod
    def backward(ctx, grad_N: torch.Tensor):
        logits_NV, teacher_NV = ctx.saved_tensors
        ctx.ledger.note("fused loss", 2 * size(logits_NV) + size(teacher_NV))
        return torch.empty_like(logits_NV), None, None


def paper_rows(ledger: Ledger):
    """In place of losses.few_rows."""
    def few_rows(logits_NV, fields, scale_N, *rest):
        loss_N = FusedRows.apply(logits_NV, fields["teacher_logits_NV"], ledger)
        return (loss_N * scale_N).sum(), loss_N.detach(), {"sampler_gap": loss_N.detach()}
    return few_rows
