"""What a teacher with another tokenizer does not say is NaN, never a number that a rule could take for its opinion."""
from dataclasses import replace

import torch
from helpers import close, look, ready

import teacher
from losses import WEIGHTS


def two_teachers(world, command, **flags):
    """A plain teacher for even problems and a foreign one for odd problems, in one step."""
    return ready(command, teacher=f"a={world / 'teacher'},b={world / 'foreign'}", route="kind", problems=6,
                 data=world / "kinds.jsonl", divergence="policy_gradient", max_new_tokens=9, **flags)


def test_a_new_signal_is_nan_where_a_teacher_reads_other_tokens(world, command, monkeypatch):
    """fails if: buffers are filled with a number, or a new signal must be known to crossing.py"""
    monkeypatch.setitem(teacher.TOLD, "top1_N", lambda logp_nV, token_n: logp_nV.amax(-1))
    monkeypatch.setitem(teacher.SIGNALS, "top1_N", teacher.told("top1_N"))
    run = two_teachers(world, command)
    _, s, _ = look(replace(run, asks=(*run.asks, "top1_N")))
    across_N = run.teacher.crossing.across_N
    assert 0 < across_N.sum() < len(across_N) and torch.equal(s.top1_N.isnan(), across_N)
    assert (s.top1_N >= s.teacher_logp_N)[~across_N].all() and s.teacher_logp_N.isfinite().all()


def test_the_entropy_is_nan_on_tokens_that_no_teacher_token_answers(world, command):
    """fails if: 0 nats, the surest a teacher can be, stand for no word at all; and fire, which reads entropies, may
    see them as the lowest of a response, but must not lose the response"""
    run = two_teachers(world, command, recipe="fire", fire_drop=0.0)
    _, s, _ = look(run)
    silent_N = run.teacher.crossing.chunk_N < 0
    assert silent_N.any() and torch.equal(s.teacher_entropy_N.isnan(), silent_N)
    weight_N = WEIGHTS["fire"](s, run.cfg)
    assert weight_N.isfinite().all()
    close(weight_N, WEIGHTS["fire"](s.replace(teacher_entropy_N=s.teacher_entropy_N.masked_fill(silent_N, 0.0)),
                                    run.cfg), 0)
