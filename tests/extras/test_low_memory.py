"""extras/low_memory.py: recomputed activations. Whole runs: test_low_memory_runs.py."""
from types import SimpleNamespace

import pytest
import torch
from model_cases import gradients, small

from extras import low_memory
from extras.lora import add_lora, projections


@pytest.mark.parametrize("lora", [False, True])
def test_gradient_checkpointing_changes_memory_and_no_gradient(lora):
    """fails if: forward ignores the flag, or use_reentrant=True (no gradients above a frozen embedding)."""
    model = small("qwen3", head_dim=8)
    if lora:
        add_lora(model, 2, 4.0)
        for linear in projections(model):
            torch.nn.init.normal_(linear.lora_B, 0.0, 0.1, generator=torch.Generator().manual_seed(5))
    plain, once = gradients(model)
    low_memory.attach(SimpleNamespace(cfg=SimpleNamespace(gradient_checkpointing=True, offload_optimizer=False),
                                      student=model))
    recomputed, twice = gradients(model)
    assert (once, twice) == (1, 2) and plain.keys() == recomputed.keys() and plain
    for name, gradient in plain.items():
        torch.testing.assert_close(recomputed[name], gradient)
