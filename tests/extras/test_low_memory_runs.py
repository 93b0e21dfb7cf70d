"""--offload_optimizer: moments that live in host memory."""
import torch
from helpers import one_step, ready

from extras.low_memory import move_moments


def test_offloaded_moments_visit_and_train_the_same(command):
    """fails if: a moment is left behind, the step count moves, or the weights come out differently."""
    weights = []
    for offload in (None, True):
        run = ready(command, offload_optimizer=offload)
        optimizer = run.make_optimizer(run.student, run.cfg)
        for step in range(2):
            one_step(run, optimizer, step)
        weights.append([p.clone() for p in run.student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    move_moments(optimizer, "meta")
    for state in optimizer.state.values():
        assert {key for key, value in state.items() if value.device.type == "meta"} == {"exp_avg", "exp_avg_sq"}
