"""One step: the gradient is that of the whole step, however it is cut up; a step does what a plain reference does.

Everything runs on the tiny pair of conftest.py. Not here: whole runs (test_loop.py), numbers that go bad
(test_numbers.py), the losses themselves.
"""
import copy
import math
from dataclasses import fields, replace

import pytest
import torch
from conftest import END
from helpers import adamw, collect, one_step, ready

import losses
import teacher as teacher_file
import train
from extras.fast.flash import FlashCache, Packed, flash_cache
from losses import Signals, row_scale
from model import CAUSAL, Transformer
from rollout import generate
from support.responses import from_responses
from teacher import Batch, Teacher

VOCAB = 20      # of conftest's tokenizer

DIVERGENCES = ("reverse_kl", "topk_reverse_kl", "policy_gradient")
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13}      # of a gradient, relative; measured: 9e-7, 3e-15


def cast(run, dtype):
    for model in (run.student, *run.kind.models):
        model.to(dtype).compute_dtype = dtype


def ragged(run, seed=0):
    """Ten responses of one to twelve tokens, written by the student."""
    return generate(run.student, run.prompts[:5], samples=2, max_new_tokens=[3, 12, 1, 7, 5], stop_ids=(END,),
                    seed=seed)


def gradient(run, rollout, micro_batch_tokens=10**6, chunk_rows=10**6):
    """(all gradients in one vector, what losses.backward notes per row), with everything else as train_step does it."""
    run = replace(run, cfg=replace(run.cfg, micro_batch_tokens=micro_batch_tokens, chunk_rows=chunk_rows))
    asked = [0] * len(rollout.length_B)
    batch = Batch(rollout, asked, [run.train[i] for i in asked], True, 0, run.tokenizer)
    parts = Teacher(run.kind.models[0], run.cfg).parts(batch)
    with torch.no_grad():
        s = train.signals(run, batch, parts)
    fields_N = {"token_N": s.token_N, "behavior_logp_N": s.behavior_logp_N}
    if run.cfg.divergence == "policy_gradient":
        fields_N["advantage_N"] = losses.opd(s, run.cfg)
    scale_N = row_scale(s, torch.ones_like(s.behavior_logp_N), run.cfg.reduction)
    losses.zero_gradients(run.student)
    per_row = losses.backward(run.student, rollout, parts, fields_N, scale_N, losses.DIVERGENCES[run.cfg.divergence],
                              run.cfg, run.observe)
    return gradients_of(run), per_row


def gradients_of(run):
    return torch.cat([p.grad.flatten() for _, p in run.student.trainable()])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


# the gradient of a step

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("micro_batch_tokens,chunk_rows", [(1, 999), (40, 999), (999, 1), (999, 7), (30, 3)])
def test_memory_settings_do_not_change_the_gradient(command, dtype, divergence, micro_batch_tokens, chunk_rows):
    """fails if: row_scale counts inside a micro-batch, row_n is ignored, or a chunk overwrites the head's
    gradient."""
    run = ready(command, divergence=divergence, reduction="sequence")
    cast(run, dtype)
    rollout = ragged(run)
    whole, rows = gradient(run, rollout)
    parts, rows_of_parts = gradient(run, rollout, micro_batch_tokens, chunk_rows)
    assert distance(parts, whole) < ROUNDING[dtype] and whole.norm() > 0.01
    torch.testing.assert_close(rows_of_parts, rows, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_order_and_padding_do_not_change_the_gradient(command, dtype, divergence):
    """fails if: rows of teacher and student are put in different orders, or a padding column is taken for a
    token."""
    run = ready(command, divergence=divergence, reduction="sequence")
    cast(run, dtype)
    rollout = ragged(run)
    whole, _ = gradient(run, rollout)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    names = [f.name for f in fields(rollout) if f.init]
    shuffled = replace(rollout, **{name: getattr(rollout, name)[order] for name in names})
    assert distance(gradient(run, shuffled, 40)[0], whole) < ROUNDING[dtype]
    wide = replace(rollout, **{name: torch.nn.functional.pad(getattr(rollout, name), (0, 5))
                               for name in names if name.endswith("_BT")})
    assert distance(gradient(run, wide)[0], whole) < ROUNDING[dtype]


def test_the_ids_of_padding_change_nothing(command):
    """fails if: attention, the scores or the loss look past the end of a response."""
    run = ready(command)
    rollout = ragged(run)
    at_BT = torch.arange(rollout.tokens_BT.shape[1]).expand_as(rollout.tokens_BT)
    padding_BT = at_BT >= (rollout.prompt_len_B + rollout.length_B)[:, None]
    other = replace(rollout, tokens_BT=torch.where(padding_BT, END, rollout.tokens_BT))
    assert padding_BT.sum() > 20
    assert torch.equal(gradient(run, other)[0], gradient(run, rollout)[0])


@pytest.mark.parametrize("stop", [0, END])
def test_gradient_enters_where_response_tokens_are_predicted_and_nowhere_else(command, stop):
    """Padding is 0, so with stop 0 the two ids are equal, and the stop token must still be trained.
    fails if: the mask is made from ids, drops the last token, covers the prompt, or is not shifted by one."""
    run = ready(command, recipe="sft")
    responses = [[5, stop], [6, 7, 8], [6, stop, 7, 8, stop]]
    rollout = from_responses([[1, 2, 3], [4, 5, 6], [4, 5, 6, 0, 2]], responses, [True, False, True], "cpu")
    states = []
    def keep(module, args, out):
        out.retain_grad()
        states.append(out)
    run.student.model.norm.register_forward_hook(keep)
    _, per_row = gradient(run, rollout)
    trained_BT = states[0].grad.norm(dim=-1) > 0
    assert [row.nonzero().flatten().tolist() for row in trained_BT] == [[2, 3], [2, 3, 4], [4, 5, 6, 7, 8]]
    assert len(per_row["loss"]) == 10 and (per_row["loss"] > 0).all()


@pytest.mark.parametrize("reduction", ["token", "sequence"])
@pytest.mark.parametrize("weights", [[1, 1, 1, 1, 1, 1], [1, 0, 2, 0, 0, 0.5], [0, 0, 0, 1, 0, 0], [0] * 6])
def test_row_scale_is_a_mean_over_the_rows_with_a_weight(reduction, weights):
    """fails if: rows of weight 0 count in a denominator, or a sequence without rows counts as one."""
    sequence_of, loss = [0, 0, 0, 1, 2, 2], [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    rows = [[i for i in range(6) if sequence_of[i] == b and weights[i] > 0] for b in range(3)]
    rows = [sequence for sequence in rows if sequence]
    total = [sum(weights[i] * loss[i] for i in sequence) for sequence in rows]
    if reduction == "token":
        expected = sum(total) / max(1, sum(map(len, rows)))
    else:
        expected = sum(part / len(sequence) for part, sequence in zip(total, rows)) / max(1, len(rows))
    s = Signals(sequence_N=torch.tensor(sequence_of), length_B=torch.tensor([3, 1, 2]))
    scale_N = row_scale(s, torch.tensor(weights, dtype=torch.float64), reduction)
    assert (scale_N * torch.tensor(loss)).sum().item() == pytest.approx(expected, abs=1e-12)


def plain_step(run, rollout, lr):
    """One opd step as a textbook has it: all logits at once, autograd, AdamW. Gives (student, loss, norm)."""
    cfg, student, mask_BT = run.cfg, copy.deepcopy(run.student), rollout.mask_BT[:, 1:]
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=cfg.weight_decay)
    p_BTV, q_BTV = (
        (model(rollout.tokens_BT)[:, :-1] @ model.head_weight()[:VOCAB].T / cfg.temperature).log_softmax(-1)
        for model in (student, run.kind.models[0]))
    loss = (p_BTV.exp() * (p_BTV - q_BTV)).sum(-1)[mask_BT].mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.max_grad_norm)
    optimizer.step()
    return student, loss.item(), norm.item()


def test_one_step_equals_a_plain_reference_in_float64(command):
    """Measured: no weight differs by more than 4e-16 after a step of 0.05.
    fails if: temperature, clipping, warm-up, weight decay, the shift by one or a head's cut is left out."""
    run = ready(command, temperature=0.7, weight_decay=0.1, max_grad_norm=0.5, lr=0.1, warmup_steps=2,
                     max_new_tokens=9)
    cast(run, torch.float64)
    expected, loss, norm = plain_step(run, collect(run).rollout, lr=0.05)
    record = one_step(run, adamw(run, weight_decay=run.cfg.weight_decay))
    assert (record["loss"], record["grad_norm"]) == pytest.approx((loss, norm), rel=1e-6)
    assert norm > run.cfg.max_grad_norm
    for (name, mine), theirs in zip(run.student.named_parameters(), expected.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9, msg=name)


def test_a_step_on_the_paths_of_a_gpu_is_the_same_step(command, gpu_paths, monkeypatch):
    """Recorded decode steps, sequences end to end in several micro-batches; float64. Measured: 2e-15.
    fails if: scoring or update stands sequences side by side, or a packed row loses its place."""
    passes, forward = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward",
                        lambda model, tokens, keys=CAUSAL: passes.append(keys) or forward(model, tokens, keys))

    def whole_step():
        run = ready(command, problems=4, samples=3, max_new_tokens=9, micro_batch_tokens=90, lr=0.1)
        cast(run, torch.float64)
        record = one_step(run)
        return run.student.cache_type, gradients_of(run), record
    _, found, record = whole_step()
    assert {type(keys) for keys in passes} == {Packed, FlashCache} and gpu_paths[1]
    monkeypatch.undo()
    plain, wanted, other = whole_step()
    assert plain is not flash_cache
    assert distance(found, wanted) < 1e-12
    assert record == pytest.approx(other, rel=1e-5, nan_ok=True)


def test_the_sampling_copy_takes_the_faster_ways_too(command, flash):
    """fails if: only the models that are loaded do, and a GPU samples in bfloat16 without flash attention."""
    run = ready(command, dtype="bfloat16")
    assert run.actor is not run.student
    assert {model.cache_type for model in (run.student, run.actor, *run.kind.models)} == {flash_cache}


@pytest.mark.parametrize("flags, asks", [
    ({"divergence": "jsd"}, False), ({"divergence": "reverse_kl", "weight": "fire"}, True),
    ({"divergence": "policy_gradient"}, True),
    ({"divergence": "policy_gradient", "advantage": "grpo"}, False)], ids=str)
def test_teacher_head_is_left_to_the_update_unless_credit_asks(command, monkeypatch, flags, asks):
    """fails if: every step projects the teacher's states twice, or a rule misses its log-probs."""
    seen, log_probs = [], teacher_file.log_probs
    monkeypatch.setattr(teacher_file, "log_probs", lambda *args: seen.append(1) or log_probs(*args))
    run = ready(command, **flags)
    record = one_step(run)
    assert bool(seen) == asks and math.isfinite(record["loss"]) and math.isfinite(record["teacher_entropy"])


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "policy_gradient"])
def test_padding_rows_of_the_vocabulary_play_no_part(command, side, divergence):
    """The two sides have 24 and 32 rows for 20 tokens.
    fails if: sampling, scoring or training uses a head that is not cut to the real vocabulary."""
    def spoiled_step(size):
        run = ready(command, divergence=divergence, lr=0.1)
        with torch.no_grad():
            (run.student if side == "student" else run.kind.models[0]).head_weight()[VOCAB:] = size
        record = one_step(run)
        weights = [p[:VOCAB] for p in run.student.parameters()]
        return {key: str(value) for key, value in record.items()}, weights
    (record, weights), (other, other_weights) = spoiled_step(0.0), spoiled_step(1e4)
    assert all(map(torch.equal, weights, other_weights))
    assert record == other


def test_updates_per_rollout_move_the_weights_that_often(command):
    """fails if: only the first of several updates reaches the optimizer."""
    run = ready(command, updates=3, divergence="policy_gradient")
    optimizer = adamw(run)
    one_step(run, optimizer)
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


def test_the_sampler_sees_the_weights_of_this_step(command):
    """fails if: the bfloat16 copy is not refreshed before each rollout, or bfloat16 weights are trained."""
    run = ready(command, dtype="bfloat16", lr=0.1)
    optimizer = adamw(run)
    one_step(run, optimizer)
    trained = {name: p.detach().to(torch.bfloat16) for name, p in run.student.named_parameters()}
    one_step(run, optimizer, 1)
    assert all(torch.equal(p, trained[name]) for name, p in run.actor.named_parameters())
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}


# what a step learns from

@pytest.mark.parametrize("total,count", [(10, 3), (7, 7), (6, 20)])
def test_every_epoch_is_a_permutation_and_the_step_alone_decides(total, count):
    """fails if: an epoch's end drops or repeats problems, all epochs are alike, or the seed is not used."""
    def steps(number, seed=3):
        return [train.pick(total, range(step * count, (step + 1) * count), seed) for step in range(number)]
    order = [i for asked in steps(total * 6) for i in asked]
    epochs = [order[start:start + total] for start in range(0, len(order) - total + 1, total)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > len(epochs) / 2
    assert train.pick(total, range(5 * count, 6 * count), seed=3) == order[5 * count:6 * count]
    assert steps(6, seed=4) != steps(6)


def test_rewards_and_groups_belong_to_their_problems(command, monkeypatch):
    """fails if: answers are compared with another problem's, or two problems share a group."""
    run = ready(command, recipe="grpo", problems=3, samples=2)
    batch = collect(run)
    wanted = batch.problems[2].answer
    monkeypatch.setattr(teacher_file, "grade", lambda text, answer, verifier: answer == wanted)
    assert batch.reward_B.tolist() == [0, 0, 1, 1, 0, 0]
    seen = []
    monkeypatch.setitem(losses.ADVANTAGES, "grpo", lambda s, a: seen.append(s) or losses.grpo(s, a))
    one_step(run)
    assert seen[0].group_B.tolist() == [0, 0, 1, 1, 2, 2] and seen[0].reward_B.tolist() == [0, 0, 1, 1, 0, 0]


def own_logp(run, batch):
    """log p of every response token."""
    return Teacher(run.student, run.cfg).parts(batch)[0].told["teacher_logp_N"]


def test_grpo_learns_from_rewards_alone(command, monkeypatch):
    """fails if: the advantage is not used, has the wrong sign, or a unanimous group moves the weights."""
    run = ready(command, recipe="grpo", teacher="none", problems=2, samples=4, lr=0.01, updates=3)
    batch = collect(run)
    good = batch.rollout.response(0)
    monkeypatch.setattr(teacher_file, "grade", lambda text, *rest: text == run.tokenizer.decode(good))
    before = own_logp(run, batch)
    one_step(run)
    after = own_logp(run, batch)
    assert (after - before)[:len(good)].sum() > 0.1
    monkeypatch.setattr(teacher_file, "grade", lambda *rest: True)
    record = one_step(run)
    assert record["grad_norm"] == 0 and run.batch.reward_B.tolist() == [1] * 8
