"""Model: a decoder for Hugging Face checkpoints. Families llama, mistral, qwen2, qwen3.

Place in the loop: the student writes with it (rollout.py), the teacher scores with it (teacher.py), train.py
moves its weights.

    x = embed(tokens)
    per layer:  x = x + o_proj( softmax( rope(q) . rope(k) / sqrt(H) ) v )        q, k, v = projections of
                norm(x) x = x + down( silu(gate(norm(x))) * up(norm(x)) )
    hidden = norm(x);   logits = hidden . lm_head (or embed, when tied)

Axes: B sequences, T positions, D width, V vocabulary rows, H head width, R key/value heads.

Modules hold parameters and nothing else: the KV cache (attention.py) is an object that the caller owns. Parameter names
equal the checkpoint's, so loading (weights.py) is a strict copy. Weights may be stored in float32 while products run in
`compute_dtype`: each projection casts its weight to the dtype of its input, so gradients arrive and add up in
the stored dtype.

Not here: text, sampling, losses; sliding windows (`context` ends at the window instead), quantised
checkpoints, rope types other than default, linear and llama3.
"""
import contextlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attention import KVCache, Packing, attend, flash_ready
from support.errors import NotFinite
from support.model_config import ModelConfig

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of channels, float32 (H/2,). llama3 keeps the fast ones, slows the slow
    ones by `factor` and blends between (Llama 3.1)."""
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


class Linear(nn.Module):
    """y = x W^T + b, product in x's dtype; with LoRA, + scale * (x A^T) B^T (Hu 2021, arXiv:2106.09685)."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_out, n_in))
        self.bias = nn.Parameter(torch.empty(n_out)) if bias else None
        self.lora_A = self.lora_B = None
        self.lora_scale = 0.0           # alpha / rank; 0 = switched off

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        decoding = x.device.type == "cpu" and torch.compiler.is_compiling() and x.shape[1] == 1
        if decoding and (x.dtype != torch.float32 or len(x) >= 8):
            # a CPU packs the right factor of every product anew, so better not the weight (a tenth of a step of 8 to 32
            # rows; eagerly, what turning costs eats that up). Fewer float32 rows are not packed. The number of rows is
            # asked last: in a compiled layer of the update it would be one more thing to compile for.
            y = (weight @ x[:, 0].T).T[:, None]
            y = y if bias is None else y + bias
        else:
            y = F.linear(x, weight, bias)
        if self.lora_scale:
            y = y + F.linear(F.linear(x, self.lora_A.to(x.dtype)), self.lora_B.to(x.dtype)) * self.lora_scale
        return y

    def merged_weight(self) -> Tensor:
        if not self.lora_scale:
            return self.weight.detach()
        return (self.weight.float() + self.lora_scale * (self.lora_B.float() @ self.lora_A.float())).detach()


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean square in float32 (Zhang 2019, arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


def rotate(x_BTnH: Tensor, cos_BT1H: Tensor, sin_BT1H: Tensor) -> Tensor:
    """Rope in the checkpoints' layout: channel i turns with channel i + H/2 (not with its neighbour). The first half
    of sin is negated."""
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
        if c.model_type == "qwen3":
            self.q_norm, self.k_norm = (RMSNorm(c.head_dim, c.rms_norm_eps) for _ in "qk")

    def forward(self, x_BTD: Tensor, rope: tuple[Tensor, Tensor], cache: KVCache | None, mask: Tensor | None,
                packing: Packing | None) -> Tensor:
        B, T, _ = x_BTD.shape
        q, k, v = (proj(x_BTD).view(B, T, -1, self.head_dim) for proj in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k, v = cache.append(self.layer, k, v, whole=packing is not None)
        return self.o_proj(attend(q, k, v, mask, packing))


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

    def forward(self, x: Tensor, rope, cache, mask, packing) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, cache, mask, packing)
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    """The part that checkpoints call `model.`"""

    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(c.vocab_size, c.hidden_size), freeze=False)
        self.layers = nn.ModuleList(Layer(c, layer) for layer in range(c.num_hidden_layers))
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps)


class Transformer(nn.Module):
    """Tokens in, final hidden states out; `head` turns rows of those into logits, a few at a time.

    compute_dtype is the dtype of every product, whatever dtype the parameters are stored in.
    """

    def __init__(self, config: ModelConfig, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config, self.compute_dtype = config, compute_dtype
        self.title = "the model"       # its part in the run, for messages: the student, the teacher
        self.model = Body(config)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.rope_frequencies = rope_frequencies(config)
        self.gradient_checkpointing = False
        self.compiled: list = []            # the layers through torch.compile, for passes without a cache
        self.disk_dtype = torch.float32     # what save() writes: the dtype the checkpoint came in

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    def head_weight(self) -> nn.Parameter:
        """(V, D), float as stored: lm_head, or the embedding when tied."""
        return self.model.embed_tokens.weight if self.config.tie_word_embeddings else self.lm_head.weight

    def forward(self, tokens_BT: Tensor, cache: KVCache | None = None, lengths: list[int] | None = None) -> Tensor:
        """hidden_BTD after the last norm, compute_dtype. Causal; right padding needs no mask because nothing
        real looks at it. With a cache, row b's tokens continue slot b at its own length. With lengths, the one row
        holds sequences of these lengths end to end, which do not see each other."""
        B, T = tokens_BT.shape
        device, mask, packing = tokens_BT.device, None, None
        if lengths is not None:
            packing = Packing.of(lengths, device, self.packs)
            at_BT = torch.cat([torch.arange(n, device=device) for n in lengths])[None]
        elif cache is not None:
            at_BT = cache.length_B[:B, None] + torch.arange(T, device=device)
        else:
            at_BT = torch.arange(T, device=device)[None]
        if cache is not None and cache.longest > 0:
            if cache.flash and T == 1:
                packing = cache.packing(B)
            else:
                later = torch.arange(cache.longest + T, device=device) > at_BT[:, None, :, None]
                mask = torch.zeros(later.shape, dtype=self.compute_dtype, device=device).masked_fill(later, -math.inf)
        x = self.embed(tokens_BT).to(self.compute_dtype)
        rope = self.rope(at_BT)
        for layer in (cache is None and self.compiled) or self.model.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, rope, cache, mask, packing, use_reentrant=False)
            else:
                x = layer(x, rope, cache, mask, packing)
        return self.model.norm(x)

    def embed(self, tokens_BT: Tensor) -> Tensor:
        """Where there is a gradient to add to, only its rows of these tokens are touched: a dense gradient, zero almost
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

    def compile_layers(self) -> None:
        """Fuse what stands between the products of a layer, forward and backward. All layers share one compilation,
        at their first pass, and sequences of any length."""
        self.compiled = [torch.compile(layer, dynamic=True) for layer in self.model.layers]

    @property
    def packs(self) -> bool:
        """Are sequences end to end faster here than side by side?"""
        return flash_ready(self.device, self.compute_dtype, self.config.head_dim)

    def response_hidden(self, tokens_BT: Tensor, mask_BT: Tensor, lengths: list[int] | None = None) -> Tensor:
        """hidden_ND: for each token under the mask, in row-major order, the state that predicts it. The one
        place where positions shift by one: the state at t - 1 predicts the token at t, end to end too, as no
        sequence begins with a response token."""
        assert not mask_BT[:, 0].any(), "the first token of a sequence has nothing that predicts it"
        return self(tokens_BT, lengths=lengths)[:, :-1][mask_BT[:, 1:]]

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 logits over every row of the head, padding rows included."""
        return F.linear(hidden, self.head_weight().to(hidden.dtype)).float()

    def copy_as(self, dtype: torch.dtype) -> "Transformer":
        """A copy for reading only: LoRA merged, stored and multiplied in `dtype`."""
        with torch.device("meta"):
            copy = Transformer(self.config, dtype).to(dtype)
        copy.to_empty(device=self.device).requires_grad_(False)
        copy.title = self.title
        copy.refresh(self)
        return copy

    @torch.no_grad()
    def refresh(self, source: "Transformer") -> None:
        """Take over the source's present weights, cast once."""
        weights = source.weights()
        for name, parameter in self.named_parameters():
            parameter.copy_(weights[name])

    # LoRA

    def add_lora(self, rank: int, alpha: float, seed: int = 0) -> None:
        """Freeze everything and give all seven projections of every layer an adapter; B = 0, so nothing
        changes yet. The A matrices are drawn on the CPU, so that a seed gives the same adapter on every
        device."""
        rng = torch.Generator().manual_seed(seed)
        self.requires_grad_(False)
        for linear in self.projections():
            bound = 1 / math.sqrt(linear.weight.shape[1])
            a = torch.empty(rank, linear.weight.shape[1]).uniform_(-bound, bound, generator=rng)
            linear.lora_A = nn.Parameter(a.to(self.device))
            linear.lora_B = nn.Parameter(torch.zeros(linear.weight.shape[0], rank, device=self.device))
            linear.lora_scale = alpha / rank

    @contextlib.contextmanager
    def lora_off(self):
        """Inside, the model is the one that was loaded: the initial policy, without a second copy."""
        scales = [linear.lora_scale for linear in self.projections()]
        try:
            for linear in self.projections():
                linear.lora_scale = 0.0
            yield
        finally:
            for linear, scale in zip(self.projections(), scales):
                linear.lora_scale = scale

    def projections(self) -> list[Linear]:
        return [module for name, module in self.named_modules() if name.rsplit(".", 1)[-1] in PROJECTIONS]

    # weights in and out

    def init_weights(self, seed: int) -> "Transformer":
        """Fresh weights: normal(0, 0.02), norms 1, biases 0; residual outputs smaller by sqrt(2 layers)."""
        rng = torch.Generator().manual_seed(seed)
        small = 0.02 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                if parameter.dim() == 1:
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                else:
                    parameter.normal_(0.0, small if "o_proj" in name or "down_proj" in name else 0.02, generator=rng)
        return self

    def weights(self) -> dict[str, Tensor]:
        """Checkpoint name -> tensor as stored, LoRA merged in, detached."""
        merged = {f"{name}.weight": module.merged_weight()
                  for name, module in self.named_modules() if isinstance(module, Linear)}
        plain = {name: p.detach() for name, p in self.named_parameters() if "lora_" not in name}
        return {name: merged.get(name, tensor) for name, tensor in plain.items()}

    def save(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write config.json and model.safetensors (LoRA merged) in `dtype`, by default the dtype the
        checkpoint came in. The tokenizer's files are Tokenizer.save's business. Weights that are not finite as written
        (65,504 is the largest number of float16) are refused before anything is written."""
        dtype = dtype or self.disk_dtype
        folder = Path(folder)
        tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in self.weights().items()}
        for name, tensor in tensors.items():
            if not all_finite(tensor):
                raise NotFinite(f"{self.title} holds NaN or infinity: tensor {name}, as {dtype} on disk; it is not "
                                f"saved to {folder}; lower --lr or --max_grad_norm")
        folder.mkdir(parents=True, exist_ok=True)
        raw = {key: value for key, value in self.config.raw.items() if key not in ("torch_dtype", "dtype")}
        raw["dtype" if "rope_parameters" in raw else "torch_dtype"] = str(dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def all_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity: either shows in the extremes, which cost a twentieth of isfinite() on a CPU."""
    return all(math.isfinite(extreme) for extreme in tensor.detach().aminmax())


def set_threads(model: Transformer, threads: int = 0) -> None:
    """`threads` CPU threads, or one for a tiny model: threads that wait for each other cost such matrices
    more than they compute, ten times more on a busy machine."""
    if threads or sum(p.numel() for p in model.parameters()) < 10_000_000:
        torch.set_num_threads(threads or 1)
