"""What the attacks share: a tiny world, one forked child per run, what two equal runs have in common, the closing line.

torch and the program are imported once, in a parent that never computes and so never starts a thread; each run is a
fork of it that executes train.py as `python train.py` would. That costs 0.3 s a run instead of 4 s.

Every child is fenced in: an audit hook ends it before it changes anything outside the attack's own folder, so an
attack that succeeds is noticed and costs nothing. Linux only (pidfd, audit events of its file system calls).
"""
import argparse
import contextlib
import functools
import importlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
from conftest import CHARACTERS, write_checkpoint, write_pair  # noqa: E402

ESCAPED = 99            # exit status of a child that was about to change something outside its folder
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink", "os.link", "os.truncate",
           "shutil.rmtree", "shutil.move", "shutil.copyfile")
TINY = dict(problems=2, samples=2, max_new_tokens=6, steps=3, eval_k=1, eval_limit=2, eval_every=0, warmup_steps=0,
            device="cpu", name="run", verifier="number")
# wall times, and what depends on the machine and on the state of the checkout
INCOMPARABLE = ("phases", "timings", "peak_memory", "planned_memory", "commit")


# The tiny world

def foreign_tokenizer(folder: Path) -> None:
    """Another alphabet order and three merges: no id of the student's means the same here."""
    pieces = [*CHARACTERS[::-1], "12", "3+", "=5"]
    merges = [["1", "2"], ["3", "+"], ["=", "5"]]
    added = [dict(id=len(pieces) + i, content=text, special=True, normalized=False, single_word=False, lstrip=False,
                  rstrip=False) for i, text in enumerate(("<s>", "</s>"))]
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"] |= {"vocab": {piece: i for i, piece in enumerate(pieces)}, "merges": merges}
    description["added_tokens"] = added
    (folder / "tokenizer.json").write_text(json.dumps(description))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": len(pieces) + 1}))


def write_world(folder: Path) -> None:
    write_pair(folder)
    write_checkpoint(folder / "foreign", 3, model_type="llama", vocab_size=24, hidden_size=16, intermediate_size=24,
                     num_hidden_layers=1)
    foreign_tokenizer(folder / "foreign")
    for path in folder.glob("*.jsonl"):     # the recipe with several teachers wants to know which
        records = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(record | {"kind": ("low", "high")[i % 2]}) + "\n"
                                for i, record in enumerate(records)))


def arguments(world: Path, **flags) -> list[str]:
    """The command line of a tiny run in `world`; None leaves a flag out, True gives it without a value."""
    files = dict(student=world / "student", teacher=world / "teacher", data=world / "train.jsonl",
                 eval_data=world / "test.jsonl")
    given = {key: value for key, value in {**files, **TINY, **flags}.items() if value is not None}
    return [f"--{key}" if value is True else f"--{key}={str(value).format(world=world)}"
            for key, value in given.items()]


# What happens inside a child

def place_of(path, descriptor=-1) -> str:
    """The absolute path that a call names, links in its last part not followed."""
    start = os.getcwd() if descriptor in (-1, None) else os.readlink(f"/proc/self/fd/{descriptor}")
    parent, name = os.path.split(os.path.join(start, os.fsdecode(path)).rstrip("/"))
    return os.path.join(os.path.realpath(parent), name)


def changed(event: str, args: tuple) -> list[str]:
    """The paths that an audit event is about to change: made, written to, renamed, removed."""
    if event == "open":
        path, _, flags = args
        if isinstance(path, int) or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            return []
        return [place_of(path)]
    if event not in CHANGES:
        return []
    if event in ("os.rename", "shutil.move"):
        return [place_of(args[0], *args[2:3]), place_of(args[1], *args[3:4])]
    if event in ("os.symlink", "os.link", "shutil.copyfile"):
        return [place_of(args[1], *args[2:3] if event == "os.symlink" else ())]
    at = args[-1] if event in ("os.remove", "os.rmdir", "os.mkdir") else -1
    return [] if isinstance(args[0], int) else [place_of(args[0], at)]


def on_changes(inside: Path, act) -> None:
    """From now on act(number, event, path) before the number-th change of the file system below `inside`; flushing
    a file to the disk counts as one."""
    prefix, count, flush = f"{os.path.realpath(inside)}/", [0], os.fsync

    def noticed(event, paths):
        if any(path.startswith(prefix) for path in paths):
            count[0] += 1
            act(count[0], event, paths[-1])

    def fsync(descriptor):
        noticed("os.fsync", [os.readlink(f"/proc/self/fd/{descriptor}")])
        flush(descriptor)
    os.fsync = fsync
    sys.addaudithook(lambda event, args: noticed(event, changed(event, args)))


def fence(inside: Path) -> None:
    """End this process before it changes anything that does not lie below `inside`."""
    allowed = (f"{os.path.realpath(inside)}/", "/dev/", "/proc/self/")

    def hook(event, args):
        for path in changed(event, args):
            if not path.startswith(allowed) and path + "/" not in allowed:
                os.write(2, f"ESCAPED: {event} {path}\n".encode(errors="backslashreplace"))
                os._exit(ESCAPED)
    sys.addaudithook(hook)


@functools.cache
def compiled(path: str):
    return compile(Path(path).read_text(), path, "exec")


def program(argv: list[str], file: str = "train.py") -> int:
    """What `python train.py ...` does in a process of its own. Returns the exit status."""
    path = str(ROOT / file)
    sys.argv = [path, *argv]
    try:
        exec(compiled(path), {"__name__": "__main__", "__file__": path})
    except SystemExit as end:
        if not isinstance(end.code, (int, type(None))):
            print(end.code, file=sys.stderr)
            return 1
        return end.code or 0
    return 0


@dataclass
class Ended:
    """A child that is over. status: its exit status, or minus the signal that ended it."""
    status: int
    text: str           # what it printed, both streams
    seconds: float
    peak: int           # bytes, of the process or of its largest child
    late: bool          # it did not end in time and was killed


class Child:
    """body() in a fork of this process, in a session of its own, with its output in a pipe."""

    def __init__(self, body, inside: Path, environment: dict | None = None, memory: int = 0, file_size: int = 0):
        sys.stdout.flush()
        self.pipe, pipe = os.pipe()
        self.text, self.ended, self.begun = b"", None, time.perf_counter()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                self.become(pipe, inside, environment or {}, memory, file_size)
                status = body()
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(OSError, ValueError):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status or 0)
        os.close(pipe)
        os.set_blocking(self.pipe, False)
        self.descriptor = os.pidfd_open(self.pid)

    @staticmethod
    def become(pipe, inside, environment, memory, file_size):
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.environ |= environment | {"TMPDIR": str(inside), "HOME": str(inside)}
        tempfile.tempdir = None
        os.chdir(inside)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number in (1, 2):
            os.dup2(pipe, number)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False, buffering=1)
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        for limit, size in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, file_size)):
            if size:
                resource.setrlimit(limit, (size, size))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        fence(inside)

    def read(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while part := os.read(self.pipe, 1 << 16):
                self.text = (self.text + part)[-10**6:]

    def reap(self, late: bool) -> Ended:
        """Called once it is over. Whatever it started and left behind ends too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status, usage = os.wait4(self.pid, 0)
        seconds = time.perf_counter() - self.begun
        self.read()
        os.close(self.pipe)
        os.close(self.descriptor)
        self.ended = Ended(os.waitstatus_to_exitcode(status), self.text.decode(errors="replace"), seconds,
                           usage.ru_maxrss * 1024, late)
        return self.ended

    def kill(self, number=signal.SIGKILL) -> None:
        if self.ended is None:
            os.kill(self.pid, number)


def wait(children: list[Child], seconds: float, stop=lambda: None) -> list[Ended]:
    """Until all are over; those that are not after `seconds` are killed. stop() is called when one fails."""
    end, running = time.perf_counter() + seconds, list(children)
    poll = select.poll()
    for child in children:
        poll.register(child.descriptor, select.POLLIN)
        poll.register(child.pipe, select.POLLIN)
    while running:
        left = end - time.perf_counter()
        ready = {number for number, event in poll.poll(max(0, min(left, 1.0)) * 1000) if event & select.POLLIN}
        for child in running[:]:
            child.read()
            if child.descriptor in ready or left <= 0:
                if left <= 0:
                    child.kill()
                poll.unregister(child.descriptor)
                poll.unregister(child.pipe)
                if child.reap(left <= 0).status:
                    stop()
                running.remove(child)
    return [child.ended for child in children]


def run(body, inside: Path, seconds: float = 60, **limits) -> Ended:
    return wait([Child(body, inside, **limits)], seconds)[0]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start_ranks(bodies: list, inside: Path) -> list[Child]:
    """One child per body, with the environment that torchrun gives its processes."""
    shared = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()), WORLD_SIZE=str(len(bodies)),
                  LOCAL_WORLD_SIZE=str(len(bodies)))
    return [Child(body, inside, shared | {"RANK": str(i), "LOCAL_RANK": str(i)}) for i, body in enumerate(bodies)]


# The parent

def warm(world: Path, *commands: list[str]) -> None:
    """Import here whatever a run of these commands imports late, so that children find it there."""
    def body(argv):
        status = program(argv)
        print("\nMODULES", *sys.modules)
        return status
    for argv in commands:
        ended = run(lambda argv=argv: body(argv), world)
        if ended.status:
            raise SystemExit(f"a tiny run that nobody attacks fails:\n{ended.text}")
        for name in ended.text.rpartition("MODULES")[2].split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    shutil.rmtree(world / "warm", ignore_errors=True)
    compiled(str(ROOT / "train.py"))        # read once: an attack looks at one state of the program
    compiled(str(ROOT / "eval.py"))
    assert len(os.listdir("/proc/self/task")) == 1, "a fork of a process with threads may hang"


@contextlib.contextmanager
def worlds(keep: bool):
    """A folder for everything, with the tiny world in it; in memory where there is room: no test can pull the plug."""
    memory = "/dev/shm"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))     # so that the folder goes
    base = Path(tempfile.mkdtemp(prefix="attack-", dir=memory if os.access(memory, os.W_OK) else None))
    try:
        made = run(lambda: write_world(base), base)
        assert made.status == 0, made.text
        warm(base, arguments(base, runs=base / "warm"))
        yield base
    finally:
        if keep:
            print(f"kept    {base}")
        else:
            shutil.rmtree(base, ignore_errors=True)


def comparable(value, name: str) -> dict:
    """Flat: name.key.key -> number or text, without what may differ."""
    if not isinstance(value, dict):
        return {name: value}
    return {path: item for key, part in value.items() if "second" not in key and key not in INCOMPARABLE
            for path, item in comparable(part, f"{name}.{key}").items()}


def result(folder: Path) -> dict:
    """What must not depend on interruptions: weights, moments, links, records, answers, and that nothing else lies
    there. Two equal runs have equal results."""
    found, records = {}, (folder / "metrics.jsonl").read_text().splitlines()
    files = {name: (folder / name).read_text() for name in ("last/trainer.json", "summary.json")}
    for name, text in [*files.items(), *((f"record {i}", text) for i, text in enumerate(records))]:
        found |= comparable(json.loads(text), name)
    for path in [folder / "last/model.safetensors", folder / "last/trainer.safetensors", *folder.glob("samples/*")]:
        found[str(path.relative_to(folder))] = sha256(path.read_bytes()).hexdigest()
    return found | {"best": os.readlink(folder / "best"), "names": sorted(os.listdir(folder)),
                    "names beside it": sorted(os.listdir(folder.parent))}


def differences(found: dict, wanted: dict) -> list[str]:
    return [f"{key}: {str(found.get(key))[:200]} instead of {str(wanted.get(key))[:200]}"
            for key in sorted(found.keys() | wanted.keys()) if found.get(key) != wanted.get(key)]


def trouble(ended: Ended, allowed=(0, 2)) -> str | None:
    """What is wrong with the way a run ended; None when it ended well or said why in one sentence."""
    said = [line for line in ended.text.splitlines() if line.startswith("error:")]
    checks = [(ended.late, "HANGS"),
              (ended.status == ESCAPED, "TOUCHES what is not its own"),
              (ended.status < 0, f"DIES of signal {-ended.status}"),
              ("Traceback (most" in ended.text or "panicked at" in ended.text, "TRACEBACK"),
              (ended.status not in allowed, f"STATUS {ended.status}"),
              (ended.status == 2 and len(said) != 1, f"says {len(said)} sentences, not one")]
    return next((text for holds, text in checks if holds), None)


class Tally:
    """Counts runs and prints failures as they are found."""

    def __init__(self, title: str, kinds: tuple[str, ...], script: str):
        self.title, self.script, self.begun = title, script, time.perf_counter()
        self.done, self.skipped, self.failures = 0, 0, dict.fromkeys(kinds, 0)

    def good(self) -> None:
        self.done += 1
        if sys.stderr.isatty():
            print(f"{self.done}\r", end="", file=sys.stderr)

    def skip(self) -> None:
        """What cannot be tried on this machine."""
        self.skipped += 1

    def bad(self, kind: str, args, setting: str, index: int, what: str, text: str = "") -> None:
        self.done += 1
        self.failures[kind] += 1
        last = "\n".join(f"      | {line[:300]}" for line in text.strip().splitlines()[-4:])
        told = (f"{kind.upper():9s} {setting} {index}: {what}\n{last}\n"
                f"      again: python tests/attack/{self.script} --kind {setting} --seed {args.seed} --index {index}")
        print(told.encode(errors="backslashreplace").decode(), flush=True)

    def close(self, wanted: int) -> int:
        counts = ", ".join(f"{number:,} {kind}" for kind, number in self.failures.items())
        if self.skipped:
            counts += f", {self.skipped:,} not possible here"
        print(f"{self.title:9s} {self.done:,} of {wanted:,}: {counts}, {time.perf_counter() - self.begun:.0f} s",
              flush=True)
        return int(any(self.failures.values()) or self.done + self.skipped < wanted)


def options(text: str, kinds, count: int, argv=None, **more) -> argparse.Namespace:
    """--count, --seed, --kind, --index, --keep, and a switch for each of `more` (name=help)."""
    parser = argparse.ArgumentParser(description=text.split("\n\n")[0])
    parser.add_argument("--count", type=int, default=count, help=f"how many (default {count:,})")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="only these, separated by commas: " + ", ".join(kinds))
    parser.add_argument("--index", type=int, help="only this one of a kind, to see a failure again")
    parser.add_argument("--keep", action="store_true", help="leave the folder with everything in it")
    for name, words in more.items():
        parser.add_argument(f"--{name}", action="store_true", help=words)
    args = parser.parse_args(argv)
    args.kinds = [kind for kind in args.kind.split(",") if kind] or list(kinds)
    if unknown := set(args.kinds) - set(kinds):
        parser.error(f"unknown --kind {', '.join(unknown)}")
    return args


def schedule(args) -> list[tuple[str, int]]:
    """(kind, index) of every attack: kinds take turns, so that any --count tries all of them."""
    if args.index is not None:
        return [(args.kinds[0], args.index)]
    return [(args.kinds[i % len(args.kinds)], i // len(args.kinds)) for i in range(args.count)]
