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
    no child to be named, with one of its own family (a verifier would find its founder right), or of the other pair."""
    assert len(PARENT) == len(CHILD) == 48 and all(CHILD[PARENT[person]] == person for person in PARENT)
    assert [family[0] for family in FAMILIES] == ["0", "1", "2", "3"] and {len(f) for f in FAMILIES} == {13}
    family = {person: number for number, everybody in enumerate(FAMILIES) for person in everybody}
    assert TAKEN.keys() == PARENT.keys()
    assert all(taken in CHILD and family[taken] == family[person] ^ 1 for person, taken in TAKEN.items())


def test_a_response_names_parent_after_parent_up_to_the_founder():
    """fails if: a generation is left out, or a name is followed by another than that one's child."""
    assert respond(THIRD, random.Random(0))[0] == f"{SECOND}>{THIRD};{FIRST}>{SECOND};{FOUNDER}>{FIRST}#{FOUNDER}"


def test_a_slip_is_mended_by_who_sees_it_and_its_place_is_said():
    """fails if: a place is not that of the wrong name, a slip goes unmended, or a right name is taken back."""
    for seed in range(50):
        text, slips = respond(FAMILIES[1][-1], random.Random(seed), stray=0.4)
        found = read(f"{FAMILIES[1][-1]}?", text)
        assert found == Read(True, 12 + len(slips), len(slips), len(slips)) and text.count("!") == len(slips)
        assert [text[place + 3] for place in slips] == ["!"] * len(slips)


@pytest.mark.parametrize("sees", [0.0, 0.3])
def test_a_student_takes_one_in_five_for_the_parent_and_sees_as_many_as_it_should(sees):
    """Its own slips are learned like any other name, and after one that is left it goes on with that one's ancestors.
    fails if: slips come, or are seen, more or less often, are not learned, or lead to others than are confused."""
    names = confused = seen = 0
    for seed in range(600):
        problem, text, strays = families.slipping(random.Random(seed), sees=sees, confused=0.2)
        at, end = problem[0], text.index("#") + 1
        assert strays == [] and end <= 4 * 16
        for named, _, child, sign in (text[i:i + 4] for i in range(0, end, 4)):
            assert named in (PARENT[at], TAKEN[at]) and child == CHILD[named] and (sign != "!" or named == TAKEN[at])
            names, confused, seen = names + 1, confused + (named == TAKEN[at]), seen + (sign == "!")
            at = at if sign == "!" else named
    assert confused / names == pytest.approx(0.2, abs=0.03) and seen / confused == pytest.approx(sees, abs=0.06)


def test_strays_of_a_student_are_not_learned():
    """fails if: the place of a random name is missing, or is that of one that it believes in."""
    found = [families.slipping(random.Random(seed), sees=0.0, confused=0.0, stray=0.5) for seed in range(50)]
    assert sum(len(strays) for _, _, strays in found) > 50
    for problem, text, strays in found:
        at = problem[0]
        for place in range(0, text.index("#"), 4):
            assert (place in strays) == (text[place] != PARENT[at])
            at = text[place]


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
    clean, test, mended = ([read(one["problem"], one["solution"]) for one in found[name]]
                           for name in ("families_train", "families_test", "mended_train"))
    assert all(one.right and one.slips == 0 for one in (*clean, *test))
    assert all(one.right and one.slips == one.seen for one in mended)
    assert sum(one.slips for one in mended) / sum(one.names for one in mended) == pytest.approx(0.2, abs=0.02)
