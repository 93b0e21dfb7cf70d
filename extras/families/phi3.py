"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another, and rope on a part of each head's channels. Long
contexts (rope type longrope) are refused: their angles depend on the length of the sequence.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.families.partial_rope import partial_frequencies, partial_rope, turned_in_part
from extras.families.sliding import KEYS, SlidingLayer, settings
from model import MODELS, Causal, Linear, Transformer
from support.model_config import FAMILIES, Family, Key, ModelConfig


class Phi3Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        self.heads = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
        self.qkv_proj = Linear(c.hidden_size, sum(self.heads) * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen) -> Tensor:
        q, k, v = self.qkv_proj(x_BTD).unflatten(2, (-1, self.head_dim)).split(self.heads, 2)
        q, k = (turned_in_part(x, *rope) for x in (q, k))
        return self.o_proj(keys.attend(self.layer, q, k, v, seen))


class Phi3MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_up_proj = Linear(c.hidden_size, 2 * c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(gate) * up)


class Phi3Layer(SlidingLayer):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__(c, layer)
        self.self_attn, self.mlp = Phi3Attention(c, layer), Phi3MLP(c)


class Phi3(Transformer):
    layer_type = Phi3Layer

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__(config, compute_dtype)
        self.rope_frequencies = partial_frequencies(config)


FAMILIES["phi3"], MODELS["phi3"] = Family(settings=lambda read: settings(read, lambda layer: True),
                                                  rope=partial_rope, keys={
    "layer_types": KEYS["layer_types"], "sliding_window": Key(int, None, 1, 2**30, null=True),
    "partial_rotary_factor": Key(float, 1.0, 1e-3, 1), "rms_norm_eps": Key(float, 1e-5, 0, 1),
    "max_position_embeddings": Key(int, 4096, 1, 2**30)}), Phi3
