"""Teacher: who scores the student's tokens, and what they hand over.

Place in the loop:  rollout -> [TEACHER] -> losses -> optimizer.

A teacher never writes here; it reads the student's sequence once and hands over, for every response token, its log-prob
of that token, its entropy, and its hidden state. Hidden states, not logits: N x width is small, N x vocabulary is not
(8,192 tokens x 151,936 words are 4.6 GiB in float32, the hidden states of a 4,096 wide teacher 64 MiB). losses.py
projects them a few rows at a time.

Not here: which loss will be used.
"""
from dataclasses import dataclass

import torch
from torch import Tensor

from losses import upcast
from model import Transformer
from rollout import Rollout
from tokenizer import Tokenizer, UserError


@dataclass(frozen=True)
class Scores:
    """What a teacher says about the N response tokens of a rollout, in Rollout.rows order. No gradient anywhere."""
    logp_N: Tensor          # float32: log q(token) at the sampling temperature
    entropy_N: Tensor       # float32, nats
    hidden_NE: Tensor       # teacher's compute dtype: the states that predict the tokens
    head_VE: Tensor         # (real vocabulary, E), same dtype: upcast(hidden @ head.T) are the logits


@torch.no_grad()
def score(model: Transformer, rollout: Rollout, *, vocab_size: int, temperature: float, max_tokens: int,
          chunk_rows: int) -> Scores:
    """One forward pass over the rollout, `max_tokens` tokens at a time, the head `chunk_rows` rows at a time.

    vocab_size cuts padding rows off the head: they stand for no token, and mass that leaks there would be lost to both
    sides (Qwen2.5: 151,936 rows for one size, 152,064 for another, 151,665 tokens).
    """
    n_rows = int(rollout.mask_BT.sum())
    head_VE = model.head_weight()[:vocab_size].to(model.compute_dtype)
    hidden_NE = torch.empty(n_rows, model.config.hidden_size, dtype=model.compute_dtype, device=model.device)
    for tokens_bt, mask_bt, row_n in rollout.micro_batches(max_tokens):
        hidden_NE[row_n] = model.response_hidden(tokens_bt, mask_bt)
    token_N = rollout.rows(rollout.tokens_BT)
    logps, entropies = [], []
    for start in range(0, n_rows, chunk_rows):
        at = slice(start, start + chunk_rows)
        logp_NV = (upcast(hidden_NE[at] @ head_VE.T) / temperature).log_softmax(-1)
        logps.append(logp_NV.gather(1, token_N[at, None]).squeeze(1))
        entropies.append(-(logp_NV.exp() * logp_NV).sum(-1))
    return Scores(torch.cat(logps), torch.cat(entropies), hidden_NE, head_VE)


def check_same_tokens(student: Tokenizer, teacher: Tokenizer, stop_ids: tuple[int, ...] | None) -> None:
    """UserError unless both read the same ids the same way and end their turns with the same ones. A base student under
    an instruct teacher with another stop token never learns to stop: its responses grow to the limit."""
    mine, theirs = student.vocab(), teacher.vocab()
    if mine != theirs:
        odd = sorted(set(mine.items()) ^ set(theirs.items()), key=lambda item: item[1])[0]
        raise UserError(f"student and teacher have different vocabularies ({len(mine)} and {len(theirs)} tokens; "
                        f"the first difference is {odd[0]!r} = id {odd[1]}); choose a teacher with the student's tokenizer")
    if stop_ids is None and set(student.stop_ids) != set(teacher.stop_ids):
        raise UserError(f"the student stops at ids {list(student.stop_ids)}, the teacher at {list(teacher.stop_ids)}; "
                        f"pass --stop_ids {','.join(map(str, teacher.stop_ids))} to train the student on the teacher's")
