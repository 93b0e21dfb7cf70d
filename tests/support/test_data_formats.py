"""Files of problems as people have them: every layout is read as it is, and what cannot be read is one sentence."""
import json
import os
import shlex
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from support import records  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.problems import answered, load_problems  # noqa: E402
from support.verifier import grade  # noqa: E402

USER, SYSTEM = {"role": "user", "content": "2+2?"}, {"role": "system", "content": "be brief"}
REPLY = {"role": "assistant", "content": "so \\boxed{4}"}
PARTS = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]

LAYOUTS = [     # record -> prompt, answer, solution
    # verl, as DAPO, verl's own GSM8K and Skywork write it
    ({"data_source": "math_dapo", "prompt": [USER], "ability": "MATH", "extra_info": {"index": "9"},
      "reward_model": {"ground_truth": "34", "style": "rule"}}, [USER], "34", None),
    ({"prompt": [USER], "reward_model": {"ground_truth": "72", "style": "rule"},
      "extra_info": {"answer": "48/2=24\n#### 72", "question": "2+2?"}}, [USER], "72", "48/2=24\n#### 72"),
    ({"prompt": [USER], "reward_model": {"ground_truth": "72"}, "extra_info": {"answer": "72"}}, [USER], "72", None),
    ({"prompt": [USER], "reward_model": {"ground_truth": "[\"34\"]"}}, [USER], "34", None),
    ({"prompt": [USER], "reward_model": {"ground_truth": "[\"34\", \"x\"]"}}, [USER], ("34", "x"), None),
    ({"prompt": [USER], "reward_model": {"ground_truth": "[1, 2]"}}, [USER], "[1, 2]", None),
    ({"prompt": [USER], "reward_model": {"ground_truth": "[1, 2)"}}, [USER], "[1, 2)", None),
    ({"prompt": "2+2?", "reward_model": {"ground_truth": 4}, "answer": "5"}, "2+2?", "4", None),
    ({"prompt": "2+2?", "reward_model": "a name", "answer": "5"}, "2+2?", "5", None),
    # TRL
    ({"prompt": "2+2?", "completion": " so \\boxed{4}"}, "2+2?", "4", "so \\boxed{4}"),
    ({"prompt": [USER], "completion": [REPLY]}, [USER], "4", REPLY["content"]),
    ({"prompt": "2+2?", "completion": "it is 4"}, "2+2?", None, "it is 4"),
    ({"prompt": "2+2?", "completion": "it is 5", "answer": "4"}, "2+2?", "4", "it is 5"),
    # plain
    ({"query": "2+2?", "response": "it is\n#### 4"}, "2+2?", "4", "it is\n#### 4"),
    ({"ID": 3, "Problem": "2+2?", "Solution": "add", "Answer": 4}, "2+2?", "4", "add"),
    ({"QUESTION": "2+2?", "Answer": "4"}, "2+2?", "4", None),
    ({"Question": "no", "question": "2+2?", "ANSWER": None, "Answer": "4"}, "2+2?", "4", None),
    ({"Question": "2+2?", "QUESTION": "no", "answer": "4"}, "2+2?", "4", None),
    ({"problem": "2+2?", "answer": ["4", "four", 4, ""]}, "2+2?", ("4", "four"), None),
    ({"problem": "2+2?", "answer": ["4"]}, "2+2?", "4", None),
    ({"problem": "2+2?", "answer": "[\"4\"]"}, "2+2?", "[\"4\"]", None),
    ({"question": "2+2?", "final_answer": ["4"], "solution": ["add them"]}, "2+2?", "4", "add them"),
    ({"messages": [{"role": "user", "content": PARTS}, REPLY]}, [USER], "4", REPLY["content"]),
    ({"messages": [{**USER, "name": "Ana"}]}, [{**USER, "name": "Ana"}], None, None),
    ({"problem": "2+2?", "solution": "#### Step 1\nadd\nIt is 4."}, "2+2?", None, "#### Step 1\nadd\nIt is 4."),
    # ShareGPT and OpenThoughts
    ({"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": REPLY["content"]}]}, [USER], "4",
     REPLY["content"]),
    ({"system": "be brief", "conversations": [{"from": "user", "value": "2+2?"}, {"from": "assistant", "value": "4"}]},
     [SYSTEM, USER], None, "4"),
    ({"conversations": [{"from": "system", "value": "be brief"}, {"from": "Human", "value": "2+2?", "weight": 0}]},
     [SYSTEM, {**USER, "weight": 0}], None, None),
    ({"conversations": [USER, REPLY], "answer": 5}, [USER], "5", REPLY["content"]),
    # Alpaca
    ({"instruction": "Add.", "input": "2+2?", "output": "so \\boxed{4}"}, "Add.\n\n2+2?", "4", "so \\boxed{4}"),
    ({"instruction": "2+2?", "input": "", "output": "it is 4"}, "2+2?", None, "it is 4"),
    ({"instruction": "2+2?", "system": "be brief", "answer": 4}, [SYSTEM, USER], "4", None),
    # a record that fits two formats is read by the first
    ({"prompt": "2+2?", "completion": "\\boxed{5}", "reward_model": {"ground_truth": "4"}}, "2+2?", "4", None),
    ({"prompt": "2+2?", "instruction": "no", "conversations": []}, "2+2?", None, None),
    ({"conversations": [USER], "instruction": "no"}, [USER], None, None),
]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("record, prompt, answer, solution", LAYOUTS)
def test_every_layout_is_read_as_it_is(tmp_path, record, prompt, answer, solution):
    """fails if: FORMATS is reordered, list answers are cut to the first, or a text list outside verl is opened."""
    found, = load_problems(write(tmp_path / "p.jsonl", json.dumps(record)))
    assert (found.prompt, found.answer, found.solution, found.fields) == (prompt, answer, solution, record)


def test_any_of_several_answers_is_right():
    """fails if: grade takes the first answer alone, or all of them."""
    assert [grade(f"\\boxed{{{text}}}", ("4", "four")) for text in ("4.0", "four", "5")] == [True, True, False]
    assert grade("four", ("4", "four"), "exact") and not grade("4.0", ("4", "four"), "exact")


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("name", ["p.json", "p.jsonl", "p"])
def test_an_array_is_read_like_lines(tmp_path, name, indent, monkeypatch):
    """fails if: the name decides, an item that is cut by a block is broken, or lines are not counted."""
    wanted = [{"prompt": "[é,]}" + "x" * 70_000, "answer": "\\\"}"}, {"prompt": "b", "meta": {"deep": [1, {"a": []}]}}]
    text = "\ufeff \n" + json.dumps(wanted, indent=indent, ensure_ascii=False) + "\n\n"
    found = load_problems(write(tmp_path / name, text))
    assert [p.fields for p in found] == wanted
    assert [p.place for p in found] == (["line 2"] * 2 if indent is None else ["line 3", "line 7"])
    assert len(load_problems(tmp_path / name, limit=1)) == 1
    small = [{"prompt": "\u00e9\U0001f600", "answer": "x\\y\"", "more": [True, None, -1.5e3, {"n": 12}]}] * 2
    for size in range(1, len(json.dumps(small))):       # every place at which a block can end
        monkeypatch.setattr(records.Stream, "more", lambda self, _, more=records.Stream.more: more(self, size))
        assert [p.fields for p in load_problems(write(tmp_path / name, json.dumps(small)))] == small
        monkeypatch.undo()


BAD = [         # a file -> what the sentence says
    ('[{"prompt": "a"}', "line 1: not valid JSON (expected , or ] after an object, found '')"),
    ('[{"prompt": "a"}\n {"prompt": "b"}]', "line 2: not valid JSON (expected , or ] after an object, found '{"),
    ('[{"prompt": "a"},\n]', "line 2: not valid JSON (expected a JSON object, found ']')"),
    ('[\n["prompt"]]', "line 2: not valid JSON (expected a JSON object, found '["),
    ('[{"prompt": "a"}]\n[]', "line 2: not valid JSON (text after the array)"),
    ('[{"prompt":\n "a" "b"}]' + " " * 10**6, "line 2: not valid JSON (Expecting ',' delimiter)"),
    ('[{"prompt": "a', "line 1: not valid JSON (Unterminated string"),
    ("[]", "no problems in this file"),
    ('[{"prompt": ' + "[" * 200_000, "line 1: not valid JSON (maximum recursion"),
    (b'[{"prompt": "\xff"}]', "line 1 or later: not valid JSON ('utf-8' codec"),
    ('{"prompt": "a"}\n{"prompt": "b", "answer": NaN}', "line 2: not valid JSON (NaN is no number of JSON)"),
    ('[{"prompt": "b",\n "score": -Infinity}]', "not valid JSON (-Infinity is no number of JSON)"),
    ('{"prompt": "b", "score": 1e999}', "line 1: not valid JSON (1e999 is no number of JSON)"),
    ('{"prompt": "\\ud800"}', "line 1: a text holds half a character"),
    ('{"prompt": "a", "solution": "\\udfff"}', "line 1: a text holds half a character"),
    ('{"prompt": "a", "answer": ["1", "\\ud800"]}', "line 1: a text holds half a character"),
    ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "line 1: a text holds half a character"),
    (b"\x1f\x8b\x08", "is compressed; unpack it first"),
    ('{"conversations": [{"from": "observation", "value": "x"}]}', "a turn of `conversations` is from 'observation'"),
    ('{"conversations": [{"from": "human"}]}', "a message of `conversations` needs `role` and `content`"),
    ('{"conversations": "x"}', None),
    ('{"conversations": {"a": 1}}', "`conversations` must be text or a list of messages, not dict"),
    ('{"messages": [{"role": "user", "content": [{"type": "image_url", "url": "x"}]}]}',
     "a message of `messages` has a part that is not text (image_url)"),
    ('{"prompt": "a", "completion": ["x"]}', "a message of `completion` needs `role` and `content`"),
    ('{"instruction": ["a"]}', "`instruction` and `input` must be text"),
    ('{"instruction": " ", "input": ""}', "`instruction` is empty"),
    ("prompt,answer\na,1\n", "line 1: not valid JSON (Expecting value)"),
]


@pytest.mark.parametrize("text, sentence", BAD, ids=lambda part: repr(part[:40]) if part else "")
def test_what_cannot_be_read_is_one_sentence(tmp_path, text, sentence):
    """fails if: an error passes through, or names no line."""
    path = write(tmp_path / "p.jsonl", text)
    if sentence is None:
        assert load_problems(path)[0].prompt == "x"
        return
    with pytest.raises(UserError) as error:
        load_problems(path)
    said = str(error.value)
    assert sentence in said and said.startswith(str(path)) and "\n" not in said and len(said) < 500


def test_a_lone_surrogate_in_a_field_that_nobody_reads_is_no_error(tmp_path):
    """fails if: whole records are refused for a column of rubbish."""
    assert load_problems(write(tmp_path / "p.jsonl", '{"prompt": "a", "url": "\\ud800", "url": 1}'))


@pytest.mark.parametrize("head, sentence", [
    ('{"prompt": "', "line 1 is longer than 1 MiB"), ('[{"prompt": "', "line 1: .*an object of more than 1 MiB"),
    ("[", "line 1: .*expected a JSON object"), (" ", "line 1 is longer than 1 MiB")])
def test_endless_records_are_refused_before_they_fill_the_memory(tmp_path, head, sentence, monkeypatch):
    """fails if: a whole line or a whole array is read first: the file is sparse and far larger than the memory."""
    monkeypatch.setattr(records, "LONGEST", 2**20)
    path = write(tmp_path / "p.jsonl", head)
    os.truncate(path, 2**36)
    start = time.perf_counter()
    with pytest.raises(UserError, match="line 1"):
        load_problems(path)
    assert time.perf_counter() - start < 5
    path = write(tmp_path / "p.jsonl", head + "x" * 2**21)
    with pytest.raises(UserError, match=sentence):
        load_problems(path)


def test_no_more_of_an_endless_object_is_read_than_the_limit(tmp_path, monkeypatch):
    """fails if: reading goes on to the end of the file, which may be larger than the memory."""
    monkeypatch.setattr(records, "LONGEST", 2**16)
    sizes, more = [], records.Stream.more
    monkeypatch.setattr(records.Stream, "more", lambda self, size: sizes.append(size) or more(self, size))
    with pytest.raises(UserError, match="an object of more than 0 MiB"):
        load_problems(write(tmp_path / "p.json", '[{"prompt": "' + "x" * 2**22))
    assert sum(sizes) <= 2**18


def test_a_file_of_blank_lines_is_refused_early(tmp_path, monkeypatch):
    """fails if: a gigabyte of line ends is walked through for an hour."""
    monkeypatch.setattr(records, "MOST_BLANK", 10)
    text = "\n" * 9 + '{"prompt": "a"}'
    assert load_problems(write(tmp_path / "p", text))[0].place == "line 10"
    with pytest.raises(UserError, match="line 11 is blank, like 9 others"):
        load_problems(write(tmp_path / "p", text + "\n\n"))


def test_only_files_are_opened(tmp_path):
    """fails if: a pipe is opened (which waits for ever), or a folder ends in a traceback."""
    os.mkfifo(tmp_path / "pipe")
    for path, sentence in ((tmp_path, "is a folder, a pipe or a device"), (tmp_path / "pipe", "is a folder, a pipe"),
                           ("/dev/zero", "is a folder, a pipe or a device"), (tmp_path / "no", "no such file"),
                           ("a" * 5000, "no such file"), ("a\0b", "no such file"), ("", "no such file")):
        with pytest.raises(UserError, match=sentence):
            load_problems(path)
    if os.getuid():
        os.chmod(write(tmp_path / "mine", "{}"), 0)
        with pytest.raises(UserError, match="cannot be read .Permission denied"):
            load_problems(tmp_path / "mine")


def test_all_problems_have_an_answer_or_none(tmp_path):
    """fails if: some answers are taken for all or for none."""
    path = write(tmp_path / "p.jsonl", '{"prompt": "a"}\n{"prompt": "b", "answer": "1"}\n{"prompt": "c"}')
    both = load_problems(path)
    assert (answered(path, both[1:2]), answered(path, both[::2])) == (True, False)
    with pytest.raises(UserError, match="line 2 has an answer and line 1 has none; give all problems an answer"):
        answered(path, both)


def test_parquet_without_pyarrow_names_the_line_that_converts(tmp_path, monkeypatch):
    """fails if: the bytes are taken for text, or the command is not one that a shell can run."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = write(tmp_path / "it's.parquet", b"PAR1 and so on")
    with pytest.raises(UserError, match="pip install pyarrow") as error:
        load_problems(path)
    python, flag, code = shlex.split(str(error.value).partition("pandas is: ")[2])
    assert (python, flag) == ("python", "-c") and compile(code, "line", "exec")
    assert repr(str(path)) in code and repr(str(tmp_path / "it's.jsonl")) in code


def test_parquet_rows_are_records(tmp_path, monkeypatch):
    """fails if: rows are counted per batch or called lines, or pyarrow's own errors come out."""
    class Broken(Exception):
        pass
    rows = [[{"prompt": [USER], "reward_model": {"ground_truth": "1"}, "note": None}], [{"prompt": "b", "answer": 2.0}]]

    class File:
        def __init__(self, path):
            assert Path(path) == tmp_path / "p"

        def iter_batches(self, batch_size):
            for batch in rows:
                if batch is None:
                    raise Broken("a page\nis torn")
                kind = ModuleType("batch")
                kind.to_pylist = lambda batch=batch: batch
                yield kind
    arrow, arrow.parquet = ModuleType("pyarrow"), ModuleType("pyarrow.parquet")
    arrow.ArrowException, arrow.parquet.ParquetFile = Broken, File
    monkeypatch.setitem(sys.modules, "pyarrow", arrow)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", arrow.parquet)
    path = write(tmp_path / "p", b"PAR1")
    found = load_problems(path)
    assert [(p.prompt, p.answer, p.place) for p in found] == [([USER], "1", "row 1"), ("b", "2.0", "row 2")]
    rows[1:] = [[{"prompt": "b"}]]
    with pytest.raises(UserError, match="p: row 1 has an answer and row 2 has none"):
        answered(path, load_problems(path))
    rows[1:] = [[{"prompt": "b", "answer": float("nan")}]]
    with pytest.raises(UserError, match="p, row 2: an answer is nan"):
        load_problems(path)
    rows[1:] = [None]
    with pytest.raises(UserError, match=r"p: not a whole parquet file \(after row 1: a page is torn\)"):
        load_problems(path)


def test_parquet_by_pyarrow_itself(tmp_path):
    """fails if: the calls are not those of the package."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet
    rows = [{"prompt": [USER], "reward_model": {"ground_truth": str(i), "style": "rule"}} for i in range(600)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    found = load_problems(tmp_path / "p.parquet", need_answer=True)
    assert [(p.answer, p.place, p.prompt) for p in found] == [(str(i), f"row {i + 1}", [USER]) for i in range(600)]
    data = (tmp_path / "p.parquet").read_bytes()
    with pytest.raises(UserError, match="parquet|cannot be read"):
        load_problems(write(tmp_path / "cut", data[:len(data) // 2]))
