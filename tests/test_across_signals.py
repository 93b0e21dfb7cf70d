"""What a teacher with another tokenizer does not say is NaN, never a number that a rule could take for its opinion."""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from test_across import world  # noqa: F401
from test_teachers import close, ready

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import teacher  # noqa: E402
from credit import WEIGHTS  # noqa: E402
from step import Clock, look  # noqa: E402


def two_teachers(world, command, **flags):  # noqa: F811
    """A plain teacher for even problems and a foreign one for odd problems, in one step."""
    return ready(command, teacher=f"a={world / 'teacher'},b={world / 'foreign'}", route="kind", problems=6,
                 data=world / "kinds.jsonl", divergence="policy_gradient", max_new_tokens=9, **flags)


def test_a_new_signal_is_nan_where_a_teacher_reads_other_tokens(world, command, monkeypatch):  # noqa: F811
    """fails if: buffers are filled with a number, or a new signal must be known to across.py"""
    @dataclass(frozen=True)
    class More(teacher.Scores):
        top1_N: torch.Tensor | None = None

    def told(logp_NV, token_N, plain=teacher.told):
        return plain(logp_NV, token_N) | {"top1_N": logp_NV.amax(-1)}
    monkeypatch.setattr(teacher, "Scores", More)
    monkeypatch.setattr(teacher, "SIGNALS", (*teacher.SIGNALS, "top1_N"))
    monkeypatch.setattr(teacher, "told", told)
    cfg, run = two_teachers(world, command)
    _, s, scores, *_ = look(cfg, run, 0, {}, Clock())
    across_N = scores.crossing.across_N
    assert 0 < across_N.sum() < len(across_N) and torch.equal(scores.top1_N.isnan(), across_N)
    assert (scores.top1_N >= scores.logp_N)[~across_N].all() and scores.logp_N.isfinite().all()


def test_the_entropy_is_nan_on_tokens_that_no_teacher_token_answers(world, command):  # noqa: F811
    """fails if: 0 nats, the surest a teacher can be, stand for no word at all; and fire, which reads entropies, may
    see them as the lowest of a response, but must not lose the response"""
    cfg, run = two_teachers(world, command, recipe="fire", fire_drop=0.0)
    _, s, scores, *_ = look(cfg, run, 0, {}, Clock())
    silent_N = scores.crossing.chunk_N < 0
    assert silent_N.any() and torch.equal(s.teacher_entropy_N.isnan(), silent_N)
    weight_N = WEIGHTS["fire"](s, cfg)
    assert weight_N.isfinite().all()
    close(weight_N, WEIGHTS["fire"](s._replace(teacher_entropy_N=s.teacher_entropy_N.masked_fill(silent_N, 0.0)),
                                    cfg), 0)
