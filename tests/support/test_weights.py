"""weights.py and Transformer.save against strangers' files: everything is looked at before memory is taken, nothing
outside the folder is opened, nothing that is not finite is written.
"""
import json
import os
import random
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from extras.lora import add_lora, projections
from model import Transformer
from support.model_config import ModelConfig
from support.saving import all_finite
from support.errors import UserError
from support.weights import checkpoint_folder, load_model

RAW = dict(model_type="qwen3", vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
           num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True)
UP = "model.layers.1.mlp.up_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def fresh(**changes) -> Transformer:
    return Transformer(ModelConfig.from_dict({**RAW, **changes})).init_weights(0)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that may be broken."""
    fresh().save(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def sentence(call, *args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert text.isprintable() and len(text) < 1000
    return text


def index_of(folder, names) -> None:
    """An index that names these files; the single file becomes the first of them."""
    tensors = list(load_file(folder / SINGLE))
    (folder / INDEX).write_text(json.dumps({"weight_map": dict(zip(tensors, [*names] + [names[-1]] * len(tensors)))}))
    os.rename(folder / SINGLE, folder / "a.safetensors")


# what may stand under the name of a file

@pytest.mark.parametrize("name", [SINGLE, "config.json", INDEX, "a.safetensors"])
@pytest.mark.parametrize("what", ["folder", "pipe", "device", "dangling", "circle", "outside"])
def test_only_regular_files_of_the_folder_are_opened(folder, name, what):
    """fails if: a file is opened without support/files.py: a pipe waits for ever, a link reads a private file."""
    if name in (INDEX, "a.safetensors"):
        index_of(folder, ["a.safetensors"])
    path = folder / name
    os.rename(path, folder.parent / "private")
    {"folder": lambda: path.mkdir(), "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"),
     "dangling": lambda: path.symlink_to("gone"), "circle": lambda: path.symlink_to(name),
     "outside": lambda: path.symlink_to("../private")}[what]()
    words = {"device": "outside the checkpoint", "dangling": "which does not exist", "circle": "cannot be read",
             "outside": "outside the checkpoint"}.get(what, "is a folder, a pipe or a device")
    assert str(path) in (text := sentence(load_model, folder)) and words in text


@pytest.mark.parametrize("name", [
    "a" * 300 + ".safetensors", "/etc/x.safetensors", "b/a.safetensors", "../a.safetensors", "..", "a.bin", "",
    "a\0.safetensors", "\ud800.safetensors", "a\n.safetensors", 5, None, ["a.safetensors"], {"a": "b"}, "x" * 10**6],
    ids=lambda name: repr(name)[:20])
def test_an_index_may_name_anything(folder, name):
    """fails if: a name reaches the file system before it is looked at, or an error of the system comes through."""
    index_of(folder, ["a.safetensors", name])
    assert INDEX in sentence(load_model, folder)


def test_a_checkpoint_in_the_layout_of_the_hub_cache_loads(folder, tmp_path):
    """fails if: links into the blobs are refused."""
    snapshot, blobs = tmp_path / "models--o--n/snapshots/0a1b", tmp_path / "models--o--n/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(folder.iterdir()):
        os.rename(file, blobs / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    assert torch.equal(load_model(snapshot).model.norm.weight, fresh().model.norm.weight)
    (tmp_path / "link").symlink_to(snapshot)
    load_model(tmp_path / "link")


# what a safetensors file may hold

def changed_header(folder, change, body=None) -> None:
    """The file again, with another header."""
    data = (folder / SINGLE).read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + size])
    text = json.dumps(change(header) or header).encode()
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + (data[8 + size:] if body is None else body))


@pytest.mark.parametrize("change, words", [
    (lambda h: h.update({UP: {**h[UP], "shape": [16, 24]}}), f"{UP} has shape [16, 24], config.json asks for [24, 16]"),
    (lambda h: h.update({UP: {**h[UP], "shape": [24 * 16]}}), "has shape [384]"),
    (lambda h: h.update({UP: {**h[UP], "dtype": "I32"}}), f"{UP} has dtype I32"),
    (lambda h: h.update({"\x1b[2J": h.pop(UP)}), "no place in this architecture"),
    (lambda h: h.update({"x" * 10**5: h.pop(UP)}), "no place in this architecture"),
    (lambda h: h.pop(UP) and None, "damaged"),
    (lambda h: h.update({UP: {**h[UP], "shape": [2**63, 2]}}), "damaged"), (lambda h: h.update(x=1), "damaged"),
    (lambda h: {**h, "__metadata__": {str(n): "x" * 100 for n in range(10**5)}}, "its header claims")],
    ids=range(9))
def test_headers_are_judged_before_memory_is_taken(folder, monkeypatch, change, words):
    """fails if: the model is built on its device first, or a header may be as long as it likes."""
    monkeypatch.setattr(Transformer, "to_empty", lambda *_, **__: pytest.fail("took memory"))
    changed_header(folder, change)
    assert words in sentence(load_model, folder)


def test_a_file_that_cannot_be_mapped_is_named(folder):
    """fails if: torch's RuntimeError comes through."""
    def grown(header):
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
        header["big"] = {"dtype": "F32", "shape": [2**40], "data_offsets": [end, end + 2**42]}
    changed_header(folder, grown)
    try:
        os.truncate(folder / SINGLE, (folder / SINGLE).stat().st_size + 2**42)
    except OSError:
        pytest.skip("no sparse file of 4 TiB on this file system")
    assert SINGLE in sentence(load_model, folder)


def test_weights_for_which_there_is_no_room_are_one_sentence(folder, monkeypatch):
    """fails if: the allocator's exception comes through."""
    def full(*_, **__):
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB.\nmore")
    monkeypatch.setattr(Transformer, "to_empty", full)
    assert "no room for 0.0 GiB of weights on cpu (Tried to allocate 20 GiB.)" in sentence(load_model, folder)


def test_a_mutated_file_loads_or_is_one_sentence(folder):
    """fails if: an exception of the library comes through, or NaN is loaded."""
    rng, good = random.Random(0), (folder / SINGLE).read_bytes()
    header = 8 + struct.unpack("<Q", good[:8])[0]
    loaded = 0
    for _ in range(400):
        data = bytearray(good)
        for _ in range(rng.choice((1, 3, 30))):
            data[rng.randrange(header if rng.random() < 0.7 else len(data))] = rng.randrange(256)
        if rng.random() < 0.2:
            del data[rng.randrange(len(data)):]
        (folder / SINGLE).write_bytes(data)
        try:
            model = load_model(folder)
        except UserError as error:
            assert str(error).isprintable() and SINGLE in str(error) or "missing" in str(error)
            continue
        assert all(p.isfinite().all() for p in model.parameters())
        loaded += 1
    assert 5 < loaded < 300


@pytest.mark.parametrize("stored, value, dtype", [
    (torch.float32, float("nan"), torch.float32), (torch.bfloat16, float("-inf"), torch.float32),
    (torch.float32, 1e5, torch.float16), (torch.float32, 3.4e38, torch.bfloat16), (torch.bfloat16, 1e5, torch.float16)])
def test_what_is_not_finite_in_the_dtype_asked_for_is_not_loaded(folder, stored, value, dtype):
    """fails if: tensors are looked at before they are rounded only, or not at all."""
    tensors = {name: tensor.to(stored) for name, tensor in load_file(folder / SINGLE).items()}
    tensors[UP][3, 5] = value
    save_file(tensors, folder / SINGLE)
    assert f"{UP} holds NaN or infinity as {dtype if stored != torch.bfloat16 or value > 0 else stored}" in sentence(
        load_model, folder, dtype=dtype)


# saving

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_all_finite_is_isfinite_of_all(dtype, value):
    """fails if: one end of the extremes is forgotten, or NaN is passed over."""
    tensor = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    limits = torch.finfo(dtype)
    assert all_finite(tensor) and all_finite(torch.tensor([limits.max, limits.min], dtype=dtype))
    for place in ((0, 0), (3, 17), (6, 32)):
        bad = tensor.clone()
        bad[place] = value
        assert not all_finite(bad)


@pytest.mark.parametrize("value, dtype", [(float("nan"), torch.float32), (float("inf"), torch.bfloat16),
                                          (7e4, torch.float16), (3.4e38, torch.bfloat16)])
def test_weights_that_are_not_finite_on_disk_are_not_written(tmp_path, value, dtype):
    """fails if: save() checks the stored dtype, checks while it writes, or does not check."""
    model = fresh()
    model.title = "the student"
    model.save(tmp_path / "old", dtype)
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    with torch.no_grad():
        dict(model.named_parameters())[UP][3, 5] = value
    for name in ("old", "new"):
        text = sentence(model.save, tmp_path / name, dtype)
        assert UP in text and str(dtype) in text and "the student" in text
    assert {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()} == before
    assert not (tmp_path / "new").exists()
    if abs(value) < float("inf"):
        model.save(tmp_path / "new", torch.float32)


def test_an_adapter_that_overflows_is_not_written(tmp_path):
    """fails if: the adapters are looked at instead of what is written, the merged weight."""
    model = fresh()
    add_lora(model, 2, 2.0)
    with torch.no_grad():
        for linear in projections(model):
            linear.lora_B.fill_(1e30)
            linear.lora_A.fill_(1e30)
    assert "q_proj.weight, as torch.float32" in sentence(model.save, tmp_path / "new")
    assert not (tmp_path / "new").exists() and all_finite(projections(model)[0].lora_B)


# names

@pytest.mark.parametrize("name", ["x" * 5000, "owner/" + "x" * 5000, "~nobody/x", "\udcff", "owner/\udcff", "a\nb",
                                  "a\0b", "/dev/null/x", "", "/dev/zero"], ids=lambda name: repr(name)[:12])
def test_any_name_is_one_sentence(name, monkeypatch, tmp_path):
    """fails if: a name of a model raises before it is looked up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(sentence(lambda: load_model(checkpoint_folder(name)))) < 700


def test_a_hub_id_can_be_had_without_its_weights(monkeypatch, tmp_path):
    """fails if: weights=False downloads safetensors, or leaves out what a tokenizer needs."""
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download",
                        lambda name, allow_patterns, **_: asked.append(set(allow_patterns)) or str(tmp_path))
    assert checkpoint_folder("owner/name", weights=False) == checkpoint_folder("owner/name") == tmp_path
    assert asked == [{"*.json", "*.jinja"}, {"*.json", "*.jinja", "*.safetensors"}]
    assert checkpoint_folder(str(tmp_path), weights=False) == tmp_path
