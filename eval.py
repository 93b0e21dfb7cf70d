"""Evaluation: how often a model answers problems right.

    problems -> rollout.generate -> support/verifier.py -> avg@k, pass@k, maj@k

    python eval.py --model DIR --data FILE --k 8 --temperature 0.7 --max_new_tokens 512 --out samples.jsonl

prints one JSON object on stdout; progress goes to stderr. What a problem is: support/problems.py. Where no problem has
an answer nothing is graded: lengths are left, and with a teacher the distance to it (support/held_out.py).

P problems    K samples of each    B = P * K sequences    T positions
"""
import json
import sys
import time
from collections import Counter

import numpy as np

from rollout import generate
from support.errors import UserError
from support.held_out import check_out, distance, distance_to, write_samples
from support.problems import Problem, answered, checked_prompts, load_problems
from support.memory import compute_dtype
from support.settings import check_eval_settings, eval_arguments
from support.setup import choose_device
from support.tokenizer import Tokenizer, template_variables
from support.verifier import canonical, extract, grade
from support.weights import checkpoint_folder, load_model, set_threads


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one: 1 - C(n-c, k) / C(n, k), written as a
    product without large binomials. Unbiased for every n >= k (Chen 2021, arXiv:2107.03374)."""
    return 1.0 - float(np.prod(1.0 - k / np.arange(n - correct + 1, n + 1))) if correct else 0.0


def majority(votes: list, correct: list[bool]) -> float:
    """Chance that the most frequent answer is right when ties are broken uniformly at random; 0 without votes.
    votes: the canonical answer of each sample; None (no answer) does not vote."""
    counts, right = Counter(vote for vote in votes if vote is not None), dict(zip(votes, correct))
    top = max(counts.values(), default=0)
    winners = [right[vote] for vote, count in counts.items() if count == top]
    return sum(winners) / max(len(winners), 1)


def bootstrap_interval(values_P: np.ndarray, seed: int = 0) -> list[float]:
    """95 % percentile interval of the mean over problems: 2,000 resamples with replacement, 100 at a time for memory.
    Values that are all alike (every answer right) give width zero: then the interval says nothing."""
    rng, size = np.random.default_rng(seed), len(values_P)
    means = [values_P[rng.integers(size, size=(100, size))].mean(axis=1) for _ in range(20)]
    return np.quantile(np.concatenate(means), (0.025, 0.975)).tolist()


def evaluate(model, tokenizer, problems: list[Problem], *, k: int, temperature: float, max_new_tokens: int,
             seed: int, verifier: str | None = "auto", slots: int = 64,
             progress: str | None = None) -> tuple[dict, list[dict]]:
    """Sample k responses per problem and grade them. Returns (metrics, samples), samples problem by problem.

    metrics   avg@k, pass@k, maj@k from 0 to 1, each with `..._ci` = [low, high]; truncation_rate: share of
              samples cut at max_new_tokens; mean_length: tokens per sample; counts problems, samples, tokens. verifier
              None, or no problem has an answer: no grading, so none of the first three.
    samples   problem and sample (both from 0), prompt_tokens, tokens (stop token included), logprobs (one per
              token, nats, at `temperature`), text (without special tokens), answer (as extracted, or None), correct
              (None without grading), finished (ended by a stop token).
    Raises UserError before anything is sampled.
    """
    check_eval_settings(k, temperature, max_new_tokens, slots, verifier)
    if all(problem.answer is None for problem in problems):
        verifier = None
    prompts = checked_prompts(problems, tokenizer, max_new_tokens, model.config.context, graded=verifier is not None)
    rollout = generate(model, prompts, samples=k, max_new_tokens=max_new_tokens, stop_ids=tokenizer.stop_ids,
                       temperature=temperature, seed=seed, slots=slots, progress=progress)
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


def test(run, label: str) -> tuple[dict, list[dict]]:
    """Held-out metrics and answers of the student as it is now; where it cannot be graded, how far it is from its
    teacher as well. The same seed every time, so that curves share their noise."""
    if run.actor is not run.student:
        run.actor.refresh(run.student)
    begun = time.perf_counter()
    metrics, samples = evaluate(run.actor, run.tokenizer, run.held_out, progress=label, **settings(run.cfg))
    if run.held_out[0].answer is None:
        metrics |= distance(run, run.held_out, samples)
    return metrics | {"seconds": time.perf_counter() - begun}, samples


def test_teacher(run) -> dict | None:
    """Held-out metrics of the teacher; of several, each on the problems that are its own."""
    samples: list[dict] = []
    for label, model, tokenizer, problems in run.kind.held_out(run) if run.cfg.eval_teacher else ():
        samples += evaluate(model, tokenizer, problems, progress=label, **settings(run.cfg))[1]
    return metrics_of(samples, run.cfg.eval_k, run.cfg.verifier) if samples else None


def settings(cfg) -> dict:
    return dict(k=cfg.eval_k, temperature=cfg.eval_temperature, seed=10**9 + cfg.seed, verifier=cfg.verifier,
                max_new_tokens=cfg.eval_max_new_tokens or cfg.max_new_tokens, slots=cfg.slots)


# Command line

def run(argv: list[str] | None) -> dict:
    args = eval_arguments(argv)
    check_eval_settings(args.k, args.temperature, args.max_new_tokens, args.slots, args.verifier)
    variables = template_variables(args.template_vars, args.template_var)
    if args.out:
        check_out(args.out)
    problems = load_problems(args.data, limit=args.limit)
    graded, device = answered(args.data, problems), choose_device(args.device)
    folder = checkpoint_folder(args.model)
    tokenizer = Tokenizer(folder, args.chat_template)
    tokenizer.variables = variables
    model = load_model(folder, dtype=compute_dtype(args, device), device=device)
    model.vocab_size = tokenizer.vocab_size
    set_threads(model)
    used = {name: vars(args)[name] for name in ("k", "temperature", "max_new_tokens", "seed")}
    used["verifier"] = args.verifier if graded else None
    metrics, samples = evaluate(model, tokenizer, problems, **used, slots=args.slots, progress="evaluate")
    if args.teacher != "none":
        metrics |= {"teacher": args.teacher} | distance_to(args, model, tokenizer, problems, samples)
    if args.out:
        write_samples(args.out, samples)
    return {"model": args.model, "data": args.data} | used | metrics


def main(argv: list[str] | None = None) -> int:
    try:
        print(json.dumps(run(argv)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
