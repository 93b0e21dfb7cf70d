"""extras/serve_teacher.py: what it serves, and what it refuses; after every refusal it still answers."""
import hashlib
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from serving import own_cache, serving  # noqa: F401 (a fixture)

from extras import serve_teacher
from extras.fast import ways
from extras.fast.flash import Packed
from extras.remote_wire import packed, unpacked, weights_hash
from model import Transformer
from support.weights import load_model

ROOT = Path(__file__).resolve().parents[2]
GOOD = dict(tokens_BT=torch.tensor([[1, 2, 3], [4, 5, 0]], dtype=torch.int32),
            mask_BT=torch.tensor([[False, True, True], [False, True, False]]))


@pytest.fixture
def served(pair):
    with serving(pair / "teacher", "--token", "secret") as url:
        yield url


def ask(url, path, body=None, method=None, **headers):
    """(status, body) of one request that knows the token."""
    there = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    given = {"Authorization": "Bearer secret", "X-Checksum": hashlib.sha256(body or b"").hexdigest()}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    there.request(method or ("GET" if body is None else "POST"), path, body,
                  {name: value for name, value in given.items() if value is not None})
    answer = there.getresponse()
    return answer.status, answer.read()


def hidden(url, asked=GOOD):
    status, body = ask(url, "/score", packed(**asked))
    assert status == 200, body
    return unpacked(body)["hidden_NE"]


def test_the_states_are_those_of_the_model(pair, served):
    """fails if: a row belongs to another token, or padding is answered"""
    model = load_model(pair / "teacher")
    with torch.no_grad():
        wanted = model.response_hidden(GOOD["tokens_BT"].long(), GOOD["mask_BT"])
    assert torch.equal(hidden(served), wanted) and wanted.shape == (3, 24)


def test_hello_names_what_is_served(pair, served):
    """fails if: a hash is not that of the bytes behind it, so that a client could not check them"""
    model, said = load_model(pair / "teacher"), json.loads(ask(served, "/hello")[1])
    assert said["vocab_size"] == 20 and said["hidden_size"] == 24 and said["context"] == 64
    assert said["weights"] == weights_hash(model.weights())
    assert {"config.json", "tokenizer.json", "generation_config.json"} == said["files"].keys()
    for name, digest in said["files"].items():
        status, body = ask(served, f"/file/{name}")
        assert status == 200 and hashlib.sha256(body).hexdigest() == digest
        assert body == (pair / "teacher" / name).read_bytes()
    head = ask(served, "/head")[1]
    assert hashlib.sha256(head).hexdigest() == said["head"] and len(head) == said["head_bytes"]
    assert torch.equal(safetensors.torch.load(head)["head_VE"], model.head_weight()[:20])


def test_another_weight_is_another_hash(pair):
    """fails if: a teacher that was trained on would pass for the same one"""
    weights = load_model(pair / "teacher").weights()
    before = weights_hash(weights)
    weights["model.norm.weight"][3] += 1e-6
    assert weights_hash(weights) != before


def wrong(**changes):
    return packed(**{name: value for name, value in {**GOOD, **changes}.items() if value is not None})


def ints(*rows, dtype=torch.int32):
    return torch.tensor(rows, dtype=dtype)


SHORT = dict(topk=torch.tensor(3), temperature=torch.tensor(1.0, dtype=torch.float64))
HOSTILE = {
    "junk": (b"\0" * 100, 400, "no safetensors"),
    "nothing": (b"", 400, "no safetensors"),
    "a header of exabytes": (b"\xff" * 8 + b"{}", 400, "no safetensors"),
    "a shape that lies": ((lambda h: len(h).to_bytes(8, "little") + h)(json.dumps({"tokens_BT": {
        "dtype": "I32", "shape": [10**9, 10**9], "data_offsets": [0, 4]}}).encode()) + bytes(4), 400, "no safetensors"),
    "no mask": (wrong(mask_BT=None), 400, "tokens_BT and mask_BT"),
    "another name": (wrong(weights=ints(1)), 400, "no other names"),
    "int64": (wrong(tokens_BT=GOOD["tokens_BT"].long()), 400, "must be int32"),
    "no mask of bits": (wrong(mask_BT=GOOD["tokens_BT"].clone()), 400, "must be int32"),
    "two shapes": (wrong(mask_BT=GOOD["mask_BT"][:1]), 400, "of one shape"),
    "no tokens": (wrong(tokens_BT=ints(dtype=torch.int32)[:, None], mask_BT=torch.zeros(0, 1).bool()), 400, "shape"),
    "one dimension": (wrong(tokens_BT=ints(1, 2), mask_BT=torch.tensor([False, True])), 400, "of one shape"),
    "a large id": (wrong(tokens_BT=ints([1, 20, 3], [4, 5, 0])), 400, "ends at 19"),
    "a negative id": (wrong(tokens_BT=ints([1, -1, 3], [4, 5, 0])), 400, "ends at 19"),
    "nothing asked": (wrong(mask_BT=torch.zeros(2, 3).bool()), 400, "asks for no token"),
    "the first token": (wrong(mask_BT=torch.ones(2, 3).bool()), 400, "nothing that predicts it"),
    "too long": (wrong(tokens_BT=ints([1] * 65), mask_BT=torch.arange(65)[None] > 3), 400, "context of 64"),
    "too many": (wrong(tokens_BT=ints(*[[1] * 60] * 3), mask_BT=(torch.arange(60) > 3).expand(3, 60)), 413,
                 "--micro_batch_tokens 100"),
    "end to end": (wrong(lengths_S=ints(3, 3)), 400, "side by side"),
    "k of 0": (wrong(**SHORT | {"topk": torch.tensor(0)}), 400, "from 1 to 20"),
    "k beyond": (wrong(**SHORT | {"topk": torch.tensor(21)}), 400, "from 1 to 20"),
    "no temperature": (wrong(topk=torch.tensor(3)), 400, "temperature"),
    "NaN": (wrong(**SHORT | {"temperature": torch.tensor(torch.nan, dtype=torch.float64)}), 400, "temperature"),
    "several temperatures": (wrong(**SHORT | {"temperature": torch.ones(2, dtype=torch.float64)}), 400, "temperature"),
}


def test_hostile_passes_get_a_sentence_and_the_server_lives_on(pair, capsys):
    """fails if: one of them reaches the model, is answered with states, or takes the server down"""
    with serving(pair / "teacher", "--token", "secret", "--micro_batch_tokens", "100") as url:
        for name, (body, status, said) in HOSTILE.items():
            got, answer = ask(url, "/score", body)
            assert got == status and said in json.loads(answer)["error"], (name, got, answer)
        assert len(hidden(url)) == 3
    assert capsys.readouterr().err == ""


ENDS = {        # lengths_S of a pass end to end -> what is wrong with it
    "short": (ints(2, 3), "add up"), "zero": (ints(6, 0), "above 0"), "int64": (ints(6, dtype=torch.int64), "int32"),
    "overflow": (ints(2**31 - 1, 2**31 - 1, 8), "add up"), "first": (ints(2, 4), "nothing that predicts it")}


def test_sequences_end_to_end_are_checked_too(pair, flash):
    """fails if: lengths that do not fit the tokens reach the kernel"""
    ways.begin("")
    row = dict(tokens_BT=ints([1, 2, 3, 4, 5, 6]), mask_BT=torch.tensor([[False, True, True, False, False, True]]))
    with serving(pair / "teacher", "--token", "secret") as url:
        for name, (lengths_S, said) in ENDS.items():
            got, answer = ask(url, "/score", packed(**row, lengths_S=lengths_S))
            assert got == 400 and said in json.loads(answer)["error"], (name, answer)
        model = load_model(pair / "teacher")
        with torch.no_grad():
            wanted = model.response_hidden(row["tokens_BT"].long(), row["mask_BT"], Packed([3, 3]))
        assert torch.equal(hidden(url, row | {"lengths_S": ints(3, 3)}), wanted)


REQUESTS = {
    "another token": (dict(path="/hello", Authorization="Bearer secret2"), 401),
    "no token": (dict(path="/head", Authorization=None), 401),
    "a token of bytes": (dict(path="/hello", Authorization="Bearer \xff\xfe"), 401),
    "another page": (dict(path="/etc/passwd"), 404),
    "a path that climbs": (dict(path="/file/../../train.jsonl"), 404),
    "a path in disguise": (dict(path="/file/%2e%2e%2ftrain.jsonl"), 404),
    "weights": (dict(path="/file/model.safetensors"), 404),
    "another method": (dict(path="/hello", method="DELETE"), 501),
    "post elsewhere": (dict(path="/hello", body=b"x"), 404),
    "a wrong checksum": (dict(path="/score", body=b"x", X_Checksum="0" * 64), 503),
    "a length of words": (dict(path="/score", body=b"x", Content_Length="many"), 411),
    "a negative length": (dict(path="/score", body=b"x", Content_Length="-5"), 411),
    "a huge length": (dict(path="/score", body=b"x", Content_Length="9" * 40), 413),
    "a large body": (dict(path="/score", body=b"x" * 2**23), 413),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_hostile_requests_get_a_status_and_the_server_lives_on(served, name):
    """fails if: a file outside the checkpoint's small ones is sent, a token is guessed, memory is taken unseen"""
    asked, status = REQUESTS[name]
    if "length" in name:        # the client would wait for the rest of the answer's request
        with socket.create_connection(served.removeprefix("http://").split(":"), timeout=20) as raw:
            raw.sendall(f"POST /score HTTP/1.0\r\nAuthorization: Bearer secret\r\nContent-Length: "
                        f"{asked['Content_Length']}\r\n\r\n".encode())
            raw.shutdown(socket.SHUT_WR)
            assert int(raw.recv(100).split()[1]) == status
    else:
        assert ask(served, **asked)[0] == status
    assert len(hidden(served)) == 3


def test_a_request_that_dribbles_is_hung_up_on(served, monkeypatch):
    """fails if: a client that never ends its request keeps its place for ever"""
    monkeypatch.setattr(serve_teacher, "SECONDS", 0.5)
    begun = time.monotonic()
    with socket.create_connection(served.removeprefix("http://").split(":"), timeout=20) as raw:
        raw.sendall(b"POST /score HTTP/1.0\r\nAuthorization: Bearer secret\r\nContent-Length: 100\r\n\r\n")
        with pytest.raises(OSError):
            while True:
                raw.sendall(b"x")
                time.sleep(0.1)
                assert time.monotonic() - begun < 10
    assert len(hidden(served)) == 3


def test_too_many_connections_are_told_to_come_back(served, monkeypatch):
    """fails if: idle connections take threads without end, or keep others out once they are gone"""
    address = served.removeprefix("http://").split(":")
    idle = [socket.create_connection(address) for _ in range(serve_teacher.CONNECTIONS)]
    time.sleep(0.3)
    assert ask(served, "/hello")[0] == 503
    for one in idle:
        one.close()
    time.sleep(0.3)
    assert ask(served, "/hello")[0] == 200


def test_the_next_request_is_read_while_one_is_at_work(served, monkeypatch):
    """fails if: the server reads one request after the other"""
    working, go_on, read = threading.Event(), threading.Event(), []
    real_score, real_body = serve_teacher.Service.checked, serve_teacher.Handler.body

    def body(handler):
        read.append(real_body(handler))
        return read[-1]

    def checked(service, asked):
        found = real_score(service, asked)
        if not working.is_set():
            working.set()
            with service.lock:
                go_on.wait(10)
        return found
    monkeypatch.setattr(serve_teacher.Handler, "body", body)
    monkeypatch.setattr(serve_teacher.Service, "checked", checked)
    threads = [threading.Thread(target=hidden, args=(served,)) for _ in range(2)]
    threads[0].start()
    assert working.wait(10)
    threads[1].start()
    end = time.monotonic() + 10
    while len(read) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(read) == 2
    go_on.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_one_pass_is_at_work_at_a_time(served, monkeypatch):
    """fails if: two passes share the model's memory, which was planned for one"""
    now, most, real = [], [], Transformer.response_hidden

    def at_work(model, *inputs):
        now.append(1)
        most.append(len(now))
        time.sleep(0.1)
        found = real(model, *inputs)
        now.pop()
        return found
    monkeypatch.setattr(Transformer, "response_hidden", at_work)
    threads = [threading.Thread(target=hidden, args=(served,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert most == [1, 1, 1]


@pytest.mark.parametrize("flags,said", [
    (["--host", "0.0.0.0"], "whoever reaches this port"), (["--micro_batch_tokens", "0"], "at least 1"),
    (["--port", "70000"], "between 0 and 65535"), (["--modle", "x"], "unknown flag --modle")])
def test_wrong_flags_are_one_sentence(pair, capsys, flags, said):
    assert serve_teacher.main(["--model", str(pair / "teacher"), "--port", "0", *flags]) == 2
    error = capsys.readouterr().err
    assert said in error and error.startswith("error: ") and error.count("\n") == 1


def test_the_command_serves_until_it_is_told_to_stop(pair):
    """fails if: `python -m extras.serve_teacher` does not print its address, or Ctrl-C ends in a traceback"""
    command = [sys.executable, "-m", "extras.serve_teacher", "--model", pair / "teacher", "--port", "0"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        line = next(line for line in server.stdout if line.startswith("serving at"))
        url = line.split()[2].rstrip(":")
        assert len(hidden(url)) == 3 and "weights" in line
        server.send_signal(2)
        assert server.wait(20) == 0 and server.stderr.read() == ""
    finally:
        server.kill()
