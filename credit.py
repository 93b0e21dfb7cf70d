"""Credit: how much the whole step says each token should count, before any gradient exists.

Place in the loop:  rollout -> teacher -> [CREDIT] -> losses -> optimizer.  Imports torch only.

Two tables of pure functions of the whole step's rollout. A filter, a group statistic or a normalisation is
only right when it sees all of it: official code of two papers is wrong because it computes them per
micro-batch.

    ADVANTAGES   (Signals, CreditArgs) -> advantage_N    for the policy_gradient divergence; higher = more
                 likely
    WEIGHTS      (Signals, CreditArgs) -> weight_N       >= 0, for every divergence; 0 = dropped

Axes: N rows (response tokens of the step), B sequences, G problems ("groups"). a the sampled token; log q
teacher, log b behaviour (the student when it sampled), log r reference (the student at step 0). Nothing here
carries a gradient.

Add one: write the function, give it a line in its table, say which signals it needs, test it.
"""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from losses import opt


@dataclass(frozen=True)
class CreditArgs:
    discount: float = opt(0.0, "opd: weight of the next token's log-ratio in this token's return (MiniLLM: 1)")
    grpo_std: bool = opt(True, "grpo: divide by the group's standard deviation (off: Dr. GRPO)")
    extrapolate: float = opt(1.25, "exopd: scale of the teacher's reward over the reference; 1 = opd")
    sg_agree: float = opt(1.8, "sg: factor where teacher and verifier agree")
    sg_conflict: float = opt(1.0, "sg: factor where they do not")
    sg_form: str = opt("reference", "sg: the factor extrapolates from the initial student, or scales the advantage",
                       ("reference", "scale"))
    sg_gate: str = opt("sign", "sg: where to extrapolate: where signs agree; the same number of random "
                               "tokens; everywhere",
                       ("sign", "random", "all"))
    kdrl_coef: float = opt(5e-3, "kdrl: weight of the teacher at the first step")
    kdrl_coef_end: float = opt(1e-3, "kdrl: weight of the teacher at the last step, linear in between")
    kdrl_mask: str = opt("none", "kdrl: no teacher on right responses; or on groups with "
                                 "one", ("none", "response", "group"))
    uni_margin: float = opt(0.4, "uni: required gap between the mean log-ratios of right and wrong responses")
    uni_gap: str = opt("mean", "uni: gap of the means, or of worst right against best wrong", ("mean", "minmax"))
    uni_guard: float = opt(10.0, "uni: tokens with a log-ratio at least this large get no credit")
    rlsd_clip: float = opt(0.2, "rlsd: the teacher scales the verifier's advantage by at most 1 +- this")
    scope_temperature: float = opt(1.0, "scope: softness of the perplexity weights")
    scope_sign: str = opt("paper", "scope: weight of right responses grows with perplexity (paper) or falls "
                                   "(scripts)",
                          ("paper", "code"))
    reopold_share: float = opt(0.3, "reopold: student share of the mixture that floors the log-ratio")
    reopold_floor: str = opt("logit", "reopold: floor log(s/(1-s)) or log(s)/(1-s)", ("logit", "jensen"))
    reopold_entropy: float = opt(0.2, "reopold: share of highest-entropy tokens kept in the second half")
    fire_drop: float = opt(0.2, "fire: share of the responses that the teacher finds least likely, dropped")
    fire_alpha: float = opt(1.0, "fire: strength of the teacher's confidence in the token weight")
    fire_beta: float = opt(1.0, "fire: strength of the student's uncertainty in the token weight")
    fire_max: str = opt("sequence", "fire: entropies are divided by the largest of the sequence or of the step",
                        ("sequence", "batch"))
    fire_filter: str = opt("global", "fire: rank the responses over the whole step or per "
                                     "teacher", ("global", "teacher"))
    tip_keep: float = opt(0.5, "tip: share of the tokens kept")
    keep: float = opt(0.5, "random: share of the tokens kept, drawn anew each step")
    skip_first: int = opt(0, "first response tokens without a loss (SDFT: 3)")
    loss_first_n: int = opt(0, "only the first so many tokens of a response get a loss; 0 = all")
    skip_tokens: str = opt("", "comma-separated ids of tokens without a loss, such as special ones")


class Signals(NamedTuple):
    """What is known of a whole step before the update. None: this run does not have it."""
    token_N: Tensor                         # int64: a
    student_N: Tensor                       # float32: log b(a)
    student_entropy_N: Tensor               # nats
    sequence_N: Tensor                      # int64: which sequence a row belongs to; rows of one are neighbours
    position_N: Tensor                      # int64: 0 for the first response token
    length_B: Tensor                        # int64: response tokens
    group_B: Tensor                         # int64: which problem a sequence answers, 0 ... G-1
    finished_B: Tensor                      # bool
    teacher_B: Tensor | None = None         # int64: which teacher scored a sequence
    teacher_N: Tensor | None = None         # log q(a); for a teacher with another tokenizer its effective value
    teacher_total_B: Tensor | None = None   # log q(response) where the effective values do not sum to it
    teacher_entropy_N: Tensor | None = None
    reference_N: Tensor | None = None       # log r(a)
    kl_N: Tensor | None = None              # KL(p||q) over the vocabulary
    reward_B: Tensor | None = None          # float: 1 right, 0 wrong
    progress: float = 0.0                   # step / steps
    seed: int = 0                           # of this step, for random controls


# Small tools

def sequence_mean(value_N: Tensor, s: Signals) -> Tensor:
    """(B,): mean over each sequence's rows."""
    zeros_B = torch.zeros(len(s.length_B), dtype=value_N.dtype, device=value_N.device)
    return zeros_B.scatter_add(0, s.sequence_N, value_N) / s.length_B


def teacher_mean(s: Signals) -> Tensor:
    """(B,): the teacher's log-prob of each response, per student token."""
    return sequence_mean(s.teacher_N, s) if s.teacher_total_B is None else s.teacher_total_B / s.length_B


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
    return s.teacher_N - s.student_N


def opd(s: Signals, args: CreditArgs) -> Tensor:
    """log q(a) - log b(a): minus the sampled reverse KL at this token.  Thinking Machines 2025, discount 0.

    With discount 1 each token also answers for the rest of its sequence: MiniLLM's return-to-go (Gu 2023,
    arXiv:2306.08543), the sequence-level reverse-KL gradient, at a far larger variance.
    """
    return return_to_go(log_ratio(s), s, args.discount) if args.discount else log_ratio(s)


def grpo(s: Signals, args: CreditArgs) -> Tensor:
    """(reward - group mean) / group std (n - 1), the same on every token of a response.  Shao 2024,
    arXiv:2402.03300; without the std: Dr. GRPO, arXiv:2503.20783. A unanimous group gets exactly 0: no
    epsilon decides it."""
    return group_advantage(s, args.grpo_std)[s.sequence_N]


def group_advantage(s: Signals, divide: bool) -> Tensor:
    # counted from the group's lowest reward: seven times 0.1 has a rounded mean that is not 0.1, and the std
    # of that rounding error would turn it into an advantage of 0.9
    start_G = torch.zeros(int(s.group_B.max()) + 1, dtype=s.reward_B.dtype, device=s.reward_B.device)
    above_B = s.reward_B - start_G.scatter_reduce(0, s.group_B, s.reward_B, "amin", include_self=False)[s.group_B]
    centred_B = above_B - group_mean(above_B, s)[s.group_B]
    if not divide:
        return centred_B
    size_B = torch.bincount(s.group_B)[s.group_B]
    variance_B = group_mean(centred_B.square(), s)[s.group_B] * size_B / (size_B - 1).clamp(min=1)
    return torch.where(variance_B > 0, centred_B / variance_B.sqrt(), 0.0)


def exopd(s: Signals, args: CreditArgs) -> Tensor:
    """(log q - log b) + (extrapolate - 1)(log q - log r).  G-OPD / ExOPD, arXiv:2602.12125. The optimum moves
    past the teacher, to r^(1-x) q^x; x = 1 is opd, 0 < x < 1 interpolates."""
    return log_ratio(s) + (args.extrapolate - 1) * (s.teacher_N - s.reference_N)


def sg(s: Signals, args: CreditArgs) -> Tensor:
    """Sign-gated OPD, arXiv:2606.09304.  a1 = the verifier's verdict against its group, a2 = log q - log b;
    factor k = sg_agree where a1 a2 > 0, else sg_conflict.

    reference   a2 + (k - 1)(log q - log r)   form A: extrapolates from the initial student, as ExOPD does
    scale       k a2                          form B
    What k multiplies is our reading: the paper's full text could not be had, and its abstract and those who quote it
    fit both forms. At step 0 (r = b) both are the same. A unanimous group has a1 = 0, agrees nowhere, and is plain OPD at
    sg_conflict 1. A cut response says nothing about its tokens and is not extrapolated either. Gates `random`
    (as many tokens, drawn blindly) and `all` are the controls.
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
    return a2_N + (factor_N - 1) * (s.teacher_N - s.reference_N)


def opdvr(s: Signals, args: CreditArgs) -> Tensor:
    """z max(0, z (log q - log b)), z = +1 for a right response, -1 for a wrong one.  OPDVR, arXiv:2608.24696:
    tokens on which teacher and verifier disagree get nothing."""
    z_N = (2 * s.reward_B - 1)[s.sequence_N]
    return z_N * (z_N * log_ratio(s)).clamp(min=0)


def kdrl(s: Signals, args: CreditArgs) -> Tensor:
    """grpo + coef (log q - log b), coef falling linearly.  KDRL, arXiv:2506.02208 (its k2 term has this
    gradient). kdrl_mask drops the teacher on right responses, or on every response of a group that has
    one."""
    coef = args.kdrl_coef + (args.kdrl_coef_end - args.kdrl_coef) * s.progress
    right_B = s.reward_B > 0
    masked_B = {"none": torch.zeros_like(right_B), "response": right_B,
                "group": group_mean(s.reward_B, s)[s.group_B] > 0}[args.kdrl_mask]
    return grpo(s, args) + torch.where(masked_B[s.sequence_N], 0.0, coef * log_ratio(s))


def uni(s: Signals, args: CreditArgs) -> Tensor:
    """Outcome-guided margin.  Uni-OPD, arXiv:2605.03677: when in a group the mean log-ratio of right
    responses does not exceed that of wrong ones by uni_margin, half of what is missing is added to every
    token of the right ones and taken from the wrong ones. Groups with one outcome stay. Tokens with
    |log-ratio| >= uni_guard get no credit."""
    ratio_N, right_B = log_ratio(s), s.reward_B > 0
    score_B = teacher_mean(s) - sequence_mean(s.student_N, s)
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


def rlsd(s: Signals, args: CreditArgs) -> Tensor:
    """A clip(exp(sign(A)(log q - log b)), 1 - c, 1 + c), A from grpo.  RLSD, arXiv:2604.03128: the verifier
    sets the sign, the teacher (usually the student with privileged context) only the size."""
    advantage_N = grpo(s, args)
    ratio_N = (advantage_N.sign() * log_ratio(s)).exp()
    return advantage_N * ratio_N.clamp(1 - args.rlsd_clip, 1 + args.rlsd_clip)


def scope(s: Signals, args: CreditArgs) -> Tensor:
    """SCOPE, arXiv:2604.10688: right responses are imitated (advantage = weight: the gradient of weighted
    NLL), wrong ones distilled (weight (log q - log b)). Weights are softmaxed perplexities inside the group's
    right and wrong halves, times the half's size: student perplexity^(1/t) on the right, teacher
    perplexity^(-1/t) on the wrong. The launch scripts flip the former's sign (scope_sign code)."""
    right_B = s.reward_B > 0
    sign = 1.0 if args.scope_sign == "paper" else -1.0
    log_ppl_B = torch.where(right_B, -sign * sequence_mean(s.student_N, s), teacher_mean(s))
    score_B = log_ppl_B / args.scope_temperature
    halves = s._replace(group_B=2 * s.group_B + right_B)        # the two halves of a group as groups of their own
    top_G = torch.full((int(halves.group_B.max()) + 1,), -torch.inf, dtype=score_B.dtype, device=score_B.device)
    # from the half's largest down: at a low temperature the exponential itself would overflow
    raw_B = (score_B - top_G.scatter_reduce(0, halves.group_B, score_B, "amax")[halves.group_B]).exp()
    weight_B = raw_B / group_mean(raw_B, halves)[halves.group_B]
    return weight_B[s.sequence_N] * torch.where(right_B[s.sequence_N], 1.0, log_ratio(s))


def reopold_floor(args: CreditArgs) -> float:
    share = torch.tensor(args.reopold_share, dtype=torch.float64)
    floor = (share / (1 - share)).log() if args.reopold_floor == "logit" else share.log() / (1 - share)
    return floor.item()


def reopold(s: Signals, args: CreditArgs) -> Tensor:
    """max(log q - log b, floor).  REOPOLD, arXiv:2603.11137: the reward of a mixture of teacher and student,
    which is bounded below; sources print the floor in two ways. Goes with the weight of the same name."""
    return log_ratio(s).clamp(min=reopold_floor(args))


ADVANTAGES = {"opd": opd, "grpo": grpo, "exopd": exopd, "sg": sg, "opdvr": opdvr, "kdrl": kdrl, "uni": uni,
              "rlsd": rlsd, "scope": scope, "reopold": reopold}


# Weights

def uniform(s: Signals, args: CreditArgs) -> Tensor:
    """Every token counts the same."""
    return torch.ones_like(s.student_N)


def fire(s: Signals, args: CreditArgs) -> Tensor:
    """Filter, then reweight.  FiRe-OPD, arXiv:2606.02684, eqs. 4-8.

    Filter: score = the teacher's mean log-prob of the response; a response below the fire_drop quantile
    (linear, ties stay) of the whole step is dropped. Reweight: (1 + alpha (1 - H_T/max H_T)) (1 + beta
    H_S/max H_S), divided by its mean in the response, so that it shifts weight between tokens and never
    between responses.

    Where paper and code part: the quantile is the paper's (of the whole step); the code takes it inside micro-batches
    of one response, where it drops nothing. The default maximum, per response, is what the code's micro-batches
    amount to; the paper's eqs. 5-6 take the batch's (fire_max batch). It matters: on the toy pair the two weightings
    correlate 0.63.
    """
    score_B = teacher_mean(s)
    part_B = s.teacher_B if args.fire_filter == "teacher" and s.teacher_B is not None else torch.zeros_like(s.group_B)
    keep_B = torch.ones_like(s.finished_B)
    for part in part_B.unique():
        here_B = part_B == part
        keep_B[here_B] = score_B[here_B] >= score_B[here_B].quantile(args.fire_drop)
    floor = 1e-6        # all-zero entropies: the official code's floor, not a repair of ours
    # NaN where a teacher with another tokenizer has no token to answer: such a row has no loss of its own, and its
    # entropy counts as 0 among the others of the response
    teacher_entropy_N = s.teacher_entropy_N.nan_to_num(0.0)
    confident_N = 1 - teacher_entropy_N / largest(teacher_entropy_N, s, args.fire_max).clamp(min=floor)
    confused_N = s.student_entropy_N / largest(s.student_entropy_N, s, args.fire_max).clamp(min=floor)
    weight_N = (1 + args.fire_alpha * confident_N.clamp(0, 1)) * (1 + args.fire_beta * confused_N.clamp(0, 1))
    return weight_N / sequence_mean(weight_N, s)[s.sequence_N] * keep_B[s.sequence_N]


def tip(s: Signals, args: CreditArgs) -> Tensor:
    """The tip_keep share of tokens with the highest h + d - h d, where h = student entropy and d = KL(p||q),
    both scaled
    to [0, 1] over the step: uncertain or wrong.  TIP, arXiv:2604.14084."""
    def scaled(x_N: Tensor) -> Tensor:
        spread = x_N.max() - x_N.min()
        return (x_N - x_N.min()) / spread if spread > 0 else torch.zeros_like(x_N)
    h_N, d_N = scaled(s.student_entropy_N), scaled(s.kl_N)
    return keep_highest(h_N + d_N - h_N * d_N, args.tip_keep)


def keep_highest(score_N: Tensor, share: float) -> Tensor:
    """1 for the ceil(share N) highest scores, earlier rows first among equals; 0 elsewhere."""
    n = max(1, int(-(-share * len(score_N) // 1)))
    return torch.zeros_like(score_N).scatter(0, score_N.argsort(descending=True, stable=True)[:n], 1.0)


def reopold_weight(s: Signals, args: CreditArgs) -> Tensor:
    """First half of training: tokens whose log-ratio is above the floor. Second half: the reopold_entropy
    share of tokens
    with the highest student entropy.  REOPOLD, arXiv:2603.11137 (switch at half: a reading of the paper)."""
    if s.progress < 0.5:
        return (s.teacher_N - s.student_N >= reopold_floor(args)).to(s.student_N.dtype)
    return keep_highest(s.student_entropy_N, args.reopold_entropy)


def random(s: Signals, args: CreditArgs) -> Tensor:
    """A random share of the tokens: the control for every rule that drops some."""
    return keep_highest(permutation(len(s.token_N), s).to(s.student_N.dtype), args.keep)


WEIGHTS = {"none": uniform, "fire": fire, "tip": tip, "reopold": reopold_weight, "random": random}

def supervised(s: Signals, args: CreditArgs) -> Tensor:
    """1 where a token may have a loss at all, whatever the weight: skip_first (SDFT, arXiv:2601.19897),
    loss_first_n (supervision depth), skip_tokens (the special-token mask of arXiv:2603.25562)."""
    last = args.loss_first_n or int(s.length_B.max())
    skipped = torch.tensor([int(part) for part in args.skip_tokens.split(",") if part], dtype=torch.int64,
                           device=s.token_N.device)
    inside_N = (s.position_N >= args.skip_first) & (s.position_N < last) & ~torch.isin(s.token_N, skipped)
    return inside_N.to(s.student_N.dtype)


# What an entry needs beyond the student's own log-probs; train.py checks it before the first step and
# provides it.
NEEDS = {
    "teacher": ("opd", "exopd", "sg", "opdvr", "kdrl", "uni", "rlsd", "scope", "reopold", "fire", "tip"),
    "reward": ("grpo", "sg", "opdvr", "kdrl", "uni", "rlsd", "scope"),
    "group": ("grpo", "sg", "kdrl", "uni", "rlsd", "scope"),
    "reference": ("exopd", "sg"),
    "kl": ("tip",),
}
