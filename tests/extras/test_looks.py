"""--report_only and --self_check: looks before the first step."""
import math
import re
from dataclasses import replace

import pytest
from helpers import ready

import train
from extras import report
from rollout import generate
from support.errors import UserError
from support.weights import load_model
from teacher import Teacher


@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "topk_reverse_kl", "policy_gradient", "k2"])
def test_self_check_passes_on_sound_code(command, capsys, divergence):
    """fails if: the student as its own teacher is no fixed point."""
    run = ready(command, divergence=divergence)
    report.self_check(run, None, None)
    assert "gradient norm" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["sampler", "stale sampler", "teacher"])
def test_self_check_fails_when_two_parts_disagree(command, monkeypatch, broken):
    """fails if: self_check forgets to compare the sampler's log-probs, or the teacher's distribution, with
    training."""
    run, read = ready(command), Teacher.read
    def generate_otherwise(*args, **kwargs):
        return replace(rollout := generate(*args, **kwargs), logp_BT=rollout.logp_BT * 1.1)
    def read_otherwise(*args):
        part = read(*args)
        return replace(part, hidden_nE=part.hidden_nE * 1.1)
    if broken == "sampler":
        monkeypatch.setattr(train, "generate", generate_otherwise)
    elif broken == "stale sampler":
        run.actor = load_model(run.cfg.teacher)
        run.actor.vocab_size, run.actor.refresh = run.student.vocab_size, lambda student: None
    else:
        monkeypatch.setattr(Teacher, "read", read_otherwise)
    with pytest.raises(UserError, match="--self_check failed"):
        report.self_check(run, None, None)


def table(text):
    """name -> the five numbers of its line."""
    line = r"^(\w+)" + 5 * r" +(-?[\d.]+|nan)" + "$"
    found = re.findall(line, text, re.M)
    return {name: [float(x) for x in numbers] for name, *numbers in found}


@pytest.mark.parametrize("teacher", ["student", "teacher", "self"])
def test_report_only(pair, command, tmp_path, capsys, teacher):
    """fails if: the report trains or writes, compares the student with itself, or leaves a number
    undefined"""
    teacher_flag = teacher if teacher == "self" else pair / teacher
    assert train.main(command(teacher=teacher_flag, report_only=True, problems=4)) == 0
    found = table(capsys.readouterr().out)
    assert {"reverse_kl", "forward_kl", "overlap_ratio", "overlap_advantage", "entropy_gap",
            "topk_mass_teacher"} <= set(found)
    assert all(math.isfinite(x) for row in found.values() for x in row) and not (tmp_path / "runs").exists()
    if teacher == "teacher":
        assert min(found["reverse_kl"]) > 0.1 and found["overlap_ratio"][0] < 1
    else:
        assert found["overlap_ratio"] == [1.0] * 5
        zero = ("reverse_kl", "forward_kl", "overlap_advantage", "entropy_gap")
        assert all(found[name] == [0.0] * 5 for name in zero)


def test_report_compares_two_teachers(pair, command, capsys):
    """fails if: the second table holds the student again, or reads the second teacher on other tokens"""
    flags = dict(report_only=True, problems=4)
    assert train.main(command(compare_teacher=pair / "student", **flags)) == 0
    first, second = (table(text) for text in capsys.readouterr().out.split("--compare_teacher")[0:2])
    assert first == second                      # the student itself as the other teacher
    assert train.main(command(compare_teacher=pair / "teacher", **flags)) == 0
    _, same = (table(text) for text in capsys.readouterr().out.split("--compare_teacher")[0:2])
    assert same["reverse_kl"] == [0.0] * 5 and same["overlap_ratio"] == [1.0] * 5
