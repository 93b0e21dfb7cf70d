"""Memory: what a run will need, said before it is spent.

Place in the loop: train.py prints it before the weights are loaded (or `python train.py --plan` alone). Works
from the two config.json files and the flags; nothing here allocates.
"""
import ctypes
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

import parallel
from model import ModelConfig, Transformer

# float32 tensors over the vocabulary that are alive at once while a few rows run their loss
CHUNK_TENSORS = {"cross_entropy": 4, "skewed_forward_kl": 10, "uld": 11, "skewed_reverse_kl": 13, "jsd": 14, "gold": 14}
OTHER_DIVERGENCES = 7
LIBRARIES = 96 * 2**20      # what tokenizers, torch and its kernels take once they are in use
CACHED_LOGITS = 2**19       # entries of the few rows whose loss a CPU computes at a time: 2 MB
MAPPED = 2**22              # bytes from which the C library gives a freed block back to the system at once
FREE_HEAP = 2**26           # what it keeps of smaller ones


def auto_chunk(cfg, vocab_size: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows whose float32 logits take 256 MB on a GPU; on a CPU 2 MB, which stay in cache, but at least 96 rows (192
    where they take half the memory), fewer of which would not pay for reading the head. dtype: of the products."""
    if device.type == "cpu":
        return cfg.chunk_rows or max(384 // dtype.itemsize, 2**19 // vocab_size)
    return cfg.chunk_rows or max(16, 2**26 // vocab_size)


def rows_at_once(chunk_rows: int, vocab_size: int, device: torch.device) -> int:
    """How many rows run their loss together: a GPU wants many, a CPU what its cache holds."""
    return chunk_rows if device.type == "cuda" else max(1, min(chunk_rows, CACHED_LOGITS // vocab_size))


def kept_activations(c: ModelConfig, tokens: int, item: int, checkpointing: bool, rank: int = 0) -> int:
    """Bytes that the forward pass of `tokens` tokens leaves for the backward pass. item: bytes of a product's dtype;
    rank: of the adapters.

    Per norm its input and, unless its weight is frozen, the normed value, both in float32, and its output; per
    projection its input (and, where the masters are of another dtype, the cast weight); the turned q, k and v;
    attention's output twice, before and after its heads are put side by side; four tensors of the MLP."""
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    normed = 2 * c.hidden_size + (q + kv) * (c.model_type == "qwen3")
    norms = normed * (4 if rank else 8) + 2 * c.hidden_size * item
    per_layer = tokens * (norms + item * (3 * q + 2 * kv + 4 * c.intermediate_size + 7 * rank))
    if item < 4:
        per_layer += item * (c.hidden_size * (2 * q + 2 * kv) + 3 * c.hidden_size * c.intermediate_size)
    # of the layer at work; an adapter has its own beside that of the weight
    gradients = tokens * item * ((4 if rank else 2) * c.intermediate_size + c.hidden_size)
    if checkpointing:
        return per_layer + gradients + tokens * c.hidden_size * item * c.num_hidden_layers
    return per_layer * c.num_hidden_layers + gradients


def memory_plan(cfg, student: ModelConfig, teachers: list[ModelConfig], prompt: int, vocab_size: int,
                chunk_rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Bytes, by what they are for. Weights, gradients, moments, cache and hidden rows are exact, the rest within a few
    percent."""
    def size(config: ModelConfig) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Transformer(config).parameters())
    item, s = dtype.itemsize, student
    length, sequences = prompt + cfg.max_new_tokens, cfg.problems * cfg.samples
    rows, weights = sequences * cfg.max_new_tokens, size(s)
    q, kv = s.num_attention_heads * s.head_dim, s.num_key_value_heads * s.head_dim
    widths = 4 * s.hidden_size + 2 * q + 2 * kv + 3 * (s.hidden_size + s.intermediate_size)     # in and out, 7 matrices
    adapters = cfg.lora_rank * s.num_hidden_layers * widths
    tokens = max(min(cfg.micro_batch_tokens, sequences * length), length)
    at_once = rows_at_once(chunk_rows, vocab_size, device)
    tensors = CHUNK_TENSORS.get(cfg.divergence, OTHER_DIVERGENCES)
    plan = {
        "student weights, float32": 4 * (weights + adapters),
        "gradients and AdamW moments": (4 if cfg.offload_optimizer else 12) * (adapters or weights),
        "student copy for sampling": 0 if dtype == torch.float32 else item * weights,
        "KV cache": min(cfg.slots, sequences) * length * 2 * s.num_hidden_layers * kv * item,
        "activations of a micro-batch": kept_activations(s, tokens, item, cfg.gradient_checkpointing,
                                                             cfg.lora_rank),
        "logits of the slots": min(cfg.slots, sequences) * vocab_size * item,
        "packed head of the slots": s.hidden_size * vocab_size * item if device.type == "cpu" else 0,
        "logits of a chunk": vocab_size * (2 * item * min(chunk_rows, rows) + 4 * tensors * min(at_once, rows)),
        "libraries": LIBRARIES,
        "freed blocks": FREE_HEAP if device.type == "cpu" else 0,
    }
    if teachers:
        plan["teacher weights"] = item * sum(map(size, teachers))
        plan["teacher hidden states"] = rows * max(t.hidden_size for t in teachers) * item
    return plan


def peak(plan: dict[str, int]) -> int:
    """What is there all the time, plus the larger of the two phases: the cache is freed before the update
    begins."""
    rollout = "KV cache", "logits of the slots", "packed head of the slots"
    update = "activations of a micro-batch", "logits of a chunk"
    return (sum(size for name, size in plan.items() if name not in rollout + update)
            + max(sum(plan.get(name, 0) for name in phase) for phase in (rollout, update)))


def total_memory(device: torch.device) -> int:
    """Bytes of the whole device; of the machine, shared by the processes, for a CPU. Not what is free: the sizes
    chosen from it decide in which order sums are taken, and a resumed run has to take them in the same order."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 2**33
    return whole // parallel.world()


def fit(cfg, *plan_args, device: torch.device):
    """cfg with micro_batch_tokens and slots filled in where they are 0: the largest of a few sizes with which the
    plan stays below three quarters of the memory, or the smallest when none does."""
    room = 0.75 * total_memory(device)
    most = 2**11 if device.type == "cpu" else 2**16     # larger ones are no faster
    chosen = replace(cfg, slots=cfg.slots or 1, micro_batch_tokens=cfg.micro_batch_tokens or 1)
    for name, sizes in (("slots", [2**n for n in range(8, 2, -1)]),
                        ("micro_batch_tokens", [most >> n for n in range(6)])):
        if not getattr(cfg, name):
            trials = (replace(chosen, **{name: size}) for size in sizes)
            fitting = (c for c in trials if peak(parallel.per_process(memory_plan(c, *plan_args, device))) <= room)
            chosen = next(fitting, replace(chosen, **{name: sizes[-1]}))
    return chosen


def print_plan(cfg, *plan_args, device: torch.device) -> int:
    """Say what the run will take; returns the bytes at the peak."""
    plan = parallel.per_process(memory_plan(cfg, *plan_args, device))
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in plan.items() if size)
    total = peak(plan)
    print(f"memory  about {size_text(total)} at the peak: {parts} ({cfg.slots} slots, micro-batches of "
          f"{cfg.micro_batch_tokens:,} tokens)")
    if device.type == "cuda" and total > (free := torch.cuda.mem_get_info(device)[0]):
        print(f"        only {size_text(free)} are free: lower --micro_batch_tokens, --slots or "
              f"--max_new_tokens, or use "
              f"--lora_rank or --gradient_checkpointing")
    return total


def resident(field: str) -> int:
    """Bytes of this process, from a Linux kernel: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def used_memory(device: torch.device, since: int = 0) -> int:
    """Bytes: the most that was ever in use on a GPU; of a process the most resident memory, less `since`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):     # rusage's peak begins at that of the process that started this one
        return resident("VmHWM") - since
    import resource     # not on Windows
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) - since


def size_text(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def give_back_freed_memory() -> None:
    """Tell glibc to hand large freed blocks back to the system at once instead of keeping them in pieces:
    chunk after chunk of logits otherwise leaves a heap of 1.1 full logits tensors behind, with this 0.1
    (bench/loss.py). Large is above 4 MB: blocks that are paged in anew at every use cost more than the
    arithmetic on them. Smaller ones stay in the heap, whose free end is handed back only beyond 64 MB, for the same
    reason. Elsewhere: nothing."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, MAPPED)        # M_MMAP_THRESHOLD, which grows by itself unless it is set
        libc.mallopt(-1, FREE_HEAP)     # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass
