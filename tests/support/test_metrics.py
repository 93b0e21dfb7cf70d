"""support/metrics.py: the diagnostics equal a loop over sets of tokens, and means are over the right rows."""
import doctest

import numpy as np
import pytest
import torch
from loss_reference import ROWS, close, logits, probs

from losses import Rows
from support import metrics
from support.metrics import diagnostics, repeats, summarise


def diagnostics_ref(p, q):
    """One row, sets of tokens, the definitions of arXiv:2604.13016, section 2.3 and eq. 9-10."""
    k = min(16, len(p))
    top_p, top_q = (set(sorted(range(len(x)), key=lambda v: -x[v])[:k]) for x in (p, q))
    shared = sorted(top_p & top_q)
    p_I, q_I = p[shared], q[shared]
    advantage = [pv / p_I.sum() * np.log((qv / q_I.sum()) / (pv / p_I.sum())) for pv, qv in zip(p_I, q_I)]
    entropy_p, entropy_q = -(p * np.log(p)).sum(), -(q * np.log(q)).sum()
    return {"reverse_kl": sum(p * np.log(p / q)), "forward_kl": sum(q * np.log(q / p)),
            "overlap_ratio": len(shared) / k,
            "overlap_mass_student": p_I.sum(), "overlap_mass_teacher": q_I.sum(),
            "overlap_advantage": np.mean(advantage) if shared else np.nan,
            "student_entropy": entropy_p, "teacher_entropy": entropy_q,
            "entropy_gap": abs(entropy_q - entropy_p),
            "topk_mass_student": sum(p[v] for v in top_p), "topk_mass_teacher": sum(q[v] for v in top_q)}


def diagnose(z, teacher_z):
    return diagnostics(Rows(z.log_softmax(-1), None, teacher_z.log_softmax(-1)))


@pytest.mark.parametrize("vocab", [5, 16, 40])
def test_diagnostics_equal_a_loop_over_sets(vocab):
    """fails if: the advantage is not divided by |I|, a mass is renormalised, min(16, V) is dropped, the gap
    loses its abs, topk_mass_teacher is taken on the student's tokens"""
    z, teacher_z = logits(6, vocab=vocab), logits(7, vocab=vocab)
    teacher_z[0] = -z[0]            # ranked backwards: nothing shared at V = 40
    measured = diagnose(z, teacher_z)
    expected = [diagnostics_ref(p, q) for p, q in zip(probs(z), probs(teacher_z))]
    assert set(measured) == set(expected[0])
    assert measured["overlap_advantage"].isnan().any().item() == (vocab == 40)
    for name, value_N in measured.items():
        close(value_N, [row[name] for row in expected])


def test_diagnostics_of_a_student_equal_to_its_teacher():
    """fails if: overlap_advantage loses its minus or its renormalisation, the overlap is counted over V, or
    the gap is not a difference"""
    z, teacher_z = logits(6, vocab=40), logits(7, vocab=40)
    same, apart = diagnose(z, z), diagnose(z, teacher_z)
    assert (same["overlap_ratio"] == 1).all()
    for name in ("overlap_advantage", "entropy_gap", "reverse_kl", "forward_kl"):
        close(same[name], np.zeros(ROWS), 1e-14)
    assert (apart["overlap_advantage"].nan_to_num(-1.0) <= 1e-14).all() and (apart["entropy_gap"] >= 0).all()


@pytest.mark.parametrize("n", [1, 2, 4])
def test_repeats_equals_brute_force(n):
    """fails if: the n-grams may not overlap, have n - 1 tokens, or count themselves"""
    rng = np.random.default_rng(0)
    for length in (0, 1, 3, 4, 5, 40):
        tokens = rng.integers(0, 3, length).tolist()
        expected = [float(end >= n and any(tokens[s:s + n] == tokens[end - n:end] for s in range(end - n)))
                    for end in range(1, length + 1)]
        assert repeats(tokens, n) == expected


def test_docstring_examples():
    """fails if: repeats marks the first occurrence too"""
    result = doctest.testmod(metrics)
    assert result.attempted and not result.failed


def test_summarise_equals_a_loop_over_quarters():
    """fails if: quarters are cut at the longest response instead of the row's own, or NaN is not skipped"""
    lengths = [1, 2, 3, 4, 7, 8, 100]
    position = [t for length in lengths for t in range(length)]
    length_N = [length for length in lengths for _ in range(length)]
    value = np.random.default_rng(0).normal(size=len(position))
    value[::3] = np.nan
    out = summarise({"x": torch.tensor(value)}, torch.tensor(position), torch.tensor(length_N))
    quarters = [[], [], [], []]
    for x, t, length in zip(value, position, length_N):
        if not np.isnan(x):
            quarters[int(t / length * 4)].append(x)
    assert set(out) == {"x", "x/q1", "x/q2", "x/q3", "x/q4"}
    close([out[key] for key in ("x", "x/q1", "x/q2", "x/q3", "x/q4")],
          [np.nanmean(value), *(np.mean(x) for x in quarters)])


def test_summarise_of_nothing_is_nan():
    """fails if: an empty quarter, or a quantity without a defined row, becomes 0"""
    values = {"x": torch.tensor([2.0]), "y": torch.tensor([torch.nan])}
    out = summarise(values, torch.tensor([0]), torch.tensor([1]))
    assert out["x"] == out["x/q1"] == 2.0
    assert all(np.isnan(out[key]) for key in ("x/q2", "x/q3", "x/q4", "y", "y/q1"))
