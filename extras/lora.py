"""LoRA (Hu 2021, arXiv:2106.09685): adapters on every projection of every layer are trained, not the weights.

y = x W^T + alpha / rank * (x A^T) B^T. The student's projections become Adapted; sampling copies and checkpoints hold
the merged weights, so whatever reads them needs to know nothing.
"""
import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import Linear, Transformer
from support.flags import opt


@dataclass(frozen=True)
class Flags:
    lora_rank: int = opt(0, "train adapters of this rank on all projections of the layers instead of all weights; 0 = "
                            "off", high=10_000)
    lora_alpha: float = opt(32.0, "the adapter's output is scaled by lora_alpha / lora_rank")


def rules(cfg) -> list[tuple[bool, str]]:
    return [(cfg.lora_alpha > 0, "--lora_alpha must be above 0")]


def student(cfg, model: Transformer) -> None:
    if cfg.lora_rank:
        add_lora(model, cfg.lora_rank, cfg.lora_alpha, cfg.seed)


class Adapted(Linear):
    """A Linear with an adapter, which lora_scale = 0 switches off."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.lora_scale:
            return super().forward(x)
        # rows side by side: what the adapter adds goes into the product's own memory, with nothing held in between
        x_nD = x.flatten(0, -2)
        y_nE, low_nR = super().forward(x_nD), F.linear(x_nD, self.lora_A.to(x.dtype))
        return y_nE.addmm_(low_nR, self.lora_B.to(x.dtype).T, alpha=self.lora_scale).view(*x.shape[:-1], -1)

    def merged_weight(self) -> Tensor:
        if not self.lora_scale:
            return self.weight.detach()
        return (self.weight.float() + self.lora_scale * (self.lora_B.float() @ self.lora_A.float())).detach()


def add_lora(model: Transformer, rank: int, alpha: float, seed: int = 0) -> None:
    """Freeze everything and give every projection an adapter; B = 0, so nothing changes yet. The A matrices are drawn
    on the CPU, so that a seed gives the same adapter on every device."""
    rng = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for linear in projections(model):
        linear.__class__ = Adapted
        bound = 1 / math.sqrt(linear.weight.shape[1])
        a = torch.empty(rank, linear.weight.shape[1]).uniform_(-bound, bound, generator=rng)
        linear.lora_A = nn.Parameter(a.to(model.device))
        linear.lora_B = nn.Parameter(torch.zeros(linear.weight.shape[0], rank, device=model.device))
        linear.lora_scale = alpha / rank
    model.weights = lambda: merged_weights(model)


def merged_weights(model: Transformer) -> dict[str, Tensor]:
    """Transformer.weights() with the adapters merged in."""
    merged = {f"{name}.weight": module.merged_weight()
              for name, module in model.named_modules() if isinstance(module, Adapted)}
    plain = {name: p.detach() for name, p in model.named_parameters() if "lora_" not in name}
    return {name: merged.get(name, tensor) for name, tensor in plain.items()}


@contextlib.contextmanager
def lora_off(model: Transformer):
    """Inside, the model is the one that was loaded: the initial policy, without a second copy."""
    scales = [linear.lora_scale for linear in projections(model)]
    try:
        for linear in projections(model):
            linear.lora_scale = 0.0
        yield
    finally:
        for linear, scale in zip(projections(model), scales):
            linear.lora_scale = scale


def projections(model: Transformer) -> list[Linear]:
    return [module for module in model.model.layers.modules() if isinstance(module, Linear)]
