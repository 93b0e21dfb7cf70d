"""--compile: a compiled step learns what a plain one does."""
import pytest
import torch
from helpers import one_step, ready

import losses
from extras import compile as compile_file
from model import Linear


@pytest.mark.parametrize("flags", [{}, {"samples": 8}, {"gradient_checkpointing": True, "lora_rank": 2},
                                   {"teacher": "self"}], ids=str)
def test_a_compiled_run_learns_the_same(command, monkeypatch, flags):
    """Traced as for a real backend, run as plain torch.
    fails if: the warm-up leaves a gradient, moves a weight or leaves something for the first step to compile, the loss
    is not compiled, or some pass of a step is traced wrongly."""
    compile, weights, graphs = torch.compile, [], []
    def plain(graph, inputs):
        graphs.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=plain, **options))
    for owner, name in ((losses, "few_rows"), (Linear, "forward")):
        monkeypatch.setattr(owner, name, getattr(owner, name))     # put back afterwards
    compile_file.fused_rows.cache_clear()
    torch._dynamo.reset()
    for how in (None, True):
        run = ready(command, compile=how, lr=0.1, **flags)
        assert (run.student.forward.__module__ == "extras.compile") == bool(how)
        for warm_up in run.before_first_step:
            warm_up(run, None, None)
            assert not any(p.grad is not None and p.grad.any() for p in run.student.parameters())
        warm = len(graphs)
        one_step(run)
        weights.append(torch.cat([p.detach().flatten() for p in run.student.parameters()]))
    assert len(graphs) == warm and any("log_softmax" in graph.code for graph in graphs)
    compile_file.fused_rows.cache_clear()
    compiled, plain = reversed(weights)
    assert (compiled - plain).norm() / plain.norm() < 1e-6
