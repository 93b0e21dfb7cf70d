"""Crossing: what a teacher with another tokenizer says about the student's tokens.

The teacher reads the student's text, cut into its own tokens, after its own prompt. align.py says which runs of tokens
on both sides hold the same bytes (chunks); here they are scored, and every student token gets one effective log-prob,
so that advantages, weights, filters and routing work as ever. A token that cannot be scored gets the student's own
log-prob: no credit, and no part in the loss.

    chunks of one token on both sides    the teacher's log-prob itself, and its whole distribution
    other chunks                         chunk_credit.py shares the log-ratio out; no distribution

Cross-tokenizer OPD, arXiv:2606.09456.
"""
import time
from collections import Counter
from dataclasses import replace

import torch
from torch import Tensor

import teacher as teacher_file
from extras.cross_tokenizer.align import Bridge, Reading
from extras.cross_tokenizer.chunk_credit import CREDIT, chunk_sums, credit, prefix_scores, slice_mass
from extras.cross_tokenizer.rows import CrossRows, on_shared
from losses import ADVANTAGES, USES_ADVANTAGE, WEIGHTS, upcast
from model import Transformer
from rollout import Rollout
from support.responses import from_responses
from teacher import Batch, Part, Teacher, log_probs

PAIRING = {"uld": "place", "gold": "last"}      # which teacher row a dense divergence stands beside; others: "alone"


def whole_states(model: Transformer, rollout: Rollout, cfg) -> Tensor:
    """The states that predict every response token of a rollout. Several processes put one here that joins them."""
    batch = Batch(rollout, [], [], False, 0)
    return Teacher(model, cfg).read(batch, rollout.every_B).hidden_nE


def whole_rows(value_N: Tensor) -> Tensor:
    """The rows of all processes, where there are several."""
    return value_N


def last_row(chunk_n: Tensor, count: int) -> Tensor:
    """(count,): the last row of every chunk."""
    rows, inside_n = torch.arange(len(chunk_n), device=chunk_n.device), chunk_n >= 0
    start = torch.full((count,), -1, dtype=torch.int64, device=chunk_n.device)
    return start.scatter_reduce(0, chunk_n[inside_n], rows[inside_n], "amax")


class Crossing:
    """One step's notes over all N rows; rows of teachers with the student's tokenizer are neutral in it.

    scored_N           bool: rows with a log-prob from their teacher
    paired_N           bool: rows with a distribution beside them
    chunk_N            int64: number of the row's chunk, unique over the step; -1 = not scored
    student_before_N   log b and log q of the chunk's earlier tokens (baselines.gold); 0 where the row is alone
    by_mode            what A would be under each credit rule
    dropped, readings  why responses could not be read; how the others were (sequence -> Reading)
    """

    def __init__(self, bridges: list[Bridge | None], rollout: Rollout, cfg, stop_N: Tensor | None = None):
        """cfg: Flags, with divergence, temperature, micro_batch_tokens and chunk_rows. stop_N: of a student with
        several stop ids, the log-mass it gave to all of them, per row."""
        self.bridges, self.rollout, self.cfg, self.stop_N = bridges, rollout, cfg, stop_N
        self.pairing = PAIRING.get(cfg.divergence, "alone")
        device = self.device = rollout.tokens_BT.device
        self.behavior_logp_N, self.token_N = rollout.rows(rollout.logp_BT), rollout.rows(rollout.tokens_BT)
        self.sequence_N, N = rollout.sequence_N, len(self.token_N)
        self.across_N, self.scored_N, self.paired_N = (torch.full((N,), x, device=device) for x in (False, True, True))
        self.chunk_N = torch.arange(N, device=device)
        self.size_N2 = torch.ones(N, 2, dtype=torch.int64, device=device)       # tokens of the row's chunk, both sides
        self.student_before_N, self.teacher_before_N = (torch.zeros_like(self.behavior_logp_N) for _ in range(2))
        self.by_mode = {mode: torch.zeros_like(self.behavior_logp_N) for mode in CREDIT}
        self.seconds = 0.0          # spent on text: reading it as the teacher does, and its chunks
        self.dropped: Counter[str] = Counter()
        self.readings: dict[int, Reading] = {}

    @staticmethod
    def of(panel, batch: Batch) -> "Crossing":
        """The notes of a step, before any teacher has read it."""
        cfg, rollout, stop_N = panel.sizes, batch.rollout, None
        stops = list(panel.kind.setup.tokenizer.stop_ids)
        if len(stops) > 1 or not batch.on_policy:
            own = Teacher(panel.student, cfg).read(batch, rollout.every_B)
            if not batch.on_policy:     # nobody sampled given responses: their log-probs are not noted yet
                logp_N = teacher_file.told("teacher_logp_N")(None, batch, [own])
                rollout = replace(rollout, logp_BT=rollout.logp_BT.masked_scatter(rollout.mask_BT, logp_N.float()))
            if len(stops) > 1:          # to stop is one event; the sampler noted only the stop token that it drew
                stop_N = torch.full_like(rollout.rows(rollout.logp_BT), torch.nan)
                for row_n in (own.place_N >= 0).nonzero().squeeze(1).split(cfg.chunk_rows):
                    logp_nV = log_probs(own.hidden_nE[own.place_N[row_n]], own.head_VE, cfg.temperature)
                    stop_N[row_n] = logp_nV[:, stops].logsumexp(-1)
                stop_N = whole_rows(stop_N)
        return Crossing(panel.kind.bridges, rollout, cfg, stop_N)

    def read(self, number: int, model: Transformer, sequence_b: Tensor, seen: Rollout) -> "CrossPart":
        """What teacher `number` says of the sequences sequence_b.

        `seen` holds the prompts in the teacher's ids. teacher_logp_N is the effective log q; teacher_entropy_N the mean
        over the teacher's tokens of the chunk, NaN where there is none."""
        bridge, rows = self.bridges[number], torch.isin(self.sequence_N, sequence_b).nonzero().squeeze(1)
        begun = time.perf_counter()
        prompts = {b: seen.tokens_BT[b, :seen.prompt_len_B[b]].tolist() for b in sequence_b.tolist()}
        self.read_texts(bridge, prompts, model.config.context)
        kept = [b for b in prompts if b in self.readings and self.readings[b].ids]
        responses = [self.readings[b].ids for b in kept]
        ids_m = torch.tensor([i for ids in responses for i in ids], dtype=torch.int64, device=self.device)
        end_m = torch.zeros_like(ids_m, dtype=torch.bool)
        end_m[torch.tensor([len(ids) for ids in responses], dtype=torch.int64, device=self.device).cumsum(0) - 1] = True
        chunk_n, chunk_m, cuts = self.joined(prompts)
        self.seconds += time.perf_counter() - begun
        # the zero: a chunk 0 even if all is masked
        count = int(torch.cat([chunk_n, chunk_m, chunk_n.new_zeros(1)]).max()) + 1
        head_VE = model.head()
        hidden_mE = head_VE.new_empty(0, head_VE.shape[1])
        if kept:
            theirs = from_responses([prompts[b] for b in kept], responses, [True] * len(kept), self.device)
            hidden_mE = whole_states(model, theirs, self.cfg)
        teacher_m, entropy_m, mass = self.teacher_rows(bridge, hidden_mE, head_VE, ids_m, end_m & (chunk_m >= 0), cuts)
        effective_n = self.share_out(bridge, rows, chunk_n, chunk_m, teacher_m, cuts, mass)
        place_N = torch.full_like(self.token_N, -1)
        place_n = self.beside(rows, chunk_n, chunk_m, teacher_m, count)
        place_N[rows] = torch.where(self.white(bridge, rows), -1, place_n)
        self.paired_N[rows] = place_N[rows] >= 0
        self.across_N[rows] = True
        self.chunk_N[rows] = torch.where(chunk_n >= 0, chunk_n + len(self.token_N) * (number + 1), -1)
        size_c2 = torch.stack([chunk_sums(torch.ones_like(chunk), chunk, count).long()
                               for chunk in (chunk_n, chunk_m)], 1)
        self.size_N2[rows] = torch.where(chunk_n[:, None] >= 0, size_c2[chunk_n], 0)
        mean_c = chunk_sums(entropy_m, chunk_m, count) / size_c2[:, 1].clamp(min=1)
        entropy_n = torch.where(chunk_n >= 0, mean_c[chunk_n], torch.nan)
        if not kept:        # a row that stands beside nothing is still looked up
            hidden_mE = head_VE.new_zeros(1, head_VE.shape[1])
        told = {}
        for name, value_n in (("teacher_logp_N", effective_n), ("teacher_entropy_N", entropy_n)):
            told[name] = torch.full(self.token_N.shape, torch.nan, dtype=effective_n.dtype, device=self.device)
            told[name][rows] = value_n.to(effective_n.dtype)
        return CrossPart(sequence_b, place_N, hidden_mE, head_VE, self, bridge, told)

    def read_texts(self, bridge: Bridge, prompts: dict[int, list[int]], context: int) -> None:
        """How the teacher reads each response, or why it cannot."""
        finished = self.rollout.finished_B.tolist()
        for b, prompt in prompts.items():
            found = bridge.read(self.rollout.response(b), finished[b], bridge.opened(prompt))
            if isinstance(found, Reading) and len(prompt) + len(found.ids) > context:
                found = "longer than the teacher's context"
            if isinstance(found, Reading):
                self.readings[b] = found
            else:
                self.dropped[found] += 1

    def joined(self, prompts: dict[int, list[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """The readings of these sequences one after the other: chunk_n of the student's rows, chunk_m of the
        teacher's, and (4, cuts): student row, teacher row, first and last place in Bridge.order."""
        chunk_n: list[int] = []
        chunk_m: list[int] = []
        cuts: list[tuple[int, ...]] = []
        chunks, lengths = 0, self.rollout.length_B.tolist()
        for b in prompts:
            reading = self.readings.get(b)
            if reading is None:
                chunk_n += [-1] * lengths[b]
                continue
            cuts += [(i + len(chunk_n), j + len(chunk_m), lo, hi) for i, j, lo, hi in reading.cuts]
            chunk_n += [c + chunks if c >= 0 else -1 for c in reading.student_chunk]
            chunk_m += [c + chunks if c >= 0 else -1 for c in reading.teacher_chunk]
            chunks += max([-1, *reading.student_chunk]) + 1
        chunk_n, chunk_m = (torch.tensor(chunk, dtype=torch.int64, device=self.device) for chunk in (chunk_n, chunk_m))
        return chunk_n, chunk_m, torch.tensor(cuts, dtype=torch.int64, device=self.device).reshape(-1, 4).T

    def teacher_rows(self, bridge: Bridge, hidden_mE: Tensor, head_VE: Tensor, ids_m: Tensor, end_m: Tensor,
                     cuts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(log q, entropy) of the teacher's own tokens, and for each cut the log-mass of the teacher tokens
        that begin with the bytes before it (only for prefix credit)."""
        dtype = torch.promote_types(head_VE.dtype, torch.float32)
        teacher_m, entropy_m = (torch.zeros(len(ids_m), dtype=dtype, device=self.device) for _ in range(2))
        mass = torch.zeros(cuts.shape[1], dtype=dtype, device=self.device)
        stops = torch.tensor(bridge.teacher_stop, device=self.device)
        stop_m = torch.isin(ids_m, stops) & end_m       # before the end it is a control token like others
        for start in range(0, len(hidden_mE), self.cfg.chunk_rows):
            at = slice(start, min(start + self.cfg.chunk_rows, len(hidden_mE)))
            logp_MV = log_probs(hidden_mE[at], head_VE, self.cfg.temperature)
            teacher_m[at] = logp_MV.gather(1, ids_m[at, None]).squeeze(1)
            entropy_m[at] = -(logp_MV.exp() * logp_MV).sum(-1)
            if len(stops) > 1:      # to stop is one event, whichever token says it
                teacher_m[at] = torch.where(stop_m[at], logp_MV[:, stops].logsumexp(-1), teacher_m[at])
            if self.cfg.chunk_credit == "prefix":
                here = (cuts[1] >= at.start) & (cuts[1] < at.stop)
                mass[here] = slice_mass(logp_MV, bridge.order.to(self.device), cuts[1, here] - at.start,
                                        *cuts[2:, here])
        return teacher_m, entropy_m, mass

    def share_out(self, bridge: Bridge, rows: Tensor, chunk_n: Tensor, chunk_m: Tensor, teacher_m: Tensor,
                  cuts: Tensor, mass: Tensor) -> Tensor:
        """The effective log q of the student's rows; notes who is scored and what each rule would give."""
        student_n, args = self.behavior_logp_N[rows].to(teacher_m.dtype), self.cfg
        event_n, token_n = student_n, self.token_N[rows]
        if self.stop_N is not None:     # the student's side of the stop event: any of its stop tokens
            stops = torch.tensor(bridge.student_stop, device=self.device)
            event_n = torch.where(torch.isin(token_n, stops), self.stop_N[rows].to(student_n.dtype), student_n)
        found = {}
        for mode in CREDIT if args.chunk_credit == "prefix" else [mode for mode in CREDIT if mode != "prefix"]:
            prefix_n = prefix_scores(teacher_m, chunk_n, chunk_m, cuts[0], cuts[1], mass) if mode == "prefix" else None
            found[mode] = credit(mode, event_n, teacher_m, chunk_n, chunk_m, prefix_n=prefix_n, clamp=args.chunk_clamp,
                                 max_chunk=args.max_chunk)
            self.by_mode[mode][rows] = (found[mode][0] - event_n).to(self.behavior_logp_N.dtype)
        effective_n, scored_n = found[args.chunk_credit]
        effective_n = torch.where(event_n == student_n, effective_n, student_n + (effective_n - event_n))
        white_n = self.white(bridge, rows)
        self.scored_N[rows] = scored_n & ~white_n
        return torch.where(white_n, student_n, effective_n)

    def white(self, bridge: Bridge, rows: Tensor) -> Tensor:
        """Rows that are white space alone and are to be left out."""
        if not self.cfg.mask_whitespace:
            return torch.zeros_like(rows, dtype=torch.bool)
        return bridge.whitespace.to(self.device)[self.token_N[rows]]

    def beside(self, rows: Tensor, chunk_n: Tensor, chunk_m: Tensor, teacher_m: Tensor, count: int) -> Tensor:
        """The teacher row whose distribution a student row is compared with, or -1.

        alone    chunks of one token on both sides          last   the last rows of every chunk (gold)
        place    the rows with the same place in the response, whatever they say (uld)
        """
        nowhere_n, one_n, one_m = (torch.full_like(chunk_n, -1), torch.ones_like(chunk_n), torch.ones_like(chunk_m))
        if self.pairing == "place":
            pairs, n, m = [], 0, 0
            for b in dict.fromkeys(self.sequence_N[rows].tolist()):
                ours, theirs = int(self.rollout.length_B[b]), len(self.readings[b].ids) if b in self.readings else 0
                pairs += [m + i if i < theirs else -1 for i in range(ours)]
                n, m = n + ours, m + theirs
            return torch.tensor(pairs, dtype=torch.int64, device=self.device)
        last_n, last_m = last_row(chunk_n, count), last_row(chunk_m, count)
        kept_c = (last_n >= 0) & (last_m >= 0)      # a masked chunk has a number, but no rows
        if self.pairing == "alone":
            kept_c = (chunk_sums(one_n, chunk_n, count) == 1) & (chunk_sums(one_m, chunk_m, count) == 1)
        last_n, last_m = last_n[kept_c], last_m[kept_c]
        if self.pairing == "last":
            student_n = self.behavior_logp_N[rows]
            for before_N, value, chunk, last in ((self.student_before_N, student_n, chunk_n, last_n),
                                                 (self.teacher_before_N, teacher_m, chunk_m, last_m)):
                before_N[rows[last_n]] = (chunk_sums(value, chunk, count)[kept_c] - value[last]).to(before_N.dtype)
        return nowhere_n.index_copy(0, last_n, last_m)

    # what credit rules and the record of the step want to know

    def total_B(self, logp_N: Tensor) -> Tensor:
        """(B,) log q(response): the chunks' own sums, the student's log b where nothing was scored."""
        alone_N = torch.where(self.across_N, self.behavior_logp_N + self.by_mode["shift"] * self.scored_N, logp_N)
        return alone_N.new_zeros(len(self.rollout.length_B)).index_add(0, self.sequence_N, alone_N)

    def spread(self, other_N: Tensor) -> Tensor:
        """log r(a) of a model with the student's tokenizer, in the currency of the effective log-probs: log q
        - log r becomes the log-ratio of the whole chunk, as log q - log b is."""
        mode = self.cfg.chunk_credit
        if mode == "prefix":        # already one value per student token
            return other_N
        mode = "chunk" if mode == "strict" else mode
        spread_N, _ = credit(mode, self.behavior_logp_N, other_N, self.chunk_N, self.chunk_N)
        return torch.where(self.size_N2[:, 0] == 1, other_N, spread_N)

    def metrics(self) -> dict[str, float]:
        """How well the two tokenizers fit on this step, over the rows read across."""
        across_N, size_N = self.across_N, self.size_N2[self.across_N]
        B = max(1, len(self.readings) + self.dropped.total())
        rows, chunks = max(1, int(across_N.sum())), (size_N[:, 0] > 0) / size_N[:, 0].clamp(min=1)
        stops = torch.tensor(self.student_stops(), device=self.device)
        stop_N = across_N & self.scored_N & torch.isin(self.token_N, stops)
        found = {"strict_coverage": float((size_N == 1).all(1).sum()) / rows,
                 "masked_share": float((across_N & ~self.scored_N).sum()) / rows,
                 "dropped_share": self.dropped.total() / B,
                 "stop_advantage": float(self.by_mode[self.cfg.chunk_credit][stop_N].mean()),
                 "teacher_tokens": sum(len(reading.ids) for reading in self.readings.values()),
                 "align_seconds": self.seconds}
        for size in (1, 2, 3, 4):
            of_size = (size_N[:, 0] == size) if size < 4 else size_N[:, 0] >= 4
            found[f"chunks_of_{size}{'+' * (size == 4)}"] = float(chunks[of_size].sum() / chunks.sum().clamp(min=1))
        for mode, a_N in self.by_mode.items():
            if mode == "prefix" and self.cfg.chunk_credit != "prefix":     # needs masses that were not asked for
                continue
            found[f"advantage_sum/{mode}"] = float(a_N[across_N].sum()) / B
        return found

    def student_stops(self) -> list[int]:
        return sorted({i for bridge in self.bridges if bridge for i in bridge.student_stop})


class CrossPart(Part):
    """The rows that a teacher with another tokenizer scored."""

    def __init__(self, sequence_b: Tensor, place_N: Tensor, hidden_mE: Tensor, head_VE: Tensor, crossing: Crossing,
                 bridge: Bridge, told: dict[str, Tensor]):
        super().__init__(sequence_b, place_N, hidden_mE, head_VE, crossing.token_N, crossing.cfg)
        self.crossing, self.told = crossing, told
        self.shared = tuple(ids.to(head_VE.device) for ids in bridge.shared)

    def fields(self, row_n: Tensor) -> dict[str, Tensor]:
        return super().fields(row_n) | {"student_before_N": self.crossing.student_before_N[row_n],
                                        "teacher_before_N": self.crossing.teacher_before_N[row_n],
                                        "paired_N": self.place_N[row_n] >= 0}

    def rows(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> CrossRows:
        own = {name: value for name, value in fields.items() if name not in ("teacher_logits_NV", "token_N")}
        student_NV, teacher_NV = (upcast(x_NV).log_softmax(-1) for x_NV in (logits_NV, fields["teacher_logits_NV"]))
        student_NK, teacher_NK, place_N = on_shared(student_NV, teacher_NV, fields["token_N"], self.shared)
        return CrossRows(student_NK, place_N, teacher_NK, student_all_NV=student_NV, teacher_all_NV=teacher_NV,
                         drawn_N=fields["token_N"], shared=self.shared, **own)

    def top_ids(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> None:
        return None


# What a step does differently

def asks_teacher(cfg) -> bool:
    """Does the advantage or the weight look at what the teacher says of the tokens drawn?"""
    rules = [WEIGHTS[cfg.weight]] + [ADVANTAGES[cfg.advantage]] * (cfg.divergence in USES_ADVANTAGE)
    return any(name.startswith("teacher") for rule in rules for name in rule.asks)


def taught(cfg, crossing: Crossing) -> Tensor | int:
    """1 for rows that this run's loss can learn from across tokenizers: all, when it never asks the teacher."""
    if cfg.divergence in USES_ADVANTAGE:
        return crossing.scored_N if asks_teacher(cfg) else 1
    return 1 if cfg.divergence == "cross_entropy" else crossing.paired_N


def only_taught(scale_N: Tensor, taught_N: Tensor | int) -> Tensor:
    """0 where nothing can be learned, also where a rule is NaN there."""
    return torch.where(taught_N, scale_N, 0.0) if isinstance(taught_N, Tensor) else scale_N


def attach_crossing(run) -> None:
    scale, observe, step = run.scale, run.observe, run.step
    # rows without credit stay in the denominator
    run.scale = lambda run, s, weight_N: only_taught(scale(run, s, weight_N), taught(run.cfg, run.teacher.crossing))
    run.step = lambda run, *rest: step(run, *rest) | run.teacher.crossing.metrics()

    def observe_paired(rows, top_ids_NK) -> dict[str, Tensor]:
        """Rows that stand beside no distribution of the teacher compare nothing."""
        noted = observe(rows, top_ids_NK)
        if not isinstance(rows, CrossRows):
            return noted
        return {name: value if name == "sampler_gap" else torch.where(rows.paired_N, value, torch.nan)
                for name, value in noted.items()}
    run.observe = observe_paired


plain_total = teacher_file.teacher_total


def teacher_total(run, batch: Batch, parts: list[Part]) -> Tensor:
    """(B,) log q(response); across tokenizers the effective values do not sum to it."""
    if getattr(run.teacher, "crossing", None) is None:
        return plain_total(run, batch, parts)
    return run.teacher.crossing.total_B(teacher_file.told("teacher_logp_N")(run, batch, parts))


teacher_file.SIGNALS["teacher_total_B"] = teacher_total
