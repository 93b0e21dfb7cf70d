"""Line: requests to a teacher's server (serve_teacher.py), repeated until they are answered or the deadline is over.

    no connection, a cut or damaged body, status 502, 503, 504    asked again, after pauses that double
    any other status, another teacher than at the start           one sentence at once
    nothing for --teacher_deadline seconds                        one sentence, and the run goes on later

What a server says is a stranger's: how long it may be is known before it is read.
"""
import http.client
import json
import queue
import socket
import ssl
import sys
import threading
import time
from collections import deque
from urllib.parse import quote, urlsplit

from extras.remote_wire import (CHECKSUM, MOST_HELLO, PROTOCOL, SMALL_FILES, TOKEN, WEIGHTS, digest, is_digest)
from support.errors import UserError, one_line, shown

PAUSES = 0.1, 5.0       # seconds before the first repetition, and at most
AT_START = 60           # seconds that a run waits for a server which has not answered yet
IN_FLIGHT = 4           # requests at once: the server reads the next ones while it works
PIECE = 2**20           # bytes read between two looks at the clock
LATE = "timed out"      # as sockets say it
LARGEST = 10**12        # of any number in a hello


class Again(Exception):
    """Why a request has to be repeated."""


def is_url(name: str) -> bool:
    return name.startswith(("http://", "https://"))


class Line:
    """The way to one server."""

    def __init__(self, url: str, token: str, deadline: float):
        self.url, self.token, self.deadline = url.rstrip("/"), token, deadline
        try:
            parts = urlsplit(self.url)
            self.host, self.port, self.path = parts.hostname, parts.port, parts.path
        except ValueError as error:
            raise UserError(f"--teacher {shown(url)} is no address ({error}); write http://host:port") from error
        if not self.host or parts.query or parts.fragment or parts.username or not url.isascii():
            raise UserError(f"--teacher {shown(url)} is no address; write http://host:port (a token goes into the "
                            f"environment as {TOKEN})")
        self.secure, self.weights = parts.scheme == "https", None
        self.received, self.sent = 0, 0         # bytes of bodies
        self.over, self.failed = threading.Event(), None    # one has given up: so do the others

    def ask(self, path: str, body: bytes | None = None, most: int = MOST_HELLO) -> bytes:
        """The answer, of at most so many bytes."""
        begun, pause, reason = time.monotonic(), PAUSES[0], LATE
        while self.failed is None:
            try:
                return self.once(path, body, most, begun + self.deadline - time.monotonic())
            except Again as again:
                # the last try has little time: that it was late says nothing new
                reason = reason if str(again) == LATE else str(again)
                if (seconds := time.monotonic() - begun) + pause >= self.deadline:
                    self.give_up(self.gone(seconds, reason))
                elif self.weights is None and pause == PAUSES[0]:
                    print(f"teacher  waiting for {self.url} ({reason}), {self.deadline:g} s at most "
                          f"(--teacher_deadline)", file=sys.stderr, flush=True)
            except UserError as error:
                self.give_up(str(error))
            self.over.wait(pause)
            pause = min(2 * pause, PAUSES[1])
        raise UserError(self.failed)

    def give_up(self, sentence: str) -> None:
        """For all who are asking: the first reason counts. (A sentence: an error would hold on to the whole run.)"""
        self.failed = self.failed or sentence
        self.over.set()

    def gone(self, seconds: float, reason: str) -> str:
        if self.weights is None:
            return (f"no teacher answers at {self.url} since {seconds:.0f} s ({reason}); start it there with python -m "
                    f"extras.serve_teacher, or correct the address")
        return (f"the teacher at {self.url} does not answer since {seconds:.0f} s ({reason}); start it again and run "
                f"the same command: the run goes on at its last checkpoint")

    def once(self, path: str, body: bytes | None, most: int, left: float) -> bytes:
        """One try. A half of the deadline is left for another, where a machine has vanished without a word."""
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        until, connection = time.monotonic() + left, kind(self.host, self.port, timeout=max(0.01, min(left, 10)))
        headers = {CHECKSUM: digest(body or b"")} | ({"Authorization": f"Bearer {self.token}"} if self.token else {})
        try:
            connection.connect()
            connection.sock.settimeout(max(0.01, min(left, max(self.deadline / 2, 1))))
            connection.request("GET" if body is None else "POST", self.path + path, body, headers)
            answer = connection.getresponse()
            found = self.whole(answer, most, until)
        except ssl.SSLCertVerificationError as error:
            raise UserError(f"the certificate of {self.url} is not valid ({shown(one_line(error))}); correct it, or "
                            f"reach the server through a tunnel and http://") from error
        except socket.gaierror as error:
            if self.weights is None:
                raise UserError(f"--teacher {self.url}: no machine of that name ({error.strerror}); correct "
                                f"it") from error
            raise Again(one_line(error)) from error
        except (OSError, http.client.HTTPException) as error:
            raise Again("the answer was cut off" if isinstance(error, http.client.IncompleteRead) else
                        getattr(error, "strerror", None) or one_line(error)) from error
        finally:
            connection.close()
        self.look(answer, found)
        self.received, self.sent = self.received + len(found), self.sent + len(body or b"")
        return found

    def whole(self, answer: http.client.HTTPResponse, most: int, until: float) -> bytes:
        """The body. http.client raises IncompleteRead where it ends early."""
        length, parts, got = answer.length, [], 0
        if length is None or answer.status == 200 and length > most or length > most + MOST_HELLO:
            raise UserError(f"{self.url} answers with {'a body of unknown length' if length is None else length} "
                            f"{'' if length is None else 'bytes '}where at most {most} bytes belong; is it a server of "
                            f"extras/serve_teacher.py?")
        while part := answer.read1(min(PIECE, length - got)):
            parts.append(part)
            got += len(part)
            if time.monotonic() > until:
                raise TimeoutError(LATE)
        if got < length:
            raise http.client.IncompleteRead(b"", length - got)
        return b"".join(parts)

    def look(self, answer: http.client.HTTPResponse, body: bytes) -> None:
        """Is it an answer, whole, and of the same teacher?"""
        if answer.status in (502, 503, 504):
            raise Again(f"status {answer.status}")
        if answer.status != 200:
            try:
                said = shown(json.loads(body)["error"])
            except (ValueError, KeyError, TypeError):
                said = shown(answer.reason)
            raise UserError(f"the teacher at {self.url} refuses (status {answer.status}): {said}")
        if answer.headers.get(CHECKSUM) is None:
            raise UserError(f"{self.url} answers, but not as extras/serve_teacher.py does; correct the address, or "
                            f"start the teacher there with python -m extras.serve_teacher")
        if answer.headers[CHECKSUM] != digest(body):
            raise Again("the answer arrived damaged")
        if self.weights is not None and answer.headers.get(WEIGHTS) != self.weights:
            raise UserError(f"the teacher at {self.url} is another one than at the start of this run; serve the first "
                            f"one again and run the same command, or begin another run")

    def hello(self) -> dict:
        """What is served there. From here on it must stay that."""
        patience, self.deadline = self.deadline, min(self.deadline, AT_START)
        try:
            said = json.loads(self.ask("/hello"))
        except UserError:
            raise
        except (ValueError, RecursionError):
            said = None
        finally:
            self.deadline = patience
        if not isinstance(said, dict) or said.get("protocol") != PROTOCOL:
            raise UserError(f"{self.url} does not speak {PROTOCOL!r}; start the same version of this project there")
        numbers = ("head_bytes", "vocab_size", "hidden_size", "context", "most_tokens")
        files = said.get("files")
        sound = [isinstance(said.get(name), int) and 0 < said[name] < LARGEST for name in numbers]
        sound += [is_digest(said.get(name)) for name in ("weights", "head")]
        sound += [isinstance(files, dict) and files.keys() <= set(SMALL_FILES) and all(map(is_digest, files.values())),
                  said.get("dtype") in ("float32", "bfloat16"), isinstance(said.get("lengths"), bool)]
        if not all(sound):
            raise UserError(f"{self.url} says of itself what no server of extras/serve_teacher.py says; start the same "
                            f"version of this project there")
        self.weights = said["weights"]
        return said

    def file(self, name: str, wanted: str, most: int) -> bytes:
        body = self.ask("/head" if name == "head" else f"/file/{quote(name)}", most=most)
        if digest(body) != wanted:
            raise UserError(f"{self.url}: {name} is not what the server says it is; start the server again")
        return body


# Several at once

class Begun(threading.Thread):
    """work(item), begun. A daemon: whoever is told to stop does not wait for a server."""

    def __init__(self, work, item):
        super().__init__(daemon=True)
        self.work, self.item, self.done = work, item, queue.SimpleQueue()
        self.start()

    def run(self) -> None:
        try:
            self.done.put((self.work(self.item), None))
        except BaseException as error:
            self.done.put((None, error))

    def result(self):
        found, error = self.done.get()      # not join(): a signal may end this wait
        if error is not None:
            raise error
        return found


def in_flight(work, items, most: int = IN_FLIGHT):
    """Yield work(item) of each, in their order, up to `most` of them at once."""
    waiting: deque[Begun] = deque()
    for item in items:
        if len(waiting) == most:
            yield waiting.popleft().result()
        waiting.append(Begun(work, item))
    while waiting:
        yield waiting.popleft().result()
