"""extras/fast/flash.py: sequences packed end to end and slots at their own lengths give what the plain ways give, with
a slow and plain kernel in place of a GPU's.
"""
import pytest
import torch
from model_cases import run_cached, small, tokens
from rollout_cases import small as writer
from rollout_cases import write

from extras.fast import flash as flash_file
from extras.fast.flash import FlashCache, Packed
from extras.fast.young import available


def test_sequences_end_to_end_are_those_side_by_side(flash):
    """Lengths 5, 1 and 12 in one row of 18 tokens: states and gradients as of each sequence alone.
    fails if: a sequence sees the one before it, or positions go on counting across a boundary."""
    model, lengths = small("qwen3", head_dim=8), [5, 1, 12]
    rows = tokens(1, sum(lengths))
    grads = []
    for end_to_end in (True, False):
        model.zero_grad()
        hidden = (model(rows, Packed(lengths)) if end_to_end
                  else torch.cat([model(part) for part in rows.split(lengths, 1)], 1))
        (hidden * torch.arange(18.)[:, None].sin()).sum().backward()
        grads.append((hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    assert all((a - b).abs().max() < 1e-4 * b.abs().max() for a, b in zip(*grads))


@torch.no_grad()
def test_flash_attention_gets_what_makes_it_the_same(flash):
    """A row end to end, and slots of one cache at their own lengths, four steps each.
    fails if: a slot's keys begin elsewhere, the new key is not counted, or queries share the wrong keys."""
    model, rows = small("qwen3", head_dim=8, num_attention_heads=6, num_key_value_heads=2), tokens(3, 40)
    flash_file.on_model(model)
    full_BTD = model(rows)
    end_to_end = model(torch.cat([rows[0, :7], rows[1, :30], rows[2, :2]])[None], Packed([7, 30, 2]))[0]
    assert (end_to_end - torch.cat([full_BTD[0, :7], full_BTD[1, :30], full_BTD[2, :2]])).abs().max() < 1e-5
    cache = model.cache_type(model, 5, 40)
    assert isinstance(cache, FlashCache)
    for at_BT, hidden_BTD in run_cached(model, rows, [5, 17, 2], [1, 1, 1, 1], cache):
        wanted = full_BTD.gather(1, at_BT[..., None].expand_as(hidden_BTD))
        assert (hidden_BTD - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("kernel", flash_file.KERNELS)
def test_flash_operator_accepts_what_it_is_given(kernel, monkeypatch):
    """Of the public function (torch 2.13) and the operator beneath it. On the meta device torch checks the operator's
    arguments without a GPU; nothing may ask for a value.
    fails if: an argument is unknown to the installed torch, a length goes to the host, or no gradient comes back."""
    monkeypatch.setattr(flash_file, "flash_ready", lambda device, dtype, head_dim: dtype == torch.bfloat16)
    if not available(kernel):
        pytest.skip(f"torch {torch.__version__} has no {kernel} of this kind")
    monkeypatch.setattr(flash_file, "available", lambda path: path == kernel)
    model = small("qwen3", head_dim=8, num_attention_heads=6, num_key_value_heads=2).to("meta")
    model.compute_dtype = torch.bfloat16
    flash_file.on_model(model)
    model(tokens(1, 18).to("meta"), Packed([5, 1, 12])).sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
    cache = model.cache_type(model, 5, 40)
    assert isinstance(cache, FlashCache) and model.read.__func__ is flash_file.read
    cache.longest = 7
    with torch.no_grad():       # as the sampler runs: the public function refuses lengths of keys beside a gradient
        assert model(tokens(3, 1).to("meta"), cache).shape == (3, 1, model.config.hidden_size)


@pytest.mark.parametrize("max_tokens", [1, 60, 200, 10 ** 6])
def test_packed_micro_batches_hold_every_row_once_and_no_padding(max_tokens):
    """fails if: padding is laid end to end too, a length is the padded one, or rows are renumbered."""
    model, rollout = writer(), write(writer())
    passes, tokens_N = [], rollout.rows(rollout.tokens_BT)
    model.response_hidden = lambda tokens_1n, mask_1n, keys: passes.append((tokens_1n, mask_1n, keys.lengths))
    rows = [row_n for _, row_n in flash_file.read(model, rollout, rollout.every_B, max_tokens)]
    seen, real = [], 0
    for (tokens_bt, mask_bt, lengths), row_n in zip(passes, rows, strict=True):
        assert torch.equal(tokens_bt[mask_bt], tokens_N[row_n])
        assert tokens_bt.shape == (1, sum(lengths)) and (sum(lengths) <= max_tokens or len(lengths) == 1)
        starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        assert not mask_bt[0, starts].any()
        seen += row_n.tolist()
        real += sum(lengths)
    assert sorted(seen) == list(range(len(tokens_N)))
    assert real == (rollout.prompt_len_B + rollout.length_B).sum()


@torch.no_grad()
@pytest.mark.parametrize("max_tokens", [1, 60, 10 ** 6])
@pytest.mark.parametrize("chosen", [range(21), [0, 5, 20], []], ids=len)
def test_a_packed_reading_is_the_plain_one(flash, max_tokens, chosen):
    """fails if: a state stands at another row, or a sequence that was not asked for is read"""
    model, rollout, sequence_b = writer(), write(writer()), torch.tensor(chosen, dtype=torch.int64)
    found = []
    for _ in range(2):
        hidden_ND = torch.full((len(rollout.sequence_N), model.config.hidden_size), torch.nan)
        for hidden_nD, row_n in model.read(rollout, sequence_b, max_tokens):
            hidden_ND[row_n] = hidden_nD
        found.append(hidden_ND)
        flash_file.on_model(model)
    torch.testing.assert_close(*found, equal_nan=True, atol=1e-5, rtol=1e-5)
    assert torch.equal(found[0].isnan().any(1), ~torch.isin(rollout.sequence_N, sequence_b))
