"""On-policy distillation: the student writes, the teacher scores every token, the student moves.

    python train.py                                   # the toy pair in toy/: about a minute on two CPU cores
    python train.py --recipe gkd --lr 1e-4            # another method, another flag
    python train.py --help                            # every flag and what it means

    repeat:  problems -> rollout (student) -> scores (teacher) -> advantage, weight -> loss -> one optimizer step

A recipe is a row of overrides, and any flag after it overrides the recipe. The run lands in runs/NAME; the same command
again goes on where it was stopped. Nothing imports this file; Config is the only place where defaults live.
"""
import argparse
import difflib
import importlib.util
import math
import os
import re
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import losses
from checkpoint import RunFolder, trainable
from eval import Problem, evaluate, grade, load_problems, template_variable
from losses import ADVANTAGES, DIVERGENCES, WEIGHTS, LossArgs, Signals, opt
from memory import auto_chunk, print_plan
from model import Transformer, checkpoint_folder, load_config, load_model
from rollout import Rollout, from_responses, generate
from teacher import Scores, check_same_tokens, score
from tokenizer import Tokenizer, UserError, one_line

TOY = Path(__file__).resolve().parent / "toy"


@dataclass(frozen=True)
class Config(LossArgs):
    recipe: str = opt("opd", "a row of RECIPES; the flags that follow override it")
    # models
    student: str = opt(str(TOY / "student"), "the model that learns: a checkpoint folder or a hub id")
    teacher: str = opt(str(TOY / "teacher"), "the model that scores: a checkpoint folder, a hub id, or none")
    lora_rank: int = opt(0, "train adapters of this rank on all seven projections instead of all weights; 0 = off")
    lora_alpha: float = opt(32.0, "LoRA: the adapter's output is scaled by lora_alpha / lora_rank")
    gradient_checkpointing: bool = opt(False, "recompute activations in the backward pass: less memory, a third slower")
    # loss: one entry of each table of losses.py
    divergence: str = opt("reverse_kl", "what is differentiated", tuple(DIVERGENCES))
    advantage: str = opt("opd", "credit per token, for policy_gradient", tuple(ADVANTAGES))
    weight: str = opt("none", "weight per token; 0 drops it", tuple(WEIGHTS))
    reduction: str = opt("token", "token: mean over all tokens of the step; sequence: mean of the sequences' means",
                         ("token", "sequence"))
    lmbda: float = opt(1.0, "GKD: probability that a step learns on the student's own samples; else on given responses")
    responses: str = opt("solution", "given responses: the data's solutions, or written by the teacher",
                         ("solution", "teacher"))
    # data and sampling
    data: str = opt(str(TOY / "train.jsonl"), "training problems, one JSON object per line")
    eval_data: str = opt(str(TOY / "test.jsonl"), "held-out problems")
    problems: int = opt(16, "problems per step")
    samples: int = opt(4, "responses per problem")
    max_new_tokens: int = opt(40, "longest response; longer ones are cut")
    temperature: float = opt(1.0, "used to sample and to score, for both sides")
    slots: int = opt(128, "sequences decoded side by side")
    stop_ids: str = opt("", "comma-separated ids that end a response; empty: the checkpoint's own")
    chat_template: str = opt("auto", "auto: the student checkpoint's own; plain: none; or a .jinja file")
    template_vars: str = opt("", "comma-separated name=value pairs for the template, e.g. enable_thinking=false")
    verifier: str = opt("auto", "how answers are graded",
                        ("auto", "boxed", "hash", "number", "exact", "math-verify"))
    # optimization
    steps: int = opt(120, "optimizer steps")
    lr: float = opt(5e-4, "AdamW learning rate after warm-up (a real model wants 1e-6 to 1e-5; LoRA 1e-4)")
    warmup_steps: int = opt(5, "steps over which the learning rate rises linearly")
    schedule: str = opt("constant", "learning rate after warm-up", ("constant", "cosine"))
    weight_decay: float = opt(0.0, "AdamW weight decay")
    max_grad_norm: float = opt(1.0, "the gradient is scaled down to this norm")
    updates: int = opt(1, "optimizer steps per rollout; past the first the policy_gradient ratio clip can act")
    micro_batch_tokens: int = opt(16384, "tokens per forward pass, padding included: memory, not mathematics")
    chunk_rows: int = opt(0, "rows projected to the vocabulary at a time: memory, not mathematics; 0 = by vocabulary")
    # evaluation
    eval_every: int = opt(20, "steps between evaluations; 0 = only before and after")
    eval_k: int = opt(8, "answers per held-out problem")
    eval_temperature: float = opt(1.0, "sampling temperature of the evaluation")
    eval_max_new_tokens: int = opt(0, "longest answer in evaluation; 0 = max_new_tokens")
    eval_limit: int = opt(0, "use only the first so many held-out problems; 0 = all")
    eval_teacher: bool = opt(True, "evaluate the teacher once, for the summary")
    # run
    name: str = opt("", "folder under --runs; empty: made from the recipe and the flags given")
    runs: str = opt("runs", "where run folders live")
    save_every: int = opt(20, "steps between checkpoints")
    fresh: bool = opt(False, "delete the run folder of this name and start again")
    device: str = opt("auto", "auto: cuda if there is one, else cpu; mps on request", ("auto", "cpu", "cuda", "mps"))
    dtype: str = opt("auto", "of products; auto: bfloat16 on cuda, else float32. Trained weights stay float32",
                     ("auto", "float32", "bfloat16"))
    seed: int = opt(0, "fixes data order, samples and adapters")
    plan: bool = opt(False, "print the memory estimate and stop")
    self_check: bool = opt(False, "first make the student its own teacher: loss and gradient must be 0")
    wandb: bool = opt(False, "also log to Weights & Biases")
    tensorboard: bool = opt(False, "also log to TensorBoard, inside the run folder")


RECIPES = {     # name -> overrides of Config; the paper beside it
    "opd": dict(divergence="reverse_kl"),                       # MiniLLM 2306.08543 without the long part; GKD at lmbda 1
    "gkd": dict(divergence="jsd", lmbda=0.5),                   # GKD 2306.13649
    "topk": dict(divergence="topk_reverse_kl"),                 # Rethinking OPD 2604.13016, code form of eq. 5
    "sft": dict(divergence="cross_entropy", lmbda=0.0),         # cross-entropy on given responses
    "grpo": dict(divergence="policy_gradient", advantage="grpo", problems=8, samples=8),    # GRPO 2402.03300: no teacher
}


# Command line

def parse(argv: list[str]) -> tuple[Config, list[str]]:
    """(Config, the flags that were given). Defaults, then the recipe's row, then the flags."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            if unknown := re.match(r"unrecognized arguments: (\S+)", message):
                flags = [flag for action in self._actions for flag in action.option_strings]
                close = difflib.get_close_matches(unknown[1], flags, 1)
                hint = f"; did you mean {close[0]}?" if close else "; --help lists them all"
                message = f"unknown flag {unknown[1]}{hint}"
            raise UserError(message)
    parser = Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS, description=__doc__.split("\n")[0])
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type, "metavar": f.name.upper()}
        choices = f.metadata["choices"]
        text = f.metadata["help"] + (f" [{' '.join(choices)}]" if choices else "")
        parser.add_argument(f"--{f.name}", **kind, help=f"{text} (default: {f.default!r})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    recipe = given.get("recipe", Config.recipe)
    if recipe not in RECIPES:
        raise UserError(f"unknown recipe {recipe!r}; known are {', '.join(RECIPES)}")
    return Config(**{**RECIPES[recipe], **given}), sorted(given)


# flags that say where and how a run is watched: they may change when it goes on, and no result depends on them
NOT_THE_RUN = ("name", "runs", "fresh", "wandb", "tensorboard", "plan", "self_check")


def run_name(cfg: Config, given: list[str]) -> str:
    """recipe,flag=value,...: the same command finds the same run, another flag makes another run. Of a path only the
    last part is shown; should two paths share it, the configurations differ and the run folder says so."""
    parts = [f"{key}={str(getattr(cfg, key)).rstrip('/').rsplit('/', 1)[-1]}" for key in given
             if key not in ("recipe", *NOT_THE_RUN)]
    return re.sub(r"[^\w.=+,-]+", "_", ",".join([cfg.recipe, *parts]))[:200]


def check(cfg: Config) -> None:
    """Settings that cannot work are refused here, before anything is loaded."""
    for f in fields(cfg):
        value, choices = getattr(cfg, f.name), f.metadata["choices"]
        if choices and value not in choices:
            raise UserError(f"--{f.name} {value}: choose from {', '.join(choices)}")
    for least, names in ((1, ("problems", "samples", "max_new_tokens", "slots", "steps", "updates", "micro_batch_tokens",
                              "eval_k", "save_every", "topk")),
                         (0, ("lora_rank", "warmup_steps", "chunk_rows", "eval_every", "eval_max_new_tokens",
                              "eval_limit", "seed", "weight_decay", "eval_temperature", "clip"))):
        for name in names:
            if not getattr(cfg, name) >= least:
                raise UserError(f"--{name} must be at least {least}, not {getattr(cfg, name)}")
    for name in ("wandb", "tensorboard"):
        if getattr(cfg, name) and importlib.util.find_spec(name) is None:
            raise UserError(f"--{name}: that package is not installed; pip install {name}, or leave the flag out")
    rules = [
        (0 < cfg.lr < math.inf, "--lr must be above 0 and finite"),
        (0 < cfg.lora_alpha < math.inf, "--lora_alpha must be above 0 and finite"),
        (cfg.weight_decay < math.inf, "--weight_decay must be finite"),
        (cfg.max_grad_norm > 0, "--max_grad_norm must be above 0; inf never clips"),
        (cfg.seed < 2**31, "--seed must be below 2**31"),
        (0 < cfg.temperature < math.inf,
         "--temperature must be above 0 and finite: a greedy rollout is no sample of the student"),
        (cfg.eval_temperature < math.inf, "--eval_temperature must be finite"),
        (cfg.eval_temperature > 0 or cfg.eval_k == 1, "--eval_temperature 0 gives the same answer every time: use --eval_k 1"),
        (0 <= cfg.lmbda <= 1, "--lmbda is a probability between 0 and 1"),
        (cfg.divergence != "jsd" or 0 < cfg.beta < 1, "--beta must lie strictly between 0 and 1: jsd is 0 at both ends; "
                                                      "use --divergence forward_kl or reverse_kl for those"),
        (0 <= cfg.skew < 1, "--skew must be at least 0 and below 1"),
        (cfg.lmbda == 1 or cfg.divergence not in losses.ON_SAMPLES_ONLY,
         f"{cfg.divergence} is only right on the student's own samples: keep --lmbda 1"),
        (cfg.divergence != "cross_entropy" or cfg.lmbda < 1,
         "cross_entropy on the student's own samples has zero expected gradient: lower --lmbda"),
        (not needs_reward(cfg) or cfg.samples > 1, "grpo compares the samples of one problem: --samples must be at least 2"),
        (not needs_teacher(cfg) or cfg.teacher != "none", f"--teacher none: recipe {cfg.recipe} needs a teacher"),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def needs_reward(cfg: Config) -> bool:
    return cfg.divergence == "policy_gradient" and cfg.advantage in losses.NEEDS_REWARD


def needs_teacher(cfg: Config) -> bool:
    if cfg.lmbda < 1 and cfg.responses == "teacher":
        return True
    if cfg.divergence == "policy_gradient":
        return cfg.advantage in losses.ADVANTAGE_NEEDS_TEACHER
    return cfg.divergence not in losses.NEEDS_NO_TEACHER


# One step

def pick(total: int, count: int, step: int, seed: int) -> list[int]:
    """Indices of this step's problems: every epoch is a new permutation, and step alone decides, so a resumed run
    sees the same order."""
    places = range(step * count, (step + 1) * count)
    orders = {epoch: np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(total)
              for epoch in {place // total for place in places}}
    return [int(orders[place // total][place % total]) for place in places]


def signals(rollout: Rollout, group_B: Tensor, reward_B: Tensor | None, scores: Scores | None) -> Signals:
    """The whole step as rows, before any micro-batch exists."""
    B, T = rollout.tokens_BT.shape
    device = rollout.tokens_BT.device
    sequence_BT = torch.arange(B, device=device)[:, None].expand(B, T)
    position_BT = torch.arange(T, device=device) - rollout.prompt_len_B[:, None]
    return Signals(
        student_N=rollout.rows(rollout.logp_BT), student_entropy_N=rollout.rows(rollout.entropy_BT),
        sequence_N=rollout.rows(sequence_BT), position_N=rollout.rows(position_BT), length_B=rollout.length_B,
        group_B=group_B, finished_B=rollout.finished_B, reward_B=reward_B,
        teacher_N=scores.logp_N if scores else None, teacher_entropy_N=scores.entropy_N if scores else None)


def row_scale(s: Signals, weight_N: Tensor, reduction: str) -> Tensor:
    """What each row's loss is multiplied by so that the step's loss is a mean: over all rows with a weight (token), or
    over the sequences that have one, each by its own mean (sequence). Counted over the whole step."""
    kept_N = (weight_N > 0).to(weight_N.dtype)
    if reduction == "token":
        return weight_N / kept_N.sum().clamp(min=1)
    per_sequence_B = torch.zeros_like(s.length_B, dtype=weight_N.dtype).scatter_add(0, s.sequence_N, kept_N)
    return weight_N / (per_sequence_B[s.sequence_N].clamp(min=1) * (per_sequence_B > 0).sum().clamp(min=1))


def backward(student: Transformer, rollout: Rollout, s: Signals, scores: Scores | None, scale_N: Tensor,
             advantage_N: Tensor | None, cfg: Config, *, vocab_size: int, chunk_rows: int) -> dict[str, Tensor]:
    """Leaves the gradient of sum_n scale_n loss_n in .grad, the same for every micro-batch and chunk size.

    Returns `loss` and, when there is a teacher, the diagnostics, each (N,) over all rows of the step.
    """
    for _, parameter in trainable(student):     # zeros, not None: the head's gradient is added by hand
        parameter.grad = torch.zeros_like(parameter)
    head = student.head_weight()
    head_grad_VD = head.grad[:vocab_size] if head.requires_grad else None
    head_VD = head.detach()[:vocab_size].to(student.compute_dtype)
    token_N, per_row = rollout.rows(rollout.tokens_BT), {}
    for tokens_bt, mask_bt, row_n in rollout.micro_batches(cfg.micro_batch_tokens):
        batch = {"token_N": token_N[row_n], "behavior_N": s.student_N[row_n],
                 "advantage_N": None if advantage_N is None else advantage_N[row_n]}
        loss_n, diagnosed = losses.chunked_backward(
            student.response_hidden(tokens_bt, mask_bt), head_VD, head_grad_VD, batch, scale_N[row_n],
            DIVERGENCES[cfg.divergence], cfg, temperature=cfg.temperature, chunk_rows=chunk_rows,
            teacher_hidden_NE=scores.hidden_NE[row_n] if scores else None,
            teacher_head_VE=scores.head_VE if scores else None, diagnose=True)
        for name, value_n in {"loss": loss_n, **diagnosed}.items():
            per_row.setdefault(name, torch.zeros_like(scale_N))[row_n] = value_n.to(scale_N.dtype)
    return per_row


def update(student: Transformer, optimizer, s: Signals, scale_N: Tensor, per_row: dict[str, Tensor],
           max_grad_norm: float) -> dict[str, float]:
    """One optimizer step on the gradient that backward() left. Returns the step's loss, the gradient norm before
    clipping and the mean diagnostics. A loss or gradient that is not finite moves nothing: skipped = 1."""
    grad_norm = torch.nn.utils.clip_grad_norm_([p for _, p in trainable(student)], max_grad_norm)
    loss = (per_row.pop("loss") * scale_N).sum()
    finite = bool(torch.isfinite(loss) & torch.isfinite(grad_norm))
    if finite:
        optimizer.step()
    return {"loss": loss.item(), "grad_norm": grad_norm.item(), "skipped": 0 if finite else 1,
            **losses.summarise(per_row, s.position_N, s.length_B[s.sequence_N])}


def learning_rate(step: int, cfg: Config) -> float:
    if step < cfg.warmup_steps:
        return cfg.lr * (step + 1) / cfg.warmup_steps
    if cfg.schedule == "constant":
        return cfg.lr
    done = (step - cfg.warmup_steps) / max(1, cfg.steps - cfg.warmup_steps)
    return cfg.lr * (1 + np.cos(np.pi * done)) / 2


# Setting up: everything that can be wrong is found here, before the first step

@dataclass
class Setup:
    """What the loop works with. actor is the student as the sampler sees it: the student itself, or a copy in the
    dtype of the products, refreshed once per step."""
    student: Transformer
    actor: Transformer
    teacher: Transformer | None
    tokenizer: Tokenizer
    train: list[Problem]
    held_out: list[Problem]
    prompts: list[list[int]]            # of train
    given: list[list[int]] | None       # reference responses of train, when some steps learn on them
    variables: dict                     # of the chat template
    chunk_rows: int

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size


def choose_device(name: str) -> torch.device:
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: there is no such device here; use --device cpu") from error
    return torch.device(name)


def compute_dtype(cfg: Config, device: torch.device) -> torch.dtype:
    return getattr(torch, cfg.dtype if cfg.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32")


def parse_stop_ids(text: str, vocab_size: int) -> tuple[int, ...] | None:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not (part.isdecimal() and int(part) < vocab_size):
            raise UserError(f"--stop_ids {text}: {part!r} is no token id; give whole numbers from 0 to "
                            f"{vocab_size - 1}, separated by commas")
    return tuple(dict.fromkeys(map(int, parts))) or None


def load_problem_set(cfg: Config, tokenizer: Tokenizer, variables: dict, context: int, eval_context: int):
    """(training problems, held-out problems, prompt ids, given responses or None), each checked against what the run
    will ask of it."""
    graded = needs_reward(cfg)
    train, held_out = load_problems(cfg.data, need_answer=graded), load_problems(cfg.eval_data, need_answer=True,
                                                                                 limit=cfg.eval_limit or None)
    prompts = [tokenizer.prompt_ids(problem.prompt, **variables) for problem in train]
    asked = [tokenizer.prompt_ids(problem.prompt, **variables) for problem in held_out]
    eval_limit = ("eval_max_new_tokens", cfg.eval_max_new_tokens) if cfg.eval_max_new_tokens else (
        "max_new_tokens", cfg.max_new_tokens)
    for path, problems, ids, (flag, limit), longest in (
            (cfg.data, train, prompts, ("max_new_tokens", cfg.max_new_tokens), context),
            (cfg.eval_data, held_out, asked, eval_limit, eval_context)):
        for problem, prompt in zip(problems, ids):
            if len(prompt) + limit > longest:
                raise UserError(f"{path}, line {problem.line}: a prompt of {len(prompt)} tokens plus --{flag} {limit} "
                                f"exceed the models' context of {longest}; shorten one of them")
    if cfg.lmbda == 1 or cfg.responses == "teacher":
        return train, held_out, prompts, None
    given = []
    for problem in train:
        if not problem.solution:
            raise UserError(f"{cfg.data}, line {problem.line} has no solution to learn from; add a `solution` field or "
                            f"pass --responses teacher")
        given.append((tokenizer.encode(problem.solution) + [tokenizer.stop_ids[0]])[:cfg.max_new_tokens])
    return train, held_out, prompts, given


def set_up(cfg: Config) -> Setup:
    device = choose_device(cfg.device)
    dtype = compute_dtype(cfg, device)
    variables = dict(template_variable(pair) for pair in cfg.template_vars.split(",") if pair)
    folder = checkpoint_folder(cfg.student)
    teacher_folder = None if cfg.teacher == "none" else checkpoint_folder(cfg.teacher)
    tokenizer = Tokenizer(folder, cfg.chat_template)
    stop_ids = parse_stop_ids(cfg.stop_ids, tokenizer.vocab_size)
    if teacher_folder is not None:
        check_same_tokens(tokenizer, Tokenizer(teacher_folder, cfg.chat_template), stop_ids)
    tokenizer.stop_ids = stop_ids or tokenizer.stop_ids
    configs = [load_config(found) for found in (folder, teacher_folder) if found is not None]
    for found, config in zip((folder, teacher_folder), configs):
        if config.vocab_size < tokenizer.vocab_size:
            raise UserError(f"{found}: config.json has {config.vocab_size} rows of vocabulary, but the ids of "
                            f"tokenizer.json end at {tokenizer.vocab_size - 1}; the two files do not belong together")
    train, held_out, prompts, given = load_problem_set(
        cfg, tokenizer, variables, min(config.context for config in configs),
        min(config.context for config in (configs if cfg.eval_teacher else configs[:1])))
    print_plan(cfg, folder, teacher_folder, max(map(len, prompts)), tokenizer.vocab_size, device, dtype)
    if cfg.plan:
        sys.exit(0)
    student = load_model(folder, compute_dtype=dtype, device=device)
    if cfg.lora_rank:
        student.add_lora(cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    student.gradient_checkpointing = cfg.gradient_checkpointing
    teacher = None if teacher_folder is None else load_model(teacher_folder, dtype=dtype, device=device)
    if teacher is not None:
        teacher.requires_grad_(False)
    actor = student if dtype == torch.float32 else student.copy_as(dtype)
    return Setup(student, actor, teacher, tokenizer, train, held_out, prompts, given, variables,
                 auto_chunk(cfg, tokenizer.vocab_size, device))


# The loop

def collect(cfg: Config, run: Setup, step: int) -> tuple[Rollout, list[int], bool]:
    """This step's sequences, the problem each answers, and whether the student wrote them."""
    chosen = pick(len(run.train), cfg.problems, step, cfg.seed)
    prompts = [run.prompts[i] for i in chosen]
    on_policy = np.random.Generator(np.random.Philox(key=[cfg.seed, 2**32 + step])).random() <= cfg.lmbda
    if on_policy or cfg.responses == "teacher":
        writer = run.actor if on_policy else run.teacher
        rollout = generate(writer, prompts, samples=cfg.samples, max_new_tokens=cfg.max_new_tokens,
                           stop_ids=run.tokenizer.stop_ids, temperature=cfg.temperature, slots=cfg.slots,
                           seed=cfg.seed * 2**32 + step, vocab_size=run.vocab_size,
                           progress="rollout" if cfg.max_new_tokens > 200 else None)
        return rollout, [i for i in chosen for _ in range(cfg.samples)], on_policy
    # one reference response per problem: the batch is filled with other problems instead of copies
    chosen = pick(len(run.train), cfg.problems * cfg.samples, step, cfg.seed)
    given = [run.given[i] for i in chosen]
    rollout = from_responses([run.prompts[i] for i in chosen], given,
                             [response[-1] in run.tokenizer.stop_ids for response in given], run.student.device)
    return rollout, chosen, False


def rewards(cfg: Config, run: Setup, rollout: Rollout, asked: list[int]) -> Tensor | None:
    """1 for a right answer, 0 for a wrong one; None when some problem of the step has no answer to compare with."""
    if any(run.train[i].answer is None for i in asked):
        return None
    right = [float(grade(run.tokenizer.decode(rollout.response(b)), run.train[i].answer, cfg.verifier))
             for b, i in enumerate(asked)]
    return torch.tensor(right, device=rollout.tokens_BT.device)


def train_step(cfg: Config, run: Setup, optimizer, step: int, clock) -> dict:
    """Roll out, score, weigh, update. Returns the step's record for metrics.jsonl."""
    with clock("rollout"):
        if run.actor is not run.student:
            run.actor.refresh(run.student)
        rollout, asked, on_policy = collect(cfg, run, step)
        reward_B = rewards(cfg, run, rollout, asked)
    with clock("score"):
        scores = None if run.teacher is None else score(
            run.teacher, rollout, vocab_size=run.vocab_size, temperature=cfg.temperature,
            max_tokens=cfg.micro_batch_tokens, chunk_rows=run.chunk_rows)
    group_of = {problem: group for group, problem in enumerate(dict.fromkeys(asked))}
    s = signals(rollout, torch.tensor([group_of[i] for i in asked], device=run.student.device), reward_B, scores)
    advantage_N = ADVANTAGES[cfg.advantage](s, cfg) if cfg.divergence == "policy_gradient" else None
    weight_N = WEIGHTS[cfg.weight](s, cfg)
    scale_N = row_scale(s, weight_N, cfg.reduction)
    with clock("update"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, cfg)
        for _ in range(cfg.updates):
            per_row = backward(run.student, rollout, s, scores, scale_N, advantage_N, cfg,
                               vocab_size=run.vocab_size, chunk_rows=run.chunk_rows)
            metrics = update(run.student, optimizer, s, scale_N, per_row, cfg.max_grad_norm)
    repeat_N = [x for b in range(len(asked)) for x in losses.repeats(rollout.response(b))]
    extra = {"repetition_rate": torch.tensor(repeat_N, device=run.student.device)}
    if on_policy:
        extra["sampled_entropy"] = s.student_entropy_N
    return {**metrics, **losses.summarise(extra, s.position_N, s.length_B[s.sequence_N]),
            "reward": reward_B.mean().item() if reward_B is not None else float("nan"),
            "mean_length": s.length_B.double().mean().item(),
            "truncation_rate": 1 - s.finished_B.double().mean().item(),
            "on_policy": int(on_policy), "lr": learning_rate(step, cfg), "tokens": int(s.length_B.sum())}


def self_check(cfg: Config, run: Setup) -> None:
    """The student as its own teacher is a fixed point: the loss and its gradient must vanish."""
    rollout, _, _ = collect(replace(cfg, lmbda=1.0), run, 0)
    scores = score(run.student, rollout, vocab_size=run.vocab_size, temperature=cfg.temperature,
                   max_tokens=cfg.micro_batch_tokens, chunk_rows=run.chunk_rows)
    s = signals(rollout, torch.arange(len(rollout.length_B), device=run.student.device), None, scores)
    advantage_N = losses.opd_advantage(s, cfg) if cfg.divergence == "policy_gradient" else None
    scale_N = row_scale(s, torch.ones_like(s.student_N), cfg.reduction)
    per_row = backward(run.student, rollout, s, scores, scale_N, advantage_N, cfg, vocab_size=run.vocab_size,
                       chunk_rows=run.chunk_rows)
    norm = torch.stack([p.grad.norm() for _, p in trainable(run.student)]).norm().item()
    kl = per_row["reverse_kl"].abs().max().item()
    gap = (scores.logp_N - s.student_N).abs().mean().item()
    print(f"check   student as its own teacher: largest token KL {kl:.1e}, gradient norm {norm:.1e}, sampler off by "
          f"{gap:.1e} nats per token (all should be 0)")
    # decoding and scoring multiply in different orders: bfloat16 leaves 1e-2 nats between them, float32 1e-6
    exact = run.student.compute_dtype == torch.float32
    small = 1e-3 if exact or cfg.divergence != "policy_gradient" else 0.1
    gradient_ok = norm < small or cfg.divergence == "cross_entropy"
    if not (kl < 1e-3 and gap < (1e-3 if exact else 0.1) and gradient_ok):
        raise UserError("--self_check failed: the student differs from itself; sampler, scoring and training disagree")


def step_line(step: int, cfg: Config, m: dict) -> str:
    """The one line of a step; undefined numbers are left out."""
    shown = [("loss", "loss", "7.4f"), ("kl", "reverse_kl", "6.3f"), ("right", "reward", "4.0%"),
             ("length", "mean_length", "5.1f"), ("cut", "truncation_rate", "3.0%"), ("overlap", "overlap_ratio", "4.2f"),
             ("entropy", "student_entropy", "5.2f"), ("grad", "grad_norm", "6.3f"), ("s", "seconds", "5.2f")]
    parts = [f"{label} {m[key]:{form}}" for label, key, form in shown if not np.isnan(m.get(key, np.nan))]
    skipped = "  SKIPPED: loss or gradient not finite" if m["skipped"] else ""
    return f"step {step:>{len(str(cfg.steps))}}/{cfg.steps}  {'  '.join(parts)}{skipped}"


class Clock:
    """Seconds by phase: `with clock("rollout"): ...`. On a GPU the phases end where the host reads a result."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str):
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start


@contextmanager
def graceful_stop():
    """Yields a list that SIGINT or SIGTERM fills: the step is finished first. A second signal acts at once."""
    caught = []
    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        # not print: a handler that interrupts a print would be refused as a reentrant call, and end the run
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving (once more to stop at once)\n"
        os.write(2, text.encode())
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def trackers(cfg: Config, folder: RunFolder) -> list:
    """Functions (record, step) for the optional services, imported only when asked for."""
    found = []
    if cfg.wandb:
        import wandb
        run = wandb.init(project="opd", name=folder.path.name, config=asdict(cfg), resume="allow", id=folder.path.name)
        found.append(lambda record, step: run.log(record, step=step))
    if cfg.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
        board = SummaryWriter(folder.path / "tensorboard")
        found.append(lambda record, step: [board.add_scalar(k, v, step) for k, v in record.items()
                                           if isinstance(v, (int, float))])
    return found


def test(cfg: Config, run: Setup, model: Transformer, label: str) -> tuple[dict, list[dict]]:
    """Held-out metrics and answers of a model. The same seed every time, so that curves share their noise."""
    return evaluate(model, run.tokenizer, run.held_out, k=cfg.eval_k, temperature=cfg.eval_temperature,
                    max_new_tokens=cfg.eval_max_new_tokens or cfg.max_new_tokens, seed=10**9 + cfg.seed,
                    verifier=cfg.verifier, slots=cfg.slots, progress=label, variables=run.variables)


def test_line(label: str, cfg: Config, metrics: dict) -> str:
    low, high = metrics[f"avg@{cfg.eval_k}_ci"]
    return (f"{label}  held-out avg@{cfg.eval_k} {metrics[f'avg@{cfg.eval_k}']:.1%} [{low:.1%}, {high:.1%}]  "
            f"pass@{cfg.eval_k} {metrics[f'pass@{cfg.eval_k}']:.1%}  length {metrics['mean_length']:.1f}  "
            f"cut {metrics['truncation_rate']:.0%}")


def example(run: Setup, samples: list[dict], step: int) -> str:
    """One held-out answer, another one each time."""
    sample = samples[(step * 7919) % len(samples)]
    asked = run.held_out[sample["problem"]].prompt
    asked = asked if isinstance(asked, str) else asked[-1]["content"]
    verdict = "right" if sample["correct"] else "wrong"
    return f"        e.g. {asked[-200:]!r} -> {sample['text'][:400]!r}  ({verdict})"


def train(cfg: Config, folder: RunFolder, run: Setup) -> int:
    """The run, from wherever the folder says it stands. Returns the exit status: 0, or 128 + signal when stopped."""
    optimizer = torch.optim.AdamW([p for _, p in trainable(run.student)], lr=cfg.lr, betas=(0.9, 0.999),
                                  weight_decay=cfg.weight_decay)
    started, track = time.perf_counter(), trackers(cfg, folder)
    state = folder.resume(run.student, optimizer)
    if state:
        print(f"resume  {folder.path} from step {state['step']}")
    else:
        if cfg.self_check:
            self_check(cfg, run)
        before, samples = test(cfg, run, run.actor, "student before")
        folder.write_samples(0, samples)
        print(test_line("before ", cfg, before))
        teacher = test(cfg, run, run.teacher, "teacher")[0] if run.teacher is not None and cfg.eval_teacher else None
        if teacher:
            print(test_line("teacher", cfg, teacher))
        state = {"step": 0, "before": before, "teacher": teacher, "best": -1.0, "seconds": 0.0, "skipped": 0,
                 "skipped_in_a_row": 0, "tokens": 0}
        folder.log({"step": 0, "eval": before, "eval_teacher": teacher})
    seconds_before = state["seconds"]

    with graceful_stop() as stopped, tqdm(total=cfg.steps, initial=state["step"], unit="step", disable=None) as bar:
        while state["step"] < cfg.steps:
            clock = Clock()
            with clock("seconds"):
                record = train_step(cfg, run, optimizer, state["step"], clock)
            step = state["step"] = state["step"] + 1
            record |= {"seconds": clock.seconds.pop("seconds"), **{f"{k}_seconds": v for k, v in clock.seconds.items()}}
            state["tokens"] += record["tokens"] * record["on_policy"]
            state["skipped"] += record["skipped"]
            state["skipped_in_a_row"] = (state["skipped_in_a_row"] + 1) * record["skipped"]
            folder.log({"step": step, **record})
            for log in track:
                log(record, step)
            tqdm.write(step_line(step, cfg, record))
            bar.update()
            if state["skipped_in_a_row"] >= 5:
                raise UserError(f"the loss or gradient was not finite in 5 steps in a row, the weights are those of step "
                                f"{step - 5}; lower --lr or look at the data, in another run than {folder.path}")
            due = cfg.eval_every and step % cfg.eval_every == 0 or step == cfg.steps
            if due:
                evaluate_and_note(cfg, run, folder, state, track)
            stop = bool(stopped)        # asked once: a signal between two looks would leave without saving
            if due or stop or step % cfg.save_every == 0:
                state["seconds"] = seconds_before + time.perf_counter() - started
                folder.save(step, run.student, run.tokenizer, optimizer, state, best=state.get("best_step") == step)
            if stop and step < cfg.steps:
                tqdm.write(f"stopped after step {step}; the same command goes on from there")
                return 128 + stopped[0]
    finish(cfg, folder, state)
    return 0


def evaluate_and_note(cfg: Config, run: Setup, folder: RunFolder, state: dict, track: list) -> None:
    """Evaluate the student as it is now, print and record it, and remember whether it is the best so far."""
    if run.actor is not run.student:
        run.actor.refresh(run.student)
    start = time.perf_counter()
    metrics, samples = test(cfg, run, run.actor, "evaluate")
    metrics["seconds"] = time.perf_counter() - start
    step, score_now = state["step"], metrics[f"avg@{cfg.eval_k}"]
    folder.write_samples(step, samples)
    folder.log({"step": step, "eval": metrics})
    for log in track:
        log({f"eval/{key}": value for key, value in metrics.items()}, step)
    if score_now > state["best"]:
        state["best"], state["best_step"] = score_now, step
    state["after"] = metrics
    tqdm.write(test_line("eval   ", cfg, metrics))
    tqdm.write(example(run, samples, step))


def finish(cfg: Config, folder: RunFolder, state: dict) -> None:
    folder.write_summary({"before": state["before"], "after": state["after"], "teacher": state["teacher"],
                          "steps": state["step"], "seconds": state["seconds"], "tokens": state["tokens"],
                          "best": {"step": state["best_step"], f"avg@{cfg.eval_k}": state["best"]},
                          "skipped": state["skipped"], "recipe": cfg.recipe})
    print(closing_line(cfg, folder, folder.summary()))


def closing_line(cfg: Config, folder: RunFolder, summary: dict) -> str:
    key = f"avg@{cfg.eval_k}"
    teacher = f" (teacher {summary['teacher'][key]:.1%})" if summary["teacher"] else ""
    return (f"done    held-out {key} {summary['before'][key]:.1%} -> {summary['after'][key]:.1%}{teacher} in "
            f"{summary['steps']} steps, {summary['seconds']:.0f} s\n"
            f"        in {folder.path}: the trained model last/, the best one best/, metrics.jsonl, samples/, summary.json")


def main(argv: list[str] | None = None) -> int:
    try:
        cfg, given = parse(sys.argv[1:] if argv is None else argv)
        check(cfg)
        path = Path(cfg.runs) / (cfg.name or run_name(cfg, given))
        lasting = {key: value for key, value in asdict(cfg).items() if key not in NOT_THE_RUN}
        if os.path.exists(path / "summary.json") and not cfg.fresh:     # False where the path itself is impossible
            folder = RunFolder(path, lasting)
            print(f"{path} is complete; pass --fresh to run it again, or change a flag for another run")
            print(closing_line(cfg, folder, folder.summary()))
            return 0
        torch.manual_seed(cfg.seed)     # nothing draws from the global stream; if a fork does, it is at least fixed
        run = set_up(cfg)
        return train(cfg, RunFolder(path, lasting, cfg.fresh), run)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:       # before the loop, or the second signal in it
        print("stopped at once; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
