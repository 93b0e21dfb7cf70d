"""Small checkpoints of the families in extras/families/, written by transformers with random weights.

name -> (model_type, what differs from SHAPE). Odd shapes, tied and untied heads; windows and patterns so short that
sequences of the tests cross them.
"""
import pytest
import torch
from model_cases import scramble

SHAPE = dict(vocab_size=97, hidden_size=36, intermediate_size=44, num_hidden_layers=3, num_attention_heads=6,
             num_key_value_heads=2, head_dim=10, max_position_embeddings=600)
BOTH = ["sliding_attention", "full_attention", "sliding_attention"]
ROPES = dict(sliding_attention=dict(rope_type="default", rope_theta=1000.0),
             full_attention=dict(rope_type="linear", rope_theta=1e5, factor=4.0))
DELTA = dict(head_dim=24, linear_key_head_dim=24, linear_value_head_dim=20, linear_num_key_heads=2,
             linear_num_value_heads=6)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=150)

CASES = {
    "mistral-window": ("mistral", dict(sliding_window=17)),
    "qwen2-window": ("qwen2", dict(use_sliding_window=True, sliding_window=9, max_window_layers=1, head_dim=6)),
    "qwen3-window": ("qwen3", dict(use_sliding_window=True, sliding_window=33, layer_types=BOTH)),
    "gemma3": ("gemma3_text", dict(sliding_window=21, layer_types=BOTH, query_pre_attn_scalar=7,
                                   rope_parameters=ROPES)),
    "gemma3-untied": ("gemma3_text", dict(sliding_window=21, tie_word_embeddings=False)),
    "olmo2": ("olmo2", dict(head_dim=6)),
    "olmo3": ("olmo3", dict(sliding_window=19, head_dim=6)),
    "olmo3-yarn": ("olmo3", dict(sliding_window=19, head_dim=6, layer_types=BOTH, tie_word_embeddings=True,
                                 rope_parameters=dict(full_attention=YARN,
                                                      sliding_attention=ROPES["sliding_attention"]))),
    "phi3": ("phi3", dict(head_dim=6)),
    "phi3-partial-window": ("phi3", dict(head_dim=None, hidden_size=96, sliding_window=25, tie_word_embeddings=True,
                                         rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                                              partial_rotary_factor=0.75))),
    "smollm3": ("smollm3", dict(head_dim=6, no_rope_layer_interval=2)),
    "smollm3-window": ("smollm3", dict(head_dim=6, no_rope_layers=[1, 0, 1], use_sliding_window=True, sliding_window=13,
                                       tie_word_embeddings=False, attention_bias=True)),
    "qwen3-moe": ("qwen3_moe", dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=12,
                                    norm_topk_prob=True)),
    "qwen3-moe-mixed": ("qwen3_moe", dict(num_experts=4, num_experts_per_tok=3, moe_intermediate_size=16,
                                          mlp_only_layers=[1], tie_word_embeddings=True)),
    "qwen3_5": ("qwen3_5_text", dict(DELTA, layer_types=["linear_attention", "linear_attention", "full_attention"])),
    "qwen3_5-tied": ("qwen3_5_text", dict(DELTA, layer_types=["linear_attention", "full_attention", "linear_attention"],
                                          linear_num_key_heads=3, linear_num_value_heads=3, linear_conv_kernel_dim=3,
                                          attention_bias=True, tie_word_embeddings=True,
                                          rope_parameters=dict(rope_type="default", rope_theta=1e3,
                                                               partial_rotary_factor=0.5))),
}
SHARDED = ("qwen3_5", "mistral-window", "gemma3", "olmo3-yarn", "phi3", "smollm3-window", "qwen3-moe")


def write_peer(name: str, folder, dtype=torch.float32):
    """transformers' model of a case, and its checkpoint in `folder`: many files or one."""
    transformers = pytest.importorskip("transformers")
    family, changes = CASES[name]
    fields = {**SHAPE, "pad_token_id": None, **changes}
    config = transformers.AutoConfig.for_model(family, **{key: x for key, x in fields.items() if x is not None})
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    theirs = scramble(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32,
                                                                    attn_implementation="eager"))
    if family == "qwen3_5_text":
        remembering(theirs)
    theirs.to(dtype).save_pretrained(folder, max_shard_size="8KB" if name in SHARDED else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == (name in SHARDED)
    return theirs.float()


def remembering(model):
    """Decays as published ones lie, from none to two thirds a token: with those of scramble() no state would outlive a
    chunk. And norms about 1, as here their weights are what is added to it: with 2 a model is as ill-conditioned as
    its float32 log-probs then differ between any two orders of summation, 5e-5."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("A_log"):
                p.copy_(torch.linspace(-5, -1, len(p)))
            if "norm" in name and "linear_attn" not in name:
                p -= 1
