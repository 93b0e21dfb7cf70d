"""Settings of extras that contradict each other or the data: one sentence, before anything is loaded."""
import json
import re

import pytest
from helpers import jsonl, with_third

import train
from support import setup

PROMPT = "{solution};{problem}"


@pytest.fixture(scope="session")
def folder(pair):
    return with_third(pair)


def bad_flags(folder, tmp_path):
    """name -> (flags, what the one sentence says)."""
    known = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    without = {key: jsonl(tmp_path / f"{key}.jsonl",
                          [{k: v for k, v in r.items() if k not in keys} for r in known])
               for key, keys in (("solution", ["solution"]), ("answer", ["answer", "solution"]))}
    strange = jsonl(tmp_path / "strange.jsonl", [known[0] | {"kind": "a"}, known[1] | {"kind": "c"}])
    two = dict(teacher=f"a={folder / 'teacher'},b={folder / 'third'}", route="kind")
    secret = dict(recipe="opsd", teacher="self")
    long = PROMPT + 45 * "1"
    return {
        "unknown tag": (two | dict(data=strange),
                        r"strange.jsonl, line 2: kind is 'c', which names no teacher.* a, b"),
        "no tag": (two, r"train.jsonl, line 1: kind is None, which names no teacher"),
        "no folder": (dict(teacher="a="), "'a' is no tag=folder pair"),
        "a tag twice": (dict(teacher=f"a={folder / 'teacher'},a={folder / 'third'}"),
                        "a tag names two teachers"),
        "no solution": (secret | dict(data=without["solution"], teacher_prompt=PROMPT),
                        r"solution.jsonl, line 1 has no solution"),
        "long secret": (secret | dict(teacher_prompt=long, max_new_tokens=10),
                        r"train.jsonl, line 1: the teacher's prompt of \d+ tokens plus --max_new_tokens 10 "
                        r"exceed the context of 64"),
        "long sibling": (secret | dict(recipe="sdpo", teacher_prompt=long, max_new_tokens=10),
                         r"line 1: the teacher's prompt of"),
        "no placeholder": (secret | dict(teacher_prompt="{problem}"),
                           "must contain {problem} and {solution}"),
        "grpo alone": (dict(recipe="grpo", samples=1), "--samples must be at least 2"),
        "sg alone": (dict(recipe="sg", samples=1), "--samples must be at least 2"),
        "sibling alone": (secret | dict(recipe="sdpo", samples=1, teacher_prompt=PROMPT),
                          "--samples must be at least 2"),
        "sg without answers": (dict(recipe="sg", data=without["answer"]), "answer.jsonl, line 1: no answer"),
        "phased without answers": (dict(pts_weight=0.1, data=without["answer"]),
                                   "answer.jsonl, line 1: no answer"),
        "no teacher": (dict(teacher="none"), "needs a teacher"),
        "secret for nobody": (dict(recipe="grpo", teacher="none", privileged="solution"), "there is none"),
        "report on nobody": (dict(recipe="grpo", teacher="none", report_only=True), "there is none"),
        "two authors": (two | dict(recipe="sft", responses="teacher"), "written by one teacher"),
        "own author": (dict(recipe="sft", responses="teacher", teacher="self"), "written by one teacher"),
        "second teacher for no report": (dict(compare_teacher=folder / "third"), "belongs to --report_only"),
        "half a mixture": (dict(mix=0.5), "--mix and --mix_data go together"),
        "all of it known": (dict(mix=0.5, mix_data=folder / "train.jsonl"), "every problem is also in"),
        "phases turned": (dict(pts_hold=0.5, pts_end=0.4), "--pts_hold and --pts_end"),
        "cold scope": (dict(recipe="scope", scope_temperature=0), "--scope_temperature must be above 0"),
    }

BAD = ("unknown tag", "no tag", "no folder", "a tag twice", "no solution", "long secret", "long sibling",
       "no placeholder",
       "grpo alone", "sg alone", "sibling alone", "sg without answers", "phased without answers",
       "no teacher",
       "secret for nobody", "report on nobody", "two authors", "own author", "second teacher for no report",
       "half a mixture", "all of it known", "phases turned", "cold scope")


@pytest.mark.parametrize("name", BAD)
def test_a_wrong_setting_is_one_sentence(folder, command, tmp_path, monkeypatch, capsys, name):
    """fails if: a rule is dropped from check() or set_up(), or comes after the models"""
    monkeypatch.setattr(setup, "load_model", None)
    every = bad_flags(folder, tmp_path)
    flags, message = every[name]
    assert set(every) == set(BAD)
    assert train.main(command(**flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "runs").exists()
