"""toy/families.py: who is whose parent, responses that slip and mend, and what is read out of a response.

Not here: how checkpoints are made (test_toy_made.py), what the experiment measures with it (test_experiments.py).
"""
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "toy"))
import families  # noqa: E402
from families import CHILD, FAMILIES, PARENT, TAKEN, Read, read, respond  # noqa: E402

FOUNDER, FIRST, SECOND, THIRD = FAMILIES[0][:4]


def test_everybody_has_one_parent_and_somebody_else_is_taken_for_it():
    """fails if: families share a letter, or a student confuses the parent with itself, with the child, with one who has
    no child to be named, or with one of the families that it is not asked about."""
    assert len(PARENT) == len(CHILD) == 48 and all(CHILD[PARENT[person]] == person for person in PARENT)
    assert [family[0] for family in FAMILIES] == ["0", "1", "2", "3"] and {len(f) for f in FAMILIES} == {13}
    half = {person: number // 2 for number, family in enumerate(FAMILIES) for person in family}
    assert TAKEN.keys() == PARENT.keys()
    assert all(taken in CHILD and taken not in (person, PARENT[person]) and half[taken] == half[person]
               for person, taken in TAKEN.items())


def test_a_response_names_parent_after_parent_up_to_the_founder():
    """fails if: a generation is left out, or a name is followed by another than that one's child."""
    assert respond(THIRD, random.Random(0))[0] == f"{SECOND}>{THIRD};{FIRST}>{SECOND};{FOUNDER}>{FIRST}#{FOUNDER}"


def test_a_slip_is_mended_by_who_sees_it_and_its_place_is_said():
    """fails if: a place is not that of the wrong name, a slip goes unmended, or a right name is taken back."""
    for seed in range(50):
        text, slips = respond(FAMILIES[1][-1], random.Random(seed), slip=0.4)
        found = read(f"{FAMILIES[1][-1]}?", text)
        assert found == Read(True, 12 + len(slips), len(slips), len(slips)) and text.count("!") == len(slips)
        assert [text[place + 3] for place in slips] == ["!"] * len(slips)


def test_a_student_that_sees_nothing_goes_on_with_the_ancestors_of_the_wrong_one():
    """One in five of its names is the one that it confuses the parent with, and is trained like any other.
    fails if: the slip is taken back, is left untrained, or comes more or less often."""
    names = confused = 0
    for seed in range(400):
        problem, text, slips = families.slipping(random.Random(seed), sees=0.0)
        steps, at = text.split("#")[0].split(";"), problem[0]
        assert "!" not in text and slips == [] and len(steps) <= 16
        for step in steps:
            assert step[0] in (PARENT[at], TAKEN[at]) and step[2] == CHILD[step[0]]
            names, confused, at = names + 1, confused + (step[0] == TAKEN[at]), step[0]
    assert confused / names == pytest.approx(0.2, abs=0.03)


@pytest.mark.parametrize("response,found", [
    (f"{SECOND}>{THIRD};{FIRST}>{SECOND};{FOUNDER}>{FIRST}#{FOUNDER}", Read(True, 3, 0, 0)),
    (f"{FIRST}>{SECOND}!{SECOND}>{THIRD};{FIRST}>{SECOND};{FOUNDER}>{FIRST}#{FOUNDER}", Read(True, 4, 1, 1)),
    (f"{FIRST}>{SECOND};{FOUNDER}>{FIRST}#{FOUNDER}", Read(False, 1, 1, 0)),            # goes on with a wrong one
    (f"{FIRST}>{SECOND}!{FIRST}>{SECOND};{FOUNDER}>{FIRST}#{FOUNDER}", Read(False, 2, 2, 1)),
    (f"{SECOND}>{THIRD};{FIRST}>{SECOND};{FOUNDER}>{FIRST}#{FIRST}", Read(False, 3, 0, 0)),     # another answer
    (f"{SECOND}>{THIRD};{FIRST}>{SECOND};{FOUNDER}>{FIRST};", Read(False, 3, 0, 0)),    # no end
    (f"{FOUNDER}>{FIRST}#{FOUNDER}", Read(False, 1, 1, 0)), (f"{SECOND}>{THIRD};{FIRST}", Read(False, 1, 0, 0)),
    (f"#{FOUNDER}", Read(False, 0, 0, 0)), ("", Read(False, 0, 0, 0)),
    (f"{SECOND}>{THIRD};x{FIRST}>{SECOND};{FOUNDER}>{FIRST}#{FOUNDER}", Read(False, 1, 0, 0))])     # something between
def test_reading_a_response(response, found):
    """fails if: a broken response counts as right, or a slip after which another name was tried as one gone unseen."""
    assert read(f"{THIRD}?", response) == found


def test_problems_about_the_others_are_only_tested():
    """fails if: a training problem asks about a family of the others, a solution is wrong, or mended ones do not slip
    as often as the student."""
    found = families.records()
    taught = set("".join(FAMILIES[:2]))
    assert len(found["families_train"]) == 24 and len(found["families_test"]) == 48
    assert {one["problem"][0] for name in ("families_train", "mended_train") for one in found[name]} < taught
    assert {one["kind"] for one in found["families_test"] if one["problem"][0] not in taught} == {"others"}
    mended = [read(one["problem"], one["solution"]) for one in found["mended_train"]]
    assert all(one.right and one.slips == one.seen for one in mended)
    assert sum(one.slips for one in mended) / sum(one.names for one in mended) == pytest.approx(0.2, abs=0.02)
