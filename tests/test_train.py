"""train.py: the gradient is that of the whole step, however it is cut up; a setting does what its help says;
a run leaves what the docstrings promise.

Everything runs on the tiny pair of conftest.py. Not here: kill and resume (test_resume.py), wrong input
(test_bad_input.py), the losses themselves (test_losses.py).
"""
import copy
import json
import math
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import credit  # noqa: E402
import data  # noqa: E402
import losses  # noqa: E402
import memory  # noqa: E402
import report  # noqa: E402
import rollout as rollout_file  # noqa: E402
import step as step_file  # noqa: E402
import teacher as teacher_file  # noqa: E402
import config  # noqa: E402
import train  # noqa: E402
import update  # noqa: E402
from checkpoint import trainable  # noqa: E402
from model import ModelConfig, Transformer  # noqa: E402
from weights import load_model  # noqa: E402
from rollout import from_responses, generate  # noqa: E402
from teacher import score  # noqa: E402
from tokenizer import Tokenizer, UserError  # noqa: E402

END, VOCAB = 17, 20     # of conftest's tokenizer
DIVERGENCES = ("reverse_kl", "topk_reverse_kl", "policy_gradient")
ROUNDING = {torch.float32: 2e-6, torch.float64: 1e-13}      # of a gradient, relative; measured: 9e-7, 3e-15


@pytest.fixture
def setup(command):
    """setup(lr=0.1, ...) -> (Config, Setup) of the tiny run with these flags."""
    def make(**flags):
        cfg, _ = train.parse(command(**flags))
        train.check(cfg)
        return train.set_up(cfg)
    return make


def cast(run, dtype):
    for model in (run.student, *run.teachers):
        model.to(dtype).compute_dtype = dtype


def ragged(run, seed=0):
    """Ten responses of one to twelve tokens, written by the student."""
    return generate(run.student, run.prompts[:5], samples=2, max_new_tokens=[3, 12, 1, 7, 5], stop_ids=(END,),
                    seed=seed, vocab_size=VOCAB)


def scored(run, model, rollout):
    return score([model], rollout, 0 * rollout.length_B, vocab_size=VOCAB, temperature=1.0, max_tokens=99,
                 chunk_rows=99)


def adamw(run):
    return torch.optim.AdamW([p for _, p in trainable(run.student)], weight_decay=0)


def gradient(cfg, run, rollout, micro_batch_tokens=10**6, chunk_rows=10**6):
    """(all gradients in one vector, per_row of backward()), with everything else as train_step does it."""
    cfg = replace(cfg, micro_batch_tokens=micro_batch_tokens)
    scores = score(run.teachers, rollout, 0 * rollout.length_B, vocab_size=VOCAB, temperature=cfg.temperature,
                   max_tokens=micro_batch_tokens, chunk_rows=chunk_rows)
    s = update.signals(rollout, torch.zeros_like(rollout.length_B), None, scores)
    advantage_N = credit.opd(s, cfg) if cfg.divergence == "policy_gradient" else None
    scale_N = update.row_scale(s, torch.ones_like(s.student_N), cfg.reduction)
    per_row = update.backward(run.student, rollout, s, scores, scale_N, advantage_N, cfg, vocab_size=VOCAB,
                             chunk_rows=chunk_rows)
    return gradients_of(run), per_row


def gradients_of(run):
    return torch.cat([p.grad.flatten() for _, p in trainable(run.student)])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder):
    return [record for record in metrics(folder) if "loss" in record]


# the gradient of a step

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("micro_batch_tokens,chunk_rows", [(1, 999), (40, 999), (999, 1), (999, 7), (30, 3)])
def test_memory_settings_do_not_change_the_gradient(setup, dtype, divergence, micro_batch_tokens, chunk_rows):
    """fails if: row_scale counts inside a micro-batch, row_n is ignored, or a chunk overwrites the head's
    gradient."""
    cfg, run = setup(divergence=divergence, reduction="sequence")
    cast(run, dtype)
    rollout = ragged(run)
    whole, rows = gradient(cfg, run, rollout)
    parts, rows_of_parts = gradient(cfg, run, rollout, micro_batch_tokens, chunk_rows)
    assert distance(parts, whole) < ROUNDING[dtype] and whole.norm() > 0.01
    torch.testing.assert_close(rows_of_parts, rows, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_order_and_padding_do_not_change_the_gradient(setup, dtype, divergence):
    """fails if: rows of teacher and student are put in different orders, or a padding column is taken for a
    token."""
    cfg, run = setup(divergence=divergence, reduction="sequence")
    cast(run, dtype)
    rollout = ragged(run)
    whole, _ = gradient(cfg, run, rollout)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    names = [f.name for f in fields(rollout)]
    shuffled = replace(rollout, **{name: getattr(rollout, name)[order] for name in names})
    assert distance(gradient(cfg, run, shuffled, 40)[0], whole) < ROUNDING[dtype]
    wide = replace(rollout, **{name: torch.nn.functional.pad(getattr(rollout, name), (0, 5))
                               for name in names if name.endswith("_BT")})
    assert distance(gradient(cfg, run, wide)[0], whole) < ROUNDING[dtype]


def test_the_ids_of_padding_change_nothing(setup):
    """fails if: attention, the scores or the loss look past the end of a response."""
    cfg, run = setup()
    rollout = ragged(run)
    at_BT = torch.arange(rollout.tokens_BT.shape[1]).expand_as(rollout.tokens_BT)
    padding_BT = at_BT >= (rollout.prompt_len_B + rollout.length_B)[:, None]
    other = replace(rollout, tokens_BT=torch.where(padding_BT, END, rollout.tokens_BT))
    assert padding_BT.sum() > 20
    assert torch.equal(gradient(cfg, run, other)[0], gradient(cfg, run, rollout)[0])


@pytest.mark.parametrize("stop", [0, END])
def test_gradient_enters_where_response_tokens_are_predicted_and_nowhere_else(setup, stop):
    """Padding is 0, so with stop 0 the two ids are equal, and the stop token must still be trained.
    fails if: the mask is made from ids, drops the last token, covers the prompt, or is not shifted by one."""
    cfg, run = setup(recipe="sft")
    responses = [[5, stop], [6, 7, 8], [6, stop, 7, 8, stop]]
    rollout = from_responses([[1, 2, 3], [4, 5, 6], [4, 5, 6, 0, 2]], responses, [True, False, True], "cpu")
    states = []
    def keep(module, args, out):
        out.retain_grad()
        states.append(out)
    run.student.model.norm.register_forward_hook(keep)
    _, per_row = gradient(cfg, run, rollout)
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
    s = credit.Signals(None, None, None, torch.tensor(sequence_of), None, torch.tensor([3, 1, 2]), None, None)
    scale_N = update.row_scale(s, torch.tensor(weights, dtype=torch.float64), reduction)
    assert (scale_N * torch.tensor(loss)).sum().item() == pytest.approx(expected, abs=1e-12)


def plain_step(run, cfg, rollout, lr):
    """One opd step as a textbook has it: all logits at once, autograd, AdamW. Gives (student, loss, norm)."""
    student, mask_BT = copy.deepcopy(run.student), rollout.mask_BT[:, 1:]
    optimizer = torch.optim.AdamW(student.parameters(), lr=lr, weight_decay=cfg.weight_decay)
    p_BTV, q_BTV = (
        (model(rollout.tokens_BT)[:, :-1] @ model.head_weight()[:VOCAB].T / cfg.temperature).log_softmax(-1)
        for model in (student, run.teachers[0]))
    loss = (p_BTV.exp() * (p_BTV - q_BTV)).sum(-1)[mask_BT].mean()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.max_grad_norm)
    optimizer.step()
    return student, loss.item(), norm.item()


def test_one_step_equals_a_plain_reference_in_float64(setup):
    """Measured: no weight differs by more than 4e-16 after a step of 0.05.
    fails if: temperature, clipping, warm-up, weight decay, the shift by one or a head's cut is left out."""
    cfg, run = setup(temperature=0.7, weight_decay=0.1, max_grad_norm=0.5, lr=0.1, warmup_steps=2,
                     max_new_tokens=9)
    cast(run, torch.float64)
    rollout, _, _ = step_file.collect(cfg, run, 0, {})
    expected, loss, norm = plain_step(run, cfg, rollout, lr=0.05)
    optimizer = torch.optim.AdamW(run.student.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    record = step_file.train_step(cfg, run, optimizer, 0, {}, step_file.Clock())
    assert (record["loss"], record["grad_norm"]) == pytest.approx((loss, norm), rel=1e-6)
    assert norm > cfg.max_grad_norm
    for (name, mine), theirs in zip(run.student.named_parameters(), expected.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9, msg=name)


def test_a_step_on_the_paths_of_a_gpu_is_the_same_step(setup, gpu_paths, monkeypatch):
    """Recorded decode steps, sequences end to end in several micro-batches; float64. Measured: 2e-15.
    fails if: scoring or update stands sequences side by side, or a packed row loses its place."""
    passes, forward = [], Transformer.forward
    monkeypatch.setattr(Transformer, "forward", lambda model, tokens, cache=None, lengths=None: passes.append(
        (cache, lengths)) or forward(model, tokens, cache, lengths))

    def one_step():
        cfg, run = setup(problems=4, samples=3, max_new_tokens=9, micro_batch_tokens=90, lr=0.1)
        cast(run, torch.float64)
        record = step_file.train_step(cfg, run, adamw(run), 0, {}, step_file.Clock())
        return run.student.packs, gradients_of(run), record
    packed, found, record = one_step()
    assert {lengths is not None for cache, lengths in passes if cache is None} == {True}
    monkeypatch.undo()
    plain, wanted, other = one_step()
    assert packed and not plain and gpu_paths[1]
    assert distance(found, wanted) < 1e-12
    assert record == pytest.approx(other, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("flags, asks", [
    ({"divergence": "jsd"}, False), ({"divergence": "reverse_kl", "weight": "fire"}, True),
    ({"divergence": "policy_gradient"}, True),
    ({"divergence": "policy_gradient", "advantage": "grpo"}, False)], ids=str)
def test_teacher_head_is_left_to_the_update_unless_credit_asks(setup, monkeypatch, flags, asks):
    """fails if: every step projects the teacher's states twice, or a rule misses its log-probs."""
    seen, distributions = [], teacher_file.distributions
    monkeypatch.setattr(teacher_file, "distributions", lambda *args: seen.append(1) or distributions(*args))
    cfg, run = setup(**flags)
    record = step_file.train_step(cfg, run, adamw(run), 0, {}, step_file.Clock())
    assert bool(seen) == asks and math.isfinite(record["loss"]) and math.isfinite(record["teacher_entropy"])


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "policy_gradient"])
def test_padding_rows_of_the_vocabulary_play_no_part(setup, side, divergence):
    """The two sides have 24 and 32 rows for 20 tokens.
    fails if: sampling, scoring or training uses a head that is not cut to the real vocabulary."""
    def one_step(size):
        cfg, run = setup(divergence=divergence, lr=0.1)
        with torch.no_grad():
            (run.student if side == "student" else run.teachers[0]).head_weight()[VOCAB:] = size
        record = step_file.train_step(cfg, run, adamw(run), 0, {}, step_file.Clock())
        weights = [p[:VOCAB] for p in run.student.parameters()]
        return {key: str(value) for key, value in record.items()}, weights
    (record, weights), (other, other_weights) = one_step(0.0), one_step(1e4)
    assert all(map(torch.equal, weights, other_weights))
    assert record == other


def test_updates_per_rollout_move_the_weights_that_often(setup):
    """fails if: only the first of several updates reaches the optimizer."""
    cfg, run = setup(updates=3, divergence="policy_gradient")
    optimizer = adamw(run)
    step_file.train_step(cfg, run, optimizer, 0, {}, step_file.Clock())
    assert {int(state["step"]) for state in optimizer.state.values()} == {3}


def test_the_sampler_sees_the_weights_of_this_step(setup):
    """fails if: the bfloat16 copy is not refreshed before each rollout, or bfloat16 weights are trained."""
    cfg, run = setup(dtype="bfloat16", lr=0.1)
    optimizer = adamw(run)
    step_file.train_step(cfg, run, optimizer, 0, {}, step_file.Clock())
    trained = {name: p.detach().to(torch.bfloat16) for name, p in run.student.named_parameters()}
    step_file.train_step(cfg, run, optimizer, 1, {}, step_file.Clock())
    assert all(torch.equal(p, trained[name]) for name, p in run.actor.named_parameters())
    assert {p.dtype for p in run.student.parameters()} == {torch.float32}


# what a step learns from

@pytest.mark.parametrize("total,count", [(10, 3), (7, 7), (6, 20)])
def test_every_epoch_is_a_permutation_and_the_step_alone_decides(total, count):
    """fails if: an epoch's end drops or repeats problems, all epochs are alike, or the seed is not used."""
    def steps(number, seed=3):
        return [data.pick(total, range(step * count, (step + 1) * count), seed) for step in range(number)]
    order = [i for asked in steps(total * 6) for i in asked]
    epochs = [order[start:start + total] for start in range(0, len(order) - total + 1, total)]
    assert all(sorted(epoch) == list(range(total)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > len(epochs) / 2
    assert data.pick(total, range(5 * count, 6 * count), seed=3) == order[5 * count:6 * count]
    assert steps(6, seed=4) != steps(6)


@pytest.mark.parametrize("lmbda", [0.0, 0.3, 0.8, 1.0])
def test_lmbda_is_the_share_of_steps_on_own_samples(setup, monkeypatch, lmbda):
    """4 standard deviations of 1500 draws: a false alarm in 30,000 seeds, and the seed is fixed.
    fails if: the comparison with lmbda is turned around, or every step draws the same number."""
    cfg, run = setup(recipe="gkd", lmbda=lmbda)
    monkeypatch.setattr(step_file, "generate", lambda *args, **kwargs: None)
    monkeypatch.setattr(step_file, "from_responses", lambda *args: None)
    drawn = [step_file.collect(cfg, run, step, {})[2] for step in range(1500)]
    assert abs(sum(drawn) / 1500 - lmbda) <= 4 * math.sqrt(lmbda * (1 - lmbda) / 1500)
    assert all(drawn) == (lmbda == 1) and any(drawn) == (lmbda > 0)


@pytest.mark.parametrize("recipe", ["sft", "gkd"])
@pytest.mark.parametrize("limit,finished", [(40, True), (6, True), (5, False), (3, False)])
def test_given_responses_end_with_the_stop_token_and_are_cut(setup, recipe, limit, finished):
    """`1+3=4` and the stop token are six tokens.
    fails if: the stop token is not appended, or comes back after a cut, or the batch is not problems x
    samples."""
    cfg, run = setup(recipe=recipe, max_new_tokens=limit, lmbda=0.0)
    rollout, asked, on_policy = step_file.collect(cfg, run, 1, {})
    whole = [run.tokenizer.encode(run.train[i].solution) + [END] for i in asked]
    assert [rollout.response(b) for b in range(4)] == [response[:limit] for response in whole]
    assert rollout.finished_B.tolist() == [finished] * 4 and on_policy is False
    prompts = [rollout.tokens_BT[b, :n].tolist() for b, n in enumerate(rollout.prompt_len_B)]
    assert prompts == [run.prompts[i] for i in asked]


def test_responses_of_the_teacher_are_the_teachers(setup):
    """fails if: the student writes what --responses teacher asks of the teacher."""
    cfg, run = setup(recipe="sft", responses="teacher")
    rollout, asked, on_policy = step_file.collect(cfg, run, 0, {})
    theirs = generate(run.teachers[0], [run.prompts[i] for i in asked], max_new_tokens=cfg.max_new_tokens, seed=0,
                      stop_ids=run.tokenizer.stop_ids, vocab_size=VOCAB)
    assert [rollout.response(b) for b in range(4)] == [theirs.response(b) for b in range(4)]
    assert len(asked) == 4 and on_policy is False and run.given is None


def test_rewards_and_groups_belong_to_their_problems(setup, monkeypatch):
    """fails if: answers are compared with another problem's, or two problems share a group."""
    cfg, run = setup(recipe="grpo", problems=3, samples=2)
    rollout, asked, _ = step_file.collect(cfg, run, 0, {})
    monkeypatch.setattr(step_file, "grade", lambda text, answer, verifier: answer == run.train[asked[2]].answer)
    texts = [run.tokenizer.decode(rollout.response(b)) for b in range(6)]
    assert step_file.rewards(cfg, run, texts, asked).tolist() == [0, 0, 1, 1, 0, 0]
    seen = []
    monkeypatch.setitem(step_file.ADVANTAGES, "grpo", lambda s, a: seen.append(s) or credit.grpo(s, a))
    step_file.train_step(cfg, run, adamw(run), 0, {}, step_file.Clock())
    assert seen[0].group_B.tolist() == [0, 0, 1, 1, 2, 2] and seen[0].reward_B.tolist() == [0, 0, 1, 1, 0, 0]


# guards

@pytest.mark.parametrize("divergence", ["reverse_kl", "jsd", "topk_reverse_kl", "policy_gradient", "k2"])
def test_self_check_passes_on_sound_code(setup, capsys, divergence):
    """fails if: the student as its own teacher is no fixed point."""
    cfg, run = setup(divergence=divergence)
    report.self_check(cfg, run)
    assert "gradient norm" in capsys.readouterr().out


@pytest.mark.parametrize("broken", ["sampler", "stale sampler", "teacher"])
def test_self_check_fails_when_two_parts_disagree(setup, monkeypatch, broken):
    """fails if: self_check forgets to compare the sampler's log-probs, or the teacher's distribution, with
    training."""
    (cfg, run), real = setup(), score
    def generate_otherwise(*args, **kwargs):
        return replace(rollout := generate(*args, **kwargs), logp_BT=rollout.logp_BT * 1.1)
    def score_otherwise(*args, **kwargs):
        scores = real(*args, **kwargs)
        return replace(scores, parts=[replace(part, hidden_nE=part.hidden_nE * 1.1) for part in scores.parts])
    if broken == "sampler":
        monkeypatch.setattr(step_file, "generate", generate_otherwise)
    elif broken == "stale sampler":
        run.actor = load_model(cfg.teacher)
    else:
        monkeypatch.setattr(step_file, "score", score_otherwise)
    with pytest.raises(UserError, match="--self_check failed"):
        report.self_check(cfg, run)


def spoil(monkeypatch, kind, steps):
    """Makes loss and gradient, or the gradient alone, not finite at these steps (one chunk per step)."""
    real, calls = losses.reverse_kl, []
    def spoiled(rows, args):
        calls.append(1)
        loss_N = real(rows, args)
        if len(calls) not in steps:
            return loss_N
        return loss_N * math.nan if kind == "loss" else loss_N + (loss_N - loss_N.detach()).sqrt()
    monkeypatch.setitem(losses.DIVERGENCES, "reverse_kl", spoiled)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing_and_is_counted(command, tmp_path, pair, monkeypatch, capsys,
                                                                kind):
    """fails if: update() steps the optimizer anyway, or looks at only one of loss and gradient."""
    spoil(monkeypatch, kind, {1})
    assert train.main(command(steps=1)) == 0
    folder = tmp_path / "runs/a"
    before, after = (load_file(path / "model.safetensors") for path in (pair / "student", folder / "last"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(name.startswith("exp_avg") for name in load_file(folder / "last/trainer.safetensors"))
    assert steps_of(folder)[0]["skipped"] == 1 == json.loads((folder / "summary.json").read_text())["skipped"]
    assert "SKIPPED" in capsys.readouterr().out


@pytest.mark.parametrize("spoiled,done", [({1, 2, 3, 4, 6, 7, 8, 9}, 10), ({3, 4, 5, 6, 7}, 7)])
def test_five_skipped_steps_in_a_row_end_the_run(command, tmp_path, monkeypatch, capsys, spoiled, done):
    """fails if: skipped steps are counted in all instead of in a row, or the run goes on for ever."""
    spoil(monkeypatch, "loss", spoiled)
    assert train.main(command(steps=10)) == (0 if done == 10 else 2)
    skipped = [record["skipped"] for record in steps_of(tmp_path / "runs/a")]
    assert skipped == [int(step in spoiled) for step in range(1, done + 1)]
    error = capsys.readouterr().err
    assert error == "" if done == 10 else error.startswith("error: ") and "5 steps in a row" in error


# settings

@pytest.mark.parametrize("schedule,expected", [
    ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
    ("cosine", [0.25, 0.5, 0.75, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2])])
def test_learning_rate_rises_then_follows_its_schedule(schedule, expected):
    """fails if: warm-up starts at 0 or ends late, or the cosine does not start where warm-up ends."""
    cfg = train.Config(lr=2.0, warmup_steps=4, steps=8, schedule=schedule)
    assert [step_file.learning_rate(step, cfg, 2.0) for step in range(8)] == pytest.approx([2 * x for x in expected])


def test_defaults_then_recipe_then_flags():
    """fails if: a recipe overrides a flag, or a flag of one type arrives as another."""
    flags = "--recipe gkd --lr 1 --problems 3 --no-eval_teacher --fresh --verifier exact"
    cfg, given = train.parse(flags.split())
    assert (cfg.divergence, cfg.lmbda, cfg.problems, cfg.verifier) == ("jsd", 0.5, 3, "exact")
    assert cfg.eval_teacher is False and cfg.fresh is True and isinstance(cfg.lr, float)
    assert cfg.samples == train.Config.samples
    assert given == ["eval_teacher", "fresh", "lr", "problems", "recipe", "verifier"]
    assert train.parse("--lmbda 0.25 --recipe gkd --divergence forward_kl".split())[0].lmbda == 0.25
    assert train.parse(["--recipe", "grpo", "--samples", "4"])[0].samples == 4
    assert train.parse([]) == (train.Config(), [])


@pytest.mark.parametrize("argv,name", [
    ("", "opd"), ("--recipe gkd", "gkd"),
    ("--recipe gkd --lr 1e-4 --student /a/b/c/ --seed 2", "gkd,lr=0.0001,seed=2,student=c"),
    ("--lr 1e-4 --runs x --fresh --wandb --tensorboard --plan --self_check --name y", "opd,lr=0.0001"),
    ("--data a/b:*?.jsonl --no-grpo_std", "opd,data=b_.jsonl,grpo_std=False")])
def test_run_name_follows_from_the_flags(argv, name):
    """fails if: two different experiments share a name, or a flag that changes no result is part of it."""
    assert train.run_name(*train.parse(argv.split())) == name


def test_run_name_fits_into_a_file_name():
    """fails if: the name is not cut, or keeps characters that a file system refuses."""
    assert len(train.run_name(*train.parse(["--student", "x" * 300]))) == 200
    odd = train.parse(["--teacher", "../a b\n\0*", "--stop_ids", "1/.."])
    assert train.run_name(*odd) == "opd,stop_ids=..,teacher=a_b_"


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


# whole runs

def strict_json(folder):
    """Every JSON text in a run folder, parsed by the letter: NaN and Infinity are no JSON."""
    def refuse(constant):
        raise AssertionError(f"{constant} in {path}")
    for path in folder.rglob("*.json*"):
        for text in path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]:
            json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("flags", [
    *({"recipe": name} for name in config.RECIPES), {"recipe": "grpo", "teacher": "none"},
    {"recipe": "sft", "teacher": "none"}, {"recipe": "gkd", "responses": "teacher"}],
    ids=lambda flags: " ".join(flags.values()))
def test_every_recipe_runs_and_leaves_what_it_promises(command, tmp_path, flags):
    """Responses of two tokens leave quarters empty: undefined numbers, which must become null.
    fails if: a recipe breaks, NaN reaches a file, or metrics.jsonl does not begin with configuration and
    commit."""
    own = {"sg": {"pts_weight": 0.0}, "sdft": {"skip_first": 1}}.get(flags["recipe"], {})     # no room in two tokens
    assert train.main(command(**flags, **own, max_new_tokens=2, max_grad_norm=math.inf)) == 0
    folder = tmp_path / "runs/a"
    strict_json(folder)
    first, *records = metrics(folder)
    assert set(first) == {"config", "commit"} and first["config"]["recipe"] == flags["recipe"]
    assert None in records[1].values() and [r["step"] for r in records if "loss" in r] == [1, 2]
    summary = json.loads((folder / "summary.json").read_text())
    assert {"before", "after", "teacher", "steps", "seconds"} <= set(summary) and summary["steps"] == 2
    assert {"avg@1", "pass@1", "mean_length"} <= set(summary["after"])
    assert (summary["teacher"] is None) == (flags.get("teacher") == "none")
    norms = [load_file(path / "model.safetensors")["model.norm.weight"]
             for path in (folder / "last", Path(first["config"]["student"]))]
    assert flags["recipe"] in ("grpo", "sdpo", "rlsd") or not torch.equal(*norms)    # these need a right answer


def test_grpo_learns_from_rewards_alone(setup, monkeypatch):
    """fails if: the advantage is not used, has the wrong sign, or a unanimous group moves the weights."""
    cfg, run = setup(recipe="grpo", teacher="none", problems=2, samples=4, lr=0.01, updates=3)
    rollout, asked, _ = step_file.collect(cfg, run, 0, {})
    good = rollout.response(0)
    monkeypatch.setattr(step_file, "grade", lambda text, *rest: text == run.tokenizer.decode(good))
    before = scored(run, run.student, rollout).logp_N
    step_file.train_step(cfg, run, adamw(run), 0, {}, step_file.Clock())
    after = scored(run, run.student, rollout).logp_N
    assert (after - before)[:len(good)].sum() > 0.1
    monkeypatch.setattr(step_file, "grade", lambda *rest: True)
    record = step_file.train_step(cfg, run, adamw(run), 0, {}, step_file.Clock())
    assert record["grad_norm"] == 0 and record["reward"] == 1


def test_lora_run_saves_a_merged_checkpoint(command, tmp_path, pair):
    """fails if: other weights than the adapters are trained, or the adapter is saved apart or unscaled."""
    assert train.main(command(lora_rank=2, lora_alpha=4.0, lr=0.1)) == 0
    folder = tmp_path / "runs/a/last"
    base, merged, kept = (load_file(path) for path in (
        pair / "student/model.safetensors", folder / "model.safetensors", folder / "trainer.safetensors"))
    changed = {name for name in base if not torch.equal(base[name], merged[name])}
    assert set(merged) == set(base) and changed == {name for name in base if "proj" in name}
    for name in changed:
        stem = "weight/" + name.removesuffix(".weight")
        adapter = kept[f"{stem}.lora_B"] @ kept[f"{stem}.lora_A"]
        torch.testing.assert_close(merged[name], base[name] + 4.0 / 2 * adapter)
    assert all("lora_" in name for name in kept) and load_model(folder).config.hidden_size == 16


@pytest.mark.parametrize("stop_ids,saved", [(None, END), ("2,5", [2, 5]), ("5", 5)])
def test_stop_ids_of_the_run_are_saved_with_the_model(command, tmp_path, pair, stop_ids, saved):
    """fails if: Tokenizer.save keeps the old eos_token_id, drops other keys, or rewrites without need."""
    assert train.main(command(stop_ids=stop_ids)) == 0
    path, source = tmp_path / "runs/a/last/generation_config.json", pair / "student/generation_config.json"
    assert json.loads(path.read_text()) == {"eos_token_id": saved, "top_p": 0.9}
    assert (path.read_bytes() == source.read_bytes()) == (stop_ids is None)
    assert list(Tokenizer(path.parent).stop_ids) == (saved if isinstance(saved, list) else [saved])


@pytest.mark.parametrize("flags", [{}, {"dtype": "bfloat16"}, {"lora_rank": 2},
                                   {"dtype": "bfloat16", "lora_rank": 3}], ids=str)
def test_memory_plan_equals_the_tensors_of_a_step(setup, monkeypatch, flags):
    """Stop ids that no one samples: every response has full length.
    fails if: the plan miscounts adapters, moments, the sampler's copy, a cache entry or a hidden state."""
    cfg, run = setup(problems=10, samples=1, slots=7, **flags)
    run.tokenizer.stop_ids, real, caches, optimizer = (VOCAB + 1,), rollout_file.KVCache, [], adamw(run)
    monkeypatch.setattr(rollout_file, "KVCache", lambda *args: caches.append(real(*args)) or caches[-1])
    step_file.train_step(cfg, run, optimizer, 0, {}, step_file.Clock())
    scores = scored(run, run.teachers[0], step_file.collect(cfg, run, 0, {})[0])
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    tensors = {
        "student weights, float32": run.student.parameters(), "teacher weights": run.teachers[0].parameters(),
        "gradients and AdamW moments": moments + [p.grad for _, p in trainable(run.student)],
        "student copy for sampling": [] if run.actor is run.student else run.actor.parameters(),
        "KV cache": caches[0].keys + caches[0].values, "teacher hidden states": [scores.parts[0].hidden_nE]}
    student, *teachers = (memory.sized(model.config) for model in (run.student, *run.teachers))
    plan = memory.memory_plan(cfg, memory.Job(run.student.device, 2**34, student, teachers, None, VOCAB,
                                              max(map(len, run.prompts))))
    assert {name: plan[name] for name in tensors} == {
        name: sum(x.numel() * x.element_size() for x in held) for name, held in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_planned_activations_are_what_autograd_keeps(family, rank, dtype):
    """fails if: the plan forgets a tensor per layer, or counts one that is not kept, say the normed value of a frozen
    norm."""
    raw = dict(model_type=family, vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=16,
               num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    model = Transformer(ModelConfig.from_dict(raw), dtype).init_weights(0)
    if rank:
        model.add_lora(rank, rank)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor      # held, so that no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(torch.zeros(8, 128, dtype=torch.int64))
    found = sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights)
    most = memory.kept_activations(model.config, 8 * 128, dtype.itemsize, False, rank)
    assert out.requires_grad and 0.9 < found / most < 1.0


@pytest.mark.parametrize("flags", [{}, {"samples": 8}, {"gradient_checkpointing": True, "lora_rank": 2},
                                   {"teacher": "self"}], ids=str)
def test_a_compiled_run_learns_the_same(setup, monkeypatch, flags):
    """Traced as for a real backend, run as plain torch.
    fails if: the warm-up leaves a gradient, moves a weight or leaves something for the first step to compile, the loss
    is not compiled, or some pass of a step is traced wrongly."""
    compile, weights, graphs = torch.compile, [], []
    def plain(graph, inputs):
        graphs.append(graph)
        return graph
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend=plain, **options))
    update.fused_few_rows.cache_clear()
    torch._dynamo.reset()
    for how in (None, True):
        cfg, run = setup(compile=how, lr=0.1, **flags)
        assert bool(run.student.compiled) == bool(how)
        if how:
            step_file.warm_up(cfg, run)
            assert not any(p.grad is not None and p.grad.any() for p in run.student.parameters())
        warm = len(graphs)
        step_file.train_step(cfg, run, adamw(run), 0, {}, step_file.Clock())
        weights.append(torch.cat([p.detach().flatten() for p in run.student.parameters()]))
    assert len(graphs) == warm and any("log_softmax" in graph.code for graph in graphs)
    update.fused_few_rows.cache_clear()
    assert distance(*weights) < 1e-6


def test_offloaded_moments_visit_and_train_the_same(setup):
    """fails if: a moment is left behind, the step count moves, or the weights come out differently."""
    weights = []
    for offload in (None, True):
        cfg, run = setup(offload_optimizer=offload)
        optimizer = adamw(run)
        for step in range(2):
            step_file.train_step(cfg, run, optimizer, step, {}, step_file.Clock())
        weights.append([p.clone() for p in run.student.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights))
    update.move_moments(optimizer, "meta")
    for state in optimizer.state.values():
        assert {key for key, value in state.items() if value.device.type == "meta"} == {"exp_avg", "exp_avg_sq"}


def test_the_peak_counts_the_larger_phase():
    """fails if: cache and activations, which are never there together, are added up."""
    plan = {"weights": 100, "KV cache": 7, "activations of a micro-batch": 3, "logits of a chunk": 2}
    assert memory.peak(plan) == 107 and memory.peak({**plan, "logits of a chunk": 9}) == 112


def test_plan_prints_and_writes_nothing(command, tmp_path, capsys):
    """fails if: --plan loads weights into a run folder, or trains."""
    with pytest.raises(SystemExit) as stopped:
        train.main(command(plan=True))
    assert stopped.value.code == 0 and not (tmp_path / "runs").exists()
    assert capsys.readouterr().out.startswith("plan    fits: about ")
