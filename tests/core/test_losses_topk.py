"""losses.py, divergences on a support of a few tokens: which tokens, what becomes of the mass outside, limits."""
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from loss_reference import CHOICES, TOPK, VOCAB, case_id, close, logits, measure, probs, support_ref

import losses
from losses import DIVERGENCES, LossArgs, Rows, choose_support


def forms(only=CHOICES["topk_form"], **args):
    """Every top-k loss in every form and support."""
    every = product(TOPK, CHOICES["support"], only)
    cases = [(name, LossArgs(support=support, topk_form=form, **args)) for name, support, form in every]
    return pytest.mark.parametrize("name,args", cases, ids=case_id)


@pytest.mark.parametrize("k", [VOCAB, VOCAB + 5])
@forms()
def test_topk_of_the_whole_vocabulary_is_the_exact_kl(name, args, k):
    """fails if: min(topk, V) is dropped, tail_term is not 0 without a rest, a union counts a token twice"""
    z, teacher_z = logits(0), logits(1)
    loss, grad = measure(DIVERGENCES[name], z, replace(args, topk=k), teacher_z)
    exact, gradient = measure(DIVERGENCES[name.removeprefix("topk_")], z, args, teacher_z)
    close(loss, exact)
    close(grad, gradient)


@pytest.mark.parametrize("name,support", [("topk_reverse_kl", "student"), ("topk_forward_kl", "teacher")])
def test_truncated_is_negative_when_the_other_side_is_surer(name, support):
    """fails if: `truncated` takes abs(log-ratio), or is renormalised on both sides"""
    unsure, sure = (torch.tensor([x], dtype=torch.float64).log() for x in ((.5, .3, .2), (.9, .06, .04)))
    z, teacher_z = (unsure, sure) if name == "topk_reverse_kl" else (sure, unsure)
    for k, mass in ((1, 0.5), (2, 0.8)):
        args = LossArgs(topk=k, support=support, topk_form="truncated")
        loss, _ = measure(DIVERGENCES[name], z, args, teacher_z)
        kept = [(0.5, 0.9), (0.3, 0.06)][:k]
        divisor = mass if name == "topk_reverse_kl" else 1
        close(loss, [sum(a * np.log(a / b) for a, b in kept) / divisor])
        assert (loss < 0) == (k == 1)


@pytest.mark.parametrize("k", [1, 2, 5])
@forms(only=("renormalised", "tail"))
def test_renormalised_and_tail_are_never_negative_and_tail_is_a_lower_bound(name, args, k):
    """fails if: `tail` leaves out its bucket, `renormalised` its division, or kl_on_support turns its sign"""
    z, teacher_z = logits(0), logits(1)
    loss, _ = measure(DIVERGENCES[name], z, replace(args, topk=k), teacher_z)
    exact, _ = measure(DIVERGENCES[name.removeprefix("topk_")], z, args, teacher_z)
    assert (loss >= -1e-14).all()
    assert args.topk_form != "tail" or (loss <= exact + 1e-12).all()


@pytest.mark.parametrize("support", [s for s in CHOICES["support"] if s != "union"])
@pytest.mark.parametrize("name", TOPK)
def test_top_1_is_nothing_when_renormalised_and_something_when_truncated(name, support):
    """fails if: `renormalised` keeps the raw log-ratio, or `truncated` is renormalised as in eq. 5"""
    z = logits(0)
    teacher_z = z + torch.where(z < z.amax(1, keepdim=True), -logits(1, scales=(0.1,)).abs(), 0.5)
    first = z.argmax(1, keepdim=True).numpy()
    p, q = (np.take_along_axis(x, first, 1)[:, 0] for x in (probs(z), probs(teacher_z)))
    args = dict(topk=1, support=support)
    loss, grad = measure(DIVERGENCES[name], z, LossArgs(topk_form="renormalised", **args), teacher_z)
    assert (teacher_z.argmax(1, keepdim=True).numpy() == first).all()
    close(loss, 0 * loss, 1e-15)
    close(grad, 0 * grad, 1e-15)
    loss, grad = measure(DIVERGENCES[name], z, LossArgs(topk_form="truncated", **args), teacher_z)
    sign, weight = (1, np.log(p / q)) if name == "topk_reverse_kl" else (-1, q)
    close(np.take_along_axis(grad, first, 1)[:, 0], sign * (1 - p) * weight)
    close(loss, weight if name == "topk_reverse_kl" else q * np.log(q / p))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("form", CHOICES["topk_form"])
@pytest.mark.parametrize("name", TOPK)
def test_an_empty_intersection_is_worth_nothing(name, form, dtype):
    """fails if: a masked entry becomes -inf (a NaN on the way back, even where a later mask hides it), or
    tail_term counts masked tokens"""
    z = logits(0, rows=3, scales=(2.0,)).sort(-1).values.to(dtype)
    teacher_z = torch.stack([z[0].flip(0), 0.5 * z[1], z[2].flip(0)])           # row 1 shares all its tokens
    args, full = (LossArgs(topk=4, support=s, topk_form=form) for s in ("intersection", "student"))
    with torch.autograd.set_detect_anomaly(True):
        loss, grad = measure(DIVERGENCES[name], z, args, teacher_z)
    precision = 1e-14 if dtype == torch.float64 else 1e-6       # of the log-softmax's sum to 1
    close(loss[::2], np.zeros(2), precision)
    close(grad[::2], np.zeros((2, VOCAB)), precision)
    expected = measure(DIVERGENCES[name], z[1:2], full, teacher_z[1:2])
    close(loss[1:2], expected[0], precision)
    close(grad[1:2], expected[1], precision)


def test_a_support_holds_the_right_tokens_and_none_twice():
    """fails if: a union keeps the teacher's duplicates, or the intersection is taken from teacher ids"""
    z, teacher_z = logits(0), logits(1)
    for support, k in product(CHOICES["support"], (1, 4, VOCAB)):
        args = LossArgs(support=support, topk=k)
        s = choose_support(Rows(z.log_softmax(-1), None, teacher_z.log_softmax(-1)), args)
        for n, (p, q) in enumerate(zip(probs(z), probs(teacher_z))):
            kept = s.id_NK[n][s.keep_NK[n]]
            assert len(kept) == len(set(kept.tolist())) and set(kept.tolist()) == support_ref(p, q, args)
            close(s.student_NK[n][s.keep_NK[n]], np.log(p)[kept])
            close(s.teacher_NK[n][s.keep_NK[n]], np.log(q)[kept])


@forms(topk=4)
def test_supports_agree_when_both_sides_rank_alike(name, args):
    """fails if: a union keeps the teacher's duplicates, or tail_term lets a masked one reopen its token"""
    z = logits(0)
    one, other = (measure(DIVERGENCES[name], z, x, 0.4 * z) for x in (args, replace(args, support="student")))
    close(one[0], other[0])
    close(one[1], other[1])


@forms(topk=4)
def test_gradient_outside_the_support(name, args):
    """fails if: the live log p(v) of `truncated` is renormalised on S, or the divisor of `renormalised` or
    the tail bucket is a constant"""
    z, teacher_z = logits(2, scales=(1.0,)), logits(3, scales=(1.0,))
    loss, grad = measure(DIVERGENCES[name], z, args, teacher_z)
    for n, (p, q) in enumerate(zip(probs(z), probs(teacher_z))):
        inside = support_ref(p, q, args)
        out = [v for v in range(VOCAB) if v not in inside]
        A, B = p[out].sum(), q[out].sum()
        per_p = {               # what p is multiplied with, the same for every token outside
            "renormalised": 0.0,
            "truncated": -loss[n] if name == "topk_reverse_kl" else sum(q[v] for v in inside),
            "tail": np.log(A / B) - loss[n] if name == "topk_reverse_kl" else 1 - B / A}[args.topk_form]
        close(grad[n, out], per_p * p[out])


@pytest.mark.parametrize("V", [17, 400, 4096, 5003, 151_936])
@pytest.mark.parametrize("k", [1, 16])
def test_the_largest_entries_are_found_block_by_block(V, k):
    """Rows of every shape, the last block shorter: the largest entry at either end, ties, minus infinity.
    fails if: entries past the last whole block are left out, or the order is not falling."""
    x_NV = torch.randn(5, V, generator=torch.Generator().manual_seed(V)).double()
    x_NV[0, -1], x_NV[1, 0], x_NV[2, V // 2:], x_NV[3] = 99.0, 99.0, -torch.inf, 0.0
    id_NK = losses.top_ids(x_NV, k)
    assert torch.equal(x_NV.gather(1, id_NK), x_NV.topk(k).values)
    assert all(len(set(row)) == k for row in id_NK.tolist())
    assert id_NK[0, 0] == V - 1 and id_NK[1, 0] == 0
