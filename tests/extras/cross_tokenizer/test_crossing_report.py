"""What is refused of a teacher with another tokenizer, and what the report shows of it."""
import re
from dataclasses import replace

import pytest
import torch
from crossing_reference import cut, foreign, joined, told
from helpers import close, look

import train
from extras.cross_tokenizer.gate import check_tokenizers, picture
from support.errors import UserError


@pytest.mark.parametrize("flags,message", [
    (dict(recipe="eopd"), "divergence eopd needs a teacher with the student's tokenizer"),
    (dict(divergence="k2"), "divergence k2 needs a teacher"), (dict(recipe="tip"), "weight tip needs a teacher"),
    (dict(recipe="minillm"), "--discount .* --chunk_credit"),
    (dict(max_chunk=-1), "--max_chunk must be at least 0"), (dict(chunk_clamp=-1), "--chunk_clamp must be at least 0"),
    (dict(min_coverage=1.5), "--min_coverage must lie between 0 and 1"),
    (dict(max_dropped=-1), "--max_dropped must lie between 0 and 1"),
    (dict(min_coverage=0.99),
     r"of the student's tokens get credit \(--chunk_credit chunk\), and --min_coverage is 99.0%"),
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


def with_flags(run, **flags):
    return replace(run, cfg=replace(run.cfg, **flags))


def test_the_share_that_a_refusal_names_is_enough(world, command, capsys):
    """fails if: it is rounded to the wrong side"""
    run, _ = foreign(world, command)
    for seed in range(4):
        with pytest.raises(UserError) as refused:
            check_tokenizers(with_flags(run, min_coverage=1.0, seed=seed), None, None)
        share = float(re.search(r"set --min_coverage (\S+)", str(refused.value))[1])
        check_tokenizers(with_flags(run, min_coverage=share, seed=seed), None, None)


def test_report_only_shows_how_both_cut(world, command, capsys):
    """fails if: rows of the report are looked up as tokens, or a gate stops a report"""
    assert train.main(command(teacher=world / "foreign", report_only=True, problems=8, samples=3, min_coverage=1)) == 0
    out = capsys.readouterr().out
    assert "of the student's tokens have a teacher token of their own" in out and "chunks by student tokens" in out
    assert re.search(r"student +teacher +credit", out) and re.search(r"reverse_kl +\d", out)


def test_the_picture_shows_one_response_chunk_by_chunk(world, command):
    """fails if: one side's tokens or the credit of another response stand in a line"""
    run, theirs = foreign(world, command, problems=6)
    sizes = set()
    for seed in range(6):
        batch, _, _ = look(with_flags(run, seed=seed))
        _, *lines = picture(run, batch)
        b = int(batch.rollout.length_B.argmax())
        part, mine = told(run, theirs, batch, only=[b])[b], batch.rollout.response(b)
        ids, _ = cut(run.tokenizer, theirs, mine, bool(batch.rollout.finished_B[b]))
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
    run, theirs = foreign(world, command, student=world / "rich", teacher=world / "two", chunk_credit=mode,
                          samples=8, seed=1, max_new_tokens=12)
    batch, s, _ = look(run)
    parts = told(run, theirs, batch, mode)
    close(s.teacher_logp_N - s.behavior_logp_N, torch.tensor(joined(parts, "a")), 1e-4)
    close(s.teacher_total_B, torch.tensor([part.total for part in parts]), 1e-4)
    stops = {batch.rollout.response(b)[-1] for b in range(24) if parts[b].stop is not None}
    assert stops == set(run.tokenizer.stop_ids)
