"""Inputs: whatever a file, a flag or a run folder holds, a run ends in order or says in one sentence what is wrong.

    python tests/attack/inputs.py --count 10000            about half an hour on one core

Every file of a checkpoint (config.json, weights, shards, tokenizer), problems, chat templates, flags, and run folders
that somebody has touched are mutated, one run each, mostly of train.py, some of eval.py, --plan and --report_only.

    traceback   a traceback, a panic, a signal, a status that is not 0 or 2, or 2 without exactly one sentence
    slow        more than 10 s
    big         more than 2 GB
    accepted    NaN or infinity taken for a number and nothing said; weights saved that are not finite
    touched     something changed, removed or written that is no part of the run
"""
import json
import os
import random
import shutil
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np

import common
from bombs import template
from common import ESCAPED, Tally, arguments, options, program, run, trouble
from mutations import KINDS, ODD, SPOILS, Case, disturb, dump, read_tensors, short, spoil
from train import SETTINGS, Config

RECIPES = SETTINGS.recipes

SECONDS, BYTES = 10, 2 * 10**9
QUICK = dict(steps=1, problems=1, samples=1, max_new_tokens=3, eval_limit=1, eval_teacher=None, verifier=None)
QUICK |= {"no-eval_teacher": True}
# counts that may well be meant: a long run is no failure, so only what nobody can mean is tried on them
LONG = {"steps", "problems", "samples", "eval_k", "pts_samples", "updates", "max_new_tokens", "eval_max_new_tokens",
        "save_every", "eval_every", "warmup_steps", "lora_rank", "cold_start_steps", "eval_limit", "threads"}
VALUES = [
    "", " ", "0", "1", "-1", "2", "0.5", "1.0", "nan", "-nan", "inf", "-inf", "1e308", "1e-308", "-1e308", "1e-45",
    "1e20", "-0.0", "0x10", "1_0", "１２", " 5", "5 ", "+3", "1e", ".", "true", "True", "None", "null", "é", "\udc80",
    "\ud800x", "a\nb", "\x1b[31m", "%s", "{}", "{world}", "$(id)", "`id`", "=", ",", "a=b", "a=b,c=d", ",,,", "..",
    ".", "/", "~", "~nobody/x", "~root/x", "/dev/null", "/dev/zero", "/dev/stdin", "/proc/self/mem", "/etc/passwd",
    "//", "a/../b", "-", "--", "--lr", "auto", "none", "self", "owner/name", "a/b/c", "http://x/y", "x" * 300,
    "x" * 5000, "/" + "y/" * 2000, "9" * 400, "9" * 5000, "9223372036854775807", "9223372036854775808",
    "100000000000000000000"]
HUGE = [value for value in VALUES if len(value) > 18 or not value.strip("+-. ").isdigit()]
SOME = ["0", "1", "2", "0.5", "0.1", "3", "1e-3", "nan", "inf"]
MEANT = {("max_grad_norm", "inf")}     # its help says what it does


def flags(place: Path, index: int, rng: random.Random, seed: int) -> Case:
    known = [f for f in fields(Config) if f.name not in ("compile", "wandb", "tensorboard", "device")]
    table = [(f, value) for f in known if f.type is not bool
             for value in (HUGE if f.name in LONG else VALUES)]
    if index < len(table):
        f, value = random.Random(seed).sample(table, len(table))[index]
        value = value.replace("{world}", str(place))
        fresh = rng.random() < 0.3
        argv = [f"--{f.name}={value}"] if rng.random() < 0.7 else [f"--{f.name}", value]
        loose = f.type is float and value in ("nan", "inf") and (f.name, value) not in MEANT
        return Case(f"{short(' '.join(argv))}{' --fresh' * fresh}", {"fresh": True} if fresh else {}, argv,
                    not_finite=loose, outside=f.name in ("runs", "name"))
    argv = []
    for f in rng.sample(known, rng.choice((1, 2, 2, 3, 4))):
        if f.type is bool:
            argv.append(rng.choice((f"--{f.name}", f"--no-{f.name}", f"--{f.name}=1", f"--no{f.name}")))
        elif f.metadata["choices"]:
            argv.append(f"--{f.name}={rng.choice((*f.metadata['choices'], 'x'))}")
        elif f.type is str:
            argv.append(f"--{f.name}={rng.choice(('', 'self', 'none', '3', 'x', place / 'student', 'a=b'))}")
        else:
            argv.append(f"--{f.name}={rng.choice(SOME)}")
    if rng.random() < 0.3:
        argv.append(rng.choice(("--lrr", "x", "--", "-h", "--help=1", "--steps", "-", "--lr=1=2", "\udc80")))
    if rng.random() < 0.5:
        argv.insert(0, f"--recipe={rng.choice(list(RECIPES))}")
    return Case(short(" ".join(argv)), {}, argv, outside=True)


FILES = ("config.json", "metrics.jsonl", "summary.json", ".lock", "last/trainer.json", "last/trainer.safetensors",
         "last/model.safetensors", "last/config.json", "last/tokenizer.json", "last", "best",
         "samples/step-000000.jsonl")
NAMES = ("step-000020-backup", "step-", "step-x", "step-000009", "step-000009.unfinished", "step-9" + "9" * 30,
         "step-000001 copy", "step--00001", "notes.txt", ".hidden", "last.old", "samples/mine.txt", "last/mine.txt",
         "x.unfinished", "step-000001.removed", ".removed-run", "é", "\udc80", "step-１２", "tensorboard")


def folder(place: Path, index: int, rng: random.Random, seed: int) -> Case:
    """A run that was complete or interrupted, and then somebody was there."""
    home = place / "runs" / "run"
    complete, fresh = rng.random() < 0.5, rng.random() < 0.4
    shutil.copytree(place.parent / "finished", place / "runs", symlinks=True)
    if not complete:
        (home / "summary.json").unlink()
        if rng.random() < 0.5:
            shutil.rmtree(home / "step-000001")
    state = "complete" if complete else "interrupted"
    case = Case(f"{state} run{', --fresh' * fresh}: ", {"fresh": True} if fresh else {})
    for _ in range(rng.choice((1, 1, 2, 3))):
        case.what += touch(home, rng, case) + "; "
    outside = place / "private"
    outside.mkdir()
    (outside / "mine.txt").write_text("mine")
    case.kept.append((outside / "mine.txt", b"mine"))
    if rng.random() < 0.3:
        link = home / rng.choice(("step-000007", "mine", "samples/mine", "last/mine", "step-000001.unfinished"))
        if link.parent.is_dir() and not os.path.lexists(link):
            link.symlink_to(outside)
            case.what += f"{link.name} links to a private folder"
    return case


def touch(home: Path, rng: random.Random, case: Case) -> str:
    name = rng.choice(FILES)
    path = home / name
    way = rng.choice(("json", "json", "bytes", "extra", "extra", "move"))
    if way == "extra" or not os.path.lexists(path):
        name = rng.choice(NAMES)
        path = home / name
        if os.path.lexists(path) or not path.parent.is_dir():
            return "nothing"
        if rng.random() < 0.5:
            path.mkdir()
            path /= "mine.txt"
        path.write_bytes(b"mine")
        if not name.endswith((".unfinished", ".removed")) and "last/" not in name:
            case.kept.append((path, b"mine"))
        return f"{name} is new"
    if name not in ("last", "best") and not path.is_file():
        return "nothing"            # it was spoilt before
    if name in ("last", "best"):
        target = rng.choice(("step-000001", "nothing", name, "..", "samples", "/etc", "step-000002"))
        path.unlink()
        path.symlink_to(target)
        return f"{name} links to {target}"
    if way == "move":
        path.rename(path.with_name(path.name + ".bak"))
        return f"{name} is gone"
    if way == "json" and name.endswith((".json", ".jsonl")):
        try:
            lines = path.read_text().splitlines() if name.endswith("l") else [path.read_text()]
            at = rng.randrange(len(lines))
            tree, what = disturb(json.loads(lines[at]), rng)
        except (ValueError, RecursionError):    # an earlier touch has left no JSON that can be read
            return spoil(path, rng, next(iter(SPOILS)))
        lines[at] = dump(tree)
        if rng.random() < 0.4:
            lines[at], what = (value := rng.choice(ODD)), short(value)
        path.write_text("\n".join(lines) + "\n")
        return f"{name}, part {at}: {what}"
    return spoil(path, rng, rng.choice([way for way in SPOILS if "zeros" not in way or way == "zeros"]))


ALL = {**KINDS, "template": template, "flags": flags, "folder": folder}


def not_finite(path: Path, but: tuple = ()) -> str | None:
    """The name of a tensor in a safetensors file that holds NaN or infinity; those with a part of `but` aside."""
    if not path.is_file():
        return None
    header, body = read_tensors(path)
    for name, info in header.items():
        if name != "__metadata__" and not any(part in name for part in but):
            kind, top = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00)}.get(
                info["dtype"], (np.uint16, 0x7F80))
            if ((np.frombuffer(body[slice(*info["data_offsets"])], kind) & kind(top)) == top).any():
                return name
    return None


def command(place: Path, case: Case, entry: str) -> tuple[list[str], str]:
    files = {"data": place / "train.jsonl", "eval_data": place / "test.jsonl"} | case.flags
    if entry == "eval.py":
        more = [f"--chat_template={files['chat_template']}"] if "chat_template" in files else []
        more += [f"--template_var={files['template_vars']}"] if "template_vars" in files else []
        return [f"--model={place / 'student'}", f"--data={files['eval_data']}", "--k=2", "--max_new_tokens=3",
                "--device=cpu", "--limit=2", *more], entry
    flags = QUICK | {"runs": place / "runs"} | files
    flags |= {entry: True} if entry in ("plan", "report_only") else {}
    return [*arguments(place, **flags), *case.argv], "train.py"


def verdict(case: Case, ended, place: Path, entry: str) -> tuple[str, str] | None:
    if ended.late or ended.seconds > SECONDS:
        return "slow", f"{ended.seconds:.0f} s"
    if ended.peak > BYTES:
        return "big", f"{ended.peak / 1e9:.1f} GB"
    if ended.status == ESCAPED and case.outside and not any(
            word in ended.text.rpartition("ESCAPED:")[2] for word in ("remove", "rmdir", "rmtree", "rename", "move")):
        return None         # it was told to make its folder there
    if wrong := trouble(ended):
        return "touched" if ended.status == ESCAPED else "traceback", wrong
    if case.not_finite and ended.status == 0 and entry == "train":
        return "accepted", "status 0"
    if ended.status == 0 and (name := not_finite(place / "runs/run/last/model.safetensors")):
        return "accepted", f"last/ holds {name}, which is not finite"
    for path, content in case.kept:
        if not path.is_file() or path.read_bytes() != content:
            return "touched", f"{path.relative_to(place)} was no part of the run"
    return None


def attack(world: Path, kind: str, index: int, args, tally: Tally) -> None:
    rng = random.Random(f"{args.seed} {kind} {index}")
    place = world / "inputs" / f"{kind}{index}"
    place.mkdir(parents=True)
    for name in ("student", "teacher", "train.jsonl", "test.jsonl"):
        source = world / name
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, place / name)
    if kind == "folder" and not (place.parent / "finished").exists():
        done = run(lambda: program(arguments(world, **QUICK, save_every=1, runs=place.parent / "finished")), world)
        assert done.status == 0, done.text
    case = ALL[kind](place, index, rng, args.seed)
    entry = "train"
    if kind not in ("folder", "flags"):
        entry = rng.choice(("train",) * 6 + ("eval.py", "eval.py", "plan", "report_only"))
    argv, file = command(place, case, entry)
    ended = run(lambda: program(argv, file), place, seconds=SECONDS + 2, memory=6 * 10**9)
    if found := verdict(case, ended, place, entry):
        tally.bad(found[0], args, kind, index, f"{entry}: {case.what}: {found[1]}", ended.text)
    else:
        tally.good()
    if not args.keep:
        shutil.rmtree(place, ignore_errors=True)


def main(argv: list[str] | None = None, world: Path | None = None) -> int:
    args = options(__doc__, ALL, 10000, argv)
    if world is None:
        with common.worlds(args.keep) as made:
            return main(argv, made)
    tally = Tally("inputs", ("traceback", "slow", "big", "accepted", "touched"), "inputs.py")
    work = common.schedule(args)
    for kind, index in work:
        attack(world, kind, index, args, tally)
    return tally.close(len(work))


if __name__ == "__main__":
    sys.exit(main())
