"""On-policy distillation: the student writes, the teacher scores every token, the student moves.

    python train.py                                   # the toy pair in toy/: about a minute on two CPU cores
    python train.py --recipe fire --lr 1e-4           # another method, another flag
    python train.py --help                            # every flag and what it means

The loop, and the file that holds each part of it:

    problems ──► rollout.generate(student) ──► Rollout ──► teacher.parts ──► hidden states, signals ──┐
                                                  │                                                   ▼
                                   verifier ── reward_B ──► losses: advantage_N, weight_N   (whole step, no gradient)
                                                                                                      │
    micro-batch: model.read ──► losses: Rows ──► loss_N ──► sum_n scale_n loss_n ──► backward ──► optimizer

What a step does depends on (seed, step) alone, so a resumed run takes the same steps. A recipe is a row of flags; any
flag given beside it overrides it. The run is written to runs/NAME, and the same command again goes on where it stopped.
What only some runs ask for is in extras/ and attaches itself to the Run; without that folder this file still trains.
"""
import math
import sys

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import losses
from eval import test, test_teacher
from losses import ADVANTAGES, DIVERGENCES, USES_ADVANTAGE, WEIGHTS, Signals, row_scale, supervised
from rollout import generate
from support.checkpoint import RunFolder
from support.errors import UserError
from support.extras import load_extras
from support.flags import gather, recipe
from support.metrics import summarise, token_metrics
from support.report import Clock, Report
from support.settings import HELP, Core
from support.setup import Run
from support.start import graceful_stop, start
from teacher import SIGNALS, Batch, Part

# Recipes: a row of flags for each paper. What a flag means: support/settings.py and, for the loss, losses.py

PG, GROUPS = dict(divergence="policy_gradient"), dict(problems=8, samples=8)    # GROUPS: several responses per problem

RECIPES = {
    "opd": recipe("full-vocabulary reverse KL on the student's samples (MiniLLM, GKD, Thinking Machines)"),
    "topk": recipe("reverse KL on the student's top 16, code form (2604.13016)", divergence="topk_reverse_kl"),
    "lsm": recipe("reverse KL on the teacher's top k, both sides renormalised (2603.25562)", support="teacher",
                  divergence="topk_reverse_kl", topk_form="renormalised"),
    "eopd": recipe("forward KL where the teacher is unsure (2603.07079)", divergence="eopd", advantage="opd"),
    "minillm": recipe("sampled policy gradient with return-to-go (2306.08543)", advantage="opd", discount=1.0, **PG),
    "fire": recipe("drop unlikely responses, then reweight tokens (FiRe-OPD 2606.02684)", weight="fire",
                   reduction="sequence", **PG),
    "tip": recipe("the tokens that matter (TIP 2604.14084)", divergence="reverse_kl", weight="tip"),
    "reopold": recipe("floored log-ratio, two phases (2603.11137)", advantage="reopold", weight="reopold", **PG),
    "grpo": recipe("verifier reward, no teacher (2402.03300)", advantage="grpo", teacher="none", **PG, **GROUPS),
    "opdvr": recipe("teacher where the verifier agrees (2608.24696)", advantage="opdvr", **PG, **GROUPS),
    "kdrl": recipe("GRPO plus a little OPD (2506.02208)", advantage="kdrl", **PG, **GROUPS),
    "uni": recipe("outcome-guided margin (Uni-OPD 2605.03677)", advantage="uni", **PG, **GROUPS),
    "scope": recipe("imitate right responses, distil wrong ones (2604.10688)", advantage="scope", **PG, **GROUPS),
}

SETTINGS = gather(Core, RECIPES, HELP, load_extras())   # with what extras/__init__.py lists, where that folder is there
Config = SETTINGS.config


# One step

def pick(total: int, places: range, seed: int) -> list[int]:
    """The problems at these places of an endless list: every epoch is a new permutation of all of them."""
    orders = {epoch: np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(total)
              for epoch in {place // total for place in places}}
    return [int(orders[place // total][place % total]) for place in places]


def student_writes(run: Run, step: int) -> Batch:
    """The responses of a step, by the student as it is now."""
    cfg, asked = run.cfg, run.order(run, run.places(run, step))
    if run.actor is not run.student:
        run.actor.refresh(run.student)
    rollout = generate(run.actor, [run.prompts[i] for i in asked], samples=cfg.samples, seed=cfg.seed * 2**32 + step,
                       max_new_tokens=cfg.max_new_tokens, stop_ids=run.tokenizer.stop_ids, slots=cfg.slots,
                       temperature=cfg.temperature, progress="rollout" if cfg.max_new_tokens > 200 else None)
    asked = [i for i in asked for _ in range(cfg.samples)]
    return Batch(rollout, asked, [run.train[i] for i in asked], True, step, run.tokenizer, cfg.verifier)


def signals(run: Run, batch: Batch, parts: list[Part]) -> Signals:
    """The whole step as rows, with what the rules of this run ask for."""
    cfg, rollout = run.cfg, batch.rollout
    group_of = {problem: group for group, problem in enumerate(dict.fromkeys(batch.asked))}
    asked = {name: SIGNALS[name](run, batch, parts) for name in run.asks}
    return Signals(
        token_N=rollout.rows(rollout.tokens_BT), behavior_logp_N=rollout.rows(rollout.logp_BT),
        student_entropy_N=rollout.rows(rollout.entropy_BT), sequence_N=rollout.sequence_N,
        position_N=rollout.position_N, length_B=rollout.length_B, finished_B=rollout.finished_B,
        group_B=torch.tensor([group_of[i] for i in batch.asked], device=rollout.length_B.device),
        progress=batch.step / max(1, cfg.steps - 1), seed=cfg.seed * 2**32 + batch.step, **asked)


def train_step(run: Run, optimizer, step: int, clock: Clock) -> dict:
    """Roll out, score, weigh, update. Returns the step's record for metrics.jsonl."""
    cfg = run.cfg
    with clock("rollout"):
        batch = run.batch = next(write for writes, write in run.sources if writes(step))(run, step)
    with clock("score"), torch.no_grad():
        parts = run.teacher.parts(batch)
        s = signals(run, batch, parts)
        weight_N = run.weigh(run, s)
        fields_N = {"token_N": s.token_N, "behavior_logp_N": s.behavior_logp_N}
        if cfg.divergence in USES_ADVANTAGE:
            fields_N["advantage_N"] = ADVANTAGES[cfg.advantage](s, cfg)
        scale_N = run.scale(run, s, weight_N)
    for name, value_N in (("advantage", fields_N.get("advantage_N", scale_N)), ("weight", scale_N)):
        if not torch.isfinite(value_N[scale_N != 0]).all():
            raise UserError(f"--{name} {getattr(cfg, name)} is not a number for some tokens that count: it reads a "
                            f"signal that this teacher does not give")
    with clock("update"):
        moves = [update(run, optimizer, batch, parts, fields_N, scale_N) for _ in range(cfg.updates)]
    noted = token_metrics(s, batch) | {"weight": weight_N}
    noted |= {"advantage": fields_N["advantage_N"]} if "advantage_N" in fields_N else {}
    return {**step_metrics(moves, batch.on_policy), **summarise(noted, s.position_N, s.length_B[s.sequence_N]),
            "kept": (weight_N > 0).double().mean().item(),
            "mean_length": s.length_B.double().mean().item(),
            "truncation_rate": 1 - batch.rollout.finished_B.double().mean().item(), "on_policy": int(batch.on_policy),
            "lr": learning_rate(step, cfg, cfg.lr), "tokens": int(s.length_B.sum())}


def learning_rate(step: int, cfg, highest: float) -> float:
    """The learning rate of a step; `highest` is the one right after the warm-up."""
    if step < cfg.warmup_steps:
        return highest * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return highest
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return highest * (1 + np.cos(np.pi * done)) / 2


def update(run: Run, optimizer, batch: Batch, parts: list, fields_N: dict[str, Tensor], scale_N: Tensor) -> dict:
    """One optimizer step. Returns the step's loss, the gradient norm before clipping and the mean diagnostics.

    A loss or gradient that is not finite moves nothing: skipped = 1. Nor does a gradient that is exactly zero (every
    group unanimous, every token masked), where AdamW would go on by its moments alone: empty = 1."""
    cfg, student = run.cfg, run.student
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(batch.step, cfg, group.setdefault("initial_lr", group["lr"]))
    parameters = [parameter for _, parameter in student.trainable()]
    losses.zero_gradients(student)
    noted = losses.backward(student, batch.rollout, parts, fields_N, scale_N, DIVERGENCES[cfg.divergence], cfg,
                            run.observe)
    more = {}
    for add_gradient in run.gradients:
        more |= add_gradient(run, batch)
    grad_norm = run.clip(parameters, cfg.max_grad_norm)
    loss = (noted.pop("loss") * scale_N).sum()
    finite = bool(torch.isfinite(loss) & torch.isfinite(grad_norm))
    if finite and grad_norm > 0:
        optimizer.step()
    length_N = batch.rollout.length_B[batch.rollout.sequence_N]
    return {"loss": loss.item(), "grad_norm": grad_norm.item(), "skipped": int(not finite),
            "empty": int(finite and grad_norm == 0), **summarise(noted, batch.rollout.position_N, length_N), **more}


def step_metrics(moves: list[dict], on_policy: bool) -> dict:
    """The last update's numbers; but `skipped` and `empty` are 1 if any update was, and sampler_gap is the first
    update's, the only one before which the student has not moved since it sampled."""
    gap = {key: value if on_policy else math.nan for key, value in moves[0].items() if key.startswith("sampler_gap")}
    return moves[-1] | gap | {key: max(move[key] for move in moves) for key in ("skipped", "empty")}


# The loop

def make_optimizer(student, cfg):
    """Any torch optimizer, or support.optimizers.Optimizers of several: its moments are saved by parameter name, and
    the learning rate of each group rises and falls by the schedule."""
    return torch.optim.AdamW([p for _, p in student.trainable()], lr=cfg.lr, betas=(0.9, 0.999),
                             weight_decay=cfg.weight_decay, fused=student.device.type in ("cuda", "cpu"))


def train(run: Run, folder: RunFolder) -> int:
    """The run, from wherever the folder says it stands. Returns the exit status: 0, or 128 + signal when stopped."""
    cfg, report = run.cfg, Report(run, folder)
    optimizer = run.make_optimizer(run.student, cfg)
    state = report.resume(optimizer)
    for ready in run.before_first_step:
        ready(run, folder, state)
    if state is None:
        state = report.begin(*test(run, "student before"), test_teacher(run))
        report.save(0, optimizer)       # the untouched student is the first candidate for best/
    with graceful_stop() as stopped, tqdm(total=cfg.steps, initial=state["step"], unit="step", disable=None) as bar:
        while state["step"] < cfg.steps:
            clock = Clock()
            record = run.step(run, optimizer, state["step"], clock)
            step = state["step"] = state["step"] + 1
            report.step(step, record, clock)
            bar.update()
            due = cfg.eval_every and step % cfg.eval_every == 0 or step == cfg.steps
            if due:
                report.evaluation(step, *test(run, "evaluate"))
            stop = run.agree(stopped[0] if stopped else 0)  # asked once: saving and leaving must agree
            if due or stop or step % cfg.save_every == 0:
                report.save(step, optimizer)
            if stop and step < cfg.steps:
                tqdm.write(f"stopped after step {step}; the same command goes on from there")
                return 128 + stop
    report.finish()
    return 0


def defaults(run: Run) -> None:
    """What a step is made of. Extras put theirs before, around or in place of these."""
    run.places = lambda run, step: range(step * run.cfg.problems, (step + 1) * run.cfg.problems)
    run.pick, run.order = pick, lambda run, places: pick(len(run.train), places, run.cfg.seed)
    run.sources = [(lambda step: True, student_writes)]     # (whether it writes a step, how); the first that does
    run.weigh = lambda run, s: WEIGHTS[run.cfg.weight](s, run.cfg) * supervised(s, run.cfg)
    run.scale = lambda run, s, weight_N: row_scale(s, weight_N, run.cfg.reduction)
    run.clip = torch.nn.utils.clip_grad_norm_
    run.step, run.make_optimizer = train_step, make_optimizer


def main(argv: list[str] | None = None) -> int:
    return start(sys.argv[1:] if argv is None else argv, SETTINGS, defaults, train)


if __name__ == "__main__":
    sys.exit(main())
