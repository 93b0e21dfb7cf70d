"""Update: one step as rows, their scale, the chunked backward pass, micro-batches, the optimizer step.

Place in the loop:  rollout -> teacher -> credit -> [UPDATE].  Everything that belongs to the whole step
(which sequence a row is of, the denominator) is settled here before the first micro-batch exists, so
micro-batches cannot change it. Of a micro-batch, a few rows at a time see the vocabulary, so chunks cannot
either, and (N, V) logits never exist.

Axes: N rows of the step, n of a micro-batch (N again inside chunked_backward), C rows of a chunk, V real
vocabulary, D student width, E teacher width. Not here: what a row's loss is (losses.py), what it counts
(credit.py).
"""
import functools

import torch
from torch import Tensor

import parallel
from checkpoint import trainable
from credit import Signals
from diagnostics import DIAGNOSTIC_K, diagnostics, summarise
from losses import DIVERGENCES, MIXTURES, TWO_VOCABULARIES, LossArgs, OneStop, Rows, on_shared, top_ids, upcast
from memory import rows_at_once
from model import Transformer
from rollout import Rollout
from teacher import Scores


# Rows and their scale

def row_places(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """(sequence_N, position_N): which sequence a response token belongs to, and its place there from 0."""
    place_T = torch.arange(rollout.tokens_BT.shape[1], device=rollout.tokens_BT.device)
    position_BT = place_T - rollout.prompt_len_B[:, None]
    return rollout.sequence_N, rollout.rows(position_BT)


def signals(rollout: Rollout, group_B: Tensor, reward_B: Tensor | None = None, scores: Scores | None = None,
            **more) -> Signals:
    """The whole step as rows."""
    sequence_N, position_N = row_places(rollout)
    return Signals(
        token_N=rollout.rows(rollout.tokens_BT), student_N=rollout.rows(rollout.logp_BT),
        student_entropy_N=rollout.rows(rollout.entropy_BT), sequence_N=sequence_N, position_N=position_N,
        length_B=rollout.length_B, group_B=group_B, finished_B=rollout.finished_B, reward_B=reward_B,
        teacher_B=scores.teacher_B if scores else None, teacher_N=scores.logp_N if scores else None,
        teacher_entropy_N=scores.entropy_N if scores else None,
        teacher_total_B=scores.crossing.total_B(scores.logp_N) if scores and scores.crossing else None, **more)


def row_scale(s: Signals, weight_N: Tensor, reduction: str) -> Tensor:
    """What each row's loss is multiplied by so that the step's loss is a mean: over all rows with a weight
    (token), or over the sequences that have one, each by its own mean (sequence). Counted over the whole
    step."""
    kept_N = (weight_N > 0).to(weight_N.dtype)
    if reduction == "token":
        return weight_N / kept_N.sum().clamp(min=1)
    per_sequence_B = torch.zeros_like(s.length_B, dtype=weight_N.dtype).scatter_add(0, s.sequence_N, kept_N)
    return weight_N / (per_sequence_B[s.sequence_N].clamp(min=1) * (per_sequence_B > 0).sum().clamp(min=1))


# The engine: exact losses in memory O(chunk).

CACHED_GRADIENT = 2**19     # entries of the head's gradient to which a CPU adds a bfloat16 product at a time: 2 MB


def few_rows(logits_NV: Tensor, teacher_NV: Tensor | None, fields: dict, scale_N: Tensor, divergence, args: LossArgs,
             shared: tuple[Tensor, Tensor] | None, top_NK: tuple[Tensor, Tensor] | None, diagnose: bool
             ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(sum of scale_n loss_n, loss_N, diagnostics per row): what sees the vocabulary, in one function to fuse."""
    rows = Rows(upcast(logits_NV).log_softmax(-1), shared=shared, **fields,
                teacher_NV=None if teacher_NV is None else upcast(teacher_NV).log_softmax(-1))
    compared = rows if shared is None else on_shared(rows)
    if isinstance(shared, OneStop):     # no loss asks which stop token it was
        rows = compared
    loss_N = divergence(rows if divergence in TWO_VOCABULARIES else compared, args)
    found = {}
    with torch.no_grad():
        if diagnose and teacher_NV is not None:
            found = diagnostics(compared, top_NK)
        if rows.behavior_N is not None:
            found["sampler_gap"] = (rows.student_N() - rows.behavior_N).abs()
    return (loss_N * scale_N).sum(), loss_N.detach(), found


@functools.cache
def fused_few_rows():
    return torch.compile(few_rows, dynamic=True)


def gradient_in_place(logits_NV: Tensor, teacher_NV: Tensor | None, fields: dict, scale_N: Tensor, divergence,
                      args: LossArgs, shared: tuple[Tensor, Tensor] | None, diagnose: bool, compile: bool
                      ) -> tuple[Tensor, dict[str, Tensor]]:
    """(loss_N, diagnostics per row) of few_rows; the gradient of the logits takes their place."""
    top_NK = None
    if diagnose and teacher_NV is not None and shared is None:      # a search cannot be fused
        top_NK = top_ids(logits_NV, DIAGNOSTIC_K), top_ids(teacher_NV, DIAGNOSTIC_K)
    leaf_NV = logits_NV.detach().requires_grad_()
    with torch.enable_grad():
        total, loss_N, found = (fused_few_rows() if compile else few_rows)(
            leaf_NV, teacher_NV, fields, scale_N, divergence, args, shared, top_NK, diagnose)
    (grad_NV,) = torch.autograd.grad(total, leaf_NV)
    logits_NV.copy_(grad_NV)
    return loss_N, found


def add_product(head_grad_VD: Tensor, grad_NV: Tensor, states_ND: Tensor) -> None:
    """head_grad += grad^T states. A bfloat16 product is rounded like every product and added up in float32; on a CPU a
    part of the head at a time, whose product then stays in cache."""
    if head_grad_VD.dtype == grad_NV.dtype:
        head_grad_VD.addmm_(grad_NV.T, states_ND)
        return
    V, D = head_grad_VD.shape
    part = max(1, CACHED_GRADIENT // D) if head_grad_VD.device.type == "cpu" else V
    for part_vD, grad_Nv in zip(head_grad_VD.split(part), grad_NV.split(part, 1)):
        part_vD += grad_Nv.T @ states_ND


@torch.no_grad()
def chunked_backward(hidden_ND: Tensor, head_VD: Tensor, head_grad_VD: Tensor | None, batch: dict, scale_N: Tensor,
                     divergence, args: LossArgs, *, temperature: float, chunk_rows: int,
                     teacher_hidden_NE: Tensor | None = None, teacher_head_VE: Tensor | None = None,
                     shared: tuple[Tensor, Tensor] | None = None, diagnose: bool = False, compile: bool = False
                     ) -> tuple[Tensor, dict[str, Tensor]]:
    """Backward of sum_n scale_n loss_n without ever holding (N, V) logits. Returns (loss_N, diagnostics per
    row).

    hidden_ND      student states with their graph; teacher_hidden_NE the teacher's, constants.
    head_VD        student head cut to the real vocabulary, in the dtype of hidden_ND; no gradient of its own.
    head_grad_VD   where its gradient is added (None: the head is frozen).
    batch          the (N,) fields of Rows: token_N, behavior_N, advantage_N ...
    shared         of Rows; None when both sides have one vocabulary and the same stop tokens.
    scale_N        weight of each row over the denominator of the whole optimizer step, counted before the
                   first micro-batch.
    compile        fuse what stands between the products (torch.compile).

    Two levels, because products want many rows and everything else wants to stay in cache. chunk_rows rows of
    both sides are projected at once into memory that every chunk uses again; then a few rows at a time run the
    loss backward as far as the logits, whose gradient takes their place; then two products turn it into the
    gradient of the states and of the head. At the end the states' gradient goes through the body once. Extra
    memory: 2 (chunk_rows, V) tensors and a few rows, whatever N is.
    """
    # both sides' states are divided by the temperature instead of their logits: V/D times less to go over
    states_ND, N = hidden_ND.detach() / temperature, len(hidden_ND)
    grad_ND, loss_N, per_row = torch.empty_like(states_ND), torch.empty_like(scale_N), {}
    logits_CV, teacher_CV = head_VD.new_empty(min(chunk_rows, N), len(head_VD)), None
    if teacher_hidden_NE is not None:
        teacher_hidden_NE = teacher_hidden_NE / temperature
        teacher_CV = teacher_head_VE.new_empty(min(chunk_rows, N), len(teacher_head_VE))
    few = rows_at_once(chunk_rows, len(head_VD), states_ND.device)
    for start in range(0, N, chunk_rows):
        at = slice(start, min(start + chunk_rows, N))
        logits_NV = torch.mm(states_ND[at], head_VD.T, out=logits_CV[:at.stop - start])
        if teacher_CV is not None:
            torch.mm(teacher_hidden_NE[at], teacher_head_VE.T, out=teacher_CV[:at.stop - start])
        for first in range(start, at.stop, few):
            here = slice(first, min(first + few, at.stop))
            inside = slice(first - start, here.stop - start)
            loss_N[here], found = gradient_in_place(
                logits_NV[inside], None if teacher_CV is None else teacher_CV[inside].detach(),
                {name: None if value is None else value[here] for name, value in batch.items()}, scale_N[here],
                divergence, args, shared, diagnose, compile)
            for name, value_N in found.items():
                per_row.setdefault(name, value_N.new_empty(N))[here] = value_N
        torch.mm(logits_NV, head_VD, out=grad_ND[at])
        if head_grad_VD is not None:
            add_product(head_grad_VD, logits_NV, states_ND[at])
    hidden_ND.backward(grad_ND / temperature)
    return loss_N, per_row


# The step

def backward(student: Transformer, rollout: Rollout, s: Signals, scores: Scores | None, scale_N: Tensor,
             advantage_N: Tensor | None, cfg, *, vocab_size: int, chunk_rows: int, divergence: str | None = None,
             add: bool = False) -> dict[str, Tensor]:
    """Leaves the gradient of sum_n scale_n loss_n in .grad, or adds it to what is there; the same for every
    micro-batch and chunk size. `divergence` overrides cfg's.

    Returns `loss` and, when there is a teacher, the diagnostics, each (N,) over all rows of the step.
    """
    scale_N, advantage_N = parallel.same(scale_N), parallel.same(advantage_N)
    for _, parameter in trainable(student):     # zeros, not None: the head's gradient is added by hand
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        elif not add:
            parameter.grad.zero_()
    head = parallel.take_head(student)
    head_grad_VD = head.grad[:vocab_size] if head.requires_grad else None
    head_VD = head.detach()[:vocab_size].to(student.compute_dtype)
    name = divergence or cfg.divergence
    fuse = cfg.compile and not (student.device.type == "cpu" and name in MIXTURES)  # logaddexp: twice as slow fused
    per_row: dict[str, Tensor] = {}
    crossing = scores.crossing if scores else None
    for part in scores.parts if scores else [None]:
        for tokens_bt, mask_bt, lengths, row_n in rollout.micro_batches(
                cfg.micro_batch_tokens, part and part.sequence_b, student.packs):
            batch = {"token_N": s.token_N[row_n], "behavior_N": s.student_N[row_n],
                     "advantage_N": None if advantage_N is None else advantage_N[row_n]}
            if crossing:
                batch |= {"student_before_N": crossing.student_before_N[row_n],
                          "teacher_before_N": crossing.teacher_before_N[row_n]}
            loss_n, diagnosed = chunked_backward(
                student.response_hidden(tokens_bt, mask_bt, lengths), head_VD, head_grad_VD, batch, scale_N[row_n],
                DIVERGENCES[name], cfg, temperature=cfg.temperature, chunk_rows=chunk_rows,
                teacher_hidden_NE=part.hidden_nE[part.place_N[row_n]] if part else None,
                teacher_head_VE=part.head_VE if part else None, shared=part.shared if part else None, diagnose=True,
                compile=fuse)
            if crossing:        # rows that stand beside no distribution of the teacher compare nothing
                beside_n = part.place_N[row_n] >= 0
                diagnosed |= {key: torch.where(beside_n, value_n, torch.nan)
                              for key, value_n in diagnosed.items() if key != "sampler_gap"}
            for key, value_n in {"loss": loss_n, **diagnosed}.items():
                per_row.setdefault(key, torch.zeros_like(scale_N))[row_n] = value_n.to(scale_N.dtype)
    parallel.give_head(student, head)
    return parallel.joined(per_row, parallel.owned(s.sequence_N))


def move_moments(optimizer, device) -> None:
    """AdamW's moments to `device`; the step count stays where its kernel wants it."""
    for state in optimizer.state.values():
        for key in state.keys() - {"step"}:
            state[key] = state[key].to(device)


def update(student: Transformer, optimizer, s: Signals, scale_N: Tensor, per_row: dict[str, Tensor],
           max_grad_norm: float, offload: bool = False) -> dict[str, float]:
    """One optimizer step on the gradient that backward() left. Returns the step's loss, the gradient norm
    before clipping and the mean diagnostics. A loss or gradient that is not finite moves nothing: skipped = 1.
    Nor does a gradient that is exactly zero (every group unanimous, every token masked), where AdamW would go on
    by its moments alone: empty = 1. offload: the moments live in host memory and visit the device for this call
    only."""
    grad_norm = parallel.whole(torch.nn.utils.clip_grad_norm_([p for _, p in trainable(student)], max_grad_norm))
    loss = (per_row.pop("loss") * scale_N).sum()
    finite = bool(torch.isfinite(loss) & torch.isfinite(grad_norm))
    if finite and grad_norm > 0:
        if offload:
            move_moments(optimizer, student.device)
        optimizer.step()
        if offload:
            move_moments(optimizer, "cpu")
    return {"loss": loss.item(), "grad_norm": grad_norm.item(), "skipped": int(not finite),
            "empty": int(finite and grad_norm == 0),
            **summarise(per_row, s.position_N, s.length_B[s.sequence_N])}
