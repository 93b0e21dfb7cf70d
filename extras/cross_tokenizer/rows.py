"""Rows of two vocabularies: what a divergence reads when the teacher has another tokenizer.

Both sides are cut to the tokens that both vocabularies have and divided by their mass there, so that any divergence of
the table compares them (strict 1:1 distillation, arXiv:2610.08448); log p(a) stays that of the whole vocabulary.
"""
from typing import NamedTuple

import torch
from torch import Tensor


class CrossRows(NamedTuple):
    """losses.Rows, and what stands behind them. Gradient flows through student_NV and student_all_NV only."""
    student_NV: Tensor                      # log p on the shared tokens (N, K)
    token_N: Tensor                         # a, as its place among the shared tokens
    teacher_NV: Tensor                      # log q on the shared tokens
    student_all_NV: Tensor                  # log p and log q, each over its own vocabulary
    teacher_all_NV: Tensor
    drawn_N: Tensor                         # a
    shared: tuple[Tensor, Tensor]           # ids of the shared tokens, student's and teacher's
    student_before_N: Tensor                # log b and log q of the tokens that stand before this row in its chunk
    teacher_before_N: Tensor
    paired_N: Tensor                        # bool: does a distribution of the teacher stand beside this row?
    behavior_logp_N: Tensor | None = None
    advantage_N: Tensor | None = None

    def student_logp_N(self) -> Tensor:
        return self.student_all_NV.gather(1, self.drawn_N[:, None]).squeeze(1)


def on_shared(student_NV: Tensor, teacher_NV: Tensor, token_N: Tensor, shared: tuple[Tensor, Tensor]
              ) -> tuple[Tensor, Tensor, Tensor]:
    """(student (N, K), teacher (N, K), token's place among the K) on the shared tokens."""
    student_id_K, teacher_id_K = shared
    place_V = torch.zeros(student_NV.shape[1], dtype=torch.int64, device=student_id_K.device)
    place_V[student_id_K] = torch.arange(len(student_id_K), device=student_id_K.device)
    student_NK, teacher_NK = (logp_NV[:, id_K].log_softmax(-1) for logp_NV, id_K in
                              ((student_NV, student_id_K), (teacher_NV, teacher_id_K)))
    return student_NK, teacher_NK, place_V[token_N]
