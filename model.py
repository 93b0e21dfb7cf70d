"""Model: a decoder for Hugging Face checkpoints. Families llama, mistral, qwen2, qwen3.

The student writes with it (rollout.py), the teacher scores with it (teacher.py), train.py moves its weights.

    x = embed(tokens)
    per layer:  x = x + o_proj( softmax( rope(q) . rope(k) / sqrt(H) ) v )        q, k, v = projections of
                norm(x) x = x + down( silu(gate(norm(x))) * up(norm(x)) )
    hidden = norm(x);   logits = hidden . lm_head (or embed, when tied)

Axes: B sequences, T positions, D width, V vocabulary rows, Q query heads, R key/value heads, H head width.

Modules hold parameters and nothing else. What the queries of a pass look at is an object of its own, `keys`: CAUSAL for
whole sequences side by side, a KVCache for sequences that go on. Parameter names equal the checkpoint's, so loading
(support/weights.py) is a strict copy. Weights may be stored in float32 while products run in `compute_dtype`: each
projection casts its weight to the dtype of its input, so gradients arrive and add up in the stored dtype.

Not here: text, sampling, losses; quantised checkpoints, rope types other than default, linear and llama3. Further
families, sliding windows (without extras/ `context` ends at the window) and faster ways of attention and decoding are
in extras/.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.model_config import ModelConfig
from support.saving import Saves


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of channels, float32 (H/2,). llama3 keeps the fast ones, slows the slow ones by
    `factor` and blends between (Llama 3.1)."""
    rope, dim = config.rope, config.head_dim
    freq = 1.0 / rope["rope_theta"] ** (torch.arange(0, dim, 2, device="cpu").float() / dim)
    if rope["rope_type"] == "linear":
        return freq / rope["factor"]
    if rope["rope_type"] == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = rope["original_max_position_embeddings"] * freq / (2 * math.pi)    # rotations inside the old context
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        return keep * freq + (1 - keep) * freq / rope["factor"]
    return freq


# What the queries of a pass look at

class Causal:
    """Whole sequences side by side, (B, T). Padding stands on the right, where no real token looks: no mask."""

    def begin(self, tokens_BT: Tensor) -> tuple[Tensor, Tensor | None]:
        """(positions, int64 and broadcastable to (B, T); what every layer passes to attend() as `seen`)."""
        return torch.arange(tokens_BT.shape[1], device=tokens_BT.device)[None], None

    def attend(self, layer: int, q_BTQH: Tensor, k_BTRH: Tensor, v_BTRH: Tensor, seen: Tensor | None) -> Tensor:
        """softmax(q . k / sqrt(H)) v, (B, T, Q * H); every token looks at itself and those before it."""
        q, k, v = (x.transpose(1, 2) for x in (q_BTQH, k_BTRH, v_BTRH))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)


CAUSAL = Causal()


class KVCache(Causal):
    """Keys and values of `slots` sequences, each at its own length. The caller owns it and sets `length_B`.

    keys, values: per layer (slots, R, capacity, H): a CPU reads one head's keys up to four times as fast when they lie
    together. A forward pass with T tokens writes them at positions length_B ... length_B + T - 1 of the first B slots;
    the caller then advances length_B, which for slots that begin (longest 0) says before the pass how many tokens are
    real. Positions past a sequence's length hold leftovers: they are masked while decoding and overwritten in time.
    """

    def __init__(self, model: "Transformer", slots: int, capacity: int):
        c, device, dtype = model.config, model.device, model.compute_dtype
        shape, layers = (slots, c.num_key_value_heads, capacity, c.head_dim), range(c.num_hidden_layers)
        self.keys, self.values = ([torch.zeros(shape, dtype=dtype, device=device) for _ in layers] for _ in "kv")
        self.length_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.longest = 0        # length_B.max() as the host knows it, or more: how far a pass reads; 0: all slots empty

    def begin(self, tokens_BT: Tensor):
        """(positions; None while all slots are empty, else the mask of each query and where the new keys go)."""
        (B, T), device = tokens_BT.shape, tokens_BT.device
        if self.longest == 0:
            return super().begin(tokens_BT)
        at_BT = self.length_B[:B, None] + torch.arange(T, device=device)
        later = torch.arange(self.longest + T, device=device) > at_BT[:, None, :, None]
        mask_B1TS = torch.where(later, -math.inf, 0.0).to(self.keys[0].dtype)
        return at_BT, (mask_B1TS, (torch.arange(B, device=device)[:, None], slice(None), at_BT))

    def attend(self, layer: int, q_BTQH: Tensor, k_BTRH: Tensor, v_BTRH: Tensor, seen) -> Tensor:
        (B, T), keys, values = k_BTRH.shape[:2], self.keys[layer], self.values[layer]
        if seen is None:                # prefill of empty slots: nothing older to read
            keys[:B, :, :T], values[:B, :, :T] = k_BTRH.transpose(1, 2), v_BTRH.transpose(1, 2)
            return super().attend(layer, q_BTQH, k_BTRH, v_BTRH, None)
        mask_B1TS, at = seen
        # written through the whole tensors: in a compiled step, a write through a view would copy the cache
        keys[at], values[at] = k_BTRH, v_BTRH
        S = mask_B1TS.shape[-1]
        return masked_attention(q_BTQH, keys[:B, :, :S], values[:B, :, :S], mask_B1TS)

    def copy_rows(self, to: Tensor, source: "KVCache", rows: Tensor) -> None:
        """Slots `to` become copies of `source`'s slots `rows` (int64), before `longest`: one prefilled prompt serves
        all its samples, and a slot moves when `source` is this cache."""
        n = source.longest
        for mine, theirs in zip(self.keys + self.values, source.keys + source.values):
            mine[to, :, :n] = theirs[rows, :, :n]
        self.length_B[to] = source.length_B[rows]


def masked_attention(q_BTQH: Tensor, k_BRSH: Tensor, v_BRSH: Tensor, mask_B1TS: Tensor) -> Tensor:
    """(B, T, Q * H) of queries that go on in a cache of S positions, under an additive mask."""
    B, T, Q, H = q_BTQH.shape
    if T > 1:
        q_BQTH = q_BTQH.transpose(1, 2)
        out = F.scaled_dot_product_attention(q_BQTH, k_BRSH, v_BRSH, attn_mask=mask_B1TS, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)
    # the query heads that share a key stand as rows: enable_gqa with a mask has no fused CUDA kernel, a slow CPU one
    q_BRnH = q_BTQH.view(B, k_BRSH.shape[1], -1, H)
    return F.scaled_dot_product_attention(q_BRnH, k_BRSH, v_BRSH, attn_mask=mask_B1TS).view(B, 1, Q * H)


# Layers

class Linear(nn.Module):
    """y = x W^T + b, product in x's dtype."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean square in float32 (Zhang 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x_BTnH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """Rope in the checkpoints' layout: channel i turns with channel i + H/2. The first half of sin is negated."""
    return x_BTnH * cos_BT1H + x_BTnH.roll(x_BTnH.shape[-1] // 2, -1) * sin_BT1H


class Attention(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim = layer, c.head_dim
        q_width, kv_width = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_width, c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_width, c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_width, c.qkv_bias)
        self.o_proj = Linear(q_width, c.hidden_size, c.o_bias)
        if c.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.rms_norm_eps) for _ in "qk")

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen: Tensor | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (proj(x_BTD).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        return self.o_proj(keys.attend(self.layer, rotate(q, *rope), rotate(k, *rope), v, seen))


class MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, c: ModelConfig, layer: int):
        super().__init__()
        self.self_attn, self.mlp = Attention(c, layer), MLP(c)
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], keys: Causal, seen: Tensor | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, keys, seen)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """The part that checkpoints call `model.`"""

    def __init__(self, c: ModelConfig, layer_type: type):
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.hidden_size), freeze=False)
        self.layers = nn.ModuleList(layer_type(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(Saves, nn.Module):
    """Tokens in, final hidden states out; the head turns rows of those into logits, a few at a time.

    compute_dtype is the dtype of every product, whatever dtype the parameters are stored in.
    """
    layer_type = Layer          # a family with other layers is a subclass
    cache_type = KVCache        # what the sampler decodes with

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.title = "the model"            # its part in the run, for messages: the student, the teacher
        self.disk_dtype = torch.float32     # what save() writes: the dtype the checkpoint came in
        self.vocab_size = config.vocab_size     # real tokens; rows of the head past them are padding
        self.model = Body(config, self.layer_type)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.rope_frequencies = rope_frequencies(config)

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def head_weight(self) -> nn.Parameter:
        """(V, D), float as stored: lm_head, or the embedding when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def head(self) -> Tensor:
        """(vocab_size, D) in compute_dtype, without gradient. Padding rows are cut off: they stand for no token, and
        mass that leaks there would be lost (Qwen2.5: 151,665 tokens, 151,936 or 152,064 rows)."""
        return self.head_weight().detach()[:self.vocab_size].to(self.compute_dtype)

    def forward(self, tokens_BT: Tensor, keys: Causal = CAUSAL) -> Tensor:
        """hidden_BTD after the last norm, compute_dtype. With a KVCache as keys, row b's tokens continue slot b."""
        at_BT, seen = keys.begin(tokens_BT)
        x, rope = self.embed(tokens_BT).to(self.compute_dtype), self.rope(at_BT)
        for layer in self.model.layers:
            x = layer(x, rope, keys, seen)
        return self.model.norm(x)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Where .grad exists already, backward touches only its rows of these tokens: a dense gradient, zero almost
        everywhere, would cost three passes over (V, D) per micro-batch."""
        table = self.model.embed_tokens
        return F.embedding(tokens_BT, table.weight, sparse=torch.is_grad_enabled() and table.weight.grad is not None)

    def rope(self, at_BT: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, (B, T, 1, H), as rotate() wants them."""
        if self.rope_frequencies.device != at_BT.device:
            self.rope_frequencies = self.rope_frequencies.to(at_BT.device)      # once, not one copy per decode step
        angle_BT1H = (at_BT[..., None] * self.rope_frequencies)[:, :, None]
        cos, sin = angle_BT1H.cos().to(self.compute_dtype), angle_BT1H.sin().to(self.compute_dtype)
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)

    def response_hidden(self, tokens_BT: Tensor, mask_BT: Tensor, keys: Causal = CAUSAL) -> Tensor:
        """hidden_ND: for each token under the mask, in row-major order, the state that predicts it. The one place where
        positions shift by one: the state at t - 1 predicts the token at t."""
        assert not mask_BT[:, 0].any(), "the first token of a sequence has nothing that predicts it"
        return self(tokens_BT, keys)[:, :-1][mask_BT[:, 1:]]

    def read(self, rollout, sequence_b: Tensor, max_tokens: int):
        """Yield (hidden_nD, row_n), micro-batch by micro-batch of at most max_tokens tokens: the states that predict
        the response tokens of these sequences, and which of the rollout's N rows they are."""
        for tokens_bt, mask_bt, row_n in rollout.micro_batches(sequence_b, max_tokens):
            yield self.response_hidden(tokens_bt, mask_bt), row_n

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits over every row of the head, padding rows included."""
        return F.linear(hidden, self.head_weight().to(hidden.dtype)).float()

    def copy_as(self, dtype: torch.dtype) -> "Transformer":
        """A copy for reading only, stored and multiplied in `dtype`."""
        with torch.device("meta"):
            copy = type(self)(self.config, dtype).to(dtype)
        copy.to_empty(device=self.device).requires_grad_(False)
        copy.title, copy.vocab_size = self.title, self.vocab_size
        copy.refresh(self)
        return copy

    @torch.no_grad()
    def refresh(self, source: "Transformer") -> None:
        """Take over the source's present weights, cast once."""
        weights = source.weights()
        for name, parameter in self.named_parameters():
            parameter.copy_(weights[name])

    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, parameter) for name, parameter in self.named_parameters() if parameter.requires_grad]

    def weights(self) -> dict[str, Tensor]:
        """Checkpoint name -> tensor as stored, detached."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}


# model_type of config.json -> its class
MODELS = {"llama": Transformer, "mistral": Transformer, "qwen2": Transformer, "qwen3": Transformer}
