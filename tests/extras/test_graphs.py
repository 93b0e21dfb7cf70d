"""extras/fast/graphs.py: recorded decode steps write the text of steps that are launched one by one."""
import pytest
import torch
from rollout_cases import same, small, write

import rollout as rollout_file
from extras.fast import flash, graphs, ways


@pytest.mark.parametrize("slots", [5, 64])
def test_recorded_steps_write_the_same_text(slots, gpu_paths, monkeypatch):
    """Rows are rounded up to a power of two or all slots, and the rows to spare decode along.
    fails if: the step that is recorded is not replayed, a free slot counts on, or each number of rows is recorded."""
    monkeypatch.setattr(rollout_file, "LOOK_EVERY", (1, 3))
    (recorded, replayed, launched), asked = gpu_paths, []
    monkeypatch.setattr(rollout_file.Slots, "decode", lambda pool: asked.append(1) or graphs.decode(pool))
    model = small()
    flash.on_model(model)
    found = write(model, slots=slots)
    assert torch.cuda.CUDAGraph.pools == [()] + [("pool",)] * (len(recorded) - 1), "graphs share their memory"
    monkeypatch.undo()
    wanted = write(small(), slots=slots)
    assert same(found, wanted) and (found.logp_BT - wanted.logp_BT).abs().max() < 1e-5
    assert len(set(recorded)) == len(recorded) and set(recorded) <= {1, 2, 4, 8, 16, 21, slots}
    assert len(asked) == len(launched) + len(replayed) and len(set(launched)) == len(launched)
    assert len(replayed) > len(recorded) and set(replayed) == set(recorded)


def test_graphs_come_with_a_cache_that_reads_each_slots_own_length(gpu_paths):
    """fails if: on_model() replaces decode() for every model, or a way that stands aside still records"""
    plain = rollout_file.Slots.decode
    graphs.on_model(small())
    assert rollout_file.Slots.decode is plain
    model = small()
    flash.on_model(model)
    graphs.on_model(model)
    assert rollout_file.Slots.decode is graphs.decode
    recorded, replayed, launched = gpu_paths
    wanted = write(small())
    assert not recorded and not replayed
    launched.clear()
    assert same(write(model), wanted) and recorded and replayed
    counts = len(recorded), len(replayed)
    ways.aside.add("graphs")
    assert same(write(model), wanted) and (len(recorded), len(replayed)) == counts
