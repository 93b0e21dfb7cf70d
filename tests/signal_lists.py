"""What the tests of advantages and weights share: one step as Signals, and the same step as plain Python lists."""
import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import torch

from losses import ADVANTAGES, WEIGHTS, LossArgs, Signals
from support.errors import UserError
from support.extras import offers
from support.setup import asked_signals, check_combinations


F64 = torch.float64
GROUP_B = [0, 2, 1, 0, 3, 2, 0, 1, 2, 0, 4, 4]          # of 4, 2, 3, 1 and 2 sequences
REWARD_B = [1, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0]         # groups 1, 3 and 4 are unanimous
PER_ROW = ("token_N", "behavior_logp_N", "student_entropy_N", "teacher_logp_N", "teacher_entropy_N",
           "reference_logp_N", "reverse_kl_N")


# One step, and the same step as plain lists.

def a_step(seed=0, dtype=F64, **fields):
    """Twelve responses of 1 to 6 tokens to five problems; two teachers, some cut, a token past uni_guard."""
    rng = torch.Generator().manual_seed(seed)
    length_B = torch.randint(1, 7, (12,), generator=rng)
    n = int(length_B.sum())
    behavior_logp_N, teacher_logp_N, reference_logp_N = -3 * torch.rand(3, n, generator=rng, dtype=dtype)
    teacher_logp_N[n // 2] -= 12
    student_entropy_N, teacher_entropy_N, reverse_kl_N = 2 * torch.rand(3, n, generator=rng, dtype=dtype)
    base = dict(token_N=torch.randint(9, (n,), generator=rng),
                behavior_logp_N=behavior_logp_N, student_entropy_N=student_entropy_N,
                sequence_N=torch.arange(12).repeat_interleave(length_B),
                position_N=torch.cat([torch.arange(length) for length in length_B.tolist()]),
                length_B=length_B,
                group_B=torch.tensor(GROUP_B), finished_B=torch.rand(12, generator=rng) < 0.8,
                teacher_B=torch.randint(2, (12,), generator=rng), teacher_logp_N=teacher_logp_N,
                teacher_entropy_N=teacher_entropy_N, reference_logp_N=reference_logp_N, reverse_kl_N=reverse_kl_N,
                reward_B=torch.tensor(REWARD_B).to(dtype), progress=0.3, seed=seed)
    return changed(Signals(**base), **fields)


def of_lists(group=None, reward=None, finished=None, dtype=F64, **rows):
    """Signals of sequences written out: teacher=[[-1.0, -2.0], [-3.0]], ... one inner list per sequence."""
    names = {"teacher": "teacher_logp_N", "student": "behavior_logp_N", "reference": "reference_logp_N",
             "kl": "reverse_kl_N", "token": "token_N", "teacher_entropy": "teacher_entropy_N",
             "student_entropy": "student_entropy_N"}
    shape = next(iter(rows.values()))
    flat = {names[key]: torch.tensor(sum(value, []), dtype=torch.int64 if key == "token" else dtype)
            for key, value in rows.items()}
    length_B = torch.tensor([len(row) for row in shape])
    zeros_N = torch.zeros(int(length_B.sum()), dtype=dtype)
    B = len(shape)
    base = dict(token_N=zeros_N.long(), behavior_logp_N=zeros_N, student_entropy_N=zeros_N, length_B=length_B,
                sequence_N=torch.arange(B).repeat_interleave(length_B),
                position_N=torch.cat([torch.arange(len(row)) for row in shape]),
                group_B=torch.tensor(group or [0] * B), finished_B=torch.tensor(finished or [True] * B),
                teacher_B=torch.zeros(B, dtype=torch.int64), progress=0.0, seed=0)
    if reward is not None:
        base["reward_B"] = torch.tensor(reward, dtype=dtype)
    return changed(Signals(**base), **flat)


def changed(s, **fields):
    """The same step with other signals. A plain teacher's log-prob of a response is the sum of those of its tokens."""
    s = s.replace(**fields)
    if "teacher_logp_N" not in vars(s):
        return s
    zeros_B = torch.zeros(len(s.length_B), dtype=s.teacher_logp_N.dtype)
    return s.replace(teacher_total_B=zeros_B.scatter_add(0, s.sequence_N, s.teacher_logp_N))


def without(s, name):
    """The same step, which lacks a signal."""
    return Signals(**{key: value for key, value in vars(s).items() if key != name})


def lists(s):
    """One namespace per sequence: log-probs q, b, r of teacher, behaviour, reference; entropies; kl."""
    step = []
    for b, length in enumerate(s.length_B.tolist()):
        rows = (s.sequence_N == b).nonzero().squeeze(1).tolist()
        assert len(rows) == length
        token, sampled, H_S, q, H_T, r, kl = ([getattr(s, name)[i].item() for i in rows] for name in PER_ROW)
        step.append(SimpleNamespace(
            token=token, b=sampled, H_S=H_S, q=q, H_T=H_T, r=r, kl=kl, group=GROUP_B[b],
            right=REWARD_B[b] == 1, finished=bool(s.finished_B[b]), teacher=int(s.teacher_B[b])))
    return step


def close(value_N, rows, atol=1e-12):
    expected = [x for row in rows for x in row] if isinstance(rows[0], list) else rows
    torch.testing.assert_close(value_N, torch.as_tensor(expected, dtype=value_N.dtype), rtol=0, atol=atol)


def advantage(name, s, **args):
    return ADVANTAGES[name](s, LossArgs(**args))


def weight(name, s, **args):
    return WEIGHTS[name](s, LossArgs(**args))


def args_id(x):
    if not isinstance(x, LossArgs):
        return str(x)
    return ",".join(f"{k}={v}" for k, v in vars(x).items() if v != getattr(LossArgs(), k)) or "defaults"


def variants(**choices):
    return [LossArgs(**dict(zip(choices, values))) for values in product(*choices.values())]


def reopold_c(args):
    x = args.reopold_share
    return math.log(x / (1 - x)) if args.reopold_floor == "logit" else math.log(x) / (1 - x)


# Claims about one entry, for every entry of both tables.

ASKED = ("teacher_logp_N", "teacher_total_B", "teacher_entropy_N", "teacher_B", "reward_B", "reference_logp_N",
         "reverse_kl_N")       # what a rule may ask for, beyond what every step has


def keeps_dtype_inputs_and_order(rule):
    """float32 stays, no argument is written, and only the problem of a sequence matters, not its place in the step."""
    s, args = a_step(4, torch.float32), LossArgs()
    before = {key: x.clone() for key, x in vars(s).items() if isinstance(x, torch.Tensor)}
    value_N = rule(s, args)
    assert value_N.shape == s.behavior_logp_N.shape and value_N.dtype == torch.float32 and value_N.isfinite().all()
    assert all(torch.equal(getattr(s, key), x) for key, x in before.items())
    if rule is not WEIGHTS["random"]:
        order_B = torch.arange(11, -1, -1)
        rows = torch.cat([(s.sequence_N == b).nonzero().squeeze(1) for b in order_B.tolist()])
        turned = s.replace(**{key: x[order_B] if key.endswith("_B") else x[rows] for key, x in before.items()})
        turned = turned.replace(sequence_N=11 - s.sequence_N[rows])
        torch.testing.assert_close(rule(turned, args), value_N[rows])
    return value_N


def fails_without(name, table):
    """The rules of a table that cannot do without this signal."""
    failing = set()
    for rule_name, rule in table.items():
        try:
            rule(without(a_step(), name), LossArgs())
        except UserError as error:
            assert name in str(error)
            failing.add(rule_name)
    return failing


def looks_at_groups(table):
    """The rules of a table that give something else when each response answers a problem of its own."""
    s, alone = a_step(), a_step(group_B=torch.arange(12))
    return {name for name, rule in table.items() if not torch.equal(rule(s, LossArgs()), rule(alone, LossArgs()))}


def refused(cfg, part):
    """Is the configuration refused in a sentence that has this part?"""
    try:
        check_combinations(cfg)
    except UserError as error:
        return part in str(error)
    return False


def needs(cfg):
    """What this configuration looks at: a teacher, several responses to one problem, right answers, an entropy ..."""
    asked = asked_signals(cfg)
    found = {
        "teacher": refused(replace(cfg, teacher="none"), "needs a teacher"),
        "group": refused(replace(cfg, samples=1), "--samples must be at least 2"),
        "reward": "reward_B" in asked or any(needs_answers(cfg) for needs_answers in offers("needs_answers")),
        "kl": "reverse_kl_N" in asked}
    return {what for what, yes in found.items() if yes}
