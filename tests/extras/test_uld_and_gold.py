"""extras/cross_tokenizer/baselines.py where both sides have one vocabulary: the same claims as of the divergences of
losses.py. Two vocabularies: cross_tokenizer/test_crossing.py.
"""
import numpy as np
import pytest
from loss_reference import (bf16_is_scored_in_float32, bf16_loses_the_rounding_of_a_matmul, case_id,
                            chunks_equal_plain_autograd, equals_the_formula, jsd_ref, moves_the_student_only,
                            rests_at_the_teacher, through_softmax)

import losses
from extras.cross_tokenizer import baselines  # noqa: F401  (adds its rows to the table)
from losses import LossArgs


def uld_ref(p, q, **_):
    slope = np.zeros(len(p))
    for mine, theirs in zip(np.argsort(-p, kind="stable"), np.argsort(-q, kind="stable")):
        slope[mine] = np.sign(p[mine] - q[theirs])
    return sum(abs(a - b) for a, b in zip(sorted(p), sorted(q))), through_softmax(p, slope)


REFERENCE = {"uld": (uld_ref, [LossArgs()]), "gold": (jsd_ref, [LossArgs(beta=beta) for beta in (0.3, 0.5)])}
CASES = [(name, args) for name, (_, all_args) in REFERENCE.items() for args in all_args]


@pytest.mark.parametrize("name,args", CASES, ids=case_id)
def test_value_and_gradient_equal_the_formula(name, args):
    """fails if: sides are paired by id instead of by rank, or gold weighs by a share of one vocabulary"""
    equals_the_formula(name, args, REFERENCE[name][0])


@pytest.mark.parametrize("name", REFERENCE)
def test_student_equal_to_teacher_is_a_fixed_point(name):
    """fails if: any term of a loss is scaled or dropped on one side only"""
    rests_at_the_teacher(name, REFERENCE[name][1])


@pytest.mark.parametrize("name,args", CASES, ids=case_id)
def test_only_the_student_gets_a_gradient_and_no_argument_is_written(name, args):
    """fails if: a loss detaches the student, or sorts an argument in place"""
    moves_the_student_only(name, args)


def test_neither_is_about_the_sampled_token():
    """fails if: a row of baselines.py is listed as one that wants the student's own samples"""
    assert not set(REFERENCE) & (losses.ON_SAMPLES_ONLY | losses.NEEDS_NO_TEACHER)


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("name", REFERENCE)
def test_chunked_backward_equals_plain_autograd(name, chunk_rows):
    """fails if: the temperature is forgotten on one side, or a loss looks at other rows than its own"""
    chunks_equal_plain_autograd(name, REFERENCE[name][1][-1], chunk_rows)


@pytest.mark.parametrize("cached", [2**19, 15])
@pytest.mark.parametrize("name", REFERENCE)
def test_bf16_states_are_scored_in_float32(monkeypatch, name, cached):
    """fails if: probabilities are sorted in bfloat16"""
    monkeypatch.setattr(losses, "CACHED_GRADIENT", cached)
    bf16_is_scored_in_float32(name, REFERENCE[name][1][-1])


@pytest.mark.parametrize("name", REFERENCE)
def test_bf16_states_lose_only_the_rounding_of_a_matmul(name):
    """fails if: probabilities are sorted in bfloat16"""
    bf16_loses_the_rounding_of_a_matmul(name, REFERENCE[name][1][-1])
