"""A teacher on an inference server as it is: token ids in, log-probs of the tokens and of the likeliest ones out.

    --teacher vllm+http://host:8000       OpenAI-style /v1/completions with prompt_logprobs, as vLLM serves it
    --teacher sglang+http://host:30000    /generate with the log-probs of the input, as SGLang serves it

Each sequence is one request, --api_parallel of them at a time. What comes back is held to what was sent: as many
entries as tokens, each with its own id, the likeliest tokens complete. What is wrong is one sentence; a server that is
busy, slow or gone is asked again. A server knows no temperature for what it reads and tells no whole vocabulary:
topk_part.py says which losses that determines. The server's tokenizer cannot be seen; a probe before anything is loaded
compares the texts that it gives for ids of the whole vocabulary, where it gives any.
"""
import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from extras import topk_part
from extras.elsewhere import ELSEWHERE, addresses
from extras.given import has_teacher_write
from extras.topk_part import TOPK_LOSSES, Told, TopKPart, rules_for_topk
from support import memory
from support.errors import UserError, one_line, shown
from support.flags import opt
from teacher import Batch

PREFIXES = ("vllm+http://", "vllm+https://", "sglang+http://", "sglang+https://")
BUSY = {408, 425, 429}      # and 5xx: asked again
NO_MASS = -9999.0           # what vLLM writes for minus infinity, which JSON cannot say
LEAST_TAIL = 2.0**-23       # rounded float32 log-probs leave no smaller mass that could be told from none
FIRST_WAIT = 1.0            # seconds before a server is asked again; twice that before the next time
PROBED = 64                 # ids of the vocabulary whose text is compared


@dataclass(frozen=True)
class Flags:
    api_model: str = opt("", "inference server: the model's name there; empty: the only one that it serves")
    api_topk: int = opt(0, "inference server: how many tokens it tells (vLLM: at most its --max-logprobs, 20); 0 = "
                           "what the loss reads", high=10_000)
    api_parallel: int = opt(16, "inference server: requests under way at a time", low=1, high=1000)
    api_deadline: float = opt(300.0, "inference server: seconds for one sequence", low=0.01)
    api_retries: int = opt(4, "inference server: how often one that is busy or lost is asked again, after 1, 2, 4 ... "
                              "seconds", high=100)
    api_key_variable: str = opt("", "inference server: the environment variable that holds the key; empty: none is "
                                    "sent")


def servers(cfg) -> list[str]:
    return [address for address in addresses(cfg) if address.startswith(PREFIXES)]


def rules(cfg) -> list[tuple[bool, str]]:
    found = servers(cfg)
    if not found:
        return []
    what = f"--teacher {found[0]}"
    return [
        (cfg.temperature == 1,
         f"{what} tells log-probs at temperature 1, whatever is asked: --temperature must be 1"),
        *rules_for_topk(cfg, what, cfg.api_topk or None),
        (not has_teacher_write(cfg),
         f"{what} scores and writes no responses here; name a checkpoint, or leave out what asks a teacher to write"),
        (not (getattr(cfg, "teacher_int8", False) or getattr(cfg, "teacher_memory", "resident") != "resident"),
         f"{what}: --teacher_int8 and --teacher_memory are about weights in this process; leave them out"),
        (memory.processes() == 1, f"{what} is asked by one process; run without torchrun"),
        (not cfg.api_key_variable or cfg.api_key_variable in os.environ,
         f"--api_key_variable {cfg.api_key_variable}: there is no such environment variable"),
    ]


def attach(run) -> None:
    if servers(run.cfg):
        topk_part.watch(run)


# One request

class NoRedirect(urllib.request.HTTPRedirectHandler):
    """A key is for the host that was named."""

    def redirect_request(self, *asked):
        return None


class Server:
    """The wire: JSON to one address and back, by a deadline."""

    def __init__(self, cfg, address: str):
        self.cfg, self.address = cfg, address
        self.kind, _, self.url = address.partition("+")
        self.url = self.url.rstrip("/")
        self.opener = urllib.request.build_opener(NoRedirect)
        self.headers = {"Content-Type": "application/json"}
        if cfg.api_key_variable:
            self.headers["Authorization"] = f"Bearer {os.environ[cfg.api_key_variable]}"

    def ask(self, path: str, body: dict | None = None, most: int = 2**24) -> dict:
        """The answer to one request (a GET without a body) of at most `most` bytes. UserError when the server refuses
        it, or is busy, slow or gone --api_retries times in a row."""
        for attempt in range(self.cfg.api_retries + 1):
            if attempt:
                time.sleep(min(FIRST_WAIT * 2.0**(attempt - 1), 60.0))
            try:
                return self.once(path, body, most)
            except urllib.error.HTTPError as error:
                said = f"{error.code} {shown(one_line(error.read(2000).decode(errors='replace')))}"
                if error.code < 500 and error.code not in BUSY:
                    raise UserError(f"--teacher {self.address} refuses a request to {path} ({said}); correct the flag "
                                    f"that it names, or how the server was started") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                said = shown(one_line(getattr(error, "reason", None) or error))
        raise UserError(f"--teacher {self.address} does not answer {path} ({said}; asked {attempt + 1} times); is "
                        f"the server up? The same command goes on from the last checkpoint, if there is one")

    def once(self, path: str, body: dict | None, most: int) -> dict:
        until = time.monotonic() + self.cfg.api_deadline
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        with self.opener.open(request, timeout=self.cfg.api_deadline) as answer:
            parts, size = [], 0
            while part := answer.read1(2**16):      # a server that sends a byte a second never runs into the timeout
                parts.append(part)
                size += len(part)
                if time.monotonic() > until:
                    raise TimeoutError(f"the answer is not complete after {self.cfg.api_deadline:g} seconds")
                if size > most:
                    raise UserError(f"--teacher {self.address} answers {path} with more than {most} bytes; is it an "
                                    f"inference server?")
        found = json.loads(b"".join(parts))
        if not isinstance(found, dict | list):
            raise ValueError("the answer is no JSON object")
        return found


# The two formats: what is sent, and what is read of the answer. `first` is the place of the first token asked about.

def vllm_request(ids: list[int], first: int, k: int, model: str, texts: bool) -> dict:
    """temperature and penalties are those that change nothing, since a checkpoint's own would be used otherwise."""
    return {"model": model, "prompt": ids, "max_tokens": 1, "temperature": 1.0, "top_p": 1.0, "top_k": -1,
            "repetition_penalty": 1.0, "prompt_logprobs": k, "add_special_tokens": False, "return_token_ids": True,
            "stream": False}


def vllm_entries(answer: dict, ids: list[int], first: int, k: int) -> list[tuple]:
    """(id, its log-prob, [(id, log-prob) of the k likeliest], its text or None) of the tokens from `first` on."""
    choice = answer["choices"][0]
    entries, echo = choice["prompt_logprobs"], choice.get("prompt_token_ids") or ids
    same_length(len(entries), len(ids))
    same_length(len(echo), len(ids))
    found = []
    for sent, back, entry in list(zip(ids, echo, entries))[first:]:
        pairs = {int(token): said["logprob"] for token, said in entry.items()}
        if sent not in pairs or back != sent:
            raise Wrong(f"token {sent} comes back as {back if back != sent else next(iter(pairs))}")
        others = [(token, logp) for token, logp in pairs.items() if token != sent]
        # one more than k: the token itself, which is none of the likeliest
        likeliest = others if len(pairs) == k + 1 else list(pairs.items())
        found.append((sent, pairs[sent], likeliest, entry[str(sent)].get("decoded_token")))
    return found


def sglang_request(ids: list[int], first: int, k: int, model: str, texts: bool) -> dict:
    """The log-probs begin one token early: the first entry has none."""
    return {"input_ids": ids, "sampling_params": {"max_new_tokens": 0, "temperature": 1.0}, "return_logprob": True,
            "logprob_start_len": first - 1, "top_logprobs_num": k, "return_text_in_logprobs": texts, "stream": False}


def sglang_entries(answer: dict, ids: list[int], first: int, k: int) -> list[tuple]:
    """As vllm_entries. The last id of the model's vocabulary comes back as 0: SGLang means to hide places of images."""
    said = (answer[0] if isinstance(answer, list) else answer)["meta_info"]
    same_length(said.get("prompt_tokens", len(ids)), len(ids))
    entries = said["input_token_logprobs"]
    tops = said["input_top_logprobs"] if k else [[]] * len(entries)
    for read in (entries, tops):
        same_length(len(read), len(ids) - first + 1)
    found = []
    for sent, (logp, back, text), top in list(zip(ids[first - 1:], entries, tops))[1:]:
        if back not in (sent, 0):
            raise Wrong(f"token {sent} comes back as {back}")
        found.append((sent, logp, [(token, value) for value, token, _ in top], text))
    return found


FORMATS = {"vllm": ("/v1/completions", vllm_request, vllm_entries),
           "sglang": ("/generate", sglang_request, sglang_entries)}


class Wrong(Exception):
    """An answer that does not fit what was sent."""


def same_length(back: int, sent: int) -> None:
    if back != sent:
        raise Wrong(f"{back} entries came back for {sent} tokens")


def checked(entries: list[tuple], k: int, vocab_size: int) -> Told:
    """The entries as tensors, complete and of numbers that can be log-probs. Raises Wrong."""
    id_nK, logp_nK, tail_n, token_n = [], [], [], []
    for token, logp, likeliest, _ in entries:
        likeliest = sorted(likeliest, key=lambda pair: -pair[1])
        ids, values = [i for i, _ in likeliest], [value for _, value in likeliest]
        if len(set(ids)) != k:
            raise Wrong(f"{len(set(ids))} of the {k} likeliest tokens came back for token {token}")
        if not all(type(value) in (int, float) and NO_MASS < value < 1e-3 for value in [logp, *values]):
            raise Wrong(f"a log-prob beside token {token} is {logp if k == 0 else min([logp, *values])}")
        if not all(0 <= i < vocab_size for i in ids):
            raise Wrong(f"it tells id {max(ids)}, and the student's end at {vocab_size - 1}")
        mass = math.fsum(map(math.exp, values))
        outside = 0.0 if token in ids else math.exp(logp)
        if mass + outside > 1.001 or k and token not in ids and logp > values[-1] + 1e-3:
            raise Wrong(f"the likeliest tokens beside token {token} are not the likeliest, or their log-probs not "
                        f"those of one distribution")
        id_nK.append(ids)
        logp_nK.append(values)
        token_n.append(logp)
        # no token outside is likelier than the last one told; and one at least has the mass of the token itself
        most = (vocab_size - k) * math.exp(values[-1]) if k else 1.0
        tail_n.append(math.log(max(min(1 - mass, most), min(LEAST_TAIL, most), outside, 1e-30)))
    n = len(entries)
    return Told(torch.tensor(id_nK, dtype=torch.int64).view(n, k), torch.tensor(logp_nK).view(n, k),
                torch.tensor(tail_n), torch.tensor(token_n))


# The teacher

class ApiTeacher:
    """Scores what a server reads."""

    def __init__(self, cfg, setup, address: str):
        self.cfg, self.server = cfg, Server(cfg, address)
        self.path, self.request, self.entries = FORMATS[self.server.kind]
        self.vocab_size, self.context = setup.tokenizer.vocab_size, 2**62
        wanted = cfg.api_topk or (cfg.topk if cfg.divergence in TOPK_LOSSES else 0)
        self.k, self.name = min(wanted, self.vocab_size), cfg.api_model
        if not cfg.plan:        # of a plan the server need not be there
            self.meet(setup)

    @property
    def identity(self) -> dict:
        """What the answers depend on, as far as it can be seen."""
        return {"model": f"{self.server.kind} {self.name}", "told": self.k}

    def meet(self, setup) -> None:
        """Which model is it, how long a sequence does it read, and does it read the student's ids?"""
        if self.server.kind == "vllm":
            served = {entry["id"]: entry.get("max_model_len") for entry in self.server.ask("/v1/models")["data"]}
            if self.name not in served and (self.name or len(served) != 1):
                raise UserError(f"--api_model {self.name!r}: --teacher {self.server.address} serves "
                                f"{', '.join(map(shown, served))}; name one of them")
            self.name = self.name or next(iter(served))
            self.context = (served[self.name] or 2**62) - 1      # one token is written and thrown away
        count = min(PROBED, self.vocab_size, self.context - 1)
        spread = [i * (self.vocab_size - 1) // max(1, count - 1) for i in range(count)]
        ids = [setup.prompts[0][0], *spread]
        found = self.score(ids, 1, texts=True)
        for token, _, _, text in found:
            theirs, ours = (text or "").strip(), setup.tokenizer.decode([token]).strip()
            if theirs and ours and theirs != ours and (theirs + ours).isascii() and (theirs + ours).isprintable():
                raise UserError(f"--teacher {self.server.address} reads id {token} as {theirs!r}, the student's "
                                f"tokenizer as {ours!r}: it serves a model with another tokenizer; serve one with the "
                                f"student's")

    def score(self, ids: list[int], first: int, texts: bool = False) -> list[tuple]:
        try:
            most = 2**20 + 400 * (self.k + 2) * len(ids)
            answer = self.server.ask(self.path, self.request(ids, first, self.k, self.name, texts), most)
            entries = self.entries(answer, ids, first, self.k)
            return entries if texts else checked(entries, self.k, self.vocab_size)
        except Wrong as error:
            why = str(error)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            why = f"{type(error).__name__} {shown(one_line(error))}"
        raise UserError(f"--teacher {self.server.address} answers {self.path} wrongly for a sequence of {len(ids)} "
                        f"tokens ({why}); is it {self.server.kind}, with the student's tokenizer?")

    def read(self, batch: Batch, sequence_b: Tensor) -> TopKPart:
        """What it says of the sequences sequence_b; the same sequence is asked about once."""
        rollout = batch.rollout
        ends, firsts = (rollout.prompt_len_B + rollout.length_B).tolist(), rollout.prompt_len_B.tolist()
        asked = [(tuple(rollout.tokens_BT[b, :ends[b]].tolist()), firsts[b]) for b in sequence_b.tolist()]
        pool = ThreadPoolExecutor(self.cfg.api_parallel)
        try:
            under_way = {key: pool.submit(self.score, list(key[0]), key[1]) for key in dict.fromkeys(asked)}
            return topk_part.topk_part(rollout, sequence_b, [under_way[key].result() for key in asked])
        finally:        # after an error nothing else is asked
            pool.shutdown(wait=False, cancel_futures=True)


ELSEWHERE.update(dict.fromkeys(PREFIXES, ApiTeacher))
