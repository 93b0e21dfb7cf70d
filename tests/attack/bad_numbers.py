"""Bad numbers: whatever overflows, the run ends in order or names the side in one sentence, and no weight is lost.

    python tests/attack/bad_numbers.py --count 500         about four minutes on one core

Every recipe meets learning rates, temperatures, weight decays, rope_thetas and weights far outside what anybody trains
with, and every flag of its own rules at the ends of what a float can hold.

    traceback   a traceback, a signal, a status that is not 0 or 2, or 2 without exactly one sentence
    unnamed     the sentence names neither student, teacher, learning rate, temperature nor the flag that was turned
    damaged     a saved checkpoint holds weights that are not finite, or `last` leads nowhere
"""
import json
import random
import shutil
import struct
import sys
from dataclasses import fields
from pathlib import Path

import common
from common import Tally, arguments, options, program, run, trouble
from inputs import not_finite
from mutations import read_tensors, write_tensors
from train import SETTINGS, Config

RECIPES = {name: row.flags for name, row in SETTINGS.recipes.items()}

STEPS = dict(steps=4, save_every=1, eval_every=2, eval_limit=1)
OTHER = {       # what a recipe needs in the tiny world
    "grpo": dict(teacher="none"), "multi": dict(teacher="low={world}/teacher,high={world}/student"),
    "xtok": dict(teacher="{world}/foreign", min_coverage=0), "sg": dict(pts_samples=32), "sft": dict(),
    **{name: dict(teacher="self") for name, row in RECIPES.items() if row.get("teacher") == "self"}}
ENDS = ("1e38", "1e30", "1e10", "1e5", "1e-10", "1e-30", "1e-45", "1e-300", "1e300")
INSIDE = ("100", "30", "1", "0.01", "1e15", "1e-6")        # what is taken, and still far from anything sensible
KNOBS = [f.name for f in fields(Config) if f.type is float and f.name not in ("lr", "temperature", "weight_decay")]
NAMED = ("student", "teacher", "learning rate", "--lr", "temperature", "rope_theta", "rms_norm_eps")


def scale(folder: Path, factor: float, only: str) -> None:
    """Multiply the float32 tensors whose names hold `only`."""
    path = folder / "model.safetensors"
    header, body = read_tensors(path)
    numbers = bytearray(body)
    for name, info in header.items():
        if name != "__metadata__" and only in name:
            begin, end = info["data_offsets"]
            values = struct.unpack(f"<{(end - begin) // 4}f", body[begin:end])
            limited = [max(-3.4e38, min(3.4e38, value * factor)) for value in values]
            numbers[begin:end] = struct.pack(f"<{len(values)}f", *limited)
    write_tensors(path, json.dumps(header), bytes(numbers))


def turn(place: Path, recipe: str, index: int, rng: random.Random) -> tuple[str, dict, str]:
    """(what was turned, the flags, the word that may name it)."""
    way = ("lr", "student", "temperature", "teacher", "weight_decay", "config", "knob", "several")[index % 8]
    flags = dict(recipe=recipe)
    if way in ("student", "teacher"):
        sides = [way] if way == "student" or recipe not in ("xtok",) else ["foreign"]
        factor = float(rng.choice(ENDS[:4]))
        only = rng.choice(("", "norm", "embed", "down_proj", "q_proj", "model.norm"))
        scale(place / sides[0], factor, only)
        if rng.random() < 0.3:
            flags["dtype"] = "bfloat16"
        return f"{sides[0]}'s {only or 'weights'} times {factor:g}", flags, way
    if way == "config":
        side, key = rng.choice(("student", "teacher")), rng.choice(("rope_theta", "rms_norm_eps"))
        path, value = place / side / "config.json", float(rng.choice(ENDS + INSIDE))
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        return f"{side}: {key} {value}", flags, key
    names = [way] if way in ("lr", "temperature", "weight_decay") else [rng.choice(KNOBS)]
    if way == "several":
        names = ["lr", rng.choice(("temperature", "weight_decay", "max_grad_norm", "eval_temperature"))]
    flags |= {name: rng.choice(ENDS + 2 * INSIDE) for name in names}
    if "max_grad_norm" in names:
        flags["max_grad_norm"] = "inf"
    return " ".join(f"--{name} {flags[name]}" for name in names), flags, names[-1]


def damaged(folder: Path) -> str | None:
    for path in [*folder.glob("step-*"), folder / "last"]:
        if not path.is_symlink() and path.name == "last" and list(folder.glob("step-*")):
            return "there is no last/"
        for name in ("model.safetensors", "trainer.safetensors") if path.exists() else ():
            if tensor := not_finite(path / name, ("exp_avg", "step/")):
                return f"{path.name}/{name}: {tensor} is not finite"
    return None


def attack(world: Path, recipe: str, index: int, args, tally: Tally) -> None:
    rng = random.Random(f"{args.seed} {recipe} {index}")
    place = world / "numbers" / f"{recipe}{index}"
    place.mkdir(parents=True)
    for name in ("student", "teacher", "foreign"):
        shutil.copytree(world / name, place / name)
    for name in ("train.jsonl", "test.jsonl"):
        shutil.copyfile(world / name, place / name)
    what, flags, word = turn(place, recipe, index, rng)
    flags = STEPS | OTHER.get(recipe, {}) | {"runs": place / "runs"} | flags
    argv = [part.replace("{world}", str(place)) for part in arguments(place, **flags)]
    ended = run(lambda: program(argv), place, seconds=60, memory=6 * 10**9)
    said = next((line for line in ended.text.splitlines() if line.startswith("error:")), "")
    if wrong := trouble(ended):
        tally.bad("traceback", args, recipe, index, f"{what}: {wrong}", ended.text)
    elif ended.status and not any(name in said for name in (*NAMED, f"--{word}")):
        tally.bad("unnamed", args, recipe, index, what, said)
    elif wrong := damaged(place / "runs" / "run"):
        tally.bad("damaged", args, recipe, index, f"{what}: {wrong}", ended.text)
    else:
        tally.good()
    if not args.keep:
        shutil.rmtree(place)


def main(argv: list[str] | None = None, world: Path | None = None) -> int:
    args = options(__doc__, RECIPES, 500, argv)
    if world is None:
        with common.worlds(args.keep) as made:
            return main(argv, made)
    tally, work = Tally("numbers", ("traceback", "unnamed", "damaged"), "bad_numbers.py"), common.schedule(args)
    for recipe, index in work:
        # the first round of every recipe would otherwise meet the same attack
        attack(world, recipe, index if args.index is not None else index + list(RECIPES).index(recipe), args, tally)
    return tally.close(len(work))


if __name__ == "__main__":
    sys.exit(main())
