"""Gate: how well two tokenizers fit, printed before the first step, and whether this run's loss can learn from it."""
import math
from dataclasses import replace

import torch

from extras.cross_tokenizer.crossing import PAIRING, Crossing, taught
from losses import USES_ADVANTAGE
from support.errors import UserError


def check_tokenizers(run, folder, state) -> None:
    """On about 50 responses of the student. UserError when too little can be scored to learn from."""
    if state is not None:
        return
    cfg, (_, write) = run.cfg, run.sources[-1]
    probe = replace(run, cfg=replace(cfg, problems=math.ceil(50 / cfg.samples)))
    probe.places = lambda run, step: range(step * run.cfg.problems, (step + 1) * run.cfg.problems)
    with torch.no_grad():
        batch = write(probe, 0)
        run.teacher.parts(batch)
    found = print_fit(run, batch)
    covered, what, other = coverage(cfg, run.teacher.crossing)
    for value, holds, what, flag, enough, other in (
            (covered, covered >= cfg.min_coverage, what, "min_coverage", math.floor, other),
            (found["dropped_share"], found["dropped_share"] <= cfg.max_dropped, "of the responses cannot be read",
             "max_dropped", math.ceil, "")):
        if not holds:
            raise UserError(f"{value:.1%} {what}, and --{flag} is {getattr(cfg, flag):.1%}: choose a teacher whose "
                            f"tokenizer is closer to the student's{other}, or set --{flag} "
                            f"{enough(100 * value) / 100:.2f}")


def coverage(cfg, crossing: Crossing) -> tuple[float, str, str]:
    """(share of the student's tokens that this run's loss can learn from, what those tokens have, which other setting
    asks for less)."""
    taught_N = crossing.across_N & torch.as_tensor(taught(cfg, crossing), device=crossing.device).bool()
    rows = int(crossing.across_N.sum())
    share = float(taught_N.sum()) / rows if rows else 1.0
    if cfg.divergence in USES_ADVANTAGE and cfg.chunk_credit != "strict":
        return share, f"of the student's tokens get credit (--chunk_credit {cfg.chunk_credit})", ""
    if cfg.divergence in PAIRING:
        return share, f"of the student's tokens stand beside a distribution of the teacher ({cfg.divergence})", ""
    return share, "of the student's tokens have a teacher token of their own", (
        ", learn from longer chunks too (--divergence policy_gradient --chunk_credit chunk)")


def print_fit(run, batch) -> dict[str, float]:
    """How well two tokenizers fit on these responses, with one response as both sides cut it. Returns the figures."""
    crossing, cfg = run.teacher.crossing, run.cfg
    found = crossing.metrics()
    advantage_N, size_N = crossing.by_mode[cfg.chunk_credit], crossing.size_N2[:, 0].clamp(max=4)
    sizes = [f"{size}{'+' * (size == 4)}: {share:.1%} "
             f"(A {advantage_N[crossing.across_N & (size_N == size)].mean():+.2f})"
             for size in (1, 2, 3, 4) if (share := found[f"chunks_of_{size}{'+' * (size == 4)}"])]
    print(f"tokens  {found['strict_coverage']:.1%} of the student's tokens have a teacher token of their own, "
          f"{found['masked_share']:.1%} get no credit, {found['dropped_share']:.1%} of the responses cannot be read"
          + "".join(f"; {why}: {count}" for why, count in crossing.dropped.items())
          + f"\n        chunks by student tokens  {'  '.join(sizes)}  stop {found['stop_advantage']:+.2f}")
    for line in picture(run, batch):
        print(f"        {line}")
    return found


def picture(run, batch, most: int = 12) -> list[str]:
    """One response that was read, chunk by chunk: what both sides cut, and the credit of each student token."""
    crossing = run.teacher.crossing
    if not crossing.readings:
        return []
    b = max(crossing.readings, key=lambda b: len(crossing.readings[b].student_chunk))
    reading, bridge = crossing.readings[b], crossing.bridges[run.kind.which(batch.problems[b])]
    advantage = crossing.by_mode[run.cfg.chunk_credit][crossing.sequence_N == b].tolist()
    lines = [f"{'student':24}{'teacher':24}credit"]
    chunks = list(dict.fromkeys(reading.student_chunk))
    for chunk in chunks[:most]:
        ours = [i for i, c in enumerate(reading.student_chunk) if c == chunk]
        theirs = [j for j, c in enumerate(reading.teacher_chunk) if c == chunk] if chunk >= 0 else []
        left, right = (" ".join(repr(text.decode([ids[k]], skip_special=False))[1:-1] for k in places)
                       for text, ids, places in ((run.tokenizer, batch.rollout.response(b), ours),
                                                 (bridge.teacher, reading.ids, theirs)))
        lines.append(f"{left:24}{right or '(not read)':24}" + " ".join(f"{advantage[i]:+.2f}" for i in ours))
    return lines + [f"... {len(chunks) - most} more chunks"] * (len(chunks) > most)
