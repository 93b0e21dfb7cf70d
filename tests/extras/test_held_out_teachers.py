"""The distance on held-out problems to several teachers, to one that is shown a solution, across tokenizers."""
import json
from pathlib import Path

import pytest
import torch
from helpers import jsonl, predictions, ready

from eval import evaluate
from support.held_out import distance

TOY = Path(__file__).resolve().parents[2] / "toy"


@pytest.fixture
def compared(command, pair, tmp_path):
    """compared(teacher="self", ...) -> (a run in float64, samples of its student to the held-out problems)."""
    def make(**flags):
        rows = [json.loads(line) for line in (pair / "test.jsonl").read_text().splitlines()]
        held_out = [{"prompt": row["problem"], "response": row["solution"], "kind": "ab"[i % 2]}
                    for i, row in enumerate(rows)]
        run = ready(command, eval_data=jsonl(tmp_path / "held_out.jsonl", [{**row, "answer": ""} for row in held_out]),
                    eval_limit=0, temperature=0.7, **flags)
        for model in (run.student, *run.kind.models):
            model.to(torch.float64).compute_dtype = torch.float64
        _, samples = evaluate(run.student, run.tokenizer, run.held_out, k=3, temperature=0.7, max_new_tokens=8, seed=1)
        return run, samples
    return make


def plain_distance(run, samples: list[dict], models: list, prompts: list[list[int]]) -> dict:
    """Sequence by sequence, all logits at once: of problem i against models[i] after prompts[i]."""
    reverse, forward = [], []
    for sample in samples:
        i, response = sample["problem"], sample["tokens"]
        with torch.no_grad():
            p, q = (predictions(model, prompt, response, 0.7)
                    for model, prompt in ((run.student, sample["prompt_tokens"]), (models[i], prompts[i])))
        reverse.append((p.exp() * (p - q)).sum(-1))
        forward.append((q.exp() * (q - p)).sum(-1))
    return {"reverse_kl": torch.cat(reverse).mean().item(), "forward_kl": torch.cat(forward).mean().item()}


def prompts_of(run) -> list[list[int]]:
    """As the student reads them."""
    return [run.tokenizer.prompt_ids(problem.prompt) for problem in run.held_out]


def test_every_problem_goes_to_its_own_teacher(compared, pair, tmp_path):
    """fails if: teachers are chosen by sample instead of by problem."""
    rows = [json.loads(line) for line in (pair / "train.jsonl").read_text().splitlines()]
    data = jsonl(tmp_path / "routed.jsonl", [{**row, "kind": "a"} for row in rows])
    run, samples = compared(teacher=f"a={pair / 'teacher'},b={pair / 'student'}", route="kind", data=data)
    found, teachers = distance(run, run.held_out, samples), run.kind.models
    assert found == pytest.approx(plain_distance(run, samples, teachers * 2, prompts_of(run)), rel=1e-9)
    own = [sample for sample in samples if sample["problem"] % 2]           # the student's own weights
    assert distance(run, run.held_out, own) == pytest.approx({"reverse_kl": 0, "forward_kl": 0}, abs=1e-12)


def test_a_teacher_reads_its_own_prompts(compared):
    """fails if: what the teacher is shown beside the problem is left out."""
    run, samples = compared(teacher="self", privileged="solution", teacher_prompt="{solution};{problem}")
    shown = [run.tokenizer.prompt_ids(f"{problem.solution};{problem.prompt}") for problem in run.held_out]
    found = distance(run, run.held_out, samples)
    assert found == pytest.approx(plain_distance(run, samples, run.kind.models * 4, shown), rel=1e-9)
    assert found["reverse_kl"] > 1e-3


def test_across_tokenizers_shared_tokens_are_compared(compared):
    """With a bridge between equal tokenizers every token is shared, and the figures are those without it.
    fails if: the rows of a bridge are lost, or paired by place."""
    run, samples = compared(align="always")
    done = [sample for sample in samples if sample["finished"]] or samples
    wanted = plain_distance(run, done, run.kind.models * 4, prompts_of(run))
    assert any(run.kind.bridges) and distance(run, run.held_out, done) == pytest.approx(wanted, rel=1e-6)


def test_with_another_tokenizer_the_words_of_both_are_compared(command):
    """Against the reading itself: chunks of one token on both sides, renormalised over the shared words.
    fails if: tokens are paired by place, words that one side lacks keep their mass, or the prompt is the student's."""
    run = ready(command, student=TOY / "student", teacher=TOY / "teacher_bpe", data=TOY / "test.jsonl",
                eval_data=TOY / "test.jsonl", eval_limit=5, max_new_tokens=40)
    student, (teacher,), (bridge,) = run.student, run.kind.models, run.kind.bridges
    _, samples = evaluate(student, run.tokenizer, run.held_out, k=4, temperature=1.0, max_new_tokens=40, seed=2)
    reverse, forward = [], []
    for sample in samples:
        prompt = run.kind.prompt(run.held_out[sample["problem"]])
        reading = bridge.read(sample["tokens"], sample["finished"], bridge.opened(prompt))
        mine, theirs = reading.student_chunk, reading.teacher_chunk
        pairs = [(mine.index(chunk), theirs.index(chunk)) for chunk in sorted(set(mine) - {-1})
                 if mine.count(chunk) == theirs.count(chunk) == 1]
        p, q = (model.logits(model(torch.tensor([start + ids]))[0, len(start) - 1:-1])[[pair[side] for pair in pairs]]
                [:, bridge.shared[side]].log_softmax(-1)
                for side, (model, start, ids) in enumerate(((student, sample["prompt_tokens"], sample["tokens"]),
                                                            (teacher, prompt, reading.ids))))
        reverse.append((p.exp() * (p - q)).sum(-1))
        forward.append((q.exp() * (q - p)).sum(-1))
    wanted = {"reverse_kl": torch.cat(reverse).mean().item(), "forward_kl": torch.cat(forward).mean().item()}
    assert sum(map(len, reverse)) < sum(len(s["tokens"]) for s in samples) and wanted["reverse_kl"] > 0.1
    assert distance(run, run.held_out, samples) == pytest.approx(wanted, rel=1e-4)
