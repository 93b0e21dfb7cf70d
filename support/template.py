"""Chat templates: where a checkpoint keeps its own, what it gets to see, and how it is rendered under limits.

Text equals that of transformers 5 (apply_chat_template) on the same folder. A chat template is a program by a
stranger: it sees plain JSON data, inside jinja2's immutable sandbox, inside a process of its own
(template_worker.py) whose time, memory and output are limited here.

Not here: further named templates (tool_use, rag).
"""
import atexit
import importlib.util
import json
import os
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

from support.errors import UserError, one_line, shown
from support.files import checkpoint_file

SECONDS = 5             # of compiling or rendering once; published templates take less than 0.01
OUTPUT = 4 * 10**6      # bytes of one prompt: a million tokens of English; tokenizers take up to 0.8 GB for it
MEMORY = 2**30          # bytes of address space of the process; published templates need a twentieth
SOURCE = 2**20          # bytes of a template; published ones have less than 30,000
START_SECONDS = 60      # until the process answers at all: Python may lie on a slow network disk
TEMPLATES = 32          # that one process keeps before another takes its place, lest memory adds up
REASONING = ("reasoning_content", "thinking", "reasoning")      # where data sets keep a message's reasoning
OTHER_TEMPLATE = "give another chat template (the path of a .jinja file)"
LIMITS = {"time": f"takes more than {SECONDS} s", "memory": f"needs more than {MEMORY / 2**30:g} GB of memory",
          "output": f"writes more than {OUTPUT / 10**6:g} MB"}


# ------------------------------------------------------------------------------------------- the process


class Stopped(Exception):
    """The process gave no answer, and is gone; the message says why, as LIMITS does."""


class Worker:
    """One process that compiles and renders. It holds no state that matters, so it is killed without regret."""

    def __init__(self):
        folders = []
        for package in ("jinja2", "markupsafe"):
            found = importlib.util.find_spec(package)
            if found is None:
                raise UserError(f"{package}, which chat templates need, is not installed: pip install {package}")
            folders.append(str(Path(found.origin).parents[1]))
        given = dict(seconds=SECONDS, output=OUTPUT, memory=MEMORY, folders=list(dict.fromkeys(folders)))
        try:        # -I -S: no variable of the environment and no .pth file changes what this Python imports
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(Path(__file__).with_name("template_worker.py")), json.dumps(given)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0)
        except (OSError, ValueError) as error:
            raise UserError(start_failed(one_line(error))) from error
        self.numbers: dict[str, int] = {}       # template -> its number in the process
        os.set_blocking(self.process.stdin.fileno(), False)
        try:
            self.read(time.monotonic() + START_SECONDS)
        except Stopped as error:
            words = self.process.stderr.read(10_000).decode(errors="replace").strip().splitlines()
            raise UserError(start_failed(words[-1] if words else one_line(error))) from error
        finally:
            self.process.stderr.close()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()

    def ask(self, request: dict) -> dict:
        """The answer to one request. Stopped: there is none within the limits."""
        until = time.monotonic() + SECONDS
        try:
            rest = memoryview(json.dumps(request).encode() + b"\n")
            while rest:
                self.wait(self.process.stdin, select.POLLOUT, until)
                rest = rest[os.write(self.process.stdin.fileno(), rest):]
        except BrokenPipeError:     # it died; read says of what
            pass
        except BaseException:       # half a request is written: the next one would be misread
            self.stop()
            raise
        return self.read(until)

    def read(self, until: float) -> dict:
        line = bytearray()
        try:
            while not line.endswith(b"\n"):
                self.wait(self.process.stdout, select.POLLIN, until)
                part = os.read(self.process.stdout.fileno(), 2**16)
                if not part:
                    raise Stopped(f"ends the Python that renders it ({exit_text(self.process.wait())})")
                line += part
                if len(line) > 6 * OUTPUT + 10**4:      # JSON writes a control character in six bytes
                    raise Stopped(LIMITS["output"])
            return json.loads(line)
        except BaseException:       # half an answer is read: the next one would be misread
            self.stop()
            raise

    def wait(self, pipe, event: int, until: float) -> None:
        poll = select.poll()
        poll.register(pipe, event)
        if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
            raise Stopped(LIMITS["time"])


def start_failed(why: str) -> str:
    return (f"the Python process that renders chat templates could not be started ({shown(why)}); mend that, or use "
            f"the chat template 'plain'")


def exit_text(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"


class Workers:
    """The one worker of this process: started by the first template, replaced when it is gone."""
    current: Worker | None = None
    lock = threading.Lock()

    @classmethod
    def ask(cls, source: str, request: dict | None = None) -> dict:
        """Compiles the template unless the worker has it, then asks. An answer without `problem`, or one that
        describes the problem."""
        with cls.lock:
            worker = cls.current
            if worker is not None and (worker.process.poll() is not None or len(worker.numbers) >= TEMPLATES):
                cls.end()
            worker = cls.current = cls.current or Worker()
            try:
                if source not in worker.numbers:
                    found = worker.ask({"compile": source})
                    if "problem" in found:
                        return found
                    worker.numbers[source] = found["number"]
                return worker.ask({"number": worker.numbers[source], **request}) if request else {}
            except Stopped as error:
                cls.end()
                return {"problem": "limit", "why": str(error)}

    @classmethod
    def end(cls) -> None:
        worker, cls.current = cls.current, None
        if worker is not None:
            worker.stop()

    @classmethod
    def forget(cls) -> None:
        """In a forked child: the worker stays the parent's. Its pipes are closed here, else it would outlive it."""
        worker, cls.current, cls.lock = cls.current, None, threading.Lock()
        if worker is not None:
            worker.process.stdin.close()
            worker.process.stdout.close()
            worker.process.returncode = 0       # keeps Popen from asking after a process that is not its child


atexit.register(Workers.end)
os.register_at_fork(after_in_child=Workers.forget)


# ------------------------------------------------------------------------------------------ the template


class Template:
    """A chat template; `origin` names its file in every UserError."""

    def __init__(self, source: str, origin: str):
        self.source, self.origin = source, origin
        found = Workers.ask(source)
        if "problem" in found:
            raise UserError(self.sentence(found, " to compile"))

    def render(self, variables: dict, messages: list[dict], add_generation_prompt: bool, now: datetime) -> str:
        found = Workers.ask(self.source, dict(variables=variables, messages=messages, now=now.isoformat(),
                                              add_generation_prompt=add_generation_prompt))
        if "problem" in found:
            raise UserError(self.sentence(found, " on this prompt"))
        return found["text"]

    def sentence(self, found: dict, when: str) -> str:
        kind, why = found["problem"], shown(found.get("why", ""), 1000)
        if kind in LIMITS or kind == "limit":
            return f"{self.origin} {LIMITS.get(kind, why)}{when}; correct it or {OTHER_TEMPLATE}"
        if kind == "surrogate":
            return (f"{self.origin} writes half of a character (a lone surrogate) in {why}; correct the messages or "
                    f"{OTHER_TEMPLATE}")
        if kind == "refused":
            return f"{self.origin} refuses this prompt: {why}"
        if when == " to compile":
            line = f", line {found['line']}" if found["line"] else ""
            return f"{self.origin}{line}: {why}; correct it or {OTHER_TEMPLATE}"
        did = "reaches for Python internals or alters its input" if kind == "sandbox" else "fails on this prompt"
        return f"{self.origin} {did} ({found['class']}: {why}); correct the messages or {OTHER_TEMPLATE}"


def read_template(path: Path) -> str:
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or found.st_size > SOURCE:
            raise UserError(f"{shown(path)} is no file of at most {SOURCE} bytes, so no chat template; "
                            f"{OTHER_TEMPLATE}")
        return path.read_text(encoding="utf-8")
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{shown(path)} cannot be read ({shown(one_line(error))}); {OTHER_TEMPLATE}") from error


def find_template(folder: Path, config: dict, choice: str) -> tuple[str | None, str]:
    """(template, or None for plain text; where it is written). `choice` as Tokenizer's chat_template."""
    if choice == "plain":
        return None, ""
    if choice != "auto" and Path(choice).suffix != ".jinja":
        raise UserError(f"chat_template {shown(repr(choice))} must be 'auto', 'plain' or the path of a .jinja file")
    path = Path(choice) if choice != "auto" else checkpoint_file(folder, "chat_template.jinja", optional=True)
    if path is not None:
        return read_template(path), shown(path)
    origin = f"chat_template in {shown(folder / 'tokenizer_config.json')}"
    found = config.get("chat_template")
    if isinstance(found, list):
        named = [entry for entry in found if isinstance(entry, dict) and entry.get("name") == "default"]
        found = named[-1].get("template") if named else found
    if found is not None and not isinstance(found, str):
        raise UserError(f"{origin} is neither a text nor a list with a text named default; {OTHER_TEMPLATE}")
    if found and len(found) > SOURCE:
        raise UserError(f"{origin} has more than {SOURCE} characters; {OTHER_TEMPLATE}")
    return found, origin


# ------------------------------------------------------------------------------------------ what it sees


def plain_data(value, what: str):
    """A copy made of JSON types, since other objects have methods that the sandbox cannot judge."""
    try:
        return json.loads(json.dumps(value, ensure_ascii=False).encode())   # encode() finds lone surrogates
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{what} must be plain JSON data: {shown(one_line(error))}") from error


def checked_messages(messages) -> list[dict]:
    """A copy as transformers hands it to the template: keys whose value is None are gone (a template would
    print the word None), and a reasoning is found under every name that templates read."""
    if not isinstance(messages, list) or not messages:
        raise UserError(f"a chat prompt must be a non-empty list of messages, not {shown(one_line(messages), 80)}")
    checked = []
    for number, message in enumerate(plain_data(messages, "a chat prompt"), start=1):
        message = {k: v for k, v in message.items() if v is not None} if isinstance(message, dict) else {}
        content = message.get("content", "" if "tool_calls" in message else None)
        if not isinstance(message.get("role"), str) or not isinstance(content, (str, list)):
            raise UserError(f'message {number} of a prompt needs a text "role" and a "content" (text or a'
                            f" list of parts), not {shown(one_line(messages[number - 1]), 80)}")
        reasoning = next((message[key] for key in REASONING if key in message), None)
        if reasoning is not None:
            message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
        checked.append(message)
    return checked
