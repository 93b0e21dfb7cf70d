"""Young: the private and the young functions of torch that the project calls, and what takes their place.

They may change their arguments or go with any release. Each is named here with the arguments that it is given by name;
tests/extras/test_young.py holds the installed torch to the table, and a way whose function is missing is not taken.
"""
import functools
import importlib
import inspect
from typing import NamedTuple

import torch


class Young(NamedTuple):
    used_in: str
    arguments: str      # those given by name
    instead: str        # what takes its place where it, or one of its arguments, is missing


YOUNG = {
    "torch.nn.attention.varlen.varlen_attn": Young(
        "extras/fast/flash.py", "window_size enable_gqa seqused_k", "torch.ops.aten._flash_attention_forward"),
    "torch.ops.aten._flash_attention_forward": Young(
        "extras/fast/flash.py", "window_size_left seqused_k", "model.masked_attention and padded micro-batches"),
    "torch.nn.functional.grouped_mm": Young("extras/families/qwen3_moe.py", "offs", "one product per expert"),
    "torch.cuda.CUDAGraph.capture_begin": Young(
        "extras/fast/graphs.py", "capture_error_mode", "rollout.Slots.decode, launched kernel by kernel"),
    "torch.ops.mkldnn._reorder_linear_weight": Young("extras/fast/cpu.py", "", "rollout.head_product"),
    "torch.ops.mkldnn._linear_pointwise": Young("extras/fast/cpu.py", "", "rollout.head_product"),
    "torch._dynamo.exc.TorchDynamoException": Young("extras/compile.py", "", "a traceback instead of a sentence"),
    "torch.compiler.is_compiling": Young("extras/compile.py", "", "model.Linear.forward"),
    "torch.distributed.fsdp.fully_shard": Young(
        "extras/parallel/sharded.py", "mesh reshard_after_forward mp_policy", "one process"),
    "torch.distributed.fsdp.FSDPModule.set_gradient_divide_factor": Young(
        "extras/parallel/sharded.py", "", "one process"),
    "torch.distributed.fsdp.FSDPModule.set_force_sum_reduction_for_comms": Young(
        "extras/parallel/sharded.py", "", "one process"),
    "torch.distributed.tensor.DTensor.from_local": Young("extras/parallel/sharded.py", "run_check", "one process"),
    "torch.distributed.tensor.distribute_tensor": Young("extras/parallel/sharded.py", "src_data_rank", "one process"),
}


def find(path: str):
    """The function of this dotted path; AttributeError or ImportError where there is none."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise ImportError(path)


def arguments_of(function) -> set[str]:
    """Names of its arguments: an operator tells them by its schema, a Python function by its signature, a function
    written in C++ by the first line of its help."""
    if isinstance(function, torch._ops.OpOverloadPacket):
        return {argument.name for name in function.overloads()
                for argument in getattr(function, name)._schema.arguments}
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()


@functools.cache
def available(path: str) -> bool:
    """Is it there, with the arguments that YOUNG says it is given?"""
    try:
        return set(YOUNG[path].arguments.split()) <= arguments_of(find(path))
    except (AttributeError, ImportError, RuntimeError):
        return False
