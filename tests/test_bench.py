"""What the benchmarks work out of their own figures."""
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "bench"))
import learn  # noqa: E402


def run(variant, *points, seed=0):
    """A run of bench/learn.py, from (accuracy, seconds of processor time) at steps 0, 10, ..."""
    return {"variant": variant, "seed": seed, "points": [
        {"step": 10 * n, "accuracy": accuracy, "processor": seconds, "wall": 2 * seconds}
        for n, (accuracy, seconds) in enumerate(points)]}


def test_seconds_to_a_goal_stand_in_proportion_between_two_evaluations():
    """The curve falls back after it has reached the goal, and meets another one exactly.
    fails if: the line runs from the wrong evaluation or is turned round, or a later crossing counts."""
    points = run("ours", (0.5, 1.0), (0.8, 4.0), (0.6, 6.0), (1.0, 10.0))["points"]
    assert learn.seconds_to(0.7, points, "processor") == pytest.approx(1.0 + 3.0 * 2 / 3)
    assert learn.seconds_to(0.7, points, "wall") == pytest.approx(2.0 + 6.0 * 2 / 3)
    assert learn.seconds_to(0.9, points, "processor") == pytest.approx(6.0 + 4.0 * 3 / 4)
    assert learn.seconds_to(0.8, points, "processor") == pytest.approx(4.0)
    assert learn.seconds_to(0.4, points, "processor") == 1.0
    assert learn.seconds_to(0.9, points[:3], "processor") == float("inf")


def test_the_ratio_is_that_of_the_faster_trainer_by_medians():
    """fails if: means, the slower trainer or the other clock are taken, or an unreached goal is no null in the JSON"""
    runs = [run("ours", (0.0, 0.0), (1.0, seconds)) for seconds in (2.0, 4.0, 60.0)]
    runs += [run("gkd", (0.0, 0.0), (1.0, seconds)) for seconds in (1.0, 20.0, 21.0)]
    runs += [run("distillation", (0.0, 0.0), (1.0, 12.0))]
    found = learn.summary(runs, 0.5)
    assert found["ratio"] == found["wall_ratio"] == pytest.approx(6.0 / 2.0)
    assert found["gkd"] == {"processor": 10.0, "wall": 20.0}
    assert learn.summary([run("ours", (0.0, 0.0), (0.2, 1.0))], 0.5)["ratio"] is None


def test_every_run_is_a_curve_in_both_panels():
    """fails if: a run is left out, or the SVG is not well formed"""
    runs = [run(variant, (0.2, 0.0), (0.9, 5.0), (1.0, 9.0)) for variant in ("ours", "gkd")]
    svg = ElementTree.fromstring(learn.picture(runs, 0.9))
    assert [len(item.get("points").split()) for item in svg.iter() if item.tag.endswith("polyline")] == [3] * 4
