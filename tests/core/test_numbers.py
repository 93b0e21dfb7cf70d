"""Numbers that go bad, steps that teach nothing, a sampler that has changed: said, counted, kept out of checkpoints."""
import functools
import json
import math
from dataclasses import replace

import pytest
import torch
from helpers import adamw, asked, collect, one_step, ready

import losses
import rollout
import train
from support.errors import NotFinite
from support.report import without_folders
from support.weights import load_model
from teacher import SIGNALS, log_probs


# numbers that are none

def test_sampling_from_logits_that_are_no_numbers_names_the_model(pair):
    """fails if: an index error comes first, or the draw goes on with some token"""
    model = load_model(pair / "student")
    model.title = "the student"
    for spoiled in (math.nan, math.inf):
        with torch.no_grad():
            model.model.norm.weight.fill_(spoiled)
        with pytest.raises(NotFinite, match="the student's|of the student are not finite"):
            rollout.generate(model, [[1, 2], [3]], max_new_tokens=4, stop_ids=(17,))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_run_whose_numbers_go_bad_names_the_side_and_keeps_the_last_checkpoint(command, tmp_path, monkeypatch, capsys,
                                                                                   side):
    """fails if: the wrong side is blamed, a traceback comes, or weights that are not finite are saved"""
    real, calls = train.train_step, []

    def spoil(run, *rest):
        calls.append(1)
        if len(calls) == 2:
            model = run.student if side == "student" else run.kind.models[0]
            with torch.no_grad():
                model.model.norm.weight.fill_(math.nan)
        return real(run, *rest)
    monkeypatch.setattr(train, "train_step", spoil)
    assert train.main(command(steps=3, save_every=1)) == 2
    error = capsys.readouterr().err
    assert f"the {side}" in error and error.count("\n") == 1
    assert ("--lr" in error) == (side == "student")
    assert (tmp_path / "runs/a/last").resolve().name == "step-000001"


def test_weights_that_went_bad_in_the_last_step_are_not_saved(command, tmp_path, monkeypatch, capsys):
    """fails if: the save after a step does not look at the student"""
    real = train.train_step

    def spoil(run, *rest):
        record = real(run, *rest)
        with torch.no_grad():
            run.student.model.norm.weight.fill_(math.inf)
        return record
    monkeypatch.setattr(train, "train_step", spoil)
    assert train.main(command(steps=2, save_every=1)) == 2
    assert "student" in capsys.readouterr().err
    assert (tmp_path / "runs/a/last").resolve().name == "step-000000"


@pytest.mark.parametrize("flags", [
    dict(lr="1e38"), dict(temperature="1e-308"), dict(temperature="nan"), dict(weight_decay="1e20"), dict(beta="nan"),
    dict(entry_clip="1e308"), dict(steps=10**20), dict(problems=10**6, samples=10**6), dict(uni_margin="inf"),
    dict(divergence="k2", updates=4)], ids=str)
def test_settings_that_cannot_work_are_one_sentence(command, capsys, flags):
    """fails if: a number is taken that overflows, never ends, or makes the loss another one"""
    assert train.main(command(**flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --") or "k2" in error
    assert error.count("\n") == 1


# sampler and trainer

def test_sampler_gap_is_the_mean_distance_of_the_two_log_probs(command):
    """By plain forward passes in float64.
    fails if: it is measured after the student moved, or at another temperature"""
    run = ready(command, temperature=0.7, updates=2, lr=0.5, divergence="policy_gradient")
    batch = collect(run)
    rollout_ = batch.rollout
    hidden = run.student.response_hidden(rollout_.tokens_BT, rollout_.mask_BT)
    logp_NV = log_probs(hidden.double(), run.student.head().double(), run.cfg.temperature)
    token_N = rollout_.rows(rollout_.tokens_BT)
    shifted = replace(rollout_, logp_BT=rollout_.logp_BT + 0.25 * rollout_.mask_BT)
    expected = (logp_NV.gather(1, token_N[:, None]).squeeze(1) - rollout_.rows(rollout_.logp_BT) - 0.25).abs().mean()
    run.sources = [(lambda step: True, lambda run, step: replace(batch, rollout=shifted))]
    record = one_step(run)
    assert record["sampler_gap"] == pytest.approx(expected.item(), rel=1e-4)


def test_sampler_gap_of_given_responses_is_not_a_number(command):
    """Nobody sampled them. fails if: it is 0, which would say that all is well"""
    run = ready(command, recipe="sft")
    assert math.isnan(one_step(run)["sampler_gap"])


def test_a_changed_sampler_is_warned_about_once_and_stands_in_the_summary(command, tmp_path, monkeypatch, capsys):
    """min-p: tokens below a tenth of the largest probability are never drawn, as a fork might do.
    fails if: the run trains on off-policy without a word, or warns at every step"""
    real = rollout.sample

    def min_p(logits_BV, temperature, uniform_B):
        low = logits_BV < logits_BV.amax(-1, keepdim=True) + math.log(0.1)
        return real(logits_BV.masked_fill(low, -math.inf), temperature, uniform_B)
    monkeypatch.setattr(rollout, "sample", min_p)
    assert train.main(command(steps=3)) == 0
    out = capsys.readouterr()
    assert (out.out + out.err).count("warning: log-probs of sampler and trainer") == 1
    assert json.loads((tmp_path / "runs/a/summary.json").read_text())["sampler_gap"] > 0.01


def test_an_unchanged_sampler_stays_within_rounding(command, tmp_path, capsys):
    """fails if: the warning comes for nothing"""
    assert train.main(command(steps=2)) == 0
    assert "warning" not in capsys.readouterr().out
    assert 0 < json.loads((tmp_path / "runs/a/summary.json").read_text())["sampler_gap"] < 1e-5


# steps

def test_a_step_without_a_gradient_moves_nothing_and_is_counted(command, tmp_path, monkeypatch):
    """AdamW would go on by its moments. fails if: a weight moves, or the step is called skipped"""
    run = ready(command, recipe="grpo", samples=2)
    optimizer = adamw(run, lr=0.1)
    verdicts = iter([[1.0, 0.0, 0.0, 1.0], [1.0] * 4, [0.0] * 4])
    monkeypatch.setitem(SIGNALS, "reward_B", lambda *_: torch.tensor(next(verdicts)))
    first = one_step(run, optimizer)
    before = [p.clone() for p in run.student.parameters()]
    rest = [one_step(run, optimizer, step) for step in (1, 2)]
    assert all(torch.equal(p, old) for p, old in zip(run.student.parameters(), before))
    assert [r["empty"] for r in (first, *rest)] == [0, 1, 1] and not any(r["skipped"] for r in rest)


@pytest.mark.parametrize("lmbda", [0.0, 0.5])
def test_every_problem_is_asked_once_an_epoch_whoever_writes(command, lmbda):
    """fails if: places in the list of problems are counted by step while given solutions fill a batch with others"""
    run = ready(command, divergence="jsd", lmbda=lmbda, problems=2, samples=4)
    steps, total = [asked(run, step) for step in range(40)], len(run.train)
    every = [i for chosen in steps for i in chosen]
    for start in range(0, len(every) - total + 1, total):
        assert sorted(every[start:start + total]) == list(range(total))
    assert set(map(len, steps)) == ({8} if lmbda == 0 else {2, 8})


def test_a_live_self_teacher_stands_still_while_the_student_is_updated(command):
    """fails if: the head that was scored with is the student's own parameter"""
    run = ready(command, teacher="self", self_teacher="live", updates=3, lr=0.5)
    (part,) = run.teacher.parts(collect(run))
    head = part.head_VE.clone()
    with torch.no_grad():
        run.student.head_weight().add_(1.0)
    assert torch.equal(part.head_VE, head)


def test_groups_of_parameters_keep_their_own_learning_rates(command):
    """fails if: one learning rate is written into every group"""
    run = ready(command, warmup_steps=2)
    first, *others = [p for _, p in run.student.trainable()]
    optimizer = torch.optim.AdamW([dict(params=[first], lr=1e-2), dict(params=others, lr=1e-3)])
    for step, share in ((0, 0.5), (1, 1.0), (2, 1.0)):
        one_step(run, optimizer, step)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2 * share, 1e-3 * share])


def test_the_last_step_has_the_last_weight_of_kdrl(command, monkeypatch):
    """fails if: progress is counted so that the last step stops short of the end"""
    seen = []
    @functools.wraps(losses.kdrl)
    def noting(s, args):
        seen.append(s.progress)
        return torch.ones_like(s.behavior_logp_N)
    monkeypatch.setitem(losses.ADVANTAGES, "kdrl", noting)
    assert train.main(command(recipe="kdrl", steps=3, samples=2)) == 0
    assert seen == [0.0, 0.5, 1.0]


def test_the_untouched_student_is_a_candidate_for_best(command, tmp_path, monkeypatch):
    """fails if: a run that only gets worse leaves a worse model in best/"""
    scores = iter([0.5, 0.2, 0.1])
    real = train.test

    def falling(*args):
        metrics, samples = real(*args)
        return metrics | {"avg@1": next(scores)}, samples
    monkeypatch.setattr(train, "test", falling)
    assert train.main(command(steps=2, eval_every=1, eval_teacher=None, teacher="none", recipe="grpo")) == 0
    assert (tmp_path / "runs/a/best").resolve().name == "step-000000"
    assert (tmp_path / "runs/a/last").resolve().name == "step-000002"
    assert json.loads((tmp_path / "runs/a/summary.json").read_text())["best"]["step"] == 0


def test_grpo_loads_no_teacher(command):
    """fails if: the recipe without a teacher scores every step with one"""
    run = ready(command, recipe="grpo", teacher=None, samples=2)
    assert run.kind.models == []


def test_paths_of_this_machine_do_not_reach_a_public_log():
    """fails if: a folder is told, or a hub id is cut"""
    assert without_folders("/home/me/models/x") == "x"
    assert without_folders("~/models/x") == "x" and without_folders("../m/x") == "x"
    assert without_folders("low=/home/me/low,high=~/a/high") == "low=low,high=high"
    assert without_folders("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B" and without_folders(0.5) == 0.5
