"""What eval.py promises: problems read as written, right answers found, metrics as they are defined."""
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import eval as ev
from rollout import Rollout
from tokenizer import UserError

GSM8K = [
    {"question": "Ana has 3 bags of 4 pears and eats 2. How many are left?",
     "answer": "She had 3*4=<<3*4=12>>12 pears.\nShe has 12-2=<<12-2=10>>10 left.\n#### 10"},
    {"question": "A car costs $1,200 more than a $15,000 one. What does it cost?",
     "answer": "It costs 15,000+1,200=$<<15000+1200=16200>>16,200.\n#### 16,200"},
    {"question": "It was 5 degrees and fell by 8. What is it now?", "answer": "5-8=<<5-8=-3>>-3.\n#### -3"}]


def write(path: Path, *records) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines))
    return path


# ---------------------------------------------------------------- problems


def test_gsm8k_answer_is_what_follows_the_marker_and_the_text_is_the_solution(tmp_path):
    """fails if: load_problems keeps the whole answer text as the answer (`_marked(answer) or` dropped)"""
    problems = ev.load_problems(write(tmp_path / "g.jsonl", *GSM8K), need_answer=True)
    assert [p.answer for p in problems] == ["10", "16,200", "-3"]
    assert [p.solution for p in problems] == [r["answer"] for r in GSM8K]
    assert [p.prompt for p in problems] == [r["question"] for r in GSM8K]
    for verifier in ("auto", "hash", "number"):
        assert all(ev.grade(p.solution, p.answer, verifier) for p in problems)
        assert not any(ev.grade(p.solution, q.answer, verifier) for p, q in zip(problems, problems[1:]))


RECORDS = [     # record -> prompt, answer, solution
    ({"prompt": "a", "problem": "b", "answer": "1", "label": "2"}, "a", "1", None),
    ({"problem": "b", "question": "c", "label": 7, "ground_truth": "8"}, "b", "7", None),
    ({"prompt": None, "question": "c", "answer": None, "ground_truth": 0.5}, "c", "0.5", None),
    ({"question": "c", "answer": " 4 ", "solution": "2+2 is \\boxed{5}"}, "c", "4", "2+2 is \\boxed{5}"),
    ({"problem": "b", "solution": "\\boxed{\\frac{1}{2}}."}, "b", "\\frac{1}{2}", "\\boxed{\\frac{1}{2}}."),
    ({"problem": "b", "solution": "so $\\boxed 2$."}, "b", "2", "so $\\boxed 2$."),
    ({"problem": "b", "solution": "long", "label": "B"}, "b", "B", "long"),
    ({"problem": "b", "solution": "\\boxed{9}", "label": "B"}, "b", "9", "\\boxed{9}"),
    ({"problem": "b", "solution": "204"}, "b", "204", "204"),
    ({"problem": "b", "response": "it is 3"}, "b", None, "it is 3"),
    ({"problem": "b", "response": "it is\n#### 3"}, "b", "3", "it is\n#### 3"),
    ({"problem": "b", "answer": "F#"}, "b", "F#", None),
    ({"problem": "b", "answer": {"no": "text"}, "label": "x"}, "b", "x", None),
    ({"problem": "b"}, "b", None, None),
]


@pytest.mark.parametrize("record, prompt, answer, solution", RECORDS)
def test_fields_are_taken_in_the_documented_order(tmp_path, record, prompt, answer, solution):
    """fails if: PROMPT_FIELDS is reordered, or _problem asks label before a marked solution"""
    found, = ev.load_problems(write(tmp_path / "p.jsonl", record))
    assert (found.prompt, found.answer, found.solution, found.fields) == (prompt, answer, solution, record)


def test_last_assistant_turn_is_the_solution_and_not_the_prompt(tmp_path):
    """fails if: prompt[:-1] becomes prompt"""
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    reply = {"role": "assistant", "content": "so \\boxed{4}"}
    path = write(tmp_path / "p.jsonl", {"messages": [system, user, reply]}, {"prompt": [user, reply, user]})
    first, second = ev.load_problems(path)
    assert (first.prompt, first.solution, first.answer) == ([system, user], "so \\boxed{4}", "4")
    assert (second.prompt, second.solution, second.answer) == ([user, reply, user], None, None)


def test_lines_are_counted_as_in_an_editor(tmp_path):
    """fails if: the file is cut by str.splitlines() (U+2028 ends a line), or "utf-8-sig" becomes "utf-8" """
    path = tmp_path / "p.jsonl"
    path.write_bytes("\ufeff{\"prompt\": \"a\u2028b\"}\r\n\n   \n{\"prompt\": \"é\"}".encode())
    assert [(p.prompt, p.line) for p in ev.load_problems(path)] == [("a\u2028b", 1), ("é", 4)]
    assert len(ev.load_problems(path, limit=1)) == 1 and len(ev.load_problems(path, limit=9)) == 2


BAD_LINES = [   # the third line of a file -> what the sentence says
    ('{"prompt": "a"', "not valid JSON (Expecting ',' delimiter)"),
    ('{"prompt": ' + "9" * 5000 + "}", "not valid JSON"),
    ("[" * 200_000, "not valid JSON"),
    ('["prompt"]', "expected a JSON object, found a list"),
    ('null', "expected a JSON object, found a NoneType"),
    ('{"text": "a", "answer": "1"}', "no prompt; one of prompt, messages, problem, question, query, "
                                       "conversations, instruction is needed"),
    ('{"prompt": 3, "answer": "1"}', "`prompt` must be text or a list of messages, not int"),
    ('{"prompt": {"role": "user"}, "answer": "1"}', "`prompt` must be text or a list of messages, not dict"),
    ('{"messages": ["hi"], "answer": "1"}', "a message of `messages` needs `role` and `content`, both text"),
    ('{"messages": [{"role": "user", "content": null}]}', "needs `role` and `content`, both text"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "`messages` is empty"),
    ('{"prompt": "", "answer": "1"}', "`prompt` is empty"),
    ('{"prompt": "a"}', "no answer, text or a number, in any of answer, final_answer, solution, label, ground_truth"),
    ('{"prompt": "a", "answer": "  "}', "no answer"),
    ('{"prompt": "a", "answer": [" ", {"a": 1}, []]}', "no answer"),
]


@pytest.mark.parametrize("line, sentence", BAD_LINES)
def test_a_bad_line_is_one_sentence_with_file_and_line(tmp_path, line, sentence):
    """fails if: enumerate(file, 1) becomes enumerate(file), or a check of load_problems is removed"""
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "answer": "1"}, "", line)
    with pytest.raises(UserError) as error:
        ev.load_problems(path, need_answer=True)
    assert str(error.value).startswith(f"{path}, line 3: ") and sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_bad_file_is_one_sentence(tmp_path):
    """fails if: `if not problems: raise` is removed, or json.JSONDecodeError alone is caught"""
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "é"}'.encode("latin-1"))
    for path, sentence in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "is a folder, a pipe or a device"),
                           (write(tmp_path / "empty.jsonl"), "no problems in this file"),
                           (write(tmp_path / "blank.jsonl", "", " "), "no problems in this file"),
                           (tmp_path / "latin.jsonl", "line 1: not valid JSON")):
        with pytest.raises(UserError, match=sentence):
            ev.load_problems(path)
    with pytest.raises(UserError, match="limit must be at least 1"):
        ev.load_problems(write(tmp_path / "p.jsonl", {"prompt": "a"}), limit=0)


# ---------------------------------------------------------------- metrics


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


# ---------------------------------------------------------------- evaluate and the command line

REPLIES = {"p": ["\\boxed{1}", "\\boxed{2}", "\\boxed{1.0}", "cut"], "q": ["8", "9", "9", "8.0"]}
PROBLEMS = [ev.Problem("p", "1", None, {}, 3), ev.Problem("q", "9", None, {}, 5)]
MODEL = SimpleNamespace(config=SimpleNamespace(context=20), parameters=lambda: iter(()))
TOKENIZER = SimpleNamespace(     # one token per character, "\0" stops
    prompt_ids=lambda prompt, **variables: [ord(c) for c in prompt + str(variables or "")],
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
                          vocab_size=128, progress=None)]


def test_a_sample_holds_what_was_sampled(calls):
    """fails if: logprobs are taken from the whole row, or `variables` do not reach the chat template"""
    asked = settings(k=2, verifier="exact", variables={"a": 1})
    _, samples = ev.evaluate(MODEL, TOKENIZER, PROBLEMS, **asked)
    assert samples[3] == {
        "problem": 1, "sample": 1, "prompt_tokens": [ord(c) for c in "q{'a': 1}"], "tokens": [ord("9"), 0],
        "logprobs": [-57.0, 0.0], "text": "9", "answer": "9", "correct": True, "finished": True}
    assert json.loads(json.dumps(samples)) == samples


def test_without_verifier_nothing_is_graded(calls):
    """fails if: answers are required whatever the verifier, or problems without answers are graded"""
    for verifier, problem in ((None, PROBLEMS[1]), ("auto", ev.Problem("q", None, None, {}, 1))):
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
    (dict(problems=[*PROBLEMS, ev.Problem("p", None, None, {}, 7)]), "the problem on line 7 has no answer to grade"),
    (dict(problems=[]), "there are no problems to evaluate on"),
]


@pytest.mark.parametrize("changes, sentence", BAD_SETTINGS)
def test_bad_settings_are_refused_before_sampling(calls, changes, sentence):
    """fails if: a check in check_settings or evaluate is removed, or comes after generate"""
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
    assert loads == ["M", "auto", (torch.float32, "cpu")]
    assert calls == [dict(samples=2, max_new_tokens=5, stop_ids=(0,), temperature=0.9, seed=4, slots=3,
                          vocab_size=128, progress="evaluate")]
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


JUDGED = [      # figures of an evaluation, of an earlier one -> the figure that decides, is it better, the line
    ({"avg@2": 0.5, "avg@2_ci": [0.4, 0.6], "pass@2": 0.75}, 0.4, "avg@2", True,
     "avg@2 50.0% [40.0%, 60.0%]  pass@2 75.0%  "),
    ({"avg@2": 0.5, "avg@2_ci": [0.4, 0.6], "pass@2": 0.75}, 0.5, "avg@2", False, None),
    ({"mean_length": 3.0, "reverse_kl": 0.5, "forward_kl": 0.25}, 0.6, "reverse_kl", True,
     "reverse_kl 0.5000  forward_kl 0.2500  "),
    ({"reverse_kl": 0.5, "forward_kl": 0.25}, 0.5, "reverse_kl", False, None),
    ({"reverse_kl": None, "forward_kl": None}, 0.5, "reverse_kl", False, "reverse_kl -  forward_kl -  "),
    ({"reverse_kl": 0.5, "forward_kl": 0.25}, None, "reverse_kl", True, None),
    ({"mean_length": 3.0}, None, None, True, ""),
]


@pytest.mark.parametrize("metrics, best, key, better, line", JUDGED)
def test_accuracy_decides_else_the_distance_else_the_later_one(metrics, best, key, better, line):
    """fails if: more distance is better, a tie is an improvement, or nothing to judge by keeps the first"""
    assert (ev.judged_by(metrics), ev.better(metrics, best)) == (key, better)
    assert line is None or ev.headline(metrics) == line


def test_the_closing_words_name_the_figure_that_decided():
    """fails if: the teacher's length is compared with a distance"""
    assert ev.change({"avg@1": 0.1}, {"avg@1": 0.2}, {"avg@1": 1.0}) == "avg@1 10.0% -> 20.0% (teacher 100.0%)"
    distances = [{"mean_length": 3.0, "reverse_kl": value} for value in (2.0, 1.0)]
    assert ev.change(*distances, {"mean_length": 9.0}) == "reverse_kl 2.0000 -> 1.0000"
    assert ev.change({"mean_length": 3.0}, {"mean_length": 4.0}, None) == "mean_length 3.0 -> 4.0"


def test_template_variables_are_json_or_text():
    """fails if: json.loads is dropped (the text "false" is true in a template)"""
    pairs = [ev.template_variable(text) for text in ("a=false", "b=3", "c=low", "d=x=y", "e=")]
    assert pairs == [("a", False), ("b", 3), ("c", "low"), ("d", "x=y"), ("e", "")]


def test_every_flag_has_help(monkeypatch):
    """fails if: a flag is added without help"""
    flags = []
    monkeypatch.setattr(ev.argparse.ArgumentParser, "parse_args", lambda self, _: flags.extend(self._actions))
    with pytest.raises(AttributeError):         # there are no parsed flags to go on with
        ev.run([])
    assert len(flags) == 17 and all(flag.help for flag in flags)
