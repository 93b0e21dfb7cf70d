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

from extras.fast.ways import put, way
from extras.fast.young import available, find
from model import Causal, KVCache, Transformer

KERNELS = "torch.nn.attention.varlen.varlen_attn", "torch.ops.aten._flash_attention_forward"    # the better one first


@functools.cache
def flash_ready(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Can torch's flash attention take these? Half precision on a GPU from Ampere on."""
    can = (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0
           and head_dim <= 256 and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0))
    if can and not any(map(available, KERNELS)):
        print(f"fast    flash_rows and flash_cache stand aside: torch {torch.__version__} has neither {KERNELS[0]} "
              f"with seqused_k nor {KERNELS[1]}; micro-batches are padded, decode steps masked")
        return False
    return can


def on_model(model: Transformer) -> None:
    plain = type(model).read is Transformer.read and type(model).cache_type is KVCache   # else it keeps more than these
    if plain and flash_ready(model.device, model.compute_dtype, model.config.head_dim):
        put("flash_rows", model, "read", MethodType(read, model))
        put("flash_cache", model, "cache_type", flash_cache)


@dataclass(frozen=True)
class Packing:
    """Where sequences begin in a row of tokens laid end to end; one end each for queries and for keys."""
    first_q: Tensor             # int32 (S + 1,): 0, then where each sequence ends
    first_k: Tensor
    longest_q: int
    longest_k: int
    used_k: Tensor | None = None    # int32 (S,): how many keys of each sequence are real; None = all
    at_S: Tensor | None = None      # int64 (S,): where the cache, its slots end to end, takes the new keys
    window: int = -1            # how many keys before its own a query sees; -1 = all


def flash(q_NQH: Tensor, k_MRH: Tensor, v_MRH: Tensor, at: Packing) -> Tensor:
    """(N, Q, H). Causal, but for one query per slot of a cache, which sees all the keys that are real.

    The public function where it can tell how many keys are real (torch 2.13), else the operator beneath it."""
    sequences = q_NQH, k_MRH, v_MRH, at.first_q, at.first_k, at.longest_q, at.longest_k
    if available(KERNELS[0]):
        window = at.window, 0 if at.used_k is None else -1
        return find(KERNELS[0])(*sequences, window_size=window, enable_gqa=True, seqused_k=at.used_k)
    return find(KERNELS[1])(*sequences, 0.0, at.used_k is None, False, window_size_left=at.window,
                            seqused_k=at.used_k)[0]


def packed_attention(q_BTQH: Tensor, k_BSRH: Tensor, v_BSRH: Tensor, at: Packing) -> Tensor:
    """(B, T, Q * H)"""
    B, T, _, _ = q_BTQH.shape
    return flash(q_BTQH.flatten(0, 1), k_BSRH.flatten(0, 1), v_BSRH.flatten(0, 1), at).reshape(B, T, -1)


def decode_attention(q_S1QH: Tensor, k_MRH: Tensor, v_MRH: Tensor, at: Packing) -> Tensor:
    """(S, 1, Q * H): one query per slot of a cache whose slots lie end to end."""
    return flash(q_S1QH.flatten(0, 1), k_MRH, v_MRH, at).reshape(len(q_S1QH), 1, -1)


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
    """A KVCache whose decode steps read each slot up to its own length. The kernel wants the slots end to end, so keys
    and values lie as (slots, capacity, R, H) and are seen as KVCache has them."""

    def __init__(self, model: Transformer, slots: int, capacity: int):
        super().__init__(model, slots, 0)
        _, R, _, H = self.keys[0].shape
        self.keys, self.values = ([empty.new_zeros(slots, capacity, R, H).transpose(1, 2) for empty in layers]
                                  for layers in (self.keys, self.values))

    def begin(self, tokens_BT: Tensor):
        B, T = tokens_BT.shape
        if self.longest == 0 or T > 1:
            return super().begin(tokens_BT)
        number, capacity = torch.arange(B + 1, dtype=torch.int32, device=tokens_BT.device), self.keys[0].shape[2]
        first, length_B = number * capacity, self.length_B[:B]
        return length_B[:, None], Packing(number, first, 1, capacity, (length_B + 1).int(), first[:-1] + length_B)

    def attend(self, layer: int, q_BTQH: Tensor, k_BTRH: Tensor, v_BTRH: Tensor, seen) -> Tensor:
        if not isinstance(seen, Packing):
            return super().attend(layer, q_BTQH, k_BTRH, v_BTRH, seen)
        cached = []
        for cache, new_BTRH in ((self.keys[layer], k_BTRH), (self.values[layer], v_BTRH)):
            end_to_end = cache.transpose(1, 2).flatten(0, 1)
            end_to_end.index_copy_(0, seen.at_S, new_BTRH.flatten(0, 1))    # one kernel for all slots
            cached.append(end_to_end)
        return decode_attention(q_BTQH, *cached, seen)


@way("flash_cache", instead_of=KVCache)
def flash_cache(model: Transformer, slots: int, capacity: int) -> FlashCache:
    return FlashCache(model, slots, capacity)


@way("flash_rows", instead_of=Transformer.read)
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
