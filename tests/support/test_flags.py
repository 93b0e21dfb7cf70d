"""Flags: defaults, then the recipe, then the command line; the name of a run; --help."""
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import train
from support.flags import run_name
from support.flags import parse as parse_with
from support.start import NOT_THE_RUN
from support.tokenizer import template_variables


def parse(argv):
    return parse_with(argv, train.SETTINGS)


def name_of(argv):
    return run_name(*parse(argv), NOT_THE_RUN)


def test_defaults_then_recipe_then_flags():
    """fails if: a recipe overrides a flag, or a flag of one type arrives as another."""
    flags = "--recipe gkd --lr 1 --problems 3 --no-eval_teacher --fresh --verifier exact"
    cfg, given = parse(flags.split())
    assert (cfg.divergence, cfg.lmbda, cfg.problems, cfg.verifier) == ("jsd", 0.5, 3, "exact")
    assert cfg.eval_teacher is False and cfg.fresh is True and isinstance(cfg.lr, float)
    assert cfg.samples == train.Config.samples
    assert given == ["eval_teacher", "fresh", "lr", "problems", "recipe", "verifier"]
    assert parse("--lmbda 0.25 --recipe gkd --divergence forward_kl".split())[0].lmbda == 0.25
    assert parse(["--recipe", "grpo", "--samples", "4"])[0].samples == 4
    assert parse([]) == (train.Config(), [])


@pytest.mark.parametrize("argv,name", [
    ("", "opd"), ("--recipe gkd", "gkd"),
    ("--recipe gkd --lr 1e-4 --student /a/b/c/ --seed 2", "gkd,lr=0.0001,seed=2,student=c"),
    ("--lr 1e-4 --runs x --fresh --wandb --tensorboard --plan --self_check --name y", "opd,lr=0.0001"),
    ("--data a/b:*?.jsonl --no-grpo_std", "opd,data=b_.jsonl,grpo_std=False")])
def test_run_name_follows_from_the_flags(argv, name):
    """fails if: two different experiments share a name, or a flag that changes no result is part of it."""
    assert name_of(argv.split()) == name


def test_run_name_fits_into_a_file_name():
    """fails if: the name is not cut, or keeps characters that a file system refuses."""
    assert len(name_of(["--student", "x" * 300])) == 200
    odd = name_of(["--teacher", "../a b\n\0*", "--stop_ids", "1/.."])
    assert odd == "opd,stop_ids=..,teacher=a_b_"


def test_every_flag_has_a_help_line():
    """fails if: a field of Config is added without its help."""
    assert [f.name for f in fields(train.Config) if len(f.metadata.get("help", "")) < 10] == []


def test_help_and_exit_status_of_the_script():
    """fails if: --help lacks a flag, or the status of main() does not become the process's."""
    script = [sys.executable, str(Path(train.__file__))]
    shown = subprocess.run([*script, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and all(f"--{f.name}" in shown.stdout for f in fields(train.Config))
    refused = subprocess.run([*script, "--lrr", "1"], capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (2, "") and "did you mean --lr?" in refused.stderr


def test_template_variables_are_json_or_text():
    """fails if: json.loads is dropped (the text "false" is true in a template)"""
    found = template_variables("a=false,b=3", ["c=low", "d=x=y", "e="])
    assert found == {"a": False, "b": 3, "c": "low", "d": "x=y", "e": ""}
