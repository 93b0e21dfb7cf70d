"""A teacher of which only the likeliest tokens are known: their ids and log-probs, the mass of all others together, and
the log-prob of the token drawn.

That is what inference servers tell and what fits on a disk. It determines exactly

    the sampled token    policy_gradient with every advantage that reads teacher_logp_N or teacher_total_B, and k2
    the teacher's top k  topk_reverse_kl and topk_forward_kl in every form, with --support teacher, or intersection (the
                         student's top k are known here, the teacher's there), as long as --topk is not above what is
                         told

since a divergence on a support S reads log q on S and, for the tail, one number: q outside S. For S smaller than what
is told, that is the tail that was told plus what is told and not in S. Everything else is refused (rules_for_topk), and
of the metrics what is not determined is NaN.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from extras.remote_wire import NOTHING
from losses import DIVERGENCES, Rows, top_ids, upcast
from support.metrics import DIAGNOSTIC_K
from support.setup import asked_signals
from teacher import TOLD, Untaught

TOPK_LOSSES, SUPPORTS = ("topk_reverse_kl", "topk_forward_kl"), ("teacher", "intersection")
SAMPLED_LOSSES = ("policy_gradient", "k2", "cross_entropy")
INSTEAD = {"forward_kl": "topk_forward_kl", "skewed_forward_kl": "topk_forward_kl", "eopd": "policy_gradient"}
KNOWN_SIGNALS = {"teacher_logp_N", "teacher_total_B", "teacher_B", "reward_B", "reference_logp_N"}
OF_THE_STUDENT = {"student_entropy", "topk_mass_student", "sampler_gap"}      # metrics that are known whoever teaches
OF_BOTH_TOPS = {"overlap_ratio", "overlap_mass_student", "overlap_mass_teacher", "overlap_advantage",
                "topk_mass_teacher"}


class KnownIds(NamedTuple):
    """losses.top_ids of the student, and what is known of the teacher; tells the metrics what they may say."""
    student_NK: Tensor
    teacher_NK: Tensor
    entropy_N: Tensor | None


@dataclass(eq=False)
class TopKPart(Untaught):
    """The rows that such a teacher scored. All tensors have the N rows of the step, in the order of Rollout.rows; rows
    of sequences that it did not read hold NaN (and any id). K may be 0: then only the token drawn is known."""
    id_NK: Tensor           # int64: the likeliest tokens, no id twice in a row
    logp_NK: Tensor         # float32 at least: their log-probs, normalised over the whole vocabulary
    tail_logp_N: Tensor     # log of the mass of all other tokens; of any value where there are none
    token_logp_N: Tensor    # log q(a)
    entropy_N: Tensor | None = None     # of the whole distribution, where the teacher told it

    def __post_init__(self):
        self.told = {"teacher_logp_N": self.token_logp_N}
        if self.entropy_N is not None:
            self.told["teacher_entropy_N"] = self.entropy_N

    def fields(self, row_n: Tensor) -> dict[str, Tensor]:
        found = {"told_id_NK": self.id_NK, "told_logp_NK": self.logp_NK, "told_tail_N": self.tail_logp_N,
                 "told_token_N": self.token_logp_N}
        if self.entropy_N is not None:
            found["told_entropy_N"] = self.entropy_N
        return {name: value_N[row_n] for name, value_N in found.items()}

    def rows(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> Rows:
        own = {name: value for name, value in fields.items() if not name.startswith("told_")}
        teacher_NV = completed(fields["told_id_NK"], fields["told_logp_NK"], fields["told_tail_N"],
                               fields["token_N"], fields["told_token_N"], logits_NV.shape[1])
        return Rows(upcast(logits_NV).log_softmax(-1), teacher_NV=teacher_NV, **own)

    def top_ids(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> KnownIds:
        return KnownIds(top_ids(logits_NV, DIAGNOSTIC_K), fields["told_id_NK"][:, :DIAGNOSTIC_K],
                        fields.get("told_entropy_N"))


class Told(NamedTuple):
    """What such a teacher says of the n response tokens of one sequence."""
    id_nK: Tensor
    logp_nK: Tensor
    tail_logp_n: Tensor
    token_logp_n: Tensor
    entropy_n: Tensor | None = None


def told_of(logp_nV: Tensor, token_n: Tensor, k: int) -> Told:
    """What a whole distribution says of its k likeliest tokens. The tail is summed from its own entries: 1 - (mass of
    the top k) loses all digits when that mass is near 1."""
    id_nK = top_ids(logp_nV, k)
    tail_n = logp_nV.scatter(1, id_nK, NOTHING).logsumexp(-1)
    drawn_n, entropy_n = (TOLD[name](logp_nV, token_n) for name in ("teacher_logp_N", "teacher_entropy_N"))
    return Told(id_nK.int(), logp_nV.gather(1, id_nK), tail_n, drawn_n, entropy_n)


def topk_part(rollout, sequence_b: Tensor, answers: list[Told]) -> TopKPart:
    """The part of a step of which the sequences sequence_b are told, answers in their order."""
    like = rollout.rows(rollout.logp_BT)
    start_B = rollout.length_B.cumsum(0) - rollout.length_B
    row_n = torch.cat([torch.arange(start, start + length) for start, length in
                       zip(start_B[sequence_b].tolist(), rollout.length_B[sequence_b].tolist())]).to(like.device)
    spread = []
    for values in zip(*answers):
        if values[0] is None:
            continue
        value_n = torch.cat(list(values)).to(like.device)
        nothing_N = value_n.new_zeros(len(like), *value_n.shape[1:])
        if value_n.is_floating_point():
            nothing_N.fill_(torch.nan)
        spread.append(nothing_N.index_copy(0, row_n, value_n))
    return TopKPart(sequence_b, *spread)


def completed(id_NK: Tensor, logp_NK: Tensor, tail_N: Tensor, token_N: Tensor, token_logp_N: Tensor, V: int) -> Tensor:
    """(N, V): one of the distributions that agree with what is known: the mass that is left is spread evenly. Whoever
    reads more of it than the k tokens, the token drawn and sums over all others reads an invention.

    An even share is never above the smallest that is told, so the likeliest tokens of this distribution are those that
    were told; where rounding says otherwise the share is held just below."""
    K, inside_N = id_NK.shape[1], (id_NK == token_N[:, None]).any(1)
    outside_N = V - K - (~inside_N).long()
    tail_mass_N = tail_N.double().exp()
    left_N = tail_mass_N - torch.where(inside_N, 0.0, token_logp_N.double().exp())
    # the difference of two numbers of rounded digits: below this share of the tail nothing is known of it
    left_N = left_N.clamp(min=torch.finfo(logp_NK.dtype).eps * tail_mass_N.clamp(min=1e-30))
    share_N = (left_N / outside_N.clamp(min=1)).log().to(logp_NK.dtype)
    if K:
        lowest_N = logp_NK.amin(1)
        share_N = torch.minimum(share_N, torch.nextafter(lowest_N, lowest_N.new_tensor(-torch.inf)))
    teacher_NV = share_N[:, None].repeat(1, V).scatter(1, token_N[:, None], token_logp_N[:, None])
    return teacher_NV.scatter(1, id_NK, logp_NK)


def watch(run) -> None:
    """Metrics of rows that are known in part: NaN for what is not determined, and `reverse_kl_at_least`, the KL(p||q)
    of the k tokens told and one bucket for all others, which is never above the true one."""
    observe = run.observe

    def observe_known(rows: Rows, top_NK) -> dict[str, Tensor]:
        if not isinstance(top_NK, KnownIds):
            return observe(rows, top_NK)
        noted, nothing_N = observe(rows, top_NK[:2]), torch.full_like(rows.behavior_logp_N, torch.nan)
        enough = top_NK.teacher_NK.shape[1] >= min(DIAGNOSTIC_K, rows.student_NV.shape[1])
        known = OF_THE_STUDENT | OF_BOTH_TOPS if enough else OF_THE_STUDENT
        noted |= {name: nothing_N for name in noted if name not in known}
        if top_NK.entropy_N is not None and "student_entropy" in noted:
            noted["teacher_entropy"] = top_NK.entropy_N
            noted["entropy_gap"] = (top_NK.entropy_N - noted["student_entropy"]).abs()
        if top_NK.teacher_NK.shape[1]:
            noted["reverse_kl_at_least"] = coarse_kl(rows, top_NK.teacher_NK)
        return noted
    run.observe = observe_known


def coarse_kl(rows: Rows, id_NK: Tensor) -> Tensor:
    """KL of the tokens id_NK and one bucket for all others."""
    p_NK, q_NK = (x_NV.gather(1, id_NK).double() for x_NV in (rows.student_NV.detach(), rows.teacher_NV))
    p_rest_N, q_rest_N = ((1 - x_NK.exp().sum(1)).clamp(min=1e-12) for x_NK in (p_NK, q_NK))
    inside_N, rest_N = (p_NK.exp() * (p_NK - q_NK)).sum(1), p_rest_N * (p_rest_N / q_rest_N).log()
    return (inside_N + rest_N).to(rows.student_NV.dtype)


def rules_for_topk(cfg, what: str, most: int | None = None, entropy: bool = False) -> list[tuple[bool, str]]:
    """What such a teacher refuses, for an extra's rules(cfg). `what` begins the sentence (the flag that chose it);
    most: how many tokens it tells at the most (None: as many as --topk asks for); entropy: does it tell its entropy?"""
    known = KNOWN_SIGNALS | ({"teacher_entropy_N"} if entropy else set())
    unknown = [name for name in asked_signals(cfg) if name not in known]
    instead = INSTEAD.get(cfg.divergence, "topk_reverse_kl")
    how = " --support teacher" if instead in TOPK_LOSSES else ""
    topk = cfg.divergence in TOPK_LOSSES
    return [
        (topk or cfg.divergence in SAMPLED_LOSSES,
         f"{what} tells the teacher's likeliest tokens, and {cfg.divergence} reads its whole vocabulary: use "
         f"--divergence {instead}{how}, or policy_gradient or k2"
         if cfg.divergence in DIVERGENCES else f"--divergence {cfg.divergence} is unknown"),
        (not topk or cfg.support in SUPPORTS,
         f"{what} tells the teacher's likeliest tokens, and --support {cfg.support} reads it on the student's: pass "
         f"--support teacher"),
        (not topk or most is None or cfg.topk <= most,
         f"{what} tells {most} tokens: --topk {cfg.topk} must not be above that"),
        (not unknown,
         f"{what} tells the teacher's likeliest tokens, and --advantage {cfg.advantage} --weight {cfg.weight} read "
         f"{', '.join(unknown)}, which they do not determine: choose others, such as --advantage opd --weight none"),
        (not getattr(cfg, "report_only", False),
         f"{what}: --report_only compares whole distributions, and it tells the likeliest tokens; pass a checkpoint"),
    ]
