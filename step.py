"""Step: one turn of the loop. Ask, write, read, weigh, move.

Place in the loop: all of it once; train.py repeats it. (seed, step) alone decide what happens, never a stream
that was left somewhere, so a resumed run does the same.

    collect          which problems, and who writes the responses: the student, the data, or the teacher
    teacher_reads    what the teachers see: the student's prompt, or one that shows a solution
    look             rollout, rewards, scores, signals: everything before the update
    train_step       advantage and weight from credit.py, one backward pass, one optimizer step
"""
import functools
import json
import math
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import credit
import losses
import parallel
from across import Crossing
from checkpoint import RunFolder, read_responses, write_text
from credit import ADVANTAGES, WEIGHTS
from data import SHOWN_SOLUTION, degenerate, pick, pick_mixed, privileged_prompt
from diagnostics import repeats, summarise
from eval import grade
from prepare import Setup, needs
from rollout import Rollout, from_responses, generate
from teacher import Scores, disagreement, distributions, score, update_average
from tokenizer import UserError
from update import backward, row_scale, signals, update


def learning_rate(step: int, cfg, highest: float) -> float:
    """Of a parameter group whose learning rate after the warm-up is `highest`."""
    if step < cfg.warmup_steps:
        return highest * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return highest
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return highest * (1 + np.cos(np.pi * done)) / 2


class Clock:
    """Seconds by phase: `with clock("rollout"): ...`. On a GPU the phases end where the host reads a
    result."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


def random_of(*key: int) -> np.random.Generator:
    """A stream that (seed, purpose, step) alone decides, so a resumed run draws the same."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))


@functools.cache
def student_writes(seed: int, lmbda: float, step: int) -> bool:
    """GKD's draw: does the student write the responses of this step?"""
    return random_of(seed, 2, step).random() <= lmbda


def count_asked(cfg, step: int) -> int:
    """Problems that a step asks. Given solutions are one per problem, so other problems fill the batch."""
    given = cfg.responses == "solution" and not student_writes(cfg.seed, cfg.lmbda, step)
    return cfg.problems * cfg.samples if given else cfg.problems


def ask(cfg, run: Setup, step: int) -> list[int]:
    """The problems of this step: each epoch asks every problem once, whoever writes."""
    start = step * cfg.problems if cfg.lmbda == 1 else sum(count_asked(cfg, earlier) for earlier in range(step))
    places = range(start, start + count_asked(cfg, step))
    if not cfg.mix:
        return pick(len(run.train), places, cfg.seed)
    return pick_mixed(run.first, len(run.train) - run.first, cfg.mix, places, cfg.seed)


def collect(cfg, run: Setup, step: int, written: dict[int, list]) -> tuple[Rollout, list[int], bool]:
    """This step's sequences, the problem each answers, and whether the student wrote them."""
    def given(chosen: list[int], responses: list[list[int]]) -> tuple[Rollout, list[int], bool]:
        ended = [response[-1] in run.tokenizer.stop_ids for response in responses]
        return from_responses([run.prompts[i] for i in chosen], responses, ended, run.student.device), chosen, False
    if step < cfg.cold_start_steps:
        pool, count = sorted(written), cfg.problems * cfg.samples
        chosen = [pool[i] for i in pick(len(pool), range(step * count, (step + 1) * count), cfg.seed)]
        rng = random_of(cfg.seed, 1, step)
        return given(chosen, [written[i][rng.integers(len(written[i]))] for i in chosen])
    on_policy, chosen = student_writes(cfg.seed, cfg.lmbda, step), ask(cfg, run, step)
    if not on_policy and cfg.responses == "solution":
        return given(chosen, [run.given[i] for i in chosen])
    if not on_policy:
        texts = teacher_writes(cfg, run, 0, run.prompts, chosen, cfg.samples, cfg.seed * 2**32 + step)
        if not texts:
            raise UserError(f"step {step}: nothing that the teacher wrote can be said in the student's tokens within "
                            f"--max_new_tokens {cfg.max_new_tokens}; raise it, or --problems or --samples")
        return given([i for i, _, _ in texts], [ids for _, ids, _ in texts])
    rollout = generate(run.actor, [run.prompts[i] for i in chosen], samples=cfg.samples,
                       stop_ids=run.tokenizer.stop_ids, vocab_size=run.vocab_size, seed=cfg.seed * 2**32 + step,
                       one_stop=bool(run.one_stop), **sampling(cfg))
    return rollout, [i for i in chosen for _ in range(cfg.samples)], True


def sampling(cfg) -> dict:
    return dict(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, slots=cfg.slots, compile=cfg.compile,
                progress="rollout" if cfg.max_new_tokens > 200 else None)


def teacher_writes(cfg, run: Setup, number: int, prompts: list[list[int]], chosen: list[int], samples: int,
                   seed: int) -> list[tuple[int, list[int], bool]]:
    """(problem, response in the student's ids, finished) of what a teacher writes. With another tokenizer it
    reads its own prompts, and what the student's cannot say exactly is left out."""
    bridge = run.bridges[number]
    text = bridge.teacher if bridge else run.tokenizer
    if bridge:
        prompts = run.teacher_prompts
    rollout = generate(run.teachers[number], [prompts[i] for i in chosen], samples=samples, stop_ids=text.stop_ids,
                       vocab_size=text.vocab_size, seed=seed, **sampling(cfg))
    written = []
    for b, finished in enumerate(rollout.finished_B.tolist()):
        ids = rollout.response(b)
        if bridge:
            ids = bridge.translate(ids, finished)
            if not ids or len(ids) > cfg.max_new_tokens:
                continue
        written.append((chosen[b // samples], ids, finished))
    return written


def right(cfg, run: Setup, problem: int, text: str) -> bool:
    return grade(text, run.train[problem].answer, cfg.verifier)


def rewards(cfg, run: Setup, texts: list[str], asked: list[int]) -> Tensor | None:
    """1 for a right answer, 0 for a wrong one; None when some problem of the step has no answer to compare
    with."""
    if any(run.train[i].answer is None for i in asked):
        return None
    return torch.tensor([float(right(cfg, run, i, text)) for i, text in zip(asked, texts)], device=run.student.device)


def teacher_reads(cfg, run: Setup, rollout: Rollout, asked: list[int], texts: list[str], reward_B: Tensor | None,
                  step: int) -> tuple[list[list[int]] | None, Tensor]:
    """(the prompts as the teachers read them, None = as the student does; which responses it makes sense to
    learn from).

    sibling: the solution shown is a right, finished response of another sample to the same problem, drawn at
    random (the shortest one collapses training); a sample without such a sibling is not learned from.  SDPO,
    arXiv:2601.20802.
    """
    usable_B = torch.ones(len(asked), device=run.student.device)
    prompts = run.teacher_prompts and [run.teacher_prompts[i] for i in asked]
    if cfg.privileged != "sibling":
        return prompts, usable_B
    prompts = prompts or [run.prompts[i] for i in asked]
    good = [b for b, finished in enumerate(rollout.finished_B.tolist()) if finished and reward_B[b] > 0]
    rng = random_of(cfg.seed, 3, step)
    for b, i in enumerate(asked):
        siblings = [c for c in good if asked[c] == i and c != b]
        if not siblings:
            usable_B[b] = 0.0
            continue
        shown = privileged_prompt(run.train[i].prompt, texts[siblings[rng.integers(len(siblings))]],
                                  cfg.teacher_prompt or SHOWN_SOLUTION)
        bridge = run.bridges[run.teacher_of[i]]
        prompts[b] = (bridge.teacher if bridge else run.tokenizer).prompt_ids(shown, **run.teacher_variables)
    return prompts, usable_B


def read(cfg, run: Setup, models: list, rollout: Rollout, teacher_B: Tensor | None = None,
         prompts: list[list[int]] | None = None, crossing: Crossing | None = None, tokens_too: bool = True) -> Scores:
    """score() with this run's settings."""
    if teacher_B is None:
        teacher_B = torch.zeros(len(rollout.length_B), dtype=torch.int64, device=run.student.device)
    return score(models, rollout, teacher_B, vocab_size=run.vocab_size, temperature=cfg.temperature, prompts=prompts,
                 max_tokens=cfg.micro_batch_tokens, chunk_rows=run.chunk_rows, crossing=crossing, tokens_too=tokens_too,
                 one_stop=run.one_stop)


def cross(cfg, run: Setup, rollout: Rollout, on_policy: bool) -> Crossing | None:
    """The notes of this step, when some teacher has another tokenizer."""
    if not any(run.bridges):
        return None
    stops, stop_N = list(run.tokenizer.stop_ids), None
    own = read(cfg, run, [run.student], rollout) if len(stops) > 1 or not on_policy else None
    if not on_policy:       # nobody sampled given responses: their log-probs are not noted yet
        rollout = replace(rollout, logp_BT=rollout.logp_BT.masked_scatter(rollout.mask_BT, own.logp_N.float()))
    if len(stops) > 1:      # to stop is one event; the sampler noted only the stop token that it drew
        (mine,) = own.parts
        chunks = distributions(mine.hidden_nE, mine.head_VE, cfg.temperature, run.chunk_rows)
        stop_N = parallel.spread([logp_NV[:, stops].logsumexp(-1) for _, logp_NV in chunks], mine.place_N)
    return Crossing(run.bridges, rollout, cfg, divergence=cfg.divergence, temperature=cfg.temperature,
                    max_tokens=cfg.micro_batch_tokens, chunk_rows=run.chunk_rows, stop_N=stop_N)


def scored(cfg, run: Setup, rollout: Rollout, asked: list[int], prompts: list[list[int]] | None,
           crossing: Crossing | None) -> Scores | None:
    """What each sequence's own teacher says of it."""
    if not run.teachers:
        return None
    teacher_B = torch.tensor([run.teacher_of[i] for i in asked], device=run.student.device)
    with run.student.lora_off() if run.adapters_off else nullcontext():
        scores = read(cfg, run, run.teachers, rollout, teacher_B, prompts, crossing, tokens_too=credit_asks(cfg))
    if run.teachers[0] is run.student and cfg.updates > 1:
        # the head is the student's own parameter: the second update would be held against a teacher that has moved
        return replace(scores, parts=[replace(part, head_VE=part.head_VE.clone()) for part in scores.parts])
    return scores


def look(cfg, run: Setup, step: int, written: dict[int, list], clock) -> tuple:
    """Everything before the update: (rollout, signals, scores, which sequences count, problems asked, on
    policy?)."""
    with clock("rollout"):
        if run.actor is not run.student:
            run.actor.refresh(run.student)
        rollout, asked, on_policy = collect(cfg, run, step, written)
        texts = [run.tokenizer.decode(rollout.response(b)) for b in range(len(asked))]
        reward_B = rewards(cfg, run, texts, asked)
    with clock("score"):
        more = {}
        prompts, usable_B = teacher_reads(cfg, run, rollout, asked, texts, reward_B, step)
        crossing = cross(cfg, run, rollout, on_policy)
        scores = scored(cfg, run, rollout, asked, prompts, crossing)
        if needs(cfg, "reference"):
            with nullcontext() if run.reference else run.student.lora_off():
                reference_N = read(cfg, run, [run.reference or run.student], rollout).logp_N
            more["reference_N"] = crossing.spread(reference_N) if crossing else reference_N
        if needs(cfg, "kl"):
            more["kl_N"] = disagreement(read(cfg, run, [run.student], rollout), scores, temperature=cfg.temperature,
                                        chunk_rows=run.chunk_rows)["reverse_kl"]
    group_of = {problem: group for group, problem in enumerate(dict.fromkeys(asked))}
    s = signals(rollout, torch.tensor([group_of[i] for i in asked], device=run.student.device), reward_B, scores,
                progress=step / max(1, cfg.steps - 1), seed=cfg.seed * 2**32 + step, **more)
    return rollout, s, scores, usable_B, asked, on_policy


def credit_asks(cfg) -> bool:
    """Does the advantage or the weight look at what the teacher says of the tokens drawn?"""
    advantage = cfg.advantage if cfg.divergence in losses.USES_ADVANTAGE else None
    return bool({advantage, cfg.weight} & set(credit.NEEDS["teacher"]))


def taught(cfg, crossing: Crossing) -> Tensor | int:
    """1 for rows that this run's loss can learn from across tokenizers: all, when it never asks the teacher."""
    if cfg.divergence in losses.USES_ADVANTAGE:
        return crossing.scored_N if credit_asks(cfg) else 1
    return 1 if cfg.divergence == "cross_entropy" else crossing.paired_N


def train_step(cfg, run: Setup, optimizer, step: int, written: dict[int, list], clock) -> dict:
    """Roll out, score, weigh, update. Returns the step's record for metrics.jsonl."""
    if step < cfg.cold_start_steps:
        # the teacher's responses have no siblings
        seen = "none" if cfg.privileged == "sibling" else cfg.privileged
        cfg = replace(cfg, divergence="cross_entropy", weight="none", pts_weight=0.0, privileged=seen)
    rollout, s, scores, usable_B, asked, on_policy = look(cfg, run, step, written, clock)
    advantage_N = ADVANTAGES[cfg.advantage](s, cfg) if cfg.divergence in losses.USES_ADVANTAGE else None
    weight_N = WEIGHTS[cfg.weight](s, cfg) * credit.supervised(s, cfg) * usable_B[s.sequence_N]
    scale_N = row_scale(s, weight_N, cfg.reduction)
    crossing = scores.crossing if scores else None
    if crossing:
        scale_N = scale_N * taught(cfg, crossing)       # rows without credit stay in the denominator
    sizes = dict(vocab_size=run.vocab_size, chunk_rows=run.chunk_rows)
    with clock("update"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg, group.setdefault("initial_lr", group["lr"]))
        moves = []
        for _ in range(cfg.updates):
            per_row = backward(run.student, rollout, s, scores, scale_N, advantage_N, cfg, **sizes)
            extra = teacher_sampling(cfg, run, asked, step, written, sizes)
            moves.append(update(run.student, optimizer, s, scale_N, per_row, cfg.max_grad_norm,
                                cfg.offload_optimizer) | extra)
        if run.average is not None:
            update_average(run.average, run.student, cfg.ema)
    repeat_N = [x for b in range(len(asked)) for x in repeats(rollout.response(b))]
    more = {"repetition_rate": torch.tensor(repeat_N, device=run.student.device), "weight": weight_N}
    if on_policy:
        more["sampled_entropy"] = s.student_entropy_N
    if advantage_N is not None:
        more["advantage"] = advantage_N
    return {**step_metrics(moves, on_policy), **(crossing.metrics() if crossing else {}),
            **summarise(more, s.position_N, s.length_B[s.sequence_N]),
            "kept": (weight_N > 0).double().mean().item(),
            "reward": s.reward_B.mean().item() if s.reward_B is not None else float("nan"),
            "mean_length": s.length_B.double().mean().item(),
            "truncation_rate": 1 - s.finished_B.double().mean().item(),
            "on_policy": int(on_policy), "lr": learning_rate(step, cfg, cfg.lr), "tokens": int(s.length_B.sum())}


def step_metrics(moves: list[dict], on_policy: bool) -> dict:
    """The last update's numbers; `skipped` and `empty` if any update was; and from the first, before the student
    moved away from its sampler, how far log b and log p are apart."""
    gap = {key: value if on_policy else math.nan for key, value in moves[0].items() if key.startswith("sampler_gap")}
    return moves[-1] | gap | {key: max(move[key] for move in moves) for key in ("skipped", "empty")}


def warm_up(cfg, run: Setup) -> None:
    """Compile by a first use: a few short responses are written, read by every teacher and learned from, which moves
    nothing."""
    one_each = {run.teacher_of[i]: i for i in range(len(run.prompts))}
    asked = (list(one_each.values()) * 13)[:13]
    # 9 of 13 slots live, then 5, then 1, for each of which a decode step is compiled apart; 13 tokens or more: sizes
    # that happen to be equal are compiled as one, and again when they part
    limits = [min(n, cfg.max_new_tokens) for n in [1] * 4 + [4] * 4 + [8] * 4 + [12]]
    rollout = generate(run.actor, [run.prompts[i] for i in asked], max_new_tokens=limits, stop_ids=(),
                       vocab_size=run.vocab_size, compile=True)
    crossing = cross(cfg, run, rollout, True)
    prompts = run.teacher_prompts and [run.teacher_prompts[i] for i in asked]
    scores = scored(cfg, run, rollout, asked, prompts, crossing)
    s = signals(rollout, torch.arange(len(asked), device=run.student.device), None, scores)
    advantage_N = torch.zeros_like(s.student_N) if cfg.divergence in losses.USES_ADVANTAGE else None
    backward(run.student, rollout, s, scores, torch.zeros_like(s.student_N), advantage_N, cfg,
             vocab_size=run.vocab_size, chunk_rows=run.chunk_rows)
    run.student.zero_grad()


# Responses the teacher wrote

def phased_weight(progress: float, cfg) -> float:
    """Constant, then a cosine down to 0, then 0.  SG-OPD, arXiv:2606.09304 (phase boundaries are ours)."""
    if progress < cfg.pts_hold:
        return cfg.pts_weight
    if progress >= cfg.pts_end:
        return 0.0
    return cfg.pts_weight * (1 + math.cos(math.pi * (progress - cfg.pts_hold) / (cfg.pts_end - cfg.pts_hold))) / 2


def teacher_sampling(cfg, run: Setup, asked: list[int], step: int, written: dict[int, list], sizes: dict) -> dict:
    """Adds the gradient of phased_weight times the cross-entropy of one verified teacher response per problem
    of the step that has one. They never enter the group statistics."""
    weight = phased_weight(step / cfg.steps, cfg)
    chosen = [i for i in dict.fromkeys(asked) if written.get(i)]
    if not weight or not chosen:
        return {}
    rng = random_of(cfg.seed, 4, step)
    responses = [written[i][rng.integers(len(written[i]))] for i in chosen]
    rollout = from_responses([run.prompts[i] for i in chosen], responses, [True] * len(chosen), run.student.device)
    s = signals(rollout, torch.arange(len(chosen), device=run.student.device))
    scale_N = torch.full_like(s.student_N, weight / len(s.student_N))
    per_row = backward(run.student, rollout, s, None, scale_N, None, cfg, divergence="cross_entropy", add=True, **sizes)
    return {"teacher_cross_entropy": per_row["loss"].mean().item(), "teacher_weight": weight}


def teacher_responses(cfg, run: Setup, folder: RunFolder) -> dict[int, list]:
    """problem -> responses its teacher wrote, once per run and kept in the run folder: finished, not running
    in circles, and right where there is an answer.  Cold start: Rethinking OPD, arXiv:2604.13016, section
    5.1; SG-OPD's teacher rollouts."""
    path = folder.path / "teacher_responses.json"
    if not (cfg.cold_start_steps or cfg.pts_weight):
        return {}
    if not path.exists():
        wanted: dict[int, None] = {}
        for step in range(math.ceil(cfg.pts_end * cfg.steps) if cfg.pts_weight else 0):
            wanted |= dict.fromkeys(ask(cfg, run, step))
            if len(wanted) == len(run.train):
                break
        count = cfg.cold_start_steps * cfg.problems * cfg.samples
        cold = pick(len(run.train), range(min(len(run.train), count)), cfg.seed)
        kept: dict[int, list] = {}
        for number in range(len(run.teachers)):
            ours = [i for i in {**wanted, **dict.fromkeys(cold)} if run.teacher_of[i] == number]
            if not ours:
                continue
            for i, response, finished in teacher_writes(cfg, run, number, run.teacher_prompts or run.prompts, ours,
                                                        cfg.pts_samples, cfg.seed * 2**32 + 2**31 + number):
                text = run.tokenizer.decode(response)
                if finished and not degenerate(text) and (run.train[i].answer is None or right(cfg, run, i, text)):
                    kept.setdefault(i, []).append(response)
        if not kept:
            raise UserError("no response of the teacher passed the filter (finished, no repetition, right "
                            "answer); raise --max_new_tokens or leave out --cold_start_steps and --pts_weight")
        parallel.on_first(write_text, path, json.dumps(kept))
        print(f"teacher wrote {sum(map(len, kept.values()))} usable responses to {len(kept)} problems")
    return read_responses(path, len(run.train), run.vocab_size)
