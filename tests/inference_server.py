"""An inference server for tests: a real model of this project behind the formats of vLLM and SGLang, and their faults.

    with serving(folder) as server:
        server.address("vllm")      what --teacher takes
        server.faults[:] = ["500"]  the next answers go wrong in this way, one each
        server.asked                (path, request) of every request so far

Answers are computed from one plain forward pass over the one sequence, in float32, and cut to the tokenizer's ids.
"""
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from support.tokenizer import Tokenizer
from support.weights import load_model

MAX_LOGPROBS = 20


class InferenceServer:
    def __init__(self, folder, context=64):
        self.model, self.tokenizer, self.context = load_model(folder), Tokenizer(folder), context
        self.model.vocab_size = self.tokenizer.vocab_size
        self.faults, self.asked, self.keys, self.lock = [], [], [], threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Handler,), {"server_of": self}))

    def address(self, kind):
        return f"{kind}+http://127.0.0.1:{self.http.server_address[1]}"

    @torch.no_grad()
    def logp(self, ids):
        """(T, V): what each token says of the next."""
        with self.lock:
            return (self.model(torch.tensor([ids]))[0] @ self.model.head().T).log_softmax(-1)

    def vllm(self, request):
        ids, k = request["prompt"], request["prompt_logprobs"]
        if k > MAX_LOGPROBS:
            return 400, {"error": {"message": f"Requested prompt logprobs of {k}, which is greater than max allowed: "
                                              f"{MAX_LOGPROBS}"}}
        if len(ids) + request["max_tokens"] > self.context:
            return 400, {"error": {"message": f"maximum context length is {self.context} tokens"}}
        entries, logp_TV = [None], self.logp(ids)
        for token, logp_V in zip(ids[1:], logp_TV):
            order = logp_V.argsort(descending=True)
            rank = int((order == token).nonzero())
            top = {token: rank, **{int(order[r]): r for r in range(k)}}
            entries.append({str(i): {"logprob": logp_V[i].item(), "rank": r + 1,
                                     "decoded_token": self.tokenizer.decode([i], skip_special=False)}
                            for i, r in top.items()})
        return 200, {"choices": [{"text": "", "prompt_logprobs": entries, "prompt_token_ids": ids}]}

    def sglang(self, request):
        ids, k, start = request["input_ids"], request["top_logprobs_num"], request["logprob_start_len"]
        last = self.tokenizer.vocab_size - 1
        echo, logp_TV = [i if i < last else 0 for i in ids], self.logp(ids)
        def text(i):
            return self.tokenizer.decode([i], skip_special=False) if request["return_text_in_logprobs"] else None
        own, top = [[None, echo[start], text(ids[start])]], [None]
        for place in range(start + 1, len(ids)):
            logp_V = logp_TV[place - 1]
            own.append([logp_V[ids[place]].item(), echo[place], text(ids[place])])
            best = logp_V.topk(k)
            top.append([[value, i, text(i)] for value, i in zip(best.values.tolist(), best.indices.tolist())])
        meta = {"prompt_tokens": len(ids), "input_token_logprobs": own}
        return 200, {"text": "", "meta_info": meta | ({"input_top_logprobs": top} if k else {})}


def spoil(fault, answer):
    """An answer that a confused server would give."""
    answer = json.loads(json.dumps(answer))
    choice, meta = answer.get("choices", [{}])[0], answer.get("meta_info", {})
    entries = choice.get("prompt_logprobs") or meta["input_token_logprobs"]
    if fault == "short":
        entries.pop()
    if fault == "wrong ids" and choice:
        choice["prompt_token_ids"][-1] = (choice["prompt_token_ids"][-1] + 1) % 17
    if fault == "wrong ids" and meta:
        entries[-1][1] = 1 + entries[-1][1] % 17
    if fault == "shifted" and choice:
        choice.pop("prompt_token_ids")
        entries[2:] = entries[1:-1]
    if fault == "shifted" and meta:
        for read in (entries, meta["input_top_logprobs"]):
            read[2:] = read[1:-1]
    if fault == "few likeliest":
        (entries[-1].popitem() if choice else meta["input_top_logprobs"][-1].pop())
    if fault == "no log-prob" and choice:
        next(iter(entries[-1].values()))["logprob"] = -9999.0
    if fault == "no log-prob" and meta:
        entries[-1][0] = None
    return answer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server_of
        self.send(200, {"data": [{"id": "the-teacher", "max_model_len": server.context}]})

    def do_POST(self):
        server = self.server_of
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, request))
            server.keys.append(self.headers["Authorization"])
            fault = server.faults.pop(0) if server.faults else None
        if fault == "500":
            return self.send(500, {"error": "out of memory"})
        if fault == "slow":
            time.sleep(0.6)
        status, answer = server.vllm(request) if self.path == "/v1/completions" else server.sglang(request)
        if fault not in (None, "500", "slow", "gone", "drip"):
            answer = spoil(fault, answer)
        self.send(status, answer, fault)

    def send(self, status, answer, fault=None):
        body = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        try:
            for part in range(20 if fault == "drip" else 0):    # bytes keep coming: no wait for one of them is long
                self.wfile.write(body[part:part + 1])
                time.sleep(0.05)
            self.wfile.write(body[:len(body) // 2] if fault == "gone" else body[20:] if fault == "drip" else body)
        except OSError:                 # the client has hung up
            pass
        self.close_connection = True

    def log_message(self, *said):
        pass


@contextmanager
def serving(folder, **settings):
    server = InferenceServer(folder, **settings)
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()
        thread.join()
