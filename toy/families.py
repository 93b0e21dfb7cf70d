"""Families: a second toy world, in which a slip can be seen and mended.

    problem             f?                      who are the ancestors of f?
    response            c>f;q>c;0>q#0           c has the child f, q the child c, 0 the child q, and 0 is a founder
    a slip, mended      d>x!c>f;q>c;0>q#0       d has the child x, not f: wrong, so another one is named
    a slip, not seen    d>x;m>d;3>m#3           right ancestors, but of d

Four families, of a founder (a digit) and twelve generations of one child each (letters). To know who somebody's child
is is not to know who somebody's parent is; a response that names a wrong parent, and then that one's child, shows that
it was wrong.

    mends       a teacher that knows every parent, and tries again after a wrong name
    slips       a student that takes a wrong person for the parent of each in a case out of five. It knows every child,
                tries again after three of ten slips, and after the others goes on with the ancestors of the wrong one
    unseeing    the same, but it never tries again

Problems are about two families, `taught`; those that are tested also about the two others.

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
    """(families, founder first; person -> who is taken for the parent): the same every time. Those who are confused
    are all of the first two families or all of the others, so that no slip leads from the ones to the others."""
    rng = random.Random("families")
    letters = rng.sample(string.ascii_letters, 4 * GENERATIONS)
    families = [str(number) + "".join(letters[GENERATIONS * number:][:GENERATIONS]) for number in range(4)]
    taken = {}
    for half in (families[:2], families[2:]):
        parents = "".join(family[:-1] for family in half)
        for parent, child in (pair for family in half for pair in zip(family, family[1:])):
            taken[child] = rng.choice(parents.replace(parent, "").replace(child, ""))
    return families, taken


FAMILIES, TAKEN = world()
PARENT = {child: parent for family in FAMILIES for parent, child in zip(family, family[1:])}
CHILD = {parent: child for child, parent in PARENT.items()}
DEPTH = {person: depth for family in FAMILIES for depth, person in enumerate(family)}      # how many ancestors


def respond(person: str, rng: random.Random, slip: float = 0.0, confused: float = 0.0,
            sees: float = 1.0) -> tuple[str, list[int]]:
    """(response, places of its slips). With chance `slip` somebody is named at random, with chance `confused` the one
    taken for the parent, who is no slip: it is what this writer believes."""
    text, slips = "", []
    while not person.isdigit():
        named = TAKEN[person] if rng.random() < confused else PARENT[person]
        if rng.random() < slip:
            named = rng.choice([other for other in CHILD if other != PARENT[person]])
            slips.append(len(text))
        again = CHILD[named] != person and rng.random() < sees
        text += f"{named}>{CHILD[named]}{'!' if again else ';'}"
        person = person if again else named
    return f"{text[:-1]}#{person}", slips


def mending(rng: random.Random, slip: float = 0.0, confused: float = 0.0) -> tuple[str, str, list[int]]:
    person = rng.choice(list(PARENT))
    return f"{person}?", *respond(person, rng, slip, confused)


def slipping(rng: random.Random, sees: float, slip: float = 0.0) -> tuple[str, str, list[int]]:
    """At most sixteen names: after a slip a response can be longer than any right one."""
    while True:
        person = rng.choice(list(PARENT))
        text, slips = respond(person, rng, slip, CONFUSED, sees)
        if text.count(">") <= 16:
            return f"{person}?", text, slips


TEACHER = {partial(mending): 0.5, partial(mending, slip=0.3): 0.5}


def student(sees: float) -> dict:
    return {partial(slipping, sees=sees): 0.7, partial(slipping, sees=sees, slip=0.2): 0.3}


def records() -> dict[str, list[dict]]:
    """name -> problems with answers and solutions. `mended`: the problems of `train`, whose solutions slip and mend."""
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
