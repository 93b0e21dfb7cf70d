"""The run folder on disk: what counts as a run, what --fresh and pruning delete, and what hands have changed in it."""
import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from safetensors import SafetensorError

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import train  # noqa: E402
from support.checkpoint import RunFolder, read_responses, recorded, run_path, started  # noqa: E402
from support import run_folder  # noqa: E402
from support.errors import UserError  # noqa: E402

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


# whose things are in it

WRITES = (".lock", "config.json", "started.json", "metrics.jsonl", "summary.json", "teacher_responses.json",
          "samples/step-000000.jsonl", "tensorboard/events.out.tfevents.1", "step-000000/config.json",
          "step-000000/model.safetensors", "step-000000/tokenizer.json", "step-000000/trainer.json",
          "step-000000/trainer.safetensors", "last", "best", "step-000002.unfinished/.tmpa1B2c3",
          "step-000001.removed/config.json", "last.unfinished", "summary.json.unfinished",
          "samples/step-000002.jsonl.unfinished")


def lay(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.split(".")[0] in ("last", "best"):
            path.symlink_to("step-000000")
        else:
            path.write_text(json.dumps(MARKED) if name == "config.json" else "user or run")


def test_fresh_deletes_all_that_a_run_writes(tmp_path):
    lay(tmp_path / "a", *WRITES)
    RunFolder(tmp_path / "a", {**MARKED, "steps": 7}, fresh=True)
    assert sorted(everything(tmp_path)) == ["a", "a/.lock", "a/config.json"]
    assert json.loads((tmp_path / "a/config.json").read_text())["steps"] == 7


def test_the_next_start_deletes_what_is_unfinished_and_nothing_else(tmp_path):
    """fails if: a kill leaves something for ever, or a name that merely looks like ours goes with it."""
    mine = ("thesis.unfinished", "samples/a.unfinished", "step-000020-backup/x", "step-20.unfinished/x", "old.removed",
            "step-000003.removed/notes", "step-000004.unfinished/notes")
    lay(tmp_path, *WRITES, *mine)
    RunFolder(tmp_path, MARKED)
    left = {name for name, content in everything(tmp_path).items() if content is not None}
    kept = {name for name in WRITES if ".unfinished" not in name and ".removed" not in name}
    assert left == kept - {"last", "best"} | set(mine) and os.readlink(tmp_path / "best") == "step-000000"


@pytest.mark.parametrize("name", ["notes.txt", "step-000000/notes", "step-000020-backup/x", "samples/mine.jsonl",
                                  "best.txt", "step-20/x", "tensorboard/plot.png", "a/config.json", ".git/config",
                                  "x.unfinished", "step-000002.unfinished/x", "last.removed.txt"])
def test_fresh_deletes_nothing_where_somebody_has_put_something(tmp_path, name):
    """fails if: a file that no run wrote goes, or others have gone before it is found."""
    lay(tmp_path / "a", *WRITES, name)
    before = everything(tmp_path)
    with pytest.raises(UserError, match=f"{name.split('/')[0]}[^ ]* was not written by a run.* move it elsewhere"):
        RunFolder(tmp_path / "a", MARKED, fresh=True)
    assert everything(tmp_path) == before


FILES = ("metrics.jsonl", "summary.json", "started.json", "step-000000/trainer.json", ".lock")
OTHERS = [(name, kind) for kind in ("folder", "pipe", "link") for name in (*FILES, "config.json")] + [
    (name, kind) for kind in ("pipe", "file") for name in ("best", "last", "samples", "step-000000")] + [
    ("best", "folder"), ("last", "folder"), ("samples", "link"), ("step-000000", "link")]


@pytest.mark.parametrize("name, kind", OTHERS)
@pytest.mark.parametrize("fresh", [True, False])
def test_another_thing_under_a_name_of_ours_is_refused(tmp_path, name, kind, fresh):
    """fails if: a user's file is replaced, a link is followed to write, or a pipe is waited for."""
    lay(tmp_path / "a", *WRITES)
    (tmp_path / "precious").write_text("user")
    path = tmp_path / "a" / name
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "file": lambda: path.write_text("user"),
     "link": lambda: path.symlink_to(tmp_path / "precious")}[kind]()
    before = sorted(str(item) for item in tmp_path.rglob("*"))
    with pytest.raises(UserError, match="move it elsewhere|in the way|cannot write|is no run"):
        RunFolder(tmp_path / "a", MARKED, fresh)
    assert sorted(str(item) for item in tmp_path.rglob("*")) == before and (tmp_path / "precious").read_text() == "user"


def test_remains_of_a_killed_deletion_go_with_the_next_start(tmp_path):
    """Whatever it had come to: the mark goes last. fails if: remains stay, or a folder of the user's goes."""
    for number, names in enumerate([WRITES, ["config.json", ".lock"], [".lock"], ["step-000000/model.safetensors"]]):
        lay(tmp_path / f".removed-{number}", *names)
        RunFolder(tmp_path / str(number), MARKED)
        assert (tmp_path / f".removed-{number}").exists() == (names[0].startswith("step"))
    lay(tmp_path / ".removed-0", *WRITES, "notes")
    with pytest.raises(UserError, match="in the way"):
        RunFolder(tmp_path / "0", MARKED, fresh=True)
    RunFolder(tmp_path / "0", MARKED)
    assert (tmp_path / ".removed-0/notes").exists() and (tmp_path / ".removed-0/metrics.jsonl").exists()


def test_the_lock_is_on_the_folder_that_has_the_name(tmp_path, monkeypatch):
    """--fresh of another process moves the folder between opening and locking.
    fails if: two processes can then train under one name."""
    real, moved = run_folder.fcntl.flock, []
    lay(tmp_path / "a", "config.json", ".lock")

    def flock(*args):
        if not moved:
            moved.append(os.rename(tmp_path / "a", tmp_path / ".removed-a"))
        real(*args)
    monkeypatch.setattr(run_folder.fcntl, "flock", flock)
    first = RunFolder(tmp_path / "a", MARKED)
    assert os.path.samestat(os.fstat(first.lock.fileno()), os.stat(tmp_path / "a/.lock"))
    with pytest.raises(UserError, match="another process is training in"):
        RunFolder(tmp_path / "a", MARKED)


# checkpoints

def open_run(folder: Path, steps=(), keep=None) -> RunFolder:
    run = RunFolder(folder, MARKED)
    for step in steps:
        lay(folder, *(f"step-{step:06d}/{name}" for name in ("model.safetensors", "trainer.json")))
        run.link("last", run.step_folder(step))
    if keep is not None:
        run.link("best", run.step_folder(keep))
    return run


def test_pruning_keeps_last_best_and_what_somebody_added_to(tmp_path):
    run = open_run(tmp_path, (0, 1, 2, 3, 1234567), keep=0)
    lay(tmp_path, "step-000002/notes", "step-000001-backup/model.safetensors", "step-0000001/x", "step-1/x")
    assert run.steps() == [0, 1, 2, 3, 1234567]
    run.prune()
    assert run.steps() == [0, 2, 1234567]
    for name in ("step-000002/notes", "step-000001-backup/model.safetensors", "step-0000001/x", "step-1/x"):
        assert (tmp_path / name).exists()


@pytest.mark.parametrize("owner, name", [(os, "replace"), (Path, "unlink"), (Path, "rmdir")])
def test_an_old_checkpoint_that_cannot_be_deleted_is_one_sentence(tmp_path, monkeypatch, capsys, owner, name):
    """fails if: the run ends, or what is half deleted keeps the name of a checkpoint."""
    run = open_run(tmp_path, (0, 1, 2))

    def refused(*args, **kwargs):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refused)
        run.prune()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("warning: an old checkpoint in") and "Permission denied" in line
    assert all((run.step_folder(step) / "trainer.json").exists() for step in run.steps()) and 2 in run.steps()
    del run
    run = RunFolder(tmp_path, MARKED)
    run.prune()
    assert run.steps() == [2] and not list(tmp_path.glob("*.removed"))


@pytest.mark.parametrize("number, words", [
    (errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EACCES, "the right to write"),
    (errno.EROFS, "can only be read"), (errno.ENAMETOOLONG, "shorter --name"), (errno.EISDIR, "in the way"),
    (errno.EIO, "mend the disk")])
def test_the_advice_fits_the_error(tmp_path, number, words):
    """fails if: a full disk is blamed for everything."""
    with pytest.raises(UserError, match=words):
        with run_folder.writing(tmp_path):
            raise OSError(number, os.strerror(number))
    assert words in run_folder.advice(SafetensorError(f"I/O error: {os.strerror(number)} (os error {number})"))


# metrics.jsonl

def trimmed(folder: Path, content: bytes, step: int) -> bytes:
    run = RunFolder(folder, MARKED)
    run.metrics.write_bytes(content)
    run.trim_metrics(step)
    return run.metrics.read_bytes()


def test_records_of_later_steps_and_a_record_cut_short_are_made_again(tmp_path):
    head = b'{"config": {}, "commit": null}\n{"step": 1}\n'
    for tail in (b'{"step": 2}\n', b'{"step": 2, "lo', b'{"step": 2}', b"\0" * 20, b"{", b"\n \n", b""):
        assert trimmed(tmp_path, head + tail, 1) == head
    assert trimmed(tmp_path, head.strip(), 1) == head
    assert trimmed(tmp_path, head + b'{"step": 2}', 2) == head + b'{"step": 2}\n'
    assert json.loads(trimmed(tmp_path, head[-12:], -1))["config"] == MARKED


@pytest.mark.parametrize("line", [
    b"hello", b"[1]", b"5", b'{"loss": 1}', b'{"step": "1"}', b'{"step": true}', b"\xff\xfe", b'{"step": 1e400}',
    b"{" * 100000, b'{"step": 2, "lo'], ids=lambda line: repr(line[:20]))
def test_a_line_that_no_run_wrote_is_not_deleted(tmp_path, line):
    content = b'{"config": {}}\n{"step": 1}\n' + line + b'\n{"step": 2}\n'
    with pytest.raises(UserError, match="metrics.jsonl, line 3, is no record of a run; move that line"):
        trimmed(tmp_path, content, 1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content
    if not line.startswith(b"{"):       # nor at the end, where ours may be cut short
        with pytest.raises(UserError, match="line 3"):
            trimmed(tmp_path, content[:content.rindex(b"\n", 0, -1)], 1)


# hands in a run

@pytest.mark.parametrize("text", ["", "{}", "[]", "{", "\udcff", '{"step": 2}', '{"step": 1}', "null",
                                  '{"step": "2", "phases": {}}'], ids=ascii)
def test_a_damaged_state_is_one_sentence(command, tmp_path, capsys, text):
    """fails if: it ends in a traceback, at once or steps later."""
    assert train.main(command(save_every=1)) == 0
    folder = tmp_path / "runs/a"
    (folder / "summary.json").unlink()
    (folder / "step-000002/trainer.json").write_bytes(os.fsencode(text))
    capsys.readouterr()
    assert train.main(command(save_every=1)) == 2
    assert "step-000002 cannot be resumed (" in capsys.readouterr().err
    shutil.rmtree(folder / "step-000002")
    assert train.main(command(save_every=1)) == 0


@pytest.mark.parametrize("text", ["", "{}", "[]", "{", "\udcff", "null", '{"timings": 5}',
                                  '{"before": {}, "after": {}, "teacher": null, "timings": {}}'], ids=ascii)
def test_a_damaged_summary_is_one_sentence(command, tmp_path, capsys, text):
    assert train.main(command()) == 0
    file = tmp_path / "runs/a/summary.json"
    file.write_bytes(os.fsencode(text))
    assert train.main(command()) == 2
    assert "summary.json is not what a run writes (" in capsys.readouterr().err
    file.unlink()
    assert train.main(command()) == 0 and json.loads(file.read_text())["steps"] == 2


@pytest.mark.parametrize("text", ["", "[]", "null", '{"0": 5}', '{"0": [[]]}', '{"0": [["a"]]}', '{"0": [[999]]}',
                                  '{"0": [[-1]]}', '{"99": [[1]]}', '{"x": [[1]]}', '{"0": [[true]]}', '{"0": [5]}'],
                         ids=ascii)
def test_damaged_responses_of_the_teacher_are_one_sentence(tmp_path, text):
    path = tmp_path / "teacher_responses.json"
    path.write_text(text)
    with pytest.raises(UserError, match="teacher_responses.json is not what a run writes .* the teacher writes again"):
        read_responses(path, 10, 24)
    path.write_text('{"0": [[1, 23]], "9": [[0], [5]]}')
    assert read_responses(path, 10, 24) == {0: [[1, 23]], 9: [[0], [5]]}


def test_the_start_is_a_checkpoint_like_any_other(command, tmp_path):
    """Step 0 is the best of a run that only gets worse. fails if: 0 is taken for none."""
    assert train.main(command(save_every=1, lr=1.0)) == 0
    folder = tmp_path / "runs/a"
    assert os.readlink(folder / "best") == "step-000000" and os.readlink(folder / "last") == "step-000002"
    shutil.rmtree(folder / "step-000002")
    (folder / "summary.json").unlink()
    assert train.main(command(save_every=1, lr=1.0)) == 0 and os.readlink(folder / "best") == "step-000000"


def test_what_a_killed_pruning_left_goes_with_the_next_start(command, tmp_path):
    assert train.main(command(save_every=1, steps=3, eval_every=1)) == 0
    folder = tmp_path / "runs/a"
    names = {"step-000003", os.readlink(folder / "best")}
    stray = next(f"step-{step:06d}" for step in (0, 1, 2) if f"step-{step:06d}" not in names)
    shutil.copytree(folder / "step-000003", folder / stray)
    (folder / "summary.json").unlink()
    assert train.main(command(save_every=1, steps=3, eval_every=1)) == 0
    assert {item.name for item in folder.glob("step-*")} == names


def test_paths_of_the_project_are_recorded_relative_to_it():
    root = Path(train.__file__).parent
    config = {"student": f"{root}/toy/student", "teacher": f"low={root}/toy/a,high={root}/toy/b", "lr": 1.0,
              "data": "/elsewhere/x", "other": f"{root}er/x", "typed": "../x"}
    assert recorded(config) == {**config, "student": "toy/student", "teacher": "low=toy/a,high=toy/b"}
    assert recorded(recorded(config)) == recorded(config)
