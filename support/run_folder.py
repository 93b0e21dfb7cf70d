"""Run folder: where a run lives, which names it writes there, and how they come and go.

No command deletes or replaces what a run did not write:

    is_run      a folder is a run if its config.json bears a run's keys; nothing else makes it one
    KNOWN       every name that a run writes, and what stands under it. Anything else is a stranger, and stays
    coming      written as NAME.unfinished, flushed, renamed: what bears its final name is complete
    going       renamed first, whole, then deleted name by name: a checkpoint becomes step-000020.removed, a run under
                --fresh becomes the hidden .removed-NAME beside it. Nothing takes these for a checkpoint or a run

A kill at any instant leaves something complete or something with such a name, and the next start finishes it.
Not here: what is in a checkpoint (checkpoint.py).
"""
import errno
import fcntl
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from support.errors import UserError, one_line, read_json, shown
from support.tokenizer import TEXT_FILES

MARK = {"recipe", "student", "teacher", "steps"}        # keys of a run's config.json that no other file has together
NAME_BYTES = 200        # file systems take 255, and ours grow by a prefix and a suffix
UNFINISHED, REMOVED = ".unfinished", ".removed"
FILE, LINK = "file", "link"
STEP = "step-[0-9]{6,}"
CHECKPOINT = dict.fromkeys([*map(re.escape, TEXT_FILES), r"config\.json", r"model\.safetensors",
                            r"trainer\.safetensors", r"trainer\.json",
                            r"\.tmp\w{6}"], FILE)      # a file that safetensors is writing
KNOWN = {       # pattern of a name -> a file, a link, or the names in that folder
    r"\.lock": FILE, r"config\.json": FILE, r"started\.json": FILE, r"metrics\.jsonl": FILE, r"summary\.json": FILE,
    r"report\.html": FILE, "tokens": {STEP + r"\.json": FILE},
    r"teacher_responses\.json": FILE, "last": LINK, "best": LINK, STEP: CHECKPOINT,
    "samples": {STEP + r"\.jsonl": FILE},
    "tensorboard": {r"events\.out\.tfevents\..+": FILE},
}
STARTING = {".lock", "config.json" + UNFINISHED}        # all there is before config.json
LOOKS = 20              # at a folder that other processes move away, before this one gives up


# Where

def run_path(runs: str, name: str) -> Path:
    """The folder of run `name` in the folder `runs`, resolved: what is looked at is what is written to.

    A name is one visible part of a path. `..` would make the folder above a run, which --fresh deletes.
    """
    wrong = ("is empty" if not name else "begins with a dot" if name.startswith(".") else
             "holds a path separator" if "/" in name or os.sep in name else
             "holds a character that cannot be printed" if not name.isprintable() else
             f"is longer than {NAME_BYTES} bytes" if len(os.fsencode(name)) > NAME_BYTES else "")
    if wrong:
        raise UserError(f"--name {shown(name, 80)} {wrong}; pass a plain name, and the folder above it as --runs")
    try:
        str(runs).encode()
        path, here = (Path(runs).expanduser() / name).resolve(), Path.cwd()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"--runs {shown(runs, 80)} is no folder ({shown(one_line(error))}); pass another") from error
    return path.relative_to(here) if path.is_relative_to(here) else path     # as short as it can be printed


def unlike_a_run(path: Path) -> str:
    """Why this folder does not bear the mark of a run, a config.json with a run's keys; empty if it does."""
    try:
        if not is_kind(path / "config.json", FILE):
            return "it holds no config.json"
        return "" if MARK <= read_json(path / "config.json").keys() else "its config.json is not that of a run"
    except UserError as error:
        return str(error).rpartition("; ")[0]


def is_run(path: Path) -> bool:
    return not unlike_a_run(path)


# What lies there

def kind_of(name: str, table: dict):
    """What a run writes under this name, finished or not: FILE, LINK, the table of a folder, or None."""
    bare = name.removesuffix(UNFINISHED).removesuffix(REMOVED)
    return next((kind for pattern, kind in table.items() if re.fullmatch(pattern, bare)), None)


def is_kind(path: Path, kind) -> bool:
    if path.is_symlink() or kind is LINK:
        return kind is LINK and path.is_symlink()
    return path.is_dir() if isinstance(kind, dict) else path.is_file()


def strangers(folder: Path, table: dict = KNOWN) -> Iterator[tuple]:
    """What no run wrote, at any depth, as (path, kind): kind is None where no run writes such a name, else what a run
    writes there and this is not (a folder called best)."""
    for item in sorted(folder.iterdir()):
        kind = kind_of(item.name, table)
        if kind is None or not is_kind(item, kind):
            yield item, kind
        elif isinstance(kind, dict):
            yield from strangers(item, kind)


def refuse_foreign(path: Path) -> None:
    """Only a run, or a folder in which nothing is but what a start that was cut short leaves, is touched."""
    try:
        names, before = sorted(item.name for item in path.iterdir() if item.name not in STARTING), path.stat()
    except FileNotFoundError:
        return
    except NotADirectoryError:
        raise UserError(f"{path} is no folder; pass another --name, or --runs") from None
    why = unlike_a_run(path) if names else ""
    if why and os.path.samestat(path.stat(), before):       # else it was just moved
        raise UserError(f"{path} exists, holds {shown(names[0])} and is no run ({why}); pass another --name, or move "
                        f"it elsewhere")


def refuse_imitations(path: Path) -> None:
    """Notes of the user's may lie in a run, but nothing of theirs under a name that a run reads or replaces."""
    for item, kind in strangers(path):
        if kind is not None:
            raise UserError(f"{shown(item)} is not what a run writes under that name; move it elsewhere and run the "
                            f"same command again")


# How it comes

ADVICE = {
    (errno.ENOSPC, errno.EDQUOT): "free some space and run the same command again",
    (errno.EACCES, errno.EPERM): "get the right to write there, or choose another --runs folder",
    (errno.EROFS,): "that disk can only be read: choose another --runs folder",
    (errno.ENAMETOOLONG,): "pass a shorter --name or --runs",
    (errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR, errno.ENOTDIR, errno.ELOOP):
        "something that no run wrote is in the way: move it elsewhere and run the same command again",
}


def advice(error: Exception) -> str:
    """What to do about an error of the disk. safetensors tells the number of its own only in the text."""
    number, text = getattr(error, "errno", None), re.search(r"os error (\d+)", str(error))
    number = int(text[1]) if number is None and text else number
    return next((words for numbers, words in ADVICE.items() if number in numbers),
                "mend the disk or choose another --runs folder, and run the same command again")


@contextmanager
def writing(path: Path):
    """A full or broken disk is said in one sentence. What is already complete stays as it is."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {shown(path)} ({error.strerror or error}); {advice(error)}") from error


def flush(path: Path) -> None:
    """Ask the disk to really hold a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """All of it or nothing."""
    temporary = path.with_name(path.name + UNFINISHED)
    with writing(path):
        temporary.unlink(missing_ok=True)       # left by a failure; written through, a link would lead elsewhere
        temporary.write_bytes(content)
        flush(temporary)
        os.replace(temporary, path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def open_own(name: str, flags: int) -> int:
    """For open(): no link to somebody else's file, and no pipe, which would wait for a reader."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def lock(path: Path):
    """The file .lock of the run in this folder, open and locked; both are made where they do not exist yet.

    --fresh in another process may rename the folder between any two lines. The file that was locked is then no longer
    the one at this path, and we look again.
    """
    try:
        for _ in range(LOOKS):
            try:
                refuse_foreign(path)
                path.mkdir(parents=True, exist_ok=True)
                refuse_foreign(path)        # the path may lead elsewhere now that the folders above it exist
                file = open(path / ".lock", "a", opener=open_own)
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path / ".lock")):
                    return file
                moved = FileNotFoundError(errno.ENOENT, "another process keeps moving it")
            except FileNotFoundError as error:
                moved = error
        raise moved
    except BlockingIOError as error:
        raise UserError(f"another process is training in {path}; wait for it or pass another --name") from error
    except OSError as error:
        raise UserError(f"cannot write to {shown(path)} ({error.strerror or error}); {advice(error)}") from error


# How it goes

def remove(path: Path, kind) -> None:
    """Delete what a run wrote. Whatever else lies in a folder stays, and the folder with it (OSError)."""
    if isinstance(kind, dict):
        # the mark last: a deletion that is cut short must still know whose remains these are
        for item in sorted(path.iterdir(), key=lambda item: (item.name == ".lock", item.name == "config.json")):
            known = kind_of(item.name, kind)
            if known is not None and is_kind(item, known):
                remove(item, known)
        path.rmdir()
    else:
        path.unlink(missing_ok=True)


def remove_checkpoints(folders: list[Path]) -> None:
    """Those to which somebody has added something stay."""
    doomed = []
    for folder in folders:
        if not any(strangers(folder, CHECKPOINT)):
            doomed.append(folder.with_name(folder.name + REMOVED))
            os.replace(folder, doomed[-1])
    if doomed:
        flush(doomed[0].parent)     # else a power cut could undo the renaming, but not the deletion
    for folder in doomed:
        remove(folder, CHECKPOINT)


def tidy(folder: Path, table: dict = KNOWN) -> None:
    """Finish what a kill left half done: delete what is unfinished or was on its way out."""
    for item in sorted(folder.iterdir()):
        kind = kind_of(item.name, table)
        if kind is None or not is_kind(item, kind):
            continue
        if not item.name.endswith((UNFINISHED, REMOVED)):
            if isinstance(kind, dict):
                tidy(item, kind)
        elif not isinstance(kind, dict) or not any(strangers(item, kind)):
            remove(item, kind)


def aside(path: Path) -> Path:
    """What the run in this folder is called while --fresh deletes it. No run's name begins with a dot."""
    return path.with_name(f".removed-{path.name}")


def set_aside(path: Path) -> None:
    """Rename a run so that it can be deleted. The whole folder goes, so there must be nothing else in it."""
    for item, _ in strangers(path):
        raise UserError(f"{shown(item)} was not written by a run, and --fresh deletes its whole folder; move it "
                        f"elsewhere, or pass another --name")
    with writing(aside(path)):
        os.replace(path, aside(path))
        flush(path.parent)


def remove_aside(path: Path) -> None:
    """Delete what --fresh, or one that was killed, has set aside of the run in this folder."""
    old = aside(path)
    try:
        if is_kind(old, KNOWN) and not any(strangers(old)) and (
                is_run(old) or {item.name for item in old.iterdir()} <= STARTING):
            remove(old, KNOWN)
    except OSError as error:        # the new run can go on; the next start tries again
        print(f"warning: {old}, the remains of a run that --fresh deletes, cannot be removed ({error.strerror})",
              file=sys.stderr)
