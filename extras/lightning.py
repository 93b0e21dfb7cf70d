"""Written once: the initial student writes the responses of the first epoch, the teacher scores them, and every step
learns from these.  Lightning OPD, arXiv:2604.13010.

    --write_once    (recipe lightning) before the first step all responses are written and scored; each epoch learns
                    from the same ones, in another order

The responses and what the teacher said lie in --cache_teacher FOLDER (empty: teacher_cache in the run folder). A run
with --teacher cache:FOLDER needs neither the teacher nor a sampler. The paper stores the log-probs of the tokens, which
is --divergence policy_gradient here (our reading: its abstract gives no formula); hidden states allow the reverse KL
over the vocabulary, the recipe's default, which learns more (docs/teachers.md). The paper asks for a student that was
fine-tuned on this teacher's own texts, else offline and online end elsewhere.

The responses are the initial student's (b), not the present one's (p): policy_gradient weighs each token by p/b,
clipped; a divergence over the vocabulary is exact at each prefix, but the prefixes stay those of b. How far p has gone
shows in `importance_ratio`, the mean of p/b over the tokens (1 in expectation over fresh draws of b; it falls as mass
leaves for tokens that b did not draw), and `ratio_outside_clip`, the share of tokens beyond 1 +- --clip.
"""
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from extras import teacher_cache
from extras.teacher_store import digest
from rollout import assemble, generate
from support.errors import UserError, one_line, shown
from support.flags import opt, recipe
from support.run_folder import write_bytes, writing
from teacher import Batch

RESPONSES = "responses.safetensors"
CACHE = "teacher_cache"     # in the run folder
SAMPLER = ("seed", "samples", "max_new_tokens", "temperature", "stop_ids")      # flags that responses depend on


@dataclass(frozen=True)
class Flags:
    write_once: bool = opt(False, "the initial student writes the responses of the first epoch once, and every step "
                                  "learns from these")


RECIPES = {
    "lightning": recipe("responses written and scored once, then no teacher (Lightning OPD 2604.13010)",
                        write_once=True),
}


def rules(cfg) -> list[tuple[bool, str]]:
    if not cfg.write_once:
        return []
    return [
        (cfg.divergence not in ("k2", "cross_entropy"),
         f"--write_once: {cfg.divergence} has no ratio p/b and is wrong on responses that an earlier student wrote; "
         f"use policy_gradient, or a divergence over the vocabulary"),
        (cfg.lmbda == 1, "--write_once learns from the initial student's responses alone: keep --lmbda 1"),
        (getattr(cfg, "privileged", "none") != "sibling",
         "--write_once: --privileged sibling draws a sibling anew at each step, and the teacher is asked once; use "
         "--privileged solution"),
        (cfg.teacher != "self" or getattr(cfg, "self_teacher", "initial") == "initial",
         "--write_once asks the teacher once, and --self_teacher ema and live change: keep --self_teacher initial"),
        (cfg.teacher != "none", "--write_once learns from a teacher; there is none (--teacher none)"),
    ]


def attach(run) -> None:
    cfg = run.cfg
    if not cfg.write_once:
        return
    responses = Responses()
    run.before_first_step.append(lambda run, folder, state: responses.find(run, folder.path, state))
    run.sources.insert(0, (lambda step: True, responses.batch))
    observe = run.observe

    def with_ratio(rows, top_NK) -> dict[str, Tensor]:
        ratio_N = (rows.student_logp_N() - rows.behavior_logp_N).exp()
        return observe(rows, top_NK) | {"importance_ratio": ratio_N,
                                        "ratio_outside_clip": ((ratio_N - 1).abs() > cfg.clip).to(ratio_N.dtype)}
    run.observe = with_ratio


def wanted(run) -> list[int]:
    """The problems that the steps ask for, in the order in which they come."""
    asked: dict[int, None] = {}
    for step in range(run.cfg.steps):
        asked |= dict.fromkeys(run.order(run, run.places(run, step)))
        if len(asked) == len(run.train):
            break
    return list(asked)


class Responses:
    """The one source of a run: problem -> its responses, each (tokens, log b, entropies, finished)."""

    def __init__(self):
        self.of: dict[int, list[tuple]] = {}

    def find(self, run, path: Path, state) -> None:
        """Written at the first start, read at every later one; then scored, as far as that is not on disk yet."""
        cfg, disk = run.cfg, teacher_cache.from_disk(run.cfg)
        folder = Path(cfg.cache_teacher).expanduser() if cfg.cache_teacher else path / CACHE
        if disk:        # of several teachers each has a folder in that of the responses
            folder = next((place for place in (disk[0], disk[0].parent) if (place / RESPONSES).exists()), disk[0])
        if not cfg.cache_teacher and not disk:
            teacher_cache.put_in_front(run, folder)
        file, now = folder / RESPONSES, described(run)
        if not file.exists():
            if disk:
                raise UserError(f"{shown(file)} does not exist: the run that wrote this cache wrote no responses; run "
                                f"once with the teacher, --cache_teacher {shown(folder)} and --write_once")
            if state is not None:
                raise UserError(f"{shown(file)} is gone, and the initial student is, too; pass --fresh to begin again")
            write_bytes(file, written(run, wanted(run), now))
        self.of = read(file, now)
        if state is None and not disk:
            self.score(run)

    def score(self, run) -> None:
        """Ask the teacher about every response, as the steps of the first epoch will."""
        seen: set[int] = set()
        for step in range(run.cfg.steps):
            asked = set(run.order(run, run.places(run, step)))
            if not asked <= seen:
                with torch.no_grad():
                    run.teacher.parts(self.batch(run, step))
            seen |= asked
            if len(seen) == len(self.of):
                break
        count = sum(map(len, self.of.values()))
        print(f"once    {count} responses to {len(self.of)} problems written by the student and scored by the teacher")

    def batch(self, run, step: int) -> Batch:
        asked = [i for i in run.order(run, run.places(run, step)) for _ in range(run.cfg.samples)]
        count, parts = {}, []
        for i in asked:
            count[i] = count.get(i, -1) + 1
            parts.append(self.of[i][count[i] % len(self.of[i])])
        rollout = assemble([run.prompts[i] for i in asked], *map(list, zip(*parts)), run.student.device)
        return Batch(rollout, asked, [run.train[i] for i in asked], False, step, run.tokenizer, run.cfg.verifier)


def described(run) -> dict[str, str]:
    """What the responses depend on: hashes of the student and of the prompts, and the flags of the sampler."""
    cfg = run.cfg
    return {"student": teacher_cache.weights_hash(run.tokenizer.folder),
            "prompts": digest(json.dumps(run.prompts).encode()),
            **{name: str(getattr(cfg, name)) for name in SAMPLER},
            "problems": json.dumps(sorted(wanted(run)))}


def written(run, chosen: list[int], now: dict) -> bytes:
    """The file of responses to these problems, by the student as it is."""
    cfg = run.cfg
    if run.actor is not run.student:
        run.actor.refresh(run.student)
    rollout = generate(run.actor, [run.prompts[i] for i in chosen], samples=cfg.samples, seed=cfg.seed * 2**32 + 2**30,
                       max_new_tokens=cfg.max_new_tokens, stop_ids=run.tokenizer.stop_ids, slots=cfg.slots,
                       temperature=cfg.temperature, progress="student writes once")
    return save({
        "problem": torch.tensor(chosen).repeat_interleave(cfg.samples), "length": rollout.length_B.cpu(),
        "finished": rollout.finished_B.cpu(), "token": rollout.rows(rollout.tokens_BT).cpu(),
        "logp": rollout.rows(rollout.logp_BT).cpu(), "entropy": rollout.rows(rollout.entropy_BT).cpu()}, now)


def read(file: Path, now: dict[str, str]) -> dict[int, list[tuple]]:
    """The responses, when they are those of this run; a run of fewer problems may read those of a longer one."""
    try:
        with writing(file), safe_open(file, framework="pt") as opened:
            then, tensors = opened.metadata(), {name: opened.get_tensor(name) for name in opened.keys()}
        fewer = set(json.loads(now["problems"])) <= set(json.loads(then["problems"]))
    except (SafetensorError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{shown(file)} is not what a run writes ({shown(one_line(error))}); pass another folder, or "
                        f"--fresh") from error
    changed = [name for name, value in now.items() if then.get(name) != value and not (name == "problems" and fewer)]
    if changed:
        what = f"--{changed[0]}" if changed[0] not in ("student", "prompts", "problems") else changed[0]
        raise UserError(f"{shown(file)} was written with another {what} ({shown(then.get(changed[0]), 40)}, now "
                        f"{shown(now[changed[0]], 40)}); pass the same, or another folder")
    lengths, of = tensors["length"].tolist(), {}
    parts = zip(*(tensors[name].split(lengths) for name in ("token", "logp", "entropy")), tensors["finished"].tolist())
    for problem, part in zip(tensors["problem"].tolist(), parts):
        of.setdefault(problem, []).append(part)
    return of
