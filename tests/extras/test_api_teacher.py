"""A teacher on an inference server: what it says equals what the same model says here; each fault is one sentence."""
import math

import pytest
import torch
from helpers import close, interrupted, look, one_step, ready, steps_of, with_third
from inference_server import serving

import eval as evaluation
import train
from extras.api_teacher import Wrong, checked
from support.errors import UserError

KINDS = ("vllm", "sglang")
TOP = dict(divergence="topk_reverse_kl", support="teacher", topk=5)
FAST = dict(api_deadline=5, api_retries=1, eval_teacher=None)


@pytest.fixture(scope="module")
def server(pair):
    with serving(pair / "teacher") as found:
        yield found


@pytest.fixture(autouse=True)
def calm(server, monkeypatch):
    server.faults.clear()
    server.asked.clear()
    server.keys.clear()
    monkeypatch.setattr("extras.api_teacher.FIRST_WAIT", 0.0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("flags", [
    dict(divergence="policy_gradient"), dict(divergence="k2"), dict(recipe="minillm"), dict(recipe="uni"),
    {**TOP, "topk_form": "tail"}, {**TOP, "topk_form": "truncated"}, {**TOP, "divergence": "topk_forward_kl"},
    {**TOP, "support": "intersection"}], ids=lambda flags: " ".join(map(str, flags.values())))
def test_a_served_teacher_takes_the_steps_of_a_loaded_one(command, server, kind, flags):
    """fails if: a log-prob lands on a neighbour's row, the tail is wrong, or a prompt's token is taken for the first of
    the response"""
    moved = []
    for teacher in ({}, {"teacher": server.address(kind)}):
        run = ready(command, **FAST, **flags, **teacher)
        records = [one_step(run, step=step) for step in range(2)]
        moved.append((records, [p.detach().clone() for _, p in run.student.trainable()]))
    for (mine, theirs) in zip(moved[0][0], moved[1][0]):
        close(mine["loss"], theirs["loss"])
        close(mine["grad_norm"], theirs["grad_norm"], 1e-4 * max(1, mine["grad_norm"]))
    for mine, theirs in zip(moved[0][1], moved[1][1]):
        close(mine, theirs, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_signals_are_those_of_the_model(command, server, kind):
    """fails if: log q(a) or its sum over a response is another token's; entropy is invented instead of missing"""
    seen = {}
    for name, teacher in (("here", {}), ("there", {"teacher": server.address(kind)})):
        run = ready(command, divergence="policy_gradient", api_topk=16, **FAST, **teacher)
        seen[name] = look(run)[1:]
    close(seen["here"][0].teacher_logp_N, seen["there"][0].teacher_logp_N)
    close(seen["here"][0].teacher_total_B, seen["there"][0].teacher_total_B)
    assert seen["there"][0].teacher_entropy_N.isnan().all() and seen["there"][1][0].id_NK.shape[1] == 16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["500", "gone", "slow", "drip"])
def test_a_fault_that_passes_is_asked_again(command, server, kind, fault):
    """fails if: a server that was busy, slow or gone once ends the run, or half an answer is taken for a whole one"""
    flags = dict(divergence="policy_gradient", teacher=server.address(kind), eval_teacher=None, api_retries=1)
    run = ready(command, **flags, api_deadline=0.4 if fault in ("slow", "drip") else 5)
    _, before, _ = look(run)
    server.faults.append(fault)
    count = len(server.asked)
    _, again, _ = look(run)
    assert torch.equal(before.teacher_logp_N, again.teacher_logp_N) and not server.faults
    assert len(server.asked) == count + count - 1 + 1       # the probe came first; one request was repeated


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["500", "gone"])
def test_a_fault_that_stays_is_one_sentence(command, server, kind, fault, capsys):
    """fails if: the run hangs, or ends with anything but one sentence that names the server"""
    server.faults += [fault] * 9
    assert train.main(command(divergence="policy_gradient", teacher=server.address(kind), **FAST)) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "does not answer" in said and "asked 2 times" in said, said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault, name", [
    ("short", "entries came back for"), ("wrong ids", "comes back as"), ("shifted", "comes back as|not the likeliest"),
    ("few likeliest", "comes back as|of the 5 likeliest"), ("no log-prob", "log-prob|float")])
def test_an_answer_that_does_not_fit_is_one_sentence(command, server, kind, fault, name):
    """fails if: a length, an id, a missing likeliest token or a missing number goes unseen"""
    run = ready(command, teacher=server.address(kind), api_parallel=1, **TOP, **FAST)
    server.faults += [fault] * 4
    with pytest.raises(UserError, match=name) as error:
        look(run)
    assert "\n" not in str(error.value) and server.address(kind) in str(error.value)
    assert len({str(request) for request in server.asked}) == len(server.asked)     # nothing is asked again


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_with_another_tokenizer_is_found_out(command, server, kind, monkeypatch):
    """fails if: the probe compares nothing, or only ids"""
    monkeypatch.setattr(server, "tokenizer", Swapped(server.tokenizer))
    with pytest.raises(UserError, match="reads id .* another tokenizer"):
        ready(command, divergence="policy_gradient", teacher=server.address(kind), **FAST)


class Swapped:
    def __init__(self, tokenizer):
        self.tokenizer, self.vocab_size = tokenizer, tokenizer.vocab_size

    def decode(self, ids, **how):
        return self.tokenizer.decode([{3: 4, 4: 3}.get(i, i) for i in ids], **how)


@pytest.mark.parametrize("entry, name", [
    ((3, -1.5, [(5, -0.7), (6, -1.9)], None), "not the likeliest"),       # the token itself is likelier than one
    ((3, -5.0, [(5, -0.1), (6, -0.2)], None), "one distribution"),
    ((3, -5.0, [(5, -0.7), (5, -1.1)], None), "1 of the 2"),
    ((3, -5.0, [(5, 0.2), (6, -1.1)], None), "log-prob"), ((3, -5.0, [(5, -0.7), (99, -1.1)], None), "id 99"),
    ((3, float("nan"), [(5, -0.7), (6, -1.1)], None), "log-prob")])
def test_numbers_that_cannot_be_are_found(entry, name):
    """fails if: likeliest tokens that are not the likeliest, a mass above 1, or ids of no word get through"""
    good = (3, -5.0, [(5, -0.7), (6, -1.1)], None)
    assert checked([good], 2, 20).id_nK.tolist() == [[5, 6]]
    with pytest.raises(Wrong, match=name):
        checked([good, entry], 2, 20)


@pytest.mark.parametrize("sharp", [1.0, 5.0, 12.0])
def test_the_tail_of_rounded_numbers_is_held_between_its_bounds(sharp):
    """fails if: a tail far below the rounding of its top k is taken to be as large as that rounding"""
    logits_V = sharp * torch.randn(200, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logp_V = logits_V.log_softmax(0)
    value_K, id_K = logp_V.topk(16)
    top = list(zip(id_K.tolist(), value_K.float().tolist()))
    told = checked([(top[0][0], top[0][1], top, None)], 16, 200)
    true, most = logp_V.scatter(0, id_K, -torch.inf).logsumexp(0).item(), value_K[-1].item() + math.log(184)
    assert told.tail_logp_n.item() <= most + 1e-4
    assert told.tail_logp_n.item() == pytest.approx(true, abs=1e-4) if sharp < 12 else told.tail_logp_n.item() >= true


def test_the_servers_refusal_is_passed_on(command, server):
    """fails if: what the server says against a request is hidden, or the request repeated"""
    with pytest.raises(UserError, match="refuses a request to /v1/completions .*greater than max allowed: 20"):
        run = ready(command, teacher=server.address("vllm"), api_parallel=1, **TOP, **FAST)
        run.kind.readers[0].k = 21      # the tiny vocabulary has no 21 tokens to ask for
        look(run)
    assert len({str(request) for request in server.asked}) == len(server.asked)


@pytest.mark.parametrize("flags, name", [
    (dict(), "use --divergence topk_reverse_kl --support teacher"),
    (dict(divergence="policy_gradient", temperature=0.7), "--temperature must be 1"),
    (dict(divergence="topk_reverse_kl", support="teacher", topk=21, api_topk=20), "--topk 21"),
    (dict(divergence="topk_reverse_kl"), "--support student"), (dict(recipe="fire"), "teacher_entropy_N"),
    (dict(recipe="eopd"), "use --divergence policy_gradient"),
    (dict(divergence="policy_gradient", cold_start_steps=1), "writes no responses"),
    (dict(divergence="policy_gradient", teacher_int8=True), "--teacher_int8"),
    (dict(divergence="policy_gradient", report_only=True), "--report_only"),
    (dict(divergence="policy_gradient", api_key_variable="NO_SUCH_KEY"), "no such environment variable")])
def test_what_a_server_cannot_tell_is_refused_before_it_is_asked(command, capsys, flags, name):
    """fails if: a loss that needs more gets through, or the server (there is none here) is asked first"""
    assert train.main(command(teacher="vllm+http://127.0.0.1:9", **FAST, **flags)) == 2
    said = capsys.readouterr().err
    assert name in said and said.count("\n") == 1, said


def test_model_context_and_key(command, server, monkeypatch):
    """fails if: an unknown name is used, the server's context is not the limit of responses, or the key is not sent"""
    flags = dict(divergence="policy_gradient", teacher=server.address("vllm"), **FAST)
    with pytest.raises(UserError, match="serves the-teacher"):
        ready(command, api_model="other", **flags)
    monkeypatch.setattr(server, "context", 10)
    with pytest.raises(UserError, match="exceed the context of 9"):
        ready(command, **flags)
    monkeypatch.undo()
    monkeypatch.setenv("TEACHER_KEY", "secret")
    ready(command, api_key_variable="TEACHER_KEY", **flags)
    assert server.keys[-1] == "Bearer secret" and server.asked[-1][1]["model"] == "the-teacher"


def test_it_stands_beside_a_loaded_teacher_and_reads_privileged_prompts(pair, command, server):
    """fails if: problems go to the wrong one of two teachers of different kinds, or the server is sent what the student
    read instead of what the teacher is shown"""
    with_third(pair)
    flags = dict(route="kind", data=pair / "routed.jsonl", divergence="policy_gradient", privileged="solution",
                 teacher_prompt="{solution};{problem}", problems=6, **FAST)
    seen = []
    for b in (pair / "teacher", server.address("sglang")):
        run = ready(command, teacher=f"a={pair / 'third'},b={b}", **flags)
        seen.append(look(run))
    (batch, here, _), (_, there, parts) = seen
    close(here.teacher_logp_N, there.teacher_logp_N)
    assert [type(part).__name__ for part in parts] == ["Part", "TopKPart"]
    assert {problem.fields["kind"] for problem in batch.problems} == {"a", "b"}
    sent = {tuple(request["input_ids"]) for _, request in server.asked}
    for b, problem in enumerate(batch.problems):
        whole = (*run.kind.prompt(problem), *batch.rollout.response(b))
        assert (whole in sent) == (problem.fields["kind"] == "b") and len(whole) > len(problem.prompt)


def test_it_stands_beside_a_teacher_with_another_tokenizer(world, command, server):
    """fails if: the rows of one are taken for the other's, or a filter does not see both"""
    flags = dict(route="kind", data=world / "kinds.jsonl", divergence="policy_gradient", problems=6, **FAST)
    seen = [look(ready(command, teacher=f"a={world / 'foreign'},b={b}", **flags))[1]
            for b in (world / "teacher", server.address("vllm"))]
    torch.testing.assert_close(seen[0].teacher_logp_N, seen[1].teacher_logp_N, rtol=0, atol=1e-5, equal_nan=True)
    run = ready(command, teacher=f"a={world / 'foreign'},b={server.address('vllm')}", **flags)
    assert one_step(run)["grad_norm"] > 0


def test_eval_says_that_it_cannot_compare(pair, server, capsys):
    """fails if: eval.py leaves the distance out without a word"""
    data = ["--data", str(pair / "test.jsonl"), "--max_new_tokens", "6", "--k", "1"]
    assert evaluation.main(["--model", str(pair / "student"), *data, "--teacher", server.address("vllm")]) == 2
    said = capsys.readouterr().err
    assert "name a checkpoint" in said and said.count("\n") == 1


def test_a_whole_run_resumes(command, server, monkeypatch, tmp_path):
    """fails if: the loop, its report or a checkpoint stumbles over what is NaN; or a resumed run is another"""
    flags = dict(teacher=server.address("vllm"), steps=3, save_every=1, lr=0.05, **TOP, **FAST)
    assert train.main(command(**flags, runs=tmp_path / "whole")) == 0
    interrupted(monkeypatch, command, 2, **flags)
    whole, resumed = (steps_of(tmp_path / name / "a") for name in ("whole", "runs"))
    assert [record["loss"] for record in whole] == [record["loss"] for record in resumed]
    assert all(record["reverse_kl"] is None and record["reverse_kl_at_least"] > 0 for record in whole)
