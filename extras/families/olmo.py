"""OLMo 2 (arXiv:2501.00656) and OLMo 3: norms behind attention and MLP instead of before them, and over all query and
all key heads at once. OLMo 3 has sliding layers, and YaRN (arXiv:2309.00071) on its full ones.
"""
import math

import torch
from torch import Tensor, nn

from extras.families.sliding import FULL, KEYS, TwoRopes, ropes, settings, within
from model import MLP, MODELS, Attention, Causal, RMSNorm, Transformer, rotate
from support.model_config import FAMILIES, ROPE_KEYS, Family, Key, ModelConfig, Reader, head_width


class OlmoAttention(Attention):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__(c, layer)
        self.q_norm, self.k_norm = (RMSNorm(len(proj.weight), c.rms_norm_eps) for proj in (self.q_proj, self.k_proj))

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k = self.q_norm(self.q_proj(x_BTD)), self.k_norm(self.k_proj(x_BTD))
        q, k, v = (x.view(B, T, -1, self.head_dim) for x in (q, k, self.v_proj(x_BTD)))
        return self.o_proj(keys.attend(self.layer, rotate(q, *rope), rotate(k, *rope), v, seen))


class Olmo2Layer(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = OlmoAttention(c, layer), MLP(c)
        self.post_attention_layernorm, self.post_feedforward_layernorm = (RMSNorm(c.hidden_size, c.rms_norm_eps)
                                                                          for _ in range(2))

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(x, rope, keys, seen))
        return x + self.post_feedforward_layernorm(self.mlp(x))


class Olmo3Layer(Olmo2Layer):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__(c, layer)
        self.kind, self.window = c.own["kinds"][layer], c.own["windows"][layer]

    def forward(self, x: Tensor, rope: dict, keys: Causal, seen) -> Tensor:
        return super().forward(x, rope[self.kind], within(keys, self.window), seen)


class Olmo2(Transformer):
    layer_type = Olmo2Layer


class Olmo3(TwoRopes):
    layer_type = Olmo3Layer

    def frequencies_of(self, rope: dict) -> Tensor:
        plain = super().frequencies_of(rope)
        return yarn(plain, rope) if rope["rope_type"] == "yarn" else plain

    def rope(self, at_BT: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        full, found = self.config.own["ropes"][FULL], super().rope(at_BT)
        if full["rope_type"] == "yarn":     # queries and keys of longer contexts are sharpened as well
            found[FULL] = tuple(part * yarn_sharpness(full) for part in found[FULL])
        return found


def yarn(plain: Tensor, rope: dict) -> Tensor:
    """The plain angles per position of each pair of channels, (dim/2,), after YaRN: channels that turn more than
    beta_fast times in the old context keep their pace, those that turn less than beta_slow times go `factor` times
    slower, and between them (by the channel's number) the two are blended."""
    dim = 2 * len(plain)

    def channel(turns: float) -> float:
        return dim * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi)) \
            / (2 * math.log(rope["rope_theta"]))
    first = max(math.floor(channel(rope.get("beta_fast") or 32.0)), 0)
    last = min(math.ceil(channel(rope.get("beta_slow") or 1.0)), dim - 1)
    slow = ((torch.arange(dim // 2, device="cpu") - first) / max(last - first, 1e-3)).clamp(0, 1)
    return plain * (1 - slow) + plain / rope["factor"] * slow


def yarn_sharpness(rope: dict) -> float:
    return rope.get("attention_factor") or 0.1 * math.log(max(rope["factor"], 1)) + 1


def olmo2(read: Reader) -> dict:
    q = read("num_attention_heads")
    heads = q + (read("num_key_value_heads") or q)
    return {"own": {"normed": 2 * read("hidden_size") + heads * head_width(read)}}      # columns, for the memory plan


def olmo3(read: Reader) -> dict:
    return settings(read, lambda layer: (layer + 1) % 4, ropes=ropes(read, "rope_theta"), **olmo2(read)["own"])


SHARED = {"attention_bias": Key(bool, False), "rms_norm_eps": Key(float, 1e-5, 0, 1)}
ROPE_KEYS["yarn"] = ("factor", "original_max_position_embeddings")
FAMILIES["olmo2"], MODELS["olmo2"] = Family(keys=SHARED, settings=olmo2), Olmo2
FAMILIES["olmo3"], MODELS["olmo3"] = Family(settings=olmo3, rope=lambda read: ropes(read, "rope_theta")[FULL], keys={
    **SHARED, "layer_types": KEYS["layer_types"], "rope_theta": Key(float, 5e5, 1, 1e15),
    "rope_type": Key(str, choices=("default", "linear", "llama3", "yarn"))}), Olmo3
