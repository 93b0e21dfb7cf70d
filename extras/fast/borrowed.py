"""One low-precision copy of the student instead of two: the update multiplies with the sampler's.

Weights are trained in float32. Where products run in less, the sampler has a copy in their dtype, and a projection
casts its weight once more for every micro-batch and keeps the result for the backward pass: all of the model a second
time.
In place of model.Linear.forward and Transformer.head of the student; the gradient goes to the float32 weight as before,
and every digit is the same.
"""
from types import MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from extras.fast import ways
from extras.fast.ways import put, way
from model import Linear, Transformer

plain_linear = Linear.forward


class InPlaceOf(torch.autograd.Function):
    """The copy's values; the gradient goes to the weight that it was cast from, in that weight's dtype."""

    @staticmethod
    def forward(ctx, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.dtype), None


def lends(student: Transformer, actor: Transformer) -> bool:
    """Is there a copy for sampling whose weights are the student's, cast?  Adapters are merged in it."""
    return actor is not student and all(type(module) is Linear for name, module in student.named_modules()
                                        if name.endswith("_proj"))


def borrow(student: Transformer, actor: Transformer) -> None:
    """The copy takes over the student's weights before each reading, so it never lags behind an update."""
    own, plain_read = dict(actor.named_modules()), student.read

    def read(rollout, sequence_b: Tensor, max_tokens: int):
        if "borrowed_copy" not in ways.aside:
            actor.refresh(student)
        yield from plain_read(rollout, sequence_b, max_tokens)
    student.read = read

    @way("borrowed_copy", instead_of=MethodType(Transformer.head, student))
    def head() -> Tensor:
        actor.refresh(student)
        return actor.head()
    put("borrowed_copy", student, "head", head)
    for name, module in student.named_modules():
        if name.endswith("_proj"):
            put("borrowed_copy", module, "forward", MethodType(multiplying_with(own[name].weight), module))


def multiplying_with(copy: Tensor):
    """Linear.forward whose weight is `copy`, as long as the product is in the copy's dtype."""
    @way("borrowed_copy", instead_of=plain_linear)
    def forward(linear: Linear, x: Tensor) -> Tensor:
        if x.dtype != copy.dtype:
            return plain_linear(linear, x)
        bias = None if linear.bias is None else linear.bias.to(x.dtype)
        return F.linear(x, InPlaceOf.apply(linear.weight, copy), bias)
    return forward
