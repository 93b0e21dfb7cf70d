"""Rollout: the student writes the responses it will be trained on. The one sampler, for training and
evaluation.

Place in the loop:  prompts -> [ROLLOUT] -> teacher -> loss -> optimizer.

    sequence b of tokens_BT:   [ prompt_b | response_b | padding ]
    mask_BT:                     0 0 0 0 0  1 1 1 1 1 1  0 0 0 0     the stop token is inside

Sequences are decoded in a fixed set of slots, each at its own position. When one ends, the next request takes
its slot; when none is left, the last live slot moves into the gap and the batch shrinks. So a finished
sequence costs nothing while longer ones go on. A prompt is prefilled once for all samples admitted together.

Every sequence draws from its own random stream, keyed by (seed, its number), so its text does not depend on
the slot it got, on the number of slots or on its neighbours.

Not here: top-k and top-p. The loss scores the distribution that was sampled; truncating it would make
training off-policy without saying so.
"""
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import parallel
from model import KVCache, Transformer
from tokenizer import UserError

PREFILL_TOKENS = 16_384     # prompt tokens per prefill pass: bounds its activations, whatever the number of slots
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

    @property
    def length_B(self) -> Tensor:
        """Response lengths in tokens, int64."""
        return self.mask_BT.sum(1)

    @property
    def sequence_N(self) -> Tensor:
        """int64: which sequence each response token belongs to."""
        at_B1 = torch.arange(len(self.tokens_BT), device=self.tokens_BT.device)[:, None]
        return self.rows(at_B1.expand_as(self.tokens_BT))

    def response(self, b: int) -> list[int]:
        return self.tokens_BT[b][self.mask_BT[b]].tolist()

    def rows(self, per_token_BT: Tensor) -> Tensor:
        """(B, T) -> (N,): the response tokens in row-major order, the order of every _N tensor."""
        return per_token_BT[self.mask_BT]

    def with_prompts(self, prompts: list[list[int]]) -> "Rollout":
        """The same responses after other prompts, one per sequence: what a teacher with another context
        reads. Rows keep their number and order."""
        mask_BT, parts = self.mask_BT.cpu(), (self.tokens_BT.cpu(), self.logp_BT.cpu(), self.entropy_BT.cpu())
        responses, logps, entropies = ([row[mask] for row, mask in zip(part, mask_BT)] for part in parts)
        return assemble(prompts, responses, logps, entropies, self.finished_B.tolist(), self.tokens_BT.device)

    @parallel.in_step
    def micro_batches(self, max_tokens: int, sequence_b: Tensor | None = None):
        """Yield (tokens_bt, mask_bt, row_n) of groups of sequences of similar length, each of at most
        max_tokens tokens padding included (or one sequence): of all sequences, or of those in sequence_b.
        row_n says where the group's rows, in row-major order, stand among all N."""
        total_B = self.prompt_len_B + self.length_B
        row_BT = self.mask_BT.flatten().cumsum(0).view_as(self.mask_BT) - 1
        order, lengths = total_B.argsort(stable=True), total_B.tolist()
        if sequence_b is not None:
            order = order[torch.isin(order, sequence_b)]
        for group in similar_lengths(order[parallel.owned(order)].tolist(), lengths, max_tokens):
            at, longest = torch.tensor(group, device=order.device), lengths[group[-1]]
            tokens_bt, mask_bt = self.tokens_BT[at, :longest], self.mask_BT[at, :longest]
            yield tokens_bt, mask_bt, row_BT[at, :longest][mask_bt]


def similar_lengths(order: list[int], lengths: list[int], max_tokens: int):
    """Cut `order`, in which lengths rise, into groups. Each, padded to its longest, has at most max_tokens tokens
    and no more padding than a tenth of its real tokens plus 128; one sequence always fits. (96 sequences of
    lognormal lengths, 16,384 tokens at a time: 37 % padding without the second rule, 11 % with it.)"""
    group, real = [], 0
    for b in order:
        padded = lengths[b] * (len(group) + 1)
        if group and padded > min(max_tokens, 1.1 * (real + lengths[b]) + 128):
            yield group
            group, real = [], 0
        group.append(b)
        real += lengths[b]
    if group:
        yield group


def assemble(prompts: list[list[int]], responses: list[Tensor], logps: list[Tensor], entropies: list[Tensor],
             finished: list[bool], device) -> Rollout:
    """Prompts and responses (one per sequence) side by side, right-padded."""
    def pad(parts: list[Tensor], outside) -> Tensor:
        rows = [torch.cat([torch.full((len(prompt),), outside, dtype=part.dtype), part])
                for prompt, part in zip(prompts, parts)]
        return pad_sequence(rows, batch_first=True, padding_value=outside).to(device)
    tokens = [torch.cat([torch.tensor(prompt, dtype=torch.int64), response.to(torch.int64)])
              for prompt, response in zip(prompts, responses)]
    return Rollout(
        tokens_BT=pad_sequence(tokens, batch_first=True).to(device),
        mask_BT=pad([torch.ones(len(response), dtype=torch.bool) for response in responses], False),
        logp_BT=pad(logps, 0.0), entropy_BT=pad(entropies, 0.0),
        prompt_len_B=torch.tensor([len(prompt) for prompt in prompts], device=device),
        finished_B=torch.tensor(finished, device=device))


def from_responses(prompts: list[list[int]], responses: list[list[int]], finished: list[bool], device) -> Rollout:
    """Given responses (stop token included) in the shape of a rollout. Nobody sampled them, so logp and
    entropy are 0 and mean nothing: only losses that never look at the behaviour policy may use such rows."""
    texts = [torch.tensor(response, dtype=torch.int64) for response in responses]
    zeros = [torch.zeros(len(text)) for text in texts]
    return assemble(prompts, texts, zeros, zeros, finished, device)


def sample(logits_BV: Tensor, temperature: float, uniform_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row: (token_B int64, its logp_B, entropy_B), the latter two float32 at `temperature`.

    Exact inverse CDF of one uniform number in [0, 1) per row, in two levels: sums over blocks of about
    sqrt(V) entries, then inside the one block that is hit. At 152k words this is many times cheaper than a
    multinomial draw. temperature 0 = argmax, logp and entropy then at temperature 1.
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
    logp_B1 = logits_BV.gather(1, token_B1).float() * scale - top_B1 - total_B1.log()
    return token_B1.squeeze(1), logp_B1.squeeze(1), (total_B1.log() - mean_B1 / total_B1).squeeze(1)


def block_masses(logits_BV: Tensor, scale: float, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """With x = scale * logits and p = exp(x - max x): (p summed over blocks of `width` entries, max x, the sum
    of p (x - max x)), float32. A few rows at a time through the same two buffers: on a CPU they stay in cache,
    and fresh memory would cost more than the arithmetic."""
    B, V = logits_BV.shape
    rows, whole = max(1, SAMPLE_ENTRIES[logits_BV.device.type == "cpu"] // V), V // width * width
    scratch_2bV = torch.empty(2, min(rows, B), V, device=logits_BV.device)
    parts = []
    for logits_bV in logits_BV.split(rows):
        x_bV, p_bV = scratch_2bV[:, :len(logits_bV)]
        top_b1 = torch.mul(x_bV.copy_(logits_bV), scale, out=x_bV).amax(-1, keepdim=True)
        torch.exp(x_bV.sub_(top_b1), out=p_bV)
        mass_bK = p_bV[:, :whole].unflatten(1, (-1, width)).sum(-1)
        rest_b1 = p_bV[:, whole:].sum(-1, keepdim=True)
        parts.append((torch.cat([mass_bK, rest_b1], 1), top_b1, x_bV.mul_(p_bV).sum(-1, keepdim=True)))
    return tuple(torch.cat(part) for part in zip(*parts))


def first_above(cdf_BK: Tensor, target_B1: Tensor) -> Tensor:
    """Index of the first entry of each increasing row that exceeds the target. A target that rounding pushed
    up to the row's total is taken just below it, so the entry hit always has a mass above zero."""
    below_B1 = torch.nextafter(cdf_BK[:, -1:], torch.zeros_like(target_B1))
    return torch.searchsorted(cdf_BK, torch.minimum(target_B1, below_B1), right=True)


class Slots:
    """The live sequences of one generate() call. Slots 0 ... live-1 are busy; request_S says with what."""

    def __init__(self, model: Transformer, n_slots: int, capacity: int, limit: int, vocab_size: int,
                 compile: bool = False):
        self.model, self.device, self.vocab_size = model, model.device, vocab_size
        self.step = torch.compile(model.forward, dynamic=True) if compile else model    # prefill is never compiled
        self.cache = KVCache(model.config, n_slots, capacity, model.compute_dtype, self.device)
        self.logits_SV = torch.empty(n_slots, vocab_size, dtype=model.compute_dtype, device=self.device)
        self.token_ST = torch.zeros(n_slots, limit, dtype=torch.int64, device=self.device)
        self.logp_ST, self.entropy_ST, self.uniform_ST = (
            torch.zeros(n_slots, limit, device=self.device) for _ in range(3))
        self.count_S = torch.zeros(n_slots, dtype=torch.int64, device=self.device)     # tokens written so far
        self.limit_S = torch.zeros(n_slots, dtype=torch.int64, device=self.device)
        self.request: list[int] = []            # host: request number of each live slot
        self.length: list[int] = []             # host mirror of cache.length_B[:live]

    @property
    def live(self) -> int:
        return len(self.request)

    def admit(self, requests: list[int], prompt_of: list[list[int]], limit_of: list[int], stream_of: list[int],
              seed: int) -> Tensor:
        """Prefill the prompts of `requests` into the next free slots; return the hidden state (n, D) that
        predicts the first token of each. Requests with the same prompt object share one prefill row."""
        first = self.live
        unique = {id(prompt_of[r]): prompt_of[r] for r in requests}
        row_of = {key: row for row, key in enumerate(unique)}
        prompts = list(unique.values())
        longest = max(map(len, prompts))
        hidden_PD = []
        per_pass = max(1, PREFILL_TOKENS // longest)
        for start in range(0, len(prompts), per_pass):
            group = prompts[start:start + per_pass]
            prefill = KVCache(self.model.config, len(group), max(map(len, group)), self.model.compute_dtype,
                              self.device)
            tokens_PT = pad_sequence([torch.tensor(p) for p in group], batch_first=True).to(self.device)
            length_P = torch.tensor([len(p) for p in group], device=self.device)
            hidden_PTD = self.model(tokens_PT, prefill)
            prefill.length_B, prefill.longest = length_P, max(map(len, group))
            hidden_PD.append(hidden_PTD[torch.arange(len(group), device=self.device), length_P - 1])
            here = [(slot, row_of[id(prompt_of[r])] - start) for slot, r in enumerate(requests, first)]
            here = torch.tensor([pair for pair in here if 0 <= pair[1] < len(group)], device=self.device)
            self.cache.copy_rows(here[:, 0], prefill, here[:, 1])
        for slot, r in enumerate(requests, first):
            # as uint64: a plain list of a huge and a small number becomes float64, and negative seeds one
            # stream
            stream = np.random.Generator(np.random.Philox(key=np.array([seed % 2**64, stream_of[r]], dtype=np.uint64)))
            self.uniform_ST[slot, :limit_of[r]] = torch.from_numpy(stream.random(limit_of[r], dtype=np.float32))
        self.request += requests
        self.length += [len(prompt_of[r]) for r in requests]
        self.count_S[first:self.live] = 0
        self.limit_S[first:self.live] = torch.tensor([limit_of[r] for r in requests], device=self.device)
        return torch.cat(hidden_PD)[torch.tensor([row_of[id(prompt_of[r])] for r in requests], device=self.device)]

    def write(self, first: int, hidden_BD: Tensor, temperature: float) -> None:
        """Sample the next token of slots first ... live-1 from their hidden states and store it."""
        rows_B = torch.arange(first, self.live, device=self.device)
        at = rows_B, self.count_S[rows_B]
        head_VD = self.model.head_weight()[:self.vocab_size].to(hidden_BD.dtype)
        # into the same memory every step: on a CPU, paging 10 MB in costs as much as a fifth of their product
        logits_BV = torch.mm(hidden_BD, head_VD.T, out=self.logits_SV[:len(hidden_BD)])
        self.token_ST[at], self.logp_ST[at], self.entropy_ST[at] = sample(logits_BV, temperature, self.uniform_ST[at])
        self.count_S[rows_B] += 1

    def decode(self) -> Tensor:
        """Feed every live slot the token it wrote last; return hidden_BD."""
        live = self.live
        last_B1 = self.token_ST[torch.arange(live, device=self.device), self.count_S[:live] - 1][:, None]
        self.cache.longest = max(self.length)
        hidden_BD = self.step(last_B1, self.cache)[:, 0]
        self.cache.length_B[:live] += 1
        self.length = [n + 1 for n in self.length]
        return hidden_BD

    def retire(self, stop_ids: Tensor):
        """Yield (request, tokens, logps, entropies, finished) of every slot that stopped or is full, and free
        it."""
        live = self.live
        last_B = self.token_ST[torch.arange(live, device=self.device), self.count_S[:live] - 1]
        stopped_B = torch.isin(last_B, stop_ids)
        stopped, done = torch.stack([stopped_B, stopped_B | (self.count_S[:live] >= self.limit_S[:live])]).tolist()
        for slot in reversed(range(live)):      # from the end, so that the slot moved into a gap is already judged
            if done[slot]:
                n = int(self.count_S[slot])
                yield (self.request[slot], *(buffer[slot, :n].clone().cpu() for buffer in
                                             (self.token_ST, self.logp_ST, self.entropy_ST)), stopped[slot])
                self.free(slot)

    def free(self, slot: int) -> None:
        last = self.live - 1
        if slot != last:
            n = self.length[last]
            for cached in self.cache.keys + self.cache.values:
                cached[slot, :, :n] = cached[last, :, :n]
            for state in (self.cache.length_B, self.token_ST, self.logp_ST, self.entropy_ST, self.uniform_ST,
                          self.count_S, self.limit_S):
                state[slot] = state[last]
            self.request[slot], self.length[slot] = self.request[last], self.length[last]
        self.request.pop()
        self.length.pop()


@parallel.divided
@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int | list[int],
             stop_ids: tuple[int, ...], temperature: float = 1.0, seed: int = 0, slots: int = 64,
             vocab_size: int | None = None, progress: str | None = None, compile: bool = False,
             numbers: list[int] | None = None) -> Rollout:
    """`samples` responses to each prompt; sequences i * samples ... belong to prompts[i].

    max_new_tokens   one limit, or one per prompt. A response ends with a stop token (kept) or at its limit.
    vocab_size       real tokens: head rows past it are padding and are never sampled or counted in the
                     softmax.
    progress         label of a progress bar; None = silent.
    compile          fuse the decode step with torch.compile (a C++ compiler is needed on a CPU). The first call of a
                     process takes half a minute more. Worth it where products are cheap beside the rest: bfloat16.
    numbers          of the prompts, which number the random streams; None = 0, 1, ... (parallel.py writes a part).
    Ensures  logp_BT[mask_BT] == log-softmax of a plain forward pass over the same sequences (float32: 1e-5).
    Errors   UserError for an empty prompt, and for prompt + limit beyond the model's context.
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
    prompt_of = [prompt for prompt in prompts for _ in range(samples)]
    limit_of = [limit for limit in limits for _ in range(samples)]
    stream_of = [n * samples + sample for n in numbers or range(len(prompts)) for sample in range(samples)]
    vocab_size = vocab_size or model.config.vocab_size
    stop = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=model.device)
    n_slots = min(slots, len(prompt_of))
    pool = Slots(model, n_slots, max(len(p) + n for p, n in zip(prompts, limits)), max(limits), vocab_size,
                 compile)
    queue, done = deque(range(len(prompt_of))), {}
    with tqdm(total=len(prompt_of), desc=progress, unit="seq", leave=False, disable=None if progress else True) as bar:
        while pool.live or queue:
            if pool.live:
                pool.write(0, pool.decode(), temperature)
            # refilling one slot at a time would prefill one prompt at a time: wait for an eighth of them
            if queue and (n_slots - pool.live >= max(1, n_slots // 8) or not pool.live):
                new = [queue.popleft() for _ in range(min(n_slots - pool.live, len(queue)))]
                first = pool.live
                pool.write(first, pool.admit(new, prompt_of, limit_of, stream_of, seed), temperature)
            for request, *result in pool.retire(stop):
                done[request] = result
                bar.update()
    columns = zip(*(done[request] for request in range(len(prompt_of))))
    return assemble(prompt_of, *map(list, columns), model.device)
