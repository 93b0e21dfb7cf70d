"""The server of a teacher on another GPU or machine; remote.py is its client.

    python -m extras.serve_teacher --model Qwen/Qwen3-32B --port 8500 --host 0.0.0.0     # token: OPD_TEACHER_TOKEN
    python train.py --teacher http://there:8500 ...

Any model that can be a teacher is served, by the passes that a run in one process would make. Connections are read
side by side, and one model works on one pass at a time: the next request has arrived when it is ready. A request is
looked at before any of it reaches the model, and a wrong one costs one sentence.

Not here: encryption. Between machines that do not trust the wire put a reverse proxy with TLS before it (the client
takes https://), or an SSH tunnel.
"""
import argparse
import hmac
import json
import os
import signal
import socket
import sys
import threading
from contextlib import suppress
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from urllib.parse import unquote

import torch
from torch import Tensor

from extras import fast
from extras.fast import merged, ways
from extras.fast.flash import Packed
from extras.remote_wire import (CHECKSUM, MOST_TOPK, PROTOCOL, SMALL_FILES, SPARE, TOKEN, WEIGHTS,
                                digest, packed, unpacked, weights_hash)
from extras.topk_part import told_of
from support.errors import UserError, one_line, shown
from support.files import checkpoint_file
from support.flags import Parser
from support.memory import compute_dtype
from support.setup import check_vocabulary, choose_device
from support.tokenizer import Tokenizer
from support.weights import checkpoint_folder, load_model, set_threads
from teacher import log_probs

CONNECTIONS = 64        # at once; the next one is told to come back
SECONDS = 60            # within which a whole request must have arrived
PIECE = 2**20           # bytes that are written or dropped at a time
CHUNK_ENTRIES = 2**26   # float32 logits that top-k looks at together: 256 MB


class Refusal(Exception):
    """status, and one sentence."""


class Service:
    """One model, and what is said about it."""

    def __init__(self, folder, model, weights: str, most_tokens: int):
        """weights: their hash. The model is as it will read, its faster ways proved."""
        self.model, self.weights, self.most_tokens, self.lock = model, weights, most_tokens, threading.Lock()
        self.lengths = "flash_rows" in ways.in_use()
        self.head = packed(head_VE=model.head())
        self.files = {name: path.read_bytes() for name in SMALL_FILES
                      if (path := checkpoint_file(folder, name, optional=True))}
        self.said = {
            "protocol": PROTOCOL, "weights": self.weights, "head": digest(self.head), "head_bytes": len(self.head),
            "files": {name: digest(body) for name, body in self.files.items()},
            "vocab_size": model.vocab_size, "hidden_size": model.config.hidden_size, "context": model.config.context,
            "dtype": str(model.compute_dtype).removeprefix("torch."), "most_tokens": most_tokens,
            "lengths": self.lengths}
        # 4 bytes an id, 1 a bit of the mask, 4 a length
        self.most_bytes = 9 * max(most_tokens, model.config.context) + SPARE

    def score(self, body: bytes) -> bytes:
        asked = self.checked(body)
        lengths = asked.get("lengths_S")
        keys = [] if lengths is None else [Packed(lengths.tolist())]
        with self.lock, torch.no_grad():
            device = self.model.device
            tokens_BT, mask_BT = asked["tokens_BT"].long().to(device), asked["mask_BT"].to(device)
            hidden_NE = self.model.response_hidden(tokens_BT, mask_BT, *keys)
            if "topk" not in asked:
                return packed(hidden_NE=hidden_NE)
            return packed(**self.top(hidden_NE, tokens_BT[mask_BT], int(asked["topk"]), float(asked["temperature"])))

    def top(self, hidden_NE: Tensor, token_N: Tensor, k: int, temperature: float) -> dict[str, Tensor]:
        """Of every row: its k largest log-probs and whose they are, the log of the mass of the rest, and what a local
        teacher would tell. A few rows at a time."""
        head_VE, found = self.model.head(), []
        rows = max(1, CHUNK_ENTRIES // len(head_VE))
        for hidden_nE, token_n in zip(hidden_NE.split(rows), token_N.split(rows)):
            found.append(told_of(log_probs(hidden_nE, head_VE, temperature), token_n, k))
        names = ("id_NK", "top_NK", "tail_N", "logp_N", "entropy_N")        # of Told's fields, in their order
        return {name: torch.cat(parts) for name, parts in zip(names, zip(*found))}

    def checked(self, body: bytes) -> dict[str, Tensor]:
        """What a request holds. Refusal unless the model can read it."""
        try:
            asked = unpacked(body)
        except ValueError as error:
            raise Refusal(400, f"the body is {shown(one_line(error))}") from error
        for holds, status, sentence in self.rules(asked):
            if not holds():     # one after the other: a later rule relies on the earlier ones
                raise Refusal(status, sentence)
        return asked

    def rules(self, asked: dict[str, Tensor]) -> list[tuple]:
        c, vocab_size = self.model.config, self.model.vocab_size
        tokens_BT, mask_BT, lengths_S = (asked.get(name) for name in ("tokens_BT", "mask_BT", "lengths_S"))
        topk, temperature = asked.get("topk"), asked.get("temperature")
        end_to_end, short = lengths_S is not None, topk is not None or temperature is not None

        def one(number: Tensor | None, dtype: torch.dtype, low: float, high: float) -> bool:
            return number is not None and number.dtype == dtype and number.ndim == 0 and low <= number.item() <= high
        return [
            (lambda: set(asked) <= {"tokens_BT", "mask_BT", "lengths_S", "topk", "temperature"} and
             tokens_BT is not None and mask_BT is not None, 400,
             "a pass has tokens_BT and mask_BT, and no other names than lengths_S, topk and temperature"),
            (lambda: tokens_BT.dtype == torch.int32 and mask_BT.dtype == torch.bool and tokens_BT.ndim == 2 and
             tokens_BT.shape == mask_BT.shape and tokens_BT.numel() > 0, 400,
             "tokens_BT must be int32 and mask_BT bool, of one shape (sequences, positions)"),
            (lambda: 0 <= int(tokens_BT.min()) and int(tokens_BT.max()) < vocab_size, 400,
             f"an id lies outside the vocabulary, which ends at {vocab_size - 1}"),
            (lambda: bool(mask_BT.any()), 400, "the mask asks for no token"),
            (lambda: not end_to_end or self.lengths, 400, "this server reads sequences side by side, not end to end"),
            (lambda: not end_to_end or len(tokens_BT) == 1 and lengths_S.dtype == torch.int32 and lengths_S.ndim == 1
             and len(lengths_S) > 0 and int(lengths_S.min()) > 0
             and int(lengths_S.long().sum()) == tokens_BT.shape[1], 400,
             "lengths_S must be int32 and above 0, and add up to the tokens of the one row"),
            (lambda: (int(lengths_S.max()) if end_to_end else tokens_BT.shape[1]) <= c.context, 400,
             f"a sequence is longer than the context of {c.context}"),
            (lambda: not (mask_BT[:, 0] if not end_to_end else
                          mask_BT[0, (lengths_S.long().cumsum(0) - lengths_S)]).any(), 400,
             "the first token of a sequence has nothing that predicts it"),
            (lambda: tokens_BT.numel() <= self.most_tokens or (len(lengths_S) if end_to_end else len(tokens_BT)) == 1,
             413, f"a pass holds at most {self.most_tokens} tokens, padding included, or one sequence; pass "
                  f"--micro_batch_tokens {self.most_tokens}"),
            (lambda: not short or one(topk, torch.int64, 1, min(MOST_TOPK, vocab_size)) and
             one(temperature, torch.float64, 0.01, 100), 400,
             f"topk must be an int64 from 1 to {min(MOST_TOPK, vocab_size)}, temperature a float64 from 0.01 to 100"),
        ]


class Server(ThreadingHTTPServer):
    daemon_threads, allow_reuse_address, request_queue_size = True, True, CONNECTIONS

    def __init__(self, address: tuple[str, int], service: Service, token: str):
        self.service, self.token = service, sha256(token.encode()).digest() if token else None
        self.open = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__(address, Handler)

    def handle_error(self, request, address) -> None:
        """A client that goes away is nothing to tell of."""


class Handler(BaseHTTPRequestHandler):
    server_version, sys_version, timeout = "opd", "", SECONDS

    def handle(self) -> None:
        if not self.server.open.acquire(blocking=False):
            with suppress(OSError):
                self.connection.sendall(b"HTTP/1.0 503 busy\r\nContent-Length: 0\r\nRetry-After: 1\r\n\r\n")
            return
        # the timeout of a socket counts from byte to byte: one that dribbles would hold its place for ever
        self.late = threading.Timer(SECONDS, self.hang_up)
        self.late.daemon = True
        self.late.start()
        try:
            super().handle()
        finally:
            self.late.cancel()
            self.server.open.release()

    def hang_up(self) -> None:
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        self.answer_with(lambda: self.found(unquote(self.path)))

    def do_POST(self) -> None:
        self.answer_with(lambda: self.server.service.score(self.body()))

    def answer_with(self, find) -> None:
        try:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ").encode(errors="replace")
            if self.server.token and not hmac.compare_digest(sha256(given).digest(), self.server.token):
                raise Refusal(401, f"the token is not this server's; pass its own in {TOKEN} or --teacher_token")
            found = find()
            self.late.cancel()      # from here on it is the line that takes its time
            self.answer(200, found)
        except Refusal as refusal:
            self.refuse(*refusal.args)
        except OSError:
            pass            # the client is gone
        except Exception as error:      # no memory, say: the next request may be smaller
            print(f"error: {self.path}: {type(error).__name__}: {shown(one_line(error))}", file=sys.stderr, flush=True)
            self.refuse(500, f"the server failed ({type(error).__name__}: {shown(one_line(error))})")

    def found(self, path: str) -> bytes:
        service = self.server.service
        if path == "/hello":
            return json.dumps(service.said).encode()
        if path == "/head":
            return service.head
        name = path.removeprefix("/file/")
        if name in service.files:
            return service.files[name]
        raise Refusal(404, f"there is no {shown(path, 120)} here; a teacher is served")

    def body(self) -> bytes:
        most, told = self.server.service.most_bytes, self.headers.get("Content-Length", "")
        if self.path != "/score":
            raise Refusal(404, f"there is no {shown(self.path, 120)} here to post to")
        if not (told.isascii() and told.isdecimal()):
            raise Refusal(411, "a request needs its Content-Length")
        if len(told) > 18 or int(told) > most:
            raise Refusal(413, f"a request has at most {most} bytes")
        body = self.rfile.read(int(told))
        self.late.cancel()
        if digest(body) != self.headers.get(CHECKSUM):
            raise Refusal(503, "the body was cut off or damaged on its way; send it again")
        return body

    def answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        for name, value in (("Content-Type", "application/octet-stream"), ("Content-Length", str(len(body))),
                            (CHECKSUM, digest(body)), (WEIGHTS, self.server.service.weights)):
            self.send_header(name, value)
        self.end_headers()
        for start in range(0, len(body), PIECE):    # a socket's timeout is for the whole of what it is given
            self.wfile.write(memoryview(body)[start:start + PIECE])

    def refuse(self, status: int, sentence: str) -> None:
        """Whatever is still on its way is read and dropped: closed over it, the client would not see the sentence."""
        with suppress(OSError):
            self.answer(status, json.dumps({"error": sentence}).encode())
            self.connection.shutdown(socket.SHUT_WR)
            while self.connection.recv(PIECE):      # until `late` hangs up
                pass

    def log_message(self, *_) -> None:
        """Quiet: errors are told where they arise."""


# Command line

def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m extras.serve_teacher", allow_abbrev=False, description=__doc__.split("\n\n")[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub id of a checkpoint in Hugging Face layout")
    parser.add_argument("--port", type=int, required=True, help="0 = any free one; the line that is printed names it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 = from anywhere")
    parser.add_argument("--token", default="", help=f"what clients must know; better in the environment as {TOKEN}, "
                                                    f"where no list of processes shows it")
    parser.add_argument("--device", default="auto", help="auto = cuda if there is one, else cpu; mps must be asked for")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="of products: that of the runs which ask; auto = bfloat16 on cuda, else float32")
    parser.add_argument("--micro_batch_tokens", type=int, default=65536,
                        help="tokens of a pass at most, padding included; clients cut their micro-batches to it")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 = one for models under 10 million "
                                                               "weights")
    parser.add_argument("--plain", default="", help="faster ways to leave out, by name; all = every one")
    return parser.parse_args(argv)


def make_server(argv: list[str] | None) -> Server:
    """Loaded, checked and listening."""
    args = arguments(argv)
    token = args.token or os.environ.get(TOKEN, "")
    if not token and args.host not in ("127.0.0.1", "localhost", "::1"):
        raise UserError(f"--host {args.host}: whoever reaches this port could use the teacher; set a token in the "
                        f"environment as {TOKEN}, or pass --token")
    if not 0 <= args.port < 2**16 or args.micro_batch_tokens < 1 or args.threads < 0:
        raise UserError("--port must lie between 0 and 65535, --micro_batch_tokens be at least 1, --threads at least 0")
    ways.begin(args.plain)
    device = choose_device(args.device)
    folder = checkpoint_folder(args.model)
    tokenizer = Tokenizer(folder)
    model = load_model(folder, dtype=compute_dtype(args, device), device=device).requires_grad_(False)
    check_vocabulary(folder, model.config, tokenizer)
    model.title, model.vocab_size = "the teacher", tokenizer.vocab_size
    set_threads(model, args.threads)
    weights = weights_hash(model.weights())     # before they are merged
    as_in_a_run(model)
    service = Service(folder, model, weights, args.micro_batch_tokens)
    try:
        return Server((args.host, args.port), service, token)
    except OSError as error:
        raise UserError(f"--host {args.host} --port {args.port} cannot be listened at ({error.strerror}); choose "
                        f"another port") from error


def as_in_a_run(model) -> None:
    """The faster ways of a teacher in a run, held to the plain ones as there, so that the same digits come out."""
    if merged.mergeable(model):
        merged.merge(model)
    fast.prove(SimpleNamespace(models=lambda: {model}, student=None, actor=None), None, None)


def main(argv: list[str] | None = None) -> int:
    try:
        server = make_server(argv)
    except UserError as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    host, port = server.server_address[:2]
    said = server.service.said
    print(f"serving at http://{host}:{port}: {said['vocab_size']} tokens, {said['hidden_size']} wide, {said['dtype']}, "
          f"weights {said['weights'][:12]}", flush=True)
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell starts its background jobs deaf to Ctrl-C
    with suppress(KeyboardInterrupt):
        server.serve_forever()
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
