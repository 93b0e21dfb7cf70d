"""What README.md and docs/ say, as far as it can be looked up: links, files, flags, recipes, commands, the picture."""
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from xml.etree import ElementTree

import pytest

import train
from support.settings import eval_arguments

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SCRIPTS = [path for folder in ("extras", "experiments", "bench", "docs", "toy", "tests/attack", "tests")
           for path in sorted((ROOT / folder).glob("*.py"))]
OF_OTHERS = {"--standalone", "--nproc_per_node", "--help", "--max-logprobs"}   # torchrun's, everybody's, vLLM's
INSTALL = "python3 -m venv .venv && .venv/bin/pip install -q -r"
by_name = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def without_code(text):
    """Markdown without code, where brackets are no links."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)


def anchors(page):
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def known_flags():
    """Every flag of train.py, eval.py, and the scripts beside them."""
    with pytest.MonkeyPatch.context() as patch:
        found = set()
        patch.setattr("argparse.ArgumentParser.parse_args", lambda parser, argv: found.update(
            option for action in parser._actions for option in action.option_strings))
        eval_arguments([])
    for field in fields(train.Config):
        found |= {f"--{field.name}"} | ({f"--no-{field.name}"} if field.type is bool else set())
    for script in SCRIPTS:
        found |= set(re.findall(r"add_argument\(f?\"(--\w+)\"", script.read_text()))
    found |= set(re.findall(r"^ +(--\w+)\) ", (ROOT / "speedrun.sh").read_text(), re.MULTILINE))
    run_all = (ROOT / "tests/attack/run_all.py").read_text()        # makes one of every name in its table
    return found | {f"--{name}" for name in re.findall(r"\"(\w+)\": \(\w+, \d+\)", run_all)} | OF_OTHERS


@by_name
def test_links_lead_somewhere(page):
    """fails if: a linked file is moved or renamed, or a heading that is linked to changes its words"""
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists() and linked.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(linked), target


@by_name
def test_files_in_code_exist(page):
    """fails if: a command or a sentence names a Python file of this project under an old path"""
    folders = "|".join(path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith("."))
    named = re.findall(rf"(?<![\w/.])((?:{folders})/[\w./]*\w\.(?:py|md|txt|jsonl?|svg))", page.read_text())
    named += re.findall(r"python ([\w/]+\.py)", page.read_text())
    made = {"extras/" + name for name in re.findall(r"^# extras/(\w+\.py)$", page.read_text(), re.MULTILINE)}
    gone = [name for name in named if not (ROOT / name).exists() and name not in made and name.split("/")[0] != "runs"]
    assert gone == []


@by_name
def test_flags_exist(page):
    """fails if: a flag is renamed, or a page promises one that is not there. Examples add their own (--min_p)."""
    text = page.read_text()
    own = {f"--{name}" for name in re.findall(r"^    (\w+): \w+ = opt\(", text, re.MULTILINE)}
    named = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text))
    assert sorted(named - known_flags() - own) == []


def test_the_readme_is_read_in_one_sitting():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 220


def test_the_readme_has_a_row_for_each_recipe_and_for_no_other():
    """fails if: a recipe is added or dropped without its row"""
    table = re.search(r"^\| `--recipe` \|.*?(?=\n\n)", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)[0]
    named = [name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(train.SETTINGS.recipes)


def test_the_readme_names_every_module_of_extras_and_no_other():
    readme = (ROOT / "README.md").read_text()
    named = {name for line in re.findall(r"^\| · (.*?) \|", readme, re.MULTILINE)
             for name in re.findall(r"`([\w./]+)`", line)}
    there = {path.name + "/" * path.is_dir() for path in (ROOT / "extras").iterdir()
             if not path.name.startswith(("_", "."))}
    assert named == there


def test_the_readme_draws_the_loop_as_train_does():
    """fails if: one of the two drawings is changed alone"""
    drawing = re.search(r"^( *problems ──►.*?optimizer)$", train.__doc__, re.MULTILINE | re.DOTALL)[1]
    drawing = "\n".join(line.removeprefix("    ") for line in drawing.splitlines())
    assert drawing in (ROOT / "README.md").read_text()


def test_the_readme_gives_the_two_commands_of_a_fresh_machine():
    """fails if: .ci/run, which runs the first line with `python -m pytest`, would run another one"""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert f"{INSTALL} requirements.txt && .venv/bin/python train.py" in lines
    first = next(line for line in lines if "python -m pytest" in line)
    assert first == f"{INSTALL} tests/requirements.txt && .venv/bin/python -m pytest -q"


# The picture

def draw(folder, out):
    return subprocess.run([sys.executable, ROOT / "docs/make_picture.py", folder, "--out", out], capture_output=True,
                          text=True, timeout=60)


def test_the_picture_is_drawn_from_the_records_of_a_run(tmp_path):
    """fails if: a curve misses a point, or the SVG is not well formed"""
    tested = [{"step": step, "eval": {"avg@2": mean, "avg@2_ci": [mean - 0.1, mean + 0.1]}} for step, mean in
              ((0, 0.25), (2, 0.5), (4, 0.75))]
    tested[0]["eval_teacher"] = {"avg@2": 0.875}
    stepped = [{"step": step, "reverse_kl": 10.0 ** -step, "loss": 1.0} for step in (1, 2, 3, 4)]
    records = [{"config": {}}, *tested, *stepped, {"step": 5, "loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    done = draw(tmp_path, tmp_path / "run.svg")
    assert done.returncode == 0, done.stderr
    svg = ElementTree.parse(tmp_path / "run.svg").getroot()
    curves = [len(item.get("points").split()) for item in svg.iter() if item.tag.endswith("polyline")]
    words = {item.text for item in svg.iter() if item.tag.endswith("text")}
    assert curves == [3, 4] and {"student 75.0%", "teacher 87.5%", "held-out accuracy (avg@2)"} <= words


def test_without_a_run_the_picture_is_refused_in_a_sentence(tmp_path):
    done = draw(tmp_path, tmp_path / "run.svg")
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval": {"mean_length": 1.0}}\n')
    done = draw(tmp_path, tmp_path / "run.svg")
    assert done.returncode == 2 and "graded evaluations" in done.stderr


def test_the_picture_in_the_readme_is_well_formed():
    assert ElementTree.parse(ROOT / "docs/run.svg").getroot().tag.endswith("svg")
