"""Qwen3 with experts (arXiv:2505.09388): in place of one MLP a router that sends each token to a few of many.

The experts of a layer lie in two tensors; in the files each has matrices of its own. Tokens are sorted by expert, so
that a layer is two grouped products. Axes: n tokens, k experts of a token, E experts, I their width, m = n k.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.families.sliding import KEYS, SlidingLayer, upper_layers
from extras.fast.young import available, find
from model import MODELS, Transformer
from support.errors import UserError, shown
from support.model_config import FAMILIES, Family, Key, ModelConfig, Reader


class Experts(nn.Module):
    """y = sum over a token's experts of weight * down(silu(gate) * up)."""

    def __init__(self, experts: int, width: int, inner: int):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * inner, width))
        self.down_proj = nn.Parameter(torch.empty(experts, width, inner))

    def forward(self, x_nD: Tensor, expert_nk: Tensor, weight_nk: Tensor) -> Tensor:
        order_m = expert_nk.flatten().argsort(stable=True)
        count_E = torch.bincount(expert_nk.flatten(), minlength=len(self.down_proj))
        x_mD = x_nD[order_m // expert_nk.shape[1]]
        gate, up = grouped_product(x_mD, self.gate_up_proj.to(x_nD.dtype), count_E).chunk(2, -1)
        y_mD = grouped_product(F.silu(gate) * up, self.down_proj.to(x_nD.dtype), count_E)
        back_m = torch.empty_like(order_m).scatter_(0, order_m, torch.arange(len(order_m), device=order_m.device))
        return (y_mD[back_m].view(*expert_nk.shape, -1) * weight_nk[..., None]).sum(1)


def grouped_product(x_mD: Tensor, weight_EID: Tensor, count_E: Tensor) -> Tensor:
    """(m, I): the first count_E[0] rows times the first matrix, the next times the second, and so on."""
    grouped = "torch.nn.functional.grouped_mm"
    if x_mD.device.type == "cuda" and x_mD.dtype == torch.bfloat16 and available(grouped):
        return find(grouped)(x_mD, weight_EID.transpose(1, 2), offs=count_E.cumsum(0).int())
    return torch.cat([F.linear(x, weight) for x, weight in zip(x_mD.split(count_E.tolist()), weight_EID)])


class Router(nn.Module):
    """Which experts a token goes to, and with which weights."""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.weight, self.own = nn.Parameter(torch.empty(c.own["num_experts"], c.hidden_size)), c.own

    def shares(self, x_nD: Tensor) -> Tensor:
        """(n, E): the probability of each expert, float32."""
        return F.linear(x_nD, self.weight.to(x_nD.dtype)).float().softmax(-1)

    def forward(self, x_nD: Tensor) -> tuple[Tensor, Tensor]:
        """(expert_nk int64, weight_nk in x's dtype): the likeliest experts, whose probabilities are divided by their
        sum where config.json says so."""
        weight_nk, expert_nk = self.shares(x_nD).topk(self.own["num_experts_per_tok"])
        if self.own["norm_topk_prob"]:
            weight_nk = weight_nk / weight_nk.sum(-1, keepdim=True)
        return expert_nk, weight_nk.to(x_nD.dtype)


class SparseMLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate = Router(c)
        self.experts = Experts(c.own["num_experts"], c.hidden_size, c.own["moe_intermediate_size"])

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_nD = x_BTD.flatten(0, 1)
        return self.experts(x_nD, *self.gate(x_nD)).view_as(x_BTD)


class MoeLayer(SlidingLayer):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__(c, layer)
        if layer in c.own["sparse"]:
            self.mlp = SparseMLP(c)


class Qwen3Moe(Transformer):
    layer_type = MoeLayer

    def on_disk(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Each expert's matrices under their own names."""
        found = {}
        for name, tensor in weights.items():
            layer, experts, matrix = name.partition(".experts.")
            for e in range(len(tensor) * bool(experts)):
                parts = tensor[e].chunk(2) if matrix == "gate_up_proj" else [tensor[e]]
                for part, view in zip(matrix.removesuffix("_proj").split("_"), parts):
                    found[f"{layer}.experts.{e}.{part}_proj.weight"] = view
            if not experts:
                found[name] = tensor
        return found


def qwen3_moe(read: Reader) -> dict:
    own = {key: read(key) for key in ("num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob")}
    own["num_experts"] = read("num_local_experts") or read("num_experts")    # transformers 5's name, the older
    dense, every = read("mlp_only_layers") or [], read("decoder_sparse_step")
    if own["num_experts_per_tok"] > own["num_experts"]:
        raise UserError(f"{read.where}: num_experts_per_tok {own['num_experts_per_tok']} exceeds num_experts "
                        f"{own['num_experts']}")
    if not all(isinstance(layer, int) for layer in dense):
        raise UserError(f"{read.where}: mlp_only_layers {shown(dense, 90)} is not supported, only numbers of layers")
    own["sparse"] = {layer for layer in range(read("num_hidden_layers"))
                     if layer not in dense and (layer + 1) % every == 0}
    # columns that a token leaves for the backward pass, for the memory plan; the mean over the layers
    routed = own["num_experts_per_tok"] * (2 * read("hidden_size") + 4 * own["moe_intermediate_size"])
    share = len(own["sparse"]) / read("num_hidden_layers")
    own["mlp_kept"] = round(share * routed + (1 - share) * 4 * read("intermediate_size"))
    found = upper_layers(read)
    return {**found, "own": {**found["own"], **own}, "qk_norm": True}


FAMILIES["qwen3_moe"], MODELS["qwen3_moe"] = Family(settings=qwen3_moe, keys={
    **KEYS, "use_sliding_window": Key(bool, False, null=True), "attention_bias": Key(bool, False),
    "num_experts": Key(int, 128, 1, 2**12), "num_local_experts": Key(int, None, 1, 2**12, null=True),
    "num_experts_per_tok": Key(int, 8, 1, 2**10),
    "moe_intermediate_size": Key(int, 768, 1, 2**19), "norm_topk_prob": Key(bool, False),
    "decoder_sparse_step": Key(int, 1, 1, 512), "mlp_only_layers": Key(list, None, null=True)}), Qwen3Moe
