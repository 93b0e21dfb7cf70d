"""losses.py, weights: each equals a loop over sequences, and numbers by hand; where a token may have a loss at all.

The loops see plain Python lists and the papers' formulas. Exact in float64.
"""
import math
from statistics import mean

import pytest
import torch
from signal_lists import (ASKED, F64, a_step, args_id, changed, close, fails_without, keeps_dtype_inputs_and_order,
                          lists, looks_at_groups, of_lists, reopold_c, variants, weight)

from losses import WEIGHTS, LossArgs, supervised

NEWER = {"iw", "rlcsd"}      # extras/test_newer.py, extras/test_hints.py
OF_THE_CORE = {name: rule for name, rule in WEIGHTS.items() if name not in NEWER}


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
    "none": (lambda step, args: [[1.0] * len(y.q) for y in step], [LossArgs()]),
    "fire": (fire_ref, [*variants(fire_drop=(0.0, 0.2, 0.5), fire_max=("sequence", "batch"),
                                  fire_filter=("global", "teacher")),
                        *variants(fire_alpha=(0.0, 3.0), fire_beta=(0.0, 0.5))]),
    "tip": (tip_ref, variants(tip_keep=(0.5, 0.1, 1.0))),
    "reopold": (reopold_weight_ref, variants(reopold_share=(0.3, 0.1), reopold_floor=("logit", "jensen"))),
    "random": (None, [LossArgs()]),       # test_the_random_weight_...
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
    """fails if: an entry is added to WEIGHTS without a reference here"""
    assert set(OF_THE_CORE) == set(WEIGHT_REF)


@pytest.mark.parametrize("name", WEIGHT_REF)
def test_an_entry_keeps_float32_its_inputs_and_the_order_of_sequences(name):
    """fails if: a result is not of behavior_logp_N's dtype and shape, is negative, an argument is written in place, or
    a rule looks across sequences by their place in the step instead of their problem"""
    value_N = keeps_dtype_inputs_and_order(WEIGHTS[name])
    assert (value_N >= 0).all() and (value_N > 0).any()


@pytest.mark.parametrize("signal", ASKED)
def test_an_entry_asks_for_what_it_reads(signal):
    """fails if: a rule names a signal in @asks that it does not read, or reads one that it does not name"""
    assert fails_without(signal, OF_THE_CORE) == {name for name, rule in OF_THE_CORE.items() if signal in rule.asks}


def test_no_weight_compares_responses_to_one_problem():
    """fails if: a weight reads group_B without group=True"""
    assert looks_at_groups(OF_THE_CORE) == {name for name, rule in OF_THE_CORE.items() if rule.group} == set()


# FiRe-OPD by hand.

def fire_step(scores, lengths=None, teacher_B=None, **fields):
    lengths = lengths or [2] * len(scores)
    s = of_lists(teacher=[[score + 1.0, score - 1.0, *[score] * (n - 2)][:n] if n > 1 else [score]
                          for score, n in zip(scores, lengths)], **fields)
    ones_N = torch.ones_like(s.teacher_logp_N)
    return changed(s, teacher_entropy_N=ones_N, student_entropy_N=ones_N,
                   teacher_B=torch.tensor(teacher_B or [0] * len(scores)))


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
            s = changed(s, teacher_entropy_N=0 * s.reverse_kl_N, student_entropy_N=0 * s.reverse_kl_N)
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
    louder = changed(s, teacher_entropy_N=s.teacher_entropy_N.clone(),
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
    flat = changed(s, reverse_kl_N=torch.ones_like(s.reverse_kl_N))
    assert weight("tip", flat, tip_keep=0.5).tolist() == [0, 1, 0, 1, 0, 1]
    nothing = changed(flat, student_entropy_N=torch.zeros_like(s.reverse_kl_N))
    assert weight("tip", nothing, tip_keep=0.5).tolist() == [1, 1, 1, 0, 0, 0]


@pytest.mark.parametrize("progress,expected", [(0.0, [0, 1, 1, 1, 0]), (0.49, [0, 1, 1, 1, 0]),
                                               (0.5, [1, 0, 0, 0, 0]),
                                               (1.0, [1, 0, 0, 0, 0])])
def test_reopold_switches_from_log_ratios_to_entropy_at_half(progress, expected):
    """fails if: the phases swap, the switch moves, or the second keeps the lowest entropies"""
    s = of_lists(teacher=[[-2.0, -0.5, 0.5, math.log(0.3 / 0.7), -0.85]],
                 student_entropy=[[3.0, 1.0, 2.0, 0.0, 0.5]])
    assert weight("reopold", changed(s, progress=progress)).tolist() == expected


def test_the_random_weight_is_a_fresh_share_each_step():
    """fails if: the draw ignores the step's seed, uses the global stream, or keeps another number of
    tokens"""
    s = a_step()
    n = len(s.token_N)
    for keep in (0.5, 0.1, 1.0):
        drawn = [weight("random", changed(s, seed=seed), keep=keep) for seed in range(30)]
        assert all(x.sum() == math.ceil(keep * n) and set(x.tolist()) <= {0.0, 1.0} for x in drawn)
        torch.manual_seed(1)
        assert torch.equal(drawn[7], weight("random", changed(s, seed=7), keep=keep))
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
    assert supervised(s, LossArgs(**flags)).tolist() == expected
