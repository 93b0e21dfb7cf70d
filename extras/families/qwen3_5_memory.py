"""What layers of Qwen3.5 take, for the memory plan. In place of support.memory's functions of the same names.

K, V, H: widths of a delta layer's keys and values, its value heads; C tokens of a chunk. Its rule works in float32
whatever the products are (bytes EXACT).
"""
from extras.families.qwen3_5 import CHUNK, KINDS
from support import memory
from support.memory import head_widths
from support.model_config import ModelConfig

EXACT = 4


def shape(c: ModelConfig) -> tuple[int, int, int, int]:
    """(K, V, H, channels of the convolution)."""
    K, V, keys, H = (c.own[f"linear_{name}"] for name in ("key_head_dim", "value_head_dim", "num_key_heads",
                                                         "num_value_heads"))
    return K, V, H, 2 * keys * K + H * V


def counts(c: ModelConfig) -> tuple[int, int]:
    """How many delta layers and attention layers."""
    return tuple(c.own["layer_types"].count(kind) for kind in KINDS)


def cache(c: ModelConfig, slots: int, length: int, item: int) -> int:
    (K, V, H, channels), (deltas, attentions) = shape(c), counts(c)
    state = EXACT * H * K * V + item * channels * (c.own["linear_conv_kernel_dim"] - 1)
    return slots * (deltas * state + attentions * length * 2 * head_widths(c)[1] * item)


def rule(c: ModelConfig, squares: int, keys: int, values: int) -> int:
    """Bytes per token of so many (C, C), (C, K) and (C, V) tensors of every head, and of a state per chunk."""
    K, V, H, _ = shape(c)
    return EXACT * H * (squares * CHUNK + keys * K + values * V + K * V // CHUNK)


def kept_activations(c: ModelConfig, tokens: int, item: int, checkpointing: bool, rank: int = 0) -> int:
    """A delta layer keeps five squares of each chunk (decays, products of keys, of queries and keys, and both with
    their decays), keys and queries as each product has them, both right sides solved, and what it gates; and the
    inputs, outputs and activations of the convolution."""
    (q, kv), (K, V, H, channels), (deltas, attentions) = head_widths(c), shape(c), counts(c)
    per_norm = 4 if rank else 8
    both = 2 * c.hidden_size * (per_norm + item) + item * (4 * c.intermediate_size + 3 * rank)
    delta = rule(c, 5, 9, 7) + channels * (2 * item + EXACT) + item * (2 * H * V + 5 * rank) + 10 * EXACT * H
    attention = per_norm * (q + kv) + item * (5 * q + 2 * kv + 4 * rank)
    kept, layer = deltas * (both + delta) + attentions * (both + attention), both + max(delta, attention)
    # of the layer at work: gradients of an MLP, or of a chunked rule
    gradients = max(item * ((4 if rank else 2) * c.intermediate_size + c.hidden_size), rule(c, 2, 4, 3))
    if checkpointing:
        kept = layer + c.hidden_size * item * c.num_hidden_layers
    return tokens * (kept + gradients)


def forward_pass(c: ModelConfig, tokens: int, item: int) -> int:
    (q, kv), (K, V, H, channels) = head_widths(c), shape(c)
    widest = max(item * 3 * c.intermediate_size, item * (4 * q + 2 * kv), rule(c, 4, 7, 5) + channels * (item + EXACT))
    return tokens * (widest + 2 * c.hidden_size * item + 8 * c.hidden_size)


def also(plain, own):
    """`plain`, which for this family is `own`."""
    return lambda c, *sizes: (own if c.model_type == "qwen3_5_text" else plain)(c, *sizes)


for own in (cache, kept_activations, forward_pass):
    setattr(memory, own.__name__, also(getattr(memory, own.__name__), own))
