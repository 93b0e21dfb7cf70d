"""Every recipe takes the steps that tests/data/pins.json keeps (tests/pins.py writes and explains it)."""
import json

import pins
import pytest

PINNED = json.loads(pins.FILE.read_text())


@pytest.mark.parametrize("name", PINNED)
def test_three_steps_are_those_that_were_pinned(name, tmp_path):
    """To three digits, in bfloat16 to two, since processors add and round in their own order; bit for bit:
    python tests/pins.py --exact.
    fails if: a number, a length or one sampled token changes"""
    found, wanted = pins.run_case(pins.CASES[name], str(tmp_path)), PINNED[name]
    assert found["ids"] == wanted["ids"]
    rel = 2e-2 if name == "bfloat16" else 1e-3
    for mine, theirs in zip(found["steps"], wanted["steps"], strict=True):
        assert mine == {key: value if value is None else pytest.approx(value, rel=rel, abs=1e-4)
                        for key, value in theirs.items()}


def test_every_recipe_is_pinned():
    assert set(pins.CASES) == set(PINNED) and set(pins.train.SETTINGS.recipes) <= set(PINNED)
