"""Proof: at start every faster way is held to the plain one on the run's own models, and stands aside where it raises
an error or is wrong on this machine.

    writing     20 ragged prompts in 16 slots, up to 24 new tokens: refills, moves, and 12 steps past the first replay.
                Compared are the log-probs and entropies that the sampler stores
    reading     20 ragged sequences, packed against padded: the states, and for the student the gradient of its first
                layer, which has come through all the others
    the loss    of 48 rows over the whole vocabulary and its gradient, where it is compiled

Both ways are compared with one plain float32 pass, since in bfloat16 neither is right: a fast way may be off by twice
as much as the plain one, and by what float32 rounds. All ways together come first; only when they fail is each tried
alone, so that the one at fault is named.
"""
import time
from contextlib import contextmanager

import torch
from torch import Tensor

import losses
from extras.fast.ways import SAMPLING, in_use, only, stand_aside
from model import Transformer
from rollout import Rollout, assemble, generate
from support.errors import NotFinite, UserError
from support.used_memory import trim
from teacher import Part

SLOTS = 16
PROMPTS = (1, 24, 7, 13, 2, 19, 5, 9, 24, 3, 16, 11, 1, 6, 21, 4, 8, 17, 10, 14)    # tokens
LIMITS = (24, 3, 17, 24, 6, 24, 11, 24, 2, 20, 24, 5, 24, 19, 24, 7, 24, 10, 4, 22)
SLACK = 1e-4            # relative; more than float32 rounds, a hundredth of a wrong answer
ROWS = 48               # of the loss


@contextmanager
def in_float32(model: Transformer):
    """Inside, products run in float32; each weight is cast when it is used."""
    dtype, model.compute_dtype = model.compute_dtype, torch.float32
    try:
        yield
    finally:
        model.compute_dtype = dtype


def sequences(model: Transformer) -> tuple[list[list[int]], list[int], torch.Generator]:
    """(random prompts, limits), as long as the model's context allows, and what goes on drawing."""
    rng, longest = torch.Generator().manual_seed(0), max(1, min(24, model.config.context // 2))
    prompts = [torch.randint(model.vocab_size, (min(n, longest),), generator=rng).tolist() for n in PROMPTS]
    return prompts, [min(n, model.config.context - longest) for n in LIMITS], rng


def write(model: Transformer) -> Rollout:
    prompts, limits, _ = sequences(model)
    return generate(model, prompts, max_new_tokens=limits, stop_ids=(), slots=SLOTS)


def written(model: Transformer) -> Rollout:
    """Random responses instead of the model's: a teacher may not be able to write."""
    prompts, limits, rng = sequences(model)
    responses = [torch.randint(model.vocab_size, (n,), generator=rng) for n in limits]
    zeros = [torch.zeros(n) for n in limits]
    return assemble(prompts, responses, zeros, zeros, [False] * len(limits), model.device)


def read(model: Transformer, rollout: Rollout) -> Tensor:
    """hidden_ND, float32, with its graph; two micro-batches or more."""
    total = int(rollout.prompt_len_B.sum() + rollout.length_B.sum())
    found = list(model.read(rollout, rollout.every_B, total // 2 + 1))
    order_N = torch.cat([row_n for _, row_n in found]).argsort()
    return torch.cat([hidden_nD.float() for hidden_nD, _ in found])[order_N]


@torch.no_grad()
def stored(model: Transformer, rollout: Rollout) -> Tensor:
    """(2, N): what a sampler should have stored, log-probs and entropies, by a plain float32 pass. A part of the head
    at a time: the whole of it in float32 would be the largest tensor of the run."""
    with in_float32(model), only(()):
        hidden_ND = read(model, rollout)
        head_VD, token_N, found = model.head_weight().detach()[:model.vocab_size], rollout.rows(rollout.tokens_BT), []
        for hidden_nD, token_n in zip(hidden_ND.split(64), token_N.split(64)):
            logp_nV = torch.cat([hidden_nD @ part.float().T for part in head_VD.split(2**14)], 1).log_softmax(-1)
            found.append(torch.stack([logp_nV.gather(1, token_n[:, None])[:, 0], -(logp_nV.exp() * logp_nV).sum(-1)]))
    return torch.cat(found, 1)


def distance(found: Tensor, true: Tensor) -> float:
    """Root of the mean squared difference over that of the true values; infinite where something is no number."""
    off = ((found - true).norm() / true.norm().clamp(min=1e-20)).item()
    return off if off == off else float("inf")


# What is compared: each returns how far the ways in use are from float32

def writing(model: Transformer) -> float:
    try:
        rollout = write(model)
    except NotFinite:
        return float("inf")
    return distance(torch.stack([rollout.rows(rollout.logp_BT), rollout.rows(rollout.entropy_BT)]),
                    stored(model, rollout))


class Reading:
    """Of one rollout, by a student with the gradient of its first layer. The true values are found once."""

    def __init__(self, model: Transformer):
        self.rollout = written(model)
        with only(()), in_float32(model):
            self.true = self.once(model)

    def once(self, model: Transformer) -> list[Tensor]:
        learned = [parameter for parameter in model.model.layers[0].parameters() if parameter.requires_grad]
        with torch.set_grad_enabled(bool(learned)):
            hidden_ND = read(model, self.rollout)
            rng = torch.Generator().manual_seed(1)
            probe_ND = torch.randn(hidden_ND.shape, generator=rng).to(hidden_ND.device)
            gradients = torch.autograd.grad((hidden_ND * probe_ND).sum(), learned) if learned else ()
        return [hidden_ND.detach(), *([torch.cat([g.float().flatten() for g in gradients])] if learned else ())]

    def __call__(self, model: Transformer) -> float:
        return max(map(distance, self.once(model), self.true))


class Loss:
    """The divergence of the run, on rows of the student's own head and random states of a teacher."""

    def __init__(self, run):
        self.run, rng = run, torch.Generator().manual_seed(2)
        model, cfg = run.student, run.cfg
        self.head_VD, device = model.head(), model.device
        self.states, others = (torch.randn(ROWS, self.head_VD.shape[1], generator=rng).to(device) for _ in range(2))
        token_N = torch.randint(model.vocab_size, (ROWS,), generator=rng).to(device)
        every_N = torch.arange(ROWS, device=device)
        self.part = Part(every_N, every_N, others.to(self.head_VD.dtype), self.head_VD, token_N, cfg)
        self.scale_N = torch.rand(ROWS, generator=rng).to(device)
        self.fields = {"token_N": token_N, "behavior_logp_N": -8 + self.scale_N}
        if cfg.divergence in losses.USES_ADVANTAGE:
            self.fields["advantage_N"] = self.scale_N - 0.5
        with only(()):
            self.true = self.once()

    def once(self) -> list[Tensor]:
        cfg, fields = self.run.cfg, {**self.fields, **self.part.fields(self.part.sequence_b)}
        logits_NV = self.states.to(self.head_VD.dtype) @ self.head_VD.T
        with torch.no_grad():
            loss_N, _ = losses.gradient_in_place(logits_NV, fields, self.scale_N, self.part,
                                                 losses.DIVERGENCES[cfg.divergence], cfg, self.run.observe)
        return [loss_N.float(), logits_NV.float()]

    def __call__(self, model) -> float:
        return max(map(distance, self.once(), self.true))


# The proof

def hold(what: str, model: Transformer, off_by) -> None:
    """Compare the ways in use with none in use; each that is wrong stands aside."""
    with only(()):
        plain = off_by(model)

    def wrong() -> Exception | str | None:
        try:
            off = off_by(model)
        except UserError:
            raise
        except Exception as error:      # whatever a kernel, a compiler or a missing operator may raise
            return error
        if off <= 2 * plain + SLACK:
            return None
        return f"{what} is off by {off:.1e} on {model.title}, the plain way by {plain:.1e}"

    if wrong() is None:
        return
    names, trusted = in_use(), []
    for name in names:                  # later ways build on earlier ones
        with only([*trusted, name]):
            found = wrong()
        if found is None:
            trusted.append(name)
        else:
            stand_aside(name, found)


def prove(run, folder, state) -> None:
    """Before the first step of every start; nothing of the run is changed by it."""
    if not in_use():
        return
    begun, tried = time.perf_counter(), in_use()
    for model in sorted(run.models(), key=lambda model: model.title):
        here = all(parameter.device == model.device for parameter in model.parameters())    # parked teachers are not
        writes = here and not getattr(model, "only_reads", False)
        if writes and (model is run.actor or model is not run.student):
            hold("sampling", model, writing)
        if set(tried) - SAMPLING:
            hold("reading", model, Reading(model))
    if "compiled_loss" in tried:
        hold("the loss", run.student, Loss(run))
    trim()      # what the comparisons leave in the heap would stand beside the whole run
    if good := [name for name in tried if name in in_use()]:
        print(f"fast    {', '.join(good)}: as exact as the plain ways ({time.perf_counter() - begun:.1f} s)")
