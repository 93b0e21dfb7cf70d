"""Errors: wrong input is said in one sentence, and JSON files are read in one way."""
import json
import math
import stat
from pathlib import Path

DEEPEST = 100       # levels of a JSON file


class UserError(ValueError):
    """Wrong input, said in one sentence: what is wrong, where, and what to do."""


class NotFinite(UserError):
    """Numbers of a model went bad; the sentence names the model."""


def one_line(thing) -> str:
    return " ".join(str(thing).split()) or type(thing).__name__


def shown(value, most: int = 300) -> str:
    """A value, a name or a path as it may stand in a sentence: text as it is, anything else as JSON would be read;
    control characters and bytes that are no UTF-8 escaped, the middle of a long one left out."""
    try:
        text = str(value) if isinstance(value, (str, Path)) else repr(value)
    except ValueError:              # an integer with more digits than Python likes to print
        text = "a number of thousands of digits"
    if len(text) > most:
        text = f"{text[:most * 2 // 3]} ... {text[-most // 6:]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def read_json(path: Path, optional: bool = False, most: int = 2**25) -> dict:
    """The object in a JSON file of at most `most` bytes; {} for a missing `optional` one. UserError names the file and
    the line. NaN and infinity are refused: they are no JSON, and other readers of what is saved would stumble."""
    path = Path(path)
    try:
        if optional and not path.exists():
            return {}
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):     # to open a pipe would wait for ever
            raise UserError(f"{shown(path)} is a folder, a pipe or a device, not a file; remove or rename it")
        if found.st_size > most:
            raise UserError(f"{shown(path)} holds {found.st_size} bytes, more than the {most} that are read; is it the "
                            f"right file?")
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=finite, parse_float=finite)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read ({error.strerror}); is the folder complete?") from error
    except (ValueError, RecursionError) as error:   # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{shown(path)} is not JSON ({shown(one_line(error))}); download or write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{shown(path)} holds a JSON {type(value).__name__}, not an object; download it again")
    level = [value]
    for _ in range(DEEPEST):        # what is nested deeper can be read, but perhaps not be written again
        level = [inner for outer in level for inner in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(inner, (dict, list))]
    if level:
        raise UserError(f"{shown(path)} is nested more than {DEEPEST} deep; is it the right file?")
    return value


def finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is no number of JSON")
    return number
