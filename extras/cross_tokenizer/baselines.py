"""Baselines across two vocabularies: ULD and GOLD, kept to be compared with (12-22 % held-out accuracy on the toy pair
where chunks reach 90 %; experiments/xtok.py).

Rows of the divergences table; --divergence uld or gold.
"""
import torch
from torch import Tensor

from extras.cross_tokenizer.rows import CrossRows
from losses import DIVERGENCES, LossArgs, Rows, jsd


def sorted_gap(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """sum_r |r-th largest p - r-th largest q|, the shorter side filled up with zeros."""
    size = max(p_NV.shape[1], q_NV.shape[1])
    p_NV, q_NV = (torch.nn.functional.pad(x_NV.sort(-1, descending=True).values, (0, size - x_NV.shape[1]))
                  for x_NV in (p_NV, q_NV))
    return (p_NV - q_NV).abs().sum(-1)


def uld(r: Rows, args: LossArgs) -> Tensor:
    """Universal logit distillation, Boizard 2024, arXiv:2402.12030: the Wasserstein distance of the two
    distributions when every pair of tokens is equally far apart. It sees how peaked the teacher is, never on
    which token. Rows are paired by their place in the response, whatever they say; no cross-entropy is
    added."""
    both = (r.student_all_NV, r.teacher_all_NV) if isinstance(r, CrossRows) else (r.student_NV, r.teacher_NV)
    return sorted_gap(both[0].exp(), both[1].exp())


def gold(r: Rows, args: LossArgs) -> Tensor:
    """w JSD(beta) on the shared tokens + (1 - w) sorted gap on the others, w = shared / teacher vocabulary.
    GOLD (TRL, 2025), hybrid form with bayesian merging: one row per chunk, its last distribution times the
    probability of the chunk's earlier tokens (held fixed). Unlike the original, tokens are matched by their
    bytes, the JSD gets distributions (each side divided by its shared mass; beta 0.5 as there) and rows are
    not shifted by one."""
    if not isinstance(r, CrossRows):
        return jsd(r, args)
    student_id_K, teacher_id_K = r.shared
    rest = []
    for logp_NV, before_N, id_K in ((r.student_all_NV, r.student_before_N, student_id_K),
                                    (r.teacher_all_NV, r.teacher_before_N, teacher_id_K)):
        alone_V = torch.ones(logp_NV.shape[1], dtype=torch.bool, device=id_K.device)
        alone_V[id_K] = False
        rest.append((logp_NV[:, alone_V] + before_N[:, None]).exp())
    share = len(teacher_id_K) / r.teacher_all_NV.shape[1]
    return share * jsd(r, args) + (1 - share) * sorted_gap(*rest)


DIVERGENCES |= {"uld": uld, "gold": gold}
