"""Fewer and larger products in the layers of a model that is only read: q, k and v as one, gate and up as one, and what
a block adds to the residual stream added by the product itself. A decode step of few rows waits for launches more than
for arithmetic: 19 kernels a layer instead of 32 (bench/budget.py).

In place of model.Layer.forward. The parameters stay and keep their names: they become views of the merged tensors.
"""
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from extras.fast.ways import put, way
from model import Attention, Causal, Layer, Linear, Transformer


def mergeable(model: Transformer) -> bool:
    """Plain layers on a GPU, stored in the dtype of the products, without a parameter that learns."""
    return (model.device.type == "cuda" and all(type(layer) is Layer for layer in model.model.layers)
            and not any(p.requires_grad or p.dtype != model.compute_dtype for p in model.parameters()))


def merge(model: Transformer) -> None:
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        layer.qkv = joined(attention.q_proj, attention.k_proj, attention.v_proj)
        layer.gate_up = joined(mlp.gate_proj, mlp.up_proj)
        layer.qk_norm_nH = norms_of_heads(attention)
        put("merged_layers", layer, "forward", MethodType(forward, layer))


def norms_of_heads(attention: Attention) -> Tensor | None:
    """The norm's weight of each query head and each key head, (Q + R, H); None where heads are not normed."""
    if not hasattr(attention, "q_norm"):
        return None
    pairs = (attention.q_proj, attention.q_norm), (attention.k_proj, attention.k_norm)
    return torch.cat([norm.weight.detach().expand(len(linear.weight) // attention.head_dim, -1)
                      for linear, norm in pairs])


def one_below_the_other(*linears: Linear) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of one Linear in place of several with the same input; copies, without a gradient."""
    weights, biases = ([getattr(linear, name) for linear in linears] for name in ("weight", "bias"))
    bias = None if biases[0] is None else torch.cat([bias.detach() for bias in biases])
    return torch.cat([weight.detach() for weight in weights]), bias


def joined(*linears: Linear) -> tuple[Tensor, Tensor | None]:
    """one_below_the_other; the linears' own parameters become views of it."""
    weight, bias = one_below_the_other(*linears)
    rows = [len(linear.weight) for linear in linears]
    for linear, part in zip(linears, weight.split(rows)):
        linear.weight.data = part
    if bias is not None:
        for linear, part in zip(linears, bias.split(rows)):
            linear.bias.data = part
    return weight, bias


@way("merged_layers", instead_of=Layer.forward)
def forward(layer: Layer, x_BTD: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen) -> Tensor:
    """Changes x_BTD in place."""
    (B, T, D), attention = x_BTD.shape, layer.self_attn
    x_nD = x_BTD.view(-1, D)
    qkv_BTnH = F.linear(layer.input_layernorm(x_BTD), *layer.qkv).view(B, T, -1, attention.head_dim)
    kv = len(attention.k_proj.weight) // attention.head_dim
    qk_BTnH, v_BTRH = qkv_BTnH[:, :, :-kv], qkv_BTnH[:, :, -kv:]
    if layer.qk_norm_nH is not None:
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


def add_product(x_nD: Tensor, y_nE: Tensor, linear: Linear) -> None:
    """x += linear(y), one kernel where the linear has no bias."""
    x_nD.addmm_(y_nE, linear.weight.T)
    if linear.bias is not None:
        x_nD += linear.bias
