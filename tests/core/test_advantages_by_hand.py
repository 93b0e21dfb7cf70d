"""losses.py, advantages: numbers worked out by hand, exact in float64."""
import math
from statistics import mean

import numpy as np
import pytest
import torch
from loss_reference import close as near
from loss_reference import signals
from signal_lists import F64, GROUP_B, REWARD_B, a_step, advantage, changed, close, of_lists

from losses import ADVANTAGES, WEIGHTS, LossArgs


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
        s, args = a_step(dtype=dtype), LossArgs(sg_agree=1.0, sg_conflict=1.0, sg_form=form)
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
    args = LossArgs(sg_agree=1.0, sg_conflict=0.0, sg_form="scale")
    mixed_N = torch.isin(s.group_B, torch.tensor([0, 2]))[s.sequence_N]
    sg_N, opdvr_N = ADVANTAGES["sg"](s, args), ADVANTAGES["opdvr"](s, args)
    close(sg_N[mixed_N], opdvr_N[mixed_N])
    assert (sg_N[~mixed_N] == 0).all() and (opdvr_N[~mixed_N] != 0).any()


@pytest.mark.parametrize("gate", ["sign", "random", "all"])
def test_sg_forms_agree_while_the_student_is_its_reference(gate):
    """fails if: one form's factor is k, the other's k - 1 or 1 + k"""
    s = a_step()
    s = changed(s, reference_logp_N=s.behavior_logp_N)
    a, b = (advantage("sg", s, sg_form=form, sg_gate=gate) for form in ("reference", "scale"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_sg_leaves_unanimous_groups_and_cut_responses_alone():
    """fails if: finished_B is not asked, or a1 is the reward itself"""
    s, args = of_lists(**SG, finished=[False, True, True, True]), LossArgs()
    sg_N, opd_N = ADVANTAGES["sg"](s, args), ADVANTAGES["opd"](s, args)
    assert (sg_N == opd_N).tolist() == [True, True, True, False, True, True, True, True]


@pytest.mark.parametrize("form", ["reference", "scale"])
def test_sg_controls(form):
    """fails if: the random gate draws a share of its own, takes the global stream, or is the sign gate; `all`
    leaves some"""
    s = a_step(1)
    opd_N = advantage("opd", s)
    def gated(gate, seed=0):
        return advantage("sg", changed(s, seed=seed), sg_form=form, sg_gate=gate) != opd_N
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
    s = of_lists(teacher=[[-1.0]] * 4, student=[[-2.0]] * 4, group=[0, 0, 1, 1], reward=[1.0, 0.0, 0.0, 0.0])
    s = changed(s, progress=progress)
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
    assert torch.equal(advantage("uni", one_outcome, uni_gap=gap), one_outcome.teacher_logp_N)
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
    # a log-ratio of 1 everywhere, so advantage = weight
    s = changed(s, behavior_logp_N=5 * s.behavior_logp_N, teacher_logp_N=5 * s.behavior_logp_N + 1)
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


# GRPO on permuted rows and groups of many sizes.

SQRT3 = 3 ** 0.5
WITH_STD = {(0, 1): SQRT3 / 2, (0, 0): -SQRT3 / 2, (2, 1): SQRT3 / 3, (2, 0): -2 * SQRT3 / 3}
WITHOUT_STD = {(0, 1): 1 / 2, (0, 0): -1 / 2, (2, 1): 1 / 3, (2, 0): -2 / 3}


@pytest.mark.parametrize("std,table", [(True, WITH_STD), (False, WITHOUT_STD)])
def test_grpo_on_groups_worked_out_by_hand(std, table):
    """fails if: size - 1 becomes size, grpo_std is ignored, or the result is not spread with sequence_N"""
    sequence_N = torch.tensor([3, 3, 0, 7, 1, 5, 5, 5, 2, 4, 6, 8, 9, 10, 11, 0])
    s = signals(12, sequence_N=sequence_N, group_B=torch.tensor(GROUP_B),
                reward_B=torch.tensor(REWARD_B).double())
    advantage_N = ADVANTAGES["grpo"](s, LossArgs(grpo_std=std))
    near(advantage_N, [table.get((GROUP_B[b], REWARD_B[b]), 0.0) for b in sequence_N], 1e-14)
    assert (advantage_N[[3, 8, 9, 13, 14]] == 0).all()


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_unanimous_group_of_any_size_gets_exactly_zero(dtype, std):
    """fails if: an epsilon replaces the choice on std > 0, or deviations are from a rounded mean of 0.1"""
    sizes = torch.arange(1, 20)
    group_B = torch.arange(len(sizes)).repeat_interleave(sizes)
    for reward in (0.0, 1.0, 0.1, 0.3, -1 / 3):
        reward_B = torch.tensor([reward, 0.7], dtype=dtype)[group_B % 2]
        s = signals(len(group_B), group_B=group_B, reward_B=reward_B)
        assert (ADVANTAGES["grpo"](s, LossArgs(grpo_std=std)) == 0).all(), reward


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
    near(ADVANTAGES["grpo"](s, LossArgs(grpo_std=std)), expected[sequence_N])


def test_opd_and_the_uniform():
    """fails if: opd changes its sign, or uniform counts sequences instead of rows"""
    s = signals(5, teacher_logp_N=torch.tensor([-1.0, -3.0, -2.5, 0.0, -5.0]), group_B=torch.tensor([0, 0]))
    assert ADVANTAGES["opd"](s, LossArgs()).tolist() == [0.0, -1.0, 0.5, 4.0, 0.0]      # against -1 ... -5
    assert WEIGHTS["none"](s, LossArgs()).tolist() == [1.0] * 5
