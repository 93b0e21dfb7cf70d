"""Align: one text, two tokenizers. Which tokens of the teacher answer for which tokens of the student.

Everything is counted in bytes of token ids, never in characters: a token may end inside a character, and
decoded strings hide it. A chunk is a shortest stretch of text on whose two ends both tokenizers agree. With equal
tokenizers every token is its own chunk.

    student   | Hel | lo | Ġwor | ld | 1 | 2 | <stop>
    teacher   | Hello    | Ġworld    | 12    | <stop>        four chunks; <stop> is an event, not text

What cannot be aligned exactly is masked or dropped with a reason. Chunks: Niu et al. 2026, arXiv:2606.09456.

Not here: log-probs, and how a chunk's are shared out (chunk_credit.py); who scores (crossing.py); tokenizers
that do not give back the bytes they read (WordPiece, nmt_nfkc): UserError.
"""
import re
from bisect import bisect_left, bisect_right
from codecs import getincrementaldecoder
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

from extras.cross_tokenizer.token_bytes import TokenBytes, byte_table, rebuilt_raw, supported, whitespace_tokens
from support.tokenizer import Tokenizer


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


def by_bytes(table: TokenBytes, special: bool) -> tuple[dict[bytes, int], dict[bytes, list[int]]]:
    """(the first id of every text, the later ones of those that have several), of control tokens or of the others."""
    first: dict[bytes, int] = {}
    more: dict[bytes, list[int]] = {}
    stand_ins, skipped = table.fallback - table.special, table.fallback | table.special
    ordinary = [i for i in range(len(table.bytes)) if i not in skipped] + sorted(stand_ins)
    for i in sorted(table.special) if special else ordinary:
        text = table.bytes[i]
        if text is not None and first.setdefault(text, i) != i:
            more.setdefault(text, []).append(i)
    return first, more


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
        self._mine, self._theirs = (
            Side(byte_table(side.backend, spec), rebuilt_raw(side.backend, spec), tuple(side.stop_ids))
            for side in (student, teacher) for spec in [supported(side)])
        self.student_stop, self.teacher_stop = self._mine.stop, self._theirs.stop
        mine, theirs = self._mine.table, self._theirs.table
        self._control, self._control_back = same_control(mine, theirs), same_control(theirs, mine)
        order = sorted((i for i, text in enumerate(theirs.bytes) if text and i not in theirs.special),
                       key=theirs.bytes.__getitem__)
        self._sorted = [theirs.bytes[i] for i in order]
        self.order = torch.tensor(order, dtype=torch.int64)
        self.shared = self._shared_ids()
        self.whitespace = whitespace_tokens(mine)

    def _shared_ids(self) -> tuple[Tensor, Tensor]:
        """Ids of equal bytes are paired in order, pieces before the byte tokens that stand in for them."""
        pairs: dict[int, int] = {}
        for special in (False, True):
            (mine, more), (theirs, others) = (by_bytes(table, special)
                                              for table in (self._mine.table, self._theirs.table))
            pairs |= {i: theirs[text] for text, i in mine.items() if text in theirs}
            for text in more.keys() & others.keys():
                pairs |= dict(zip(more[text], others[text]))
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
