"""losses.py, divergences: every value and gradient equals a formula written out in loss_reference.py, and every sampled
estimate the enumeration of what could have been sampled. Supports of a few tokens: test_losses_topk.py; clips and eopd:
test_losses_clip.py; the chunked backward pass: test_engine.py.
"""
from itertools import product

import numpy as np
import pytest
import torch
from loss_reference import (CASES, REFERENCE, ROWS, SKEWED, VOCAB, case_id, close, equals_the_formula, forward_ref,
                            logits, measure, moves_the_student_only, probs, rests_at_the_teacher, reverse_ref,
                            sampled_fields, signals)

import losses
from losses import ADVANTAGES, DIVERGENCES, LossArgs

NEWER = {"veto", "tropd"}                # extras/test_newer.py
OF_EXTRAS = {"uld", "gold", *NEWER}     # extras/test_uld_and_gold.py


def test_every_entry_of_every_table_is_tested():
    """fails if: an entry is added to DIVERGENCES without a reference here (eopd has its own tests)"""
    assert set(DIVERGENCES) - OF_EXTRAS == {*REFERENCE, "eopd"}
    assert probs(logits(0)).min() < 1e-25 and probs(logits(1)).min() < 1e-25


@pytest.mark.parametrize("name,args", CASES, ids=case_id)
def test_value_and_gradient_equal_the_formula(name, args):
    """fails if: beta and 1 - beta are swapped, the fixed weight of `truncated` loses its detach, tail_term
    takes 1 - (mass on the support), a sign or a factor changes anywhere"""
    equals_the_formula(name, args, REFERENCE[name][0])


# What the sampled losses do on average: every token a, weighted with the p(a) that would draw it.

def k1(r, args):
    return r.student_logp_N() - r.teacher_logp_N()


def k3(r, args):
    log_ratio_N = r.teacher_logp_N() - r.student_logp_N()
    return log_ratio_N.exp() - 1 - log_ratio_N


def on_policy_gradient(r, args):
    """policy_gradient as a run has it: behaviour = student, advantage from the table."""
    behavior_N = r.student_logp_N().detach()
    s = signals(len(behavior_N), behavior_logp_N=behavior_N, teacher_logp_N=r.teacher_logp_N())
    advantage_N = ADVANTAGES["opd"](s, LossArgs())
    return DIVERGENCES["policy_gradient"](r._replace(behavior_logp_N=behavior_N, advantage_N=advantage_N), args)


def constant_advantage(r, args):
    """An advantage that knows the prefix but not the token: the KL itself."""
    kl_N = (r.teacher_NV.exp() * (r.teacher_NV - r.student_NV)).sum(-1).detach()
    on_policy = r._replace(behavior_logp_N=r.student_logp_N().detach(), advantage_N=kl_N)
    return DIVERGENCES["policy_gradient"](on_policy, args)


def zero_ref(p, q):
    return None, 0 * p


@pytest.mark.parametrize("estimate,reference", [
    (on_policy_gradient, reverse_ref), (DIVERGENCES["k2"], reverse_ref), (k1, zero_ref), (k3, forward_ref),
    (constant_advantage, zero_ref), (DIVERGENCES["cross_entropy"], zero_ref)],
    ids=["policy_gradient", "k2", "k1", "k3", "constant_advantage", "cross_entropy"])
def test_expected_gradient_of_a_sampled_estimate(estimate, reference):
    """fails if: k2 loses its / 2, opd changes its sign, policy_gradient squares the ratio or
    centres the advantage, Rows.teacher_logp_N reads the student (k3), Rows.student_logp_N is not a log (k1)"""
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
    """fails if: any term of a loss is scaled or dropped on one side only, opd ignores the student"""
    rests_at_the_teacher(name, REFERENCE[name][1])


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
                         behavior_logp_N=behavior_N, advantage_N=torch.full((6,), advantage, dtype=torch.float64))
    close(loss, np.full(6, value))
    close(grad, -ratio * advantage * (np.eye(7)[:6] - p) if live else 0 * p)


@pytest.mark.parametrize("name,args", CASES, ids=case_id)
def test_only_the_student_gets_a_gradient_and_no_argument_is_written(name, args):
    """fails if: a loss detaches the student, or an in-place op reaches an argument (masked_fill_, neg_)"""
    moves_the_student_only(name, args)


def test_each_divergence_needs_what_its_table_says():
    """fails if: k2 leaves ON_SAMPLES_ONLY, or cross_entropy leaves NEEDS_NO_TEACHER"""
    z, teacher_z = logits(0), logits(1)
    fields = sampled_fields(z)
    other = {**fields, "token_N": (fields["token_N"] + 1) % VOCAB}
    on_token, without_teacher = set(), set()
    for name, loss in ((name, loss) for name, loss in DIVERGENCES.items() if name not in NEWER):
        here, there = (measure(loss, z, LossArgs(), teacher_z, **x)[0] for x in (fields, other))
        if (here != there).any():
            on_token.add(name)
        try:
            measure(loss, z, LossArgs(), None, **fields)
            without_teacher.add(name)
        except (AttributeError, TypeError):
            pass
    assert on_token == {*losses.ON_SAMPLES_ONLY, "cross_entropy"} - NEWER
    assert without_teacher == {*losses.NEEDS_NO_TEACHER, "policy_gradient"}
