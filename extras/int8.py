"""Weights of eight bits: int8 with one scale per output row, symmetric; the products stay in the compute dtype.

    W_ij ~ scale_i q_ij    scale_i = max_j |W_ij| / 127    q = round(W / scale)    y = (x q^T) scale

A teacher's projections alone (--teacher_int8): its norms, embedding and head stay as they are loaded.
"""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from extras.lora import projections
from model import Linear
from rollout import Rollout, generate
from support.errors import UserError
from support.responses import from_responses
from teacher import Batch, Teacher, disagreement

COMPARED = 16       # responses on which the two teachers are compared


class Int8Linear(Linear):
    """A Linear whose weight is int8 (out, in), its scale (out,) in the dtype that the weight had."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)


@torch.no_grad()
def quantise(linear: Linear) -> None:
    """In place. The scale is rounded to the weight's dtype before it divides, so that its rounding is no error."""
    weight = linear.weight.float()
    scale = (weight.abs().amax(1) / 127).to(linear.weight.dtype)
    q = (weight / scale[:, None].float()).nan_to_num().round().clamp(-127, 127).to(torch.int8)   # NaN: a row of zeros
    linear.weight, linear.scale = (nn.Parameter(x, requires_grad=False) for x in (q, scale))
    linear.__class__ = Int8Linear


@torch.no_grad()
def quantise_teacher(run, number: int, place) -> None:
    """Every projection of teacher `number`; a line says how far that takes it from itself. place() lets the model read
    with the weights that it has at the moment."""
    model, rollout, parts = run.kind.models[number], responses(run, number), []
    for change in (lambda linear: None, quantise):
        for linear in projections(model):
            change(linear)
        place()
        parts.append(Teacher(model, run.cfg).read(Batch(rollout, [], [], False, 0), rollout.every_B))
    kl_N = disagreement(parts[0], parts[1:])["reverse_kl"]
    print(f"int8     teacher {number + 1}: KL(as loaded || int8) {kl_N.mean():.2e} nats per token, the mean over "
          f"{len(kl_N)} tokens of {len(rollout.every_B)} responses that the student wrote")


def responses(run, number: int) -> Rollout:
    """What the student writes to a few problems of this teacher, after the prompts and in the ids that it reads."""
    cfg, every = run.cfg, run.pick(len(run.train), range(len(run.train)), run.cfg.seed)
    ours = [i for i in every if run.kind.which(run.train[i]) == number][:COMPARED]
    if not ours:
        raise UserError(f"--teacher_int8: no problem of {cfg.data} is one of teacher {number + 1}'s, so that it cannot "
                        f"be compared with itself; leave it out of --teacher")
    written = generate(run.actor, [run.prompts[i] for i in ours], max_new_tokens=cfg.max_new_tokens, seed=cfg.seed,
                       temperature=cfg.temperature, stop_ids=run.tokenizer.stop_ids, slots=cfg.slots)
    writer = run.kind.writer(run, number, shown=True)
    ids = [(writer.tokenizer.encode(run.tokenizer.decode(written.response(b))) + [writer.tokenizer.stop_ids[0]]
            )[:cfg.max_new_tokens] for b in range(len(ours))]
    return from_responses([writer.prompt(i) for i in ours], ids, [True] * len(ids), run.student.device)
