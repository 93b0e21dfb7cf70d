"""Held-out problems without answers: how far a student is from its teacher, on the responses it sampled to them.

Place in the loop:  eval.evaluate -> [DISTANCE] -> the figure that decides which checkpoint is best.

Both sides read the same responses; at every token their distributions over the whole vocabulary are compared, at the
temperature of the samples (greedy ones: at 1). With another tokenizer that is done at the tokens and over the words
that both have, as in training.
"""
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from model import Transformer
from rollout import from_responses
from support.errors import UserError
from support.problems import Problem
from teacher import disagreement, score, stops_of_all
from tokenizer import Tokenizer
from weights import checkpoint_folder, load_model

if TYPE_CHECKING:
    from across import AcrossArgs
    from align import Bridge

TOKENS_AT_ONCE = 2**14      # hidden states of so many response tokens are held, both sides' (4,096 wide: 256 MiB)


@dataclass(frozen=True)
class Comparison:
    """Who reads the responses to held-out problems, and how."""
    teachers: list[Transformer]
    teacher_of: list[int]                   # which of them reads the responses to a problem
    prompts: list[list[int]] | None         # per problem, in the ids of its teacher; None = as the student reads it
    bridges: "list[Bridge | None]"          # per teacher: how it reads the student's text, if its tokenizer is another
    args: "AcrossArgs | None" = None        # of the bridges
    adapters_off: bool = False              # the teacher is the student without its adapters
    one_stop: tuple[int, ...] = ()          # stop ids that are one word for both (losses.OneStop)


@torch.no_grad()
def distance(samples: list[dict], student: Transformer, c: Comparison, *, vocab_size: int, temperature: float,
             max_tokens: int, chunk_rows: int) -> dict[str, float | None]:
    """{"reverse_kl": KL(student || teacher), "forward_kl": KL(teacher || student)} in nats per token: means over all
    tokens of eval.evaluate's samples. None when no token could be compared."""
    sums, rows = dict.fromkeys(("reverse_kl", "forward_kl"), 0.0), 0
    sizes = dict(vocab_size=vocab_size, temperature=temperature, max_tokens=max_tokens, chunk_rows=chunk_rows,
                 one_stop=c.one_stop)
    for group in groups(samples):
        asked = [sample["problem"] for sample in group]
        rollout = from_responses([sample["prompt_tokens"] for sample in group], [s["tokens"] for s in group],
                                 [sample["finished"] for sample in group], student.device)
        teacher_B = torch.tensor([c.teacher_of[i] for i in asked], device=student.device)
        crossing = None
        if any(c.bridges):
            from across import Crossing
            crossing = Crossing(c.bridges, rollout, c.args, divergence="reverse_kl", temperature=temperature,
                                max_tokens=max_tokens, chunk_rows=chunk_rows)
        with student.lora_off() if c.adapters_off else nullcontext():
            theirs = score(c.teachers, rollout, teacher_B, prompts=c.prompts and [c.prompts[i] for i in asked],
                           crossing=crossing, tokens_too=False, **sizes)
        mine = score([student], rollout, torch.zeros_like(teacher_B), tokens_too=False, **sizes)
        found = disagreement(mine, theirs, temperature=temperature, chunk_rows=chunk_rows)
        for name in sums:
            sums[name] += found[name].double().nansum().item()
        rows += int((~found["reverse_kl"].isnan()).sum())
    return {name: total / rows if rows else None for name, total in sums.items()}


def groups(samples: list[dict]):
    """The samples, so many at a time that their hidden states fit."""
    group, held = [], 0
    for sample in samples:
        held += len(sample["tokens"])
        if group and held > TOKENS_AT_ONCE:
            yield group
            group, held = [], len(sample["tokens"])
        group.append(sample)
    yield group


def compare_with(name: str, student: Tokenizer, problems: list[Problem], *, chat_template: str, variables: dict,
                 max_new_tokens: int, dtype: torch.dtype, device) -> Comparison:
    """The teacher of `eval.py --teacher`, loaded and checked."""
    folder = checkpoint_folder(name)
    theirs, bridge, prompts, args = Tokenizer(folder, chat_template), None, None, None
    one_stop = stops_of_all(student, [theirs])
    if theirs.vocab() != student.vocab():
        from across import AcrossArgs
        from align import Bridge
        theirs = theirs if chat_template == "auto" else Tokenizer(folder)   # the student's template is not for it
        bridge, args, one_stop = Bridge(student, theirs), AcrossArgs(), ()
        prompts = [theirs.prompt_ids(problem.prompt, **variables) for problem in problems]
    model = load_model(folder, dtype=dtype, device=device)
    model.title = "the teacher"
    if model.config.vocab_size < theirs.vocab_size:
        raise UserError(f"{folder}: its head has {model.config.vocab_size} rows, fewer than its tokenizer has tokens; "
                        f"the two do not belong together")
    for i, problem in enumerate(problems):
        size = len(prompts[i] if prompts else student.prompt_ids(problem.prompt, **variables))
        if size + max_new_tokens > model.config.context:
            raise UserError(f"the prompt on line {problem.line} has {size} tokens; with max_new_tokens "
                            f"{max_new_tokens} it does not fit the context of {model.config.context} of {name}")
    return Comparison([model], [0] * len(problems), prompts, [bridge], args, one_stop=one_stop)
