"""More than one plain teacher: several, the student itself, or one that is shown more than the student saw.

    tag=folder,tag=folder   each problem is scored by the teacher that its --route field names (FiRe-OPD 2606.02684)
    self                    the student as it was at the start, as a running average (SDFT, SDPO), or as it is now
    --privileged            the teacher's prompt holds the reference solution (OPSD 2601.18734), or a right response of
                            another sample to the same problem (SDPO 2601.20802)

Each may have a tokenizer of its own (cross_tokenizer/), or be no checkpoint here (elsewhere.py). Whatever it sees, a
teacher scores the same response tokens.
"""
import re
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from extras import elsewhere
from extras.cross_tokenizer.bridge import find_bridge
from extras.cross_tokenizer.crossing import Crossing
from extras.elsewhere import addresses, is_elsewhere
from extras.given import random_of, solutions
from extras.lora import lora_off
from extras.one_stop import OneStopPart, stops_of_all, with_one_stop
from model import Transformer
from rollout import Rollout, assemble
from support.errors import UserError
from support.flags import opt, recipe
from support.problems import Problem
from support.settings import TOY
from support.setup import Run, Setup, TeacherKind, Writer, check_lengths, check_vocabulary
from support.tokenizer import Tokenizer, template_variables
from support.weights import checkpoint_folder, load_config, load_model
from teacher import Batch, Part, Teacher

SHOWN_SOLUTION = (
    "Problem: {problem}\n\nA reference solution of this problem follows.\n--- reference begins ---\n{solution}\n"
    "--- reference ends ---\n\nFirst make sure that you understand every step of the reference, without copying or "
    "rephrasing it. Then reach the same final answer to the problem above with reasoning of your own. Think step by "
    "step, try more than one way, and go back wherever needed.")


@dataclass(frozen=True)
class Flags:
    route: str = opt("teacher", "several teachers (tag=folder,tag=folder): the field of a problem that names its "
                                "teacher's tag")
    self_teacher: str = opt("initial", "--teacher self: the student as it was at the start, a running average, or as "
                                        "it is",
                            ("initial", "ema", "live"))
    ema: float = opt(0.99, "--self_teacher ema: share of the average kept at each step", high=1)
    privileged: str = opt("none", "what else the teacher is shown: the solution, or a right response of another sample",
                          ("none", "solution", "sibling"))
    teacher_prompt: str = opt("", "template of the privileged prompt with {problem} and {solution}; empty: "
                                  "extras/teachers.py's")
    teacher_template_vars: str = opt("", "like template_vars, for the teacher's side; empty: the same")


PG, GROUPS = dict(divergence="policy_gradient"), dict(problems=8, samples=8)
SELF = dict(student=TOY + "self", teacher="self", teacher_prompt="{solution}|{problem}", lr=1e-4, steps=60,
            eval_every=15)

RECIPES = {
    "multi": recipe("several teachers, each problem routed to one by a field (2606.02684)", route="kind",
                    teacher=f"low={TOY}teacher_low,high={TOY}teacher_high", data=TOY + "mixed_train.jsonl",
                    eval_data=TOY + "mixed_test.jsonl"),
    # its mean is over responses (--reduction sequence), ours over tokens
    "opsd": recipe("the student is its own teacher and is shown the solution; clipped forward KL (2601.18734 v3)",
                   privileged="solution", divergence="forward_kl", entry_clip=0.05, **SELF),
    "sdft": recipe("the same with an average of the student as teacher, reverse KL, first tokens skipped (2601.19897)",
                   privileged="solution", self_teacher="ema", skip_first=3, **SELF),
    "sdpo": recipe("the same with a sibling's right answer instead of the solution; top-k and tail (2601.20802)",
                   privileged="sibling", self_teacher="ema", ema=0.95, divergence="topk_reverse_kl", topk_form="tail",
                   **SELF, **GROUPS),
    "rlsd": recipe("verifier sets the sign, privileged self-teacher the size (2604.03128)", advantage="rlsd",
                   privileged="solution", **PG, **SELF, **GROUPS),
}


def rules(cfg) -> list[tuple[bool, str]]:
    return [
        (not cfg.teacher_prompt or "{solution}" in cfg.teacher_prompt and "{problem}" in cfg.teacher_prompt,
         "--teacher_prompt must contain {problem} and {solution}"),
        (cfg.privileged == "none" or cfg.teacher != "none",
         f"--privileged {cfg.privileged} shows it to a teacher; there is none"),
        (cfg.privileged != "sibling" or cfg.lmbda == 1,
         "--privileged sibling needs the student's own samples: keep --lmbda 1"),
        (cfg.privileged != "sibling" or cfg.samples > 1,
         f"recipe {cfg.recipe} compares the responses to one problem: --samples must be at least 2"),
    ]


def needs_answers(cfg) -> bool:
    return cfg.privileged == "sibling"


def teacher(cfg, setup: Setup) -> TeacherKind | None:
    """Teachers, unless one with the student's tokens and stop ids reads what the student reads."""
    if cfg.teacher == "none":
        return None
    plain = (cfg.privileged == "none" and cfg.align == "auto" and cfg.teacher != "self" and not addresses(cfg)
             and not cfg.teacher_template_vars and "" in (folders := parse_teachers(cfg)))
    if plain:
        theirs = Tokenizer(folders[""], cfg.chat_template)
        if theirs.vocab() == setup.tokenizer.vocab() and (
                cfg.stop_ids or not stops_of_all(setup.tokenizer, [theirs])):
            return None
    return Teachers(cfg, setup)


def parse_teachers(cfg) -> dict[str, Path | str]:
    """{"": folder} for one teacher, {tag: folder} for `tag=folder,tag=folder`, {} for self; an address stays text."""
    def place(text: str) -> Path | str:
        return text if is_elsewhere(text) else checkpoint_folder(text, weights=not cfg.plan)
    if cfg.teacher == "self":
        return {}
    if is_elsewhere(cfg.teacher) or Path(cfg.teacher).expanduser().is_dir() or "=" not in cfg.teacher:
        return {"": place(cfg.teacher)}
    pairs = [part.partition("=") for part in cfg.teacher.split(",")]
    if bad := [tag for tag, _, folder in pairs if not tag or not folder]:
        raise UserError(f"--teacher {cfg.teacher}: {bad[0]!r} is no tag=folder pair")
    if len({tag for tag, _, _ in pairs}) < len(pairs):
        raise UserError(f"--teacher {cfg.teacher}: a tag names two teachers")
    return {tag: place(folder) for tag, _, folder in pairs}


def same_stops(student: Tokenizer, teachers: list[Tokenizer], bridges: list, training: bool) -> tuple[int, ...]:
    """stops_of_all of the teachers that read the student's ids. When there are any, a student in training ends its
    responses, and the model that is saved ends its own, at each of them."""
    ids = stops_of_all(student, teachers)
    if not ids:
        return ()
    theirs = next(teacher.stop_ids for teacher in teachers if set(teacher.stop_ids) != set(student.stop_ids))
    said = f"the student stops at ids {list(student.stop_ids)}, a teacher at {list(theirs)}"
    if any(bridges):
        raise UserError(f"{said}, and another teacher has another tokenizer; pass --stop_ids "
                        f"{','.join(map(str, theirs))} to train the student on the first one's")
    if training:
        print(f"stop    {said}: one event here, and responses end at each of {list(ids)}, those of the saved model too "
              f"(--stop_ids chooses others)")
        student.stop_ids = ids
    return ids


def with_prompts(rollout: Rollout, prompts: list[list[int]]) -> Rollout:
    """The same responses after other prompts, one per sequence: what a teacher with another context reads. Rows keep
    their number and order."""
    mask_BT, parts = rollout.mask_BT.cpu(), (rollout.tokens_BT.cpu(), rollout.logp_BT.cpu(), rollout.entropy_BT.cpu())
    responses, logps, entropies = ([row[mask] for row, mask in zip(part, mask_BT)] for part in parts)
    return assemble(prompts, responses, logps, entropies, rollout.finished_B.tolist(), rollout.tokens_BT.device)


def privileged_prompt(prompt: str | list[dict], solution: str, template: str) -> str | list[dict]:
    """The student's prompt with `template` in place of its last user message (of its last one, if no user speaks);
    {problem} and {solution} are filled in one pass, so braces inside the problem stay text.  OPSD, arXiv:2601.18734 v3:
    the structure of its code's prompt, in our words.

    >>> privileged_prompt("2+2?", "four", "{solution} | {problem}")
    'four | 2+2?'
    """
    if isinstance(prompt, list):
        last = max((i for i, message in enumerate(prompt) if message["role"] == "user"), default=len(prompt) - 1)
        content = privileged_prompt(prompt[last]["content"], solution, template)
        return [*prompt[:last], {**prompt[last], "content": content}, *prompt[last + 1:]]
    return re.sub(r"\{(problem|solution)\}", lambda found: prompt if found[1] == "problem" else solution, template)


class Teachers(TeacherKind):
    """The teachers of a run: their folders and tokenizers, and what each reads of a problem."""

    def __init__(self, cfg, setup: Setup):
        self.cfg, self.setup = cfg, setup
        self.folders = parse_teachers(cfg)
        self.tags, folders = list(self.folders) or [""], list(self.folders.values())
        here = [isinstance(folder, Path) for folder in folders or [setup.folder]]
        texts = [setup.tokenizer if folder == setup.folder or not ours else Tokenizer(folder, cfg.chat_template)
                 for folder, ours in zip(folders or [setup.folder], here)]
        self.bridges = [find_bridge(cfg, setup.tokenizer, text) if ours else None for text, ours in zip(texts, here)]
        self.one_stop = () if cfg.stop_ids else same_stops(
            setup.tokenizer, [text for text, bridge in zip(texts, self.bridges) if not bridge], self.bridges,
            training=bool(setup.held_out))      # of a run; eval.py has none
        if self.one_stop and not all(here):
            raise UserError(f"--teacher {cfg.teacher}: one of them stops at other tokens than the student, and what is "
                            f"no checkpoint here cannot be read with both as one; pass --stop_ids")
        self.tokenizers = [bridge.teacher if bridge else setup.tokenizer for bridge in self.bridges]
        own = self.own = [load_config(folder) if ours else elsewhere.find(cfg, setup, folder)
                          for folder, ours in zip(folders, here)]
        self.configs = [config for config, ours in zip(own, here) if ours]
        for folder, config, tokenizer, ours in zip(folders, own, self.tokenizers, here):
            if ours:
                check_vocabulary(folder, config, tokenizer)
        self.other_tokenizers = [bridge.teacher for bridge in self.bridges if bridge]
        self.contexts = [config.context for config in own or [setup.config]]
        self.context = min(self.contexts)
        if cfg.privileged == "solution":
            solutions(cfg, setup.train, "to show the teacher (--privileged solution)")
        self.read_prompts: dict[int, list[int]] = {}    # id(problem) -> what its teacher reads
        self.check(cfg.data, setup.train, cfg.max_new_tokens)
        if setup.held_out and setup.held_out[0].answer is None and self.compares(setup.held_out):
            self.check(cfg.eval_data, setup.held_out, cfg.eval_max_new_tokens or cfg.max_new_tokens)

    def check(self, path: str, problems: list[Problem], limit: int) -> None:
        """UserError unless every problem has a teacher, whose context holds what it will read."""
        sibling = self.cfg.privileged == "sibling"
        for problem in problems:
            context = self.contexts[self.which(problem, path)]
            empty = privileged_prompt(problem.prompt, "", self.template) if sibling else None
            ids = self.ids(problem, empty) if sibling else self.prompt(problem)
            check_lengths(path, [problem], [ids + [0] * limit * sibling], "max_new_tokens", limit, context, "teacher")
            self.longest_prompt = max(self.longest_prompt, len(ids))

    @property
    def reads_as_student(self) -> bool:
        return self.cfg.privileged == "none" and not self.cfg.teacher_template_vars and not any(self.bridges)

    @property
    def template(self) -> str:
        return self.cfg.teacher_prompt or SHOWN_SOLUTION

    def which(self, problem: Problem, path: str = "") -> int:
        if self.tags == [""]:
            return 0
        tag = problem.fields.get(self.cfg.route)
        if tag not in self.tags:
            raise UserError(f"{path or self.cfg.data}, {problem.place}: {self.cfg.route} is {tag!r}, which names "
                            f"no teacher; --teacher knows {', '.join(self.tags)}")
        return self.tags.index(tag)

    def ids(self, problem: Problem, prompt: str | list[dict]) -> list[int]:
        """A prompt in the ids of the problem's teacher."""
        tokenizer = self.tokenizers[self.which(problem)]
        before = tokenizer.variables
        try:
            tokenizer.variables = template_variables(self.cfg.teacher_template_vars) or self.setup.tokenizer.variables
            return tokenizer.prompt_ids(prompt)
        finally:
            tokenizer.variables = before

    def prompt(self, problem: Problem) -> list[int]:
        """What the problem's teacher reads before a response; a sibling's response is added by Panel.prompts."""
        key = id(problem)
        if key not in self.read_prompts:
            shown = problem.prompt
            if self.cfg.privileged == "solution":
                shown = privileged_prompt(problem.prompt, problem.solution, self.template)
            self.read_prompts[key] = self.ids(problem, shown)
        return self.read_prompts[key]

    def load(self, setup: Setup, student: Transformer) -> "Panel":
        """The models that score; the student itself where no copy is needed."""
        cfg, average = setup.cfg, None
        if cfg.teacher != "self":
            models = [load_model(folder, dtype=setup.dtype, device=setup.teacher_device) if isinstance(folder, Path)
                      else None for folder in self.folders.values()]
        elif cfg.self_teacher == "ema":
            models = [average := load_model(setup.folder, compute_dtype=setup.dtype, device=setup.device)]
        elif cfg.self_teacher == "initial" and not cfg.lora_rank:   # full fine-tuning: the initial policy needs a copy
            models = [load_model(setup.folder, dtype=setup.dtype, device=setup.device)]
        else:
            models = [student]
        for model, tokenizer in zip(models, self.tokenizers):
            if model not in (student, None):
                model.requires_grad_(False)
                model.title, model.vocab_size = "the teacher", tokenizer.vocab_size
        self.models, self.average = [model for model in models if model], average
        self.readers = [Teacher(model, cfg) if model else self.own[number] for number, model in enumerate(models)]
        return Panel(self, student)

    def writer(self, run: Run, number: int, shown: bool) -> Writer:
        bridge, model = self.bridges[number], self.readers[number].model
        if bridge:
            return Writer(model, bridge.teacher, lambda i: self.prompt(run.train[i]), bridge.translate)
        prompt = (lambda i: self.prompt(run.train[i])) if shown else run.prompts.__getitem__
        return Writer(model, run.tokenizer, prompt, lambda ids, finished: ids)

    def compares(self, problems: list[Problem]) -> bool:
        """Whether held-out problems can be scored: not when the teacher is to be shown what they do not have."""
        return self.cfg.privileged != "sibling" and not addresses(self.cfg) and (
            self.cfg.privileged == "none" or all(problem.solution for problem in problems))

    def held_out(self, run: Run) -> list[tuple[str, Transformer, Tokenizer, list[Problem]]]:
        if self.cfg.teacher == "self":
            return []
        found = []
        for tag, reader, tokenizer in zip(self.tags, self.readers, self.tokenizers):
            ours = [p for p in run.held_out if not tag or p.fields.get(self.cfg.route) == tag]
            if ours and (model := getattr(reader, "model", None)):
                tokenizer.variables = template_variables(self.cfg.teacher_template_vars or self.cfg.template_vars)
                found.append((f"teacher {tag}".strip(), model, tokenizer, ours))
        return found


class Panel:
    """Run.teacher: the loaded teachers, which score a step."""

    def __init__(self, kind: Teachers, student: Transformer):
        self.kind, self.student = kind, student
        self.crossing: Crossing | None = None   # of the last batch: who could score what, across tokenizers
        self.usable_B: Tensor | None = None     # of the last batch: has a sequence something to learn from? (sibling)

    def parts(self, batch: Batch) -> list[Part]:
        seen = batch.rollout
        if not self.kind.reads_as_student:
            seen = with_prompts(seen, self.prompts(batch))
        return self.read(batch, seen, seen.every_B)

    def read(self, batch: Batch, seen: Rollout, sequence_b: Tensor) -> list[Part]:
        """What each teacher says of its own among the sequences sequence_b of the step, which it reads in `seen`."""
        kind, cfg, device = self.kind, self.kind.cfg, self.student.device
        teacher_b = torch.tensor([kind.which(batch.problems[b]) for b in sequence_b.tolist()], device=device)
        self.crossing = Crossing.of(self, batch) if any(kind.bridges) else None
        is_student = self.student in kind.models
        parts, adapters_off = [], is_student and cfg.teacher == "self" and cfg.self_teacher == "initial"
        with lora_off(self.student) if adapters_off else nullcontext():
            for number, reader in enumerate(kind.readers):
                its_own_b = sequence_b[teacher_b == number]
                if len(its_own_b) and kind.bridges[number]:
                    parts.append(self.crossing.read(number, reader.model, its_own_b, seen))
                elif len(its_own_b):
                    parts.append(self.in_its_words(reader.read(replace(batch, rollout=seen), its_own_b)))
        if is_student and cfg.updates > 1:
            # the head is the student's own parameter: without a copy, the first update would change the teacher
            for part in parts:
                part.head_VE = part.head_VE.clone()
        return parts

    def in_its_words(self, part: Part) -> Part:
        """The part of a model with the student's tokenizer; its stop tokens one word where teachers stop otherwise."""
        ids = self.kind.one_stop
        return OneStopPart(part, torch.tensor(ids, device=part.token_N.device)) if ids else part

    def spread(self, other_N: Tensor) -> Tensor:
        """Log-probs of a model with the student's tokenizer, spread over tokens as a crossing teacher's are."""
        return self.crossing.spread(other_N) if self.crossing else other_N

    @property
    def sizes(self):
        """Settings with the sizes that were chosen at set-up."""
        return self.kind.setup.cfg

    def prompts(self, batch: Batch) -> list[list[int]]:
        """What is read before each response. sibling: the solution shown is a right, finished response of another
        sample to the same problem, drawn at random (the shortest one collapses training); a sample without such a
        sibling is not learned from.  SDPO, arXiv:2601.20802."""
        kind = self.kind
        prompts = [kind.prompt(problem) for problem in batch.problems]
        self.usable_B = torch.ones(len(prompts), device=self.student.device)
        if kind.cfg.privileged != "sibling" or not batch.on_policy:
            return prompts
        finished_B, reward_B = batch.rollout.finished_B.tolist(), batch.reward_B.tolist()
        good = [b for b, finished in enumerate(finished_B) if finished and reward_B[b] > 0]
        rng = random_of(kind.cfg.seed, 3, batch.step)
        for b, problem in enumerate(batch.problems):
            siblings = [c for c in good if batch.asked[c] == batch.asked[b] and c != b]
            if not siblings:
                self.usable_B[b] = 0.0
                continue
            text = batch.texts[siblings[rng.integers(len(siblings))]]
            prompts[b] = kind.ids(problem, privileged_prompt(problem.prompt, text, kind.template))
        return prompts


def attach(run: Run) -> None:
    if not isinstance(run.kind, Teachers):
        return
    if run.kind.one_stop:
        writes, write = run.sources[-1]
        run.sources[-1] = writes, with_one_stop(write, run.kind.one_stop)
    if run.cfg.privileged == "sibling":
        weigh = run.weigh
        run.weigh = lambda run, s: weigh(run, s) * run.teacher.usable_B[s.sequence_N]
    if run.kind.average is not None:
        run.also_saved["average"] = run.kind.average
        run.step = followed_by_average(run.step, run.kind.average)


def followed_by_average(step, average: Transformer):
    """A step after which the running average follows the student."""
    def both(run, optimizer, number: int, clock) -> dict:
        record = step(run, optimizer, number, clock)
        update_average(average, run.student, run.cfg.ema)
        return record
    return both


@torch.no_grad()
def update_average(average: Transformer, student: Transformer, decay: float) -> None:
    """average <- decay * average + (1 - decay) * student, LoRA merged: the EMA teacher of SDFT and SDPO."""
    weights = student.weights()
    for name, parameter in average.named_parameters():
        parameter.lerp_(weights[name].to(parameter.dtype), 1 - decay)
