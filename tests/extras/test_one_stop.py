"""Student and teacher of one tokenizer that end their turns with different tokens: to stop is one word for both.

The reference is a smaller vocabulary made by hand: the stop columns are added up and taken away, and everything is
computed there.
"""
import json
import re
import shutil

import pytest
import torch
from conftest import CHARACTERS, END
from crossing_reference import checkpoint, write_table
from helpers import adamw, close, collect, jsonl, look, one_step, predictions, ready

import eval as eval_file
import rollout
import train
from extras.one_stop import OneStopPart, plain_sample, sampler, stops_of_all
from losses import ADVANTAGES, DIVERGENCES, LossArgs, Rows, chunked_backward
from support.errors import UserError
from support.held_out import distance
from support.metrics import observe
from support.tokenizer import Tokenizer
from support.weights import load_model
from teacher import Part, Teacher, disagreement
from train import Config

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


def one_stop_part(y_NV, token_N, args=None):
    """What a teacher with the logits y_NV says of these rows."""
    rows = torch.arange(len(y_NV))
    return OneStopPart(Part(rows, rows, y_NV, torch.eye(V).double(), token_N, args), IDS)


def one_stop_rows(p_NV, token_N, q_NV, **fields):
    """Rows of both sides' log-probs, as a divergence reads them."""
    return one_stop_part(q_NV, token_N).rows(p_NV, {"teacher_logits_NV": q_NV, "token_N": token_N, **fields})


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
    args = Config(**DENSE.get(name, {}), temperature=1.0, chunk_rows=chunk_rows)
    fields = dict(behavior_logp_N=torch.linspace(-3, -1, 6).double(), advantage_N=torch.linspace(-1, 2, 6).double())
    plain_NV = z_NV.clone().requires_grad_()
    wanted_N = divergence(Rows(smaller(plain_NV.log_softmax(-1)), place(token_N),
                               smaller(y_NV.log_softmax(-1)), **fields), args)
    scale_N = torch.linspace(0.5, 1, 6).double()
    (gradient_NV,) = torch.autograd.grad((wanted_N * scale_N).sum(), plain_NV)
    hidden_NV, eye = z_NV.clone().requires_grad_(), torch.eye(V).double()
    loss_N, seen = chunked_backward(hidden_NV, torch.arange(6), (eye, None), one_stop_part(y_NV, token_N, args),
                                    dict(token_N=token_N, **fields), scale_N, divergence, args, observe)
    exact(loss_N, wanted_N.detach())
    exact(hidden_NV.grad, gradient_NV)
    p_NV, q_NV = (smaller(x_NV.log_softmax(-1)) for x_NV in (z_NV, y_NV))
    exact(seen["reverse_kl"], (p_NV.exp() * (p_NV - q_NV)).sum(-1))
    exact(seen["teacher_entropy"], -(q_NV.exp() * q_NV).sum(-1))
    exact(seen["sampler_gap"], (p_NV.gather(1, place(token_N)[:, None])[:, 0] - fields["behavior_logp_N"]).abs())


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
        rows = one_stop_rows(p_NV, token_N, q_NV.detach(), behavior_logp_N=b_N, advantage_N=q_N - b_N)
        total = total + (p_NV.detach()[:, a].exp() * DIVERGENCES["policy_gradient"](rows, LossArgs())).sum()
    (found,) = torch.autograd.grad(total, leaf_NV)
    exact(found, wanted)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name not in ("cross_entropy", "eopd", "uld", "veto")])
def test_a_student_that_moves_mass_between_stop_words_is_at_rest(name):
    """fails if: it matters which word says that the response ends"""
    z_NV, _ = two(2)
    p_NV = z_NV.softmax(-1)
    q_NV = p_NV.clone()
    q_NV[:, 2], q_NV[:, 7] = p_NV[:, 2] + 0.75 * p_NV[:, 7], 0.25 * p_NV[:, 7]
    token_N = torch.tensor([2, 4, 7, 0, 8, 3])
    event_N = smaller(p_NV.log()).gather(1, place(token_N)[:, None])[:, 0]
    leaf_NV = z_NV.clone().requires_grad_()
    rows = one_stop_rows(leaf_NV.log_softmax(-1), token_N, q_NV.log(), behavior_logp_N=event_N, advantage_N=0 * event_N)
    args = Config(topk=V, topk_form="tail", support="union")
    loss_N = DIVERGENCES[name](rows, args)
    exact(loss_N.detach(), torch.zeros(6).double())
    exact(torch.autograd.grad(loss_N.sum(), leaf_NV)[0], torch.zeros(6, V).double())


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_the_sampler_draws_from_the_smaller_vocabulary(temperature):
    """fails if: only the first stop word's own mass is drawn or noted, its siblings are drawn or stay in the entropy,
    or any other word gets more or less than its share"""
    z_NV, _ = two(3)
    logits_NV, draws = z_NV.float(), 4001
    small_NV = smaller((z_NV / (temperature or 1)).log_softmax(-1))
    for n in range(6):
        token_B, logp_B, entropy_B = sampler(IDS)(logits_NV[n:n + 1].expand(draws, V), temperature,
                                                  torch.linspace(0, 1 - 1e-6, draws))
        assert set(token_B.tolist()) <= set(KEPT)
        word_B = place(token_B)
        exact(logp_B.double(), small_NV[n][word_B], 1e-5)
        exact(entropy_B.double(), -(small_NV[n].exp() * small_NV[n]).sum().expand(draws), 1e-5)
        share = torch.bincount(word_B, minlength=len(KEPT)).double() / draws
        wanted = torch.eye(len(KEPT)).double()[small_NV[n].argmax()] if temperature == 0 else small_NV[n].exp()
        exact(share, wanted, 2 / draws)


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


def by_hand(model, prompts, batch):
    """(log-probs of the smaller vocabulary with gradient, the words drawn there) of all rows."""
    rollout = batch.rollout
    p = [predictions(model, prompts[i], rollout.response(b)) for b, i in enumerate(batch.asked)]
    return smaller(torch.cat(p), STOPS, WORDS), place(rollout.rows(rollout.tokens_BT), STOPS, WORDS)


@pytest.mark.parametrize("divergence", ["policy_gradient", "reverse_kl", "jsd", "k2", "eopd"])
def test_a_step_is_that_of_the_smaller_vocabulary(apart, command, divergence):
    """fails if: sampler, teacher, loss or gradient know the stop tokens apart"""
    run = started(apart, command, divergence=divergence)
    assert run.kind.one_stop == run.tokenizer.stop_ids == STOPS
    batch, s, _ = look(run)
    responses = [batch.rollout.response(b) for b in range(len(batch.asked))]
    ends = [response[-1] for response, finished in zip(responses, batch.rollout.finished_B.tolist()) if finished]
    assert len(ends) > 3 and set(ends) == {STOPS[0]}
    assert not set(STOPS) & {i for response in responses for i in response[:-1]}
    p_NV, word_N = by_hand(run.student, run.prompts, batch)
    q_NV, _ = by_hand(run.kind.models[0], run.prompts, batch)
    p_N, q_N = (x.gather(1, word_N[:, None])[:, 0] for x in (p_NV, q_NV.detach()))
    close(s.behavior_logp_N, p_N.detach())
    close(s.student_entropy_N, -(p_NV.exp() * p_NV).sum(-1).detach())
    close(s.teacher_logp_N, q_N)
    close(s.teacher_entropy_N, -(q_NV.exp() * q_NV).sum(-1).detach())
    rows = Rows(p_NV, word_N, q_NV.detach(), behavior_logp_N=p_N.detach(), advantage_N=(q_N - p_N).detach())
    loss = DIVERGENCES[divergence](rows, run.cfg).mean()
    gradients = torch.autograd.grad(loss, list(run.student.parameters()))
    record = one_step(run)
    for parameter, gradient in zip(run.student.parameters(), gradients):
        close(parameter.grad, gradient, 1e-4)
    assert record["loss"] == pytest.approx(loss.item(), abs=1e-5) and record["sampler_gap"] < 1e-5


def test_a_third_model_knows_the_event_too(apart, command):
    """fails if: the reference's log-prob of one stop token is compared with the teacher's of all"""
    run = started(apart, command, recipe="exopd", divergence=None, reference=apart / "teacher", extrapolate=1.5)
    _, s, _ = look(run)
    close(s.reference_logp_N, s.teacher_logp_N)
    close(ADVANTAGES["exopd"](s, run.cfg), s.teacher_logp_N - s.behavior_logp_N)


def test_a_student_under_its_own_weights_is_at_rest(apart, command, capsys):
    """fails if: what each side calls its stop tokens makes a loss of its own"""
    shutil.copytree(apart / "student", apart / "twin")
    (apart / "twin/generation_config.json").write_text(json.dumps({"eos_token_id": [13, END]}))
    for divergence in ("policy_gradient", "reverse_kl"):
        run = started(apart, command, teacher=apart / "twin", divergence=divergence)
        record = one_step(run)
        assert abs(record["reverse_kl"]) < 1e-6 and record["grad_norm"] < 1e-4
    assert train.main(command(student=apart / "student", teacher=apart / "twin", self_check=True, steps=1)) == 0
    assert float(re.search(r"largest token KL (\S+),", capsys.readouterr().out)[1]) < 1e-6


def test_only_the_students_own_writing_is_folded(apart, command):
    """fails if: the sampler of the smaller vocabulary is left in place for held-out problems or the next run"""
    run = started(apart, command)
    batch = collect(run)
    assert rollout.sample is plain_sample
    drawn = {batch.rollout.response(b)[-1] for b in range(len(batch.asked)) if batch.rollout.finished_B[b]}
    assert drawn == {STOPS[0]}
    plain = rollout.generate(run.student, run.prompts, samples=3, max_new_tokens=9, stop_ids=STOPS, seed=1)
    assert {plain.response(b)[-1] for b in range(30) if plain.finished_B[b]} == set(STOPS)


def test_equal_stop_tokens_are_left_alone(apart, command):
    """fails if: a pair that agrees is folded: its digits would move"""
    for mine, theirs, ids in (([3, END], [END, 3], (3, END)), ([END], [END], (END,))):
        for side, stops in (("student", mine), ("teacher", theirs)):
            (apart / side / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
        run = started(apart, command)
        _, _, (part,) = look(run)
        assert type(part) is Part and run.tokenizer.stop_ids == ids and run.sources[-1][1] is train.student_writes


def test_flags_and_other_tokenizers(apart, command, capsys):
    """fails if: --stop_ids is overruled, or a bridge is built beside a folded vocabulary that it does not know"""
    run = started(apart, command, stop_ids="3,13")
    _, _, (part,) = look(run)
    assert type(part) is Part and run.tokenizer.stop_ids == (3, 13)
    capsys.readouterr()
    run = started(apart, command)
    assert capsys.readouterr().out.startswith("stop    the student stops at ids [3], a teacher at [13, 17]: one event")
    assert run.kind.bridges == [None]
    run = started(apart, command, align="always", divergence="reverse_kl")
    assert run.kind.one_stop == () and run.kind.bridges[0]
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
    run = started(apart, command, teacher=f"a={apart / 'teacher'},b={apart / 'other'}", route="kind", data=data)
    assert run.kind.one_stop == (3, 13, END, 5)
    _, _, parts = look(run)
    assert len(parts) == 2 and all(part.ids.tolist() == [3, 13, END, 5] for part in parts)


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
    run = started(apart, command, chunk_rows=5, micro_batch_tokens=99)
    batch = collect(run)
    samples = [dict(problem=i, prompt_tokens=run.prompts[i], tokens=batch.rollout.response(b), finished=True)
               for b, i in enumerate(batch.asked)]
    found = distance(run, run.train, samples)
    p_NV, _ = by_hand(run.student, run.prompts, batch)
    q_NV, _ = by_hand(run.kind.models[0], run.prompts, batch)
    wanted = (p_NV.exp() * (p_NV - q_NV)).sum(-1).mean().item()
    assert found["reverse_kl"] == pytest.approx(wanted, abs=1e-5)
    student = Teacher(run.student, run.cfg).read(batch, batch.rollout.every_B)
    close(disagreement(student, run.teacher.parts(batch))["reverse_kl"].mean(), wanted)


def test_eval_compares_in_the_smaller_vocabulary_without_a_word(apart, capsys):
    """fails if: what is said of a run in training stands before the JSON, or the stop tokens are known apart"""
    flags = ["--model", str(apart / "student"), "--data", str(apart / "student/p.jsonl"), "--max_new_tokens", "6",
             "--device", "cpu", "--k", "8", "--temperature", "1", "--out", str(apart / "out.jsonl"),
             "--teacher", str(apart / "teacher")]
    jsonl(apart / "student/p.jsonl", [dict(problem="1+3?")])
    assert eval_file.main(flags) == 0
    found, (student, teacher) = json.loads(capsys.readouterr().out), (load_model(apart / side) for side in
                                                                      ("student", "teacher"))
    p_NV, q_NV = (smaller(torch.cat([predictions(model, sample["prompt_tokens"], sample["tokens"])
                                     for sample in map(json.loads, (apart / "out.jsonl").read_text().splitlines())]),
                          STOPS, WORDS) for model in (student, teacher))
    assert found["reverse_kl"] == pytest.approx((p_NV.exp() * (p_NV - q_NV)).sum(-1).mean().item(), abs=1e-5)


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
        run = ready(command, student=tmp_path / "ends", teacher=tmp_path / "turns", data=data, eval_data=data,
                    problems=1, samples=64, max_new_tokens=20, lr=0.05, divergence=divergence, stop_ids=stop_ids)
        for model, table in zip((run.student, run.kind.models[0]), tables.values()):
            write_table(model, torch.tensor([table] * 4).log())
        optimizer = adamw(run)
        records = [one_step(run, optimizer, step) for step in range(40)]
        told[stop_ids] = records[0]["mean_length"], records[-1]["mean_length"], records[-1]["truncation_rate"]
    assert told[""][0] > 3 and told[""][1] == pytest.approx(2, abs=0.6) and told[""][2] == 0
    assert told["2"][1] > 12 and told["2"][2] > 0.3, told
