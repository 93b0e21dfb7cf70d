"""support/template.py: a stranger's chat template can take neither the time nor the memory of the process that
trains, and the process in which it runs leaves nothing behind.

Limits are made small here, so that a test takes a second; the loops and products would take hours and terabytes.
"""
import json
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from support import template as file  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.template import Stopped, Template, Worker, Workers  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402

NOW = datetime(2031, 5, 1, 12, 30)
LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
COUNT = "{% for a in range(messages[0].content | int) %}{% for b in range(99999) %}{% endfor %}{% endfor %}done"


@pytest.fixture(autouse=True)
def small_limits(monkeypatch):
    """A fresh process with little memory for every test; much time, except where time is what is tested."""
    Workers.end()
    monkeypatch.setattr(file, "SECONDS", 30)
    monkeypatch.setattr(file, "MEMORY", 2**28)
    yield
    Workers.end()


@pytest.fixture
def hurried(monkeypatch):
    monkeypatch.setattr(file, "SECONDS", 1.0)


def ask(source, content="x", **variables):
    return Template(source, "the.jinja").render(variables, [{"role": "user", "content": content}], True, NOW)


def sentence(source, content="x", **variables) -> str:
    with pytest.raises(UserError) as caught:
        ask(source, content, **variables)
    said = str(caught.value)
    assert "\n" not in said and said.startswith("the.jinja") and len(said) < 1500
    return said


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def gone(pid: int, seconds: float) -> bool:
    """Has the process ended (a zombie counts: whoever inherits it may be slow to collect it)?"""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


# ------------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize("source, when", [
    (LOOP, "on this prompt"), ("{{ lipsum(n=10**6) and '' }}", "on this prompt"),
    ("{% if false %}{{ 9 ** (9 ** 9) }}{% endif %}", "to compile")])
def test_a_template_that_takes_too_long_is_stopped(hurried, source, when):
    """fails if: the parent waits for an answer, or compiles the template itself (jinja2 computes constants)."""
    begin = time.monotonic()
    assert sentence(source) == (f"the.jinja takes more than 5 s {when}; correct it or give another chat template "
                                f"(the path of a .jinja file)")
    assert time.monotonic() - begin < 15 and Workers.current is None


@pytest.mark.parametrize("source", [
    "{{ 'x' * 10**9 }}", "{{ messages[0].content * 10**9 }}", "{{ [1, 2] | tojson(indent=10**9) }}",
    "{{ [messages, 1] | tojson(indent=10**9) }}", "{{ messages[0].content | center(10**9) }}",
    "{% set ns = namespace(x='x') %}{% for i in range(40) %}{% set ns.x = ns.x + ns.x %}{% endfor %}"])
def test_a_template_that_needs_too_much_memory_is_stopped(source):
    """fails if: RLIMIT_AS is not set, or MemoryError ends the process without an answer."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "needs more than 1 GB of memory" in sentence(source)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15      # KB


@pytest.mark.parametrize("source", ["{{ messages[0].content * 501 }}",
                                    "{% for i in range(501) %}{{ messages[0].content }}{% endfor %}"])
def test_output_is_bounded_in_bytes(monkeypatch, source):
    """fails if: the limit is off by one, counts characters, or only whole prompts are counted."""
    monkeypatch.setattr(file, "OUTPUT", 1000)
    assert "the.jinja writes more than 4 MB on this prompt; correct" in sentence(source, "é")
    assert ask(source.replace("501", "500"), "é") == "é" * 500
    assert ask(source.replace("501", "1000"), "\x01") == "\x01" * 1000       # six bytes each in JSON
    assert "writes more than" in sentence(source.replace("501", "99999"), "é" * 10)


def test_writing_without_end_is_stopped_when_it_is_too_much(monkeypatch):
    """fails if: the length is looked at when the template has ended: memory or time would run out first."""
    monkeypatch.setattr(file, "OUTPUT", 1000)
    assert "writes more than" in sentence(LOOP.replace("{% endfor %}{% endfor %}", "x{% endfor %}{% endfor %}"))


def test_the_sentence_of_a_template_is_bounded():
    """fails if: the whole message of raise_exception is passed on."""
    said = sentence("{{ raise_exception(messages[0].content * 10**6) }}", "no ")
    assert said.startswith("the.jinja refuses this prompt: no no no")


def test_the_parent_holds_time_and_output_by_itself(hurried, monkeypatch):
    """fails if: the parent trusts the process: one that says nothing, one that never stops talking."""
    worker = Worker()
    for command, words in ((["sleep", "60"], "takes more than"), (["cat", "/dev/zero"], "writes more than")):
        monkeypatch.setattr(file, "OUTPUT", 10**5)
        worker.stop()
        worker.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        with pytest.raises(Stopped, match=words):
            worker.ask({"compile": "x"})
        assert worker.process.poll() is not None and worker.process.stdout.closed


def test_a_prompt_that_the_process_does_not_read_is_given_up(hurried):
    """fails if: writing a long request blocks, so that no limit is looked at."""
    worker = Worker()
    os.kill(worker.process.pid, signal.SIGSTOP)
    with pytest.raises(Stopped, match="takes more than"):
        worker.ask({"compile": "x" * 10**6})
    assert worker.process.poll() is not None


# ----------------------------------------------------------------------------------- one process, replaced


def test_after_a_limit_the_next_prompt_is_rendered(hurried):
    """fails if: the dead process is asked again, or a new one is not given the templates that the old one had."""
    kept, other = Template(COUNT, "the.jinja"), Template("{{ messages[0].content }}!", "other.jinja")
    first = Workers.current.process.pid
    with pytest.raises(UserError, match="takes more than"):
        kept.render({}, [{"role": "user", "content": "99999"}], True, NOW)
    for template, text in ((kept, "done"), (other, "3!"), (kept, "done")):
        assert template.render({}, [{"role": "user", "content": "3"}], True, NOW) == text
    assert Workers.current.process.pid != first


def test_a_process_that_dies_between_prompts_is_replaced_in_silence():
    """fails if: a worker that somebody killed is blamed on the template."""
    kept = Template("{{ messages[0].content }}", "the.jinja")
    os.kill(Workers.current.process.pid, signal.SIGKILL)
    assert gone(Workers.current.process.pid, 5)
    assert kept.render({}, [{"role": "user", "content": "hi"}], True, NOW) == "hi"


def test_a_process_that_dies_on_a_prompt_is_one_sentence():
    """fails if: end of file is taken for an answer, or the signal is not named."""
    kept = Template(LOOP, "the.jinja")
    threading.Timer(0.3, os.kill, (Workers.current.process.pid, signal.SIGKILL)).start()
    with pytest.raises(UserError, match=r"the.jinja ends the Python that renders it \(SIGKILL\) on this prompt; corr"):
        kept.render({}, [{"role": "user", "content": "hi"}], True, NOW)


def test_many_templates_take_turns(monkeypatch):
    """fails if: one process keeps every template for ever, or a template is forgotten with its process."""
    monkeypatch.setattr(file, "TEMPLATES", 3)
    templates, pids = [Template(f"{i}" + "{{ messages[0].content }}", "the.jinja") for i in range(8)], set()
    for i, template in enumerate(templates):
        assert template.render({}, [{"role": "user", "content": "x"}], True, NOW) == f"{i}x"
        assert len(Workers.current.numbers) <= 3
        pids.add(Workers.current.process.pid)
    assert 1 < len(pids) <= 8


def test_an_interrupted_prompt_does_not_leave_its_answer_for_the_next_one():
    """fails if: the process lives on after ctrl-C in the middle of a request."""
    slow, fast = Template(COUNT, "the.jinja"), Template("fast", "the.jinja")
    def interrupt(number, frame):
        raise KeyboardInterrupt
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            slow.render({}, [{"role": "user", "content": "99999"}], True, NOW)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert fast.render({}, [{"role": "user", "content": "x"}], True, NOW) == "fast"


def test_nothing_is_left_behind():
    """fails if: a pipe stays open or a killed process is not collected."""
    ask("warm")
    Workers.end()
    before = open_files()
    for _ in range(3):
        ask("x")
        os.kill(Workers.current.process.pid, signal.SIGKILL)
        assert gone(Workers.current.process.pid, 5)
    sentence("{{ 'x' * 10**9 }}")
    Workers.end()
    assert open_files() == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_forked_child_has_a_process_of_its_own():
    """fails if: parent and child share the pipes (answers get mixed up, and the child keeps the worker alive)."""
    template = Template("{{ messages[0].content }}", "the.jinja")
    worker = Workers.current
    pipes, pid = (worker.process.stdin.fileno(), worker.process.stdout.fileno()), worker.process.pid
    child = os.fork()
    if child == 0:
        good = False
        try:
            closed = sum(not os.path.exists(f"/proc/self/fd/{pipe}") for pipe in pipes) == 2
            good = closed and template.render({}, [{"role": "user", "content": "child"}], True, NOW) == "child"
            good = good and Workers.current.process.pid != pid
            Workers.end()
        finally:
            os._exit(0 if good else 1)
    assert template.render({}, [{"role": "user", "content": "parent"}], True, NOW) == "parent"
    assert os.waitpid(child, 0)[1] == 0 and Workers.current.process.pid == pid


SCRIPT = """
import sys, os
sys.path.insert(0, {root!r})
from support import template as file
from datetime import datetime
file.SECONDS = 1
t = file.Template({source!r}, "t")
print(file.Workers.current.process.pid, flush=True)
if {render}:
    t.render({{}}, [], True, datetime.now())
sys.stdin.readline()
"""


@pytest.mark.parametrize("source, render, how", [("x", False, "kill"), (LOOP, True, "kill"), ("x", False, "exit")])
def test_the_process_ends_with_its_parent(source, render, how):
    """fails if: the worker is kept by a second copy of its pipes; or, in an endless template, has no alarm."""
    parent = subprocess.Popen([sys.executable, "-c", SCRIPT.format(root=str(ROOT), source=source, render=render)],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert not gone(pid, 0.3)
    if how == "kill":
        parent.kill()
    parent.communicate()
    assert gone(pid, 10)


# --------------------------------------------------------------------------------- how the process begins


def test_the_environment_does_not_reach_the_process(monkeypatch, tmp_path):
    """fails if: Python is started without -I, so that PYTHONPATH decides what jinja2 is."""
    (tmp_path / "jinja2.py").write_text("raise SystemExit(3)")
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert ask("{{ messages[0].content }}", "hi") == "hi"


@pytest.mark.parametrize("executable, words", [
    ("/nowhere/python", "No such file"), ("/bin/false", "exit code 1"), ("", "[Pp]ermission|empty|No such|not"),
    ("broken", "SyntaxError|invalid|Error")])
def test_a_process_that_cannot_be_started_is_one_sentence(monkeypatch, tmp_path, executable, words):
    """fails if: OSError comes through, or the words that Python died with are lost."""
    if executable == "broken":
        script = tmp_path / "python"
        script.write_text("#!/bin/sh\necho 'line one' >&2\necho 'ImportError: no such library' >&2\nexit 1\n")
        script.chmod(0o755)
        executable = str(script)
    monkeypatch.setattr(sys, "executable", executable)
    before = open_files()
    with pytest.raises(UserError, match=rf"could not be started \(.*({words}).*\); mend that, or use"):
        Template("x", "the.jinja")
    assert open_files() == before and Workers.current is None


# ----------------------------------------------------------------------------------------- text and dates


@pytest.mark.parametrize("source", [r"{{ 'ab\ud800cd' }}", r"{{ '\ud83d' ~ '\ude00' }}",
                                    r"{% for h in ['\ud83d', '\ude00'] %}{{ h }}{% endfor %}"])
def test_half_a_character_in_a_prompt_is_one_sentence(source):
    """fails if: a lone surrogate reaches the tokenizer, or two halves are joined on the way."""
    assert "the.jinja writes half of a character (a lone surrogate) in '" in sentence(source)


def test_text_passes_through_the_process_unchanged():
    """fails if: the pipes lose a character of the messages, the variables or the prompt."""
    odd = "".join(map(chr, [*range(0x300), 0x2028, 0x2029, 0xFEFF, 0xFFFF, 0x10000, 0x1F642, 0x10FFFF]))
    assert ask("{{ messages[0].content }}{{ more['é'] }}", odd, more={"é": odd}) == odd + odd
    numbers = [0.1, 1e300, -0.0, 2**70, True, None, [], {}]
    assert ask("{{ more | tojson }}", more=numbers) == json.dumps(numbers)


def test_a_run_keeps_the_date_of_its_start(monkeypatch):
    """fails if: strftime_now asks the clock when Tokenizer.started is set."""
    folder = ROOT / "toy" / "student"
    text = "{{ strftime_now('%d %b %Y %H:%M') }}"
    monkeypatch.setattr("support.tokenizer.find_template", lambda *rest: (text, "the.jinja"))
    tokenizer = Tokenizer(folder)
    monkeypatch.setattr(Tokenizer, "started", NOW)
    assert tokenizer.render([{"role": "user", "content": "x"}]) == "01 May 2031 12:30"
    monkeypatch.setattr(Tokenizer, "started", None)
    assert tokenizer.render([{"role": "user", "content": "x"}])[:11] == datetime.now().strftime("%d %b %Y")


def test_waiting_looks_at_the_right_end(monkeypatch):
    """fails if: wait returns before the pipe is ready."""
    worker = Worker()
    worker.wait(worker.process.stdin, select.POLLOUT, time.monotonic() + 1)
    with pytest.raises(Stopped, match="takes more than"):
        worker.wait(worker.process.stdout, select.POLLIN, time.monotonic() + 0.05)
    worker.stop()
