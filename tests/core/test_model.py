"""model.py: the same numbers as transformers, a cache that changes nothing, and gradients in the dtype of the weights.

Only the parity tests need transformers; they are skipped without it. Files and broken checkpoints: test_model_files.py;
text, sampling and losses are tested elsewhere.
"""
import shutil

import pytest
import torch
from model_cases import (LINEAR, LLAMA3, SHAPE, config_json, edit_json, gap, logits, old_spelling,
                         reads_the_keys_before_it, run_cached, small, tokens, written)

from model import masked_attention
from rollout import generate
from support.model_config import FAMILIES, Family, ModelConfig
from support.weights import load_model

LENGTHS = (1, 2, 63, 512)


# parity with transformers


def test_logits_equal_transformers(peer, record_property):
    """Measured with torch 2.13 and transformers 5.23: no difference at all; 1e-5 is room for other kernels.
    fails if: rotate turns neighbouring channels, or any norm, bias or rope type is left out."""
    theirs, folder = peer
    ours, gaps = load_model(folder), []
    for T in LENGTHS:
        with torch.no_grad():
            wanted = theirs(tokens(2, T, seed=T)).logits
        gaps.append(gap(logits(ours, tokens(2, T, seed=T)), wanted))
    record_property("largest_relative_difference", max(gaps))
    print(f"largest relative difference {max(gaps):.1e}")
    assert max(gaps) < 1e-5


def test_greedy_text_equals_transformers(peer):
    """fails if: KVCache.append writes one position too far."""
    theirs, folder = peer
    prompt = tokens(1, 9, seed=1)
    wanted = theirs.generate(prompt, max_new_tokens=64, do_sample=False, pad_token_id=0)[0, 9:].tolist()
    rollout = generate(load_model(folder), prompt.tolist(), max_new_tokens=64, stop_ids=(), temperature=0.0)
    assert rollout.response(0) == wanted


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)],
                         ids=str)
def test_one_query_per_slot_reads_the_keys_before_it(dtype, tolerance):
    """Grouped heads, three slots of other lengths, leftovers behind them.
    fails if: a query reads another head's keys or a leftover, or the way of one dtype forgets the mask."""
    reads_the_keys_before_it(masked_attention, dtype, tolerance)


@pytest.mark.parametrize("spelling", ["new", "old"])
def test_saved_checkpoint_loads_in_transformers(peer, spelling, tmp_path):
    """fails if: save() drops the embedding, or a name that an old config.json has."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(peer[1], tmp_path / "in")
    if spelling == "old":
        edit_json(tmp_path / "in" / "config.json", old_spelling)
    ours = load_model(tmp_path / "in")
    ours.save(tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, report = load(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert gap(theirs(tokens(2, 40)).logits, logits(ours, tokens(2, 40))) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_bfloat16_products_on_float32_weights_are_as_exact_as_a_bfloat16_model(family, tmp_path):
    """Root of the mean squared distance from the float32 logits, against that of transformers' bfloat16 model: measured
    0.93 (llama) and 0.88 (qwen3), as a norm here rounds once where transformers rounds twice.
    fails if: load_model drops compute_dtype, stores the weights in it, or a norm is taken in bfloat16."""
    transformers = pytest.importorskip("transformers")
    small(family, head_dim=8).save(tmp_path, dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ours = load_model(tmp_path, dtype=torch.float32, compute_dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    assert ours(tokens(1, 3)).dtype == torch.bfloat16 and logits(ours, tokens(1, 3)).dtype == torch.float32
    asked = tokens(8, 100)
    exact = logits(load_model(tmp_path), asked)
    mine, peer = (((x - exact) ** 2).mean().sqrt().item()
                  for x in (logits(ours, asked), theirs(asked).logits.float()))
    print(f"{mine / peer:.3f}")
    assert 0 < mine < 1.05 * peer


# config.json


@pytest.mark.parametrize("rope", [LLAMA3, LINEAR, dict(rope_type="default", rope_theta=5e5)])
def test_both_spellings_of_the_config_are_one_model(rope, tmp_path):
    """fails if: rope_settings ignores `type`, rope_scaling or the outer rope_theta."""
    written(tmp_path / "new", rope_parameters=rope)
    written(tmp_path / "old", rope_parameters=rope)
    edit_json(tmp_path / "old" / "config.json", old_spelling)
    new, old = load_model(tmp_path / "new"), load_model(tmp_path / "old")
    assert torch.equal(logits(new, tokens(1, 200)), logits(old, tokens(1, 200)))
    assert not torch.equal(new.rope_frequencies, small().rope_frequencies)
    old.save(tmp_path / "again")
    assert "torch_dtype" in config_json(tmp_path / "again") and "dtype" in config_json(tmp_path / "new")


@pytest.mark.parametrize("family, changes, context", [
    ("llama", dict(), 600), ("llama", dict(sliding_window=32), 600), ("mistral", dict(sliding_window=32), 32),
    ("mistral", dict(sliding_window=None), 600), ("mistral", dict(max_position_embeddings=9000), 4096),
    ("mistral", dict(sliding_window=601), 600), ("qwen2", dict(sliding_window=32), 600),
    ("qwen2", dict(sliding_window=32, use_sliding_window=True), 32),
    ("qwen3", dict(sliding_window=32, use_sliding_window=False), 600)])
def test_context_ends_at_a_sliding_window_that_is_in_use(family, changes, context, monkeypatch):
    """Without extras/families/sliding.py. fails if: from_dict takes max_position_embeddings alone, or a window that is
    switched off."""
    monkeypatch.setitem(FAMILIES, family, Family())
    assert ModelConfig.from_dict({"model_type": family, **SHAPE, **changes}).context == context


# the cache, the shift, gradients


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_cached_forward_equals_full_forward(family):
    """Rows of different lengths in a cache with slots to spare; four tokens at once, then one by one.
    fails if: positions ignore length_B, the mask lets leftovers in, or append writes at 0."""
    model, rows = small(family, head_dim=12), tokens(3, 40)
    full_BTD = model(rows)
    cache = model.cache_type(model, 5, 40)
    for at_BT, hidden_BTD in run_cached(model, rows, [5, 17, 2], [4, 1, 1, 3, 1], cache):
        wanted = full_BTD.gather(1, at_BT[..., None].expand_as(hidden_BTD))
        assert (hidden_BTD - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_copied_slots_continue_like_the_original():
    """fails if: copy_rows copies the keys and not the values, or leaves length_B behind."""
    model, rows = small(), tokens(2, 12)
    prefill, cache = (model.cache_type(model, n, 12) for n in (2, 4))
    list(run_cached(model, rows, [6, 9], [], prefill))
    cache.copy_rows(torch.tensor([0, 1, 2]), prefill, torch.tensor([1, 0, 1]))
    cache.longest = 9
    hidden = model(rows[[1, 0, 1], [9, 6, 9]][:, None], cache)[:, 0]
    full = model(rows)
    assert (hidden - torch.stack([full[1, 9], full[0, 6], full[1, 9]])).abs().max() < 1e-5


def test_state_that_predicts_a_token_is_the_one_before_it():
    """fails if: response_hidden returns the state at the token itself, or accepts a mask on position 0."""
    model, rows = small(), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    full = model(rows)
    wanted = torch.stack([full[b, t - 1] for b, t in mask.nonzero().tolist()])
    assert torch.equal(model.response_hidden(rows, mask), wanted)
    with pytest.raises(AssertionError):
        model.response_hidden(rows, torch.ones_like(mask))


def test_gradients_of_bfloat16_products_arrive_in_float32(tmp_path):
    """fails if: Linear.forward multiplies in the weight's dtype instead of its input's."""
    model = load_model(written(tmp_path, "qwen2"), compute_dtype=torch.bfloat16)
    hidden = model(tokens(1, 5))
    model.logits(hidden).sum().backward()
    assert hidden.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in model.parameters() if p.dim() > 1)


def snapshot(model):
    return [(name, key, id(value), getattr(value, "_version", 0))
            for name, module in model.named_modules() for key, value in sorted(vars(module).items())]


def test_generating_leaves_nothing_on_the_modules():
    """fails if: forward keeps the cache, or anything else, as an attribute."""
    model = small()
    weights, attributes = {k: v.clone() for k, v in model.state_dict().items()}, snapshot(model)
    generate(model, tokens(3, 7).tolist(), max_new_tokens=6, stop_ids=())
    assert snapshot(model) == attributes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
