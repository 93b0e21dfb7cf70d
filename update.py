"""Update: one step as rows, their scale, the backward pass, the optimizer step.

Place in the loop:  rollout -> teacher -> credit -> [UPDATE].  Everything that belongs to the whole step
(which sequence a row is of, the denominator) is settled here before the first micro-batch exists, so
micro-batches cannot change it.
"""
import torch
from torch import Tensor

import losses
import parallel
from checkpoint import trainable
from credit import Signals
from losses import DIVERGENCES
from model import Transformer
from rollout import Rollout
from teacher import Scores


def row_places(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """(sequence_N, position_N): which sequence a response token belongs to, and its place there from 0."""
    B, T = rollout.tokens_BT.shape
    sequence_BT = torch.arange(B, device=rollout.tokens_BT.device)[:, None].expand(B, T)
    position_BT = torch.arange(T, device=rollout.tokens_BT.device) - rollout.prompt_len_B[:, None]
    return rollout.rows(sequence_BT), rollout.rows(position_BT)


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


def backward(student: Transformer, rollout: Rollout, s: Signals, scores: Scores | None, scale_N: Tensor,
             advantage_N: Tensor | None, cfg, *, vocab_size: int, chunk_rows: int, divergence: str | None = None,
             add: bool = False) -> dict[str, Tensor]:
    """Leaves the gradient of sum_n scale_n loss_n in .grad, or adds it to what is there; the same for every
    micro-batch and chunk size. `divergence` overrides cfg's.

    Returns `loss` and, when there is a teacher, the diagnostics, each (N,) over all rows of the step.
    """
    scale_N, advantage_N = parallel.same(scale_N), parallel.same(advantage_N)
    for _, parameter in trainable(student):     # zeros, not None: the head's gradient is added by hand
        parameter.grad = parameter.grad if add else torch.zeros_like(parameter)
    head = parallel.take_head(student)
    head_grad_VD = head.grad[:vocab_size] if head.requires_grad else None
    head_VD = head.detach()[:vocab_size].to(student.compute_dtype)
    per_row: dict[str, Tensor] = {}
    crossing = scores.crossing if scores else None
    for part in scores.parts if scores else [None]:
        for tokens_bt, mask_bt, row_n in rollout.micro_batches(cfg.micro_batch_tokens, part and part.sequence_b):
            batch = {"token_N": s.token_N[row_n], "behavior_N": s.student_N[row_n],
                     "advantage_N": None if advantage_N is None else advantage_N[row_n]}
            if crossing:
                batch |= {"student_before_N": crossing.student_before_N[row_n],
                          "teacher_before_N": crossing.teacher_before_N[row_n]}
            loss_n, diagnosed = losses.chunked_backward(
                student.response_hidden(tokens_bt, mask_bt), head_VD, head_grad_VD, batch, scale_N[row_n],
                DIVERGENCES[divergence or cfg.divergence], cfg, temperature=cfg.temperature, chunk_rows=chunk_rows,
                teacher_hidden_NE=part.hidden_nE[part.place_N[row_n]] if part else None,
                teacher_head_VE=part.head_VE if part else None, shared=part.shared if part else None, diagnose=True)
            if crossing:        # rows that stand beside no distribution of the teacher compare nothing
                diagnosed = {name: torch.where(part.place_N[row_n] >= 0, value_n, torch.nan)
                             for name, value_n in diagnosed.items()}
            for name, value_n in {"loss": loss_n, **diagnosed}.items():
                per_row.setdefault(name, torch.zeros_like(scale_N))[row_n] = value_n.to(scale_N.dtype)
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
    before clipping and the mean diagnostics. A loss or gradient that is not finite moves nothing: skipped =
    1. offload: the moments live in host memory and visit the device for this call only."""
    grad_norm = parallel.whole(torch.nn.utils.clip_grad_norm_([p for _, p in trainable(student)], max_grad_norm))
    loss = (per_row.pop("loss") * scale_N).sum()
    finite = bool(torch.isfinite(loss) & torch.isfinite(grad_norm))
    if finite:
        if offload:
            move_moments(optimizer, student.device)
        optimizer.step()
        if offload:
            move_moments(optimizer, "cpu")
    return {"loss": loss.item(), "grad_norm": grad_norm.item(), "skipped": 0 if finite else 1,
            **losses.summarise(per_row, s.position_N, s.length_B[s.sequence_N])}
