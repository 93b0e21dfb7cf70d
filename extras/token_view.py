"""Token view: a few responses of the first, the middle and the last step, token by token, for the run's report.html.

Kept is what the step used, before the update: the student's and the teacher's probabilities of each token and the eight
likeliest of both, KL, entropies, credit and weight; across tokenizers also how the teacher cut the text. Beside the
step's own responses a few to held-out problems. Three steps of a run pay for it; tokens/ stays below about 3 MB.

Attached from outside, around the step, its weights and the teacher; nothing that it does changes a number of the run.
"""
import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from losses import ADVANTAGES, USES_ADVANTAGE, group_advantage
from rollout import generate
from support import memory
from support.flags import opt
from support.run_folder import write_text, writing
from teacher import Batch, Nobody, Part, Teacher

EACH = 4            # responses of either kind
TOKENS = 160        # of a response that are kept
TOP = 8             # likeliest tokens of each side


@dataclass(frozen=True)
class Flags:
    token_view: bool = opt(True, "keep a few responses of the first, the middle and the last step for report.html, "
                                 "with what student and teacher gave each token")


def attach(run) -> None:
    if run.cfg.token_view and memory.processes() == 1:
        run.before_first_step.append(begin)


def begin(run, folder, state) -> None:
    View(run, folder)


class View:
    """Wraps what a step is made of."""

    def __init__(self, run, folder):
        self.folder, self.steps = folder.path / "tokens", {0, run.cfg.steps // 2, run.cfg.steps - 1}
        self.parts, self.train = None, None         # of the step at work
        self.step, self.weigh, self.ask = run.step, run.weigh, run.teacher.parts
        run.step, run.weigh, run.teacher.parts = self.kept_step, self.noted_weigh, self.noted_parts

    def noted_parts(self, batch: Batch) -> list:
        self.parts = self.ask(batch)
        return self.parts

    def noted_weigh(self, run, s) -> Tensor:
        weight_N = self.weigh(run, s)
        if run.batch.step in self.steps:
            credit = {"weight": weight_N, "behavior_logp": s.behavior_logp_N}
            if run.cfg.divergence in USES_ADVANTAGE:
                credit["advantage"] = ADVANTAGES[run.cfg.advantage](s, run.cfg)
            if "teacher_logp_N" in vars(s):
                credit["teacher_logp"] = s.teacher_logp_N
            if "reward_B" in vars(s) and run.cfg.samples > 1:
                credit["verdict"] = (s.finished_B * group_advantage(s, divide=False))[s.sequence_N]
            chosen = varied(run.batch, weight_N)
            self.train = told(run, run.batch, self.parts, credit, chosen)
        return weight_N

    def kept_step(self, run, optimizer, step: int, clock) -> dict:
        held_out = self.held_out(run, step) if step in self.steps else None
        record = self.step(run, optimizer, step, clock)
        if held_out is not None:
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
            view = {"step": step + 1, "training": self.train, "held-out": held_out}
            write_text(self.folder / f"step-{step + 1:06}.json", json.dumps(view, separators=(",", ":")) + "\n")
        self.parts = self.train = None
        return record

    @torch.no_grad()
    def held_out(self, run, step: int) -> list[dict]:
        """What the student answers now to the first held-out problems, and what the teacher says of that."""
        cfg, problems = run.cfg, run.held_out[:EACH]
        if run.actor is not run.student:
            run.actor.refresh(run.student)
        rollout = generate(run.actor, [run.tokenizer.prompt_ids(problem.prompt) for problem in problems],
                           max_new_tokens=cfg.eval_max_new_tokens or cfg.max_new_tokens, temperature=cfg.temperature,
                           stop_ids=run.tokenizer.stop_ids, seed=step, slots=EACH)
        batch = Batch(rollout, list(range(len(problems))), problems, True, step, run.tokenizer, cfg.verifier)
        parts = (self.ask if run.kind.compares(problems) else Nobody().parts)(batch)
        return told(run, batch, parts, {"behavior_logp": rollout.rows(rollout.logp_BT)}, range(len(problems)))


def varied(batch: Batch, weight_N: Tensor) -> list[int]:
    """Responses that differ: right and wrong, dropped and kept, cut and finished, as far as there are such."""
    kept_B = torch.zeros(len(batch.asked)).index_add(0, batch.rollout.sequence_N.cpu(), weight_N.cpu().float()) > 0
    kinds: dict[str, list[int]] = {}        # a kind as text: NaN, a reward that nobody knows, equals itself there
    for b, kind in enumerate(zip(batch.reward_B.tolist(), kept_B.tolist(), batch.rollout.finished_B.tolist())):
        kinds.setdefault(str(kind), []).append(b)
    chosen: list[int] = []
    while len(chosen) < min(EACH, len(batch.asked)):
        for members in kinds.values():
            chosen += [members.pop(0)] if members else []
    return sorted(chosen[:EACH])


@torch.no_grad()
def told(run, batch: Batch, parts: list, credit: dict[str, Tensor], chosen) -> list[dict]:
    """One record for each of the chosen responses; credit: (N,) each, of the whole step."""
    rollout, token_N = batch.rollout, batch.rollout.rows(batch.rollout.tokens_BT)
    student = Teacher(run.student, run.cfg).read(batch, torch.tensor(list(chosen), device=token_N.device))
    found = []
    for b in chosen:
        row_n = (rollout.sequence_N == b).nonzero().squeeze(1)[:TOKENS]
        part = next(part for part in parts if (part.sequence_b == b).any())
        columns, top = beside(student, part, row_n, run, credit, theirs := tokenizer_of(run, batch.problems[b]))
        columns |= {name: value_N[row_n] for name, value_N in credit.items()}
        asked = batch.problems[b].prompt
        found.append({
            "prompt": (asked if isinstance(asked, str) else asked[-1]["content"])[-2000:],
            "pieces": pieces(run.tokenizer, token_N[row_n].tolist()), "length": int(rollout.length_B[b]),
            "finished": bool(rollout.finished_B[b]), "right": short(batch.reward_B[b].item()), "top": top,
            "columns": {name: [short(x) for x in value_n.tolist()] for name, value_n in columns.items()},
            **cut_by_teacher(run, b, theirs)})
    return found


NOTED = {"kl": ("reverse_kl",), "kl_at_least": ("reverse_kl_at_least", "coarse_kl"),
         "student_entropy": ("student_entropy",), "teacher_entropy": ("teacher_entropy",)}      # ours: run.observe's


def beside(student: Part, part, row_n: Tensor, run, credit: dict[str, Tensor], theirs) -> tuple[dict, list[list]]:
    """({name: (n,)}, the likeliest tokens of student and teacher) of these rows; NaN and nothing where the teacher has
    no distribution beside a row."""
    found: dict[str, list[Tensor]] = {}
    tops: list[list] = []
    for few_n in row_n.split(run.cfg.chunk_rows):
        logits_nV = student.fields(few_n)["teacher_logits_NV"].clone()
        own = {"token_N": student.token_N[few_n], "behavior_logp_N": credit["behavior_logp"][few_n]}
        fields = part.fields(few_n)
        rows = part.rows(logits_nV, fields | own)
        values = run.observe(rows, part.top_ids(logits_nV, fields | own))
        for name, sources in NOTED.items():
            found.setdefault(name, []).extend(values[source].double() for source in sources if source in values)
        if hasattr(rows, "teacher_logp_N") and len(fields):
            found.setdefault("teacher_logp", []).append(rows.teacher_logp_N())
        told_n = paired(rows, few_n, what_is_told(rows, fields, theirs))
        tops += map(list, zip(likeliest(logits_nV, run.tokenizer), told_n))
    return {name: torch.cat(values) for name, values in found.items() if values}, tops


def paired(rows, row_n: Tensor, told_n: list) -> list:
    """Across tokenizers some rows stand beside no distribution of the teacher."""
    paired_N = getattr(rows, "paired_N", torch.ones_like(row_n, dtype=torch.bool)).tolist()
    return [told if beside else [] for told, beside in zip(told_n, paired_N)]


def what_is_told(rows, fields: dict[str, Tensor], tokenizer) -> list[list]:
    """The teacher's likeliest tokens: by its distribution, or those that it told."""
    if "teacher_logits_NV" in fields:
        return likeliest(fields["teacher_logits_NV"], tokenizer)
    id_NK, logp_NK = (fields.get(name, getattr(rows, other, None)) for name, other in
                      (("told_id_NK", "id_NK"), ("told_logp_NK", "top_NK")))
    if id_NK is None:
        return [[] for _ in range(len(rows.student_NV))]
    return with_shares(id_NK[:, :TOP], logp_NK[:, :TOP].float().exp(), tokenizer)


def likeliest(logits_nV: Tensor, tokenizer) -> list[list]:
    """[[token, probability], ...] of each row, the likeliest first."""
    top_nk = logits_nV.float().softmax(-1).topk(min(TOP, logits_nV.shape[1]))
    return with_shares(top_nk.indices, top_nk.values, tokenizer)


def with_shares(id_nk: Tensor, share_nk: Tensor, tokenizer) -> list[list]:
    return [list(map(list, zip(pieces(tokenizer, ids), map(short, shares))))
            for ids, shares in zip(id_nk.tolist(), share_nk.tolist())]


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """Each token alone as text; a part of a character shows as the replacement character."""
    return [tokenizer.decode([i], skip_special=False) for i in ids]


def tokenizer_of(run, problem):
    """The tokenizer whose ids the problem's teacher speaks in."""
    return run.kind.tokenizers[run.kind.which(problem)] if hasattr(run.kind, "tokenizers") else run.tokenizer


def cut_by_teacher(run, b: int, theirs) -> dict:
    """Across tokenizers: the teacher's tokens of response b, and the chunk that each token on both sides belongs to."""
    crossing = getattr(run.teacher, "crossing", None)
    reading = crossing and crossing.readings.get(b)
    if not reading:
        return {}
    return {"chunks": reading.student_chunk[:TOKENS], "their_pieces": pieces(theirs, reading.ids[:2 * TOKENS]),
            "their_chunks": reading.teacher_chunk[:2 * TOKENS]}


def short(x: float) -> float | None:
    """Four digits; None for what is not known."""
    return float(f"{x:.4g}") if math.isfinite(x) else None
