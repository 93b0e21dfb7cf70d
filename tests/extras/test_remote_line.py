"""extras/remote_line.py: whatever goes wrong on the line is repaired, or one sentence within the deadline."""
import json
import re
import signal
import threading
import time

import pytest
from helpers import ready, result
from serving import line_to, own_cache, serving  # noqa: F401 (a fixture)

import train
from extras.remote_line import IN_FLIGHT, Line, in_flight
from support.errors import UserError
from test_remote import two_steps

SMALL = dict(problems=4, micro_batch_tokens=1)      # 8 requests to score in each step


@pytest.fixture
def served(pair):
    with serving(pair / "teacher", "--token", "secret") as url:
        yield url


@pytest.fixture
def here(command):
    return two_steps(ready(command, **SMALL))


@pytest.mark.parametrize("fault", ["cut", "damaged", "hang up", "502", "503", "504", "slow"])
def test_what_goes_wrong_once_is_asked_for_again(served, here, command, fault):
    """Every third request. fails if: the run ends, or goes on with what arrived"""
    with line_to(served, lambda number: fault if number % 3 == 1 else None) as url:
        run = ready(command, **SMALL, teacher=url, teacher_token="secret", teacher_deadline=20)
        assert two_steps(run) == here


LASTING = {     # what never gets better -> what is said
    "cut": "does not answer since 1 s .the answer was cut off.; start it again and run the same command",
    "damaged": "the answer arrived damaged",
    "hang up": "does not answer since 1 s",
    "503": "status 503",
    "hang": "timed out",
    "dribble": "timed out",
    "500": "refuses .status 500.",
    "404": "refuses .status 404.",
    "another": "is another one than at the start of this run",
    "endless": "at most .* bytes belong",
    "unsigned": "not as extras/serve_teacher.py does",
}


@pytest.mark.parametrize("fault", LASTING)
def test_what_stays_wrong_is_one_sentence_within_the_deadline(served, command, capsys, fault):
    """fails if: the run hangs, retries what no retry can help, or ends in a traceback"""
    with line_to(served, lambda number: fault if number >= 5 else None) as url:
        begun = time.monotonic()
        status = train.main(command(**SMALL, teacher=url, teacher_token="secret", teacher_deadline=1))
        assert status == 2 and time.monotonic() - begun < 8
    said = capsys.readouterr().err
    assert said.count("error:") == 1 and said.count("\n") == 1
    assert re.search(LASTING[fault], said), said


def test_a_server_that_goes_half_way_and_comes_back_changes_nothing(pair, command, tmp_path, capsys, monkeypatch):
    """fails if: the run cannot go on at its last checkpoint, or takes other steps then"""
    flags = dict(steps=4, save_every=1, teacher_deadline=1)
    with serving(pair / "teacher") as url:
        assert train.main(command(**flags, teacher=url, name="calm")) == 0
    port, real = url.rpartition(":")[2], train.train_step
    server = serving(pair / "teacher", port=port)

    def step(run, optimizer, number, *rest):
        if number == 2:
            server.__exit__(None, None, None)
        return real(run, optimizer, number, *rest)
    monkeypatch.setattr(train, "train_step", step)
    assert server.__enter__() == url and train.main(command(**flags, teacher=url)) == 2
    assert f"the teacher at {url} does not answer since 1 s" in capsys.readouterr().err
    monkeypatch.setattr(train, "train_step", real)
    with serving(pair / "teacher", port=port):
        assert train.main(command(**flags, teacher=url)) == 0
    calm, found = (result(tmp_path / "runs" / name) for name in ("calm", "a"))
    assert calm.pop("records")[1:] == found.pop("records")[1:] and calm == found


def test_nobody_there_is_one_sentence(command, capsys):
    """fails if: a run waits for ever for a server that was never started"""
    assert train.main(command(teacher="http://127.0.0.1:9", teacher_deadline=1)) == 2
    said = capsys.readouterr().err
    assert "waiting for http://127.0.0.1:9" in said and "no teacher answers at http://127.0.0.1:9 since 1 s" in said


@pytest.mark.parametrize("token", ["", "secret2", "Secret"])
def test_without_the_token_nothing_is_said(served, command, token, capsys):
    """fails if: a wrong token is accepted, or retried until the deadline"""
    assert train.main(command(teacher=served, teacher_token=token)) == 2
    assert "status 401" in (said := capsys.readouterr().err) and "OPD_TEACHER_TOKEN" in said


def test_the_token_may_come_from_the_environment_and_is_kept_nowhere(served, command, monkeypatch, tmp_path):
    """fails if: the environment is not read, or the run folder holds the token"""
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "secret")
    assert train.main(command(teacher=served, name="by_environment")) == 0
    monkeypatch.setenv("OPD_TEACHER_TOKEN", "")
    assert train.main(command(teacher=served, teacher_token="secret", name=None)) == 0
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 10 and not any(b"secret" in path.read_bytes() for path in files)
    assert not any("secret" in path.name for path in (tmp_path / "runs").iterdir())


def test_other_servers_are_not_taken_for_a_teacher(tmp_path, command, capsys):
    """fails if: any page that answers is read as what a teacher says"""
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *args):
            pass
    server = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    assert train.main(command(teacher=f"http://127.0.0.1:{server.server_port}")) == 2
    server.shutdown()
    server.server_close()
    assert "not as extras/serve_teacher.py does" in capsys.readouterr().err


@pytest.mark.parametrize("change", [dict(protocol="x"), dict(vocab_size=-1), dict(files={"../x": "0" * 64}),
                                    dict(weights=3), dict(dtype="int8"), dict(head_bytes=10**30), dict(context="64")],
                         ids=lambda change: next(iter(change)))
def test_a_hello_with_a_lie_in_it_is_refused(served, monkeypatch, change):
    """fails if: a number, a hash or a file name of the server is used as it comes"""
    real = Line.ask
    monkeypatch.setattr(Line, "ask", lambda line, path, *rest, **more: json.dumps(
        json.loads(real(line, path, *rest, **more)) | change).encode())
    with pytest.raises(UserError, match="same version"):
        Line(served, "secret", 5).hello()


def test_several_requests_are_in_flight_and_come_back_in_order():
    """fails if: one waits for the other, more than IN_FLIGHT are begun, or the order is that of the answers"""
    together, now, most = threading.Barrier(IN_FLIGHT, timeout=5), [], []

    def work(item):
        now.append(item)
        most.append(len(now))
        together.wait()
        time.sleep(0.05 * (item % 3 == 0))
        now.remove(item)
        return item
    assert list(in_flight(work, range(3 * IN_FLIGHT))) == list(range(3 * IN_FLIGHT))
    assert max(most) == IN_FLIGHT


def test_the_first_error_ends_all(served):
    """fails if: others go on asking until their own deadline"""
    line = Line(served, "secret", 30)
    line.hello()
    with line_to(served, lambda number: "500" if number == 0 else "503") as url:
        broken = Line(url, "secret", 30)
        broken.hello()
        begun = time.monotonic()
        with pytest.raises(UserError, match="status 500"):
            list(in_flight(lambda body: broken.ask("/score", body), [b"x"] * 4))
        assert time.monotonic() - begun < 5


def test_an_interrupt_does_not_wait_for_the_server(served, command):
    """fails if: a second Ctrl-C waits for answers, repetitions or threads"""
    with line_to(served, lambda number: "hang") as url:
        run = ready(command, teacher=url, teacher_token="secret", teacher_deadline=60)
        before = signal.signal(signal.SIGALRM, signal.default_int_handler)
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        begun = time.monotonic()
        try:
            with pytest.raises(KeyboardInterrupt):
                two_steps(run)
        finally:
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - begun < 3
