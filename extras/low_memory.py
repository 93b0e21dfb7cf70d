"""Less memory for time: activations recomputed in the backward pass, AdamW's moments in host memory between steps."""
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

from support.flags import opt


@dataclass(frozen=True)
class Flags:
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, a third slower")
    offload_optimizer: bool = opt(False, "keep AdamW's moments in host memory between steps: a GPU saves eight bytes a "
                                         "weight and waits for two transfers a step")


def attach(run) -> None:
    if run.cfg.gradient_checkpointing:
        for layer in run.student.model.layers:
            layer.forward = recomputed(layer.forward)
    if run.cfg.offload_optimizer:
        make = run.make_optimizer
        run.make_optimizer = lambda student, cfg: offload(make(student, cfg), student.device)


def recomputed(forward):
    """A layer's forward pass that keeps its input alone for the backward pass."""
    def passing(*args):
        return checkpoint(forward, *args, use_reentrant=False) if torch.is_grad_enabled() else forward(*args)
    passing.inside = forward
    return passing


def offload(optimizer, device):
    """The same optimizer, whose moments visit the device for its step only."""
    step = optimizer.step

    def visiting():
        move_moments(optimizer, device)
        step()
        move_moments(optimizer, "cpu")
    optimizer.step = visiting
    return optimizer


def move_moments(optimizer, device) -> None:
    """The moments to `device`; the step count stays where its kernel wants it."""
    for state in optimizer.state.values():
        for key in state.keys() - {"step"}:
            state[key] = state[key].to(device)
