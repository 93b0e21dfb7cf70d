"""eval.py: metrics as they are defined, samples as they were drawn, a command line that refuses in time."""
import argparse
import itertools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as ev
from rollout import Rollout
from support.errors import UserError
from support.problems import Problem
from support.settings import eval_arguments


# metrics

def test_pass_at_k_equals_enumeration_of_all_subsets():
    """fails if: the product starts at n - correct instead of n - correct + 1"""
    for n in range(1, 8):
        for c, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([1] * c + [0] * (n - c), k))
            assert ev.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-12)
    assert ev.pass_at_k(100_000, 1, 1000) == pytest.approx(0.01)     # C(n, k) has 2,400 digits


def test_majority_equals_the_mean_over_all_tie_breaks():
    """fails if: ties go to the first answer (winners[:1]), or None is allowed to vote"""
    for votes in itertools.product("abc", repeat=5):
        votes = [None if vote == "c" else vote for vote in votes] + ["d"]
        orders = list(itertools.permutations("abd"))
        expected = sum(max(order, key=votes.count) == "a" for order in orders) / len(orders)
        assert ev.majority(votes, [vote == "a" for vote in votes]) == pytest.approx(expected)
    assert ev.majority([None, None], [False, False]) == 0


def test_bootstrap_interval_covers_the_truth_in_95_of_100_runs():
    """fails if: the quantiles become (0.25, 0.75), or problems are drawn without replacement"""
    rng, p, size, runs = np.random.default_rng(1), 0.3, 150, 200
    values = rng.random((runs, size)) < p
    edges = np.array([ev.bootstrap_interval(row.astype(float)) for row in values])
    assert 0.90 <= np.mean((edges[:, 0] <= p) & (p <= edges[:, 1])) <= 0.99
    normal = 2 * 1.96 * (p * (1 - p) / size) ** 0.5
    assert np.mean(edges[:, 1] - edges[:, 0]) == pytest.approx(normal, rel=0.05)
    assert ev.bootstrap_interval(values[0] * 1.0) == ev.bootstrap_interval(values[0] * 1.0)
    assert ev.bootstrap_interval(np.ones(9)) == [1.0, 1.0]


# evaluate and the command line

def write(path: Path, *records) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path

REPLIES = {"p": ["\\boxed{1}", "\\boxed{2}", "\\boxed{1.0}", "cut"], "q": ["8", "9", "9", "8.0"]}
PROBLEMS = [Problem("p", "1", None, {}, "line 3"), Problem("q", "9", None, {}, "line 5")]
MODEL = SimpleNamespace(config=SimpleNamespace(context=20), parameters=lambda: iter(()))
TOKENIZER = SimpleNamespace(     # one token per character, "\0" stops
    variables={}, prompt_ids=lambda prompt: [ord(c) for c in prompt + str(TOKENIZER.variables or "")],
    decode=lambda ids: "".join(map(chr, ids)).removesuffix("\0"), stop_ids=(0,), vocab_size=128)


def fake_generate(calls: list):
    def generate(model, prompts, *, samples, max_new_tokens, **rest):
        calls.append(dict(rest, samples=samples, max_new_tokens=max_new_tokens))
        texts = [(ids, text + "\0" * (text != "cut"))
                 for ids in prompts for text in REPLIES[chr(ids[0])][:samples]]
        tokens = torch.zeros(len(texts), 40, dtype=torch.int64)
        mask = torch.zeros(len(texts), 40, dtype=torch.bool)
        for b, (ids, text) in enumerate(texts):
            mask[b, len(ids):len(ids) + len(text)] = True
            tokens[b, mask[b]] = torch.tensor([ord(c) for c in text])
        return Rollout(tokens, mask, torch.where(mask, -tokens.float(), 0.0), torch.zeros(tokens.shape),
                       torch.tensor([len(ids) for ids, _ in texts]),
                       torch.tensor(["\0" in text for _, text in texts]))
    return generate


@pytest.fixture
def calls(monkeypatch) -> list:
    calls = []
    monkeypatch.setattr(ev, "generate", fake_generate(calls))
    return calls


def settings(**changes) -> dict:
    return dict(k=4, temperature=0.7, max_new_tokens=10, seed=1) | changes


def test_evaluate_equals_counting_by_hand(calls):
    """fails if: truncation_rate counts finished samples, or samples are attributed by b % len(problems)"""
    metrics, samples = ev.evaluate(MODEL, TOKENIZER, PROBLEMS, **settings())
    # p: right, wrong, right, cut; q: two votes for 8 and two for 9, so its majority is right half the time
    assert [s["correct"] for s in samples] == [True, False, True, False, False, True, True, False]
    assert [s["answer"] for s in samples] == ["1", "2", "1.0", "cut", "8", "9", "9", "8.0"]
    assert (metrics["avg@4"], metrics["pass@4"], metrics["maj@4"]) == (0.5, 1.0, 0.75)
    assert metrics["avg@4_ci"] == [0.5, 0.5] and metrics["maj@4_ci"] == [0.5, 1.0]
    lengths = [len(s["tokens"]) for s in samples]
    assert lengths == [10, 10, 12, 3, 2, 2, 2, 4]
    assert metrics["truncation_rate"] == 1 / 8 and metrics["mean_length"] == sum(lengths) / 8
    assert (metrics["problems"], metrics["samples"], metrics["tokens"]) == (2, 8, sum(lengths))
    assert calls == [dict(samples=4, max_new_tokens=10, stop_ids=(0,), temperature=0.7, seed=1, slots=64,
                          progress=None)]


def test_a_sample_holds_what_was_sampled(calls, monkeypatch):
    """fails if: logprobs are taken from the whole row, or the template's variables do not reach the chat template"""
    monkeypatch.setattr(TOKENIZER, "variables", {"a": 1})
    asked = settings(k=2, verifier="exact")
    _, samples = ev.evaluate(MODEL, TOKENIZER, PROBLEMS, **asked)
    assert samples[3] == {
        "problem": 1, "sample": 1, "prompt_tokens": [ord(c) for c in "q{'a': 1}"], "tokens": [ord("9"), 0],
        "logprobs": [-57.0, 0.0], "text": "9", "answer": "9", "correct": True, "finished": True}
    assert json.loads(json.dumps(samples)) == samples


def test_without_verifier_nothing_is_graded(calls):
    """fails if: answers are required whatever the verifier, or problems without answers are graded"""
    for verifier, problem in ((None, PROBLEMS[1]), ("auto", Problem("q", None, None, {}, "line 1"))):
        metrics, samples = ev.evaluate(MODEL, TOKENIZER, [problem], **settings(verifier=verifier))
        assert set(metrics) == {"truncation_rate", "mean_length", "problems", "samples", "tokens"}
        assert {(s["answer"], s["correct"]) for s in samples} == {(None, None)}
        assert ev.metrics_of(samples, 4, "auto") == metrics

BAD_SETTINGS = [
    (dict(k=0), "k must be at least 1, not 0"),
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1"),
    (dict(slots=0), "slots must be at least 1"),
    (dict(temperature=-1.0), "temperature must be 0 or a positive number"),
    (dict(temperature=float("nan")), "temperature must be"),
    (dict(temperature=float("inf")), "temperature must be"),
    (dict(temperature=0.0), "temperature 0 gives the same response 4 times: use k 1"),
    (dict(verifier="regex"), "unknown verifier 'regex'"),
    (dict(verifier=""), "unknown verifier ''"),
    (dict(max_new_tokens=20), "the prompt on line 3 has 1 tokens; with max_new_tokens 20 it does not fit the "
                              "model's context of 20"),
    (dict(problems=[*PROBLEMS, Problem("p", None, None, {}, "row 7")]), "the problem on row 7 has no answer to grade"),
    (dict(problems=[PROBLEMS[0], Problem("", "1", None, {}, "line 4")]), "the prompt on line 4 has no tokens"),
    (dict(problems=[]), "there are no problems to evaluate on"),
]


@pytest.mark.parametrize("changes, sentence", BAD_SETTINGS)
def test_bad_settings_are_refused_before_sampling(calls, changes, sentence):
    """fails if: a check in check_eval_settings or evaluate is removed, or comes after generate"""
    with pytest.raises(UserError, match=sentence):
        ev.evaluate(MODEL, TOKENIZER, **({"problems": PROBLEMS} | settings(**changes)))
    assert not calls


def test_greedy_with_one_sample_is_allowed(calls):
    """fails if: temperature 0 is refused whatever k"""
    assert ev.evaluate(MODEL, TOKENIZER, PROBLEMS, **settings(k=1, temperature=0.0))[0]["avg@1"] == 0.5


@pytest.fixture
def loads(monkeypatch, calls) -> list:
    """The command line with a fake checkpoint; the list records what was loaded."""
    loads = []
    monkeypatch.setattr(ev, "checkpoint_folder", lambda name: loads.append(name) or Path(name))
    monkeypatch.setattr(ev, "Tokenizer", lambda folder, template: loads.append(template) or TOKENIZER)
    monkeypatch.setattr(ev, "load_model", lambda _, *, dtype, device: loads.append((dtype, device)) or MODEL)
    return loads


def test_command_line_prints_one_json_object_and_writes_the_samples(tmp_path, capsys, loads, calls):
    """fails if: samples are printed, a flag is not passed on, or the temporary file is left behind"""
    data = write(tmp_path / "p.jsonl", {"prompt": "p", "answer": 1}, {"prompt": "q", "answer": 9})
    out = write(tmp_path / "samples.jsonl", dict.fromkeys(("problem", "sample", "prompt_tokens", "tokens", "text"), 0))
    assert ev.main(["--model", "M", "--data", str(data), "--k", "2", "--temperature", "0.9", "--seed", "4",
                    "--max_new_tokens", "5", "--slots", "3", "--limit", "2", "--device", "cpu",
                    "--out", str(out), "--template_vars", "a=1", "--template_var", "a=x,y"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert printed["avg@2"] == 0.5 and printed["model"] == "M" and printed["temperature"] == 0.9
    assert [row["correct"] for row in rows] == [True, False, False, True]
    assert bytes(rows[0]["prompt_tokens"]) == b"p{'a': 'x,y'}"
    assert loads == ["M", "auto", (torch.float32, torch.device("cpu"))]
    assert calls == [dict(samples=2, max_new_tokens=5, stop_ids=(0,), temperature=0.9, seed=4, slots=3,
                          progress="evaluate")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.jsonl", "samples.jsonl"]


def test_command_line_refuses_before_a_model_is_loaded(tmp_path, capsys, loads):
    """fails if: the check of --out moves below load_model, or lets a folder or a device be replaced"""
    data = str(write(tmp_path / "p.jsonl", {"prompt": "p", "answer": 1}))
    os.mkfifo(tmp_path / "pipe")
    for flags, sentence in ((["--out", str(tmp_path / "no" / "s.jsonl")], "its folder must exist"),
                            (["--out", str(tmp_path)], "may only be a file"),
                            (["--out", str(tmp_path / "pipe")], "may only be a file"),
                            (["--out", data], "does not hold samples of eval.py"),
                            (["--data", str(tmp_path / "no.jsonl")], "no such file"),
                            (["--temperature", "0"], "temperature 0 gives the same response 8 times"),
                            (["--limit", "0"], "limit must be at least 1"),
                            (["--template_var", "thinking"], "expected NAME=VALUE"),
                            (["--template_vars", "a=1,thinking"], "expected NAME=VALUE"),
                            (["--template_var", "prompt=x"], "expected NAME=VALUE"),
                            (["--device", "nosuch"], "--device nosuch: there is no such device here")):
        assert ev.main(["--model", "M", "--data", data, *flags]) == 2
        said = capsys.readouterr()
        assert said.err.startswith("error: ") and sentence in said.err and said.err.count("\n") == 1
        assert said.out == "" and loads == []


@pytest.mark.parametrize("flags", [["--tempurature", "1"], ["--tempera", "1"], ["--k", "two"], ["extra"],
                                   ["--verifier", "regex"]])
def test_unknown_flags_are_errors(capsys, loads, flags):
    """fails if: parse_args becomes parse_known_args, or allow_abbrev=False is dropped"""
    assert ev.main(["--model", "M", "--data", "D", *flags]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and loads == []
    assert flags[-1] in said or flags[0] in said


@pytest.mark.parametrize("content", [b"notes\n", b"{}\n", b'{"problem": 0}\n', b"[1]\n", b"3", b"\xff", b"[" * 9999])
def test_what_eval_did_not_write_stays(tmp_path, capsys, loads, content):
    """fails if: any file, or any JSON, may be replaced; an empty one may"""
    data, out = write(tmp_path / "p.jsonl", {"prompt": "p", "answer": 1}), tmp_path / "out"
    command = ["--model", "M", "--data", str(data), "--k", "1", "--max_new_tokens", "5", "--device", "cpu",
               "--out", str(out)]
    out.write_bytes(content)
    assert ev.main(command) == 2 and out.read_bytes() == content and loads == []
    assert "exists and does not hold samples of eval.py; pass another name" in capsys.readouterr().err
    out.write_bytes(b"")
    assert ev.main(command) == ev.main(command) == 0 and b'"problem": 0' in out.read_bytes()


def test_every_flag_has_help(monkeypatch):
    """fails if: a flag is added without help"""
    flags = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, _: flags.extend(self._actions))
    eval_arguments([])
    assert len(flags) == 17 and all(flag.help for flag in flags)
