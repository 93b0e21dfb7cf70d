"""Memory: what a run will need, said before it is spent.

Place in the loop: train.py prints it before the weights are loaded (or `python train.py --plan` alone). Works
from the two config.json files and the flags; nothing here allocates.
"""
import ctypes

import torch

import parallel
from model import ModelConfig, Transformer


def auto_chunk(cfg, vocab_size: int, device: torch.device) -> int:
    """Rows whose float32 logits take 16 MB on a CPU (they should stay in cache) and 256 MB on a GPU."""
    return cfg.chunk_rows or max(16, (2**22 if device.type == "cpu" else 2**26) // vocab_size)


def memory_plan(cfg, student: ModelConfig, teachers: list[ModelConfig], prompt: int, vocab_size: int,
                chunk_rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes, by what they are for. Weights, gradients, moments, cache and hidden rows are exact; activations
    count the tensors that the backward pass keeps, and the allocator adds its own few percent."""
    def size(config: ModelConfig) -> int:
        with torch.device("meta"):
            return sum(parameter.numel() for parameter in Transformer(config).parameters())
    item, s = dtype.itemsize, student
    length = prompt + cfg.max_new_tokens
    sequences = cfg.problems * cfg.samples
    weights = size(s)
    qkv = (s.num_attention_heads + 2 * s.num_key_value_heads) * s.head_dim
    wide = qkv + s.num_attention_heads * s.head_dim + 3 * s.intermediate_size
    adapters = cfg.lora_rank * s.num_hidden_layers * (
        4 * s.hidden_size + qkv + s.num_attention_heads * s.head_dim + 3 * (s.hidden_size + s.intermediate_size))
    trained = adapters or weights
    tokens = max(min(cfg.micro_batch_tokens, sequences * length), length)
    per_layer = tokens * (wide * item + s.hidden_size * (4 * item + 8))
    kept_layers = per_layer * s.num_hidden_layers
    if cfg.gradient_checkpointing:
        kept_layers = per_layer + tokens * s.hidden_size * item * s.num_hidden_layers
    plan = {
        "student weights, float32": 4 * (weights + adapters),
        "gradients and AdamW moments": 12 * trained,
        "student copy for sampling": 0 if dtype == torch.float32 else item * weights,
        "KV cache": (min(cfg.slots, sequences) * length * 2 * s.num_hidden_layers * s.num_key_value_heads * s.head_dim
                     * item),
        "activations of a micro-batch": kept_layers,
        "logits of a chunk": 8 * 4 * min(chunk_rows, sequences * cfg.max_new_tokens) * vocab_size,
    }
    if teachers:
        plan["teacher weights"] = item * sum(map(size, teachers))
        plan["teacher hidden states"] = sequences * cfg.max_new_tokens * max(t.hidden_size for t in teachers) * item
    return plan


def peak(plan: dict[str, int]) -> int:
    """What is there all the time, plus the larger of the two phases: the cache is freed before the update
    begins."""
    rollout, update = ("KV cache",), ("activations of a micro-batch", "logits of a chunk")
    return (sum(size for name, size in plan.items() if name not in rollout + update)
            + max(sum(plan[name] for name in phase) for phase in (rollout, update)))


def print_plan(cfg, student: ModelConfig, teachers: list[ModelConfig], prompt: int, vocab_size: int, device, dtype) -> None:
    plan = parallel.per_process(memory_plan(cfg, student, teachers, prompt, vocab_size,
                                            auto_chunk(cfg, vocab_size, device), dtype))
    parts = ", ".join(f"{name} {size_text(size)}" for name, size in plan.items() if size)
    total = peak(plan)
    print(f"memory  about {size_text(total)} at the peak: {parts}")
    if device.type == "cuda" and total > (free := torch.cuda.mem_get_info(device)[0]):
        print(f"        only {size_text(free)} are free: lower --micro_batch_tokens, --slots or "
              f"--max_new_tokens, or use "
              f"--lora_rank or --gradient_checkpointing")


def size_text(size: float) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"


def give_back_freed_memory() -> None:
    """Tell glibc to hand large freed blocks back to the system at once instead of keeping them in pieces:
    chunk after chunk of logits otherwise leaves a heap of 1.1 full logits tensors behind, with this 0.1
    (bench/loss.py). Elsewhere: nothing."""
    try:
        ctypes.CDLL(None).mallopt(-3, 1 << 20)      # -3 = M_MMAP_THRESHOLD, which grows by itself unless it is set
    except (OSError, AttributeError):
        pass
