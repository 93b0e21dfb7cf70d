"""A folder of what a teacher said: shards that are written whole or not at all, and found again by key.

    meta.json                   what wrote it; whoever opens the folder to write compares it (teacher_cache.py)
    head.safetensors            the teacher's head (hidden states only)
    shard-000000.safetensors    key (S, 32), length (S), at (S, 2: step, and how many of the same came before in it),
                                and what was said of each token, one sequence after the other
"""
import fcntl
import hashlib
import json
import re
from functools import lru_cache
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from support.errors import UserError, one_line, shown
from support.run_folder import UNFINISHED, flush, write_bytes, write_text, writing

SHARD = r"shard-\d{6}\.safetensors"


def digest(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little") + part)
    return found.hexdigest()


class Entry:
    """Where something said of a sequence lies: rows first ... last of a shard."""
    __slots__ = ("shard", "first", "last")

    def __init__(self, shard: Path, first: int, last: int):
        self.shard, self.first, self.last = shard, first, last


class Store:
    """A folder of shards. found: key -> {(step, occurrence in it): Entry}."""

    def __init__(self, folder: Path, meta: dict | None = None, compare=None):
        """meta: what is to be written there, and compare(folder, meta) raises where something else was; None: only
        read."""
        self.folder, self.found, self.head = folder, {}, None
        if meta is not None:
            self.begin(meta, compare)
        self.shards = sorted(path for path in folder.iterdir() if re.fullmatch(SHARD, path.name))
        for shard in self.shards:
            self.look_at(shard)

    def begin(self, meta: dict, compare) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "a")
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"another process writes to {shown(self.folder)}; wait for it, or pass another "
                                f"--cache_teacher") from None
            left = [path for path in self.folder.iterdir() if path.name.endswith(UNFINISHED)
                    and re.fullmatch(rf"meta\.json|\w+\.safetensors|{SHARD}", path.name.removesuffix(UNFINISHED))]
            for path in left:           # of a run that was killed while it wrote
                path.unlink()
            others = [path.name for path in self.folder.iterdir() if path.name != ".lock"]
        if "meta.json" in others:
            compare(self.folder, meta)
        elif others:
            raise UserError(f"{shown(self.folder)} holds {shown(others[0])} and was written by no --cache_teacher; "
                            f"pass another folder")
        else:
            write_text(self.folder / "meta.json", json.dumps(meta, indent=2) + "\n")

    def look_at(self, shard: Path) -> None:
        file = self.opened(shard)
        key_S, length_S, at_S2 = (file.get_tensor(name) for name in ("key", "length", "at"))
        last_S = length_S.cumsum(0)
        for key_32, first, last, at in zip(key_S, (last_S - length_S).tolist(), last_S.tolist(), at_S2.tolist()):
            self.found.setdefault(bytes(key_32.tolist()), {})[tuple(at)] = Entry(shard, first, last)

    def opened(self, shard: Path):
        try:
            return open_shard(shard)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{shown(shard)} cannot be read ({shown(one_line(error))}); delete it, and the teacher is "
                            f"asked again") from error

    def pick(self, asked: list[tuple]) -> list[Entry] | None:
        """For each (key, step, occurrence) what was said in the same step, else in any; None if one is missing."""
        found = [(self.found.get(key, {}), at) for key, *at in asked]
        return [entries.get(tuple(at)) or next(iter(entries.values())) for entries, at in found] if all(
            entries for entries, _ in found) else None

    def read(self, entries: list[Entry], name: str) -> Tensor:
        """The rows of this tensor, one entry after the other."""
        return torch.cat([self.opened(entry.shard).get_slice(name)[entry.first:entry.last] for entry in entries])

    def append(self, asked: list[tuple], lengths: list[int], rows: dict[str, Tensor]) -> None:
        """Write a shard of those that are not there yet; rows holds the tokens of all, one sequence after the other."""
        new = [key not in self.found or tuple(at) not in self.found[key] for key, *at in asked]
        if not any(new):
            return
        keep_n = torch.tensor(new).repeat_interleave(torch.tensor(lengths))
        chosen = [(key, at, length) for (key, *at), length, is_new in zip(asked, lengths, new) if is_new]
        tensors = {
            "key": torch.tensor([list(key) for key, _, _ in chosen], dtype=torch.uint8),
            "length": torch.tensor([length for _, _, length in chosen]),
            "at": torch.tensor([at for _, at, _ in chosen]),
            **{name: value_n.cpu()[keep_n].contiguous() for name, value_n in rows.items()}}
        number = 1 + max((int(path.name[6:12]) for path in self.shards), default=-1)
        shard = self.folder / f"shard-{number:06d}.safetensors"
        write_bytes(shard, save(tensors))
        flush(self.folder)
        self.shards.append(shard)
        self.look_at(shard)

    def keep_head(self, head_VE: Tensor) -> None:
        path = self.folder / "head.safetensors"
        if not path.exists():
            write_bytes(path, save({"head": head_VE.cpu().contiguous()}))
            flush(self.folder)

    def read_head(self, device) -> Tensor:
        if self.head is None:
            self.head = self.opened(self.folder / "head.safetensors").get_tensor("head").to(device)
        return self.head


@lru_cache(64)      # a run of thousands of steps has more shards than a process may hold open
def open_shard(shard: Path):
    return safe_open(shard, framework="pt")
