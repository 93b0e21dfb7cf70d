"""Faster ways: proved at start on the run's own models, the plain way where that fails.

Each takes the place of one named function of the core, wherever it can run:

    cpu.py      the head packed for a few rows; grouped bfloat16 attention of a decode step
    packed.py   a decode step of a small float32 model on a CPU, in fewer calls
    flash.py    attention of packed micro-batches and of a KV cache, on a GPU in half precision
    graphs.py   decode steps recorded as CUDA graphs
    merged.py   fewer and larger products in the layers of a model that is not trained, on a GPU
    borrowed.py the update multiplies with the sampler's copy of the weights
    ways.py     which ways there are, and which stand aside
    proof.py    the proof at start
    young.py    functions of torch that may be missing

The plain function is the specification: tests/extras/ hold each way to it.
"""
from dataclasses import dataclass

from extras.fast import borrowed, cpu, flash, graphs, merged, packed, ways
from extras.fast.proof import prove
from support import memory
from support.flags import opt


@dataclass(frozen=True)
class Flags:
    plain: str = opt("", f"faster ways to leave out, separated by commas, or all: {', '.join(ways.WAYS)}")


def before_loading(cfg, setup) -> None:
    ways.begin(cfg.plain)


def on_model(model) -> None:
    cpu.on_model(model)
    flash.on_model(model)
    graphs.on_model(model)
    packed.on_model(model)


def of_a_run(student, actor, models, compiles: bool) -> None:
    """The ways that depend on which model of a run learns, and which one writes."""
    for model in models:
        if merged.mergeable(model):
            merged.merge(model)
    if borrowed.lends(student, actor) and not compiles:     # compiled layers cast by themselves
        borrowed.borrow(student, actor)


def attach(run) -> None:
    if memory.processes() == 1:        # several cut the parameters up
        of_a_run(run.student, run.actor, run.models(), getattr(run.cfg, "compile", False))
        run.before_first_step.append(prove)
