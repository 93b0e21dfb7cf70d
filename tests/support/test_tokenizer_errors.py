"""support/tokenizer.py: one sentence for every broken checkpoint, and nothing executed."""
import re

import pytest
from tokenizer_folders import CHATS, a, changed, sentence, u, write

from support.errors import read_json
from support.tokenizer import Tokenizer


def test_a_missing_folder_or_tokenizer_json_is_named(tmp_path):
    """fails if: tokenizers' own error comes through, or the sentence does not tell folder from file."""
    assert re.match(r"\S+nowhere does not exist; give a", sentence(Tokenizer, tmp_path / "nowhere"))
    assert re.match(r"\S+tokenizer\.json does not exist; give a", sentence(Tokenizer, tmp_path))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_json_is_named(tmp_path, content):
    """fails if: the bare Exception of the tokenizers library is not caught."""
    (write(tmp_path) / "tokenizer.json").write_bytes(content)
    assert re.search(r"tokenizer\.json is broken \(.+\); download it again", sentence(Tokenizer, tmp_path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json", "config.json",
                                  "special_tokens_map.json"])
def test_broken_json_is_named_with_its_line(tmp_path, name):
    """fails if: json's own error comes through, or the file or line is not in the sentence."""
    (write(tmp_path) / name).write_text('{"a": 1,\n "b" 2}', encoding="utf-8")
    assert re.search(rf"{name} is not JSON \(.*line 2 .*\); download or write", sentence(Tokenizer, tmp_path))


def test_read_json_wants_an_object_in_a_readable_file(tmp_path):
    """fails if: a list passes, a missing file counts as empty, or bytes that are no UTF-8 raise."""
    path = tmp_path / "x.json"
    assert "x.json cannot be read (No such file" in sentence(read_json, path)
    for content, words in ((b"[1]", "holds a JSON list, not an object"), (b"\xff", "is not JSON"),
                           (b"[" * 100_000, "is not JSON")):
        path.write_bytes(content)
        assert re.search(rf"x\.json {words}", sentence(read_json, path))
    path.write_text('{"é": [1]}', encoding="utf-8")
    assert read_json(path) == {"é": [1]} and read_json(tmp_path / "none.json", optional=True) == {}


def test_a_broken_token_declaration_is_named(tmp_path):
    """fails if: a malformed added_tokens_decoder raises, or a special token that is no text passes."""
    folder = changed(write(tmp_path), added_tokens_decoder={"5": "<x>"})
    assert "tokenizer_config.json is broken" in sentence(Tokenizer, folder)
    folder = changed(write(tmp_path), bos_token=["<s>"])
    assert "bos_token must be a text, not ['<s>']" in sentence(Tokenizer, folder)


@pytest.mark.parametrize("template, words", [
    ("ok\n{% if %}", "line 2: "), ("{{ 'open }}", "line 1: "), ("{% endfor %}", "line 1: "),
    ("{{ 1 | nofilter }}", "line 1: No filter named"), ("{% break %}", "'break' outside loop")])
def test_a_template_that_is_no_template_is_named_with_its_line(tmp_path, template, words):
    """fails if: the template is compiled at the first prompt only, or jinja2's own error comes through."""
    folder = write(tmp_path, template=template)
    assert re.search(rf"chat_template\.jinja.*{words}.*correct it or give", sentence(Tokenizer, folder))
    folder = changed(write(tmp_path, template=None, chat_template__jinja=None), chat_template=template)
    (folder / "chat_template.jinja").unlink()
    assert re.search(r"^chat_template in \S+tokenizer_config\.json.*: ", sentence(Tokenizer, folder))


def test_a_chat_template_argument_that_is_no_file_is_refused(checkpoints, tmp_path):
    """fails if: an unknown word counts as "auto", or a missing file means the checkpoint's template."""
    folder = checkpoints["qwen25"]
    assert "'chatml' must be 'auto', 'plain' or the path of" in sentence(Tokenizer, folder, "chatml")
    assert "'auto', 'plain' or" in sentence(Tokenizer, folder, str(folder / "config.json"))
    missing = sentence(Tokenizer, folder, str(tmp_path / "none.jinja"))
    assert "none.jinja cannot be read" in missing and "give another chat template" in missing
    (tmp_path / "bytes.jinja").write_bytes(b"\xff")
    assert "bytes.jinja cannot be read" in sentence(Tokenizer, folder, tmp_path / "bytes.jinja")


@pytest.mark.parametrize("found", [7, {"default": 7}, [{"name": "rag", "template": "r"}], ["x"],
                                   [{"name": "default", "template": 1}]])
def test_a_chat_template_entry_of_the_wrong_kind_is_refused(tmp_path, found):
    """fails if: a list without a default counts as no template: it would train on plain text, silently."""
    folder = changed(write(tmp_path, template=None), chat_template=found)
    assert "tokenizer_config.json is neither a text nor a list with" in sentence(Tokenizer, folder)


def test_the_words_of_raise_exception_are_passed_on(checkpoints):
    """fails if: the template's own message or the template's file is missing from the sentence."""
    said = sentence(Tokenizer(checkpoints["mistral"]).render, [a("first")])
    assert re.match(r"\S+chat_template\.jinja refuses this prompt: roles must go user, .* after an opt", said)


@pytest.mark.parametrize("template", [
    "{{ ''.__class__.__mro__ }}", "{{ messages.__class__.__base__.__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}", "{{ (messages | attr('__class__')).__mro__ }}",
    "{{ raise_exception.__globals__.json }}", "{{ strftime_now.__globals__['shutil'] }}",
    "{{ '{0.__class__.__mro__}'.format(1) }}", "{% set ns = namespace() %}{% set ns.__call__ = 1 %}",
    "{{ namespace(__call__=1) }}", "{{ namespace({'__call__': 1}) }}", "{{ messages.append(1) }}",
    "{{ messages[0].update(role='x') }}"])
def test_a_template_that_leaves_its_sandbox_is_stopped(tmp_path, template):
    """fails if: jinja2's plain Environment, its mutable sandbox or its own namespace is used."""
    said = sentence(Tokenizer(write(tmp_path, template=template)).render, [u("x")])
    assert re.search(r"chat_template\.jinja (reaches for Python internals|fails on this prompt)", said)
    assert "SecurityError" in said


@pytest.mark.parametrize("template", ["{% include '/etc/hostname' %}", "{% import 'os' as os %}"])
def test_a_template_cannot_read_files(tmp_path, template):
    """fails if: the environment gets a loader."""
    assert "fails on this prompt" in sentence(Tokenizer(write(tmp_path, template=template)).render, [u("x")])


@pytest.mark.parametrize("template", [
    "{{ nothing.at.all }}", "{{ 1 + 'a' }}", "{{ 1 // 0 }}", "{{ range(10 ** 9) }}",
    "{{ raise_exception | tojson }}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"])
def test_a_template_that_fails_is_one_sentence(tmp_path, template):
    """fails if: only jinja2's errors are caught (not TypeError, OverflowError, RecursionError ...)."""
    said = sentence(Tokenizer(write(tmp_path, template=template)).render, [u("x")])
    assert re.search(r"chat_template\.jinja fails on this prompt \(\w+: .*give another chat template", said)


@pytest.mark.parametrize("messages, words", [
    ([], "non-empty list"), ("hi", "non-empty list"), (None, "non-empty list"), (u("x"), "non-empty list"),
    (["hi"], "message 1"), ([u("x"), {"content": "y"}], "message 2"), ([u(None)], "message 1"),
    ([u("x"), {"role": "user"}], "message 2"), ([{"role": 1, "content": "x"}], "message 1"),
    ([u(3)], "message 1"),
    ([[u("x")]], "message 1"), ([u(b"x")], "plain JSON data"), ([u("\ud800")], "plain JSON data"),
    ([u("x") | {"t": {1}}], "plain JSON data")])
def test_misshapen_messages_are_described(checkpoints, messages, words):
    """fails if: a message without role or content reaches the template, or a batch of chats counts as one."""
    assert words in sentence(Tokenizer(checkpoints["qwen25"]).render, messages)


def test_variables_that_are_no_plain_data_are_refused(checkpoints):
    """fails if: live Python objects reach the template."""
    said = sentence(Tokenizer(checkpoints["qwen25"]).render, [u("x")], tools=[open])
    assert said.startswith("variables must be plain JSON data")


def test_a_chat_without_a_template_is_refused(tmp_path):
    """fails if: the contents of several messages are joined in a format that nobody chose."""
    tokenizer = Tokenizer(write(tmp_path, template=None))
    for chat in (CHATS[1], [u([{"type": "text", "text": "x"}])]):
        assert re.search(r"without a chat template.*give another", sentence(tokenizer.prompt_ids, chat))


def test_a_missing_stop_token_says_what_to_add(tmp_path):
    """fails if: stop_ids may be empty, or an eos token outside the vocabulary is passed over."""
    folder = changed(write(tmp_path), eos_token=None)
    assert "add eos_token_id (a number or a list) to generation_config.json" in sentence(Tokenizer, folder)
    folder = changed(folder, eos_token="<|stop|>")
    assert re.search(r"tokenizer_config\.json: eos_token '<\|stop\|>' is not in the vocabulary; correct it",
                     sentence(Tokenizer, folder))


@pytest.mark.parametrize("eos", [100_000, -1, "2", True, 2.0, [1, None]])
def test_a_stop_id_that_is_no_token_is_refused(tmp_path, eos):
    """fails if: an id that can never be sampled counts as a stop id."""
    folder = write(tmp_path, generation_config__json={"eos_token_id": eos})
    assert re.search(r"generation_config\.json: eos_token_id .* is no token of .*correct it",
                     sentence(Tokenizer, folder))
