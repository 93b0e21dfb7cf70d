"""losses.py, the engine: the chunked backward pass equals plain autograd, whatever the chunk, and rounds no more than
it must."""
import pytest
import torch
from loss_reference import (D, N, REFERENCE, SKEWED, TOPK, bf16_is_scored_in_float32,
                            bf16_loses_the_rounding_of_a_matmul, body, chunks_equal_plain_autograd, close, engine,
                            engine_args, run_engine, teacher_part)

import losses
from losses import DIVERGENCES, LossArgs, Rows
from teacher import Untaught

UNTAUGHT = Untaught(torch.zeros(1, dtype=torch.int64))


def silent(rows, top_ids_NK):
    return {}


@pytest.mark.parametrize("chunk_rows", [1, 3, 100])
@pytest.mark.parametrize("name", REFERENCE)
def test_chunked_backward_equals_plain_autograd(name, chunk_rows):
    """fails if: the temperature is forgotten on one side, scale_N is not cut with the chunk, addmm_
    overwrites the gradient already there, a chunk is missed, the loss is differentiated up to the teacher"""
    chunks_equal_plain_autograd(name, REFERENCE[name][1][-1], chunk_rows)


@pytest.mark.parametrize("grad_mode", [torch.enable_grad, torch.no_grad])
def test_a_frozen_head_and_no_teacher(grad_mode):
    """fails if: a head without a gradient is not allowed, the loss runs outside enable_grad, or diagnostics want
    a teacher"""
    head_VD, layer_DD, inputs_N, _, fields_N, scale_N = engine()
    fixed_VD, hidden_ND = head_VD.detach(), body(head_VD, layer_DD, inputs_N)
    rows = Rows((hidden_ND @ fixed_VD.T).log_softmax(-1), **fields_N)
    plain = (DIVERGENCES["policy_gradient"](rows, LossArgs()) * scale_N).sum()
    (grad_DD,) = torch.autograd.grad(plain, layer_DD, retain_graph=True)
    with grad_mode():
        loss_N, noted = run_engine(hidden_ND, fixed_VD, None, UNTAUGHT, fields_N, scale_N, "policy_gradient",
                                   engine_args(LossArgs()))
    close(layer_DD.grad, grad_DD)
    assert fixed_VD.grad is None and set(noted) == {"sampler_gap"} and loss_N.shape == (N,)


def test_a_loss_that_reads_the_token_alone_is_given_nothing_else():
    """fails if: a field is wanted that the loss does not read, or something is noted unasked"""
    head_VD, layer_DD, inputs_N, teacher, fields_N, scale_N = engine()
    args = engine_args(LossArgs(), chunk_rows=4)
    loss_N, noted = run_engine(body(head_VD, layer_DD, inputs_N), head_VD.detach(), None, teacher_part(*teacher, args),
                               {"token_N": fields_N["token_N"]}, scale_N, "k2", args, observe=silent)
    assert noted == {} and (loss_N > 0).all()


@pytest.mark.parametrize("cached", [2**19, 3 * D])
@pytest.mark.parametrize("name", [n for n in REFERENCE if n != "policy_gradient"])
def test_bf16_states_are_scored_in_float32(monkeypatch, name, cached):
    """cached: entries of the head's gradient that are added at a time, all or three rows.
    fails if: a part of the head is left out, upcast leaves bfloat16 alone, or the head's gradient is summed over
    chunks in bfloat16."""
    monkeypatch.setattr(losses, "CACHED_GRADIENT", cached)
    bf16_is_scored_in_float32(name, REFERENCE[name][1][-1])


@pytest.mark.parametrize("name", [n for n in REFERENCE if n not in ("policy_gradient", *TOPK)])
def test_bf16_states_lose_only_the_rounding_of_a_matmul(name):
    """fails if: upcast leaves bfloat16 alone"""
    bf16_loses_the_rounding_of_a_matmul(name, REFERENCE[name][1][-1])


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", *SKEWED])
def test_a_divergence_in_float32_is_never_visibly_negative(name):
    """fails if: upcast leaves bfloat16 alone, or the mixture of jsd is rounded to it"""
    rng = torch.Generator().manual_seed(0)
    hidden_ND, head_VD = (torch.randn(shape, generator=rng).bfloat16() for shape in ((64, 16), (500, 16)))
    fields_N, near_VD = {"token_N": torch.zeros(64, dtype=torch.int64)}, head_VD * (1 + 2 ** -7)
    args = engine_args(LossArgs(), chunk_rows=64)
    for teacher_VD in (head_VD, near_VD):
        loss_N, _ = run_engine(hidden_ND.clone().requires_grad_(), head_VD, None,
                               teacher_part(hidden_ND, teacher_VD, args), fields_N, torch.ones(64), name, args,
                               observe=silent)
        assert loss_N.isfinite().all() and (loss_N > -1e-6).all()
        assert teacher_VD is near_VD or (loss_N.abs() < 1e-6).all()
