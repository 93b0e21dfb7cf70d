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
from model import CAUSAL, MODELS, Causal, KVCache, Transformer, rope_frequencies
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


def upper_layers(read: Reader) -> dict:
    """qwen2, qwen3: the layers from max_window_layers on, if use_sliding_window says so."""
    if not read("use_sliding_window"):
        read = Reader({**read.raw, "layer_types": None, "sliding_window": None}, read.where, read.family)
    return settings(read, lambda layer: read("sliding_window") and layer >= read("max_window_layers"))


def ropes(read: Reader, sliding_theta: str) -> dict[str, dict]:
    """Rope of each kind of layer. In files from before transformers 5 the scaling is that of the full layers alone, and
    the base of the sliding ones is the key `sliding_theta`."""
    both = read("rope_parameters") or {}
    if not any(kind in both for kind in KINDS):
        plain = {"rope_type": "default", "rope_theta": read(sliding_theta)}
        return {FULL: rope_settings(read), SLIDING: plain}
    return {kind: rope_settings(Reader({**read.raw, "rope_parameters": both.get(kind), "rope_scaling": None}, read.where,
                                       read.family)) for kind in KINDS}


# What the queries see

class Windowed(Causal):
    """The keys of a pass, cut to the window of each layer: whatever `keys` are, padded, packed, or a cache."""

    def __init__(self, keys: Causal, windows: list[int | None]):
        self.keys, self.windows = keys, windows

    def begin(self, tokens_BT: Tensor):
        """(positions; what `keys` says is seen, and for each window what takes its place)."""
        at_BT, seen = self.keys.begin(tokens_BT)
        wanted = {window for window in self.windows if window is not None}
        return at_BT, (seen, {window: narrowed(seen, at_BT, window) for window in wanted})

    def attend(self, layer: int, q_BTQH: Tensor, k_BTRH: Tensor, v_BTRH: Tensor, seen) -> Tensor:
        whole, narrow = seen
        seen = whole if self.windows[layer] is None else narrow[self.windows[layer]]
        if not isinstance(seen, Tensor):
            return self.keys.attend(layer, q_BTQH, k_BTRH, v_BTRH, seen)
        if isinstance(self.keys, KVCache):      # the prefill of empty slots
            (B, T), cache = k_BTRH.shape[:2], self.keys
            cache.keys[layer][:B, :, :T], cache.values[layer][:B, :, :T] = k_BTRH.transpose(1, 2), v_BTRH.transpose(1, 2)
        return banded_attention(q_BTQH, k_BTRH, v_BTRH, seen)


def narrowed(seen, at_BT: Tensor, window: int):
    """`seen` of a pass for a layer with this window: of the same type, or, for whole sequences that are longer, a bool
    mask (T, T)."""
    if seen is None:
        T = at_BT.shape[1]
        place_T = torch.arange(T, device=at_BT.device)
        back_TT = place_T[:, None] - place_T
        return (back_TT >= 0) & (back_TT < window) if T > window else None
    if isinstance(seen, Packing):
        return replace(seen, window=window - 1)
    mask_B1TS, place = seen
    too_old = torch.arange(mask_B1TS.shape[-1], device=at_BT.device) <= at_BT[:, None, :, None] - window
    return mask_B1TS.masked_fill(too_old, -torch.inf), place


def banded_attention(q_BTQH: Tensor, k_BTRH: Tensor, v_BTRH: Tensor, mask_TT: Tensor) -> Tensor:
    """(B, T, Q * H). Key heads are repeated: with a mask no fused CUDA kernel groups query heads by itself."""
    each = q_BTQH.shape[2] // k_BTRH.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q_BTQH, *(kv.repeat_interleave(each, 2) for kv in (k_BTRH, v_BTRH))))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask_TT).transpose(1, 2).flatten(2)


# Models

class Sliding(Transformer):
    """A Transformer some of whose layers have a window (config.own["windows"])."""

    def forward(self, tokens_BT: Tensor, keys: Causal = CAUSAL) -> Tensor:
        return super().forward(tokens_BT, Windowed(keys, self.config.own["windows"]))


class TwoRopes(Sliding):
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
