"""One stop: a teacher with the student's vocabulary that ends its turns with other tokens.

After any of `ids`, the stop tokens S of both, a response is over; which of them was drawn means nothing, so both sides
are compared with S as one word:

    p'(stop) = sum over s in S of p(s),   p'(v) = p(v) for every v outside S,   q' likewise

and the token drawn, its log-probs (b', p', q') and every divergence are those of this smaller vocabulary. The first of
`ids` stands for the word: the sampler draws it with the mass of all, and in texts that others wrote it replaces each s.
The student's responses end at every s in S, the teacher's own among them: else p' would count as a stop what goes on.
Compared id by id, a student that ends with <|endoftext|> under a teacher that ends with <|im_end|> pays for every stop:
it unlearns stopping, and its responses grow to the limit.

From OPD length inflation, arXiv:2609.20511 (`semantic_class` in its code), which does it for the sampled token; that
dense losses and entropies see the sum too is our reading. A student that is its own teacher is at rest under both.
"""
import torch
from torch import Tensor

import rollout
from losses import Rows, upcast
from support.tokenizer import Tokenizer
from teacher import TOLD, Part, log_probs

plain_sample = rollout.sample


def stops_of_all(student: Tokenizer, teachers: list[Tokenizer]) -> tuple[int, ...]:
    """The stop ids of either side, the student's first, when teachers with its vocabulary end their turns with others;
    () when all agree."""
    sets = [dict.fromkeys(side.stop_ids) for side in (student, *teachers)]
    if all(ids.keys() == sets[0].keys() for ids in sets):
        return ()
    return tuple(dict.fromkeys(i for ids in sets for i in ids))


def fold(logp_NV: Tensor, ids: Tensor) -> Tensor:
    """log p': the sum in the place of the first id, no mass in those of the others. -1e30 and not -inf, which turns
    into NaN in an entropy and in a backward pass."""
    mass_N1 = logp_NV[:, ids].logsumexp(-1, keepdim=True)
    return logp_NV.index_fill(1, ids, -1e30).index_copy(1, ids[:1], mass_N1)


def word(token_N: Tensor, ids: Tensor) -> Tensor:
    """The tokens in the smaller vocabulary."""
    return torch.where((token_N[:, None] == ids).any(1), ids[0], token_N)


class OneStopPart(Part):
    """The rows of such a teacher."""

    def __init__(self, part: Part, ids: Tensor):
        super().__init__(part.sequence_b, part.place_N, part.hidden_nE, part.head_VE, word(part.token_N, ids), part.cfg)
        self.ids = ids

    def rows(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> Rows:
        own = {name: value for name, value in fields.items() if name not in ("teacher_logits_NV", "token_N")}
        student_NV, teacher_NV = (fold(upcast(x_NV).log_softmax(-1), self.ids)
                                  for x_NV in (logits_NV, fields["teacher_logits_NV"]))
        return Rows(student_NV, word(fields["token_N"], self.ids), teacher_NV, **own)

    def top_ids(self, logits_NV: Tensor, fields: dict[str, Tensor]) -> None:
        return None

    def tell(self, row_n: Tensor) -> dict[str, Tensor]:
        logp_nV = fold(log_probs(self.hidden_nE[self.place_N[row_n]], self.head_VE, self.cfg.temperature), self.ids)
        return {name: tell(logp_nV, self.token_N[row_n]) for name, tell in TOLD.items()}


def sampler(ids: Tensor):
    """rollout.sample over the smaller vocabulary: the stop that is drawn is the first of ids, with the mass of all."""
    def sample(logits_BV: Tensor, temperature: float, uniform_B: Tensor):
        scale = temperature or 1.0
        return plain_sample(fold(upcast(logits_BV) / scale, ids) * scale, temperature, uniform_B)
    return sample


def with_one_stop(write, ids: tuple[int, ...]):
    """The source `write`, with rollout.sample replaced by that sampler."""
    def writing(run, step: int):
        rollout.sample = sampler(torch.tensor(ids, device=run.actor.device))    # a CUDA graph could not copy them
        try:
            return write(run, step)
        finally:
            rollout.sample = plain_sample
    return writing
