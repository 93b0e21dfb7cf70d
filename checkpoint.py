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
name is complete. A run is resumed from the newest complete step-* folder, whatever the links say.

Kept apart from train.py so that its loop stays on one screen. Not here: what is trained, and how.
"""
import fcntl
import json
import math
import os
import shutil
import subprocess
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import parallel
from support.errors import UserError, one_line, read_json

TEMPORARY = ".unfinished"
MARK = {"recipe", "student", "teacher", "steps"}       # keys of a run's config.json, which no other file has together
NAME_BYTES = 200        # a name of 255 bytes is the most that file systems take, and ours grow by a suffix


def run_path(runs: str, name: str) -> Path:
    """The folder of run `name` in the folder `runs`, resolved: what is looked at is what is written to.

    A name is one visible part of a path. `..` would make the folder above a run, which --fresh deletes.
    """
    wrong = ("is empty" if not name else "begins with a dot" if name.startswith(".") else
             "holds a path separator" if "/" in name or os.sep in name else
             "holds a character that cannot be printed" if not name.isprintable() else
             f"is longer than {NAME_BYTES} bytes" if len(os.fsencode(name)) > NAME_BYTES else "")
    if wrong:
        raise UserError(f"--name {one_line(ascii(name))[:80]} {wrong}; pass a plain name, and the folder above it as "
                        f"--runs")
    try:
        str(runs).encode()
        path, here = (Path(runs).expanduser() / name).resolve(), Path.cwd()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--runs {ascii(str(runs))[:80]} is no folder ({one_line(error)}); pass another") from error
    return path.relative_to(here) if path.is_relative_to(here) else path     # as short as it can be printed


def is_run(path: Path) -> bool:
    """Does this folder bear the mark of a run, a config.json with a run's keys?"""
    try:
        return MARK <= read_json(path / "config.json").keys()
    except UserError:
        return False


def flush(path: Path) -> None:
    """Ask the disk to really hold a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(path: Path):
    """A full or broken disk is said in one sentence. What is already complete stays as it is."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path} ({error.strerror or error}); free some space and run the same command "
                        f"again") from error


def write_text(path: Path, text: str) -> None:
    """All of it or nothing."""
    temporary = path.with_name(path.name + TEMPORARY)
    with writing(path):
        temporary.write_text(text)
        flush(temporary)
        os.replace(temporary, path)


def plain(value):
    """JSON has no NaN: what is undefined (a mean over no rows) becomes null."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def git_commit() -> str | None:
    """The commit of the code that runs, with a + when the tree has changes; None outside a git checkout."""
    try:
        here = Path(__file__).resolve().parent
        command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


STARTED = {"date": str, "torch": str, "threads": int, "slots": int, "micro_batch_tokens": int, "chunk_rows": int}


def started(path: Path) -> dict:
    """What the first start of the run in this folder chose (RunFolder.note_start); {} for a run that is new."""
    file = Path(path) / "started.json"
    if not is_run(path) or not os.path.lexists(file):
        return {}
    found = read_json(file)
    wrong = [key for key, kind in STARTED.items() if (value := found.get(key)) is not None
             and (type(value) is not kind or kind is int and not 0 < value < 2**31)]
    try:
        datetime.fromisoformat(found.get("date") or "2000-01-01")
    except (ValueError, TypeError):
        wrong.append("date")
    if wrong:
        raise UserError(f"{file} has {wrong[0]} = {found[wrong[0]]!r}, which no run wrote; delete that file (a run whose "
                        f"prompts hold the date may go on differently), or pass --fresh")
    return found


class RunFolder:
    """One run on disk. Opening it takes a lock, refuses another configuration, and finds where to go on."""

    def __init__(self, path: Path, config: dict, fresh: bool = False):
        self.path, self.config = Path(path), plain(config)
        self.refuse_foreign()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.refuse_foreign()       # the path may lead elsewhere now that the folders above it exist
            self.lock = open(self.path / ".lock", "w")
        except OSError as error:
            raise UserError(f"cannot write to {self.path} ({error.strerror}); choose another --runs "
                            f"folder") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another process is training in {self.path}; wait for it or pass another "
                            f"--name") from error
        if fresh:
            self.empty()
        if (self.path / "config.json").exists():
            self.compare(read_json(self.path / "config.json"))
        else:
            write_text(self.path / "config.json", json.dumps(self.config, indent=2) + "\n")
        for leftover in list(self.path.rglob("*" + TEMPORARY)):
            remove(leftover)

    def refuse_foreign(self) -> None:
        """Only a run, or a folder in which nothing is but what a start that was cut short leaves, is touched."""
        try:
            names = {item.name for item in self.path.iterdir()} if self.path.is_dir() else set()
        except OSError as error:
            raise UserError(f"cannot read {self.path} ({error.strerror}); choose another --runs folder") from error
        if names - {".lock", "config.json" + TEMPORARY} and not is_run(self.path):
            raise UserError(f"{self.path} exists and is no run (it holds {min(names)}); pass another --name")

    def empty(self) -> None:
        # config.json goes last: a deletion that is cut short must still know whose remains these are
        for item in sorted(self.path.iterdir(), key=lambda item: item.name == "config.json"):
            if item.name != ".lock":
                remove(item)

    def compare(self, old: dict) -> None:
        """The same run must mean the same configuration, or its curve would be two experiments glued
        together."""
        if changed := [key for key in self.config if old.get(key) != self.config[key]]:
            key = changed[0]
            raise UserError(f"{self.path} was started with {key} = {old.get(key)!r}, now it is {self.config[key]!r}; "
                            f"pass another --name, or --fresh to delete that run and start again")

    # checkpoints

    def steps(self) -> list[int]:
        return sorted(int(item.name.removeprefix("step-")) for item in self.path.glob("step-*") if item.suffix == "")

    def step_folder(self, step: int) -> Path:
        return self.path / f"step-{step:06d}"

    def save(self, step: int, model, tokenizer, optimizer, state: dict, best: bool, average=None) -> None:
        """A complete checkpoint or none: when the disk fills up, the unfinished one is removed and the
        previous stays."""
        final = self.step_folder(step)
        temporary = final.with_name(final.name + TEMPORARY)
        try:
            model.save(temporary)
            tokenizer.save(temporary)
            save_file(trainer_tensors(model, optimizer, average), temporary / "trainer.safetensors")
            (temporary / "trainer.json").write_text(json.dumps(plain({**state, "step": step}), indent=2) + "\n")
            for file in [*temporary.iterdir(), temporary]:
                flush(file)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            self.link("last", final)
            if best:
                self.link("best", final)
            flush(self.path)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            kept = "no checkpoint existed yet"
            if self.steps():
                kept = f"the checkpoint of step {self.steps()[-1]} is intact"
            raise UserError(f"saving step {step} to {self.path} failed ({error}); {kept}: free some space and run the "
                            f"same command again") from error
        keep = {(self.path / name).resolve().name for name in ("last", "best") if (self.path / name).exists()}
        for old in self.steps():
            if self.step_folder(old).name not in keep:
                shutil.rmtree(self.step_folder(old))

    def link(self, name: str, target: Path) -> None:
        temporary = self.path / (name + TEMPORARY)
        temporary.symlink_to(target.name)
        os.replace(temporary, self.path / name)

    def resume(self, model, optimizer, average=None) -> dict | None:
        """Load the newest checkpoint into model, optimizer and the teacher's running average; return its
        state, or None at the very start. Records of steps after it are cut off metrics.jsonl: they will be
        made again."""
        if not self.steps():
            state = None
        else:
            folder = self.step_folder(self.steps()[-1])
            state = read_json(folder / "trainer.json")
            try:
                # read on the CPU: a second copy of weights and moments may not fit on the device
                restore(load_file(folder / "trainer.safetensors"), model, optimizer, average)
            except (OSError, SafetensorError, KeyError, RuntimeError) as error:
                raise UserError(f"{folder} cannot be resumed ({error}); delete that folder to go on from an older "
                                f"checkpoint, or pass --fresh") from error
            with writing(self.path / "last"):       # the process may have died before it set the links
                self.link("last", folder)
                if state.get("best_step") == state["step"]:
                    self.link("best", folder)
        self.trim_metrics(state["step"] if state else -1)
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
        kept = []
        for line in self.metrics.read_text().splitlines() if self.metrics.exists() else ():
            try:
                record = json.loads(line)
            except ValueError:          # the line that was being written when the process died
                continue
            if record.get("step", -1) <= step:
                kept.append(line)
        if not kept:
            kept = [json.dumps({"config": self.config, "commit": git_commit()})]
        write_text(self.metrics, "\n".join(kept) + "\n")

    def log(self, record: dict) -> None:
        with writing(self.metrics), open(self.metrics, "a") as file:
            file.write(json.dumps(plain(record)) + "\n")

    def write_samples(self, step: int, samples: list[dict]) -> None:
        with writing(self.path / "samples"):
            (self.path / "samples").mkdir(exist_ok=True)
        lines = "".join(json.dumps(plain(sample)) + "\n" for sample in samples)
        write_text(self.path / "samples" / f"step-{step:06d}.jsonl", lines)

    def write_summary(self, summary: dict) -> None:
        write_text(self.path / "summary.json", json.dumps(plain(summary), indent=2) + "\n")

    def summary(self) -> dict | None:
        return read_json(self.path / "summary.json") if (self.path / "summary.json").exists() else None


def trainable(model) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def trainer_tensors(model, optimizer, average=None) -> dict[str, torch.Tensor]:
    """What the Hugging Face folder beside it does not hold: the trained weights as stored (float32 masters,
    adapters unmerged), the optimizer's moments, and the running average where there is one."""
    tensors = {f"average/{name}": parallel.on_host(p) for name, p in average.named_parameters()} if average else {}
    for name, parameter in trainable(model):
        tensors[f"weight/{name}"] = parallel.on_host(parameter)
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = parallel.on_host(value)
    return tensors


def restore(tensors: dict[str, torch.Tensor], model, optimizer, average=None) -> None:
    moments = {}
    for name, parameter in average.named_parameters() if average else ():
        with torch.no_grad():
            parameter.copy_(parallel.like(tensors.pop(f"average/{name}"), parameter))
    for index, (name, parameter) in enumerate(trainable(model)):
        with torch.no_grad():
            parameter.copy_(parallel.like(tensors.pop(f"weight/{name}"), parameter))
        own = [key for key in tensors if key.split("/", 1)[1] == name]
        if own:
            moments[index] = {key.split("/", 1)[0]: parallel.like(tensors.pop(key), parameter) for key in own}
    # the learning rate and its schedule belong to the configuration, not to the checkpoint
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
