"""speedrun.sh: with --dry every stage of the real run, on a CPU, in a copy of the project."""
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
               "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
FLAGS = "--dry", "--price", "3.60", "--runs", "out", "--", "--steps", "30"


def speedrun(folder, *flags):
    return subprocess.run(["bash", str(folder / "speedrun.sh"), *flags], cwd=folder, capture_output=True, text=True,
                          timeout=180, env=ENVIRONMENT)


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """The project without what a clone lacks."""
    folder = tmp_path_factory.mktemp("speedrun") / "copy"
    left_out = shutil.ignore_patterns(".git", "runs", ".venv", "tests", "gsm8k", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


@pytest.fixture(scope="module")
def done(copy):
    """What it said before it was killed in the middle of training, and after it was started again: about 35 seconds of
    one core."""
    first = subprocess.Popen(["bash", "speedrun.sh", *FLAGS], cwd=copy, stdout=subprocess.PIPE, text=True,
                             stderr=subprocess.STDOUT, start_new_session=True,
                             env={**ENVIRONMENT, "PYTHONUNBUFFERED": "1"})
    seen = ""
    for line in first.stdout:
        seen += line
        if line.startswith("step  3/30"):
            break
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert "step  3/30" in seen, seen
    result = speedrun(copy, *FLAGS)
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-1500:]
    return seen, result.stdout


def test_every_stage_runs_and_a_killed_run_goes_on(copy, done):
    """fails if: a stage is left out, a second start begins anew, or a file of the run or of its results is missing"""
    done = done[1]
    assert re.findall(r"^== (\w+)", done, re.MULTILINE) == ["requirements", "download", "plan", "train", "evaluate"]
    assert "plan    fits" in done and re.search(r"^resume .* from step [2-9]", done, re.MULTILINE), done
    assert not (copy / "gsm8k").exists() and not (copy / ".venv").exists()
    run, results = copy / "out/speedrun-dry", copy / "out/speedrun-dry-results"
    assert (run / "report.html").exists() and json.loads((run / "summary.json").read_text())["steps"] == 30
    for when in ("before", "after"):
        metrics = json.loads((results / f"{when}.json").read_text())
        assert metrics["problems"] == 4 and metrics["temperature"] == 0
    assert json.loads((results / "after.json").read_text())["model"] == str(run / "last")


def test_it_says_what_it_took_and_the_row_fits_the_table(copy, done):
    """fails if: a phase has no seconds, the cost is not seconds times price, or row and table have other columns"""
    done = done[1]
    found = re.search(r"([\d,]+) seconds: (.*); cost \$([\d.]+) at \$3.60 an hour", done)
    phases = {part.split()[0]: int(part.split()[1]) for part in found[2].split(", ")}
    assert set(phases) == {"requirements", "download", "plan", "train", "evaluate"} and phases["evaluate"] > 0
    assert int(found[1]) == sum(phases.values()) and float(found[3]) == pytest.approx(int(found[1]) / 1000, abs=0.006)
    report = (copy / "out/speedrun-dry-results/report.txt").read_text()
    assert done.endswith(report)
    table = re.search(r"^\| GPU .*$", (ROOT / "docs/speedrun.md").read_text(), re.MULTILINE)[0]
    assert report.splitlines()[-1].count("|") == table.count("|")


def test_the_check_is_made_before_the_first_step(done):
    """fails if: training begins without --self_check"""
    first = done[0]
    assert 0 < first.index("check   student as its own teacher") < first.index("step  1/30")


def test_it_trains_with_the_command_of_the_readme():
    """fails if: one of the two is changed alone"""
    command = re.search(r"^python train.py --student Qwen.*?\n.*?$", (ROOT / "README.md").read_text(), re.MULTILINE)[0]
    script = (ROOT / "speedrun.sh").read_text()
    given = shlex.split(re.search(r"^train=\((.*?) \$\{small", script, re.MULTILINE | re.DOTALL)[1])
    names = dict(re.findall(r"\b(data|student|teacher)=([\w./-]+)", script[script.index("data=gsm8k"):]))
    for name, value in names.items():
        given = [word.replace(f"${name}", value) for word in given]
    assert given == shlex.split(command.replace("\\\n", " "))[1:]
    address = re.search(r"\bfrom=(\S+)", script)[1]
    assert f"{address}/$f.jsonl" in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("flags, words", [
    (["--quick"], "unknown flag --quick"), (["--price", "two"], "--price takes dollars per hour"),
    (["--price"], "--price takes"), (["--runs"], "--runs takes a folder"),
    (["--dry", "--runs", "/dev/null/x"], "no folder can be made there")])
def test_a_wrong_flag_is_one_sentence(tmp_path, flags, words):
    """fails if: it is passed over, or ends in a message of bash"""
    shutil.copy(ROOT / "speedrun.sh", tmp_path)
    result = speedrun(tmp_path, *flags)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1, result.stderr
    assert result.stderr.startswith("error: ") and words in result.stderr


def test_without_a_gpu_nothing_is_downloaded(copy):
    """fails if: ten gigabytes come first and the sentence after"""
    result = speedrun(copy, "--runs", "none")
    assert result.returncode == 2 and not (copy / "gsm8k").exists()
    assert result.stderr == "error: torch finds no GPU here; bash speedrun.sh --dry goes through all of it on a CPU\n"
