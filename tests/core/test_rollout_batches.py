"""rollout.py: given responses in the shape of a rollout, other prompts before the same responses, and micro-batches."""
import numpy as np
import pytest
import torch
from rollout_cases import ragged, same, small, texts, write

from extras.teachers import with_prompts
from rollout import assemble
from support.responses import from_responses


# given responses

def test_given_responses_take_the_shape_of_a_rollout():
    """Token 0 is a word here: only the mask says what is padding.
    fails if: assemble() builds the mask from ids, or pads on the left."""
    rollout = from_responses([[5, 0], [6], [7, 8]], [[1, 0], [2, 3, 0], [0]], [True, True, False], "cpu")
    assert rollout.tokens_BT.tolist() == [[5, 0, 1, 0], [6, 2, 3, 0], [7, 8, 0, 0]]
    assert rollout.mask_BT.int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0]]
    assert rollout.prompt_len_B.tolist() == [2, 1, 2] and rollout.length_B.tolist() == [2, 3, 1]
    assert rollout.finished_B.tolist() == [True, True, False]
    assert not rollout.logp_BT.any() and not rollout.entropy_BT.any()
    assert texts(rollout) == [[1, 0], [2, 3, 0], [0]]
    assert {t.dtype for t in (rollout.tokens_BT, rollout.prompt_len_B)} == {torch.int64}


def test_columns_of_an_assembled_rollout_line_up():
    """rows() of every field runs through the same tokens in the same order, sequence after sequence.
    fails if: assemble() swaps logp and entropy, or rows() goes column by column."""
    responses = [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])]
    logps, entropies = [-r.float() for r in responses], [10.0 * r for r in responses]
    rollout = assemble([[9], [9, 9, 9], [9, 9]], responses, logps, entropies, [True, False, True], "cpu")
    assert rollout.rows(rollout.tokens_BT).tolist() == [1, 2, 3, 4, 5, 6]
    assert rollout.rows(rollout.logp_BT).tolist() == [-1, -2, -3, -4, -5, -6]
    assert rollout.rows(rollout.entropy_BT).tolist() == [10, 20, 30, 40, 50, 60]


def test_written_and_given_rollouts_agree():
    """fails if: from_responses() and generate() disagree on where a response starts."""
    rollout = write(small())
    prompts, finished = [p for p in ragged() for _ in range(3)], rollout.finished_B.tolist()
    given = from_responses(prompts, texts(rollout), finished, "cpu")
    assert same(rollout, given) and torch.equal(rollout.prompt_len_B, given.prompt_len_B)
    assert torch.equal(rollout.finished_B, given.finished_B)


def test_other_prompts_leave_the_rows_as_they_are():
    """fails if: with_prompts() keeps the old prompt lengths, or takes whole rows without the mask."""
    rollout = write(small())
    other = with_prompts(rollout, [[9] * (1 + b % 4) for b in range(len(rollout.tokens_BT))])
    for field in ("tokens_BT", "logp_BT", "entropy_BT"):
        assert torch.equal(other.rows(getattr(other, field)), rollout.rows(getattr(rollout, field))), field
    assert other.prompt_len_B.tolist() == [1 + b % 4 for b in range(21)] and texts(other) == texts(rollout)
    assert torch.equal(other.finished_B, rollout.finished_B)


@pytest.mark.parametrize("max_tokens", [1, 60, 200, 10 ** 6])
@pytest.mark.parametrize("chosen", [range(21), [0, 5, 20], []], ids=len)
def test_micro_batches_hold_every_chosen_row_once(max_tokens, chosen):
    """fails if: micro_batches() forgets the last group, lets one outgrow max_tokens, or renumbers rows."""
    rollout = write(small())
    number_BT = torch.full(rollout.mask_BT.shape, -1).masked_scatter(rollout.mask_BT, torch.arange(1000))
    sequence_b = torch.tensor(chosen, dtype=torch.int64)
    wanted = number_BT[sequence_b]
    seen, tokens_N = [], rollout.rows(rollout.tokens_BT)
    for tokens_bt, mask_bt, row_n in rollout.micro_batches(sequence_b, max_tokens):
        assert torch.equal(tokens_bt[mask_bt], tokens_N[row_n])
        assert tokens_bt.numel() <= max_tokens or len(tokens_bt) == 1
        seen += row_n.tolist()
    assert sorted(seen) == sorted(wanted[wanted >= 0].tolist())


def test_micro_batches_hold_little_padding():
    """Lognormal lengths, which one group would pad by more than half.
    fails if: micro_batches() fills every group up to max_tokens."""
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 200).clip(2, 400).astype(int).tolist()
    texts = [torch.zeros(n - 1, dtype=torch.int64) for n in lengths]
    zeros = [torch.zeros(n - 1) for n in lengths]
    rollout = assemble([[1]] * 200, texts, zeros, zeros, [True] * 200, "cpu")
    assert rollout.tokens_BT.numel() > 2 * sum(lengths)
    groups = [tokens_bt for tokens_bt, *_ in rollout.micro_batches(rollout.every_B, 10**6)]
    assert sum(tokens_bt.numel() for tokens_bt in groups) < 1.1 * sum(lengths) + 128 * len(groups)
    assert len(groups) < 20
