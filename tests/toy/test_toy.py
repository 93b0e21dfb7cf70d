"""toy/: the shipped pair is what make.py promises, and every main recipe learns on it, end to end.

Not here: the mathematics of a recipe (test_losses.py, test_credit.py, test_teachers.py).
"""
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from eval import evaluate  # noqa: E402
from support.problems import load_problems  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from support.weights import load_model  # noqa: E402

TOY = ROOT / "toy"
FILES = [TOY / name for name in ("train.jsonl", "test.jsonl", "mixed_train.jsonl", "mixed_test.jsonl")]


def left_to_right(problem):
    """The running results, by hand: (calculation written out, answer)."""
    value, parts = int(problem[0]), []
    for operator, digit in zip(problem[1:-1:2], problem[2::2]):
        result = {"+": value + int(digit), "-": value - int(digit), "*": value * int(digit)}[operator] % 10
        parts.append(f"{value}{operator}{digit}={result}")
        value = result
    return f"{';'.join(parts)}#{value}", str(value)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_solution_is_right(path):
    """fails if: an operator binds stronger than its left neighbour, or a result is not taken mod 10."""
    problems = load_problems(path, need_answer=True)
    assert len(problems) >= 200
    for problem in problems:
        assert (problem.solution, problem.answer) == left_to_right(problem.prompt)


def test_held_out_problems_are_held_out():
    """fails if: a test file and a training file share a problem, or a kind has the wrong operators."""
    asked = [{problem.prompt for problem in load_problems(path)} for path in FILES]
    assert not (asked[0] | asked[2]) & asked[1] and not asked[2] & asked[3]
    for problem in load_problems(FILES[2]) + load_problems(FILES[3]):
        operators = set(problem.prompt[1:-1:2])
        assert operators <= {"low": set("+-"), "high": {"*"}}[problem.fields["kind"]]


@pytest.mark.parametrize("name,low,high", [("teacher", 0.98, 1.0), ("student", 0.10, 0.40)])
def test_a_checkpoint_answers_as_well_as_promised(name, low, high):
    """fails if: the files are not those that make.py measured, or the template or stop id is lost."""
    model, tokenizer = load_model(TOY / name), Tokenizer(TOY / name)
    assert tokenizer.vocab_size == 259 < model.config.vocab_size
    assert tokenizer.decode(tokenizer.encode("3+8=1;")) == "3+8=1;"
    metrics, _ = evaluate(model, tokenizer, load_problems(TOY / "test.jsonl", limit=60), k=4, temperature=1.0,
                          max_new_tokens=40, seed=0, slots=128)
    assert low <= metrics["avg@4"] <= high and metrics["truncation_rate"] < 0.02


def test_the_toy_world_is_small():
    """fails if: something large is added to toy/."""
    assert sum(path.stat().st_size for path in TOY.rglob("*") if path.is_file()) < 8e6


@pytest.mark.parametrize("recipe,lr", [
    ("opd", 3e-4), ("gkd", 3e-4), ("topk", 3e-4), ("sft", 1e-3), ("grpo", 1e-3), ("fire", 3e-4), ("sg", 3e-4),
    ("multi", 3e-4)])
def test_25_steps_of_a_recipe_teach_the_student(recipe, lr, tmp_path):
    """Measured with seed 0: 23 % -> 95, 93, 95, 99, 73, 84, 88 % in this order (multi: 48 % -> 99 %).
    fails if: the loss has the wrong sign, the teacher reads other tokens, or the update reaches other weights."""
    flags = f"--recipe {recipe} --lr {lr} --steps 25 --eval_limit 50 --eval_k 4 --eval_every 0 --no-eval_teacher"
    assert train.main([*flags.split(), "--runs", str(tmp_path), "--name", "a"]) == 0
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["after"]["avg@4"] > summary["before"]["avg@4"] + 0.25
    records = [json.loads(line) for line in (tmp_path / "a/metrics.jsonl").read_text().splitlines()]
    kl = [record["reverse_kl"] for record in records if "reverse_kl" in record]
    assert kl[-1] < 0.25 * kl[0] if recipe != "grpo" else not kl        # grpo has no teacher to be far from


@pytest.mark.parametrize("recipe,steps", [("opsd", 15), ("sdpo", 10)])
def test_self_distillation_teaches_a_student_that_is_shown_solutions(recipe, steps, tmp_path):
    """Full size, seed 0: opsd 27 % -> 35, 42, 50, 56 % after 15, 30, 45, 60 steps; sdpo 29 % -> 99 % in 30.
    fails if: the teacher does not read the solution, or the clip works on the wrong side."""
    flags = f"--recipe {recipe} --lr 3e-4 --steps {steps} --eval_limit 50 --eval_k 4 --eval_every 0"
    assert train.main([*flags.split(), "--runs", str(tmp_path), "--name", "a"]) == 0
    summary = json.loads((tmp_path / "a/summary.json").read_text())
    assert summary["after"]["avg@4"] > summary["before"]["avg@4"] + 0.15
