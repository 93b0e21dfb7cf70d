"""Attention: softmax(q . k / sqrt(H)) v with grouped keys, over sequences side by side, sequences end to end,
and sequences that go on in a cache.

Place in the loop: model.py's layers call attend(); rollout.py owns the cache. Axes as there: B sequences,
T positions, Q query heads, R key/value heads, H head width.

    side by side    (B, T) rows, causal, padding on the right           torch's fused attention, any device
    end to end      (1, N) rows holding sequences of given lengths      flash attention: no padding anywhere
    in a cache      (B, 1) rows, each after its own sequence            flash attention reads each slot's own length;
                                                                        elsewhere up to the longest, under a mask

Flash attention is there on a GPU in half precision; `end to end` elsewhere takes one sequence after the other.
"""
import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


FLASH = True        # False: torch's fused attention everywhere


@functools.cache
def flash_ready(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Can torch's flash attention take these? Half precision on a GPU from Ampere on."""
    return (FLASH and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
            and head_dim <= 256 and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0))


@dataclass(frozen=True)
class Packing:
    """Where sequences begin in a row of tokens laid end to end; one end each for queries and for keys."""
    first_q: Tensor             # int32 (S + 1,): 0, then where each sequence ends
    first_k: Tensor
    longest_q: int
    longest_k: int
    flash: bool
    used_k: Tensor | None = None    # int32 (S,): how many keys of each sequence are real; None = all

    @staticmethod
    def of(lengths: list[int], device, flash: bool) -> "Packing":
        first = F.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device)
        return Packing(first, first, max(lengths), max(lengths), flash)


class KVCache:
    """Keys and values of `slots` sequences, each at its own length. The caller owns it and sets `length_B`.

    keys, values: per layer (slots, capacity, R, H). A forward pass with T tokens writes them at positions
    length_B ... length_B + T - 1 of the first B slots; the caller then advances length_B. Positions past a
    sequence's length hold leftovers: they are masked while decoding and overwritten before they are reached.
    """

    def __init__(self, config, slots: int, capacity: int, dtype: torch.dtype, device):
        shape = (slots, capacity, config.num_key_value_heads, config.head_dim)
        layers = range(config.num_hidden_layers)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in layers]
        self.length_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.longest = 0                # host copy of length_B.max(), or more: what a masked pass has to read
        self.flash = flash_ready(self.length_B.device, dtype, config.head_dim)

    def packing(self, B: int) -> Packing:
        """Of one query in each of the first B slots, and of the slots themselves."""
        first = torch.arange(B + 1, dtype=torch.int32, device=self.length_B.device)
        capacity = self.keys[0].shape[1]
        return Packing(first, first * capacity, 1, capacity, True, (self.length_B[:B] + 1).int())

    def append(self, layer: int, key_BTRH: Tensor, value_BTRH: Tensor, whole: bool) -> tuple[Tensor, Tensor]:
        """Write in place; return the first B slots, up to the longest live position or the whole of them."""
        B, T, _, _ = key_BTRH.shape
        keys, values = self.keys[layer][:B], self.values[layer][:B]
        if self.longest == 0:           # prefill of empty slots: nothing older to read
            keys[:, :T], values[:, :T] = key_BTRH, value_BTRH
            return key_BTRH, value_BTRH
        rows_B1 = torch.arange(B, device=key_BTRH.device)[:, None]
        at_BT = self.length_B[:B, None] + torch.arange(T, device=key_BTRH.device)
        # through the whole tensors: compiled, a write through a view of them would copy the cache
        self.keys[layer][rows_B1, at_BT], self.values[layer][rows_B1, at_BT] = key_BTRH, value_BTRH
        return (keys, values) if whole else (keys[:, :self.longest + T], values[:, :self.longest + T])

    def copy_rows(self, to: Tensor, source: "KVCache", rows: Tensor) -> None:
        """Slots `to` become copies of `source`'s slots `rows` (both int64): one prefilled prompt serves all
        its samples."""
        n = source.longest
        for mine, theirs in zip(self.keys + self.values, source.keys + source.values):
            mine[to, :n] = theirs[rows, :n]
        self.length_B[to] = source.length_B[rows]

    def move(self, to: int, last: int, length: int) -> None:
        """Slot `to` becomes a copy of slot `last`, `length` tokens long."""
        for cached in self.keys + self.values:
            cached[to, :length] = cached[last, :length]
        self.length_B[to] = self.length_B[last]


def attend(q_BTQH: Tensor, k_BSRH: Tensor, v_BSRH: Tensor, mask: Tensor | None, packing: Packing | None) -> Tensor:
    """(B, T, Q * H). mask: additive, over the keys, of queries in a cache; packing: of rows end to end; neither:
    causal."""
    B, T, Q, H = q_BTQH.shape
    if packing is not None and packing.flash:
        out = flash(q_BTQH.flatten(0, 1), k_BSRH.flatten(0, 1), v_BSRH.flatten(0, 1), packing)
    elif packing is not None:
        lengths = packing.first_q.diff().tolist()
        parts = zip(*(x.split(lengths, dim=1) for x in (q_BTQH, k_BSRH, v_BSRH)))
        out = torch.cat([attend(*part, None, None) for part in parts], 1)
    else:
        q, k, v = q_BTQH.transpose(1, 2), k_BSRH.transpose(1, 2), v_BSRH.transpose(1, 2)
        if T == 1 and mask is not None and not (q.device.type == "cpu" and q.dtype == torch.bfloat16):
            # the query heads that share a key stand as rows: a mask with enable_gqa has no fused CUDA kernel, and in
            # float32 a slower one on a CPU; in bfloat16 a faster one
            out = F.scaled_dot_product_attention(q.reshape(B, k.shape[1], -1, H), k, v, attn_mask=mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
            out = out.transpose(1, 2)
    return out.reshape(B, T, Q * H)


def flash(q_NQH: Tensor, k_MRH: Tensor, v_MRH: Tensor, at: Packing) -> Tensor:
    """(N, Q, H). The operator under torch.nn.attention.varlen, whose function cannot yet tell in torch 2.11 how many
    keys of a slot are real, nor share keys between query heads."""
    return torch.ops.aten._flash_attention_forward(
        q_NQH, k_MRH, v_MRH, at.first_q, at.first_k, at.longest_q, at.longest_k, 0.0, at.used_k is None, False,
        seqused_k=at.used_k)[0]
