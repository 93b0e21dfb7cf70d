"""extras/teacher_memory.py and extras/int8.py: parked and streamed teachers, weights of eight bits.

The device is seen through teacher_memory.copied, by which alone a weight comes there; on a CPU it makes a copy as well.
"""
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import write_checkpoint
from helpers import adamw, close, collect, one_step, predictions, ready, settings, with_third
from torch.multiprocessing.reductions import StorageWeakRef

import eval as eval_file
import train
from extras import int8, teacher_memory, teachers
from extras.fast import proof
from extras.lora import projections
from model import Linear
from support import memory, plan, setup
from support.errors import UserError
from support.model_config import ModelConfig
from support.weights import load_model

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
LAYERS = 5


@pytest.fixture(scope="session")
def deep(pair):
    """The pair, with teachers of five layers: one with an embedding of its own, one whose head is its embedding."""
    with_third(pair)
    for name, tied in (("deep", False), ("tied", True)):
        if not (pair / name).exists():
            write_checkpoint(pair / name, 7, model_type="qwen3", vocab_size=32, hidden_size=24, intermediate_size=32,
                             num_hidden_layers=LAYERS, head_dim=8, tie_word_embeddings=tied)
    return pair


@pytest.fixture
def device(monkeypatch):
    """What lies on the device by teacher_memory.copied: .bytes now, .peak so far, .homes of the copies in order."""
    seen, alive = SimpleNamespace(peak=0, homes=[]), []

    def copied(home, *where):
        copy = real(home, *where)
        alive.append((StorageWeakRef(copy.untyped_storage()), copy.nbytes))
        seen.homes.append(home.data_ptr())
        seen.peak = max(seen.peak, seen.bytes())
        return copy
    seen.bytes = lambda: sum(size for storage, size in alive if not storage.expired())
    real = teacher_memory.copied
    monkeypatch.setattr(teacher_memory, "copied", copied)
    return seen


def two_steps(run) -> tuple[str, list]:
    """The records as text, in which NaN is NaN and a float has all its digits; the weights after them."""
    optimizer = adamw(run, lr=0.05)
    records = [one_step(run, optimizer, step) for step in range(2)]
    return repr(records), [parameter.tolist() for parameter in run.student.parameters()]


def size(parameters) -> int:
    return sum(parameter.nbytes for parameter in parameters)


# Parked and streamed

RECIPES = {"opd": {}, "fire": {"recipe": "fire"}, "topk": {"recipe": "topk", "micro_batch_tokens": 1},
           "several": {"recipe": "multi", "route": "kind"}}


@pytest.mark.parametrize("where", ["park", "stream"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_steps_are_taken_bit_for_bit(deep, command, recipe, where):
    """fails if: a layer works with another's weights, a state goes on in another micro-batch, or a signal is read while
    the weights are away"""
    flags = dict(RECIPES[recipe], teacher=deep / "deep", updates=2)
    if recipe == "several":
        flags |= dict(teacher=f"a={deep / 'deep'},b={deep / 'third'}", data=deep / "routed.jsonl",
                      eval_data=deep / "routed.jsonl")
    plain, found = (two_steps(ready(command, **flags, teacher_memory=place)) for place in ("resident", where))
    assert plain == found


def test_packed_passes_are_streamed_as_they_are_cut(flash, deep, command):
    """fails if: the fast ways of the device are not offered again, or a pass loses its keys between two layers"""
    steps = []
    for where in ("resident", "stream"):
        run = ready(command, teacher=deep / "deep", teacher_memory=where, micro_batch_tokens=30)
        steps.append(two_steps(run))
    assert steps[0] == steps[1]


@pytest.mark.parametrize("teacher", ["deep", "tied"])
@pytest.mark.parametrize("where", ["park", "stream"])
def test_each_weight_comes_once_a_step_and_leaves(deep, command, device, where, teacher):
    """fails if: layers are read once per micro-batch, a third layer is there while one works, the head travels, or
    something stays for the update"""
    run = ready(command, teacher=deep / teacher, teacher_memory=where, micro_batch_tokens=1)
    model, layers = run.kind.models[0], run.kind.models[0].model.layers
    table = [model.model.embed_tokens.weight] * (where == "park" and teacher == "deep")
    homes = [parameter.data_ptr() for parameter in (*table, *layers.parameters())]
    one = size(layers[0].parameters())
    for step in range(2):
        batch = collect(run, step)
        assert device.bytes() == 0 and len(device.homes) == step * len(homes)
        run.teacher.parts(batch)
        assert sorted(device.homes[step * len(homes):]) == sorted(homes)
    assert len(batch.asked) > 2      # micro-batches of one sequence each
    assert device.peak == (2 * one if where == "stream" else LAYERS * one + size(table))
    assert device.bytes() == 0 and sorted(homes) == sorted(p.data_ptr() for p in (*table, *layers.parameters()))


def test_copies_and_layers_wait_for_each_other_and_for_nothing_else(deep, command, monkeypatch):
    """With streams that note who waits for whom. fails if: a layer begins before its copy is there, a copy overwrites a
    layer at work, or a copy begins only when the layer before is done"""
    events, run = [], ready(command, teacher=deep / "deep")
    model = run.kind.models[0]

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            events.append(f"{self.name} waits for {other.name}")
    side, main, number_of = Stream("copies"), Stream("work"), {}
    for number, layer in enumerate(model.model.layers):
        number_of[layer.mlp.up_proj.weight.data_ptr()] = number
        layer.register_forward_hook(lambda *_, number=number: events.append(f"layer {number}"))
    real = teacher_memory.copied
    monkeypatch.setattr(teacher_memory, "copied", lambda home, *where: real(home, CPU, None) if events.append(
        f"copy {number_of[home.data_ptr()]}" if home.data_ptr() in number_of else None) is None else None)
    monkeypatch.setattr(teacher_memory, "side_stream", lambda device: side)
    monkeypatch.setattr(teacher_memory, "page_locked", lambda home: home)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: main)
    teacher_memory.stream(model, CPU)
    run.teacher.parts(collect(run))
    expected = ["copies waits for work", "copy 0"]
    for number in range(LAYERS):
        expected += ["work waits for copies"]
        expected += ["copies waits for work", f"copy {number + 1}"] * (number + 1 < LAYERS)
        expected += [f"layer {number}"]
    assert [event for event in events if event] == expected


def test_a_teacher_is_loaded_to_host_memory_and_only_then(deep, command, monkeypatch):
    """fails if: a parked, streamed or int8 teacher is loaded to the device whole, or a resident one is not"""
    class Loaded(Exception):
        pass

    def load(folder, *, dtype, device):
        raise Loaded(device.type)
    for module in (setup, teachers):
        monkeypatch.setattr(module, "load_model", load)
    for flags, found in (({}, "meta"), ({"teacher_memory": "park"}, "cpu"), ({"teacher_memory": "stream"}, "cpu"),
                         ({"teacher_int8": True}, "cpu")):
        for teacher in (deep / "deep", f"a={deep / 'deep'},b={deep / 'third'}"):
            cfg = settings(command, **flags, teacher=teacher, data=deep / "routed.jsonl", route="kind")
            small = setup.read_small_files(cfg, torch.device("meta"))
            teacher_memory.before_loading(cfg, small)
            with pytest.raises(Loaded, match=found):
                setup.teacher_kind(cfg, small).load(small, None)


def test_a_parked_teacher_is_evaluated_and_writes(deep, command, device):
    """fails if: it decodes with weights that are away, or keeps them on the device"""
    found = []
    for where in ("resident", "park"):
        run = ready(command, recipe="sft", responses="teacher", teacher=deep / "deep", teacher_memory=where)
        tested = eval_file.test_teacher(run)
        found.append((tested, collect(run).rollout.tokens_BT.tolist()))
    assert found[0] == found[1] and tested["tokens"] > 0
    parameters = len(list(run.kind.models[0].parameters())) - 2         # without norm and head
    assert len(device.homes) == 2 * parameters and device.bytes() == 0


def test_a_streamed_teacher_says_that_it_is_not_evaluated(deep, command, tmp_path, capsys):
    """fails if: it decodes layer by layer, token by token, or is left out without a word"""
    assert train.main(command(teacher=deep / "deep", teacher_memory="stream")) == 0
    assert "teacher  not evaluated itself: --teacher_memory stream" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "runs/a/metrics.jsonl").read_text().splitlines()]
    assert not any(record.get("eval_teacher") for record in records)


@pytest.mark.parametrize("flags, word", [
    ({"recipe": "grpo", "teacher": "none", "teacher_memory": "park"}, "--teacher none"),
    ({"recipe": "opsd", "teacher": "self", "teacher_int8": True}, "--teacher self"),
    ({"recipe": "sft", "responses": "teacher", "teacher_memory": "stream"}, "cannot write"),
    ({"cold_start_steps": 1, "teacher_memory": "stream"}, "cannot write"),
    ({"recipe": "sg", "teacher_memory": "stream"}, "cannot write")], ids=str)
def test_what_cannot_work_is_refused(command, flags, word):
    """fails if: the run goes on with a flag that does nothing, or breaks off at its first step"""
    with pytest.raises(UserError, match=word):
        settings(command, **flags)


def test_several_processes_are_refused(command, monkeypatch):
    """fails if: a teacher is both shared out and streamed"""
    monkeypatch.setattr(memory, "processes", lambda: 2)
    with pytest.raises(UserError, match="one process"):
        settings(command, teacher_memory="stream")


# Eight bits

def test_a_quantised_row_is_off_by_half_a_step_at_most():
    """fails if: scales are per column or per matrix, values are cut instead of rounded, or a row of zeros is NaN"""
    linear = Linear(6, 4, bias=True)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor(
            [[1e-3], [1.0], [0.0], [50.0]]))
        linear.bias.fill_(0.5)
    weight, x = linear.weight.detach().clone(), torch.randn(3, 6)
    int8.quantise(linear)
    assert linear.weight.dtype == torch.int8 and linear.scale.shape == (4,)
    off = (linear.weight * linear.scale[:, None] - weight).abs()
    assert (off <= weight.abs().amax(1, keepdim=True) / 254 * 1.001).all() and off[1].max() > 0
    close(linear(x), F.linear(x, linear.weight * linear.scale[:, None], linear.bias), 1e-4)


@torch.no_grad()
def rounded_to(linear, levels):
    scale = linear.weight.abs().amax(1, keepdim=True) / levels
    linear.weight.copy_((linear.weight / scale).round() * scale)


@pytest.mark.parametrize("levels", [127, 1])
def test_the_printed_distance_is_that_of_the_rounded_weights(deep, command, monkeypatch, capsys, levels):
    """The reference rounds the weights of a plain model; with a single level both directions of the KL are far apart.
    fails if: it is the other one, an unquantised layer is compared, or a prompt's tokens are counted"""
    if levels == 1:
        monkeypatch.setattr(int8, "quantise", lambda linear: rounded_to(linear, 1))
    run = ready(command, teacher=deep / "deep", teacher_int8=True, temperature=0.7)
    said = re.search(r"int8 +teacher 1: KL.* (\S+) nats per token, the mean over (\d+) tokens of 10 responses",
                     capsys.readouterr().out)
    exact, rounded = (load_model(deep / "deep") for _ in "12")
    for linear in projections(rounded):
        rounded_to(linear, levels)
    with torch.no_grad():
        rollout, kl = int8.responses(run, 0), []
        for b in range(10):
            prompt, response = rollout.tokens_BT[b, :rollout.prompt_len_B[b]].tolist(), rollout.response(b)
            p, q = (predictions(model, prompt, response, 0.7) for model in (exact, rounded))
            kl.append((p.exp() * (p - q)).sum(-1))
    kl_N = torch.cat(kl)
    assert int(said[2]) == len(kl_N) and kl_N.mean() > 1e-6
    assert float(said[1]) == pytest.approx(kl_N.mean().item(), rel=0.02)


def test_int8_goes_with_either_place(deep, command, device):
    """fails if: an int8 layer comes in another dtype, or its scales stay behind"""
    found = []
    for where in ("resident", "park", "stream"):
        run = ready(command, teacher=deep / "deep", teacher_memory=where, teacher_int8=True)
        layer = run.kind.models[0].model.layers[0]
        assert {p.dtype for p in layer.self_attn.q_proj.parameters()} == {torch.int8, torch.float32}
        device.peak = 0
        found.append(two_steps(run))
    assert device.peak == 2 * size(layer.parameters())
    assert found[0] == found[1] == found[2]


def test_a_teacher_without_problems_cannot_be_compared(deep, command):
    """fails if: the sentence is that of the sampler, which knows nothing of teachers"""
    with pytest.raises(UserError, match="no problem of .* is one of teacher 3's"):
        ready(command, teacher=f"a={deep / 'deep'},b={deep / 'third'},c={deep / 'tied'}", data=deep / "routed.jsonl",
              eval_data=deep / "routed.jsonl", route="kind", teacher_int8=True)


# The plan

QWEN3 = dict(model_type="qwen3", vocab_size=151936, head_dim=128, num_key_value_heads=8, max_position_embeddings=40960,
             torch_dtype="bfloat16")
SMALL = dict(QWEN3, hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_hidden_layers=28,
             tie_word_embeddings=True)
LARGE = dict(QWEN3, hidden_size=5120, intermediate_size=25600, num_attention_heads=64, num_hidden_layers=64,
             tie_word_embeddings=False)


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("where", ["resident", "park", "stream"])
@pytest.mark.parametrize("teacher", ["deep", "tied"])
def test_planned_weights_are_those_that_come(deep, command, device, teacher, where, quantised):
    """fails if: head, embedding, scales or norms are counted in the wrong place or dtype"""
    run = ready(command, teacher=deep / teacher, teacher_memory=where, teacher_int8=quantised or None)
    model, device.peak = run.kind.models[0], 0
    run.teacher.parts(collect(run))
    whole, guests = size(model.parameters()), device.peak
    job = memory.Job(CUDA, 2**30, memory.sized(run.student.config), [memory.sized(load_model(deep / teacher).config)],
                     None, 20, 9)
    found = memory.teacher_bytes(replace(run.cfg, dtype="float32"), job, job.teachers[0])
    assert found.visit == guests and found.stay + found.wait == whole
    assert found.stay == (whole if where == "resident" else size([model.model.norm.weight, model.head_weight()]))


@pytest.fixture
def job():
    """Qwen3-32B over Qwen3-0.6B on a GPU of 24 GB."""
    student, teacher = (memory.sized(ModelConfig.from_dict(raw)) for raw in (SMALL, LARGE))
    return memory.Job(CUDA, 24 * 10**9, student, [teacher], None, 151669, 200, (200, 200))


def test_a_teacher_of_32b_fits_in_24_gb_layer_by_layer(job):
    """fails if: the plan does not name the flag that helps, counts the whole teacher with it, or forgets it on the
    host"""
    cfg = train.Config(max_new_tokens=512, eval_k=1, gradient_checkpointing=True)
    plain = plan.settle(cfg, job)
    said = plan.verdict(plain, job)
    assert said.startswith("does not fit") and "--teacher_memory stream would save the most" in said
    assert plan.way_to_fit(plain, job)[0] == {"teacher_memory": "stream"}
    saved = {plan.flag_text(flags): saved for saved, flags, _ in plan.savings(plain, job)}
    assert saved["--teacher_memory stream"] > 55 * 2**30 and saved["--teacher_int8"] > 25 * 2**30
    streamed = plan.settle(replace(cfg, teacher_memory="stream"), job)
    assert plan.verdict(streamed, job).startswith("fits") and plan.host_text(streamed, job).count("teacher weights")
    host = memory.host_plan(streamed, job)
    assert 60 * 10**9 < host["teacher weights"] and sum(host.values()) < 80 * 10**9
    halved = memory.host_plan(replace(streamed, teacher_int8=True), job)["teacher weights"]
    loaded = job.teachers[0].weights * 2 - host["a checkpoint as it is written"]     # whole, before it is quantised
    assert halved == loaded < host["teacher weights"]


def test_only_flags_that_the_rules_allow_are_advised(job):
    """fails if: a plan advises what check_combinations refuses"""
    for flags, streams in (({}, True), ({"cold_start_steps": 3}, False)):
        cfg = plan.settle(train.Config(max_new_tokens=512, eval_k=1, **flags), job)
        assert ({"teacher_memory": "stream"} in [flags for flags, _ in plan.trials(cfg, job)]) == streams
    nobody = plan.settle(train.Config(teacher="none"), replace(job, teachers=[]))
    assert not any("teacher" in name for flags, _ in plan.trials(nobody, job) for name in flags)


def test_the_proof_asks_no_streamed_teacher_to_write(command, capsys):
    """fails if: a way that is right stands aside because a model that only reads was asked to sample."""
    run = ready(command, teacher_memory="stream")
    proof.prove(run, None, None)
    assert "as exact as the plain ways" in (text := capsys.readouterr().out) and "stands aside" not in text
