"""Kill and resume: a run that dies at any instant and is started again ends with the same bytes as one that
was left alone.

The kills at random instants are real ones, from outside; RESUME_KILLS=20 asks for more of them. That no file
operation is a bad instant to die is tested exhaustively, in-process, on checkpoint.py alone: test_resume_instants.py.
"""
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import MARKED, disk_full, no_waiting_for_the_disk, result  # noqa: F401 (a fixture)

import train
from support import checkpoint, saving
from support.checkpoint import RunFolder
from support.errors import UserError

KILLS = int(os.environ.get("RESUME_KILLS", "4"))
REAL_STEP = train.train_step


def interrupt(monkeypatch, at, action):
    """Do something inside train_step, after the student has moved, in these steps (counted over restarts)."""
    calls = []
    def train_step(*args):
        record = REAL_STEP(*args)
        calls.append(1)
        if len(calls) in at:
            action()
        return record
    monkeypatch.setattr(train, "train_step", train_step)


def stop_at_once():
    raise KeyboardInterrupt


@pytest.fixture
def undisturbed(command, tmp_path):
    """undisturbed(steps=6, ...) -> the result() of a run in its own folder that nobody interrupts."""
    def make(**flags):
        assert train.main(command(**{**flags, "runs": tmp_path / "calm"})) == 0
        return result(tmp_path / "calm/a")
    return make


# a process that is really killed

def start(command, **flags):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, train.__file__, *command(**flags)], env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_killed_at_random_instants_the_run_ends_with_the_same_bytes(command, tmp_path):
    """Each process dies up to two steps after one of its first six lines (plan, resume, steps), at random.
    fails if: anything random depends on more than the step, the moments or the records are not restored, or a
    checkpoint can be seen half-written."""
    flags = dict(steps=6 * KILLS, save_every=1, eval_every=5)
    calm = start(command, **flags, runs=tmp_path / "calm")
    while not calm.stdout.readline().startswith("step"):
        assert calm.poll() is None
    begun = time.perf_counter()
    assert calm.wait() == 0, calm.stdout.read()
    rng, pause = random.Random(0), 2 * (time.perf_counter() - begun) / flags["steps"]
    killed = 0
    while killed < KILLS:
        process = start(command, **flags)
        for _ in range(rng.randint(1, 6)):
            process.stdout.readline()
        time.sleep(rng.uniform(0, pause))
        process.kill()
        if process.wait() == 0:     # it was done before the kill
            break
        killed += 1
    last = start(command, **flags)
    output = last.communicate()[0]
    assert last.returncode == 0, output
    assert killed > KILLS / 2 and result(tmp_path / "runs/a") == result(tmp_path / "calm/a")


def test_a_signal_to_the_process_becomes_its_exit_status(command, tmp_path):
    """fails if: the handlers are not installed, or the status is lost on the way out."""
    process = start(command, steps=10**6, save_every=10**6)
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.terminate()
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    assert "Traceback" not in output and (tmp_path / "runs/a/last/trainer.safetensors").exists()
    assert int(re.search(r"stopped after step (\d+); the same command goes on", output)[1]) >= 1


# the loop, interrupted in-process

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_resumes_to_the_byte(command, undisturbed, tmp_path, monkeypatch,
                                                                  capfd, number):
    """fails if: the step is dropped, nothing is saved between two checkpoints, or the run goes on."""
    flags = dict(steps=6, eval_every=2, lr=0.01, schedule="cosine")
    expected = undisturbed(**flags)
    interrupt(monkeypatch, {3}, lambda: os.kill(os.getpid(), number))
    assert train.main(command(**flags)) == 128 + number
    out, err = capfd.readouterr()
    assert "stopped after step 3; the same command goes on from there" in out and "finishing this step" in err
    assert os.readlink(tmp_path / "runs/a/last") == "step-000003"
    assert not (tmp_path / "runs/a/summary.json").exists()
    assert train.main(command(**flags)) == 0
    assert "resume  " in capfd.readouterr().out and result(tmp_path / "runs/a") == expected


def test_a_signal_in_the_last_step_changes_nothing(command, tmp_path, monkeypatch):
    """fails if: a run that is done reports itself as stopped, or skips its last evaluation."""
    interrupt(monkeypatch, {2}, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train.main(command(steps=2)) == 0 and (tmp_path / "runs/a/summary.json").exists()


def test_the_second_signal_acts_at_once(command, tmp_path, monkeypatch, capfd):
    """fails if: a second Ctrl-C waits like the first, ends in a traceback, or the handlers stay behind."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    interrupt(monkeypatch, {2}, lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)])
    try:
        status = train.main(command(steps=4, save_every=1))
    except KeyboardInterrupt:
        pytest.fail("a traceback")
    assert status == 130
    assert os.readlink(tmp_path / "runs/a/last") == "step-000001"
    assert capfd.readouterr().err.splitlines()[-1].startswith("stopped at once")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("flags", [
    {}, {"recipe": "gkd"}, {"recipe": "grpo", "updates": 2}, {"lora_rank": 2}, {"dtype": "bfloat16"},
    {"reduction": "sequence", "weight_decay": 0.1, "max_grad_norm": 0.1}], ids=str)
def test_every_kind_of_run_resumes_to_the_byte(command, undisturbed, tmp_path, monkeypatch, flags):
    """Died in step 2, before the first checkpoint, and in step 5, one step after the second.
    fails if: a draw depends on earlier ones, adapters or moments are lost, or steps are recorded twice."""
    flags = dict(steps=6, save_every=2, eval_every=3, lr=0.01, **flags)
    expected = undisturbed(**flags)
    interrupt(monkeypatch, {2, 7}, stop_at_once)        # call 7 is step 5 of the second process
    assert [train.main(command(**flags)) for _ in range(3)] == [130, 130, 0]
    assert result(tmp_path / "runs/a") == expected


def test_a_record_cut_short_and_an_unfinished_checkpoint_go(command, undisturbed, tmp_path, monkeypatch):
    """fails if: a broken last line of metrics.jsonl stops the run, or *.unfinished is loaded or kept."""
    flags = dict(steps=4, save_every=2)
    expected = undisturbed(**flags)
    interrupt(monkeypatch, {3}, stop_at_once)
    assert train.main(command(**flags)) == 130
    folder = tmp_path / "runs/a"
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 0.')
    shutil.copytree(folder / "step-000002", folder / "step-000003.unfinished")
    (folder / "step-000003.unfinished/trainer.json").write_text('{"step"')
    (folder / "last.unfinished").symlink_to("step-000002")
    (folder / "samples/step-000002.jsonl.unfinished").write_text("{")
    assert train.main(command(**flags)) == 0 and result(folder) == expected


def test_a_finished_run_says_so(command, tmp_path, capsys):
    """fails if: the same command trains again, or its folder is touched."""
    assert train.main(command()) == 0
    files = [path for path in (tmp_path / "runs/a").rglob("*") if path.name != ".lock"]
    before = {path: path.stat().st_mtime_ns for path in files}
    capsys.readouterr()
    assert train.main(command(wandb=None)) == 0
    out = capsys.readouterr().out
    assert "is complete; pass --fresh" in out and "done    held-out avg@1" in out and "step 1" not in out
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_fresh_starts_again(command, undisturbed, tmp_path):
    """fails if: --fresh keeps a record, a checkpoint or the old configuration."""
    assert train.main(command(steps=3, lr=0.1, save_every=1)) == 0
    assert train.main(command(steps=2, fresh=True)) == 0
    assert result(tmp_path / "runs/a") == undisturbed(steps=2)


@pytest.mark.parametrize("complete", [True, False])
@pytest.mark.parametrize("flag,value", [("lr", 0.1), ("seed", 7), ("grpo_std", None)])
def test_another_setting_under_the_same_name_is_refused(command, monkeypatch, capsys, complete, flag, value):
    """fails if: two configurations can share a folder."""
    if not complete:
        interrupt(monkeypatch, {2}, stop_at_once)
    assert train.main(command()) == (0 if complete else 130)
    capsys.readouterr()
    changed = command(**{flag: value}) if value else [*command(), f"--no-{flag}"]
    assert train.main(changed) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and f" with {flag} = " in error and "--fresh" in error


def test_settings_that_change_no_result_may_change(command, tmp_path, monkeypatch, capsys):
    """fails if: a run that was moved, or is watched otherwise, is taken for another one."""
    interrupt(monkeypatch, {2}, stop_at_once)
    assert train.main(command(steps=3, save_every=1)) == 130
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert train.main(command(steps=3, save_every=1, runs=tmp_path / "moved", self_check=True)) == 0
    assert "resume  " in capsys.readouterr().out


def test_one_process_at_a_time(command, tmp_path, capsys):
    """fails if: the lock is not taken, or is taken after something was changed."""
    held = RunFolder(tmp_path / "runs/a", MARKED)
    assert train.main(command(fresh=True)) == 2
    assert "another process is training in" in capsys.readouterr().err
    assert json.loads((tmp_path / "runs/a/config.json").read_text()) == MARKED
    del held


# a disk that is full

@pytest.mark.parametrize("owner,name", [
    (saving, "save_file"), (checkpoint, "save_file"), (os, "replace"), (os, "fsync"),
    (shutil, "copyfile"), (Path, "write_text"), (Path, "symlink_to")],
    ids=lambda part: getattr(part, "__name__", part))
def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_stays(
        command, undisturbed, tmp_path, monkeypatch, capsys, owner, name):
    """fails if: the error is not caught at this point, or the previous checkpoint goes before the next is
    complete."""
    flags, full = dict(steps=4, save_every=1), []
    expected, real = undisturbed(**flags), getattr(owner, name)
    interrupt(monkeypatch, {3}, lambda: full.append(True))
    def limited(*args, **kwargs):
        if full:
            raise disk_full()
        return real(*args, **kwargs)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, limited)
        assert train.main(command(**flags)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    kept = 3 if name == "symlink_to" else 2         # the links are set once the checkpoint is complete
    assert error.startswith("error: saving step 3 to ") and f"checkpoint of step {kept} is intact" in error
    assert not list((tmp_path / "runs/a").rglob("step*.unfinished"))
    assert train.main(command(**flags)) == 0 and result(tmp_path / "runs/a") == expected


def test_a_full_disk_between_checkpoints_is_one_sentence(command, tmp_path, monkeypatch, capsys):
    """fails if: records or samples that cannot be written end in a traceback."""
    def full(*args, **kwargs):
        raise disk_full()
    for method in ("write_samples", "write_summary", "log", "note_start"):
        folder = RunFolder(tmp_path / method, MARKED)
        for owner, name in ((Path, "mkdir"), (Path, "write_bytes"), (checkpoint, "open")):
            monkeypatch.setattr(owner, name, full, raising=False)
        with pytest.raises(UserError, match="cannot write .*; free some space and run the same command"):
            getattr(folder, method)(*([1, []] if method == "write_samples" else [{}]))
        monkeypatch.undo()
