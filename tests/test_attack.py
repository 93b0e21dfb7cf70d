"""A sample of every attack in tests/attack; its README has the command for the full sizes."""
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ATTACK = Path(__file__).parent / "attack"
SHARES = {"kills": 12, "disks": 12, "inputs": 70, "numbers": 24}      # title of the closing line -> how many


@pytest.fixture(scope="module")
def sample():
    """What run_all.py prints, one process for all: importing torch takes longer than ten attacks."""
    sizes = [f"--{title}={count}" for title, count in {**SHARES, "verifier": 40}.items()]
    return subprocess.run([sys.executable, ATTACK / "run_all.py", *sizes], capture_output=True, text=True, timeout=300,
                          errors="replace")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the attacks watch Linux's file system calls")
@pytest.mark.parametrize("title", SHARES)
def test_a_sample_of_the_attacks_finds_nothing(sample, title):
    closing = re.search(rf"^{title} +(\d+) of (\d+): (.*), \d+ s$", sample.stdout, re.MULTILINE)
    assert closing, sample.stdout + sample.stderr
    found = re.findall(r"(\d+) (?!not possible)", closing[3])
    assert int(closing[2]) == SHARES[title] and set(found) == {"0"}, sample.stdout


def test_the_verifier_is_compared_where_math_verify_is(sample):
    """fails if: run_all.py leaves the verifier out, or fails where there is nothing to compare it to"""
    there = importlib.util.find_spec("math_verify")
    said = "40 gradings, seed 0: 0 right here alone" if there else "math-verify is missing (pip install math-verify"
    assert said in sample.stdout and sample.returncode == 0, sample.stdout + sample.stderr
