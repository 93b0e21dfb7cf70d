"""Align: one text, two tokenizers. Which tokens of the teacher answer for which tokens of the student.

Place in the loop:  rollout -> [ALIGN] -> teacher -> chunk credit -> credit, losses.

Everything is counted in bytes of token ids, never in characters: a token may end inside a character, and
decoded strings hide it. A chunk is a shortest stretch of text on whose two ends both tokenizers agree. With equal
tokenizers every token is its own chunk.

    student   | Hel | lo | Ġwor | ld | 1 | 2 | <stop>
    teacher   | Hello    | Ġworld    | 12    | <stop>        four chunks; <stop> is an event, not text

What cannot be aligned exactly is masked or dropped with a reason. Chunks: Niu et al. 2026, arXiv:2606.09456.

Not here: log-probs, and how a chunk's are shared out (chunk_credit.py); who scores (teacher.py); tokenizers
that do not give back the bytes they read (WordPiece, nmt_nfkc): UserError.
"""
import json
import re
from bisect import bisect_left, bisect_right
from codecs import getincrementaldecoder
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

from tokenizer import Tokenizer, UserError

MODELS = ("BPE", "Unigram")
NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Strip", "Prepend")
PRE_TOKENIZERS = ("ByteLevel", "Metaspace", "Split", "Digits", "Punctuation", "UnicodeScripts")
DECODERS = ("ByteLevel", "Metaspace", "ByteFallback", "Fuse", "Strip")


# Bytes of ids

class TokenBytes(NamedTuple):
    """What every id of a tokenizer stands for."""
    bytes: list[bytes | None]   # by id; None: no such id
    special: frozenset[int]     # control tokens: events that no text spells
    added: dict[bytes, int]     # tokens that are matched whole, special or not: content -> id
    fallback: frozenset[int]    # <0x00> ... <0xFF>: single bytes that stand in for characters without a piece


def flat(step: dict | None) -> list[dict]:
    """The steps of a normalizer, pre_tokenizer or decoder in order; a Sequence may hold Sequences."""
    if step is None or step["type"] != "Sequence":
        return [] if step is None else [step]
    (inner,) = (value for value in step.values() if isinstance(value, list))
    return [part for step in inner for part in flat(step)]


def is_lossy(step: dict, known: tuple[str, ...]) -> bool:
    """Whether a step loses part of ordinary text; replacing is allowed between spaces and their marker."""
    if step["type"] == "Replace":
        return " " not in (step["content"], step["pattern"].get("String")) or "String" not in step["pattern"]
    # inverted, what matches is the delimiter and is kept (cl100k's layout): only what no pattern matches is lost, and
    # Side.spell finds that in the text where it happens
    return step["type"] not in known or step.get("behavior") == "Removed" and not step.get("invert")


def supported(tokenizer: Tokenizer) -> dict:
    """tokenizer.json, if its ids can be turned into bytes and bytes into ids without loss; else UserError."""
    spec = tokenizer.description()
    model = spec["model"]
    odd = [f"a {model['type']} model"] if model["type"] not in MODELS else []
    odd += [f"a {key}" for key in ("continuing_subword_prefix", "end_of_word_suffix") if model.get(key)]
    for part, known in (("normalizer", NORMALIZERS), ("pre_tokenizer", PRE_TOKENIZERS), ("decoder", DECODERS)):
        odd += [f"the {part} {step['type']}" for step in flat(spec[part]) if is_lossy(step, known)]
    if not any(step["type"] in ("ByteLevel", "Replace", "Metaspace", "ByteFallback") for step in flat(spec["decoder"])):
        odd.append("no decoder that says how pieces become bytes")
    if odd:
        raise UserError(f"{tokenizer.folder / 'tokenizer.json'} has {odd[0]}, so its tokens do not spell a text byte "
                        f"by byte; choose a model with byte-level or SentencePiece BPE")
    return spec


def byte_alphabet() -> dict[str, int]:
    """How byte-level tokenizers write bytes (GPT-2): printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def byte_table(spec: dict) -> TokenBytes:
    """A piece is what the decoder makes of it. An added token is its literal content, except in a SentencePiece
    vocabulary where it is a piece as well (Gemma declares runs of spaces, ▁▁, both ways)."""
    vocab, added, decoder = spec["model"]["vocab"], spec["added_tokens"], flat(spec["decoder"])
    pieces = vocab if isinstance(vocab, dict) else {piece: token_id for token_id, (piece, _) in enumerate(vocab)}
    byte_level = any(step["type"] == "ByteLevel" for step in decoder)
    markers = [step["replacement"] if step["type"] == "Metaspace" else step["pattern"]["String"]
               for step in decoder if step["type"] in ("Metaspace", "Replace")]
    single = {f"<0x{byte:02X}>": bytes([byte]) for byte in range(256)} if spec["model"].get("byte_fallback") else {}
    fallback = frozenset() if byte_level else frozenset(pieces[piece] for piece in single if piece in pieces)
    value_of = byte_alphabet().__getitem__
    size = 1 + max([*pieces.values(), *(token["id"] for token in added)])
    table: list[bytes | None] = [None] * size
    for piece, token_id in pieces.items():
        try:
            table[token_id] = bytes(map(value_of, piece)) if byte_level else single[piece]
        except KeyError:    # an ordinary SentencePiece; or one that no byte-level encoder writes
            for marker in markers:
                piece = piece.replace(marker, " ")
            table[token_id] = piece.encode()
    for token in added:
        if byte_level or token["special"] or token["content"] not in pieces:
            table[token["id"]] = token["content"].encode()
    special = frozenset(token["id"] for token in added if token["special"])
    return TokenBytes(table, special, {token["content"].encode(): token["id"] for token in added}, fallback)


def rebuilt_raw(spec: dict) -> Backend:
    """What raw_copy promises, from the description of the tokenizer."""
    steps = [{**step, "add_prefix_space": False} if step["type"] == "ByteLevel" else
             {**step, "prepend_scheme": "never"} if step["type"] == "Metaspace" else step
             for step in flat(spec["pre_tokenizer"])]
    kept = [step for step in flat(spec["normalizer"]) if step["type"] == "Replace"]
    backend = Backend.from_str(json.dumps({
        **spec, "truncation": None, "padding": None, "post_processor": None,
        "normalizer": {"type": "Sequence", "normalizers": kept},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps},
        "added_tokens": [{**token, "lstrip": False, "rstrip": False} for token in spec["added_tokens"]],
        "model": {**spec["model"], **({"dropout": None} if "dropout" in spec["model"] else {})}}))
    backend.encode_special_tokens = True
    return backend


def token_bytes(tokenizer: Tokenizer) -> TokenBytes:
    """The byte table of a tokenizer.  UserError: a kind whose tokens have no bytes of their own."""
    return byte_table(supported(tokenizer))


def raw_copy(tokenizer: Tokenizer) -> Backend:
    """The tokenizer without anything that changes a text before it is cut: no normal forms, no space in front,
    no text turned into control tokens, no spaces swallowed beside added tokens, no dropout. `encode` with
    add_special_tokens=False.  UserError: as token_bytes."""
    return rebuilt_raw(supported(tokenizer))


def whitespace_tokens(table: TokenBytes) -> Tensor:
    """(V,) bool: tokens of nothing but spaces, tabs and newlines."""
    return torch.tensor([bool(text) and not text.strip(b" \t\r\n") for text in table.bytes])


# Chunks

def chunks(student_lengths: list[int], teacher_lengths: list[int]) -> tuple[list[int], list[int]]:
    """The chunk number (0, 1, ...) of every student and every teacher token, given their lengths in bytes.

    A chunk ends wherever a token of both ends: the finest partition into equal texts. A token of no bytes belongs
    to the chunk that starts at its place, at the very end to the last. O(tokens + bytes).
    """
    lengths = [np.asarray(side, dtype=np.int64) for side in (student_lengths, teacher_lengths)]
    ends = [side.cumsum() for side in lengths]
    total = int(lengths[0].sum())
    if total != lengths[1].sum():
        raise ValueError(f"{total} bytes cannot be aligned with {lengths[1].sum()}")
    is_end = np.zeros((2, total + 1), dtype=bool)
    for row, end in zip(is_end, ends):
        row[end] = True
    is_end[:, 0] = False
    number = is_end.all(0).cumsum()     # by place in the text: how many chunks end there or before
    last = max(number[-1] - 1, 0)
    mine, theirs = (number[end - length].clip(max=last).tolist() for end, length in zip(ends, lengths))
    return mine, theirs


def whole_tokens(pieces: list[bytes]) -> int | None:
    """How many tokens, from the left, end where a character ends, if only an unfinished character follows; None
    if the bytes are not UTF-8."""
    data, decoder = b"".join(pieces), getincrementaldecoder("utf-8")()
    try:
        decoder.decode(data)
    except UnicodeDecodeError:
        return None
    whole = len(data) - len(decoder.getstate()[0])
    keep, end = len(pieces), len(data)
    while end > whole or data[end:end + 1] and data[end] & 0xC0 == 0x80:    # 0x80: inside a character
        keep -= 1
        end -= len(pieces[keep])
    return keep


class Reading(NamedTuple):
    """One response as the teacher reads it."""
    ids: list[int]              # teacher tokens after its prompt; finished: a teacher stop id stands last
    student_chunk: list[int]    # per response token: chunk number in this response; -1 = cannot be scored
    teacher_chunk: list[int]    # per entry of ids: chunk number; -1 = read, but answers for no student token
    cuts: list[tuple[int, int, int, int]]   # (i, j, lo, hi): student token i ends inside teacher token j, whose
    #                             bytes so far are the first ones of Bridge.order[lo:hi]


class Side(NamedTuple):
    """One of the two tokenizers."""
    table: TokenBytes
    raw: Backend
    stop: tuple[int, ...]

    def spell(self, data: bytes) -> list[int] | str:
        """Ids of exactly these bytes, or why there are none."""
        try:
            ids = self.raw.encode(data.decode(), add_special_tokens=False).ids
        except UnicodeDecodeError:
            return "its bytes are not UTF-8"
        if any(token_id in self.table.special for token_id in ids):
            return "a control or unknown token would be needed to spell it"
        return ids if b"".join(self.table.bytes[i] for i in ids) == data else "spelling it changes its bytes"

    def stop_like(self, text: bytes) -> int:
        """The stop id that is written like the other side's, else the first."""
        return next((i for i in self.stop if self.table.bytes[i] == text), self.stop[0])


def same_control(source: TokenBytes, target: TokenBytes) -> dict[int, int | None]:
    """Control tokens of `source` -> the added token of `target` with the same content, or None. A thinking marker
    that only `target` declares special is one too, if `source` has it as a whole token."""
    pairs = {token_id: target.added.get(text) for text, token_id in source.added.items()}
    return {i: other for i, other in pairs.items() if i in source.special or other in target.special}


# The bridge

class Bridge:
    """How a teacher with another tokenizer reads what the student wrote. Both stop_ids are taken here, once.

    order           int64: teacher ids in the order of their bytes, control tokens left out: those that start with
                    given bytes stand side by side
    shared          two int64 (K,): student ids and teacher ids of the same bytes and kind, one-to-one; the
                    student's first stop id goes with the teacher's
    student_stop, teacher_stop      stop ids of both
    whitespace      (V,) bool: the student's tokens of white space alone
    teacher         the teacher's tokenizer

    UserError: a tokenizer whose tokens have no bytes.
    """

    def __init__(self, student: Tokenizer, teacher: Tokenizer):
        self.teacher = teacher
        self._mine, self._theirs = (Side(byte_table(spec), rebuilt_raw(spec), tuple(side.stop_ids))
                                    for side in (student, teacher) for spec in [supported(side)])
        self.student_stop, self.teacher_stop = self._mine.stop, self._theirs.stop
        mine, theirs = self._mine.table, self._theirs.table
        self._control, self._control_back = same_control(mine, theirs), same_control(theirs, mine)
        spelled = sorted((text, i) for i, text in enumerate(theirs.bytes) if text and i not in theirs.special)
        self._sorted = [text for text, _ in spelled]
        self.order = torch.tensor([i for _, i in spelled], dtype=torch.int64)
        self.shared = self._shared_ids()
        self.whitespace = whitespace_tokens(mine)

    def _shared_ids(self) -> tuple[Tensor, Tensor]:
        """Ids of equal bytes are paired in order, pieces before the byte tokens that stand in for them."""
        groups: tuple[dict, dict] = {}, {}
        for side, group in zip((self._mine.table, self._theirs.table), groups):
            pieces = [i for i, text in enumerate(side.bytes) if text is not None and i not in side.fallback]
            for i in pieces + sorted(side.fallback):
                group.setdefault((side.bytes[i], i in side.special), []).append(i)
        pairs = {i: j for key, ids in groups[0].items() for i, j in zip(ids, groups[1].get(key, []))}
        stop = self.student_stop[0]
        answer = self._theirs.stop_like(self._mine.table.bytes[stop])
        pairs = {i: j for i, j in pairs.items() if j != answer} | {stop: answer}
        mine, theirs = zip(*sorted(pairs.items()))
        return torch.tensor(mine, dtype=torch.int64), torch.tensor(theirs, dtype=torch.int64)

    def read(self, response: list[int], finished: bool, opened: bytes = b"") -> Reading | str:
        """The response in the teacher's tokens, or the reason why it cannot be read exactly.

        The stop token is an event of its own. So is a control token that both have; one that the teacher lacks is
        masked, and the teacher reads on as if it were not there. A response that was cut may end inside a word: its
        last chunk is masked, and an unfinished character is not read at all (a stop after one is not scored).
        opened: what ends the teacher's prompt and may be repeated by the response, such as b"<think>\\n"; it is
        masked and not read twice, with or without the white space at its end.
        """
        table, content = self._mine.table, response[:-1] if finished else response
        odd = [i for i in response if not 0 <= i < len(table.bytes) or table.bytes[i] is None]
        if odd:
            return f"id {odd[0]} is no token of the student's tokenizer"
        if finished and (not response or response[-1] not in self.student_stop):
            return "it is called finished, but does not end in a stop token"
        pieces, draft, cut = [table.bytes[i] for i in content], Draft(), False
        text = b"".join(pieces)
        repeated = next((len(head) for head in (opened, opened.rstrip()) if head and text.startswith(head)), 0)
        for start, end in runs(content, self._control):
            skip = min(repeated, sum(map(len, pieces[start:end])))
            repeated -= skip
            if content[start] in self._control:
                draft.add_event(None if skip else self._control[content[start]])
                continue
            keep, last = whole_tokens(pieces[start:end]), end == len(content)
            if keep is None or keep < end - start and not last:
                return "its bytes are not UTF-8"
            cut = last and (not finished or keep < end - start)
            ids = self._theirs.spell(b"".join(pieces[start:start + keep])[skip:])
            if isinstance(ids, str):
                return ids
            draft.add_text(pieces[start:end], keep, skip, ids, self, cut)
        if finished:
            draft.add_event(self._theirs.stop_like(table.bytes[response[-1]]), scored=not cut)
        return Reading(draft.ids, draft.student, draft.teacher, draft.cuts)

    def opened(self, prompt: list[int]) -> bytes:
        """A tag such as <think> with which the teacher's prompt ends (after its last control token), else
        nothing: the student may have written it itself."""
        table, tail = self._theirs.table, b""
        for token_id in reversed(prompt):
            if token_id in table.special or len(tail) > 64:
                break
            tail = table.bytes[token_id] + tail
        found = re.search(rb"<[A-Za-z_]+>\s*$", tail)
        return found[0] if found else b""

    def translate(self, ids: list[int], finished: bool) -> list[int] | None:
        """A text that the teacher wrote (finished: its stop id stands last) in the student's tokens, with the
        student's stop id; None if that is not possible to the byte."""
        known, out = self._theirs.table.bytes, []
        if any(not 0 <= i < len(known) or known[i] is None for i in ids):
            return None
        if finished and (not ids or ids[-1] not in self.teacher_stop):
            return None
        content = ids[:-1] if finished else ids
        for start, end in runs(content, self._control_back):
            if content[start] in self._control_back:
                spelled = [self._control_back[content[start]]]
            else:
                spelled = self._mine.spell(b"".join(known[i] for i in content[start:end]))
            if isinstance(spelled, str) or None in spelled:
                return None
            out += spelled
        return out + [self._mine.stop_like(known[ids[-1]])] if finished else out

    def starting_with(self, text: bytes) -> tuple[int, int]:
        """lo, hi: order[lo:hi] are the teacher's tokens that start with these bytes (at least one byte)."""
        above = text.rstrip(b"\xff")
        above = above[:-1] + bytes([above[-1] + 1]) if above else None     # the least text beyond all of them
        lo = bisect_left(self._sorted, text)
        return lo, bisect_left(self._sorted, above, lo) if above else len(self._sorted)

    def text(self, teacher_id: int) -> bytes:
        return self._theirs.table.bytes[teacher_id]


def runs(ids: list[int], control) -> list[tuple[int, int]]:
    """Bounds of the stretches of ordinary tokens; every control token is a stretch of its own."""
    edges = {edge for i, token_id in enumerate(ids) if token_id in control for edge in (i, i + 1)}
    return list(pairwise(sorted(edges | {0, len(ids)})))


class Draft:
    """A Reading as it grows, one stretch of the response after the other."""

    def __init__(self):
        self.ids, self.student, self.teacher, self.cuts, self.count = [], [], [], [], 0

    def add_event(self, teacher_id: int | None, scored: bool = True):
        """One control or stop token of the student, which the teacher may have too."""
        number = self.count if scored and teacher_id is not None else -1
        self.student.append(number)
        if teacher_id is not None:
            self.ids.append(teacher_id)
            self.teacher.append(number)
        self.count += number >= 0

    def add_text(self, pieces: list[bytes], keep: int, skip: int, ids: list[int], bridge: Bridge, cut: bool):
        """Student tokens, of which the teacher reads the first `keep` without their first `skip` bytes, as
        `ids`. cut: the text goes on where nobody sees it, so the teacher might have read its end otherwise."""
        ends = [end - skip for end in accumulate(map(len, pieces[:keep]))]
        lengths = [max(0, min(end, len(piece))) for end, piece in zip(ends, pieces)]
        texts = [bridge.text(token_id) for token_id in ids]
        their_ends = list(accumulate(map(len, texts)))
        mine, theirs = chunks(lengths, list(map(len, texts)))
        masked = {number for number, length, piece in zip(mine, lengths, pieces) if 0 < length < len(piece)}
        masked |= {mine[-1]} if cut and mine else set()
        first_i, first_j = len(self.student), len(self.ids)
        for i, (end, length) in enumerate(zip(ends, lengths)):
            scored = length > 0 and mine[i] not in masked      # a token of no bytes is nothing to score
            self.student.append(self.count + mine[i] if scored else -1)
            j = bisect_right(their_ends, end)
            before = their_ends[j] - len(texts[j]) if j < len(ids) else end
            if scored and before < end:
                self.cuts.append((first_i + i, first_j + j, *bridge.starting_with(texts[j][:end - before])))
        self.student += [-1] * (len(pieces) - keep)
        self.ids += ids
        self.teacher += [-1 if number in masked else self.count + number for number in theirs]
        self.count += 1 + max(theirs, default=-1)
