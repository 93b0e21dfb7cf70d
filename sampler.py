"""Sampler: from the hidden states of a decode step to one token per row.

Place in the loop: inside rollout.py, once per token. Axes: B rows, V vocabulary, D width, K blocks, W entries of one.
Not here: which rows live, and when they end (rollout.py).
"""
import torch
from torch import Tensor

SAMPLE_ENTRIES = 2**26, 2**18       # logits per pass of the sampler, GPU and CPU: 256 MB; what stays in a core's cache


def prepacked(head_VD: Tensor) -> Tensor | None:
    """The head in the order in which a CPU's product of a few rows reads it; MKL would bring it there anew at every
    step (151,936 words of width 256, 8 rows: 13 ms instead of 39; bfloat16 5 instead of 12). The operators are those by
    which torch.compile freezes a weight. None where there are none: a GPU, float64, some processors."""
    if head_VD.device.type != "cpu" or "AVX" not in torch.backends.cpu.get_cpu_capability():
        return None
    try:
        return torch.ops.mkldnn._reorder_linear_weight(head_VD)
    except (AttributeError, RuntimeError):
        return None


def project(hidden_BD: Tensor, head_VD: Tensor, packed: Tensor | None, out: Tensor) -> Tensor:
    """Logits (B, V) = hidden . head. packed: the head prepacked(), for up to 32 rows; more are written to `out`, the
    same memory every step, since on a CPU paging 10 MB in costs as much as a fifth of the product."""
    if packed is not None and len(hidden_BD) <= 32:
        return torch.ops.mkldnn._linear_pointwise(hidden_BD, packed, None, "none", [], "")
    return torch.mm(hidden_BD, head_VD.T, out=out)


def sample(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row: (token_B int64, its logp_B, entropy_B), the latter two float32 at `temperature`.

    Exact inverse CDF of one uniform number in [0, 1) per row, in two levels: sums over blocks of about
    sqrt(V) entries, then inside the one block that is hit. At 152k words this is many times cheaper than a
    multinomial draw. temperature 0 = argmax, logp and entropy then at temperature 1.
    """
    V, scale = logits_BV.shape[1], 1 / (temperature or 1.0)
    width = max(1, int(V ** 0.5))
    mass_BK, top_B1, mean_B1 = block_masses(logits_BV, scale, width)
    cdf_BK = mass_BK.cumsum(-1)
    total_B1 = cdf_BK[:, -1:]
    if temperature == 0:
        token_B1 = logits_BV.argmax(-1, keepdim=True)
    else:
        target_B1 = uniform_B[:, None] * total_B1
        block_B1 = first_above(cdf_BK, target_B1)
        before_B1 = torch.where(block_B1 > 0, cdf_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
        id_BW = block_B1 * width + torch.arange(width, device=logits_BV.device)
        x_BW = logits_BV.gather(1, id_BW.clamp(max=V - 1)).float() * scale - top_B1
        inside_cdf_BW = x_BW.exp().masked_fill(id_BW >= V, 0.0).cumsum(-1)
        # clamped: logits that are not numbers hit no entry; generate() finds them by their log-prob
        inside_B1 = first_above(inside_cdf_BW, (target_B1 - before_B1).clamp(min=0))
        token_B1 = (block_B1 * width + inside_B1).clamp(max=V - 1)
    logp_B1 = logits_BV.gather(1, token_B1).float() * scale - top_B1 - total_B1.log()
    return token_B1.squeeze(1), logp_B1.squeeze(1), (total_B1.log() - mean_B1 / total_B1).squeeze(1)


def block_masses(logits_BV: Tensor, scale: float, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """With x = scale * logits and p = exp(x - max x): (p summed over blocks of `width` entries, max x, the sum
    of p (x - max x)), float32. A few rows at a time through the same two buffers: on a CPU they stay in cache,
    and fresh memory would cost more than the arithmetic."""
    B, V = logits_BV.shape
    rows, whole = max(1, SAMPLE_ENTRIES[logits_BV.device.type == "cpu"] // V), V // width * width
    scratch_2bV = torch.empty(2, min(rows, B), V, device=logits_BV.device)
    parts = []
    for logits_bV in logits_BV.split(rows):
        x_bV, p_bV = scratch_2bV[:, :len(logits_bV)]
        x_bV.copy_(logits_bV)
        if scale != 1:
            x_bV.mul_(scale)
        top_b1 = x_bV.amax(-1, keepdim=True)
        torch.exp(x_bV.sub_(top_b1), out=p_bV)
        mass_bK = p_bV[:, :whole].unflatten(1, (-1, width)).sum(-1)
        rest_b1 = p_bV[:, whole:].sum(-1, keepdim=True)
        parts.append((torch.cat([mass_bK, rest_b1], 1), top_b1, x_bV.mul_(p_bV).sum(-1, keepdim=True)))
    return tuple(torch.cat(part) for part in zip(*parts))


def first_above(cdf_BK: Tensor, target_B1: Tensor) -> Tensor:
    """Index of the first entry of each increasing row that exceeds the target. A target that rounding pushed
    up to the row's total is taken just below it, so the entry hit always has a mass above zero."""
    below_B1 = torch.nextafter(cdf_BK[:, -1:], torch.zeros_like(target_B1))
    return torch.searchsorted(cdf_BK, torch.minimum(target_B1, below_B1), right=True)


def one_event(drawn: tuple[Tensor, Tensor, Tensor], logits_BV: Tensor, ids_S: Tensor, temperature: float
              ) -> tuple[Tensor, Tensor, Tensor]:
    """What sample() has drawn, said of the distribution in which the words ids_S are one (losses.OneStop): where one
    of them was drawn the log-prob is that of all together, and the entropy does not ask which."""
    token_B, logp_B, entropy_B = drawn
    scale = 1 / (temperature or 1.0)
    norm_B1 = logits_BV.gather(1, token_B[:, None]).float() * scale - logp_B[:, None]
    logp_BS = logits_BV[:, ids_S].float() * scale - norm_B1
    mass_B = logp_BS.logsumexp(-1)
    inside_B = (token_B[:, None] == ids_S).any(1)
    entropy_B = entropy_B + (logp_BS.exp() * logp_BS).sum(-1) - mass_B.exp() * mass_B
    return token_B, torch.where(inside_B, mass_B, logp_B), entropy_B
