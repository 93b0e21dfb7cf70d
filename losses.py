"""Losses: at each token of the step, how far is the student from the teacher?

Place in the loop:  rollout -> teacher -> credit -> [LOSSES] -> optimizer.  Imports torch only.

This file sees ROWS. One row = one response token; prompts, padding and the shift by one are gone before a row
exists, so nothing here takes a mask. DIVERGENCES is a table of pure functions (Rows, LossArgs) -> loss_N, one
number per row, not reduced. How much a row counts, and the advantage of a policy gradient, come from
credit.py.

Axes: N rows, V real vocabulary, K support, D student width, E teacher width.
p student, q teacher, b behaviour (the student when it sampled), a the sampled token. Natural logs; float32,
or float64 when given. reverse_kl = KL(p||q), forward_kl = KL(q||p).

What differentiating each sampled estimate of KL(p||q) really does, in expectation over a ~ p
(tests/test_losses.py):
    k1 = log p(a) - log q(a)       right value, gradient exactly zero             not offered
    k2 = (log p(a) - log q(a))^2/2 wrong value, gradient of KL(p||q)              offered
    k3 = q/p - 1 - log q/p         right value, gradient of KL(q||p)              not offered
    policy_gradient with A = log q(a) - log b(a), held fixed: gradient of KL(p||q) when b = p

Add a loss: write the function, give it a line in the table, test its value, gradient and limits.
"""
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


def opt(default, help: str, choices: tuple | None = None):
    """A dataclass field that carries its own --help line."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class LossArgs:
    beta: float = opt(0.5, "jsd: weight of the teacher in the mixture, strictly between 0 and 1")
    skew: float = opt(0.1, "skewed KLs: share of the other distribution mixed in, 0 <= skew < 1")
    topk: int = opt(16, "top-k losses: size of each side's support")
    support: str = opt("student", "top-k losses: whose top-k tokens", ("student", "teacher", "union", "intersection"))
    topk_form: str = opt("truncated", "top-k losses: what happens to the mass outside the support",
                         ("renormalised", "truncated", "tail"))
    clip: float = opt(0.2, "policy_gradient: the ratio p(a)/b(a) is kept in [1 - clip, 1 + clip]")
    entry_clip: float = opt(0.0, "full-vocabulary divergences: cap on each vocabulary entry's term (OPSD: "
                                 "0.05); 0 = off")
    token_clip: float = opt(0.0, "full-vocabulary divergences: tokens above this are scaled down to it; 0 = off")
    eopd_alpha: float = opt(1.0, "eopd: weight of the forward KL where the teacher is unsure")
    eopd_entropy: float = opt(0.8, "eopd: teacher entropy in nats above which the forward KL is added")
    eopd_renormalise: bool = opt(False, "eopd: divide the teacher's top-k by its mass (readings of the paper differ)")


class Rows(NamedTuple):
    """What a divergence may look at. Gradient flows through student_NV only."""
    student_NV: Tensor                      # log p
    token_N: Tensor                         # a, int64
    teacher_NV: Tensor | None = None        # log q; None when there is no teacher
    behavior_N: Tensor | None = None        # log b(a), stored by the sampler
    advantage_N: Tensor | None = None       # from ADVANTAGES
    shared: "tuple[Tensor, Tensor] | OneStop | None" = None     # what both sides have in common, when not all: ids of
    #                           the tokens (another tokenizer), or which stop tokens mean the same
    student_before_N: Tensor | None = None  # then, for gold: log b and log q of the tokens that stand before
    teacher_before_N: Tensor | None = None  # this row in its chunk

    def student_N(self) -> Tensor:
        return self.student_NV.gather(1, self.token_N[:, None]).squeeze(1)

    def teacher_N(self) -> Tensor:
        return self.teacher_NV.gather(1, self.token_N[:, None]).squeeze(1)


def upcast(x: Tensor) -> Tensor:
    """Log-softmax needs float32 at least; float64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def vocab_sum(term_NV: Tensor, args: LossArgs) -> Tensor:
    """Sum over the vocabulary, with one of two brakes on tokens where teacher and student are far apart.

    entry_clip t   min(term, t) before the sum.  OPSD, Zhao 2026, arXiv:2601.18734 v3, section 3.2. A clipped
                   term loses its gradient but keeps its share of the normaliser: for the forward KL the
                   gradient is Q p - q on the unclipped tokens U and +Q p on clipped ones, Q = q(U). What the
                   teacher wants to raise most is pushed DOWN, the minimum is below 0 and lies away from q. It
                   acts as a gate: small disagreements are distilled, large ones refused.
    token_clip t   the sum times min(1, t / sum), the factor held fixed: same direction, bounded size. Our
                   alternative.
    """
    if args.entry_clip:
        term_NV = term_NV.clamp(max=args.entry_clip)
    sum_N = term_NV.sum(-1)
    return sum_N * (args.token_clip / sum_N.detach().clamp(min=args.token_clip)) if args.token_clip else sum_N


# Divergences over the whole vocabulary. Zero iff p == q; the teacher gets no gradient because its rows carry
# none.

def reverse_kl(r: Rows, args: LossArgs) -> Tensor:
    """sum_v p (log p - log q) = KL(p||q), exact, mode-seeking.  Gu 2023, arXiv:2306.08543; GKD,
    arXiv:2306.13649.

    Gradient also flows through the leading p: the true derivative p (log p/q - KL) on the logits, no
    estimator.
    """
    return vocab_sum(r.student_NV.exp() * (r.student_NV - r.teacher_NV), args)


def forward_kl(r: Rows, args: LossArgs) -> Tensor:
    """sum_v q (log q - log p) = KL(q||p), exact, mass-covering; gradient p - q on the logits.  Hinton
    2015."""
    return vocab_sum(r.teacher_NV.exp() * (r.teacher_NV - r.student_NV), args)


def jsd(r: Rows, args: LossArgs) -> Tensor:
    """beta KL(q||m) + (1-beta) KL(p||m), m = beta q + (1-beta) p.  GKD, Agarwal 2023, arXiv:2306.13649, eq.
    1.

    Limits: jsd/beta -> KL(q||p) as beta -> 0, jsd/(1-beta) -> KL(p||q) as beta -> 1, so jsd itself -> 0 at
    both ends: beta acts as a learning rate there. beta of 0 or 1 is refused instead of silently becoming
    another loss.
    """
    if not 0 < args.beta < 1:
        raise ValueError(f"jsd needs 0 < beta < 1, not {args.beta}: use forward_kl or reverse_kl for the ends")
    beta = torch.as_tensor(args.beta, dtype=r.student_NV.dtype, device=r.student_NV.device)
    m_NV = torch.logaddexp(r.teacher_NV + beta.log(), r.student_NV + (1 - beta).log())
    teacher_NV, student_NV = (x_NV.exp() * (x_NV - m_NV) for x_NV in (r.teacher_NV, r.student_NV))
    return vocab_sum(beta * teacher_NV + (1 - beta) * student_NV, args)


def log_mix(main_NV: Tensor, other_NV: Tensor, share: float) -> Tensor:
    """log((1-share) main + share other)."""
    if not 0 <= share < 1:
        raise ValueError(f"skewed KLs need 0 <= skew < 1, not {share}")
    if share == 0:
        return main_NV
    share = torch.as_tensor(share, dtype=main_NV.dtype, device=main_NV.device)
    return torch.logaddexp(main_NV + (1 - share).log(), other_NV + share.log())


def skewed_forward_kl(r: Rows, args: LossArgs) -> Tensor:
    """KL(q || (1-skew) p + skew q).  DistiLLM, Ko 2024, arXiv:2402.03898. skew 0 = forward_kl; bounded by
    -log skew."""
    return vocab_sum(r.teacher_NV.exp() * (r.teacher_NV - log_mix(r.student_NV, r.teacher_NV, args.skew)), args)


def skewed_reverse_kl(r: Rows, args: LossArgs) -> Tensor:
    """KL(p || (1-skew) q + skew p).  DistiLLM, Ko 2024, arXiv:2402.03898. skew 0 = reverse_kl; bounded by
    -log skew."""
    return vocab_sum(r.student_NV.exp() * (r.student_NV - log_mix(r.teacher_NV, r.student_NV, args.skew)), args)


# Divergences on a support of a few tokens.

class Support(NamedTuple):
    """Log-probs on the chosen tokens (N, K), full-softmax normalised, and which of the K columns count."""
    student_NK: Tensor
    teacher_NK: Tensor
    keep_NK: Tensor
    id_NK: Tensor


@torch.compiler.disable         # a few indices are not worth fusing, and slower when they are
def top_ids(x_NV: Tensor, k: int) -> Tensor:
    """(N, k): where the k largest entries of each row are, or all of them, the largest first. They lie in the k blocks
    with the largest maxima, and only those are searched: torch.topk over a whole row of 151,936 takes a CPU ten times
    as long."""
    N, V = x_NV.shape
    k, width = min(k, V), int(V ** 0.5)
    whole = V // width * width
    if whole // width <= 2 * k:
        return x_NV.topk(k).indices
    block_NK = x_NV[:, :whole].unflatten(1, (-1, width)).amax(-1).topk(k).indices
    id_NC = (block_NK[:, :, None] * width + torch.arange(width, device=x_NV.device)).flatten(1)
    rest_NR = torch.arange(whole, V, device=x_NV.device).expand(N, -1)
    id_NC = torch.cat([id_NC, rest_NR], 1)
    return id_NC.gather(1, x_NV.gather(1, id_NC).topk(k).indices)


def choose_support(r: Rows, args: LossArgs) -> Support:
    """student / teacher: that side's top-k. intersection: the student's top-k that are in the teacher's too.
    union: the student's, then the teacher's that are not among them. The choice itself carries no
    gradient."""
    student_id_NK, teacher_id_NK = top_ids(r.student_NV.detach(), args.topk), top_ids(r.teacher_NV, args.topk)
    same_NKK = student_id_NK[:, :, None] == teacher_id_NK[:, None, :]
    everywhere = torch.ones_like(student_id_NK, dtype=torch.bool)
    id_NK, keep_NK = {
        "student": (student_id_NK, everywhere),
        "teacher": (teacher_id_NK, everywhere),
        "intersection": (student_id_NK, same_NKK.any(2)),
        "union": (torch.cat([student_id_NK, teacher_id_NK], 1), torch.cat([everywhere, ~same_NKK.any(1)], 1)),
    }[args.support]
    return Support(r.student_NV.gather(1, id_NK), r.teacher_NV.gather(1, id_NK), keep_NK, id_NK)


def renormalised(logp_NK: Tensor, keep_NK: Tensor) -> Tensor:
    """log-probs divided by their mass on the support; -1e30 off it, and everywhere when the support is empty.
    A large finite number, because -inf turns into NaN in the backward pass of a row without support."""
    masked_NK = logp_NK.masked_fill(~keep_NK, -1e30)
    return torch.where(keep_NK, masked_NK - masked_NK.logsumexp(-1, keepdim=True), -1e30)


def kl_on_support(a_NK: Tensor, b_NK: Tensor, keep_NK: Tensor) -> Tensor:
    """sum over the support of exp(a) (a - b); exact zero off it."""
    return torch.where(keep_NK, a_NK.exp() * (a_NK - b_NK), 0.0).sum(-1)


def tail_term(a_NV: Tensor, b_NV: Tensor, s: Support) -> Tensor:
    """The one bucket that holds everything outside the support: A log(A/B), A and B its masses. Summed from
    its own entries, since 1 - (mass on the support) loses all digits when that mass is near 1."""
    # counted, not written: in a union the teacher's masked duplicate names the same token as its kept twin
    inside_NV = torch.zeros_like(a_NV).scatter_add(1, s.id_NK, s.keep_NK.to(a_NV.dtype)) > 0
    rest_a_N, rest_b_N = (x.masked_fill(inside_NV, -1e30).logsumexp(-1) for x in (a_NV, b_NV))
    return torch.where(inside_NV.all(-1), 0.0, rest_a_N.exp() * (rest_a_N - rest_b_N))


def topk_reverse_kl(r: Rows, args: LossArgs) -> Tensor:
    """KL(p||q) restricted to a support S.  Rethinking OPD, Li 2026, arXiv:2604.13016.

    renormalised   KL(p_S || q_S), both divided by their mass on S (eq. 5): >= 0, and identically 0 at k = 1.
    truncated      sum_S w log(p/q) with w = p renormalised on S and held fixed, raw log-ratio, gradient
                   through log p only: thunlp/OPD's code. Can be negative; differs from eq. 5 once S holds
                   less than all mass.
    tail           sum_S p log(p/q) + one bucket for the rest: a KL of a coarser distribution, 0 <= it <=
    KL(p||q). All three equal KL(p||q), value and gradient, when S is the vocabulary. An empty intersection
    gives 0.
    """
    s = choose_support(r, args)
    if args.topk_form == "renormalised":
        return kl_on_support(renormalised(s.student_NK, s.keep_NK), renormalised(s.teacher_NK, s.keep_NK), s.keep_NK)
    if args.topk_form == "tail":
        return kl_on_support(s.student_NK, s.teacher_NK, s.keep_NK) + tail_term(r.student_NV, r.teacher_NV, s)
    weight_NK = torch.where(s.keep_NK, renormalised(s.student_NK.detach(), s.keep_NK).exp(), 0.0)
    cost_NK = weight_NK * (s.student_NK - s.teacher_NK).detach()
    # the value is sum cost; its gradient is the policy gradient of a draw from w with every log p(v) live
    return (cost_NK * (1 + s.student_NK - s.student_NK.detach())).sum(-1)


def topk_forward_kl(r: Rows, args: LossArgs) -> Tensor:
    """KL(q||p) restricted to a support S, usually the teacher's.  Forms as in topk_reverse_kl; verl's
    forward_kl_topk is `truncated`: sum_S q log(q/p) with raw probabilities, negative when the student holds
    more mass on S than the teacher (verl issue 7856), and not at rest at p = q, where it still moves mass
    onto S. `tail` stays a KL."""
    s = choose_support(r, args)
    if args.topk_form == "renormalised":
        return kl_on_support(renormalised(s.teacher_NK, s.keep_NK), renormalised(s.student_NK, s.keep_NK), s.keep_NK)
    tail_N = tail_term(r.teacher_NV, r.student_NV, s) if args.topk_form == "tail" else 0.0
    return kl_on_support(s.teacher_NK, s.student_NK, s.keep_NK) + tail_N


# Losses on the sampled token alone.

def policy_gradient(r: Rows, args: LossArgs) -> Tensor:
    """-min(ratio A, clip(ratio) A), ratio = p(a)/b(a), A held fixed.  PPO, Schulman 2017; OPD as RL: Thinking
    Machines 2025. With A = log q(a) - log b(a) and b = p, E_a[gradient] = gradient of KL(p||q) at this
    prefix.

    At the first update after sampling ratio = 1 and nothing is clipped: the gradient is -A grad log p(a).
    Effects of this token on later ones are not counted (discount 0).
    """
    ratio_N = (r.student_N() - r.behavior_N).exp()
    clipped_N = ratio_N.clamp(1 - args.clip, 1 + args.clip)
    return -torch.minimum(ratio_N * r.advantage_N, clipped_N * r.advantage_N)


def k2(r: Rows, args: LossArgs) -> Tensor:
    """(log p(a) - log q(a))^2 / 2.  Schulman's k2: E_a[gradient] = gradient of KL(p||q), though its value is
    not the KL. No ratio: differentiate it on fresh samples only."""
    return (r.student_N() - r.teacher_N()).square() / 2


def cross_entropy(r: Rows, args: LossArgs) -> Tensor:
    """-log p(a): imitation of given responses (SFT, sequence-level KD). On the student's own samples its
    expected gradient is zero."""
    return -r.student_N()


def eopd(r: Rows, args: LossArgs) -> Tensor:
    """policy_gradient + eopd_alpha [H(q) > eopd_entropy] sum_{top-k of q} q (log q - log p).  EOPD,
    arXiv:2603.07079: where the teacher itself is unsure, one sampled token says little, so its alternatives
    are imitated as well. Added, not switched to. Readings differ on dividing q by its top-k mass
    (eopd_renormalise); p keeps its full normaliser."""
    id_NK = top_ids(r.teacher_NV, args.topk)
    top_NK = r.teacher_NV.gather(1, id_NK)
    if args.eopd_renormalise:
        top_NK = top_NK - top_NK.logsumexp(-1, keepdim=True)
    forward_N = (top_NK.exp() * (top_NK - r.student_NV.gather(1, id_NK))).sum(-1)
    unsure_N = -(r.teacher_NV.exp() * r.teacher_NV).sum(-1) > args.eopd_entropy
    return policy_gradient(r, args) + args.eopd_alpha * torch.where(unsure_N, forward_N, 0.0)


# Teachers that need not say the same by the same id.

class OneStop(NamedTuple):
    """One vocabulary, but two sides that end their turns with different tokens. After any of `ids`, the stop tokens S
    of both, a response is over; which of them was drawn means nothing, so both sides are compared with S as one word:

        p'(stop) = sum over s in S of p(s),   p'(v) = p(v) for every v outside S,   q' likewise

    and the token drawn, its log-probs (b', p', q') and every divergence are those of this smaller vocabulary. The
    student's responses end at every s in S; were an s of the teacher's alone to go on, p' would count as stopping
    what does not stop. Compared id by id, a student that ends with <|endoftext|> under a teacher that ends with
    <|im_end|> pays for every stop: it unlearns stopping, and its responses grow to the limit.

    OPD length inflation, arXiv:2609.20511: `semantic_class` of its code, for the sampled token; that dense losses and
    entropies see the sum too is our reading. A student that is its own teacher is at rest, whatever each calls a stop.
    """
    ids: Tensor         # int64

    def fold(self, logp_NV: Tensor) -> Tensor:
        """log p': the sum in the place of the first id, no mass (-1e30, see `renormalised`) in those of the others."""
        mass_N1 = logp_NV[:, self.ids].logsumexp(-1, keepdim=True)
        return logp_NV.index_fill(1, self.ids, -1e30).index_copy(1, self.ids[:1], mass_N1)

    def word(self, token_N: Tensor) -> Tensor:
        return torch.where((token_N[:, None] == self.ids).any(1), self.ids[0], token_N)


def on_shared(r: Rows) -> Rows:
    """Rows that any divergence of the table can compare: with two vocabularies, both sides on the tokens that both
    have, divided by their mass there (strict 1:1 distillation, arXiv:2610.08448); with OneStop, folded."""
    if isinstance(r.shared, OneStop):
        return r._replace(student_NV=r.shared.fold(r.student_NV), token_N=r.shared.word(r.token_N), shared=None,
                          teacher_NV=None if r.teacher_NV is None else r.shared.fold(r.teacher_NV))
    student_id_K, teacher_id_K = r.shared
    place_V = torch.zeros(r.student_NV.shape[1], dtype=torch.int64, device=student_id_K.device)
    place_V[student_id_K] = torch.arange(len(student_id_K), device=student_id_K.device)
    student_NK, teacher_NK = (logp_NV[:, id_K].log_softmax(-1) for logp_NV, id_K in
                              ((r.student_NV, student_id_K), (r.teacher_NV, teacher_id_K)))
    return r._replace(student_NV=student_NK, teacher_NV=teacher_NK, token_N=place_V[r.token_N], shared=None)


def sorted_gap(p_NV: Tensor, q_NV: Tensor) -> Tensor:
    """sum_r |r-th largest p - r-th largest q|, the shorter side filled up with zeros."""
    size = max(p_NV.shape[1], q_NV.shape[1])
    p_NV, q_NV = (torch.nn.functional.pad(x_NV.sort(-1, descending=True).values, (0, size - x_NV.shape[1]))
                  for x_NV in (p_NV, q_NV))
    return (p_NV - q_NV).abs().sum(-1)


def uld(r: Rows, args: LossArgs) -> Tensor:
    """Universal logit distillation, Boizard 2024, arXiv:2402.12030: the Wasserstein distance of the two
    distributions when every pair of tokens is equally far apart. It sees how peaked the teacher is, never on
    which token. Rows are paired by their place in the response, whatever they say; no cross-entropy is
    added."""
    return sorted_gap(r.student_NV.exp(), r.teacher_NV.exp())


def gold(r: Rows, args: LossArgs) -> Tensor:
    """w JSD(beta) on the shared tokens + (1 - w) sorted gap on the others, w = shared / teacher vocabulary.
    GOLD (TRL, 2025), hybrid form with bayesian merging: one row per chunk, its last distribution times the
    probability of the chunk's earlier tokens (held fixed). Unlike the original, tokens are matched by their
    bytes, the JSD gets distributions (each side divided by its shared mass; beta 0.5 as there) and rows are
    not shifted by one."""
    if r.shared is None:
        return jsd(r, args)
    student_id_K, teacher_id_K = r.shared
    rest = []
    for logp_NV, before_N, id_K in ((r.student_NV, r.student_before_N, student_id_K),
                                    (r.teacher_NV, r.teacher_before_N, teacher_id_K)):
        alone_V = torch.ones(logp_NV.shape[1], dtype=torch.bool, device=id_K.device)
        alone_V[id_K] = False
        rest.append((logp_NV[:, alone_V] + before_N[:, None]).exp())
    share = len(teacher_id_K) / r.teacher_NV.shape[1]
    return share * jsd(on_shared(r), args) + (1 - share) * sorted_gap(*rest)


DIVERGENCES = {
    "reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl, "skewed_reverse_kl": skewed_reverse_kl,
    "topk_reverse_kl": topk_reverse_kl, "topk_forward_kl": topk_forward_kl,
    "policy_gradient": policy_gradient, "k2": k2, "eopd": eopd, "cross_entropy": cross_entropy,
    "uld": uld, "gold": gold,
}
# estimates that are wrong on responses the student did not write
ON_SAMPLES_ONLY = ("policy_gradient", "k2", "eopd")
USES_ADVANTAGE = ("policy_gradient", "eopd")
NEEDS_NO_TEACHER = ("policy_gradient", "cross_entropy")     # though an advantage may
MIXTURES = ("jsd", "skewed_forward_kl", "skewed_reverse_kl", "gold")
# teacher with another tokenizer: these look at their rows as they are, the others at the shared tokens of
# both sides
TWO_VOCABULARIES = (policy_gradient, cross_entropy, uld, gold)
