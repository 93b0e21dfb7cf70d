"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another, and rope on a part of each head's channels. Long
contexts (rope type longrope) are refused: their angles depend on the length of the sequence.
"""
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.families.sliding import SlidingLayer, settings
from model import MODELS, Causal, Linear, Transformer, rope_frequencies, rotate
from support.errors import UserError
from support.model_config import FAMILIES, Family, Key, ModelConfig, Reader


class Phi3Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.turned = layer, c.head_dim, c.own["turned"]
        self.heads = c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads
        self.qkv_proj = Linear(c.hidden_size, sum(self.heads) * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen) -> Tensor:
        q, k, v = self.qkv_proj(x_BTD).unflatten(2, (-1, self.head_dim)).split(self.heads, 2)
        q, k = (torch.cat([rotate(x[..., :self.turned], *rope), x[..., self.turned:]], -1) for x in (q, k))
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
        self.rope_frequencies = rope_frequencies(replace(config, head_dim=config.own["turned"]))


def phi3(read: Reader) -> dict:
    """Phi-4-mini writes partial_rotary_factor beside rope, transformers 5 into it."""
    share = (read("rope_parameters") or {}).get("partial_rotary_factor", read("partial_rotary_factor"))
    width = read("head_dim") or read("hidden_size") // read("num_attention_heads")
    if not 0 < (turned := int(width * share)) <= width or turned % 2:
        raise UserError(f"{read.where}: partial_rotary_factor {share} turns {turned} of {width} channels, which is not "
                        f"supported, only an even number of them")
    return settings(read, lambda layer: True, turned=turned)


FAMILIES["phi3"], MODELS["phi3"] = Family(settings=phi3, keys={
    "layer_types": Key(list, None, null=True), "sliding_window": Key(int, None, 1, 2**30, null=True),
    "partial_rotary_factor": Key(float, 1.0, 1e-3, 1), "rms_norm_eps": Key(float, 1e-5, 0, 1),
    "max_position_embeddings": Key(int, 4096, 1, 2**30)}), Phi3
