"""Flash attention on a GPU in half precision: micro-batches packed end to end instead of padded, and decode steps that
read each slot's own length instead of the longest under a mask.

In place of model.Transformer.read and cache_type, for models that can (flash_ready). Axes as in model.py; N tokens end
to end.
"""
import functools
from dataclasses import dataclass
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from model import Causal, KVCache, Transformer

FLASH = True        # False: torch's fused attention everywhere


@functools.cache
def flash_ready(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Can torch's flash attention take these? Half precision on a GPU from Ampere on."""
    return (FLASH and device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
            and head_dim <= 256 and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0))


def on_model(model: Transformer) -> None:
    if flash_ready(model.device, model.compute_dtype, model.config.head_dim):
        model.read, model.cache_type = MethodType(read, model), FlashCache


@dataclass(frozen=True)
class Packing:
    """Where sequences begin in a row of tokens laid end to end; one end each for queries and for keys."""
    first_q: Tensor             # int32 (S + 1,): 0, then where each sequence ends
    first_k: Tensor
    longest_q: int
    longest_k: int
    used_k: Tensor | None = None    # int32 (S,): how many keys of each sequence are real; None = all


def flash(q_NQH: Tensor, k_MRH: Tensor, v_MRH: Tensor, at: Packing) -> Tensor:
    """(N, Q, H). The operator under torch.nn.attention.varlen, whose function cannot yet tell in torch 2.11 how many
    keys of a slot are real, nor share keys between query heads."""
    return torch.ops.aten._flash_attention_forward(
        q_NQH, k_MRH, v_MRH, at.first_q, at.first_k, at.longest_q, at.longest_k, 0.0, at.used_k is None, False,
        seqused_k=at.used_k)[0]


def packed_attention(q_BTQH: Tensor, k_BSRH: Tensor, v_BSRH: Tensor, at: Packing) -> Tensor:
    """(B, T, Q * H)"""
    B, T, _, _ = q_BTQH.shape
    return flash(q_BTQH.flatten(0, 1), k_BSRH.flatten(0, 1), v_BSRH.flatten(0, 1), at).reshape(B, T, -1)


class Packed(Causal):
    """Sequences of these lengths end to end in one row, which do not see each other."""

    def __init__(self, lengths: list[int]):
        self.lengths = lengths

    def begin(self, tokens_BT: Tensor) -> tuple[Tensor, Packing]:
        device, lengths = tokens_BT.device, torch.tensor(self.lengths, dtype=torch.int32)
        first = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0)).to(device)
        at_BT = torch.cat([torch.arange(n, device=device) for n in self.lengths])[None]
        return at_BT, Packing(first, first, max(self.lengths), max(self.lengths))

    def attend(self, layer: int, q_BTQH: Tensor, k_BTRH: Tensor, v_BTRH: Tensor, seen: Packing) -> Tensor:
        return packed_attention(q_BTQH, k_BTRH, v_BTRH, seen)


class FlashCache(KVCache):
    """A KVCache whose decode steps read each slot up to its own length."""

    def begin(self, tokens_BT: Tensor):
        B, T = tokens_BT.shape
        if self.longest == 0 or T > 1:
            return super().begin(tokens_BT)
        first, capacity = torch.arange(B + 1, dtype=torch.int32, device=tokens_BT.device), self.keys[0].shape[1]
        return self.length_B[:B, None], Packing(first, first * capacity, 1, capacity, (self.length_B[:B] + 1).int())

    def attend(self, layer: int, q_BTQH: Tensor, k_BTRH: Tensor, v_BTRH: Tensor, seen) -> Tensor:
        if not isinstance(seen, Packing):
            return super().attend(layer, q_BTQH, k_BTRH, v_BTRH, seen)
        return packed_attention(q_BTQH, *self.append(layer, k_BTRH, v_BTRH), seen)


def read(model: Transformer, rollout, sequence_b: Tensor, max_tokens: int):
    """Transformer.read without padding. Positions shift by one end to end too: no sequence begins with a response
    token."""
    total_B = rollout.prompt_len_B + rollout.length_B
    row_BT = rollout.mask_BT.flatten().cumsum(0).view_as(rollout.mask_BT) - 1
    order, lengths = total_B.argsort(stable=True), total_B.tolist()
    for group in groups(order[torch.isin(order, sequence_b)].tolist(), lengths, max_tokens):
        at, longest = torch.tensor(group, device=order.device), lengths[group[-1]]
        mask_bt = rollout.mask_BT[at, :longest]
        real_bt = torch.arange(longest, device=order.device) < total_B[at, None]
        tokens_1n, mask_1n = rollout.tokens_BT[at, :longest][real_bt][None], mask_bt[real_bt][None]
        yield (model.response_hidden(tokens_1n, mask_1n, Packed([lengths[b] for b in group])),
               row_BT[at, :longest][mask_bt])


def groups(order: list[int], lengths: list[int], max_tokens: int):
    """Cut `order` into groups of at most max_tokens tokens; one sequence always fits."""
    group, size = [], 0
    for b in order:
        if group and size + lengths[b] > max_tokens:
            yield group
            group, size = [], 0
        group.append(b)
        size += lengths[b]
    if group:
        yield group
