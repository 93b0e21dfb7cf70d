"""Template worker: the process in which chat templates are compiled and rendered; support/template.py starts it.

A chat template is a program by a stranger. jinja2's immutable sandbox keeps it away from Python and from files, but
lets it take all time and all memory; and jinja2 computes constant expressions while it compiles. So both happen here,
under limits. Requests come on stdin and answers go to stdout, one JSON object a line:

    {"compile": text}                                   {"number": 0}
    {"number": 0, "now": when, "messages": [...], ...}  {"text": the prompt}
    what went wrong with either                         {"problem": kind, "class": name, "why": words, "line": number}

`kind` is memory, output, surrogate, refused (the template itself said no), sandbox or failed.

This file imports nothing of this project: it runs in a Python without site-packages, which is told on its command
line where jinja2 lies. Settings, filters and helpers are those of transformers 5.
"""
import json
import os
import resource
import signal
import sys
from datetime import datetime

GIVEN = json.loads(sys.argv[1])     # seconds, output, memory: the limits; folders: where to find jinja2
sys.path.extend(GIVEN["folders"])
import jinja2  # noqa: E402
from jinja2 import nodes  # noqa: E402
from jinja2.exceptions import SecurityError  # noqa: E402
from jinja2.ext import Extension  # noqa: E402
from jinja2.sandbox import ImmutableSandboxedEnvironment  # noqa: E402

MOST_WORDS = 1000       # characters of an error's message


class GenerationTag(Extension):
    """`{% generation %}` ... `{% endgeneration %}` marks the assistant's words; here it only renders them."""
    tags = {"generation"}

    def parse(self, parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class Namespace(jinja2.utils.Namespace):
    """namespace() of a template. jinja2 looks `__call__` up in it, so underscore names open the sandbox."""

    def __init__(self, /, *args, **kwargs):
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name, value):
        if str(name).startswith("_"):
            raise SecurityError(f"namespace attribute {name!r} begins with an underscore")
        super().__setitem__(name, value)


class Refused(Exception):
    """A template says that it cannot express the messages."""


class TooLong(Exception):
    """A template writes more than it may."""


PROBLEMS = {"refused": Refused, "sandbox": SecurityError}


def raise_exception(message) -> None:
    raise Refused(message)


def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """Filter tojson. jinja2's own escapes < > & ' for HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


class Clock:
    """What strftime_now shows: the moment that came with the request, so that a run can keep its date."""
    now = datetime.min


def compile_template(text: str) -> jinja2.Template:
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                        extensions=[GenerationTag, "jinja2.ext.loopcontrols"])
    env.filters["tojson"] = to_json
    env.globals.update(raise_exception=raise_exception, namespace=Namespace,
                       strftime_now=lambda layout: Clock.now.strftime(layout))
    return env.from_string(text)


def render(template: jinja2.Template, variables: dict, messages: list, add_generation_prompt: bool) -> str:
    pieces, size = [], 0
    for piece in template.generate(**variables, messages=messages, add_generation_prompt=add_generation_prompt):
        size += len(piece)
        if size > GIVEN["output"]:
            raise TooLong
        pieces.append(piece)
    return "".join(pieces)


def answer(line: bytes, templates: list[jinja2.Template]) -> dict:
    try:
        request = json.loads(line)
        if "compile" in request:
            templates.append(compile_template(request["compile"]))
            return {"number": len(templates) - 1}
        Clock.now = datetime.fromisoformat(request["now"])
        text = render(templates[request["number"]], request["variables"], request["messages"],
                      request["add_generation_prompt"])
    except MemoryError:
        return {"problem": "memory"}
    except TooLong:
        return {"problem": "output"}
    except Exception as error:      # a template can fail in every way a program can
        kind = next((kind for kind, classes in PROBLEMS.items() if isinstance(error, classes)), "failed")
        words = " ".join(str(error)[:100 * MOST_WORDS].split()) or type(error).__name__
        line_number = error.lineno if isinstance(error, jinja2.TemplateSyntaxError) else None
        return {"problem": kind, "class": type(error).__name__, "why": words[:MOST_WORDS], "line": line_number}
    try:
        return {"text": text} if len(text.encode()) <= GIVEN["output"] else {"problem": "output"}
    except UnicodeEncodeError as error:
        return {"problem": "surrogate", "why": repr(text[max(0, error.start - 20):error.start + 20])}


def limit_this_process() -> None:
    """Memory and core files through the kernel, where it has such limits. The alarm of main ends this process also
    when the one that started it is gone; ctrl-C and a scheduler's SIGTERM are for that one to decide about."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for kind, most in ((resource.RLIMIT_AS, GIVEN["memory"]), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        try:
            resource.setrlimit(kind, (most, most))
        except (ValueError, OSError):       # macOS has no limit of this kind
            pass


def main() -> None:
    limit_this_process()
    templates: list[jinja2.Template] = []
    said: dict = {"ready": True}
    while True:
        sys.stdout.buffer.write(json.dumps(said, ensure_ascii="text" not in said).encode() + b"\n")
        sys.stdout.buffer.flush()
        signal.setitimer(signal.ITIMER_REAL, 0)
        line = sys.stdin.buffer.readline()
        if not line:
            os._exit(0)     # at once: nothing here is worth the second that Python may take to end
        signal.setitimer(signal.ITIMER_REAL, GIVEN["seconds"] + 1)
        try:
            said = answer(line, templates)
        except MemoryError:     # even its handling needed some
            said = {"problem": "memory"}


main()
