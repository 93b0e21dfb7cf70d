"""Layers that look back no further than a window: mistral, qwen2 and qwen3 where config.json switches one on, and what
other families with such layers share.

A token sees itself and the window - 1 tokens before it. Without this file model.py ends a model's context at its window
instead. Axes as in model.py.
"""
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from extras.fast.flash import Packing
from model import MODELS, Causal, KVCache, Layer, Transformer, rope_frequencies
from support.errors import UserError, shown
from support.model_config import FAMILIES, TABLE, Key, ModelConfig, Reader, rope_settings

KINDS = FULL, SLIDING = "full_attention", "sliding_attention"       # as layer_types of config.json names them


# config.json

KEYS = {"layer_types": Key(list, None, null=True), "max_window_layers": Key(int, 28, 0, 512)}


def layer_kinds(read: Reader, slides) -> list[str]:
    """One of KINDS per layer; slides(layer) says which slide where layer_types is not given."""
    count = read("num_hidden_layers")
    kinds = read("layer_types") or [KINDS[bool(slides(layer))] for layer in range(count)]
    if len(kinds) != count or any(kind not in KINDS for kind in kinds):
        raise UserError(f"{read.where}: layer_types {shown(kinds, 90)} is not supported, only {FULL} or {SLIDING} for "
                        f"each of the {count} layers")
    return kinds


def settings(read: Reader, slides, **own) -> dict:
    """Fields of ModelConfig: the whole context, and own["kinds"] and own["windows"] (None: all the way) of each
    layer."""
    context = read("max_position_embeddings") or TABLE["max_position_embeddings"].default
    kinds, window = layer_kinds(read, slides), read("sliding_window")
    windows = [window if kind == SLIDING and window and window < context else None for kind in kinds]
    return {"context": context, "own": {"kinds": kinds, "windows": windows, **own}}


def switched(read: Reader) -> Reader:
    """The same file, without windows unless use_sliding_window says so."""
    if read("use_sliding_window"):
        return read
    return Reader({**read.raw, "layer_types": None, "sliding_window": None}, read.where, read.family)


def upper_layers(read: Reader) -> dict:
    """qwen2, qwen3: the layers from max_window_layers on."""
    read = switched(read)
    return settings(read, lambda layer: read("sliding_window") and layer >= read("max_window_layers"))


def ropes(read: Reader, sliding_theta: str) -> dict[str, dict]:
    """Rope of each kind of layer. In files from before transformers 5 the scaling is that of the full layers alone, and
    the base of the sliding ones is the key `sliding_theta`."""
    both = read("rope_parameters") or {}
    if not any(kind in both for kind in KINDS):
        plain = {"rope_type": "default", "rope_theta": read(sliding_theta)}
        return {FULL: rope_settings(read), SLIDING: plain}
    return {kind: rope_settings(Reader({**read.raw, "rope_parameters": both.get(kind), "rope_scaling": None},
                                       read.where, read.family)) for kind in KINDS}


# What the queries see

def within(keys: Causal, window: int | None) -> Causal:
    """What a layer with this window hands to its attention in place of `keys`."""
    return keys if window is None else Windowed(keys, window)


class Windowed(Causal):
    """The keys of a pass, whatever they are, padded, packed or a cache, as a layer with a window sees them."""

    def __init__(self, keys: Causal, window: int):
        self.keys, self.window = keys, window

    def attend(self, layer: int, q_BTQH: Tensor, k_BTRH: Tensor, v_BTRH: Tensor, seen) -> Tensor:
        if isinstance(seen, Packing):
            seen = replace(seen, window=self.window - 1)
        elif seen is not None:      # a cache that goes on: its mask, and where the new keys go
            mask_B1TS, place = seen
            place_S = torch.arange(mask_B1TS.shape[-1], device=mask_B1TS.device)
            too_old = place_S <= place[2][:, None, :, None] - self.window
            seen = mask_B1TS.masked_fill(too_old, -torch.inf), place
        elif k_BTRH.shape[1] > self.window:
            return self.attend_whole(layer, q_BTQH, k_BTRH, v_BTRH)
        return self.keys.attend(layer, q_BTQH, k_BTRH, v_BTRH, seen)

    def attend_whole(self, layer: int, q_BTQH: Tensor, k_BTRH: Tensor, v_BTRH: Tensor) -> Tensor:
        """Sequences from their first token on that are longer than the window; a cache takes their keys."""
        if isinstance(cache := self.keys, KVCache):
            B, T = k_BTRH.shape[:2]
            cache.keys[layer][:B, :, :T] = k_BTRH.transpose(1, 2)
            cache.values[layer][:B, :, :T] = v_BTRH.transpose(1, 2)
        place_T = torch.arange(k_BTRH.shape[1], device=k_BTRH.device)
        back_TT = place_T[:, None] - place_T
        return banded_attention(q_BTQH, k_BTRH, v_BTRH, (back_TT >= 0) & (back_TT < self.window))


def banded_attention(q_BTQH: Tensor, k_BTRH: Tensor, v_BTRH: Tensor, mask_TT: Tensor) -> Tensor:
    """(B, T, Q * H). Key heads are repeated: with a mask no fused CUDA kernel groups query heads by itself."""
    each = q_BTQH.shape[2] // k_BTRH.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTQH, *(kv.repeat_interleave(each, 2) for kv in (k_BTRH, v_BTRH))))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT).transpose(1, 2).flatten(2)


# Models

class SlidingLayer(Layer):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__(c, layer)
        self.window = c.own["windows"][layer]

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen) -> Tensor:
        return super().forward(x, rope, within(keys, self.window), seen)


class Sliding(Transformer):
    layer_type = SlidingLayer


class TwoRopes(Transformer):
    """Full and sliding layers turn by angles of their own (config.own["ropes"]); rope[kind] is what a layer gets."""

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__(config, compute_dtype)
        self.frequencies = {kind: self.frequencies_of(rope) for kind, rope in config.own["ropes"].items()}

    def frequencies_of(self, rope: dict) -> Tensor:
        return rope_frequencies(replace(self.config, rope=rope))

    def rope(self, at_BT: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        self.frequencies = {kind: frequencies.to(at_BT.device) for kind, frequencies in self.frequencies.items()}
        return {kind: Transformer.rope(SimpleNamespace(rope_frequencies=frequencies, compute_dtype=self.compute_dtype),
                                       at_BT) for kind, frequencies in self.frequencies.items()}


def sliding_or_plain(config: ModelConfig, compute_dtype: torch.dtype = torch.float32) -> Transformer:
    """A plain Transformer where no layer has a window: the fast ways know that one."""
    return (Sliding if any(config.own["windows"]) else Transformer)(config, compute_dtype)


def add(family: str, **row) -> None:
    FAMILIES[family], MODELS[family] = FAMILIES[family]._replace(**row), sliding_or_plain


add("mistral", settings=lambda read: settings(read, lambda layer: True), keys={"layer_types": KEYS["layer_types"]})
for name in ("qwen2", "qwen3"):
    add(name, settings=upper_layers, keys=KEYS)
