"""extras/fast/borrowed.py: an update that multiplies with the sampler's copy takes the same steps, and keeps no cast
weights."""
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from extras.fast import borrowed, ways
from rollout_cases import small, write


@pytest.mark.parametrize("flags", [{}, dict(updates=2), dict(gradient_checkpointing=True), dict(recipe="gkd")], ids=str)
def test_the_same_steps_are_taken(command, tmp_path, flags):
    """bfloat16, bit for bit; with several updates a step, and on responses that the student did not write.
    fails if: the copy lags behind the weights, a gradient is rounded elsewhere, or the way is not taken."""
    found = []
    for name, plain in (("borrowed", ""), ("plain", "borrowed_copy")):
        assert train.main(command(name=name, dtype="bfloat16", steps=3, lr=0.01, plain=plain, **flags)) == 0
        assert ("borrowed_copy" in ways.in_use()) == (not plain)
        records = map(json.loads, (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines())
        found.append(json.dumps([(record["loss"], record["grad_norm"], record["reverse_kl"])
                                 for record in records if "loss" in record]))
        found.append((tmp_path / "runs" / name / "last" / "model.safetensors").read_bytes())
    assert found[:2] == found[2:]


class Casts(TorchDispatchMode):
    """Counts the entries of matrices that are cast to another dtype."""
    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].dim() == 2:
            self.entries += args[0].numel()
        return function(*args, **(kwargs or {}))


def test_no_projection_is_cast():
    """fails if: the weights are cast once more for a micro-batch"""
    student, rollout, counted = small(), write(small()), []
    student.compute_dtype = torch.bfloat16
    actor = student.copy_as(torch.bfloat16)
    for borrows in (False, True):
        if borrows:
            borrowed.borrow(student, actor)
        with Casts() as casts:
            for hidden_nD, _ in student.read(rollout, rollout.every_B, 200):
                hidden_nD.float().sum().backward()
        counted.append(casts.entries)
    projections = sum(p.numel() for name, p in student.named_parameters() if "_proj" in name)
    micro_batches = sum(1 for _ in rollout.micro_batches(rollout.every_B, 200))
    # forward and, of the gradients, back: the latter is needed in both
    assert counted[0] - counted[1] == micro_batches * projections


def test_a_float32_pass_uses_the_weights_themselves():
    """The proof at start compares with one. fails if: it multiplies with the rounded copy."""
    student = small()
    wanted = student(torch.arange(12)[None])
    student.compute_dtype = torch.bfloat16
    borrowed.borrow(student, student.copy_as(torch.bfloat16))
    student.compute_dtype = torch.float32
    assert torch.equal(student(torch.arange(12)[None]), wanted)


def test_adapters_are_not_lent():
    """fails if: a student whose copy holds merged adapters multiplies with that copy"""
    from extras.lora import add_lora
    student = small()
    assert borrowed.lends(student, student.copy_as(torch.bfloat16)) and not borrowed.lends(student, student)
    actor = student.copy_as(torch.bfloat16)
    add_lora(student, 2, 8.0)
    assert not borrowed.lends(student, actor)
