"""Divided: who does which part of a step. Each function stands in place of the one it is named after and hands back the
whole, so that a filter or a group statistic sees the whole step.

    responses   request by request, those to one prompt on one process, which prefills it once
    rows        sequence b is read, forward and backward, on process b modulo the number of processes
"""
import torch
from torch import Tensor

import losses
import rollout as rollout_file
import teacher as teacher_file
from extras.parallel.group import Group, all_joined, broadcast, gather, joined
from extras.parallel.sharded import owned, whole_head, whole_model
from losses import upcast
from teacher import Batch, Part, Teacher

plain_respond, plain_read, plain_told = rollout_file.respond, Teacher.read, Part.told.func
plain_disagreement, plain_backward = teacher_file.disagreement, losses.backward


def respond(model, requests: list, **settings) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
    """Every process answers its share and gets all responses. Random streams are numbered by the whole step, so the
    text does not depend on the number of processes."""
    number: dict[int, int] = {}         # of each prompt
    process = [number.setdefault(id(request.prompt), len(number)) % Group.world for request in requests]
    mine, model = [request for request, rank in zip(requests, process) if rank == Group.rank], whole_model(model)
    found = plain_respond(model, mine, **settings) if mine else []
    tokens_N3, ends_S2 = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.int64)
    if mine:        # float64 holds ids and float32 numbers exactly
        tokens_N3 = torch.cat([torch.stack([x_t.double() for x_t in response[:3]], 1) for response in found])
        ends_S2 = torch.tensor([(len(tokens_t), finished) for tokens_t, _, _, finished in found], dtype=torch.int64)
    parts = [zip(rows_N3.split(sizes_S2[:, 0].tolist()), sizes_S2[:, 1].tolist())
             for rows_N3, sizes_S2 in zip(gather(tokens_N3), gather(ends_S2))]
    responses = (next(parts[rank]) for rank in process)
    return [(rows_t3[:, 0].long(), rows_t3[:, 1].float(), rows_t3[:, 2].float(), bool(finished))
            for rows_t3, finished in responses]


def read(teacher: Teacher, batch: Batch, sequence_b: Tensor) -> Part:
    """Teacher.read of this process's sequences. The part still says which ones the processes read between them."""
    part = plain_read(teacher, batch, sequence_b[owned(sequence_b)])
    part.sequence_b = sequence_b
    return part


def told(part: Part) -> dict[str, Tensor]:
    """Part.told of all processes' rows."""
    return {name: joined(value_N, part.place_N >= 0) for name, value_N in plain_told(part).items()}


def disagreement(student: Part, teachers: list[Part]) -> dict[str, Tensor]:
    nothing_N = upcast(student.hidden_nE.new_full(student.place_N.shape, torch.nan))
    return all_joined(plain_disagreement(student, teachers), student.place_N >= 0, nothing_N)


def backward(student, rollout, parts: list, fields_N: dict[str, Tensor], scale_N: Tensor,
             *rest) -> dict[str, Tensor]:
    """All processes computed weights and advantages from the same numbers, but a GPU adds in any order, and a filter
    that falls differently on two of them would belong to neither's step. So those of the first process are used."""
    scale_N = broadcast(scale_N)
    if "advantage_N" in fields_N:
        fields_N = {**fields_N, "advantage_N": broadcast(fields_N["advantage_N"])}
    with whole_head(student):
        noted = plain_backward(student, rollout, parts, fields_N, scale_N, *rest)
    return all_joined(noted, owned(rollout.sequence_N), torch.full_like(scale_N, torch.nan))


# Across tokenizers the chunks of a step are aligned as a whole

def whole_states(model, rollout, cfg) -> Tensor:
    part = Teacher(model, cfg).read(Batch(rollout, [], [], False, 0), rollout.every_B)
    mine_N = part.place_N >= 0
    hidden_NE = part.hidden_nE.new_zeros(len(mine_N), part.hidden_nE.shape[1])
    hidden_NE[mine_N] = part.hidden_nE
    return joined(hidden_NE, mine_N)


def whole_rows(value_N: Tensor) -> Tensor:
    return joined(value_N, ~value_N.isnan())
