"""The run folder on disk: what counts as a run, what --fresh and pruning delete, and what hands have changed in it."""
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train  # noqa: E402
from checkpoint import RunFolder, run_path, started  # noqa: E402
from tokenizer import UserError  # noqa: E402

MARKED = {"recipe": "opd", "student": "s", "teacher": "t", "steps": 4}


def everything(folder: Path) -> dict:
    """Path -> bytes of what lies in a folder (None: a folder)."""
    return {str(path.relative_to(folder)): None if path.is_dir() else path.read_bytes() for path in folder.rglob("*")}


# which folder

@pytest.mark.parametrize("name", ["..", ".", "../precious", "a/b", "a/", "/tmp/x", ".hidden", "a\nb", "a\0b", "\udcff",
                                  "x" * 5000, "\u00e4" * 150], ids=ascii)
@pytest.mark.parametrize("fresh", [True, None])
def test_a_name_that_is_not_one_plain_part_of_a_path_is_refused(command, tmp_path, capsys, name, fresh):
    """fails if: --fresh with a slip in --name deletes or decorates somebody's files."""
    (tmp_path / "precious").mkdir()
    for path in ("precious/config.json", "precious/.lock", ".lock", "config.json", "thesis.tex.unfinished"):
        (tmp_path / path).write_text("{}")
    before = everything(tmp_path)
    assert train.main(command(fresh=fresh, name=name)) == 2
    assert "--name" in capsys.readouterr().err and everything(tmp_path) == before


@pytest.mark.parametrize("runs, words", [("~no-such-user/x", "--runs"), ("\udcff", "--runs"), ("x" * 5000, "--runs"),
                                         ("/proc/nothing", "--runs"), ("a\0b", "--runs")], ids=ascii)
def test_runs_that_can_be_no_folder_are_refused_in_one_sentence(command, tmp_path, capsys, monkeypatch, runs, words):
    monkeypatch.chdir(tmp_path)
    assert train.main(command(runs=runs)) == 2
    assert words in capsys.readouterr().err


def test_the_path_is_resolved_before_anything_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run_path("runs/../b", "a") == Path("b/a") and run_path("~", "a").is_absolute()
    assert run_path("..", "a") == tmp_path.parent / "a"


@pytest.mark.parametrize("files", [[".lock"], [".lock", "config.json"], [".lock", ".git"], ["config.json"], ["x"]],
                         ids=str)
@pytest.mark.parametrize("fresh", [True, False])
def test_a_folder_without_the_mark_of_a_run_is_left_alone(tmp_path, files, fresh):
    """fails if: .lock or any config.json makes a folder a run, as a repository or a checkpoint has them."""
    folder = tmp_path / "a"
    folder.mkdir()
    for name in [*files, "model.safetensors"]:
        (folder / name).write_text(json.dumps({"model_type": "qwen3", "vocab_size": 24}))
    before = everything(tmp_path)
    with pytest.raises(UserError, match="is no run .*; pass another --name"):
        RunFolder(folder, MARKED, fresh)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "config.json.unfinished"]], ids=str)
def test_a_start_that_was_cut_short_is_begun_again(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{")
    RunFolder(tmp_path, MARKED)
    assert json.loads((tmp_path / "config.json").read_text()) == MARKED


def test_a_checkout_survives_a_name_that_climbs(command, tmp_path, monkeypatch):
    """fails if: the parent of a runs folder that does not exist yet is taken for a run."""
    checkout = tmp_path / "checkout"
    shutil.copytree(Path(train.__file__).parent / "tests", checkout / "tests", ignore=shutil.ignore_patterns("*.pyc"))
    (checkout / ".lock").touch()
    before = everything(checkout)
    monkeypatch.chdir(checkout)
    assert train.main(command(fresh=True, runs="runs", name="..")) == 2 and everything(checkout) == before


# what the first start chose

CHOSEN = {"date": "2026-11-27T23:59:59+01:00", "threads": 2, "slots": 64, "micro_batch_tokens": 2048, "chunk_rows": 512,
          "torch": "2.13.0", "another": None}


def test_the_first_start_is_kept(tmp_path):
    """fails if: a later start overwrites it, --fresh keeps it, or it is read from what is no run."""
    assert started(tmp_path / "a") == {}
    folder = RunFolder(tmp_path / "a", MARKED)
    assert started(tmp_path / "a") == {}
    folder.note_start(CHOSEN)
    folder.note_start({**CHOSEN, "threads": 1})
    assert started(tmp_path / "a") == CHOSEN
    del folder
    RunFolder(tmp_path / "a", MARKED, fresh=True)
    assert started(tmp_path / "a") == {}
    (tmp_path / "started.json").write_text("no run is here")
    assert started(tmp_path) == {}


@pytest.mark.parametrize("text", ["", "[]", "{", "\udcff", '{"date": 5}', '{"date": "yesterday"}', '{"threads": 0}',
                                  '{"threads": "2"}', '{"slots": -1}', '{"threads": 1e400}', '{"threads": 1.5}'],
                         ids=ascii)
def test_a_damaged_start_is_one_sentence(tmp_path, text):
    RunFolder(tmp_path, MARKED)
    (tmp_path / "started.json").write_bytes(os.fsencode(text))
    with pytest.raises(UserError, match="started.json"):
        started(tmp_path)
