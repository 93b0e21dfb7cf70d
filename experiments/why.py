"""Why on-policy: a teacher that is right, and writes in hands that the student does not know.

    python experiments/why.py                   # about half an hour on two cores, models included
    python experiments/why.py --quick           # one seed, N = 4, two arms

Claim      Imitating a teacher's text teaches its hand together with its knowledge. On the student's own text the teacher
           can only say what is right there, so that the student keeps its hand and what it knew before; and a KL that
           seeks modes (reverse) is content with one hand, where one that covers them (forward) wants them all.
Design     The teacher writes each calculation in one of N notations (`=;`, `:,`, `~&`, `_|` ...), all equally often, and
           is right in all. The student knows the first notation, calculations without `*` well (old skill) and those
           with `*` less well (new skill). Sixty steps of 64 on problems with `*`. Two by two: whose text, which
           direction of the KL; imitation is cross-entropy on the teacher's text. The learning rate of each arm is the
           best of three for the new skill on a pretraining seed that is used for nothing else, at N = 4. Five
           training seeds over three pretraining seeds of both models.
Measured   avg@4 on 200 held-out problems each, at temperature 1: with `*` (new), without (old, never trained on); and
           the share of answers in the student's own notation.
Against    the four arms as good as each other at N = 4; the old skill kept by imitation, too.
"""
import argparse
import json
import os
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from compare import ROOT, TOY, percent, run, summary, table

sys.path[:0] = [str(TOY), str(ROOT / "docs")]
import make  # noqa: E402
import torch  # noqa: E402
from make_picture import BLUE, GREY, ORANGE, drawing, line, text  # noqa: E402

from eval import evaluate  # noqa: E402
from support.problems import load_problems  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from support.weights import load_model  # noqa: E402

NOTATIONS = "=;", ":,", "~&", "_|", "^!", "@%", "<>", "(/"
COUNTS = 1, 2, 4
PRETRAINED, PILOT = 3, 3        # seeds of pretraining; the number of the one for learning rates
RATES = "3e-5", "1e-4", "3e-4"
ARMS = {
    "own text, reverse KL (opd)": "opd",
    "own text, forward KL": "opd --divergence forward_kl",
    "teacher's text, reverse KL": "gkd --lmbda 0 --responses teacher --divergence reverse_kl",
    "teacher's text, cross-entropy (sft)": "sft --responses teacher",
}


# Models, made once

def in_notations(kind, count: int):
    """`kind` of example, each time in one of the first `count` notations."""
    def example(rng: random.Random):
        problem, response, untrained = kind(rng)
        return problem, response.translate(str.maketrans(NOTATIONS[0], NOTATIONS[rng.randrange(count)])), untrained
    return example


def checkpoint(count: int, seed: int) -> make.Checkpoint:
    """count 0: the student."""
    if count == 0:
        return make.Checkpoint(64, 3, 100 + seed, [
            make.Phase(1500, 3e-3, {make.without_times: 0.98, make.written: 0.02}),
            make.Phase(300, 1e-3, {make.without_times: 0.5, make.written: 0.5})], (0.0, 1.0))
    return make.Checkpoint(96, 3, 200 + 10 * count + seed, [make.Phase(1000 + 200 * count, 3e-3, {
        in_notations(make.written, count): 0.6, in_notations(make.stumbling, count): 0.4})], (0.0, 1.0))


def made(folder: Path, count: int, seed: int, held_out: set[str]) -> Path:
    name = f"teacher{count}-{seed}" if count else f"student-{seed}"
    if not (folder / name).exists():
        torch.set_num_threads(1)
        new = folder / f".{name}.{os.getpid()}"
        make.write_tokenizer(new)
        make.CHECKPOINTS[name] = checkpoint(count, seed)
        make.pretrain(name, Tokenizer(new), held_out).save(new, torch.bfloat16)
        new.rename(folder / name)
    return folder / name


def make_models(folder: Path, counts: list[int], seeds: list[int]) -> None:
    """One process for each of two cores. A model of another run of this script is taken as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = write_problems(folder)
    jobs = [(folder, count, seed, held_out) for count in (*sorted(counts, reverse=True), 0) for seed in seeds]
    with torch.multiprocessing.get_context("spawn").Pool(os.cpu_count() or 1) as pool:
        pool.starmap(made, jobs, chunksize=1)


def write_problems(folder: Path) -> set[str]:
    """train.jsonl and new.jsonl with a `*`, old.jsonl without. Returns the held-out problems."""
    rng, found = random.Random(1), {"new": {}, "old": {}}
    while min(len(found["new"]) - 1700, len(found["old"]) - 200) < 0:
        problem = make.draw(rng, rng.choice(("+-*", "+-")))
        found["new" if "*" in problem else "old"][problem] = make.write_out(problem)[0]
    parts = {"new": list(found["new"].items())[:200], "old": list(found["old"].items())[:200],
             "train": list(found["new"].items())[200:1700]}
    for name, pairs in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(
            json.dumps({"problem": problem, "answer": solution[-1], "solution": solution}) + "\n"
            for problem, solution in pairs))
    return {problem for name in ("new", "old") for problem, _ in parts[name]}


# Runs

def flags(folder: Path, count: int, steps: int) -> str:
    here = folder.resolve()
    return (f"--student {here}/student-{{seed}} --teacher {here}/teacher{count}-{{seed}} --data {here}/train.jsonl "
            f"--eval_data {here}/new.jsonl --steps {steps} --eval_every 0 --eval_k 4 --no-eval_teacher "
            f"--no-token_view --save_every {steps}")


def linked(folder: Path, counts: list[int], seeds: list[int]) -> None:
    """Training seeds beyond the pretraining seeds use those models again."""
    for seed in seeds:
        for name in ["student", *(f"teacher{count}" for count in counts)]:
            if not (link := folder / f"{name}-{seed}").exists():
                link.symlink_to(f"{name}-{seed % PRETRAINED}")


def run_arms(arms: dict[str, str], here: str, seeds: list[int], runs: Path) -> dict[str, list[Path]]:
    """label -> its finished runs, one per seed."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        jobs = {label: [pool.submit(run, label, command, here, seed, runs) for seed in seeds]
                for label, command in arms.items()}
        return {label: [job.result() for job in found] for label, found in jobs.items()}


def measured(folder: Path) -> tuple[float, float, float]:
    """(new skill, old skill, share of answers to new problems in the student's own notation) of a finished run."""
    file = folder.parent / f"{folder.name}.json"
    if not file.exists():
        torch.set_num_threads(1)
        samples = [json.loads(line) for line in max((folder / "samples").glob("*.jsonl")).read_text().splitlines()]
        own = sum(NOTATIONS[0][0] in sample["text"] for sample in samples) / len(samples)
        config = json.loads((folder / "config.json").read_text())
        old = load_problems(str(Path(config["eval_data"]).with_name("old.jsonl")))
        metrics, _ = evaluate(load_model(folder / "last"), Tokenizer(folder / "last"), old, k=4, temperature=1.0,
                              max_new_tokens=make.MAX_NEW_TOKENS, slots=256)
        file.write_text(json.dumps([summary(folder)["after"]["avg@4"], metrics["avg@4"], own]))
    return tuple(json.loads(file.read_text()))


def all_measured(found: dict[str, list[Path]]) -> dict[str, list[tuple]]:
    with ThreadPoolExecutor(1) as pool:
        return {label: list(pool.map(measured, folders)) for label, folders in found.items()}


def best_rates(folder: Path, runs: Path, steps: int) -> dict[str, str]:
    """Arm -> learning rate, by the new skill at N = 4 on the pilot seed."""
    arms = {f"{label} {rate}": f"{command} --lr {rate}" for label, command in ARMS.items() for rate in RATES}
    found = all_measured(run_arms(arms, flags(folder, 4, steps), [PILOT], runs / "rates"))
    table(["arm", *(f"lr {rate}" for rate in RATES)], [
        [label, *(f"{found[f'{label} {rate}'][0][0]:.1%}" for rate in RATES)] for label in ARMS])
    return {label: max(RATES, key=lambda rate: found[f"{label} {rate}"][0][0]) for label in ARMS}


# What comes out

def picture(points: dict[tuple[str, int], tuple[float, float]], start: tuple[float, float]) -> str:
    """Old skill to the right, new skill up; one dot per arm and N, named by its N."""
    left, right, top, bottom = 70, 500, 24, 330
    colours = dict(zip(ARMS, (BLUE, "#0a7d8c", ORANGE, "#8250df")))

    def at(old: float, new: float) -> tuple[float, float]:
        return left + (right - left) * old, bottom - (bottom - top) * new
    drawn = [text((left + right) / 2, bottom + 36, "old skill, never trained on"),
             f'<text transform="translate({left - 44},{(top + bottom) / 2}) rotate(-90)" text-anchor="middle" '
             f'font-size="12">new skill</text>']
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = at(share, share)
        drawn += [line(left, y, right, y, f'stroke="{GREY}" stroke-opacity="0.2"'), text(left - 8, y + 4, f"{share:.0%}", "end"),
                  line(x, top, x, bottom, f'stroke="{GREY}" stroke-opacity="0.2"'), text(x, bottom + 17, f"{share:.0%}")]
    x, y = at(*reversed(start))
    drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="none" stroke="{GREY}" stroke-width="2"/>',
              text(x - 10, y + 5, "start", "end", colour=GREY)]
    for (label, count), (new, old) in points.items():
        x, y = at(old, new)
        drawn += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="9" fill="{colours[label]}" fill-opacity="0.85"/>',
                  text(x, y + 4, str(count), size=11, colour="#ffffff")]
    for i, (label, colour) in enumerate(colours.items()):
        drawn += [f'<circle cx="540" cy="{60 + 26 * i}" r="7" fill="{colour}"/>', text(556, 64 + 26 * i, label, "start")]
    drawn.append(text(540, 64 + 26 * len(colours), "the number in a dot: notations of the teacher", "start", colour=GREY))
    return drawing(drawn, 380)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=5, choices=(1, 2, 3, 5), help="training seeds (default: 5)")
    parser.add_argument("--runs", type=Path, default=Path("runs/why"), help="where models and runs are kept")
    parser.add_argument("--counts", type=int, nargs="+", default=list(COUNTS), choices=range(1, len(NOTATIONS) + 1),
                        help="notations of the teacher (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one seed, N = 4, opd and sft, one learning rate")
    args = parser.parse_args()
    counts, steps, folder = [4] if args.quick else args.counts, 60, args.runs / "made"
    seeds = 1 if args.quick else args.seeds
    make_models(folder, sorted({*counts, 4}), [0] if args.quick else [*range(min(seeds, PRETRAINED)), PILOT])
    arms = {label: f"{command} --lr 1e-4" for label, command in ARMS.items()}
    if args.quick:
        arms = {label: arms[label] for label in (list(ARMS)[0], list(ARMS)[3])}
    else:
        rates = best_rates(folder, args.runs, steps)
        arms = {label: f"{command} --lr {rates[label]}" for label, command in ARMS.items()}
    # training seeds 0, 1, 2, then 4 and 5 on the models of seeds 1 and 2: 3 is the pilot's
    every = [seed for seed in range(seeds + (seeds > PILOT)) if seed != PILOT]
    linked(folder, counts, every)
    before = [measured_start(folder, seed) for seed in sorted({seed % PRETRAINED for seed in every})]
    rows, points = [], {}
    for count in counts:
        found = run_arms(arms, flags(folder, count, steps), every, args.runs / f"{count}")
        for label, values in all_measured(found).items():
            new, old, own = map(list, zip(*values))
            rows.append([count, label, arms[label].rpartition(" ")[2], percent(new), percent(old), percent(own)])
            points[label, count] = sum(new) / len(new), sum(old) / len(old)
    new, old = (list(column) for column in zip(*before))
    print(f"start: new {percent(new)}, old {percent(old)}\n")
    table(["N", "arm", "lr", "new skill", "old skill", "in its own notation"], rows)
    (args.runs / "why.svg").write_text(picture(points, (sum(new) / len(new), sum(old) / len(old))))


def measured_start(folder: Path, seed: int) -> tuple[float, float]:
    model, tokenizer = load_model(folder / f"student-{seed}"), Tokenizer(folder / f"student-{seed}")
    return tuple(evaluate(model, tokenizer, load_problems(str(folder / f"{name}.jsonl")), k=4, temperature=1.0, slots=256,
                          max_new_tokens=make.MAX_NEW_TOKENS)[0]["avg@4"] for name in ("new", "old"))


if __name__ == "__main__":
    main()
