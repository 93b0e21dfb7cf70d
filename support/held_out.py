"""Held-out problems: the distance to the teacher where there are no answers, and the file of samples.

Student and teacher read the same responses; at every token their distributions over the whole vocabulary are compared,
at the temperature of the samples (greedy ones: at 1). With another tokenizer that is done at the tokens and over the
words that both have, as in training.
"""
import json
import os
from argparse import Namespace
from dataclasses import fields
from pathlib import Path

import torch

from support.errors import UserError
from support.extras import offers
from support.problems import Problem
from support.responses import from_responses
from support.setup import Setup, teacher_kind
from support.tokenizer import Tokenizer
from teacher import Batch, Teacher, disagreement

TOKENS_AT_ONCE = 2**14      # hidden states of so many response tokens are held, both sides' (4,096 wide: 256 MiB)


@torch.no_grad()
def distance(run, problems: list[Problem], samples: list[dict]) -> dict[str, float | None]:
    """{"reverse_kl": KL(student || teacher), "forward_kl": KL(teacher || student)} in nats per token: means over all
    tokens of eval.evaluate's samples. {} without a teacher, None when no token could be compared."""
    if not run.kind.compares(problems):
        return {}
    sums, rows, device = dict.fromkeys(("reverse_kl", "forward_kl"), 0.0), 0, run.student.device
    for group in groups(samples):
        asked = [sample["problem"] for sample in group]
        rollout = from_responses([sample["prompt_tokens"] for sample in group], [s["tokens"] for s in group],
                                 [sample["finished"] for sample in group], device)
        batch = Batch(rollout, asked, [problems[i] for i in asked], False, 0)
        mine = Teacher(run.student, run.cfg).read(batch, rollout.every_B)
        found = disagreement(mine, run.teacher.parts(batch))
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


def distance_to(args, student, tokenizer: Tokenizer, problems: list[Problem], samples: list[dict]) -> dict:
    """distance() to the teacher of `eval.py --teacher`, loaded and checked."""
    unset = {f.name: f.default for flags in offers("Flags") for f in fields(flags)}
    cfg = Namespace(**{**unset, **vars(args)}, plan=False, stop_ids="", micro_batch_tokens=8192,
                    chunk_rows=max(16, 2**24 // tokenizer.vocab_size), divergence="reverse_kl", weight="none")
    cfg.temperature = args.temperature or 1.0
    setup = Setup(cfg, student.device, student.compute_dtype, tokenizer.folder, student.config, tokenizer, problems,
                  len(problems), [], [tokenizer.prompt_ids(problem.prompt) for problem in problems])
    kind = teacher_kind(cfg, setup)
    longest = max(len(prompt) for prompt in setup.prompts)
    if max(longest, kind.longest_prompt) + args.max_new_tokens > kind.context:
        raise UserError(f"a prompt has {max(longest, kind.longest_prompt)} tokens; with max_new_tokens "
                        f"{args.max_new_tokens} it does not fit the context of {kind.context} of {args.teacher}")
    if not kind.compares(problems):
        raise UserError(f"--teacher {args.teacher} has no distribution over the vocabulary at these responses, which "
                        f"is what is compared; name a checkpoint")
    run = Namespace(student=student, cfg=cfg, kind=kind, teacher=kind.load(setup, student))
    return distance(run, problems, samples)


def check_out(path: Path) -> None:
    """UserError where samples cannot be written, or would replace what eval.py did not write."""
    if not os.path.isdir(path.parent) or os.path.lexists(path) and not os.path.isfile(path):
        raise UserError(f"--out {path}: its folder must exist, and what is there may only be a file")
    if os.path.isfile(path):
        try:
            with open(path, "rb") as file:
                first = file.readline(2**25)
            known = not first or {"problem", "sample", "prompt_tokens", "tokens", "text"} <= json.loads(first).keys()
        except (OSError, ValueError, AttributeError, RecursionError):
            known = False
        if not known:
            raise UserError(f"--out {path} exists and does not hold samples of eval.py; pass another name, or move it "
                            f"away")


def write_samples(path: Path, samples: list[dict]) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "x") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
        os.replace(part, path)          # a reader finds the old file or the whole new one
    except OSError as error:
        raise UserError(f"--out {path} cannot be written ({error.strerror})") from error
