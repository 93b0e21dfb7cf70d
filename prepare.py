"""Prepare: everything a run needs, found and checked before the first step.

Place in the loop: before it. Models, tokenizers, problems and prompts are loaded here; whatever is wrong with
them is one sentence here, before any GPU time is spent. Not here: what a flag means (train.py).
"""
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import parallel
from align import Bridge
from credit import NEEDS
from data import SHOWN_SOLUTION, near_duplicates, privileged_prompt
from eval import template_variable
from losses import NEEDS_NO_TEACHER, USES_ADVANTAGE
from memory import Job, compute_dtype, sized, text_memory, total_memory
from model import ModelConfig, Transformer, set_threads
from support.held_out import Comparison
from support.plan import announce, planned_device, print_plan, settle
from support.problems import Problem, answered, load_problems
from teacher import check_same_tokens, same_stops
from tokenizer import Tokenizer, UserError
from weights import checkpoint_folder, load_config, load_model


def needs(cfg, what: str) -> bool:
    """Does this configuration look at `what`: teacher, reward, group (of samples), reference, kl?"""
    entries = {cfg.weight} | ({cfg.advantage} if cfg.divergence in USES_ADVANTAGE else set())
    if what == "reference" and cfg.advantage == "sg" and cfg.sg_form == "scale":
        return False
    found = bool(entries & set(NEEDS[what]))
    if what == "teacher":
        found |= cfg.divergence not in NEEDS_NO_TEACHER or cfg.lmbda < 1 and cfg.responses == "teacher"
        found |= bool(cfg.cold_start_steps or cfg.pts_weight)
    if what in ("reward", "group"):
        found |= cfg.privileged == "sibling"
    return found or what == "reward" and cfg.pts_weight > 0


@dataclass
class Setup:
    """What the loop works with. actor is the student as the sampler sees it: the student itself, or a copy in
    the dtype of the products, refreshed once per step."""
    student: Transformer
    actor: Transformer
    teachers: list[Transformer]         # [] without a teacher; [student] when it is its own (adapters off, or live)
    teacher_of: list[int]               # which of them scores a training problem
    adapters_off: bool                  # the self-teacher is the student without its adapters: the initial policy
    average: Transformer | None         # the self-teacher that follows the student slowly
    reference: Transformer | None       # for advantages that compare with the initial student
    tokenizer: Tokenizer
    bridges: list[Bridge | None]        # per teacher: how it reads the student's text, if its tokenizer is another one
    one_stop: tuple[int, ...]           # stop ids that are one word for student and teachers; () = every id is its own
    train: list[Problem]                # those of --data, then those of --mix_data
    first: int                          # how many of them come from --data
    held_out: list[Problem]
    prompts: list[list[int]]            # of train, as the student reads them
    teacher_prompts: list[list[int]] | None     # of train, as its teacher reads each; None = as the student does
    given: list[list[int]] | None       # reference responses of train, when some steps learn on them
    variables: dict                     # of the chat template; teacher_variables likewise
    teacher_variables: dict
    chunk_rows: int
    planned_memory: int                 # bytes at the peak, as announced
    compared: Comparison | None         # of held-out responses that cannot be graded: with the teacher, if there is one

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


def parse_ids(flag: str, text: str, vocab_size: int) -> tuple[int, ...] | None:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    for part in parts:
        if not (part.isdecimal() and int(part) < vocab_size):
            raise UserError(f"--{flag} {text}: {part!r} is no token id; give whole numbers from 0 to "
                            f"{vocab_size - 1}, "
                            f"separated by commas")
    return tuple(dict.fromkeys(map(int, parts))) or None


def parse_teachers(cfg) -> dict[str, Path]:
    """{"": folder} for one teacher, {tag: folder} for `tag=folder,tag=folder`, {} for none and self."""
    if cfg.teacher in ("none", "self"):
        return {}
    if "=" not in cfg.teacher or os.path.isdir(os.path.expanduser(cfg.teacher)):
        return {"": checkpoint_folder(cfg.teacher, weights=not cfg.plan)}
    pairs = [part.partition("=") for part in cfg.teacher.split(",")]
    if bad := [tag for tag, _, folder in pairs if not tag or not folder]:
        raise UserError(f"--teacher {cfg.teacher}: {bad[0]!r} is no tag=folder pair")
    if len({tag for tag, _, _ in pairs}) < len(pairs):
        raise UserError(f"--teacher {cfg.teacher}: a tag names two teachers")
    return {tag: checkpoint_folder(folder, weights=not cfg.plan) for tag, _, folder in pairs}


def route(cfg, tags: list[str], train: list[Problem]) -> list[int]:
    """Which teacher scores each problem. With several, the problem's --route field has to name one."""
    if tags in ([], [""]):
        return [0] * len(train)
    for problem in train:
        if problem.fields.get(cfg.route) not in tags:
            raise UserError(f"{cfg.data}, line {problem.line}: {cfg.route} is "
                            f"{problem.fields.get(cfg.route)!r}, which names no "
                            f"teacher; --teacher knows {', '.join(tags)}")
    return [tags.index(problem.fields[cfg.route]) for problem in train]


def load_train(cfg) -> tuple[list[Problem], int]:
    """The problems of --data, then those of --mix_data that are not among them already, exactly or nearly."""
    train = load_problems(cfg.data, need_answer=needs(cfg, "reward"))
    if not cfg.mix_data:
        return train, len(train)
    others = load_problems(cfg.mix_data, need_answer=needs(cfg, "reward"))
    known = near_duplicates(others, train)
    others = [problem for i, problem in enumerate(others) if i not in known]
    if not others:
        raise UserError(f"{cfg.mix_data}: every problem is also in {cfg.data}; choose another --mix_data")
    print(f"data    {len(train)} problems of {cfg.data}, {len(others)} of {cfg.mix_data} ({len(known)} "
          f"duplicates left out)")
    return train + others, len(train)


def check_lengths(path: str, problems: list[Problem], ids: list[list[int]], flag: str, limit: int, context: int,
                  reader: str) -> None:
    for problem, prompt in zip(problems, ids):
        if len(prompt) + limit > context:
            raise UserError(f"{path}, line {problem.line}: the {reader}'s prompt of {len(prompt)} tokens plus "
                            f"--{flag} {limit} "
                            f"exceed the context of {context}; nothing is cut silently: shorten one of them "
                            f"or drop the problem")


def solutions(cfg, train: list[Problem], why: str) -> list[str]:
    for problem in train:
        if not problem.solution:
            raise UserError(f"{cfg.data}, line {problem.line} has no solution {why}; add a `solution` field")
    return [problem.solution for problem in train]


def find_bridge(cfg, student: Tokenizer, theirs: Tokenizer) -> Bridge | None:
    """None when a teacher with the tokenizer `theirs` reads the student's ids as they are."""
    folder = theirs.folder
    if student.vocab() == theirs.vocab() and cfg.align == "auto":
        return None
    if cfg.divergence in ("k2", "eopd") or cfg.weight == "tip":
        what = f"weight {cfg.weight}" if cfg.weight == "tip" else f"divergence {cfg.divergence}"
        raise UserError(f"{what} needs a teacher with the student's tokenizer, and {folder} has another one; use "
                        f"policy_gradient, or a divergence over the vocabulary")
    if student.vocab() != theirs.vocab() and cfg.chunk_credit == "chunk" and cfg.discount and (
            cfg.divergence == "policy_gradient" and cfg.advantage == "opd"):
        raise UserError(f"--discount {cfg.discount:g} adds up the credit of later tokens, and --chunk_credit chunk "
                        f"gives all of a chunk's to each of its tokens; use --chunk_credit prefix")
    own_template = student.vocab() != theirs.vocab() and cfg.chat_template != "auto"    # the student's is not for it
    return Bridge(student, Tokenizer(folder) if own_template else theirs)


def teacher_prompts(cfg, tokenizers: list[Tokenizer], teacher_of: list[int], train: list[Problem], student: Tokenizer,
                    variables: dict, contexts: list[int]) -> list[list[int]] | None:
    """What its teacher reads of each problem: shown the solution (--privileged), or through its own tokenizer
    and template. None when that is what the student reads. A sibling's response is not written yet: only the
    room for it is checked."""
    sibling, template = cfg.privileged == "sibling", cfg.teacher_prompt or SHOWN_SOLUTION
    if cfg.privileged == "none" and all(tokenizer is student for tokenizer in tokenizers):
        return None
    shown = None
    if cfg.privileged != "none":
        shown = [""] * len(train) if sibling else solutions(cfg, train, "to show the teacher (--privileged solution)")
    ids, later = [], [0] * cfg.max_new_tokens * sibling
    for number, problem in enumerate(train):
        prompt = privileged_prompt(problem.prompt, shown[number], template) if shown else problem.prompt
        ids.append(tokenizers[teacher_of[number]].prompt_ids(prompt, **variables))
        check_lengths(cfg.data, [problem], [ids[-1] + later], "max_new_tokens", cfg.max_new_tokens,
                      contexts[teacher_of[number]], "teacher")
    if sibling:
        return None if all(tokenizer is student for tokenizer in tokenizers) else [
            tokenizers[which].prompt_ids(problem.prompt, **variables) for which, problem in zip(teacher_of, train)]
    return ids


def compare_with(cfg, tokenizers: list[Tokenizer], tags: list[str], held_out: list[Problem], student: Tokenizer,
                 variables: dict, configs: list[ModelConfig]) -> tuple[list[int], list[list[int]] | None] | None:
    """(which teacher reads the responses to each held-out problem, after which prompts), as in training. None without
    a teacher, or when it is to be shown what these problems do not have."""
    if not tokenizers or cfg.privileged == "sibling" or (
            cfg.privileged == "solution" and not all(problem.solution for problem in held_out)):
        return None
    cfg = replace(cfg, data=cfg.eval_data, max_new_tokens=cfg.eval_max_new_tokens or cfg.max_new_tokens)
    teacher_of = route(cfg, tags, held_out)
    return teacher_of, teacher_prompts(cfg, tokenizers, teacher_of, held_out, student, variables,
                                       [config.context for config in configs[1:] or configs])


def load_teachers(cfg, folders: dict[str, Path], folder: Path, student: Transformer, dtype, device):
    """(models that score, the running average or None, whether to switch the student's adapters off while
    scoring)."""
    if cfg.teacher != "self":
        models = [load_model(found, dtype=dtype, device=device).requires_grad_(False) for found in folders.values()]
        return models, None, False
    if cfg.self_teacher == "ema":
        average = load_model(folder, compute_dtype=dtype, device=device).requires_grad_(False)
        return [average], average, False
    if cfg.self_teacher == "initial" and not cfg.lora_rank:     # full fine-tuning: the initial policy needs a copy
        return [load_model(folder, dtype=dtype, device=device).requires_grad_(False)], None, False
    return [student], None, cfg.self_teacher == "initial"


def check_vocabularies(folders: list, configs: list[ModelConfig], tokenizers: list[Tokenizer]) -> None:
    """Every id of a tokenizer needs a row in its model's head; spare rows are padding."""
    for folder, config, tokenizer in zip(folders, configs, tokenizers):
        if config.vocab_size < tokenizer.vocab_size:
            raise UserError(f"{folder}: config.json has {config.vocab_size} rows of vocabulary, but the ids of "
                            f"tokenizer.json end at {tokenizer.vocab_size - 1}; the two files do not belong together")


def check_compiler(device: torch.device) -> None:
    """UserError unless torch.compile works here: a line now instead of a page after the models are loaded."""
    try:
        torch.compile(torch.sin)(torch.ones(2, device=device))
    except torch._dynamo.exc.TorchDynamoException as error:
        raise UserError(f"--compile does not work here ({str(error).splitlines()[0]}); install what is missing (on a "
                        f"CPU a C++ compiler such as g++), or leave --compile out") from error


@dataclass
class Checkpoints:
    """Which checkpoints a run is made of, and how they read text. No weights yet."""
    folder: Path                        # the student's
    teachers: dict[str, Path]           # parse_teachers
    reference: Path | None              # for advantages that compare with the initial student
    configs: list[ModelConfig]          # the student's, then each teacher's
    tokenizer: Tokenizer                # the student's
    bridges: list[Bridge | None]        # per teacher
    one_stop: tuple[int, ...]           # same_stops

    @property
    def tokenizers(self) -> list[Tokenizer]:
        """What each teacher reads with."""
        return [bridge.teacher if bridge else self.tokenizer for bridge in self.bridges]

    @property
    def contexts(self) -> list[int]:
        """Of what each teacher's model is given to read."""
        return [config.context for config in self.configs[1:] or self.configs]


def find_checkpoints(cfg) -> Checkpoints:
    """Folders, config.json and tokenizers; of a hub id the weights as well, unless only a plan is asked for."""
    folder, teachers = checkpoint_folder(cfg.student, weights=not cfg.plan), parse_teachers(cfg)
    if cfg.lmbda < 1 and cfg.responses == "teacher" and len(teachers) != 1:
        raise UserError("--responses teacher is written by one teacher that is not the student itself; name "
                        "one, or pass --responses solution")
    tokenizer = Tokenizer(folder, cfg.chat_template)
    stop_ids = parse_ids("stop_ids", cfg.stop_ids, tokenizer.vocab_size)
    parse_ids("skip_tokens", cfg.skip_tokens, tokenizer.vocab_size)
    tokenizer.stop_ids = stop_ids or tokenizer.stop_ids
    texts = [tokenizer if found == folder else Tokenizer(found, cfg.chat_template)
             for found in teachers.values() or [folder] * (cfg.teacher == "self")]
    bridges = [find_bridge(cfg, tokenizer, text) for text in texts]
    one_stop = () if stop_ids else same_stops(tokenizer, texts, bridges)
    reference = None
    if needs(cfg, "reference"):
        reference = checkpoint_folder(cfg.reference, weights=not cfg.plan) if cfg.reference else folder
    folders = [folder, *teachers.values()]
    found = Checkpoints(folder, teachers, reference, [load_config(one) for one in folders], tokenizer, bridges,
                        one_stop)
    check_vocabularies(folders, found.configs, [tokenizer, *found.tokenizers])
    return found


@dataclass
class Texts:
    """Problems and prompts, in the ids of those who read them; the fields of Setup, but for held_out_prompt."""
    train: list[Problem]
    first: int
    held_out: list[Problem]
    held_out_prompt: int                # tokens of the longest one
    prompts: list[list[int]]
    teacher_of: list[int]
    teacher_prompts: list[list[int]] | None
    given: list[list[int]] | None
    variables: dict
    teacher_variables: dict
    compared: tuple | None              # compare_with


def read_texts(cfg, found: Checkpoints) -> Texts:
    """The problems, and what everybody reads of them; what is too long or missing is a UserError."""
    variables, teacher_variables = (dict(template_variable(pair) for pair in text.split(",") if pair)
                                    for text in (cfg.template_vars, cfg.teacher_template_vars or cfg.template_vars))
    tokenizer, tags, context = found.tokenizer, list(found.teachers), min(config.context for config in found.configs)
    train, first = load_train(cfg)
    held_out = load_problems(cfg.eval_data, limit=cfg.eval_limit or None)
    compared = None if answered(cfg.eval_data, held_out) else compare_with(
        cfg, found.tokenizers, tags, held_out, tokenizer, teacher_variables, found.configs)
    prompts, asked = ([tokenizer.prompt_ids(problem.prompt, **variables) for problem in part]
                      for part in (train, held_out))
    check_lengths(cfg.data, train, prompts, "max_new_tokens", cfg.max_new_tokens, context, "student")
    flag = "eval_max_new_tokens" if cfg.eval_max_new_tokens else "max_new_tokens"
    check_lengths(cfg.eval_data, held_out, asked, flag, getattr(cfg, flag),
                  context if cfg.eval_teacher else found.configs[0].context, "student")
    teacher_of, given = route(cfg, tags, train), None
    shown = teacher_prompts(cfg, found.tokenizers, teacher_of, train, tokenizer, teacher_variables, found.contexts)
    if cfg.lmbda < 1 and cfg.responses == "solution":
        texts = solutions(cfg, train, "to learn from; or pass --responses teacher")
        given = [(tokenizer.encode(text) + [tokenizer.stop_ids[0]])[:cfg.max_new_tokens] for text in texts]
    return Texts(train, first, held_out, max(map(len, asked)), prompts, teacher_of, shown, given, variables,
                 teacher_variables, compared)


def describe(found: Checkpoints, texts: Texts, device: torch.device, memory: int) -> Job:
    """What the memory plan has to know."""
    others = [bridge.teacher for bridge in found.bridges if bridge]
    reference = found.reference and sized(load_config(found.reference))
    return Job(device, memory, sized(found.configs[0]), [sized(config) for config in found.configs[1:]], reference,
               found.tokenizer.vocab_size, max(map(len, texts.teacher_prompts or texts.prompts)),
               (len(texts.held_out), texts.held_out_prompt), max((other.vocab_size for other in others), default=0),
               text_memory(found.folder / "tokenizer.json", [other.folder / "tokenizer.json" for other in others]))


def load_all(cfg, found: Checkpoints, texts: Texts, device: torch.device, planned: int) -> Setup:
    """The models on their device, ready for the first step."""
    dtype = compute_dtype(cfg, device)
    student = load_model(found.folder, compute_dtype=dtype, device=device)
    student.title = "the student"
    set_threads(student, cfg.threads)
    if cfg.lora_rank:
        student.add_lora(cfg.lora_rank, cfg.lora_alpha, cfg.seed)
    student.gradient_checkpointing = cfg.gradient_checkpointing
    parallel.shard(student)
    models, average, adapters_off = load_teachers(cfg, found.teachers, found.folder, student, dtype, device)
    reference = None
    if found.reference and (cfg.reference or not cfg.lora_rank):
        reference = load_model(found.reference, dtype=dtype, device=device).requires_grad_(False)
    for model in {*models, reference} - {student, None}:
        model.title = "the reference" if model is reference else "the teacher"
    parallel.shard(*models, reference)
    if cfg.compile and parallel.world() == 1:       # several processes gather each layer around its own pass
        for model in {student, *models, reference} - {None}:
            model.compile_layers()
    actor = student if dtype == torch.float32 else student.copy_as(dtype)
    return Setup(student, actor, models, texts.teacher_of, adapters_off, average, reference, found.tokenizer,
                 found.bridges, found.one_stop, texts.train, texts.first, texts.held_out, texts.prompts,
                 texts.teacher_prompts, texts.given, texts.variables, texts.teacher_variables, cfg.chunk_rows, planned,
                 texts.compared and Comparison(models, *texts.compared, found.bridges, cfg, adapters_off,
                                              found.one_stop))


def set_up(cfg, stored: dict | None = None) -> tuple:
    """(cfg with the sizes that were left to memory.fit, everything the loop works with). stored: what the run's first
    start chose (support/plan.py). With --plan prints the plan and exits: 0 when it fits, 1 when it does not."""
    if cfg.plan:
        device, memory = planned_device(cfg)
    else:
        device = choose_device(cfg.device)
        memory = total_memory(device)
        if cfg.compile:
            check_compiler(device)
    found = find_checkpoints(cfg)
    texts = read_texts(cfg, found)
    job = describe(found, texts, device, memory)
    cfg = settle(cfg, job, stored)
    if cfg.plan:
        sys.exit(print_plan(cfg, job))
    planned = announce(cfg, job)
    return cfg, load_all(cfg, found, texts, device, planned)


def load_other(cfg, run: Setup) -> Transformer:
    """The model of --compare_teacher, checked like a teacher."""
    folder = checkpoint_folder(cfg.compare_teacher)
    check_same_tokens(run.tokenizer, Tokenizer(folder, cfg.chat_template))
    return load_model(folder, dtype=run.student.compute_dtype, device=run.student.device).requires_grad_(False)
