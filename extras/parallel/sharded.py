"""Sharded: models whose parameters are cut over the processes (FSDP2), and what they hand out whole.

A layer is gathered for as long as it is in use, by all processes together: so each has to run it as often as the
others. The head is never run as a module. Its gradient is added by hand (losses.chunked_backward), to a whole copy; the
copies' gradients are summed back into shards once, after the last micro-batch.
"""
from collections.abc import Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from extras.parallel.group import Group, all_reduce_max
from model import Transformer
from support.extras import offers


def shard(model: Transformer) -> None:
    """Cut the parameters over all processes, in place; a model that was cut before stays. Adapters come first.

    Gradients are summed over processes, not averaged: the scale of a row already holds the denominator of the whole
    step. Every module gathers for its own forward or backward pass and lets go at once (the outermost too, which FSDP2
    would keep): between passes a parameter is always its shard. Layers are gathered in the dtype of the products, their
    gradients summed in float32.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    if is_sharded(model):
        return
    settings = dict(mesh=Group.mesh(model.device.type), reshard_after_forward=True)
    policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mp_policy=policy, **settings)
    if not model.config.tie_word_embeddings:
        fully_shard(model.lm_head, **settings)      # its forward is never called: only head_weight gathers it
    fully_shard(model, **settings)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)      # gloo cannot scale while it sums
    weights, model.read = model.weights, in_step(model)
    model.weights = lambda: Gathered(weights())
    model.head_weight = lambda: whole(sharded_head(model).detach())


def is_sharded(model: Transformer) -> bool:
    return hasattr(sharded_head(model), "full_tensor")


def sharded_head(model: Transformer) -> Tensor:
    return Transformer.head_weight(model)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def whole_model(model: Transformer) -> Transformer:
    """A copy to sample from: gathering every layer for every token would cost more than decoding. The model itself
    where it is whole."""
    if not is_sharded(model):
        return model
    copy = model.copy_as(model.compute_dtype)
    for faster in offers("on_model"):
        faster(copy)
    return copy


class Gathered(Mapping):
    """Checkpoint name -> whole tensor, gathered when it is asked for and not kept. All processes have to ask for the
    same names in the same order."""

    def __init__(self, shards: dict[str, Tensor]):
        self.shards = shards

    def __getitem__(self, name: str) -> Tensor:
        return whole(self.shards[name])

    def __iter__(self):
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


# Passes

def owned(number: Tensor) -> Tensor:
    """Of these sequence numbers, which are this process's?  bool, same shape."""
    return number % Group.world == Group.rank


def in_step(model: Transformer):
    """model.read over this process's sequences, in as many micro-batches on every process: the missing ones are
    without a row."""
    plain = model.read

    def read(rollout, sequence_b: Tensor, max_tokens: int):
        model.response_hidden = lambda *inputs: inputs      # the passes are noted first, so that they can be counted
        try:
            passes = list(plain(rollout, sequence_b[owned(sequence_b)], max_tokens))
        finally:
            del model.response_hidden
        tokens_bt = torch.zeros(1, 2, dtype=torch.int64, device=rollout.tokens_BT.device)
        empty = (tokens_bt, tokens_bt.bool()), tokens_bt.new_empty(0)
        for inputs, row_n in passes + [empty] * (all_reduce_max(len(passes)) - len(passes)):
            yield model.response_hidden(*inputs), row_n
    return read


@contextmanager
def whole_head(student: Transformer):
    """Inside, the head is one whole copy with a gradient of its own, which starts at 0; at the end the gradients that
    the processes added to their copies are summed, and each shard is added to its owner's."""
    from torch.distributed.tensor import DTensor, Partial
    own, gathering = sharded_head(student), student.head_weight
    head = whole(own.detach()).requires_grad_(own.requires_grad)
    head.grad = torch.zeros_like(head) if head.requires_grad else None
    student.head_weight = lambda: head
    yield
    student.head_weight = gathering
    if head.requires_grad:
        summed = DTensor.from_local(head.grad, own.device_mesh, [Partial()], run_check=False)
        own.grad += summed.redistribute(placements=own.placements)


# To a file and back

def on_host(tensor: Tensor) -> Tensor:
    """support.tensors.on_host: the whole tensor on the CPU of the process that writes it; the others help to gather it
    and keep nothing."""
    found = whole(tensor.detach())
    return found.cpu() if Group.rank == 0 else found.new_empty(0)


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """support.tensors.like: a whole tensor, cut as the parameter is; any other (AdamW's step count) as it is."""
    if not hasattr(parameter, "placements") or full.shape != parameter.shape:
        return full
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def update_average(average: Transformer, student: Transformer, decay: float) -> None:
    """extras.teachers.update_average: the student's weights are gathered one at a time, and cut as the average is."""
    weights = student.weights()
    for name, parameter in average.named_parameters():
        parameter.lerp_(like(weights[name], parameter).to(parameter.dtype), 1 - decay)


def per_process(plan: dict[str, int]) -> dict[str, int]:
    """support.memory.per_process: the memory plan of one of the processes."""
    divided = ("student weights, float32", "gradients and AdamW moments", "teacher weights", "teacher hidden states")
    copy = "student copy for sampling"
    plan = {**plan, copy: plan[copy] or plan["student weights, float32"]}
    return {name: size // Group.world if name in divided else size for name, size in plan.items()}
