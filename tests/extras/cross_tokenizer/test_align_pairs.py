"""align.py over real tokenizers: every ordered pair of the seven of tokenizer_kinds.py. Each text is either cut into
the finest common chunks, found again by brute force, or dropped for a loss that is inherent.
"""
import json
import random
import time
from itertools import accumulate

import pytest
import torch
from tokenizer_kinds import bridges, folders, raws, sides, tables  # noqa: F401 (fixtures)
from tokenizer_kinds import (FAMILY, KINDS, MARKED, SENTENCES, TEXTS, check_finished, inherent, mixtures, scramble,
                             write)

from extras.cross_tokenizer.align import Bridge, Reading, chunks
from extras.cross_tokenizer.chunk_credit import CREDIT, credit
from support.tokenizer import Tokenizer


# Every ordered pair

def test_every_text_is_a_finest_partition_or_an_inherent_loss(bridges, tables, raws):
    """49 ordered pairs x (101 hard texts + 20 random mixtures of them), each as the student writes it and in a
    segmentation drawn at random: 11,858 readings."""
    rng, cases, dropped = random.Random(0), 0, {kind: 0 for kind in KINDS}
    texts = TEXTS + mixtures(rng, 20)
    for (a, b), bridge in bridges.items():
        for text in texts:
            for ids in (write(tables[a], raws[a], text), scramble(tables[a], text.encode(), rng)):
                response = ids + [bridge.student_stop[0]]
                reading = bridge.read(response, True)
                cases += 1
                if isinstance(reading, str):
                    assert inherent(b, text), (a, b, text, reading)
                    dropped[b] += 1
                else:
                    assert not (b in MARKED and "▁" in text)
                    check_finished(reading, response, tables[a], tables[b], bridge)
    marked = 14 * sum("▁" in text for text in texts)
    assert cases == 49 * 2 * (len(TEXTS) + 20) == 11_858
    assert dropped.pop("unigram") > marked and dropped.pop("llama2") == dropped.pop("gemma") == marked > 0
    assert not any(dropped.values())


@pytest.mark.parametrize("kind", KINDS)
def test_with_equal_tokenizers_every_rule_is_plain_opd_to_the_bit(kind, bridges, tables, raws):
    bridge, table, rng = bridges[kind, kind], tables[kind], torch.Generator().manual_seed(0)
    events = sorted(table.special - set(bridge.student_stop))
    assert torch.equal(bridge.shared[0], torch.arange(len(table.bytes))) and torch.equal(*bridge.shared)
    for text in [text for text in TEXTS + SENTENCES if not inherent(kind, text)]:
        ids = write(table, raws[kind], text)
        content = ids + events[:1] + ids                                # a control token in the middle
        for stop in bridge.student_stop:
            reading = bridge.read(content + [stop], True)
            assert reading.ids == content + [stop] and not reading.cuts
            assert reading.student_chunk == reading.teacher_chunk == list(range(len(reading.ids)))
        cut = bridge.read(ids, False)
        assert cut.ids == ids and cut.student_chunk == cut.teacher_chunk == [*range(len(ids))][:-1] + [-1] * bool(ids)
        assert bridge.translate(content + [stop], True) == content + [stop] and bridge.translate(ids, False) == ids
        n = len(reading.ids)
        b, q = (torch.log_softmax(5 * torch.randn(n, 3, generator=rng), -1)[:, 0] for _ in range(2))
        chunk = torch.tensor(reading.student_chunk)
        for mode in CREDIT:
            effective, scored = credit(mode, b, q, chunk, chunk, prefix_n=q, max_chunk=1)
            assert scored.all() and torch.equal(effective, q) and torch.equal(effective - b, q - b)


def test_chunks_do_not_depend_on_who_is_called_student():
    rng = random.Random(1)
    for _ in range(300):
        total = rng.randrange(1, 30)
        sides = []
        for _ in range(2):
            places = sorted({total, *(rng.randrange(1, total + 1) for _ in range(rng.randrange(12)))})
            sides.append([b - a for a, b in zip([0, *places], places)])
        mine, theirs = chunks(*sides)
        assert chunks(*reversed(sides)) == (theirs, mine)
        common = set(accumulate(sides[0])) & set(accumulate(sides[1]))
        assert mine[-1] == theirs[-1] == len(common) - 1
        for number in range(len(common)):       # equal bytes in each
            assert len({sum(n for n, c in zip(side, chunk) if c == number)
                        for side, chunk in zip(sides, (mine, theirs))}) == 1
        finer = [1] * total     # cutting the student everywhere leaves the teacher's tokens as chunks
        assert chunks(finer, sides[1])[1] == list(range(len(sides[1])))


def test_tokens_of_no_bytes_go_with_the_chunk_that_starts_there():
    assert chunks([], []) == ([], [])
    assert chunks([0, 2, 0, 1, 0], [1, 1, 0, 1, 0]) == ([0, 0, 1, 1, 1], [0, 0, 1, 1, 1])
    assert chunks([0, 1, 1], [0, 1, 1]) == ([0, 0, 1], [0, 0, 1])
    assert chunks([3], [0, 1, 0, 2]) == ([0], [0, 0, 0, 0])
    assert chunks([0], []) == ([0], [])
    with pytest.raises(ValueError, match="2 bytes cannot be aligned with 3"):
        chunks([2], [1, 2])


def test_a_hundred_thousand_tokens_in_a_second(bridges, tables, raws):
    text = (SENTENCES[0] + SENTENCES[2]) * 1100
    ids = write(tables["bytes"], raws["bytes"], text)
    assert len(ids) > 100_000
    began = time.process_time()
    raws["nfc"].encode(text)
    encoding = time.process_time() - began
    began = time.process_time()
    lengths = [len(tables["bytes"].bytes[i]) for i in ids]
    chunks(lengths, lengths)
    assert time.process_time() - began < 1
    began = time.process_time()
    reading = bridges["bytes", "nfc"].read(ids + [bridges["bytes", "nfc"].student_stop[0]], True)
    assert time.process_time() - began < 1 + 2 * encoding and len(reading.cuts) > 10_000


# What is no text

def stopped(bridge, ids, stop=0):
    return ids + [bridge.student_stop[stop]]


def test_a_response_of_nothing_but_a_stop_token(bridges):
    for bridge in bridges.values():
        reading = bridge.read(stopped(bridge, []), True)
        assert reading == Reading(reading.ids, [0], [0], []) and reading.ids[0] in bridge.teacher_stop
        assert bridge.read([], False) == Reading([], [], [], [])
        (back,) = bridge.translate(reading.ids, True)
        assert bridge.translate([], False) == [] and back in bridge.student_stop
        assert "stop token" in bridge.read([], True)


def test_the_teachers_stop_is_the_one_written_like_the_students(sides, bridges):
    """nfc stops at <|im_end|> and <|endoftext|>; digits3 at <|endoftext|> alone, though it has the other."""
    bridge, vocab = bridges["nfc", "digits3"], sides["digits3"].vocab()
    for stop in (0, 1):
        assert bridge.read(stopped(bridge, [], stop), True).ids == [vocab["<|endoftext|>"]]
    back, vocab = bridges["digits3", "nfc"], sides["nfc"].vocab()
    assert back.read(stopped(back, []), True).ids == [vocab["<|endoftext|>"]] != [back.teacher_stop[0]]
    other = bridges["llama2", "nfc"]
    assert other.read(stopped(other, []), True).ids == [vocab["<|im_end|>"]] == [other.teacher_stop[0]]


def test_a_bridge_keeps_the_stop_ids_of_its_birth(folders):
    student, teacher = Tokenizer(folders / "digits3"), Tokenizer(folders / "nfc")
    student.stop_ids = (student.vocab()["<|im_end|>"],)
    bridge = Bridge(student, teacher)
    student.stop_ids = ()
    assert bridge.read(list(bridge.student_stop), True).ids == [teacher.vocab()["<|im_end|>"]]


def test_a_control_token_parts_the_text(sides, tables, raws, bridges):
    """digits3 and nfc both have <|im_start|>; llama2 has none of digits3's control tokens."""
    start = sides["digits3"].vocab()["<|im_start|>"]
    left, right = (write(tables["digits3"], raws["digits3"], text) for text in ("x \n", "\n\n the 12345"))
    for kind in ("nfc", "llama2"):
        bridge = bridges["digits3", kind]
        a, b = (bridge.read(stopped(bridge, ids), True) for ids in (left, right))
        whole = bridge.read(stopped(bridge, left + [start] + right), True)
        event = sides[kind].vocab().get("<|im_start|>")
        assert (event is None) == (kind == "llama2")
        read, chunk = ([], []) if event is None else ([event], [max(a.student_chunk)])
        assert whole.ids == a.ids[:-1] + read + b.ids
        shift = max(a.student_chunk) + len(read)
        assert whole.student_chunk == a.student_chunk[:-1] + (chunk or [-1]) + [c + shift for c in b.student_chunk]
        assert whole.teacher_chunk == a.teacher_chunk[:-1] + chunk + [c + shift for c in b.teacher_chunk]
        places = [(i + len(left) + 1, j + len(a.ids) - 1 + len(read)) for i, j, _, _ in b.cuts]
        assert [cut[:2] for cut in whole.cuts] == [cut[:2] for cut in a.cuts] + places
    ended = bridges["digits3", "nfc"].read(left + [start], False)       # a control token is complete: no mask
    assert -1 not in ended.student_chunk + ended.teacher_chunk


def test_text_that_looks_like_a_control_token_stays_text(bridges, tables, raws):
    for (a, b), bridge in bridges.items():
        for text in ("a<|im_end|>b<|endoftext|>", "</s><s><unk>"):
            reading = bridge.read(stopped(bridge, write(tables[a], raws[a], text)), True)
            assert isinstance(reading, str) and b == "unigram" or not set(reading.ids[:-1]) & tables[b].special


def test_a_marker_that_is_special_on_one_side_only_is_one_event(folders, tmp_path):
    spec = json.loads((folders / "nfc" / "tokenizer.json").read_text())
    next(token for token in spec["added_tokens"] if token["content"] == "</think>")["special"] = True
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    (tmp_path / "generation_config.json").write_text((folders / "nfc" / "generation_config.json").read_text())
    plain, special = Tokenizer(folders / "digits3"), Tokenizer(tmp_path)
    for a, b in ((plain, special), (special, plain)):
        bridge = Bridge(a, b)
        response = [a.vocab()["</think>"], a.stop_ids[0]]
        reading = bridge.read(response, True)
        assert reading.ids[0] == b.vocab()["</think>"] and reading.student_chunk == reading.teacher_chunk == [0, 1]
        assert bridge.translate([b.vocab()["</think>"]], False) == [a.vocab()["</think>"]]
        assert (response[0], reading.ids[0]) not in zip(*(side.tolist() for side in bridge.shared))
        repeated = bridge.read(response, True, b"</think>")         # and can be what the prompt opened
        assert repeated == Reading([reading.ids[1]], [-1, 0], [0], [])


def test_a_thinking_marker_is_one_token_or_several(bridges, sides, tables, raws):
    """</think> as one added token, as the student's pieces, as the teacher's pieces: one chunk each time."""
    one = sides["digits3"].vocab()["</think>"]
    pieces = scramble(tables["digits3"], b"</think>", random.Random(0), longest=3)
    for kind in ("nfc", "llama2"):
        bridge = bridges["digits3", kind]
        for ids in ([one], pieces):
            reading = bridge.read(stopped(bridge, ids), True)
            if kind == "nfc":
                assert reading.ids[0] == sides["nfc"].vocab()["</think>"]
                assert reading.student_chunk == [0] * len(ids) + [1] and len(ids) == 1 + len(reading.cuts)


def test_what_the_prompt_opened_is_not_read_twice(bridges, tables, raws):
    bridge, table = bridges["bytes", "nfc"], tables["nfc"]
    def read(text, opened):
        return bridge.read(stopped(bridge, write(tables["bytes"], raws["bytes"], text)), True, opened)
    def text(reading):
        return b"".join(table.bytes[i] for i in reading.ids[:-1])
    plain = read("\nthe answer", b"")
    for said in ("<think>\n\nthe answer", "<think>\nthe answer", "<think>the answer"):
        reading = read(said, b"<think>\n")
        skip = 8 if said[7] == "\n" else 7
        assert reading.student_chunk[:skip] == [-1] * skip and text(reading) == said[skip:].encode()
        assert -1 not in reading.student_chunk[skip:] + reading.teacher_chunk
    assert read("<think>\n\nthe answer", b"<think>\n").ids == plain.ids
    assert read("\nthe answer", b"<think>\n") == plain and read("<thin", b"<think>\n") == read("<thin", b"")
    assert text(read("<think>\n", b"<think>\n")) == b""


def test_a_token_that_only_begins_in_what_was_opened_is_masked_with_its_chunk(bridges, tables):
    bridge, by_bytes = bridges["long", "bytes"], {text: i for i, text in enumerate(tables["long"].bytes)}
    piece = next(text for text in by_bytes if len(text) == 3 and text.isalpha())
    reading = bridge.read(stopped(bridge, [by_bytes[piece], by_bytes[b" "]]), True, piece[:1])
    assert b"".join(tables["bytes"].bytes[i] for i in reading.ids[:-1]) == piece[1:] + b" "
    assert reading.student_chunk == [-1, 1, 2] and reading.teacher_chunk == [-1, -1, 1, 2]


# Cut responses, broken bytes

def test_a_response_cut_anywhere_is_read_up_to_its_last_whole_character(bridges, tables, raws):
    """The last chunk is masked on both sides, and so is whatever follows the last whole character."""
    cuts = 0
    for (a, b), bridge in bridges.items():
        ids = write(tables[a], raws[a], "the " + FAMILY + "🙂 12")
        for n in range(len(ids) + 1):
            pieces = [tables[a].bytes[i] for i in ids[:n]]
            keep = next(k for k in range(n, -1, -1) if valid(b"".join(pieces[:k])))
            reading = bridge.read(ids[:n], False)
            assert b"".join(tables[b].bytes[i] for i in reading.ids) == b"".join(pieces[:keep])
            full = chunks([len(p) for p in pieces[:keep]], [len(tables[b].bytes[i]) for i in reading.ids])
            last = max(full[0], default=0)
            mine, theirs = ([-1 if c == last else c for c in side] for side in full)
            assert reading.student_chunk == mine + [-1] * (n - keep) and reading.teacher_chunk == theirs
            assert all(reading.student_chunk[i] >= 0 for i, *_ in reading.cuts)
            if keep < n:    # stopped in the middle of a character: the stop event is read, but not scored
                ended = bridge.read(stopped(bridge, ids[:n]), True)
                assert ended.student_chunk == reading.student_chunk + [-1]
                assert ended.ids == reading.ids + [bridge._theirs.stop_like(tables[a].bytes[bridge.student_stop[0]])]
                cuts += 1
    assert cuts > 500


def valid(data):
    try:
        return data.decode() is not None
    except UnicodeDecodeError:
        return False


@pytest.mark.parametrize("data", [b"a\xffb", b"a\xe4\xbdb", b"\x80", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"])
def test_bytes_that_are_no_text_are_dropped(data, bridges, tables):
    """A stray byte, an interrupted character, a lone surrogate, an overlong form, a code point beyond the last."""
    for (a, _), bridge in bridges.items():
        ids = scramble(tables[a], data, random.Random(0), longest=1)
        assert "UTF-8" in bridge.read(stopped(bridge, ids), True) and "UTF-8" in bridge.read(ids, False)


def test_no_tokenizer_reads_a_lone_surrogate(raws):
    for raw in raws.values():
        with pytest.raises((TypeError, UnicodeEncodeError)):
            raw.encode("\ud800")


def test_a_fragment_before_a_control_token_is_dropped(bridges, tables, sides):
    bridge = bridges["digits3", "nfc"]
    half = scramble(tables["digits3"], "🙂".encode()[:2], random.Random(0), longest=1)
    assert "UTF-8" in bridge.read(half + [sides["digits3"].vocab()["<|im_start|>"]], False)


def test_ids_of_padded_rows_are_dropped(bridges, tables):
    for (a, b), bridge in bridges.items():
        for odd in (len(tables[a].bytes), 10**6, -1):
            assert f"id {odd} " in bridge.read([0 + 70, odd, bridge.student_stop[0]], True)
        assert bridge.translate([70, len(tables[b].bytes)], False) is None
