"""Hints: the teacher reads each response after a right hint and after wrong ones, and where the readings part says
which tokens have to do with being right (RLCSD, arXiv:2606.11709).

    wrong_hint_logp_N   signal      log q(a) after wrong hints, beside teacher_logp_N after the right one
    rlcsd               advantage   grpo, moved by the contrast of the two where it is clear
    rlcsd               weight      the tokens that it moves and the others count as much as each other

A hint is a finished response of another sample to the same problem, in the same words for right ones
(--privileged sibling) and wrong ones, so that what any hint does to the teacher's style cancels.
"""
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import teacher as teacher_file
from extras.given import random_of
from extras.teachers import GROUPS, PG, SELF, Panel, privileged_prompt, with_prompts
from losses import ADVANTAGES, WEIGHTS, Signals, asks, grpo, supervised
from support.flags import opt, recipe
from support.setup import asked_signals
from teacher import Batch, told


@dataclass(frozen=True)
class Flags:
    rlcsd_size: float = opt(0.5, "rlcsd: the most that the contrast adds to an advantage or takes from it")
    rlcsd_soft: float = opt(0.02, "rlcsd: the contrast, in nats, at which it gives about three quarters of that")
    rlcsd_least: float = opt(0.02, "rlcsd: what it would move by this much or less is not moved")
    rlcsd_hints: int = opt(4, "rlcsd: most wrong hints that are shown, one at a time", low=1, high=64)


RECIPES = {
    "rlcsd": recipe("GRPO moved by what a right hint and wrong ones tell apart (RLCSD 2606.11709)", advantage="rlcsd",
                    weight="rlcsd", privileged="sibling", self_teacher="ema", ema=0.9, **PG, **SELF, **GROUPS),
}


def rules(cfg) -> list[tuple[bool, str]]:
    wanted = "wrong_hint_logp_N" in asked_signals(cfg)
    return [(not wanted or cfg.privileged == "sibling",
             "--advantage and --weight rlcsd contrast a right hint with wrong ones, which are responses of other "
             "samples: pass --privileged sibling"),
            (cfg.rlcsd_soft > 0, "--rlcsd_soft must be above 0")]


# What the teacher says after wrong hints

def wrong_siblings(batch: Batch, most: int, rng: np.random.Generator) -> list[list[int]]:
    """For each response up to `most` wrong, finished ones of other samples to its problem, drawn at random."""
    reward_B, finished_B = batch.reward_B.tolist(), batch.rollout.finished_B.tolist()
    wrong = [b for b, finished in enumerate(finished_B) if finished and reward_B[b] == 0]
    pools = [[c for c in wrong if batch.asked[c] == i and c != b] for b, i in enumerate(batch.asked)]
    return [[pool[at] for at in rng.permutation(len(pool))[:most]] for pool in pools]


def wrong_hint_logp(run, batch: Batch, parts: list) -> Tensor:
    """(N,) log of the mean of q(a) over the wrong hints of a response, each read in a pass of its own; NaN where there
    is no wrong hint or no right one. As in RLCSD's code a response is never its own hint, and at most rlcsd_hints hints
    are read."""
    panel: Panel = run.teacher
    kind, rollout, crossing = panel.kind, batch.rollout, panel.crossing
    hints = wrong_siblings(batch, run.cfg.rlcsd_hints, random_of(run.cfg.seed, 5, batch.step))
    has_right, readings = panel.usable_B.tolist(), []
    without_hint = [kind.prompt(problem) for problem in batch.problems]
    for number in range(run.cfg.rlcsd_hints):
        shown = [b for b, wrong in enumerate(hints) if has_right[b] and len(wrong) > number]
        if not shown:
            break
        prompts = list(without_hint)
        for b in shown:
            asked, text = batch.problems[b], batch.texts[hints[b][number]]
            prompts[b] = kind.ids(asked, privileged_prompt(asked.prompt, text, kind.template))
        shown_b = torch.tensor(shown, device=rollout.tokens_BT.device)
        reading = panel.read(batch, with_prompts(rollout, prompts), shown_b)
        readings.append(told("teacher_logp_N")(run, batch, reading))
    panel.crossing = crossing       # what the step's own reading noted across tokenizers
    if not readings:
        return rollout.rows(torch.full_like(rollout.logp_BT, torch.nan))
    logp_KN = torch.stack(readings)
    count_N = (~logp_KN.isnan()).sum(0)
    mean_N = logp_KN.nan_to_num(-torch.inf).logsumexp(0) - count_N.to(logp_KN.dtype).log()
    return torch.where(count_N > 0, mean_N, torch.nan)


teacher_file.SIGNALS["wrong_hint_logp_N"] = wrong_hint_logp


# What follows from it

def contrast(s: Signals, args) -> Tensor:
    """r = size tanh(e / soft), e = log q(a | right hint) - log mean_k q(a | wrong hint k); 0 where |r| <= least, or
    where a hint is missing."""
    moved_N = args.rlcsd_size * ((s.teacher_logp_N - s.wrong_hint_logp_N) / args.rlcsd_soft).tanh()
    return torch.where(moved_N.abs() > args.rlcsd_least, moved_N, 0.0)      # a NaN is not above anything


@asks("teacher_logp_N", "wrong_hint_logp_N", "reward_B", group=True)
def rlcsd(s: Signals, args) -> Tensor:
    """A + r, but never past 0, A from grpo and r from contrast: the verifier decides whether a response is made more
    likely, the contrast which of its tokens. RLCSD, arXiv:2606.11709, as in its code, whose size is a product of two
    factors and whose bound on r (2) is never reached at its own settings, which are the defaults here. With the weight
    of the same name. Our reading: an average (--self_teacher ema) stands for the code's copy of the student, made every
    10 steps; a wrong response may be a hint if it ended, in the code if an answer is read from it."""
    advantage_N = grpo(s, args)
    moved_N = advantage_N + contrast(s, args)
    return torch.where(advantage_N > 0, moved_N.clamp(min=0), torch.where(advantage_N < 0, moved_N.clamp(max=0), 0.0))


@asks("teacher_logp_N", "wrong_hint_logp_N")
def rlcsd_weight(s: Signals, args) -> Tensor:
    """n / n_moved on the n_moved tokens that contrast moves, n / n_rest on the n_rest others, 0 where a hint is
    missing: the loss is the sum of two means (RLCSD, as in its code; its factor of the second is 1). So a step in
    which few tokens are moved gives each of them much."""
    usable_N = supervised(s, args) * ~s.wrong_hint_logp_N.isnan()
    moved_N = usable_N * (contrast(s, args) != 0)
    rest_N = usable_N - moved_N
    return usable_N.sum() * (moved_N / moved_N.sum().clamp(min=1) + rest_N / rest_N.sum().clamp(min=1))


ADVANTAGES["rlcsd"] = rlcsd
WEIGHTS["rlcsd"] = rlcsd_weight
