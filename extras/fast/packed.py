"""A decode step of a small model on a CPU, where calls cost more than arithmetic: projections of the same input are one
product, queries and keys are normed and turned together, angles are looked up. The same numbers, bit for bit.

In place of model.Transformer.forward for one token per slot, and of cache_type, whose object keeps what lasts for one
generate() call. Axes as in model.py; n = Q + R heads that are turned, or Q + 2 R with the values.
"""
import functools
from types import MethodType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import model as model_file
from extras.fast.merged import norms_of_heads, one_below_the_other
from extras.fast.ways import put, way
from model import CAUSAL, MLP, Attention, Causal, KVCache, Layer, Linear, RMSNorm, Transformer

PLAIN = Layer, Attention, MLP, Linear, RMSNorm
# of a model: larger products outweigh the calls, and its projections are held twice while it writes (40 MB at most)
MOST_WEIGHTS = 10_000_000


def on_model(model: Transformer) -> None:
    small = sum(parameter.numel() for parameter in model.parameters()) <= MOST_WEIGHTS
    plain = type(model).forward is Transformer.forward and model.cache_type is KVCache
    if plain and small and model.device.type == "cpu" and model.compute_dtype == torch.float32:
        put("packed_step", model, "cache_type", packed_cache)
        model.forward = MethodType(forward, model)      # the plain one, without such a cache


class PackedLayer(NamedTuple):
    """The weights of one layer as a decode step reads them."""
    layer: Layer
    qkv: tuple[Tensor, Tensor | None]       # weight and bias of all three projections, one below the other
    norm_nH: Tensor | None      # of each query head and each key head; None where heads are not normed
    gate_up: tuple[Tensor, Tensor | None]


class PackedCache(KVCache):
    """A KVCache of a model whose weights stay as they are while it lives."""

    def __init__(self, model: Transformer, slots: int, capacity: int):
        super().__init__(model, slots, capacity)
        self.model = model

    @functools.cached_property
    def layers(self) -> list[PackedLayer] | None:
        """None where a part of a layer is not the plain one: another family, an adapter, a model cut over processes."""
        layers = self.model.model.layers
        plain = all(type(module) in PLAIN for layer in layers for module in layer.modules())
        return [packed(layer) for layer in layers] if plain else None

    @functools.cached_property
    def rope_table(self) -> list[Tensor]:
        """Transformer.rope() of every position, (capacity, 1, H) each."""
        return [table[0] for table in self.model.rope(torch.arange(self.keys[0].shape[2])[None])]


@way("packed_step", instead_of=KVCache)
def packed_cache(model: Transformer, slots: int, capacity: int) -> PackedCache:
    return PackedCache(model, slots, capacity)


def packed(layer: Layer) -> PackedLayer:
    heads, mlp = layer.self_attn, layer.mlp
    return PackedLayer(layer, one_below_the_other(heads.q_proj, heads.k_proj, heads.v_proj), norms_of_heads(heads),
                       one_below_the_other(mlp.gate_proj, mlp.up_proj))


def forward(model: Transformer, tokens_BT: Tensor, keys: Causal = CAUSAL) -> Tensor:
    """Transformer.forward."""
    decoding = isinstance(keys, PackedCache) and keys.longest and tokens_BT.shape[1] == 1
    if torch.is_grad_enabled() or not decoding or keys.layers is None:
        return Transformer.forward(model, tokens_BT, keys)
    at_B1, seen = keys.begin(tokens_BT)
    x_BD, rope = model.embed(tokens_BT)[:, 0], [table[at_B1] for table in keys.rope_table]
    for number, packed_layer in enumerate(keys.layers):
        x_BD = decode_layer(packed_layer, x_BD, rope, keys.keys[number], keys.values[number], seen)
    return model.model.norm(x_BD)[:, None]


def decode_layer(packed_layer: PackedLayer, x_BD: Tensor, rope: list[Tensor], keys_BRCH: Tensor, values_BRCH: Tensor,
                 seen) -> Tensor:
    """Layer.forward of one token per slot. seen: what KVCache.begin says of the mask, and of where the new keys go."""
    layer, qkv, norm_nH, gate_up = packed_layer
    (mask_B1TS, place), B, (_, R, _, H) = seen, len(x_BD), keys_BRCH.shape
    heads_BTnH = F.linear(layer.input_layernorm(x_BD), *qkv).view(B, 1, -1, H)
    turned_BTnH, value_BTRH = heads_BTnH[:, :, :-R], heads_BTnH[:, :, -R:]
    if norm_nH is not None:
        turned_BTnH = F.rms_norm(turned_BTnH, (H,), None, layer.self_attn.q_norm.eps) * norm_nH
    turned_BTnH = model_file.rotate(turned_BTnH, *rope)
    keys_BRCH[place], values_BRCH[place] = turned_BTnH[:, :, -R:], value_BTRH
    k_BRSH, v_BRSH = (cached[:B, :, :mask_B1TS.shape[-1]] for cached in (keys_BRCH, values_BRCH))
    out_BTD = model_file.masked_attention(turned_BTnH[:, :, :-R], k_BRSH, v_BRSH, mask_B1TS)
    x_BD = x_BD + layer.self_attn.o_proj(out_BTD[:, 0])
    gate_BI, up_BI = F.linear(layer.post_attention_layernorm(x_BD), *gate_up).chunk(2, -1)
    return x_BD + layer.mlp.down_proj(F.silu(gate_BI) * up_BI)
