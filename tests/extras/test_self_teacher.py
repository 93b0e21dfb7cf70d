"""The student as its own teacher: as it was at the start, as a running average, as it is.

The reference is one plain forward pass over one sequence at a time (helpers.py). Models are those of conftest.py, and a
third of another width and family.
"""
import pytest
import torch
from helpers import adamw, close, interrupted, look, one_step, ready, told

import train
from support.weights import load_model

PROMPT = "{solution};{problem}"


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_initial_self_teacher_stays_the_initial_policy(pair, command, lora_rank):
    """fails if: adapters stay on while scoring or off afterwards, or the frozen copy shares the student's
    parameters"""
    run = ready(command, recipe="opsd", teacher="self", teacher_prompt=PROMPT, lr=0.05,
                     lora_rank=lora_rank)
    initial, optimizer = load_model(pair / "student"), adamw(run)
    for step in range(3):
        batch, s, parts = look(run, step)
        shown = [run.kind.prompt(problem) for problem in batch.problems]
        close(s.teacher_logp_N, told([initial], batch.rollout, shown))
        own_N = told([run.student], batch.rollout, [run.prompts[i] for i in batch.asked])
        close(s.behavior_logp_N, own_N)
        moved = (own_N - told([initial], batch.rollout, [run.prompts[i] for i in batch.asked])).abs().max().item()
        assert (moved > 1e-3) == (step > 0)
        one_step(run, optimizer, step)
    assert (run.kind.models[0] is run.student) == (lora_rank > 0) and len(run.kind.models) == 1
    for name, weight in initial.weights().items():
        kept = dict(run.kind.models[0].named_parameters())[name]
        assert torch.equal(kept, weight) and not (kept.requires_grad and lora_rank == 0)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_average_follows_the_student(pair, command, lora_rank):
    """fails if: decay and 1 - decay swap, the average moves before the step or once per update, or misses the
    adapters"""
    run = ready(command, recipe="sdft", teacher="self", teacher_prompt=PROMPT, lr=0.05,
                     self_teacher="ema", ema=0.8, lora_rank=lora_rank, updates=2)
    expected = {name: x.double() for name, x in load_model(pair / "student").weights().items()}
    optimizer = adamw(run)
    assert run.kind.models == [run.kind.average] and run.kind.average is not run.student
    for step in range(3):
        batch, s, parts = look(run, step)
        shown = [run.kind.prompt(problem) for problem in batch.problems]
        close(s.teacher_logp_N, told([run.kind.average], batch.rollout, shown))
        one_step(run, optimizer, step)
        now = {name: x.double() for name, x in run.student.weights().items()}
        expected = {name: 0.8 * x + 0.2 * now[name] for name, x in expected.items()}
        for name, parameter in run.kind.average.named_parameters():
            close(parameter.detach(), expected[name], 1e-6)
    assert max((now[name] - x).abs().max().item() for name, x in expected.items()) > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_live_self_teacher_is_the_student(pair, command, lora_rank):
    """fails if: live switches the adapters off, a copy is made at the start, or scoring leaves a graph"""
    run = ready(command, teacher="self", self_teacher="live", lora_rank=lora_rank, lr=0.05)
    optimizer = adamw(run)
    other = ready(command, recipe="opsd", teacher="self", self_teacher="live", teacher_prompt=PROMPT, entry_clip=0,
                  lora_rank=lora_rank, lr=0.05)
    one_step(other)
    run.student.load_state_dict(other.student.state_dict())
    _, s, parts = look(run, 1)
    assert not (s.teacher_logp_N.requires_grad or parts[0].hidden_nE.requires_grad)
    record = one_step(run, optimizer, 1)        # without a secret nothing is left to learn
    assert run.kind.models == [run.student] and abs(record["reverse_kl"]) < 1e-6 and record["grad_norm"] < 1e-4
    now, initial = (model.weights().values() for model in (run.student, load_model(pair / "student")))
    assert max((x - y).abs().max().item() for x, y in zip(now, initial)) > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_resumed_run_goes_on_with_its_average(pair, command, tmp_path, monkeypatch, capsys, lora_rank):
    """fails if: the average is not saved, not restored, or restored after it was used"""
    flags = dict(recipe="sdft", teacher="self", teacher_prompt=PROMPT, ema=0.7, lr=0.05, steps=3,
                 save_every=1, lora_rank=lora_rank)
    assert train.main(command(**flags, runs=tmp_path / "whole")) == 0
    interrupted(monkeypatch, command, 2, **flags)
    for file in ("model.safetensors", "trainer.safetensors"):
        whole, resumed = ((tmp_path / name / "a" / "last" / file).read_bytes() for name in ("whole", "runs"))
        assert whole == resumed, file
