"""Teachers that do not fit: layers that wait in host memory, weights of eight bits.

    --teacher_memory park    a teacher's layers come to the device for its passes alone: once a step, to score
    --teacher_memory stream  one layer after the other comes, once a step for all of its sequences: their states are
                             carried from layer to layer, and the next layer is on its way while this one works
    --teacher_int8           the projections of the layers as int8 (int8.py), with either or alone

The last norm and the head stay on the device; an embedding that is not the head is parked too, and looked up in host
memory when the layers are streamed. Every product is that of a resident teacher, in the same order. In place of a
teacher's read, forward and embed; and of rollout.respond, since a parked teacher visits to write or be evaluated, too.
"""
import warnings
from contextlib import nullcontext, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import rollout as rollout_file
from extras import int8
from extras.given import has_teacher_write
from model import CAUSAL, Causal, Transformer
from support import memory
from support.extras import offers
from support.flags import opt

plain_respond = rollout_file.respond


@dataclass(frozen=True)
class Flags:
    teacher_memory: str = opt("resident", "the teacher's layers lie on the device, come there from host memory once a "
                                          "step, or come one by one while the layer before works",
                              ("resident", "park", "stream"))
    teacher_int8: bool = opt(False, "the projections in the teacher's layers as int8, one scale per output row; prints "
                                    "how far it is from the teacher as it was loaded")


def named(cfg) -> str:
    """The flags of this file that are on, as they are given."""
    return " ".join([f"--teacher_memory {cfg.teacher_memory}"] * (cfg.teacher_memory != "resident")
                    + ["--teacher_int8"] * cfg.teacher_int8)


def rules(cfg) -> list[tuple[bool, str]]:
    flags = named(cfg)
    if not flags:
        return []
    return [
        (cfg.teacher != "none", f"{flags} is about a teacher's weights; there is no teacher (--teacher none)"),
        (cfg.teacher != "self", f"{flags}: --teacher self has no weights that could lie elsewhere; leave it out"),
        (cfg.teacher_memory != "stream" or not has_teacher_write(cfg),
         "--teacher_memory stream: such a teacher scores and cannot write responses, for which every token would need "
         "all layers again; pass --teacher_memory park"),
        (memory.processes() == 1, f"{flags} runs in one process; several already share the teacher out; leave it out"),
    ]


def before_loading(cfg, setup) -> None:
    if named(cfg):
        setup.teacher_device = torch.device("cpu")


def attach(run) -> None:
    if not named(run.cfg):
        return
    place, device = {"resident": stay, "park": park, "stream": stream}[run.cfg.teacher_memory], run.student.device
    for number, model in enumerate(run.kind.models):
        if run.cfg.teacher_int8:
            # read layer by layer before and after, wherever it will lie: as it was loaded it may not fit
            int8.quantise_teacher(run, number, lambda: stream(model, device, lock=False))
        place(model, device)
    if run.cfg.teacher_memory == "park":
        rollout_file.respond = respond
    if run.cfg.teacher_memory == "stream":
        run.kind.held_out = lambda run: []
        if run.cfg.eval_teacher:
            print("teacher  not evaluated itself: --teacher_memory stream reads whole sequences and writes no answers")


# Where weights lie

def stay(model: Transformer, device: torch.device) -> None:
    """All of it on the device."""
    plain_ways(model.to(device))


def plain_ways(model: Transformer) -> None:
    """The model's own read, forward and embed; and what is faster where its norm lies now: it was loaded elsewhere."""
    for name in ("read", "forward", "embed"):
        model.__dict__.pop(name, None)
    for faster in offers("on_model"):
        faster(model)


def send_head(model: Transformer, device: torch.device) -> list[nn.Parameter]:
    """Norm and head to the device, for good; from the norm a model tells where it is. Returns the other parameters."""
    there = (model.model.norm.weight, model.head_weight())
    for parameter in there:
        parameter.data = parameter.data.to(device)
    plain_ways(model)
    return [parameter for parameter in model.parameters() if all(parameter is not other for other in there)]


def page_locked(home: Tensor) -> Tensor:
    """What a GPU is to copy while it works must be locked in host memory. In place: Tensor.pin_memory() takes the next
    power of two bytes, an eighth more for Qwen3-32B. Blocks too small for pages of their own are copied there."""
    if home.nbytes < memory.MAPPED:
        return home.pin_memory()
    if int(torch.cuda.cudart().cudaHostRegister(home.data_ptr(), home.nbytes, 0)) != 0:
        warnings.warn("a teacher's weights could not be locked in host memory: the device waits while they are copied")
        with suppress(RuntimeError):        # the next kernel reports the refusal once more
            torch.zeros(1, device="cuda")
    return home


def copied(home: Tensor, device: torch.device, side: torch.cuda.Stream | None) -> Tensor:
    """The one way of a weight to the device; on a CPU a copy, too. Its memory is that of the stream which works."""
    copy = torch.empty_like(home, device=device)
    with torch.cuda.stream(side):
        return copy.copy_(home, non_blocking=True)


class Guests:
    """Weights whose home is host memory."""

    def __init__(self, parameters: list[nn.Parameter], device: torch.device, side: torch.cuda.Stream | None,
                 lock: bool = True):
        """side: the stream of the copies; None on a device that has none."""
        self.parameters, self.device, self.side = parameters, device, side
        for parameter in parameters if side and lock else ():
            parameter.data = page_locked(parameter.data)
        self.home = [parameter.data for parameter in parameters]

    def arrive(self) -> None:
        """Begin to copy, beside what the device is doing; but after the work that last used this memory."""
        if self.side:
            self.side.wait_stream(torch.cuda.current_stream())
        for parameter, home in zip(self.parameters, self.home):
            parameter.data = copied(home, self.device, self.side)

    def begin(self) -> None:
        """The device's work from here on waits for the copies."""
        if self.side:
            torch.cuda.current_stream().wait_stream(self.side)

    def leave(self) -> None:
        for parameter, home in zip(self.parameters, self.home):
            parameter.data = home

    def __enter__(self) -> None:
        self.arrive()
        self.begin()

    def __exit__(self, *error) -> None:
        self.leave()


def side_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.Stream(device) if device.type == "cuda" else None


# Parked

def park(model: Transformer, device: torch.device) -> None:
    guests = Guests(send_head(model, device), device, side_stream(device))
    read = model.read

    def parked_read(*asked):
        with guests:
            yield from read(*asked)
    model.read, model.guests = parked_read, guests


def respond(model: Transformer, *asked, **settings):
    """rollout.respond, for which a parked teacher comes to the device."""
    with getattr(model, "guests", nullcontext()):
        return plain_respond(model, *asked, **settings)


# Streamed

@dataclass
class Pass:
    """One forward pass, carried from layer to layer."""
    x_BTD: Tensor
    rope: tuple[Tensor, Tensor]
    keys: Causal
    seen: object


def stream(model: Transformer, device: torch.device, lock: bool = True) -> None:
    """model.read runs twice: the first time its forward passes are noted, the second time they are answered. So it may
    cut the sequences as it likes."""
    send_head(model, device)
    side, table, read = side_stream(device), model.model.embed_tokens.weight, model.read
    guests = [Guests(list(layer.parameters()), device, side, lock) for layer in model.model.layers]
    model.embed = lambda tokens_BT: type(model).embed(model, tokens_BT.to(table.device)).to(device)

    def streamed_read(*asked):
        passes: list[Pass] = []

        def note(tokens_BT: Tensor, keys: Causal = CAUSAL) -> Tensor:
            at_BT, seen = keys.begin(tokens_BT)
            passes.append(Pass(model.embed(tokens_BT).to(model.compute_dtype), model.rope(at_BT), keys, seen))
            return passes[-1].x_BTD
        model.forward = note
        for _ in read(*asked):
            pass
        carry(model.model.layers, guests, passes)
        model.forward = lambda tokens_BT, keys=CAUSAL: model.model.norm(passes.pop(0).x_BTD)
        yield from read(*asked)
    model.read, model.only_reads = streamed_read, True


def carry(layers: nn.ModuleList, guests: list[Guests], passes: list[Pass]) -> None:
    """All passes through layer after layer. Two layers at most are on the device: one at work, one on its way."""
    guests[0].arrive()
    for number, layer in enumerate(layers):
        guests[number].begin()
        for following in guests[number + 1:number + 2]:
            following.arrive()
        for one in passes:
            one.x_BTD = layer(one.x_BTD, one.rope, one.keys, one.seen)
        guests[number].leave()
