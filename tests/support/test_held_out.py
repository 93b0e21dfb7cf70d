"""Held-out problems without answers: the distance to the teacher takes the place of accuracy."""
import json
import os
from types import SimpleNamespace

import pytest
import torch
from helpers import metrics

import eval as eval_file
import train
from eval import evaluate
from model import Transformer
from support import held_out
from support.held_out import distance
from support.problems import load_problems
from support.setup import OneTeacher
from support.tokenizer import Tokenizer
from support.weights import load_model
from teacher import Teacher

SIZES = SimpleNamespace(temperature=0.7, micro_batch_tokens=30, chunk_rows=5)


@pytest.fixture
def unanswered(pair, tmp_path):
    """The held-out problems of the pair, without answers."""
    rows = [json.loads(line) for line in (pair / "test.jsonl").read_text().splitlines()]
    path = tmp_path / "unanswered.jsonl"
    path.write_text("".join(json.dumps({"prompt": row["problem"], "kind": "ab"[i % 2]}) + "\n"
                            for i, row in enumerate(rows)))
    return path


@pytest.fixture
def sampled(pair, unanswered):
    """(student, teacher, problems without answers, samples to them)."""
    student, teacher = (load_model(pair / name, dtype=torch.float64) for name in ("student", "teacher"))
    student.vocab_size = teacher.vocab_size = 20
    tokenizer, problems = Tokenizer(pair / "student"), load_problems(unanswered)
    _, samples = evaluate(student, tokenizer, problems, k=3, temperature=0.7, max_new_tokens=8, seed=1)
    return student, teacher, problems, samples


def plain_distance(student: Transformer, teachers: list, samples: list[dict], temperature: float) -> dict:
    """Sequence by sequence, all logits at once."""
    reverse, forward = [], []
    for sample, teacher in zip(samples, teachers):
        ids, n = torch.tensor([sample["prompt_tokens"] + sample["tokens"]]), len(sample["tokens"])
        p, q = ((model(ids)[0, -n - 1:-1] @ model.head_weight()[:20].T / temperature).log_softmax(-1)
                for model in (student, teacher))
        reverse.append((p.exp() * (p - q)).sum(-1))
        forward.append((q.exp() * (q - p)).sum(-1))
    return {"reverse_kl": torch.cat(reverse).mean().item(), "forward_kl": torch.cat(forward).mean().item()}


@pytest.mark.parametrize("at_once", [1, 20, 10**6])
def test_the_distance_is_the_mean_over_all_tokens(sampled, monkeypatch, at_once):
    """fails if: groups are averaged instead of tokens, the temperature is left out, or directions are swapped."""
    student, teacher, problems, samples = sampled
    monkeypatch.setattr(held_out, "TOKENS_AT_ONCE", at_once)
    kind = OneTeacher.__new__(OneTeacher)       # without its folder
    run = SimpleNamespace(student=student, cfg=SIZES, teacher=Teacher(teacher, SIZES), kind=kind)
    found = distance(run, problems, samples)
    wanted = plain_distance(student, [teacher] * len(samples), samples, 0.7)
    assert found == pytest.approx(wanted, rel=1e-9) and found["reverse_kl"] > 0.01


def test_training_is_judged_by_the_distance(pair, command, unanswered, tmp_path, capsys):
    """fails if: best is the largest distance or the last step, or an answer is asked for."""
    assert train.main(command(eval_data=unanswered, lr=0.03, eval_every=1, steps=4)) == 0
    out = capsys.readouterr().out
    summary = json.loads((tmp_path / "runs/a/summary.json").read_text())
    evaluations = {record["step"]: record["eval"] for record in metrics(tmp_path / "runs/a") if "eval" in record}
    kls = {step: found["reverse_kl"] for step, found in evaluations.items()}
    assert list(kls) == [0, 1, 2, 3, 4] and all("forward_kl" in found for found in evaluations.values())
    best = min(kls, key=kls.get)
    assert 0 < best and summary["best"] == {"step": best, "reverse_kl": kls[best]}
    assert os.readlink(tmp_path / "runs/a/best") == f"step-{best:06d}"
    assert f"before   held-out reverse_kl {kls[0]:.4f}  forward_kl" in out and "(wrong)" not in out
    assert f"done    held-out reverse_kl {kls[0]:.4f} -> {kls[4]:.4f} in 4 steps" in out
    assert [line for line in out.splitlines() if line.startswith("teacher  held-out length")]
    capsys.readouterr()
    assert train.main(command(eval_data=unanswered, lr=0.03, eval_every=1, steps=4)) == 0
    assert f"done    held-out reverse_kl {kls[0]:.4f} -> {kls[4]:.4f} in 4 steps" in capsys.readouterr().out


def test_without_a_teacher_the_last_is_the_best(command, unanswered, tmp_path, capsys):
    """fails if: a run that nobody can judge keeps its start as the best."""
    assert train.main(command(recipe="sft", teacher="none", eval_data=unanswered)) == 0
    out, summary = capsys.readouterr().out, json.loads((tmp_path / "runs/a/summary.json").read_text())
    assert summary["best"] == {"step": 2} and "reverse_kl" not in summary["after"]
    assert "before   held-out length" in out and "done    held-out mean_length" in out


def test_a_teacher_that_is_to_see_a_solution_needs_one(pair, command, unanswered, tmp_path):
    """fails if: the teacher is compared after another prompt than in training."""
    flags = dict(recipe="opsd", student=pair / "student", teacher="self", max_new_tokens=3, steps=1)
    assert train.main(command(eval_data=unanswered, **flags)) == 0
    assert not any("reverse_kl" in record["eval"] for record in metrics(tmp_path / "runs/a") if "eval" in record)
    shown = tmp_path / "shown.jsonl"
    shown.write_text("".join(json.dumps(json.loads(line) | {"response": "1+2=3"}) + "\n"
                             for line in unanswered.read_text().splitlines()))
    assert train.main(command(eval_data=shown, fresh=True, **flags)) == 0
    start = next(record["eval"] for record in metrics(tmp_path / "runs/a") if "eval" in record)
    assert start["reverse_kl"] > 1e-3           # the same weights, after another prompt


def test_several_teachers_need_a_name_in_every_problem(pair, command, unanswered, tmp_path, capsys):
    """fails if: held-out problems are all sent to the first teacher."""
    both = tmp_path / "train.jsonl"
    both.write_text("".join(json.dumps(json.loads(line) | {"kind": "a"}) + "\n"
                            for line in (pair / "train.jsonl").read_text().splitlines()))
    flags = dict(data=both, route="kind", steps=1)
    for tags, status in (("ab", 0), ("ac", 2)):
        teachers = ",".join(f"{tag}={pair / 'teacher'}" for tag in tags)
        assert train.main(command(eval_data=unanswered, teacher=teachers, fresh=True, **flags)) == status
    assert f"{unanswered}, line 2: kind is 'b', which names no teacher" in capsys.readouterr().err


def test_some_answers_are_refused(pair, command, unanswered, tmp_path, capsys):
    """fails if: problems without an answer count as wrong, or are left out in silence."""
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text(unanswered.read_text() + (pair / "test.jsonl").read_text())
    assert train.main(command(eval_data=mixed, eval_limit=0)) == 2
    assert "line 5 has an answer and line 1 has none; give all" in capsys.readouterr().err
    assert eval_file.main(["--model", str(pair / "student"), "--data", str(mixed)]) == 2
    assert "line 5 has an answer and line 1 has none; give all" in capsys.readouterr().err


def test_eval_without_answers_and_with_a_teacher(pair, unanswered, capsys):
    """fails if: --teacher is ignored, reads at another temperature, or grades what has no answer."""
    base = ["--model", str(pair / "student"), "--data", str(unanswered), "--k", "2", "--temperature", "0.8",
            "--max_new_tokens", "6", "--device", "cpu"]
    assert eval_file.main(base) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["verifier"] is None and "mean_length" in plain and not {"avg@2", "reverse_kl"} & set(plain)
    assert eval_file.main([*base, "--teacher", str(pair / "teacher")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert plain.items() <= found.items() and found["teacher"] == str(pair / "teacher")
    student, teacher = (load_model(pair / name) for name in ("student", "teacher"))
    student.vocab_size = 20
    _, samples = evaluate(student, Tokenizer(pair / "student"), load_problems(unanswered), k=2, temperature=0.8,
                          max_new_tokens=6, seed=0)
    wanted = plain_distance(student, [teacher] * len(samples), samples, 0.8)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-4)
    answered = ["--data", str(pair / "test.jsonl"), "--teacher", str(pair / "teacher")]
    assert eval_file.main([*base, *answered]) == 0
    assert {"avg@2", "reverse_kl"} <= set(json.loads(capsys.readouterr().out))
    assert eval_file.main([*base, "--teacher", str(pair / "teacher"), "--max_new_tokens", "60"]) == 2
    assert "does not fit" in capsys.readouterr().err
