"""support/model_config.py: every key of config.json has a type and a range, what real checkpoints write is read, and
everything else is one sentence that names the key.
"""
import json
import random

import pytest
import torch

from model import Transformer
from support.model_config import ModelConfig
from support.errors import UserError
from support.model_config import FAMILIES, REQUIRED, ROPE_KEYS, TABLE, Family
from support.weights import load_model

SMALL = dict(model_type="qwen3", vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, head_dim=8, hidden_act="silu", rms_norm_eps=1e-6,
             rope_theta=10000.0, max_position_embeddings=64, tie_word_embeddings=True, attention_bias=False,
             torch_dtype="float32")
ROPE = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
            original_max_position_embeddings=32)
ODD = [None, True, False, 0, -1, 1, 2, 3, 7, 16, 65, 10**6, 10**9, 10**12, 2**63, 2**64, 10**300, -2**63, -0.0,
       0.5, 64.0, 1e-308, 1e308, -1e308, float("nan"), float("inf"), "", "x", "16", "\ud800", "x" * 5000, [], [16], {},
       {"a": 1}, {"factor": -1.0, "type": "linear"}, {"rope_type": ["a"]}, [None] * 1000]
CORE = "llama", "mistral", "qwen2", "qwen3"     # the families of model.py
INNER = ("rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
         "partial_rotary_factor")


def config(**changes):
    return ModelConfig.from_dict({**SMALL, **changes})


def sentence(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 400
    return text


# what real checkpoints write: the keys that matter here, with the family's own odd ones

LLAMA3 = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
          "rope_type": "llama3"}
REAL = {        # name -> (config.json, (head_dim, key/value heads, context, rope_theta, tied))
    "Llama 2": (dict(model_type="llama", vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                     num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32, hidden_act="silu",
                     max_position_embeddings=4096, pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None,
                     tie_word_embeddings=False, torch_dtype="float16", use_cache=True), (128, 32, 4096, 1e4, False)),
    "Llama 3.2 1B": (dict(model_type="llama", vocab_size=128256, hidden_size=2048, intermediate_size=8192, head_dim=64,
                          num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, hidden_act="silu",
                          attention_bias=False, mlp_bias=False, eos_token_id=[128001, 128008, 128009],
                          max_position_embeddings=131072, rms_norm_eps=1e-05, rope_scaling=LLAMA3,
                          rope_theta=500000.0, tie_word_embeddings=True), (64, 8, 131072, 5e5, True)),
    "SmolLM2": (dict(model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
                     num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, is_llama_config=True,
                     max_position_embeddings=8192, rope_interleaved=False, rope_scaling=None, rope_theta=100000,
                     tie_word_embeddings=True), (64, 3, 8192, 1e5, True)),
    "DeepSeek Coder": (dict(model_type="llama", vocab_size=32256, hidden_size=2048, intermediate_size=5504,
                            num_hidden_layers=24, num_attention_heads=16, num_key_value_heads=16,
                            max_position_embeddings=16384, rope_scaling={"factor": 4.0, "type": "linear"},
                            rope_theta=100000), (128, 16, 16384, 1e5, False)),
    "Mistral 0.1": (dict(model_type="mistral", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
                         num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, rope_theta=10000.0,
                         max_position_embeddings=32768, sliding_window=4096), (128, 8, 32768, 1e4, False)),
    "Mistral Nemo": (dict(model_type="mistral", vocab_size=131072, hidden_size=5120, intermediate_size=14336,
                          num_hidden_layers=40, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
                          max_position_embeddings=1024000, rope_theta=1000000.0, sliding_window=None),
                     (128, 8, 1024000, 1e6, False)),
    "Qwen2.5": (dict(model_type="qwen2", vocab_size=151936, hidden_size=896, intermediate_size=4864,
                     num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, max_window_layers=21,
                     max_position_embeddings=32768, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32768,
                     tie_word_embeddings=True, use_sliding_window=False, use_mrope=False), (64, 2, 32768, 1e6, True)),
    "Qwen3": (dict(model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, head_dim=128,
                   num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, attention_bias=False,
                   max_position_embeddings=40960, max_window_layers=28, rope_scaling=None, rope_theta=1000000,
                   sliding_window=None, tie_word_embeddings=True, use_sliding_window=False),
              (128, 8, 40960, 1e6, True)),
    "Qwen3, as transformers 5 writes it": (
        dict(model_type="qwen3", vocab_size=151936, hidden_size=1024, intermediate_size=3072, head_dim=128,
             num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=8, dtype="bfloat16", pad_token_id=None,
             layer_types=["full_attention"] * 2, max_position_embeddings=40960, sliding_window=None,
             rope_parameters={"rope_theta": 1000000, "rope_type": "default"}, tie_word_embeddings=True),
        (128, 8, 40960, 1e6, True)),
    "Llama, nulls": (dict(model_type="llama", vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                          num_attention_heads=4, num_key_value_heads=None, head_dim=None, attention_bias=None,
                          mlp_bias=None, tie_word_embeddings=None, rope_parameters=None, quantization_config=None,
                          max_position_embeddings=None), (16, 4, 2048, 1e4, False)),
}


@pytest.mark.parametrize("name", REAL)
def test_real_configs_are_read(name):
    """fails if: a range or a type refuses what published checkpoints say, or a default is another."""
    raw, wanted = REAL[name]
    c = ModelConfig.from_dict(json.loads(json.dumps(raw)))
    assert (c.head_dim, c.num_key_value_heads, c.context, c.rope["rope_theta"], c.tie_word_embeddings) == wanted
    assert c.rope["rope_type"] == {"Llama 3.2 1B": "llama3", "DeepSeek Coder": "linear"}.get(name, "default")
    assert c.raw == raw and c.qkv_bias == (raw["model_type"] == "qwen2") and hash(c) == hash(c)


# types and ranges

def placed(key, value, **others):
    """config() with the key where it belongs: rope's numbers inside rope_scaling."""
    return config(rope_scaling={**ROPE, **others, key: value}) if key in INNER else config(**{key: value, **others})


@pytest.mark.parametrize("key", TABLE)
def test_every_key_refuses_what_is_not_its_type(key):
    """fails if: a key is read past the table, or bool counts as a number, text as its number, NaN as a float."""
    rule = TABLE[key]
    family = {"sliding_window": dict(model_type="mistral"), "mlp_bias": dict(model_type="llama")}.get(key, {})
    wrong = [[1], [], float("nan"), float("inf"), "\ud800", {"a": {"b": 1}}, -1, 1e-400, 10**30]
    wrong += {int: [16.0, "16", True, False, 0], float: ["1e4", True], bool: [0, 1, "false", "true"],
              dict: [True, "linear", 3], str: [True, "", "x" * 5000]}[rule.kind]
    for value in wrong + [None] * (not rule.null and key != "rope_type"):
        if key == "rms_norm_eps" and value == 0:
            continue
        text = sentence(placed, key, value, **(family if key not in INNER else {}))
        assert key in text and text.startswith("config.json"), (value, text)


@pytest.mark.parametrize("key", [key for key, rule in TABLE.items() if rule.kind in (int, float)])
def test_the_limits_of_a_number_are_the_tables(key):
    """fails if: a bound is off by one, or another number is checked than the one that is used."""
    rule = TABLE[key]
    others = {"sliding_window": dict(model_type="mistral"), "low_freq_factor": dict(high_freq_factor=10**6),
              "high_freq_factor": dict(low_freq_factor=1e-3), "num_key_value_heads": dict(num_attention_heads=2**10),
              "num_attention_heads": dict(num_key_value_heads=1)}.get(key, {})
    step = 1 if rule.kind is int else 1e-3
    for value in {rule.lowest, rule.highest}:
        if (key, value) not in [("low_freq_factor", rule.highest), ("high_freq_factor", rule.lowest)]:
            placed(key, value, **others)
    for value in (rule.lowest - step, rule.highest + max(step, rule.highest * 1e-9)):
        assert f"{key} " in sentence(placed, key, int(value) if rule.kind is int else value, **others)


def test_missing_keys_have_a_default_or_are_named():
    """fails if: a required key gets a default, or an optional one none."""
    for key, rule in TABLE.items():
        raw = {name: value for name, value in SMALL.items() if name != key}
        if rule.default is REQUIRED and key in SMALL:
            assert key in sentence(ModelConfig.from_dict, raw)
        else:
            ModelConfig.from_dict(raw)
    for kind in TABLE["rope_type"].choices:
        for key in ROPE_KEYS[kind]:
            rope = {name: value for name, value in {**ROPE, "rope_type": kind}.items() if name != key}
            assert f"{kind!r} needs {key}" in sentence(config, rope_parameters=rope)


@pytest.mark.parametrize("changes, words", [
    (dict(num_key_value_heads=3), "no multiple of num_key_value_heads 3"), (dict(head_dim=7), "head_dim 7"),
    (dict(model_type="llama", head_dim=None, hidden_size=18), "hidden_size 18 is no multiple"),
    (dict(model_type="llama", head_dim=None, hidden_size=12), "head_dim 3"),
    (dict(model_type="llama", head_dim=None, hidden_size=2**17), "head_dim 32768"),
    (dict(rope_scaling={**ROPE, "low_freq_factor": 4.0}), "low_freq_factor 4.0 is not below"),
    (dict(rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}), "full_attention has settings"),
    (dict(rope_scaling={"type": "yarn", "factor": 4.0}), "rope_type 'yarn'"),
    (dict(quantization_config={"bits": 4}), "quantised"), (dict(model_type=["llama"]), "model_type ['llama']")])
def test_numbers_that_do_not_fit_together_are_named(changes, words):
    """fails if: the check of that name is dropped."""
    assert words in sentence(config, **changes)


def test_keys_that_mean_nothing_to_a_family_are_not_judged():
    """As in transformers: a Llama has no window, a Qwen without use_sliding_window none in use.
    fails if: `families` is ignored, or a window is read before it is known to be in use."""
    for changes in (dict(model_type="llama", use_sliding_window=True, sliding_window=8), dict(sliding_window="none"),
                    dict(model_type="mistral", sliding_window=None, use_sliding_window=3, attention_bias=5)):
        c = config(**changes)
        assert c.context == 64 and not c.o_bias


def test_without_the_extra_a_context_ends_at_its_window(monkeypatch):
    """With it (extras/families/sliding.py) the layers look back as far as their window.
    fails if: the plain decoder reads sequences whose first tokens it should no longer see."""
    long = dict(use_sliding_window=True, sliding_window=8, max_window_layers=0)
    assert config(**long).context == 64 and config(**long).own["windows"] == [8, 8]
    for family in CORE:
        monkeypatch.setitem(FAMILIES, family, Family())
    assert config(**long).context == 8 and config(model_type="mistral", sliding_window=16).context == 16


# the whole way, with weights

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One checkpoint per family."""
    made = {}
    for family in CORE:
        made[family] = tmp_path_factory.mktemp(family)
        Transformer(config(model_type=family)).init_weights(0).save(made[family])
    return made


def mutated(rng: random.Random, count: int):
    """config.json with one to three values replaced by odd ones, at the top or inside rope."""
    keys = [*SMALL, "sliding_window", "use_sliding_window", "mlp_bias", "rope_scaling", "rope_parameters"]
    for _ in range(count):
        raw = {**SMALL, "model_type": rng.choice(CORE)}
        if rng.random() < 0.3:
            rope = {**ROPE, "rope_type": rng.choice([*ROPE_KEYS]), rng.choice([*ROPE]): rng.choice(ODD)}
            raw[rng.choice(("rope_scaling", "rope_parameters"))] = rope
        raw |= {rng.choice(keys): rng.choice(ODD) for _ in range(rng.choice((0, 1, 1, 1, 2, 3)))}
        yield raw


def test_a_mutated_config_loads_and_computes_or_is_one_sentence(folders, tmp_path):
    """fails if: any value of any key ends in another exception, or in logits that are not finite."""
    loaded = 0
    for raw in mutated(random.Random(0), 500):
        family = raw["model_type"] if raw["model_type"] in CORE else "qwen3"
        (folders[family] / "config.json").write_text(json.dumps(raw))
        try:
            model = load_model(folders[family])
        except UserError as error:
            assert str(error).isprintable() and len(str(error)) < 700
            continue
        with torch.no_grad():
            assert model.logits(model(torch.tensor([[1, 2, 3]]))).isfinite().all(), raw
        loaded += 1
    assert 50 < loaded < 350


@pytest.mark.parametrize("changes", [dict(num_hidden_layers=10**6), dict(head_dim=10**9), dict(vocab_size=10**12),
                                     dict(num_hidden_layers=512), dict(hidden_size=2**17), dict(vocab_size=2**22),
                                     dict(num_attention_heads=1024, head_dim=1024, intermediate_size=2**19)], ids=str)
def test_sizes_are_compared_before_memory_is_taken(folders, monkeypatch, changes):
    """fails if: the model is built on the device before the headers of the files are read."""
    monkeypatch.setattr(Transformer, "to_empty", lambda *_, **__: pytest.fail("took memory"))
    (folders["qwen3"] / "config.json").write_text(json.dumps({**SMALL, **changes}))
    assert "config.json" in (text := sentence(load_model, folders["qwen3"])) or "is missing" in text
