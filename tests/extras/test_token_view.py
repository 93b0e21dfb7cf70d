"""extras/token_view.py: what is kept of a step is what the step used, and keeping it changes nothing."""
import json

import pytest
import torch
from helpers import predictions, ready, sampled, steps_of

import train
from extras import token_view
from support.report import Clock


BEGIN = token_view.begin        # before conftest.py leaves it out


@pytest.fixture(autouse=True)
def kept(monkeypatch, plain_ways):
    monkeypatch.setattr(token_view, "begin", BEGIN)


def views(folder):
    return {int(file.stem[5:]): json.loads(file.read_text()) for file in (folder / "tokens").iterdir()}


def seconds_apart(record):
    return {key: value for key, value in record.items() if "second" not in key}


@pytest.mark.parametrize("flags", [
    {}, dict(recipe="fire", fire_drop=0.5), dict(recipe="sg", samples=3, pts_weight=0.0), dict(recipe="sft"),
    dict(recipe="grpo", teacher="none", samples=3), dict(dtype="bfloat16")], ids=str)
def test_keeping_tokens_changes_no_number_of_the_run(flags, command, tmp_path):
    """fails if: the view draws from the step's random numbers, moves the student, or leaves another batch's notes."""
    first = ["--recipe", flags["recipe"]] if "recipe" in flags else []
    flags = {**{key: value for key, value in flags.items() if key != "recipe"}, "steps": 3}
    if first == ["--recipe", "grpo"]:
        flags["verifier"] = "number"
    assert train.main([*first, *command(**flags)]) == 0
    assert train.main([*first, *command(**flags, name="b"), "--no-token_view"]) == 0
    runs = tmp_path / "runs"
    mine, theirs = ([seconds_apart(record) for record in steps_of(runs / name)] for name in "ab")
    assert len(mine) == 3 and str(mine) == str(theirs)      # as text: NaN equals NaN
    assert sorted(views(runs / "a")) == [1, 2, 3] and not (runs / "b/tokens").exists()


def test_columns_are_those_of_a_plain_pass_before_the_update(command, tmp_path):
    """fails if: a column belongs to another token, to the student after the step, or to another temperature."""
    run = ready(command, recipe=None, temperature=0.7, lr=0.1, divergence="policy_gradient", problems=3)

    class Folder:
        path = tmp_path
    for begin in run.before_first_step:
        begin(run, Folder, None)
    before = ready(command, temperature=0.7)
    run.step(run, run.make_optimizer(run.student, run.cfg), 0, Clock())
    (view,) = views(tmp_path).values()
    assert len(view["training"]) == 4 and len(view["held-out"]) == 2
    rollout = run.batch.rollout
    for sample in view["training"]:
        b = next(b for b in range(len(rollout.tokens_BT))
                 if [run.tokenizer.decode([i], skip_special=False) for i in rollout.response(b)] == sample["pieces"]
                 and run.batch.problems[b].prompt == sample["prompt"])
        prompt, response = rollout.tokens_BT[b, :rollout.prompt_len_B[b]].tolist(), rollout.response(b)
        with torch.no_grad():
            both = before.student, before.kind.models[0]
            p_NV, q_NV = (predictions(model, prompt, response, 0.7) for model in both)
        wanted = {"kl": (p_NV.exp() * (p_NV - q_NV)).sum(-1), "student_entropy": -(p_NV.exp() * p_NV).sum(-1),
                  "teacher_entropy": -(q_NV.exp() * q_NV).sum(-1), "behavior_logp": sampled(p_NV, response),
                  "teacher_logp": sampled(q_NV, response), "weight": torch.ones(len(response)),
                  "advantage": sampled(q_NV, response) - sampled(p_NV, response)}
        for name, value_n in wanted.items():
            assert sample["columns"][name] == pytest.approx(value_n.tolist(), rel=2e-3, abs=2e-4), name
        for (mine, theirs), p_V, q_V in zip(sample["top"], p_NV, q_NV):
            for top, logp_V in ((mine, p_V), (theirs, q_V)):
                value, index = logp_V.exp().topk(8)
                assert [x for _, x in top] == pytest.approx(value.tolist(), rel=2e-3, abs=1e-6)
                assert top[0][0] == run.tokenizer.decode([int(index[0])], skip_special=False)


def test_a_dropped_response_is_among_the_kept_and_a_second_start_goes_on(command, tmp_path):
    """fails if: the choice leaves out what a filter dropped, or a run that goes on overwrites its first step."""
    arguments = ["--recipe", "fire", *command(fire_drop=0.5, samples=4, steps=4)]
    assert train.main(arguments) == 0
    found = views(tmp_path / "runs/a")
    assert sorted(found) == [1, 3, 4]
    weights = [[set(sample["columns"]["weight"]) == {0.0} for sample in view["training"]] for view in found.values()]
    assert all(any(dropped) and not all(dropped) for dropped in weights)
    assert (tmp_path / "runs/a/report.html").stat().st_size < 2**20


def test_across_tokenizers_both_cuts_hold_the_same_chunks(tmp_path, world):
    """fails if: a chunk's number on one side names another text on the other."""
    from conftest import TINY
    teacher = world / "teacher_sp"
    flags = {**TINY, "student": world / "student", "teacher": teacher if teacher.exists() else None,
             "data": world / "train.jsonl", "eval_data": world / "test.jsonl", "runs": tmp_path / "runs",
             "min_coverage": 0.0}
    if flags["teacher"] is None:
        flags["teacher"], flags["align"] = world / "teacher", "always"
    assert train.main(["--recipe", "xtok", *(f"--{key}={value}" for key, value in flags.items())]) == 0
    samples = [sample for view in views(tmp_path / "runs/a").values() for sample in view["training"]
               if "chunks" in sample]
    assert samples
    for sample in samples:
        for chunk in {c for c in sample["chunks"] if c >= 0}:
            mine, theirs = ("".join(piece for piece, c in zip(pieces, chunks) if c == chunk) for pieces, chunks in
                            ((sample["pieces"], sample["chunks"]), (sample["their_pieces"], sample["their_chunks"])))
            assert mine.strip() == theirs.strip() or mine.startswith("<") or "�" in mine + theirs


@pytest.mark.parametrize("flags", [
    dict(divergence="topk_reverse_kl", support="teacher", topk_form="tail", topk=4, cache_topk=5),
    dict(divergence="policy_gradient", cache_topk=1)], ids=str)
def test_of_a_teacher_that_told_its_likeliest_tokens_only_those_are_shown(flags, command, tmp_path):
    """fails if: a run ends because something is not known, or what is not known is shown as a number."""
    assert train.main(command(cache_teacher=tmp_path / "told", **flags)) == 0
    for view in views(tmp_path / "runs/a").values():
        for sample in view["training"]:
            assert all(x is None for x in sample["columns"]["kl"])
            assert all(x >= 0 for x in sample["columns"]["kl_at_least"])
            assert all(len(theirs) == flags["cache_topk"] for _, theirs in sample["top"])
            assert all(x is not None for x in sample["columns"]["teacher_logp"])
