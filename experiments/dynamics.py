"""When on-policy distillation works, when it fails, and what rescues it.

    python experiments/dynamics.py              # about 10 minutes on two idle cores

Claim      1. A teacher helps if it thinks like the student and knows something that the student does not;
           strength alone is not it. 2. A strong student distilled from its weak past falls back to it, and
           teachers of one family say the same on its tokens. 3. A failing pair is rescued by imitation
           first and by prompts of the teacher's own training; success moves the shared mass to nearly one.
           4. Late tokens are the unreliable ones: the teacher goes on well from an early cut of a student's
           response, hardly better from a late one.
Paper      Rethinking OPD, arXiv:2604.13016: 1 in section 3.1 and 3.2, 2 in 3.3, 3 in 4 and 5, 4 in 6.
Design     Exact reverse KL, 40 steps (pairs: 80, at three times the rate), toy/student. Its teachers:
           toy/teacher (same notation, knows `*`); teacher_same (the student itself after 30 steps on
           written-out problems without `*`: reminded, nothing new); teacher_low (never saw a `*`);
           teacher_other (toy/teacher retrained to write `3+8:1,1*2:2#2`: as right, another notation); the
           student as it is. student_other is toy/student with that notation, from fewer steps. These are
           made first, by imitation, once. Overlap is of the top 16 of 259 tokens, most of which never
           occur: the mass tells more than the ratio. Prompts: teacher_low has only seen those without `*`.
Against    teacher_other as good as teacher; teacher_same lifting the student to teacher; the reverse run
           keeping what it had; cold start no help; the teacher's gain not falling with the cut.
"""
import json
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import numpy as np

from compare import (TOY, accuracy_by, accuracy_key, arguments, columns, differences, number, options, percent,
                     ready, records, run_all, summary, table)
from extras.report import load_other, student_batch
from rollout import generate
from support.problems import load_problems
from support.tokenizer import Tokenizer
from support.verifier import grade
from support.weights import load_model, set_threads
from teacher import Teacher, disagreement

STEPS = 40
LONG = 80           # another notation takes longer to learn than a habit, and a higher rate
DEPTH = {f"first {n} tokens": f"opd --loss_first_n {n}" for n in (5, 10, 20)}
BEFORE = {"strong": "opd --steps 120 --lr 3e-4", "halfway": "opd --steps 30"}
CUTS = (0.0, 0.25, 0.5, 0.75)
QUIET = "--eval_every 0 --eval_k 4 --no-eval_teacher"


def write_problems(runs: Path) -> dict[str, Path]:
    """Problems without `*` (low), with nothing else (high), and of all kinds with solutions in another notation."""
    runs.mkdir(parents=True, exist_ok=True)
    every, mixed = ([json.loads(line) for line in (TOY / name).read_text().splitlines()]
                    for name in ("train.jsonl", "mixed_train.jsonl"))
    low, high = ([record for record in mixed if record["kind"] == kind] for kind in ("low", "high"))
    other = [record | {"solution": record["solution"].translate(str.maketrans("=;", ":,"))} for record in every]
    paths = {}
    for name, chosen in (("low", low), ("high", high), ("other", other)):
        paths[name] = runs.resolve() / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps(record) + "\n" for record in chosen))
    return paths


def stages(runs: Path) -> dict[str, tuple[dict[str, str], str]]:
    """name -> (arms, flags of all its arms). `made` is needed once; `reverse` starts from the strong runs of
    `before`."""
    data = write_problems(runs)
    made = {name: runs.resolve() / "made" / f"{name}-0" / "last"
            for name in ("teacher_same", "teacher_other", "student_other")}
    teachers = {"teacher": TOY / "teacher", "teacher_same": made["teacher_same"], "teacher_low": TOY / "teacher_low",
                "teacher_other": made["teacher_other"], "the student as it is": TOY / "student"}
    other = f"opd --student {made['student_other']}"
    pair = {"student_other <- teacher": other,
            "the same after 40 steps of imitation": f"{other} --cold_start_steps 40",
            "imitation alone": f"{other} --cold_start_steps {LONG}",
            "student_other <- teacher_other": f"{other} --teacher {made['teacher_other']}"}
    prompts = {"only the teacher's kind": f"opd --data {data['low']}",
               "half of another kind": f"opd --data {data['low']} --mix_data {data['high']} --mix 0.5",
               "only another kind": f"opd --data {data['high']}"}
    fast = "--lr 1e-3"        # the new separators' embeddings are learnt from nothing
    short = f"--steps {STEPS} --eval_every 0 --eval_k 4"
    strong = runs.resolve() / "before" / "strong-{seed}" / "last"
    return {
        "made": ({"teacher_same": f"sft --student {TOY / 'student'} --data {data['low']} --steps 30 --lr 3e-4",
                  "teacher_other": f"sft --student {TOY / 'teacher'} --data {data['other']} --steps 400 {fast}",
                  "student_other": f"sft --student {TOY / 'student'} --data {data['other']} --steps 250 {fast}"},
                 QUIET),
        "teachers": ({name: f"opd --teacher {folder}" for name, folder in teachers.items()}, short),
        "depth": (DEPTH, f"{short} --no-eval_teacher"),
        "before": (BEFORE, QUIET),
        "reverse": ({name: f"opd --teacher {teachers[name]}"
                     for name in ("teacher_same", "the student as it is")},
                    f"{short} --student {strong}"),
        "pair": (pair, f"--steps {LONG} --lr 3e-4 --eval_every 0 --eval_k 4"),
        "prompts": (prompts, f"{short} --no-eval_teacher --teacher {TOY / 'teacher_low'} "
                             f"--eval_data {TOY / 'mixed_test.jsonl'}")}


# Statistics

def gap_recovery(before: float, after: float, teacher: float) -> float:
    """The share of what the teacher is ahead that the student has made up; NaN if the teacher is not ahead."""
    return (after - before) / (teacher - before) if teacher > before else float("nan")


def regression(before: float, after: float, origin: float) -> float:
    """The share of what was learnt since `origin` that is lost again; NaN if nothing had been learnt."""
    return (before - after) / (before - origin) if before > origin else float("nan")


def scores(folder: Path) -> tuple[float, float, float]:
    """Accuracy (before, after, of the teacher)."""
    found, key = summary(folder), accuracy_key(folder)
    return found["before"][key], found["after"][key], (found["teacher"] or {}).get(key, float("nan"))


def metric(folders: list[Path], key: str, step: int) -> list[float]:
    """One metric of one training step (from 1), over the seeds."""
    return [next(record[key] for record in records(folder) if record["step"] == step and key in record)
            for folder in folders]


def over_time(folders: list[Path], key: str, steps: int = STEPS) -> str:
    """Its mean at the first, the middle and the last step: `0.61 / 0.85 / 0.99`."""
    return " / ".join(f"{np.mean(metric(folders, key, step)):.2f}" for step in (1, steps // 2, steps))


# Claim 1: compatible and new

def print_teachers(found: dict[str, list[Path]]) -> None:
    rows = []
    for label, folders in found.items():
        before, after, teacher = columns(map(scores, folders))
        # the recovered share of a gap that is noise says nothing
        wide = np.mean(teacher) - np.mean(before) > 0.05
        gaps = percent(list(map(gap_recovery, before, after, teacher))) if wide else "no gap"
        rows.append([label, f"{np.mean(teacher):.1%}", percent(before), percent(after), gaps,
                     *(over_time(folders, key) for key in ("overlap_ratio", "overlap_mass_student", "reverse_kl"))])
    table(["teacher", "its accuracy", "student before", "after", "gap recovered",
           "overlap ratio, start / middle / end", "overlap mass", "reverse KL"], rows)


def print_depth(full: list[Path], found: dict[str, list[Path]]) -> None:
    rows = [[label, percent([scores(folder)[1] for folder in folders]), over_time(folders, "reverse_kl/q1"),
             over_time(folders, "reverse_kl/q4")] for label, folders in {**found, "all tokens": full}.items()]
    table(["supervised", "accuracy after", "reverse KL, first quarter, start / middle / end", "last quarter"], rows)


def print_entropy(folders: list[Path], name: str) -> None:
    steps = (1, 5, 10, 20, STEPS)
    rows = [[f"quarter {q}", *(number(metric(folders, f"student_entropy/q{q}", step)) for step in steps)]
            for q in range(1, 5)]
    table([f"student entropy <- {name}, step", *map(str, steps)], rows)


# Claim 2: back to the past

def between_teachers(flags: str, seed: int, runs: Path) -> tuple[float, float, float]:
    """On responses of the strong student: KL(strong student || teacher_same), KL(toy/student || teacher_same), and
    the mass of toy/student on the top tokens of both."""
    same = runs.resolve() / "made" / "teacher_same-0" / "last"
    line = f"{flags} --teacher {same} --report_only --compare_teacher {TOY / 'student'}"
    with redirect_stdout(sys.stderr):
        run = ready(arguments("opd", line, seed, runs / "look"))
        batch = student_batch(run)
        first, every_B = run.teacher.parts(batch), batch.rollout.every_B
        mine, other = (disagreement(Teacher(model, run.cfg).read(batch, every_B), first)
                       for model in (run.student, load_other(run)))
    found = mine["reverse_kl"], other["reverse_kl"], other["overlap_mass_student"]
    return tuple(value_N.mean().item() for value_N in found)


def print_reverse(found: dict[str, list[Path]], flags: str, seeds: int, runs: Path) -> None:
    origin = float(np.mean([scores(runs / "before" / f"strong-{seed}")[0] for seed in range(seeds)]))
    rows = []
    for label, folders in found.items():
        before, after, teacher = columns(map(scores, folders))
        lost = [regression(one, now, origin) for one, now in zip(before, after)]
        rows.append([label, f"{np.mean(teacher):.1%}", percent(before), percent(after), percent(lost)])
    table(["strong student <- teacher", "its accuracy", "before", "after", f"lost of what came after {origin:.1%}"],
          rows)
    mine, other, mass = columns(between_teachers(flags, seed, runs) for seed in range(seeds))
    table(["on the strong student's tokens", "nats per token, or mass"], [
        ["KL(strong student, teacher_same)", number(mine)], ["KL(toy/student, teacher_same)", number(other)],
        ["toy/student's mass on tokens in both top 16", number(mass)]])


# Claim 3: rescue

def print_pair(found: dict[str, list[Path]]) -> None:
    rows = []
    for label, folders in found.items():
        before, after, teacher = columns(map(scores, folders))
        rows.append([label, percent(before), percent(after), percent(list(map(gap_recovery, before, after, teacher))),
                     over_time(folders, "overlap_mass_student", LONG), over_time(folders, "student_entropy", LONG)])
    table(["pair", "before", "after", "gap recovered", "overlap mass, start / middle / end", "entropy"], rows)


def print_prompts(found: dict[str, list[Path]]) -> None:
    rows = []
    for label, folders in found.items():
        by = [accuracy_by(folder, lambda record: record["kind"]) for folder in folders]
        rows.append([label, percent([one["low"] for one in by]), percent([one["high"] for one in by]),
                     *(over_time(folders, key)
                       for key in ("overlap_ratio", "overlap_mass_student", "student_entropy"))])
    table(["prompts, teacher_low", "without `*`", "only `*`", "overlap ratio, start / middle / end", "overlap mass",
           "entropy"], rows)


# Claim 4: who goes on better, and from where

def continued(student_folder: Path, seed: int) -> dict[str, list[float]]:
    """Accuracy by cut, on held-out problems: of the teacher and of the student, each going on from the first
    share of the tokens of the same response of the student."""
    tokenizer, problems = Tokenizer(student_folder), load_problems(TOY / "test.jsonl", need_answer=True)
    models = {"student": load_model(student_folder), "teacher": load_model(TOY / "teacher")}
    for model in models.values():
        model.vocab_size = tokenizer.vocab_size
    set_threads(models["student"])
    prompts = [tokenizer.prompt_ids(problem.prompt) for problem in problems for _ in range(4)]
    answers = [problem.answer for problem in problems for _ in range(4)]
    sample = partial(generate, max_new_tokens=40, stop_ids=tokenizer.stop_ids, temperature=1.0, slots=128)
    first = sample(models["student"], prompts, samples=1, seed=seed)
    responses = [first.response(b) for b in range(len(prompts))]
    found: dict[str, list[float]] = {name: [] for name in models}
    for at, share in enumerate(CUTS):
        cut = [response[:int(share * len(response))] for response in responses]
        for name, model in models.items():
            rest = sample(model, [p + c for p, c in zip(prompts, cut)], samples=1, seed=seed * 100 + at + 1)
            texts = [tokenizer.decode(c + rest.response(b)) for b, c in enumerate(cut)]
            found[name].append(float(np.mean([grade(text, answer) for text, answer in zip(texts, answers)])))
    return found


def print_continued(folders: list[Path]) -> None:
    found = [continued(folder / "last", seed) for seed, folder in enumerate(folders)]
    rows = []
    for at, share in enumerate(CUTS):
        student, teacher = ([one[name][at] for one in found] for name in ("student", "teacher"))
        rows.append([f"{share:.0%}", percent(student), percent(teacher), percent(differences(teacher, student), "+")])
    table(["response kept", "student goes on", "teacher goes on", "gain"], rows)


def main() -> None:
    args = options(__doc__, "dynamics", seeds=3)
    plan = stages(args.runs)
    found = {name: run_all(arms, flags, 1 if name == "made" else args.seeds, args.runs / name)
             for name, (arms, flags) in plan.items()}
    print_teachers(found["teachers"])
    print_reverse(found["reverse"], plan["reverse"][1], args.seeds, args.runs)
    print_pair(found["pair"])
    print_prompts(found["prompts"])
    print_depth(found["teachers"]["teacher"], found["depth"])
    for name in ("teacher", "teacher_other"):
        print_entropy(found["teachers"][name], name)
    print_continued(found["before"]["halfway"])


if __name__ == "__main__":
    main()
