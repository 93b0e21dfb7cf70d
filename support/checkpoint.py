"""Checkpoint: what a run leaves on disk, so that killing it at any instant loses only the steps since the
last save.

    runs/NAME/config.json             the configuration that made it
              started.json            what the first start chose and every later one keeps: the date that chat
                                      templates see, threads, sizes that memory allowed
              metrics.jsonl           line 1: configuration and commit; then one record per step and per
                                      evaluation
              samples/step-000030.jsonl   every held-out answer of one evaluation
              summary.json            written once, at the end
              step-000030/            a checkpoint: Hugging Face folder + trainer.safetensors + trainer.json
              last, best              links to two of those; older ones are deleted

Everything is written under another name, flushed, and renamed into place: a file or folder with its final
name is complete. A run is resumed from the newest complete step-* folder, whatever the links say. Names, deletion
and what is no run: support/run_folder.py.

Kept apart from train.py so that its loop stays on one screen. Not here: what is trained, and how.
"""
import json
import math
import os
import re
import subprocess
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from support import tensors as tensors_file
from support.errors import UserError, one_line, read_json, shown
from support.optimizers import kinds, moments, restore_moments
from support.page import write_page
from support.run_folder import (CHECKPOINT, STEP, UNFINISHED, advice, flush, is_kind, is_run, lock,
                                refuse_imitations, remove, remove_aside, remove_checkpoints, run_path, set_aside,
                                strangers, tidy, write_bytes, write_text, writing)

__all__ = ["RunFolder", "read_responses", "recorded", "run_path", "started", "write_text"]
ROOT = Path(__file__).resolve().parents[1]


def plain(value):
    """JSON has no NaN: what is undefined (a mean over no rows) becomes null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def recorded(config: dict) -> dict:
    """A configuration as it is written and compared. Paths inside the project are relative to it (toy/student): where
    somebody keeps the project says nothing about the run, and these files are published."""
    inside = re.compile(rf"(^|[=,]){re.escape(str(ROOT))}/")        # also in low=...,high=...
    return {key: inside.sub(r"\1", value) if isinstance(value, str) else value for key, value in plain(config).items()}


def git_commit() -> str | None:
    """The commit of the code that runs, with a + when the tree has changes; None outside a git checkout."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


STARTED = {"date": str, "torch": str, "threads": int, "slots": int, "micro_batch_tokens": int, "chunk_rows": int}


def started(path: Path) -> dict:
    """What the first start of the run in this folder chose (RunFolder.note_start); {} for a run that is new."""
    file = Path(path) / "started.json"
    if not os.path.lexists(file) or not is_run(path):       # lexists: False where the path itself is impossible
        return {}
    found = read_json(file)
    wrong = [key for key, kind in STARTED.items() if (value := found.get(key)) is not None
             and (type(value) is not kind or kind is int and not 0 < value < 2**31)]
    try:
        datetime.fromisoformat(found.get("date") or "2000-01-01")
    except (ValueError, TypeError):
        wrong.append("date")
    if wrong:
        raise UserError(f"{file} has {wrong[0]} = {shown(found[wrong[0]])}, which no run wrote; delete that file (a "
                        f"run whose prompts hold the date may go on differently), or pass --fresh")
    return found


# what reading a damaged file may end in
DAMAGE = (OSError, SafetensorError, LookupError, RuntimeError, TypeError, ValueError, AttributeError)


def reason(error: Exception) -> str:
    """What is wrong, without the advice of who found it."""
    if isinstance(error, KeyError):
        return shown(f"{error} is missing")
    return shown(one_line(str(error).rpartition("; ")[0] if isinstance(error, UserError) else error))


def read_responses(path: Path, problems: int, vocab_size: int) -> dict[int, list]:
    """problem -> token ids of the responses in teacher_responses.json; one sentence where hands have been in it."""
    try:
        found = {int(problem): responses for problem, responses in read_json(path, most=2**33).items()}
        rows = [row for responses in found.values() for row in responses]
        if not (all(0 <= problem < problems for problem in found) and all(rows)
                and all(type(token) is int and 0 <= token < vocab_size for row in rows for token in row)):
            raise ValueError("a problem or a token that there is not")
    except DAMAGE as error:
        raise UserError(f"{path} is not what a run writes ({reason(error)}); delete it, and the teacher writes "
                        f"again") from error
    return found


class RunFolder:
    """One run on disk. Opening it takes a lock, refuses another configuration, and finds where to go on."""

    def __init__(self, path: Path, config: dict, fresh: bool = False):
        self.path, self.config = Path(path), recorded(config)
        self.lock = lock(self.path)
        remove_aside(self.path)
        with writing(self.path):
            if fresh and is_run(self.path):
                set_aside(self.path)
                self.lock.close()       # nobody else can come by it there, and NFS cannot delete an open file
                remove_aside(self.path)
                self.lock = lock(self.path)
            refuse_imitations(self.path)
            if is_run(self.path):
                self.compare(recorded(read_json(self.path / "config.json")))
            tidy(self.path)
            if not is_run(self.path):
                write_text(self.path / "config.json", json.dumps(self.config, indent=2) + "\n")

    def compare(self, old: dict) -> None:
        """The same run must mean the same configuration, or its curve would be two experiments glued
        together."""
        if changed := [key for key in self.config if old.get(key) != self.config[key]]:
            key = changed[0]
            raise UserError(f"{self.path} was started with {key} = {shown(old.get(key))}, now it is "
                            f"{shown(self.config[key])}; pass another --name, or --fresh to delete that run and start "
                            f"again")

    # checkpoints

    def steps(self) -> list[int]:
        """Of the complete checkpoints."""
        names = [item.name for item in self.path.iterdir()
                 if re.fullmatch(STEP, item.name) and is_kind(item, CHECKPOINT)]
        return sorted(int(name[5:]) for name in names if name == self.step_folder(int(name[5:])).name)

    def step_folder(self, step: int) -> Path:
        return self.path / f"step-{step:06d}"

    def save(self, step: int, model, tokenizer, optimizer, state: dict, best: bool, also: dict = {}) -> None:
        """A complete checkpoint or none: when the disk fills up, the unfinished one is removed and the
        previous stays."""
        final = self.step_folder(step)
        temporary = final.with_name(final.name + UNFINISHED)
        try:
            temporary.mkdir()
            model.save(temporary)
            tokenizer.save(temporary)
            tensors, numbers = trainer_tensors(model, optimizer, also)
            save_file(tensors, temporary / "trainer.safetensors")
            record = {**state, "step": step, "optimizer": {"kind": kinds(optimizer), "numbers": numbers}}
            (temporary / "trainer.json").write_text(json.dumps(plain(record), indent=2) + "\n")
            for file in [*temporary.iterdir(), temporary]:
                flush(file)
            if step in self.steps():
                remove_checkpoints([final])
            os.replace(temporary, final)
            self.link("last", final)
            if best:
                self.link("best", final)
            flush(self.path)
        except (OSError, SafetensorError) as error:
            discard(temporary)
            kept = "no checkpoint existed yet"
            if self.steps():
                kept = f"the checkpoint of step {self.steps()[-1]} is intact"
            raise UserError(f"saving step {step} to {self.path} failed ({shown(one_line(error))}); {kept}: "
                            f"{advice(error)}") from error
        self.prune()

    def prune(self) -> None:
        """Delete all checkpoints but those that last and best lead to. A run that cannot delete goes on."""
        keep = {(self.path / name).resolve().name for name in ("last", "best") if (self.path / name).exists()}
        try:
            remove_checkpoints([folder for folder in map(self.step_folder, self.steps()) if folder.name not in keep])
        except OSError as error:
            tqdm.write(f"warning: an old checkpoint in {self.path} cannot be removed ({error.strerror or error}); the "
                       f"new one is complete, and the run goes on")

    def link(self, name: str, target: Path) -> None:
        link = self.path / name
        temporary = link.with_name(name + UNFINISHED)
        if os.path.lexists(link) and not link.is_symlink():
            raise UserError(f"{link} is not the link that a run makes; move it elsewhere and run the same command "
                            f"again")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.name)
        os.replace(temporary, link)

    def resume(self, model, optimizer, also: dict = {}, like: dict = {}) -> dict | None:
        """Load the newest checkpoint into model, optimizer and what else the run saves; return its
        state, or None at the very start. Records of steps after it are cut off metrics.jsonl: they will be
        made again. like: what the state must hold at least, with values of the same kinds."""
        if not self.steps():
            self.trim_metrics(-1)
            return None
        folder = self.step_folder(self.steps()[-1])
        try:
            state = read_json(folder / "trainer.json")
            check_state(state, like, self.steps()[-1])
            optimized = state.pop("optimizer", {})
            if (kind := optimized.get("kind", kinds(optimizer))) != kinds(optimizer):
                raise ValueError(f"it was trained with {kind}, now it is {kinds(optimizer)}")
            # read on the CPU: a second copy of weights and moments may not fit on the device
            restore(load_file(folder / "trainer.safetensors"), optimized.get("numbers", {}), model, optimizer, also)
        except DAMAGE as error:
            raise UserError(f"{folder} cannot be resumed ({reason(error)}); delete that folder to go on from an older "
                            f"checkpoint, or pass --fresh") from error
        with writing(self.path / "last"):       # the process may have died before it set the links
            self.link("last", folder)
            if state.get("best_step") == state["step"]:
                self.link("best", folder)
        self.prune()
        self.trim_metrics(state["step"])
        return state

    # records

    def note_start(self, chosen: dict) -> None:
        """Keep what the first start chose. A later one changes nothing."""
        if not (self.path / "started.json").exists():
            write_text(self.path / "started.json", json.dumps(plain(chosen), indent=2) + "\n")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def trim_metrics(self, step: int) -> None:
        """Cut off what was recorded after this step, and the record that was being written when the process died."""
        with writing(self.metrics):
            *lines, cut = self.metrics.read_bytes().split(b"\n") if self.metrics.exists() else [b""]
        kept = []
        for number, line in enumerate([*lines, cut], 1):
            at = recorded_step(line)
            if at is None and line.strip() and not (number > len(lines) and line.lstrip(b"\0")[:1] in (b"{", b"")):
                raise UserError(f"{self.metrics}, line {number}, is no record of a run; move that line elsewhere and "
                                f"run the same command again")
            if at is not None and at <= step:
                kept.append(line + b"\n")
        if not kept:
            kept = [json.dumps({"config": self.config, "commit": git_commit()}).encode() + b"\n"]
        write_bytes(self.metrics, b"".join(kept))

    def log(self, record: dict) -> None:
        with writing(self.metrics), open(self.metrics, "a") as file:
            file.write(json.dumps(plain(record)) + "\n")

    def write_samples(self, step: int, samples: list[dict]) -> None:
        with writing(self.path / "samples"):
            (self.path / "samples").mkdir(exist_ok=True)
        lines = "".join(json.dumps(plain(sample)) + "\n" for sample in samples)
        write_text(self.path / "samples" / f"step-{step:06d}.jsonl", lines)

    def keep(self, name: str, text: str) -> None:
        """A file that the run makes once and reads at every start."""
        write_text(self.path / name, text)

    def write_summary(self, summary: dict) -> None:
        write_text(self.path / "summary.json", json.dumps(plain(summary), indent=2) + "\n")

    def write_page(self) -> None:
        write_page(self.path)

    def summary(self, describe) -> str:
        """describe(what summary.json holds), or one sentence where hands have been in it."""
        try:
            return describe(read_json(self.path / "summary.json"))
        except DAMAGE as error:
            raise UserError(f"{self.path / 'summary.json'} is not what a run writes ({reason(error)}); delete it, and "
                            f"the same command writes it again") from error


def discard(folder: Path) -> None:
    """An unfinished checkpoint makes room at once, if the disk lets it; if not, the next start deletes it."""
    try:
        if not any(strangers(folder, CHECKPOINT)):
            remove(folder, CHECKPOINT)
    except OSError:
        pass


def recorded_step(line: bytes) -> int | None:
    """The step of a record in metrics.jsonl; -1: the first line, the configuration; None: no record of a run."""
    try:
        record = json.loads(line)
        step = -1 if "config" in record else record["step"]
        return step if type(step) is int else None
    except (ValueError, TypeError, LookupError, RecursionError):
        return None


def check_state(state: dict, like: dict, step: int) -> None:
    """Hands may have been in it: the loop would stumble over a missing or different value much later."""
    for key, value in like.items():
        number = isinstance(value, (int, float))
        if key not in state or (not isinstance(state[key], (int, float)) if number else
                                value is not None and type(state[key]) is not type(value)):
            raise ValueError(f"trainer.json lacks a usable {key}")
    if state["step"] != step:
        raise ValueError(f"trainer.json is of step {shown(state['step'])}")


# What the Hugging Face folder does not hold

def trainer_tensors(model, optimizer, also: dict) -> tuple[dict[str, torch.Tensor], dict]:
    """The trained weights as stored (float32 masters, adapters unmerged), those of other models that change during the
    run (also: name -> model), what the optimizer remembers; and its numbers that are no tensors."""
    tensors = {f"{kind}/{name}": tensors_file.on_host(parameter)
               for kind, parameters in changing(model, also) for name, parameter in parameters}
    remembered, numbers = moments(model, optimizer)
    return tensors | remembered, numbers


def changing(model, also: dict) -> list[tuple[str, list]]:
    return [(kind, list(other.named_parameters())) for kind, other in also.items()] + [("weight", model.trainable())]


def restore(tensors: dict[str, torch.Tensor], numbers: dict, model, optimizer, also: dict) -> None:
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} in trainer.safetensors holds NaN or infinity")
    for kind, parameters in changing(model, also):
        for name, parameter in parameters:
            tensor = tensors.pop(f"{kind}/{name}")
            if tensor.shape != parameter.shape:
                raise ValueError(f"{kind}/{name} has shape {tuple(tensor.shape)}, not {tuple(parameter.shape)}")
            with torch.no_grad():
                parameter.copy_(tensors_file.like(tensor, parameter))
    restore_moments(tensors, numbers, model, optimizer)
