"""torch.compile of decode steps, layers and loss: half a minute to two minutes once (printed), then faster.

Takes the place of Transformer.forward, losses.few_rows and, on a CPU, Linear.forward. Everything compiles at its first
use, so warm_up uses everything once before the first step.
"""
import functools
import time
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

import losses
import model as model_file
from extras.fast import ways
from extras.low_memory import recomputed
from model import CAUSAL, KVCache, Transformer
from rollout import generate
from support.errors import UserError
from support.flags import opt
from teacher import Batch

MIXTURES = (losses.jsd, losses.skewed_forward_kl, losses.skewed_reverse_kl)     # slower when fused on a CPU: logaddexp
plain_rows, plain_linear = losses.few_rows, model_file.Linear.forward


@dataclass(frozen=True)
class Flags:
    compile: bool = opt(False, "torch.compile the decode step, the layers and the loss: a minute or two once, then "
                               "faster")


def before_loading(cfg, setup) -> None:
    """UserError unless torch.compile works here: one line now, not a page of errors after the models are loaded."""
    if not cfg.compile or cfg.plan:     # the device of a plan need not be there
        return
    try:
        torch.compile(torch.sin)(torch.ones(2, device=setup.device))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(f"--compile does not work here ({str(error).splitlines()[0]}); install what is missing (on a "
                        f"CPU a C++ compiler such as g++), or leave --compile out") from error


def attach(run) -> None:
    losses.few_rows, model_file.Linear.forward = plain_rows, plain_linear
    if run.cfg.compile:
        ways.put("compiled_loss", losses, "few_rows", few_rows)
        if run.student.device.type == "cpu":
            ways.put("turned_products", model_file.Linear, "forward", turned_linear)
        for model in run.models():
            compile_model(model)
        run.before_first_step.append(warm_up)


def compile_model(model: Transformer) -> None:
    """All layers and all sequence lengths share one compilation, at the first pass. Prefill is never compiled."""
    layers, plain = [compiled_layer(layer) for layer in model.model.layers], MethodType(Transformer.forward, model)
    decode = torch.compile(plain, dynamic=True)

    def forward(tokens_BT: Tensor, keys=CAUSAL) -> Tensor:
        decoding = isinstance(keys, KVCache) and keys.longest > 0
        if ("compiled_decode" if decoding else "compiled_layers") in ways.aside:
            return plain(tokens_BT, keys)
        if isinstance(keys, KVCache):
            return decode(tokens_BT, keys) if decoding else plain(tokens_BT, keys)
        at_BT, seen = keys.begin(tokens_BT)
        x, rope = model.embed(tokens_BT).to(model.compute_dtype), model.rope(at_BT)
        for layer in layers:
            x = layer(x, rope, keys, seen)
        return model.model.norm(x)
    for name in ("compiled_layers", "compiled_decode"):
        ways.put(name, model, "forward", forward)


def compiled_layer(layer):
    """Where activations are recomputed, the compiled layer is what runs twice: dynamo leaves a pass around a checkpoint
    uncompiled."""
    inside = getattr(layer.forward, "inside", None)
    return recomputed(torch.compile(inside, dynamic=True)) if inside else torch.compile(layer, dynamic=True)


def turned_linear(linear: model_file.Linear, x: Tensor) -> Tensor:
    """Linear.forward; a compiled decode step takes the weight as left factor. A CPU first reorders the right factor of
    every product, which for the weight costs a tenth of a step of 8 to 32 rows (without compilation, turning it round
    costs as much). With fewer float32 rows nothing is reordered. The number of rows is tested last: in the layers of
    the update the test would be a reason to compile again."""
    decoding = torch.compiler.is_compiling() and "turned_products" not in ways.aside and x.shape[1] == 1
    if not decoding or not (x.dtype != torch.float32 or len(x) >= 8):
        return F.linear(x, linear.weight.to(x.dtype), None if linear.bias is None else linear.bias.to(x.dtype))
    y = (linear.weight.to(x.dtype) @ x[:, 0].T).T[:, None]
    return y if linear.bias is None else y + linear.bias.to(x.dtype)


@functools.cache
def fused_rows():
    return torch.compile(plain_rows, dynamic=True)


@ways.way("compiled_loss", instead_of=plain_rows)
def few_rows(logits_NV: Tensor, fields: dict, scale_N: Tensor, part, divergence, *rest):
    plain = logits_NV.device.type == "cpu" and divergence in MIXTURES
    return (plain_rows if plain else fused_rows())(logits_NV, fields, scale_N, part, divergence, *rest)


def warm_up(run, folder, state) -> None:
    """Compile by a first use: a few short responses are written, read by every teacher and learned from, which moves
    nothing."""
    begun, cfg = time.perf_counter(), run.cfg
    one_each = list({run.kind.which(problem): i for i, problem in enumerate(run.train)}.values())
    asked = (one_each * 13)[:13]
    # 9 of 13 slots live, then 5, then 1: a decode step is compiled for each. Sizes that happen to be equal are compiled
    # as one and compiled again once they differ, so no other size should be 13
    limits = [min(n, cfg.max_new_tokens) for n in [1] * 4 + [4] * 4 + [8] * 4 + [12]]
    rollout = generate(run.actor, [run.prompts[i] for i in asked], max_new_tokens=limits, stop_ids=())
    batch = Batch(rollout, asked, [run.train[i] for i in asked], True, 0, run.tokenizer, cfg.verifier)
    with torch.no_grad():
        parts = run.teacher.parts(batch)
    fields_N = {"token_N": rollout.rows(rollout.tokens_BT), "behavior_logp_N": rollout.rows(rollout.logp_BT)}
    scale_N = torch.zeros_like(fields_N["behavior_logp_N"])
    if cfg.divergence in losses.USES_ADVANTAGE:
        fields_N["advantage_N"] = scale_N
    losses.zero_gradients(run.student)
    losses.backward(run.student, rollout, parts, fields_N, scale_N, losses.DIVERGENCES[cfg.divergence], cfg,
                    run.observe)
    run.student.zero_grad()
    print(f"compile took {time.perf_counter() - begun:.0f} s")
