"""Fewer and larger products in the layers of a model that is only read: q, k and v as one, gate and up as one, and what
a block adds to the residual stream added by the product itself. A decode step of few rows waits for launches more than
for arithmetic: 16 kernels a layer instead of some thirty.

In place of model.Layer.forward. The parameters stay and keep their names: they become views of the merged tensors.
"""
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from extras.fast.ways import put, way
from model import Causal, Layer, Transformer


def mergeable(model: Transformer) -> bool:
    """Plain layers on a GPU, stored in the dtype of the products, without a parameter that learns."""
    return (model.device.type == "cuda" and all(type(layer) is Layer for layer in model.model.layers)
            and not any(p.requires_grad or p.dtype != model.compute_dtype for p in model.parameters()))


def merge(model: Transformer) -> None:
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layer.qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        layer.gate_up = joined(mlp.gate_proj, mlp.up_proj)
        if hasattr(attention, "q_norm"):
            heads = (len(linear.weight) // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
            norms = (attention.q_norm.weight, attention.k_norm.weight)
            layer.qk_norm_nH = torch.cat([weight.expand(n, -1) for n, weight in zip(heads, norms)])
        put("merged_layers", layer, "forward", MethodType(forward, layer))


def joined(*linears) -> tuple[Tensor, Tensor | None]:
    """(weight, bias) of linears with one input side by side; their own become views of them."""
    found = []
    for name in ("weight", "bias"):
        own = [getattr(linear, name) for linear in linears]
        if own[0] is None:
            found.append(None)
            continue
        whole = torch.cat([parameter.detach() for parameter in own])
        for parameter, part in zip(own, whole.split([len(parameter) for parameter in own])):
            parameter.data = part
        found.append(whole)
    return tuple(found)


@way("merged_layers", instead_of=Layer.forward)
def forward(layer: Layer, x_BTD: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen) -> Tensor:
    """Changes x_BTD in place."""
    (B, T, D), attention = x_BTD.shape, layer.self_attn
    x_nD = x_BTD.view(-1, D)
    qkv_BTnH = F.linear(layer.input_layernorm(x_BTD), *layer.qkv).view(B, T, -1, attention.head_dim)
    kv = len(attention.k_proj.weight) // attention.head_dim
    qk_BTnH, v_BTRH = qkv_BTnH[:, :, :-kv], qkv_BTnH[:, :, -kv:]
    if hasattr(layer, "qk_norm_nH"):
        qk_BTnH = F.rms_norm(qk_BTnH, qk_BTnH.shape[-1:], None, attention.q_norm.eps) * layer.qk_norm_nH
    qk_BTnH = rotated(qk_BTnH, *rope)
    out_BTD = keys.attend(attention.layer, qk_BTnH[:, :, :-kv], qk_BTnH[:, :, -kv:], v_BTRH, seen)
    add_product(x_nD, out_BTD.flatten(0, 1), attention.o_proj)
    gate, up = F.linear(layer.post_attention_layernorm(x_BTD), *layer.gate_up).flatten(0, 1).chunk(2, -1)
    add_product(x_nD, F.silu(gate) * up, layer.mlp.down_proj)
    return x_BTD


def rotated(x_BTnH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """model.rotate in three kernels."""
    return torch.addcmul(x_BTnH * cos_BT1H, x_BTnH.roll(x_BTnH.shape[-1] // 2, -1), sin_BT1H)


def add_product(x_nD: Tensor, y_nE: Tensor, linear) -> None:
    """x += linear(y), one kernel where the linear has no bias."""
    x_nD.addmm_(y_nE, linear.weight.T)
    if linear.bias is not None:
        x_nD += linear.bias
