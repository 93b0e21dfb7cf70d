"""A teacher on another machine: --teacher http://host:port, where serve_teacher.py serves any model.

To everything else it is a checkpoint folder with small files, and a model that reads: so several teachers, privileged
prompts, other tokenizers and every loss work as with a model in this process. What goes over the line are the ids of a
micro-batch, and back come its hidden states in the dtype of the products; the head comes once. Cut into the same
micro-batches as here, the digits are the same.

    --teacher_topk K    too many bytes? K log-probs and the mass of the rest instead: remote_topk.py
    remote_line.py      requests, repetitions, the deadline
    remote_wire.py      what is said

The sampler has written a whole step before its first micro-batch is asked for: micro-batches are cut from all of its
responses, and others would round otherwise than in one process.
"""
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from extras import remote_topk
from extras.fast import flash
from extras.given import has_teacher_write
from extras.remote_line import Line, in_flight, is_url
from extras.remote_wire import SPARE, TOKEN, digest, packed, unpacked
from model import Transformer
from support import memory, run_folder
from support.errors import UserError, read_json
from support.flags import opt
from support.model_config import ModelConfig
from support.tokenizer import MOST_BYTES
from support.weights import load_config

PINNED = "remote_teachers.json"         # in the run folder: address -> hash of the weights
SERVED_AT = "served_at"                 # in the config.json of such a folder, for the memory plan


@dataclass(frozen=True)
class Flags:
    teacher_topk: int = opt(0, "send the so many largest log-probs of each token and the mass of the rest instead of "
                               "hidden states; 0 = hidden states, with which every loss is exact", high=10_000)
    teacher_token: str = opt("", f"what its server was started with; better in the environment as {TOKEN}, where no "
                                 f"list of processes shows it")
    teacher_deadline: float = opt(600.0, "seconds without an answer, repetitions included, after which the run ends "
                                         "with one sentence", low=1, high=10**6)


@dataclass
class Settings:
    """Of the run in this process; eval.py has no flags for them."""
    token: str = ""
    deadline: float = 600.0


class Served(NamedTuple):
    """A server, and what it said of itself."""
    line: Line
    said: dict


SETTINGS, SERVED = Settings(), {}       # SERVED: the folder of its small files -> Served
run_folder.KNOWN[PINNED.replace(".", r"\.")] = run_folder.FILE


def addresses(cfg) -> list[str]:
    """The teachers that are served elsewhere."""
    names = [cfg.teacher] if "=" not in cfg.teacher else [part.partition("=")[2] for part in cfg.teacher.split(",")]
    return [name for name in names if is_url(name)]


def rules(cfg) -> list[tuple[bool, str]]:
    here = [(not is_url(getattr(cfg, name)), f"--{name} {getattr(cfg, name)}: this model works in this process; give "
                                             f"its folder or hub id") for name in ("student", "reference")]
    if not addresses(cfg):
        return here + [(not cfg.teacher_topk, "--teacher_topk is about a teacher on another machine (--teacher "
                                              "http://host:port)")]
    url, elsewhere = addresses(cfg)[0], "its weights are in another process"
    return here + [
        (not has_teacher_write(cfg), f"--teacher {url} reads and does not write responses; use --responses solution, "
                                     f"and no --cold_start_steps or --pts_weight"),
        (cfg.teacher_memory == "resident" and not cfg.teacher_int8,
         f"--teacher {url}: {elsewhere}; leave out --teacher_memory and --teacher_int8"),
        (not (cfg.teacher_token and cfg.wandb),
         f"--teacher_token would go to Weights & Biases with all flags; put it into the environment as {TOKEN}"),
    ] + remote_topk.rules(cfg)


def before_loading(cfg, setup) -> None:
    SETTINGS.token, SETTINGS.deadline = cfg.teacher_token, cfg.teacher_deadline


# As a folder, and as a model

def served_folder(name: str) -> Path | None:
    """A folder with the small files of what is served there, if `name` is an address."""
    if not is_url(name):
        return None
    line = Line(name, SETTINGS.token or os.environ.get(TOKEN, ""), SETTINGS.deadline)
    said = line.hello()
    place = keep_files(line, said["files"])
    SERVED[place] = Served(line, said)
    return place


def keep_files(line: Line, files: dict[str, str]) -> Path:
    """Asked for once: the folder is named after what is in it, and each file is written whole or not at all."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    place = caches / "opd-teachers" / digest(json.dumps([line.url, sorted(files.items())]).encode())[:32]
    try:
        place.mkdir(parents=True, exist_ok=True)
        for name, wanted in files.items():
            if not (place / name).exists():
                body = line.file(name, wanted, MOST_BYTES)
                part = place / f"{name}.{os.getpid()}.part"
                part.write_bytes(marked(body, line.url) if name == "config.json" else body)
                run_folder.flush(part)
                os.replace(part, place / name)
    except OSError as error:
        raise UserError(f"{place} cannot be written ({error.strerror}), where the small files of {line.url} are kept; "
                        f"set XDG_CACHE_HOME to a folder of yours") from error
    return place


def marked(config: bytes, url: str) -> bytes:
    """config.json that says where the weights are."""
    try:
        return json.dumps(json.loads(config) | {SERVED_AT: url}, indent=2).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{url}: its config.json is no JSON object; correct it there") from error


def served_model(folder: Path, dtype: torch.dtype, device: torch.device | str) -> "RemoteModel | None":
    """The model of such a folder."""
    served = SERVED.get(folder)
    if served is None:
        return None
    theirs = getattr(torch, served.said["dtype"])
    if theirs != dtype:
        raise UserError(f"{served.line.url} multiplies in {served.said['dtype']}, this run in "
                        f"{str(dtype).removeprefix('torch.')}; start the server, or the run, with the other's --dtype")
    return RemoteModel(served, load_config(folder), dtype, torch.device(device))


class RemoteModel:
    """What the rest of the program asks of a model that scores."""

    def __init__(self, served: Served, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        self.line, self.said = served
        self.config, self.compute_dtype, self.device = config, dtype, device
        self.title, self.vocab_size = "the model", self.said["vocab_size"]
        self.short: remote_topk.Short | None = None     # how rows come instead of hidden states
        self.kept: Tensor | None = None

    def requires_grad_(self, wanted: bool) -> "RemoteModel":
        return self

    def parameters(self):
        return iter(())

    @property
    def cache_type(self):
        raise UserError(f"{self.line.url} reads and does not write; give a folder or a hub id instead")

    def head(self) -> "Tensor | remote_topk.Short":
        """(vocab_size, E), asked for once and checked; or how to read rows that need none."""
        if self.short:
            return self.short
        if self.kept is None:
            body = self.line.file("head", self.said["head"], self.said["head_bytes"])
            shape = self.vocab_size, self.config.hidden_size
            self.kept = tensors_of(body, self.line.url, head_VE=(self.compute_dtype, shape))["head_VE"].to(self.device)
        return self.kept

    def read(self, rollout, sequence_b: Tensor, max_tokens: int):
        """As Transformer.read. The micro-batches are those that the served model would cut; the next ones are on their
        way while one is at work."""
        cut = flash.read.__wrapped__ if self.said["lengths"] else Transformer.read
        passes = list(cut(Noted(), rollout, sequence_b, min(max_tokens, self.said["most_tokens"])))
        for (_, row_n), hidden_nE in zip(passes, in_flight(self.score, [inputs for inputs, _ in passes])):
            yield hidden_nE.to(self.device), row_n

    def score(self, inputs: tuple) -> Tensor:
        tokens_BT, mask_BT, *keys = inputs
        asked = {"tokens_BT": tokens_BT.int(), "mask_BT": mask_BT}
        if keys:
            asked["lengths_S"] = torch.tensor(keys[0].lengths, dtype=torch.int32)
        rows = int(mask_BT.sum())
        if self.short:
            wanted = self.short.wanted(rows)
            body = self.line.ask("/score", packed(**asked, **self.short.asked()), self.short.bytes * rows + SPARE)
            return self.short.joined(tensors_of(body, self.line.url, **wanted))
        wanted = self.compute_dtype, (rows, self.config.hidden_size)
        most = rows * self.config.hidden_size * self.compute_dtype.itemsize + SPARE
        return tensors_of(self.line.ask("/score", packed(**asked), most), self.line.url, hidden_NE=wanted)["hidden_NE"]


class Noted:
    """In place of a model whose passes are to be noted, not made."""

    def response_hidden(self, *inputs) -> tuple:
        return inputs


def tensors_of(body: bytes, url: str, **wanted: tuple[torch.dtype, tuple]) -> dict[str, Tensor]:
    """The tensors of a body, which must be the wanted ones."""
    try:
        found = unpacked(body)
    except ValueError:
        found = {}
    if {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()} != wanted:
        raise UserError(f"{url} answers with other tensors than were asked for; start the same version of this project "
                        f"there")
    return found


# In a run

def attach(run) -> None:
    remote = [model for model in run.kind.models if isinstance(model, RemoteModel)]
    if not remote:
        return
    held_out, models = run.kind.held_out, run.models
    run.kind.held_out = lambda run: [row for row in held_out(run) if not isinstance(row[1], RemoteModel)]
    run.models = lambda: {model for model in models() if not isinstance(model, RemoteModel)}
    if run.cfg.eval_teacher:
        print("teacher  not evaluated itself: a teacher on another machine reads and writes no answers")
    run.before_first_step.append(lambda run, folder, state: pin(remote, folder, state))
    if run.cfg.teacher_topk:
        for model in remote:
            model.short = remote_topk.Short(run.cfg, model.vocab_size)
            model.config = replace(model.config, hidden_size=model.short.columns)
            model.compute_dtype = torch.float32
        remote_topk.attach(run)


def pin(remote: list[RemoteModel], folder, state) -> None:
    """UserError when a run that goes on finds another teacher at its address than it began with."""
    found, path = {model.line.url: model.said["weights"] for model in remote}, folder.path / PINNED
    if state is None:
        folder.keep(PINNED, json.dumps(found))
    before = read_json(path, optional=True)
    if other := [url for url in found if before.get(url) != found[url]]:
        raise UserError(f"{other[0]} serves another teacher (weights {found[other[0]][:12]}) than this run began with "
                        f"({str(before.get(other[0]))[:12]}); serve that one again, or pass another --name")


# In the memory plan: the head and the states are here, the weights and their passes are not

plain_bytes, plain_pass = memory.teacher_bytes, memory.forward_pass
plain_evaluation, plain_scorers = memory.evaluation, memory.scorers


def teacher_bytes(cfg, job, teacher) -> memory.TeacherBytes:
    if SERVED_AT not in teacher.config.raw:
        return plain_bytes(cfg, job, teacher)
    c = teacher.config
    head = c.vocab_size * c.hidden_size * memory.compute_dtype(cfg, job.device).itemsize
    return memory.TeacherBytes(0 if cfg.teacher_topk else head, visit=0, wait=0)


def forward_pass(c: ModelConfig, tokens: int, item: int) -> int:
    """Of a remote one: its states as they arrive, and as a tensor."""
    return 2 * tokens * item * c.hidden_size if SERVED_AT in c.raw else plain_pass(c, tokens, item)


def evaluation(cfg, job) -> int:
    here = [teacher for teacher in job.teachers if SERVED_AT not in teacher.config.raw]
    return plain_evaluation(cfg, replace(job, teachers=here))


def scorers(cfg, job) -> list[memory.Sized]:
    """With --teacher_topk a row is as wide as what is sent of it, in float32."""
    wide = remote_topk.columns(cfg.teacher_topk) * 4 // memory.compute_dtype(cfg, job.device).itemsize
    return [one._replace(config=replace(one.config, hidden_size=wide))
            if cfg.teacher_topk and SERVED_AT in one.config.raw else one for one in plain_scorers(cfg, job)]


memory.teacher_bytes, memory.forward_pass = teacher_bytes, forward_pass
memory.evaluation, memory.scorers = evaluation, scorers
