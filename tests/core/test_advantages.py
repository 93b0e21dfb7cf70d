"""losses.py, advantages: each equals a loop over sequences and groups. Numbers by hand: test_advantages_by_hand.py.

The loops see plain Python lists and the papers' formulas, in other algebra than losses.py where there is a
choice. Exact in float64.
"""
import math
from statistics import mean, stdev

import pytest
from signal_lists import (ASKED, a_step, args_id, close, fails_without, keeps_dtype_inputs_and_order, lists,
                          looks_at_groups, reopold_c, variants)

from losses import ADVANTAGES, LossArgs


NEWER = {"power", "vopd", "opsa", "sdpg", "rlcsd"}      # extras/test_newer.py, extras/test_hints.py
OF_THE_CORE = {name: rule for name, rule in ADVANTAGES.items() if name not in NEWER}


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


def reopold_ref(step, y, args):
    return [max(q - b, reopold_c(args)) for q, b in zip(y.q, y.b)]


ADVANTAGE_REF = {       # an entry without a line here fails test_every_entry_has_a_loop
    "opd": (opd_ref, variants(discount=(0.0, 0.7, 1.0))),
    "grpo": (grpo_ref, variants(grpo_std=(True, False))),
    "exopd": (exopd_ref, variants(extrapolate=(1.25, 1.0, 0.5, 0.0))),
    "sg": (sg_ref, variants(sg_form=("reference", "scale"), sg_gate=("sign", "all"), sg_agree=(1.8,),
                            sg_conflict=(1.0, 0.5))),
    "opdvr": (opdvr_ref, [LossArgs()]),
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


def test_every_entry_has_a_loop():
    """fails if: an entry is added to ADVANTAGES without a reference here"""
    assert set(ADVANTAGES) - NEWER == set(ADVANTAGE_REF)


@pytest.mark.parametrize("name", ADVANTAGE_REF)
def test_an_entry_keeps_float32_its_inputs_and_the_order_of_sequences(name):
    """fails if: a result is not of behavior_logp_N's dtype and shape, an argument is written in place, or a rule
    looks across sequences by their place in the step instead of their problem"""
    keeps_dtype_inputs_and_order(ADVANTAGES[name])


@pytest.mark.parametrize("signal", ASKED)
def test_an_entry_asks_for_what_it_reads(signal):
    """fails if: a rule names a signal in @asks that it does not read, or reads one that it does not name"""
    assert fails_without(signal, OF_THE_CORE) == {name for name, rule in OF_THE_CORE.items() if signal in rule.asks}


def test_an_entry_that_compares_responses_to_one_problem_says_so():
    """fails if: a rule that looks at group_B loses its group=True, or another gains it"""
    assert looks_at_groups(OF_THE_CORE) == {name for name, rule in OF_THE_CORE.items() if rule.group}
