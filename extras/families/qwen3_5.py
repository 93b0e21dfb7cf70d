"""Qwen3.5, the text decoder: three layers in four carry a state of fixed size instead of keys and values.

    full_attention     x = x + o_proj( attention(q, k, v) * sigmoid(gate) )     q and gate: one projection, head by head
    linear_attention   x = x + out_proj( norm(delta rule(q, k, v, g, beta)) * silu(z) )
                       q, k, v = silu(causal convolution(in_proj_qkv(x)));  q and k have length 1, q / sqrt(K) is asked
                       beta = sigmoid(in_proj_b(x)),  g = -exp(A_log) softplus(in_proj_a(x) + dt_bias) <= 0

Gated delta rule (Yang 2024, arXiv:2412.06464), head by head, S a (K, V) matrix that begins at 0:

    u_t = beta_t (v_t - exp(g_t) S_{t-1}^T k_t);   S_t = exp(g_t) S_{t-1} + k_t u_t^T;   o_t = S_t^T q_t

S answers keys with values, and u_t is what it gets wrong about k_t. delta_step is that recurrence, delta_rule the same
for many tokens at once. Rope turns a quarter of a head's channels. A norm's weight in the file is what is added to 1,
but for the norm inside linear_attention.

Axes as in model.py; delta rule: H value heads, K width of a key, V of a value; n chunks of C tokens; c channels.
Not here: the vision tower and the layers that guess several tokens ahead (mtp), which are left out when a checkpoint is
loaded: what is saved is the text decoder.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.families.gemma3 import ShiftedNorm, scale_by_one
from extras.families.partial_rope import partial_frequencies, partial_rope, turned_in_part
from extras.families.text_part import TextPart, text_config
from model import MLP, MODELS, Attention, Causal, KVCache, Linear, RMSNorm, Transformer
from support.errors import UserError, shown
from support.model_config import FAMILIES, Family, Key, ModelConfig, Reader

CHUNK = 64      # tokens of delta_rule that are one triangular system; small ones leave the loop, large ones the system
KINDS = "linear_attention", "full_attention"


# config.json

SIZES = {
    "linear_conv_kernel_dim":   Key(int, 4, 1, 2**6),
    "linear_key_head_dim":      Key(int, 128, 1, 2**10),
    "linear_value_head_dim":    Key(int, 128, 1, 2**10),
    "linear_num_key_heads":     Key(int, 16, 1, 2**10),
    "linear_num_value_heads":   Key(int, 32, 1, 2**10),
}
KEYS = SIZES | {
    "head_dim":                 Key(int, 256, 2, 2**10),
    "num_key_value_heads":      Key(int, 4, 1, 2**10),
    "max_position_embeddings":  Key(int, 32768, 1, 2**30),
    "attention_bias":           Key(bool, False, null=True),
    "attn_output_gate":         Key(bool, True),
    "partial_rotary_factor":    Key(float, 0.25, 1e-3, 1),
    "full_attention_interval":  Key(int, 4, 1, 512),
    "layer_types":              Key(list, None, null=True),
}


def settings(read: Reader) -> dict:
    own, where = {key: read(key) for key in SIZES}, read.where
    keys, values = own["linear_num_key_heads"], own["linear_num_value_heads"]
    if values % keys:
        raise UserError(f"{where}: linear_num_value_heads {values} is no multiple of linear_num_key_heads {keys}")
    if not read("attn_output_gate"):
        raise UserError(f"{where}: attn_output_gate false is not supported: every Qwen3.5 gates its attention")
    layers, every = read("num_hidden_layers"), read("full_attention_interval")
    kinds = read("layer_types") or [KINDS[(layer + 1) % every == 0] for layer in range(layers)]
    if len(kinds) != layers or not all(kind in KINDS for kind in kinds) or KINDS[1] not in kinds:
        raise UserError(f"{where}: layer_types {shown(kinds, 90)} is not supported, only num_hidden_layers = {layers} "
                        f"times {' or '.join(map(repr, KINDS))}, the latter at least once")
    return dict(qk_norm=True, own={**own, "layer_types": kinds}, raw=text_config(read, "Qwen3_5ForCausalLM"))


# The delta rule

def delta_step(q_BHK: Tensor, k_BHK: Tensor, v_BHV: Tensor, g_BH: Tensor, beta_BH: Tensor, S_BHKV: Tensor
               ) -> tuple[Tensor, Tensor]:
    """(o_BHV, the next S_BHKV) of one token."""
    S_BHKV = S_BHKV * g_BH.exp()[..., None, None]
    u_BHV = beta_BH[..., None] * (v_BHV - torch.einsum("bhkv,bhk->bhv", S_BHKV, k_BHK))
    S_BHKV = S_BHKV + k_BHK[..., None] * u_BHV[..., None, :]
    return torch.einsum("bhkv,bhk->bhv", S_BHKV, q_BHK), S_BHKV


@torch.compiler.disable       # traced, its loop would be unrolled for every number of chunks
def delta_rule(q_BTHK: Tensor, k_BTHK: Tensor, v_BTHV: Tensor, g_BTH: Tensor, beta_BTH: Tensor, S_BHKV: Tensor
               ) -> tuple[Tensor, Tensor]:
    """(o_BTHV, S_BHKV after the last token), chunk by chunk. A token with g = beta = 0 leaves S as it is.

    Inside a chunk that begins with S_0, let G_i = g_1 + ... + g_i. Unrolled, the recurrence is
        S_i = exp(G_i) S_0 + sum_{j <= i} exp(G_i - G_j) k_j u_j^T
    and, put into the definition of u_i, it makes all u_i of the chunk the solution of one triangular system:
        u_i + beta_i sum_{j < i} exp(G_i - G_j) (k_i . k_j) u_j = beta_i v_i - beta_i exp(G_i) S_0^T k_i
    Its two right sides are solved without S_0, for all chunks at once: U = own - through S_0 (the WY form). What is
    left is a loop over chunks with four small products each. exp(G_i - G_j) is at most 1 where j <= i.
    """
    T, C = q_BTHK.shape[1], min(CHUNK, q_BTHK.shape[1])

    def cut(x_BTHw: Tensor) -> Tensor:
        return F.pad(x_BTHw.transpose(1, 2), (0, 0, 0, -T % C)).unflatten(2, (-1, C))
    q, k, v, g, beta = map(cut, (q_BTHK, k_BTHK, v_BTHV, g_BTH[..., None], beta_BTH[..., None]))      # B H n C w
    G_BHnC1 = g.cumsum(3)
    later_CC = torch.ones(C, C, dtype=torch.bool, device=g.device).triu(1)
    decay_BHnCC = (G_BHnC1 - G_BHnC1.mT).masked_fill(later_CC, -math.inf).exp()
    entered, left = G_BHnC1.exp(), (G_BHnC1[..., -1:, :] - G_BHnC1).exp()       # what S_0 lost; what u_j will lose
    system = (beta * k) @ k.mT * decay_BHnCC        # below its diagonal, which is taken as 1
    sides = torch.cat((beta * v, beta * entered * k), -1)
    own, through = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True).split(
        (v.shape[-1], k.shape[-1]), -1)
    within, asked, kept, o_BHCV = q @ k.mT * decay_BHnCC, entered * q, (left * k).mT, []
    for n in range(k.shape[2]):
        u_BHCV = own[:, :, n] - through[:, :, n] @ S_BHKV
        o_BHCV.append(asked[:, :, n] @ S_BHKV + within[:, :, n] @ u_BHCV)
        S_BHKV = entered[:, :, n, -1:] * S_BHKV + kept[:, :, n] @ u_BHCV
    return torch.cat(o_BHCV, 2)[:, :, :T].transpose(1, 2), S_BHKV


class DeltaCache(KVCache):
    """A KVCache for the attention layers alone; of each delta layer the state after a sequence's tokens, float32, and
    the inputs (slots, kernel - 1, c) that the convolution of the next token sees.

    Slots that begin hold as many tokens as length_B says; what stands behind those is padding, and no state sees it.
    """

    def __init__(self, model: Transformer, slots: int, capacity: int):
        super().__init__(model, slots, 0)
        own, kinds = model.config.own, model.config.own["layer_types"]
        (_, R, _, H), zeros = self.keys[0].shape, self.keys[0].new_zeros
        self.keys, self.values = ([zeros(slots, R, capacity, H) for _ in range(kinds.count(KINDS[1]))] for _ in "kv")
        fresh = [layer.linear_attn.fresh(slots, model.device, model.compute_dtype)
                 for layer in model.model.layers if hasattr(layer, "linear_attn")]
        self.inputs, self.states = ([pair[part] for pair in fresh] for part in (0, 1))

    def begin(self, tokens_BT: Tensor):
        assert self.longest or self.length_B[:len(tokens_BT)].all(), "length_B says first how long each prompt is"
        return super().begin(tokens_BT)

    def keep(self, layer: int, inputs_Btc: Tensor, S_BHKV: Tensor) -> None:
        """After a pass: inputs_Btc begins with the kernel - 1 inputs before it."""
        (B, t, c), last = inputs_Btc.shape, self.inputs[layer].shape[1]
        if self.longest:
            self.inputs[layer][:B] = inputs_Btc[:, t - last:]
        else:
            at_BL = self.length_B[:B, None] + torch.arange(last, device=inputs_Btc.device)
            self.inputs[layer][:B] = inputs_Btc.gather(1, at_BL[..., None].expand(-1, -1, c))
        self.states[layer][:B] = S_BHKV

    def copy_rows(self, to: Tensor, source: "DeltaCache", rows: Tensor) -> None:
        super().copy_rows(to, source, rows)
        for mine, theirs in zip(self.inputs + self.states, source.inputs + source.states):
            mine[to] = theirs[rows]


# Layers

class GatedAttention(Attention):
    """number: its place among the attention layers, and so in the cache."""

    def __init__(self, c: ModelConfig, number: int):
        super().__init__(c, number)
        self.q_proj = Linear(c.hidden_size, 2 * c.num_attention_heads * c.head_dim, c.qkv_bias)
        self.q_norm, self.k_norm = (ShiftedNorm(c.head_dim, c.rms_norm_eps) for _ in "qk")

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (proj(x_BTD).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, gate = q[:, :, ::2], q[:, :, 1::2].flatten(2)        # each head's query, then its gate
        q, k = (turned_in_part(norm(x), *rope) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        return self.o_proj(keys.attend(self.layer, q, k, v, seen) * gate.sigmoid())


class DeltaNet(nn.Module):
    """number: its place among the layers of its kind, and so in the cache."""

    def __init__(self, c: ModelConfig, number: int):
        super().__init__()
        self.number, own = number, c.own
        self.kernel, self.K, self.V = (own[f"linear_{name}_dim"] for name in ("conv_kernel", "key_head", "value_head"))
        self.key_heads, self.heads = own["linear_num_key_heads"], own["linear_num_value_heads"]
        self.widths = self.key_heads * self.K, self.key_heads * self.K, self.heads * self.V     # of q, k and v
        self.in_proj_qkv = Linear(c.hidden_size, sum(self.widths))
        self.in_proj_z = Linear(c.hidden_size, self.heads * self.V)
        self.in_proj_b, self.in_proj_a = (Linear(c.hidden_size, self.heads) for _ in "ba")
        self.out_proj = Linear(self.heads * self.V, c.hidden_size)
        self.conv1d = nn.Module()
        self.conv1d.weight = nn.Parameter(torch.empty(sum(self.widths), 1, self.kernel))
        self.A_log, self.dt_bias = (nn.Parameter(torch.empty(self.heads)) for _ in "Ad")
        self.norm = RMSNorm(self.V, c.rms_norm_eps)

    def fresh(self, B: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What a sequence begins with: no input before its first, and a state that answers nothing."""
        exact = torch.promote_types(dtype, torch.float32)
        return (torch.zeros(B, self.kernel - 1, sum(self.widths), device=device, dtype=dtype),
                torch.zeros(B, self.heads, self.K, self.V, device=device, dtype=exact))

    def forward(self, x_BTD: Tensor, keys: Causal) -> Tensor:
        (B, T, _), dtype, cached = x_BTD.shape, x_BTD.dtype, isinstance(keys, DeltaCache)
        before_Blc, S_BHKV = self.fresh(B, x_BTD.device, dtype)
        if cached and keys.longest:
            before_Blc, S_BHKV = keys.inputs[self.number][:B], keys.states[self.number][:B]
        exact = S_BHKV.dtype
        inputs_Btc = torch.cat((before_Blc, self.in_proj_qkv(x_BTD)), 1)
        mixed_BTc = F.silu(F.conv1d(inputs_Btc.mT, self.conv1d.weight.to(dtype), groups=sum(self.widths))).mT.to(exact)
        q, k, v = (x_BTw.unflatten(2, (heads, -1)) for x_BTw, heads in zip(
            mixed_BTc.split(self.widths, -1), (self.key_heads, self.key_heads, self.heads)))
        q, k = (unit(x).repeat_interleave(self.heads // self.key_heads, 2) for x in (q, k))
        beta_BTH = self.in_proj_b(x_BTD).to(exact).sigmoid()
        # weights that are float32 count as the sampler's copy of them does, rounded to the dtype of products
        A_log, dt_bias, norm = (p.to(dtype).to(exact) for p in (self.A_log, self.dt_bias, self.norm.weight))
        g_BTH = -A_log.exp() * F.softplus(self.in_proj_a(x_BTD).to(exact) + dt_bias)
        if cached and not keys.longest:         # prompts that begin: what stands behind them changes no state
            real_BT1 = torch.arange(T, device=x_BTD.device)[:, None] < keys.length_B[:B, None, None]
            beta_BTH, g_BTH = beta_BTH * real_BT1, g_BTH * real_BT1
        sides = q * self.K ** -0.5, k, v, g_BTH, beta_BTH
        if T == 1:
            o, S_BHKV = delta_step(*(x.squeeze(1) for x in sides), S_BHKV)
        else:
            o, S_BHKV = delta_rule(*sides, S_BHKV)
        if cached:
            keys.keep(self.number, inputs_Btc, S_BHKV)
        o_BTHV = F.rms_norm(o.view(B, T, self.heads, self.V), (self.V,), norm, self.norm.eps)
        gate_BTw = F.silu(self.in_proj_z(x_BTD).to(exact))
        return self.out_proj((o_BTHV.flatten(2) * gate_BTw).to(dtype))


def unit(x: Tensor) -> Tensor:
    """Of length 1; the epsilon is that of the family's code."""
    return x * (x.square().sum(-1, keepdim=True) + 1e-6).rsqrt()


class Qwen35Layer(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        kinds = c.own["layer_types"]
        self.kind, number = kinds[layer], kinds[:layer].count(kinds[layer])
        if self.kind == "linear_attention":
            self.linear_attn = DeltaNet(c, number)
        else:
            self.self_attn = GatedAttention(c, number)
        self.mlp = MLP(c)
        self.input_layernorm, self.post_attention_layernorm = (ShiftedNorm(c.hidden_size, c.rms_norm_eps) for _ in "ip")

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen) -> Tensor:
        normed = self.input_layernorm(x)
        if self.kind == "linear_attention":
            x = x + self.linear_attn(normed, keys)
        else:
            x = x + self.self_attn(normed, rope, keys, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen35(TextPart, Transformer):
    layer_type, cache_type = Qwen35Layer, DeltaCache

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__(config, compute_dtype)
        self.model.norm = ShiftedNorm(config.hidden_size, config.rms_norm_eps)
        self.rope_frequencies = partial_frequencies(config)

    @torch.no_grad()
    def init_weights(self, seed: int):
        """The norms scale by 1; decays spread as in Mamba 2: exp(A_log) from 1/64 to 16, dt_bias 1."""
        scale_by_one(super().init_weights(seed))
        for module in self.modules():
            if isinstance(module, DeltaNet):
                module.out_proj.weight /= math.sqrt(2 * self.config.num_hidden_layers)
                module.A_log.copy_(torch.linspace(1 / 64, 16, module.heads).log())
                module.dt_bias.fill_(1.0)
        return self


FAMILIES["qwen3_5_text"] = Family(KEYS, settings, partial_rope)
MODELS["qwen3_5_text"] = Qwen35
