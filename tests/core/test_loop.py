"""Whole runs: a run leaves what the docstrings promise, and steps that are not finite move nothing.

Everything runs on the tiny pair of conftest.py. Not here: kill and resume, wrong input (tests/support/).
"""
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import END
from helpers import metrics, steps_of
from safetensors.torch import load_file

import losses
import train
from support.tokenizer import Tokenizer


# guards

def spoil(monkeypatch, kind, steps):
    """Makes loss and gradient, or the gradient alone, not finite at these steps (one chunk per step)."""
    real, calls = losses.reverse_kl, []
    def spoiled(rows, args):
        calls.append(1)
        loss_N = real(rows, args)
        if len(calls) not in steps:
            return loss_N
        return loss_N * math.nan if kind == "loss" else loss_N + (loss_N - loss_N.detach()).sqrt()
    monkeypatch.setitem(losses.DIVERGENCES, "reverse_kl", spoiled)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(command, tmp_path, pair, monkeypatch, capsys,
                                                                kind):
    """fails if: update() steps the optimizer anyway, or looks at only one of loss and gradient."""
    spoil(monkeypatch, kind, {1})
    assert train.main(command(steps=1)) == 0
    folder = tmp_path / "runs/a"
    before, after = (load_file(path / "model.safetensors") for path in (pair / "student", folder / "last"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(name.startswith("exp_avg") for name in load_file(folder / "last/trainer.safetensors"))
    assert steps_of(folder)[0]["skipped"] == 1 == json.loads((folder / "summary.json").read_text())["skipped"]
    assert "SKIPPED" in capsys.readouterr().out


@pytest.mark.parametrize("spoiled,done", [({1, 2, 3, 4, 6, 7, 8, 9}, 10), ({3, 4, 5, 6, 7}, 7)])
def test_five_skipped_steps_in_a_row_end_the_run(command, tmp_path, monkeypatch, capsys, spoiled, done):
    """fails if: skipped steps are counted in all instead of in a row, or the run goes on for ever."""
    spoil(monkeypatch, "loss", spoiled)
    assert train.main(command(steps=10)) == (0 if done == 10 else 2)
    skipped = [record["skipped"] for record in steps_of(tmp_path / "runs/a")]
    assert skipped == [int(step in spoiled) for step in range(1, done + 1)]
    error = capsys.readouterr().err
    assert error == "" if done == 10 else error.startswith("error: ") and "5 steps in a row" in error


@pytest.mark.parametrize("schedule,expected", [
    ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ("cosine", [0.25, 0.5, 0.75, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])])
def test_learning_rate_rises_then_follows_its_schedule(schedule, expected):
    """fails if: warm-up starts at 0 or ends late, or the cosine does not start where warm-up ends."""
    cfg = train.Config(lr=2.0, warmup_steps=4, steps=8, schedule=schedule)
    assert [train.learning_rate(step, cfg, 2.0) for step in range(8)] == pytest.approx([2 * x for x in expected])


# whole runs

def strict_json(folder):
    """Every JSON text in a run folder, parsed by the letter: NaN and Infinity are no JSON."""
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")
    for path in folder.rglob("*.json*"):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("flags", [
    *({"recipe": name} for name in train.SETTINGS.recipes), {"recipe": "grpo", "teacher": "none"},
    {"recipe": "sft", "teacher": "none"}, {"recipe": "gkd", "responses": "teacher"}],
    ids=lambda flags: " ".join(flags.values()))
def test_every_recipe_runs_and_leaves_what_it_promises(command, tmp_path, flags):
    """Responses of two tokens leave quarters empty: undefined numbers, which must become null.
    fails if: a recipe breaks, NaN reaches a file, or metrics.jsonl does not begin with configuration and
    commit."""
    own = {"sg": {"pts_weight": 0.0}, "sdft": {"skip_first": 1}}.get(flags["recipe"], {})     # no room in two tokens
    assert train.main(command(**flags, **own, max_new_tokens=2, max_grad_norm=math.inf)) == 0
    folder = tmp_path / "runs/a"
    strict_json(folder)
    first, *records = metrics(folder)
    assert set(first) == {"config", "commit"} and first["config"]["recipe"] == flags["recipe"]
    assert None in records[1].values() and [r["step"] for r in records if "loss" in r] == [1, 2]
    summary = json.loads((folder / "summary.json").read_text())
    assert {"before", "after", "teacher", "steps", "seconds"} <= set(summary) and summary["steps"] == 2
    assert {"avg@1", "pass@1", "mean_length"} <= set(summary["after"])
    assert (summary["teacher"] is None) == (flags.get("teacher") == "none")
    norms = [load_file(path / "model.safetensors")["model.norm.weight"]
             for path in (folder / "last", Path(first["config"]["student"]))]
    needs_a_right_answer = flags["recipe"] in ("grpo", "sdpo", "rlsd", "sdpg", "rlcsd")
    assert needs_a_right_answer or not torch.equal(*norms)


@pytest.mark.parametrize("stop_ids,saved", [(None, END), ("2,5", [2, 5]), ("5", 5)])
def test_stop_ids_of_the_run_are_saved_with_the_model(command, tmp_path, pair, stop_ids, saved):
    """fails if: Tokenizer.save keeps the old eos_token_id, drops other keys, or rewrites without need."""
    assert train.main(command(stop_ids=stop_ids)) == 0
    path, source = tmp_path / "runs/a/last/generation_config.json", pair / "student/generation_config.json"
    assert json.loads(path.read_text()) == {"eos_token_id": saved, "top_p": 0.9}
    assert (path.read_bytes() == source.read_bytes()) == (stop_ids is None)
    assert list(Tokenizer(path.parent).stop_ids) == (saved if isinstance(saved, list) else [saved])
