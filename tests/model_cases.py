"""What the tests of models share: small models of every family with random weights, and how two of them are compared.

Weights are random everywhere, norms and biases included, so that a forgotten or swapped one is seen.
"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import Transformer
from support.model_config import ModelConfig


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


def scramble(module, seed=0):
    """Random norms (around 1), biases and weights, large enough that every part shows in the logits."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.3 if p.dim() == 1 else 0.15, generator=rng)
    return module.eval()


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


def run_cached(model, rows, lengths, steps, cache):
    """Prefill lengths[b] tokens of each row (right-padded), then feed steps[0] at once, then steps[1] ..."""
    B = len(lengths)
    heads = torch.stack([torch.where(torch.arange(max(lengths)) < n, row[:max(lengths)], 0)
                         for row, n in zip(rows, lengths)])
    cache.length_B[:B] = torch.tensor(lengths)
    model(heads, cache)
    cache.longest = max(lengths)
    for T in steps:
        at_BT = cache.length_B[:B, None] + torch.arange(T)
        hidden_BTD = model(rows.gather(1, at_BT), cache)
        cache.length_B[:B] += T
        cache.longest += T
        yield at_BT, hidden_BTD


def gradients(model):
    """({name: gradient}, how often the first layer ran)."""
    runs = []
    hook = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    model.zero_grad()
    model.logits(model(tokens(2, 9))).log_softmax(-1)[..., 0].sum().backward()
    hook.remove()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, len(runs)


def reads_the_keys_before_it(attention, dtype, tolerance):
    """Assert that `attention`, like model.masked_attention, is softmax attention written out head by head."""
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, *shape, generator=rng, dtype=torch.float64).to(dtype)
               for shape in ((1, 6, 8), (2, 9, 8), (2, 9, 8)))
    lengths = [9, 1, 4]
    mask = torch.zeros(3, 1, 1, 9, dtype=dtype)
    for slot, length in enumerate(lengths):
        mask[slot, :, :, length:] = -torch.inf
    found = attention(q, k, v, mask).view(3, 6, 8).double()
    for slot, length in enumerate(lengths):
        for head in range(6):
            keys, values = (x[slot, head // 3, :length].double() for x in (k, v))
            weights = (keys @ q[slot, 0, head].double() / 8 ** 0.5).softmax(0)
            torch.testing.assert_close(found[slot, head], weights @ values, atol=tolerance, rtol=tolerance)
