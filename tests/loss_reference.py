"""What the tests of losses.py share: inputs, how a loss is measured, and each divergence written out once more.

Exact mathematics in float64 on small vocabularies, probabilities down to 1e-25. A gradient is with respect to
the logits z of p = softmax(z); a reference sees one row as numpy arrays p and q, returns (value, gradient). The
claims at the end are checked of the entries of the core (core/test_losses.py) and of extras alike.
"""
from itertools import product
from types import SimpleNamespace

import numpy as np
import torch

from losses import ADVANTAGES, DIVERGENCES, LossArgs, Rows, Signals, chunked_backward
from support.metrics import diagnostics, observe
from teacher import Part


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
    return dict(token_N=token_N, behavior_logp_N=behavior_N, advantage_N=advantage_N)


def signals(rows=5, **fields):
    """Signals of one-token sequences unless told otherwise."""
    n = torch.arange(rows)
    base = dict(token_N=0 * n, behavior_logp_N=-n.double() - 1, student_entropy_N=n.double(), sequence_N=n,
                position_N=0 * n, length_B=0 * n + 1, group_B=0 * n, finished_B=n >= 0)
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
}


CASES = [(name, args) for name, (_, all_args) in REFERENCE.items() for args in all_args]


def case_id(x):
    """What differs from the defaults."""
    if not isinstance(x, LossArgs):
        return str(x)
    return "-".join(f"{k}={v}" for k, v in vars(x).items() if v != getattr(LossArgs(), k)) or "defaults"


# Claims about one entry, for every entry of the table.

def equals_the_formula(name, args, reference):
    """Value and gradient of each row."""
    z, teacher_z = logits(0), logits(1)
    fields = sampled_fields(z)
    loss, grad = measure(DIVERGENCES[name], z, args, teacher_z, **fields)
    for n, (p, q) in enumerate(zip(probs(z), probs(teacher_z))):
        value, gradient = reference(p, q, args=args, a=int(fields["token_N"][n]),
                                    log_b=fields["behavior_logp_N"][n].item(),
                                    advantage=fields["advantage_N"][n].item())
        close(loss[n], value)
        close(grad[n], gradient)


def rests_at_the_teacher(name, all_args):
    """No loss and no gradient where student and teacher are equal.

    With one exception, which is the definition's: sum_S q log(q/p) of raw probabilities is 0 there, its slope
    is not. It still moves mass onto S.
    """
    z = logits(0)
    behavior_logp_N = z.log_softmax(-1)[:, 3]
    s = signals(ROWS, behavior_logp_N=behavior_logp_N, teacher_logp_N=behavior_logp_N)
    advantage_N = ADVANTAGES["opd"](s, LossArgs())
    for args in all_args:
        loss, grad = measure(DIVERGENCES[name], z, args, z, token_N=torch.full((ROWS,), 3),
                             behavior_logp_N=behavior_logp_N, advantage_N=advantage_N)
        close(loss, 0 * loss, 1e-14)
        if (name, args.topk_form) == ("topk_forward_kl", "truncated"):
            grad = grad - [topk_ref(p, p, args, reverse=False)[1] for p in probs(z)]
        close(grad, 0 * grad, 1e-14)


def moves_the_student_only(name, args):
    """The teacher gets no gradient, and no argument is written."""
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


# The engine: a tied student (embedding = head) with one layer on top, a wider teacher, and the fields of a batch.

TEMPERATURE, N, D, E = 0.7, 7, 5, 9


def engine(dtype=torch.float64):
    """(head, layer, inputs, (teacher's states, teacher's head), fields_N, scale_N)"""
    rng = torch.Generator().manual_seed(8)
    head_VD, layer_DD, *teacher = (
        torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in ((VOCAB, D), (D, D), (N, E), (VOCAB, E)))
    inputs_N = torch.randint(VOCAB, (N,), generator=rng)
    fields_N = {name: x[:N] for name, x in sampled_fields(logits(9)).items()}
    scale_N = torch.rand(N, generator=rng, dtype=torch.float64) / 3
    scale_N[2] = 0
    return head_VD, layer_DD, inputs_N, teacher, fields_N, scale_N


def body(head_VD, layer_DD, inputs_N):
    return (head_VD[inputs_N] @ layer_DD).tanh()


def engine_args(args, temperature=1.0, chunk_rows=3):
    return SimpleNamespace(**vars(args), temperature=temperature, chunk_rows=chunk_rows)


def teacher_part(hidden_NE, head_VE, args, token_N=None):
    """What a teacher says that has a state for every row."""
    place_N = torch.arange(len(hidden_NE))
    return Part(0 * place_N[:1], place_N, hidden_NE, head_VE, 0 * place_N if token_N is None else token_N, args)


def run_engine(hidden_ND, head_VD, head_grad_VD, part, fields_N, scale_N, name, args, observe=observe):
    """(loss_N, noted) of losses.chunked_backward on rows that are a whole step."""
    return chunked_backward(hidden_ND, torch.arange(len(hidden_ND)), (head_VD, head_grad_VD), part, fields_N, scale_N,
                            DIVERGENCES[name], args, observe)


def chunks_equal_plain_autograd(name, args, chunk_rows):
    """Loss, both gradients and what is noted, beside a gradient that was there before."""
    head_VD, layer_DD, inputs_N, (teacher_NE, teacher_VE), fields_N, scale_N = engine()
    args = engine_args(args, TEMPERATURE, chunk_rows)
    hidden_ND = body(head_VD, layer_DD, inputs_N)
    with torch.no_grad():
        teacher_z = teacher_NE @ teacher_VE.T
    rows = Rows((hidden_ND @ head_VD.T / TEMPERATURE).log_softmax(-1),
                teacher_NV=(teacher_z / TEMPERATURE).log_softmax(-1), **fields_N)
    plain_N = DIVERGENCES[name](rows, args)
    grad_VD, grad_DD = torch.autograd.grad((plain_N * scale_N).sum(), (head_VD, layer_DD))
    head_VD.grad = torch.full_like(head_VD, 0.25)
    loss_N, noted = run_engine(body(head_VD, layer_DD, inputs_N), head_VD, head_VD.grad,
                               teacher_part(teacher_NE, teacher_VE, args), fields_N, scale_N, name, args)
    close(loss_N, plain_N.detach())
    close(head_VD.grad - 0.25, grad_VD)
    close(layer_DD.grad, grad_DD)
    assert teacher_NE.grad is None and teacher_VE.grad is None and not loss_N.requires_grad
    gap_N = (rows.student_logp_N() - rows.behavior_logp_N).abs().detach()
    for key, expected_N in {**diagnostics(rows), "sampler_gap": gap_N}.items():
        close(noted[key], expected_N)


def run_bf16(name, args):
    """The engine on bfloat16 states and heads: loss_N, gradients of head and states, what went in."""
    head_VD, layer_DD, inputs_N, teacher, fields_N, scale_N = engine(torch.bfloat16)
    hidden_ND = body(head_VD, layer_DD, inputs_N).detach().requires_grad_()
    head_grad_VD, args = torch.zeros(VOCAB, D), engine_args(args)
    loss_N, _ = run_engine(hidden_ND, head_VD.detach(), head_grad_VD, teacher_part(*teacher, args), fields_N,
                           scale_N.float(), name, args)
    assert loss_N.dtype == torch.float32 and hidden_ND.grad.dtype == torch.bfloat16
    tensors = [x.detach() for x in (hidden_ND, head_VD, *teacher)]
    return loss_N, head_grad_VD, hidden_ND.grad, tensors, fields_N["token_N"], scale_N


def bf16_is_scored_in_float32(name, args):
    """The rounding of the logits themselves is part of the reference; a gradient is rounded once, like any product."""
    loss_N, head_grad_VD, grad_ND, tensors, token_N, scale_N = run_bf16(name, args)
    hidden_ND, head_VD, teacher_NE, teacher_VE = tensors
    z, teacher_z = (hidden_ND @ head_VD.T).double(), (teacher_NE @ teacher_VE.T).double()
    expected, grad = measure(DIVERGENCES[name], z, args, teacher_z, token_N=token_N)
    grad_NV = scale_N[:, None].numpy() * grad
    np.testing.assert_allclose(loss_N, expected, rtol=1e-5, atol=1e-5)
    size = abs(grad_NV).T @ abs(hidden_ND.double().numpy())      # of the summands: what rounding is relative to
    assert (abs(head_grad_VD.numpy() - grad_NV.T @ hidden_ND.double().numpy()) <= 2.0 ** -7 * size + 1e-6).all()
    assert not torch.equal(head_grad_VD, head_grad_VD.bfloat16().float())
    close(grad_ND.double(), grad_NV @ head_VD.double().numpy(), 0.05)


def bf16_loses_the_rounding_of_a_matmul(name, args):
    """Against float64 all the way."""
    loss_N, _, _, tensors, token_N, _ = run_bf16(name, args)
    hidden_ND, head_VD, teacher_NE, teacher_VE = (x.double() for x in tensors)
    z, teacher_z = hidden_ND @ head_VD.T, teacher_NE @ teacher_VE.T
    expected, _ = measure(DIVERGENCES[name], z, args, teacher_z, token_N=token_N)
    rounding = 2.0 ** -8 * (z.abs().amax(1) + teacher_z.abs().amax(1)).numpy()      # of both sides' logits
    assert (abs(loss_N.numpy() - expected) <= rounding * (1 + expected)).all()
