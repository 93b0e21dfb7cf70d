"""The whole loop with a teacher of another tokenizer: gradients, every rule it composes with, what is refused, and
that the text's distribution moves to the teacher's.

The reference is that of test_across.py: one response at a time, plain Python.
"""
import json
import math
import re
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHARACTERS, END
from test_across import (advantages, checkpoint, cut, forward, joined,
                         naive, world)  # noqa: F401
from test_teachers import PROMPT, adamw, close, interrupted, jsonl, predictions, ready, sampled

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import step as loop  # noqa: E402
import train  # noqa: E402
from chunk_credit import CREDIT  # noqa: E402
from credit import ADVANTAGES, WEIGHTS  # noqa: E402
from eval import evaluate  # noqa: E402
from losses import DIVERGENCES, LossArgs, Rows  # noqa: E402
from report import check_tokenizers, picture  # noqa: E402
from rollout import from_responses  # noqa: E402
from step import Clock, collect, look, train_step  # noqa: E402
from tokenizer import UserError  # noqa: E402

VOCAB = 20


# Gradients.

def shared_of(run, theirs):
    """(student ids, teacher ids) of the tokens that both have: the characters, and to stop."""
    vocab = theirs.vocab()
    return (torch.tensor([*range(len(CHARACTERS)), END]),
            torch.tensor([*(vocab[c] for c in CHARACTERS), theirs.stop_ids[0]]))


def foreign(world, command, **flags):
    cfg, run = ready(command, **{**dict(teacher=world / "foreign", divergence="policy_gradient", max_grad_norm=1e9,
                                        problems=3, max_new_tokens=9), **flags})
    return cfg, run, run.bridges[-1].teacher


def prompt_of(theirs, text):
    return theirs.encode(f"<s>{text}*")


def told(run, theirs, rollout, asked, mode="chunk", seen=None, only=None):
    """The reference of every response that the last teacher reads (all, or those in `only`; else None)."""
    return [None if only is not None and b not in only else
            naive(run.student, run.teachers[-1], run.tokenizer, theirs, run.prompts[i],
                  seen[b] if seen else prompt_of(theirs, run.train[i].prompt), rollout.response(b),
                  bool(rollout.finished_B[b]), mode) for b, i in enumerate(asked)]


def total_loss(run, theirs, rollout, asked, parts, divergence):
    """Sum over the rows with credit, or with a state beside them."""
    sid, tid = shared_of(run, theirs)
    name, total = {"uld": "place", "gold": "last"}.get(divergence, "alone"), 0.0
    for b, (i, part) in enumerate(zip(asked, parts)):
        if part is None:
            continue
        p_NV = predictions(run.student, run.prompts[i], rollout.response(b))
        if divergence == "policy_gradient":
            total = total - (sampled(p_NV, rollout.response(b)) * torch.tensor(part.a)).sum()
            continue
        at = [n for n, state in enumerate(getattr(part, name)) if state is not None]
        if not at:
            continue
        states = torch.stack([getattr(part, name)[n] for n in at])
        q_NV = (states @ run.teachers[-1].head_weight()[:theirs.vocab_size].T).log_softmax(-1)
        if divergence == "reverse_kl":
            p, q = p_NV[at][:, sid].log_softmax(-1), q_NV[:, tid].log_softmax(-1)
            total = total + (p.exp() * (p - q)).sum()
            continue
        before = torch.tensor(part.before)[at].T
        rows = Rows(p_NV[at], torch.zeros(len(at), dtype=torch.int64), q_NV, shared=(sid, tid),
                    student_before_N=before[0], teacher_before_N=before[1])
        total = total + DIVERGENCES[divergence](rows, LossArgs()).sum()
    return total


def by_hand(run, theirs, rollout, asked, parts, divergence):
    """(loss, gradients) of a step: rows without credit or state stay in the denominator."""
    loss = total_loss(run, theirs, rollout, asked, parts, divergence) / sum(len(part.b) for part in parts)
    return loss, torch.autograd.grad(loss, list(run.student.parameters()))


@pytest.mark.parametrize("divergence,mode", [*(("policy_gradient", mode) for mode in CREDIT), ("reverse_kl", "chunk"),
                                             ("uld", "chunk"), ("gold", "chunk")])
def test_the_gradient_of_a_step(world, command, divergence, mode):
    """fails if: a token that cannot be scored moves the student or leaves the denominator, the loss reads
    another row's state, or the teacher reads the student's prompt"""
    cfg, run, theirs = foreign(world, command, divergence=divergence, chunk_credit=mode)
    rollout, _, _, _, asked, _ = look(cfg, run, 0, {}, Clock())
    parts = told(run, theirs, rollout, asked, mode)
    loss, gradients = by_hand(run, theirs, rollout, asked, parts, divergence)
    assert {1, 2} <= {len(ours) for part in parts for ours, _ in part.chunks}
    shared_kl = total_loss(run, theirs, rollout, asked, parts, "reverse_kl").item()
    record = train_step(cfg, run, adamw(cfg, run), 0, {}, Clock())
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
    cfg, run, theirs = foreign(world, command, divergence="gold", lmbda=0.0)
    rollout, _, _, _, asked, _ = look(cfg, run, 0, {}, Clock())
    parts = told(run, theirs, rollout, asked)
    loss, gradients = by_hand(run, theirs, rollout, asked, parts, "gold")
    record = train_step(cfg, run, adamw(cfg, run), 0, {}, Clock())
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5) and not record["on_policy"]
    for parameter, gradient in zip(run.student.parameters(), gradients):
        close(parameter.grad, gradient, 1e-4)
    gaps = [part.total - sum(part.b) for part in parts]
    assert record["advantage_sum/shift"] == pytest.approx(np.mean(gaps), rel=1e-4)


def test_equal_tokenizers_are_plain_distillation(world, command):
    """fails if: any rule rounds a log-prob of a 1:1 chunk, or the general path multiplies in another order"""
    flags = dict(divergence="policy_gradient", max_new_tokens=50, samples=1, problems=3, seed=3, lr=0.01)
    def run_of(**more):
        cfg, run = ready(command, **flags, **more)
        optimizer, told = adamw(cfg, run), []
        for step in range(2):
            rollout, s, *_ = look(cfg, run, step, {}, Clock())
            assert rollout.finished_B.all()
            told.append(s.teacher_N - s.student_N)
            train_step(cfg, run, optimizer, step, {}, Clock())
        return [*told, *run.student.parameters()]
    plain = run_of()
    for mode in CREDIT:
        assert all(map(torch.equal, plain, run_of(align="always", chunk_credit=mode))), mode


# What else the loop does with such a teacher.

@pytest.mark.parametrize("mode", list(CREDIT))
def test_rules_that_compare_with_a_third_model(world, command, mode):
    """fails if: the reference's log-prob of one token is taken from the teacher's of a whole chunk"""
    cfg, run, theirs = foreign(world, command, recipe="exopd", chunk_credit=mode, reference=world / "teacher",
                               extrapolate=1.5)
    rollout, s, _, _, asked, _ = look(cfg, run, 0, {}, Clock())
    a_N, start, parts = ADVANTAGES["exopd"](s, cfg).tolist(), 0, told(run, theirs, rollout, asked, mode)
    assert {1, 2} <= {len(ours) for part in parts for ours, _ in part.chunks}
    for b, (i, part) in enumerate(zip(asked, parts)):
        response = rollout.response(b)
        r = sampled(forward(run.reference, VOCAB, run.prompts[i], response)[1], response).tolist()
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
    cfg, run, theirs = foreign(world, command, recipe="kdrl", samples=4, kdrl_coef=0.3, problems=2)
    run.train[:] = [replace(p, answer=str(run.train.index(p) % 10)) for p in run.train]
    rollout, s, _, _, asked, _ = look(cfg, run, 0, {}, Clock())
    s = s._replace(reward_B=torch.tensor([1.0, 0, 0, 1, 0, 1, 0, 0]))
    monkeypatch.setattr(loop, "rewards", lambda *_: s.reward_B)
    parts = told(run, theirs, rollout, asked)
    a_N, scored_N = torch.tensor(joined(parts, "a")), torch.tensor(joined(parts, "scored"))
    close(ADVANTAGES["kdrl"](s, cfg), ADVANTAGES["grpo"](s, cfg) + 0.3 * a_N, 1e-4)
    p_N = torch.cat([sampled(predictions(run.student, run.prompts[i], rollout.response(b)), rollout.response(b))
                     for b, i in enumerate(asked)])
    loss = -((ADVANTAGES["grpo"](s, cfg) + 0.3 * a_N) * scored_N * p_N).mean()
    expected = torch.autograd.grad(loss, list(run.student.parameters()))
    train_step(cfg, run, adamw(cfg, run), 0, {}, Clock())
    for parameter, gradient in zip(run.student.parameters(), expected):
        close(parameter.grad, gradient, 1e-4)
    gradients = []
    for teacher in (world / "foreign", world / "teacher"):
        cfg, run = ready(command, recipe="grpo", samples=4, problems=2, teacher=teacher, max_grad_norm=1e9)
        record = train_step(cfg, run, adamw(cfg, run), 0, {}, Clock())
        gradients.append([p.grad for p in run.student.parameters()])
        assert record["grad_norm"] > 0
    assert all(map(torch.equal, *gradients))


def test_the_filter_of_fire_hears_the_teachers_own_total(world, command):
    """fails if: the effective log-probs are summed: they count a chunk once per token"""
    cfg, run, theirs = foreign(world, command, recipe="fire", problems=5, fire_drop=0.5)
    rollout, s, _, _, asked, _ = look(cfg, run, 0, {}, Clock())
    parts = told(run, theirs, rollout, asked)
    mean = np.array([part.total / len(part.b) for part in parts])
    close(s.teacher_total_B / s.length_B, torch.tensor(mean), 1e-4)
    dropped = WEIGHTS["fire"](s, cfg) == 0
    found = [dropped[s.sequence_N == b].all().item() for b in range(len(asked))]
    assert found == (mean < np.quantile(mean, 0.5)).tolist() and True in found


@pytest.mark.parametrize("divergence", ["policy_gradient", "reverse_kl"])
def test_a_plain_and_a_foreign_teacher(world, command, divergence):
    """fails if: rows of one are scored or masked by the other, or the second part's gradient replaces the
    first's"""
    cfg, run, theirs = foreign(world, command, teacher=f"a={world / 'teacher'},b={world / 'foreign'}", route="kind",
                               data=world / "kinds.jsonl", problems=6, divergence=divergence)
    rollout, s, scores, _, asked, _ = look(cfg, run, 0, {}, Clock())
    parts = told(run, theirs, rollout, asked, only=[b for b, i in enumerate(asked) if i % 2])
    total, covered = total_loss(run, theirs, rollout, asked, parts, divergence), 0
    for b, i in enumerate(asked):
        response, found = rollout.response(b), scores.logp_N[s.sequence_N == b]
        if parts[b]:
            covered += len(response)
            close(found, torch.tensor(parts[b].a) + torch.tensor(parts[b].b), 1e-4)
            continue
        p_NV = predictions(run.student, run.prompts[i], response)
        q_NV = forward(run.teachers[0], VOCAB, run.prompts[i], response)[1]
        p_N, q_N = sampled(p_NV, response), sampled(q_NV, response)
        close(found, q_N, 1e-4)
        total = total + (-((q_N - p_N).detach() * p_N).sum() if divergence == "policy_gradient" else
                         (p_NV.exp() * (p_NV - q_NV)).sum())
    gradients = torch.autograd.grad(total / len(s.token_N), list(run.student.parameters()))
    assert 0 < covered < len(s.token_N) and int(scores.crossing.across_N.sum()) == covered
    train_step(cfg, run, adamw(cfg, run), 0, {}, Clock())
    for parameter, gradient in zip(run.student.parameters(), gradients):
        close(parameter.grad, gradient, 1e-4)


def test_a_privileged_foreign_teacher(world, command):
    """fails if: the solution is shown through the student's tokenizer or template"""
    cfg, run, theirs = foreign(world, command, privileged="solution", teacher_prompt=PROMPT)
    rollout, s, scores, _, asked, _ = look(cfg, run, 0, {}, Clock())
    seen = [prompt_of(theirs, f"{run.train[i].solution};{run.train[i].prompt}") for i in asked]
    parts = told(run, theirs, rollout, asked, seen=seen)
    close(scores.logp_N - s.student_N, torch.tensor(joined(parts, "a")), 1e-4)
    assert run.prompts == ready(command)[1].prompts


def test_a_foreign_teacher_is_shown_a_sibling(world, command):
    """fails if: the sibling's text reaches it in the student's tokens, or it reads the student's prompt where
    there is no sibling"""
    cfg, run, theirs = foreign(world, command, recipe="sdpo", student=world / "student", teacher_prompt=PROMPT,
                               samples=2, teacher=world / "foreign", divergence="reverse_kl", problems=2)
    asked, texts = [0, 0, 3, 3], ["3", "0+3", "12", "9"]
    rollout = from_responses([run.prompts[i] for i in asked], [[*run.tokenizer.encode(text), END] for text in texts],
                             [True] * 4, "cpu")
    seen, usable_B = loop.teacher_reads(cfg, run, rollout, asked, texts, torch.tensor([1.0, 0, 0, 0]), 0)
    assert usable_B.tolist() == [0, 1, 0, 0]
    assert seen[1] == prompt_of(theirs, f"3;{run.train[0].prompt}")
    assert [seen[b] for b in (0, 2, 3)] == [prompt_of(theirs, run.train[i].prompt) for i in (0, 3, 3)]
    record = train_step(cfg, run, adamw(cfg, run), 0, {}, Clock())
    assert math.isfinite(record["loss"])


def writer(theirs, texts, calls):
    """A stand-in for step.generate: the foreign teacher writes these texts, the student nothing."""
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
        cfg, run, theirs = foreign(world, command, **{"divergence": None, **flags})
        monkeypatch.setattr(loop, "generate", writer(theirs, texts, calls))
        wanted = [*run.tokenizer.encode("12;3"), END]
        if "responses" in flags:
            rollout, asked, on_policy = collect(cfg, run, 0, {})
            assert not on_policy and [rollout.response(b) for b in range(6)] == [wanted, run.tokenizer.encode("+3")] * 3
            assert rollout.finished_B.tolist() == [True, False] * 3 and len(set(asked)) == 3
            prompts = [run.train[i].prompt for i in asked[::2]]
        else:
            run.train[:] = [replace(p, answer="3") for p in run.train]
            (tmp_path / cfg.recipe).mkdir()
            kept = loop.teacher_responses(cfg, run, SimpleNamespace(path=tmp_path / cfg.recipe))
            assert kept and all(found == [wanted] for found in kept.values())
            prompts = [run.train[i].prompt for i in kept]
            if cfg.cold_start_steps:
                _, asked, _ = collect(cfg, run, 0, kept)
                nll = -torch.cat([sampled(predictions(run.student, run.prompts[i], wanted), wanted) for i in asked])
                record = train_step(cfg, run, adamw(cfg, run), 0, kept, Clock())
                assert record["on_policy"] == 0 and record["loss"] == pytest.approx(nll.mean().item(), abs=1e-5)
        (model, read, stops), = calls
        assert model is run.teachers[0] and stops == theirs.stop_ids
        assert sorted(read) == sorted(prompt_of(theirs, text) for text in prompts)
    monkeypatch.setattr(loop, "generate", writer(theirs, texts[1:2], []))
    cfg, run, theirs = foreign(world, command, divergence=None, recipe="sft", responses="teacher")
    cfg = replace(cfg, samples=1)
    with pytest.raises(UserError, match="can be said in the student's tokens"):
        collect(cfg, run, 0, {})


def test_imitation_does_not_ask_what_can_be_scored(world, command):
    """fails if: a given response that was cut loses its last chunk, since a teacher could not score it"""
    cfg, run, _ = foreign(world, command, recipe="sft", divergence=None, max_new_tokens=4)
    rollout, _, scores, _, asked, _ = look(cfg, run, 0, {}, Clock())
    nll = -torch.cat([sampled(predictions(run.student, run.prompts[i], rollout.response(b)), rollout.response(b))
                      for b, i in enumerate(asked)])
    record = train_step(cfg, run, adamw(cfg, run), 0, {}, Clock())
    assert not scores.crossing.scored_N.all() and record["loss"] == pytest.approx(nll.mean().item(), abs=1e-5)


def test_a_foreign_teacher_is_tested_with_its_own_text(world, command):
    """fails if: the student's tokenizer writes its prompts, stops its answers or reads them"""
    cfg, run, theirs = foreign(world, command, eval_k=2, chat_template="plain")     # of the student
    assert run.teacher_prompts == [prompt_of(theirs, problem.prompt) for problem in run.train]
    wanted, _ = evaluate(run.teachers[0], theirs, run.held_out, k=2, temperature=1.0, max_new_tokens=9, seed=10**9,
                                 verifier="auto")
    assert train.test_teachers(cfg, run) == wanted


def test_a_resumed_run_across_tokenizers(world, command, tmp_path, monkeypatch, capsys):
    """fails if: the first look at the tokenizers or the notes of a step leave something behind"""
    flags = dict(teacher=world / "foreign", divergence="policy_gradient", steps=3, save_every=1, lr=0.02,
                 min_coverage=0, samples=1)
    assert train.main(command(**flags, runs=tmp_path / "whole")) == 0
    interrupted(monkeypatch, command, 2, **flags)
    for file in ("model.safetensors", "trainer.safetensors"):
        whole, resumed = ((tmp_path / name / "a" / "last" / file).read_bytes() for name in ("whole", "runs"))
        assert whole == resumed, file
    lines = (tmp_path / "whole" / "a" / "metrics.jsonl").read_text().splitlines()
    records = [record for record in map(json.loads, lines) if "loss" in record]
    assert {"strict_coverage", "masked_share", "advantage_sum/prop", "chunks_of_4+"} <= set(records[0])


# What is refused, and the report.

@pytest.mark.parametrize("flags,message", [
    (dict(recipe="eopd"), "divergence eopd needs a teacher with the student's tokenizer"),
    (dict(divergence="k2"), "divergence k2 needs a teacher"), (dict(recipe="tip"), "weight tip needs a teacher"),
    (dict(recipe="minillm"), "--discount .* --chunk_credit"),
    (dict(max_chunk=-1), "--max_chunk must be at least 0"), (dict(chunk_clamp=-1), "--chunk_clamp must be at least 0"),
    (dict(min_coverage=1.5), "--min_coverage is a share"), (dict(max_dropped=-1), "--max_dropped is a share"),
    (dict(min_coverage=0.99), r"of the student's tokens get credit \(--chunk_credit chunk\), and --min_coverage is 99.0%"),
    (dict(student="rich", teacher="two", min_coverage=0),
     "of the responses cannot be read, and --max_dropped is 1.0%")], ids=str)
def test_a_sentence_refuses_it(world, command, tmp_path, capsys, flags, message):
    """fails if: a rule that needs one vocabulary runs, or a gate is not asked"""
    flags = {**dict(teacher=world / "foreign", divergence="policy_gradient"), **flags}
    if "recipe" in flags:
        flags["divergence"] = None
    flags |= {side: world / flags[side] for side in ("student", "teacher") if side in flags}
    assert train.main(command(**flags)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and re.search(message, error), error


def test_the_share_that_a_refusal_names_is_enough(world, command, capsys):
    """fails if: it is rounded to the wrong side"""
    cfg, run, _ = foreign(world, command)
    for seed in range(4):
        with pytest.raises(UserError) as refused:
            check_tokenizers(replace(cfg, min_coverage=1.0, seed=seed), run)
        share = float(re.search(r"set --min_coverage (\S+)", str(refused.value))[1])
        check_tokenizers(replace(cfg, min_coverage=share, seed=seed), run)


def test_report_only_shows_how_both_cut(world, command, capsys):
    """fails if: rows of the report are looked up as tokens, or a gate stops a report"""
    assert train.main(command(teacher=world / "foreign", report_only=True, problems=8, samples=3, min_coverage=1)) == 0
    out = capsys.readouterr().out
    assert "of the student's tokens have a teacher token of their own" in out and "chunks by student tokens" in out
    assert re.search(r"student +teacher +credit", out) and re.search(r"reverse_kl +\d", out)


def test_the_picture_shows_one_response_chunk_by_chunk(world, command):
    """fails if: one side's tokens or the credit of another response stand in a line"""
    cfg, run, theirs = foreign(world, command, problems=6)
    sizes = set()
    for seed in range(6):
        rollout, _, scores, _, asked, _ = look(replace(cfg, seed=seed), run, 0, {}, Clock())
        _, *lines = picture(run, rollout, scores, cfg)
        b = int(rollout.length_B.argmax())
        part, mine = told(run, theirs, rollout, asked, only=[b])[b], rollout.response(b)
        ids, _ = cut(run.tokenizer, theirs, mine, bool(rollout.finished_B[b]))
        assert len(lines) == len(part.chunks) + (sum(part.scored) < len(mine))
        lines = [line for line in lines if "(not read)" not in line]
        assert len(lines) == len(part.chunks)
        for line, (ours, others) in zip(lines, part.chunks):
            texts = [run.tokenizer.decode([mine[i]], False) for i in ours]
            texts += [theirs.decode([ids[j]], False) for j in others]
            assert line.split() == texts + [f"{part.a[i]:+.2f}" for i in ours]
            sizes.add(len(ours))
    assert max(sizes) > 1


@pytest.mark.parametrize("mode", ["chunk", "prop"])
def test_the_loop_knows_every_stop_token(world, command, mode):
    """fails if: of several stop tokens only the one that was drawn counts, on either side"""
    cfg, run, theirs = foreign(world, command, student=world / "rich", teacher=world / "two", chunk_credit=mode,
                               samples=8, seed=1, max_new_tokens=12)
    rollout, s, scores, _, asked, _ = look(cfg, run, 0, {}, Clock())
    parts = told(run, theirs, rollout, asked, mode)
    close(scores.logp_N - s.student_N, torch.tensor(joined(parts, "a")), 1e-4)
    close(s.teacher_total_B, torch.tensor([part.total for part in parts]), 1e-4)
    assert {rollout.response(b)[-1] for b in range(24) if parts[b].stop is not None} == set(run.tokenizer.stop_ids)


# The distribution over texts. A model whose layers add nothing looks up the last token: any table of log-probs
# p(next | last) can be written into its head.

STOP = 2


def tables(command, folder, student_table=None, teacher_table=None, **flags):
    """(cfg, run): student over {a, b}, teacher over {b, a, ab}, both with a stop token; tables are (last, next)."""
    config = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    checkpoint(folder / "ab", 7, "ab", (), ("<|end|>",), ["<|end|>"], model_type="qwen3", vocab_size=3, head_dim=4,
               **config)
    checkpoint(folder / "ba", 8, "ba", ("a b",), ("</s>",), ["</s>"], model_type="llama", vocab_size=4, **config)
    data = jsonl(folder / "ab.jsonl", [dict(problem="b", answer="a")])
    cfg, run = ready(command, student=folder / "ab", teacher=folder / "ba", data=data, eval_data=data, problems=1,
                     divergence="policy_gradient", **{**dict(samples=64, max_new_tokens=8), **flags})
    for model, table in ((run.student, student_table), (run.teachers[0], teacher_table)):
        if table is not None:
            with torch.no_grad():
                weights = dict(model.named_parameters())
                for name, weight in weights.items():
                    weight.fill_(1.0 if "norm" in name else 0.0)
                weights["model.embed_tokens.weight"][:, :len(table)].copy_(torch.eye(len(table)))
                weights["lm_head.weight"][:, :len(table)].copy_(table.T / 8 ** 0.5)
    return cfg, run


def log_prob(model, vocab, sequences):
    """log-probs of token sequences after the prompt `b`, in one padded batch."""
    longest = max(map(len, sequences))
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])
    prompt = torch.full((len(sequences), 1), 1 if vocab == 3 else 0)
    with torch.no_grad():
        logp = (model(torch.cat([prompt, padded], 1))[:, :-1] @ model.head_weight()[:vocab].T).double().log_softmax(-1)
    there = torch.arange(longest) < torch.tensor([[len(ids)] for ids in sequences])
    return (logp.gather(2, padded[..., None]).squeeze(2) * there).sum(1)


def segmentations(text):
    """Every way to spell a text with the teacher's tokens b = 0, a = 1, ab = 2."""
    if not text:
        return [[]]
    tails = [[{"b": 0, "a": 1}[text[0]], *tail] for tail in segmentations(text[1:])]
    return tails + [[2, *tail] for tail in segmentations(text[2:])] if text[:2] == "ab" else tails


def text_kl(run):
    """KL(P_S || P_T) over all texts of at most 4 characters and one bucket for the longer ones; the teacher's
    probability of a text is summed over all its segmentations."""
    texts = ["".join(letters) for size in range(5) for letters in product("ab", repeat=size)]
    p = log_prob(run.student, 3, [["ab".index(c) for c in text] + [STOP] for text in texts]).exp()
    spelled = [(n, [*ids, 3]) for n, text in enumerate(texts) for ids in segmentations(text)]
    q = torch.zeros(len(texts)).double().index_add(0, torch.tensor([n for n, _ in spelled]),
                                                   log_prob(run.teachers[0], 4, [ids for _, ids in spelled]).exp())
    p, q = (torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (p, q))
    return (p * (p / q).log()).sum().item()


@pytest.mark.parametrize("mode", ["chunk", "prefix"])
def test_the_students_texts_become_the_teachers(world, command, tmp_path, mode):
    """fails if: credit has the wrong sign or lands on the wrong tokens: the exact divergence of the two
    distributions over texts would not fall"""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    table[1, 0] = -30.0         # no b after a: like a trained model, it spells every text in one way
    cfg, run = tables(command, tmp_path, None, table.log_softmax(-1), lr=0.05, chunk_credit=mode, max_new_tokens=6)
    optimizer, before = adamw(cfg, run), text_kl(run)
    for step in range(40):
        train_step(cfg, run, optimizer, step, {}, Clock())
    assert before > 0.3 and text_kl(run) < 0.3 * before


def test_a_teacher_of_the_same_texts_gives_no_credit(world, command, tmp_path):
    """fails if: log q of a response is not the sum over its chunks, or the stop token is left out: a teacher that
    writes the same texts in tokens of its own has nothing to say on average"""
    a, b, stop, never = 0.35, 0.35, 0.3, -30.0
    student = torch.tensor([[a, b, stop]] * 3).log()
    after = torch.tensor([b, a * (1 - b), a * b, stop]).log()      # next token b, a (and no b behind it), ab, stop
    after_a = torch.cat([torch.tensor([never]), (torch.tensor([a * (1 - b), a * b, stop]) / (1 - b)).log()])
    teacher = torch.stack([after, after_a, after, after])
    cfg, run = tables(command, tmp_path, student, teacher, samples=256, max_new_tokens=40)
    assert text_kl(run) == pytest.approx(0, abs=1e-5)
    rollout, s, scores, *_ = look(cfg, run, 0, {}, Clock())
    assert rollout.finished_B.all()
    own_B = torch.zeros(256).index_add(0, s.sequence_N, s.student_N)
    close(s.teacher_total_B, own_B, 1e-4)
    found = scores.crossing.metrics()
    assert found["chunks_of_2"] > 0.1 and abs(found["advantage_sum/shift"]) < 1e-5
    assert abs((s.teacher_N - s.student_N).mean().item()) < 0.05 < (s.teacher_N - s.student_N).abs().mean().item()
