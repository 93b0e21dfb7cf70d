"""tokenizer.py on files of strangers: nothing outside the folder is read or copied, and what breaks the tokenizers
library, its Rust code included, is one sentence."""
import json
import os
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from support import tokenizer as tokenizer_file  # noqa: E402
from support.template import SOURCE  # noqa: E402
from tokenizer_folders import changed, sentence, u, write  # noqa: E402
from support.tokenizer import TEXT_FILES, Tokenizer  # noqa: E402


def edited(folder, edit):
    """Applies `edit` to the content of a written tokenizer.json."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    edit(content)
    path.write_text(json.dumps(content), encoding="utf-8")
    return folder


def adds(token_id):
    """A post_processor that puts this id in front of every text."""
    return {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "q", "type_id": 0}},
                                                     {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [], "special_tokens": {"q": {"id": "q", "ids": [token_id], "tokens": ["q"]}}}


def sequence(kind, name, steps):
    return {"type": "Sequence", name: steps * kind} if kind > 1 else steps[0]


# ------------------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("name", [*TEXT_FILES, "config.json"])
def test_a_link_out_of_the_folder_is_refused(tmp_path, name):
    """fails if: a file of the list is opened or copied without checkpoint_file: a private file would be read, and
    published with the next checkpoint."""
    folder, private = write(tmp_path / "from"), tmp_path / "private"
    private.write_text("{}")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(private)
    assert re.search(rf"{name} is a link to \S+private, outside the checkpoint's folder", sentence(Tokenizer, folder))


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "dangling"])
def test_save_copies_no_link_that_was_made_later(tmp_path, kind):
    """fails if: save trusts the look that was taken at the start, or opens a pipe."""
    tokenizer = Tokenizer(write(tmp_path / "from"))
    (tmp_path / "private").write_text("secret")
    path = tmp_path / "from" / "vocab.txt"
    {"link": lambda: path.symlink_to(tmp_path / "private"), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir,
     "dangling": lambda: path.symlink_to("nowhere")}[kind]()
    assert "vocab.txt is a" in sentence(tokenizer.save, tmp_path / "to")
    assert not (tmp_path / "to" / "vocab.txt").exists()
    assert "vocab.txt is a" in sentence(Tokenizer, tmp_path / "from")


def test_the_links_of_the_hub_cache_are_followed_and_saved_as_files(tmp_path):
    """fails if: the cache's own layout is refused, or save copies links."""
    folder, cache = write(tmp_path / "from"), tmp_path / "models--x"
    snapshot = cache / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(folder.iterdir())):
        (cache / "blobs" / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    tokenizer = Tokenizer(snapshot)
    assert tokenizer.prompt_ids("hi") == Tokenizer(folder).prompt_ids("hi")
    tokenizer.save(tmp_path / "to")
    saved = {path.name: path.read_bytes() for path in (tmp_path / "to").iterdir() if not path.is_symlink()}
    assert saved == {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.json"}


def test_a_template_that_the_user_names_may_lie_anywhere_and_must_be_a_small_file(tmp_path):
    """fails if: a pipe is opened (it would wait for ever), or the size is not looked at."""
    folder = write(tmp_path / "from")
    (tmp_path / "real.jinja").write_text("<{{ messages[0].content }}>\r\n", newline="")
    (tmp_path / "link.jinja").symlink_to(tmp_path / "real.jinja")
    tokenizer = Tokenizer(folder, tmp_path / "link.jinja")
    assert tokenizer.render([u("x")]) == "<x>"
    (tmp_path / "real.jinja").unlink()
    tokenizer.save(tmp_path / "to")     # as it was when the run began, byte for byte
    assert (tmp_path / "to" / "chat_template.jinja").read_bytes() == b"<{{ messages[0].content }}>\r\n"
    os.mkfifo(tmp_path / "pipe.jinja")
    (tmp_path / "folder.jinja").mkdir()
    (tmp_path / "large.jinja").write_text("x" * (SOURCE + 1))
    for name in ("pipe", "folder", "large"):
        assert f"{name}.jinja is no file of at most" in sentence(Tokenizer, folder, tmp_path / f"{name}.jinja")
    (tmp_path / "large.jinja").write_text("x" * SOURCE)
    assert Tokenizer(folder, tmp_path / "large.jinja").render([u("x")]) == "x" * SOURCE
    changed(folder, chat_template="x" * (SOURCE + 1))
    (folder / "chat_template.jinja").unlink()
    assert "tokenizer_config.json has more than" in sentence(Tokenizer, folder)


# ----------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("token_id, words", [
    (2**31, "has the id 2147483648, and tables of"), (4 * 10**6, "has the id 4000000"), (10**12, "is broken"),
    (2**32 - 1, "has the id"), (-1, "is broken"), (1.5, "is broken"), (None, "is broken"), ("3", "is broken")])
def test_an_id_that_is_no_sane_number_is_refused(tmp_path, token_id, words):
    """fails if: vocab_size may be anything: every table as long as the vocabulary would be made."""
    folder = edited(write(tmp_path), lambda content: content["model"]["vocab"].update(zzzz=token_id))
    assert re.search(rf"tokenizer\.json {words}", sentence(Tokenizer, folder))


def test_ids_may_have_holes(tmp_path):
    """fails if: the bound is on the number of tokens, or off by one."""
    folder = edited(write(tmp_path), lambda content: content["model"]["vocab"].update(zzzz=4 * 10**6 - 1))
    assert Tokenizer(folder).vocab_size >= 4 * 10**6


def test_a_tokenizer_json_that_is_too_large_is_not_read(tmp_path, monkeypatch):
    """fails if: the file is read before its size is looked at."""
    folder = write(tmp_path)
    size = (folder / "tokenizer.json").stat().st_size
    monkeypatch.setattr(tokenizer_file, "MOST_BYTES", size)
    Tokenizer(folder)
    monkeypatch.setattr(tokenizer_file, "MOST_BYTES", size - 1)
    assert f"holds {size} bytes, more than" in sentence(Tokenizer, folder)


@pytest.mark.parametrize("part, value", [
    ("normalizer", sequence(30, "normalizers", [{"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}])),
    ("normalizer", {"type": "Replace", "pattern": {"Regex": "."}, "content": "x" * 65}),
    ("normalizer", {"type": "Sequence", "normalizers": [sequence(4, "normalizers", [{"type": "Prepend",
                                                                                      "prepend": "xx"}])]}),
    ("pre_tokenizer", sequence(7, "pretokenizers", [{"type": "ByteLevel", "add_prefix_space": False,
                                                     "trim_offsets": True, "use_regex": False}])),
    ("decoder", sequence(30, "decoders", [{"type": "Replace", "pattern": {"String": "x"}, "content": "xx"}]))])
def test_steps_that_multiply_the_text_are_refused(tmp_path, part, value):
    """fails if: growth does not look into Sequences, at patterns, or at one of the three parts."""
    folder = edited(write(tmp_path), lambda content: content.update({part: value}))
    assert f"tokenizer.json: its {part} can make a text more than 64 times as long" in sentence(Tokenizer, folder)


def test_the_post_processor_adds_tokens_of_the_vocabulary(tmp_path):
    """fails if: an id past the last one gets into a prompt (an index error in the model, on a GPU an assertion)."""
    folder = write(tmp_path, template=None)
    last = Tokenizer(folder).vocab_size - 1
    assert Tokenizer(edited(folder, lambda c: c.update(post_processor=adds(last)))).prompt_ids("x")[0] == last
    said = sentence(Tokenizer, edited(folder, lambda c: c.update(post_processor=adds(last + 1))))
    assert f"adds the id {last + 1}, and its ids end at {last}" in said


# ------------------------------------------------------------------------- what the library stumbles over


def missing_special(content):
    content["post_processor"] = adds(0)
    content["post_processor"]["special_tokens"] = {}


def charsmap(content):
    content["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}


@pytest.mark.parametrize("edit", [missing_special, charsmap])
def test_a_panic_of_the_library_while_loading_is_one_sentence(tmp_path, edit):
    """fails if: only Exception is caught: a PanicException of Rust is none."""
    said = sentence(Tokenizer, edited(write(tmp_path), edit))
    assert re.search(r"tokenizer\.json is broken \(.+\); download it again", said)


def empty_pattern(content):
    content["normalizer"] = {"type": "Replace", "pattern": {"String": ""}, "content": "xx"}


def fixed_length(content):
    content["pre_tokenizer"] = {"type": "FixedLength", "length": 0}


def endless_pattern(content):
    content["pre_tokenizer"] = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated",
                                "invert": False}


def no_unknown(content):
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "zz"}


@pytest.mark.parametrize("edit", [empty_pattern, fixed_length, endless_pattern, no_unknown])
def test_a_failure_on_a_text_is_one_sentence(tmp_path, edit):
    """fails if: encode or prompt_ids lets the library's errors through."""
    tokenizer = Tokenizer(edited(write(tmp_path), edit))
    for action in (tokenizer.encode, tokenizer.prompt_ids):
        said = sentence(action, "a" * 40 + "b")
        assert re.search(r"tokenizer\.json fails on the text '.{40,}' \(.+\); correct the text or the file", said)


def test_a_failure_on_ids_is_one_sentence(tmp_path):
    """fails if: decode lets a panic through."""
    tokenizer = Tokenizer(edited(write(tmp_path), lambda content: content.update(
        decoder={"type": "Strip", "content": "a", "start": 5, "stop": 5})))
    assert "tokenizer.json fails on ids that were to become text (" in sentence(tokenizer.decode, tokenizer.encode("a"))


def test_ctrl_c_is_not_taken_for_a_broken_file(tmp_path, monkeypatch):
    """fails if: everything that is raised counts as a failure of the library."""
    tokenizer = Tokenizer(write(tmp_path))
    class Interrupted:
        def encode(self, *rest, **more):
            raise KeyboardInterrupt
    monkeypatch.setattr(tokenizer, "_backend", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        tokenizer.encode("x")


@pytest.mark.parametrize("name", ["bos_token", "eos_token"])
def test_half_a_character_as_a_special_token_is_refused(tmp_path, name):
    """fails if: a lone surrogate reaches the tokenizers library."""
    assert f"{name} must be a text, not '\\ud800'" in sentence(Tokenizer, changed(write(tmp_path), **{name: "\ud800"}))


def test_half_a_character_in_a_text_is_one_sentence(tmp_path):
    """fails if: a lone surrogate in a solution or a prompt raises TypeError, or the text is not quoted."""
    tokenizer = Tokenizer(write(tmp_path, template=None))
    said = sentence(tokenizer.encode, "long " * 20 + "3*4=\ud83d12")
    assert r"half of a character (a lone surrogate) in ' long long long 3*4=\ud83d12'; correct the text" in said
    said.encode()
    assert "a chat prompt must be plain JSON data" in sentence(tokenizer.prompt_ids, "3*4=\ud83d12")


def test_a_folder_whose_name_is_no_utf8_is_read_and_named(tmp_path):
    """fails if: the path is handed to the tokenizers library, or a sentence cannot be printed."""
    folder = write(tmp_path / "caf").rename(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")))
    tokenizer = Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("12 + 30")) == "12 + 30"
    tokenizer.save(tmp_path / "to")
    (folder / "chat_template.jinja").write_text("{{ 1 // 0 }}")
    said = sentence(Tokenizer(folder).render, [u("x")])
    said.encode()
    assert r"caf\udce9/chat_template.jinja fails" in said
    for name in ("x" * 5000, "a\0b", "\udce9" * 10):
        said = sentence(Tokenizer, tmp_path / name)
        said.encode()
        assert len(said) < 1000 and "\0" not in said


@pytest.mark.parametrize("name", [[], {}, None, 5])
def test_a_named_template_without_a_name_is_refused(tmp_path, name):
    """fails if: the names become the keys of a dict (TypeError)."""
    folder = changed(write(tmp_path, template=None), chat_template=[{"name": name, "template": "x"}])
    assert "is neither a text nor a list with" in sentence(Tokenizer, folder)
