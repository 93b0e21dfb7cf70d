"""extras/fast: a faster way that is missing or wrong on this machine stands aside with one sentence, and the run goes
on with the plain way's digits."""
import json

import pytest
import torch

import rollout as rollout_file
import train
from extras import fast
from extras.fast import cpu, flash, graphs, merged, packed, proof, ways
from model import KVCache
from model_cases import CASES
from model_cases import small as of_family
from rollout_cases import same, small, write

GPU_WAYS = ("merged_layers", "flash_rows", "flash_cache", "graphs")


def digits(folder):
    """Every number of a run's steps that does not tell time, as text: NaN equals itself there."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return "\n".join(json.dumps({key: value for key, value in record.items() if "second" not in key})
                     for record in records if "loss" in record)


@pytest.fixture
def run(command, tmp_path, capsys, monkeypatch):
    """run(name, flags) -> (its digits, what it printed)."""
    monkeypatch.setattr(fast, "prove", proof.prove)

    def once(name, **flags):
        assert train.main(command(name=name, dtype="float32", max_new_tokens=12, **flags)) == 0
        return digits(tmp_path / "runs" / name), capsys.readouterr().out
    return once


@pytest.fixture
def every_way(gpu_paths, monkeypatch):
    """The ways of a GPU on a CPU: the kernel and the recording have stand-ins, the rest is what runs there."""
    monkeypatch.setattr(merged, "mergeable", lambda model: not any(p.requires_grad for p in model.parameters()))
    return gpu_paths


# What a way can do wrong, applied to the function that does its work

def raises(function):
    def broken(*args, **kwargs):
        raise RuntimeError("no kernel image is available\nfor this device")
    return broken


def not_a_number(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * torch.nan


def off_by_a_hundredth(function):
    return lambda *args, **kwargs: function(*args, **kwargs) * 1.01


# name -> (where the function that does its work stands, its name)
WORK = {
    "packed_head": (cpu, "packed_product"),
    "flash_rows": (flash, "packed_attention"),
    "flash_cache": (flash, "decode_attention"),
    "merged_layers": (merged, "rotated"),
}


@pytest.fixture
def plainly(every_way, run, plain_digits):
    """plainly(name) -> the digits of a run in which that way, and no other, is left out; each is run once."""
    def once(name):
        if name not in plain_digits:
            plain_digits[name], out = run("plain", plain=name)
            assert f"{name}:" not in out and f"{name}," not in out and "aside" not in out
        return plain_digits[name]
    return once


@pytest.fixture(scope="module")
def plain_digits():
    return {}


def sentence(out, name):
    """The one sentence that says that this way, and no other, stands aside."""
    said = [line for line in out.splitlines() if "stands aside" in line]
    assert len(said) == 1 and said[0].startswith(f"fast    {name} stands aside in this run"), said
    return said[0]


def test_every_way_is_proved_and_named(every_way, run):
    """fails if: the proof is not run, a way is not in its place, or a right one is sent away"""
    _, out = run("all")
    line = next(line for line in out.splitlines() if line.startswith("fast"))
    assert line.startswith(f"fast    packed_head, {', '.join(GPU_WAYS)}: as exact as the plain ways (")
    recorded, replayed, _ = every_way
    assert recorded and len(replayed) > 20


@pytest.mark.parametrize("fault", [raises, not_a_number, off_by_a_hundredth])
@pytest.mark.parametrize("name", WORK)
def test_a_broken_way_ends_with_the_plain_digits(name, fault, plainly, run, monkeypatch):
    """fails if: an exception ends the run, a wrong number passes, another way is blamed, or something is left behind"""
    wanted = plainly(name)
    place, function = WORK[name]
    monkeypatch.setattr(place, function, fault(getattr(place, function)))
    found, out = run("broken")
    assert found == wanted
    said = sentence(out, name)
    assert ("RuntimeError: no kernel image is available for this device" in said) == (fault is raises)


@pytest.mark.parametrize("fault", [raises, not_a_number, off_by_a_hundredth])
def test_a_broken_packed_step_ends_with_the_plain_digits(fault, run, monkeypatch):
    """On a CPU without the ways of a GPU. fails if: a small model's decode step is not proved"""
    wanted, _ = run("plain", plain="packed_step")
    monkeypatch.setattr(packed, "decode_layer", fault(packed.decode_layer))
    found, out = run("broken")
    assert found == wanted
    sentence(out, "packed_step")


def test_a_kernel_that_is_right_only_for_equal_lengths_is_found(plainly, run, monkeypatch):
    """Every sequence is read as long as the first. fails if: the proof uses rows of one length."""
    wanted = plainly("flash_cache")
    attend = flash.decode_attention

    def first_length_for_all(q_SQH, k_MRH, v_MRH, at):
        alike = flash.Packing(at.first_q, at.first_k, at.longest_q, at.longest_k, at.used_k[:1].expand_as(at.used_k))
        return attend(q_SQH, k_MRH, v_MRH, alike)
    monkeypatch.setattr(flash, "decode_attention", first_length_for_all)
    found, out = run("broken")
    assert found == wanted and "sampling is off by" in sentence(out, "flash_cache")


def test_packed_rows_that_see_each_other_are_found(plainly, run, monkeypatch):
    """fails if: the packed rows of the proof hold one sequence each"""
    wanted = plainly("flash_rows")
    monkeypatch.setattr(flash.Packed, "begin", lambda packed, tokens_BT: (
        flash.Causal().begin(tokens_BT)[0], flash.Packing(*[torch.tensor([0, tokens_BT.shape[1]])] * 2,
                                                          *[tokens_BT.shape[1]] * 2)))
    found, out = run("broken")
    assert found == wanted and "reading is off by" in sentence(out, "flash_rows")


def test_a_gradient_that_is_wrong_is_found(plainly, run, monkeypatch):
    """The states are right. fails if: only what comes forward is compared."""
    wanted = plainly("flash_rows")
    attend = flash.packed_attention

    def half_the_gradient(q_BTQH, k_BSRH, v_BSRH, at):
        out = attend(q_BTQH, k_BSRH, v_BSRH, at)
        return out.detach() + (out - out.detach()) / 2
    monkeypatch.setattr(flash, "packed_attention", half_the_gradient)
    found, out = run("broken")
    assert found == wanted and "on the student" in sentence(out, "flash_rows")


@pytest.mark.parametrize("recorded_before", [0, 2])
def test_a_recording_that_fails_half_way_is_ended_and_the_run_goes_on(recorded_before, plainly, run, monkeypatch):
    """At the first recording, or at a later one. fails if: the stream is left in capture, the step is lost, or the
    failure ends the run."""
    wanted = plainly("graphs")
    ended, recordings, step = [], [], rollout_file.Slots.step

    class Graph(torch.cuda.CUDAGraph):
        def capture_begin(self, *pool, **more):
            recordings.append(self)
            super().capture_begin(*pool, **more)

        def capture_end(self):
            ended.append(self)
            super().capture_end()

    def failing(pool, n):
        if len(recordings) > max(len(ended), recorded_before):
            raise RuntimeError("operation not permitted when stream is capturing")
        step(pool, n)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(rollout_file.Slots, "step", failing)
    found, out = run("broken")
    assert found == wanted and "not permitted when stream is capturing" in sentence(out, "graphs")
    assert ended == recordings and len(ended) == recorded_before + 1


def test_a_recording_that_fails_in_the_middle_of_a_run_loses_no_token(every_way, monkeypatch, capsys):
    """Long after the proof: another number of rows, no memory for its recording. fails if: the step is not done."""
    model, wanted = small(), write(small())
    flash.on_model(model)
    graphs.on_model(model)
    record = graphs.record
    monkeypatch.setattr(graphs, "record", lambda pool, made, n: record(pool, made, n) if len(made) < 3 else raises(0)())
    assert same(write(model), wanted)
    sentence(capsys.readouterr().out, "graphs")


# --plain

def test_plain_all_takes_no_fast_way(every_way, run):
    """fails if: a way that was named in --plain runs, or the proof runs without any"""
    found, out = run("plain", plain="all")
    recorded, replayed, _ = every_way
    assert "fast  " not in out and not recorded and not replayed
    assert not ways.in_use() and ways.placed


def test_a_way_that_is_not_there_is_refused(command, capsys):
    assert train.main(command(plain="flash_rows,grahps")) == 2
    said = capsys.readouterr().err
    assert "'grahps'" in said and "graphs" in said and said.count("\n") == 1


def test_a_missing_kernel_is_one_sentence_and_the_padded_way(monkeypatch, capsys):
    """fails if: a torch without the operators ends in a traceback, or says nothing"""
    device = torch.device("cuda")
    monkeypatch.setattr(flash, "available", lambda path: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert flash.flash_ready.__wrapped__(device, torch.bfloat16, 128) is False
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "micro-batches are padded" in said


# The proof itself

def test_the_proof_meets_what_a_run_meets(every_way, monkeypatch):
    """fails if: no slot is refilled or moved, fewer than 12 steps follow a first replay, or lengths are equal"""
    model, moved, admitted = small(), [], []
    flash.on_model(model)
    graphs.on_model(model)
    copy_rows, admit = KVCache.copy_rows, rollout_file.Slots.admit
    monkeypatch.setattr(KVCache, "copy_rows", lambda cache, to, source, rows: (
        moved.append(to) if source is cache else None, copy_rows(cache, to, source, rows)))
    monkeypatch.setattr(rollout_file.Slots, "admit", lambda pool, numbers: (admitted.append(numbers),
                                                                            admit(pool, numbers)))
    rollout = proof.write(model)
    recorded, replayed, _ = every_way
    assert moved and len(admitted) > 1 and replayed.count(recorded[0]) > 12
    assert len(set(rollout.prompt_len_B.tolist())) > 8 and len(set(rollout.length_B.tolist())) > 8


def test_the_truth_is_a_float32_pass(monkeypatch):
    """A bfloat16 model: its own sampler is off by what bfloat16 rounds, a float32 one by almost nothing.
    fails if: the reference is computed in the model's dtype, or by a fast way."""
    model = small()
    exact = proof.writing(model)
    model.compute_dtype = torch.bfloat16
    assert exact < 1e-6 < 1e-4 < proof.writing(model)
    assert model.compute_dtype == torch.bfloat16


def test_a_model_that_is_broken_anyway_is_not_blamed_on_a_way(capsys):
    """fails if: the proof ends a run, or sends ways away, where the plain way gives no numbers either"""
    model = small()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    cpu.on_model(model)
    proof.hold("sampling", model, proof.writing)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("fault", [raises, not_a_number, off_by_a_hundredth])
def test_a_broken_compiled_loss_stands_aside(fault, run, monkeypatch):
    """fails if: the loss is not proved, or its gradient is not"""
    from extras import compile as compile_file
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    wanted, _ = run("plain", compile=True, plain="compiled_loss")
    compile_file.fused_rows.cache_clear()

    def wrong(*args):
        total, loss_N, noted = losses_rows(*args)
        return fault(lambda: total)(), loss_N, noted
    losses_rows = compile_file.plain_rows
    monkeypatch.setattr(compile_file, "fused_rows", lambda: wrong)
    found, out = run("broken", compile=True)
    assert found == wanted
    sentence(out, "compiled_loss")


def test_merged_layers_are_the_plain_ones():
    """Families with and without biases and head norms. fails if: a bias is lost, heads are cut elsewhere, a parameter
    no longer has its name or its value, or the plain layer changes."""
    for family, more in CASES.values():
        model = of_family(family, **more)
        before = {name: tensor.clone() for name, tensor in model.weights().items()}
        tokens_BT = torch.randint(60, (3, 11), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            wanted = model(tokens_BT)
            merged.merge(model.requires_grad_(False))
            assert all(layer.forward.__func__ is merged.forward for layer in model.model.layers)
            torch.testing.assert_close(model(tokens_BT), wanted, atol=1e-5, rtol=1e-5)
            with ways.only(()):
                assert torch.equal(model(tokens_BT), wanted)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.weights().items())
