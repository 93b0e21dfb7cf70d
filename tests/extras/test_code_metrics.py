"""extras/code_metrics.py: the overlap metrics as thunlp/OPD computes them, against a loop over sets of tokens."""
import numpy as np
import pytest
import torch
from loss_reference import close, logits, probs

from extras.code_metrics import code_metrics, observe, pooled
from losses import Rows
from support.metrics import observe as plain_observe
from support.metrics import summarise


def rows(z, teacher_z):
    token_N = torch.zeros(len(z), dtype=torch.int64)
    return Rows(z.log_softmax(-1), token_N, teacher_z.log_softmax(-1), z.log_softmax(-1)[:, 0])


def code_ref(p, q):
    """One row."""
    k = min(16, len(p))
    top_p, top_q = (set(sorted(range(len(x)), key=lambda v: -x[v])[:k]) for x in (p, q))
    shared = sorted(top_p & top_q)
    mass = sum(p[v] for v in top_p)
    code = [p[v] / mass * np.log(q[v] / p[v]) for v in shared]
    return {"overlap_advantage_code": sum(code) / k,
            "overlap_mass_student_code": p[shared].sum() if shared else np.nan,
            "overlap_mass_teacher_code": q[shared].sum() if shared else np.nan}


@pytest.mark.parametrize("vocab", [5, 16, 40])
def test_code_metrics_equal_a_loop_over_sets(vocab):
    """fails if: log-ratios are renormalised too, a mass of nothing is 0, or min(16, V) is dropped"""
    z, teacher_z = logits(6, vocab=vocab), logits(7, vocab=vocab)
    teacher_z[0] = -z[0]            # ranked backwards: nothing shared at V = 40
    measured = code_metrics(rows(z, teacher_z), None)
    expected = [code_ref(p, q) for p, q in zip(probs(z), probs(teacher_z))]
    assert set(measured) == set(expected[0])
    assert measured["overlap_mass_student_code"].isnan().any().item() == (vocab == 40)
    for name, value_N in measured.items():
        close(value_N, [row[name] for row in expected])


def test_they_come_beside_the_metrics_of_every_run():
    """fails if: a metric of every run is replaced, or rows without a teacher are refused"""
    r = rows(logits(6), logits(7))
    plain, noted = plain_observe(r, None), observe(r, None)
    assert all(torch.equal(noted[name], value_N) for name, value_N in plain.items())
    assert set(noted) == set(plain) | set(code_metrics(r, None))
    assert set(observe(r._replace(teacher_NV=None), None)) == {"sampler_gap"}


def test_the_codes_advantage_is_pooled_over_shared_tokens():
    """fails if: rows are averaged first, so that a row with one shared token weighs as much as one with sixteen"""
    z, teacher_z = logits(6, vocab=40), logits(7, vocab=40)
    z[0] = 4 * torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    every = []
    for p, q in zip(probs(z), probs(teacher_z)):
        top_p, top_q = (np.argsort(-x)[:16] for x in (p, q))
        every += [p[v] / p[top_p].sum() * np.log(q[v] / p[v]) for v in top_p if v in top_q]
    position_N = torch.zeros(len(z), dtype=torch.int64)
    out = pooled(lambda: summarise(observe(rows(z, teacher_z), None), position_N, position_N + 1))()
    close(out["overlap_advantage_code"], np.mean(every))
    close(out["overlap_advantage_code/q1"], np.mean(every))
