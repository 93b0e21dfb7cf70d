"""Given responses: the data's solutions, what the teacher writes at a step, and what it wrote once: cold start."""
import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from conftest import END
from helpers import adamw, asked, begun, collect, interrupted, jsonl, one_step, ready, told, with_third

import train
from extras import fast, given, token_view
from extras.given import degenerate
from rollout import generate
from support.responses import from_responses
from support.checkpoint import RunFolder
from support.errors import UserError

PROMPT = "{solution};{problem}"


@pytest.fixture(scope="session")
def folder(pair):
    return with_third(pair)


def folder_at(path):
    """The folder of a run that has just begun there."""
    return RunFolder(path, {"recipe": "opd", "student": "s", "teacher": "t", "steps": 4})


# steps on given responses

@pytest.mark.parametrize("lmbda", [0.0, 0.3, 0.8, 1.0])
def test_lmbda_is_the_share_of_steps_on_own_samples(command, lmbda):
    """4 standard deviations of 1500 draws: a false alarm in 30,000 seeds, and the seed is fixed.
    fails if: the comparison with lmbda is turned around, or every step draws the same number."""
    run = ready(command, recipe="gkd", lmbda=lmbda)
    drawn = [next(write for writes, write in run.sources if writes(step)) is train.student_writes
             for step in range(1500)]
    assert abs(sum(drawn) / 1500 - lmbda) <= 4 * math.sqrt(lmbda * (1 - lmbda) / 1500)
    assert all(drawn) == (lmbda == 1) and any(drawn) == (lmbda > 0)


@pytest.mark.parametrize("recipe", ["sft", "gkd"])
@pytest.mark.parametrize("limit,finished", [(40, True), (6, True), (5, False), (3, False)])
def test_given_responses_end_with_the_stop_token_and_are_cut(command, recipe, limit, finished):
    """`1+3=4` and the stop token are six tokens.
    fails if: the stop token is not appended, or comes back after a cut, or the batch is not problems x
    samples."""
    run = ready(command, recipe=recipe, max_new_tokens=limit, lmbda=0.0)
    batch = collect(run, 1)
    rollout, asked = batch.rollout, batch.asked
    whole = [run.tokenizer.encode(run.train[i].solution) + [END] for i in asked]
    assert [rollout.response(b) for b in range(4)] == [response[:limit] for response in whole]
    assert rollout.finished_B.tolist() == [finished] * 4 and batch.on_policy is False
    prompts = [rollout.tokens_BT[b, :n].tolist() for b, n in enumerate(rollout.prompt_len_B)]
    assert prompts == [run.prompts[i] for i in asked]


def test_responses_of_the_teacher_are_the_teachers(command):
    """fails if: the student writes what --responses teacher asks of the teacher."""
    run = ready(command, recipe="sft", responses="teacher")
    batch = collect(run)
    rollout, asked = batch.rollout, batch.asked
    theirs = generate(run.kind.models[0], [run.prompts[i] for i in asked], max_new_tokens=run.cfg.max_new_tokens,
                      seed=0, stop_ids=run.tokenizer.stop_ids)
    assert [rollout.response(b) for b in range(4)] == [theirs.response(b) for b in range(4)]
    assert len(asked) == 4 and batch.on_policy is False


# responses that the teacher wrote once

def noise(length, seed):
    return "".join(np.random.default_rng(seed).choice(list("abcdefghijklmnopqrstuvwxyz"), length))


@pytest.mark.parametrize("text,expected", [
    ("", False), (noise(6000, 0), False), ("\n".join([""] * 50), False),
    ("\n".join(f"{noise(20, 0)}\n{noise(31 + i, 1 + i)}" for i in range(5)), True),
    ("\n".join(f"{noise(20, 0)}\n{noise(31 + i, 1 + i)}" for i in range(4)), False),
    ("\n".join(f"{noise(19, 0)}\n{noise(31 + i, 1 + i)}" for i in range(5)), False),
    ("".join(noise(100, 0) + noise(100, 1 + i) for i in range(3)), True),
    ("".join(noise(100, 0) + noise(100, 1 + i) for i in range(2)), False),
    ("".join(noise(99, 0) + noise(101, 1 + i) for i in range(3)), False),
    ("".join(noise(100, 0) + noise(103, 1 + i) for i in range(3)), False),          # only every 10th window
    (noise(5000, 1) + 3 * noise(53, 0), True), (noise(4000, 1) + 3 * noise(53, 0), False),
    (noise(5000, 1) + 2 * noise(53, 0), False), (noise(5000, 1) + 3 * noise(49, 0), False),
    (noise(5000, 1) + 3 * (noise(53, 0) + "\n"), True)])
def test_degenerate(text, expected):
    """fails if: a limit of one of the three rules moves, or a block may not hold a line break"""
    assert degenerate(text) is expected


def ids(run, text, stop=True):
    return run.tokenizer.encode(text) + [END] * stop


@pytest.mark.parametrize("recipe,flags", [("opd", {}), ("sg", {}), ("fire", {}),
                                          ("opsd", dict(teacher="self")),
                                          ("sdpo", dict(teacher="self"))])
def test_a_cold_start_imitates_the_teacher_then_switches(pair, command, monkeypatch, recipe, flags):
    """fails if: a cold step rolls out or keeps the recipe's loss, weight or siblings; or the last one is a
    step too late"""
    run = ready(command, recipe=recipe, reduction="token", cold_start_steps=2, lr=0.01,
                     teacher_prompt=PROMPT,
                     **{"teacher": pair / "teacher", **flags})
    written = {i: [ids(run, f"{i}={i}"), ids(run, f"{i}")] for i in (2, 3, 7)}
    optimizer, drawn = adamw(begun(run, monkeypatch, written)), set()
    for step in range(2):
        student = copy.deepcopy(run.student)
        record, batch = one_step(run, optimizer, step), run.batch
        responses = [batch.rollout.response(b) for b in range(4)]
        assert not batch.on_policy and all(response in written[i] for response, i in zip(responses, batch.asked))
        assert batch.rollout.finished_B.all() and set(batch.asked) <= set(written)
        drawn |= set(map(tuple, responses))
        log_p_N = told([student], batch.rollout, [run.prompts[i] for i in batch.asked])
        assert record["loss"] == pytest.approx(-log_p_N.mean().item(), abs=1e-5) and record["kept"] == 1
        assert not {"advantage", "sampled_entropy", "teacher_weight"} & set(record)
        assert record["on_policy"] == 0
    assert len(drawn) > 3
    assert one_step(run, optimizer, 2)["on_policy"] == 1 and run.batch.on_policy


def writes(responses, calls):
    """A stand-in for step.generate: every prompt gets these (ids, finished)."""
    def generate(model, prompts, *, samples, seed, **_):
        calls.append((model, prompts, seed))
        both = [responses(prompt) for prompt in prompts]
        assert all(len(one) == samples for one in both)
        return from_responses([p for p in prompts for _ in range(samples)],
                              [ids for one in both for ids, _ in one],
                              [finished for one in both for _, finished in one], "cpu")
    return generate


def test_only_good_responses_of_the_teacher_are_kept_and_written_once(pair, command, tmp_path, monkeypatch):
    """fails if: a cut, wrong or circling response passes, an answerless problem is dropped, the file is not
    read again, or its keys stay text"""
    run = ready(command, recipe="sg", pts_samples=4, pts_weight=0.1, pts_end=1.0, steps=4)
    run.train[0] = replace(run.train[0], answer=None)
    def responses(prompt):
        i = run.prompts.index(prompt)
        answer = str((i + 3) % 10)
        return [(ids(run, f"0+{answer}"), True), (ids(run, answer, stop=False), False),
                (ids(run, f"{answer}1"), True), (ids(run, "+" * 400 + answer), True)]
    calls = []
    monkeypatch.setattr(given, "generate", writes(responses, calls))
    run_folder = folder_at(tmp_path)
    kept = given.teacher_responses(run, run_folder)
    wanted = {i for step in range(4) for i in asked(run, step)}
    assert set(kept) == wanted and 0 in wanted and len(calls) == 1
    for i, mine in kept.items():
        good = [ids(run, f"0+{(i + 3) % 10}")]
        assert mine == (good if i else [*good, ids(run, "31")])
    monkeypatch.setattr(given, "generate", None)
    assert given.teacher_responses(run, run_folder) == kept
    unasked = ready(command, recipe="sg", pts_weight=0.0)
    assert unasked.before_first_step == [fast.prove, token_view.begin]


def test_a_teacher_without_one_good_response_is_an_error(pair, command, tmp_path, monkeypatch):
    """fails if: an empty table is written: the next start would train on nothing"""
    run = ready(command, cold_start_steps=1, pts_samples=1)
    monkeypatch.setattr(given, "generate", writes(lambda prompt: [([1, 2], False)], []))
    with pytest.raises(UserError, match="no response of the teacher passed"):
        given.teacher_responses(run, folder_at(tmp_path))
    assert not (tmp_path / given.RESPONSES).exists()


def test_every_problem_of_a_phased_step_is_written_by_its_teacher(folder, command, tmp_path, monkeypatch):
    """fails if: the first teacher writes everything or after the student's prompt, one without problems ends
    the run, or problems of --mix_data are forgotten"""
    calls = []
    monkeypatch.setattr(given, "generate", writes(lambda prompt: [([1, END], True)], calls))
    mix = jsonl(tmp_path / "mix.jsonl", [dict(problem=f"7777777{a}", answer="1", solution="1", kind="b")
                                         for a in range(4)])
    for kinds, mixed in (("ab", True), ("a", False)):
        data = jsonl(tmp_path / "d.jsonl", [dict(problem=f"{a}+3", answer="1", solution="1",
                                                 kind=kinds[a % len(kinds)])
                                            for a in range(10)])
        more = dict(mix_data=mix, mix=0.5) if mixed else {}
        run = ready(command, teacher=f"a={folder / 'teacher'},b={folder / 'third'}", route="kind",
                         data=data, steps=4,
                         problems=4, pts_weight=0.1, pts_end=0.5, pts_samples=1, privileged="solution",
                         teacher_prompt=PROMPT,
                         **more)
        calls.clear()
        kept = given.teacher_responses(run, folder_at(tmp_path / kinds))
        wanted = [i for step in range(2) for i in asked(run, step)]
        assert set(kept) == set(wanted) and (max(wanted) >= 10) == mixed
        written = {(run.kind.models.index(model), tuple(prompt)) for model, prompts, _ in calls
                   for prompt in prompts}
        assert written == {(run.kind.which(run.train[i]), tuple(run.kind.prompt(run.train[i]))) for i in wanted}
        assert len({seed for *_, seed in calls}) == len(calls) == len(kinds)


def test_a_resumed_run_reads_the_teachers_responses(pair, command, tmp_path, monkeypatch, capsys):
    """fails if: a resumed run lets the teacher write again: its weights are no longer those that wrote"""
    flags = dict(recipe="sg", steps=3, save_every=1, pts_weight=0.5, pts_hold=1.0, pts_end=1.0,
                 cold_start_steps=1, lr=0.01,
                 pts_samples=2)
    calls, real = [], given.generate
    def write(model, prompts, *, samples, **more):
        if more["seed"] % 2**32 >= 2**31:       # the seeds of what a teacher writes
            both = writes(lambda prompt: [([(prompt[0] + 3) % 10, END], True), ([1, 2], False)], calls)
            return both(model, prompts, samples=samples, **more)
        return real(model, prompts, samples=samples, **more)
    monkeypatch.setattr(given, "generate", write)
    assert train.main(command(**flags, runs=tmp_path / "whole")) == 0
    interrupted(monkeypatch, command, 2, **flags)
    assert len(calls) == 2                      # once per run
    whole, resumed = ((tmp_path / name / "a" / "last" / "trainer.safetensors").read_bytes()
                      for name in ("whole", "runs"))
    assert whole == resumed
    lines = (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["on_policy"] for r in records if "on_policy" in r] == [0, 1, 1]
    assert ["teacher_weight" in r for r in records if "on_policy" in r] == [False, True, True]
