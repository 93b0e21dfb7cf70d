"""support/saving.py, support/weights.py and support/model_config.py: files that go there and back, and one sentence for
every broken checkpoint.
"""
import json
import re
from pathlib import Path

import pytest
import torch
from model_cases import config_json, edit_json, edit_tensors, logits, small, tokens, written
from safetensors.torch import load_file, save_file

from model import Transformer
from support.errors import UserError
from support.weights import checkpoint_folder, load_model


# files

@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("tied", [False, True])
def test_every_disk_dtype_goes_there_and_back(dtype, tied, tmp_path):
    """fails if: save() writes float32 whatever came in, or load_model forgets what came in."""
    original = small(tie_word_embeddings=tied)
    original.save(tmp_path / "a", dtype=dtype)
    loaded = load_model(tmp_path / "a", dtype=torch.float32)
    loaded.save(tmp_path / "b")
    for name, tensor in original.weights().items():
        assert torch.equal(loaded.weights()[name], tensor.to(dtype).float()), name
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert config_json(tmp_path / "b")["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_weights_are_stored_in_the_dtype_asked_for(tmp_path):
    """fails if: load_model builds the model in float32 whatever `dtype` says."""
    model = load_model(written(tmp_path), dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} == {model.compute_dtype}
    assert not model.training and all(p.requires_grad for p in model.parameters())


def test_harmless_extras_in_old_files_are_accepted(tmp_path):
    """Old Llama files carry the rope table, some tied ones a copy of the embedding.
    fails if: load_model loses either exception."""
    written(tmp_path, tie_word_embeddings=True)
    before = logits(load_model(tmp_path), tokens(1, 9))

    def extras(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    edit_tensors(tmp_path / "model.safetensors", extras)
    assert torch.equal(logits(load_model(tmp_path), tokens(1, 9)), before)


def test_fresh_weights_follow_the_seed():
    """fails if: init_weights draws from the global stream, or fills norms with 0."""
    config = small("qwen2").config
    a, b, c = (Transformer(config).init_weights(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["lm_head.weight"], c["lm_head.weight"])
    assert (a["model.norm.weight"] == 1).all() and (a["model.layers.0.self_attn.q_proj.bias"] == 0).all()


# one sentence for every broken checkpoint

def refused(culprit, call, *args):
    """The call ends in a UserError of one line that names the culprit."""
    with pytest.raises(UserError, match=re.escape(culprit)) as caught:
        call(*args)
    assert "\n" not in str(caught.value)


UP = "model.layers.1.mlp.up_proj.weight"
BAD_TENSORS = {     # id -> (what happens to the file's tensors, what the message must name)
    "missing": (lambda t: t.pop(UP), UP),
    "two missing": (lambda t: (t.pop(UP), t.pop("lm_head.weight")), "lm_head.weight and 1 more"),
    "extra": (lambda t: t.update({"model.extra.weight": torch.ones(2)}), "model.extra.weight"),
    "foreign bias": (lambda t: t.update({UP.replace("weight", "bias"): torch.ones(48)}), "up_proj.bias"),
    "shape": (lambda t: t.update({UP: t[UP].T}), f"{UP} has shape [32, 48], config.json asks for [48, 32]"),
    "int8": (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP} has dtype I8"),
    "float64": (lambda t: t.update({UP: t[UP].double()}), f"{UP} has dtype F64"),
}


@pytest.mark.parametrize("case", BAD_TENSORS)
def test_tensor_that_does_not_fit_is_named(case, tmp_path):
    """fails if: fill or load_model drops the check of that name."""
    edit, culprit = BAD_TENSORS[case]
    edit_tensors(written(tmp_path) / "model.safetensors", edit)
    refused(culprit, load_model, tmp_path)


def test_tied_config_with_another_head_is_refused(tmp_path):
    """fails if: load_model skips lm_head.weight of a tied model unread."""
    written(tmp_path, tie_word_embeddings=True)
    edit_tensors(tmp_path / "model.safetensors", lambda t: t.update({"lm_head.weight": torch.ones(97, 32)}))
    refused("lm_head.weight differs", load_model, tmp_path)


BAD_CONFIGS = {     # id -> (what happens to config.json, what the message must name)
    "family": (lambda c: c.update(model_type="gpt2"), "'gpt2'"),
    "no family": (lambda c: c.pop("model_type"), "config.json: model_type None"),
    "number missing": (lambda c: c.pop("hidden_size"), "hidden_size"),
    "activation": (lambda c: c.update(hidden_act="gelu"), "'gelu'"),
    "quantised": (lambda c: c.update(quantization_config={"quant_method": "gptq"}), "quantised"),
    "rope type": (lambda c: c.update(rope_scaling={"rope_type": "yarn", "factor": 4.0}), "'yarn'"),
    "rope number missing": (lambda c: c.update(rope_scaling={"type": "linear"}), "needs factor"),
    "partial rope": (lambda c: c.update(rope_scaling={"partial_rotary_factor": 0.5}), "partial_rotary"),
}


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_config_outside_the_supported_set_is_named(case, tmp_path):
    """fails if: from_dict or rope_settings drops the check of that name."""
    edit, culprit = BAD_CONFIGS[case]
    edit_json(written(tmp_path) / "config.json", edit)
    refused(culprit, load_model, tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 300, -1])
def test_truncated_file_is_called_damaged(keep, tmp_path):
    """fails if: load_model lets SafetensorError through."""
    file = written(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused("model.safetensors is damaged", load_model, tmp_path)


def sharded(folder):
    """The weights of a small model in two shards with an index; returns the index file."""
    tensors = load_file(written(folder) / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shard_of = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for shard in set(shard_of.values()):
        save_file({name: t for name, t in tensors.items() if shard_of[name] == shard}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return folder / "model.safetensors.index.json"


@pytest.mark.parametrize("name", ["../a.safetensors", "/abs/a.safetensors", "b/a.safetensors", "..", "a.bin"])
def test_index_may_only_name_safetensors_inside_the_folder(name, tmp_path):
    """The file named exists, so only the name can be the reason.
    fails if: weight_files drops the check of the name."""
    folder = tmp_path / "model"
    index = sharded(folder)
    (folder / "b").mkdir()
    if name != "..":
        good = (folder / "model-00001-of-00002.safetensors").read_bytes()
        name = str(tmp_path / "a.safetensors") if name.startswith("/") else name
        (folder / name).write_bytes(good)
    edit_json(index, lambda data: data["weight_map"].update({UP: name}))
    refused(f"{name!r}, which is not a safetensors file inside the folder", load_model, folder)


def test_sharded_equals_single(tmp_path):
    """fails if: weight_files returns the first shard alone."""
    sharded(tmp_path / "two")
    one, two = load_model(written(tmp_path / "one")), load_model(tmp_path / "two")
    assert torch.equal(logits(one, tokens(1, 9)), logits(two, tokens(1, 9)))


def test_missing_shard_is_named(tmp_path):
    """fails if: weight_files does not look whether the shard exists."""
    sharded(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    refused("model-00002-of-00002.safetensors is missing", load_model, tmp_path)


def test_tensor_in_two_shards_is_named(tmp_path):
    """fails if: fill overwrites what another shard filled."""
    sharded(tmp_path)
    tensors = load_file(tmp_path / "model-00001-of-00002.safetensors")
    edit_tensors(tmp_path / "model-00002-of-00002.safetensors", lambda t: t.update(tensors))
    refused("appears in more than one file", load_model, tmp_path)
    refused(sorted(tensors)[0], load_model, tmp_path)


def test_folder_without_weights_or_with_an_empty_index_is_named(tmp_path):
    """fails if: weight_files drops either check."""
    (written(tmp_path) / "model.safetensors").unlink()
    refused(f"{tmp_path} has neither model.safetensors nor", load_model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    refused("has no weight_map", load_model, tmp_path)


def test_folder_without_config_is_named(tmp_path):
    """fails if: load_config opens the file without read_json."""
    refused("config.json", load_model, tmp_path)


# names of folders and hub ids

@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c", "~/nowhere-at-all"])
def test_missing_folder_is_no_hub_id(name, monkeypatch):
    """fails if: checkpoint_folder asks the hub for anything that is no folder."""
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    refused(f"no such folder: {name}", checkpoint_folder, name)


def test_file_is_no_folder(tmp_path):
    """fails if: checkpoint_folder tests exists() alone."""
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused("is a file", checkpoint_folder, str(tmp_path / "model.safetensors"))
    assert checkpoint_folder(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("error", [OSError("no network\nand a second line"), ValueError()])
def test_hub_id_without_network_is_one_sentence(error, monkeypatch):
    """fails if: checkpoint_folder lets the hub client's exception through, or prints all its lines."""
    def unreachable(*_, **__):
        raise error
    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    refused("owner/name is no folder here and could not be downloaded", checkpoint_folder, "owner/name")
    refused("no network" if str(error) else "ValueError", checkpoint_folder, "owner/name")


def test_nothing_executable_is_downloaded(tmp_path, monkeypatch):
    """fails if: allow_patterns is dropped or grows by *.py, *.bin or *.pt."""
    asked = {}

    def download(name, allow_patterns=None, **_):
        asked.update(name=name, patterns=allow_patterns)
        return str(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert checkpoint_folder("owner/name") == tmp_path
    assert asked["name"] == "owner/name"
    assert {Path(pattern).suffix for pattern in asked["patterns"]} == {".safetensors", ".json", ".jinja"}
