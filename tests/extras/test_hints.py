"""extras/hints.py: who is shown which wrong response, what the teacher then says, and what RLCSD makes of it."""
from math import tanh

import pytest
import torch
from helpers import one_step, ready, settings, told
from test_siblings import END, PROMPT

from extras.hints import rlcsd, rlcsd_weight, wrong_hint_logp, wrong_siblings
from extras.given import random_of
from extras.teachers import privileged_prompt
from losses import Signals
from support.errors import UserError
from support.responses import from_responses
from teacher import Batch
from train import Config

F64 = torch.float64
TEXTS = ["3", "5", "0+4=4", "+5", "7", "4", "5", "1"]           # problem 0 wants 3, problem 1 wants 4
ASKED, FINISHED = [0, 0, 0, 0, 0, 1, 1, 2], [True, True, True, False, True, True, True, True]
WRONG = [{1, 2, 4}, {2, 4}, {1, 4}, {1, 2, 4}, {1, 2}, {6}, set(), set()]       # of each response, without itself


def a_step(command, **flags):
    """A run with teacher `self`, and a step of eight responses to three problems."""
    run = ready(command, recipe="rlcsd", teacher="self", teacher_prompt=PROMPT, samples=4, **flags)
    ids = [run.tokenizer.encode(text) + [END] * done for text, done in zip(TEXTS, FINISHED)]
    rollout = from_responses([run.prompts[i] for i in ASKED], ids, FINISHED, "cpu")
    return run, lambda step: Batch(rollout, ASKED, [run.train[i] for i in ASKED], True, step, run.tokenizer,
                                   run.cfg.verifier)


def test_a_wrong_hint_is_a_wrong_finished_response_of_another_sample(command):
    """fails if: a response is shown to itself, a right, cut or foreign one is, one twice, or always the same ones."""
    run, batch = a_step(command)
    seen = [set() for _ in ASKED]
    for step in range(40):
        for b, hints in enumerate(wrong_siblings(batch(step), 2, random_of(0, 5, step))):
            assert len(hints) == len(set(hints)) == min(2, len(WRONG[b]))
            seen[b] |= set(hints)
    assert seen == WRONG


@pytest.mark.parametrize("most", [1, 2, 4])
def test_the_wrong_reading_is_the_mean_of_probabilities_over_the_hints(command, most):
    """Each response after each of its wrong hints, one sequence at a time. fails if: logs are averaged, a hint that
    another response lacks counts for it, or a response without a right hint has a reading."""
    run, batch = a_step(command, rlcsd_hints=most)
    parts = run.teacher.parts(batch(3))
    found_N = wrong_hint_logp(run, batch(3), parts)
    assert [b for b, usable in enumerate(run.teacher.usable_B.tolist()) if usable] == [1, 2, 3, 4, 6]
    hints, rollout = wrong_siblings(batch(3), most, random_of(run.cfg.seed, 5, 3)), batch(3).rollout
    with_hints = [b for b in (1, 2, 3, 4, 6) if WRONG[b]]
    for b in range(len(ASKED)):
        mine_N = found_N[rollout.sequence_N == b]
        if b not in with_hints:
            assert mine_N.isnan().all()
            continue
        problem = run.train[ASKED[b]]
        shown = [run.tokenizer.prompt_ids(privileged_prompt(problem.prompt, TEXTS[c], PROMPT)) for c in hints[b]]
        one = from_responses(shown, [rollout.response(b)] * len(shown), [True] * len(shown), "cpu")
        p_KN = told([run.kind.models[0]], one, shown).view(len(shown), -1).exp()
        torch.testing.assert_close(mine_N, p_KN.mean(0).log(), rtol=1e-4, atol=1e-5)


def by_hand():
    """Four responses of two tokens to one problem, two of them right; the last has no hints. And both readings."""
    right = [[-0.5, -1.0], [-0.7, -2.0], [-0.3, -0.1], [-1.0, -1.0]]
    wrong = [[-1.5, -0.6], [-0.2, -2.4], [-0.302, -0.101], [float("nan")] * 2]
    right_N, wrong_N = (torch.tensor(reading, dtype=F64).flatten() for reading in (right, wrong))
    s = Signals(teacher_logp_N=right_N, wrong_hint_logp_N=wrong_N, reward_B=torch.tensor([1.0, 0, 0, 1], dtype=F64),
                group_B=torch.zeros(4, dtype=torch.int64),
                behavior_logp_N=torch.zeros(8, dtype=F64), sequence_N=torch.arange(4).repeat_interleave(2),
                position_N=torch.arange(2).repeat(4), length_B=torch.full((4,), 2), token_N=torch.arange(8))
    return s, right, wrong


CFG = Config(rlcsd_size=0.8, rlcsd_soft=0.02, rlcsd_least=0.05, grpo_std=False)     # grpo is then +-0.5


def test_the_contrast_moves_an_advantage_and_never_turns_it():
    """Every token by hand. fails if: the two readings are swapped, a clear contrast may turn the verifier's sign, an
    unclear one counts, or a response without hints is moved."""
    s, right, wrong = by_hand()
    expected = []
    for q_right, q_wrong, sign in zip(right, wrong, (1, -1, -1, 1)):
        for q, w in zip(q_right, q_wrong):
            moved = 0.8 * tanh((q - w) / 0.02) if w == w else 0.0
            shifted = sign * 0.5 + (moved if abs(moved) > 0.05 else 0.0)
            expected.append(max(shifted, 0) if sign > 0 else min(shifted, 0))
    found_N = rlcsd(s, CFG)
    torch.testing.assert_close(found_N, torch.tensor(expected, dtype=F64), rtol=1e-12, atol=1e-13)
    # the kinds of token that the step was made of: agreed, opposed and stopped at 0, opposed, unclear, without hints
    assert found_N[0] == pytest.approx(1.3) and found_N[2] == pytest.approx(-1.3) and found_N[1] == found_N[3] == 0
    assert -0.5 < found_N[4] < -0.4 and found_N[5] == -0.5 and found_N[6] == found_N[7] == 0.5
    assert (rlcsd(s.replace(reward_B=torch.ones(4, dtype=F64)), CFG) == 0).all()       # a unanimous group


def test_moved_tokens_and_the_others_have_a_mean_each():
    """The weighted mean over all tokens against the two means. fails if: one path outweighs the other, a response
    without hints counts in a denominator, or tokens that may have no loss do."""
    s, right, wrong = by_hand()
    loss_N = torch.randn(8, dtype=F64, generator=torch.Generator().manual_seed(0))
    for cfg, here in ((CFG, range(6)), (Config(rlcsd_size=0.8, rlcsd_least=0.05, skip_first=1), (1, 3, 5))):
        size = cfg.rlcsd_size
        gap_N = (s.teacher_logp_N - s.wrong_hint_logp_N).tolist()
        moved = [n for n in here if abs(size * tanh(gap_N[n] / 0.02)) > 0.05]
        rest = [n for n in here if n not in moved]
        weight_N = rlcsd_weight(s, cfg)
        expected = loss_N[moved].mean() + loss_N[rest].mean()
        kept_N = weight_N > 0
        assert kept_N.nonzero().flatten().tolist() == list(here) and moved and rest
        torch.testing.assert_close((weight_N * loss_N).sum() / kept_N.sum(), expected, rtol=1e-12, atol=1e-13)
    nobody = s.replace(wrong_hint_logp_N=torch.full((8,), torch.nan, dtype=F64))
    assert (rlcsd_weight(nobody, CFG) == 0).all()


def test_a_step_learns_from_responses_with_both_hints_alone(command):
    """fails if: NaN of a missing hint reaches the loss, or the responses without one stay among the kept."""
    run, batch = a_step(command, clip=1e6)      # these responses are given: no log-prob of a sampler, so no ratio
    run.sources = [(lambda step: True, lambda run, step: batch(step))]
    record = one_step(run)
    length_B = batch(0).rollout.length_B
    assert record["kept"] == pytest.approx((length_B[[1, 2, 3, 4]].sum() / length_B.sum()).item())
    assert record["skipped"] == 0 and record["grad_norm"] > 0


@pytest.mark.parametrize("flags, says", [(dict(privileged="solution"), "pass --privileged sibling"),
                                         (dict(rlcsd_soft=0), "--rlcsd_soft must be above 0")])
def test_what_it_cannot_do_is_said_before_anything_is_loaded(command, flags, says):
    """fails if: the rule leaves, or its sentence names no way out."""
    with pytest.raises(UserError, match=says):
        settings(command, recipe="rlcsd", teacher="self", teacher_prompt=PROMPT, samples=4, **flags)
