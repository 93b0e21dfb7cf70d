"""Report: the figure that decides between two evaluations, and how it is said."""
import pytest

from support.report import better, change, headline, judged_by

JUDGED = [      # figures of an evaluation, of an earlier one -> the figure that decides, is it better, the line
    ({"avg@2": 0.5, "avg@2_ci": [0.4, 0.6], "pass@2": 0.75}, 0.4, "avg@2", True,
     "avg@2 50.0% [40.0%, 60.0%]  pass@2 75.0%  "),
    ({"avg@2": 0.5, "avg@2_ci": [0.4, 0.6], "pass@2": 0.75}, 0.5, "avg@2", False, None),
    ({"mean_length": 3.0, "reverse_kl": 0.5, "forward_kl": 0.25}, 0.6, "reverse_kl", True,
     "reverse_kl 0.5000  forward_kl 0.2500  "),
    ({"reverse_kl": 0.5, "forward_kl": 0.25}, 0.5, "reverse_kl", False, None),
    ({"reverse_kl": None, "forward_kl": None}, 0.5, "reverse_kl", False, "reverse_kl -  forward_kl -  "),
    ({"reverse_kl": 0.5, "forward_kl": 0.25}, None, "reverse_kl", True, None),
    ({"mean_length": 3.0}, None, None, True, ""),
]


@pytest.mark.parametrize("metrics, best, key, is_better, line", JUDGED)
def test_accuracy_decides_else_the_distance_else_the_later_one(metrics, best, key, is_better, line):
    """fails if: more distance is better, a tie is an improvement, or nothing to judge by keeps the first"""
    assert (judged_by(metrics), better(metrics, best)) == (key, is_better)
    assert line is None or headline(metrics) == line


def test_the_closing_words_name_the_figure_that_decided():
    """fails if: the teacher's length is compared with a distance"""
    assert change({"avg@1": 0.1}, {"avg@1": 0.2}, {"avg@1": 1.0}) == "avg@1 10.0% -> 20.0% (teacher 100.0%)"
    distances = [{"mean_length": 3.0, "reverse_kl": value} for value in (2.0, 1.0)]
    assert change(*distances, {"mean_length": 9.0}) == "reverse_kl 2.0000 -> 1.0000"
    assert change({"mean_length": 3.0}, {"mean_length": 4.0}, None) == "mean_length 3.0 -> 4.0"
