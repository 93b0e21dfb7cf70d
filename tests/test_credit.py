"""credit.py: every advantage and weight equals a loop over sequences and groups, and numbers by hand.

The loops see plain Python lists and the papers' formulas, in other algebra than credit.py where there is a
choice. Exact in float64. Here too: the phased weight of teacher responses, what recipes need, and that every
table entry has a test and a README row.
"""
import math
import re
import sys
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import config  # noqa: E402
import train  # noqa: E402
from credit import ADVANTAGES, NEEDS, WEIGHTS, CreditArgs, Signals, supervised  # noqa: E402
from losses import DIVERGENCES  # noqa: E402
from prepare import needs  # noqa: E402
from step import phased_weight  # noqa: E402

F64 = torch.float64
GROUP_B = [0, 2, 1, 0, 3, 2, 0, 1, 2, 0, 4, 4]          # of 4, 2, 3, 1 and 2 sequences
REWARD_B = [1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0]         # groups 1, 3 and 4 are unanimous
PER_ROW = ("token_N", "student_N", "student_entropy_N", "teacher_N", "teacher_entropy_N", "reference_N",
           "kl_N")


# One step, and the same step as plain lists.

def a_step(seed=0, dtype=F64, **fields):
    """Twelve responses of 1 to 6 tokens to five problems; two teachers, some cut, a token past uni_guard."""
    rng = torch.Generator().manual_seed(seed)
    length_B = torch.randint(1, 7, (12,), generator=rng)
    n = int(length_B.sum())
    student_N, teacher_N, reference_N = -3 * torch.rand(3, n, generator=rng, dtype=dtype)
    teacher_N[n // 2] -= 12
    student_entropy_N, teacher_entropy_N, kl_N = 2 * torch.rand(3, n, generator=rng, dtype=dtype)
    base = dict(token_N=torch.randint(9, (n,), generator=rng),
                student_N=student_N, student_entropy_N=student_entropy_N,
                sequence_N=torch.arange(12).repeat_interleave(length_B),
                position_N=torch.cat([torch.arange(length) for length in length_B.tolist()]),
                length_B=length_B,
                group_B=torch.tensor(GROUP_B), finished_B=torch.rand(12, generator=rng) < 0.8,
                teacher_B=torch.randint(2, (12,), generator=rng), teacher_N=teacher_N,
                teacher_entropy_N=teacher_entropy_N, reference_N=reference_N, kl_N=kl_N,
                reward_B=torch.tensor(REWARD_B).to(dtype), progress=0.3, seed=seed)
    return Signals(**{**base, **fields})


def of_lists(group=None, reward=None, finished=None, dtype=F64, **rows):
    """Signals of sequences written out: teacher=[[-1.0, -2.0], [-3.0]], ... one inner list per sequence."""
    names = {"teacher": "teacher_N", "student": "student_N", "reference": "reference_N", "kl": "kl_N",
             "token": "token_N",
             "teacher_entropy": "teacher_entropy_N", "student_entropy": "student_entropy_N"}
    shape = next(iter(rows.values()))
    flat = {names[key]: torch.tensor(sum(value, []), dtype=torch.int64 if key == "token" else dtype)
            for key, value in rows.items()}
    length_B = torch.tensor([len(row) for row in shape])
    zeros_N = torch.zeros(int(length_B.sum()), dtype=dtype)
    B = len(shape)
    base = dict(token_N=zeros_N.long(), student_N=zeros_N, student_entropy_N=zeros_N, length_B=length_B,
                sequence_N=torch.arange(B).repeat_interleave(length_B),
                position_N=torch.cat([torch.arange(len(row)) for row in shape]),
                group_B=torch.tensor(group or [0] * B), finished_B=torch.tensor(finished or [True] * B),
                reward_B=None if reward is None else torch.tensor(reward, dtype=dtype))
    return Signals(**{**base, **flat})


def lists(s):
    """One namespace per sequence: log-probs q, b, r of teacher, behaviour, reference; entropies; kl."""
    step = []
    for b, length in enumerate(s.length_B.tolist()):
        rows = (s.sequence_N == b).nonzero().squeeze(1).tolist()
        assert len(rows) == length
        token, sampled, H_S, q, H_T, r, kl = ([getattr(s, name)[i].item() for i in rows] for name in PER_ROW)
        step.append(SimpleNamespace(
            token=token, b=sampled, H_S=H_S, q=q, H_T=H_T, r=r, kl=kl, group=GROUP_B[b],
            right=REWARD_B[b] == 1, finished=bool(s.finished_B[b]), teacher=int(s.teacher_B[b])))
    return step


def close(value_N, rows, atol=1e-12):
    expected = [x for row in rows for x in row] if isinstance(rows[0], list) else rows
    torch.testing.assert_close(value_N, torch.as_tensor(expected, dtype=value_N.dtype), rtol=0, atol=atol)


def advantage(name, s, **args):
    return ADVANTAGES[name](s, CreditArgs(**args))


def weight(name, s, **args):
    return WEIGHTS[name](s, CreditArgs(**args))


def args_id(x):
    if not isinstance(x, CreditArgs):
        return str(x)
    return ",".join(f"{k}={v}" for k, v in vars(x).items() if v != getattr(CreditArgs(), k)) or "defaults"


# The loops: (step, y, args) -> one number per token of y.

def mates(step, y, side=None):
    return [z for z in step if z.group == y.group and (side is None or z.right == side)]


def opd_ref(step, y, args):
    T = len(y.q)
    return [sum(args.discount ** (j - t) * (y.q[j] - y.b[j]) for j in range(t, T)) for t in range(T)]


def grpo_ref(step, y, args):
    rewards = [float(z.right) for z in mates(step, y)]
    if len(set(rewards)) == 1:
        return [0.0] * len(y.q)
    return [(y.right - mean(rewards)) / (stdev(rewards) if args.grpo_std else 1)] * len(y.q)


def exopd_ref(step, y, args):
    return [args.extrapolate * (q - r) - (b - r) for q, b, r in zip(y.q, y.b, y.r)]


def sg_ref(step, y, args):
    mixed = len({z.right for z in mates(step, y)}) == 2
    out = []
    for q, b, r in zip(y.q, y.b, y.r):
        agree = mixed and y.finished and (q > b if y.right else q < b)
        k = args.sg_agree if agree or args.sg_gate == "all" else args.sg_conflict
        out.append(k * (q - r) - (b - r) if args.sg_form == "reference" else k * (q - b))
    return out


def opdvr_ref(step, y, args):
    return [max(0.0, q - b) if y.right else min(0.0, q - b) for q, b in zip(y.q, y.b)]


def kdrl_ref(step, y, args):
    coef = 0.7 * args.kdrl_coef + 0.3 * args.kdrl_coef_end          # progress 0.3
    masked = {"none": False, "response": y.right,
              "group": any(z.right for z in mates(step, y))}[args.kdrl_mask]
    return [a + (0.0 if masked else coef * (q - b)) for a, q, b in zip(grpo_ref(step, y, args), y.q, y.b)]


def uni_ref(step, y, args):
    right, wrong = ([mean(opd_ref(step, z, args)) for z in mates(step, y, side)] for side in (True, False))
    shift = 0.0
    if right and wrong:
        gap = mean(right) - mean(wrong) if args.uni_gap == "mean" else min(right) - max(wrong)
        shift = (args.uni_margin - gap) / 2 if gap < args.uni_margin else 0.0
    return [0.0 if abs(q - b) >= args.uni_guard else q - b + (shift if y.right else -shift)
            for q, b in zip(y.q, y.b)]


def rlsd_ref(step, y, args):
    def scale(A, q, b):
        ratio = math.exp(q) / math.exp(b) if A > 0 else math.exp(b) / math.exp(q)
        return A * min(max(ratio, 1 - args.rlsd_clip), 1 + args.rlsd_clip)
    return [scale(*x) for x in zip(grpo_ref(step, y, args), y.q, y.b)]


def scope_ref(step, y, args):
    def raw(z):
        perplexity = math.exp(-mean(z.b if z.right else z.q))
        power = 1 if z.right and args.scope_sign == "paper" else -1
        return perplexity ** (power / args.scope_temperature)
    half = mates(step, y, y.right)
    weight = raw(y) / sum(map(raw, half)) * len(half)
    return [weight if y.right else weight * (q - b) for q, b in zip(y.q, y.b)]


def reopold_c(args):
    x = args.reopold_share
    return math.log(x / (1 - x)) if args.reopold_floor == "logit" else math.log(x) / (1 - x)


def reopold_ref(step, y, args):
    return [max(q - b, reopold_c(args)) for q, b in zip(y.q, y.b)]


def variants(**choices):
    return [CreditArgs(**dict(zip(choices, values))) for values in product(*choices.values())]


ADVANTAGE_REF = {       # an entry without a line here fails test_every_entry_has_a_loop
    "opd": (opd_ref, variants(discount=(0.0, 0.7, 1.0))),
    "grpo": (grpo_ref, variants(grpo_std=(True, False))),
    "exopd": (exopd_ref, variants(extrapolate=(1.25, 1.0, 0.5, 0.0))),
    "sg": (sg_ref, variants(sg_form=("reference", "scale"), sg_gate=("sign", "all"), sg_agree=(1.8,),
                            sg_conflict=(1.0, 0.5))),
    "opdvr": (opdvr_ref, [CreditArgs()]),
    "kdrl": (kdrl_ref, variants(kdrl_mask=("none", "response", "group"), kdrl_coef=(0.5,),
                                kdrl_coef_end=(0.1,))),
    "uni": (uni_ref, variants(uni_gap=("mean", "minmax"), uni_margin=(0.4, 3.0, -1.0),
                              uni_guard=(10.0, 1.0))),
    "rlsd": (rlsd_ref, variants(rlsd_clip=(0.2, 0.9))),
    "scope": (scope_ref, variants(scope_temperature=(1.0, 0.3), scope_sign=("paper", "code"))),
    "reopold": (reopold_ref, variants(reopold_share=(0.3, 0.1), reopold_floor=("logit", "jensen"))),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name,args", [(n, a) for n, (_, all_args) in ADVANTAGE_REF.items()
                                       for a in all_args], ids=args_id)
def test_an_advantage_equals_the_loop(name, args, seed):
    """fails if: any sign, mean, mask or branch of an advantage changes; std divides by n; the factor of sg is
    a float32; margins are taken over the step; weights of scope over the whole group"""
    s = a_step(seed)
    step = lists(s)
    close(ADVANTAGES[name](s, args), [ADVANTAGE_REF[name][0](step, y, args) for y in step])


# Weights: (step, args) -> a list of numbers per sequence.

def quantile(values, share):
    values, at = sorted(values), share * (len(values) - 1)
    low = math.floor(at)
    return values[low] + (at - low) * (values[min(low + 1, len(values) - 1)] - values[low])


def fire_ref(step, args):
    out = []
    for y in step:
        ranked = [z for z in step if args.fire_filter == "global" or z.teacher == y.teacher]
        if mean(y.q) < quantile([mean(z.q) for z in ranked], args.fire_drop):
            out.append([0.0] * len(y.q))
            continue
        scope = [y] if args.fire_max == "sequence" else step
        max_T, max_S = max(h for z in scope for h in z.H_T), max(h for z in scope for h in z.H_S)
        raw = [(1 + args.fire_alpha * (1 - t / max_T)) * (1 + args.fire_beta * h / max_S)
               for t, h in zip(y.H_T, y.H_S)]
        out.append([w / mean(raw) for w in raw])
    return out


def best(score, share):
    """1.0 for the ceil(share n) largest of nested lists, in their shape."""
    ranked = sorted(((-x, i, t) for i, row in enumerate(score) for t, x in enumerate(row)))
    kept = {(i, t) for _, i, t in ranked[:math.ceil(share * len(ranked))]}
    return [[float((i, t) in kept) for t in range(len(row))] for i, row in enumerate(score)]


def tip_ref(step, args):
    low_h, high_h, low_d, high_d = (f(x for y in step for x in getattr(y, name))
                                    for name in ("H_S", "kl") for f in (min, max))
    def score(h, d):
        h, d = (h - low_h) / (high_h - low_h), (d - low_d) / (high_d - low_d)
        return 1 - (1 - h) * (1 - d)        # the soft or
    return best([[score(*x) for x in zip(y.H_S, y.kl)] for y in step], args.tip_keep)


def reopold_weight_ref(step, args):         # progress 0.3: first half
    return [[float(q - b >= reopold_c(args)) for q, b in zip(y.q, y.b)] for y in step]


WEIGHT_REF = {
    "none": (lambda step, args: [[1.0] * len(y.q) for y in step], [CreditArgs()]),
    "fire": (fire_ref, [*variants(fire_drop=(0.0, 0.2, 0.5), fire_max=("sequence", "batch"),
                                  fire_filter=("global", "teacher")),
                        *variants(fire_alpha=(0.0, 3.0), fire_beta=(0.0, 0.5))]),
    "tip": (tip_ref, variants(tip_keep=(0.5, 0.1, 1.0))),
    "reopold": (reopold_weight_ref, variants(reopold_share=(0.3, 0.1), reopold_floor=("logit", "jensen"))),
    "random": (None, [CreditArgs()]),       # test_the_random_weight_...
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name,args", [(n, a) for n, (f, all_args) in WEIGHT_REF.items() if f
                                       for a in all_args], ids=args_id)
def test_a_weight_equals_the_loop(name, args, seed):
    """fails if: fire ranks by the sum, swaps the two entropies or divides by the mean of the step; tip
    multiplies the two scores or scales by the largest alone; reopold keeps what lies below its floor"""
    s = a_step(seed)
    close(WEIGHTS[name](s, args), WEIGHT_REF[name][0](lists(s), args))


def test_every_entry_has_a_loop():
    """fails if: an entry is added to ADVANTAGES or WEIGHTS without a reference here"""
    assert set(ADVANTAGES) == set(ADVANTAGE_REF) and set(WEIGHTS) == set(WEIGHT_REF)


@pytest.mark.parametrize("table,name", [(t, n) for t in ("ADVANTAGES", "WEIGHTS") for n in globals()[t]])
def test_an_entry_keeps_float32_its_inputs_and_the_order_of_sequences(table, name):
    """fails if: a result is not of student_N's dtype and shape, an argument is written in place, or a rule
    looks across sequences by their place in the step instead of their problem"""
    s, function, args = a_step(4, torch.float32), globals()[table][name], CreditArgs()
    before = {key: x.clone() for key, x in s._asdict().items() if isinstance(x, torch.Tensor)}
    value_N = function(s, args)
    assert value_N.shape == s.student_N.shape and value_N.dtype == torch.float32 and value_N.isfinite().all()
    assert table == "ADVANTAGES" or (value_N >= 0).all() and (value_N > 0).any()
    assert all(torch.equal(getattr(s, key), x) for key, x in before.items())
    if name == "random":
        return
    order_B = torch.arange(11, -1, -1)
    rows = torch.cat([(s.sequence_N == b).nonzero().squeeze(1) for b in order_B.tolist()])
    turned = s._replace(**{key: x[order_B] if key.endswith("_B") else x[rows] for key, x in before.items()})
    turned = turned._replace(sequence_N=11 - s.sequence_N[rows])
    torch.testing.assert_close(function(turned, args), value_N[rows])


@pytest.mark.parametrize("what,fields", [("teacher", ("teacher_N", "teacher_entropy_N", "teacher_B", "kl_N")),
                                         ("reward", ("reward_B",)), ("reference", ("reference_N",)),
                                         ("kl", ("kl_N",))])
def test_an_entry_needs_what_its_table_says(what, fields):
    """fails if: a name leaves a line of NEEDS, or joins one whose signal its rule does not read"""
    def works(function):
        try:
            function(a_step(**dict.fromkeys(fields)), CreditArgs())
        except (TypeError, AttributeError):
            return False
        return True
    failing = {name for table in (ADVANTAGES, WEIGHTS) for name in table if not works(table[name])}
    assert failing == set(NEEDS[what])


# Advantages by hand.

def test_opd_returns_stay_inside_their_sequence():
    """fails if: the sum runs over the end of a sequence, discounts from the front, or leaves out the token
    itself"""
    s = of_lists(teacher=[[1.0, 2.0, 4.0], [8.0, 16.0], [32.0]], student=[[0.0] * 3, [0.0] * 2, [0.0]])
    close(advantage("opd", s), [1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    close(advantage("opd", s, discount=0.5), [3.0, 4.0, 4.0, 16.0, 16.0, 32.0])
    close(advantage("opd", s, discount=1.0), [7.0, 6.0, 4.0, 24.0, 16.0, 32.0])


@pytest.mark.parametrize("std", [True, False])
def test_grpo_by_hand(std):
    """fails if: size - 1 becomes size, grpo_std is ignored, or a response's tokens share its advantage"""
    s = of_lists(student=[[0.0, 0.0], [0.0], [0.0], [0.0], [0.0]], group=[0, 0, 0, 1, 1],
                 reward=[1.0, 0.0, 0.0, 1.0, 0.0])
    two, one, half = (2 / 3, -1 / 3, 1 / 2) if not std else (2 / 3 ** 0.5, -1 / 3 ** 0.5, 1 / 2 ** 0.5)
    close(advantage("grpo", s, grpo_std=std), [two, two, one, one, half, -half])


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_unanimous_group_gets_exactly_zero(dtype, std):
    """fails if: an epsilon replaces the choice on variance > 0, or deviations are taken from a rounded mean
    of 0.1"""
    group = [g for g in range(19) for _ in range(g + 1)]
    for reward in (0.0, 1.0, 0.1, 0.3, -1 / 3):
        s = of_lists(student=[[0.0]] * len(group), group=group, dtype=dtype,
                     reward=[(reward, 0.7)[g % 2] for g in group])
        assert (advantage("grpo", s, grpo_std=std) == 0).all(), reward


def test_exopd_at_1_is_opd_bit_for_bit():
    """fails if: the advantage is assembled as x (log q - log r) - (log b - log r), which rounds
    differently"""
    for dtype in (torch.float32, F64):
        s = a_step(dtype=dtype)
        assert torch.equal(advantage("exopd", s, extrapolate=1.0), advantage("opd", s))


# SG-OPD: a group of a right and a wrong response, and a unanimous group. The teacher likes the first token of
# each response more than the student did, the second less.

SG = dict(teacher=[[-1.0, -3.0]] * 4, student=[[-2.0, -2.0]] * 4, reference=[[-1.5, -2.25]] * 4,
          group=[0, 0, 1, 1],
          reward=[1.0, 0.0, 1.0, 1.0])


def test_sg_extrapolates_where_teacher_and_verifier_agree():
    """fails if: the gate's product is negated, or z = +-1 replaces the group's verdict (a unanimous group
    would agree)

    Table 1.3 of the paper: right and liked, wrong and disliked agree; the rest, and all of a unanimous group,
    does not.
    """
    agree = [True, False, False, True, False, False, False, False]
    ratio, over = [1.0, -1.0] * 4, [0.5, -0.75] * 4
    for lam, beta in ((1.8, 1.0), (1.8, 0.5), (3.0, 0.0)):
        k = [lam if yes else beta for yes in agree]
        args = dict(sg_agree=lam, sg_conflict=beta)
        close(advantage("sg", of_lists(**SG), sg_form="scale", **args), [x * y for x, y in zip(k, ratio)])
        close(advantage("sg", of_lists(**SG), **args), [x + (y - 1) * d for x, y, d in zip(ratio, k, over)])


@pytest.mark.parametrize("form", ["reference", "scale"])
def test_sg_with_both_factors_1_is_opd_bit_for_bit(form):
    """fails if: sg centres, clips or whitens its advantage"""
    for dtype in (torch.float32, F64):
        s, args = a_step(dtype=dtype), CreditArgs(sg_agree=1.0, sg_conflict=1.0, sg_form=form)
        assert torch.equal(ADVANTAGES["sg"](s, args), ADVANTAGES["opd"](s, args))


@pytest.mark.parametrize("c", [1.25, 0.5, 1.8])
def test_sg_with_one_factor_is_exopd(c):
    """fails if: the reference form scales the log-ratio instead of extrapolating, or reads another model than
    r"""
    s = a_step()
    close(advantage("sg", s, sg_agree=c, sg_conflict=c), advantage("exopd", s, extrapolate=c), 1e-15)


def test_sg_scaled_by_1_and_0_is_opdvr_on_mixed_groups():
    """fails if: opdvr or sg turns the verdict of a wrong response around, or a group's mean decides at 1/2"""
    s = a_step(finished_B=torch.ones(12, dtype=torch.bool))
    args = CreditArgs(sg_agree=1.0, sg_conflict=0.0, sg_form="scale")
    mixed_N = torch.isin(s.group_B, torch.tensor([0, 2]))[s.sequence_N]
    sg_N, opdvr_N = ADVANTAGES["sg"](s, args), ADVANTAGES["opdvr"](s, args)
    close(sg_N[mixed_N], opdvr_N[mixed_N])
    assert (sg_N[~mixed_N] == 0).all() and (opdvr_N[~mixed_N] != 0).any()


@pytest.mark.parametrize("gate", ["sign", "random", "all"])
def test_sg_forms_agree_while_the_student_is_its_reference(gate):
    """fails if: one form's factor is k, the other's k - 1 or 1 + k"""
    s = a_step()
    s = s._replace(reference_N=s.student_N)
    a, b = (advantage("sg", s, sg_form=form, sg_gate=gate) for form in ("reference", "scale"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_sg_leaves_unanimous_groups_and_cut_responses_alone():
    """fails if: finished_B is not asked, or a1 is the reward itself"""
    s, args = of_lists(**SG, finished=[False, True, True, True]), CreditArgs()
    sg_N, opd_N = ADVANTAGES["sg"](s, args), ADVANTAGES["opd"](s, args)
    assert (sg_N == opd_N).tolist() == [True, True, True, False, True, True, True, True]


@pytest.mark.parametrize("form", ["reference", "scale"])
def test_sg_controls(form):
    """fails if: the random gate draws a share of its own, takes the global stream, or is the sign gate; `all`
    leaves some"""
    s = a_step(1)
    opd_N = advantage("opd", s)
    def gated(gate, seed=0):
        return advantage("sg", s._replace(seed=seed), sg_form=form, sg_gate=gate) != opd_N
    sign_N, drawn_N = gated("sign"), [gated("random", seed) for seed in range(20)]
    assert 0 < sign_N.sum() < len(sign_N) and gated("all").all()
    assert all(x.sum() == sign_N.sum() for x in drawn_N) and torch.equal(drawn_N[3], gated("random", 3))
    rate_N = torch.stack(drawn_N).double().mean(0)
    assert len({tuple(x.tolist()) for x in drawn_N}) == 20 and (rate_N - rate_N.mean()).abs().max() < 0.4


# The other advantages.

def test_opdvr_keeps_only_what_the_verifier_backs():
    """fails if: z is 0 for a wrong response, or the wrong response's sign is lost"""
    s = of_lists(teacher=[[-1.0, -3.0]] * 2, student=[[-2.0, -2.5]] * 2, reward=[1.0, 0.0])
    close(advantage("opdvr", s), [1.0, 0.0, 0.0, -0.5])


@pytest.mark.parametrize("progress,coef", [(0.0, 5e-3), (0.5, 3e-3), (1.0, 1e-3)])
def test_kdrl_anneals_and_masks(progress, coef):
    """fails if: the coefficients swap, the group mask takes the response's own reward, or grpo is masked as
    well"""
    s = of_lists(teacher=[[-1.0]] * 4, student=[[-2.0]] * 4, group=[0, 0, 1, 1],
                 reward=[1.0, 0.0, 0.0, 0.0])._replace(
        progress=progress)
    a = 0.5 ** 0.5
    for mask, kept in (("none", (1, 1, 1, 1)), ("response", (0, 1, 1, 1)), ("group", (0, 0, 1, 1))):
        close(advantage("kdrl", s, kdrl_mask=mask), [x + k * coef for x, k in zip((a, -a, 0, 0), kept)])


UNI = dict(teacher=[[0.5, 0.1], [-0.3], [0.4, 0.0, 0.2], [1.0], [-1.0]],
           student=[[0.0] * 2, [0.0], [0.0] * 3, [0.0], [0.0]],
           group=[0, 0, 0, 1, 1], reward=[1.0, 1.0, 0.0, 1.0, 0.0])


def test_uni_moves_both_sides_by_half_of_what_is_missing():
    """fails if: all of it lands on each side, a satisfied group moves, or minmax takes the best of the right
    ones

    Group 0: right means 0.3 and -0.3, wrong mean 0.2: gap -0.2, worst against best -0.5. Group 1: gap 2.
    """
    for gap, half in (("mean", 0.3), ("minmax", 0.45)):
        close(advantage("uni", of_lists(**UNI), uni_gap=gap),
              [0.5 + half, 0.1 + half, -0.3 + half, 0.4 - half, 0.0 - half, 0.2 - half, 1.0, -1.0])


@pytest.mark.parametrize("gap", ["mean", "minmax"])
def test_uni_leaves_groups_with_one_outcome_and_guards_tokens(gap):
    """fails if: a missing side counts as 0 or infinite, or a guarded token keeps its shift"""
    one_outcome = of_lists(**{**UNI, "reward": [1.0, 1.0, 1.0, 0.0, 0.0]})
    assert torch.equal(advantage("uni", one_outcome, uni_gap=gap), one_outcome.teacher_N)
    guarded = advantage("uni", of_lists(**UNI), uni_gap=gap, uni_guard=0.4)
    assert (guarded == 0).tolist() == [True, False, False, True, False, False, True, True]


def test_rlsd_takes_the_sign_from_the_verifier():
    """fails if: the ratio is not turned around for a wrong response, or clipped on one side only"""
    ratios = [1.1, 2.0, 0.95, 0.5]
    s = of_lists(teacher=[[math.log(x) for x in ratios]] * 2, student=[[0.0] * 4] * 2, reward=[1.0, 0.0])
    expected = [1.1, 1.2, 0.95, 0.8, -1 / 1.1, -0.8, -1 / 0.95, -1.2]
    close(advantage("rlsd", s), [x * 0.5 ** 0.5 for x in expected])


@pytest.mark.parametrize("args,right,wrong", [
    (dict(), (2 / 3, 4 / 3), (8 / 5, 2 / 5)), (dict(scope_sign="code"), (4 / 3, 2 / 3), (8 / 5, 2 / 5)),
    (dict(scope_temperature=0.5), (0.4, 1.6), (32 / 17, 2 / 17)),
    (dict(scope_temperature=2.0), (2 / (1 + 2 ** 0.5), 2 / (1 + 0.5 ** 0.5)), (4 / 3, 2 / 3))], ids=str)
def test_scope_by_hand(args, right, wrong):
    """fails if: weights are left summing to 1, one half's mean is taken for the other, the temperature
    multiplies

    Perplexities: of the student on two right responses 2 and 4, of the teacher on two wrong ones 2 and 8. A
    singleton counts 1, whatever its perplexity.
    """
    two, four, eight = -math.log(2), -math.log(4), -math.log(8)
    s = of_lists(student=[[two, two], [2 * four, 0.0], [-2.0], [-3.0], [-9.0], [-1.0]],
                 teacher=[[-1.0, 0.0], [-5.0, 0.0], [two], [eight], [-4.0], [-3.0]],
                 group=[0, 0, 0, 0, 1, 2], reward=[1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    close(advantage("scope", s, **args),
          [right[0]] * 2 + [right[1]] * 2 + [wrong[0] * (two + 2), wrong[1] * (eight + 3), 1.0, -2.0])


@pytest.mark.parametrize("sign", ["paper", "code"])
def test_scope_weights_have_mean_1_in_each_half_at_any_temperature(sign):
    """fails if: the exponential of a large log-perplexity is taken before the half's largest is subtracted"""
    s = a_step(2, torch.float32)
    s = s._replace(student_N=5 * s.student_N, teacher_N=5 * s.student_N + 1)    # so advantage = weight
    for temperature in (100.0, 1.0, 0.3, 0.02):
        weight_N = advantage("scope", s, scope_sign=sign, scope_temperature=temperature)
        weight_B = [weight_N[s.sequence_N == b][0].item() for b in range(12)]
        for half in set(zip(GROUP_B, REWARD_B)):
            mine = [w for w, *key in zip(weight_B, GROUP_B, REWARD_B) if tuple(key) == half]
            assert mean(mine) == pytest.approx(1, abs=1e-5) and min(mine) >= 0


@pytest.mark.parametrize("floor,c", [("logit", -0.8472978603872037), ("jensen", -1.7199611490370512)])
def test_reopold_floors(floor, c):
    """fails if: the two readings of the floor swap, or the advantage is capped instead"""
    s = of_lists(teacher=[[-9.0, -1.0, 0.0, c]], student=[[0.0, 0.0, -1.0, 0.0]])
    close(advantage("reopold", s, reopold_floor=floor), [c, max(c, -1.0), 1.0, c])


# FiRe-OPD by hand.

def fire_step(scores, lengths=None, teacher_B=None, **fields):
    lengths = lengths or [2] * len(scores)
    s = of_lists(teacher=[[score + 1.0, score - 1.0, *[score] * (n - 2)][:n] if n > 1 else [score]
                          for score, n in zip(scores, lengths)], **fields)
    ones_N = torch.ones_like(s.teacher_N)
    return s._replace(teacher_entropy_N=ones_N, student_entropy_N=ones_N,
                      teacher_B=None if teacher_B is None else torch.tensor(teacher_B))


def kept(s, **args):
    weight_N = weight("fire", s, **args)
    return [bool((weight_N[s.sequence_N == b] > 0).all()) for b in range(len(s.length_B))]


def test_fire_weight_by_hand():
    """fails if: confidence is entropy instead of 1 - entropy, one of the two factors goes missing, or the
    mean stays"""
    s = of_lists(teacher=[[-1.0] * 3], teacher_entropy=[[0.0, 1.0, 2.0]], student_entropy=[[0.0, 0.5, 1.0]])
    close(weight("fire", s), [0.96, 1.08, 0.96])
    close(weight("fire", s, fire_beta=0.0), [4 / 3, 1.0, 2 / 3])
    close(weight("fire", s, fire_alpha=0.0), [2 / 3, 1.0, 4 / 3])


@pytest.mark.parametrize("args", [dict(fire_alpha=0.0, fire_beta=0.0, fire_drop=0.0), dict(fire_drop=0.0)])
def test_fire_without_anything_to_say_is_opd_bit_for_bit(args):
    """fails if: the floor of the maxima is dropped (0/0), or the weights lose their mean of exactly 1"""
    for dtype in (torch.float32, F64):
        s = a_step(dtype=dtype)
        if "fire_alpha" not in args:                        # all entropies zero
            s = s._replace(teacher_entropy_N=0 * s.kl_N, student_entropy_N=0 * s.kl_N)
        assert (weight("fire", s, **args) == 1.0).all()


@pytest.mark.parametrize("n,drop,dropped", [(10, 0.2, 2), (1, 0.2, 0), (1, 1.0, 0), (2, 0.2, 1), (5, 0.2, 1),
                                            (6, 0.2, 1),
                                            (7, 0.2, 2), (10, 0.0, 0), (10, 1.0, 9), (16, 0.2, 3)])
def test_fire_drops_ceil_of_share_times_one_less(n, drop, dropped):
    """fails if: responses are ranked in small batches, by the sum over tokens, or the highest are dropped"""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n)).tolist()
    s = fire_step([-3.0 + 0.01 * i for i in order], [1 + i % 3 for i in range(n)])
    assert kept(s, fire_drop=drop) == [i >= dropped for i in order]


def test_fire_keeps_ties_and_ranks_per_teacher_on_request():
    """fails if: > replaces >=, or fire_filter teacher ranks over everybody"""
    assert kept(fire_step([-1.0] * 10)) == [True] * 10
    assert kept(fire_step([-5.0, -5.0, *[-1.0] * 8])) == [False] * 2 + [True] * 8
    assert kept(fire_step([-5.0, -5.0, *[-1.0] * 8]), fire_drop=0.1) == [True] * 10     # the quantile is tied
    scores = [-9.0, -8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0]
    s = fire_step(scores, teacher_B=[0] * 5 + [1] * 5)
    assert kept(s) == [False] * 2 + [True] * 8
    assert kept(s, fire_filter="teacher") == [False, *[True] * 4] * 2
    assert kept(fire_step(scores), fire_filter="teacher") == kept(s)                    # one teacher


@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_fire_weights_have_mean_1_in_each_response(scope):
    """fails if: weights are divided by the step's mean, or maxima are taken elsewhere than fire_max says"""
    s = a_step(3)
    weight_N = weight("fire", s, fire_max=scope, fire_drop=0.0)
    for b in range(12):
        assert weight_N[s.sequence_N == b].mean().item() == pytest.approx(1, abs=1e-12)
    at = (s.sequence_N == 0).nonzero().squeeze(1)
    louder = s._replace(teacher_entropy_N=s.teacher_entropy_N.clone(),
                        student_entropy_N=s.student_entropy_N.clone())
    louder.teacher_entropy_N[-1] = louder.student_entropy_N[-1] = 50.0      # one outlier in the last response
    again_N = weight("fire", louder, fire_max=scope, fire_drop=0.0)
    assert torch.equal(again_N[at], weight_N[at]) == (scope == "sequence")


# The other weights, and where a token may have a loss at all.

def test_tip_keeps_the_uncertain_and_the_wrong():
    """fails if: scores are summed without - h d, a constant side is divided by 0, or later rows win ties"""
    s = of_lists(teacher=[[0.0] * 6], student_entropy=[[1.0, 3.0, 1.0, 2.0, 1.0, 2.0]],
                 kl=[[5.0, 5.0, 9.0, 7.0, 5.0, 6.0]])
    for keep, expected in ((0.5, [0, 1, 1, 1, 0, 0]), (1 / 6, [0, 1, 0, 0, 0, 0]), (0.51, [0, 1, 1, 1, 0, 1]),
                           (0, [0, 1, 0, 0, 0, 0])):
        assert weight("tip", s, tip_keep=keep).tolist() == expected
    flat = s._replace(kl_N=torch.ones_like(s.kl_N))
    assert weight("tip", flat, tip_keep=0.5).tolist() == [0, 1, 0, 1, 0, 1]
    nothing = flat._replace(student_entropy_N=torch.zeros_like(s.kl_N))
    assert weight("tip", nothing, tip_keep=0.5).tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("progress,expected", [(0.0, [0, 1, 1, 1, 0]), (0.49, [0, 1, 1, 1, 0]),
                                               (0.5, [1, 0, 0, 0, 0]),
                                               (1.0, [1, 0, 0, 0, 0])])
def test_reopold_switches_from_log_ratios_to_entropy_at_half(progress, expected):
    """fails if: the phases swap, the switch moves, or the second keeps the lowest entropies"""
    s = of_lists(teacher=[[-2.0, -0.5, 0.5, math.log(0.3 / 0.7), -0.85]],
                 student_entropy=[[3.0, 1.0, 2.0, 0.0, 0.5]])
    assert weight("reopold", s._replace(progress=progress)).tolist() == expected


def test_the_random_weight_is_a_fresh_share_each_step():
    """fails if: the draw ignores the step's seed, uses the global stream, or keeps another number of
    tokens"""
    s = a_step()
    n = len(s.token_N)
    for keep in (0.5, 0.1, 1.0):
        drawn = [weight("random", s._replace(seed=seed), keep=keep) for seed in range(30)]
        assert all(x.sum() == math.ceil(keep * n) and set(x.tolist()) <= {0.0, 1.0} for x in drawn)
        torch.manual_seed(1)
        assert torch.equal(drawn[7], weight("random", s._replace(seed=7), keep=keep))
        assert keep == 1.0 or len({tuple(x.tolist()) for x in drawn}) == 30
        assert (torch.stack(drawn).mean(0) - keep).abs().max() < 0.4        # 4 to 7 standard deviations


@pytest.mark.parametrize("flags,expected", [
    ({}, [1, 1, 1, 1, 1, 1]), (dict(skip_first=3), [0, 0, 0, 1, 0, 0]),
    (dict(loss_first_n=2), [1, 1, 0, 0, 1, 1]),
    (dict(skip_first=1, loss_first_n=2), [0, 1, 0, 0, 0, 1]), (dict(skip_tokens="7"), [1, 0, 1, 1, 0, 1]),
    (dict(skip_tokens="7,5"), [0, 0, 1, 1, 0, 1]), (dict(skip_first=1, skip_tokens="8"), [0, 1, 1, 0, 0, 1])])
def test_where_a_loss_may_be(flags, expected):
    """fails if: positions count from 1 or over the whole step, loss_first_n 0 means none, or one id alone is
    skipped"""
    s = of_lists(token=[[5, 7, 6, 8], [7, 6]])
    assert supervised(s, CreditArgs(**flags)).tolist() == expected


# Phased teacher sampling, recipes, coverage.

def test_the_phased_weight_holds_then_falls_to_zero():
    """fails if: the cosine starts at 0, its half period is another, or the weight jumps at either boundary"""
    cfg = train.Config(pts_weight=0.3, pts_hold=0.2, pts_end=0.6)
    for progress, weight in ((0.0, 0.3), (0.19, 0.3), (0.2, 0.3), (0.4, 0.15), (0.6, 0.0), (0.61, 0.0),
                             (1.0, 0.0)):
        assert phased_weight(progress, cfg) == pytest.approx(weight, abs=1e-15)
    assert phased_weight(0.3, cfg) == pytest.approx(0.3 * (1 + math.cos(math.pi / 4)) / 2)
    curve = [phased_weight(i / 1000, cfg) for i in range(1001)]
    assert all(0 <= a - b < 0.003 for a, b in zip(curve, curve[1:]))            # never up, never a jump
    at_once = train.Config(pts_weight=0.3, pts_hold=0.5, pts_end=0.5)
    assert [phased_weight(x, at_once) for x in (0.49, 0.5)] == [0.3, 0.0]


RECIPE_NEEDS = {
    "opd": "teacher", "gkd": "teacher", "topk": "teacher", "lsm": "teacher", "sft": "",
    "grpo": "reward group",
    "minillm": "teacher", "fire": "teacher", "multi": "teacher", "opsd": "teacher", "sdft": "teacher",
    "sdpo": "teacher reward group", "sg": "teacher reward group reference", "exopd": "teacher reference",
    "opdvr": "teacher reward", "kdrl": "teacher reward group", "uni": "teacher reward group",
    "rlsd": "teacher reward group", "scope": "teacher reward group", "eopd": "teacher", "tip": "teacher kl",
    "reopold": "teacher", "xtok": "teacher"}


@pytest.mark.parametrize("recipe", list(config.RECIPES))
def test_what_a_recipe_needs(recipe):
    """fails if: a name leaves a line of NEEDS or USES_ADVANTAGE, or a row of RECIPES takes another entry"""
    cfg, _ = train.parse(["--recipe", recipe])
    assert {what for what in NEEDS if needs(cfg, what)} == set(RECIPE_NEEDS[recipe].split())


@pytest.mark.parametrize("flags,what,expected", [
    ("--recipe sg --sg_form scale", "reference", False),
    ("--recipe exopd --sg_form scale", "reference", True),
    ("--recipe sg --divergence reverse_kl --pts_weight 0", "reward", False),
    ("--recipe opd --pts_weight 0.1", "reward", True),
    ("--recipe sft --pts_weight 0.1", "teacher", True),
    ("--recipe sft --cold_start_steps 1", "teacher", True),
    ("--recipe sft --responses teacher", "teacher", True), ("--recipe sft --advantage sg", "reward", False),
    ("--recipe opd --privileged sibling", "group", True), ("--recipe opd --weight tip", "kl", True)])
def test_what_flags_need(flags, what, expected):
    """fails if: an advantage that no loss reads is served, phased sampling goes without answers, sg's scale
    form pays for a reference"""
    cfg, _ = train.parse(flags.split())
    assert needs(cfg, what) is expected


@pytest.mark.parametrize("table", ["ADVANTAGES", "WEIGHTS", "DIVERGENCES", "RECIPES"])
def test_every_entry_is_tested_and_in_the_readme(table):
    """fails if: an entry is added without naming it in a test and in a row of README.md"""
    names = {"ADVANTAGES": ADVANTAGES, "WEIGHTS": WEIGHTS, "DIVERGENCES": DIVERGENCES,
             "RECIPES": config.RECIPES}[table]
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    rows = "\n".join(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("|"))
    assert [name for name in names if not re.search(rf"[\"']{name}[\"']", tests)] == [], "named in no test"
    assert [name for name in names if f"`{name}`" not in rows] == [], "not in a row of README.md"
