"""model.py: the same numbers as transformers, files that go there and back, a cache that changes nothing, and
one sentence for every broken checkpoint.

Weights are random everywhere, norms and biases included, so that a forgotten or swapped one is seen. Only the
parity tests need transformers; they are skipped without it. Text, sampling and losses are tested elsewhere.
"""
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from attention import KVCache, attend
from model import ModelConfig, Transformer
from weights import checkpoint_folder, load_model
from rollout import generate
from tokenizer import UserError

SHAPE = dict(vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=600)
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", rope_theta=5000.0, factor=4.0)
CASES = {       # name -> (family, what differs from SHAPE); the name is the pytest id
    "llama-llama3-rope": ("llama", dict(rope_parameters=LLAMA3)),
    "llama-linear-rope-tied": ("llama", dict(rope_parameters=LINEAR, tie_word_embeddings=True)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True, rms_norm_eps=0.1)),
    "mistral": ("mistral", dict(head_dim=12, sliding_window=None)),
    "qwen2": ("qwen2", dict(rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2-tied": ("qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("qwen3", dict(head_dim=12, num_key_value_heads=1)),
    "qwen3-tied-biases": ("qwen3", dict(head_dim=16, attention_bias=True, tie_word_embeddings=True)),
}
LENGTHS = (1, 2, 63, 512)


def scramble(module, seed=0):
    """Random norms (around 1), biases and weights, large enough that every part shows in the logits."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3 if p.dim() == 1 else 0.15, generator=rng)
    return module.eval()


def scramble_adapters(model):
    """A training step, in effect: the B matrices leave 0."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for linear in model.projections():
            linear.lora_B.normal_(0.0, 0.1, generator=rng)


def tokens(*shape, seed=0):
    return torch.randint(SHAPE["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


def small(family="llama", **changes):
    """A scrambled model that never was on disk."""
    return scramble(Transformer(ModelConfig.from_dict({"model_type": family, **SHAPE, **changes})))


def written(folder, family="llama", **changes):
    small(family, **changes).save(folder)
    return folder


def logits(model, tokens_BT):
    with torch.no_grad():
        return model.logits(model(tokens_BT))


def gap(got, wanted):
    """Largest difference, relative to the largest logit."""
    return ((got - wanted).abs().max() / wanted.abs().max()).item()


def config_json(folder):
    return json.loads((folder / "config.json").read_text())


def edit_json(file, edit):
    data = json.loads(file.read_text())
    edit(data)
    file.write_text(json.dumps(data))


def edit_tensors(file, edit):
    data = load_file(file)
    edit(data)
    save_file({name: tensor.contiguous() for name, tensor in data.items()}, file)


def old_spelling(config):
    """config.json as transformers 4 wrote it."""
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = rope if len(rope) > 1 else None
    config["torch_dtype"] = config.pop("dtype")


# parity with transformers

@pytest.fixture(scope="module", params=list(CASES))
def peer(request, tmp_path_factory):
    """(transformers' model, the folder it saved itself to): one file or, every other case, many shards."""
    transformers = pytest.importorskip("transformers")
    family, changes = CASES[request.param]
    config = transformers.AutoConfig.for_model(family, **{**SHAPE, "pad_token_id": None, **changes})
    config.bos_token_id = config.eos_token_id = None
    theirs = scramble(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    folder = tmp_path_factory.mktemp(request.param)
    sharded = list(CASES).index(request.param) % 2
    theirs.save_pretrained(folder, max_shard_size="4KB" if sharded else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == bool(sharded)
    return theirs, folder


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
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, *shape, generator=rng, dtype=torch.float64).to(dtype)
               for shape in ((1, 6, 8), (9, 2, 8), (9, 2, 8)))
    lengths = [9, 1, 4]
    mask = torch.zeros(3, 1, 1, 9, dtype=dtype)
    for slot, length in enumerate(lengths):
        mask[slot, :, :, length:] = -torch.inf
    found = attend(q, k, v, mask, None).view(3, 6, 8).double()
    for slot, length in enumerate(lengths):
        for head in range(6):
            keys, values = (x[slot, :length, head // 3].double() for x in (k, v))
            weights = (keys @ q[slot, 0, head].double() / 8 ** 0.5).softmax(0)
            torch.testing.assert_close(found[slot, head], weights @ values, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lora, spelling", [(False, "new"), (True, "old")])
def test_saved_checkpoint_loads_in_transformers(peer, lora, spelling, tmp_path):
    """fails if: save() forgets the merge (lora), or drops the embedding (no lora)."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(peer[1], tmp_path / "in")
    if spelling == "old":
        edit_json(tmp_path / "in" / "config.json", old_spelling)
    ours = load_model(tmp_path / "in")
    if lora:
        ours.add_lora(2, 4.0)
        scramble_adapters(ours)
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
def test_context_ends_at_a_sliding_window_that_is_in_use(family, changes, context):
    """fails if: from_dict takes max_position_embeddings alone, or a window that is switched off."""
    assert ModelConfig.from_dict({"model_type": family, **SHAPE, **changes}).context == context


# files

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_every_disk_dtype_goes_there_and_back(dtype, tied, tmp_path):
    """fails if: save() writes float32 whatever came in, or load_model forgets what came in."""
    original = small(tie_word_embeddings=tied)
    original.save(tmp_path / "a", dtype=dtype)
    loaded = load_model(tmp_path / "a", dtype=torch.float32)
    loaded.save(tmp_path / "b")
    for name, tensor in original.weights().items():
        assert torch.equal(loaded.weights()[name], tensor.to(dtype).float()), name
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert config_json(tmp_path / "b")["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_weights_are_stored_in_the_dtype_asked_for(tmp_path):
    """fails if: load_model builds the model in float32 whatever `dtype` says."""
    model = load_model(written(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.compute_dtype}
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_harmless_extras_in_old_files_are_accepted(tmp_path):
    """Old Llama files carry the rope table, some tied ones a copy of the embedding.
    fails if: load_model loses either exception."""
    written(tmp_path, tie_word_embeddings=True)
    before = logits(load_model(tmp_path), tokens(1, 9))

    def extras(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    edit_tensors(tmp_path / "model.safetensors", extras)
    assert torch.equal(logits(load_model(tmp_path), tokens(1, 9)), before)


def test_fresh_weights_follow_the_seed():
    """fails if: init_weights draws from the global stream, or fills norms with 0."""
    config = small("qwen2").config
    a, b, c = (Transformer(config).init_weights(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    assert (a["model.norm.weight"] == 1).all() and (a["model.layers.0.self_attn.q_proj.bias"] == 0).all()


# the cache, the shift, gradients

def run_cached(model, rows, lengths, steps, cache):
    """Prefill lengths[b] tokens of each row (right-padded), then feed steps[0] at once, then steps[1] ..."""
    B = len(lengths)
    heads = torch.stack([torch.where(torch.arange(max(lengths)) < n, row[:max(lengths)], 0)
                         for row, n in zip(rows, lengths)])
    model(heads, cache)
    cache.length_B[:B], cache.longest = torch.tensor(lengths), max(lengths)
    for T in steps:
        at_BT = cache.length_B[:B, None] + torch.arange(T)
        hidden_BTD = model(rows.gather(1, at_BT), cache)
        cache.length_B[:B] += T
        cache.longest += T
        yield at_BT, hidden_BTD


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_cached_forward_equals_full_forward(family):
    """Rows of different lengths in a cache with slots to spare; four tokens at once, then one by one.
    fails if: positions ignore length_B, the mask lets leftovers in, or append writes at 0."""
    model, rows = small(family, head_dim=12), tokens(3, 40)
    full_BTD = model(rows)
    cache = KVCache(model.config, 5, 40, torch.float32, "cpu")
    for at_BT, hidden_BTD in run_cached(model, rows, [5, 17, 2], [4, 1, 1, 3, 1], cache):
        wanted = full_BTD.gather(1, at_BT[..., None].expand_as(hidden_BTD))
        assert (hidden_BTD - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_copied_slots_continue_like_the_original():
    """fails if: copy_rows copies the keys and not the values, or leaves length_B behind."""
    model, rows = small(), tokens(2, 12)
    prefill, cache = (KVCache(model.config, n, 12, torch.float32, "cpu") for n in (2, 4))
    list(run_cached(model, rows, [6, 9], [], prefill))
    cache.copy_rows(torch.tensor([0, 1, 2]), prefill, torch.tensor([1, 0, 1]))
    cache.longest = 9
    hidden = model(rows[[1, 0, 1], [9, 6, 9]][:, None], cache)[:, 0]
    full = model(rows)
    assert (hidden - torch.stack([full[1, 9], full[0, 6], full[1, 9]])).abs().max() < 1e-5


def test_sequences_end_to_end_are_those_side_by_side():
    """Lengths 5, 1 and 12 in one row of 18 tokens: states and gradients as of each sequence alone.
    fails if: a sequence sees the one before it, or positions go on counting across a boundary."""
    model, lengths = small("qwen3", head_dim=8), [5, 1, 12]
    rows = tokens(1, sum(lengths))
    grads = []
    for end_to_end in (True, False):
        model.zero_grad()
        hidden = (model(rows, lengths=lengths) if end_to_end
                  else torch.cat([model(part) for part in rows.split(lengths, 1)], 1))
        (hidden * torch.arange(18.)[:, None].sin()).sum().backward()
        grads.append((hidden.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)))
    assert all((a - b).abs().max() < 1e-4 * b.abs().max() for a, b in zip(*grads))


@torch.no_grad()
def test_flash_attention_gets_what_makes_it_the_same(flash):
    """A row end to end, and slots of one cache at their own lengths, four steps each.
    fails if: a slot's keys begin elsewhere, the new key is not counted, or queries share the wrong keys."""
    model, rows = small("qwen3", head_dim=8, num_attention_heads=6, num_key_value_heads=2), tokens(3, 40)
    full_BTD = model(rows)
    end_to_end = model(torch.cat([rows[0, :7], rows[1, :30], rows[2, :2]])[None], lengths=[7, 30, 2])[0]
    assert (end_to_end - torch.cat([full_BTD[0, :7], full_BTD[1, :30], full_BTD[2, :2]])).abs().max() < 1e-5
    cache = KVCache(model.config, 5, 40, torch.float32, "cpu")
    assert cache.flash
    for at_BT, hidden_BTD in run_cached(model, rows, [5, 17, 2], [1, 1, 1, 1], cache):
        wanted = full_BTD.gather(1, at_BT[..., None].expand_as(hidden_BTD))
        assert (hidden_BTD - wanted).abs().max() < 1e-5


def test_flash_operator_accepts_what_it_is_given(monkeypatch):
    """On the meta device torch checks the operator's arguments without a GPU; nothing may ask for a value.
    fails if: an argument is unknown to the installed torch, a length goes to the host, or no gradient comes back."""
    for file in ("attention", "model"):
        monkeypatch.setattr(f"{file}.flash_ready", lambda device, dtype, head_dim: dtype == torch.bfloat16)
    model = small("qwen3", head_dim=8, num_attention_heads=6, num_key_value_heads=2).to("meta")
    model.compute_dtype = torch.bfloat16
    model(tokens(1, 18).to("meta"), lengths=[5, 1, 12]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())
    cache = KVCache(model.config, 5, 40, torch.bfloat16, torch.device("meta"))
    assert cache.flash and model.packs
    cache.longest = 7
    assert model(tokens(3, 1).to("meta"), cache).shape == (3, 1, model.config.hidden_size)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same_gradients(monkeypatch, checkpointing):
    """Traced as for a real backend, run as plain torch; two layers and three shapes are one or two traces, more rows
    and a pass with a cache none.
    fails if: compile_layers() compiles each layer, each length, anew from some number of rows on, or passes through
    the cache as well."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, rows = small("qwen3", head_dim=8), tokens(3, 20)
    wanted, _ = gradients(model, checkpointing)
    model.compile_layers()
    found, _ = gradients(model, checkpointing)
    assert found.keys() == wanted.keys() and all(gap(found[name], wanted[name]) < 1e-5 for name in wanted)
    model(rows), model(rows[:2, :7])
    traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model(tokens(9, 11)), model(tokens(40, 5)), model(rows, KVCache(model.config, 3, 20, torch.float32, "cpu"))
    assert 1 <= traced <= 3 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == traced


def test_state_that_predicts_a_token_is_the_one_before_it():
    """fails if: response_hidden returns the state at the token itself, or accepts a mask on position 0."""
    model, rows = small(), tokens(2, 6)
    mask = torch.tensor([[0, 0, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    full = model(rows)
    wanted = torch.stack([full[b, t - 1] for b, t in mask.nonzero().tolist()])
    assert torch.equal(model.response_hidden(rows, mask), wanted)
    with pytest.raises(AssertionError):
        model.response_hidden(rows, torch.ones_like(mask))


def gradients(model, checkpointing):
    """({name: gradient}, how often layer 0 ran)."""
    runs = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing = checkpointing
    model.zero_grad()
    model.logits(model(tokens(2, 9))).log_softmax(-1)[..., 0].sum().backward()
    hook.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(runs)


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_memory_and_no_gradient(lora):
    """fails if: forward ignores the flag, or use_reentrant=True (no gradients above a frozen embedding)."""
    model = small("qwen3", head_dim=8)
    if lora:
        model.add_lora(2, 4.0)
        scramble_adapters(model)
    (plain, once), (recomputed, twice) = gradients(model, False), gradients(model, True)
    assert (once, twice) == (1, 2) and plain.keys() == recomputed.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)


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


# LoRA

def test_untouched_adapter_changes_no_bit_and_covers_seven_projections_per_layer():
    """fails if: B starts above 0, or PROJECTIONS loses one."""
    model = small("qwen2")
    before = logits(model, tokens(2, 9))
    model.add_lora(3, 6.0)
    assert torch.equal(logits(model, tokens(2, 9)), before)
    assert len(model.projections()) == 7 * SHAPE["num_hidden_layers"]
    assert {tuple(linear.lora_A.shape)[0] for linear in model.projections()} == {3}


def test_lora_off_is_the_initial_model_bit_for_bit_after_training():
    """fails if: lora_off leaves a projection on, or does not restore the scale after an exception."""
    model = small()
    before = logits(model, tokens(2, 9))
    model.add_lora(3, 6.0)
    for _ in range(2):      # the first step moves B only: A's gradient is 0 while B is
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        gradients(model, False)
        optimizer.step()
    trained = logits(model, tokens(2, 9))
    assert gap(trained, before) > 1e-3
    with pytest.raises(KeyError), model.lora_off():
        assert torch.equal(logits(model, tokens(2, 9)), before)
        raise KeyError
    assert torch.equal(logits(model, tokens(2, 9)), trained)


def test_only_adapters_get_gradients():
    """fails if: add_lora does not freeze the checkpoint's own weights."""
    model = small("qwen2")
    model.add_lora(2, 4.0)
    scramble_adapters(model)
    names = set(gradients(model, False)[0])
    assert len(names) == 2 * 7 * SHAPE["num_hidden_layers"] and all("lora_" in name for name in names)


def test_adapter_is_scale_times_b_a_and_survives_the_merge(tmp_path):
    """fails if: lora_scale is alpha instead of alpha / rank, or merged_weight leaves it out."""
    model = small("qwen3", head_dim=12)
    model.add_lora(4, 2.0, seed=1)
    scramble_adapters(model)
    by_hand = small("qwen3", head_dim=12)
    with torch.no_grad():
        for plain, adapted in zip(by_hand.projections(), model.projections()):
            plain.weight += 2.0 / 4 * adapted.lora_B @ adapted.lora_A
    model.save(tmp_path)
    for same in (by_hand, load_model(tmp_path)):
        assert gap(logits(same, tokens(2, 9)), logits(model, tokens(2, 9))) < 1e-5


def test_adapters_of_a_bfloat16_model_stay_float32_and_merge_before_rounding(tmp_path):
    """fails if: add_lora takes the weights' dtype, or merged_weight adds in bfloat16."""
    model = load_model(written(tmp_path / "a"), dtype=torch.bfloat16)
    model.add_lora(2, 4.0)
    scramble_adapters(model)
    assert {gradient.dtype for gradient in gradients(model, False)[0].values()} == {torch.float32}
    model.save(tmp_path / "b", dtype=torch.float32)
    merged, linear = load_model(tmp_path / "b").projections()[0].weight, model.projections()[0]
    assert torch.allclose(merged, linear.weight.float() + 2.0 * linear.lora_B @ linear.lora_A, atol=1e-6)


def test_adapters_follow_their_seed_alone():
    """fails if: add_lora draws A from the global stream."""
    first, second, other = (small() for _ in range(3))
    for seed, model in ((1, first), (1, second), (2, other)):
        model.add_lora(2, 4.0, seed=seed)
    a, b, c = (model.projections()[0].lora_A for model in (first, second, other))
    assert torch.equal(a, b) and not torch.equal(a, c)


# one sentence for every broken checkpoint

def refused(culprit, call, *args):
    """The call ends in a UserError of one line that names the culprit."""
    with pytest.raises(UserError, match=re.escape(culprit)) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


UP = "model.layers.1.mlp.up_proj.weight"
BAD_TENSORS = {     # id -> (what happens to the file's tensors, what the message must name)
    "missing": (lambda t: t.pop(UP), UP),
    "two missing": (lambda t: (t.pop(UP), t.pop("lm_head.weight")), "lm_head.weight and 1 more"),
    "extra": (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "model.extra.weight"),
    "foreign bias": (lambda t: t.update({UP.replace("weight", "bias"): torch.ones(48)}), "up_proj.bias"),
    "shape": (lambda t: t.update({UP: t[UP].T}), f"{UP} has shape [32, 48], config.json asks for [48, 32]"),
    "int8": (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP} has dtype I8"),
    "float64": (lambda t: t.update({UP: t[UP].double()}), f"{UP} has dtype F64"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensor_that_does_not_fit_is_named(case, tmp_path):
    """fails if: fill or load_model drops the check of that name."""
    edit, culprit = BAD_TENSORS[case]
    edit_tensors(written(tmp_path) / "model.safetensors", edit)
    refused(culprit, load_model, tmp_path)


def test_tied_config_with_another_head_is_refused(tmp_path):
    """fails if: load_model skips lm_head.weight of a tied model unread."""
    written(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(97, 32)}))
    refused("lm_head.weight differs", load_model, tmp_path)


BAD_CONFIGS = {     # id -> (what happens to config.json, what the message must name)
    "family": (lambda c: c.update(model_type="gpt2"), "'gpt2'"),
    "no family": (lambda c: c.pop("model_type"), "config.json: model_type None"),
    "number missing": (lambda c: c.pop("hidden_size"), "hidden_size"),
    "activation": (lambda c: c.update(hidden_act="gelu"), "'gelu'"),
    "quantised": (lambda c: c.update(quantization_config={"quant_method": "gptq"}), "quantised"),
    "rope type": (lambda c: c.update(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "'yarn'"),
    "rope number missing": (lambda c: c.update(rope_scaling={"type": "linear"}), "needs factor"),
    "partial rope": (lambda c: c.update(rope_scaling={"partial_rotary_factor": 0.5}), "partial_rotary"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_outside_the_supported_set_is_named(case, tmp_path):
    """fails if: from_dict or rope_settings drops the check of that name."""
    edit, culprit = BAD_CONFIGS[case]
    edit_json(written(tmp_path) / "config.json", edit)
    refused(culprit, load_model, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_truncated_file_is_called_damaged(keep, tmp_path):
    """fails if: load_model lets SafetensorError through."""
    file = written(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused("model.safetensors is damaged", load_model, tmp_path)


def sharded(folder):
    """The weights of a small model in two shards with an index; returns the index file."""
    tensors = load_file(written(folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shard_of.values()):
        save_file({name: t for name, t in tensors.items() if shard_of[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["../a.safetensors", "/abs/a.safetensors", "b/a.safetensors", "..", "a.bin"])
def test_index_may_only_name_safetensors_inside_the_folder(name, tmp_path):
    """The file named exists, so only the name can be the reason.
    fails if: weight_files drops the check of the name."""
    folder = tmp_path / "model"
    index = sharded(folder)
    (folder / "b").mkdir()
    if name != "..":
        good = (folder / "model-00001-of-00002.safetensors").read_bytes()
        name = str(tmp_path / "a.safetensors") if name.startswith("/") else name
        (folder / name).write_bytes(good)
    edit_json(index, lambda data: data["weight_map"].update({UP: name}))
    refused(f"{name!r}, which is not a safetensors file inside the folder", load_model, folder)


def test_sharded_equals_single(tmp_path):
    """fails if: weight_files returns the first shard alone."""
    sharded(tmp_path / "two")
    one, two = load_model(written(tmp_path / "one")), load_model(tmp_path / "two")
    assert torch.equal(logits(one, tokens(1, 9)), logits(two, tokens(1, 9)))


def test_missing_shard_is_named(tmp_path):
    """fails if: weight_files does not look whether the shard exists."""
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused("model-00002-of-00002.safetensors is missing", load_model, tmp_path)


def test_tensor_in_two_shards_is_named(tmp_path):
    """fails if: fill overwrites what another shard filled."""
    sharded(tmp_path)
    tensors = load_file(tmp_path / "model-00001-of-00002.safetensors")
    edit_tensors(tmp_path / "model-00002-of-00002.safetensors", lambda t: t.update(tensors))
    refused("appears in more than one file", load_model, tmp_path)
    refused(sorted(tensors)[0], load_model, tmp_path)


def test_folder_without_weights_or_with_an_empty_index_is_named(tmp_path):
    """fails if: weight_files drops either check."""
    (written(tmp_path) / "model.safetensors").unlink()
    refused(f"{tmp_path} has neither model.safetensors nor", load_model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused("has no weight_map", load_model, tmp_path)


def test_folder_without_config_is_named(tmp_path):
    """fails if: load_config opens the file without read_json."""
    refused("config.json", load_model, tmp_path)


# names of folders and hub ids

@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "~/nowhere-at-all"])
def test_missing_folder_is_no_hub_id(name, monkeypatch):
    """fails if: checkpoint_folder asks the hub for anything that is no folder."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    refused(f"no such folder: {name}", checkpoint_folder, name)


def test_file_is_no_folder(tmp_path):
    """fails if: checkpoint_folder tests exists() alone."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused("is a file", checkpoint_folder, str(tmp_path / "model.safetensors"))
    assert checkpoint_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("error", [OSError("no network\nand a second line"), ValueError()])
def test_hub_id_without_network_is_one_sentence(error, monkeypatch):
    """fails if: checkpoint_folder lets the hub client's exception through, or prints all its lines."""
    def unreachable(*_, **__):
        raise error
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    refused("owner/name is no folder here and could not be downloaded", checkpoint_folder, "owner/name")
    refused("no network" if str(error) else "ValueError", checkpoint_folder, "owner/name")


def test_nothing_executable_is_downloaded(tmp_path, monkeypatch):
    """fails if: allow_patterns is dropped or grows by *.py, *.bin or *.pt."""
    asked = {}

    def download(name, allow_patterns=None, **_):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoint_folder("owner/name") == tmp_path
    assert asked["name"] == "owner/name"
    assert {Path(pattern).suffix for pattern in asked["patterns"]} == {".safetensors", ".json", ".jinja"}
