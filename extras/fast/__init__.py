"""Faster ways of the same passes, put in place of one named function of the core each, wherever they can run.

    flash.py    attention of packed micro-batches and of a KV cache, on a GPU in half precision
    graphs.py   decode steps recorded as CUDA graphs
    cpu.py      the head packed for a few rows; grouped bfloat16 attention of a decode step
    packed.py   a decode step of a small float32 model on a CPU, in fewer calls

The plain function is the specification: tests/extras/ hold each way to it.
"""
from extras.fast import cpu, flash, graphs, packed


def on_model(model) -> None:
    cpu.on_model(model)
    flash.on_model(model)
    graphs.on_model(model)
    packed.on_model(model)
