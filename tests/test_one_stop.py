"""Student and teacher of one tokenizer that end their turns with different tokens: to stop is one word for both.

The reference is a smaller vocabulary made by hand: the stop columns are added up and taken away, and everything is
computed there.
"""
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import CHARACTERS, END
from test_across import checkpoint
from test_teachers import adamw, close, jsonl, predictions, ready

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sampler  # noqa: E402
import train  # noqa: E402
from credit import ADVANTAGES  # noqa: E402
from losses import DIVERGENCES, LossArgs, OneStop, Rows, on_shared  # noqa: E402
from rollout import generate  # noqa: E402
from step import Clock, collect, look, read, train_step  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.held_out import Comparison, distance  # noqa: E402
from teacher import disagreement, stops_of_all  # noqa: E402
from tokenizer import Tokenizer  # noqa: E402
from update import chunked_backward  # noqa: E402

IDS = torch.tensor([7, 2, 4])       # of 9 words; the first has the sum in its place
KEPT = [0, 1, 3, 5, 6, 7, 8]
V, VOCAB = 9, 20
STOPS = (3, 13, END)                # of the tiny pair: `3` and `=` too are something that ends a response


def exact(a, b, atol=1e-12):
    torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=0, atol=atol)


def smaller(logp_NV, ids=IDS, kept=KEPT):
    """log-probs over the vocabulary in which the stop words are one, written out."""
    p_NV = logp_NV.exp()
    columns = [p_NV[:, list(ids)].sum(-1) if v == ids[0] else p_NV[:, v] for v in kept]
    return torch.stack(columns, -1).log()


def place(token_N, ids=IDS, kept=KEPT):
    return torch.tensor([kept.index(int(ids[0] if v in list(ids) else v)) for v in token_N.tolist()])


def two(seed=0, rows=6):
    rng = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, V, generator=rng, dtype=torch.float64) for _ in range(2))


# Losses

DENSE = {"topk renormalised": dict(topk=3, topk_form="renormalised"), "topk tail": dict(topk=3, topk_form="tail"),
         "topk all": dict(topk=V, topk_form="tail", support="union"), "entry_clip": dict(entry_clip=0.05),
         "token_clip": dict(token_clip=0.3)}
NAMES = [*DIVERGENCES, *DENSE]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_rows", [2, 100])
def test_every_loss_is_that_of_the_smaller_vocabulary(name, chunk_rows):
    """fails if: a stop word is counted twice or not at all, one side is not folded, the words without mass give NaN or
    a gradient of their own, or the token drawn is looked up by its own id"""
    z_NV, y_NV = two()
    token_N = torch.tensor([2, 4, 7, 0, 8, 3])
    divergence = DIVERGENCES["topk_reverse_kl" if "topk " in name else name if name in DIVERGENCES else "forward_kl"]
    args = LossArgs(**DENSE.get(name, {}))
    fields = dict(behavior_N=torch.linspace(-3, -1, 6).double(), advantage_N=torch.linspace(-1, 2, 6).double())
    plain_NV = z_NV.clone().requires_grad_()
    wanted_N = divergence(Rows(smaller(plain_NV.log_softmax(-1)), place(token_N),
                               smaller(y_NV.log_softmax(-1)), **fields), args)
    scale_N = torch.linspace(0.5, 1, 6).double()
    (gradient_NV,) = torch.autograd.grad((wanted_N * scale_N).sum(), plain_NV)
    hidden_NV, eye = z_NV.clone().requires_grad_(), torch.eye(V).double()
    loss_N, seen = chunked_backward(hidden_NV, eye, None, dict(token_N=token_N, **fields), scale_N, divergence, args,
                                    temperature=1.0, chunk_rows=chunk_rows, teacher_hidden_NE=y_NV,
                                    teacher_head_VE=eye, shared=OneStop(IDS), diagnose=True)
    exact(loss_N, wanted_N.detach())
    exact(hidden_NV.grad, gradient_NV)
    p_NV, q_NV = (smaller(x_NV.log_softmax(-1)) for x_NV in (z_NV, y_NV))
    exact(seen["reverse_kl"], (p_NV.exp() * (p_NV - q_NV)).sum(-1))
    exact(seen["teacher_entropy"], -(q_NV.exp() * q_NV).sum(-1))
    exact(seen["sampler_gap"], (p_NV.gather(1, place(token_N)[:, None])[:, 0] - fields["behavior_N"]).abs())


def test_the_expected_policy_gradient_is_that_of_the_divergence():
    """Every word enumerated, float64. fails if: the word drawn is held against its own log-prob, or the gradient
    reaches one stop word only"""
    z_NV, y_NV = two(1)
    leaf_NV = z_NV.clone().requires_grad_()
    p_NV, q_NV = leaf_NV.log_softmax(-1), y_NV.log_softmax(-1)
    small_p, small_q = smaller(p_NV), smaller(q_NV)
    (wanted,) = torch.autograd.grad((small_p.exp() * (small_p - small_q)).sum(), leaf_NV, retain_graph=True)
    total = 0.0
    for a in range(V):
        token_N = torch.full((6,), a)
        b_N, q_N = (x.detach().gather(1, place(token_N)[:, None])[:, 0] for x in (small_p, small_q))
        rows = on_shared(Rows(p_NV, token_N, q_NV, behavior_N=b_N, advantage_N=q_N - b_N, shared=OneStop(IDS)))
        total = total + (p_NV.detach()[:, a].exp() * DIVERGENCES["policy_gradient"](rows, LossArgs())).sum()
    (found,) = torch.autograd.grad(total, leaf_NV)
    exact(found, wanted)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in ("cross_entropy", "eopd", "uld")])
def test_a_student_that_moves_mass_between_stop_words_is_at_rest(name):
    """fails if: it matters which word says that the response ends"""
    z_NV, _ = two(2)
    p_NV = z_NV.softmax(-1)
    q_NV = p_NV.clone()
    q_NV[:, 2], q_NV[:, 7] = p_NV[:, 2] + 0.75 * p_NV[:, 7], 0.25 * p_NV[:, 7]
    token_N = torch.tensor([2, 4, 7, 0, 8, 3])
    event_N = smaller(p_NV.log()).gather(1, place(token_N)[:, None])[:, 0]
    leaf_NV = z_NV.clone().requires_grad_()
    rows = Rows(leaf_NV.log_softmax(-1), token_N, q_NV.log(), behavior_N=event_N,
                advantage_N=0 * event_N, shared=OneStop(IDS))
    args = LossArgs(topk=V, topk_form="tail", support="union")
    loss_N = DIVERGENCES[name](on_shared(rows), args)
    exact(loss_N.detach(), torch.zeros(6).double())
    exact(torch.autograd.grad(loss_N.sum(), leaf_NV)[0], torch.zeros(6, V).double())


def test_the_sampler_notes_the_event():
    """fails if: only the stop word that was drawn is noted, or its siblings stay in the entropy"""
    z_NV, _ = two(3)
    for temperature in (1.0, 0.7, 0.0):
        token_N = torch.tensor([2, 4, 7, 0, 8, 3])
        logp_NV = (z_NV / (temperature or 1)).log_softmax(-1)
        drawn = (token_N, logp_NV.gather(1, token_N[:, None])[:, 0], -(logp_NV.exp() * logp_NV).sum(-1))
        found = sampler.one_event(drawn, z_NV, IDS, temperature)
        small_NV = smaller(logp_NV)
        assert torch.equal(found[0], token_N)
        exact(found[1], small_NV.gather(1, place(token_N)[:, None])[:, 0], 1e-5)
        exact(found[2], -(small_NV.exp() * small_NV).sum(-1), 1e-5)


# The loop

@pytest.fixture
def apart(pair, tmp_path):
    """The tiny pair; the student stops at `3`, the teacher at `=` and <|end|>."""
    for side, ids in (("student", [3]), ("teacher", [13, END])):
        shutil.copytree(pair / side, tmp_path / side)
        (tmp_path / side / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert CHARACTERS[13] == "="
    return tmp_path


def started(apart, command, **flags):
    return ready(command, **{**dict(student=apart / "student", teacher=apart / "teacher", problems=4, samples=4,
                                    max_new_tokens=12, max_grad_norm=1e9, divergence="policy_gradient"), **flags})


WORDS = [v for v in range(VOCAB) if v not in STOPS[1:]]


def by_hand(model, prompts, rollout, asked):
    """(log-probs of the smaller vocabulary with gradient, the words drawn there) of all rows."""
    p = [predictions(model, prompts[i], rollout.response(b)) for b, i in enumerate(asked)]
    return smaller(torch.cat(p), STOPS, WORDS), place(rollout.rows(rollout.tokens_BT), STOPS, WORDS)


@pytest.mark.parametrize("divergence", ["policy_gradient", "reverse_kl", "jsd", "k2", "eopd"])
def test_a_step_is_that_of_the_smaller_vocabulary(apart, command, divergence):
    """fails if: sampler, teacher, loss or gradient know the stop tokens apart"""
    cfg, run = started(apart, command, divergence=divergence)
    assert run.one_stop == run.tokenizer.stop_ids == STOPS
    rollout, s, scores, _, asked, _ = look(cfg, run, 0, {}, Clock())
    ends = [rollout.response(b)[-1] for b, finished in enumerate(rollout.finished_B.tolist()) if finished]
    assert set(ends) == set(STOPS)      # all three are drawn, or this shows nothing
    assert not set(STOPS) & {i for b in range(len(asked)) for i in rollout.response(b)[:-1]}
    p_NV, word_N = by_hand(run.student, run.prompts, rollout, asked)
    q_NV, _ = by_hand(run.teachers[0], run.prompts, rollout, asked)
    p_N, q_N = (x.gather(1, word_N[:, None])[:, 0] for x in (p_NV, q_NV.detach()))
    close(s.student_N, p_N.detach())
    close(s.student_entropy_N, -(p_NV.exp() * p_NV).sum(-1).detach())
    if divergence == "policy_gradient":
        close(s.teacher_N, q_N)
        close(s.teacher_entropy_N, -(q_NV.exp() * q_NV).sum(-1).detach())
    rows = Rows(p_NV, word_N, q_NV.detach(), behavior_N=p_N.detach(), advantage_N=(q_N - p_N).detach())
    loss = DIVERGENCES[divergence](rows, cfg).mean()
    gradients = torch.autograd.grad(loss, list(run.student.parameters()))
    record = train_step(cfg, run, adamw(cfg, run), 0, {}, Clock())
    for parameter, gradient in zip(run.student.parameters(), gradients):
        close(parameter.grad, gradient, 1e-4)
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5) and record["sampler_gap"] < 1e-5
    if divergence == "eopd":
        close(s.teacher_N, q_N)


def test_a_third_model_knows_the_event_too(apart, command):
    """fails if: the reference's log-prob of one stop token is compared with the teacher's of all"""
    cfg, run = started(apart, command, recipe="exopd", divergence=None, reference=apart / "teacher", extrapolate=1.5)
    rollout, s, _, _, asked, _ = look(cfg, run, 0, {}, Clock())
    close(s.reference_N, s.teacher_N)
    close(ADVANTAGES["exopd"](s, cfg), s.teacher_N - s.student_N)


def test_a_student_under_its_own_weights_is_at_rest(apart, command, capsys):
    """fails if: what each side calls its stop tokens makes a loss of its own"""
    shutil.copytree(apart / "student", apart / "twin")
    (apart / "twin/generation_config.json").write_text(json.dumps({"eos_token_id": [13, END]}))
    for divergence in ("policy_gradient", "reverse_kl"):
        cfg, run = started(apart, command, teacher=apart / "twin", divergence=divergence)
        record = train_step(cfg, run, adamw(cfg, run), 0, {}, Clock())
        assert abs(record["reverse_kl"]) < 1e-6 and record["grad_norm"] < 1e-4
    assert train.main(command(student=apart / "student", teacher=apart / "twin", self_check=True, steps=1)) == 0
    assert float(re.search(r"largest token KL (\S+),", capsys.readouterr().out)[1]) < 1e-6


def test_the_same_texts_are_drawn_with_and_without_the_sum(apart, command):
    """fails if: the sum changes what is sampled"""
    cfg, run = started(apart, command)
    one, many = (generate(run.student, run.prompts, samples=3, max_new_tokens=9, stop_ids=STOPS, vocab_size=VOCAB, seed=1,
                          one_stop=flag) for flag in (True, False))
    assert torch.equal(one.tokens_BT, many.tokens_BT)
    stops_N = torch.isin(one.rows(one.tokens_BT), torch.tensor(STOPS))
    assert torch.equal(one.rows(one.logp_BT)[~stops_N], many.rows(many.logp_BT)[~stops_N])
    assert (one.rows(one.logp_BT)[stops_N] > many.rows(many.logp_BT)[stops_N]).all()


def test_equal_stop_tokens_are_left_alone(apart, command):
    """fails if: a pair that agrees is folded: its digits would move"""
    for mine, theirs, ids in (([3, END], [END, 3], (3, END)), ([END], [END], (END,))):
        for side, stops in (("student", mine), ("teacher", theirs)):
            (apart / side / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        cfg, run = started(apart, command)
        _, _, scores, *_ = look(cfg, run, 0, {}, Clock())
        assert run.one_stop == () and run.tokenizer.stop_ids == ids and scores.parts[0].shared is None


def test_flags_and_other_tokenizers(apart, command, capsys):
    """fails if: --stop_ids is overruled, or a bridge is built beside a folded vocabulary that it does not know"""
    cfg, run = started(apart, command, stop_ids="3,13")
    assert run.one_stop == () and run.tokenizer.stop_ids == (3, 13)
    capsys.readouterr()
    cfg, run = started(apart, command)
    assert capsys.readouterr().out.startswith("stop    the student stops at ids [3], a teacher at [13, 17]: one event")
    assert run.bridges == [None]
    cfg, run = started(apart, command, align="always", divergence="reverse_kl")
    assert run.one_stop == () and run.bridges[0]
    odd = apart / "odd"
    shutil.copytree(apart / "teacher", odd)
    spec = json.loads((odd / "tokenizer.json").read_text())
    spec["model"]["vocab"] = {{"1": "2", "2": "1"}.get(piece, piece): i for piece, i in spec["model"]["vocab"].items()}
    (odd / "tokenizer.json").write_text(json.dumps(spec))
    data = jsonl(apart / "kinds.jsonl", [dict(problem=f"{a}+3?", answer="3", kind="ab"[a % 2]) for a in range(4)])
    with pytest.raises(UserError, match=r"another teacher has another tokenizer; pass --stop_ids 13,17 "):
        started(apart, command, teacher=f"a={apart / 'teacher'},b={odd}", route="kind", data=data)


def test_several_teachers_stop_at_the_ids_of_all(apart, command):
    shutil.copytree(apart / "teacher", apart / "other")
    (apart / "other/generation_config.json").write_text(json.dumps({"eos_token_id": [3, 5]}))
    data = jsonl(apart / "kinds.jsonl", [dict(problem=f"{a}+3?", answer="3", kind="ab"[a % 2]) for a in range(4)])
    cfg, run = started(apart, command, teacher=f"a={apart / 'teacher'},b={apart / 'other'}", route="kind", data=data)
    assert run.one_stop == (3, 13, END, 5)
    _, s, scores, *_ = look(cfg, run, 0, {}, Clock())
    assert len(scores.parts) == 2 and all(part.shared.ids.tolist() == [3, 13, END, 5] for part in scores.parts)


def test_the_saved_model_stops_at_each_of_them(apart, command, tmp_path):
    """fails if: the model ends its answers elsewhere than in training once it is loaded"""
    flags = dict(student=apart / "student", teacher=apart / "teacher", divergence="reverse_kl", steps=1)
    assert train.main(command(**flags)) == 0
    saved = Tokenizer(tmp_path / "runs" / "a" / "last")
    assert saved.stop_ids == STOPS
    assert stops_of_all(saved, [Tokenizer(apart / "teacher")]) == STOPS    # its teacher still calls fewer a stop
    assert stops_of_all(saved, [saved]) == ()


def test_the_distance_on_held_out_problems_is_that_of_the_smaller_vocabulary(apart, command):
    """fails if: the figure that picks the best checkpoint knows the stop tokens apart"""
    cfg, run = started(apart, command)
    rollout, asked, _ = collect(cfg, run, 0, {})
    samples = [dict(problem=i, prompt_tokens=run.prompts[i], tokens=rollout.response(b), finished=True)
               for b, i in enumerate(asked)]
    c = Comparison(run.teachers, run.teacher_of, None, run.bridges, one_stop=run.one_stop)
    found = distance(samples, run.student, c, vocab_size=VOCAB, temperature=1.0, max_tokens=99, chunk_rows=5)
    p_NV, _ = by_hand(run.student, run.prompts, rollout, asked)
    q_NV, _ = by_hand(run.teachers[0], run.prompts, rollout, asked)
    wanted = (p_NV.exp() * (p_NV - q_NV)).sum(-1).mean().item()
    assert found["reverse_kl"] == pytest.approx(wanted, abs=1e-5)
    scores = read(cfg, run, run.teachers, rollout)
    close(disagreement(read(cfg, run, [run.student], rollout), scores, temperature=1.0, chunk_rows=5)["reverse_kl"].mean(),
          wanted)


@pytest.mark.parametrize("divergence", ["policy_gradient", "reverse_kl"])
def test_a_student_learns_when_to_stop_from_a_teacher_that_says_it_in_another_token(command, tmp_path, divergence):
    """A model of four words that looks up the last one: half of the teacher's words end a response, by <|eot|>; of the
    student's, which knows <|end|>, 30 %. fails if: the student is not taught to stop as often as its teacher. Held
    against each other id by id, as --stop_ids asks, the two unlearn it: that is what the sum is for."""
    tables = {"ends": [0.35, 0.35, 0.25, 0.05], "turns": [0.3, 0.2, 0.01, 0.49]}
    for seed, (name, stop) in enumerate(zip(tables, ("<|end|>", "<|eot|>"))):
        checkpoint(tmp_path / name, seed, "ab", (), ("<|end|>", "<|eot|>"), [stop], model_type="llama", vocab_size=4,
                   hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    data, told = jsonl(tmp_path / "ab.jsonl", [dict(problem="b", answer="a")]), {}
    for stop_ids in ("", "2"):
        cfg, run = ready(command, student=tmp_path / "ends", teacher=tmp_path / "turns", data=data, eval_data=data,
                         problems=1, samples=64, max_new_tokens=20, lr=0.05, divergence=divergence, stop_ids=stop_ids)
        for model, table in zip((run.student, run.teachers[0]), tables.values()):
            with torch.no_grad():
                weights = dict(model.named_parameters())
                for name, weight in weights.items():
                    weight.fill_(1.0 if "norm" in name else 0.0)
                weights["model.embed_tokens.weight"][:, :4].copy_(torch.eye(4))
                weights["lm_head.weight"][:, :4].copy_(torch.tensor([table] * 4).log().T / 8 ** 0.5)
        optimizer = adamw(cfg, run)
        records = [train_step(cfg, run, optimizer, step, {}, Clock()) for step in range(40)]
        told[stop_ids] = records[0]["mean_length"], records[-1]["mean_length"], records[-1]["truncation_rate"]
    assert told[""][0] > 3 and told[""][1] == pytest.approx(2, abs=0.6) and told[""][2] == 0
    assert told["2"][1] > 12 and told["2"][2] > 0.3, told
