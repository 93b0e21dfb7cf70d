"""What eval.py promises: problems read as written, right answers found, metrics as they are defined."""
import itertools
import json
import os
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace

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
    ('{"text": "a", "answer": "1"}', "no prompt; one of prompt, messages, problem, question is needed"),
    ('{"prompt": 3, "answer": "1"}', "`prompt` must be text or a list of messages, not int"),
    ('{"prompt": {"role": "user"}, "answer": "1"}', "`prompt` must be text or a list of messages, not dict"),
    ('{"messages": ["hi"], "answer": "1"}', "a message of `messages` needs `role` and `content`, both text"),
    ('{"messages": [{"role": "user", "content": null}]}', "needs `role` and `content`, both text"),
    ('{"messages": [{"role": "assistant", "content": "x"}]}', "`messages` is empty"),
    ('{"prompt": "", "answer": "1"}', "`prompt` is empty"),
    ('{"prompt": "a"}', "no answer, text or a number, in any of answer, solution, label, ground_truth"),
    ('{"prompt": "a", "answer": "  "}', "no answer"),
    ('{"prompt": "a", "answer": ["1"]}', "no answer"),
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
    for path, sentence in ((tmp_path / "none.jsonl", "no such file"), (tmp_path, "no such file"),
                           (write(tmp_path / "empty.jsonl"), "no problems in this file"),
                           (write(tmp_path / "blank.jsonl", "", " "), "no problems in this file"),
                           (tmp_path / "latin.jsonl", "line 1: not valid JSON")):
        with pytest.raises(UserError, match=sentence):
            ev.load_problems(path)
    with pytest.raises(UserError, match="limit must be at least 1"):
        ev.load_problems(write(tmp_path / "p.jsonl", {"prompt": "a"}), limit=0)


# ---------------------------------------------------------------- grading

EXTRACT = [     # text, verifier -> the answer in it
    ("a \\boxed{1} b \\boxed{2}", "boxed", "2"),
    ("\\boxed{\\frac{1}{2}}", "boxed", "\\frac{1}{2}"),
    ("\\boxed{ {a} {b{c}} } x}", "boxed", "{a} {b{c}}"),
    ("\\boxed{\\{1, 2\\}}", "boxed", "\\{1, 2\\}"),
    ("\\boxed{\\}", "boxed", None),
    ("\\boxed{x = \\fbox{3}}", "boxed", "3"),
    ("\\fbox{3}", "boxed", "3"),
    ("\\boxed {4}", "boxed", "4"),
    ("\\boxed 4$ or so", "boxed", "4"),
    ("\\boxed{1} then \\boxed{2", "boxed", None),
    ("\\boxed{}", "boxed", None),
    ("\\boxed{ }", "boxed", None),
    ("answer in \\boxed please: 4", "boxed", None),
    ("boxed{4}", "boxed", None),
    ("#### 5", "boxed", None),
    ("so\n#### 18\n", "hash", "18"),
    ("#### 1\n#### 2\nDone.", "hash", "2"),
    ("####", "hash", None),
    ("2#2", "hash", None),
    ("##### 5", "hash", None),
    ("\\boxed{4}", "hash", None),
    ("1 2 3", "number", "3"),
    ("costs 1,234,567.50 in all", "number", "1,234,567.50"),
    ("1,2,3", "number", "3"),
    ("(1,23)", "number", "23"),
    ("so 42.", "number", "42"),
    ("it is .5", "number", ".5"),
    ("10-5", "number", "5"),
    ("x=-5", "number", "-5"),
    ("f(x)-5", "number", "5"),
    ("x = \u22125", "number", "-5"),
    ("of 3/4 cup", "number", "3/4"),
    ("about 6.02e23 atoms", "number", "6.02e23"),
    ("rose by 50%.", "number", "50"),
    ("none", "number", None),
    ("  a b\n", "exact", "a b"),
    (" \n", "exact", None),
    ("3+8=1;1*2=2#2", "auto", "2"),
    ("#2", "auto", "2"),
    ("1#2#3", "auto", "3"),
    ("2#", "auto", "2"),
    ("# Answer\nIt is 7", "auto", "7"),
    ("## Step 1\n\\boxed{8}\n#### 9", "auto", "8"),
    ("\\boxed{8", "auto", None),
    ("a \\boxed is missing, 8", "auto", "8"),
    ("#### \nso 5", "auto", None),
    ("rose by 50\\%.", "auto", "50\\%"),
    (" Yes ", "auto", "Yes"),
    ("", "auto", None),
]


@pytest.mark.parametrize("text, verifier, found", EXTRACT)
def test_extract_finds_the_answer(text, verifier, found):
    """fails if: _last takes the first match, BRACE loses its escapes, or an unclosed box runs to the end"""
    assert ev.extract(text, verifier) == found


EQUAL = [       # every member of a group equals every other, and no member of another group
    ["1234", "1,234", "01234", "+1234", "1234.0", "1.234e3", "1234E0", " 1234 ", "$1,234$", "\\$1234",
     "1{,}234", "1,\\!234", "\\(1234\\)", "1234.", "$1234.$", "\\text{1234}", "2468/2", "1.2340e+03"],
    ["-3", "\u22123", "- 3", "-3.0", "$-3$", "-6/2", "\\frac{-6}{2}", "-\\frac{6}{2}", "\\frac{6}{-2}"],
    ["0.5", ".5", "0.50", "1/2", "\\frac{1}{2}", "\\frac12", "\\frac 1 2", "\\frac1{2}", "\\frac{1}2",
     "\\dfrac{1}{2}", "\\tfrac{2}{4}", "\\dfrac12", "50%", "50\\%", "50 %", "5e-1", "0.5/1", "1 / 2"],
    ["50", "50.", "5e1", "50^\\circ", "50^{\\circ}", "50°"],
    ["1.5", "3/2", "1\\frac12", "1 \\frac{1}{2}", "1 1/2", "+1\\dfrac{1}{2}"],
    ["-1.5", "-1\\frac12", "-1 1/2", "-3/2"],
    ["11/2", "5.5"],
    ["0", "-0", "0.000", "0/7", "0%", "0e9"],
    ["1e-2", "1%", "0.01"],
    ["5 cm", "5\\text{ cm}", "5cm", "$5$ cm", "5\\,\\text{cm}", "5~\\mathrm{cm}"],
    ["0.3333333333333333"], ["1/3", "\\frac13", "2/6"],
    ["9007199254740993"], ["9007199254740992"],
    ["1e400", "10e399"], ["1e401"], ["1e999999999"], ["1e-999999999"],
    ["1 2", "1\\quad 2", "1 ~ 2"], ["12"], ["1, 234", "1,  234"],
    ["(1,234)", "(1, 234)", "\\left( 1, 234 \\right)"],
    ["(1,2)", "(1, 2)", "\\left(1,\\;2\\right)", "( 1 , 2 )"],
    ["12,34"], ["1,23"], ["0,123"], ["123"], ["1234,567"],
    ["1/0"], ["\\frac{1}{0}"], ["1e3%"], ["%"], ["1e" + "9" * 30], ["--5"], ["1_000"], ["nan"], ["inf"],
    ["5"], ["\u0665"],
    ["2\\frac{3}{2}"], ["2\\frac{-1}{2}"],
    ["\\frac{\\sqrt{3}}{2}", "\\dfrac{\\sqrt{3}}{2}", "$\\tfrac{\\sqrt{3}}{2}$"],
    ["x+1", " x + 1 ", "\\left x+1\\right."], ["1+x"],
    ["\\leftarrow"], ["arrow"], ["(B)", "\\text{(B)}", "\\textbf{(B)}"], ["(b)"], ["B"],
    ["9" * 5000, "0" + "9" * 5000 + ".0"], ["9" * 5001], ["__import__('os').getcwd()"],
]


def test_equal_answers_are_equal_and_all_others_differ():
    """fails if: canonical compares floats, REWRITES loses a row, or RATIO lets `11/2` be read as 1 1/2"""
    values = [(group, text, ev.canonical(text)) for group, texts in enumerate(EQUAL) for text in texts]
    for (group, text, value), (other, text2, value2) in itertools.combinations(values, 2):
        assert (value == value2) == (group == other), (text, text2)
        assert (hash(value) == hash(value2)) or group != other, (text, text2)


GRADE = [       # text, answer, verifier -> verdict
    ("so \\boxed{1,234}", "1234", "auto", True),
    ("so \\boxed{5 cm}", "5", "auto", False),
    ("so \\boxed{x=5}", "5", "auto", False),
    ("\\boxed{50\\%}", "0.5", "auto", True),
    ("\\boxed{50\\%}", "50", "auto", False),
    ("it is 50%", "50", "number", True),
    ("it is 50", "50%", "number", True),
    ("\\boxed{4} or 5", "5", "number", True),
    ("\\boxed{4} or 5", "4", "auto", True),
    ("16", "#### 16", "auto", True),
    ("16", "so \\boxed{16.0}", "number", True),
    ("It costs $1,200.50.", "$1,200.50", "number", True),
    ("I think 7", "seven", "number", False),
    ("3+8=1;1*2=2#2", "2", "auto", True),
    ("3+8=1;1*2=2#3", "2", "auto", False),
    ("3+8=1;1*2=2#2", "2", "hash", False),
    ("#### 18 dollars", "18", "hash", False),
    ("#### 18", "18", "boxed", False),
    ("Paris", "Paris", "auto", True),
    ("Paris", "paris", "auto", False),
    (" a\tb ", "a\tb", "exact", True),
    ("2.0", "2", "exact", False),
    ("\\boxed{2}", "2", "exact", False),
    ("", "", "auto", False),
    ("", "", "exact", False),
    ("\\boxed{$}", "$", "auto", False),
    ("#$", "", "auto", False),
]


@pytest.mark.parametrize("text, answer, verifier, verdict", GRADE)
def test_grade(text, answer, verifier, verdict):
    """fails if: an empty answer equals an empty answer (`!= ""` dropped), or `number` keeps the % sign"""
    assert ev.grade(text, answer, verifier) is verdict


def test_grading_time_is_linear_in_the_text():
    """fails if: PART is unbounded ([0-9]+), or `[^{}]*` becomes `.*?` in the \\frac row"""
    n, start = 50_000, time.perf_counter()
    texts = ["9" * n, "1,111" * n, "1/" * n, "1e" * n, "-" * n, "1 " * n, "#" * n, "#1" * n, "\\" * n,
             "^ " * n, "\\boxed{" * n, "\\boxed{" + "{" * n, "\\boxed" + " " * n, "1" + " " * n + "1",
             "\\frac11" * n]
    boxed = ["9" * n, "9" * n + "%", "0" * n + "5", "1e" + "9" * n, "." * n, "1" * n + "/" + "7" * n,
             "{" * n + "}" * n, "1" * n + " 1/2", "\\frac{" * n + "}" * n, "\\text{" * n + "}" * n,
             "1e999999999999999999", "1e-999999999999999999"]
    for text in texts + [f"\\boxed{{{inner}}}" for inner in boxed]:
        ev.grade(text, "1/3")
        ev.grade(text, text)
    assert time.perf_counter() - start < 8          # about 2 s; one quadratic case takes minutes


def test_unknown_verifier_is_refused():
    """fails if: the check of VERIFIERS in grade is removed"""
    with pytest.raises(UserError, match="unknown verifier 'mathverify': choose from auto, boxed"):
        ev.grade("1", "1", "mathverify")


def test_math_verify_is_asked_only_on_request(monkeypatch):
    """fails if: its ImportError passes through, or verify gets the response as the gold answer"""
    monkeypatch.setitem(sys.modules, "math_verify", None)       # None makes the import fail
    assert ev.grade("\\boxed{1}", "1")
    with pytest.raises(UserError, match="pip install math-verify"):
        ev.grade("\\boxed{1}", "1", "math-verify")
    fake = ModuleType("math_verify")
    asked = []
    fake.parse = lambda text: ["parsed", text]
    fake.verify = lambda gold, found: asked.append((gold, found)) or 1
    monkeypatch.setitem(sys.modules, "math_verify", fake)
    assert ev.grade("a response", "so #### 3", "math-verify") is True
    assert asked == [(["parsed", "\\boxed{3}"], ["parsed", "a response"])]


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
    """fails if: answers are required whatever the verifier"""
    problems = [ev.Problem("q", None, None, {}, 1)]
    metrics, samples = ev.evaluate(MODEL, TOKENIZER, problems, **settings(verifier=None))
    assert set(metrics) == {"truncation_rate", "mean_length", "problems", "samples", "tokens"}
    assert {(s["answer"], s["correct"]) for s in samples} == {(None, None)}


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
    (dict(problems=[ev.Problem("p", None, None, {}, 7)]), "the problem on line 7 has no answer to grade"),
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
    out = write(tmp_path / "samples.jsonl", "an older run")
    assert ev.main(["--model", "M", "--data", str(data), "--k", "2", "--temperature", "0.9", "--seed", "4",
                    "--max_new_tokens", "5", "--slots", "3", "--limit", "2", "--device", "cpu",
                    "--out", str(out), "--template_var", "b=false"]) == 0
    printed = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert printed["avg@2"] == 0.5 and printed["model"] == "M" and printed["temperature"] == 0.9
    assert [row["correct"] for row in rows] == [True, False, False, True]
    assert bytes(rows[0]["prompt_tokens"]) == b"p{'b': False}"
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
                            (["--data", str(tmp_path / "no.jsonl")], "no such file"),
                            (["--temperature", "0"], "temperature 0 gives the same response 8 times"),
                            (["--limit", "0"], "limit must be at least 1"),
                            (["--template_var", "thinking"], "expected NAME=VALUE"),
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
    assert len(flags) == 15 and all(flag.help for flag in flags)
