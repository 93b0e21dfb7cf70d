"""losses.py: the two brakes on full-vocabulary divergences, and eopd.

Numbers of OPSD (arXiv:2601.18734 v3) on one row of four tokens, formulas on random rows, float64. Helpers and the
references of the plain losses: loss_reference.py.
"""
import numpy as np
import pytest
import torch
from loss_reference import (ROWS, VOCAB, case_id, close, engine_args, logits, measure, pg_ref, probs, reverse_ref,
                            run_engine, sampled_fields, signals, teacher_part, through_softmax)

from losses import ADVANTAGES, DIVERGENCES, LossArgs, Rows

P, Q = (torch.tensor([x], dtype=torch.float64) for x in ((0.05, 0.80, 0.10, 0.05), (0.60, 0.30, 0.06, 0.04)))
FULL = ("reverse_kl", "forward_kl", "jsd", "skewed_forward_kl", "skewed_reverse_kl")


# The published row.

@pytest.mark.parametrize("name,args,value", [
    ("forward_kl", dict(), 1.157120), ("forward_kl", dict(entry_clip=0.05), -0.283824),
    ("forward_kl", dict(entry_clip=0.06), -0.273824), ("forward_kl", dict(entry_clip=1.490943), 1.157119),
    ("reverse_kl", dict(), 0.722658), ("reverse_kl", dict(entry_clip=0.05), -0.013088),
    ("jsd", dict(beta=0.5), 0.198898), ("jsd", dict(beta=0.5, entry_clip=0.05), 0.102805),
    ("jsd", dict(beta=0.3), 0.182657), ("jsd", dict(beta=0.3, entry_clip=0.05), 0.098976),
    ("forward_kl", dict(token_clip=0.05), 0.05), ("forward_kl", dict(token_clip=1.2), 1.157120),
    ("forward_kl", dict(entry_clip=0.05, token_clip=0.01), -0.283824)], ids=str)
def test_values_of_the_published_row(name, args, value):
    """fails if: the clip acts on the sum or on both sides, beta weighs the student, token_clip scales small
    tokens up"""
    close(measure(DIVERGENCES[name], P.log(), LossArgs(**args), Q.log())[0], [value], 6e-7)


@pytest.mark.parametrize("name,clip,gradient", [
    ("forward_kl", 0.0, (-0.55, 0.50, 0.04, 0.01)), ("forward_kl", 0.05, (0.02, 0.02, -0.02, -0.02)),
    ("reverse_kl", 0.0, (-0.160378, 0.206537, -0.021183, -0.024976))])
def test_gradients_of_the_published_row(name, clip, gradient):
    """fails if: clipped entries keep a gradient of their own, or lose their share of the normaliser"""
    close(measure(DIVERGENCES[name], P.log(), LossArgs(entry_clip=clip), Q.log())[1], [gradient], 6e-7)


@pytest.mark.parametrize("clip,value", [(0.0, 0.960391), (0.05, -0.274709)])
def test_the_published_row_at_temperature_1_1(clip, value):
    """fails if: one side is not divided by the temperature, or the loss is multiplied by its square"""
    states_ND, eye_VD = P.log().requires_grad_(), torch.eye(4, dtype=torch.float64)
    args = engine_args(LossArgs(entry_clip=clip), 1.1, chunk_rows=1)
    loss_N, _ = run_engine(states_ND, eye_VD, None, teacher_part(Q.log(), eye_VD, args),
                           {"token_N": torch.zeros(1, dtype=torch.int64)}, torch.ones(1), "forward_kl", args,
                           observe=lambda rows, top_ids_NK: {})
    close(loss_N, [value], 6e-7)
    p, q = (x.pow(1 / 1.1) / x.pow(1 / 1.1).sum() for x in (P[0], Q[0]))
    keep = (q * (q / p).log() < clip) | (clip == 0)
    close(states_ND.grad, [((q[keep].sum() * p - q * keep) / 1.1).tolist()])


def test_the_sampled_advantage_of_the_published_row():
    """fails if: the advantage is the cost log p - log q: its mean under p is minus the reverse KL"""
    s = signals(4, behavior_logp_N=P[0].log(), teacher_logp_N=Q[0].log())
    advantage_N = ADVANTAGES["opd"](s, LossArgs())
    close(advantage_N, [2.484907, -0.980829, -0.510826, -0.223144], 6e-7)
    close(P[0] @ advantage_N, -0.722658, 6e-7)


# entry_clip: what a gradient through min(term, t) is, entry by entry.

def terms_and_slopes(name, p, q, args):
    """Every entry's term and its derivative in p."""
    if name == "forward_kl":
        return q * np.log(q / p), -q / p
    if name == "reverse_kl":
        return p * np.log(p / q), np.log(p / q) + 1
    if name == "jsd":
        b = args.beta
        m = b * q + (1 - b) * p
        return (b * q * np.log(q / m) + (1 - b) * p * np.log(p / m),
                (1 - b) * (np.log(p / m) + 1 - (b * q + (1 - b) * p) / m))
    s = args.skew
    if name == "skewed_forward_kl":
        m = (1 - s) * p + s * q
        return q * np.log(q / m), -(1 - s) * q / m
    m = (1 - s) * q + s * p
    return p * np.log(p / m), np.log(p / m) + 1 - s * p / m


@pytest.mark.parametrize("clip", [0.5, 0.05, 1e-6])
@pytest.mark.parametrize("name", FULL)
def test_an_entry_clip_equals_the_formula(name, clip):
    """fails if: a full-vocabulary divergence sums without vocab_sum, the clip takes the absolute value, or a
    clipped entry's slope survives"""
    z, teacher_z, args = logits(0), logits(1), LossArgs(entry_clip=clip, beta=0.3)
    loss, grad = measure(DIVERGENCES[name], z, args, teacher_z)
    clipped = 0
    for n, (p, q) in enumerate(zip(probs(z), probs(teacher_z))):
        term, slope = terms_and_slopes(name, p, q, args)
        inside = term < clip
        clipped += (~inside).sum()
        close(loss[n], np.minimum(term, clip).sum())
        close(grad[n], through_softmax(p, np.where(inside, slope, 0.0)))
        if name == "forward_kl":
            close(grad[n], q[inside].sum() * p - q * inside)        # Q p - q on U
            close(inside, p / q > np.exp(-clip / q))                # who is clipped, said in ratios
            assert (grad[n][~inside] >= 0).all()        # what the teacher wants to raise most goes down
    bounded = ("jsd", "skewed_reverse_kl", "skewed_forward_kl")
    assert clipped > 20 or clip == 0.5 and name in bounded


def test_the_minimum_of_the_clipped_forward_kl_lies_away_from_the_teacher():
    """fails if: the clip is a cap on the token, whose minimum is 0 at p = q"""
    rest, args = Q[0, 1:].sum().item(), LossArgs(entry_clip=0.05)
    p = torch.cat([torch.tensor([[1e-12]]), Q[:, 1:] / rest], 1)        # the teacher without its first token
    loss, grad = measure(DIVERGENCES["forward_kl"], p.log(), args, Q.log())
    close(loss, [rest * np.log(rest) + 0.05])
    close(grad, np.zeros((1, 4)))
    assert loss[0] < measure(DIVERGENCES["forward_kl"], Q.log(), args, Q.log())[0][0] == 0


def descend(starts, target, args, steps=3000):
    z = torch.tensor(starts, dtype=torch.float64).log().requires_grad_()
    q = torch.tensor([target] * len(starts), dtype=torch.float64).log()
    for _ in range(steps):
        rows = Rows(z.log_softmax(-1), torch.zeros(len(starts), dtype=torch.int64), q)
        (grad,) = torch.autograd.grad(DIVERGENCES["forward_kl"](rows, args).sum(), z)
        z.data -= grad
    return z.softmax(-1).detach()


def test_entry_clip_is_a_gate_and_token_clip_a_brake():
    """fails if: token_clip's factor is differentiated or clips entries; entry_clip only scales a token down

    From a small distance both reach the teacher; from a larger one the entry clip walks away from it.
    """
    near, far, q = (0.33, 0.58, 0.05, 0.04), (0.30, 0.60, 0.06, 0.04), (0.36, 0.55, 0.05, 0.04)
    gate = descend([near, far], q, LossArgs(entry_clip=0.05))
    close(gate[0], q, 1e-6)
    close(gate[1], (0.0, 0.859, 0.078, 0.0625), 2e-3)
    close(descend([near, far, P[0].tolist()], q, LossArgs(token_clip=0.05)), [q] * 3, 1e-6)


# token_clip.

@pytest.mark.parametrize("clip", [0.01, 0.3, 100.0])
@pytest.mark.parametrize("name", FULL)
def test_a_token_clip_keeps_the_direction(name, clip):
    """fails if: the factor carries a gradient, is shared by the rows, or divides by a sum below the clip"""
    z, teacher_z = logits(0), logits(1)
    plain, gradient = measure(DIVERGENCES[name], z, LossArgs(), teacher_z)
    loss, grad = measure(DIVERGENCES[name], z, LossArgs(token_clip=clip), teacher_z)
    factor = np.minimum(1, clip / plain)
    close(loss, np.minimum(plain, clip))
    close(grad, factor[:, None] * gradient)
    assert (factor < 1).any() == (clip < plain.max())
    same, at_rest = measure(DIVERGENCES[name], teacher_z, LossArgs(token_clip=clip), teacher_z)
    close(same, 0 * same, 1e-14)
    close(at_rest, 0 * at_rest, 1e-14)


@pytest.mark.parametrize("name,args", [
    ("forward_kl", LossArgs(entry_clip=0.05)), ("jsd", LossArgs(entry_clip=0.05)),
    ("reverse_kl", LossArgs(token_clip=0.1)),
    ("eopd", LossArgs(topk=3)), ("eopd", LossArgs(topk=3, eopd_renormalise=True, eopd_entropy=0.0))],
    ids=case_id)
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
def test_chunks_change_nothing(name, args, chunk_rows):
    """fails if: a clip or gate looks at more than its own row"""
    z, teacher_z, eye_VD = logits(0), logits(1), torch.eye(VOCAB, dtype=torch.float64)
    fields, scale_N = sampled_fields(z), torch.linspace(0, 1, ROWS, dtype=torch.float64)
    loss, grad = measure(DIVERGENCES[name], z, args, teacher_z, **fields)
    states_ND, head_grad_VD = z.clone().requires_grad_(), torch.zeros_like(eye_VD)
    args = engine_args(args, chunk_rows=chunk_rows)
    part = teacher_part(teacher_z, eye_VD, args)
    loss_N, _ = run_engine(states_ND, eye_VD, head_grad_VD, part, fields, scale_N, name, args)
    close(loss_N, loss)
    scaled = scale_N[:, None].numpy() * grad
    close(states_ND.grad, scaled)
    close(head_grad_VD, scaled.T @ z.numpy())


# EOPD: arXiv:2603.07079.

def forward_part(p, q, args):
    """(value, gradient) of what eopd adds on one row."""
    if -(q * np.log(q)).sum() <= args.eopd_entropy:
        return 0.0, 0 * p
    w = np.where(np.isin(np.arange(len(q)), np.argsort(-q)[:args.topk]), q, 0.0)
    if args.eopd_renormalise:
        w = w / w.sum()
    inside = w > 0
    value = (w[inside] * np.log(w[inside] / p[inside])).sum()
    return args.eopd_alpha * value, args.eopd_alpha * (p * w.sum() - w)


EOPD = [LossArgs(topk=k, eopd_renormalise=renormalise, eopd_entropy=entropy, eopd_alpha=alpha)
        for k, renormalise, entropy, alpha in (
            (16, False, 0.8, 1.0), (3, False, 0.8, 1.0), (3, True, 0.8, 1.0), (1, False, -1.0, 0.5),
            (1, True, -1.0, 2.0),
            (VOCAB, True, 0.3, 1.0), (5, False, 100.0, 1.0), (5, False, -1.0, 0.0))]


@pytest.mark.parametrize("args", EOPD, ids=case_id)
def test_eopd_equals_the_formula(args):
    """fails if: the forward KL replaces the policy gradient, p is renormalised too, the top-k is the
    student's, the gate reads the student's entropy or opens below its threshold"""
    z, teacher_z = logits(0), logits(1)
    fields = sampled_fields(z)
    loss, grad = measure(DIVERGENCES["eopd"], z, args, teacher_z, **fields)
    opened = 0
    for n, (p, q) in enumerate(zip(probs(z), probs(teacher_z))):
        base, slope = pg_ref(p, q, args, int(fields["token_N"][n]), fields["behavior_logp_N"][n].item(),
                             fields["advantage_N"][n].item())
        value, gradient = forward_part(p, q, args)
        opened += (gradient != 0).any()
        close(loss[n], base + value)
        close(grad[n], slope + gradient)
    assert 0 < opened < ROWS or args.eopd_entropy in (-1.0, 100.0)
    if not opened:
        plain = measure(DIVERGENCES["policy_gradient"], z, args, teacher_z, **fields)
        assert (loss == plain[0]).all() and (grad == plain[1]).all()


@pytest.mark.parametrize("args", EOPD[:3], ids=case_id)
def test_what_eopd_does_on_average(args):
    """fails if: the forward part depends on the sampled token, or the advantage is detached from log p(a)

    Weighted with the p(a) that would draw it: the gradient of KL(p||q) everywhere, and the forward part where
    the gate is open.
    """
    z, teacher_z = logits(2, scales=(1.0, 3.0)), logits(3, scales=(1.0, 3.0))
    expected = 0
    for a in range(VOCAB):
        behavior_logp_N, teacher_logp_N = (x.log_softmax(-1)[:, a] for x in (z, teacher_z))
        _, grad = measure(DIVERGENCES["eopd"], z, args, teacher_z, token_N=torch.full((ROWS,), a),
                          behavior_logp_N=behavior_logp_N,
                          advantage_N=teacher_logp_N - behavior_logp_N)
        expected = expected + probs(z)[:, a:a + 1] * grad
    close(expected, [reverse_ref(p, q)[1] + forward_part(p, q, args)[1]
                     for p, q in zip(probs(z), probs(teacher_z))])


def test_the_eopd_gate_is_strict_and_reads_the_whole_vocabulary():
    """fails if: > becomes >=, or the entropy is that of the renormalised top-k"""
    z, teacher_z = logits(0), logits(1, scales=(1.0,))
    fields, q_NV = sampled_fields(z), teacher_z.log_softmax(-1)
    entropy_N = -(q_NV.exp() * q_NV).sum(-1)
    plain, _ = measure(DIVERGENCES["policy_gradient"], z, LossArgs(), teacher_z, **fields)
    for n in range(3):
        for nudge, opened in ((0.0, False), (-1e-12, True)):
            args = LossArgs(topk=2, eopd_entropy=entropy_N[n].item() + nudge)
            assert (measure(DIVERGENCES["eopd"], z, args, teacher_z, **fields)[0][n] != plain[n]) == opened
