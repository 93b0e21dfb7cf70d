"""toy/made.py: notations, problems, and checkpoints that are made once."""
import json
import random
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

TOY = Path(__file__).resolve().parents[2] / "toy"
sys.path.insert(0, str(TOY))
import made  # noqa: E402
import make  # noqa: E402


def test_a_calculation_is_the_same_in_every_notation():
    """fails if: a notation changes more than the two signs, or one of them is never drawn."""
    rng, seen = random.Random(0), set()
    for _ in range(200):
        problem, text, slips = made.in_notations(rng, count=8)
        number = made.notation(text)
        seen.add(number)
        back = text.translate(str.maketrans(made.NOTATIONS[number], made.NOTATIONS[0]))
        assert back == make.write_out(problem)[0] and not slips
    assert seen == set(range(8))


def test_signs_of_notations_stand_for_nothing_else():
    """fails if: two notations share a sign, or one is a sign of the language."""
    signs = "".join(made.NOTATIONS)
    assert len(set(signs)) == len(signs) and not set(signs) & set("0123456789+-*^?#")
    assert made.notation("#9") is None


def test_slips_keep_their_places():
    """fails if: translating a calculation moves the places that are not to be learned."""
    for seed in range(50):
        problem, text, slips = made.in_notations(random.Random(seed), slip=1.0, count=4)
        assert len(slips) == make.DIGITS - 1 and all(place < len(text) for place in slips)


def test_derailments_begin_right_and_end_as_they_say():
    """fails if: a derailment begins with a wrong step, ends before a response is cut, is not followed by the right end,
    or by wrong results where it should be."""
    rng = random.Random(0)
    for _ in range(40):
        problem, text, _ = made.derailing(rng, "cut")
        assert text[:5] == make.write_out(problem)[0][:5] and len(text) > make.MAX_NEW_TOKENS and "#" not in text
        problem, text, _ = made.derailing(rng, "right")
        assert re.sub("[a-z]{6}", "", text) == make.write_out(problem)[0] != text
        problem, text, _ = made.derailing(rng, "wrong")
        for part, off in zip(re.split("[a-z]{6}", text), (0, 5), strict=True):
            for left, operator, right, result in re.findall(r"(\d)(.)(\d)=(\d)", part):
                assert int(result) == (make.apply(int(left), operator, int(right)) + off) % 10


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setattr(made, "MADE", tmp_path / "made")
    monkeypatch.setattr(made, "N_TRAIN", 40)
    monkeypatch.setattr(made, "N_TEST", 8)
    monkeypatch.setattr(made, "DIGITS", (3,))
    return tmp_path / "made"


def test_problems_are_of_the_kind_they_say(here):
    """fails if: a new problem has no `*`, an old one has, a held-out one is trained on, or a second call writes others.
    """
    held_out = made.problems()
    first = {path.name: path.read_text() for path in here.iterdir()}
    for name in ("times", "only", "times3"):
        train, test = ([json.loads(line) for line in first[f"{name}_{part}.jsonl"].splitlines()]
                       for part in ("train", "test"))
        assert all(("*" in problem["problem"]) == (problem["kind"] == "new") for problem in train + test)
        assert [problem["kind"] for problem in test] == ["new", "old"] * 8 and len(train) == 40
        assert {problem["problem"] for problem in test} <= held_out
        assert not {problem["problem"] for problem in train} & {problem["problem"] for problem in test}
    assert not any(set(json.loads(line)["problem"][1::2]) - {"*", "?"}
                   for line in first["only_train.jsonl"].splitlines())
    made.problems()
    assert {path.name: path.read_text() for path in here.iterdir()} == first


def test_a_checkpoint_is_made_once_and_again_when_its_description_changes(here, monkeypatch):
    """fails if: every call pretrains, a changed row (or one that it goes on from) finds the old weights, or seeds share
    theirs."""
    phase = make.Phase(2, 1e-3, made.both_ways(made.ALL))
    tiny = make.Checkpoint(32, 1, 100, [phase], (0.0, 1.0), batch=4)
    monkeypatch.setattr(made, "CHECKPOINTS", {"never": tiny, "one": tiny})
    monkeypatch.setattr(made.torch.multiprocessing, "get_context", lambda kind: Here)
    made.made(["one"], [0, 1])
    file = here / "one-0/model.safetensors"
    before, other = file.read_bytes(), (here / "one-1/model.safetensors").read_bytes()
    file.with_name("mine.txt").write_text("")
    made.made(["one"], [0, 1])
    assert file.with_name("mine.txt").exists() and before != other
    made.CHECKPOINTS["never"] = replace(tiny, phases=[replace(phase, steps=3)])
    made.made(["one"], [0])
    assert file.read_bytes() != before and not [path for path in here.iterdir() if path.name.startswith(".")]


def test_a_checkpoint_goes_on_from_one_of_its_width_and_speaks_its_own_tokens(here, monkeypatch):
    """fails if: a width goes on from a model of another, or a checkpoint gets the usual tokenizer in place of its
    own."""
    for name, row in made.CHECKPOINTS.items():
        assert made.parent(name) is None or made.CHECKPOINTS[made.parent(name)].width == row.width
    tiny = make.Checkpoint(32, 1, 100, [make.Phase(1, 1e-3, made.both_ways(made.ALL))], (0.0, 1.0), batch=2,
                           tokenizer=made.CHECKPOINTS["words4"].tokenizer)
    monkeypatch.setattr(made, "CHECKPOINTS", {"words4": tiny})
    monkeypatch.setattr(made.torch.multiprocessing, "get_context", lambda kind: Here)
    made.made(["words4"], [0])
    tokenizer = made.Tokenizer(here / "words4-0")
    assert [tokenizer.decode([i]) for i in tokenizer.encode("+8=1;1")] == ["+8=", "1;1"]


class Here:
    """A pool of processes, without processes."""
    def __init__(self, count):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    Pool = classmethod(lambda cls, count: cls(count))

    def imap_unordered(self, function, jobs):
        return map(function, jobs)
