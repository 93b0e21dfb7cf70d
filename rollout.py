"""Rollout: the student writes the responses it will be trained on. The one sampler, for training and evaluation.

    sequence b of tokens_BT:   [ prompt_b | response_b | padding ]
    mask_BT:                     0 0 0 0 0  1 1 1 1 1 1  0 0 0 0     the stop token is inside

Sequences are decoded in a fixed set of slots, each at its own position. When one ends, the next request takes its slot;
when none is left, the last live slot moves into the gap and the batch shrinks. So a finished sequence costs nothing
while longer ones go on. A prompt is prefilled once for all samples admitted together.

Every sequence draws from its own random stream, keyed by (seed, its number), so its text does not depend on the slot it
got, on the number of slots or on its neighbours.

Not here: top-k and top-p. The loss scores the distribution that was sampled; truncating it would make training
off-policy (the metric sampler_gap would say so). CUDA graphs and other faster ways are in extras/.
"""
import functools
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from model import Transformer
from support.errors import NotFinite, UserError

PREFILL_TOKENS = 16_384     # prompt tokens per prefill pass: bounds its activations, whatever the number of slots
LOOK_EVERY = 8, 1           # decode steps between two looks at what has ended: a look makes a GPU wait, a CPU not
SAMPLE_ENTRIES = 2**26, 2**18       # logits per pass of the sampler, GPU and CPU: 256 MB; what stays in a core's cache


@dataclass(frozen=True)
class Rollout:
    """What the student did. mask_BT is the only record of who wrote a token; it is never rebuilt from ids."""
    tokens_BT: Tensor       # int64: prompt, response, then padding of no meaning
    mask_BT: Tensor         # bool: the response, its stop token included
    logp_BT: Tensor         # float32: log-prob of the token at the sampling temperature; 0 outside the mask
    entropy_BT: Tensor      # float32, nats: entropy of the distribution it was drawn from; 0 outside the mask
    prompt_len_B: Tensor    # int64
    finished_B: Tensor      # bool: ended by a stop token; False = cut at its limit
    length_B: Tensor = field(init=False)    # int64: response tokens
    every_B: Tensor = field(init=False)     # int64: 0 ... B-1
    sequence_N: Tensor = field(init=False)  # int64: which sequence each response token belongs to
    position_N: Tensor = field(init=False)  # int64: its place in its response, from 0

    def __post_init__(self):
        place_BT = torch.arange(self.tokens_BT.shape[1], device=self.tokens_BT.device) - self.prompt_len_B[:, None]
        every_B = torch.arange(len(self.tokens_BT), device=self.tokens_BT.device)
        sequence_N = self.rows(every_B[:, None].expand_as(self.tokens_BT))
        for name, value in (("length_B", self.mask_BT.sum(1)), ("every_B", every_B), ("sequence_N", sequence_N),
                            ("position_N", self.rows(place_BT))):
            object.__setattr__(self, name, value)

    def response(self, b: int) -> list[int]:
        return self.tokens_BT[b][self.mask_BT[b]].tolist()

    def rows(self, per_token_BT: Tensor) -> Tensor:
        """(B, T) -> (N,): the response tokens in row-major order, the order of every _N tensor."""
        return per_token_BT[self.mask_BT]

    def micro_batches(self, sequence_b: Tensor, max_tokens: int):
        """Yield (tokens_bt, mask_bt, row_n) of groups of these sequences, side by side and of similar length, each of
        at most max_tokens tokens padding included (or one sequence). row_n says where the group's response tokens, in
        row-major order, stand among all N."""
        total_B = self.prompt_len_B + self.length_B
        row_BT = self.mask_BT.flatten().cumsum(0).view_as(self.mask_BT) - 1
        order, lengths = total_B.argsort(stable=True), total_B.tolist()
        for group in groups(order[torch.isin(order, sequence_b)].tolist(), lengths, max_tokens):
            at, longest = torch.tensor(group, device=order.device), lengths[group[-1]]
            mask_bt = self.mask_BT[at, :longest]
            yield self.tokens_BT[at, :longest], mask_bt, row_BT[at, :longest][mask_bt]


def groups(order: list[int], lengths: list[int], max_tokens: int):
    """Cut `order`, in which lengths rise, into groups of at most max_tokens tokens; one sequence always fits. Padded to
    its longest, no more than a tenth of a group's real tokens plus 128 are padding. (96 sequences of lognormal lengths,
    16,384 tokens at a time: 37 % padding without that rule, 11 % with it.)"""
    group, real = [], 0
    for b in order:
        size = lengths[b] * (len(group) + 1)
        if group and size > min(max_tokens, 1.1 * (real + lengths[b]) + 128):
            yield group
            group, real = [], 0
        group.append(b)
        real += lengths[b]
    if group:
        yield group


def assemble(prompts: list[list[int]], responses: list[Tensor], logps: list[Tensor], entropies: list[Tensor],
             finished: list[bool], device) -> Rollout:
    """Prompts and responses (one per sequence) side by side, right-padded."""
    prompt_len_B, length_B = (torch.tensor([len(part) for part in parts]) for parts in (prompts, responses))
    end_B = prompt_len_B + length_B
    at_T = torch.arange(int(end_B.max()))
    prompt_BT = at_T < prompt_len_B[:, None]
    mask_BT = (at_T < end_B[:, None]) & ~prompt_BT

    def laid_out(parts: list[Tensor]) -> Tensor:
        """One response after the other under the mask, 0 elsewhere."""
        flat_N = torch.cat(parts)
        return torch.zeros(mask_BT.shape, dtype=flat_N.dtype).masked_scatter(mask_BT, flat_N)
    asked = torch.tensor([token for prompt in prompts for token in prompt], dtype=torch.int64)
    return Rollout(
        tokens_BT=laid_out(responses).to(torch.int64).masked_scatter(prompt_BT, asked).to(device),
        mask_BT=mask_BT.to(device), logp_BT=laid_out(logps).to(device), entropy_BT=laid_out(entropies).to(device),
        prompt_len_B=prompt_len_B.to(device), finished_B=torch.tensor(finished, device=device))


def head_product(head_VD: Tensor, rows: int):
    """The function hidden_BD -> logits_BV of up to `rows` rows, written to the same memory every step: on a CPU paging
    10 MB in costs as much as a fifth of the product."""
    logits_SV = head_VD.new_empty(rows, len(head_VD))
    return lambda hidden_BD: torch.mm(hidden_BD, head_VD.T, out=logits_SV[:len(hidden_BD)])


def sample(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row: (token_B int64, its logp_B, entropy_B), the latter two float32 at `temperature`.

    Exact inverse CDF of one uniform number in [0, 1) per row, in two levels: sums over blocks of about sqrt(V) entries,
    then inside the one block that is hit. At 152k words this is many times cheaper than a multinomial draw. temperature
    0 = argmax, logp and entropy then at temperature 1.
    """
    V, scale = logits_BV.shape[1], 1 / (temperature or 1.0)
    width = max(1, int(V ** 0.5))
    mass_BK, top_B1, mean_B1 = block_masses(logits_BV, scale, width)
    cdf_BK = mass_BK.cumsum(-1)
    total_B1 = cdf_BK[:, -1:]
    if temperature == 0:
        token_B1 = logits_BV.argmax(-1, keepdim=True)
    else:
        target_B1 = uniform_B[:, None] * total_B1
        block_B1 = first_above(cdf_BK, target_B1)
        before_B1 = torch.where(block_B1 > 0, cdf_BK.gather(1, (block_B1 - 1).clamp(min=0)), 0.0)
        id_BW = block_B1 * width + torch.arange(width, device=logits_BV.device)
        x_BW = logits_BV.gather(1, id_BW.clamp(max=V - 1)).float() * scale - top_B1
        inside_cdf_BW = x_BW.exp().masked_fill(id_BW >= V, 0.0).cumsum(-1)
        token_B1 = block_B1 * width + first_above(inside_cdf_BW, (target_B1 - before_B1).clamp(min=0))
        token_B1.clamp_(max=V - 1)      # logits that are no numbers hit no entry; generate() finds them by log-prob
    logp_B1 = logits_BV.gather(1, token_B1).float() * scale - top_B1 - total_B1.log()
    return token_B1.squeeze(1), logp_B1.squeeze(1), (total_B1.log() - mean_B1 / total_B1).squeeze(1)


def block_masses(logits_BV: Tensor, scale: float, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """With x = scale * logits and p = exp(x - max x): (p summed over blocks of `width`, max x, sum of p (x - max x)),
    float32. A few rows at a time go through the same two buffers: on a CPU these stay in cache, and fresh memory would
    cost more than the arithmetic."""
    B, V = logits_BV.shape
    rows, whole = max(1, SAMPLE_ENTRIES[logits_BV.device.type == "cpu"] // V), V // width * width
    scratch_2bV = torch.empty(2, min(rows, B), V, device=logits_BV.device)
    parts = []
    for logits_bV in logits_BV.split(rows):
        x_bV, p_bV = scratch_2bV[:, :len(logits_bV)]
        x_bV.copy_(logits_bV)
        if scale != 1:
            x_bV.mul_(scale)
        top_b1 = x_bV.amax(-1, keepdim=True)
        torch.exp(x_bV.sub_(top_b1), out=p_bV)
        mass_bK = p_bV[:, :whole].unflatten(1, (-1, width)).sum(-1)
        rest_b1 = p_bV[:, whole:].sum(-1, keepdim=True)
        parts.append((torch.cat([mass_bK, rest_b1], 1), top_b1, x_bV.mul_(p_bV).sum(-1, keepdim=True)))
    return tuple(torch.cat(part) for part in zip(*parts))


def first_above(cdf_BK: Tensor, target_B1: Tensor) -> Tensor:
    """Index of the first entry of each increasing row that exceeds the target. A target that rounding pushed up to the
    row's total is taken just below it, so the entry hit always has a mass above zero."""
    below_B1 = torch.nextafter(cdf_BK[:, -1:], torch.zeros_like(target_B1))
    return torch.searchsorted(cdf_BK, torch.minimum(target_B1, below_B1), right=True)


class Request(NamedTuple):
    """One response that is wanted."""
    prompt: list[int]
    limit: int              # tokens, stop token included
    stream: int             # number of its random stream: with the seed it decides the text


class Slots:
    """The live sequences of one generate() call. Slots 0 ... live-1 are busy; `request` says with what.

    All that a decode step reads and writes stays at one place on the device, and no step asks the host anything: a
    sequence that has ended takes part without moving on until the host looks (every LOOK_EVERY steps).
    """

    def __init__(self, model: Transformer, requests: list[Request], n_slots: int, stop_ids: tuple[int, ...],
                 temperature: float, seed: int):
        self.model, self.device, self.requests = model, model.device, requests
        self.temperature, self.seed = temperature, seed
        limit = max(request.limit for request in requests)
        self.cache = model.cache_type(model, n_slots, max(len(prompt) + limit for prompt, limit, _ in requests))
        self.project = head_product(model.head(), n_slots)
        zeros = functools.partial(torch.zeros, device=self.device)
        # one column more than the longest response, for what an ended sequence of full length still draws
        self.token_ST, self.last_S = zeros(n_slots, limit + 1, dtype=torch.int64), zeros(n_slots, dtype=torch.int64)
        self.logp_ST, self.entropy_ST, self.uniform_ST = (zeros(n_slots, limit + 1) for _ in range(3))
        self.count_S, self.limit_S = zeros(n_slots, dtype=torch.int64), zeros(n_slots, dtype=torch.int64)
        self.stopped_S = zeros(n_slots, dtype=torch.bool)
        self.done_S = ~self.stopped_S           # free slots count as done
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=self.device)
        self.request: list[int] = []            # host: request number of each live slot
        self.length: list[int] = []             # host: tokens in the cache of each live slot, or more if it has ended

    def admit(self, numbers: list[int]) -> None:
        """Prefill the prompts of these requests into the next free slots and write the first token of each. Requests
        with the same prompt object share one prefill row."""
        first, new = len(self.request), [self.requests[number] for number in numbers]
        prompts = {id(request.prompt): request.prompt for request in new}
        row_of = {key: row for row, key in enumerate(prompts)}
        row_of_slot = torch.tensor([row_of[id(request.prompt)] for request in new], device=self.device)
        hidden_PD = self.prefill(list(prompts.values()), row_of_slot, first)
        for slot, request in enumerate(new, first):
            # as uint64: a plain list of both becomes float64, in which all small negative seeds are the same number
            key = np.array([self.seed % 2**64, request.stream], dtype=np.uint64)
            drawn = np.random.Generator(np.random.Philox(key=key)).random(request.limit, dtype=np.float32)
            self.uniform_ST[slot, :request.limit] = torch.from_numpy(drawn)
        self.request += numbers
        self.length += [len(request.prompt) for request in new]
        at = slice(first, len(self.request))
        self.count_S[at], self.stopped_S[at], self.done_S[at] = 0, False, False
        self.limit_S[at] = torch.tensor([request.limit for request in new], device=self.device)
        self.write(at, hidden_PD[row_of_slot])

    def prefill(self, prompts: list[list[int]], row_of_slot: Tensor, first: int) -> Tensor:
        """Read the prompts, copy prompt row_of_slot[i] into slot first + i, and return each prompt's last state."""
        hidden_PD, per_pass = [], max(1, PREFILL_TOKENS // max(map(len, prompts)))
        for start in range(0, len(prompts), per_pass):
            group = prompts[start:start + per_pass]
            prefill = self.model.cache_type(self.model, len(group), max(map(len, group)))
            tokens_PT = pad_sequence([torch.tensor(p) for p in group], batch_first=True).to(self.device)
            prefill.length_B = torch.tensor([len(p) for p in group], device=self.device)
            hidden_PTD = self.model(tokens_PT, prefill)
            prefill.longest = tokens_PT.shape[1]
            hidden_PD.append(hidden_PTD[torch.arange(len(group), device=self.device), prefill.length_B - 1])
            here = ((row_of_slot >= start) & (row_of_slot < start + len(group))).nonzero().squeeze(1)
            self.cache.copy_rows(first + here, prefill, row_of_slot[here] - start)
        return torch.cat(hidden_PD)

    def write(self, at: slice, hidden_BD: Tensor) -> None:
        """Sample the next token of slots `at` from their hidden states, store it, and note which have ended."""
        count_B1 = self.count_S[at, None]
        drawn = sample(self.project(hidden_BD), self.temperature, self.uniform_ST[at].gather(1, count_B1).squeeze(1))
        for buffer_ST, value_B in zip((self.token_ST, self.logp_ST, self.entropy_ST), drawn):
            buffer_ST[at].scatter_(1, count_B1, value_B[:, None])
        self.last_S[at] = drawn[0]
        going_B = ~self.done_S[at]
        self.count_S[at] += going_B
        self.stopped_S[at] |= going_B & (drawn[0][:, None] == self.stop_ids).any(1)
        self.done_S[at] |= self.stopped_S[at] | (self.count_S[at] >= self.limit_S[at])

    def step(self, n: int) -> None:
        """Feed the first n slots the token each wrote last, and write the next."""
        going_B = ~self.done_S[:n]
        hidden_BD = self.model(self.last_S[:n, None], self.cache)[:, 0]
        self.cache.length_B[:n] += going_B
        self.write(slice(0, n), hidden_BD)

    def decode(self) -> None:
        """One step of all live slots."""
        self.cache.longest = min(max(self.length), self.cache.keys[0].shape[2] - 1)
        self.length = [length + 1 for length in self.length]
        self.step(len(self.request))

    def retire(self):
        """Yield (request, tokens, logps, entropies, finished) of every slot that stopped or is full, and free them."""
        live = len(self.request)
        done, stopped, count = torch.stack([self.done_S[:live], self.stopped_S[:live], self.count_S[:live]]).tolist()
        ended = [slot for slot in range(live) if done[slot]]
        if not ended:
            return
        most = max(count[slot] for slot in ended)
        written = [buffer_ST[ended, :most].cpu() for buffer_ST in (self.token_ST, self.logp_ST, self.entropy_ST)]
        for row, slot in enumerate(ended):
            yield self.request[slot], *(part[row, :count[slot]] for part in written), bool(stopped[slot])
        self.free(ended)

    def free(self, ended: list[int]) -> None:
        """The last live slots move into the places of those that ended, and the batch shrinks."""
        live, order = len(self.request), list(range(len(self.request)))
        for slot in reversed(ended):        # from the end, so that what moves into a gap is alive
            order[slot] = order[-1]
            order.pop()
        moved = [(slot, source) for slot, source in enumerate(order) if slot != source]
        if moved:
            to, source = torch.tensor(moved, device=self.device).unbind(1)
            self.cache.longest = max(self.length)
            self.cache.copy_rows(to, self.cache, source)
            for state in (self.token_ST, self.logp_ST, self.entropy_ST, self.uniform_ST, self.last_S, self.count_S,
                          self.limit_S, self.stopped_S, self.done_S):
                state[to] = state[source]
        self.request, self.length = [self.request[slot] for slot in order], [self.length[slot] for slot in order]
        # a free row may decode along, over one key
        self.cache.length_B[len(order):live], self.done_S[len(order):live] = 0, True


def respond(model: Transformer, requests: list[Request], *, stop_ids: tuple[int, ...], temperature: float, seed: int,
            slots: int, progress: str | None) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    """(tokens, log-probs, entropies, finished) of every request, in their order, on the CPU."""
    n_slots = min(slots, len(requests))
    pool = Slots(model, requests, n_slots, stop_ids, temperature, seed)
    queue, done = deque(range(len(requests))), {}
    look_every = LOOK_EVERY[model.device.type == "cpu"]
    with tqdm(total=len(requests), desc=progress, unit="seq", leave=False, disable=None if progress else True) as bar:
        while pool.request or queue:
            for _ in range(look_every if pool.request else 0):
                pool.decode()
            # refilling one slot at a time would prefill one prompt at a time: wait for an eighth of them
            if queue and (n_slots - len(pool.request) >= max(1, n_slots // 8) or not pool.request):
                pool.admit([queue.popleft() for _ in range(min(n_slots - len(pool.request), len(queue)))])
            for number, *response in pool.retire():
                done[number] = response
                bar.update()
    return [done[number] for number in range(len(requests))]


@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int | list[int],
             stop_ids: tuple[int, ...], temperature: float = 1.0, seed: int = 0, slots: int = 64,
             progress: str | None = None) -> Rollout:
    """`samples` responses to each prompt; sequences i * samples ... belong to prompts[i].

    max_new_tokens   one limit, or one per prompt. A response ends with a stop token (kept) or at its limit.
    progress         label of a progress bar; None = silent.
    Ensures  logp_BT[mask_BT] == log-softmax of a plain forward pass over the same sequences (float32: 1e-5).
    Errors   UserError for an empty prompt, and for prompt + limit beyond the model's context; NotFinite when a token
             was drawn from logits that are no numbers.
    """
    if not prompts or samples < 1 or slots < 1:
        raise UserError("generate needs at least one prompt, one sample per prompt and one slot")
    limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
    for prompt, limit in zip(prompts, limits, strict=True):
        if not prompt or limit < 1:
            raise UserError("a prompt needs at least one token (the bos token, say) and room for one new token")
        if len(prompt) + limit > model.config.context:
            raise UserError(f"a prompt of {len(prompt)} tokens plus {limit} new ones exceed the model's context of "
                            f"{model.config.context}; shorten it or lower max_new_tokens")
    requests = [Request(prompt, limit, n * samples + sample)
                for n, (prompt, limit) in enumerate(zip(prompts, limits)) for sample in range(samples)]
    responses = respond(model, requests, stop_ids=stop_ids, temperature=temperature, seed=seed, slots=slots,
                        progress=progress)
    rollout = assemble([request.prompt for request in requests], *map(list, zip(*responses)), model.device)
    if not torch.isfinite(rollout.logp_BT).all():
        raise NotFinite(f"the logits of {model.title} are not finite at temperature {temperature:g}")
    return rollout
