"""Gemma 3 (arXiv:2503.19786), the text decoder: sliding and full layers with ropes of their own, four norms a layer
whose weights lie about 0, a scaled embedding, GELU. Of a checkpoint with a vision tower the text part is loaded.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.families.sliding import FULL, KEYS, TwoRopes, ropes, settings, within
from extras.families.text_part import TextPart, text_config
from model import MLP, MODELS, Attention, Causal, RMSNorm
from support.errors import UserError
from support.model_config import FAMILIES, Family, Key, ModelConfig, Reader


class ShiftedNorm(RMSNorm):
    """x / sqrt(mean(x^2) + eps) * (1 + weight) * scale, in float32; the weight as a copy in x's dtype has it."""

    def __init__(self, width: int, eps: float, scale: float = 1.0):
        super().__init__(width, eps)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        weight = (1 + self.weight.to(x.dtype).to(exact)) * self.scale
        return F.rms_norm(x.to(exact), weight.shape, weight, self.eps).to(x.dtype)


@torch.no_grad()
def scale_by_one(model):
    """Fresh norms of this kind: their weight is what is added to 1."""
    for module in model.modules():
        if isinstance(module, ShiftedNorm):
            module.weight.zero_()
    return model


class GeluMLP(MLP):
    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Gemma3Layer(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.kind, self.window = c.own["kinds"][layer], c.own["windows"][layer]
        self.self_attn, self.mlp = Attention(c, layer), GeluMLP(c)
        # attention divides by sqrt(head_dim), Gemma by sqrt(query_pre_attn_scalar); rope keeps the factor
        scale = (c.head_dim / c.own["query_pre_attn_scalar"]) ** 0.5
        self.self_attn.q_norm = ShiftedNorm(c.head_dim, c.rms_norm_eps, scale)
        self.self_attn.k_norm = ShiftedNorm(c.head_dim, c.rms_norm_eps)
        self.input_layernorm, self.post_attention_layernorm, self.pre_feedforward_layernorm, \
            self.post_feedforward_layernorm = (ShiftedNorm(c.hidden_size, c.rms_norm_eps) for _ in range(4))

    def forward(self, x: Tensor, rope: dict, keys: Causal, seen) -> Tensor:
        heads = self.self_attn(self.input_layernorm(x), rope[self.kind], within(keys, self.window), seen)
        x = x + self.post_attention_layernorm(heads)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Gemma3(TextPart, TwoRopes):
    layer_type = Gemma3Layer

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__(config, compute_dtype)
        self.model.norm = ShiftedNorm(config.hidden_size, config.rms_norm_eps)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """sqrt(width) is rounded to the dtype of the products, as in the original."""
        x_BTD = super().embed(tokens_BT).to(self.compute_dtype)
        return x_BTD * torch.tensor(self.config.hidden_size ** 0.5, dtype=self.compute_dtype).item()

    def init_weights(self, seed: int):
        return scale_by_one(super().init_weights(seed))


def gemma3(read: Reader) -> dict:
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if read(key) is not None:
            raise UserError(f"{read.where}: {key} is not supported; Gemma 3 has none")
    if read("use_bidirectional_attention"):
        raise UserError(f"{read.where}: use_bidirectional_attention is not supported: a decoder looks back only")
    read("hidden_activation")
    every = read("sliding_window_pattern")
    found = settings(read, lambda layer: (layer + 1) % every, ropes=ropes(read, "rope_local_base_freq"),
                     query_pre_attn_scalar=read("query_pre_attn_scalar"))
    heads = read("num_attention_heads") + read("num_key_value_heads")
    found["own"]["normed"] = 4 * read("hidden_size") + heads * read("head_dim")     # columns, for the memory plan
    return {**found, "qk_norm": True, "raw": text_config(read, "Gemma3ForCausalLM")}


FAMILIES["gemma3_text"] = Family(settings=gemma3, rope=lambda read: ropes(read, "rope_local_base_freq")[FULL], keys={
    "layer_types": KEYS["layer_types"], "sliding_window_pattern": Key(int, 6, 1, 512),
    "hidden_act": Key(str, "gelu_pytorch_tanh", choices=("gelu_pytorch_tanh",)),
    "hidden_activation": Key(str, "gelu_pytorch_tanh", choices=("gelu_pytorch_tanh",)),
    "vocab_size": Key(int, 262_208, 1, 2**22), "num_attention_heads": Key(int, 8, 1, 2**10),
    "num_key_value_heads": Key(int, 4, 1, 2**10), "head_dim": Key(int, 256, 2, 2**10),
    "max_position_embeddings": Key(int, 131_072, 1, 2**30), "sliding_window": Key(int, 4096, 1, 2**30, null=True),
    "attention_bias": Key(bool, False), "tie_word_embeddings": Key(bool, True, null=True),
    "query_pre_attn_scalar": Key(float, 256, 1e-3, 1e6), "attn_logit_softcapping": Key(float, None, 0, 1e6, null=True),
    "final_logit_softcapping": Key(float, None, 0, 1e6, null=True),
    "use_bidirectional_attention": Key(bool, False, null=True),
    "rope_theta": Key(float, 1e6, 1, 1e15), "rope_local_base_freq": Key(float, 1e4, 1, 1e15)})
MODELS["gemma3_text"] = Gemma3
