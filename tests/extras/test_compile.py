"""extras/compile.py: compiled layers and decode steps compute what plain ones do, and are traced a few times, not for
each length. Traced as for a real backend, run as plain torch.
"""
from types import SimpleNamespace

import pytest
import torch
from model_cases import gap, gradients, small, tokens
from rollout_cases import ragged, same, write
from rollout_cases import small as writer

from extras import compile as compile_file
from extras import low_memory
from extras.compile import compile_model
from model import KVCache


@pytest.fixture
def eager(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def recompute(model):
    low_memory.attach(SimpleNamespace(cfg=SimpleNamespace(gradient_checkpointing=True, offload_optimizer=False),
                                      student=model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_compute_the_same_gradients(eager, checkpointing):
    """Traced as for a real backend, run as plain torch; two layers and three shapes are one or two traces, more rows
    and a pass with a cache none.
    fails if: compile_model() compiles each layer, each length, anew from some number of rows on, or passes through
    the cache as well."""
    model, rows = small("qwen3", head_dim=8), tokens(3, 20)
    if checkpointing:
        recompute(model)
    wanted, _ = gradients(model)
    compile_model(model)
    found, _ = gradients(model)
    assert found.keys() == wanted.keys() and all(gap(found[name], wanted[name]) < 1e-5 for name in wanted)
    model(rows), model(rows[:2, :7])
    traced = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    model(tokens(9, 11)), model(tokens(40, 5)), model(rows, KVCache(model, 3, 20))
    assert 1 <= traced <= 3 and torch._dynamo.utils.counters["stats"]["unique_graphs"] == traced


@pytest.mark.parametrize("biases", [False, True])
def test_compiled_decode_step_is_traced_a_few_times_and_writes_the_same_text(eager, biases):
    """Traced as for a real backend, run as plain torch. Live slots go from three to one, lengths up to 29.
    fails if: the decode step is specialised on a length or a number of slots, Slots.step skips the cache, or the
    product with the weight as left factor loses its bias."""
    case = dict(prompts=ragged()[:4], samples=1, max_new_tokens=[6, 12, 9, 3], slots=3)
    model = writer(attention_bias=biases)
    wanted = write(model, **case)
    compile_file.attach(SimpleNamespace(cfg=SimpleNamespace(compile=True), student=model, models=lambda: {model},
                                        before_first_step=[]))
    assert same(write(model, **case), wanted)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
