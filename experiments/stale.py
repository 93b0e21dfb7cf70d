"""Several updates on one rollout: what it saves, and what is wrong with the gradient of text that has grown stale.

    python experiments/stale.py                 # a quarter of an hour on two idle cores
    python experiments/stale.py --quick         # a minute: two seeds, few arms, a rough picture

Claim      Two or three passes over one batch of the student's text help. Forward KL bears stale text, reverse
           KL suffers, unless it is computed anew with the student as it is when it learns.
Paper      CLOOPD, arXiv:2609.24141 (passes); AsyncOPD, arXiv:2606.24143 (directions, computing anew). What
           they say here is from their abstracts and what others write of them.
Design     The toy pair. `--updates K` takes K optimizer steps on one rollout of 32 responses. Exact divergences
           and the ratio p/b are computed anew at each of them; the credit log q - log b of the sampled policy
           gradient is not. As many rollouts for every K, so the same student tokens; the learning rate of
           every arm is the best of a few on a seed that is not reported. Then the bias itself: a student that
           has made K more updates on one rollout, the gradient of each loss on text of the student before
           them, and on text of its own, both on the same problems. Each kind of text is written twice, and an
           inner product of independent halves has no noise in its mean: cosine and ratio of the norms are
           those of the expected gradients. The student is moved by exact reverse KL, for all estimates alike.
Against    more updates no better at equal tokens, or no cheaper; reverse KL as close to its fresh gradient as
           forward KL; the sampled loss as good without its clip.
"""
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from compare import (accuracy_key, arguments, differences, known, number, options, percent, ready, records, run_all,
                     summary, table)
import losses
import train
from losses import Rows, forward_kl, reverse_kl
from rollout import generate
from support.report import Clock
from teacher import Batch, Teacher, told

LOSSES = {
    "reverse KL": "opd",
    "forward KL": "opd --divergence forward_kl",
    "sampled": "opd --divergence policy_gradient",
    "sampled, no clip": "opd --divergence policy_gradient --clip 1e6"}
UPDATES = (1, 2, 4, 8)
RATES = ("3e-5", "1e-4", "3e-4", "1e-3", "3e-3")    # of which every arm takes the one that is best on RATE_SEED
RATE_SEED = 100
FLAGS = "--problems 32 --steps 16 --eval_k 2 --warmup_steps 0 --no-eval_teacher --no-token_view --save_every 1000"
MOVED_BY = {"reverse KL": "opd --problems 32 --lr 3e-4 --warmup_steps 0"}
POINTS = (("reverse KL", 5), ("reverse KL", 30))        # (by which loss, after how many steps)
QUICK = dict(updates=(1, 4), losses=("reverse KL", "sampled"), points=POINTS[:1], half=96, rates=RATES[2:3])
FULL = dict(updates=UPDATES, losses=tuple(LOSSES), points=POINTS, half=192, rates=RATES)


# How well it learns

def arms(plan: dict) -> dict[str, str]:
    """Each loss with each number of updates. With one update nothing is clipped: the arm without clip begins at two."""
    return {f"{name}, {k}": f"{LOSSES[name]} --updates {k}" for name in plan["losses"] for k in plan["updates"]
            if k > 1 or "no clip" not in name}


def stages(runs: Path, plan: dict = FULL, rates: dict | None = None) -> dict[str, tuple[dict[str, str], str]]:
    """name -> (arms, flags of all its arms). rates: arm -> its learning rate; without them the middle one."""
    found = arms(plan)
    return {"rates": ({f"{label}, lr {rate}": f"{command} --lr {rate}" for label, command in found.items()
                       for rate in plan["rates"]}, f"{FLAGS} --eval_every 0"),
            "learning": ({label: f"{command} --lr {(rates or {}).get(label, RATES[2])}"
                          for label, command in found.items()}, f"{FLAGS} --eval_every 4"),
            "bias": (MOVED_BY, "--steps 1000")}


def best_rates(plan: dict, runs: Path) -> dict[str, str]:
    """The learning rate with which an arm ends highest on one seed that no table shows: from the middle one, as long as
    a neighbour is better."""
    tried, flags = stages(runs, plan)["rates"]
    rates = plan["rates"]
    at = {label: len(rates) // 2 for label in arms(plan)}
    while len(rates) > 1:
        near = {label: [i for i in (here, here - 1, here + 1) if 0 <= i < len(rates)] for label, here in at.items()}
        names = [f"{label}, lr {rates[i]}" for label, places in near.items() for i in places]
        found = run_all({name: tried[name] for name in names}, flags, 1, runs / "rates", first=RATE_SEED)

        def ends_at(name: str) -> float:
            (folder,) = found[name]
            return summary(folder)["after"][accuracy_key(folder)]
        best = {label: max(near[label], key=lambda i: ends_at(f"{label}, lr {rates[i]}")) for label in at}
        if best == at:
            break
        at = best
    return {label: rates[here] for label, here in at.items()}


def steps_of(folder: Path) -> list[dict]:
    return [record for record in records(folder) if "eval" not in record]


def prices(folders: list[Path]) -> tuple[float, float]:
    """Seconds per token of writing and scoring, and of one update: medians over the steps of all these runs, so that
    what else the machine did during one of them does not count against its arm."""
    steps = [(record, updates_of(folder)) for folder in folders for record in steps_of(folder)]
    return (float(np.median([(one["seconds"] - one["update_seconds"]) / one["tokens"] for one, _ in steps])),
            float(np.median([one["update_seconds"] / one["tokens"] / updates for one, updates in steps])))


def updates_of(folder: Path) -> int:
    return json.loads((folder / "config.json").read_text())["updates"]


def path(folder: Path, writing: float, update: float) -> list[tuple[float, int, float]]:
    """(accuracy, student tokens, seconds at these prices) at every evaluation."""
    points, tokens = [], 0
    for record in records(folder):
        if "eval" in record:
            seconds = tokens * (writing + update * updates_of(folder))
            points.append((record["eval"][accuracy_key(folder)], tokens, seconds))
        else:
            tokens += record["tokens"]
    return points


def print_learning(found: dict[str, list[Path]], rates: dict[str, str]) -> None:
    """One row per arm; what is equal is what the run that took least of it in all had taken."""
    price = prices([folder for folders in found.values() for folder in folders])
    paths = {label: [np.array(path(folder, *price)) for folder in folders] for label, folders in found.items()}
    least = [min(one[-1, column] for of_seeds in paths.values() for one in of_seeds) for column in (1, 2)]

    def at(label: str, column: int) -> list[float]:
        return [float(np.interp(least[column - 1], one[:, column], one[:, 0])) for one in paths[label]]
    rows = []
    for label, of_seeds in paths.items():
        once, first = f"{label.rpartition(',')[0].removesuffix(', no clip')}, 1", found[label][0]
        gains = ["" if label == once else percent(differences(at(label, column), at(once, column)), "+")
                 for column in (1, 2)]
        rows.append([label, rates[label], len(steps_of(first)) * updates_of(first),
                     f"{np.mean([one[-1, 1] for one in of_seeds]):,.0f}", percent(at(label, 1)), gains[0],
                     percent(at(label, 2)), gains[1], f"{np.mean([one[-1, 2] for one in of_seeds]):.1f}"])
    table(["loss, updates per rollout", "lr", "optimizer steps", "student tokens", f"at equal tokens ({least[0]:,.0f})",
           "against one update", f"at equal seconds ({least[1]:.1f})", "against one update", "seconds"], rows)
    print("priced at {:.0f} microseconds per token written and scored, {:.0f} per token and update\n".format(
        *(1e6 * seconds for seconds in price)))


# What is wrong with the gradient

def ratio(r: Rows) -> Tensor:
    return (r.student_logp_N() - r.behavior_logp_N).exp()


def without_clip(r: Rows, args) -> Tensor:
    return -ratio(r) * r.advantage_N


def without_ratio(r: Rows, args) -> Tensor:
    """The fresh formula on stale text: as if the student as it is had written it."""
    return -r.student_logp_N() * r.advantage_N


def credit_anew(r: Rows, args) -> Tensor:
    """The credit log q - log p of the student as it is, in place of log q - log b: unbiased at every prefix."""
    return -ratio(r) * (r.teacher_logp_N() - r.student_logp_N()).detach()


def sampled_forward(r: Rows, args) -> Tensor:
    """-q(a)/b(a) log p(a): the gradient of KL(q||p) in the mean over a ~ b, whatever the student is now."""
    return -(r.teacher_logp_N() - r.behavior_logp_N).exp() * r.student_logp_N()


ESTIMATES = {       # name -> (loss, the exact loss whose fresh gradient it stands for)
    "reverse KL, exact": (reverse_kl, reverse_kl),
    "reverse KL, sampled, credit anew": (credit_anew, reverse_kl),
    "reverse KL, sampled, no clip": (without_clip, reverse_kl),
    "reverse KL, sampled": (losses.policy_gradient, reverse_kl),
    "reverse KL, sampled, no ratio": (without_ratio, reverse_kl),
    "forward KL, exact": (forward_kl, forward_kl),
    "forward KL, sampled": (sampled_forward, forward_kl)}


def written(run, stream: int, half: int) -> tuple[Batch, list, dict[str, Tensor]]:
    """One response of the student as it is to each of the first problems; what the teacher says; fields of the rows."""
    rollout = generate(run.student, run.prompts[:half], seed=2**40 + stream, max_new_tokens=run.cfg.max_new_tokens,
                       stop_ids=run.tokenizer.stop_ids, slots=run.cfg.slots)
    batch = Batch(rollout, list(range(half)), run.train[:half], True, 0, run.tokenizer)
    parts = run.teacher.parts(batch)
    behavior_N = rollout.rows(rollout.logp_BT)
    return batch, parts, {"token_N": rollout.rows(rollout.tokens_BT), "behavior_logp_N": behavior_N,
                          "advantage_N": told("teacher_logp_N")(run, batch, parts) - behavior_N}


def gradient(run, text: tuple, loss) -> Tensor:
    """Of the mean of a loss over all tokens of this text, for all weights in one row."""
    batch, parts, fields_N = text
    scale_N = torch.full_like(fields_N["behavior_logp_N"], 1 / len(fields_N["behavior_logp_N"]))
    losses.zero_gradients(run.student)
    losses.backward(run.student, batch.rollout, parts, fields_N, scale_N, loss, run.cfg, lambda rows, top_NK: {})
    return torch.cat([p.grad.flatten() for _, p in run.student.trainable()]).double()


def compared(stale: list[Tensor], fresh: list[Tensor]) -> tuple[float, float]:
    """(cosine, ratio of the norms) of the expected gradients, from two independent estimates of each: a product of two
    independent ones has the expectations' product for its mean, and a square of one would add its noise."""
    both = sum((s @ f).item() for s in stale for f in fresh) / 4
    stale2, fresh2 = (stale[0] @ stale[1]).item(), (fresh[0] @ fresh[1]).item()
    if min(stale2, fresh2) <= 0:
        return float("nan"), float("nan")
    return both / (stale2 * fresh2) ** 0.5, (stale2 / fresh2) ** 0.5


def bias(seed: int, mover: str, start: int, plan: dict, runs: Path) -> dict[tuple[str, int], tuple[float, float]]:
    """(estimate, updates) -> compared, for a student of `start` steps and up to the most updates on one rollout after
    them, by the loss `mover`. Beside them ("halves agree", updates): the plain cosine of two fresh halves, for the
    exact and the sampled loss, which says how much noise there was to take out; and ("moved", updates): KL of writer
    to student, and the share of tokens whose ratio is outside the clip."""
    found = {}
    with redirect_stdout(sys.stderr):
        run = ready(arguments(MOVED_BY[mover], "--steps 1000", seed, runs / "bias"))
        optimizer = run.make_optimizer(run.student, run.cfg)
        for step in range(start):
            run.step(run, optimizer, step, Clock())
        stale = [written(run, 4 * seed + half, plan["half"]) for half in range(2)]
        batch = train.student_writes(run, start)
        parts, behavior_N = run.teacher.parts(batch), batch.rollout.rows(batch.rollout.logp_BT)
        fields_N = {"token_N": batch.rollout.rows(batch.rollout.tokens_BT), "behavior_logp_N": behavior_N}
        scale_N = torch.full_like(behavior_N, 1 / len(behavior_N))
        for k in range(max(plan["updates"]) + 1):
            if k:
                train.update(run, optimizer, batch, parts, fields_N, scale_N)
            if k == 0 or k in plan["updates"]:
                found |= {(name, k): value for name, value in at_staleness(run, stale, 1000 * k + 4 * seed, plan)}
    return found


def at_staleness(run, stale: list[tuple], stream: int, plan: dict):
    """The rows of `bias` for the student as it is."""
    fresh = [written(run, 2 + stream + half, plan["half"]) for half in range(2)]
    exact = {loss: [gradient(run, text, loss) for text in fresh] for loss in (reverse_kl, forward_kl)}
    for name, (loss, target) in ESTIMATES.items():
        yield name, compared([gradient(run, text, loss) for text in stale], exact[target])
    sampled = [gradient(run, text, losses.policy_gradient) for text in fresh]
    yield "halves agree", tuple(torch.cosine_similarity(*pair, dim=0).item() for pair in (exact[reverse_kl], sampled))
    moved_N = torch.cat([log_ratio_now(run, text) for text in stale])
    yield "moved", (-moved_N.mean().item(), (moved_N.exp() - 1).abs().gt(run.cfg.clip).double().mean().item())


@torch.no_grad()
def log_ratio_now(run, text: tuple) -> Tensor:
    """log p(a) - log b(a) of the text's tokens."""
    batch, _, fields_N = text
    part = Teacher(run.student, run.cfg).read(batch, batch.rollout.every_B)
    return told("teacher_logp_N")(run, batch, [part]) - fields_N["behavior_logp_N"]


def print_bias(seeds: int, plan: dict, runs: Path) -> None:
    counts = (0, *plan["updates"])
    for mover, start in plan["points"]:
        found, at = [bias(seed, mover, start, plan, runs) for seed in range(seeds)], f"{mover}, after {start} steps"
        for measure, column in (("cosine", 0), ("ratio of norms", 1)):
            rows = [[name, *(known([one[name, k][column] for one in found]) for k in counts)] for name in ESTIMATES]
            table([f"{at}: {measure}, stale to fresh; updates since", *map(str, counts)], rows)
        names = (("halves agree", 0, "cosine of two fresh halves, exact"), ("halves agree", 1, "the same, sampled"),
                 ("moved", 0, "KL of writer to student, nats per token"), ("moved", 1, "tokens beyond the clip"))
        table([f"{at}: halves of {plan['half']} responses; updates since", *map(str, counts)],
              [[title, *(number([one[name, k][column] for one in found], ".3f") for k in counts)]
               for name, column, title in names])


def main() -> None:
    args = options(__doc__, "stale", seeds=5, quick="two seeds and few arms, in two minutes")
    plan, seeds = (QUICK, min(args.seeds, 2)) if args.quick else (FULL, args.seeds)
    rates = best_rates(plan, args.runs)
    learning, flags = stages(args.runs, plan, rates)["learning"]
    print_learning(run_all(learning, flags, seeds, args.runs / "learning"), rates)
    print_bias(seeds, plan, args.runs)


if __name__ == "__main__":
    main()
