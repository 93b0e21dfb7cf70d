"""Phased teacher sampling: the gradient that it adds, and what it leaves alone."""
import math

import pytest
import torch
from conftest import END
from helpers import begun, close, one_step, predictions, ready, sampled

from extras import given
from support.weights import load_model
from teacher import Batch


def ids(run, text):
    return run.tokenizer.encode(text) + [END]


def imitation(run, asked, step, written):
    """What is added to the gradient of a step that asked these problems."""
    return given.imitation(run, Batch(None, asked, [run.train[i] for i in asked], True, step), written)

PTS = dict(recipe="sg", pts_weight=0.3, pts_hold=0.25, pts_end=0.75, steps=8, problems=2, samples=2)


@pytest.mark.parametrize("step,mu", [(0, 0.3), (2, 0.3), (4, 0.15), (5, 0.3 * (1 - 0.5 ** 0.5) / 2), (6, 0.0),
                                     (7, 0.0)])
def test_phased_sampling_adds_mu_times_the_cross_entropy(pair, command, step, mu):
    """fails if: the gradient already there is lost, each response is averaged for itself, a repeated problem
    counts twice, or a problem without a response counts at all"""
    run = ready(command, **PTS)
    run.student = load_model(pair / "student", dtype=torch.float64)
    run.student.vocab_size = 20
    written = {3: [ids(run, "3+3=6")], 5: [ids(run, "8")], 1: [ids(run, "4444")], 8: []}
    for p in run.student.parameters():
        p.grad = torch.full_like(p, 0.25)
    found = imitation(run, [3, 3, 8, 5, 0], step, written)
    nll_N = -torch.cat([sampled(predictions(run.student, run.prompts[i], written[i][0]), written[i][0])
                        for i in (3, 5)])
    gradients = torch.autograd.grad(mu * nll_N.mean(), list(run.student.parameters()))
    for p, gradient in zip(run.student.parameters(), gradients):
        close(p.grad, 0.25 + gradient, 1e-7)            # the scale of a row is a float32
    reported = {"teacher_cross_entropy": nll_N.mean().item(), "teacher_weight": mu}
    assert found == (pytest.approx(reported) if mu else {})


def test_phased_sampling_of_nothing_adds_nothing(pair, command):
    """fails if: an empty set of responses is averaged (NaN), or another problem's response fills in"""
    run = ready(command, **PTS)
    for p in run.student.parameters():
        p.grad = torch.full_like(p, 0.25)
    assert imitation(run, [8, 0], 0, {8: [], 3: [[1, END]]}) == {}
    assert all((p.grad == 0.25).all() for p in run.student.parameters())


def test_phased_sampling_draws_among_a_problems_responses(pair, command):
    """fails if: the first response is always taken, or the draw does not follow from seed and step"""
    run = ready(command, **{**PTS, "pts_hold": 1.0, "pts_end": 1.0, "steps": 100})
    written = {3: [ids(run, text) for text in ("1", "2+2", "333")]}
    for p in run.student.parameters():
        p.grad = torch.zeros_like(p)
    losses = [imitation(run, [3], step, written)["teacher_cross_entropy"]
              for step in (*range(20), *range(20))]
    assert len(set(losses)) == 3 and losses[:20] == losses[20:]


def test_phased_sampling_leaves_the_students_own_statistics_alone(command, monkeypatch):
    """fails if: the teacher's responses enter the groups, the rewards or the step's denominator"""
    records = []
    for weight in (0.0, 0.5):
        run = ready(command, **{**PTS, "pts_weight": weight, "samples": 4})
        written = {i: [ids(run, str((i + 3) % 10))] for i in range(10)}
        records.append(one_step(begun(run, monkeypatch, written)))
    without, with_ = records
    assert set(with_) - set(without) == {"teacher_cross_entropy", "teacher_weight"}
    assert with_["grad_norm"] != without["grad_norm"]
    for key, value in without.items():
        assert key == "grad_norm" or with_[key] == value or math.isnan(value), key
