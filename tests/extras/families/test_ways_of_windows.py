"""A window is the same window whichever way attention is computed: padded, packed end to end, over a cache, over a
cache that flash attention reads, in layers whose activations are recomputed."""
import pytest
import torch
from family_cases import CASES, write_peer
from test_bar import write

from extras.fast.flash import FlashCache, Packed
from extras.families.sliding import Windowed
from model import CAUSAL, KVCache
from support.weights import load_model

WINDOWED = [name for name, (_, changes) in CASES.items() if changes.get("sliding_window")]


@pytest.fixture(scope="module", params=WINDOWED)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    write_peer(request.param, folder)
    return folder


def hidden_of(model, rollout):
    """(N, D), in the order of the rows, by the model's own way of reading."""
    found = [(hidden_nD, row_n) for hidden_nD, row_n in model.read(rollout, rollout.every_B, 150)]
    out_ND = torch.empty(len(rollout.sequence_N), found[0][0].shape[1])
    for hidden_nD, row_n in found:
        out_ND[row_n] = hidden_nD.detach()
    return out_ND


def test_packed_rows_and_the_flash_cache_see_what_padded_ones_see(folder, flash):
    """fails if: the kernel is asked for one key more or less than the window, or for all."""
    fast = load_model(folder)
    seen, attend = set(), Windowed.attend
    Windowed.attend = lambda keys, *args: seen.add(type(keys.keys)) or attend(keys, *args)
    try:
        rollout = write(fast)
        states_ND = hidden_of(fast, rollout)
    finally:
        Windowed.attend = attend
    assert seen == {FlashCache, Packed}
    plain = load_model(folder)
    for name in ("read", "cache_type"):
        plain.__dict__.pop(name, None)
    with torch.no_grad():
        assert (states_ND - hidden_of(plain, rollout)).abs().max() <= 1e-4 * states_ND.abs().max()
        logp_NV = plain.logits(plain.response_hidden(rollout.tokens_BT, rollout.mask_BT)).log_softmax(-1)
    found_N = logp_NV.gather(1, rollout.rows(rollout.tokens_BT)[:, None])[:, 0]
    assert (found_N - rollout.rows(rollout.logp_BT)).abs().max() <= 2e-5


@pytest.mark.parametrize("window", [1, 2, 5, 30])
@pytest.mark.parametrize("length", [1, 5, 6, 30, 31, 47])
def test_a_window_is_a_band_by_definition(window, length):
    """Against scores and a mask written out, in float64: whole sequences, a cache that is filled and one that goes on.
    fails if: a token sees one key too many or too few, or itself not."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 6, dtype=torch.float64, generator=rng) for heads in (4, 2, 2))
    back = torch.arange(length)[:, None] - torch.arange(length)
    scores = torch.einsum("btqh,bsqh->bqts", q, k.repeat_interleave(2, 2)) / 6 ** 0.5
    weights = scores.masked_fill((back < 0) | (back >= window), -torch.inf).softmax(-1)
    wanted = torch.einsum("bqts,bsqh->btqh", weights, v.repeat_interleave(2, 2)).flatten(2)
    torch.testing.assert_close(Windowed(CAUSAL, window).attend(0, q, k, v, None), wanted)
    cache = KVCache.__new__(KVCache)
    cache.keys, cache.values = ([torch.zeros(2, 2, length, 6, dtype=torch.float64)] for _ in "kv")
    cache.length_B, cache.longest = torch.zeros(2, dtype=torch.int64), 0
    keys, first = Windowed(cache, window), max(1, length // 2)
    torch.testing.assert_close(keys.attend(0, q[:, :first], k[:, :first], v[:, :first], None), wanted[:, :first])
    for t in range(first, length):
        cache.length_B[:], cache.longest = t, t
        _, seen = cache.begin(torch.zeros(2, 1, dtype=torch.int64))
        found = keys.attend(0, q[:, t:t + 1], k[:, t:t + 1], v[:, t:t + 1], seen)
        torch.testing.assert_close(found, wanted[:, t:t + 1])
