"""Evaluation: how often a model answers problems right.

Place in the loop:  problems -> rollout.generate -> [GRADE] -> avg@k, pass@k, maj@k.

    python eval.py --model DIR --data FILE --k 8 --temperature 0.7 --max_new_tokens 512 --out samples.jsonl

prints one JSON object on stdout; progress goes to stderr. What a problem is: support/problems.py; what a right answer
is: support/verifier.py. Where no problem has an answer nothing is graded: lengths are left, and with a teacher the
distance to it (support/held_out.py).

P problems    K samples of each    B = P * K sequences    T positions

Not here: prompt wording (it belongs to the data), chat templates (tokenizer.py), sampling (rollout.py).
"""
import argparse
import difflib
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from model import set_threads
from rollout import generate
from support.problems import Problem, answered, load_problems
from support.verifier import VERIFIERS, canonical, extract, grade
from tokenizer import Tokenizer, UserError
from weights import checkpoint_folder, load_model


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k).

    Unbiased for every n >= k (Chen 2021, arXiv:2107.03374). The product never forms a large binomial.
    """
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1))) if correct else 0.0


def majority(votes: list, correct: list[bool]) -> float:
    """Chance that the most frequent answer is right when a tie is broken uniformly at random.

    votes: the canonical answer of each sample; None (no answer) does not vote. Nobody votes: 0.
    """
    counts, right = Counter(vote for vote in votes if vote is not None), dict(zip(votes, correct))
    top = max(counts.values(), default=0)
    winners = [right[vote] for vote, count in counts.items() if count == top]
    return sum(winners) / max(len(winners), 1)


def bootstrap_interval(values_P: np.ndarray, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean over problems: 20 x 100 (memory) resamples of P with replacement.

    Values that are all alike (every answer right) give width zero: then the interval says nothing.
    """
    rng, size = np.random.default_rng(seed), len(values_P)
    means = [values_P[rng.integers(size, size=(100, size))].mean(axis=1) for _ in range(20)]
    return np.quantile(np.concatenate(means), (0.025, 0.975)).tolist()


def check_settings(k: int, temperature: float, max_new_tokens: int, slots: int, verifier: str | None) -> None:
    """UserError for a setting that makes no sense, before a model is loaded."""
    for name, value in (("k", k), ("max_new_tokens", max_new_tokens), ("slots", slots)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature must be 0 or a positive number, not {temperature}")
    if temperature == 0 and k > 1:
        raise UserError(f"temperature 0 gives the same response {k} times: use k 1 or a temperature above 0")
    if verifier is not None:
        grade("", "", verifier)


def evaluate(model, tokenizer, problems: list[Problem], *, k: int, temperature: float, max_new_tokens: int,
             seed: int, verifier: str | None = "auto", slots: int = 64, progress: str | None = None,
             variables: dict | None = None) -> tuple[dict, list[dict]]:
    """Sample k responses per problem and grade them. Returns (metrics, samples), samples problem by problem.

    metrics   avg@k, pass@k, maj@k from 0 to 1, each with `..._ci` = [low, high]; truncation_rate: share of
              samples cut at max_new_tokens; mean_length: tokens per sample; counts problems, samples, tokens.
              verifier None, or no problem has an answer: no grading, so none of the first three.
    samples   problem and sample (both from 0), prompt_tokens, tokens (stop token included), logprobs (one per
              token, nats, at `temperature`), text (without special tokens), answer (as extracted, or None),
              correct (None without grading), finished (ended by a stop token).
    `variables` go to the chat template. Raises UserError before anything is sampled.
    """
    check_settings(k, temperature, max_new_tokens, slots, verifier)
    if not problems:
        raise UserError("there are no problems to evaluate on")
    if all(problem.answer is None for problem in problems):
        verifier = None
    prompts = [tokenizer.prompt_ids(problem.prompt, **(variables or {})) for problem in problems]
    for problem, ids in zip(problems, prompts):
        if len(ids) + max_new_tokens > model.config.context:
            raise UserError(f"the prompt on line {problem.line} has {len(ids)} tokens; with max_new_tokens "
                            f"{max_new_tokens} it does not fit the model's context of {model.config.context}")
        if verifier is not None and problem.answer is None:
            raise UserError(f"the problem on line {problem.line} has no answer to grade against")
    rollout = generate(model, prompts, samples=k, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids,
                       temperature=temperature, seed=seed, slots=slots, vocab_size=tokenizer.vocab_size,
                       progress=progress)
    logp_BT, mask_BT, finished_B = rollout.logp_BT.cpu(), rollout.mask_BT.cpu(), rollout.finished_B.tolist()
    samples = []
    for b, finished in enumerate(finished_B):
        tokens = rollout.response(b)
        text = tokenizer.decode(tokens)
        samples.append({"problem": b // k, "sample": b % k, "prompt_tokens": prompts[b // k],
                        "tokens": tokens, "logprobs": logp_BT[b][mask_BT[b]].tolist(), "text": text,
                        "answer": verifier and extract(text, verifier),
                        "correct": verifier and grade(text, problems[b // k].answer, verifier),
                        "finished": finished})
    return metrics_of(samples, k, verifier), samples


def metrics_of(samples: list[dict], k: int, verifier: str | None) -> dict:
    metrics = {}
    if verifier is not None and samples[0]["correct"] is not None:
        correct_PK = np.array([s["correct"] for s in samples], dtype=np.float64).reshape(-1, k)
        key = str if verifier == "exact" else canonical
        votes = [None if s["answer"] is None else key(s["answer"]) for s in samples]
        maj_P = [majority(votes[p * k:(p + 1) * k], row) for p, row in enumerate(correct_PK.tolist())]
        pass_P = [pass_at_k(k, int(row.sum()), k) for row in correct_PK]
        for name, values_P in (("avg", correct_PK.mean(axis=1)), ("pass", pass_P), ("maj", maj_P)):
            metrics[f"{name}@{k}"] = float(np.mean(values_P))
            metrics[f"{name}@{k}_ci"] = bootstrap_interval(np.array(values_P))
    tokens = sum(len(s["tokens"]) for s in samples)
    return metrics | {"truncation_rate": 1 - sum(s["finished"] for s in samples) / len(samples),
                      "mean_length": tokens / len(samples), "problems": len(samples) // k,
                      "samples": len(samples), "tokens": tokens}


# What an evaluation is judged by: how train.py prints it, and which checkpoint is the best

def judged_by(metrics: dict) -> str | None:
    """The figure that decides: accuracy, else the distance to the teacher, else none."""
    return next((key for key in metrics if re.fullmatch(r"avg@\d+|reverse_kl", key)), None)


def better(metrics: dict, best: float | None) -> bool:
    """Is this evaluation better than an earlier one whose figure was `best`? Where none decides, the later one is."""
    key = judged_by(metrics)
    value = metrics.get(key)
    if key is None or value is None or best is None:
        return key is None or value is not None
    return value < best if key == "reverse_kl" else value > best


def headline(metrics: dict) -> str:
    """The first figures of an evaluation's line."""
    key = judged_by(metrics)
    if key == "reverse_kl":
        return "".join(f"{name} {figure(name, metrics)}  " for name in ("reverse_kl", "forward_kl"))
    low, high = metrics[f"{key}_ci"] if key else (0, 0)
    others = key and key.replace("avg", "pass")
    return f"{key} {metrics[key]:.1%} [{low:.1%}, {high:.1%}]  {others} {metrics[others]:.1%}  " if key else ""


def change(before: dict, after: dict, teacher: dict | None) -> str:
    """`avg@8 24.6% -> 99.0% (teacher 99.7%)`"""
    key = judged_by(before) or "mean_length"
    of_teacher = f" (teacher {figure(key, teacher)})" if teacher and key in teacher else ""
    return f"{key} {figure(key, before)} -> {figure(key, after)}{of_teacher}"


def figure(key: str, metrics: dict) -> str:
    form = {"reverse_kl": ".4f", "forward_kl": ".4f", "mean_length": ".1f"}.get(key, ".1%")
    return "-" if metrics[key] is None else f"{metrics[key]:{form}}"


# Command line

def template_variable(text: str) -> tuple[str, object]:
    """`enable_thinking=false` -> ("enable_thinking", False). A value that is not JSON is a string."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()) or name in ("prompt", "messages", "add_generation_prompt"):
        raise UserError(f"expected NAME=VALUE, a variable of the chat template, not {text!r}")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


class Parser(argparse.ArgumentParser):
    """A wrong flag is one sentence, not a page of usage."""

    def error(self, message):
        if unknown := re.match(r"unrecognized arguments: (\S+)", message):
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[1], flags, 1)
            hint = f"; did you mean {close[0]}?" if close else "; --help lists them all"
            message = f"unknown flag {unknown[1]}{hint}"
        raise UserError(message)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(allow_abbrev=False, description="Sample, grade, print metrics as JSON.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = parser.add_argument
    flag("--model", required=True, help="folder or hub id of a checkpoint in Hugging Face layout")
    flag("--data", required=True, help="file of problems, with answers or without")
    flag("--teacher", help="folder or hub id: also the distance to this model, on the samples")
    flag("--k", type=int, default=8, help="samples per problem")
    flag("--temperature", type=float, default=0.7, help="0 = greedy, then --k 1")
    flag("--max_new_tokens", type=int, default=512, help="a sample is cut here; watch truncation_rate")
    flag("--seed", type=int, default=0, help="seed of the sampler")
    flag("--verifier", choices=VERIFIERS, default="auto", help="where the answer is looked for")
    flag("--limit", type=int, help="only the first LIMIT problems")
    flag("--out", type=Path, help=".jsonl file that gets one line per sample; replaced only if eval.py wrote it")
    flag("--slots", type=int, default=64, help="sequences decoded at once; changes memory and speed only")
    flag("--device", default="auto", help="auto = cuda if there is one, else cpu; mps must be asked for")
    flag("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
         help="auto = bfloat16 on cuda, else float32")
    flag("--chat_template", default="auto", help="auto (the checkpoint's own), plain, or a .jinja file")
    flag("--template_vars", default="", metavar="NAME=VALUE,...",
         help="comma-separated variables for the chat template, such as enable_thinking=false")
    flag("--template_var", action="append", default=[], metavar="NAME=VALUE",
         help="one more of them, whose value may hold a comma; may be repeated")
    return parser.parse_args(argv)


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


def run(argv: list[str] | None) -> dict:
    args = parse(argv)
    check_settings(args.k, args.temperature, args.max_new_tokens, args.slots, args.verifier)
    variables = dict(map(template_variable, filter(None, args.template_vars.split(",") + args.template_var)))
    if args.out:
        check_out(args.out)
    problems = load_problems(args.data, limit=args.limit)
    graded = answered(args.data, problems)
    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UserError(f"--device {device}: there is no such device here") from None
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if device.startswith("cuda") else "float32"
    folder = checkpoint_folder(args.model)
    tokenizer = Tokenizer(folder, args.chat_template)
    model = load_model(folder, dtype=getattr(torch, dtype), device=device)
    set_threads(model)
    if args.teacher:
        from support.held_out import compare_with, distance
        teacher = compare_with(args.teacher, tokenizer, problems, chat_template=args.chat_template, variables=variables,
                               max_new_tokens=args.max_new_tokens, dtype=getattr(torch, dtype), device=device)
    settings = {name: vars(args)[name] for name in ("k", "temperature", "max_new_tokens", "seed")}
    settings["verifier"] = args.verifier if graded else None
    metrics, samples = evaluate(model, tokenizer, problems, **settings, slots=args.slots, progress="evaluate",
                                variables=variables)
    if args.teacher:
        metrics |= {"teacher": args.teacher} | distance(
            samples, model, teacher, vocab_size=tokenizer.vocab_size, temperature=args.temperature or 1.0,
            max_tokens=8192, chunk_rows=max(16, 2**24 // tokenizer.vocab_size))
    if args.out:
        write_samples(args.out, samples)
    return {"model": args.model, "data": args.data} | settings | metrics


def main(argv: list[str] | None = None) -> int:
    try:
        print(json.dumps(run(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
