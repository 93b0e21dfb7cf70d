"""What recipes and flags of extras ask of their run, and the weight of phased teacher sampling."""
import math

import pytest
from signal_lists import needs

import train
from extras.given import phased_weight
from extras.reference import wanted
from support.flags import parse

RECIPE_NEEDS = {
    "gkd": "teacher", "sft": "", "multi": "teacher", "opsd": "teacher", "sdft": "teacher",
    "sdpo": "teacher reward group", "sg": "teacher reward group reference", "exopd": "teacher reference",
    "rlsd": "teacher reward group", "xtok": "teacher", "lightning": "teacher",
    "iw": "teacher", "power": "teacher", "vopd": "kl teacher", "opsa": "", "sdpg": "teacher reward group",
    "veto": "teacher",
    "rlcsd": "teacher reward group",
    "tropd": "teacher", "topd": "teacher"}


def all_needs(flags):
    cfg, _ = parse(flags.split(), train.SETTINGS)
    return needs(cfg) | ({"reference"} if wanted(cfg) else set())


@pytest.mark.parametrize("recipe", [name for name in train.SETTINGS.recipes if name not in train.RECIPES])
def test_what_a_recipe_needs(recipe):
    """fails if: a signal leaves a rule's @asks, or a row of RECIPES takes another entry"""
    assert all_needs(f"--recipe {recipe}") == set(RECIPE_NEEDS[recipe].split())


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_no_recipe_of_the_core_needs_a_reference(recipe):
    """fails if: wanted() is true of other advantages than exopd and sg"""
    assert "reference" not in all_needs(f"--recipe {recipe}")


@pytest.mark.parametrize("flags,what,expected", [
    ("--recipe sg --sg_form scale", "reference", False),
    ("--recipe exopd --sg_form scale", "reference", True),
    ("--recipe sg --divergence reverse_kl --pts_weight 0", "reward", False),
    ("--recipe opd --pts_weight 0.1", "reward", True),
    ("--recipe sft --pts_weight 0.1", "teacher", True),
    ("--recipe sft --cold_start_steps 1", "teacher", True),
    ("--recipe sft --responses teacher", "teacher", True), ("--recipe sft --advantage sg", "reward", False),
    ("--recipe opd --privileged sibling", "group", True)])
def test_what_flags_need(flags, what, expected):
    """fails if: an advantage that no loss reads is served, phased sampling goes without answers, sg's scale
    form pays for a reference"""
    assert (what in all_needs(flags)) is expected


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
