"""Chunk credit: from the log-ratio of a chunk to the credit of its tokens.

A chunk (align.py) holds the same bytes on both sides, cut into tokens that differ: D = log q(chunk) - log b(chunk)
compares like with like, but belongs to no single token. CREDIT is a table of rules for what each student token
gets of it. A chunk of one token on both sides has nothing to share: there every rule is plain on-policy
distillation, bit for bit.

Method: Niu et al. 2026, arXiv:2606.09456 (chunks, `prop`); `prefix` applies the byte-prefix masses of BPM,
arXiv:2607.22334, to the sampled tokens.

Axes: n student tokens and m teacher tokens of the step, C its chunks, c cuts (a student token ends inside a
teacher token), M rows of the teacher's distributions, V its vocabulary. b the student when it sampled, q the
teacher. Sums over chunks are float64. Nothing here carries a gradient.

Not here: which tokens form a chunk (align.py); the forward passes behind q, and what a step does with the result
(crossing.py); advantages of tokens (losses.py).
"""
from typing import NamedTuple

import torch
from torch import Tensor

SLICE_ENTRIES = 4_194_304   # log-probs that slice_mass gathers at a time: about 130 MB with their indices


# Chunks as sums

def number_of_chunks(*sides: Tensor) -> int:
    return 1 + max([int(chunk_n.max()) for chunk_n in sides if len(chunk_n)] + [0])


def chunk_sums(value_n: Tensor, chunk_n: Tensor, size: int) -> Tensor:
    """(size,): the sum of each chunk's values, added in float64; a token of chunk -1 is in none."""
    sums = torch.zeros(size + 1, dtype=torch.float64, device=value_n.device)
    return sums.index_add(0, torch.where(chunk_n >= 0, chunk_n, size), value_n.double())[:size]


# Rules

class Shares(NamedTuple):
    """What a credit rule sees of every student token: n rows, float64."""
    log_b: Tensor       # its own log-prob
    gap: Tensor         # D = log q(chunk) - log b(chunk), clamped
    own: Tensor         # log b(chunk)
    size: Tensor        # student tokens in the chunk
    prefix: Tensor | None


def whole_gap(s: Shares) -> Tensor:
    """A = D on every token: the chunk is one action of several tokens, and the policy gradient of its reverse KL
    gives each of them the whole return."""
    return s.gap


def proportional(s: Shares) -> Tensor:
    """A = D log b / log b(chunk).  Niu et al. 2026, arXiv:2606.09456: surprising tokens answer for the gap, forced
    ones for nothing. Sums to D, which the score function does not ask for: biased."""
    weight = torch.where(s.own == 0, 1 / s.size, s.log_b / torch.where(s.own == 0, 1.0, s.own))
    return s.gap * weight


def equal_gap(s: Shares) -> Tensor:
    """A = D / tokens: `chunk`, with long chunks weighted down."""
    return s.gap / s.size


def equal_teacher(s: Shares) -> Tensor:
    """A = log q(chunk) / tokens - log b: every token is held against the same teacher log-prob. Biased."""
    return (s.own + s.gap) / s.size - s.log_b


def prefix(s: Shares) -> Tensor:
    """A = r - log b, r the teacher's own log-prob of the token's bytes given those before (prefix_scores)."""
    return s.prefix - s.log_b


CREDIT = {"chunk": whole_gap, "prop": proportional, "shift": equal_gap, "uniform": equal_teacher, "strict": whole_gap,
          "prefix": prefix}
CLAMPED_AFTER = ("prop", "prefix")      # per token: as the paper's code does; no D enters prefix at all


def credit(mode: str, student_n: Tensor, teacher_m: Tensor, student_chunk_n: Tensor, teacher_chunk_m: Tensor, *,
           prefix_n: Tensor | None = None, clamp: float = 0.0, max_chunk: int = 0) -> tuple[Tensor, Tensor]:
    """(effective_n, scored_n): what the teacher says about each student token, as a log-prob whose difference from
    student_n is the advantage, and whether it says anything (bool; effective = student where not).

    student_n, teacher_m            log b and log q of the two sides' tokens, all responses of the step
    student_chunk_n, teacher_chunk_m    int64, a chunk has one number in the whole step; -1 = masked
    mode            a key of CREDIT; strict scores 1:1 chunks only, prefix needs prefix_n
    clamp           bounds D, or the token's advantage (CLAMPED_AFTER); 0 = off
    max_chunk       chunks with more tokens on either side are masked; 0 = none

    A 1:1 chunk gives the teacher's log q itself, not a sum that only rounds to it.
    """
    size, at = number_of_chunks(student_chunk_n, teacher_chunk_m), student_chunk_n.clamp(min=0)
    mine_n, theirs_n = (chunk_sums(torch.ones_like(value), chunk, size)[at]
                        for value, chunk in ((student_n, student_chunk_n), (teacher_m, teacher_chunk_m)))
    single_n = (mine_n == 1) & (theirs_n == 1)
    scored_n = (student_chunk_n >= 0) & (theirs_n > 0)
    if max_chunk:
        scored_n &= (mine_n <= max_chunk) & (theirs_n <= max_chunk)
    if mode == "strict":
        scored_n &= single_n
    own_n = chunk_sums(student_n, student_chunk_n, size)[at]
    teacher_n = chunk_sums(teacher_m, teacher_chunk_m, size)[at]
    gap_n, bound, after = teacher_n - own_n, clamp or torch.inf, mode in CLAMPED_AFTER
    shared_n = gap_n if after else gap_n.clamp(-bound, bound)
    advantage_n = CREDIT[mode](Shares(student_n.double(), shared_n, own_n, mine_n.clamp(min=1), prefix_n))
    if after:
        advantage_n = advantage_n.clamp(-bound, bound)
    effective_n = torch.where(single_n & (gap_n.abs() <= bound), teacher_n, student_n.double() + advantage_n)
    return torch.where(scored_n, effective_n.to(student_n.dtype), student_n), scored_n


# The teacher's log-prob of a byte prefix

def slice_mass(logp_MV: Tensor, order: Tensor, rows: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    """(c,): log of the probability that row rows[i] of logp_MV gives to the tokens order[lo[i]:hi[i]], cut by cut.

    Gathers those entries alone: c x V would be as large as the logits, while most slices are short. Not all are
    (a third of a vocabulary starts with a space), so SLICE_ENTRIES are taken at a time.
    """
    if not len(rows):
        return logp_MV.new_zeros(0)
    _, sizes = torch.unique_consecutive((hi - lo).cumsum(0) // SLICE_ENTRIES, return_counts=True)
    mass = []
    for row, start, end in zip(*(part.split(sizes.tolist()) for part in (rows, lo, hi))):
        width = end - start
        cut = torch.arange(len(row), device=row.device).repeat_interleave(width)
        place = torch.arange(len(cut), device=row.device) - (width.cumsum(0) - width)[cut] + start[cut]
        logp = logp_MV[row[cut], order[place]]
        top_c = torch.full((len(row),), -torch.inf, dtype=logp.dtype, device=logp.device)
        top_c = top_c.scatter_reduce(0, cut, logp, "amax")
        mass.append(top_c + torch.zeros_like(top_c).index_add(0, cut, (logp - top_c[cut]).exp()).log())
    return torch.cat(mass)


def prefix_scores(teacher_m: Tensor, student_chunk_n: Tensor, teacher_chunk_m: Tensor, cut_i: Tensor, cut_j: Tensor,
                  mass_c: Tensor) -> Tensor:
    """(n,): r_i = log M(e_i) - log M(e_{i-1}), M(b) the teacher's probability, along the tokens it read, that the
    text starts with these b bytes; 0 on masked tokens. Sums to log q over a chunk; no r is positive.

    cut_i, cut_j, mass_c    student token cut_i ends inside teacher token cut_j, and tokens that start with the same
                            bytes have log-mass mass_c there (Reading.cuts, slice_mass)
    Every scored token that does not end its chunk has a cut, since ends that both share are chunk ends.
    """
    size = number_of_chunks(student_chunk_n, teacher_chunk_m)
    value_m = torch.where(teacher_chunk_m >= 0, teacher_m, 0.0).double()
    before_m, at_m = value_m.cumsum(0) - value_m, teacher_chunk_m.clamp(min=0)
    place_m = torch.arange(len(value_m), device=value_m.device)
    first_C = torch.full((size,), len(value_m), device=value_m.device).scatter_reduce(
        0, at_m, torch.where(teacher_chunk_m >= 0, place_m, len(value_m)), "amin")
    # log M from the chunk's start on, in float64: its sums start anywhere in the step
    level_n = chunk_sums(teacher_m, teacher_chunk_m, size)[student_chunk_n.clamp(min=0)]
    level_n[cut_i] = before_m[cut_j] - before_m[first_C[at_m[cut_j]]] + mass_c.double()
    at = (student_chunk_n >= 0).nonzero().squeeze(1)
    level, chunk = level_n[at], student_chunk_n[at]
    level[1:] -= torch.where(chunk[1:] == chunk[:-1], level[:-1], 0.0)
    return torch.zeros_like(level_n).index_copy(0, at, level).to(teacher_m.dtype)
