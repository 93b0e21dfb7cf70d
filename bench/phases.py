"""One step of this project, phase by phase, for the benchmarks that time it."""
from dataclasses import replace

import torch

from memory import auto_chunk
from model import Transformer
from rollout import generate
from teacher import score
from update import backward, row_scale, signals, update


class Phases:
    """rollout, scoring, backward, update: each works on what the one before it left."""

    def __init__(self, student: Transformer, teacher: Transformer, cfg, vocab: int, compile: bool = False):
        self.student, self.teacher, self.cfg = student, teacher, replace(cfg, compile=compile)
        for model in (student, teacher) if compile else ():
            model.compile_layers()
        self.actor = student if student.compute_dtype == torch.float32 else student.copy_as(student.compute_dtype)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        self.sizes = dict(vocab_size=vocab, chunk_rows=auto_chunk(cfg, vocab, student.device, student.compute_dtype))

    def refresh(self) -> None:
        if self.actor is not self.student:
            self.actor.refresh(self.student)

    def rollout(self, prompts: list[list[int]], new: int | list[int], samples: int = 1, seed: int = 0) -> None:
        self.written = generate(self.actor, prompts, samples=samples, max_new_tokens=new, stop_ids=(), seed=seed,
                                slots=len(prompts) * samples, vocab_size=self.sizes["vocab_size"],
                                compile=self.cfg.compile)

    def scoring(self) -> None:
        self.scores = score([self.teacher], self.written, torch.zeros_like(self.written.length_B), temperature=1.0,
                            max_tokens=self.cfg.micro_batch_tokens, tokens_too=False, **self.sizes)

    def backward(self) -> None:
        self.signals = signals(self.written, torch.arange(len(self.written.length_B), device=self.student.device), None,
                               self.scores)
        self.scale_N = row_scale(self.signals, torch.ones_like(self.signals.student_N), "token")
        self.per_row = backward(self.student, self.written, self.signals, self.scores, self.scale_N, None, self.cfg,
                                **self.sizes)

    def update(self) -> None:
        update(self.student, self.optimizer, self.signals, self.scale_N, self.per_row, 1.0)
