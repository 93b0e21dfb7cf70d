"""Layouts of published tokenizer.json files beyond those of tokenizer_kinds.py."""
import json

import pytest
from tokenizer_kinds import SENTENCES, TEXTS, WORDS, byte_level, check_finished
from tokenizers import Regex, pre_tokenizers

from extras.cross_tokenizer.align import Bridge
from extras.cross_tokenizer.token_bytes import token_bytes
from support.errors import UserError
from support.tokenizer import Tokenizer


def saved(backend, folder, stop="<|endoftext|>"):
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": backend.token_to_id(stop)}))
    return Tokenizer(folder)


def cut_by(pattern, behavior, invert):
    """Byte-level BPE whose words are cut as cl100k's converted file (OLMo 2) says it: a Split with behavior Removed
    that is inverted, so that what matches is kept and what lies between is removed."""
    backend, _ = byte_level(420, "{1,3}")
    split = pre_tokenizers.Split(Regex(pattern), behavior, invert)
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return backend


def test_the_inverted_split_of_cl100k_reads_as_the_isolated_one(tmp_path):
    """fails if: the layout is refused as lossy, or its words differ from those of the same pattern, isolated"""
    pattern = WORDS.format(digits="{1,3}")
    inverted = saved(cut_by(pattern, "removed", True), tmp_path / "inverted")
    isolated = saved(cut_by(pattern, "isolated", False), tmp_path / "isolated")
    student = saved(byte_level(380, "")[0], tmp_path / "student")
    texts = [text.replace("<|", "< |") for text in TEXTS + SENTENCES]     # control tokens are tested elsewhere
    for a, b, plain in ((student, inverted, Bridge(student, isolated)), (inverted, student, Bridge(isolated, student))):
        bridge, mine, theirs = Bridge(a, b), token_bytes(a), token_bytes(b)
        for text in texts:
            response = a.encode(text) + [a.stop_ids[0]]
            reading = bridge.read(response, True)
            check_finished(reading, response, mine, theirs, bridge)
            assert reading == plain.read(response, True)
    assert all(inverted.encode(text) == isolated.encode(text) for text in texts)


def test_text_that_an_inverted_split_throws_away_is_dropped_with_its_reason(tmp_path):
    """fails if: a pattern that does not match everything loses text without a word, on either side's reading"""
    lossy = saved(cut_by(r"\p{L}+|\p{N}+| +", "removed", True), tmp_path / "lossy")     # no punctuation, no newline
    student = saved(byte_level(380, "")[0], tmp_path / "student")
    bridge = Bridge(student, lossy)
    for text, reason in (("the answer 42", None), ("the answer: 42", "spelling it changes its bytes"),
                         ("42\n", "spelling it changes its bytes")):
        reading = bridge.read(student.encode(text) + [student.stop_ids[0]], True)
        assert reading == reason if reason else reading.ids[:-1] == lossy.encode(text)
    back = Bridge(lossy, student)
    assert back.translate(student.encode("the answer 42"), False) == lossy.encode("the answer 42")
    assert back.translate(student.encode("the answer: 42"), False) is None


def test_a_split_that_removes_its_matches_is_still_refused(tmp_path):
    with pytest.raises(UserError, match="Split"):
        token_bytes(saved(cut_by(" ", "removed", False), tmp_path / "spaces"))
    backend = byte_level(380, "")[0]
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Punctuation("removed"),
                                                     pre_tokenizers.ByteLevel(False, use_regex=False)])
    with pytest.raises(UserError, match="Punctuation"):
        token_bytes(saved(backend, tmp_path / "points"))
