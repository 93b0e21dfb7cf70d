"""Set-up: everything a run needs, found and checked before the first step.

Models, tokenizers, problems and prompts are loaded here, small files first; whatever is wrong with them is one sentence
here, before any GPU time is spent. Not here: what a flag means (train.py), what a step is made of (train.defaults).
"""
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

from losses import ADVANTAGES, NEEDS_NO_TEACHER, USES_ADVANTAGE, WEIGHTS
from model import Transformer
from support.errors import UserError
from support.extras import offers
from support.metrics import observe
from support.memory import Job, compute_dtype, sized, text_memory, total_memory
from support.model_config import ModelConfig
from support.plan import announce, planned_device, print_plan, settle
from support.problems import Problem, answered, load_problems
from support.tokenizer import Tokenizer, template_variables
from support.weights import checkpoint_folder, load_config, load_model, set_threads
from teacher import SIGNALS, Nobody, Teacher


@dataclass
class Run:
    """What the loop works with. The second half is what a step is made of: train.defaults fills it in, and extras put
    theirs before, around or in place of it."""
    cfg: object
    student: Transformer
    actor: Transformer          # the student as the sampler sees it: itself, or a copy in the dtype of the products
    tokenizer: Tokenizer
    train: list[Problem]
    first: int                  # how many of them come from --data
    held_out: list[Problem]
    prompts: list[list[int]]    # of train, as the student reads them
    kind: "TeacherKind"         # how its teacher was found
    teacher: object             # has parts(batch)
    asks: tuple[str, ...]       # signals that its advantage and its weight read
    planned_memory: int         # bytes at the peak, as announced
    places: object = None       # step -> the places of its problems in an endless list
    order: object = None        # places -> problems
    pick: object = None         # train.pick
    sources: list = field(default_factory=list)     # (does it write this step?, writer (run, step) -> Batch)
    weigh: object = None        # (run, signals) -> weight_N
    scale: object = None        # (run, signals, weight_N) -> scale_N
    gradients: list = field(default_factory=list)   # (run, batch) -> metrics: add to .grad after the loss has
    clip: object = None         # (parameters, max_norm) -> norm
    step: object = None         # (run, optimizer, step, clock) -> record
    make_optimizer: object = None
    before_first_step: list = field(default_factory=list)   # (run, folder, state or None): once per start
    agree: object = staticmethod(lambda number: number)     # the largest of all processes' numbers
    observe: object = staticmethod(observe)                 # what the loss engine notes of a few rows
    also_saved: dict[str, Transformer] = field(default_factory=dict)    # name -> model that a checkpoint keeps too
    more_models: dict[str, Transformer] = field(default_factory=dict)   # beside student, actor and teachers
    batch: object = None        # of the last step
    memory_before: int = 0      # bytes that the process held before anything was loaded

    def models(self) -> set[Transformer]:
        return {self.student, self.actor, *self.kind.models, *self.more_models.values()}



@dataclass
class Setup:
    """What the small files say, before any weights are loaded."""
    cfg: object
    device: torch.device
    dtype: torch.dtype          # of products
    folder: Path                # the student's
    config: ModelConfig
    tokenizer: Tokenizer
    train: list[Problem]
    first: int                  # how many of them come from --data
    held_out: list[Problem]
    prompts: list[list[int]]
    teacher_device: torch.device = field(init=False)    # that teachers are loaded to: `device`, or an extra's choice

    def __post_init__(self):
        self.teacher_device = self.device


class Writer(NamedTuple):
    """A teacher that writes."""
    model: Transformer
    tokenizer: Tokenizer
    prompt: object              # number of a problem -> what it reads
    translate: object           # (its ids, finished) -> the student's, or None when they cannot say it


class TeacherKind:
    """How the teacher of a run is found, in two moves: small files first, weights later. This one: no teacher."""
    configs: list[ModelConfig] = []     # of the models that it will load, for the memory plan
    context = 2**62                     # longest sequence that it can read
    longest_prompt = 0                  # tokens of the longest prompt that it reads
    other_tokenizers: list[Tokenizer] = []      # of teachers that do not read the student's ids
    models: list[Transformer] = []      # once they are loaded

    def load(self, setup: Setup, student: Transformer):
        """What the run calls teacher."""
        return Nobody()

    def which(self, problem: Problem) -> int:
        """Number of the teacher that answers for this problem, where there are several."""
        return 0

    def compares(self, problems: list[Problem]) -> bool:
        """Can it read responses to these problems, which are not those of training?"""
        return False

    def held_out(self, run: Run) -> list[tuple[str, Transformer, Tokenizer, list[Problem]]]:
        """(label, model, tokenizer, problems) of the evaluations that say how good it is."""
        return []


class OneTeacher(TeacherKind):
    """One model with the student's tokenizer, which reads what the student reads."""

    def __init__(self, cfg, setup: Setup):
        self.folder = checkpoint_folder(cfg.teacher, weights=not cfg.plan)
        theirs = Tokenizer(self.folder, cfg.chat_template)
        check_same_tokens(setup.tokenizer, theirs)
        if not cfg.stop_ids and set(setup.tokenizer.stop_ids) != set(theirs.stop_ids):
            # a base student under an instruct teacher with another stop token never learns to stop
            raise UserError(f"the student stops at ids {list(setup.tokenizer.stop_ids)}, the teacher at "
                            f"{list(theirs.stop_ids)}; pass --stop_ids {','.join(map(str, theirs.stop_ids))} to train "
                            f"the student on the teacher's")
        self.configs = [load_config(self.folder)]
        check_vocabulary(self.folder, self.configs[0], theirs)
        self.context = self.configs[0].context

    def load(self, setup: Setup, student: Transformer) -> Teacher:
        model = load_model(self.folder, dtype=setup.dtype, device=setup.teacher_device).requires_grad_(False)
        model.title, model.vocab_size = "the teacher", setup.tokenizer.vocab_size
        self.models = [model]
        return Teacher(model, setup.cfg)

    def writer(self, run: Run, number: int, shown: bool) -> Writer:
        return Writer(self.models[0], run.tokenizer, run.prompts.__getitem__, lambda ids, finished: ids)

    def compares(self, problems: list[Problem]) -> bool:
        return True

    def held_out(self, run: Run) -> list[tuple[str, Transformer, Tokenizer, list[Problem]]]:
        return [("teacher", self.models[0], run.tokenizer, run.held_out)]


def teacher_kind(cfg, setup: Setup) -> TeacherKind:
    """The first kind that this configuration wants: an extra's, none, or one plain teacher."""
    for offer in offers("teacher"):
        if kind := offer(cfg, setup):
            return kind
    return TeacherKind() if cfg.teacher == "none" else OneTeacher(cfg, setup)


# Checks

def rules_of(cfg) -> list:
    """The entries of losses.py whose signals this configuration needs."""
    return [WEIGHTS[cfg.weight]] + [ADVANTAGES[cfg.advantage]] * (cfg.divergence in USES_ADVANTAGE)


def asked_signals(cfg) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name for rule in rules_of(cfg) for name in rule.asks))
    if missing := [name for name in names if name not in SIGNALS]:
        raise UserError(f"--advantage {cfg.advantage} --weight {cfg.weight}: they read the signal {missing[0]}, which "
                        f"nothing here provides; its part of extras/ is missing, or teacher.SIGNALS lacks a line")
    return names


def needs_teacher(cfg) -> bool:
    asked = asked_signals(cfg)
    return cfg.divergence not in NEEDS_NO_TEACHER or any(name.startswith("teacher") or name.startswith("reverse")
                                                         for name in asked)


def check_combinations(cfg) -> None:
    """Flags that contradict each other, and those that an extra's rules refuse."""
    group = any(rule.group for rule in rules_of(cfg))
    rules = [
        (cfg.lr > 0, "--lr must be above 0"),
        (cfg.lr * cfg.weight_decay < 1,
         "--lr times --weight_decay must be below 1: AdamW multiplies every weight by 1 minus that at each step"),
        (cfg.max_grad_norm > 0, "--max_grad_norm must be above 0; inf never clips"),
        (cfg.problems * cfg.samples <= 10**6, "--problems times --samples must be at most a million responses a step"),
        (cfg.scope_temperature > 0, "--scope_temperature must be above 0"),
        (0 < cfg.reopold_share < 1, "--reopold_share must lie strictly between 0 and 1"),
        (cfg.skew < 1, "--skew must be at least 0 and below 1"),
        (cfg.eval_temperature == 0 or cfg.eval_temperature >= 0.01,
         "--eval_temperature must be 0 (greedy) or lie between 0.01 and 100"),
        (cfg.eval_temperature > 0 or cfg.eval_k == 1,
         "--eval_temperature 0 gives the same answer every time: use --eval_k 1"),
        (cfg.divergence != "jsd" or 0 < cfg.beta < 1,
         "--beta must lie strictly between 0 and 1: jsd is 0 at both ends; use --divergence forward_kl or reverse_kl "
         "for those"),
        (cfg.divergence != "k2" or cfg.updates == 1,
         "k2 is only right on fresh samples: keep --updates 1, or use --divergence policy_gradient"),
        (cfg.divergence != "cross_entropy" or getattr(cfg, "lmbda", 1) < 1,
         "cross_entropy on the student's own samples has zero expected gradient: learn on given responses (--lmbda 0)"),
        (not group or cfg.samples > 1,
         f"recipe {cfg.recipe} compares the responses to one problem: --samples must be at least 2"),
        (not needs_teacher(cfg) or cfg.teacher != "none", f"--teacher none: recipe {cfg.recipe} needs a teacher"),
    ]
    for extra_rules in offers("rules"):
        rules += extra_rules(cfg)
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def choose_device(name: str) -> torch.device:
    name = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: there is no such device here; use --device cpu") from error
    return torch.device(name)


def parse_ids(flag: str, text: str, vocab_size: int) -> tuple[int, ...] | None:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not (part.isdecimal() and int(part) < vocab_size):
            raise UserError(f"--{flag} {text}: {part!r} is no token id; give whole numbers from 0 to {vocab_size - 1}, "
                            f"separated by commas")
    return tuple(dict.fromkeys(map(int, parts))) or None


def check_same_tokens(student: Tokenizer, teacher: Tokenizer) -> None:
    """UserError unless both read the same ids the same way."""
    mine, theirs = student.vocab(), teacher.vocab()
    if mine != theirs:
        odd = sorted(set(mine.items()) ^ set(theirs.items()), key=lambda item: item[1])[0]
        raise UserError(f"student and teacher have different vocabularies ({len(mine)} and {len(theirs)} tokens; the "
                        f"first difference is {odd[0]!r} = id {odd[1]}); choose a teacher with the student's tokenizer")


def check_vocabulary(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Every id of a tokenizer needs a row in its model's head; spare rows are padding."""
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"{folder}: config.json has {config.vocab_size} rows of vocabulary, but the ids of "
                        f"tokenizer.json end at {tokenizer.vocab_size - 1}; the two files do not belong together")


def check_lengths(path: str, problems: list[Problem], ids: list[list[int]], flag: str, limit: int, context: int,
                  reader: str) -> None:
    for problem, prompt in zip(problems, ids):
        if not prompt:
            raise UserError(f"{path}, {problem.place}: the {reader}'s tokenizer makes no token of this prompt, and a "
                            f"model needs one (the bos token, say); correct the problem or the chat template")
        if len(prompt) + limit > context:
            raise UserError(f"{path}, {problem.place}: the {reader}'s prompt of {len(prompt)} tokens plus --{flag} "
                            f"{limit} exceed the context of {context}; nothing is cut silently: shorten one of them or "
                            f"drop the problem")


# Loading

def read_small_files(cfg, device: torch.device) -> Setup:
    """config.json, tokenizer and problems; of a hub id the weights as well, unless only a plan is asked for."""
    folder = checkpoint_folder(cfg.student, weights=not cfg.plan)
    tokenizer = Tokenizer(folder, cfg.chat_template)
    tokenizer.variables = template_variables(cfg.template_vars)
    tokenizer.stop_ids = parse_ids("stop_ids", cfg.stop_ids, tokenizer.vocab_size) or tokenizer.stop_ids
    parse_ids("skip_tokens", cfg.skip_tokens, tokenizer.vocab_size)
    config = load_config(folder)
    check_vocabulary(folder, config, tokenizer)
    need_answer = "reward_B" in asked_signals(cfg) or any(needs(cfg) for needs in offers("needs_answers"))
    train = load_problems(cfg.data, need_answer=need_answer)
    first = len(train)
    for more_problems in offers("problems"):
        train = train + more_problems(cfg, train, need_answer)
    held_out = load_problems(cfg.eval_data, limit=cfg.eval_limit or None)
    answered(cfg.eval_data, held_out)       # all of them or none
    prompts = []
    for problem in train:       # one by one: a template may make each prompt large, and the first says so
        prompts.append(tokenizer.prompt_ids(problem.prompt))
        check_lengths(cfg.data, [problem], prompts[-1:], "max_new_tokens", cfg.max_new_tokens, config.context,
                      "student")
    return Setup(cfg, device, compute_dtype(cfg, device), folder, config, tokenizer, train, first, held_out, prompts)


def check_all_lengths(cfg, setup: Setup, kind: TeacherKind) -> int:
    """Returns the tokens of the longest held-out prompt."""
    context, asked = min(setup.config.context, kind.context), [setup.tokenizer.prompt_ids(problem.prompt)
                                                               for problem in setup.held_out]
    check_lengths(cfg.data, setup.train, setup.prompts, "max_new_tokens", cfg.max_new_tokens, context, "student")
    flag = "eval_max_new_tokens" if cfg.eval_max_new_tokens else "max_new_tokens"
    check_lengths(cfg.eval_data, setup.held_out, asked, flag, getattr(cfg, flag),
                  context if cfg.eval_teacher else setup.config.context, "student")
    return max(map(len, asked))


def describe(cfg, setup: Setup, kind: TeacherKind, held_out_prompt: int, memory: int) -> Job:
    """What the memory plan has to know."""
    references = [config for configs in offers("references") for config in configs(cfg, setup)]
    others = kind.other_tokenizers
    return Job(setup.device, memory, sized(setup.config), [sized(config) for config in kind.configs],
               sized(references[0]) if references else None, setup.tokenizer.vocab_size,
               max(*map(len, setup.prompts), kind.longest_prompt), (len(setup.held_out), held_out_prompt),
               max((other.vocab_size for other in others), default=0),
               text_memory(setup.folder / "tokenizer.json", [other.folder / "tokenizer.json" for other in others]))


def set_up(cfg, stored: dict) -> Run:
    """Everything but what a step is made of. stored: what the first start of this run chose (support/plan.py). With
    --plan prints the plan and exits: 0 when it fits, 1 when it does not."""
    device, memory = planned_device(cfg) if cfg.plan else (choose_device(cfg.device), 0)
    setup = read_small_files(cfg, device)
    for check in offers("before_loading"):
        check(cfg, setup)
    kind = teacher_kind(cfg, setup)
    job = describe(cfg, setup, kind, check_all_lengths(cfg, setup, kind), memory or total_memory(device))
    cfg = setup.cfg = settle(cfg, job, stored)
    if cfg.plan:
        sys.exit(print_plan(cfg, job))
    planned = announce(cfg, job)
    student = load_model(setup.folder, compute_dtype=setup.dtype, device=device)
    student.title, student.vocab_size = "the student", setup.tokenizer.vocab_size
    set_threads(student, cfg.threads)
    for adapt in offers("student"):
        adapt(cfg, student)
    teacher = kind.load(setup, student)
    actor = student
    if setup.dtype != torch.float32:
        actor = student.copy_as(setup.dtype)
        for faster in offers("on_model"):
            faster(actor)
    return Run(cfg, student, actor, setup.tokenizer, setup.train, setup.first, setup.held_out, setup.prompts, kind,
               teacher, asked_signals(cfg), planned)
