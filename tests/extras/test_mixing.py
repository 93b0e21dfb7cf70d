"""--mix_data: the share of the second file, and what of it is left out."""
import json

import numpy as np
import pytest
from helpers import jsonl, ready

import train
from extras.mixing import near_duplicates, pick_mixed
from support.problems import Problem


def problem(text):
    return Problem(text, None, None, {}, "line 1")


@pytest.mark.parametrize("threshold", [0.2, 0.6, 0.9, 1.0])
def test_near_duplicates_equal_brute_force(threshold):
    """fails if: a prefix is one gram too short, the two sides rank their grams differently, or the union's
    size is not taken"""
    rng = np.random.default_rng(0)
    def text(length):
        return "".join(rng.choice(list("ab c"), length))
    def nearly(one):
        letters = list(one)
        for at in rng.integers(0, len(letters), rng.integers(0, 6)):
            letters[at] = str(rng.choice(list("abXY ")))
        return "".join(letters)
    others = [text(n) for n in rng.integers(1, 40, 60)]
    mine = [nearly(others[i]) for i in rng.integers(0, 60, 60)] + [text(n) for n in rng.integers(1, 40, 40)]
    def grams(one):
        one = " ".join(one.lower().split())
        return {one[i:i + 5] for i in range(len(one) - 4)} or {one}
    expected = {i for i, one in enumerate(mine) if any(
        len(grams(one) & grams(other)) >= threshold * len(grams(one) | grams(other)) for other in others)}
    assert near_duplicates([*map(problem, mine)], [*map(problem, others)], threshold) == expected
    assert 5 < len(expected) < 95


def user(*texts):
    roles = ("system", "user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


def test_near_duplicates_fold_case_space_and_chats(pair, command, tmp_path):
    """fails if: case or white space counts, a chat is compared as a list, or --mix_data keeps what --data
    has"""
    mine = [problem("What is  TWO plus\ntwo?"), problem(user("be brief", "what is two plus two?")),
            problem("what is it?"),
            problem("")]
    assert near_duplicates(mine, [problem("what is two plus two?")]) == {0, 1}
    assert near_duplicates(mine, []) == set() and near_duplicates([], mine) == set()
    known = [json.loads(line) for line in (pair / "train.jsonl").read_text().splitlines()]
    new = [dict(problem=f"7777777{a}", answer="1") for a in range(3)]
    again = dict(known[5], problem=" " + known[5]["problem"])
    path = jsonl(tmp_path / "mix.jsonl", [known[4], new[0], again, *new[1:]])
    run = ready(command, mix_data=path, mix=0.5)
    assert run.first == 10 and [p.prompt for p in run.train[10:]] == [r["problem"] for r in new]


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_pick_mixed_keeps_the_share(count, share):
    """fails if: each step rounds for itself, a file is drawn with replacement, or its indices start at 0"""
    asked = [pick_mixed(train.pick, 7, 5, share, range(step * count, (step + 1) * count), 3) for step in range(40)]
    assert all(len(one) == count for one in asked)
    for step in range(40):
        drawn = [i for one in asked[:step + 1] for i in one]
        assert abs(sum(i >= 7 for i in drawn) - share * len(drawn)) < 1 and set(drawn) <= set(range(12))
    for low, size in ((0, 7), (7, 5)):
        mine = [i for i in drawn if low <= i < low + size]
        epochs = [mine[at:at + size] for at in range(0, len(mine) // size * size, size)]
        assert all(sorted(epoch) == list(range(low, low + size)) for epoch in epochs)
        assert len(epochs) < 4 or len(set(map(tuple, epochs))) > 1
    assert pick_mixed(train.pick, 7, 5, share, range(11 * count, 12 * count), 3) == asked[11]
