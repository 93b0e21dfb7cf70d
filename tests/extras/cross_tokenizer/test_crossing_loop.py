"""The whole loop with a teacher of another tokenizer: gradients and every rule it composes with. What is refused:
test_crossing_report.py. That the text's distribution moves to the teacher's: test_crossing_texts.py.

The reference is that of crossing_reference.py: one response at a time, plain Python.
"""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHARACTERS, END
from crossing_reference import advantages, cross_rows, foreign, forward, joined, prompt_of, told
from helpers import adamw, close, collect, interrupted, look, one_step, predictions, ready, sampled, steps_of

import eval as eval_file
import train
from extras import fast, given, token_view
from extras.cross_tokenizer.chunk_credit import CREDIT
from extras.cross_tokenizer.gate import check_tokenizers
from losses import ADVANTAGES, DIVERGENCES, WEIGHTS, LossArgs
from support.responses import from_responses
from support.errors import UserError
from teacher import Batch

PROMPT = "{solution};{problem}"
VOCAB = 20


# Gradients.

def shared_of(run, theirs):
    """(student ids, teacher ids) of the tokens that both have: the characters, and to stop."""
    vocab = theirs.vocab()
    return (torch.tensor([*range(len(CHARACTERS)), END]),
            torch.tensor([*(vocab[c] for c in CHARACTERS), theirs.stop_ids[0]]))


def total_loss(run, theirs, batch, parts, divergence):
    """Sum over the rows with credit, or with a state beside them."""
    sid, tid = shared_of(run, theirs)
    name, total = {"uld": "place", "gold": "last"}.get(divergence, "alone"), 0.0
    for b, (i, part) in enumerate(zip(batch.asked, parts)):
        if part is None:
            continue
        p_NV = predictions(run.student, run.prompts[i], batch.rollout.response(b))
        if divergence == "policy_gradient":
            total = total - (sampled(p_NV, batch.rollout.response(b)) * torch.tensor(part.a)).sum()
            continue
        at = [n for n, state in enumerate(getattr(part, name)) if state is not None]
        if not at:
            continue
        states = torch.stack([getattr(part, name)[n] for n in at])
        q_NV = (states @ run.kind.models[-1].head_weight()[:theirs.vocab_size].T).log_softmax(-1)
        if divergence == "reverse_kl":
            p, q = p_NV[at][:, sid].log_softmax(-1), q_NV[:, tid].log_softmax(-1)
            total = total + (p.exp() * (p - q)).sum()
            continue
        before = torch.tensor(part.before)[at].T
        rows = cross_rows(p_NV[at], q_NV, torch.zeros(len(at), dtype=torch.int64), (sid, tid), before)
        total = total + DIVERGENCES[divergence](rows, LossArgs()).sum()
    return total


def student_logp(run, batch):
    """log p(a) of every response token, with gradient."""
    responses = [batch.rollout.response(b) for b in range(len(batch.asked))]
    return torch.cat([sampled(predictions(run.student, run.prompts[i], response), response)
                      for i, response in zip(batch.asked, responses)])


def by_hand(run, theirs, batch, parts, divergence):
    """(loss, gradients) of a step: rows without credit or state stay in the denominator."""
    loss = total_loss(run, theirs, batch, parts, divergence) / sum(len(part.b) for part in parts)
    return loss, torch.autograd.grad(loss, list(run.student.parameters()))


@pytest.mark.parametrize("divergence,mode", [*(("policy_gradient", mode) for mode in CREDIT), ("reverse_kl", "chunk"),
                                             ("uld", "chunk"), ("gold", "chunk")])
def test_the_gradient_of_a_step(world, command, divergence, mode):
    """fails if: a token that cannot be scored moves the student or leaves the denominator, the loss reads
    another row's state, or the teacher reads the student's prompt"""
    run, theirs = foreign(world, command, divergence=divergence, chunk_credit=mode)
    batch, _, _ = look(run)
    parts = told(run, theirs, batch, mode)
    loss, gradients = by_hand(run, theirs, batch, parts, divergence)
    assert {1, 2} <= {len(ours) for part in parts for ours, _ in part.chunks}
    shared_kl = total_loss(run, theirs, batch, parts, "reverse_kl").item()
    record = one_step(run)
    for parameter, gradient in zip(run.student.parameters(), gradients):
        close(parameter.grad, gradient, 1e-4)
    if divergence != "policy_gradient":
        assert record["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert 0 < record["masked_share"] < 1 and record["grad_norm"] > 0.01
    if divergence in ("policy_gradient", "reverse_kl"):     # the mean of the rows that can be compared
        rows = sum(state is not None for state in joined(parts, "alone"))
        assert record["reverse_kl"] == pytest.approx(shared_kl / rows, abs=1e-4)


def test_gold_on_given_responses_knows_the_students_log_probs(world, command):
    """fails if: the log-probs of responses that nobody sampled (all 0) are taken for the student's"""
    run, theirs = foreign(world, command, divergence="gold", lmbda=0.0)
    batch, _, _ = look(run)
    parts = told(run, theirs, batch)
    loss, gradients = by_hand(run, theirs, batch, parts, "gold")
    record = one_step(run)
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5) and not record["on_policy"]
    for parameter, gradient in zip(run.student.parameters(), gradients):
        close(parameter.grad, gradient, 1e-4)
    gaps = [part.total - sum(part.b) for part in parts]
    assert record["advantage_sum/shift"] == pytest.approx(np.mean(gaps), rel=1e-4)


def test_equal_tokenizers_are_plain_distillation(world, command):
    """fails if: any rule rounds a log-prob of a 1:1 chunk, or the general path multiplies in another order"""
    flags = dict(divergence="policy_gradient", max_new_tokens=50, samples=1, problems=3, seed=3, lr=0.01)
    def run_of(**more):
        run = ready(command, **flags, **more)
        optimizer, told = adamw(run), []
        for step in range(2):
            batch, s, _ = look(run, step)
            assert batch.rollout.finished_B.all()
            told.append(s.teacher_logp_N - s.behavior_logp_N)
            one_step(run, optimizer, step)
        return [*told, *run.student.parameters()]
    plain = run_of()
    for mode in CREDIT:
        assert all(map(torch.equal, plain, run_of(align="always", chunk_credit=mode))), mode


# What else the loop does with such a teacher.

@pytest.mark.parametrize("mode", list(CREDIT))
def test_rules_that_compare_with_a_third_model(world, command, mode):
    """fails if: the reference's log-prob of one token is taken from the teacher's of a whole chunk"""
    run, theirs = foreign(world, command, recipe="exopd", chunk_credit=mode, reference=world / "teacher",
                          extrapolate=1.5)
    batch, s, _ = look(run)
    a_N, start, parts = ADVANTAGES["exopd"](s, run.cfg).tolist(), 0, told(run, theirs, batch, mode)
    assert {1, 2} <= {len(ours) for part in parts for ours, _ in part.chunks}
    for b, (i, part) in enumerate(zip(batch.asked, parts)):
        response = batch.rollout.response(b)
        r = sampled(forward(run.more_models["reference"], VOCAB, run.prompts[i], response)[1], response).tolist()
        for ours, _ in part.chunks:
            mine, third = ([x[j] for j in ours] for x in (part.b, r))
            away = [y - x for x, y in zip(mine, third)] if mode == "prefix" or len(ours) == 1 else \
                advantages(mode, mine, third, None, None, None, None)
            for k, j in enumerate(ours):
                if part.scored[j]:
                    assert a_N[start + j] == pytest.approx(part.a[j] + 0.5 * (part.a[j] - away[k]), abs=2e-4)
        start += len(part.b)


def test_verifier_and_teacher_together(world, command, monkeypatch):
    """fails if: the group's verdict and the chunk's credit land on different rows, or a teacher whose word no
    rule asks for keeps tokens from the verifier"""
    run, theirs = foreign(world, command, recipe="kdrl", samples=4, kdrl_coef=0.3, problems=2)
    run.train[:] = [replace(p, answer=str(run.train.index(p) % 10)) for p in run.train]
    batch, s, _ = look(run)
    s = s.replace(reward_B=torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0]))
    monkeypatch.setattr(Batch, "reward_B", s.reward_B)
    parts = told(run, theirs, batch)
    a_N, scored_N = torch.tensor(joined(parts, "a")), torch.tensor(joined(parts, "scored"))
    close(ADVANTAGES["kdrl"](s, run.cfg), ADVANTAGES["grpo"](s, run.cfg) + 0.3 * a_N, 1e-4)
    p_N = student_logp(run, batch)
    loss = -((ADVANTAGES["grpo"](s, run.cfg) + 0.3 * a_N) * scored_N * p_N).mean()
    expected = torch.autograd.grad(loss, list(run.student.parameters()))
    one_step(run)
    for parameter, gradient in zip(run.student.parameters(), expected):
        close(parameter.grad, gradient, 1e-4)
    gradients = []
    for teacher in (world / "foreign", world / "teacher"):
        run = ready(command, recipe="grpo", samples=4, problems=2, teacher=teacher, max_grad_norm=1e9)
        record = one_step(run)
        gradients.append([p.grad for p in run.student.parameters()])
        assert record["grad_norm"] > 0
    assert all(map(torch.equal, *gradients))


def test_the_filter_of_fire_hears_the_teachers_own_total(world, command):
    """fails if: the effective log-probs are summed: they count a chunk once per token"""
    run, theirs = foreign(world, command, recipe="fire", problems=5, fire_drop=0.5)
    batch, s, _ = look(run)
    parts = told(run, theirs, batch)
    mean = np.array([part.total / len(part.b) for part in parts])
    close(s.teacher_total_B / s.length_B, torch.tensor(mean), 1e-4)
    dropped = WEIGHTS["fire"](s, run.cfg) == 0
    found = [dropped[s.sequence_N == b].all().item() for b in range(len(batch.asked))]
    assert found == (mean < np.quantile(mean, 0.5)).tolist() and True in found


@pytest.mark.parametrize("divergence", ["policy_gradient", "reverse_kl"])
def test_a_plain_and_a_foreign_teacher(world, command, divergence):
    """fails if: rows of one are scored or masked by the other, or the second part's gradient replaces the
    first's"""
    run, theirs = foreign(world, command, teacher=f"a={world / 'teacher'},b={world / 'foreign'}", route="kind",
                          data=world / "kinds.jsonl", problems=6, divergence=divergence)
    batch, s, _ = look(run)
    parts = told(run, theirs, batch, only=[b for b, i in enumerate(batch.asked) if i % 2])
    total, covered = total_loss(run, theirs, batch, parts, divergence), 0
    for b, i in enumerate(batch.asked):
        response, found = batch.rollout.response(b), s.teacher_logp_N[s.sequence_N == b]
        if parts[b]:
            covered += len(response)
            close(found, torch.tensor(parts[b].a) + torch.tensor(parts[b].b), 1e-4)
            continue
        p_NV = predictions(run.student, run.prompts[i], response)
        q_NV = forward(run.kind.models[0], VOCAB, run.prompts[i], response)[1]
        p_N, q_N = sampled(p_NV, response), sampled(q_NV, response)
        close(found, q_N, 1e-4)
        total = total + (-((q_N - p_N).detach() * p_N).sum() if divergence == "policy_gradient" else
                         (p_NV.exp() * (p_NV - q_NV)).sum())
    gradients = torch.autograd.grad(total / len(s.token_N), list(run.student.parameters()))
    assert 0 < covered < len(s.token_N) and int(run.teacher.crossing.across_N.sum()) == covered
    one_step(run)
    for parameter, gradient in zip(run.student.parameters(), gradients):
        close(parameter.grad, gradient, 1e-4)


def test_a_privileged_foreign_teacher(world, command):
    """fails if: the solution is shown through the student's tokenizer or template"""
    run, theirs = foreign(world, command, privileged="solution", teacher_prompt=PROMPT)
    batch, s, _ = look(run)
    seen = [prompt_of(theirs, f"{run.train[i].solution};{run.train[i].prompt}") for i in batch.asked]
    parts = told(run, theirs, batch, seen=seen)
    close(s.teacher_logp_N - s.behavior_logp_N, torch.tensor(joined(parts, "a")), 1e-4)
    assert run.prompts == ready(command).prompts


def test_a_foreign_teacher_is_shown_a_sibling(world, command):
    """fails if: the sibling's text reaches it in the student's tokens, or it reads the student's prompt where
    there is no sibling"""
    run, theirs = foreign(world, command, recipe="sdpo", student=world / "student", teacher_prompt=PROMPT,
                          samples=2, teacher=world / "foreign", divergence="reverse_kl", problems=2)
    asked, texts = [0, 0, 3, 3], ["3", "0+3", "12", "9"]
    rollout = from_responses([run.prompts[i] for i in asked], [[*run.tokenizer.encode(text), END] for text in texts],
                             [True] * 4, "cpu")
    batch = Batch(rollout, asked, [run.train[i] for i in asked], True, 0, run.tokenizer)
    vars(batch).update(texts=texts, reward_B=torch.tensor([1.0, 0, 0, 0]))
    seen = run.teacher.prompts(batch)
    assert run.teacher.usable_B.tolist() == [0, 1, 0, 0]
    assert seen[1] == prompt_of(theirs, f"3;{run.train[0].prompt}")
    assert [seen[b] for b in (0, 2, 3)] == [prompt_of(theirs, run.train[i].prompt) for i in (0, 3, 3)]
    record = one_step(run)
    assert math.isfinite(record["loss"])


def restore(model, weights):
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), weights):
            parameter.copy_(weight)


def folder_of(path):
    """The part of a run folder that keeps the teacher's responses."""
    path.mkdir()
    return SimpleNamespace(path=path, keep=lambda name, text: (path / name).write_text(text))


def writer(theirs, texts, calls):
    """A stand-in for rollout.generate: the foreign teacher writes these texts, the student nothing."""
    def generate(model, prompts, *, samples, stop_ids, **_):
        calls.append((model, prompts, stop_ids))
        both = [(theirs.encode(text) + [theirs.stop_ids[0]] * end, bool(end)) for text, end in texts[:samples]]
        assert len(both) == samples
        return from_responses([p for p in prompts for _ in both], [ids for _ in prompts for ids, _ in both],
                              [end for _ in prompts for _, end in both], "cpu")
    return generate


def test_what_a_foreign_teacher_writes_is_translated(world, command, tmp_path, monkeypatch):
    """fails if: its ids are taken for the student's, its stop token stays, the student's prompt is read, or what
    the student cannot say is kept"""
    texts = [("12;3", 1), ("<|think|>1", 1), ("=4" * 9, 1), ("+3", 0)]
    for flags in (dict(recipe="sft", responses="teacher", samples=4), dict(cold_start_steps=1, pts_samples=4),
                  dict(recipe="sg", pts_samples=4, samples=4, pts_weight=0.1)):
        calls = []
        run, theirs = foreign(world, command, **{"divergence": None, **flags})
        monkeypatch.setattr(given, "generate", writer(theirs, texts, calls))
        wanted = [*run.tokenizer.encode("12;3"), END]
        if "responses" in flags:
            batch = collect(run)
            found = [batch.rollout.response(b) for b in range(6)]
            assert not batch.on_policy and found == [wanted, run.tokenizer.encode("+3")] * 3
            assert batch.rollout.finished_B.tolist() == [True, False] * 3 and len(set(batch.asked)) == 3
            prompts = [run.train[i].prompt for i in batch.asked[::2]]
        else:
            run.train[:] = [replace(p, answer="3") for p in run.train]
            folder = folder_of(tmp_path / run.cfg.recipe)
            others = check_tokenizers, fast.prove, token_view.begin
            cold, = (first for first in run.before_first_step if first not in others)
            cold(run, folder, None)
            kept = given.teacher_responses(run, folder)
            assert kept and all(found == [wanted] for found in kept.values())
            prompts = [run.train[i].prompt for i in kept]
            if run.cfg.cold_start_steps:
                before = [p.detach().clone() for p in run.student.parameters()]
                record = one_step(run)
                restore(run.student, before)
                nll = -torch.cat([sampled(predictions(run.student, run.prompts[i], wanted), wanted)
                                  for i in run.batch.asked])
                assert record["on_policy"] == 0 and record["loss"] == pytest.approx(nll.mean().item(), abs=1e-5)
        (model, read, stops), = calls
        assert model is run.kind.models[0] and stops == theirs.stop_ids
        assert sorted(read) == sorted(prompt_of(theirs, text) for text in prompts)
    monkeypatch.setattr(given, "generate", writer(theirs, texts[1:2], []))
    run, theirs = foreign(world, command, divergence=None, recipe="sft", responses="teacher", samples=1)
    with pytest.raises(UserError, match="can be said in the student's tokens"):
        collect(run)


def test_imitation_does_not_ask_what_can_be_scored(world, command):
    """fails if: a given response that was cut loses its last chunk, since a teacher could not score it"""
    run, _ = foreign(world, command, recipe="sft", divergence=None, max_new_tokens=4)
    batch, _, _ = look(run)
    nll = -student_logp(run, batch)
    record = one_step(run)
    assert not run.teacher.crossing.scored_N.all() and record["loss"] == pytest.approx(nll.mean().item(), abs=1e-5)


def test_a_foreign_teacher_is_tested_with_its_own_text(world, command):
    """fails if: the student's tokenizer writes its prompts, stops its answers or reads them"""
    run, theirs = foreign(world, command, eval_k=2, chat_template="plain")     # of the student
    assert list(map(run.kind.prompt, run.train)) == [prompt_of(theirs, problem.prompt) for problem in run.train]
    wanted, _ = eval_file.evaluate(run.kind.models[0], theirs, run.held_out, k=2, temperature=1.0, max_new_tokens=9,
                                   seed=10**9, verifier="auto")
    assert eval_file.test_teacher(run) == wanted


def test_a_resumed_run_across_tokenizers(world, command, tmp_path, monkeypatch, capsys):
    """fails if: the first look at the tokenizers or the notes of a step leave something behind"""
    flags = dict(teacher=world / "foreign", divergence="policy_gradient", steps=3, save_every=1, lr=0.02,
                 min_coverage=0, samples=1)
    assert train.main(command(**flags, runs=tmp_path / "whole")) == 0
    interrupted(monkeypatch, command, at=2, **flags)
    for file in ("model.safetensors", "trainer.safetensors"):
        whole, resumed = ((tmp_path / name / "a" / "last" / file).read_bytes() for name in ("whole", "runs"))
        assert whole == resumed, file
    record, *_ = steps_of(tmp_path / "whole" / "a")
    assert {"strict_coverage", "masked_share", "advantage_sum/prop", "chunks_of_4+"} <= set(record)
