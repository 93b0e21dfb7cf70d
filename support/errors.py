"""Errors: wrong input is said in one sentence, and JSON files are read in one way."""
import json
from pathlib import Path


class UserError(ValueError):
    """Wrong input, said in one sentence: what is wrong, where, and what to do."""


def one_line(thing) -> str:
    return " ".join(str(thing).split()) or type(thing).__name__


def read_json(path: Path, optional: bool = False) -> dict:
    """The object in a JSON file; {} for a missing `optional` one. UserError names the file and the line."""
    if optional and not Path(path).exists():
        return {}
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); is the folder complete?") from error
    except (ValueError, RecursionError) as error:   # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise UserError(f"{path} is not JSON ({one_line(error)}); download or write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}, not an object; download it again")
    return value
