"""Teacher: who scores the student's tokens, what they see, and what they hand over.

Place in the loop:  rollout -> [TEACHER] -> credit, losses -> optimizer.

A teacher never writes here; it reads every sequence once and hands over, for each response token, its
log-prob of that token, its entropy, and its hidden state. Hidden states, not logits: N x width is small, N x
vocabulary is not (8,192 tokens x 151,936 words are 4.6 GiB in float32, the hidden states of a 4,096 wide
teacher 64 MiB). update.py projects them a few rows at a time.

    one teacher            reads the student's own sequence
    several teachers       each reads the sequences that are routed to it; widths and families may differ
    another tokenizer      reads the same text cut into its own tokens (across.py)
    the student itself     as it was at the start, as a running average, or as it is now, reading a prompt
                           that holds more than the student saw (a reference solution): self-distillation

Whatever it sees, a teacher scores the same response tokens, so rows keep their order. Not here: which loss is
used.
"""
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import parallel
from diagnostics import diagnostics
from losses import OneStop, Rows, on_shared, upcast
from model import Transformer
from rollout import Rollout
from support.errors import NotFinite
from tokenizer import Tokenizer, UserError

if TYPE_CHECKING:
    from across import Crossing


@dataclass(frozen=True)
class Part:
    """The rows that one teacher scored."""
    sequence_b: Tensor      # int64: the sequences routed to it
    place_N: Tensor         # int64: where the row's teacher state stands in hidden_nE; -1 = another teacher's
                            # row, or (another tokenizer) one that no single token of the teacher answers
    hidden_nE: Tensor       # teacher's compute dtype: the states that predict the tokens
    head_VE: Tensor         # (real vocabulary, E), same dtype: upcast(hidden @ head.T) are the logits
    shared: tuple[Tensor, Tensor] | OneStop | None = None   # of losses.Rows


@dataclass(frozen=True)
class Scores:
    """What the teachers say about the N response tokens of a rollout, in Rollout.rows order. No gradient
    anywhere. A signal of one number per token is a line in `told` and a field here; it is NaN on rows for which a
    teacher has none to give (another tokenizer: Crossing.read), so that no rule takes a filling for an opinion."""
    logp_N: Tensor | None       # float32: log q(token) at the sampling temperature; None when nobody asked
    entropy_N: Tensor | None    # float32, nats
    teacher_B: Tensor       # int64: which teacher read a sequence
    parts: list[Part]
    crossing: "Crossing | None" = None      # when some teacher has another tokenizer: which rows it could score


SIGNALS = tuple(field.name for field in fields(Scores) if field.name.endswith("_N"))


def states(model: Transformer, rollout: Rollout, sequence_b: Tensor, place_N: Tensor, max_tokens: int) -> Tensor:
    """(n, E): the states that predict the n response tokens of these sequences; row i of the rollout stands
    at place_N[i]."""
    n = int(rollout.mask_BT[sequence_b].sum())
    hidden_nE = torch.empty(n, model.config.hidden_size, dtype=model.compute_dtype, device=rollout.tokens_BT.device)
    for tokens_bt, mask_bt, lengths, row_n in rollout.micro_batches(max_tokens, sequence_b, model.packs):
        hidden_nE[place_N[row_n]] = model.response_hidden(tokens_bt, mask_bt, lengths)
    return hidden_nE


def check_finite(model: Transformer, hidden_nE: Tensor) -> None:
    """NotFinite names the model whose states are no numbers, before a loss could blame another side."""
    if not torch.isfinite(hidden_nE).all():
        raise NotFinite(f"{model.title}'s hidden states are not finite on the tokens of this step")


def log_probs(hidden_nE: Tensor, head_VE: Tensor, temperature: float) -> Tensor:
    """(n, V), float32 at least."""
    return (upcast(hidden_nE @ head_VE.T) / temperature).log_softmax(-1)


def told(logp_NV: Tensor, token_N: Tensor) -> dict[str, Tensor]:
    """The signals of Scores, by name, of a teacher that reads the student's tokens."""
    return {"logp_N": logp_NV.gather(1, token_N[:, None]).squeeze(1),
            "entropy_N": -(logp_NV.exp() * logp_NV).sum(-1)}


def distributions(hidden_nE: Tensor, head_VE: Tensor, temperature: float, chunk_rows: int):
    """Yield (slice of rows, their log-probs over the vocabulary), chunk_rows rows at a time."""
    for start in range(0, len(hidden_nE), chunk_rows):
        at = slice(start, min(start + chunk_rows, len(hidden_nE)))
        yield at, log_probs(hidden_nE[at], head_VE, temperature)


@torch.no_grad()
def score(models: list[Transformer], rollout: Rollout, teacher_B: Tensor, *, vocab_size: int, temperature: float,
          max_tokens: int, chunk_rows: int, prompts: list[list[int]] | None = None,
          crossing: "Crossing | None" = None, tokens_too: bool = True, one_stop: tuple[int, ...] = ()) -> Scores:
    """Every sequence b read by models[teacher_B[b]], `max_tokens` tokens at a time, heads `chunk_rows` rows
    at a time.

    prompts    what is read before each response, in the ids of its teacher; None = what the student read.
    crossing   knows which teachers have another tokenizer, and scores for them; None = none has.
    tokens_too False: the hidden states are enough, no logp_N and entropy_N. A divergence projects them once more
               anyway, and over 151,936 words a projection costs more than a small teacher's layers.
    one_stop   stop ids that are one word for student and teacher (losses.OneStop); () = every id is its own.
    vocab_size cuts padding rows off the heads: they stand for no token, and mass that leaks there would be
    lost to both sides (Qwen2.5: 151,936 rows for one size, 152,064 for another, 151,665 tokens).
    """
    device = rollout.tokens_BT.device
    tokens_too = tokens_too or crossing is not None
    seen = rollout.with_prompts(prompts) if prompts else rollout
    token_N = rollout.rows(rollout.tokens_BT)
    sequence_N = rollout.sequence_N
    shared = OneStop(torch.tensor(one_stop, device=device)) if one_stop else None
    dtype = torch.promote_types(models[0].compute_dtype, torch.float32)
    found = {name: torch.full((len(token_N),), torch.nan, dtype=dtype, device=device) for name in SIGNALS}
    parts = []

    def note(rows: Tensor, signals: dict[str, Tensor]) -> None:
        for name, value in signals.items():
            found[name][rows] = value
    for number, model in enumerate(models):
        sequence_b = (teacher_B == number).nonzero().squeeze(1)
        if not len(sequence_b):
            continue
        rows = (teacher_B[sequence_N] == number).nonzero().squeeze(1)
        if crossing and crossing.bridges[number]:
            part, signals = crossing.read(number, model, sequence_b, rows, seen)
            note(rows, signals)
            parts.append(part)
            continue
        rows, sequence_b = rows[parallel.owned(sequence_N[rows])], sequence_b[parallel.owned(sequence_b)]
        place_N = torch.full_like(sequence_N, -1)
        place_N[rows] = torch.arange(len(rows), device=device)
        head_VE = model.head_weight()[:vocab_size].to(model.compute_dtype)
        hidden_nE = states(model, seen, sequence_b, place_N, max_tokens)
        check_finite(model, hidden_nE)
        for at, logp_NV in distributions(hidden_nE, head_VE, temperature, chunk_rows) if tokens_too else ():
            word_n = token_N[rows[at]]
            note(rows[at], told(shared.fold(logp_NV), shared.word(word_n)) if shared else told(logp_NV, word_n))
        parts.append(Part(sequence_b, place_N, hidden_nE, head_VE, shared))
    if not tokens_too:
        return Scores(**dict.fromkeys(SIGNALS), teacher_B=teacher_B, parts=parts)
    return Scores(**parallel.joined(found, parallel.owned(sequence_N)), teacher_B=teacher_B, parts=parts,
                  crossing=crossing)


@torch.no_grad()
def disagreement(student: Scores, teacher: Scores, *, temperature: float, chunk_rows: int) -> dict[str, Tensor]:
    """diagnostics.diagnostics, (N,) each, between one model's scores and another's on the same tokens: for credit
    rules and reports that have to see them before the update. `student` is scored by a single model. NaN on
    rows that no single token of a teacher with another tokenizer answers."""
    out: dict[str, Tensor] = {}
    (mine,) = student.parts
    for part in teacher.parts:
        for at in ((part.place_N >= 0) & (mine.place_N >= 0)).nonzero().squeeze(1).split(chunk_rows):
            p_NV, q_NV = (log_probs(side.hidden_nE[side.place_N[at]], side.head_VE, temperature)
                          for side in (mine, part))
            rows = Rows(p_NV, torch.zeros_like(at), q_NV, shared=part.shared)   # the token drawn plays no part
            for name, value in diagnostics(on_shared(rows) if part.shared else rows).items():
                out.setdefault(name, value.new_full((len(part.place_N),), torch.nan))[at] = value
    return parallel.joined(out, mine.place_N >= 0)


@torch.no_grad()
def update_average(average: Transformer, student: Transformer, decay: float) -> None:
    """average <- decay * average + (1 - decay) * student, LoRA merged: the EMA teacher of SDFT and SDPO."""
    weights = student.weights()
    for name, parameter in average.named_parameters():
        parameter.lerp_(parallel.like(weights[name], parameter).to(parameter.dtype), 1 - decay)


def stops_of_all(student: Tokenizer, teachers: list[Tokenizer]) -> tuple[int, ...]:
    """The stop ids of either side, the student's first, when teachers with its vocabulary end their turns with others
    (losses.OneStop); () when all agree."""
    sets = [dict.fromkeys(side.stop_ids) for side in (student, *teachers)]
    if all(ids.keys() == sets[0].keys() for ids in sets):
        return ()
    return tuple(dict.fromkeys(i for ids in sets for i in ids))


def same_stops(student: Tokenizer, teachers: list[Tokenizer], bridges: list) -> tuple[int, ...]:
    """stops_of_all of the teachers that read the student's ids (no bridge). When there are any, the student ends its
    responses at each of them, and so does the model that is saved."""
    teachers = [teacher for teacher, bridge in zip(teachers, bridges) if not bridge]
    ids = stops_of_all(student, teachers)
    if not ids:
        return ()
    theirs = next(teacher.stop_ids for teacher in teachers if set(teacher.stop_ids) != set(student.stop_ids))
    said = f"the student stops at ids {list(student.stop_ids)}, a teacher at {list(theirs)}"
    if any(bridges):
        raise UserError(f"{said}, and another teacher has another tokenizer; pass --stop_ids "
                        f"{','.join(map(str, theirs))} to train the student on the first one's")
    print(f"stop    {said}: one event here, and responses end at each of {list(ids)}, those of the saved model too "
          f"(--stop_ids chooses others)")
    student.stop_ids = ids
    return ids


def check_same_tokens(student: Tokenizer, teacher: Tokenizer) -> None:
    """UserError unless both read the same ids the same way."""
    mine, theirs = student.vocab(), teacher.vocab()
    if mine != theirs:
        odd = sorted(set(mine.items()) ^ set(theirs.items()), key=lambda item: item[1])[0]
        raise UserError(f"student and teacher have different vocabularies ({len(mine)} and {len(theirs)} tokens; "
                        f"the first difference is {odd[0]!r} = id {odd[1]}); choose a teacher with the "
                        f"student's tokenizer")
