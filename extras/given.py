"""Given responses: steps that learn on the data's solutions or on what the teacher wrote, instead of on the student's
own samples.

    --lmbda             GKD: the share of the steps on the student's own samples (arXiv:2306.13649, algorithm 1)
    --cold_start_steps  the first steps imitate filtered responses of the teacher (arXiv:2604.13016, section 5.1)
    --pts_weight        phased teacher sampling: beside each step's loss, the cross-entropy of one verified teacher
                        response per problem, held, then faded out (SG-OPD, arXiv:2606.09304; the phase boundaries are
                        ours)

The first two are sources of a step's responses that are asked before the student (Run.sources); the third adds a
gradient (Run.gradients). What the teacher writes for the last two is kept in the run folder, teacher_responses.json.
"""
import functools
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import torch

import losses
from losses import DIVERGENCES, ON_SAMPLES_ONLY
from rollout import generate
from support.checkpoint import read_responses
from support.errors import UserError
from support.flags import opt, recipe
from support.responses import from_responses
from support.verifier import grade
from teacher import Batch, Untaught

RESPONSES = "teacher_responses.json"


@dataclass(frozen=True)
class Flags:
    lmbda: float = opt(1.0, "GKD: probability that a step learns on the student's own samples; else on given responses",
                       high=1)
    responses: str = opt("solution", "given responses: the data's solutions, or written by the teacher",
                         ("solution", "teacher"))
    cold_start_steps: int = opt(0, "first so many steps: cross-entropy on filtered responses of the teacher")
    pts_weight: float = opt(0.0, "phased teacher sampling: weight of cross-entropy on verified teacher responses; 0 = "
                                 "off")
    pts_hold: float = opt(0.1, "phased teacher sampling: share of the run at full weight", high=1)
    pts_end: float = opt(0.4, "phased teacher sampling: share of the run after which, on a cosine, the weight is 0",
                         high=1)
    pts_samples: int = opt(4, "teacher responses tried per problem, for cold start and phased teacher sampling", low=1,
                           high=1000)


RECIPES = {
    "gkd": recipe("JSD(beta), half of the steps on the student's own samples (2306.13649)", divergence="jsd",
                  lmbda=0.5),
    "sft": recipe("cross-entropy on given responses (--responses teacher: the teacher writes them)",
                  divergence="cross_entropy", lmbda=0.0),
    "sg": recipe("sign gate of verifier and teacher, phased teacher sampling (2606.09304)",
                 divergence="policy_gradient", advantage="sg", pts_weight=0.1, problems=8, samples=8),
}


def rules(cfg) -> list[tuple[bool, str]]:
    return [
        (cfg.lmbda == 1 or cfg.divergence not in ON_SAMPLES_ONLY,
         f"{cfg.divergence} is only right on the student's own samples: keep --lmbda 1"),
        (cfg.weight == "none" or cfg.lmbda == 1,
         f"weight {cfg.weight} reads the student's own samples: keep --lmbda 1"),
        (cfg.pts_hold <= cfg.pts_end, "--pts_hold and --pts_end are shares of the run, the first not above the second"),
        (cfg.teacher != "none" or not has_teacher_write(cfg),
         f"--teacher none: recipe {cfg.recipe} needs a teacher, to write responses"),
        (cfg.lmbda == 1 or cfg.responses == "solution" or cfg.teacher != "self" and "=" not in cfg.teacher,
         "--responses teacher is written by one teacher that is not the student itself; name one, or pass --responses "
         "solution"),
    ]


def has_teacher_write(cfg) -> bool:
    return bool(cfg.cold_start_steps or cfg.pts_weight or cfg.lmbda < 1 and cfg.responses == "teacher")


def needs_answers(cfg) -> bool:
    return cfg.pts_weight > 0


def before_loading(cfg, setup) -> None:
    if cfg.lmbda < 1 and cfg.responses == "solution":
        solutions(cfg, setup.train, "to learn from; or pass --responses teacher")


def attach(run) -> None:
    cfg = run.cfg
    if cfg.lmbda < 1:
        run.places = lambda run, step: places(run.cfg, step)
        write = teacher_writes if cfg.responses == "teacher" else solutions_source(run)
        run.sources.insert(0, (lambda step: not student_writes(cfg.seed, cfg.lmbda, step), write))
    if cfg.cold_start_steps or cfg.pts_weight:
        written: dict[int, list] = {}
        run.before_first_step.append(lambda run, folder, state: written.update(teacher_responses(run, folder)))
        if cfg.pts_weight:
            run.gradients.append(lambda run, batch: imitation(run, batch, written))
        if cfg.cold_start_steps:
            run.step = with_cold_start(run.step, written)


# Sources

def random_of(*key: int) -> np.random.Generator:
    """A stream that (seed, purpose, step) alone decides, so a resumed run draws the same."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@functools.cache
def student_writes(seed: int, lmbda: float, step: int) -> bool:
    """GKD's draw: does the student write the responses of this step?"""
    return random_of(seed, 2, step).random() <= lmbda


def places(cfg, step: int) -> range:
    """Run.places when some steps learn on given solutions: those are one per problem, so other problems fill the batch,
    and still each epoch asks every problem once."""
    def count(step: int) -> int:
        given = cfg.responses == "solution" and not student_writes(cfg.seed, cfg.lmbda, step)
        return cfg.problems * cfg.samples if given else cfg.problems
    start = sum(count(earlier) for earlier in range(step))
    return range(start, start + count(step))


def given(run, asked: list[int], responses: list[list[int]], step: int) -> Batch:
    """Given responses (stop token included) as the batch of a step."""
    ended = [response[-1] in run.tokenizer.stop_ids for response in responses]
    rollout = from_responses([run.prompts[i] for i in asked], responses, ended, run.student.device)
    return Batch(rollout, asked, [run.train[i] for i in asked], False, step, run.tokenizer, run.cfg.verifier)


def solutions(cfg, problems: list, why: str) -> list[str]:
    for problem in problems:
        if not problem.solution:
            raise UserError(f"{cfg.data}, {problem.place} has no solution {why}; add a `solution` field")
    return [problem.solution for problem in problems]


def solutions_source(run):
    stop, most = run.tokenizer.stop_ids[0], run.cfg.max_new_tokens
    ids = [(run.tokenizer.encode(problem.solution) + [stop])[:most] for problem in run.train]

    def write(run, step: int) -> Batch:
        asked = run.order(run, run.places(run, step))
        return given(run, asked, [ids[i] for i in asked], step)
    return write


def writings(run, number: int, chosen: list[int], samples: int, seed: int, shown: bool) -> list[tuple]:
    """(problem, response in the student's ids, finished) of what teacher `number` writes; shown: it reads the prompt
    under which it scores. With another tokenizer, what the student's cannot say exactly is left out."""
    writer = run.kind.writer(run, number, shown)
    cfg = run.cfg
    rollout = generate(writer.model, [writer.prompt(i) for i in chosen], samples=samples, seed=seed, slots=cfg.slots,
                       max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature,
                       stop_ids=writer.tokenizer.stop_ids,
                       progress="teacher writes" if cfg.max_new_tokens > 200 else None)
    written = []
    for b, finished in enumerate(rollout.finished_B.tolist()):
        ids = writer.translate(rollout.response(b), finished)
        if ids and len(ids) <= cfg.max_new_tokens:
            written.append((chosen[b // samples], ids, finished))
    return written


def teacher_writes(run, step: int) -> Batch:
    cfg = run.cfg
    texts = writings(run, 0, run.order(run, run.places(run, step)), cfg.samples, cfg.seed * 2**32 + step, shown=False)
    if not texts:
        raise UserError(f"step {step}: nothing that the teacher wrote can be said in the student's tokens within "
                        f"--max_new_tokens {cfg.max_new_tokens}; raise it, or --problems or --samples")
    return given(run, [i for i, _, _ in texts], [ids for _, ids, _ in texts], step)


# Responses that the teacher wrote once

def degenerate(text: str) -> bool:
    """Does a response run in circles?  The cold-start filters of Rethinking OPD's code (arXiv:2604.13016): a line of at
    least 20 characters five times; a window of 100 characters (every 10th) three times; in texts over 5,000 characters
    a block of at least 50 repeated three times in a row."""
    lines = Counter(line for line in text.splitlines() if len(line) >= 20)
    windows = Counter(text[start:start + 100] for start in range(0, len(text) - 99, 10))
    if max(lines.values(), default=0) >= 5 or max(windows.values(), default=0) >= 3:
        return True
    return len(text) > 5000 and re.search(r"(.{50,500}?)\1\1", text, re.DOTALL) is not None


def wanted(run) -> list[int]:
    """The problems to which responses of the teacher will be used."""
    cfg, asked = run.cfg, {}
    for step in range(math.ceil(cfg.pts_end * cfg.steps) if cfg.pts_weight else 0):
        asked |= dict.fromkeys(run.order(run, run.places(run, step)))
        if len(asked) == len(run.train):
            break
    cold = min(len(run.train), cfg.cold_start_steps * cfg.problems * cfg.samples)
    return list(asked | dict.fromkeys(run.pick(len(run.train), range(cold), cfg.seed)))


def teacher_responses(run, folder) -> dict[int, list]:
    """problem -> responses its teacher wrote, once per run and kept in the run folder: finished, not running in
    circles, and right where there is an answer."""
    cfg, path = run.cfg, folder.path / RESPONSES
    if not path.exists():
        kept: dict[int, list] = {}
        numbers, asked = [run.kind.which(problem) for problem in run.train], wanted(run)
        for number in sorted({numbers[i] for i in asked}):
            ours = [i for i in asked if numbers[i] == number]
            for i, response, finished in writings(run, number, ours, cfg.pts_samples,
                                                  cfg.seed * 2**32 + 2**31 + number, shown=True):
                text, answer = run.tokenizer.decode(response), run.train[i].answer
                if finished and not degenerate(text) and (answer is None or grade(text, answer, cfg.verifier)):
                    kept.setdefault(i, []).append(response)
        if not kept:
            raise UserError("no response of the teacher passed the filter (finished, no repetition, right answer); "
                            "raise --max_new_tokens or leave out --cold_start_steps and --pts_weight")
        folder.keep(RESPONSES, json.dumps(kept))
        print(f"teacher wrote {sum(map(len, kept.values()))} usable responses to {len(kept)} problems")
    return read_responses(path, len(run.train), run.tokenizer.vocab_size)


def with_cold_start(step_after, written: dict[int, list]):
    """step_after, but the first steps imitate what the teacher wrote: cross-entropy, no weights, nothing added."""
    def cold_source(run, step: int) -> Batch:
        cfg, pool, count = run.cfg, sorted(written), run.cfg.problems * run.cfg.samples
        chosen = [pool[i] for i in run.pick(len(pool), range(step * count, (step + 1) * count), cfg.seed)]
        rng = random_of(cfg.seed, 1, step)
        return given(run, chosen, [written[i][rng.integers(len(written[i]))] for i in chosen], step)

    def step(run, optimizer, number: int, clock) -> dict:
        if number >= run.cfg.cold_start_steps:
            return step_after(run, optimizer, number, clock)
        cfg = replace(run.cfg, divergence="cross_entropy", weight="none")
        cold = replace(run, cfg=cfg, asks=(), sources=[(lambda _: True, cold_source)], gradients=[])
        record = step_after(cold, optimizer, number, clock)
        run.batch = cold.batch
        return record
    return step


# Phased teacher sampling

def phased_weight(progress: float, cfg) -> float:
    """Constant, then a cosine down to 0, then 0."""
    if progress < cfg.pts_hold:
        return cfg.pts_weight
    if progress >= cfg.pts_end:
        return 0.0
    return cfg.pts_weight * (1 + math.cos(math.pi * (progress - cfg.pts_hold) / (cfg.pts_end - cfg.pts_hold))) / 2


def imitation(run, batch: Batch, written: dict[int, list]) -> dict:
    """Adds the gradient of phased_weight times the cross-entropy of one verified teacher response per problem of the
    step that has one. They never enter the group statistics."""
    cfg = run.cfg
    weight = phased_weight(batch.step / cfg.steps, cfg)
    chosen = [i for i in dict.fromkeys(batch.asked) if written.get(i)]
    if not weight or not chosen:
        return {}
    rng = random_of(cfg.seed, 4, batch.step)
    responses = [written[i][rng.integers(len(written[i]))] for i in chosen]
    rollout = from_responses([run.prompts[i] for i in chosen], responses, [True] * len(chosen), run.student.device)
    fields_N = {"token_N": rollout.rows(rollout.tokens_BT), "behavior_logp_N": rollout.rows(rollout.logp_BT)}
    scale_N = torch.full_like(fields_N["behavior_logp_N"], weight / len(fields_N["token_N"]))
    noted = losses.backward(run.student, rollout, [Untaught(rollout.every_B)], fields_N, scale_N,
                            DIVERGENCES["cross_entropy"], cfg, run.observe)
    return {"teacher_cross_entropy": noted["loss"].mean().item(), "teacher_weight": weight}
