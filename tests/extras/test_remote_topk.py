"""extras/remote_topk.py: what K words and the mass of the rest say exactly, and that nothing else is said.

Values and gradients in float64 against the same loss with the teacher's whole distribution.
"""
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from helpers import adamw, close, look, one_step, ready, settings, steps_of, with_third
from loss_reference import TOPK, VOCAB, logits, sampled_fields
from serving import own_cache, serving  # noqa: F401 (a fixture)

import losses
import train
from extras import remote_topk
from extras.remote_topk import Short, TopkPart
from losses import DIVERGENCES, LossArgs, Rows
from support.errors import UserError
from support.metrics import diagnostics

SHORT = dict(divergence="policy_gradient", teacher_topk=4)


@pytest.fixture
def served(pair):
    with serving(pair / "teacher") as url:
        yield url


@pytest.fixture(autouse=True)
def in_place(monkeypatch):
    """What a run puts in place; taken back at the end."""
    monkeypatch.setattr(losses, "choose_support", losses.choose_support)
    for name in TOPK:
        monkeypatch.setitem(DIVERGENCES, name, DIVERGENCES[name])
    remote_topk.put_in_place()


def short_rows(z_NV, teacher_NV, k, **fields):
    """The rows of a teacher that sends its k likeliest words, from what its server would say in float64."""
    top_NK, id_NK = teacher_NV.topk(k)
    rest_N = teacher_NV.exp().scatter(1, id_NK, 0.0).sum(1).clamp(min=1e-300).log()
    drawn_N = teacher_NV.gather(1, fields["token_N"][:, None]).squeeze(1)
    entropy_N = -(teacher_NV.exp() * teacher_NV).sum(1)
    told_NC = torch.cat([top_NK, id_NK.double(), torch.stack([rest_N, drawn_N, entropy_N], 1)], 1)
    place_N = torch.arange(len(z_NV))
    short = Short(SimpleNamespace(teacher_topk=k, temperature=1.0), z_NV.shape[1])
    part = TopkPart(place_N, place_N, told_NC, short, fields["token_N"], None)
    return part.rows(z_NV, part.fields(place_N) | fields)


def both(loss, z_NV, args, teacher_NV, k, **fields):
    """[(loss_N, gradient)] from the whole distribution, and from k words of it."""
    found = []
    for whole in (True, False):
        leaf_NV = z_NV.clone().requires_grad_()
        rows = (Rows(leaf_NV.log_softmax(-1), teacher_NV=teacher_NV, **fields) if whole else
                short_rows(leaf_NV, teacher_NV, k, **fields))
        loss_N = loss(rows, args)
        found.append((loss_N.detach(), torch.autograd.grad(loss_N.sum(), leaf_NV)[0]))
    return found


FORMS = [LossArgs(support=support, topk_form=form) for support, form in
         product(("teacher", "intersection"), ("renormalised", "truncated", "tail"))]


@pytest.mark.parametrize("k,topk", [(1, 1), (4, 4), (6, 3), (VOCAB - 1, 5), (VOCAB, 5), (VOCAB, VOCAB)])
@pytest.mark.parametrize("args", FORMS, ids=lambda args: f"{args.support}-{args.topk_form}")
@pytest.mark.parametrize("name", TOPK)
def test_topk_losses_are_those_of_the_whole_distribution(name, args, k, topk):
    """fails if: the rest is chosen as a word, its mass is lost, or the student's rest misses what was not sent"""
    z, teacher = logits(0), logits(1).log_softmax(-1)
    whole, short = both(DIVERGENCES[name], z, replace(args, topk=topk), teacher, k, **sampled_fields(z))
    for mine, theirs in zip(short, whole):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", remote_topk.ON_DRAWN)
def test_losses_on_the_token_drawn_are_too(name):
    """fails if: the drawn token is looked for among the words that were sent"""
    z, teacher = logits(0), logits(1).log_softmax(-1)
    whole, short = both(DIVERGENCES[name], z, LossArgs(), teacher, 2, **sampled_fields(z))
    for mine, theirs in zip(short, whole):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [1, 4, VOCAB])
def test_what_is_logged_is_exact_or_a_bound(k):
    """fails if: an entropy is that of K + 1 words, or the coarse KL is above the whole one; at K = V they are equal"""
    z, teacher = logits(0), logits(1).log_softmax(-1)
    fields = sampled_fields(z)
    wanted = diagnostics(Rows(z.log_softmax(-1), teacher_NV=teacher, **fields))
    found = remote_topk.noted(short_rows(z, teacher, k, **fields))
    for name in ("student_entropy", "teacher_entropy", "entropy_gap"):
        close(found[name], wanted[name], 1e-9)
    assert (found["coarse_kl"] <= wanted["reverse_kl"] + 1e-9).all() and (found["coarse_kl"] >= -1e-12).all()
    if k == VOCAB:
        close(found["coarse_kl"], wanted["reverse_kl"], 1e-9)
    assert not {"reverse_kl", "forward_kl", "overlap_ratio"} & found.keys()


# Over the line

RUNS = {
    "policy gradient": dict(recipe="fire"),
    "every token drawn": dict(divergence="k2"),
    "tail": dict(divergence="topk_reverse_kl", support="teacher", topk_form="tail", topk=4),
    "renormalised": dict(recipe="lsm", topk=3),
    "forward": dict(divergence="topk_forward_kl", support="intersection", topk=4, temperature=0.7),
    "bfloat16": dict(recipe="fire", dtype="bfloat16"),
    "many passes": dict(divergence="k2", micro_batch_tokens=1, problems=6),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_that_of_the_teacher_in_this_process(pair, command, name):
    """fails if: the server's temperature, vocabulary or rows are others than a local teacher's"""
    here = ready(command, **RUNS[name])
    with serving(pair / "teacher", "--dtype", RUNS[name].get("dtype", "auto")) as url:
        there = ready(command, **RUNS[name], teacher=url, teacher_topk=4)
        for number in range(2):
            mine, theirs = (one_step(run, adamw(run, lr=1e-3), number) for run in (there, here))
            for key in ("loss", "grad_norm", "student_entropy", "teacher_entropy", "sampler_gap", "kept"):
                assert mine[key] == pytest.approx(theirs[key], rel=2e-4, abs=1e-5), key
            assert mine["tokens"] == theirs["tokens"]


def test_signals_are_those_of_the_teacher_in_this_process(served, command):
    """fails if: log q(a) or H(q) is of another token, or the head is asked for all the same"""
    run = ready(command, **SHORT, problems=5, teacher=served)
    _, here, _ = look(ready(command, divergence="policy_gradient", problems=5))
    _, there, parts = look(run)
    close(there.teacher_logp_N, here.teacher_logp_N)
    assert run.kind.models[0].kept is None
    close(parts[0].told["teacher_entropy_N"], here.teacher_entropy_N)


def test_bytes_per_token(served, command):
    """fails if: more is sent than is said: 8 K + 12, against 4 for each column"""
    for flags, bytes_per_token in ((SHORT, 8 * 4 + 12), (dict(divergence="policy_gradient"), 4 * 24)):
        run = ready(command, **flags, problems=8, samples=4, teacher=served)
        line = run.kind.models[0].line
        if not run.cfg.teacher_topk:
            run.kind.models[0].head()
        before = line.received
        batch, *_ = look(run)
        tokens = len(batch.rollout.sequence_N)
        assert 0 <= line.received - before - bytes_per_token * tokens < 1000


def test_one_of_two_teachers_may_send_short_rows(pair, served, command):
    """fails if: a teacher in this process is read as if it were the other"""
    with_third(pair)
    routed = dict(recipe="multi", route="kind", data=pair / "routed.jsonl", eval_data=pair / "routed.jsonl", problems=4,
                  divergence="policy_gradient")
    _, here, _ = look(ready(command, **routed, teacher=f"a={pair / 'teacher'},b={pair / 'third'}"))
    _, there, _ = look(ready(command, **routed, teacher=f"a={served},b={pair / 'third'}", teacher_topk=3))
    close(there.teacher_logp_N, here.teacher_logp_N)


def test_whole_runs_are_taken_too(served, command, tmp_path):
    """fails if: whatever looks at a run beside its steps (records, pages) takes K + 1 words for the vocabulary"""
    flags = dict(divergence="topk_reverse_kl", support="teacher", topk=4, teacher=served, teacher_topk=4)
    assert train.main(command(**flags)) == 0
    assert all("coarse_kl" in record and "reverse_kl" not in record for record in steps_of(tmp_path / "runs/a"))


# What it cannot say

WRONG = {
    "opd": ({}, "topk_reverse_kl --support teacher --topk_form tail --topk 4"),
    "jsd": (dict(divergence="jsd"), "whole distribution"),
    "eopd": (dict(recipe="eopd"), "whole distribution"),
    "student": (dict(recipe="topk", topk=4), "--support student: "),
    "union": (dict(divergence="topk_forward_kl", support="union", topk=4), "--support union: "),
    "more": (dict(recipe="lsm", topk=5), "--topk 5 asks for more words than --teacher_topk 4 sends"),
    "tip": (dict(divergence="policy_gradient", weight="tip"), "--weight tip needs"),
    "report": (dict(divergence="k2", report_only=True), "--report_only compares"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_needs_more_is_refused_before_anything_is_asked(command, name):
    """fails if: a loss that looks at words which were not sent trains on something made up"""
    flags, said = WRONG[name]
    with pytest.raises(UserError, match=said):
        settings(command, **{"teacher": "http://127.0.0.1:1", "teacher_topk": 4, **flags})


def test_another_tokenizer_is_refused(world, command):
    with serving(world / "foreign") as url, pytest.raises(UserError, match="another tokenizer"):
        ready(command, **SHORT, min_coverage=0, teacher=url)


def test_problems_without_answers_have_no_distance(pair, served, command, tmp_path):
    """fails if: the distance of two coarse distributions is reported as reverse_kl"""
    (tmp_path / "asked.jsonl").write_text('{"problem": "1+1?"}\n')
    import eval as eval_file
    run = ready(command, **SHORT, teacher=served, eval_data=tmp_path / "asked.jsonl", eval_limit=1)
    assert "reverse_kl" not in eval_file.test(run, "x")[0]
