"""Looks before the first step: do student and teacher match (--report_only), and are loss and gradient 0 where the
student is its own teacher (--self_check)?"""
from dataclasses import dataclass

import torch

import losses
from extras.teachers import Panel
from losses import DIVERGENCES, USES_ADVANTAGE
from support.errors import UserError
from support.flags import opt
from support.metrics import summarise
from support.tokenizer import Tokenizer
from support.weights import checkpoint_folder, load_model
from support.setup import check_same_tokens
from teacher import Teacher, disagreement, told


@dataclass(frozen=True)
class Flags:
    report_only: bool = opt(False, "print how well teacher and student match before any step, and stop")
    compare_teacher: str = opt("", "--report_only: a second teacher, compared with the first on the same student "
                                   "tokens")
    self_check: bool = opt(False, "first make the student its own teacher: loss and gradient must be 0")


def rules(cfg) -> list[tuple[bool, str]]:
    return [(not cfg.compare_teacher or cfg.report_only, "--compare_teacher belongs to --report_only"),
            (not cfg.report_only or cfg.teacher != "none",
             "--report_only compares the student with a teacher; there is none")]


def look(cfg):
    """What to do instead of training."""
    return report if cfg.report_only else None


def attach(run) -> None:
    if run.cfg.self_check:
        run.before_first_step.append(self_check)


def student_batch(run):
    """The first step's batch, written by the student whatever the recipe says."""
    _, write = run.sources[-1]
    return write(run, 0)


def self_check(run, folder, state) -> None:
    """The student as its own teacher is a fixed point: the loss and its gradient must vanish."""
    if state is not None:
        return
    cfg, batch = run.cfg, student_batch(run)
    part = Teacher(run.student, cfg).read(batch, batch.rollout.every_B)
    part = run.teacher.in_its_words(part) if isinstance(run.teacher, Panel) else part
    behavior_N = batch.rollout.rows(batch.rollout.logp_BT)
    teacher_N = told("teacher_logp_N")(run, batch, [part])
    fields_N = {"token_N": batch.rollout.rows(batch.rollout.tokens_BT), "behavior_logp_N": behavior_N}
    if cfg.divergence in USES_ADVANTAGE:
        fields_N["advantage_N"] = teacher_N - behavior_N
    scale_N = torch.full_like(behavior_N, 1 / len(behavior_N))
    losses.zero_gradients(run.student)
    noted = losses.backward(run.student, batch.rollout, [part], fields_N, scale_N, DIVERGENCES[cfg.divergence], cfg,
                            run.observe)
    norm = run.clip([p for _, p in run.student.trainable()], torch.inf).item()
    kl = noted["reverse_kl"].abs().max().item()
    gap = (teacher_N - behavior_N).abs().mean().item()
    # the three divergences that still move a student which equals its teacher have no gradient to check
    rests = cfg.divergence not in ("cross_entropy", "eopd", "topk_forward_kl")
    # decoding and scoring multiply in different orders: bfloat16 leaves 1e-2 nats between them, float32 1e-6
    exact = run.student.compute_dtype == torch.float32
    small = 1e-3 if exact or cfg.divergence not in USES_ADVANTAGE else 0.1
    print(f"check   student as its own teacher: largest token KL {kl:.1e}, sampler off by {gap:.1e} nats per token"
          + (f", gradient norm {norm:.1e}" if rests else "") + " (all should be 0)")
    if not (kl < 1e-3 and gap < (1e-3 if exact else 0.1) and (norm < small or not rests)):
        raise UserError("--self_check failed: the student differs from itself; sampler, scoring and training disagree")


def report(run) -> int:
    """Compatibility before any step (Rethinking OPD, arXiv:2604.13016, section 2.3): do student and teacher think alike
    on the student's own tokens? Overlap near 1 and KL near 0: nothing to learn; low overlap mass: another pattern, try
    --cold_start_steps; in between is where OPD works. No number alone decides."""
    batch = student_batch(run)
    rollout = batch.rollout
    with torch.no_grad():
        parts = run.teacher.parts(batch)
        if getattr(run.teacher, "crossing", None):
            from extras.cross_tokenizer.gate import print_fit
            print_fit(run, batch)
        student = Teacher(run.student, run.cfg).read(batch, rollout.every_B)
        tables = {"student and teacher": disagreement(student, parts)}
        if run.cfg.compare_teacher:
            other = Teacher(load_other(run), run.cfg).read(batch, rollout.every_B)
            tables["first teacher (as `teacher`) and --compare_teacher (as `student`)"] = disagreement(other, parts)
    for title, per_row in tables.items():
        found = summarise(per_row, rollout.position_N, rollout.length_B[rollout.sequence_N])
        print(f"\n{title}, {len(rollout.sequence_N)} tokens of {len(batch.asked)} responses\n"
              f"{'':26}{'all':>9}{'1st':>9}{'2nd':>9}{'3rd':>9}{'4th quarter':>13}")
        for name in per_row:
            cells = [found[name], *(found[f"{name}/q{quarter}"] for quarter in range(1, 5))]
            print(f"{name:26}" + "".join(f"{cell:9.4f}" for cell in cells[:4]) + f"{cells[4]:13.4f}")
    right = "" if batch.reward_B.isnan().any() else f", right {batch.reward_B.mean():.0%}"
    length, cut = rollout.length_B.double().mean(), 1 - rollout.finished_B.double().mean()
    print(f"\nmean length {length:.1f}, cut {cut:.0%}{right}")
    return 0


def load_other(run):
    """The model of --compare_teacher, checked like a teacher."""
    folder = checkpoint_folder(run.cfg.compare_teacher)
    check_same_tokens(run.tokenizer, Tokenizer(folder, run.cfg.chat_template))
    model = load_model(folder, dtype=run.student.compute_dtype, device=run.student.device).requires_grad_(False)
    model.title, model.vocab_size = "the second teacher", run.student.vocab_size
    return model
