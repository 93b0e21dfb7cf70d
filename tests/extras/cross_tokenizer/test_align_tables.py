"""What align.py rests on, over the seven tokenizers of tokenizer_kinds.py: the bytes of every token, raw copies that
read any text, and what two vocabularies share.
"""
import json
import random

import pytest
from tokenizer_kinds import bridges, folders, raws, sides, tables  # noqa: F401 (fixtures)
from tokenizer_kinds import KINDS, SENTENCES, TEXTS, byte_level, inherent, scramble, write
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers

from extras.cross_tokenizer.align import Bridge
from extras.cross_tokenizer.token_bytes import raw_copy, token_bytes, whitespace_tokens
from support.errors import UserError
from support.tokenizer import Tokenizer


# Tables and raw copies

@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(kind, sides, tables, raws):
    lossy = 0
    for text in TEXTS + SENTENCES:
        ids = raws[kind].encode(text, add_special_tokens=False).ids
        if inherent(kind, text):
            lossy += 1
            continue
        assert b"".join(tables[kind].bytes[i] for i in ids) == text.encode(), text
        decoded = sides[kind].decode(ids, skip_special=False)
        stripped = text[1:] if kind in ("llama2", "unigram") and text.startswith(" ") else text
        assert decoded == stripped      # the library's own decoder, which takes one leading space off
    assert lossy == {"llama2": 2, "gemma": 2, "unigram": 6}.get(kind, 0)


def test_a_byte_level_token_is_one_byte_per_character(tables, sides):
    for kind in ("digits3", "nfc", "bytes", "long"):
        vocab = sides[kind].vocab()
        assert tables[kind].bytes[vocab["Ġ"]] == b" " and tables[kind].bytes[vocab["Ċ"]] == b"\n"
        assert tables[kind].bytes[vocab["é"]] == b"\xe9" and tables[kind].bytes[vocab["</think>"]] == b"</think>"
        singles = [text for text in tables[kind].bytes if len(text) == 1]
        assert sorted(singles) == [bytes([byte]) for byte in range(256)]


def test_byte_tokens_spaces_and_added_tokens_of_sentencepiece(tables, sides):
    vocab, table = sides["gemma"].vocab(), tables["gemma"]
    assert table.bytes[vocab["<0x0A>"]] == b"\n" and vocab["<0x0A>"] in table.fallback
    assert table.bytes[vocab["▁▁"]] == b"  "            # an added token that is a piece as well
    assert table.bytes[vocab["<table>"]] == b"<table>" and vocab["<table>"] not in table.special
    assert table.bytes[vocab["<turn▁end>"]] == "<turn▁end>".encode()    # a control token has no spaces
    assert table.bytes[vocab["</s>"]] == b"</s>" and vocab["</s>"] in table.special
    spaces = whitespace_tokens(table)
    assert spaces.shape == (sides["gemma"].vocab_size,)
    assert all(spaces[vocab[piece]] for piece in ("▁", "▁▁", "<0x09>", "<0x0D>"))
    assert spaces.tolist() == [text.isspace() and text.decode("latin1").strip(" \t\r\n") == "" for text in table.bytes]


def test_a_byte_token_is_one_only_if_the_model_falls_back_to_bytes(folders, tmp_path):
    spec = json.loads((folders / "gemma" / "tokenizer.json").read_text())
    spec["model"]["byte_fallback"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    table = token_bytes(Tokenizer(tmp_path))
    assert table.bytes[3 + 65] == b"<0x41>" and not table.fallback


def test_a_raw_copy_reads_what_is_written_where_the_tokenizer_itself_does_not(sides, raws):
    """Each case is one of the edits: without it the stock tokenizer gives other ids."""
    def texts(kind, text, raw):
        ids = raws[kind].encode(text, add_special_tokens=False).ids if raw else sides[kind].encode(text)
        return b"".join(token_bytes(sides[kind]).bytes[i] for i in ids)
    for kind, text in (("nfc", "e\u0301"), ("nfc", "the"),
                       ("nfc", " </think> x"), ("llama2", "the"), ("unigram", "the")):
        assert texts(kind, text, raw=True) == text.encode() != texts(kind, text, raw=False), (kind, text)
    end = sides["nfc"].vocab()["<|im_end|>"]
    assert end in sides["nfc"].encode("a<|im_end|>") and end not in raws["nfc"].encode("a<|im_end|>").ids
    assert sides["nfc"].vocab()["</think>"] in raws["nfc"].encode("a</think>").ids


@pytest.mark.parametrize("part, value, word", [
    ("model", models.WordPiece({"[UNK]": 0, "a": 1, "<s>": 2}, unk_token="[UNK]"), "WordPiece"),
    ("model", models.WordLevel({"<unk>": 0, "a": 1, "<s>": 2}, unk_token="<unk>"), "WordLevel"),
    ("model", models.BPE({"a</w>": 0, "b": 1, "<s>": 2}, [], end_of_word_suffix="</w>"), "end_of_word_suffix"),
    ("normalizer", normalizers.Sequence([normalizers.NFC(), normalizers.Nmt()]), "Nmt"),
    ("normalizer", normalizers.BertNormalizer(), "BertNormalizer"),
    ("normalizer", normalizers.Replace(Regex(" {2,}"), " "), "Replace"),
    ("pre_tokenizer", pre_tokenizers.Whitespace(), "Whitespace"),
    ("pre_tokenizer", pre_tokenizers.Split(" ", "removed"), "Split"),
    ("decoder", decoders.WordPiece(), "WordPiece"), ("decoder", decoders.Fuse(), "no decoder"),
])
def test_a_tokenizer_that_does_not_give_bytes_back_is_refused_by_name(part, value, word, tmp_path, sides):
    backend = byte_level(256)[0]
    setattr(backend, part, value)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    odd = Tokenizer(tmp_path)
    for build in (token_bytes, raw_copy, lambda odd: Bridge(odd, sides["nfc"]), lambda odd: Bridge(sides["nfc"], odd)):
        with pytest.raises(UserError, match=word) as error:
            build(odd)
        assert str(tmp_path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_dropout_is_off_in_the_raw_copy(tmp_path):
    backend = byte_level(500)[0]
    backend.model.dropout = 0.9
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    odd = Tokenizer(tmp_path)
    assert len({tuple(odd.encode(SENTENCES[0])) for _ in range(5)}) > 1     # the fixture does drop
    assert len({tuple(raw_copy(odd).encode(SENTENCES[0]).ids) for _ in range(5)}) == 1


# What both vocabularies have

def test_shared_ids_have_equal_bytes_and_kind_and_are_one_to_one(bridges, tables):
    for (a, b), bridge in bridges.items():
        mine, theirs = (side.tolist() for side in bridge.shared)
        assert len(set(mine)) == len(mine) == len(set(theirs)) == len(theirs)
        pairs = dict(zip(mine, theirs))
        for i, j in pairs.items():
            if i != bridge.student_stop[0]:
                assert tables[a].bytes[i] == tables[b].bytes[j]
                assert (i in tables[a].special) == (j in tables[b].special)
        stop = bridge.student_stop[0]
        assert pairs[stop] == bridge.read([stop], True).ids[0]
        texts = {text for i, text in enumerate(tables[a].bytes) if i not in tables[a].special}
        both = texts & {text for i, text in enumerate(tables[b].bytes) if i not in tables[b].special}
        assert both <= {tables[a].bytes[i] for i in pairs}


def test_a_piece_pairs_with_a_piece_before_a_byte_token(bridges, sides):
    """llama2 has both "1" and <0x31>, both of the byte 31; bytes has the one piece."""
    mine, theirs = sides["llama2"].vocab(), sides["bytes"].vocab()
    pairs = dict(zip(*(side.tolist() for side in bridges["llama2", "bytes"].shared)))
    assert pairs[mine["1"]] == theirs["1"] and mine["<0x31>"] not in pairs
    assert pairs[mine["<0x09>"]] == theirs["ĉ"]      # no piece of its own


def test_the_order_holds_every_token_but_the_control_tokens(bridges, tables):
    for (_, b), bridge in bridges.items():
        order = bridge.order.tolist()
        assert sorted(order) == [i for i, text in enumerate(tables[b].bytes) if text and i not in tables[b].special]
        assert [tables[b].bytes[i] for i in order] == sorted(tables[b].bytes[i] for i in order)


def test_translation_gives_the_students_own_tokens(bridges, tables, raws):
    for (a, b), bridge in bridges.items():
        for text in TEXTS:
            theirs = write(tables[b], raws[b], text)
            back = bridge.translate(theirs + [bridge.teacher_stop[-1]], True)
            assert back is not None or inherent(a, text)
            if back is not None:
                assert back[-1] in bridge.student_stop
                assert b"".join(tables[a].bytes[i] for i in back[:-1]) == text.encode()
                assert back[:-1] == raws[a].encode(text, add_special_tokens=False).ids
        half = scramble(tables[b], b"\xe4", random.Random(0), longest=1)
        assert bridge.translate(half, False) is None and bridge.translate(half, True) is None
    start = raws["nfc"].token_to_id("<|im_start|>")
    assert bridges["llama2", "nfc"].translate([start], False) is None
    assert bridges["bytes", "nfc"].translate([start], False) == [raws["bytes"].token_to_id("<|im_start|>")]
