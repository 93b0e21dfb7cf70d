"""Metrics as code defines them: overlap_*_code, as the repository of Rethinking OPD (thunlp/OPD) logs them. Its paper
defines them otherwise.

overlap_advantage_code          weights renormalised on the student's top k, raw log-ratio, mean over all shared tokens
overlap_mass_student_code, overlap_mass_teacher_code    without the rows that share no token
"""
from dataclasses import dataclass

import torch

from losses import top_ids
from support import metrics
from support.flags import opt

plain_observe = metrics.observe


@dataclass(frozen=True)
class Flags:
    code_metrics: bool = opt(False, "also log the overlap metrics as thunlp/OPD computes them")


def attach(run) -> None:
    if run.cfg.code_metrics:
        run.observe, run.step = observe, pooled(run.step)


def observe(r, top_ids_NK) -> dict:
    noted = plain_observe(r, top_ids_NK)
    return noted if r.teacher_NV is None else noted | code_metrics(r, top_ids_NK)


def code_metrics(r, top_ids_NK) -> dict:
    p, q = r.student_NV.detach(), r.teacher_NV
    student_id_NK, teacher_id_NK = top_ids_NK or (top_ids(x, metrics.DIAGNOSTIC_K) for x in (p, q))
    student_NK, teacher_NK = p.gather(1, student_id_NK), q.gather(1, student_id_NK)
    inside = (student_id_NK[:, :, None] == teacher_id_NK[:, None, :]).any(2)
    training_NK = student_NK.log_softmax(-1).exp() * (teacher_NK - student_NK)
    shared = inside.any(-1)
    return {
        # divided by k here and by overlap_ratio in pooled: the mean over all shared tokens of the step
        "overlap_advantage_code": (training_NK * inside).sum(-1) / inside.shape[1],
        "overlap_mass_student_code": torch.where(shared, (student_NK.exp() * inside).sum(-1), torch.nan),
        "overlap_mass_teacher_code": torch.where(shared, (teacher_NK.exp() * inside).sum(-1), torch.nan),
    }


def pooled(step):
    """A step whose overlap_advantage_code is divided by its overlap_ratio: the mean over all shared tokens."""
    def with_code_metrics(*args) -> dict:
        record = step(*args)
        for part in ("", "/q1", "/q2", "/q3", "/q4"):
            if record.get(f"overlap_ratio{part}"):
                record[f"overlap_advantage_code{part}"] /= record[f"overlap_ratio{part}"]
        return record
    return with_code_metrics
