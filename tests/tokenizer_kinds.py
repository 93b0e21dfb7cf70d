"""What the tests of extras/cross_tokenizer/align.py share: seven kinds of tokenizers, trained here on a few sentences,
hard texts for them, and the definition of a finest common partition.
"""
import json
import random
from itertools import accumulate, product

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from extras.cross_tokenizer.align import Bridge
from extras.cross_tokenizer.token_bytes import raw_copy, token_bytes
from support.tokenizer import Tokenizer

FAMILY = "\U0001F468\u200d\U0001F469\u200d\U0001F467\u200d\U0001F466"
SENTENCES = ["The quick brown fox: 12345 + 678 = 13023, so 3*4=12; 12-5=7.", "def f(x):\n    return x  # 12\n\n",
             "Ünïcödé, 你好世界 and 🙂🙂 " + FAMILY + " are bytes too.",
             "the answer is <think> 42 </think> the answer is 42"]
WORDS = r"[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def byte_level(size, digits=None, nfc=False):
    backend = Backend(models.BPE(ignore_merges=digits == "{1,3}"))
    backend.normalizer = normalizers.NFC() if nfc else None
    cut = [pre_tokenizers.Split(Regex(WORDS.format(digits=digits)), "isolated")] if digits is not None else []
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        cut + [pre_tokenizers.ByteLevel(add_prefix_space=nfc, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet,
                                                               show_progress=False))
    backend.add_tokens([AddedToken("</think>", lstrip=nfc, rstrip=nfc)])
    backend.add_special_tokens(["<|im_start|>", "<|endoftext|>", "<|im_end|>"])
    return backend, ["<|im_end|>", "<|endoftext|>"] if nfc else ["<|endoftext|>"]


def sentencepiece(prepend):
    marked = normalizers.Replace(" ", "▁")
    backend = Backend(models.BPE())
    backend.normalizer = marked
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("(?=▁)"), "isolated")
    backend.train_from_iterator(SENTENCES[:2], trainers.BpeTrainer(vocab_size=110, show_progress=False))
    learnt = json.loads(backend.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>"] + BYTES + sorted(learnt["vocab"], key=learnt["vocab"].get)
    merges = [tuple(pair) for pair in learnt["merges"]]
    if not prepend and "▁▁" not in pieces:
        pieces, merges = pieces + ["▁▁", "<turn▁end>"], merges + [("▁", "▁")]
    backend = Backend(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, unk_token="<unk>",
                                 byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), marked]) if prepend else marked
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prepend)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if not prepend:     # as Gemma: runs of spaces are pieces and added tokens at once
        backend.add_special_tokens(["<turn▁end>"])
        backend.add_tokens([AddedToken("▁▁", normalized=False), AddedToken("<table>", normalized=False)])
    return backend, ["</s>"]


def unigram():
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)] + [(text, -20.0) for text in BYTES]
    pieces += [(character, -5.0) for character in sorted(set("".join(SENTENCES[:2]).replace(" ", "▁")))]
    pieces += [("▁the", -3.0), ("▁answer", -4.0), ("12", -4.0), ("re", -4.0), ("turn", -4.5), ("▁return", -4.0)]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend, ["</s>"]


KINDS = {"digits3": lambda: byte_level(420, "{1,3}"), "nfc": lambda: byte_level(380, "", nfc=True),
         "llama2": lambda: sentencepiece(True), "gemma": lambda: sentencepiece(False),
         "bytes": lambda: byte_level(256), "long": lambda: byte_level(500), "unigram": unigram}
MARKED = ("llama2", "gemma", "unigram")     # they write a space as ▁, so a real ▁ cannot be told from it
STARTING: dict = {}     # found by brute force once

TEXTS = [
    "", "a", " ", "🙂", FAMILY,
    "🇩🇪🇫🇷", "☺\ufe0f", "👍🏽👍🏿", "你好,世界。",
    "\u1112\u1161\u11ab 한", "ภาษาไทย", "السلام ﻻ ﷺ",
    "क्षत्रिय", "e\u0301 é", "\u212b Å", "ﬁ", "ＡＢ１２",
    "a\u0323\u0307 a\u0307\u0323", "\ufffd real", "\0\x01\x1f\x7f",
    "▁", " ▁ a▁▁b", "<0x41>A", "Ġ the Ċ",
    "a\u00a0b\u2003c", "a\u200bb\ufeff", "\ufefftop", "\t\t x\t", "a\rb\r\nc\r\n\r\n",
    "end  ", "\n\n\nstart", "\n", " \n ", "-1.5e-10 +3,000.25", "if x:\n        return [y\n            for y in z]\n",
    "<|im_end|>", "a<|endoftext|>b", "<|im_start|>user\n", "<s>", "x</s>y", "<unk>", "</think>", " </think> ",
    "<think>\n42\n</think>\n\nthe answer", "<table> x", "\U0010ffff", "\U000e0041", "the answer is 42", "Ünïcödé",
    *(" " * n + "x" for n in range(1, 41)), *("1234567890123"[:n] for n in range(1, 13)),
]


def inherent(kind, text):
    """The losses that no reading can avoid: a real ▁; in a unigram model the text of a control or byte token,
    which it finds as a piece."""
    return kind in MARKED and "▁" in text or kind == "unigram" and any(s in text for s in ("<s>", "</s>", "<unk>",
                                                                                           "<0x41>"))


def write(table, raw, text):
    """The text as the tokenizer itself would write it, to the byte; from single bytes where it cannot."""
    ids = raw.encode(text, add_special_tokens=False).ids
    if b"".join(table.bytes[i] for i in ids) == text.encode() and not table.special & set(ids):
        return ids
    return scramble(table, text.encode(), random.Random(0), longest=1)


def scramble(table, data, rng, longest=8):
    """Ids that spell the bytes in a way drawn at random, hardly ever the tokenizer's own."""
    by_bytes = {text: i for i, text in enumerate(table.bytes) if text and i not in table.special}
    ids = []
    while data:
        sizes = [n for n in range(1, longest + 1) if data[:n] in by_bytes]
        size = rng.choice(sizes)
        ids.append(by_bytes[data[:size]])
        data = data[size:]
    return ids


def ends(table, ids):
    return list(accumulate(len(table.bytes[i]) for i in ids))


def check_finished(reading, response, mine, theirs, bridge):
    """The definition, by sets: chunk ends are the common ends, and all else follows."""
    assert response[-1] in bridge.student_stop and reading.ids[-1] in bridge.teacher_stop
    content, read = response[:-1], reading.ids[:-1]
    assert b"".join(mine.bytes[i] for i in content) == b"".join(theirs.bytes[i] for i in read)
    my_ends, their_ends = ends(mine, content), ends(theirs, read)
    common = sorted(set(my_ends) & set(their_ends))
    for chunk, side in ((reading.student_chunk, my_ends), (reading.teacher_chunk, their_ends)):
        assert chunk == [sum(end < own for end in common) for own in side] + [len(common)]
    expected = []
    for i, end in enumerate(my_ends):
        for j, (start, stop) in enumerate(zip([0, *their_ends], their_ends)):
            if start < end < stop:
                expected.append((i, j, theirs.bytes[read[j]][:end - start]))
    assert [cut[:2] for cut in reading.cuts] == [cut[:2] for cut in expected]
    for (_, _, lo, hi), (_, _, prefix) in zip(reading.cuts, expected):
        assert bridge.order[lo:hi].tolist() == starting(theirs, prefix)


def starting(table, prefix):
    key = id(table), prefix
    if key not in STARTING:
        STARTING[key] = [i for text, i in sorted((text, i) for i, text in enumerate(table.bytes) if text)
                         if i not in table.special and text.startswith(prefix)]
    return STARTING[key]


def mixtures(rng, number):
    return ["".join(rng.choice(TEXTS + SENTENCES)[:rng.randrange(1, 30)] for _ in range(rng.randrange(1, 5)))
            for _ in range(number)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    for name, build in KINDS.items():
        backend, stops = build()
        (root / name).mkdir()
        backend.save(str(root / name / "tokenizer.json"))
        stop_ids = [backend.token_to_id(text) for text in stops]
        (root / name / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}))
    return root


@pytest.fixture(scope="module")
def sides(folders):
    return {name: Tokenizer(folders / name) for name in KINDS}


@pytest.fixture(scope="module")
def tables(sides):
    return {name: token_bytes(side) for name, side in sides.items()}


@pytest.fixture(scope="module")
def raws(sides):
    return {name: raw_copy(side) for name, side in sides.items()}


@pytest.fixture(scope="module")
def bridges(sides):
    return {(a, b): Bridge(sides[a], sides[b]) for a, b in product(KINDS, KINDS)}
