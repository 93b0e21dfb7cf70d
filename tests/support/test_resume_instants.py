"""No file operation of support/checkpoint.py is a bad instant to die, or for the disk to be full: each is tried,
in-process."""
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import MARKED, disk_full, no_waiting_for_the_disk, result  # noqa: F401 (a fixture)
from safetensors.torch import load_file

from model import Transformer
from support import checkpoint, run_folder, saving
from support.checkpoint import RunFolder
from support.errors import UserError
from support.model_config import ModelConfig
from support.tokenizer import Tokenizer


class Death(BaseException):
    """Like a kill: nothing catches it."""

OPERATIONS = [(os, "replace"), (os, "fsync"), (shutil, "copyfile"), (checkpoint, "save_file"),
              (saving, "save_file"), (Path, "write_text"), (Path, "write_bytes"), (Path, "unlink"), (Path, "rmdir"),
              (Path, "symlink_to"), (Path, "mkdir")]


def break_operation(patch, fatal, error):
    """File operation number `fatal` raises; on a full disk so do all later ones that need space. A write
    leaves half of its file. Returns a list with an entry per operation."""
    done, deletions = [], (Path.rmdir, Path.unlink)
    written = {checkpoint.save_file: 1, shutil.copyfile: 1, Path.write_text: 0, Path.write_bytes: 0}    # which argument
    def wrap(real):
        def operation(*args, **kwargs):
            done.append(real)
            full = error is not Death and len(done) > fatal and real not in deletions
            if full or error is Death and len(done) == fatal + 1:
                if real in written:
                    real(*args, **kwargs)
                    os.truncate(args[written[real]], os.path.getsize(args[written[real]]) // 2)
                raise error()
            return real(*args, **kwargs)
        return operation
    for owner, name in OPERATIONS:
        patch.setattr(owner, name, wrap(getattr(owner, name)))
    return done


def check_links(folder):
    """last and best, where they exist, are whole checkpoints at every instant."""
    for link in (folder / "last", folder / "best"):
        if link.is_symlink():
            assert json.loads((link / "trainer.json").read_text())["step"] == int(os.readlink(link)[-6:])
            assert load_file(link / "model.safetensors") and load_file(link / "trainer.safetensors")
            assert Tokenizer(link).stop_ids


def small_run(folder, tokenizer, steps=4, fresh=False, **other):
    """RunFolder used as train.py does, with a model that its optimizer moves. Steps 1 and 3 are the best."""
    config = dict(model_type="llama", vocab_size=3, hidden_size=2, intermediate_size=2, num_hidden_layers=1,
                  num_attention_heads=1)
    model = Transformer(ModelConfig.from_dict(config)).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    run = RunFolder(folder, {**MARKED, **other}, fresh)
    state = run.resume(model, optimizer, {}, {}) or {"step": 0}
    while state["step"] < steps:
        step = state["step"] = state["step"] + 1
        for number, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, step + number)
        optimizer.step()
        run.log({"step": step})
        if step % 2:
            run.write_samples(step, [{"step": step}])
            state["best_step"] = step
        run.save(step, model, tokenizer, optimizer, state, best=state["best_step"] == step, also={})
    run.write_summary({"step": steps})


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, pair, monkeypatch):
    """fails if: a file of a checkpoint, or one of the small files, is renamed before it is flushed."""
    flushed, renamed, real = [], [], os.replace
    def replace(source, target):
        if not Path(source).is_symlink():
            assert {Path(source), *Path(source).glob("*")} <= set(flushed)
            renamed.append(Path(target).name)
        real(source, target)
    for file in (checkpoint, run_folder):
        monkeypatch.setattr(file, "flush", flushed.append)
    monkeypatch.setattr(os, "replace", replace)
    small_run(tmp_path / "run", Tokenizer(pair / "student"), steps=2)
    assert {"config.json", "metrics.jsonl", "step-000001", "step-000002", "summary.json"} <= set(renamed)
    assert flushed.count(tmp_path / "run") == 2
    assert flushed[-1] == tmp_path / "run/summary.json.unfinished"


@pytest.mark.parametrize("error", [Death, disk_full], ids=["kill", "full"])
def test_no_file_operation_is_a_bad_instant(tmp_path, pair, monkeypatch, error):
    """The process dies, or the disk is full from then on, at each of a hundred operations; then all is well.
    fails if: a checkpoint is renamed before it is complete, a leftover blocks the next start, or a link is
    forgotten."""
    tokenizer = Tokenizer(pair / "student")
    small_run(tmp_path / "calm", tokenizer)
    expected = result(tmp_path / "calm")
    assert expected["left"] == [".lock", "best", "config.json", "last", "metrics.jsonl", "samples",
                                "step-000003", "step-000004", "summary.json"]
    for fatal in range(1000):
        folder = tmp_path / str(fatal)
        with monkeypatch.context() as patch:
            done = break_operation(patch, fatal, error)
            try:
                small_run(folder, tokenizer)
            except (Death, UserError) as reason:
                assert isinstance(reason, UserError) == (error is not Death)
        if len(done) <= fatal:
            break
        check_links(folder)
        small_run(folder, tokenizer)
        assert result(folder) == expected, fatal
        shutil.rmtree(folder)
    assert fatal > 100


def test_a_killed_fresh_leaves_the_old_run_whole_or_nothing_of_it(tmp_path, pair, monkeypatch):
    """The old run has another configuration: the next command without --fresh may refuse it, but only as it was.
    fails if: what is half deleted bears the name of a run, or something is left over."""
    tokenizer = Tokenizer(pair / "student")
    small_run(tmp_path / "calm/a", tokenizer, steps=1, seed=0)
    small_run(tmp_path / "old/a", tokenizer, steps=2, seed=1)
    expected, old = result(tmp_path / "calm/a"), result(tmp_path / "old/a")
    refused = 0
    for fatal in range(1000):
        runs = tmp_path / str(fatal)
        shutil.copytree(tmp_path / "old", runs, symlinks=True)
        with monkeypatch.context() as patch:
            done = break_operation(patch, fatal, Death)
            try:
                small_run(runs / "a", tokenizer, steps=1, fresh=True, seed=0)
            except Death:
                pass
        if len(done) <= fatal:
            break
        try:
            small_run(runs / "a", tokenizer, steps=1, seed=0)
        except UserError as error:
            assert "was started with seed" in str(error) and result(runs / "a") == old
            refused += 1
        else:
            assert result(runs / "a") == expected and os.listdir(runs) == ["a"], fatal
        shutil.rmtree(runs)
    assert fatal > 40 and refused in (1, 2)
