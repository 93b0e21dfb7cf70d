"""Teacher: who scores the student's tokens, and what they hand over.

A teacher never writes here; it reads every sequence once and hands over its hidden states, from which everything else
follows: N x width is small, N x vocabulary is not (8,192 tokens x 151,936 words are 4.6 GiB in float32, the hidden
states of a 4,096 wide teacher 64 MiB). They are projected a few rows at a time, by the loss (losses.chunked_backward)
and, for rules that ask what the teacher says of the tokens drawn, by SIGNALS.

    Teacher     a model with the student's tokenizer that reads what the student read
    Part        what one teacher says about the sequences it read, rows in the order of Rollout.rows
    SIGNALS     what an advantage or a weight may ask for, and how it is found

Another kind of teacher is a class with one method, read(batch, sequence_b) -> Part: several teachers, the student
itself, another tokenizer are in extras/. What a teacher cannot say of a row is NaN, never 0.
"""
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from losses import Rows, top_ids, upcast
from model import Transformer
from rollout import Rollout
from support.errors import NotFinite
from support.metrics import DIAGNOSTIC_K, diagnostics
from support.tokenizer import Tokenizer
from support.verifier import grade


@dataclass(frozen=True)
class Batch:
    """The responses of one step."""
    rollout: Rollout
    asked: list[int]        # number of the problem that each sequence answers
    problems: list          # that problem, per sequence
    on_policy: bool         # did the student write them?
    step: int
    tokenizer: Tokenizer | None = None
    verifier: str = "auto"

    @cached_property
    def texts(self) -> list[str]:
        return [self.tokenizer.decode(self.rollout.response(b)) for b in range(len(self.asked))]

    @cached_property
    def reward_B(self) -> Tensor:
        """float32: 1 right, 0 wrong; NaN when some problem of the step has no answer to compare with."""
        reward_B = torch.full((len(self.asked),), torch.nan, device=self.rollout.tokens_BT.device)
        if all(problem.answer is not None for problem in self.problems):
            for b, (text, problem) in enumerate(zip(self.texts, self.problems)):
                reward_B[b] = float(grade(text, problem.answer, self.verifier))
        return reward_B


@dataclass(eq=False)
class Untaught:
    """Rows without a teacher: what the loss engine asks of every Part."""
    sequence_b: Tensor      # int64: the sequences these rows belong to

    def fields(self, row_n: Tensor) -> dict[str, Tensor]:
        """What the teacher's side adds to these rows of the step, one entry per row."""
        return {}

    def rows(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> Rows:
        """Rows as a divergence reads them, from the student's logits and fields (self.fields and those of the step)."""
        return Rows(upcast(logits_NV).log_softmax(-1), **fields)

    def top_ids(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """losses.top_ids of both sides, for the metrics."""
        return None


@dataclass(eq=False)
class Part(Untaught):
    """The rows that one teacher scored."""
    place_N: Tensor         # int64: where the row's teacher state stands in hidden_nE; -1 = not one of its rows
    hidden_nE: Tensor       # teacher's compute dtype: the states that predict the tokens
    head_VE: Tensor         # (real vocabulary, E), same dtype: upcast(hidden @ head.T) are the logits
    token_N: Tensor         # int64: the tokens drawn, of all rows
    cfg: object             # temperature, chunk_rows
    logits_CV: Tensor | None = None     # memory that every chunk of rows uses again

    def fields(self, row_n: Tensor) -> dict[str, Tensor]:
        # the states are divided by the temperature instead of their logits: V/E times less to go over
        states_nE = self.hidden_nE[self.place_N[row_n]] / self.cfg.temperature
        if self.logits_CV is None:
            self.logits_CV = self.head_VE.new_empty(min(self.cfg.chunk_rows, len(self.place_N)), len(self.head_VE))
        return {"teacher_logits_NV": torch.mm(states_nE, self.head_VE.T, out=self.logits_CV[:len(row_n)])}

    def rows(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> Rows:
        own = {name: value for name, value in fields.items() if name != "teacher_logits_NV"}
        teacher_NV = upcast(fields["teacher_logits_NV"]).log_softmax(-1)
        return Rows(upcast(logits_NV).log_softmax(-1), teacher_NV=teacher_NV, **own)

    def top_ids(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return top_ids(logits_NV, DIAGNOSTIC_K), top_ids(fields["teacher_logits_NV"], DIAGNOSTIC_K)

    @cached_property
    def told(self) -> dict[str, Tensor]:
        """TOLD of its rows, (N,) each and NaN elsewhere; float32 at least."""
        nothing_N = upcast(self.hidden_nE.new_full(self.place_N.shape, torch.nan))
        found = {name: nothing_N.clone() for name in TOLD}
        for row_n in (self.place_N >= 0).nonzero().squeeze(1).split(self.cfg.chunk_rows):
            for name, value_n in self.tell(row_n).items():
                found[name][row_n] = value_n
        return found

    def tell(self, row_n: Tensor) -> dict[str, Tensor]:
        logp_nV = log_probs(self.hidden_nE[self.place_N[row_n]], self.head_VE, self.cfg.temperature)
        return {name: tell(logp_nV, self.token_N[row_n]) for name, tell in TOLD.items()}


def log_probs(hidden_nE: Tensor, head_VE: Tensor, temperature: float) -> Tensor:
    """(n, V), float32 at least."""
    return (upcast(hidden_nE @ head_VE.T) / temperature).log_softmax(-1)


class Teacher:
    """A model with the student's tokenizer, which reads what the student read."""

    def __init__(self, model: Transformer, cfg):
        self.model, self.cfg = model, cfg

    def parts(self, batch: Batch) -> list[Part]:
        """What it says of a whole step."""
        return [self.read(batch, batch.rollout.every_B)]

    @torch.no_grad()
    def read(self, batch: Batch, sequence_b: Tensor) -> Part:
        """The sequences sequence_b of the step, cfg.micro_batch_tokens tokens at a time. Raises NotFinite for states
        that are no numbers, so that the student is not blamed for them."""
        rollout, model = batch.rollout, self.model
        mine_N = torch.isin(rollout.sequence_N, sequence_b)
        place_N = torch.where(mine_N, mine_N.cumsum(0) - 1, -1)
        hidden_nE = torch.empty(int(mine_N.sum()), model.config.hidden_size, dtype=model.compute_dtype,
                                device=model.device)
        for hidden_bE, row_b in model.read(rollout, sequence_b, self.cfg.micro_batch_tokens):
            hidden_nE[place_N[row_b]] = hidden_bE
        if not torch.isfinite(hidden_nE).all():
            raise NotFinite(f"{model.title}'s hidden states are not finite on the tokens of this step")
        return Part(sequence_b, place_N, hidden_nE, model.head(), rollout.rows(rollout.tokens_BT), self.cfg)


class Nobody:
    """No teacher: the verifier, or given responses, teach."""

    def parts(self, batch: Batch) -> list[Untaught]:
        return [Untaught(batch.rollout.every_B)]


# What a rule may ask for

TOLD = {    # what a teacher says of its rows: (its log-probs over the vocabulary, the token drawn) -> (n,)
    "teacher_logp_N": lambda logp_nV, token_n: logp_nV.gather(1, token_n[:, None]).squeeze(1),
    "teacher_entropy_N": lambda logp_nV, token_n: -(logp_nV.exp() * logp_nV).sum(-1),
}


def told(name: str):
    """The signal `name`, from whichever teacher read the row; NaN where none can say it."""
    def signal(run, batch: Batch, parts: list[Part]) -> Tensor:
        out_N = batch.rollout.rows(batch.rollout.logp_BT).new_full((len(batch.rollout.sequence_N),), torch.nan)
        for told_N in (part.told[name] for part in parts if name in part.told):
            out_N = torch.where(out_N.isnan(), told_N, out_N)
        return out_N
    return signal


def teacher_total(run, batch: Batch, parts: list[Part]) -> Tensor:
    """(B,) log q(response)."""
    logp_N = told("teacher_logp_N")(run, batch, parts)
    zeros_B = torch.zeros(len(batch.asked), dtype=logp_N.dtype, device=logp_N.device)
    return zeros_B.scatter_add(0, batch.rollout.sequence_N, logp_N)


def which_teacher(run, batch: Batch, parts: list[Part]) -> Tensor:
    """(B,) int64: a number for each teacher that read some of the step."""
    teacher_B = torch.zeros_like(batch.rollout.length_B)
    for number, part in enumerate(parts):
        teacher_B[part.sequence_b] = number
    return teacher_B


def reverse_kl(run, batch: Batch, parts: list[Part]) -> Tensor:
    """(N,) KL(p||q) over the vocabulary, from a pass of the student before the update."""
    student = Teacher(run.student, run.cfg).read(batch, batch.rollout.every_B)
    return disagreement(student, parts)["reverse_kl"]


SIGNALS = {     # name -> (run, batch, parts) -> tensor; what losses.asks may name
    **{name: told(name) for name in TOLD},
    "teacher_total_B": teacher_total,
    "teacher_B": which_teacher,
    "reward_B": lambda run, batch, parts: batch.reward_B,
    "reverse_kl_N": reverse_kl,
}


@torch.no_grad()
def disagreement(student: Part, teachers: list[Part]) -> dict[str, Tensor]:
    """support.metrics.diagnostics, (N,) each, between one model's part and others' on the same tokens: for credit rules
    and reports that have to see them before the update. NaN on rows that no teacher answers."""
    out: dict[str, Tensor] = {}
    for part in teachers:
        for row_n in ((part.place_N >= 0) & (student.place_N >= 0)).nonzero().squeeze(1).split(part.cfg.chunk_rows):
            logits_nV = student.fields(row_n)["teacher_logits_NV"]
            fields = part.fields(row_n) | {"token_N": student.token_N[row_n]}
            for name, value in diagnostics(part.rows(logits_nV, fields)).items():
                out.setdefault(name, value.new_full(part.place_N.shape, torch.nan))[row_n] = value
    return out
