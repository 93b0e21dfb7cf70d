"""losses.py and the chunked backward pass of update.py: every value and gradient equals a formula written out
here, and every sampled estimate the enumeration of what could have been sampled.

Exact mathematics in float64 on small vocabularies, probabilities down to 1e-25. A gradient is with respect to
the logits z of p = softmax(z); a reference sees one row as numpy arrays p and q, returns (value, gradient).
"""
import doctest
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import diagnostics as diagnostics_file  # noqa: E402
import losses as losses_file  # noqa: E402
from credit import ADVANTAGES, WEIGHTS, CreditArgs, Signals  # noqa: E402
from diagnostics import diagnostics, repeats, summarise  # noqa: E402
from losses import DIVERGENCES, LossArgs, Rows, choose_support  # noqa: E402
import update  # noqa: E402
from update import chunked_backward  # noqa: E402

ROWS, VOCAB = 24, 12
CHOICES = {name: LossArgs.__dataclass_fields__[name].metadata["choices"] for name in ("support", "topk_form")}
TOPK = ("topk_reverse_kl", "topk_forward_kl")
SKEWED = ("skewed_forward_kl", "skewed_reverse_kl")


# Inputs and measurement.

def logits(seed, rows=ROWS, vocab=VOCAB, scales=(1.0, 3.0, 10.0, 20.0)):
    """Rows from nearly flat to a peak with 1e-25 beside it, the scale drawn per row."""
    rng = torch.Generator().manual_seed(seed)
    scale = torch.tensor(scales, dtype=torch.float64)[torch.randint(len(scales), (rows, 1), generator=rng)]
    return scale * torch.randn(rows, vocab, generator=rng, dtype=torch.float64)


def probs(z_NV):
    """Softmax by numpy alone."""
    e = np.exp(z_NV.double().numpy() - z_NV.double().numpy().max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def measure(loss, z_NV, args=LossArgs(), teacher_z=None, **fields):
    """(loss_N, gradient of its sum with respect to z) as numpy arrays."""
    z_NV = z_NV.clone().requires_grad_()
    fields.setdefault("token_N", torch.zeros(len(z_NV), dtype=torch.int64))
    teacher_NV = None if teacher_z is None else teacher_z.log_softmax(-1)
    loss_N = loss(Rows(z_NV.log_softmax(-1), teacher_NV=teacher_NV, **fields), args)
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), z_NV)
    return loss_N.detach().numpy(), grad_NV.numpy()


def sampled_fields(z_NV, seed=5):
    """A drawn token, a behaviour that puts p(a)/b(a) on both sides of the clip, advantages of both signs."""
    rng = torch.Generator().manual_seed(seed)
    rows, vocab = z_NV.shape
    token_N = torch.randint(vocab, (rows,), generator=rng)
    noise_N, advantage_N = torch.randn(2, rows, generator=rng, dtype=torch.float64)
    behavior_N = z_NV.log_softmax(-1).gather(1, token_N[:, None])[:, 0] + 0.4 * noise_N
    return dict(token_N=token_N, behavior_N=behavior_N, advantage_N=advantage_N)


def signals(rows=5, **fields):
    """Signals of one-token sequences unless told otherwise."""
    n = torch.arange(rows)
    base = dict(token_N=0 * n, student_N=-n.double() - 1, student_entropy_N=n.double(), sequence_N=n, position_N=0 * n,
                length_B=0 * n + 1, group_B=0 * n, finished_B=n >= 0)
    return Signals(**{**base, **fields})


def close(a, b, atol=1e-10):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol)


# The reference: one row, explicit sums.

def through_softmax(p, slope):
    """Gradient on the logits of a function with derivative `slope` in p."""
    return p * (slope - (p * slope).sum())


def reverse_ref(p, q, **_):
    kl = (p * np.log(p / q)).sum()
    return kl, p * (np.log(p / q) - kl)


def forward_ref(p, q, **_):
    return (q * np.log(q / p)).sum(), p - q


def jsd_ref(p, q, args, **_):
    m = args.beta * q + (1 - args.beta) * p
    value = args.beta * (q * np.log(q / m)).sum() + (1 - args.beta) * (p * np.log(p / m)).sum()
    return value, through_softmax(p, (1 - args.beta) * np.log(p / m))


def skewed_forward_ref(p, q, args, **_):
    m = (1 - args.skew) * p + args.skew * q
    return (q * np.log(q / m)).sum(), through_softmax(p, -(1 - args.skew) * q / m)


def skewed_reverse_ref(p, q, args, **_):
    m = (1 - args.skew) * q + args.skew * p
    return (p * np.log(p / m)).sum(), through_softmax(p, np.log(p / m) - args.skew * p / m)


def support_ref(p, q, args):
    """The support as a set of tokens."""
    student, teacher = (set(np.argsort(-x)[:args.topk].tolist()) for x in (p, q))
    return {"student": student, "teacher": teacher, "union": student | teacher,
            "intersection": student & teacher}[args.support]


def topk_ref(p, q, args, reverse):
    inside = np.isin(np.arange(len(p)), list(support_ref(p, q, args)))
    p_in, q_in = np.where(inside, p, 0), np.where(inside, q, 0)
    if not inside.any():
        return 0.0, 0 * p
    if args.topk_form == "tail":        # one more token, in place of all those outside
        bucket = np.where(inside, p / q, p[~inside].sum() / q[~inside].sum() if not inside.all() else 1)
        if not reverse:
            return -(q * np.log(bucket)).sum(), p * (1 - 1 / bucket)
        kl = (p * np.log(bucket)).sum()
        return kl, p * (np.log(bucket) - kl)
    if args.topk_form == "renormalised":
        ps, qs = p_in / p_in.sum(), q_in / q_in.sum()
        log_ratio = np.log(ps, where=inside, out=0 * p) - np.log(qs, where=inside, out=0 * p)
        return ((ps * log_ratio).sum(), ps * (log_ratio - (ps * log_ratio).sum())) if reverse else (
            -(qs * log_ratio).sum(), ps - qs)
    if reverse:                         # the weight is a number, only log p(v) moves: thunlp/OPD
        cost = p_in / p_in.sum() * np.log(p / q)
        return cost.sum(), cost - p * cost.sum()
    return (q_in * np.log(q / p)).sum(), p * q_in.sum() - q_in


def pg_ref(p, q, args, a, log_b, advantage, **_):
    ratio = p[a] / np.exp(log_b)
    if advantage > 0 and ratio > 1 + args.clip:
        return -(1 + args.clip) * advantage, 0 * p
    if advantage < 0 and ratio < 1 - args.clip:
        return -(1 - args.clip) * advantage, 0 * p
    return -ratio * advantage, -ratio * advantage * (np.eye(len(p))[a] - p)


def k2_ref(p, q, a, **_):
    return np.log(p[a] / q[a]) ** 2 / 2, np.log(p[a] / q[a]) * (np.eye(len(p))[a] - p)


def cross_entropy_ref(p, q, a, **_):
    return -np.log(p[a]), p - np.eye(len(p))[a]


def uld_ref(p, q, **_):
    slope = np.zeros(len(p))
    for mine, theirs in zip(np.argsort(-p, kind="stable"), np.argsort(-q, kind="stable")):
        slope[mine] = np.sign(p[mine] - q[theirs])
    return sum(abs(a - b) for a, b in zip(sorted(p), sorted(q))), through_softmax(p, slope)


TOPK_ARGS = [LossArgs(topk=k, support=support, topk_form=form)
             for k, support, form in product((1, 3, 7), CHOICES["support"], CHOICES["topk_form"])]
SKEWS = [LossArgs(skew=skew) for skew in (0.0, 0.1, 0.9)]
REFERENCE = {       # a divergence without a line here fails test_every_entry_of_every_table_is_tested
    "reverse_kl": (reverse_ref, [LossArgs()]),
    "forward_kl": (forward_ref, [LossArgs()]),
    "jsd": (jsd_ref, [LossArgs(beta=beta) for beta in (0.1, 0.5, 0.7)]),
    "skewed_forward_kl": (skewed_forward_ref, SKEWS),
    "skewed_reverse_kl": (skewed_reverse_ref, SKEWS),
    "topk_reverse_kl": (lambda p, q, args, **_: topk_ref(p, q, args, True), TOPK_ARGS),
    "topk_forward_kl": (lambda p, q, args, **_: topk_ref(p, q, args, False), TOPK_ARGS),
    "policy_gradient": (pg_ref, [LossArgs(), LossArgs(clip=0.5)]),
    "k2": (k2_ref, [LossArgs()]),
    "cross_entropy": (cross_entropy_ref, [LossArgs()]),
    "uld": (uld_ref, [LossArgs()]),
    "gold": (jsd_ref, [LossArgs(beta=beta) for beta in (0.3, 0.5)]),   # one vocabulary; two: test_across.py
}
CASES = [(name, args) for name, (_, all_args) in REFERENCE.items() for args in all_args]


def case_id(x):
    """What differs from the defaults."""
    if not isinstance(x, LossArgs):
        return str(x)
    return "-".join(f"{k}={v}" for k, v in vars(x).items() if v != getattr(LossArgs(), k)) or "defaults"


def forms(only=CHOICES["topk_form"], **args):
    """Every top-k loss in every form and support."""
    every = product(TOPK, CHOICES["support"], only)
    cases = [(name, LossArgs(support=support, topk_form=form, **args)) for name, support, form in every]
    return pytest.mark.parametrize("name,args", cases, ids=case_id)


def test_every_entry_of_every_table_is_tested():
    """fails if: an entry is added to DIVERGENCES without a reference here (eopd has its own tests)"""
    assert set(DIVERGENCES) == {*REFERENCE, "eopd"}
    assert probs(logits(0)).min() < 1e-25 and probs(logits(1)).min() < 1e-25


@pytest.mark.parametrize("name,args", CASES, ids=case_id)
def test_value_and_gradient_equal_the_formula(name, args):
    """fails if: beta and 1 - beta are swapped, the fixed weight of `truncated` loses its detach, tail_term
    takes 1 - (mass on the support), a sign or a factor changes anywhere"""
    z, teacher_z = logits(0), logits(1)
    fields = sampled_fields(z)
    loss, grad = measure(DIVERGENCES[name], z, args, teacher_z, **fields)
    for n, (p, q) in enumerate(zip(probs(z), probs(teacher_z))):
        value, gradient = REFERENCE[name][0](p, q, args=args, a=int(fields["token_N"][n]),
                                             log_b=fields["behavior_N"][n].item(),
                                             advantage=fields["advantage_N"][n].item())
        close(loss[n], value)
        close(grad[n], gradient)


# What the sampled losses do on average: every token a, weighted with the p(a) that would draw it.

def k1(r, args):
    return r.student_N() - r.teacher_N()


def k3(r, args):
    log_ratio_N = r.teacher_N() - r.student_N()
    return log_ratio_N.exp() - 1 - log_ratio_N


def on_policy_gradient(r, args):
    """policy_gradient as a run has it: behaviour = student, advantage from the table."""
    behavior_N = r.student_N().detach()
    s = signals(len(behavior_N), student_N=behavior_N, teacher_N=r.teacher_N())
    advantage_N = ADVANTAGES["opd"](s, CreditArgs())
    return DIVERGENCES["policy_gradient"](r._replace(behavior_N=behavior_N, advantage_N=advantage_N), args)


def constant_advantage(r, args):
    """An advantage that knows the prefix but not the token: the KL itself."""
    kl_N = (r.teacher_NV.exp() * (r.teacher_NV - r.student_NV)).sum(-1).detach()
    on_policy = r._replace(behavior_N=r.student_N().detach(), advantage_N=kl_N)
    return DIVERGENCES["policy_gradient"](on_policy, args)


def zero_ref(p, q):
    return None, 0 * p


@pytest.mark.parametrize("estimate,reference", [
    (on_policy_gradient, reverse_ref), (DIVERGENCES["k2"], reverse_ref), (k1, zero_ref), (k3, forward_ref),
    (constant_advantage, zero_ref), (DIVERGENCES["cross_entropy"], zero_ref)],
    ids=["policy_gradient", "k2", "k1", "k3", "constant_advantage", "cross_entropy"])
def test_expected_gradient_of_a_sampled_estimate(estimate, reference):
    """fails if: k2 loses its / 2, opd changes its sign, policy_gradient squares the ratio or
    centres the advantage, Rows.teacher_N reads the student (k3), Rows.student_N is not a log (k1)"""
    z, teacher_z = logits(2, scales=(1.0, 3.0)), logits(3, scales=(1.0, 3.0))
    expected = 0
    for a in range(VOCAB):
        _, grad = measure(estimate, z, teacher_z=teacher_z, token_N=torch.full((ROWS,), a))
        expected = expected + probs(z)[:, a:a + 1] * grad
    close(expected, [reference(p, q)[1] for p, q in zip(probs(z), probs(teacher_z))])


def test_expected_values_of_the_estimates():
    """fails if: k2 loses its / 2, or opd changes its sign. -A, k1, k3 average to KL(p||q), and k2
    does not."""
    z, teacher_z = logits(2, scales=(1.0, 3.0)), logits(3, scales=(1.0, 3.0))
    p, q = probs(z), probs(teacher_z)

    def mean(estimate):
        return sum(p[:, a] * measure(estimate, z, teacher_z=teacher_z, token_N=torch.full((ROWS,), a))[0]
                   for a in range(VOCAB))

    kl = (p * np.log(p / q)).sum(-1)
    for estimate in (k1, k3, on_policy_gradient):
        close(mean(estimate), kl)
    close(mean(DIVERGENCES["k2"]), (p * np.log(p / q) ** 2).sum(-1) / 2)
    assert (abs(mean(DIVERGENCES["k2"]) - kl) > 0.01).mean() > 0.9


# Limits, signs and bounds.

@pytest.mark.parametrize("beta,scale,reference", [(1e-6, 1e6, forward_ref), (1 - 1e-6, 1e6, reverse_ref)])
def test_jsd_limits_are_forward_and_reverse_kl(beta, scale, reference):
    """fails if: beta weighs the student; next to an end the rest is of order beta (chi squared), 1e-4 here"""
    z, teacher_z = logits(2, scales=(1.0,)), logits(3, scales=(1.0,))
    loss, grad = measure(DIVERGENCES["jsd"], z, LossArgs(beta=beta), teacher_z)
    assert (loss < 1e-5).all()
    for n, (p, q) in enumerate(zip(probs(z), probs(teacher_z))):
        value, gradient = reference(p, q)
        close(scale * loss[n], value, 1e-4)
        close(scale * grad[n], gradient, 1e-4)


def test_jsd_is_symmetric_at_one_half_and_between_its_bounds():
    """fails if: the student's half is weighted with beta^2, or m uses the log of the wrong share"""
    z, teacher_z = logits(0), logits(1)
    close(measure(DIVERGENCES["jsd"], z, LossArgs(), teacher_z)[0],
          measure(DIVERGENCES["jsd"], teacher_z, LossArgs(), z)[0])
    for beta in (1e-3, 0.1, 0.5, 0.9, 0.999):
        entropy_of_beta = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
        loss, _ = measure(DIVERGENCES["jsd"], z, LossArgs(beta=beta), teacher_z)
        assert (loss >= -1e-15).all() and (loss <= entropy_of_beta + 1e-12).all()


@pytest.mark.parametrize("name,args", [
    ("jsd", LossArgs(beta=0.0)), ("jsd", LossArgs(beta=1.0)), ("jsd", LossArgs(beta=-0.1)),
    *product(SKEWED, (LossArgs(skew=1.0), LossArgs(skew=-0.1), LossArgs(skew=2.0)))], ids=case_id)
def test_shares_that_mean_another_loss_are_refused(name, args):
    """fails if: `0 < args.beta < 1` becomes `<=`, or the check of log_mix is removed"""
    with pytest.raises(ValueError, match=str(args.beta if name == "jsd" else args.skew)):
        measure(DIVERGENCES[name], logits(0), args, logits(1))


@pytest.mark.parametrize("name", SKEWED)
def test_skew_0_is_the_plain_kl_and_skew_bounds_it(name):
    """fails if: log_mix swaps its shares, or share 0 gives `other`"""
    z, teacher_z = logits(0), logits(1)
    names = (name, name.removeprefix("skewed_"))
    unskewed, exact = (measure(DIVERGENCES[x], z, LossArgs(skew=0.0), teacher_z) for x in names)
    close(unskewed[0], exact[0])
    close(unskewed[1], exact[1])
    for skew in (0.01, 0.1, 0.5, 0.99):
        loss, _ = measure(DIVERGENCES[name], z, LossArgs(skew=skew), teacher_z)
        assert (loss >= -1e-15).all() and (loss <= np.minimum(-np.log(skew), exact[0]) + 1e-12).all()


@pytest.mark.parametrize("name", [n for n in REFERENCE if n != "cross_entropy"])
def test_student_equal_to_teacher_is_a_fixed_point(name):
    """fails if: any term of a loss is scaled or dropped on one side only, opd ignores the student

    With one exception, which is the definition's: sum_S q log(q/p) of raw probabilities is 0 there, its slope
    is not. It still moves mass onto S.
    """
    z = logits(0)
    behavior_N = z.log_softmax(-1)[:, 3]
    advantage_N = ADVANTAGES["opd"](signals(ROWS, student_N=behavior_N, teacher_N=behavior_N), CreditArgs())
    for args in REFERENCE[name][1]:
        loss, grad = measure(DIVERGENCES[name], z, args, z, token_N=torch.full((ROWS,), 3),
                             behavior_N=behavior_N, advantage_N=advantage_N)
        close(loss, 0 * loss, 1e-14)
        if (name, args.topk_form) == ("topk_forward_kl", "truncated"):
            grad = grad - [topk_ref(p, p, args, reverse=False)[1] for p in probs(z)]
        close(grad, 0 * grad, 1e-14)


# Supports of a few tokens.

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


# Policy gradient, and what flows where.

@pytest.mark.parametrize("ratio,advantage,value,live", [
    (1.5, 1.0, -1.2, False), (1.5, -1.0, 1.5, True), (0.5, 1.0, -0.5, True), (0.5, -1.0, 0.8, False),
    (1.1, 2.0, -2.2, True), (0.9, -2.0, 1.8, True), (1.0, 0.7, -0.7, True)])
def test_the_ratio_is_clipped_only_where_it_would_gain(ratio, advantage, value, live):
    """fails if: minimum becomes maximum, clamp loses a side, or the clipped branch stands alone"""
    z = logits(4, rows=6, vocab=7)
    p, token_N = probs(z), torch.arange(6)
    behavior_N = torch.tensor(np.log(p[range(6), range(6)] / ratio))
    loss, grad = measure(DIVERGENCES["policy_gradient"], z, LossArgs(clip=0.2), token_N=token_N,
                         behavior_N=behavior_N, advantage_N=torch.full((6,), advantage, dtype=torch.float64))
    close(loss, np.full(6, value))
    close(grad, -ratio * advantage * (np.eye(7)[:6] - p) if live else 0 * p)


@pytest.mark.parametrize("name,args", CASES, ids=case_id)
def test_only_the_student_gets_a_gradient_and_no_argument_is_written(name, args):
    """fails if: a loss detaches the student, or an in-place op reaches an argument (masked_fill_, neg_)"""
    z = logits(0)
    fields = dict(student_NV=z.log_softmax(-1).requires_grad_(), teacher_NV=logits(1).log_softmax(-1),
                  **sampled_fields(z))
    before = {key: x.detach().clone() for key, x in fields.items()}
    rows = Rows(**fields)
    DIVERGENCES[name](rows, args).sum().backward()
    assert rows.student_NV.grad.isfinite().all()
    for key, x in fields.items():
        assert torch.equal(x.detach(), before[key]), key
        assert key == "student_NV" or (x.grad is None and not x.requires_grad), key


def test_each_divergence_needs_what_its_table_says():
    """fails if: k2 leaves ON_SAMPLES_ONLY, or cross_entropy leaves NEEDS_NO_TEACHER"""
    z, teacher_z = logits(0), logits(1)
    fields = sampled_fields(z)
    other = {**fields, "token_N": (fields["token_N"] + 1) % VOCAB}
    on_token, without_teacher = set(), set()
    for name, loss in DIVERGENCES.items():
        here, there = (measure(loss, z, LossArgs(), teacher_z, **x)[0] for x in (fields, other))
        if (here != there).any():
            on_token.add(name)
        try:
            measure(loss, z, LossArgs(), None, **fields)
            without_teacher.add(name)
        except (AttributeError, TypeError):
            pass
    assert on_token == {*losses_file.ON_SAMPLES_ONLY, "cross_entropy"}
    assert without_teacher == {*losses_file.NEEDS_NO_TEACHER, "policy_gradient"}


# Advantages and weights.

REWARD_B = [1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0]
GROUP_B = [0, 2, 1, 0, 3, 2, 0, 1, 2, 0, 4, 4]         # of 4, 2, 3, 1 and 2 sequences; 1 and 4 are unanimous
SQRT3 = 3 ** 0.5
WITH_STD = {(0, 1): SQRT3 / 2, (0, 0): -SQRT3 / 2, (2, 1): SQRT3 / 3, (2, 0): -2 * SQRT3 / 3}
WITHOUT_STD = {(0, 1): 1 / 2, (0, 0): -1 / 2, (2, 1): 1 / 3, (2, 0): -2 / 3}


@pytest.mark.parametrize("std,table", [(True, WITH_STD), (False, WITHOUT_STD)])
def test_grpo_on_groups_worked_out_by_hand(std, table):
    """fails if: size - 1 becomes size, grpo_std is ignored, or the result is not spread with sequence_N"""
    sequence_N = torch.tensor([3, 3, 0, 7, 1, 5, 5, 5, 2, 4, 6, 8, 9, 10, 11, 0])
    s = signals(12, sequence_N=sequence_N, group_B=torch.tensor(GROUP_B),
                reward_B=torch.tensor(REWARD_B).double())
    advantage_N = ADVANTAGES["grpo"](s, CreditArgs(grpo_std=std))
    close(advantage_N, [table.get((GROUP_B[b], REWARD_B[b]), 0.0) for b in sequence_N], 1e-14)
    assert (advantage_N[[3, 8, 9, 13, 14]] == 0).all()


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_unanimous_group_gets_exactly_zero(dtype, std):
    """fails if: an epsilon replaces the choice on std > 0, or deviations are from a rounded mean of 0.1"""
    sizes = torch.arange(1, 20)
    group_B = torch.arange(len(sizes)).repeat_interleave(sizes)
    for reward in (0.0, 1.0, 0.1, 0.3, -1 / 3):
        reward_B = torch.tensor([reward, 0.7], dtype=dtype)[group_B % 2]
        s = signals(len(group_B), group_B=group_B, reward_B=reward_B)
        assert (ADVANTAGES["grpo"](s, CreditArgs(grpo_std=std)) == 0).all(), reward


@pytest.mark.parametrize("std", [True, False])
def test_grpo_equals_a_loop_over_groups(std):
    """fails if: the statistics are taken over the whole batch, or over rows instead of sequences"""
    rng = np.random.default_rng(0)
    group_B, reward_B = rng.permutation([g for g in range(8) for _ in range(g + 1)]), rng.normal(size=36)
    sequence_N = rng.permutation(np.repeat(np.arange(36), rng.integers(1, 5, 36)))
    expected = np.zeros(36)
    for g in range(8):
        mine = reward_B[group_B == g]
        scale = np.std(mine, ddof=1) if std and len(mine) > 1 else 1.0
        expected[group_B == g] = (mine - mine.mean()) / scale
    s = signals(36, sequence_N=torch.tensor(sequence_N), group_B=torch.tensor(group_B),
                reward_B=torch.tensor(reward_B))
    close(ADVANTAGES["grpo"](s, CreditArgs(grpo_std=std)), expected[sequence_N])


def test_opd_and_the_uniform():
    """fails if: opd changes its sign, or uniform counts sequences instead of rows"""
    s = signals(5, teacher_N=torch.tensor([-1.0, -3.0, -2.5, 0.0, -5.0]), group_B=torch.tensor([0, 0]))
    assert ADVANTAGES["opd"](s, CreditArgs()).tolist() == [0.0, -1.0, 0.5, 4.0, 0.0]      # against -1 ... -5
    assert WEIGHTS["none"](s, CreditArgs()).tolist() == [1.0] * 5


# Diagnostics.

def diagnostics_ref(p, q):
    """One row, sets of tokens, the definitions of arXiv:2604.13016, section 2.3 and eq. 9-10."""
    k = min(16, len(p))
    top_p, top_q = (set(sorted(range(len(x)), key=lambda v: -x[v])[:k]) for x in (p, q))
    shared = sorted(top_p & top_q)
    p_I, q_I = p[shared], q[shared]
    advantage = [pv / p_I.sum() * np.log((qv / q_I.sum()) / (pv / p_I.sum())) for pv, qv in zip(p_I, q_I)]
    entropy_p, entropy_q = -(p * np.log(p)).sum(), -(q * np.log(q)).sum()
    mass = sum(p[v] for v in top_p)
    code = [p[v] / mass * np.log(q[v] / p[v]) for v in shared]
    return {"overlap_advantage_code": sum(code) / k, "overlap_mass_student_code": p_I.sum() if shared else np.nan,
            "overlap_mass_teacher_code": q_I.sum() if shared else np.nan,
            "reverse_kl": sum(p * np.log(p / q)), "forward_kl": sum(q * np.log(q / p)),
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


def test_the_codes_advantage_is_pooled_over_shared_tokens():
    """fails if: rows are averaged first, so that a row with one shared token weighs as much as one with sixteen"""
    z, teacher_z = logits(6, vocab=40), logits(7, vocab=40)
    z[0] = 4 * torch.randn(40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    pooled = []
    for p, q in zip(probs(z), probs(teacher_z)):
        top_p, top_q = (np.argsort(-x)[:16] for x in (p, q))
        pooled += [p[v] / p[top_p].sum() * np.log(q[v] / p[v]) for v in top_p if v in top_q]
    position_N = torch.zeros(len(z), dtype=torch.int64)
    out = summarise(diagnose(z, teacher_z), position_N, position_N + 1)
    close(out["overlap_advantage_code"], np.mean(pooled))
    close(out["overlap_advantage_code/q1"], np.mean(pooled))


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
    result = doctest.testmod(diagnostics_file)
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


# The engine.

TEMPERATURE, N, D, E = 0.7, 7, 5, 9


def engine(dtype=torch.float64):
    """A tied student (embedding = head) with one layer on top, a wider teacher, and the fields of a batch."""
    rng = torch.Generator().manual_seed(8)
    head_VD, layer_DD, *teacher = (
        torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((VOCAB, D), (D, D), (N, E), (VOCAB, E)))
    inputs_N = torch.randint(VOCAB, (N,), generator=rng)
    batch = {name: x[:N] for name, x in sampled_fields(logits(9)).items()}
    scale_N = torch.rand(N, generator=rng, dtype=torch.float64) / 3
    scale_N[2] = 0
    teacher = dict(zip(("teacher_hidden_NE", "teacher_head_VE"), teacher))
    return head_VD, layer_DD, inputs_N, teacher, batch, scale_N


def body(head_VD, layer_DD, inputs_N):
    return (head_VD[inputs_N] @ layer_DD).tanh()


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("name", REFERENCE)
def test_chunked_backward_equals_plain_autograd(name, chunk_rows):
    """fails if: the temperature is forgotten on one side, scale_N is not cut with the chunk, addmm_
    overwrites the gradient already there, a chunk is missed, the loss is differentiated up to the teacher"""
    head_VD, layer_DD, inputs_N, teacher, batch, scale_N = engine()
    loss, args = DIVERGENCES[name], REFERENCE[name][1][-1]
    hidden_ND = body(head_VD, layer_DD, inputs_N)
    with torch.no_grad():
        teacher_z = teacher["teacher_hidden_NE"] @ teacher["teacher_head_VE"].T
    rows = Rows((hidden_ND @ head_VD.T / TEMPERATURE).log_softmax(-1),
                teacher_NV=(teacher_z / TEMPERATURE).log_softmax(-1), **batch)
    plain_N = loss(rows, args)
    grad_VD, grad_DD = torch.autograd.grad((plain_N * scale_N).sum(), (head_VD, layer_DD))
    head_VD.grad = torch.full_like(head_VD, 0.25)
    loss_N, measured = chunked_backward(
        body(head_VD, layer_DD, inputs_N), head_VD, head_VD.grad, batch, scale_N, loss, args,
        temperature=TEMPERATURE, chunk_rows=chunk_rows, diagnose=True, **teacher)
    close(loss_N, plain_N.detach())
    close(head_VD.grad - 0.25, grad_VD)
    close(layer_DD.grad, grad_DD)
    assert all(x.grad is None for x in teacher.values()) and not loss_N.requires_grad
    for key, expected_N in diagnostics(rows).items():
        close(measured[key], expected_N)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_a_frozen_head_and_no_teacher(grad_mode):
    """fails if: head_grad_VD None is not allowed, the loss runs outside enable_grad, or diagnostics want
    a teacher"""
    head_VD, layer_DD, inputs_N, _, batch, scale_N = engine()
    fixed_VD, hidden_ND = head_VD.detach(), body(head_VD, layer_DD, inputs_N)
    loss = DIVERGENCES["policy_gradient"]
    rows = Rows((hidden_ND @ fixed_VD.T).log_softmax(-1), **batch)
    plain = (loss(rows, LossArgs()) * scale_N).sum()
    (grad_DD,) = torch.autograd.grad(plain, layer_DD, retain_graph=True)
    with grad_mode():
        loss_N, measured = chunked_backward(hidden_ND, fixed_VD, None, batch, scale_N, loss, LossArgs(),
                                            temperature=1.0, chunk_rows=3, diagnose=True)
    close(layer_DD.grad, grad_DD)
    assert fixed_VD.grad is None and measured == {} and loss_N.shape == (N,)


def test_absent_fields_stay_absent():
    """fails if: a field of the batch that is None is cut like a tensor, or diagnose False still diagnoses"""
    head_VD, layer_DD, inputs_N, teacher, batch, scale_N = engine()
    batch = {"token_N": batch["token_N"], "behavior_N": None, "advantage_N": None}
    loss_N, measured = chunked_backward(
        body(head_VD, layer_DD, inputs_N), head_VD.detach(), None, batch, scale_N, DIVERGENCES["k2"],
        LossArgs(), temperature=1.0, chunk_rows=4, **teacher)
    assert measured == {} and (loss_N > 0).all()


def run_bf16(name):
    """chunked_backward on bfloat16 states and heads: loss_N, gradients of head and states, what went in."""
    head_VD, layer_DD, inputs_N, teacher, batch, scale_N = engine(torch.bfloat16)
    hidden_ND = body(head_VD, layer_DD, inputs_N).detach().requires_grad_()
    head_grad_VD = torch.zeros(VOCAB, D)
    loss_N, _ = chunked_backward(
        hidden_ND, head_VD.detach(), head_grad_VD, batch, scale_N.float(), DIVERGENCES[name],
        REFERENCE[name][1][-1], temperature=1.0, chunk_rows=3, **teacher)
    assert loss_N.dtype == torch.float32 and hidden_ND.grad.dtype == torch.bfloat16
    tensors = [x.detach() for x in (hidden_ND, head_VD, *teacher.values())]
    return loss_N, head_grad_VD, hidden_ND.grad, tensors, batch["token_N"], scale_N


@pytest.mark.parametrize("cached", [2**19, 3 * D])
@pytest.mark.parametrize("name", [n for n in REFERENCE if n != "policy_gradient"])
def test_bf16_states_are_scored_in_float32(monkeypatch, name, cached):
    """cached: entries of the head's gradient that are added at a time, all or three rows.
    fails if: a part of the head is left out, upcast leaves bfloat16 alone, or the head's gradient is summed over
    chunks in bfloat16. The rounding of the logits themselves is part of the reference; a gradient is rounded once,
    like any product."""
    monkeypatch.setattr(update, "CACHED_GRADIENT", cached)
    loss_N, head_grad_VD, grad_ND, tensors, token_N, scale_N = run_bf16(name)
    hidden_ND, head_VD, teacher_NE, teacher_VE = tensors
    z, teacher_z = (hidden_ND @ head_VD.T).double(), (teacher_NE @ teacher_VE.T).double()
    expected, grad = measure(DIVERGENCES[name], z, REFERENCE[name][1][-1], teacher_z, token_N=token_N)
    grad_NV = scale_N[:, None].numpy() * grad
    np.testing.assert_allclose(loss_N, expected, rtol=1e-5, atol=1e-5)
    size = abs(grad_NV).T @ abs(hidden_ND.double().numpy())      # of the summands: what rounding is relative to
    assert (abs(head_grad_VD.numpy() - grad_NV.T @ hidden_ND.double().numpy()) <= 2.0 ** -7 * size + 1e-6).all()
    assert not torch.equal(head_grad_VD, head_grad_VD.bfloat16().float())
    close(grad_ND.double(), grad_NV @ head_VD.double().numpy(), 0.05)


@pytest.mark.parametrize("name", [n for n in REFERENCE if n not in ("policy_gradient", *TOPK)])
def test_bf16_states_lose_only_the_rounding_of_a_matmul(name):
    """fails if: upcast leaves bfloat16 alone"""
    loss_N, _, _, tensors, token_N, _ = run_bf16(name)
    hidden_ND, head_VD, teacher_NE, teacher_VE = (x.double() for x in tensors)
    args, z, teacher_z = REFERENCE[name][1][-1], hidden_ND @ head_VD.T, teacher_NE @ teacher_VE.T
    expected, _ = measure(DIVERGENCES[name], z, args, teacher_z, token_N=token_N)
    rounding = 2.0 ** -8 * (z.abs().amax(1) + teacher_z.abs().amax(1)).numpy()      # of both sides' logits
    assert (abs(loss_N.numpy() - expected) <= rounding * (1 + expected)).all()


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", *SKEWED])
def test_a_divergence_in_float32_is_never_visibly_negative(name):
    """fails if: upcast leaves bfloat16 alone, or the mixture of jsd is rounded to it"""
    rng = torch.Generator().manual_seed(0)
    hidden_ND, head_VD = (torch.randn(shape, generator=rng).bfloat16() for shape in ((64, 16), (500, 16)))
    batch, near_VD = {"token_N": torch.zeros(64, dtype=torch.int64)}, head_VD * (1 + 2 ** -7)
    for teacher_VD in (head_VD, near_VD):
        loss_N, _ = chunked_backward(
            hidden_ND.clone().requires_grad_(), head_VD, None, batch, torch.ones(64), DIVERGENCES[name],
            LossArgs(), temperature=1.0, chunk_rows=64, teacher_hidden_NE=hidden_ND,
            teacher_head_VE=teacher_VD)
        assert loss_N.isfinite().all() and (loss_N > -1e-6).all()
        assert teacher_VD is near_VD or (loss_N.abs() < 1e-6).all()


@pytest.mark.parametrize("V", [17, 400, 4096, 5003, 151_936])
@pytest.mark.parametrize("k", [1, 16])
def test_the_largest_entries_are_found_block_by_block(V, k):
    """Rows of every shape, the last block shorter: the largest entry at either end, ties, minus infinity.
    fails if: entries past the last whole block are left out, or the order is not falling."""
    x_NV = torch.randn(5, V, generator=torch.Generator().manual_seed(V)).double()
    x_NV[0, -1], x_NV[1, 0], x_NV[2, V // 2:], x_NV[3] = 99.0, 99.0, -torch.inf, 0.0
    id_NK = losses_file.top_ids(x_NV, k)
    assert torch.equal(x_NV.gather(1, id_NK), x_NV.topk(k).values)
    assert all(len(set(row)) == k for row in id_NK.tolist())
    assert id_NK[0, 0] == V - 1 and id_NK[1, 0] == 0
