"""A teacher on disk: what it said of each sequence is written once, and a later run learns from that without it.

    --cache_teacher FOLDER      the teacher is there: what it says is written to FOLDER, and read from there next time
    --teacher cache:FOLDER      the teacher is not there: everything is read from FOLDER
    --cache_topk K              writes the K likeliest tokens and the mass of the others instead of hidden states

The key of a sequence is a hash of the ids that the teacher read and of where its response begins: prompt, template,
privileged text and response are all in it. Hidden states give every loss, digit for digit; the K likeliest those of
topk_part.py. What a step needs is written before the step learns from it, whole or not at all (teacher_store.py): a run
that is killed goes on from what is there. A step is read from the disk when every sequence of it is there, those of the
same step first: a teacher that reads a sequence beside others may round its last digit differently.
"""
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from extras import topk_part
from extras.elsewhere import ELSEWHERE, addresses
from extras.given import has_teacher_write
from extras.teacher_store import Entry, Store, digest
from extras.topk_part import Told, TopKPart, rules_for_topk, told_of
from support import memory
from support.errors import UserError, read_json, shown
from support.flags import opt
from teacher import Batch, Part, Teacher, log_probs

PREFIX = "cache:"
SAMPLED_BLOCKS, BLOCK = 256, 4096       # of each weights file that its hash sees, beside its header
MEANING = {     # keys of meta.json -> what a sentence calls them, and what to do about a difference
    "teacher": ("the teacher", "name the teacher that wrote it"),
    "tokenizer": ("the student's tokenizer", "take a student with that tokenizer"),
    "template": ("the chat template", "pass the --chat_template that wrote it"),
    "stop_ids": ("the stop ids", "pass the --stop_ids that wrote it"),
    "dtype": ("the dtype", "pass the --dtype that wrote it"),
    "topk": ("--cache_topk", "pass the same"),
    "temperature": ("--temperature, which its top k depend on,", "pass the same"),
}


@dataclass(frozen=True)
class Flags:
    cache_teacher: str = opt("", "a folder: what the teacher says is written there, and read from there next time; "
                                 "--teacher cache:FOLDER reads it without the teacher")
    cache_topk: int = opt(0, "--cache_teacher: write so many of the likeliest tokens and the mass of the others; 0 = "
                             "hidden states, which every loss can read", high=10_000)


def from_disk(cfg) -> list[Path]:
    return [Path(address.removeprefix(PREFIX)).expanduser() for address in addresses(cfg) if address.startswith(PREFIX)]


def rules(cfg) -> list[tuple[bool, str]]:
    folders = from_disk(cfg)
    if not (folders or cfg.cache_teacher or cfg.cache_topk):
        return []
    found = [
        (not cfg.cache_topk or bool(cfg.cache_teacher), "--cache_topk belongs to --cache_teacher"),
        (memory.processes() == 1, "a teacher's cache is read and written by one process; run without torchrun"),
        (not folders or not cfg.cache_teacher, f"--teacher {cfg.teacher} is read from disk already: leave out "
                                               f"--cache_teacher"),
        (not cfg.cache_teacher or cfg.teacher != "none", "--cache_teacher: there is no teacher (--teacher none)"),
        (not cfg.cache_teacher or cfg.teacher != "self" or getattr(cfg, "self_teacher", "initial") == "initial",
         "--cache_teacher: --self_teacher ema and live change at every step; keep --self_teacher initial"),
        (not cfg.cache_topk or not addresses(cfg),
         "--cache_topk: a teacher that is no checkpoint here tells what it tells, and that is written; leave it out"),
        (not folders or not has_teacher_write(cfg),
         f"--teacher {cfg.teacher} was written and writes nothing itself; leave out what asks a teacher to write"),
        (not folders or not (getattr(cfg, "teacher_int8", False) or getattr(cfg, "teacher_memory", "") in (
            "park", "stream")), f"--teacher {cfg.teacher} has no weights that could lie elsewhere or be rounded: leave "
                                f"out --teacher_memory and --teacher_int8"),
    ]
    if cfg.cache_topk:
        found += rules_for_topk(cfg, f"--cache_topk {cfg.cache_topk}", cfg.cache_topk, entropy=True)
    for folder in folders:
        topk = read_meta(folder)["topk"]
        if topk is not None:
            found += rules_for_topk(cfg, f"--teacher {PREFIX}{folder}", topk["tokens"], topk["entropy"])
    return found


# What it is checked by

def weights_hash(folder: Path) -> str:
    """Of config.json and, for each weights file, its name, size, header and SAMPLED_BLOCKS blocks: reading all of a
    large teacher would take minutes. Two checkpoints that differ in a few numbers alone may go unnoticed."""
    parts = [(folder / "config.json").read_bytes()]
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = file.read(min(size, int.from_bytes(file.read(8), "little")))
            blocks = []
            for block in range(SAMPLED_BLOCKS):
                file.seek(block * max(0, size - BLOCK) // (SAMPLED_BLOCKS - 1))
                blocks.append(file.read(BLOCK))
        parts += [path.name.encode(), str(size).encode(), header, *blocks]
    return digest(*parts)


def described(cfg, tokenizer, dtype: torch.dtype, teacher: str | None, topk: dict | None) -> dict:
    """meta.json: whatever would make what was written another thing."""
    variables = (cfg.template_vars, getattr(cfg, "teacher_template_vars", ""))
    return {
        "teacher": teacher, "tokenizer": digest(json.dumps(sorted(tokenizer.vocab().items())).encode()),
        "template": digest(json.dumps([tokenizer.template, *variables]).encode()),
        "stop_ids": list(tokenizer.stop_ids), "dtype": str(dtype).removeprefix("torch."), "topk": topk,
        "temperature": cfg.temperature if topk else None,
    }


def read_meta(folder: Path) -> dict:
    if not (folder / "meta.json").is_file():
        raise UserError(f"{shown(folder)} holds no meta.json, so no teacher was written there; run once with "
                        f"--cache_teacher {shown(folder)} and the teacher itself")
    meta = read_json(folder / "meta.json")
    if missing := [key for key in MEANING if key not in meta]:
        raise UserError(f"{shown(folder / 'meta.json')} lacks {missing[0]}; write the cache again in another folder")
    return meta


def compare(folder: Path, now: dict) -> None:
    """UserError for the first thing that is not as it was when this was written."""
    then = read_meta(folder)
    for key, (name, what_to_do) in MEANING.items():
        if then[key] != now[key] and (now[key] is not None or key == "topk"):
            old, new = (shown(str(value)[:16], 60) for value in (then[key], now[key]))
            raise UserError(f"{shown(folder)} was written with another {name.removeprefix('the ')} ({old}, now {new}); "
                            f"{what_to_do}, or write another folder with --cache_teacher")


# Reading and writing a step

def asked_of(batch: Batch, sequence_b: Tensor) -> list[tuple]:
    """(key, step, how many of the same came before in it) of each sequence, in their order."""
    rollout, seen, out = batch.rollout, Counter(), []
    ends, firsts = (rollout.prompt_len_B + rollout.length_B).tolist(), rollout.prompt_len_B.tolist()
    for b in sequence_b.tolist():
        ids = rollout.tokens_BT[b, :ends[b]].cpu().numpy().astype("<i8").tobytes()
        key = bytes.fromhex(digest(firsts[b].to_bytes(8, "little"), ids))
        out.append((key, batch.step, seen[key]))
        seen[key] += 1
    return out


def stored_part(store: Store, entries: list[Entry], batch: Batch, sequence_b: Tensor, cfg, meta: dict):
    """The part of these sequences, as it was written."""
    rollout, device = batch.rollout, batch.rollout.tokens_BT.device
    if meta["topk"] is not None:
        lengths = [entry.last - entry.first for entry in entries]
        names = [name for name in Told._fields if meta["topk"]["entropy"] or name != "entropy_n"]
        parts = [store.read(entries, name).split(lengths) for name in names]
        answers = [Told(*values)._replace(id_nK=values[0].long()) for values in zip(*parts)]
        return topk_part.topk_part(rollout, sequence_b, answers)
    mine_N = torch.isin(rollout.sequence_N, sequence_b)
    return Part(sequence_b, torch.where(mine_N, mine_N.cumsum(0) - 1, -1), store.read(entries, "hidden").to(device),
                store.read_head(device), rollout.rows(rollout.tokens_BT), cfg)


@torch.no_grad()
def likeliest(part: Part, k: int) -> dict[str, Tensor]:
    """Told of the rows of a part of hidden states, in their order."""
    found = []
    for row_n in (part.place_N >= 0).nonzero().squeeze(1).split(part.cfg.chunk_rows):
        logp_nV = log_probs(part.hidden_nE[part.place_N[row_n]], part.head_VE, part.cfg.temperature)
        found.append(told_of(logp_nV, part.token_N[row_n], k))
    return {name: torch.cat(values) for name, values in zip(Told._fields, zip(*found))}


class Cached:
    """A reader in front of another: from the disk where the step is there, else from the teacher and to the disk."""

    def __init__(self, reader, store: Store, meta: dict, cfg):
        self.reader, self.live, self.store, self.meta, self.cfg = reader, reader.read, store, meta, cfg
        self.model = getattr(reader, "model", None)

    def read(self, batch: Batch, sequence_b: Tensor):
        asked = asked_of(batch, sequence_b)
        entries = self.store.pick(asked)
        if entries is None:
            part, lengths = self.live(batch, sequence_b), batch.rollout.length_B[sequence_b].tolist()
            if isinstance(part, TopKPart):
                mine_N = torch.isin(batch.rollout.sequence_N, sequence_b)
                values = (part.id_NK.int(), part.logp_NK, part.tail_logp_N, part.token_logp_N)
                rows = {name: value_N[mine_N] for name, value_N in zip(Told._fields, values)}
            elif self.meta["topk"]:
                rows = likeliest(part, self.meta["topk"]["tokens"])
            else:
                self.store.keep_head(part.head_VE)
                rows = {"hidden": part.hidden_nE}
            self.store.append(asked, lengths, rows)
            if "hidden" in rows or isinstance(part, TopKPart):
                return part         # digit for digit what was written
            entries = self.store.pick(asked)
        return stored_part(self.store, entries, batch, sequence_b, self.cfg, self.meta)


class CachedTeacher(Teacher):
    """One plain teacher behind its cache."""

    def __init__(self, cached: Cached):
        super().__init__(cached.model, cached.cfg)
        self.read = cached.read


class FromDisk:
    """--teacher cache:FOLDER."""

    def __init__(self, cfg, setup, address: str):
        self.folder, self.context = Path(address.removeprefix(PREFIX)).expanduser(), 2**62
        self.meta, self.setup = read_meta(self.folder), setup
        compare(self.folder, described(cfg, setup.tokenizer, setup.dtype, None, self.meta["topk"]))
        self.store = Store(self.folder)

    def read(self, batch: Batch, sequence_b: Tensor):
        asked = asked_of(batch, sequence_b)
        entries = self.store.pick(asked)
        if entries is None:
            b = next(b for b, one in zip(sequence_b.tolist(), asked) if self.store.pick([one]) is None)
            raise UserError(f"step {batch.step}: {shown(self.folder)} holds nothing about this response to "
                            f"{batch.problems[b].place} of the data ({int(batch.rollout.length_B[b])} tokens): prompt, "
                            f"template or response are not those that the teacher read; run once with the teacher and "
                            f"--cache_teacher {shown(self.folder)}, or with the flags that wrote it")
        return stored_part(self.store, entries, batch, sequence_b, self.setup.cfg, self.meta)


ELSEWHERE[PREFIX] = FromDisk


# A run that writes

def subfolder(folder: Path, tag: str) -> Path:
    if tag and (not re.fullmatch(r"[\w.+-]+", tag) or tag.startswith(".")):
        raise UserError(f"--cache_teacher: the tag {shown(tag)} of a teacher cannot be the name of a folder; rename it")
    return folder / tag if tag else folder


def identity(run, reader, number: int) -> tuple[str, dict | None]:
    """(hash of a teacher, what it tells of the likeliest tokens or None)."""
    cfg = run.cfg
    if hasattr(reader, "identity"):
        said = reader.identity
        return digest(json.dumps(said).encode()), {"tokens": said["told"], "entropy": False}
    folders = list(getattr(run.kind, "folders", {}).values()) or [getattr(run.kind, "folder", run.tokenizer.folder)]
    rounded = b"int8" if getattr(cfg, "teacher_int8", False) else b""
    return digest(weights_hash(folders[number]).encode(), rounded), (
        {"tokens": cfg.cache_topk, "entropy": True} if cfg.cache_topk else None)


def cached(run, reader, number: int, folder: Path) -> Cached:
    teacher, topk = identity(run, reader, number)
    meta = described(run.cfg, run.tokenizer, run.student.compute_dtype, teacher, topk)
    return Cached(reader, Store(folder, meta, compare), meta, run.cfg)


def put_in_front(run, folder: Path) -> None:
    """Of every teacher of the run."""
    kind = run.kind
    if any(getattr(kind, "bridges", [])) or getattr(kind, "one_stop", ()):
        raise UserError("--cache_teacher: what a teacher with another tokenizer or other stop tokens says is fitted to "
                        "the student's words at each step and is not written; leave it out, or pass --stop_ids where "
                        "only those differ")
    if hasattr(kind, "readers"):
        kind.readers = [cached(run, reader, number, subfolder(folder, tag))
                        for number, (reader, tag) in enumerate(zip(kind.readers, kind.tags))]
    else:
        run.teacher = CachedTeacher(cached(run, run.teacher, 0, folder))


def attach(run) -> None:
    cfg = run.cfg
    if cfg.cache_teacher:
        put_in_front(run, Path(cfg.cache_teacher).expanduser())
    if cfg.cache_topk or any(read_meta(folder)["topk"] for folder in from_disk(cfg)):
        topk_part.watch(run)
