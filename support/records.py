"""Records: what stands in a file of problems, one record after the other, whatever its layout.

JSON lines, one JSON array, or parquet: the first bytes say which, not the name. A file is read piece by piece, and
every record is bounded, so no file can fill the memory before it is refused.
"""
import json
import re
import shlex
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path

from support.errors import UserError, finite, one_line, shown

DECODER = json.JSONDecoder(parse_float=finite, parse_constant=finite)
WHITE = re.compile(r"[ \t\r\n]*")
MOST_BLANK = 10**6  # blank lines, after which a file is taken for something else
LONGEST = 2**24     # bytes of one record. Parsed, the worst text of this length takes half a GB


def records(path: Path) -> Iterator[tuple[str, object]]:
    """(`line 3` or `row 3`, what stands there) of every record. The first bytes say what the file is, whatever its
    name."""
    with open(path, "rb") as file:
        head = file.read(4096)
        file.seek(0)
        if head.startswith(b"PAR1"):
            yield from parquet(path)
        elif head.startswith((b"\x1f\x8b", b"PK\3\4", b"\x28\xb5\x2f\xfd")):
            raise UserError(f"{shown(path)} is compressed; unpack it first")
        elif head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            yield from array(path, file)
        else:
            yield from lines(path, file)


def lines(path: Path, file) -> Iterator[tuple[str, object]]:
    """JSON lines; blank ones are skipped. As bytes only \\n ends a line; str.splitlines() also cuts at U+2028."""
    blank = 0
    for line, raw in enumerate(iter(lambda: file.readline(LONGEST + 1), b""), 1):
        if len(raw) > LONGEST:
            raise UserError(f"{shown(path)}, line {line} is longer than {LONGEST >> 20} MiB; a problem is one line")
        try:
            text = raw.decode("utf-8-sig" if line == 1 else "utf-8").strip()
            record = DECODER.decode(text) if text else None
        except (ValueError, RecursionError) as error:       # no JSON, no utf-8, or an endless integer
            reason = shown(one_line(getattr(error, "msg", error)))
            raise UserError(f"{shown(path)}, line {line}: not valid JSON ({reason})") from None
        blank += not text
        if blank >= MOST_BLANK:
            raise UserError(f"{shown(path)}, line {line} is blank, like {blank - 1:,} others; is it the right file?")
        if text:
            yield f"line {line}", record


def array(path: Path, file) -> Iterator[tuple[str, object]]:
    """The objects of one JSON array. No more of the file is held than the object at hand, twice over."""
    stream = Stream(path, file)
    stream.take("[", "[")
    if stream.peek() != "]":
        yield stream.item()
        while stream.peek() != "]":
            stream.take(",", ", or ] after an object")
            yield stream.item()
    stream.take("]", "]")
    if stream.peek():
        raise stream.wrong("text after the array")


class Stream:
    """A text that is read on as it is needed."""

    def __init__(self, path: Path, file):
        self.path, self.file = path, TextIOWrapper(file, encoding="utf-8-sig", newline="")
        self.text, self.at, self.line = "", 0, 1

    def more(self, size: int) -> bool:
        """Read on; False at the end of the file."""
        try:
            added = self.file.read(size)
        except ValueError as error:
            raise self.wrong(error, " or later") from None
        self.text, self.at = self.text[self.at:] + added, 0
        return bool(added)

    def peek(self) -> str:
        """The next character that is no white space; "" at the end."""
        while True:
            end = WHITE.match(self.text, self.at).end()
            self.line, self.at = self.line + self.text.count("\n", self.at, end), end
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more(2**16):
                return ""

    def take(self, character: str, expected: str) -> None:
        if self.peek() != character:
            raise self.wrong(f"expected {expected}, found {shown(repr(self.text[self.at:self.at + 20]))}")
        self.at += 1

    def item(self) -> tuple[str, object]:
        if self.peek() != "{":
            raise self.wrong(f"expected a JSON object, found {shown(repr(self.text[self.at:self.at + 20]))}")
        while True:
            try:
                record, end = DECODER.raw_decode(self.text, self.at)
                break
            except (ValueError, RecursionError) as error:
                size, place = len(self.text) - self.at, getattr(error, "pos", 0)
                # at the end of what has been read an object breaks off; anywhere else it is broken
                cut = place > len(self.text) - 16 or str(error).startswith("Unterminated")
                if cut and size <= LONGEST and self.more(max(size, 2**16)):
                    continue
                self.line += self.text.count("\n", self.at, place)
                reason = f"an object of more than {LONGEST >> 20} MiB" if cut and size > LONGEST else error
                raise self.wrong(getattr(reason, "msg", reason)) from None
        found = f"line {self.line}", record
        self.line, self.at = self.line + self.text.count("\n", self.at, end), end
        return found

    def wrong(self, reason, later: str = "") -> UserError:
        return UserError(f"{shown(self.path)}, line {self.line}{later}: not valid JSON ({shown(one_line(reason))})")


def parquet(path: Path) -> Iterator[tuple[str, object]]:
    """The rows of a parquet file, by pyarrow."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        code = (f"import pandas; pandas.read_parquet({str(path)!r}).to_json({str(path.with_suffix('.jsonl'))!r}, "
                f"orient='records', lines=True)")
        raise UserError(f"{shown(path)} is a parquet file and pyarrow is not installed: pip install pyarrow, or "
                        f"convert the file where pandas is: python -c {shlex.quote(code)}") from None
    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=256):
            for row, record in enumerate(batch.to_pylist(), row + 1):
                yield f"row {row}", record
    except pyarrow.ArrowException as error:
        reason = shown(one_line(error))
        raise UserError(f"{shown(path)}: not a whole parquet file (after row {row}: {reason})") from error
