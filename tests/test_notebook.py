"""notebooks/opd.ipynb: it runs from top to bottom, and what it says is true."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks/opd.ipynb"
CELLS = json.loads(NOTEBOOK.read_text())["cells"]
CODE = [(number, "".join(cell["source"])) for number, cell in enumerate(CELLS, 1) if cell["cell_type"] == "code"]

RUN = """
import json, sys, traceback
space = {"__name__": "__main__"}
for number, source in json.loads(sys.stdin.read()):
    try:
        exec(compile(source, f"cell {number}", "exec"), space)
    except BaseException as error:
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        sys.exit(f"cell {number} failed: {error}")
shown = getattr(sys.modules.get("pictures"), "shown", {})
print(json.dumps({"shown": shown, "accuracy": space.get("accuracy")}))
"""


def run(cells, folder):
    """The cells in order in one process, as a notebook in this folder would run them."""
    return subprocess.run([sys.executable, "-c", RUN], cwd=folder, input=json.dumps(cells), capture_output=True,
                          text=True, timeout=180,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})


@pytest.fixture(scope="module")
def done():
    """About 25 seconds of one core."""
    result = run(CODE, NOTEBOOK.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1]), result.stdout


def test_it_runs_from_top_to_bottom_and_the_student_learns(done):
    """fails if: a cell raises (its number is named), an identity that the text claims does not hold, or the student
    does not learn"""
    accuracy = done[0]["accuracy"]
    assert list(accuracy) == ["reverse KL", "grpo"] and all(len(points) == 9 for points in accuracy.values())
    (_, first), *_, (_, last) = accuracy["reverse KL"]
    assert last > first + 0.5 and last > accuracy["grpo"][-1][1] > first


def test_its_pictures_are_well_formed_and_hold_what_they_show(done):
    """fails if: a token's text breaks the markup, or a bar, a token or a point is left out"""
    shown = {name: ElementTree.fromstring(picture) for name, picture in done[0]["shown"].items()}
    assert list(shown) == ["one token", "push", "layout", "coloured", "accuracy, reverse KL", "answers",
                           "accuracy, grpo"]

    def count(name, tag):
        return sum(item.tag.split("}")[-1] == tag for item in shown[name].iter())
    assert count("one token", "rect") == 1 + 16 and count("push", "rect") == 1 + 8
    rows = int(re.search(r"blue: (\d+) rows", done[1])[1])
    blue = [item for item in shown["layout"].iter("span") if "#9ec5fe" in item.get("style")]
    assert len(blue) == rows and count("coloured", "span") == 8 + rows
    assert count("accuracy, reverse KL", "circle") == 9 and count("accuracy, grpo", "circle") == 18
    assert count("answers", "tr") == 9


def test_a_cell_that_fails_is_named():
    """fails if: the tests above would not see an error, or not say where it was"""
    result = run([(2, CODE[0][1]), (3, "1 / 0")], NOTEBOOK.parent)
    assert result.returncode == 1 and result.stderr.endswith("cell 3 failed: division by zero\n")


def test_on_a_machine_without_the_project_it_asks_for_a_fork_or_clones_it(tmp_path):
    """fails if: the first cell invents an address, or does not find what it has cloned"""
    number, first = CODE[0]
    result = run([(number, first)], tmp_path)
    assert result.returncode == 1 and result.stderr.count("\n") == 1, result.stderr
    assert "Write your fork's address into REPOSITORY" in result.stderr
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no repository to clone")
    here, count = re.subn(r'(?m)^REPOSITORY = "[^"]*"', f"REPOSITORY = {str(ROOT)!r}", first)
    found = "assert ROOT == Path.cwd() / 'opd' and (ROOT / 'train.py').exists()"
    result = run([(number, here), (number + 1, found)], tmp_path)
    assert count == 1 and result.returncode == 0, result.stderr


def test_what_is_stored_is_small_and_names_no_machine():
    """fails if: the notebook is committed with outputs of a run, with paths of a machine, or has grown"""
    assert 18 <= len(CELLS) <= 24
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in CELLS if "outputs" in cell)
    assert not re.search(r"/(home|tmp|root|Users|content|work)/", NOTEBOOK.read_text())
    assert all(len(source.splitlines()) <= 30 for _, source in CODE)
    assert max(len(line) for _, source in CODE for line in source.splitlines()) <= 110    # what a browser shows


def test_its_links_lead_somewhere():
    """fails if: a file that the text names is moved"""
    links = [link for cell in CELLS if cell["cell_type"] == "markdown"
             for link in re.findall(r"\]\(([^)]+)\)", "".join(cell["source"]))]
    assert len(links) >= 8 and all((NOTEBOOK.parent / link).resolve().exists() for link in links)
