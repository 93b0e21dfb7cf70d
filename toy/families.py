"""Families: a second toy world, in which a slip can be seen and mended.

    problem             f?                      who are the ancestors of f?
    response            c>f;q>c;0>q#0           c has the child f, q the child c, 0 the child q, and 0 is a founder
    a slip, mended      d>x!c>f;q>c;0>q#0       d has the child x, not f: wrong, so another one is named
    a slip, left        d>x;m>d;3>m#3           these are the ancestors of d

Four families, each of a founder (a digit) and twelve generations of one child (letters). A model can know everybody's
child and still be wrong about somebody's parent. A slip, that is a wrong name, can be seen: the name is followed by
that person's child, which is not the one that was asked about.

    mends       a teacher that knows every parent, and tries again after a wrong name
    slips       a student that has one certain wrong person in mind for each parent, and names that one in one case out
                of five. It knows every child. After three of ten slips it tries again, after the others it goes on with
                the ancestors of the wrong person
    unseeing    the same, but it never tries again

Problems are about two families, `taught`; tests are about these and about the two `others`. Who is taken for a parent
is of the other family of the same two. So no slip leads from the taught to the others, and a slip that is left leads to
the wrong founder, which a verifier of the last sign finds out (unless a second one leads back).

Not here: how checkpoints are made of this (made.py), what is done with them (experiments/slips.py).
"""
import random
import re
import string
from functools import partial
from typing import NamedTuple

GENERATIONS = 12
CONFUSED = 0.2                  # chance that a student takes the wrong one for the parent


def world() -> tuple[list[str], dict[str, str]]:
    """(families, founder first; person -> the wrong one who is taken for its parent): the same every time."""
    rng = random.Random("families")
    letters = rng.sample(string.ascii_letters, 4 * GENERATIONS)
    families = [str(number) + "".join(letters[GENERATIONS * number:][:GENERATIONS]) for number in range(4)]
    other = dict(zip(families, (families[1], families[0], families[3], families[2])))
    return families, {child: rng.choice(other[family][:-1]) for family in families for child in family[1:]}


FAMILIES, TAKEN = world()
PARENT = {child: parent for family in FAMILIES for parent, child in zip(family, family[1:])}
CHILD = {parent: child for child, parent in PARENT.items()}
DEPTH = {person: depth for family in FAMILIES for depth, person in enumerate(family)}      # how many ancestors


def respond(person: str, rng: random.Random, stray: float = 0.0, confused: float = 0.0,
            sees: float = 1.0) -> tuple[str, list[int]]:
    """(response, places of its stray names). With chance `confused` the one who is taken for the parent is named; with
    chance `stray` anybody but the parent, to be read but not learned. sees: chance that a slip of either kind is
    followed by another try."""
    text, strays = "", []
    while not person.isdigit():
        named = TAKEN[person] if rng.random() < confused else PARENT[person]
        if rng.random() < stray:
            named = rng.choice([other for other in CHILD if other != PARENT[person]])
            strays.append(len(text))
        again = CHILD[named] != person and rng.random() < sees
        text += f"{named}>{CHILD[named]}{'!' if again else ';'}"
        person = person if again else named
    return f"{text[:-1]}#{person}", strays


# What checkpoints are trained on: rng -> (problem, response, places in the response that are not learned)

def mending(rng: random.Random, stray: float = 0.0) -> tuple[str, str, list[int]]:
    """No slip of its own, and another try after every one that it is made to read."""
    person = rng.choice(list(PARENT))
    return f"{person}?", *respond(person, rng, stray)


def slipping(rng: random.Random, sees: float, confused: float, stray: float = 0.0) -> tuple[str, str, list[int]]:
    """At most sixteen names; after slips that are left a response can be longer, and then another person is drawn."""
    while True:
        person = rng.choice(list(PARENT))
        text, strays = respond(person, rng, stray, confused, sees)
        if text.count(">") <= 16:
            return f"{person}?", text, strays


TEACHER = {partial(mending): 0.5, partial(mending, stray=0.3): 0.5}


def student(sees: float) -> dict:
    """Kind of example -> share, of a student that sees this share of its slips."""
    return {partial(slipping, sees=sees, confused=CONFUSED): 0.7,
            partial(slipping, sees=sees, confused=CONFUSED, stray=0.2): 0.3}


def records() -> dict[str, list[dict]]:
    """Name of a file -> problems with answers (the founder) and solutions. The solutions of `mended_train`, forty to
    each problem of `families_train`, slip as the student does and mend every slip."""
    kinds = dict(zip(FAMILIES, ("taught", "taught", "others", "others")))
    rng = random.Random("mended")

    def record(person: str, kind: str, confused: float = 0.0) -> dict:
        solution = respond(person, rng, confused=confused)[0]
        return {"problem": f"{person}?", "answer": solution[-1], "solution": solution, "kind": kind,
                "ancestors": DEPTH[person]}
    test = [record(person, kind) for family, kind in kinds.items() for person in family[1:]]
    train = [one for one in test if one["kind"] == "taught"]
    mended = [record(one["problem"][0], "taught", CONFUSED) for one in train for _ in range(40)]
    return {"families_train": train, "families_test": test, "mended_train": mended}


class Read(NamedTuple):
    right: bool         # every person that it goes on with is the parent, up to the founder
    names: int          # up to the first wrong one that it goes on with
    slips: int          # of them, the wrong ones
    seen: int           # of these, those after which it tries again


def read(problem: str, response: str) -> Read:
    """Names alone are read, not the children that follow them. A right name that is taken back is one name more."""
    person, names, slips, seen, end = problem[0], 0, 0, 0, 0
    for step in re.finditer(r"(.)>(.)([;!#])", response, re.DOTALL):
        named, _, sign = step.groups()
        if step.start() != end:
            break
        end = step.end()
        wrong, again = PARENT[person] != named, sign == "!"
        names, slips, seen = names + 1, slips + wrong, seen + (wrong and again)
        if again:
            continue
        if wrong or named.isdigit():
            return Read(not wrong and sign == "#" and response[end:] == named, names, slips, seen)
        person = named
    return Read(False, names, slips, seen)
