"""Losses: at each token of the step, how far is the student from the teacher, and how much does the token count?

The catalogue of every loss variant. Three tables of pure functions; each entry can be read alone:

    DIVERGENCES  (Rows, args) -> loss_N         what is differentiated, one number per row, not reduced
    ADVANTAGES   (Signals, args) -> advantage_N     credit per token for policy_gradient; higher = more likely
    WEIGHTS      (Signals, args) -> weight_N        >= 0, for every divergence; 0 = dropped

A divergence sees ROWS. One row = one response token; prompts, padding and the shift by one are gone before a row
exists, so nothing here takes a mask. Advantages and weights see SIGNALS, the whole step at once and without any
gradient: a filter, a group statistic or a normalisation is only right when it sees all of it (official code of two
papers is wrong because it computes them per micro-batch). At the end stands the engine, which differentiates a
divergence through the vocabulary a few rows at a time.

Axes: N rows of the step, n of a micro-batch, C of a chunk, B sequences, G problems ("groups"), V real vocabulary, K
support, D student width. p student, q teacher, b behaviour (the student when it sampled), r reference (the student at
step 0), a the sampled token. Natural logs; float32, or float64 when given. reverse_kl = KL(p||q), forward_kl =
KL(q||p).

What differentiating each sampled estimate of KL(p||q) really does, in expectation over a ~ p (tests/losses/):
    k1 = log p(a) - log q(a)       right value, gradient exactly zero             not offered
    k2 = (log p(a) - log q(a))^2/2 wrong value, gradient of KL(p||q)              offered
    k3 = q/p - 1 - log q/p         right value, gradient of KL(q||p)              not offered
    policy_gradient with A = log q(a) - log b(a), held fixed: gradient of KL(p||q) when b = p

Add one: write the function, give it a line in its table, test its value, gradient and limits (docs/extending.md).
"""
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor

from support.errors import UserError
from support.flags import opt


@dataclass(frozen=True)
class LossArgs:
    """The knobs of the entries; a knob's help begins with the name of its entry."""
    beta: float = opt(0.5, "jsd: weight of the teacher in the mixture, strictly between 0 and 1")
    skew: float = opt(0.1, "skewed KLs: share of the other distribution mixed in, 0 <= skew < 1")
    topk: int = opt(16, "top-k losses: size of each side's support", low=1, high=10_000)
    support: str = opt("student", "top-k losses: whose top-k tokens", ("student", "teacher", "union", "intersection"))
    topk_form: str = opt("truncated", "top-k losses: what happens to the mass outside the support",
                         ("renormalised", "truncated", "tail"))
    clip: float = opt(0.2, "policy_gradient: the ratio p(a)/b(a) is kept in [1 - clip, 1 + clip]")
    entry_clip: float = opt(0.0, "full-vocabulary divergences: cap on each vocabulary entry's term (OPSD: 0.05); "
                                 "0 = off")
    token_clip: float = opt(0.0, "full-vocabulary divergences: tokens above this are scaled down to it; 0 = off")
    eopd_alpha: float = opt(1.0, "eopd: weight of the forward KL where the teacher is unsure")
    eopd_entropy: float = opt(0.8, "eopd: teacher entropy in nats above which the forward KL is added")
    eopd_renormalise: bool = opt(False, "eopd: divide the teacher's top-k by its mass (readings of the paper differ)")
    discount: float = opt(0.0, "opd: weight of the next token's log-ratio in this token's return (MiniLLM: 1)")
    grpo_std: bool = opt(True, "grpo: divide by the group's standard deviation (off: Dr. GRPO)")
    extrapolate: float = opt(1.25, "exopd: scale of the teacher's reward over the reference; 1 = opd", low=-math.inf)
    sg_agree: float = opt(1.8, "sg: factor where teacher and verifier agree", low=-math.inf)
    sg_conflict: float = opt(1.0, "sg: factor where they do not", low=-math.inf)
    sg_form: str = opt("reference", "sg: the factor extrapolates from the initial student, or scales the advantage",
                       ("reference", "scale"))
    sg_gate: str = opt("sign", "sg: where to extrapolate: where signs agree; the same number of random "
                               "tokens; everywhere", ("sign", "random", "all"))
    kdrl_coef: float = opt(5e-3, "kdrl: weight of the teacher at the first step", low=-math.inf)
    kdrl_coef_end: float = opt(1e-3, "kdrl: weight of the teacher at the last step, linear in between", low=-math.inf)
    kdrl_mask: str = opt("none", "kdrl: no teacher on right responses; or on groups with one",
                         ("none", "response", "group"))
    uni_margin: float = opt(0.4, "uni: required gap between the mean log-ratios of right and wrong responses",
                            low=-math.inf)
    uni_gap: str = opt("mean", "uni: gap of the means, or of worst right against best wrong", ("mean", "minmax"))
    uni_guard: float = opt(10.0, "uni: tokens with a log-ratio at least this large get no credit")
    rlsd_clip: float = opt(0.2, "rlsd: the teacher scales the verifier's advantage by at most 1 +- this")
    scope_temperature: float = opt(1.0, "scope: softness of the perplexity weights")
    scope_sign: str = opt("paper", "scope: weight of right responses grows with perplexity (paper) or "
                                   "falls (scripts)", ("paper", "code"))
    reopold_share: float = opt(0.3, "reopold: student share of the mixture that floors the log-ratio")
    reopold_floor: str = opt("logit", "reopold: floor log(s/(1-s)) or log(s)/(1-s)", ("logit", "jensen"))
    reopold_entropy: float = opt(0.2, "reopold: share of highest-entropy tokens kept in the second half", high=1)
    fire_drop: float = opt(0.2, "fire: share of the responses that the teacher finds least likely, dropped", high=1)
    fire_alpha: float = opt(1.0, "fire: strength of the teacher's confidence in the token weight")
    fire_beta: float = opt(1.0, "fire: strength of the student's uncertainty in the token weight")
    fire_max: str = opt("sequence", "fire: entropies are divided by the largest of the sequence or of the step",
                        ("sequence", "batch"))
    fire_filter: str = opt("global", "fire: rank the responses over the whole step or per teacher",
                           ("global", "teacher"))
    tip_keep: float = opt(0.5, "tip: share of the tokens kept", high=1)
    keep: float = opt(0.5, "random: share of the tokens kept, drawn anew each step", high=1)
    skip_first: int = opt(0, "first response tokens without a loss (SDFT: 3)")
    loss_first_n: int = opt(0, "only the first so many tokens of a response get a loss; 0 = all")
    skip_tokens: str = opt("", "comma-separated ids of tokens without a loss, such as special ones")


class Rows(NamedTuple):
    """What a divergence may look at. Gradient flows through student_NV only."""
    student_NV: Tensor                          # log p
    token_N: Tensor                             # a, int64
    teacher_NV: Tensor | None = None            # log q; None when there is no teacher
    behavior_logp_N: Tensor | None = None       # log b(a), stored by the sampler
    advantage_N: Tensor | None = None           # from ADVANTAGES

    def student_logp_N(self) -> Tensor:
        """log p(a)"""
        return self.student_NV.gather(1, self.token_N[:, None]).squeeze(1)

    def teacher_logp_N(self) -> Tensor:
        """log q(a)"""
        return self.teacher_NV.gather(1, self.token_N[:, None]).squeeze(1)


def upcast(x: Tensor) -> Tensor:
    """Log-softmax needs float32 at least; float64 stays."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def vocab_sum(term_NV: Tensor, args: LossArgs) -> Tensor:
    """Sum over the vocabulary, with one of two brakes on tokens where teacher and student are far apart.

    entry_clip t   min(term, t) before the sum.  OPSD, Zhao 2026, arXiv:2601.18734 v3, section 3.2. A clipped term loses
                   its gradient but keeps its share of the normaliser: for the forward KL the gradient is Q p - q on the
                   unclipped tokens U and +Q p on clipped ones, Q = q(U). What the teacher wants to raise most is pushed
                   DOWN; the minimum is below 0 and lies away from q. It acts as a gate: small disagreements are
                   distilled, large ones refused.
    token_clip t   our alternative: the sum times min(1, t / sum), the factor held fixed: same direction, bounded size.
    """
    if args.entry_clip:
        term_NV = term_NV.clamp(max=args.entry_clip)
    sum_N = term_NV.sum(-1)
    return sum_N * (args.token_clip / sum_N.detach().clamp(min=args.token_clip)) if args.token_clip else sum_N


# Divergences over the whole vocabulary. Zero iff p == q; the teacher's rows carry no gradient.

def reverse_kl(r: Rows, args: LossArgs) -> Tensor:
    """sum_v p (log p - log q) = KL(p||q), exact, mode-seeking.  Gu 2023, arXiv:2306.08543; GKD, arXiv:2306.13649.
    Gradient also flows through the leading p: the true derivative p (log p/q - KL) on the logits, no estimator."""
    return vocab_sum(r.student_NV.exp() * (r.student_NV - r.teacher_NV), args)


def forward_kl(r: Rows, args: LossArgs) -> Tensor:
    """sum_v q (log q - log p) = KL(q||p), exact, mass-covering; gradient p - q on the logits.  Hinton 2015."""
    return vocab_sum(r.teacher_NV.exp() * (r.teacher_NV - r.student_NV), args)


def jsd(r: Rows, args: LossArgs) -> Tensor:
    """beta KL(q||m) + (1-beta) KL(p||m), m = beta q + (1-beta) p.  GKD, Agarwal 2023, arXiv:2306.13649, eq. 1.

    Limits: jsd/beta -> KL(q||p) as beta -> 0, jsd/(1-beta) -> KL(p||q) as beta -> 1, so jsd itself -> 0 at both ends:
    beta acts as a learning rate there. beta of 0 or 1 is refused instead of silently becoming another loss.
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
    """KL(q || (1-skew) p + skew q) <= -log skew.  DistiLLM, Ko 2024, arXiv:2402.03898. skew 0 = forward_kl."""
    return vocab_sum(r.teacher_NV.exp() * (r.teacher_NV - log_mix(r.student_NV, r.teacher_NV, args.skew)), args)


def skewed_reverse_kl(r: Rows, args: LossArgs) -> Tensor:
    """KL(p || (1-skew) q + skew p) <= -log skew.  DistiLLM, Ko 2024, arXiv:2402.03898. skew 0 = reverse_kl."""
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
    """student / teacher: that side's top-k. intersection: the student's top-k that are in the teacher's too. union: the
    student's, then the teacher's that are not among them. The choice itself carries no gradient."""
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
    """log-probs divided by their mass on the support; -1e30 off it, and everywhere when the support is empty. A large
    finite number, because -inf turns into NaN in the backward pass of a row without support."""
    masked_NK = logp_NK.masked_fill(~keep_NK, -1e30)
    return torch.where(keep_NK, masked_NK - masked_NK.logsumexp(-1, keepdim=True), -1e30)


def kl_on_support(a_NK: Tensor, b_NK: Tensor, keep_NK: Tensor) -> Tensor:
    """sum over the support of exp(a) (a - b); exact zero off it."""
    return torch.where(keep_NK, a_NK.exp() * (a_NK - b_NK), 0.0).sum(-1)


def tail_term(a_NV: Tensor, b_NV: Tensor, s: Support) -> Tensor:
    """The one bucket that holds everything outside the support: A log(A/B), A and B its masses. Summed from its own
    entries, since 1 - (mass on the support) loses all digits when that mass is near 1."""
    # counted, not written: in a union the teacher's masked duplicate names the same token as its kept twin
    inside_NV = torch.zeros_like(a_NV).scatter_add(1, s.id_NK, s.keep_NK.to(a_NV.dtype)) > 0
    rest_a_N, rest_b_N = (x.masked_fill(inside_NV, -1e30).logsumexp(-1) for x in (a_NV, b_NV))
    return torch.where(inside_NV.all(-1), 0.0, rest_a_N.exp() * (rest_a_N - rest_b_N))


def topk_reverse_kl(r: Rows, args: LossArgs) -> Tensor:
    """KL(p||q) restricted to a support S.  Rethinking OPD, Li 2026, arXiv:2604.13016.

    renormalised   KL(p_S || q_S), both divided by their mass on S (eq. 5): >= 0, and identically 0 at k = 1.
    truncated      sum_S w log(p/q) with w = p renormalised on S and held fixed, raw log-ratio, gradient through log p
                   only: thunlp/OPD's code. Can be negative; differs from eq. 5 once S holds less than all mass.
    tail           sum_S p log(p/q) + one bucket for the rest: a KL of a coarser distribution, between 0 and KL(p||q).

    All three equal KL(p||q), value and gradient, when S is the vocabulary. An empty intersection gives 0.
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
    """KL(q||p) restricted to a support S, usually the teacher's.  Forms as in topk_reverse_kl; `truncated` is verl's
    forward_kl_topk, sum_S q log(q/p) with raw probabilities: negative when the student holds more mass on S than the
    teacher (verl issue 7856), and at p = q it still moves mass onto S. `tail` stays a KL."""
    s = choose_support(r, args)
    if args.topk_form == "renormalised":
        return kl_on_support(renormalised(s.teacher_NK, s.keep_NK), renormalised(s.student_NK, s.keep_NK), s.keep_NK)
    tail_N = tail_term(r.teacher_NV, r.student_NV, s) if args.topk_form == "tail" else 0.0
    return kl_on_support(s.teacher_NK, s.student_NK, s.keep_NK) + tail_N


# Losses on the sampled token alone.

def policy_gradient(r: Rows, args: LossArgs) -> Tensor:
    """-min(ratio A, clip(ratio) A), ratio = p(a)/b(a), A held fixed.  PPO, Schulman 2017; OPD as RL: Thinking Machines
    2025. With A = log q(a) - log b(a) and b = p, E_a[gradient] = gradient of KL(p||q) at this prefix.

    At the first update after sampling ratio = 1 and nothing is clipped: the gradient is -A grad log p(a). Effects of
    this token on later ones are not counted (discount 0).
    """
    ratio_N = (r.student_logp_N() - r.behavior_logp_N).exp()
    clipped_N = ratio_N.clamp(1 - args.clip, 1 + args.clip)
    return -torch.minimum(ratio_N * r.advantage_N, clipped_N * r.advantage_N)


def k2(r: Rows, args: LossArgs) -> Tensor:
    """(log p(a) - log q(a))^2 / 2.  Schulman's k2: E_a[gradient] = gradient of KL(p||q), though its value is not the
    KL. It has no ratio p/b, so it is right on fresh samples only."""
    return (r.student_logp_N() - r.teacher_logp_N()).square() / 2


def cross_entropy(r: Rows, args: LossArgs) -> Tensor:
    """-log p(a): imitation of given responses (SFT, sequence-level KD). On the student's own samples its expected
    gradient is zero."""
    return -r.student_logp_N()


def eopd(r: Rows, args: LossArgs) -> Tensor:
    """policy_gradient + eopd_alpha [H(q) > eopd_entropy] sum_{top-k of q} q (log q - log p).  EOPD, arXiv:2603.07079:
    where the teacher is unsure, one sampled token says little, so its alternatives are imitated as well. Readings
    differ on whether q is divided by its top-k mass (eopd_renormalise); p keeps its full normaliser."""
    id_NK = top_ids(r.teacher_NV, args.topk)
    top_NK = r.teacher_NV.gather(1, id_NK)
    if args.eopd_renormalise:
        top_NK = top_NK - top_NK.logsumexp(-1, keepdim=True)
    forward_N = (top_NK.exp() * (top_NK - r.student_NV.gather(1, id_NK))).sum(-1)
    unsure_N = -(r.teacher_NV.exp() * r.teacher_NV).sum(-1) > args.eopd_entropy
    return policy_gradient(r, args) + args.eopd_alpha * torch.where(unsure_N, forward_N, 0.0)


DIVERGENCES = {
    "reverse_kl": reverse_kl, "forward_kl": forward_kl, "jsd": jsd,
    "skewed_forward_kl": skewed_forward_kl, "skewed_reverse_kl": skewed_reverse_kl,
    "topk_reverse_kl": topk_reverse_kl, "topk_forward_kl": topk_forward_kl,
    "policy_gradient": policy_gradient, "k2": k2, "eopd": eopd, "cross_entropy": cross_entropy,
}
ON_SAMPLES_ONLY = {"policy_gradient", "k2", "eopd"}     # wrong on responses that the student did not write
USES_ADVANTAGE = {"policy_gradient", "eopd"}
NEEDS_NO_TEACHER = {"policy_gradient", "cross_entropy"}     # though its advantage may need one


# Advantages and weights

class Signals(SimpleNamespace):
    """What is known of a whole step before the update, one attribute per signal. Every step has

        token_N (int64: a), behavior_logp_N (log b(a)), student_entropy_N (nats), sequence_N and position_N (int64:
        which sequence a row belongs to, rows of one being neighbours, and its place there from 0), length_B (int64),
        group_B (int64: which problem a sequence answers, 0 ... G-1), finished_B (bool), progress (0 at the first step,
        1 at the last), seed (of this step, for random controls)

    and what its rules ask for (teacher.SIGNALS). NaN where a signal is missing for a row, never 0; asking for one that
    this run does not have is an error."""

    def __getattr__(self, name: str):
        raise UserError(f"this run has no signal {name}: a rule that reads it names it in @asks(...), and "
                        f"teacher.SIGNALS has to provide it")

    def replace(self, **changes) -> "Signals":
        return Signals(**{**self.__dict__, **changes})


def asks(*signals: str, group: bool = False):
    """Decorates a rule: `signals` it reads beyond those that every step has; group: it compares the responses to one
    problem, so there have to be several."""
    def mark(rule):
        rule.asks, rule.group = signals, group
        return rule
    return mark


# Small tools of the rules

def sequence_mean(value_N: Tensor, s: Signals) -> Tensor:
    """(B,): mean over each sequence's rows."""
    zeros_B = torch.zeros(len(s.length_B), dtype=value_N.dtype, device=value_N.device)
    return zeros_B.scatter_add(0, s.sequence_N, value_N) / s.length_B


def teacher_mean(s: Signals) -> Tensor:
    """(B,): the teacher's log-prob of each response, per student token."""
    return s.teacher_total_B / s.length_B


def group_mean(value_B: Tensor, s: Signals, where_B: Tensor | None = None) -> Tensor:
    """(G,): mean over the group's sequences (those under where_B); NaN for a group without any."""
    weight_B = torch.ones_like(value_B) if where_B is None else where_B.to(value_B.dtype)
    zeros_G = torch.zeros(int(s.group_B.max()) + 1, dtype=value_B.dtype, device=value_B.device)
    return (zeros_G.scatter_add(0, s.group_B, value_B * weight_B) / zeros_G.scatter_add(0, s.group_B, weight_B))


def largest(value_N: Tensor, s: Signals, scope: str) -> Tensor:
    """(N,): the largest value of the row's sequence, or of the whole step."""
    if scope == "batch":
        return value_N.max().expand_as(value_N)
    start_B = torch.full((len(s.length_B),), -torch.inf, dtype=value_N.dtype, device=value_N.device)
    return start_B.scatter_reduce(0, s.sequence_N, value_N, "amax")[s.sequence_N]


def permutation(n: int, s: Signals) -> Tensor:
    rng = torch.Generator().manual_seed(s.seed)
    return torch.randperm(n, generator=rng).to(s.token_N.device)


def return_to_go(value_N: Tensor, s: Signals, discount: float) -> Tensor:
    """out_n = value_n + discount * out_{n+1} inside one sequence, never across."""
    table_BT = torch.zeros(len(s.length_B), int(s.length_B.max()) + 1, dtype=value_N.dtype, device=value_N.device)
    at = s.sequence_N, s.position_N
    table_BT[at] = value_N
    for t in reversed(range(table_BT.shape[1] - 1)):
        table_BT[:, t] += discount * table_BT[:, t + 1]
    return table_BT[at]


# Advantages

def log_ratio(s: Signals) -> Tensor:
    return s.teacher_logp_N - s.behavior_logp_N


@asks("teacher_logp_N")
def opd(s: Signals, args: LossArgs) -> Tensor:
    """log q(a) - log b(a): minus the sampled reverse KL at this token.  Thinking Machines 2025. With discount 1 each
    token also answers for the rest of its sequence: MiniLLM's return-to-go (Gu 2023, arXiv:2306.08543), the
    sequence-level reverse-KL gradient, at a far larger variance."""
    return return_to_go(log_ratio(s), s, args.discount) if args.discount else log_ratio(s)


@asks("reward_B", group=True)
def grpo(s: Signals, args: LossArgs) -> Tensor:
    """(reward - group mean) / group std (n - 1), the same on every token of a response.  Shao 2024,
    arXiv:2402.03300; without the std: Dr. GRPO, arXiv:2503.20783. A unanimous group gets exactly 0, with no epsilon."""
    return group_advantage(s, args.grpo_std)[s.sequence_N]


def group_advantage(s: Signals, divide: bool) -> Tensor:
    # counted from the group's lowest reward: the rounded mean of seven times 0.1 is not 0.1, and divided by its own
    # std that rounding error would be an advantage of 0.9
    start_G = torch.zeros(int(s.group_B.max()) + 1, dtype=s.reward_B.dtype, device=s.reward_B.device)
    above_B = s.reward_B - start_G.scatter_reduce(0, s.group_B, s.reward_B, "amin", include_self=False)[s.group_B]
    centred_B = above_B - group_mean(above_B, s)[s.group_B]
    if not divide:
        return centred_B
    size_B = torch.bincount(s.group_B)[s.group_B]
    variance_B = group_mean(centred_B.square(), s)[s.group_B] * size_B / (size_B - 1).clamp(min=1)
    return torch.where(variance_B > 0, centred_B / variance_B.sqrt(), 0.0)


@asks("teacher_logp_N", "reference_logp_N")
def exopd(s: Signals, args: LossArgs) -> Tensor:
    """(log q - log b) + (extrapolate - 1)(log q - log r).  G-OPD / ExOPD, arXiv:2602.12125. The optimum moves past
    the teacher, to r^(1-x) q^x with x = extrapolate; x = 1 is opd, 0 < x < 1 interpolates."""
    return log_ratio(s) + (args.extrapolate - 1) * (s.teacher_logp_N - s.reference_logp_N)


@asks("teacher_logp_N", "reference_logp_N", "reward_B", group=True)
def sg(s: Signals, args: LossArgs) -> Tensor:
    """Sign-gated OPD, arXiv:2606.09304. a1 = the verifier's verdict against its group, a2 = log q - log b; factor k =
    sg_agree where a1 a2 > 0, else sg_conflict.

    reference   a2 + (k - 1)(log q - log r)   form A: extrapolates from the initial student, as ExOPD does
    scale       k a2                          form B
    What k multiplies is our reading: the paper's full text could not be had, and its abstract and those who quote it
    fit both forms. At step 0 (r = b) both are the same. A unanimous group has a1 = 0 and agrees nowhere: plain OPD at
    sg_conflict 1. So does a cut response, whose verdict says nothing about its tokens. The gates `random` (as many
    tokens, drawn blindly) and `all` are the controls.
    """
    a2_N = log_ratio(s)
    verdict_B = torch.where(s.finished_B, group_advantage(s, divide=False), 0.0)
    agree_N = verdict_B[s.sequence_N] * a2_N > 0
    if args.sg_gate == "random":
        agree_N = agree_N[permutation(len(agree_N), s)]
    elif args.sg_gate == "all":
        agree_N = torch.ones_like(agree_N)
    factor_N = torch.full_like(a2_N, args.sg_conflict).masked_fill(agree_N, args.sg_agree)
    if args.sg_form == "scale":
        return factor_N * a2_N
    return a2_N + (factor_N - 1) * (s.teacher_logp_N - s.reference_logp_N)


@asks("teacher_logp_N", "reward_B")
def opdvr(s: Signals, args: LossArgs) -> Tensor:
    """z max(0, z (log q - log b)), z = +1 for a right response, -1 for a wrong one.  OPDVR, arXiv:2608.24696:
    tokens on which teacher and verifier disagree get nothing."""
    z_N = (2 * s.reward_B - 1)[s.sequence_N]
    return z_N * (z_N * log_ratio(s)).clamp(min=0)


@asks("teacher_logp_N", "reward_B", group=True)
def kdrl(s: Signals, args: LossArgs) -> Tensor:
    """grpo + coef (log q - log b), coef falling linearly.  KDRL, arXiv:2506.02208 (its k2 term has this
    gradient). kdrl_mask drops the teacher on right responses, or on every response of a group that has one."""
    coef = args.kdrl_coef + (args.kdrl_coef_end - args.kdrl_coef) * s.progress
    right_B = s.reward_B > 0
    masked_B = {"none": torch.zeros_like(right_B), "response": right_B,
                "group": group_mean(s.reward_B, s)[s.group_B] > 0}[args.kdrl_mask]
    return grpo(s, args) + torch.where(masked_B[s.sequence_N], 0.0, coef * log_ratio(s))


@asks("teacher_logp_N", "teacher_total_B", "reward_B", group=True)
def uni(s: Signals, args: LossArgs) -> Tensor:
    """Outcome-guided margin.  Uni-OPD, arXiv:2605.03677: when in a group the mean log-ratio of right responses does not
    exceed that of wrong ones by uni_margin, half of what is missing is added to every token of the right ones and taken
    from the wrong ones. Groups with one outcome are left alone. Tokens with |log-ratio| >= uni_guard get no credit."""
    ratio_N, right_B = log_ratio(s), s.reward_B > 0
    score_B = teacher_mean(s) - sequence_mean(s.behavior_logp_N, s)
    if args.uni_gap == "mean":
        gap_G = group_mean(score_B, s, right_B) - group_mean(score_B, s, ~right_B)
    else:
        worst_G, best_G = (torch.full((int(s.group_B.max()) + 1,), end, device=score_B.device, dtype=score_B.dtype)
                           .scatter_reduce(0, s.group_B[side], score_B[side], how)
                           for end, side, how in ((torch.inf, right_B, "amin"), (-torch.inf, ~right_B, "amax")))
        gap_G = worst_G - best_G
    shift_G = (args.uni_margin - gap_G).clamp(min=0).nan_to_num(0.0)    # one outcome: the gap is NaN, or infinite
    shift_B = shift_G[s.group_B] / 2 * torch.where(right_B, 1.0, -1.0).to(ratio_N.dtype)
    return torch.where(ratio_N.abs() >= args.uni_guard, 0.0, ratio_N + shift_B[s.sequence_N])


@asks("teacher_logp_N", "reward_B", group=True)
def rlsd(s: Signals, args: LossArgs) -> Tensor:
    """A clip(exp(sign(A)(log q - log b)), 1 - c, 1 + c), A from grpo.  RLSD, arXiv:2604.03128: the verifier sets
    the sign, the teacher (usually the student with privileged context) only the size."""
    advantage_N = grpo(s, args)
    ratio_N = (advantage_N.sign() * log_ratio(s)).exp()
    return advantage_N * ratio_N.clamp(1 - args.rlsd_clip, 1 + args.rlsd_clip)


@asks("teacher_logp_N", "teacher_total_B", "reward_B", group=True)
def scope(s: Signals, args: LossArgs) -> Tensor:
    """SCOPE, arXiv:2604.10688: right responses are imitated (advantage = weight: the gradient of weighted NLL), wrong
    ones distilled (weight (log q - log b)). Weights are softmaxed perplexities inside the group's right and wrong
    halves, times the half's size: student perplexity^(1/t) on the right, teacher perplexity^(-1/t) on the wrong. The
    launch scripts flip the former's sign (scope_sign code)."""
    right_B = s.reward_B > 0
    sign = 1.0 if args.scope_sign == "paper" else -1.0
    log_ppl_B = torch.where(right_B, -sign * sequence_mean(s.behavior_logp_N, s), teacher_mean(s))
    score_B = log_ppl_B / args.scope_temperature
    halves = s.replace(group_B=2 * s.group_B + right_B)        # the two halves of a group as groups of their own
    top_G = torch.full((int(halves.group_B.max()) + 1,), -torch.inf, dtype=score_B.dtype, device=score_B.device)
    # from the half's largest down: at a low temperature the exponential itself would overflow
    raw_B = (score_B - top_G.scatter_reduce(0, halves.group_B, score_B, "amax")[halves.group_B]).exp()
    weight_B = raw_B / group_mean(raw_B, halves)[halves.group_B]
    return weight_B[s.sequence_N] * torch.where(right_B[s.sequence_N], 1.0, log_ratio(s))


def reopold_floor(args: LossArgs) -> float:
    share = torch.tensor(args.reopold_share, dtype=torch.float64)
    floor = (share / (1 - share)).log() if args.reopold_floor == "logit" else share.log() / (1 - share)
    return floor.item()


@asks("teacher_logp_N")
def reopold(s: Signals, args: LossArgs) -> Tensor:
    """max(log q - log b, floor).  REOPOLD, arXiv:2603.11137: the reward of a mixture of teacher and student is bounded
    below; sources print that floor in two ways. Goes with the weight of the same name."""
    return log_ratio(s).clamp(min=reopold_floor(args))


ADVANTAGES = {"opd": opd, "grpo": grpo, "exopd": exopd, "sg": sg, "opdvr": opdvr, "kdrl": kdrl, "uni": uni,
              "rlsd": rlsd, "scope": scope, "reopold": reopold}


# Weights

@asks()
def uniform(s: Signals, args: LossArgs) -> Tensor:
    """Every token counts the same."""
    return torch.ones_like(s.behavior_logp_N)


@asks("teacher_B", "teacher_total_B", "teacher_entropy_N")
def fire(s: Signals, args: LossArgs) -> Tensor:
    """Filter, then reweight.  FiRe-OPD, arXiv:2606.02684, eqs. 4-8.

    Filter: score = the teacher's mean log-prob of the response; a response below the fire_drop quantile (linear, ties
    stay) of the whole step is dropped. Reweight: (1 + alpha (1 - H_T/max H_T)) (1 + beta H_S/max H_S), divided by its
    mean in the response, so that it shifts weight between tokens and never between responses.

    Where paper and code differ: the quantile is the paper's (of the whole step); the code takes it inside micro-batches
    of one response, where it drops nothing. The default maximum, per response, is the code's for the same reason; the
    paper's eqs. 5-6 take the batch's (fire_max batch). On the toy pair the two weightings correlate 0.63.
    """
    score_B = teacher_mean(s)
    part_B = s.teacher_B if args.fire_filter == "teacher" else torch.zeros_like(s.teacher_B)
    keep_B = torch.ones_like(s.finished_B)
    for part in part_B.unique():
        here_B = part_B == part
        keep_B[here_B] = score_B[here_B] >= score_B[here_B].quantile(args.fire_drop)
    floor = 1e-6        # for all-zero entropies: the official code's floor
    # NaN where a teacher with another tokenizer says nothing: such a row has no loss, and its entropy counts as 0
    teacher_entropy_N = s.teacher_entropy_N.nan_to_num(0.0)
    confident_N = 1 - teacher_entropy_N / largest(teacher_entropy_N, s, args.fire_max).clamp(min=floor)
    confused_N = s.student_entropy_N / largest(s.student_entropy_N, s, args.fire_max).clamp(min=floor)
    weight_N = (1 + args.fire_alpha * confident_N.clamp(0, 1)) * (1 + args.fire_beta * confused_N.clamp(0, 1))
    return weight_N / sequence_mean(weight_N, s)[s.sequence_N] * keep_B[s.sequence_N]


@asks("reverse_kl_N")
def tip(s: Signals, args: LossArgs) -> Tensor:
    """The tip_keep share of tokens with the highest h + d - h d, h = student entropy and d = KL(p||q), both scaled to
    [0, 1] over the step: uncertain or wrong.  TIP, arXiv:2604.14084."""
    def scaled(x_N: Tensor) -> Tensor:
        spread = x_N.max() - x_N.min()
        return (x_N - x_N.min()) / spread if spread > 0 else torch.zeros_like(x_N)
    h_N, d_N = scaled(s.student_entropy_N), scaled(s.reverse_kl_N)
    return keep_highest(h_N + d_N - h_N * d_N, args.tip_keep)


def keep_highest(score_N: Tensor, share: float) -> Tensor:
    """1 for the ceil(share N) highest scores, earlier rows first among equals; 0 elsewhere."""
    n = max(1, int(-(-share * len(score_N) // 1)))
    return torch.zeros_like(score_N).scatter(0, score_N.argsort(descending=True, stable=True)[:n], 1.0)


@asks("teacher_logp_N")
def reopold_weight(s: Signals, args: LossArgs) -> Tensor:
    """First half of training: tokens whose log-ratio is at least the floor. Second half: the reopold_entropy share of
    tokens with the highest student entropy.  REOPOLD, arXiv:2603.11137 (the switch at half is our reading)."""
    if s.progress < 0.5:
        return (s.teacher_logp_N - s.behavior_logp_N >= reopold_floor(args)).to(s.behavior_logp_N.dtype)
    return keep_highest(s.student_entropy_N, args.reopold_entropy)


@asks()
def random(s: Signals, args: LossArgs) -> Tensor:
    """A random share of the tokens: the control for every rule that drops some."""
    return keep_highest(permutation(len(s.token_N), s).to(s.behavior_logp_N.dtype), args.keep)


WEIGHTS = {"none": uniform, "fire": fire, "tip": tip, "reopold": reopold_weight, "random": random}


def supervised(s: Signals, args: LossArgs) -> Tensor:
    """1 where a token may have a loss at all, whatever the weight: skip_first (SDFT, arXiv:2601.19897), loss_first_n
    (supervision depth), skip_tokens (the special-token mask of arXiv:2603.25562)."""
    last = args.loss_first_n or int(s.length_B.max())
    skipped = torch.tensor([int(part) for part in args.skip_tokens.split(",") if part], dtype=torch.int64,
                           device=s.token_N.device)
    inside_N = (s.position_N >= args.skip_first) & (s.position_N < last) & ~torch.isin(s.token_N, skipped)
    return inside_N.to(s.behavior_logp_N.dtype)


# The engine: exact losses in memory O(chunk)

CACHED_LOGITS = 2**19       # entries of the few rows whose loss a CPU computes at a time: 2 MB, which stay in its cache
CACHED_GRADIENT = 2**19     # entries of the head's gradient to which a CPU adds a bfloat16 product at a time: 2 MB


def rows_at_once(chunk_rows: int, vocab_size: int, device: torch.device) -> int:
    """How many rows run their loss together: a GPU wants many, a CPU what its cache holds."""
    return chunk_rows if device.type == "cuda" else max(1, min(chunk_rows, CACHED_LOGITS // vocab_size))


def few_rows(logits_NV: Tensor, fields: dict[str, Tensor], scale_N: Tensor, part, divergence, args: LossArgs, observe,
             top_NK) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of scale_n loss_n, loss_N, what observe notes per row): all that sees the vocabulary, in one function."""
    rows = part.rows(logits_NV, fields)
    loss_N = divergence(rows, args)
    with torch.no_grad():
        noted = observe(rows, top_NK)
    return (loss_N * scale_N).sum(), loss_N.detach(), noted


def gradient_in_place(logits_NV: Tensor, fields: dict[str, Tensor], scale_N: Tensor, part, divergence, args: LossArgs,
                      observe) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss_N, what observe notes) of few_rows; the gradient of the logits takes their place."""
    top_NK = part.top_ids(logits_NV, fields)        # not in few_rows, which may be compiled: a search cannot be fused
    leaf_NV = logits_NV.detach().requires_grad_()
    with torch.enable_grad():
        total, loss_N, noted = few_rows(leaf_NV, fields, scale_N, part, divergence, args, observe, top_NK)
    (grad_NV,) = torch.autograd.grad(total, leaf_NV)
    logits_NV.copy_(grad_NV)
    return loss_N, noted


def add_product(head_grad_VD: Tensor, grad_NV: Tensor, states_ND: Tensor) -> None:
    """head_grad += grad^T states. A bfloat16 product is rounded like every product and added up in float32; on a CPU a
    part of the head at a time, whose product then stays in cache."""
    if head_grad_VD.dtype == grad_NV.dtype:
        head_grad_VD.addmm_(grad_NV.T, states_ND)
        return
    V, D = head_grad_VD.shape
    part = max(1, CACHED_GRADIENT // D) if head_grad_VD.device.type == "cpu" else V
    for part_vD, grad_Nv in zip(head_grad_VD.split(part), grad_NV.split(part, 1)):
        part_vD += grad_Nv.T @ states_ND


@torch.no_grad()
def chunked_backward(hidden_nD: Tensor, row_n: Tensor, head: tuple[Tensor, Tensor | None], part, fields_N: dict,
                     scale_N: Tensor, divergence, args, observe) -> tuple[Tensor, dict[str, Tensor]]:
    """Backward of sum_n scale_n loss_n without ever holding (n, V) logits. Returns (loss_n, what observe notes).

    hidden_nD   student states of a micro-batch, with their graph; row_n: which rows of the step they predict.
    head        (V, D) student head cut to the real vocabulary, in the dtype of hidden_nD, without a gradient of its
                own; and where its gradient is added (None: the head is frozen).
    part        the teacher's side of these rows (teacher.Part).
    fields_N    of Rows, for the whole step: token_N, behavior_logp_N, advantage_N.
    scale_N     weight of each row over the denominator of the whole optimizer step.
    args        LossArgs with temperature and chunk_rows.
    observe     (Rows, top ids of both sides) -> {name: (rows,)}, without gradient.

    Two levels, because products want many rows and everything else wants to stay in cache. chunk_rows rows of both
    sides are projected at once into memory that every chunk uses again; then a few rows at a time run the loss backward
    as far as the logits, whose gradient takes their place; then two products turn it into the gradient of the states
    and of the head. At the end the states' gradient goes through the body once. Extra memory: 2 (chunk_rows, V) tensors
    and a few rows, whatever n is.
    """
    head_VD, head_grad_VD = head
    # the states are divided by the temperature instead of their logits: V/D times less to go over
    states_nD, scale_n, n = hidden_nD.detach() / args.temperature, scale_N[row_n], len(row_n)
    fields_n = {name: value_N[row_n] for name, value_N in fields_N.items()}
    grad_nD, loss_n, noted = torch.empty_like(states_nD), torch.empty_like(scale_n), {}
    logits_CV = head_VD.new_empty(min(args.chunk_rows, n), len(head_VD))
    few = rows_at_once(args.chunk_rows, len(head_VD), states_nD.device)
    for start in range(0, n, args.chunk_rows):
        at = slice(start, min(start + args.chunk_rows, n))
        logits_NV = torch.mm(states_nD[at], head_VD.T, out=logits_CV[:at.stop - start])
        chunk = {name: value_n[at] for name, value_n in fields_n.items()} | part.fields(row_n[at])
        for first in range(start, at.stop, few):
            here = slice(first, min(first + few, at.stop))
            inside = slice(first - start, here.stop - start)
            fields = {name: value_C[inside] for name, value_C in chunk.items()}
            loss_n[here], found = gradient_in_place(logits_NV[inside], fields, scale_n[here], part, divergence, args,
                                                    observe)
            for name, value in found.items():
                noted.setdefault(name, value.new_empty(n))[here] = value
        torch.mm(logits_NV, head_VD, out=grad_nD[at])
        if head_grad_VD is not None:
            add_product(head_grad_VD, logits_NV, states_nD[at])
    hidden_nD.backward(grad_nD / args.temperature)
    return loss_n, noted


def zero_gradients(student) -> None:
    """Zeros, not None: the head's gradient is added by hand."""
    for _, parameter in student.trainable():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.zero_()


def backward(student, rollout, parts: list, fields_N: dict[str, Tensor], scale_N: Tensor, divergence, args,
             observe) -> dict[str, Tensor]:
    """Adds the gradient of sum_n scale_n loss_n to .grad; the same for every micro-batch and chunk size. Arguments as
    in chunked_backward, parts covering the rollout between them; args also has micro_batch_tokens.

    Returns `loss` and what observe notes, each (N,) over all rows of the step; NaN where nothing was noted."""
    head = student.head_weight()
    head = student.head(), head.grad[:student.vocab_size] if head.requires_grad else None
    noted_N: dict[str, Tensor] = {}
    for part in parts:
        for hidden_nD, row_n in student.read(rollout, part.sequence_b, args.micro_batch_tokens):
            loss_n, found = chunked_backward(hidden_nD, row_n, head, part, fields_N, scale_N, divergence, args, observe)
            for name, value_n in {"loss": loss_n, **found}.items():
                noted_N.setdefault(name, torch.full_like(scale_N, torch.nan))[row_n] = value_n.to(scale_N.dtype)
    return noted_N


def row_scale(s: Signals, weight_N: Tensor, reduction: str) -> Tensor:
    """What each row's loss is multiplied by so that the step's loss is a mean: over all rows with a weight (token), or
    over the sequences that have one, each by its own mean (sequence). Counted over the whole step."""
    kept_N = (weight_N > 0).to(weight_N.dtype)
    if reduction == "token":
        return weight_N / kept_N.sum().clamp(min=1)
    per_sequence_B = torch.zeros_like(s.length_B, dtype=weight_N.dtype).scatter_add(0, s.sequence_N, kept_N)
    return weight_N / (per_sequence_B[s.sequence_N].clamp(min=1) * (per_sequence_B > 0).sum().clamp(min=1))
