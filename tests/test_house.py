"""The rules by which the project is built, as far as they can be counted."""
import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CORE = ("train", "model", "rollout", "teacher", "losses", "eval")
PACKAGES = {"torch", "safetensors", "tokenizers", "numpy", "tqdm", "jinja2", "huggingface_hub"}


def python_files(*folders):
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def imported(path, at_top=True):
    """The modules that a file imports: at its top, or anywhere in it."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_top else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_the_top_holds_the_six_files_and_nothing_else():
    assert {path.stem for path in ROOT.glob("*.py")} == set(CORE)


def test_the_six_are_read_in_one_evening():
    """fails if: they grow. losses.py is a catalogue, whose entries are read alone."""
    lines = {name: len((ROOT / f"{name}.py").read_text().splitlines()) for name in CORE}
    assert sum(lines.values()) <= 2000, lines
    assert all(count <= 400 for name, count in lines.items() if name != "losses"), lines


def test_functions_of_the_six_fit_a_screen():
    """fails if: one is longer than 60 lines or takes more than ten parameters"""
    for name in CORE:
        for node in ast.walk(ast.parse((ROOT / f"{name}.py").read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, (name, node.name)
                assert len(node.args.args) + len(node.args.kwonlyargs) <= 10, (name, node.name)


def test_lines_fit_a_window():
    """fails if: a line of code is wider than 120 columns, in the tests and experiments too."""
    folders = "bench", "docs", "experiments", "extras", "support", "tests", "toy"
    files = [*ROOT.glob("*.py"), *python_files(*folders)]
    assert [f"{path.relative_to(ROOT)}:{number}" for path in files
            for number, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120] == []


def test_core_and_support_import_no_extra():
    """fails if: a core file reaches into extras/, at its top or inside a function; support/extras.py alone looks for
    it"""
    for path in [*(ROOT / f"{name}.py" for name in CORE), *python_files("support")]:
        reached = {name for name in imported(path, at_top=False) if name.split(".")[0] == "extras"}
        assert not reached or path.name == "extras.py", (path, reached)


def test_the_six_import_each_other_support_and_the_packages_of_the_card():
    known = PACKAGES | set(CORE) | {"support"} | set(sys.stdlib_module_names)
    for name in CORE:
        others = {module.split(".")[0] for module in imported(ROOT / f"{name}.py", at_top=False)} - known
        assert not others, (name, others)


def test_no_import_goes_in_a_circle():
    """Imports inside functions counted too. fails if: two files need each other"""
    files = [*(ROOT / f"{name}.py" for name in CORE), *python_files("support", "extras")]
    needs = {module_of(path): imported(path, at_top=False) for path in files}
    needs = {name: {other for other in others if other in needs and other != name} for name, others in needs.items()}
    needs["support.extras"] -= {"extras"}       # looks the folder up when it is there
    for package in ("extras", "extras.cross_tokenizer", "extras.fast", "extras.parallel"):
        needs[package] = set()                  # a package is the list of its modules
    gone: set[str] = set()
    while ready := [name for name, others in needs.items() if name not in gone and others <= gone | {
            "extras", "extras.cross_tokenizer", "extras.fast", "extras.parallel"}]:
        gone |= set(ready)
    assert set(needs) == gone, {name: others - gone for name, others in needs.items() if name not in gone}


def test_a_plain_step_opens_few_files():
    """fails if: following one train_step takes more files or functions than it did when this was written"""
    done = subprocess.run([sys.executable, str(ROOT / "tests/trace_step.py")], capture_output=True, text=True,
                          timeout=120)
    counts = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert counts["files"] <= 7 and counts["functions"] <= 77 and counts["changes of file"] <= 28, counts


# Without extras

@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A copy of the project without extras/."""
    copy = tmp_path_factory.mktemp("bare") / "copy"
    left_out = shutil.ignore_patterns(".git", "runs", ".venv", "tests", "extras", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=left_out)
    return copy


def command(folder, *flags):
    return subprocess.run([sys.executable, "train.py", *flags], cwd=folder, capture_output=True, text=True, timeout=240,
                          env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"})


def test_without_extras_the_same_steps_are_taken(bare, tmp_path):
    """fails if: the core needs an extra, or an extra changes what plain OPD computes"""
    flags = ["--problems", "8", "--steps", "3", "--eval_limit", "2", "--eval_k", "1", "--eval_every", "0",
             "--name", "x", "--runs", str(tmp_path)]
    steps = []
    for folder in (bare, ROOT):
        done = command(folder, *flags, "--fresh")
        assert done.returncode == 0, done.stderr
        records = map(json.loads, (tmp_path / "x/metrics.jsonl").read_text().splitlines())
        steps.append([{key: value for key, value in record.items() if "second" not in key}
                      for record in records if "loss" in record])
    assert len(steps[0]) == 3
    for mine, theirs in zip(*steps):
        # the sampler's own numbers may differ in their last bit: an extra packs the head for a CPU
        assert mine.keys() == theirs.keys()
        for key in mine:
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5, abs=1e-6, nan_ok=True), (key, mine, theirs)
        for key in ("loss", "grad_norm", "tokens"):
            assert mine[key] == theirs[key], (key, mine, theirs)


@pytest.mark.parametrize("flags", [("--recipe", "sg"), ("--recipe", "xtok"), ("--lora_rank", "4"),
                                   ("--teacher", "self"),
                                   ("--advantage", "exopd", "--divergence", "policy_gradient")], ids=" ".join)
def test_without_extras_what_needs_one_is_refused_in_a_sentence(bare, flags):
    done = command(bare, *flags)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("error: "), done.stderr


def test_without_extras_help_shows_only_what_is_there(bare):
    shown, whole = command(bare, "--help").stdout, command(ROOT, "--help").stdout
    for word in ("lora_rank", "lmbda", "  xtok", "self_teacher", "compile", "chunk_credit"):
        assert word not in shown and word in whole, word
