"""A teacher on disk: the same steps as with the teacher itself, and one sentence for whatever differs."""
import gc
import json
import os
import shutil

import pytest
import torch
from conftest import write_checkpoint
from helpers import interrupted, look, one_step, ready, steps_of, with_third
from inference_server import serving
from safetensors.torch import load_file, save_file

import train
from extras import teacher_cache, teacher_store
from support.errors import UserError
from teacher import Teacher

RUN = dict(steps=3, lr=0.05, save_every=1, problems=4, eval_teacher=None)
TOP = dict(divergence="topk_reverse_kl", support="teacher", topk=4)


def moved(folder):
    """What a run has learned, to the last bit, and what it logged."""
    seconds = ("second", "memory")
    records = [{key: value for key, value in record.items() if not any(word in key for word in seconds)}
               for record in steps_of(folder / "a")]
    return (folder / "a/last/model.safetensors").read_bytes(), records


def written(command, tmp_path, **flags):
    """The folder of a finished run that wrote its teacher there, and what the run learned."""
    folder = tmp_path / "cache"
    assert train.main(command(cache_teacher=folder, runs=tmp_path / "writes", **{**RUN, **flags})) == 0
    return folder, moved(tmp_path / "writes")


@pytest.fixture
def teacher_away(pair):
    """Nobody may load the teacher's weights any more."""
    def hide():
        os.rename(pair / "teacher", pair / "teacher_away")
    yield hide
    if (pair / "teacher_away").exists():
        os.rename(pair / "teacher_away", pair / "teacher")


@pytest.mark.parametrize("flags", [
    dict(), dict(divergence="jsd", temperature=0.7), dict(recipe="fire"), dict(recipe="tip"), dict(recipe="eopd"),
    dict(recipe="uni", problems=4, samples=4), dict(divergence="topk_reverse_kl", support="union"),
    dict(privileged="solution", teacher_prompt="{solution};{problem}")], ids=lambda flags: " ".join(map(str, flags)))
def test_hidden_states_from_disk_take_the_same_steps_to_the_last_bit(command, tmp_path, teacher_away, flags):
    """fails if: a state, its row, the head or the order of sequences changes on the way; or the writing run learns from
    something else than it writes"""
    assert train.main(command(runs=tmp_path / "live", **{**RUN, **flags})) == 0
    live = moved(tmp_path / "live")
    folder, while_writing = written(command, tmp_path, **flags)
    assert while_writing == live
    teacher_away()
    assert train.main(command(runs=tmp_path / "reads", **{**RUN, **flags, "teacher": f"cache:{folder}"})) == 0
    assert moved(tmp_path / "reads") == live


@pytest.mark.parametrize("flags", [TOP, {**TOP, "topk_form": "tail"}, dict(recipe="fire"),
                                   dict(divergence="policy_gradient", temperature=0.8)])
def test_the_likeliest_from_disk_take_the_steps_of_the_writing_run(command, tmp_path, teacher_away, flags):
    """fails if: what was read differs from what was written; or it is far from the whole distribution's step"""
    folder, while_writing = written(command, tmp_path, cache_topk=5, **flags)
    teacher_away()
    assert train.main(command(runs=tmp_path / "reads", **{**RUN, **flags, "teacher": f"cache:{folder}"})) == 0
    assert moved(tmp_path / "reads") == while_writing
    shard = load_file(next(folder.glob("shard-*")))
    assert shard["id_nK"].shape[1] == 5 and "hidden" not in shard and not (folder / "head.safetensors").exists()


def test_the_likeliest_take_the_step_of_the_whole_distribution(command, tmp_path):
    """fails if: the tail is not summed from its own entries, or the temperature is left out"""
    flags = dict(topk_form="tail", temperature=0.7, **TOP)
    live, kept = (one_step(ready(command, **flags, **more))
                  for more in ({}, dict(cache_teacher=tmp_path / "c", cache_topk=4)))
    assert kept["loss"] == pytest.approx(live["loss"], rel=1e-5)
    assert kept["grad_norm"] == pytest.approx(live["grad_norm"], rel=1e-4)
    assert kept["teacher_entropy"] == pytest.approx(live["teacher_entropy"], rel=1e-5)


def test_a_run_that_was_stopped_goes_on_without_asking_twice(command, tmp_path, monkeypatch):
    """fails if: what was written before the stop is asked again, or the resumed run is another"""
    asked, read = [], Teacher.read

    def counted(self, batch, sequence_b):
        if self.model.title == "the teacher":
            asked.append(batch.step)
        return read(self, batch, sequence_b)
    monkeypatch.setattr(Teacher, "read", counted)
    _, whole = written(command, tmp_path)
    assert asked == [0, 1, 2]
    asked.clear()
    gc.collect()
    interrupted(monkeypatch, command, 2, **RUN, cache_teacher=tmp_path / "other")
    assert asked == [0, 1, 2] and moved(tmp_path / "runs") == whole
    asked.clear()
    shutil.rmtree(tmp_path / "runs")
    assert train.main(command(**RUN, cache_teacher=tmp_path / "other")) == 0
    assert asked == [] and moved(tmp_path / "runs") == whole


@pytest.mark.parametrize("when", ["write", "replace"])
def test_killed_while_it_writes(command, tmp_path, monkeypatch, when):
    """fails if: half a shard is found by the next run, or stands in its way"""
    class Killed(BaseException):
        pass
    real = os.replace

    def replace(source, target):
        if "shard-000001" in str(target):
            if when == "write":
                with open(source, "r+b") as file:
                    file.truncate(100)
            raise Killed
        real(source, target)
    monkeypatch.setattr("support.run_folder.os.replace", replace)
    with pytest.raises(Killed):     # no name for what was raised: its frames would hold the lock
        train.main(command(**RUN, cache_teacher=tmp_path / "cache"))
    monkeypatch.setattr("support.run_folder.os.replace", real)
    names = {path.name for path in (tmp_path / "cache").iterdir()}
    assert "shard-000001.safetensors.unfinished" in names and "shard-000001.safetensors" not in names
    gc.collect()
    assert train.main(command(**RUN, cache_teacher=tmp_path / "cache")) == 0
    assert {path.name for path in (tmp_path / "cache").iterdir()} == {
        ".lock", "meta.json", "head.safetensors", *(f"shard-{n:06d}.safetensors" for n in range(3))}
    assert train.main(command(runs=tmp_path / "whole", **RUN)) == 0
    assert moved(tmp_path / "runs") == moved(tmp_path / "whole")


def refused(capsys, arguments, name):
    gc.collect()        # an earlier run of this process holds the lock until it is forgotten
    assert train.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and name in said and said.startswith("error: "), said


def test_each_difference_is_one_sentence(pair, command, tmp_path, capsys):
    """fails if: another teacher, tokenizer, template, dtype, stop id, text or kind of record goes unseen"""
    folder, _ = written(command, tmp_path)
    template = tmp_path / "t.jinja"
    template.write_text("{{ messages[0]['content'] }};")
    more = tmp_path / "student"
    shutil.copytree(pair / "student", more)
    tokenizer = json.loads((more / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["0"], vocab["1"] = vocab["1"], vocab["0"]
    (more / "tokenizer.json").write_text(json.dumps(tokenizer))
    with_third(pair)
    reads, writes = dict(teacher=f"cache:{folder}"), dict(cache_teacher=folder)
    for number, (flags, name) in enumerate([
            ({**writes, "teacher": pair / "third"}, "another teacher"), ({**reads, "student": more}, "tokenizer"),
            ({**reads, "chat_template": template}, "chat template"),
            ({**writes, "chat_template": template}, "chat template"),
            ({**reads, "template_vars": "a=1"}, "chat template"), ({**reads, "stop_ids": "3"}, "stop ids"),
            ({**reads, "dtype": "bfloat16"}, "dtype"), ({**writes, "cache_topk": 4, **TOP}, "--cache_topk"),
            ({**reads, "seed": 1}, "holds nothing about this response"),
            ({**reads, "temperature": 0.5}, "holds nothing about this response"),
            ({**reads, "cache_teacher": tmp_path}, "leave out --cache_teacher"),
            (dict(teacher=f"cache:{tmp_path / 'nowhere'}"), "no meta.json")]):
        refused(capsys, command(runs=tmp_path / f"runs{number}", **{**RUN, **flags}), name)


def test_temperature_matters_to_the_likeliest_alone(command, tmp_path, capsys):
    """fails if: top-k of another temperature are taken for this one's, or a loss that they do not determine passes"""
    flags = dict(divergence="policy_gradient")
    folder, _ = written(command, tmp_path, cache_topk=4, **flags)
    reads = {**RUN, **flags, "teacher": f"cache:{folder}"}
    refused(capsys, command(**{**reads, "temperature": 0.5}), "--temperature")
    refused(capsys, command(**{**reads, "divergence": "jsd"}), "use --divergence topk_reverse_kl")
    refused(capsys, command(**{**reads, **TOP, "topk": 5}), "--topk 5")


def test_a_folder_of_somebody_else_and_a_damaged_shard(command, tmp_path, capsys):
    """fails if: a folder that holds other things is written to, or a shard cut by hands is read as it is"""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("x")
    refused(capsys, command(**RUN, cache_teacher=tmp_path / "mine"), "thesis.txt")
    folder, _ = written(command, tmp_path)
    shard = folder / "shard-000001.safetensors"
    shard.write_bytes(shard.read_bytes()[:200])
    teacher_store.open_shard.cache_clear()
    refused(capsys, command(runs=tmp_path / "r", **{**RUN, "teacher": f"cache:{folder}"}), "shard-000001.safetensors")


def test_two_processes_do_not_write_to_one_folder(command, tmp_path):
    """fails if: the lock is not taken"""
    first = ready(command, cache_teacher=tmp_path / "cache")
    with pytest.raises(UserError, match="another process writes"):
        ready(command, cache_teacher=tmp_path / "cache")
    assert first.kind


def test_several_teachers_have_a_folder_each(pair, command, tmp_path, teacher_away):
    """fails if: two teachers share a store, or a routed problem is read from the other's"""
    with_third(pair)
    flags = {**RUN, "route": "kind", "data": pair / "routed.jsonl"}
    live = dict(teacher=f"a={pair / 'third'},b={pair / 'teacher'}")
    folder, learned = written(command, tmp_path, **{**flags, **live})
    teacher_away()
    mixed = dict(teacher=f"a={pair / 'third'},b=cache:{folder / 'b'}")
    for name, teachers in (("both", dict(teacher=f"a=cache:{folder / 'a'},b=cache:{folder / 'b'}")), ("one", mixed)):
        assert train.main(command(runs=tmp_path / name, **{**flags, **teachers})) == 0
        assert moved(tmp_path / name) == learned


def test_a_server_is_asked_once(pair, command, tmp_path):
    """fails if: what a server tells is not written, or is asked again"""
    with serving(pair / "teacher") as server:
        flags = dict(teacher=server.address("vllm"), **TOP)
        folder, learned = written(command, tmp_path, **flags)
        count = len(server.asked)
    assert train.main(command(runs=tmp_path / "reads", **{**RUN, **flags, "teacher": f"cache:{folder}"})) == 0
    assert count > 3 and moved(tmp_path / "reads") == learned


def test_a_teacher_with_another_tokenizer_is_not_written(world, command, tmp_path, capsys):
    """fails if: what was fitted to another tokenizer's words is written as if it were the student's"""
    flags = {**RUN, "teacher": world / "foreign", "cache_teacher": tmp_path / "c"}
    refused(capsys, command(**flags), "another tokenizer")


def test_weights_are_told_apart(tmp_path):
    """fails if: the hash sees names and sizes alone"""
    shape = dict(model_type="qwen2", vocab_size=20, hidden_size=32, intermediate_size=16, num_hidden_layers=1)
    hashes = []
    for number, seed in enumerate((1, 1, 2)):
        write_checkpoint(tmp_path / str(number), seed, **shape)
        hashes.append(teacher_cache.weights_hash(tmp_path / str(number)))
    assert hashes[0] == hashes[1] != hashes[2]
    tensors = load_file(tmp_path / "0/model.safetensors")
    name = sorted(tensors)[1]
    tensors[name].view(-1)[5] += 1
    save_file(tensors, tmp_path / "0/model.safetensors")
    assert teacher_cache.weights_hash(tmp_path / "0") != hashes[0]


def test_what_was_said_in_the_same_step_comes_first(tmp_path):
    """fails if: a sequence that was read in several steps is taken from another than the one that asks"""
    store = teacher_store.Store(tmp_path, {}, None)
    key, other = bytes(32), bytes([1] * 32)
    for step in (0, 5):
        rows = {"hidden": torch.tensor([[step], [step + 1], [step + 2]])}
        store.append([(key, step, 0), (key, step, 1)], [1, 2], rows)
    store.append([(key, 5, 0), (other, 5, 0)], [1, 1], {"hidden": torch.tensor([[9], [8]])})
    for store in (store, teacher_store.Store(tmp_path)):
        def found(*asked):
            return store.read(store.pick(list(asked)), "hidden").flatten().tolist()
        assert found((key, 5, 1), (key, 0, 0), (key, 5, 0), (other, 7, 0)) == [6, 7, 0, 5, 8]
        assert found((key, 3, 0)) == [0] and store.pick([(key, 0, 0), (bytes([2] * 32), 0, 0)]) is None
    assert len(store.shards) == 3


def test_a_response_that_comes_twice_is_read_twice(command, tmp_path):
    """fails if: equal responses of one step share what belongs to one of them"""
    run = ready(command, cache_teacher=tmp_path / "c", temperature=0.05, samples=4)
    _, first, _ = look(run)
    _, again, parts = look(run)
    assert torch.equal(first.teacher_logp_N, again.teacher_logp_N) and not again.teacher_logp_N.isnan().any()
