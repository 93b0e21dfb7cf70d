"""What a recipe of the core asks of its run, and that every entry of every table is tested and documented."""
import re
from pathlib import Path

import pytest
from signal_lists import needs

import train
from losses import ADVANTAGES, DIVERGENCES, WEIGHTS
from support.flags import parse

ROOT = Path(__file__).resolve().parents[2]
RECIPE_NEEDS = {
    "opd": "teacher", "topk": "teacher", "lsm": "teacher", "grpo": "reward group", "minillm": "teacher",
    "fire": "teacher", "opdvr": "teacher reward", "kdrl": "teacher reward group", "uni": "teacher reward group",
    "scope": "teacher reward group", "eopd": "teacher", "tip": "teacher kl", "reopold": "teacher"}


@pytest.mark.parametrize("recipe", train.RECIPES)
def test_what_a_recipe_needs(recipe):
    """fails if: a signal leaves a rule's @asks, or a row of RECIPES takes another entry"""
    cfg, _ = parse(["--recipe", recipe], train.SETTINGS)
    assert needs(cfg) == set(RECIPE_NEEDS[recipe].split())


@pytest.mark.parametrize("flags,what,expected", [
    ("--recipe kdrl --divergence reverse_kl", "reward", False), ("--recipe opd --advantage grpo", "group", False),
    ("--recipe opd --weight tip", "kl", True)])
def test_what_flags_need(flags, what, expected):
    """fails if: an advantage that no loss reads is served"""
    cfg, _ = parse(flags.split(), train.SETTINGS)
    assert (what in needs(cfg)) is expected


@pytest.mark.parametrize("table", ["ADVANTAGES", "WEIGHTS", "DIVERGENCES", "RECIPES"])
def test_every_entry_is_tested_and_documented(table):
    """fails if: an entry is added without naming it in a test and in a row of README.md or docs/"""
    names = {"ADVANTAGES": ADVANTAGES, "WEIGHTS": WEIGHTS, "DIVERGENCES": DIVERGENCES,
             "RECIPES": train.SETTINGS.recipes}[table]
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("*.py") if path.name != "pins.py")
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    rows = "\n".join(line for page in pages for line in page.read_text().splitlines() if line.startswith("|"))
    assert [name for name in names if not re.search(rf"[\"']{name}[\"']", tests)] == [], "named in no test"
    assert [name for name in names if f"`{name}`" not in rows] == [], "in no row of README.md or docs/"
