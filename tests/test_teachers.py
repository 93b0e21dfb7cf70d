"""Who scores and what they see: several teachers, privileged prompts, self-teachers, siblings, cold starts.

The reference is one plain forward pass over one sequence at a time. Models are those of conftest.py, and a
third of another width and family.
"""
import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import END, write_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import prepare  # noqa: E402
import step as loop  # noqa: E402
import train  # noqa: E402
from checkpoint import trainable  # noqa: E402
from data import SHOWN_SOLUTION, degenerate, near_duplicates, pick_mixed, privileged_prompt  # noqa: E402
from eval import Problem  # noqa: E402
from diagnostics import diagnostics  # noqa: E402
from losses import Rows  # noqa: E402
from weights import load_model  # noqa: E402
from rollout import from_responses  # noqa: E402
from step import (Clock, collect, teacher_reads, teacher_responses, teacher_sampling,  # noqa: E402
                  train_step)
from teacher import disagreement, score  # noqa: E402
from tokenizer import UserError  # noqa: E402
from update import backward, signals  # noqa: E402

VOCAB = 20
PROMPT = "{solution};{problem}"


@pytest.fixture(scope="session")
def folder(pair):
    """pair, with a third model and problems that name their teacher."""
    write_checkpoint(pair / "third", 2, model_type="qwen2", vocab_size=20, hidden_size=32,
                     intermediate_size=16,
                     num_hidden_layers=1)
    jsonl(pair / "routed.jsonl", [dict(problem=f"{a}+3", answer=str(a), solution=str(a), kind="ab"[a % 2])
                                  for a in range(10)])
    return pair


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def ready(command, **flags):
    """(cfg, run) of a tiny run whose models are loaded."""
    cfg, _ = train.parse(command(**flags))
    train.check(cfg)
    return prepare.set_up(cfg)


def sizes(run):
    return dict(vocab_size=run.vocab_size, chunk_rows=run.chunk_rows)


def adamw(cfg, run):
    return torch.optim.AdamW([p for _, p in trainable(run.student)], lr=cfg.lr)


def look(cfg, *args):
    """step.look under a loss that asks what the teacher says of each token drawn; else that is left to the update."""
    asking = cfg if loop.credit_asks(cfg) else replace(cfg, divergence="policy_gradient", advantage="opd")
    return loop.look(asking, *args)


def predictions(model, prompt, response, temperature=1.0):
    """(n, VOCAB) log-probs of what follows each prefix: one sequence, no batch, no padding, no chunk."""
    hidden_TD = model(torch.tensor([[*prompt, *response]]))[0]
    rows_NV = hidden_TD[len(prompt) - 1:-1] @ model.head_weight().to(hidden_TD.dtype)[:VOCAB].T
    return (rows_NV / temperature).log_softmax(-1)


def sampled(logp_NV, response):
    return logp_NV.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def told(models, rollout, prompts, teacher_B=None):
    """log q(a) of every response token, each sequence read by its teacher after prompts[b]."""
    parts = []
    for b, number in enumerate(teacher_B or [0] * len(prompts)):
        response = rollout.response(b)
        with torch.no_grad():
            parts.append(sampled(predictions(models[number], prompts[b], response), response))
    return torch.cat(parts)


def close(a, b, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=0, atol=atol)


# Several teachers.

@pytest.fixture(scope="session")
def several(folder):
    """(student, four teachers of which one is never asked, rollout, routing)."""
    models = [load_model(folder / name) for name in ("student", "teacher", "third", "student", "teacher")]
    rng = np.random.default_rng(0)
    texts = [rng.integers(0, VOCAB, rng.integers(1, 8)).tolist() for _ in range(18)]
    rollout = from_responses(texts[:9], texts[9:], [True] * 9, "cpu")
    return models[0], models[1:], rollout, torch.tensor([0, 1, 2, 0, 1, 2, 0, 0, 1])


def each(several, temperature=1.0):
    """Per sequence: (student's rows, its own teacher's rows, response)."""
    student, teachers, rollout, teacher_B = several
    for b, number in enumerate(teacher_B.tolist()):
        prompt, response = rollout.tokens_BT[b, :rollout.prompt_len_B[b]].tolist(), rollout.response(b)
        with torch.no_grad():
            q_NV = predictions(teachers[number], prompt, response, temperature)
        yield predictions(student, prompt, response, temperature), q_NV, response


def scores_of(several, max_tokens=16384, chunk_rows=64, temperature=1.0, models=None):
    _, teachers, rollout, teacher_B = several
    return score(models or teachers, rollout, 0 * teacher_B if models else teacher_B, vocab_size=VOCAB,
                 temperature=temperature, max_tokens=max_tokens, chunk_rows=chunk_rows)


@pytest.mark.parametrize("max_tokens,chunk_rows,temperature", [(1, 1, 1.0), (20, 3, 0.7), (16384, 64, 1.3)])
def test_each_sequence_is_scored_by_its_own_teacher(several, max_tokens, chunk_rows, temperature):
    """fails if: rows are stored in micro-batch order, a head serves another teacher's rows, padding rows
    enter the softmax, or the temperature reaches one teacher only"""
    found = scores_of(several, max_tokens, chunk_rows, temperature)
    expected = list(each(several, temperature))
    close(found.logp_N, torch.cat([sampled(q_NV, response) for _, q_NV, response in expected]))
    close(found.entropy_N, torch.cat([-(q_NV.exp() * q_NV).sum(-1) for _, q_NV, _ in expected]))
    assert [part.hidden_nE.shape[1] for part in found.parts] == [24, 32, 16]        # the fourth read nothing


@pytest.mark.parametrize("max_tokens,chunk_rows", [(1, 1), (20, 3), (16384, 64)])
def test_the_gradient_is_the_sum_over_sequences(several, folder, max_tokens, chunk_rows):
    """fails if: a part's gradient replaces the last one's, place_N is taken as a row of the step, or rows of
    a part are not those of its micro-batch"""
    student, rollout = load_model(folder / "student", dtype=torch.float64), several[2]
    s = signals(rollout, torch.arange(9))
    scale_N = torch.linspace(0.1, 1, len(s.token_N), dtype=torch.float64)
    cfg = train.Config(divergence="reverse_kl", micro_batch_tokens=max_tokens)
    per_row = backward(student, rollout, s, scores_of(several), scale_N, None, cfg, vocab_size=VOCAB,
                       chunk_rows=chunk_rows)
    found = {name: p.grad.clone() for name, p in student.named_parameters()}
    kl_N = torch.cat([(p_NV.exp() * (p_NV - q_NV)).sum(-1)
                      for p_NV, q_NV, _ in each((student, *several[1:]))])
    gradients = torch.autograd.grad((kl_N * scale_N).sum(), list(student.parameters()))
    for (name, gradient), expected in zip(found.items(), gradients):
        close(gradient, expected, 1e-6)          # the teachers' half is in float32
    close(per_row["loss"], kl_N.detach(), 1e-6)
    close(per_row["reverse_kl"], kl_N.detach(), 1e-6)


@pytest.mark.parametrize("chunk_rows", [1, 5, 1000])
def test_disagreement_equals_the_rows_written_out(several, chunk_rows):
    """fails if: student and teacher swap, or a part's rows land at their place among the part's own"""
    student, _, _, _ = several
    found = disagreement(scores_of(several, models=[student]), scores_of(several), temperature=0.7,
                         chunk_rows=chunk_rows)
    rows = list(each(several, 0.7))
    p_NV, q_NV = (torch.cat([row[i] for row in rows]).detach() for i in (0, 1))
    expected = diagnostics(Rows(p_NV, torch.zeros(len(p_NV), dtype=torch.int64), q_NV))
    assert set(found) == set(expected)
    for name, value_N in expected.items():
        close(found[name], value_N)


def test_a_field_names_the_teacher(folder, command):
    """fails if: tags are numbered by first use instead of --teacher's order, or the step routes by place
    instead of problem"""
    cfg, run = ready(command, recipe="multi", route="kind",
                     teacher=f"b={folder / 'third'},a={folder / 'teacher'}",
                     data=folder / "routed.jsonl", problems=6)
    assert run.teacher_of == [1, 0] * 5 and [m.config.hidden_size for m in run.teachers] == [32, 24]
    rollout, s, scores, _, asked, _ = look(cfg, run, 0, {}, Clock())
    teacher_B = [1 - i % 2 for i in asked]
    assert scores.teacher_B.tolist() == teacher_B == s.teacher_B.tolist() and set(teacher_B) == {0, 1}
    close(scores.logp_N, told(run.teachers, rollout, [run.prompts[i] for i in asked], teacher_B))


def test_every_teacher_is_tested_on_its_own_problems(folder, command, monkeypatch):
    """fails if: a teacher is evaluated on everybody's problems, or held-out problems that name nobody end the
    run"""
    teachers = f"a={folder / 'teacher'},b={folder / 'third'}"
    cfg, run = ready(command, teacher=teachers, route="kind", data=folder / "routed.jsonl", eval_limit=0,
                     eval_data=folder / "routed.jsonl")
    read, real = [], train.test
    def test(cfg, run, model, label, bridge):
        read.append((model, run.held_out))
        return real(cfg, run, model, label, bridge)
    monkeypatch.setattr(train, "test", test)
    metrics = train.test_teachers(cfg, run)
    assert metrics["problems"] == 10 and [model for model, _ in read] == run.teachers
    assert [{p.fields["kind"] for p in problems} for _, problems in read] == [{"a"}, {"b"}]
    cfg, run = ready(command, teacher=teachers, route="kind", data=folder / "routed.jsonl")
    assert train.test_teachers(cfg, run) is None


# What a teacher sees.

def test_with_prompts_changes_prompts_only():
    """fails if: responses are cut from the text instead of the mask, log-probs stay where the old prompt put
    them"""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCAB, rng.integers(1, 8)).tolist() for _ in range(15)]
    old = from_responses(texts[:5], texts[5:10], [True, False] * 2 + [True], "cpu")
    old.logp_BT[old.mask_BT], old.entropy_BT[old.mask_BT] = torch.rand(2, int(old.mask_BT.sum()))
    before, new = old.tokens_BT.clone(), old.with_prompts(texts[10:])
    assert [new.response(b) for b in range(5)] == texts[5:10]
    assert [new.tokens_BT[b, :n].tolist() for b, n in enumerate(new.prompt_len_B.tolist())] == texts[10:]
    for name in ("tokens_BT", "logp_BT", "entropy_BT"):
        assert torch.equal(new.rows(getattr(new, name)), old.rows(getattr(old, name)))
    assert new.finished_B.tolist() == old.finished_B.tolist() and torch.equal(old.tokens_BT, before)
    assert not new.logp_BT[~new.mask_BT].any() and torch.equal(new.length_B, old.length_B)


@pytest.mark.parametrize("teacher", ["self", "teacher"])
def test_a_privileged_teacher_reads_another_prompt(folder, command, teacher):
    """fails if: the student writes after the privileged prompt or is scored on it, or the teacher reads the
    student's"""
    flags = dict(teacher=teacher if teacher == "self" else folder / teacher, teacher_prompt=PROMPT,
                 problems=3)
    _, plain = ready(command, **flags)
    cfg, run = ready(command, privileged="solution", **flags)
    assert run.prompts == plain.prompts
    rollout, s, scores, usable_B, asked, _ = look(cfg, run, 0, {}, Clock())
    same, s0, scores0, *_ = look(replace(cfg, privileged="none"), plain, 0, {}, Clock())
    assert torch.equal(rollout.tokens_BT, same.tokens_BT) and torch.equal(s.student_N, s0.student_N)
    shown = [run.tokenizer.prompt_ids(f"{run.train[i].solution};{run.train[i].prompt}") for i in asked]
    close(scores.logp_N, told(run.teachers, rollout, shown))
    close(scores0.logp_N, told(run.teachers, rollout, [run.prompts[i] for i in asked]))
    assert (scores.logp_N - scores0.logp_N).abs().min() > 1e-4 and usable_B.tolist() == [1.0] * len(asked)
    if teacher == "self":       # the gradient too: each side with its own prompt
        adamw(cfg, run).zero_grad()
        per_row = backward(run.student, rollout, s, scores, torch.ones_like(s.student_N), None, cfg,
                           **sizes(run))
        kl_N = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in (
            (predictions(run.student, run.prompts[i], rollout.response(b)),
             predictions(run.teachers[0], shown[b], rollout.response(b))) for b, i in enumerate(asked))])
        close(per_row["loss"], kl_N.detach())


def user(*texts):
    roles = ("system", "user", "assistant", "user")
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


@pytest.mark.parametrize("prompt,solution,template,expected", [
    ("2+2?", "four", "{problem} -> {solution}", "2+2? -> four"),
    ("set {1}", "{problem}", "{solution}|{problem}|{other}|{}", "{problem}|set {1}|{other}|{}"),
    ("{solution}", r"\1 \g<0> \\", "{problem}{problem}={solution}", r"{solution}{solution}=\1 \g<0> \\"),
    (user("be brief", "2+2?", "hm", "3+3?"), "six", "{problem} ({solution})",
     user("be brief", "2+2?", "hm", "3+3? (six)")),
    (user("be brief", "2+2?"), "four", "{solution}", user("be brief", "four")),
    (user("2+2?"), "four", "{problem}={solution}", user("2+2?=four"))])
def test_privileged_prompt(prompt, solution, template, expected):
    """fails if: str.format or two replacements in turn fill the template, the first user message is taken, or
    the given chat is changed in place"""
    before = json.dumps(prompt)
    assert privileged_prompt(prompt, solution, template) == expected and json.dumps(prompt) == before


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}, {"reference": "third"},
                                   {"reference": "third", "lora_rank": 2}], ids=str)
def test_the_signals_of_a_step(folder, command, flags):
    """fails if: the reference is the student as it is now or --reference is ignored, kl_N reads the
    privileged prompt on the student's side, or a signal carries a gradient"""
    named = {"reference": folder / flags["reference"]} if "reference" in flags else {}
    cfg, run = ready(command, recipe="exopd", weight="tip", privileged="solution", teacher_prompt=PROMPT,
                     lr=0.05,
                     **{**flags, **named})
    reference, optimizer = load_model(folder / flags.get("reference", "student")), adamw(cfg, run)
    for step in range(2):
        rollout, s, scores, _, asked, _ = look(cfg, run, step, {}, Clock())
        prompts = [run.prompts[i] for i in asked]
        close(s.reference_N, told([reference], rollout, prompts))
        kl = [(p.exp() * (p - q)).sum(-1) for b, i in enumerate(asked) for p, q in (
            [predictions(model, prompt, rollout.response(b)).detach()
             for model, prompt in ((run.student, prompts[b]), (run.teachers[0], run.teacher_prompts[i]))],)]
        close(s.kl_N, torch.cat(kl))
        tensors = [*s, scores.logp_N, scores.entropy_N, scores.parts[0].hidden_nE]
        assert not any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)
        train_step(cfg, run, optimizer, step, {}, Clock())


# The student as its own teacher.

@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_initial_self_teacher_stays_the_initial_policy(folder, command, lora_rank):
    """fails if: adapters stay on while scoring or off afterwards, or the frozen copy shares the student's
    parameters"""
    cfg, run = ready(command, recipe="opsd", teacher="self", teacher_prompt=PROMPT, lr=0.05,
                     lora_rank=lora_rank)
    initial, optimizer = load_model(folder / "student"), adamw(cfg, run)
    for step in range(3):
        rollout, s, scores, _, asked, _ = look(cfg, run, step, {}, Clock())
        close(scores.logp_N, told([initial], rollout, [run.teacher_prompts[i] for i in asked]))
        own_N = told([run.student], rollout, [run.prompts[i] for i in asked])
        close(s.student_N, own_N)
        moved = (own_N - told([initial], rollout, [run.prompts[i] for i in asked])).abs().max().item()
        assert (moved > 1e-3) == (step > 0)
        train_step(cfg, run, optimizer, step, {}, Clock())
    assert (run.teachers[0] is run.student) == (lora_rank > 0) and len(run.teachers) == 1
    for name, weight in initial.weights().items():
        kept = dict(run.teachers[0].named_parameters())[name]
        assert torch.equal(kept, weight) and not (kept.requires_grad and lora_rank == 0)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_average_follows_the_student(folder, command, lora_rank):
    """fails if: decay and 1 - decay swap, the average moves before the step or once per update, or misses the
    adapters"""
    cfg, run = ready(command, recipe="sdft", teacher="self", teacher_prompt=PROMPT, lr=0.05,
                     self_teacher="ema", ema=0.8, lora_rank=lora_rank, updates=2)
    expected = {name: x.double() for name, x in load_model(folder / "student").weights().items()}
    optimizer = adamw(cfg, run)
    assert run.teachers == [run.average] and run.average is not run.student
    for step in range(3):
        rollout, _, scores, _, asked, _ = look(cfg, run, step, {}, Clock())
        close(scores.logp_N, told([run.average], rollout, [run.teacher_prompts[i] for i in asked]))
        train_step(cfg, run, optimizer, step, {}, Clock())
        now = {name: x.double() for name, x in run.student.weights().items()}
        expected = {name: 0.8 * x + 0.2 * now[name] for name, x in expected.items()}
        for name, parameter in run.average.named_parameters():
            close(parameter.detach(), expected[name], 1e-6)
    assert max((now[name] - x).abs().max().item() for name, x in expected.items()) > 1e-3


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_the_live_self_teacher_is_the_student(folder, command, lora_rank):
    """fails if: live switches the adapters off, a copy is made at the start, or scoring leaves a graph"""
    cfg, run = ready(command, teacher="self", self_teacher="live", lora_rank=lora_rank, lr=0.05)
    optimizer = adamw(cfg, run)
    _, other = ready(command, recipe="opsd", teacher="self", self_teacher="live", teacher_prompt=PROMPT,
                     lora_rank=lora_rank)
    loop.train_step(replace(cfg, privileged="solution", divergence="forward_kl"),
                    replace(run, teacher_prompts=other.teacher_prompts), optimizer, 0, {}, Clock())
    _, s, scores, *_ = look(cfg, run, 1, {}, Clock())
    assert not (s.teacher_N.requires_grad or scores.parts[0].hidden_nE.requires_grad)
    record = train_step(cfg, run, optimizer, 1, {}, Clock())    # without a secret nothing is left to learn
    assert run.teachers == [run.student] and abs(record["reverse_kl"]) < 1e-6 and record["grad_norm"] < 1e-4
    now, initial = (model.weights().values() for model in (run.student, load_model(folder / "student")))
    assert max((x - y).abs().max().item() for x, y in zip(now, initial)) > 1e-3


def interrupted(monkeypatch, command, at, **flags):
    """Run, stopped for good at step `at`; then the same command again."""
    real = train.train_step
    def stop(cfg, run, optimizer, step, *rest):
        if step == at:
            raise KeyboardInterrupt
        return real(cfg, run, optimizer, step, *rest)
    monkeypatch.setattr(train, "train_step", stop)
    assert train.main(command(**flags)) == 130
    monkeypatch.setattr(train, "train_step", real)
    assert train.main(command(**flags)) == 0


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_a_resumed_run_goes_on_with_its_average(folder, command, tmp_path, monkeypatch, capsys, lora_rank):
    """fails if: the average is not saved, not restored, or restored after it was used"""
    flags = dict(recipe="sdft", teacher="self", teacher_prompt=PROMPT, ema=0.7, lr=0.05, steps=3,
                 save_every=1, lora_rank=lora_rank)
    assert train.main(command(**flags, runs=tmp_path / "whole")) == 0
    interrupted(monkeypatch, command, 2, **flags)
    for file in ("model.safetensors", "trainer.safetensors"):
        whole, resumed = ((tmp_path / name / "a" / "last" / file).read_bytes() for name in ("whole", "runs"))
        assert whole == resumed, file


# Filters of problems and texts.

def problem(text):
    return Problem(text, None, None, {}, 1)


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


def test_near_duplicates_fold_case_space_and_chats(folder, command, tmp_path):
    """fails if: case or white space counts, a chat is compared as a list, or --mix_data keeps what --data
    has"""
    mine = [problem("What is  TWO plus\ntwo?"), problem(user("be brief", "what is two plus two?")),
            problem("what is it?"),
            problem("")]
    assert near_duplicates(mine, [problem("what is two plus two?")]) == {0, 1}
    assert near_duplicates(mine, []) == set() and near_duplicates([], mine) == set()
    known = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    new = [dict(problem=f"7777777{a}", answer="1") for a in range(3)]
    again = dict(known[5], problem=" " + known[5]["problem"])
    path = jsonl(tmp_path / "mix.jsonl", [known[4], new[0], again, *new[1:]])
    _, run = ready(command, mix_data=path, mix=0.5)
    assert run.first == 10 and [p.prompt for p in run.train[10:]] == [r["problem"] for r in new]


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


@pytest.mark.parametrize("share", [0.0, 0.25, 0.3, 1.0])
@pytest.mark.parametrize("count", [1, 4, 16])
def test_pick_mixed_keeps_the_share(count, share):
    """fails if: each step rounds for itself, a file is drawn with replacement, or its indices start at 0"""
    asked = [pick_mixed(7, 5, share, range(step * count, (step + 1) * count), 3) for step in range(40)]
    assert all(len(one) == count for one in asked)
    for step in range(40):
        drawn = [i for one in asked[:step + 1] for i in one]
        assert abs(sum(i >= 7 for i in drawn) - share * len(drawn)) < 1 and set(drawn) <= set(range(12))
    for low, size in ((0, 7), (7, 5)):
        mine = [i for i in drawn if low <= i < low + size]
        epochs = [mine[at:at + size] for at in range(0, len(mine) // size * size, size)]
        assert all(sorted(epoch) == list(range(low, low + size)) for epoch in epochs)
        assert len(epochs) < 4 or len(set(map(tuple, epochs))) > 1
    assert pick_mixed(7, 5, share, range(11 * count, 12 * count), 3) == asked[11]


# Responses that the teacher wrote.

def ids(run, text, stop=True):
    return run.tokenizer.encode(text) + [END] * stop


@pytest.mark.parametrize("recipe,flags", [("opd", {}), ("sg", {}), ("fire", {}),
                                          ("opsd", dict(teacher="self")),
                                          ("sdpo", dict(teacher="self"))])
def test_a_cold_start_imitates_the_teacher_then_switches(folder, command, recipe, flags):
    """fails if: a cold step rolls out or keeps the recipe's loss, weight or siblings; or the last one is a
    step too late"""
    cfg, run = ready(command, recipe=recipe, reduction="token", cold_start_steps=2, lr=0.01,
                     teacher_prompt=PROMPT,
                     **{"teacher": folder / "teacher", **flags})
    written = {i: [ids(run, f"{i}={i}"), ids(run, f"{i}")] for i in (2, 3, 7)}
    optimizer, drawn = adamw(cfg, run), set()
    for step in range(2):
        rollout, asked, on_policy = collect(cfg, run, step, written)
        responses = [rollout.response(b) for b in range(4)]
        assert not on_policy and all(response in written[i] for response, i in zip(responses, asked))
        assert rollout.finished_B.all() and set(asked) <= set(written)
        drawn |= set(map(tuple, responses))
        log_p_N = told([run.student], rollout, [run.prompts[i] for i in asked])
        record = train_step(cfg, run, optimizer, step, written, Clock())
        assert record["loss"] == pytest.approx(-log_p_N.mean().item(), abs=1e-5) and record["kept"] == 1
        assert not {"advantage", "sampled_entropy", "teacher_weight"} & set(record)
        assert record["on_policy"] == 0
    assert len(drawn) > 3
    _, _, on_policy = collect(cfg, run, 2, written)
    assert on_policy and train_step(cfg, run, optimizer, 2, written, Clock())["on_policy"] == 1


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


def test_only_good_responses_of_the_teacher_are_kept_and_written_once(folder, command, tmp_path, monkeypatch):
    """fails if: a cut, wrong or circling response passes, an answerless problem is dropped, the file is not
    read again, or its keys stay text"""
    cfg, run = ready(command, recipe="sg", pts_samples=4, pts_weight=0.1, pts_end=1.0, steps=4)
    run.train[0] = replace(run.train[0], answer=None)
    def responses(prompt):
        i = run.prompts.index(prompt)
        answer = str((i + 3) % 10)
        return [(ids(run, f"0+{answer}"), True), (ids(run, answer, stop=False), False),
                (ids(run, f"{answer}1"), True), (ids(run, "+" * 400 + answer), True)]
    calls = []
    monkeypatch.setattr(loop, "generate", writes(responses, calls))
    run_folder = SimpleNamespace(path=tmp_path)
    kept = teacher_responses(cfg, run, run_folder)
    asked = {i for step in range(4) for i in loop.ask(cfg, run, step)}
    assert set(kept) == asked and 0 in asked and len(calls) == 1
    for i, mine in kept.items():
        good = [ids(run, f"0+{(i + 3) % 10}")]
        assert mine == (good if i else [*good, ids(run, "31")])
    monkeypatch.setattr(loop, "generate", None)
    assert teacher_responses(cfg, run, run_folder) == kept
    assert teacher_responses(replace(cfg, pts_weight=0.0), run, run_folder) == {}       # nobody asks for them


def test_a_teacher_without_one_good_response_is_an_error(folder, command, tmp_path, monkeypatch):
    """fails if: an empty table is written: the next start would train on nothing"""
    cfg, run = ready(command, cold_start_steps=1, pts_samples=1)
    monkeypatch.setattr(loop, "generate", writes(lambda prompt: [([1, 2], False)], []))
    with pytest.raises(UserError, match="no response of the teacher passed"):
        teacher_responses(cfg, run, SimpleNamespace(path=tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_every_problem_of_a_phased_step_is_written_by_its_teacher(folder, command, tmp_path, monkeypatch):
    """fails if: the first teacher writes everything or after the student's prompt, one without problems ends
    the run, or problems of --mix_data are forgotten"""
    calls = []
    monkeypatch.setattr(loop, "generate", writes(lambda prompt: [([1, END], True)], calls))
    mix = jsonl(tmp_path / "mix.jsonl", [dict(problem=f"7777777{a}", answer="1", solution="1", kind="b")
                                         for a in range(4)])
    for kinds, mixed in (("ab", True), ("a", False)):
        data = jsonl(tmp_path / "d.jsonl", [dict(problem=f"{a}+3", answer="1", solution="1",
                                                 kind=kinds[a % len(kinds)])
                                            for a in range(10)])
        more = dict(mix_data=mix, mix=0.5) if mixed else {}
        cfg, run = ready(command, teacher=f"a={folder / 'teacher'},b={folder / 'third'}", route="kind",
                         data=data, steps=4,
                         problems=4, pts_weight=0.1, pts_end=0.5, pts_samples=1, privileged="solution",
                         teacher_prompt=PROMPT,
                         **more)
        calls.clear()
        (tmp_path / kinds).mkdir()
        kept = teacher_responses(cfg, run, SimpleNamespace(path=tmp_path / kinds))
        wanted = [i for step in range(2) for i in loop.ask(cfg, run, step)]
        assert set(kept) == set(wanted) and (max(wanted) >= 10) == mixed
        written = {(run.teachers.index(model), tuple(prompt)) for model, prompts, _ in calls
                   for prompt in prompts}
        assert written == {(run.teacher_of[i], tuple(run.teacher_prompts[i])) for i in wanted}
        assert len({seed for *_, seed in calls}) == len(calls) == len(kinds)


def test_a_resumed_run_reads_the_teachers_responses(folder, command, tmp_path, monkeypatch, capsys):
    """fails if: a resumed run lets the teacher write again: its weights are no longer those that wrote"""
    flags = dict(recipe="sg", steps=3, save_every=1, pts_weight=0.5, pts_hold=1.0, pts_end=1.0,
                 cold_start_steps=1, lr=0.01,
                 pts_samples=2)
    calls, real = [], loop.generate
    def write(model, prompts, *, samples, **more):
        if more["seed"] % 2**32 >= 2**31:       # the seeds of what a teacher writes
            both = writes(lambda prompt: [([(prompt[0] + 3) % 10, END], True), ([1, 2], False)], calls)
            return both(model, prompts, samples=samples, **more)
        return real(model, prompts, samples=samples, **more)
    monkeypatch.setattr(loop, "generate", write)
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


PTS = dict(recipe="sg", pts_weight=0.3, pts_hold=0.25, pts_end=0.75, steps=8, problems=2, samples=2)


@pytest.mark.parametrize("step,mu", [(0, 0.3), (2, 0.3), (4, 0.15), (5, 0.3 * (1 - 0.5 ** 0.5) / 2), (6, 0.0),
                                     (7, 0.0)])
def test_phased_sampling_adds_mu_times_the_cross_entropy(folder, command, step, mu):
    """fails if: the gradient already there is lost, each response is averaged for itself, a repeated problem
    counts twice, or a problem without a response counts at all"""
    cfg, run = ready(command, **PTS)
    run.student = load_model(folder / "student", dtype=torch.float64)
    written = {3: [ids(run, "3+3=6")], 5: [ids(run, "8")], 1: [ids(run, "4444")], 8: []}
    for p in run.student.parameters():
        p.grad = torch.full_like(p, 0.25)
    found = teacher_sampling(cfg, run, [3, 3, 8, 5, 0], step, written, sizes(run))
    nll_N = -torch.cat([sampled(predictions(run.student, run.prompts[i], written[i][0]), written[i][0])
                        for i in (3, 5)])
    gradients = torch.autograd.grad(mu * nll_N.mean(), list(run.student.parameters()))
    for p, gradient in zip(run.student.parameters(), gradients):
        close(p.grad, 0.25 + gradient, 1e-7)            # the scale of a row is a float32
    reported = {"teacher_cross_entropy": nll_N.mean().item(), "teacher_weight": mu}
    assert found == (pytest.approx(reported) if mu else {})


def test_phased_sampling_of_nothing_adds_nothing(folder, command):
    """fails if: an empty set of responses is averaged (NaN), or another problem's response fills in"""
    cfg, run = ready(command, **PTS)
    for p in run.student.parameters():
        p.grad = torch.full_like(p, 0.25)
    assert teacher_sampling(cfg, run, [8, 0], 0, {8: [], 3: [[1, END]]}, sizes(run)) == {}
    assert all((p.grad == 0.25).all() for p in run.student.parameters())


def test_phased_sampling_draws_among_a_problems_responses(folder, command):
    """fails if: the first response is always taken, or the draw does not follow from seed and step"""
    cfg, run = ready(command, **{**PTS, "pts_hold": 1.0, "pts_end": 1.0, "steps": 100})
    written = {3: [ids(run, text) for text in ("1", "2+2", "333")]}
    for p in run.student.parameters():
        p.grad = torch.zeros_like(p)
    losses = [teacher_sampling(cfg, run, [3], step, written, sizes(run))["teacher_cross_entropy"]
              for step in (*range(20), *range(20))]
    assert len(set(losses)) == 3 and losses[:20] == losses[20:]


def test_phased_sampling_leaves_the_students_own_statistics_alone(folder, command):
    """fails if: the teacher's responses enter the groups, the rewards or the step's denominator"""
    records = []
    for weight in (0.0, 0.5):
        cfg, run = ready(command, **{**PTS, "pts_weight": weight, "samples": 4})
        written = {i: [ids(run, str((i + 3) % 10))] for i in range(10)}
        records.append(train_step(cfg, run, adamw(cfg, run), 0, written, Clock()))
    without, with_ = records
    assert set(with_) - set(without) == {"teacher_cross_entropy", "teacher_weight"}
    assert with_["grad_norm"] != without["grad_norm"]
    for key, value in without.items():
        assert key == "grad_norm" or with_[key] == value or math.isnan(value), key


# Siblings.

def siblings(command, folder, template=PROMPT):
    """A step with eight responses to three problems, and who may be shown to whom."""
    cfg, run = ready(command, recipe="sdpo", teacher="self", teacher_prompt=template, samples=4)
    texts = ["3", "0+3=3", "4", "+3", "4", "5", "1", "2"]           # problem 0 wants 3, problem 1 wants 4
    asked, finished = [0, 0, 0, 0, 1, 1, 2, 2], [True, True, True, False, True, True, True, True]
    rollout = from_responses([run.prompts[i] for i in asked],
                             [ids(run, text, done) for text, done in zip(texts, finished)],
                             finished, "cpu")
    allowed = [{1}, {0}, {0, 1}, {0, 1}, set(), {4}, set(), set()]
    return cfg, run, texts, asked, rollout, allowed


@pytest.mark.parametrize("template", [PROMPT, ""])
def test_a_sibling_is_a_right_finished_response_of_another_sample(folder, command, template):
    """fails if: a response is shown to itself, a cut or wrong one or another problem's is shown, always the
    first is taken, or an empty --teacher_prompt shows nothing"""
    cfg, run, texts, asked, rollout, allowed = siblings(command, folder, template)
    reward_B = loop.rewards(cfg, run, texts, asked)
    assert reward_B.tolist() == [1, 1, 0, 1, 1, 0, 0, 0]
    shown = [set() for _ in asked]
    for step in range(30):
        seen, usable_B = teacher_reads(cfg, run, rollout, asked, texts, reward_B, step)
        again, _ = teacher_reads(cfg, run, rollout, asked, texts, reward_B, step)
        assert usable_B.tolist() == [float(bool(who)) for who in allowed]
        assert seen == again
        for b in range(8):
            shown[b].add(tuple(seen[b]))
    for b, i in enumerate(asked):
        prompt, form = run.train[i].prompt, template or SHOWN_SOLUTION
        expected = {tuple(run.tokenizer.prompt_ids(privileged_prompt(prompt, texts[c], form)))
                    for c in allowed[b]}
        assert shown[b] == (expected or {tuple(run.prompts[i])})


def test_a_sample_without_a_sibling_is_not_learned_from(folder, command, monkeypatch):
    """fails if: usable_B does not reach the weights, or its tokens stay in the denominator"""
    cfg, run, texts, asked, rollout, allowed = siblings(command, folder)
    monkeypatch.setattr(loop, "collect", lambda *_: (rollout, asked, True))
    cfg = replace(cfg, divergence="reverse_kl")
    seen, _ = teacher_reads(cfg, run, rollout, asked, texts, loop.rewards(cfg, run, texts, asked), 0)
    kl = [(p.exp() * (p - q)).sum(-1) for p, q in (
        (predictions(run.student, run.prompts[i], rollout.response(b)),
         predictions(run.teachers[0], seen[b], rollout.response(b)))
        for b, i in enumerate(asked))]
    kept = torch.cat([kl_n for kl_n, who in zip(kl, allowed) if who])
    loss = kept.mean()
    gradients = torch.autograd.grad(loss, list(run.student.parameters()))
    expected = torch.stack([g.norm() for g in gradients]).norm()
    record = train_step(cfg, run, adamw(cfg, run), 0, {}, Clock())
    assert record["kept"] == len(kept) / len(torch.cat(kl))
    assert record["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert record["grad_norm"] == pytest.approx(expected.item(), rel=1e-3)


# Wrong settings, before anything is loaded.

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
    monkeypatch.setattr(prepare, "load_model", None)
    every = bad_flags(folder, tmp_path)
    flags, message = every[name]
    assert set(every) == set(BAD)
    assert train.main(command(**flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(message, error), error
    assert not (tmp_path / "runs").exists()


# The report.

def table(text):
    """name -> the five numbers of its line."""
    line = r"^(\w+)" + 5 * r" +(-?[\d.]+|nan)" + "$"
    found = re.findall(line, text, re.M)
    return {name: [float(x) for x in numbers] for name, *numbers in found}


@pytest.mark.parametrize("teacher", ["student", "teacher", "self"])
def test_report_only(folder, command, tmp_path, capsys, teacher):
    """fails if: the report trains or writes, compares the student with itself, or leaves a number
    undefined"""
    teacher_flag = teacher if teacher == "self" else folder / teacher
    assert train.main(command(teacher=teacher_flag, report_only=True, problems=4)) == 0
    found = table(capsys.readouterr().out)
    assert {"reverse_kl", "forward_kl", "overlap_ratio", "overlap_advantage", "entropy_gap",
            "topk_mass_teacher"} <= set(found)
    assert all(math.isfinite(x) for row in found.values() for x in row) and not (tmp_path / "runs").exists()
    if teacher == "teacher":
        assert min(found["reverse_kl"]) > 0.1 and found["overlap_ratio"][0] < 1
    else:
        assert found["overlap_ratio"] == [1.0] * 5
        zero = ("reverse_kl", "forward_kl", "overlap_advantage", "entropy_gap")
        assert all(found[name] == [0.0] * 5 for name in zero)


def test_report_compares_two_teachers(folder, command, capsys):
    """fails if: the second table holds the student again, or reads the second teacher on other tokens"""
    flags = dict(report_only=True, problems=4)
    assert train.main(command(compare_teacher=folder / "student", **flags)) == 0
    first, second = (table(text) for text in capsys.readouterr().out.split("--compare_teacher")[0:2])
    assert first == second                      # the student itself as the other teacher
    assert train.main(command(compare_teacher=folder / "teacher", **flags)) == 0
    _, same = (table(text) for text in capsys.readouterr().out.split("--compare_teacher")[0:2])
    assert same["reverse_kl"] == [0.0] * 5 and same["overlap_ratio"] == [1.0] * 5
