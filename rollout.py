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
import functools
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

import parallel
from attention import KVCache
from model import Transformer
from sampler import one_event, prepacked, project, sample
from support.errors import NotFinite, UserError

PREFILL_TOKENS = 16_384     # prompt tokens per prefill pass: bounds its activations, whatever the number of slots
CUDA_GRAPHS = True          # False: launch every kernel of every decode step
LOOK_EVERY = 8, 1           # decode steps between two looks at what has ended: a look makes a GPU wait, a CPU not


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
    def micro_batches(self, max_tokens: int, sequence_b: Tensor | None = None, pack: bool = False):
        """Yield (tokens_bt, mask_bt, lengths, row_n) of groups of sequences, each of at most max_tokens tokens padding
        included (or one sequence): of all sequences, or of those in sequence_b. A group's sequences stand side by
        side and are of similar length, lengths = None; or, to pack, end to end in one row. row_n says where the
        group's response tokens, in row-major order, stand among all N."""
        total_B = self.prompt_len_B + self.length_B
        row_BT = self.mask_BT.flatten().cumsum(0).view_as(self.mask_BT) - 1
        order, lengths = total_B.argsort(stable=True), total_B.tolist()
        if sequence_b is not None:
            order = order[torch.isin(order, sequence_b)]
        for group in groups(order[parallel.owned(order)].tolist(), lengths, max_tokens, pack):
            at, longest = torch.tensor(group, device=order.device), lengths[group[-1]]
            tokens_bt, mask_bt = self.tokens_BT[at, :longest], self.mask_BT[at, :longest]
            row_n = row_BT[at, :longest][mask_bt]
            if pack:
                real_bt = torch.arange(longest, device=order.device) < total_B[at, None]
                yield tokens_bt[real_bt][None], mask_bt[real_bt][None], [lengths[b] for b in group], row_n
            else:
                yield tokens_bt, mask_bt, None, row_n


def groups(order: list[int], lengths: list[int], max_tokens: int, pack: bool):
    """Cut `order`, in which lengths rise, into groups of at most max_tokens tokens; one sequence always fits. Side by
    side, padded to the longest, no more than a tenth of a group's real tokens plus 128 are padding. (96 sequences of
    lognormal lengths, 16,384 tokens at a time: 37 % padding without that rule, 11 % with it.)"""
    group, real = [], 0
    for b in order:
        size, most = real + lengths[b], max_tokens
        if not pack:
            size, most = lengths[b] * (len(group) + 1), min(max_tokens, 1.1 * size + 128)
        if group and size > most:
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


class Slots:
    """The live sequences of one generate() call. Slots 0 ... live-1 are busy; `request` says with what.

    All that a decode step reads and writes stays at one place on the device, and no step asks the host anything:
    a sequence that has ended takes part without moving on until the host looks (every LOOK_EVERY steps). So on a
    GPU a step is recorded once per number of rows as a CUDA graph, and from then on replayed without the host's
    some thousand launches.
    """

    def __init__(self, model: Transformer, n_slots: int, capacity: int, limit: int, vocab_size: int,
                 stop_ids: tuple[int, ...], temperature: float, compile: bool = False, one_stop: bool = False):
        self.model, self.device, self.temperature = model, model.device, temperature
        self.forward = torch.compile(model.forward, dynamic=True) if compile else model     # prefill is never compiled
        self.cache = KVCache(model.config, n_slots, capacity, model.compute_dtype, self.device)
        self.head_VD = model.head_weight()[:vocab_size].to(model.compute_dtype)
        self.logits_SV = torch.empty(n_slots, vocab_size, dtype=model.compute_dtype, device=self.device)
        self.packed = prepacked(self.head_VD)
        zeros = functools.partial(torch.zeros, device=self.device)
        # one column more than the longest response: there goes what an ended sequence of full length still draws
        self.token_ST, self.last_S = zeros(n_slots, limit + 1, dtype=torch.int64), zeros(n_slots, dtype=torch.int64)
        self.logp_ST, self.entropy_ST, self.uniform_ST = (zeros(n_slots, limit + 1) for _ in range(3))
        self.count_S, self.limit_S = zeros(n_slots, dtype=torch.int64), zeros(n_slots, dtype=torch.int64)
        self.stopped_S = zeros(n_slots, dtype=torch.bool)
        self.done_S = ~self.stopped_S           # of a free slot too
        self.stop_ids = torch.tensor(sorted(stop_ids), dtype=torch.int64, device=self.device)
        self.one_stop = one_stop and len(stop_ids) > 1
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}   # rows -> its step; None = ran once, not recorded
        self.request: list[int] = []            # host: request number of each live slot
        self.length: list[int] = []             # host: tokens in the cache of each live slot, or more if it has ended

    @property
    def live(self) -> int:
        return len(self.request)

    def admit(self, requests: list[int], prompt_of: list[list[int]], limit_of: list[int], stream_of: list[int],
              seed: int) -> None:
        """Prefill the prompts of `requests` into the next free slots and write the first token of each. Requests
        with the same prompt object share one prefill row."""
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
        new = slice(first, self.live)
        self.count_S[new], self.stopped_S[new], self.done_S[new] = 0, False, False
        self.limit_S[new] = torch.tensor([limit_of[r] for r in requests], device=self.device)
        rows = torch.tensor([row_of[id(prompt_of[r])] for r in requests], device=self.device)
        self.write(new, torch.cat(hidden_PD)[rows])

    def write(self, at: slice, hidden_BD: Tensor) -> None:
        """Sample the next token of slots `at` from their hidden states, store it, and note which have ended."""
        logits_BV = project(hidden_BD, self.head_VD, self.packed, self.logits_SV[:len(hidden_BD)])
        count_B1 = self.count_S[at, None]
        drawn = sample(logits_BV, self.temperature, self.uniform_ST[at].gather(1, count_B1).squeeze(1))
        if self.one_stop:
            drawn = one_event(drawn, logits_BV, self.stop_ids, self.temperature)
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
        hidden_BD = self.forward(self.last_S[:n, None], self.cache)[:, 0]
        self.cache.length_B[:n] += going_B
        self.write(slice(0, n), hidden_BD)

    def decode(self) -> None:
        """One step of all live slots."""
        self.cache.longest = min(max(self.length), self.cache.keys[0].shape[1] - 1)
        self.length = [length + 1 for length in self.length]
        if not (CUDA_GRAPHS and self.cache.flash):      # how far a masked pass reads changes from step to step
            self.step(self.live)
            return
        n = min(1 << (self.live - 1).bit_length(), len(self.count_S))      # few graphs; free rows cost next to nothing
        if n not in self.graphs:        # the first step of its kind also loads kernels, which cannot be recorded
            self.graphs[n] = None
            self.step(n)
            return
        if self.graphs[n] is None:
            self.graphs[n] = self.record(n)
        self.graphs[n].replay()

    def record(self, n: int) -> torch.cuda.CUDAGraph:
        """The step of n rows, noted and not run. Without torch.cuda.graph(), which would also collect garbage and
        empty the allocator's cache, each time."""
        graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        shared = [other.pool() for other in self.graphs.values() if other][:1]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            graph.capture_begin(*shared, capture_error_mode="thread_local")    # NCCL's watchdog may go on asking
            self.step(n)
            graph.capture_end()
        return graph

    def retire(self):
        """Yield (request, tokens, logps, entropies, finished) of every slot that stopped or is full, and free
        it."""
        live = self.live
        done, stopped, count = torch.stack([self.done_S[:live], self.stopped_S[:live], self.count_S[:live]]).tolist()
        for slot in reversed(range(live)):      # from the end, so that the slot moved into a gap is already judged
            if done[slot]:
                yield (self.request[slot], *(buffer[slot, :count[slot]].clone().cpu() for buffer in
                                             (self.token_ST, self.logp_ST, self.entropy_ST)), bool(stopped[slot]))
                self.free(slot)

    def free(self, slot: int) -> None:
        last = self.live - 1
        if slot != last:
            self.cache.move(slot, last, self.length[last])
            for state in (self.token_ST, self.logp_ST, self.entropy_ST, self.uniform_ST, self.last_S, self.count_S,
                          self.limit_S, self.stopped_S, self.done_S):
                state[slot] = state[last]
            self.request[slot], self.length[slot] = self.request[last], self.length[last]
        self.cache.length_B[last], self.done_S[last] = 0, True      # a free row decodes along, over one key
        self.request.pop()
        self.length.pop()


@parallel.divided
@torch.no_grad()
def generate(model: Transformer, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int | list[int],
             stop_ids: tuple[int, ...], temperature: float = 1.0, seed: int = 0, slots: int = 64,
             vocab_size: int | None = None, progress: str | None = None, compile: bool = False,
             numbers: list[int] | None = None, one_stop: bool = False) -> Rollout:
    """`samples` responses to each prompt; sequences i * samples ... belong to prompts[i].

    max_new_tokens   one limit, or one per prompt. A response ends with a stop token (kept) or at its limit.
    vocab_size       real tokens: head rows past it are padding and are never sampled or counted in the
                     softmax.
    progress         label of a progress bar; None = silent.
    compile          fuse the decode step with torch.compile (a C++ compiler is needed on a CPU). The first call of a
                     process takes half a minute more. Worth it where products are cheap beside the rest: bfloat16.
    one_stop         the stop ids are one word: log-probs and entropies are said of all of them (losses.OneStop).
    numbers          of the prompts, which number the random streams; None = 0, 1, ... (parallel.py writes a part).
    Ensures  logp_BT[mask_BT] == log-softmax of a plain forward pass over the same sequences (float32: 1e-5).
    Errors   UserError for an empty prompt, and for prompt + limit beyond the model's context; NotFinite when a
             token was drawn from logits that are no numbers.
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
    n_slots = min(slots, len(prompt_of))
    pool = Slots(model, n_slots, max(len(p) + n for p, n in zip(prompts, limits)), max(limits), vocab_size, stop_ids,
                 temperature, compile, one_stop)
    queue, done = deque(range(len(prompt_of))), {}
    look_every = LOOK_EVERY[model.device.type == "cpu"]
    with tqdm(total=len(prompt_of), desc=progress, unit="seq", leave=False, disable=None if progress else True) as bar:
        while pool.live or queue:
            for _ in range(look_every if pool.live else 0):
                pool.decode()
            # refilling one slot at a time would prefill one prompt at a time: wait for an eighth of them
            if queue and (n_slots - pool.live >= max(1, n_slots // 8) or not pool.live):
                new = [queue.popleft() for _ in range(min(n_slots - pool.live, len(queue)))]
                pool.admit(new, prompt_of, limit_of, stream_of, seed)
            for request, *result in pool.retire():
                done[request] = result
                bar.update()
    columns = zip(*(done[request] for request in range(len(prompt_of))))
    rollout = assemble(prompt_of, *map(list, columns), model.device)
    if not torch.isfinite(rollout.logp_BT).all():
        raise NotFinite(f"the logits of {model.title} are not finite at temperature {temperature:g}")
    return rollout
