"""bench/budget.py and bench/ledger.py: what is counted on paper is what the code does."""
import argparse
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

BENCH = str(Path(__file__).resolve().parents[1] / "bench")
sys.path.insert(0, BENCH)
import budget  # noqa: E402
import fused  # noqa: E402
from common import qwen3  # noqa: E402
from ledger import Kernel, known, paper_gpu, paper_model  # noqa: E402

sys.path.remove(BENCH)
from model import Transformer  # noqa: E402
from support.used_memory import resident  # noqa: E402
from support.model_config import ModelConfig  # noqa: E402

V, D, M, Q, R, H, L = 160, 32, 48, 4, 2, 8, 2
SMALL = qwen3(V, D, M, L, Q, R, H)
SIZES = argparse.Namespace(batch=4, prompt=3, new=10, micro_batch_tokens=26)    # two micro-batches of two sequences
PRODUCTS = D * (2 * Q + 2 * R) * H + 3 * D * M      # weights of a layer that are multiplied


@pytest.fixture(scope="module")
def found():
    return budget.phases_of(SMALL, SMALL, SIZES)


def flops(kernels: Counter, kind: str) -> int:
    return budget.total(Counter({kernel: n for kernel, n in kernels.items() if kernel.kind == kind}), "flops")


def test_flops_of_a_decode_step_are_those_of_the_formulas(found):
    """fails if: a product is missed or counted twice, or attention counts the capacity in place of the lengths"""
    rows, length = 4, SIZES.prompt + SIZES.new // 2 + 1
    step = found["decode 4"]
    assert flops(step, "product") == 2 * rows * (L * PRODUCTS + V * D)
    assert flops(step, "attention") == L * rows * 4 * Q * H * length


def test_flops_of_scoring_and_update_are_those_of_the_formulas(found):
    """fails if: a micro-batch, a chunk or one of the two products of a backward pass is missed, or attention counts
    what lies above the diagonal"""
    tokens, rows = SIZES.batch * (SIZES.prompt + SIZES.new), SIZES.batch * SIZES.new
    pairs = SIZES.batch * (SIZES.prompt + SIZES.new) * (SIZES.prompt + SIZES.new + 1) // 2
    assert flops(found["scoring"], "product") == 2 * tokens * L * PRODUCTS
    assert flops(found["scoring"], "attention") == L * 4 * Q * H * pairs
    assert flops(found["teacher's head"], "product") == 2 * rows * V * D
    # logits of both sides, gradient of the states and of the head; and three products of every other weight
    assert flops(found["backward"], "product") == 6 * tokens * L * PRODUCTS + 8 * rows * V * D
    assert flops(found["backward"], "attention") == L * (4 + 10) * Q * H * pairs


def test_a_decode_step_reads_every_weight_that_it_multiplies_once(found):
    """What its products move grows evenly with the rows; what is left at no rows are the weights, in bfloat16.
    fails if: a weight is read in float32, twice, or not at all, or a view of the head counts as a copy"""
    few, many = (sum(kernel.bytes * n for kernel, n in found[f"decode {rows}"].items() if kernel.kind == "product")
                 for rows in (64, 256))
    assert few - 64 * (many - few) // 192 == 2 * (L * PRODUCTS + V * D)


def test_one_and_two_layers_tell_what_three_cost(found, monkeypatch):
    """fails if: layers are not counted evenly, or the kernels that every step has are counted per layer"""
    monkeypatch.setattr(budget, "BATCHES", ())
    one, three = (budget.phases_of(budget.with_layers(SMALL, n), budget.with_layers(SMALL, n), SIZES) for n in (1, 3))
    for phase in ("refresh", "prefill", "decode 4", "scoring", "backward"):
        told = budget.grown(one[phase], found[phase], 3)
        assert {kernel: n for kernel, n in told.items() if n} == dict(three[phase]), phase
    told = budget.grown(one["optimizer"], found["optimizer"], 3)
    assert all(budget.total(told, what) == budget.total(three["optimizer"], what) for what in ("bytes", "launches"))


def test_compiled_layers_keep_products_attention_and_sums_of_gradients(found, monkeypatch):
    """Between them stands what inductor generates, here a kernel of 7 bytes for every layer and micro-batch.
    fails if: an eager kernel of a layer is left in, a product is taken out, or the sum of a gradient with that of the
    micro-batch before it"""
    one = Counter({Kernel("fused", 7, 0, 1, "other"): 1})
    monkeypatch.setattr(budget, "BATCHES", (4,))
    monkeypatch.setattr(fused, "decode_kernels", lambda raw, rows: [one for _ in rows])
    monkeypatch.setattr(fused, "layer_kernels", lambda raw, tokens, trained: [one for _ in tokens])
    plain, _ = budget.count(SMALL, SMALL, SIZES)
    compiled, layer = budget.compiled(SMALL, SMALL, SIZES)
    for phase, of_each in (("decode 4", 1), ("scoring", 2), ("backward", 2)):
        kept, new = plain[phase] - Counter(), compiled[phase] - Counter()
        assert [flops(new, kind) for kind in ("product", "attention")] == [flops(kept, kind) for kind in
                                                                         ("product", "attention")]
        assert sum(n for kernel, n in new.items() if kernel.operator == "fused") == L * of_each
        others = {kernel.operator for kernel in layer[phase] if kernel.kind == "other" and layer[phase][kernel]}
        assert others == ({"fused", "add", "zero"} if phase == "backward" else {"fused"})
    assert budget.micro_batches(SIZES) == [26, 26]
    sums = Counter({kernel: n for kernel, n in layer["backward"].items() if kernel.operator == "add"})
    assert budget.total(sums, "bytes") == 2 * 12 * (PRODUCTS + 2 * D + 2 * H)


def test_a_fused_loss_reads_both_sides_and_writes_the_gradient(monkeypatch):
    """fails if: a side of the logits is left out, or the plain loss is counted beside the fused one"""
    monkeypatch.setattr(budget, "BATCHES", ())
    plain, compiled = (budget.phases_of(SMALL, SMALL, SIZES, fused_loss)["backward"] for fused_loss in (False, True))
    rows = SIZES.batch * SIZES.new
    moved = sum(kernel.bytes * n for kernel, n in compiled.items() if kernel.operator == "fused loss")
    assert moved == 2 * rows * V * (2 * fused.PASSES + 3)
    assert {kernel.operator for kernel in plain} - {kernel.operator for kernel in compiled} >= {"_log_softmax", "exp"}


def test_inductor_tells_what_it_generates():
    """fails if: bytes are not those of what is read and written, or a product counts as generated"""
    function = torch.compile(lambda x, w: ((x.sin() + 1) * 2) @ w)
    assert fused.generated(lambda: function(torch.ones(64, 32), torch.ones(32, 32))) == [2 * 4 * 64 * 32]


def test_nothing_is_allocated():
    """16 GB of weights on paper. fails if: a tensor of the GPU's is made for real"""
    before = resident("VmRSS")
    with paper_gpu(), torch.no_grad():
        large = paper_model(qwen3(151_936, 4096, 12_288, 2, 32, 8, 128, False), torch.float32, torch.bfloat16)
        hidden = large(torch.zeros(8, 512, dtype=torch.int64, device=large.device))
        assert hidden.shape == (8, 512, 4096) and hidden.device.type == "cuda"
    weights = sum(parameter.numel() for parameter in large.parameters())
    assert weights > 1.6e9 and resident("VmRSS") - before < 2**28


def test_integers_are_known_until_something_unknown_is_written():
    """fails if: a mask's size is guessed, or a stale number answers the host after a kernel has written over it"""
    with paper_gpu() as ledger:
        lengths = torch.tensor([3, 1, 2], device="cuda:0")
        mask = torch.arange(4, device="cuda:0") < lengths[:, None]
        assert mask.sum().item() == 6 and torch.randn(3, 4, device="cuda:0")[mask].shape == (6,)
        assert lengths.cumsum(0).tolist() == [3, 4, 6]
        lengths[1:].copy_(torch.randn(3, device="cuda:0")[:2])
        assert known(lengths) is None
    asked = Kernel("copy to the host", 8, 0, 1, "other")
    assert ledger.kernels[asked] == 1


def test_a_kernel_takes_the_longer_of_its_times_and_the_host_no_less():
    """fails if: times of bytes and FLOPs are added, the shares are left out, or a graph waits for the host"""
    card = budget.Card(1e12, 1e14, copy=0.5, weights=0.25, product=0.5, products=0.5, attention=0.1, fixed=1e-6,
                       host=5e-6)
    moves, multiplies = Kernel("add", 10**6, 0, 1, "other"), Kernel("mm", 10**6, 10**9, 1, "product")
    assert budget.seconds(Counter({moves: 2}), card, launched=False) == pytest.approx(2 * 3e-6)
    assert budget.seconds(Counter({moves: 2}), card) == pytest.approx(2 * 5e-6)
    assert budget.seconds(Counter({multiplies: 1}), card, launched=False) == pytest.approx(40e-6 + 1e-6)


def test_a_paper_gpu_leaves_everything_as_it_was():
    """fails if: a function that was replaced stays replaced"""
    import losses
    import rollout
    before = losses.chunked_backward, rollout.Slots.decode, torch.nn.functional.rms_norm
    with paper_gpu():
        paper_model(SMALL, torch.bfloat16, torch.bfloat16)
    assert before == (losses.chunked_backward, rollout.Slots.decode, torch.nn.functional.rms_norm)
    assert Transformer(ModelConfig.from_dict(SMALL)).device.type == "cpu"
