"""toy/dry_pair.py: random weights of small shape, but files as published checkpoints have them."""
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import close
from support.problems import load_problems
from support.tokenizer import Tokenizer
from support.verifier import grade
from support.weights import load_model

DRY_PAIR = Path(__file__).resolve().parents[2] / "toy/dry_pair.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dry")
    subprocess.run([sys.executable, str(DRY_PAIR), str(folder)], check=True, timeout=60)
    return folder


def test_transformers_loads_them_and_finds_the_same_logits_and_prompt(folder):
    """fails if: a file is none that transformers reads, or the chat template says something else there"""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "teacher")
    asked = [{"role": "user", "content": "How many apples are left?"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    assert text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    ids = Tokenizer(folder / "teacher").prompt_ids(asked, enable_thinking=False)
    assert ids == tokenizer(text)["input_ids"] and len(ids) < len(text) / 2
    mine = load_model(folder / "teacher")
    with torch.no_grad():
        close(mine.logits(mine(torch.tensor([ids]))), theirs(torch.tensor([ids])).logits)


def test_student_and_teacher_share_a_tokenizer_and_the_problems_are_a_dozen(folder):
    """fails if: the two could not be a pair, a published solution would be graded wrong, or the head has no spare
    rows."""
    student, teacher = (Tokenizer(folder / name) for name in ("student", "teacher"))
    assert student.vocab() == teacher.vocab() and len(student.stop_ids) == 2
    assert load_model(folder / "student").config.vocab_size > student.vocab_size
    problems = [problem for name in ("train", "test") for problem in load_problems(folder / f"{name}.jsonl")]
    assert len({problem.prompt for problem in problems}) == 12
    assert all(grade(f"so #### {problem.answer}", problem.answer, "auto") for problem in problems)


def test_without_a_folder_it_is_one_sentence():
    """fails if: it writes into the folder that it is started in"""
    done = subprocess.run([sys.executable, str(DRY_PAIR)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
