"""Problems: read as written, right answers found; a bad file is one sentence."""
import json
from pathlib import Path

import pytest

from support.errors import UserError
from support.problems import load_problems
from support.verifier import grade

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


def test_gsm8k_answer_is_what_follows_the_marker_and_the_text_is_the_solution(tmp_path):
    """fails if: load_problems keeps the whole answer text as the answer (`_marked(answer) or` dropped)"""
    problems = load_problems(write(tmp_path / "g.jsonl", *GSM8K), need_answer=True)
    assert [p.answer for p in problems] == ["10", "16,200", "-3"]
    assert [p.solution for p in problems] == [r["answer"] for r in GSM8K]
    assert [p.prompt for p in problems] == [r["question"] for r in GSM8K]
    for verifier in ("auto", "hash", "number"):
        assert all(grade(p.solution, p.answer, verifier) for p in problems)
        assert not any(grade(p.solution, q.answer, verifier) for p, q in zip(problems, problems[1:]))

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
    found, = load_problems(write(tmp_path / "p.jsonl", record))
    assert (found.prompt, found.answer, found.solution, found.fields) == (prompt, answer, solution, record)


def test_last_assistant_turn_is_the_solution_and_not_the_prompt(tmp_path):
    """fails if: prompt[:-1] becomes prompt"""
    system, user = {"role": "system", "content": "s"}, {"role": "user", "content": "u"}
    reply = {"role": "assistant", "content": "so \\boxed{4}"}
    path = write(tmp_path / "p.jsonl", {"messages": [system, user, reply]}, {"prompt": [user, reply, user]})
    first, second = load_problems(path)
    assert (first.prompt, first.solution, first.answer) == ([system, user], "so \\boxed{4}", "4")
    assert (second.prompt, second.solution, second.answer) == ([user, reply, user], None, None)


def test_lines_are_counted_as_in_an_editor(tmp_path):
    """fails if: the file is cut by str.splitlines() (U+2028 ends a line), or "utf-8-sig" becomes "utf-8" """
    path = tmp_path / "p.jsonl"
    path.write_bytes("\ufeff{\"prompt\": \"a\u2028b\"}\r\n\n   \n{\"prompt\": \"é\"}".encode())
    assert [(p.prompt, p.place) for p in load_problems(path)] == [("a\u2028b", "line 1"), ("é", "line 4")]
    assert len(load_problems(path, limit=1)) == 1 and len(load_problems(path, limit=9)) == 2

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
        load_problems(path, need_answer=True)
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
            load_problems(path)
    with pytest.raises(UserError, match="limit must be at least 1"):
        load_problems(write(tmp_path / "p.jsonl", {"prompt": "a"}), limit=0)
