"""Report: what can be said before the first step: do student and teacher match, do their tokenizers, does the
loop vanish at its fixed point?

Place in the loop: before it, on request (--report_only, --self_check).
"""
import math
from dataclasses import replace

import torch

import credit
import losses
import parallel
from across import PAIRING, Crossing
from checkpoint import trainable
from diagnostics import summarise
from prepare import Setup, load_other
from rollout import Rollout
from step import Clock, collect, look, read, taught
from teacher import Scores, disagreement
from tokenizer import UserError
from update import backward, row_scale, signals


def self_check(cfg, run: Setup) -> None:
    """The student as its own teacher is a fixed point: the loss and its gradient must vanish."""
    cfg = replace(cfg, lmbda=1.0, cold_start_steps=0)
    rollout, _, _ = collect(cfg, run, 0, {})
    scores = read(cfg, run, [run.student], rollout)
    s = signals(rollout, torch.arange(len(rollout.length_B), device=run.student.device), None, scores)
    advantage_N = credit.opd(s, cfg) if cfg.divergence in losses.USES_ADVANTAGE else None
    scale_N = row_scale(s, torch.ones_like(s.student_N), cfg.reduction)
    per_row = backward(run.student, rollout, s, scores, scale_N, advantage_N, cfg, vocab_size=run.vocab_size,
                       chunk_rows=run.chunk_rows)
    norm = torch.stack([parallel.whole(p.grad.norm()) for _, p in trainable(run.student)]).norm().item()
    kl = per_row["reverse_kl"].abs().max().item()
    gap = (scores.logp_N - s.student_N).abs().mean().item()
    # these pull towards something else than the teacher even when both agree; decoding and scoring multiply
    # in different orders: bfloat16 leaves 1e-2 nats between them, float32 1e-6
    rests = cfg.divergence not in ("cross_entropy", "eopd", "topk_forward_kl")
    exact = run.student.compute_dtype == torch.float32
    small = 1e-3 if exact or cfg.divergence not in losses.USES_ADVANTAGE else 0.1
    print(f"check   student as its own teacher: largest token KL {kl:.1e}, sampler off by {gap:.1e} nats per token"
          + (f", gradient norm {norm:.1e}" if rests else "") + " (all should be 0)")
    if not (kl < 1e-3 and gap < (1e-3 if exact else 0.1) and (norm < small or not rests)):
        raise UserError("--self_check failed: the student differs from itself; sampler, scoring and training disagree")


def check_tokenizers(cfg, run: Setup) -> None:
    """Teachers with another tokenizer: how well do the two fit on about 50 responses? Prints it; UserError
    when too little can be scored to learn from."""
    if not any(run.bridges):
        return
    probe = replace(cfg, lmbda=1.0, cold_start_steps=0, problems=math.ceil(50 / cfg.samples))
    rollout, _, scores, *_ = look(probe, run, 0, {}, Clock())
    found = print_fit(cfg, run, rollout, scores)
    covered, what, other = coverage(cfg, scores.crossing)
    for value, holds, what, flag, enough, other in (
            (covered, covered >= cfg.min_coverage, what, "min_coverage", math.floor, other),
            (found["dropped_share"], found["dropped_share"] <= cfg.max_dropped, "of the responses cannot be read",
             "max_dropped", math.ceil, "")):
        if not holds:
            raise UserError(f"{value:.1%} {what}, and --{flag} is {getattr(cfg, flag):.1%}: choose a teacher whose "
                            f"tokenizer is closer to the student's{other}, or set --{flag} "
                            f"{enough(100 * value) / 100:.2f}")


def coverage(cfg, crossing: Crossing) -> tuple[float, str, str]:
    """(share of the student's tokens that this run's loss can learn from, what those tokens have, which other
    setting asks for less)."""
    taught_N = crossing.across_N & torch.as_tensor(taught(cfg, crossing), device=crossing.device).bool()
    rows = int(crossing.across_N.sum())
    share = float(taught_N.sum()) / rows if rows else 1.0
    if cfg.divergence in losses.USES_ADVANTAGE and cfg.chunk_credit != "strict":
        return share, f"of the student's tokens get credit (--chunk_credit {cfg.chunk_credit})", ""
    if cfg.divergence in PAIRING:
        return share, f"of the student's tokens stand beside a distribution of the teacher ({cfg.divergence})", ""
    return share, "of the student's tokens have a teacher token of their own", (
        ", learn from longer chunks too (--divergence policy_gradient --chunk_credit chunk)")


def print_fit(cfg, run: Setup, rollout: Rollout, scores: Scores) -> dict[str, float]:
    """How well two tokenizers fit on these responses, with one response as both sides cut it. Returns the
    figures."""
    crossing, found = scores.crossing, scores.crossing.metrics()
    advantage_N, size_N = crossing.by_mode[cfg.chunk_credit], crossing.size_N2[:, 0].clamp(max=4)
    sizes = [f"{size}{'+' * (size == 4)}: {share:.1%} "
             f"(A {advantage_N[crossing.across_N & (size_N == size)].mean():+.2f})"
             for size in (1, 2, 3, 4) if (share := found[f"chunks_of_{size}{'+' * (size == 4)}"])]
    print(f"tokens  {found['strict_coverage']:.1%} of the student's tokens have a teacher token of their own, "
          f"{found['masked_share']:.1%} get no credit, {found['dropped_share']:.1%} of the responses cannot be read"
          + "".join(f"; {why}: {count}" for why, count in crossing.dropped.items())
          + f"\n        chunks by student tokens  {'  '.join(sizes)}  stop {found['stop_advantage']:+.2f}")
    for line in picture(run, rollout, scores, cfg):
        print(f"        {line}")
    return found


def picture(run: Setup, rollout: Rollout, scores: Scores, cfg, most: int = 12) -> list[str]:
    """One response that was read, chunk by chunk: what both sides cut, and the credit of each student
    token."""
    crossing = scores.crossing
    if not crossing.readings:
        return []
    b = max(crossing.readings, key=lambda b: len(crossing.readings[b].student_chunk))
    reading, bridge = crossing.readings[b], run.bridges[int(scores.teacher_B[b])]
    advantage = crossing.by_mode[cfg.chunk_credit][crossing.sequence_N == b].tolist()
    lines = [f"{'student':24}{'teacher':24}credit"]
    chunks = list(dict.fromkeys(reading.student_chunk))
    for chunk in chunks[:most]:
        ours = [i for i, c in enumerate(reading.student_chunk) if c == chunk]
        theirs = [j for j, c in enumerate(reading.teacher_chunk) if c == chunk] if chunk >= 0 else []
        left, right = (" ".join(repr(text.decode([ids[k]], skip_special=False))[1:-1] for k in places)
                       for text, ids, places in ((run.tokenizer, rollout.response(b), ours),
                                                 (bridge.teacher, reading.ids, theirs)))
        lines.append(f"{left:24}{right or '(not read)':24}" + " ".join(f"{advantage[i]:+.2f}" for i in ours))
    return lines + [f"... {len(chunks) - most} more chunks"] * (len(chunks) > most)


def report(cfg, run: Setup) -> int:
    """Compatibility before any step (Rethinking OPD, arXiv:2604.13016, section 2.3): do student and teacher
    think alike on the student's own tokens? Overlap near 1 and KL near 0: nothing to learn; low overlap mass:
    another pattern, try
    --cold_start_steps; in between is where OPD works. No number alone decides."""
    cfg = replace(cfg, lmbda=1.0, cold_start_steps=0)
    rollout, s, scores, _, asked, _ = look(cfg, run, 0, {}, Clock())
    if scores.crossing:
        print_fit(cfg, run, rollout, scores)
    settings = dict(temperature=cfg.temperature, chunk_rows=run.chunk_rows)
    tables = {"student and teacher": disagreement(read(cfg, run, [run.student], rollout), scores, **settings)}
    if cfg.compare_teacher:
        other = read(cfg, run, [load_other(cfg, run)], rollout)
        title = "first teacher (as `teacher`) and --compare_teacher (as `student`)"
        tables[title] = disagreement(other, scores, **settings)
    for title, per_row in tables.items():
        found = summarise(per_row, s.position_N, s.length_B[s.sequence_N])
        print(f"\n{title}, {len(s.student_N)} tokens of {len(asked)} responses\n"
              f"{'':26}{'all':>9}{'1st':>9}{'2nd':>9}{'3rd':>9}{'4th quarter':>13}")
        for name in per_row:
            cells = [found[name], *(found[f"{name}/q{quarter}"] for quarter in range(1, 5))]
            print(f"{name:26}" + "".join(f"{cell:9.4f}" for cell in cells[:4]) + f"{cells[4]:13.4f}")
    print(f"\nmean length {s.length_B.double().mean():.1f}, cut {1 - s.finished_B.double().mean():.0%}"
          + ("" if s.reward_B is None else f", right {s.reward_B.mean():.0%}"))
    return 0
