"""Responses that the initial student writes once: who wrote them, who scored them and when, and how the ratio shows."""
import gc
import shutil

import pytest
import torch
from helpers import (asked, close, collect, interrupted, one_step, predictions, ready, result, sampled, settings,
                     steps_of)

import train
from extras import lightning
from support.errors import UserError
from support.weights import load_model
from teacher import Teacher

RUN = dict(recipe="lightning", problems=4, samples=2, steps=6, lr=0.05, save_every=2)     # 10 problems: 2.4 epochs


def begun(run, tmp_path, state=None):
    """The run, as far as the first step."""
    class Folder:
        path = tmp_path
    for ready_now in run.before_first_step:
        ready_now(run, Folder, state)
    return run


@torch.no_grad()
def logp(model, run, batch):
    """The model's log-prob of every response token, one sequence at a time."""
    responses = [batch.rollout.response(b) for b in range(len(batch.asked))]
    return torch.cat([sampled(predictions(model, run.prompts[i], response), response)
                      for i, response in zip(batch.asked, responses)])


def b_of(pair, run, batch):
    """log b, by the checkpoint that the run began with."""
    return logp(load_model(pair / "student"), run, batch)


def test_every_step_learns_from_what_the_initial_student_wrote(pair, command, tmp_path, monkeypatch):
    """fails if: a later student writes, log b is that of a later student, an epoch writes anew, or the teacher is asked
    later than before the first step"""
    read, times = Teacher.read, []
    monkeypatch.setattr(Teacher, "read", lambda self, *args: times.append(self.model.title) or read(self, *args))
    run = begun(ready(command, **RUN), tmp_path)
    assert times == ["the teacher"] * 3         # 10 problems, 4 a step
    optimizer, first = torch.optim.SGD(run.student.parameters(), lr=0.1), {}
    for step in range(6):
        batch = collect(run, step)
        assert batch.asked == [i for i in asked(run, step) for _ in range(2)] and not batch.on_policy
        close(batch.rollout.rows(batch.rollout.logp_BT), b_of(pair, run, batch))
        for b, i in enumerate(batch.asked):
            first.setdefault((i, b % 2), batch.rollout.response(b))
            assert first[i, b % 2] == batch.rollout.response(b)
        one_step(run, optimizer, step)
    assert len(first) == 20 and len(times) == 3


def test_the_ratio_is_shown(pair, command, tmp_path):
    """fails if: the ratio is against a later student, upside down, or not 1 before the first update"""
    run = begun(ready(command, **{**RUN, "clip": 0.1}), tmp_path)
    optimizer = torch.optim.SGD(run.student.parameters(), lr=0.5)
    record = one_step(run, optimizer, 0)
    assert record["importance_ratio"] == pytest.approx(1, abs=1e-5) and record["ratio_outside_clip"] == 0
    batch = collect(run, 1)
    ratio_N = (logp(run.student, run, batch) - b_of(pair, run, batch)).exp()
    record = one_step(run, optimizer, 1)
    assert record["importance_ratio"] == pytest.approx(ratio_N.mean().item(), abs=1e-5) != 1
    assert record["ratio_outside_clip"] == pytest.approx(((ratio_N - 1).abs() > 0.1).double().mean().item(), abs=1e-6)


def test_the_policy_gradient_weighs_by_the_ratio(pair, command, tmp_path):
    """fails if: the advantage or the ratio takes the present student for the one that wrote"""
    run = begun(ready(command, **{**RUN, "divergence": "policy_gradient", "clip": 1e9}), tmp_path)
    one_step(run, torch.optim.SGD(run.student.parameters(), lr=0.5), 0)
    batch = collect(run, 1)
    p_N, q_N = (logp(model, run, batch) for model in (run.student, load_model(pair / "teacher")))
    b_N = b_of(pair, run, batch)
    record = one_step(run, torch.optim.SGD(run.student.parameters(), lr=0.0), 1)
    assert record["loss"] == pytest.approx(-((p_N - b_N).exp() * (q_N - b_N)).mean().item(), abs=1e-4)


def moved(folder):
    seconds = ("second", "memory")
    return (folder / "a/last/model.safetensors").read_bytes(), [
        {key: value for key, value in record.items() if not any(word in key for word in seconds)}
        for record in steps_of(folder / "a")]


@pytest.mark.parametrize("flags", [dict(), dict(divergence="policy_gradient", cache_topk=1),
                                   dict(weight="fire"),
                                   dict(privileged="solution", teacher_prompt="{solution};{problem}"),
                                   dict(temperature=0.7, lora_rank=2)], ids=lambda flags: " ".join(flags))
def test_a_run_without_the_teacher_learns_the_same(command, tmp_path, monkeypatch, flags):
    """fails if: the teacher is asked after the start, or what is read differs from what was written"""
    read, times = Teacher.read, []
    monkeypatch.setattr(Teacher, "read", lambda self, *args: times.append(self.model.title) or read(self, *args))
    folder = tmp_path / "cache"
    assert train.main(command(runs=tmp_path / "writes", **{**RUN, **flags}, cache_teacher=folder)) == 0
    assert times.count("the teacher") == 3          # 10 problems, 4 a step
    times.clear()
    gc.collect()
    reads = {**RUN, **flags, "teacher": f"cache:{folder}", "cache_topk": None}
    assert train.main(command(runs=tmp_path / "reads", **reads)) == 0
    assert "the teacher" not in times and moved(tmp_path / "reads") == moved(tmp_path / "writes")


def test_it_resumes_and_begins_afresh(command, tmp_path, monkeypatch):
    """fails if: the responses are written anew by the student of step 4, or --fresh stumbles over the folder"""
    assert train.main(command(runs=tmp_path / "whole", **RUN)) == 0
    interrupted(monkeypatch, command, 4, **RUN)
    whole, resumed = result(tmp_path / "whole/a"), result(tmp_path / "runs/a")
    assert whole == resumed and "teacher_cache" in whole["left"]
    gc.collect()
    assert train.main(command(**{**RUN, "seed": 1}, fresh=True)) == 0
    assert result(tmp_path / "runs/a") != whole


@pytest.mark.parametrize("flags, name", [
    (dict(divergence="k2"), "has no ratio"), (dict(lmbda=0.5), "keep --lmbda 1"),
    (dict(divergence="cross_entropy", lmbda=0.5), "has no ratio"),
    (dict(teacher="none", divergence="policy_gradient", advantage="grpo"), "there is none"),
    (dict(teacher="self", self_teacher="ema"), "keep --self_teacher initial"),
    (dict(privileged="sibling", teacher_prompt="{solution};{problem}"), "draws a sibling anew")])
def test_what_is_wrong_on_stored_responses_is_refused(command, flags, name):
    """fails if: a loss without a ratio, or a teacher that changes, is let through"""
    with pytest.raises(UserError, match=name):
        settings(command, **{**RUN, **flags})


def test_responses_of_another_run_are_one_sentence(pair, command, tmp_path, capsys):
    """fails if: responses of another seed, student, sampler or set of problems are learned from"""
    folder = tmp_path / "cache"
    assert train.main(command(**RUN, cache_teacher=folder)) == 0
    shutil.copytree(pair / "student", tmp_path / "other")
    weights = (tmp_path / "other/model.safetensors").read_bytes()
    (tmp_path / "other/model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    reads = {**RUN, "teacher": f"cache:{folder}"}
    for number, (flags, name) in enumerate([
            ({"seed": 1}, "another --seed"), ({"samples": 3}, "another --samples"),
            ({"temperature": 0.9}, "another --temperature"),
            ({"student": tmp_path / "other"}, "another student"), ({"data": pair / "test.jsonl"}, "another prompts")]):
        capsys.readouterr()
        assert train.main(command(runs=tmp_path / f"r{number}", **{**reads, **flags})) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and name in said, said
    (folder / lightning.RESPONSES).write_bytes(b"x" * 30)
    assert train.main(command(runs=tmp_path / "r", **reads)) == 2
    assert "is not what a run writes" in capsys.readouterr().err
