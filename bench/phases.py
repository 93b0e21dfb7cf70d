"""One step of this project, phase by phase, for the benchmarks that time it."""
from dataclasses import replace
from types import SimpleNamespace

from common import compile_models  # isort: skip

import torch

import losses
import train
from extras import fast
from losses import row_scale
from model import Transformer
from rollout import generate
from support.extras import offers
from support.memory import auto_chunk
from support.metrics import observe, summarise
from teacher import Batch, Teacher


class Phases:
    """rollout, scoring, backward, update: each works on what the one before it left."""

    def __init__(self, student: Transformer, teacher: Transformer, cfg, vocab: int, compile: bool = False):
        chunk_rows = auto_chunk(cfg, vocab, student.device, student.compute_dtype)
        self.cfg = replace(cfg, chunk_rows=chunk_rows)
        student.vocab_size = teacher.vocab_size = vocab
        self.student = self.actor = student
        if student.compute_dtype != torch.float32:
            self.actor = student.copy_as(student.compute_dtype)
            for faster in offers("on_model"):
                faster(self.actor)
        fast.of_a_run(student, self.actor, {student, self.actor, teacher.requires_grad_(False)}, compile)
        if compile:
            compile_models({student, self.actor, teacher})
        self.teacher = Teacher(teacher, self.cfg)
        self.optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0, fused=True)
        self.run = SimpleNamespace(cfg=self.cfg, asks=())

    def refresh(self) -> None:
        if self.actor is not self.student:
            self.actor.refresh(self.student)

    def rollout(self, prompts: list[list[int]], new: int | list[int], samples: int = 1, seed: int = 0) -> None:
        written = generate(self.actor, prompts, samples=samples, max_new_tokens=new, stop_ids=(), seed=seed,
                           slots=len(prompts) * samples)
        asked = list(range(len(written.length_B)))
        self.batch = Batch(written, asked, [None] * len(asked), True, 0)

    def scoring(self) -> None:
        self.parts = self.teacher.parts(self.batch)

    def backward(self) -> None:
        s = train.signals(self.run, self.batch, self.parts)
        fields_N = {"token_N": s.token_N, "behavior_logp_N": s.behavior_logp_N}
        self.scale_N = row_scale(s, torch.ones_like(s.behavior_logp_N), "token")
        losses.zero_gradients(self.student)
        self.noted = losses.backward(self.student, self.batch.rollout, self.parts, fields_N, self.scale_N,
                                     losses.DIVERGENCES[self.cfg.divergence], self.cfg, observe)

    def update(self) -> dict:
        """As train.update goes on: clip, look, step, means."""
        rollout, noted = self.batch.rollout, dict(self.noted)
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        loss = (noted.pop("loss") * self.scale_N).sum()
        if bool(torch.isfinite(loss) & torch.isfinite(norm)):
            self.optimizer.step()
        return summarise(noted, rollout.position_N, rollout.length_B[rollout.sequence_N])
