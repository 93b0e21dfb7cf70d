"""Metrics: what every run logs of its tokens, whatever its loss.

The loss engine calls observe() on the rows it has at hand anyway, and train.py averages what it notes. Per row, no
gradient, no mask; axes and symbols as in losses.py. docs/metrics.md says what each name means.
"""
import torch
from torch import Tensor

from losses import Rows, kl_on_support, renormalised, top_ids

DIAGNOSTIC_K = 16       # the k of Rethinking OPD's metrics (arXiv:2604.13016, section 2.3)


def diagnostics(r: Rows, top_ids_NK: tuple[Tensor, Tensor] | None = None) -> dict[str, Tensor]:
    """Per row, no gradient. Rethinking OPD, arXiv:2604.13016, section 2.3 and appendix B.1; I = the tokens
    in both top-16 sets. NaN where a quantity is undefined (no shared token); means skip those rows.

    top_ids_NK: losses.top_ids of both sides, when they are known already.
    """
    p, q = r.student_NV.detach(), r.teacher_NV
    exp_p, exp_q, gap = p.exp(), q.exp(), p - q
    entropy_p, entropy_q = -torch.linalg.vecdot(exp_p, p), -torch.linalg.vecdot(exp_q, q)
    reverse_kl = torch.linalg.vecdot(exp_p.to(gap.dtype), gap)
    forward_kl = -torch.linalg.vecdot(exp_q.to(gap.dtype), gap)
    student_id_NK, teacher_id_NK = top_ids_NK or (top_ids(p, DIAGNOSTIC_K), top_ids(q, DIAGNOSTIC_K))
    k = student_id_NK.shape[1]
    student_NK, top_teacher_NK = p.gather(1, student_id_NK), q.gather(1, teacher_id_NK)
    teacher_NK = q.gather(1, student_id_NK)         # q on the student's top k; its own top k is top_teacher_NK
    keep_NK = (student_id_NK[:, :, None] == teacher_id_NK[:, None, :]).any(2)
    size = keep_NK.sum(-1)
    shared_kl = kl_on_support(renormalised(student_NK, keep_NK), renormalised(teacher_NK, keep_NK), keep_NK)
    return {
        "reverse_kl": reverse_kl,
        "forward_kl": forward_kl,
        "overlap_ratio": size / k,
        "overlap_mass_student": torch.where(keep_NK, student_NK.exp(), 0.0).sum(-1),
        "overlap_mass_teacher": torch.where(keep_NK, teacher_NK.exp(), 0.0).sum(-1),
        "overlap_advantage": torch.where(size > 0, -shared_kl / size, torch.nan),
        "student_entropy": entropy_p,
        "teacher_entropy": entropy_q,
        "entropy_gap": (entropy_q - entropy_p).abs(),
        "topk_mass_student": student_NK.exp().sum(-1),
        "topk_mass_teacher": top_teacher_NK.exp().sum(-1),
    }


def observe(r: Rows, top_ids_NK: tuple[Tensor, Tensor] | None) -> dict[str, Tensor]:
    """What the loss engine notes of a few rows: how far sampler and trainer are apart, and, beside a teacher's
    distribution, the diagnostics."""
    noted = {} if r.teacher_NV is None else diagnostics(r, top_ids_NK)
    return noted | {"sampler_gap": (r.student_logp_N() - r.behavior_logp_N).abs()}


def token_metrics(s, batch) -> dict[str, Tensor]:
    """(N,) each: what the responses alone say."""
    repeat_N = [x for token_t in s.token_N.split(s.length_B.tolist()) for x in repeats(token_t.tolist())]
    found = {"repetition_rate": torch.tensor(repeat_N, device=s.token_N.device)}
    return found | {"sampled_entropy": s.student_entropy_N} if batch.on_policy else found


def repeats(tokens: list[int], n: int = 4) -> list[float]:
    """1.0 for each token that ends an n-gram seen earlier in the same response, else 0.0: its mean is the
    repetition rate (seq-rep-4, Welleck 2019, arXiv:1908.04319).

    >>> repeats([1, 2, 3, 4, 1, 2, 3, 4])
    [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    """
    seen, out = set(), []
    for end in range(1, len(tokens) + 1):
        gram = tuple(tokens[max(0, end - n):end])
        out.append(1.0 if len(gram) == n and gram in seen else 0.0)
        seen.add(gram)
    return out


def summarise(per_row: dict[str, Tensor], position_N: Tensor, length_N: Tensor) -> dict[str, float]:
    """Mean of every quantity over all rows, and over each quarter of the responses: name/q1 ... name/q4,
    where a token belongs to the quarter of its own response in which it stands."""
    quarter_N = (4 * position_N // length_N).clamp(max=3)
    value_MN = torch.stack([value_N.double() for value_N in per_row.values()])      # M quantities
    parts = {"": value_MN} | {f"/q{quarter + 1}": value_MN[:, quarter_N == quarter] for quarter in range(4)}
    means = {ending: part_Mn.nanmean(1).tolist() for ending, part_Mn in parts.items()}
    return {name + ending: means[ending][m] for m, name in enumerate(per_row) for ending in parts}
