"""extras/router_loss.py against transformers and by hand."""
from types import SimpleNamespace

import pytest
import torch
from family_cases import SHAPE, write_peer
from helpers import adamw, one_step, ready
from model_cases import tokens

import losses
from conftest import write_checkpoint
from extras.router_loss import balance
from rollout import generate
from support.errors import UserError
from support.weights import load_model

MOE = dict(model_type="qwen3_moe", vocab_size=24, hidden_size=32, intermediate_size=16, num_hidden_layers=2, head_dim=8,
           num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)


@pytest.mark.parametrize("max_tokens", [60, 10_000])
def test_value_and_gradient_are_those_of_transformers_over_the_whole_step(max_tokens, tmp_path):
    """fails if: padding counts, a micro-batch has a mean of its own, or f has a gradient."""
    theirs = write_peer("qwen3-moe", tmp_path)
    ours, coef = load_model(tmp_path), 0.3
    rollout = generate(ours, [tokens(n, seed=n).tolist() for n in (3, 30, 9)], max_new_tokens=[20, 5, 30], stop_ids=())
    losses.zero_gradients(ours)
    cfg = SimpleNamespace(router_aux_loss=coef, micro_batch_tokens=max_tokens)
    found = balance(SimpleNamespace(student=ours, cfg=cfg), SimpleNamespace(rollout=rollout))
    total_B1 = (rollout.prompt_len_B + rollout.length_B)[:, None]
    real_BT = torch.arange(rollout.tokens_BT.shape[1]) < total_B1
    out = theirs(rollout.tokens_BT, attention_mask=real_BT.long(), output_router_logits=True)
    (coef * out.aux_loss).backward()
    assert found["router_loss"] == pytest.approx(coef * out.aux_loss.item(), rel=1e-5)
    for n in range(SHAPE["num_hidden_layers"]):
        mine, peer = (model.model.layers[n].mlp.gate.weight.grad for model in (ours, theirs))
        assert (mine - peer).abs().max() <= 1e-4 * peer.abs().max() and peer.abs().max() > 0


def test_a_run_balances_its_experts(command, pair, tmp_path):
    """fails if: the gradient is not added to that of the step, or has the wrong sign."""
    write_checkpoint(tmp_path / "moe", 3, **MOE)
    run = ready(command, student=tmp_path / "moe", router_aux_loss=10.0, problems=8, lr=3e-3)
    optimizer = adamw(run)
    records = [one_step(run, optimizer, step) for step in range(12)]
    assert records[-1]["router_loss"] < records[0]["router_loss"] and records[0]["busiest_expert"] >= 1


def test_a_student_without_experts_is_refused(command):
    with pytest.raises(UserError, match="--router_aux_loss"):
        ready(command, router_aux_loss=1e-3)
