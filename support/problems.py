"""Problems: files of them as people have them, read into one shape.

A file holds JSON objects, one per line or all in one array, or is parquet (records.py). Which format a record has, the
first row of this table that fits decides. `Problem` is read as `problem`, and a key whose value is null as absent.

    format     known by                          prompt                          the record's own reply
    verl       prompt, reward_model {...}        prompt                          extra_info.solution, .answer if worked
    TRL        prompt, completion                prompt                          completion
    plain      one of PROMPT_FIELDS              the first of them               response
    ShareGPT   conversations                     its turns, after `system`       -
    Alpaca     instruction                       instruction, blank line, input  output

A prompt is text or a chat; of a chat that ends with the assistant, that turn is the reply (unless the record has one
of its own). A message is {role, content} or {from, value}; content may be a list of parts, all of them text.

    answer     reward_model.ground_truth (verl), `answer`, `final_answer`, the answer that `solution` marks, `label`,
               `ground_truth`, a `solution` of one line, the answer that the reply marks: the first that is text or a
               number. Of a list, each item counts as right, also where verl's ground_truth is a list written as text.
    solution   `solution`, else the reply, else an `answer` that is worked out.

Marked is what stands in the last \\boxed{}, else after #### on the last line, as in GSM8K.
"""
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Number
from pathlib import Path
from typing import NamedTuple

from support.errors import UserError, one_line, shown
from support.records import records
from support.verifier import extract

PROMPT_FIELDS = ("prompt", "messages", "problem", "question", "query")
ANSWER_FIELDS = ("answer", "final_answer", "solution", "label", "ground_truth", "reward_model.ground_truth")
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant",
         "system": "system", "tool": "tool"}       # ShareGPT's `from` -> the role that chat templates know


@dataclass(frozen=True)
class Problem:
    prompt: str | list[dict]    # text, or messages {"role", "content"} that do not end with the assistant
    answer: str | tuple[str, ...] | None    # what verifier.grade compares with; of several, any is right
    solution: str | None        # reference solution in full, where the record has one
    fields: dict                # the record as read
    place: str                  # in its file: `line 3`, from 1; in a parquet file `row 3`


def load_problems(path: str | Path, *, need_answer: bool = False, limit: int | None = None) -> list[Problem]:
    """The first `limit` problems of a file, as the table above reads them. UserError names file and place."""
    problems: list[Problem] = []
    if limit is not None and limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}")
    if not os.path.isfile(path):        # opening a pipe would wait for somebody to write into it
        there = os.path.exists(path)
        raise UserError(f"{shown(path)} is a folder, a pipe or a device; name a file of problems" if there else
                        f"{shown(path)}: no such file")
    try:
        for place, record in records(Path(path)):
            try:
                problems.append(as_problem(record, place))
            except UserError as error:
                raise UserError(f"{shown(path)}, {place}: {error}") from None
            if need_answer and problems[-1].answer is None:
                raise UserError(f"{shown(path)}, {place}: no answer, text or a number, in any of "
                                f"{', '.join(ANSWER_FIELDS)}")
            if len(problems) == limit:
                break
    except OSError as error:
        raise UserError(f"{shown(path)} cannot be read ({one_line(error.strerror or error)})") from error
    if not problems:
        raise UserError(f"{shown(path)}: no problems in this file")
    return problems


def answered(path: str | Path, problems: list[Problem]) -> bool:
    """Can responses to these problems be graded? UserError when only some of them have an answer."""
    without = next((p for p in problems if p.answer is None), None)
    having = next((p for p in problems if p.answer is not None), None)
    if without and having:
        raise UserError(f"{shown(path)}: {having.place} has an answer and {without.place} has none; give all "
                        f"problems an answer, or none, to compare the student with its teacher instead")
    return without is None


class Taken(NamedTuple):
    """What a format finds in a record."""
    field: str              # where the prompt comes from, for messages
    prompt: object
    reply: str = ""         # how the record itself answers
    answer: object = None   # an answer that goes before all others


def verl(r: dict) -> Taken:
    truth, info = r["reward_model"].get("ground_truth"), r.get("extra_info")
    if isinstance(truth, str) and truth.lstrip().startswith("["):       # Skywork: '["34"]'; [1, 2] is an answer itself
        try:
            found = json.loads(truth)
            truth = found if all(isinstance(item, str) for item in found) else truth
        except (ValueError, RecursionError):
            pass
    info = info if isinstance(info, dict) else {}
    worked = first_text(info.get("answer"))
    return Taken("prompt", r["prompt"], first_text(info.get("solution")) or worked * bool(marked(worked)), truth)


def trl(r: dict) -> Taken:
    reply = r["completion"]
    if isinstance(reply, list):
        reply = "".join(turn["content"] for turn in chat("completion", reply) if turn["role"] == "assistant")
    return Taken("prompt", r["prompt"], first_text(reply))


def plain(r: dict) -> Taken:
    field = next(name for name in PROMPT_FIELDS if name in r)
    return Taken(field, r[field], first_text(r.get("response")))


def sharegpt(r: dict) -> Taken:
    return Taken("conversations", with_system(r, r["conversations"]))


def alpaca(r: dict) -> Taken:
    parts = [r["instruction"], r.get("input", "")]
    if not all(isinstance(part, str) for part in parts):
        raise UserError("`instruction` and `input` must be text")
    prompt = "\n\n".join(part for part in parts if part.strip())
    if prompt and r.get("system"):
        prompt = with_system(r, [{"role": "user", "content": prompt}])
    return Taken("instruction", prompt, first_text(r.get("output")))


def with_system(r: dict, turns: object) -> object:
    if not (r.get("system") and isinstance(r["system"], str) and isinstance(turns, list)):
        return turns
    return [{"role": "system", "content": r["system"]}, *turns]


FORMATS: list[tuple[Callable[[dict], bool], Callable[[dict], Taken]]] = [      # known by, read by; the first that fits
    (lambda r: "prompt" in r and isinstance(r.get("reward_model"), dict), verl),
    (lambda r: "prompt" in r and "completion" in r, trl),
    (lambda r: any(name in r for name in PROMPT_FIELDS), plain),
    (lambda r: "conversations" in r, sharegpt),
    (lambda r: "instruction" in r, alpaca),
]


def checked_prompts(problems: list[Problem], tokenizer, max_new_tokens: int, context: int,
                    graded: bool) -> list[list[int]]:
    """The ids of each prompt. UserError names the problem that cannot be asked, or not be graded."""
    if not problems:
        raise UserError("there are no problems to evaluate on")
    prompts = []
    for problem in problems:        # one by one: a template may make each prompt large, and the first says so
        ids = tokenizer.prompt_ids(problem.prompt)
        if not ids:
            raise UserError(f"the prompt on {problem.place} has no tokens, and a model needs one (the bos token, say)")
        if len(ids) + max_new_tokens > context:
            raise UserError(f"the prompt on {problem.place} has {len(ids)} tokens; with max_new_tokens "
                            f"{max_new_tokens} it does not fit the model's context of {context}")
        if graded and problem.answer is None:
            raise UserError(f"the problem on {problem.place} has no answer to grade against")
        prompts.append(ids)
    return prompts


def as_problem(record: object, place: str) -> Problem:
    if not isinstance(record, dict):
        raise UserError(f"expected a JSON object, found a {type(record).__name__}")
    r = {name: value for name, value in record.items() if value is not None}
    r = {**{name.lower(): value for name, value in reversed(r.items()) if name[:1].isupper()}, **r}
    reader = next((read for fits, read in FORMATS if fits(r)), None)
    if reader is None:
        raise UserError(f"no prompt; one of {', '.join(PROMPT_FIELDS)}, conversations, instruction is needed")
    taken = reader(r)
    prompt, last = question(taken.field, taken.prompt)
    reply, worked, own = taken.reply or last, first_text(r.get("solution")), first_text(r.get("answer"))
    answers = (accepted(taken.answer) or accepted(r.get("answer")) or accepted(r.get("final_answer"))
               or accepted(marked(worked)) or accepted(r.get("label")) or accepted(r.get("ground_truth"))
               or accepted(worked if "\n" not in worked else None) or accepted(marked(reply)))
    solution = worked or reply or (own if marked(own) else "")
    texts = [prompt] if isinstance(prompt, str) else [turn["content"] for turn in prompt]
    try:
        "".join([*texts, *answers, solution]).encode()
    except UnicodeEncodeError:
        raise UserError("a text holds half a character (a lone surrogate), which no tokenizer can read") from None
    return Problem(prompt, answers if len(answers) > 1 else answers[0] if answers else None, solution or None, record,
                   place)


def question(field: str, value: object) -> tuple[str | list[dict], str]:
    """(the prompt, the assistant's turn that follows it)."""
    if not isinstance(value, (str, list)):
        raise UserError(f"`{field}` must be text or a list of messages, not {type(value).__name__}")
    reply = ""
    if isinstance(value, list):
        value = chat(field, value)
        if value and value[-1]["role"] == "assistant":
            value, reply = value[:-1], value[-1]["content"]
    if not value:
        raise UserError(f"`{field}` is empty")
    return value, reply


def chat(field: str, turns: list) -> list[dict]:
    """Messages with `role` and `content`, both text."""
    out = []
    for turn in turns:
        turn = dict(turn) if isinstance(turn, dict) else {}
        if "from" in turn and "value" in turn and "role" not in turn:
            speaker, value = str(turn.pop("from")), turn.pop("value")
            if speaker.lower() not in ROLES:
                raise UserError(f"a turn of `{field}` is from {shown(repr(speaker), 60)}; known are {', '.join(ROLES)}")
            turn |= {"role": ROLES[speaker.lower()], "content": value}
        content = turn.get("content")
        if isinstance(content, list):
            other = [part for part in content if not (isinstance(part, dict) and isinstance(part.get("text"), str))]
            if other:
                kind = other[0].get("type") if isinstance(other[0], dict) else other[0]
                raise UserError(f"a message of `{field}` has a part that is not text ({shown(kind, 60)}); only "
                                f"text is read")
            turn["content"] = "".join(part["text"] for part in content)
        if not (type(turn.get("role")) is type(turn.get("content")) is str):
            raise UserError(f"a message of `{field}` needs `role` and `content`, both text")
        out.append(turn)
    return out


def accepted(value: object) -> tuple[str, ...]:
    """The answers that a field holds, what they mark instead of their text; none where there is no text or number."""
    found = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, float) and not math.isfinite(item):
            raise UserError(f"an answer is {item}, which is no number")
        if isinstance(item, (str, Number)) and (text := str(item).strip()):
            found.append(marked(text) or text)
    return tuple(dict.fromkeys(found))


def first_text(value: object) -> str:
    texts = value if isinstance(value, list) else [value]
    return next((str(item).strip() for item in texts if isinstance(item, (str, Number))), "")


def marked(text: str) -> str:
    """The answer that a worked solution marks, "" if it marks none. Further up, #### is a heading."""
    return extract(text, "boxed") or extract(text.strip().rpartition("\n")[2], "hash") or ""
