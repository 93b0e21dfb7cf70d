"""Newer: losses of 2026 beyond the catalogue in losses.py, each a function and a row, most of them a few lines.

    iw      weight      early tokens count more: they decide where the rest goes (IW-OPD)
    power   advantage   a bounded difference of powers in place of the log-ratio (PowerOPD)
    vopd    advantage   the log-ratio less its exact mean: the same expected gradient, less noise (vOPD)
    opsa    advantage   no teacher: what the student found least likely is made less likely; a control
    sdpg    advantage   verifier, and the teacher on responses better than their group
    veto    divergence  the product of teacher and student as the target
    tropd   divergence  policy gradient where the teacher trusts the token, imitation of its top k where not (TrOPD)
    topd    recipe      the student writes, and learns from, only the first tokens; the horizon grows (TOPD, POPD)

Symbols as in losses.py. Each docstring says whether the formula is the paper's, its code's, or our reading.
"""
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from extras.teachers import GROUPS, PG, SELF
from losses import (ADVANTAGES, DIVERGENCES, ON_SAMPLES_ONLY, USES_ADVANTAGE, WEIGHTS, Rows, Signals, asks, grpo,
                    keep_highest, log_ratio, policy_gradient, return_to_go, top_ids, vocab_sum)
from support.flags import opt, recipe


@dataclass(frozen=True)
class Flags:
    iw_gain: float = opt(1.0, "iw: how much more the first token of a response counts than the last")
    power_exponent: float = opt(5.0, "power: exponent of both probabilities, above 0")
    opsa_share: float = opt(0.2, "opsa: share of the tokens, the least likely ones, that are pushed down", high=1)
    opsa_push: float = opt(1.0, "opsa: by how much")
    sdpg_coef: float = opt(0.1, "sdpg: weight of the teacher at its highest")
    sdpg_warm: float = opt(0.1, "sdpg: share of the run over which that weight rises", high=1)
    sdpg_decay: float = opt(0.5, "sdpg: share of the run after which it falls, to 0 at the end", high=1)
    veto_beta: float = opt(0.3, "veto: exponent of the student in the target, below 1", high=0.999)
    tropd_outside: str = opt("imitate", "tropd: where the teacher does not trust the token, its top k is imitated, or "
                                        "the token has no loss", ("imitate", "mask"))
    topd_start: float = opt(1.0, "share of --max_new_tokens that a response may have in the first step; it grows "
                                 "linearly", low=0.001, high=1)
    topd_until: float = opt(0.5, "share of the run at which it reaches the whole", low=0.001, high=1)


RECIPES = {
    "iw": recipe("early tokens count more (IW-OPD 2606.22600)", weight="iw", **PG),
    "power": recipe("difference of powers, bounded (PowerOPD 2606.17199)", advantage="power", **PG),
    "vopd": recipe("log-ratio less its exact mean (vOPD 2605.07865)", advantage="vopd", **PG),
    "opsa": recipe("no teacher: the least likely tokens pushed down, a control (OPSA 2608.31046)", advantage="opsa",
                   teacher="none", **PG),
    "sdpg": recipe("verifier, and the student shown the solution where a response beats its group (SDPG 2606.04036)",
                   advantage="sdpg", privileged="solution", **SELF, **GROUPS, **PG),
    "veto": recipe("product of teacher and student as the target (Veto 2601.07155)", divergence="veto"),
    "tropd": recipe("policy gradient inside the teacher's trust, imitation outside (TrOPD 2606.01249)",
                    divergence="tropd"),
    "topd": recipe("the first tokens first: a growing horizon (TOPD/POPD 2605.31490)", topd_start=0.1),
}


# Weights and advantages

@asks("teacher_logp_N")
def iw(s: Signals, args) -> Tensor:
    """1 + gain (1 - sum_{s<t} |A_s| / sum_s |A_s|), A = log q - log b, in each response.  IW-OPD, arXiv:2606.22600, as
    in its code: the first token has 1 + gain, and what comes after the largest disagreements counts least. A response
    in which both agree everywhere has 1 + gain throughout."""
    size_N = log_ratio(s).abs()
    rest_N = return_to_go(size_N, s, 1.0)           # this token's and all later ones
    first_N = s.position_N == 0
    whole_B = torch.zeros(len(s.length_B), dtype=rest_N.dtype, device=rest_N.device)
    whole_N = whole_B.index_add(0, s.sequence_N[first_N], rest_N[first_N])[s.sequence_N]
    return 1 + args.iw_gain * torch.where(whole_N > 0, rest_N / whole_N, 1.0)


@asks("teacher_logp_N")
def power(s: Signals, args) -> Tensor:
    """q(a)^x - b(a)^x, x = power_exponent, in (-1, 1).  PowerOPD, arXiv:2606.17199, as in its code (x = 5): a token
    that the teacher rules out costs at most 1 instead of its log-ratio."""
    return (args.power_exponent * s.teacher_logp_N).exp() - (args.power_exponent * s.behavior_logp_N).exp()


@asks("teacher_logp_N", "reverse_kl_N")
def vopd(s: Signals, args) -> Tensor:
    """log q(a) - log b(a) + KL(b||q), the exact mean of the log-ratio taken off.  vOPD, arXiv:2605.07865, as in its
    code. A constant over the words of a prefix, so the expected gradient stays opd's. Its variance falls on average,
    though not at every prefix: the constant that makes it least weighs the words by the size of their gradients. On the
    first update after sampling: the KL is that of the student as it is, b."""
    return log_ratio(s) + s.reverse_kl_N


@asks()
def opsa(s: Signals, args) -> Tensor:
    """-push on the share of the step's tokens with the lowest log b, 0 elsewhere.  OPSA, arXiv:2608.31046: what a
    teacher is worth is what it adds to this. The share is taken over the step (our reading)."""
    return -args.opsa_push * keep_highest(-s.behavior_logp_N, args.opsa_share)


@asks("teacher_logp_N", "reward_B", group=True)
def sdpg(s: Signals, args) -> Tensor:
    """grpo + coef(k) [grpo > 0] (log q - log b), q the student that is shown the solution.  SDPG, arXiv:2606.04036:
    there coef KL(p||q) over the vocabulary, here its sampled policy gradient (our reading, as kdrl has it); coef rises
    over sdpg_warm of the run and falls to 0 after sdpg_decay. Without the paper's small KL to the reference."""
    advantage_N = grpo(s, args)
    rise = min(1.0, s.progress / args.sdpg_warm) if args.sdpg_warm else 1.0
    fall = 1.0 if s.progress <= args.sdpg_decay else (1 - s.progress) / (1 - args.sdpg_decay)
    return advantage_N + torch.where(advantage_N > 0, args.sdpg_coef * rise * fall * log_ratio(s), 0.0)


# Divergences

def veto(r: Rows, args) -> Tensor:
    """KL(t||p), t = softmax(log q + beta log p), held fixed.  Veto, arXiv:2601.07155, the target as in its code;
    forward KL to it is our reading. Where both are unsure t is surer than either, and its fixed point is p =
    q^(1/(1-beta)), renormalised: sharper than the teacher, not the teacher itself."""
    target_NV = (r.teacher_NV + args.veto_beta * r.student_NV.detach()).log_softmax(-1)
    return vocab_sum(target_NV.exp() * (target_NV - r.student_NV), args)


def tropd(r: Rows, args) -> Tensor:
    """T pg + (1 - T) sum_{top-k of q} q (log q - log p), T = min(q(a)/p(a), 1) held fixed, pg = policy_gradient.
    TrOPD, arXiv:2606.01249: the paper speaks of inside and outside a region of trust, its code is not published; that T
    blends the two is our reading. mask: outside there is nothing."""
    trust_N = (r.teacher_logp_N() - r.student_logp_N()).detach().exp().clamp(max=1)
    inside_N = trust_N * policy_gradient(r, args)
    if args.tropd_outside == "mask":
        return inside_N
    id_NK = top_ids(r.teacher_NV, args.topk)
    top_NK = r.teacher_NV.gather(1, id_NK)
    return inside_N + (1 - trust_N) * (top_NK.exp() * (top_NK - r.student_NV.gather(1, id_NK))).sum(-1)


WEIGHTS["iw"] = iw
ADVANTAGES |= {"power": power, "vopd": vopd, "opsa": opsa, "sdpg": sdpg}
DIVERGENCES |= {"veto": veto, "tropd": tropd}
ON_SAMPLES_ONLY.add("tropd")
USES_ADVANTAGE.add("tropd")


def rules(cfg) -> list[tuple[bool, str]]:
    on_policy = cfg.advantage != "vopd" or cfg.divergence not in USES_ADVANTAGE
    return [(cfg.power_exponent > 0, "--power_exponent must be above 0"),
            (on_policy or getattr(cfg, "lmbda", 1) == 1,
             "--advantage vopd takes the mean over what the student would write: it is right on the student's own "
             "responses only (--lmbda 1)"),
            (cfg.sdpg_decay < 1 or cfg.advantage != "sdpg", "--sdpg_decay must be below 1")]


# The horizon

def horizon(cfg, step: int) -> int:
    """Tokens that a response of this step may have."""
    done = min(1.0, step / max(1, cfg.topd_until * cfg.steps))
    return max(1, round(cfg.max_new_tokens * (cfg.topd_start + (1 - cfg.topd_start) * done)))


def attach(run) -> None:
    """Only the student's own writing is cut short."""
    if run.cfg.topd_start == 1:
        return
    (writes, write), step = run.sources[-1], run.step

    def short(run, number: int):
        whole, run.cfg = run.cfg, replace(run.cfg, max_new_tokens=horizon(run.cfg, number))
        try:
            return write(run, number)
        finally:
            run.cfg = whole
    run.sources[-1] = writes, short
    run.step = lambda run, optimizer, number, clock: step(run, optimizer, number, clock) | {
        "horizon": horizon(run.cfg, number)}
