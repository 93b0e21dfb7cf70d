"""What the tests of a teacher on another machine share: its server in a thread, and a line on which things go wrong."""
import http.client
import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from extras import remote_line, serve_teacher


@contextmanager
def serving(model, *flags, port=0):
    """The address of this checkpoint, served as `python -m extras.serve_teacher` does."""
    with listening(serve_teacher.make_server(["--model", str(model), "--port", str(port), *flags])) as url:
        yield url


@contextmanager
def listening(server):
    """The address of a server that answers in a thread."""
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Small files are kept below the test's own folder, and repetitions follow at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("OPD_TEACHER_TOKEN", raising=False)
    monkeypatch.setattr(remote_line, "PAUSES", (0.01, 0.05))


class Line(ThreadingHTTPServer):
    """Between a client and a server. fault(number of the request to score, from 0) names what goes wrong with it."""
    daemon_threads = True

    def __init__(self, url: str, fault):
        self.there, self.fault, self.scored = url.removeprefix("http://"), fault, 0
        super().__init__(("127.0.0.1", 0), Passing)

    def handle_error(self, request, address):
        """The other side is gone, as it should be."""


class Passing(BaseHTTPRequestHandler):
    def do_GET(self):
        self.pass_on(None, "none")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        number, self.server.scored = self.server.scored, self.server.scored + 1
        self.pass_on(body, self.server.fault(number) or "none")

    def pass_on(self, body, fault):
        if fault == "hang up":
            return
        if fault.isdecimal():
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "hang":
            time.sleep(20)
        if fault == "slow":
            time.sleep(0.3)
        there = http.client.HTTPConnection(self.server.there)
        there.request(self.command, self.path, body, dict(self.headers.items()))
        answer = there.getresponse()
        found = answer.read()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            value = "0" * 64 if name == "X-Weights" and fault == "another" else value
            if not (name == "X-Checksum" and fault == "unsigned"):
                self.send_header(name, "1000000000000" if name == "Content-Length" and fault == "endless" else value)
        self.end_headers()
        if fault == "damaged":
            found = found[:-1] + bytes([found[-1] ^ 1])
        with suppress(OSError):
            if fault == "dribble":
                for byte in found:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.2)
            else:
                self.wfile.write(found[:len(found) // 2] if fault == "cut" else found)

    def log_message(self, *args):
        pass


def line_to(url, fault):
    """The address of a Line to this server, while it is a context."""
    return listening(Line(url, fault))
