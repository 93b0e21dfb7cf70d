"""Several teachers, and what each sees: its own problems, its own prompt, a reference.

The reference is one plain forward pass over one sequence at a time (helpers.py). Models are those of conftest.py, and a
third of another width and family.
"""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import adamw, close, look, one_step, predictions, ready, sampled, told, with_third

import eval as eval_file
import losses
import train
from extras.teachers import privileged_prompt, with_prompts
from losses import Rows
from support.responses import from_responses
from support.metrics import diagnostics, observe
from support.weights import load_model
from teacher import SIGNALS, Batch, Teacher, disagreement

VOCAB = 20
PROMPT = "{solution};{problem}"


@pytest.fixture(scope="session")
def folder(pair):
    return with_third(pair)


@pytest.fixture(scope="session")
def several(folder):
    """(student, four teachers of which one is never asked, rollout, routing)."""
    models = [load_model(folder / name) for name in ("student", "teacher", "third", "student", "teacher")]
    for model in models:
        model.vocab_size = VOCAB
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


def parts_of(several, max_tokens=16384, chunk_rows=64, temperature=1.0, models=None):
    _, teachers, rollout, teacher_B = several
    cfg = SimpleNamespace(micro_batch_tokens=max_tokens, chunk_rows=chunk_rows, temperature=temperature)
    batch = Batch(rollout, list(range(9)), [None] * 9, False, 0)
    if models:
        return batch, [Teacher(models[0], cfg).read(batch, rollout.every_B)]
    read_by = [(teacher_B == number).nonzero().squeeze(1) for number in range(len(teachers))]
    return batch, [Teacher(model, cfg).read(batch, mine_b) for model, mine_b in zip(teachers, read_by) if len(mine_b)]


@pytest.mark.parametrize("max_tokens,chunk_rows,temperature", [(1, 1, 1.0), (20, 3, 0.7), (16384, 64, 1.3)])
def test_each_sequence_is_scored_by_its_own_teacher(several, max_tokens, chunk_rows, temperature):
    """fails if: rows are stored in micro-batch order, a head serves another teacher's rows, padding rows
    enter the softmax, or the temperature reaches one teacher only"""
    batch, parts = parts_of(several, max_tokens, chunk_rows, temperature)
    logp_N, entropy_N = (SIGNALS[name](None, batch, parts) for name in ("teacher_logp_N", "teacher_entropy_N"))
    expected = list(each(several, temperature))
    close(logp_N, torch.cat([sampled(q_NV, response) for _, q_NV, response in expected]))
    close(entropy_N, torch.cat([-(q_NV.exp() * q_NV).sum(-1) for _, q_NV, _ in expected]))
    assert [part.hidden_nE.shape[1] for part in parts] == [24, 32, 16]        # the fourth read nothing


@pytest.mark.parametrize("max_tokens,chunk_rows", [(1, 1), (20, 3), (16384, 64)])
def test_the_gradient_is_the_sum_over_sequences(several, folder, max_tokens, chunk_rows):
    """fails if: a part's gradient replaces the last one's, place_N is taken as a row of the step, or rows of
    a part are not those of its micro-batch"""
    student, rollout = load_model(folder / "student", dtype=torch.float64), several[2]
    student.vocab_size = VOCAB
    fields_N = {"token_N": rollout.rows(rollout.tokens_BT), "behavior_logp_N": rollout.rows(rollout.logp_BT)}
    scale_N = torch.linspace(0.1, 1, len(rollout.sequence_N), dtype=torch.float64)
    cfg = train.Config(divergence="reverse_kl", micro_batch_tokens=max_tokens, chunk_rows=chunk_rows)
    losses.zero_gradients(student)
    parts = parts_of(several)[1]
    per_row = losses.backward(student, rollout, parts, fields_N, scale_N, losses.reverse_kl, cfg, observe)
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
    sizes = dict(chunk_rows=chunk_rows, temperature=0.7)
    (mine,), theirs = parts_of(several, models=[student], **sizes)[1], parts_of(several, **sizes)[1]
    found = disagreement(mine, theirs)
    rows = list(each(several, 0.7))
    p_NV, q_NV = (torch.cat([row[i] for row in rows]).detach() for i in (0, 1))
    expected = diagnostics(Rows(p_NV, torch.zeros(len(p_NV), dtype=torch.int64), q_NV))
    assert set(found) == set(expected)
    for name, value_N in expected.items():
        close(found[name], value_N)


def test_a_field_names_the_teacher(folder, command):
    """fails if: tags are numbered by first use instead of --teacher's order, or the step routes by place
    instead of problem"""
    run = ready(command, recipe="multi", route="kind",
                     teacher=f"b={folder / 'third'},a={folder / 'teacher'}",
                     data=folder / "routed.jsonl", problems=6)
    assert [run.kind.which(problem) for problem in run.train] == [1, 0] * 5
    assert [model.config.hidden_size for model in run.kind.models] == [32, 24]
    batch, s, parts = look(run)
    teacher_B = [1 - i % 2 for i in batch.asked]
    assert SIGNALS["teacher_B"](run, batch, parts).tolist() == teacher_B and set(teacher_B) == {0, 1}
    close(s.teacher_logp_N, told(run.kind.models, batch.rollout, [run.prompts[i] for i in batch.asked], teacher_B))


def test_every_teacher_is_tested_on_its_own_problems(folder, command, monkeypatch):
    """fails if: a teacher is evaluated on everybody's problems, or held-out problems that name nobody end the
    run"""
    teachers = f"a={folder / 'teacher'},b={folder / 'third'}"
    run = ready(command, teacher=teachers, route="kind", data=folder / "routed.jsonl", eval_limit=0,
                     eval_data=folder / "routed.jsonl")
    read, real = [], eval_file.evaluate
    def evaluate(model, tokenizer, problems, **settings):
        read.append((model, problems))
        return real(model, tokenizer, problems, **settings)
    monkeypatch.setattr(eval_file, "evaluate", evaluate)
    metrics = eval_file.test_teacher(run)
    assert metrics["problems"] == 10 and [model for model, _ in read] == run.kind.models
    assert [{p.fields["kind"] for p in problems} for _, problems in read] == [{"a"}, {"b"}]
    run = ready(command, teacher=teachers, route="kind", data=folder / "routed.jsonl")
    assert eval_file.test_teacher(run) is None


def test_with_prompts_changes_prompts_only():
    """fails if: responses are cut from the text instead of the mask, log-probs stay where the old prompt put
    them"""
    rng = np.random.default_rng(1)
    texts = [rng.integers(0, VOCAB, rng.integers(1, 8)).tolist() for _ in range(15)]
    old = from_responses(texts[:5], texts[5:10], [True, False] * 2 + [True], "cpu")
    old.logp_BT[old.mask_BT], old.entropy_BT[old.mask_BT] = torch.rand(2, int(old.mask_BT.sum()))
    before, new = old.tokens_BT.clone(), with_prompts(old, texts[10:])
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
    plain = ready(command, **flags)
    run = ready(command, privileged="solution", **flags)
    assert run.prompts == plain.prompts
    (batch, s, parts), (same, s0, _) = look(run), look(plain)
    rollout, asked = batch.rollout, batch.asked
    assert torch.equal(rollout.tokens_BT, same.rollout.tokens_BT)
    assert torch.equal(s.behavior_logp_N, s0.behavior_logp_N)
    shown = [run.tokenizer.prompt_ids(f"{run.train[i].solution};{run.train[i].prompt}") for i in asked]
    close(s.teacher_logp_N, told(run.kind.models, batch.rollout, shown))
    close(s0.teacher_logp_N, told(run.kind.models, batch.rollout, [run.prompts[i] for i in batch.asked]))
    assert (s.teacher_logp_N - s0.teacher_logp_N).abs().min() > 1e-4
    assert (run.weigh(run, s) == 1).all()
    if teacher == "self":       # the gradient too: each side with its own prompt
        losses.zero_gradients(run.student)
        fields_N = {"token_N": s.token_N, "behavior_logp_N": s.behavior_logp_N}
        per_row = losses.backward(run.student, rollout, parts, fields_N, torch.ones_like(s.behavior_logp_N),
                                  losses.reverse_kl, run.cfg, run.observe)
        kl_N = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in (
            (predictions(run.student, run.prompts[i], rollout.response(b)),
             predictions(run.kind.models[0], shown[b], rollout.response(b))) for b, i in enumerate(asked))])
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
    """fails if: the reference is the student as it is now or --reference is ignored, reverse_kl_N reads
    the privileged prompt on the student's side, or a signal carries a gradient"""
    named = {"reference": folder / flags["reference"]} if "reference" in flags else {}
    run = ready(command, recipe="exopd", weight="tip", privileged="solution", teacher_prompt=PROMPT,
                     lr=0.05,
                     **{**flags, **named})
    reference, optimizer = load_model(folder / flags.get("reference", "student")), adamw(run)
    for step in range(2):
        batch, s, parts = look(run, step)
        prompts = [run.prompts[i] for i in batch.asked]
        close(s.reference_logp_N, told([reference], batch.rollout, prompts))
        kl = [(p.exp() * (p - q)).sum(-1) for b, problem in enumerate(batch.problems) for p, q in (
            [predictions(model, prompt, batch.rollout.response(b)).detach()
             for model, prompt in ((run.student, prompts[b]), (run.kind.models[0], run.kind.prompt(problem)))],)]
        close(s.reverse_kl_N, torch.cat(kl))
        tensors = [*vars(s).values(), *parts[0].told.values(), parts[0].hidden_nE]
        assert not any(isinstance(x, torch.Tensor) and x.requires_grad for x in tensors)
        one_step(run, optimizer, step)
