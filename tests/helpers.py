"""What the tests of whole steps and runs share: a run that is ready to step, and what it leaves."""
import errno
import json
import os
from dataclasses import replace

import pytest
import torch

import train
from conftest import write_checkpoint
from extras import given
from support.extras import offers
from support.flags import check_ranges, parse
from support.report import Clock
from support.setup import Run, check_combinations, set_up
from teacher import Batch


def settings(command, **flags):
    """The configuration of the tiny run with these flags, checked."""
    cfg, _ = parse(command(**flags), train.SETTINGS)
    check_ranges(cfg)
    check_combinations(cfg)
    return cfg


def ready(command, **flags) -> Run:
    """The tiny run with these flags, models loaded and extras attached, as support.start makes it."""
    run = set_up(settings(command, **flags), {})
    train.defaults(run)
    for attach in offers("attach"):
        attach(run)
    return run


def adamw(run: Run, **settings) -> torch.optim.AdamW:
    """The optimizer of a run; settings are torch's."""
    settings = {"lr": run.cfg.lr, "weight_decay": 0, **settings}
    return torch.optim.AdamW([parameter for _, parameter in run.student.trainable()], **settings)


def one_step(run: Run, optimizer=None, step: int = 0) -> dict:
    """The record of this step of the run."""
    return run.step(run, optimizer or adamw(run), step, Clock())


def collect(run: Run, step: int = 0) -> Batch:
    """The responses of this step, by whoever writes it."""
    return next(write for writes, write in run.sources if writes(step))(run, step)


def asked(run: Run, step: int) -> list[int]:
    """The problems of this step."""
    return run.order(run, run.places(run, step))


def metrics(folder) -> list[dict]:
    """Every line of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps_of(folder) -> list[dict]:
    return [record for record in metrics(folder) if "loss" in record]


def jsonl(path, records):
    """The path, once the records are written there."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def close(a, b, atol=1e-5):
    torch.testing.assert_close(torch.as_tensor(a).double(), torch.as_tensor(b).double(), rtol=0, atol=atol)


# The reference of teachers: one sequence, no batch, no padding, no chunk of rows

def predictions(model, prompt, response, temperature=1.0, vocab_size=20):
    """(n, vocab_size) log-probs of what follows each prefix of the response, with gradient."""
    hidden_TD = model(torch.tensor([[*prompt, *response]]))[0]
    rows_NV = hidden_TD[len(prompt) - 1:-1] @ model.head_weight().to(hidden_TD.dtype)[:vocab_size].T
    return (rows_NV / temperature).log_softmax(-1)


def sampled(logp_NV, response):
    return logp_NV.gather(1, torch.tensor(response)[:, None]).squeeze(1)


def told(models, rollout, prompts, teacher_B=None):
    """log q(a) of every response token, each sequence read by its teacher after prompts[b]."""
    parts = []
    for b, number in enumerate(teacher_B or [0] * len(prompts)):
        response = rollout.response(b)
        with torch.no_grad():
            parts.append(sampled(predictions(models[number], prompts[b], response), response))
    return torch.cat(parts)


@torch.no_grad()
def look(run, step=0, batch=None):
    """(batch, signals, parts) of this step, with what the teacher says of the tokens drawn among the signals."""
    if run.actor is not run.student:
        run.actor.refresh(run.student)
    batch = batch or collect(run, step)
    told = ("teacher_logp_N", "teacher_entropy_N", "teacher_total_B")
    parts, asks = run.teacher.parts(batch), tuple(dict.fromkeys((*told, *run.asks)))
    return batch, train.signals(replace(run, asks=asks), batch, parts), parts


def with_third(pair):
    """The pair, with a third model and problems that name their teacher (`kind`: a or b)."""
    if not (pair / "third").exists():
        write_checkpoint(pair / "third", 2, model_type="qwen2", vocab_size=20, hidden_size=32, intermediate_size=16,
                         num_hidden_layers=1)
        jsonl(pair / "routed.jsonl", [dict(problem=f"{a}+3", answer=str(a), solution=str(a), kind="ab"[a % 2])
                                      for a in range(10)])
    return pair


def stopped(monkeypatch, command, at, **flags):
    """Run, and stop for good at step `at`."""
    real = train.train_step

    def stop(run, optimizer, step, *rest):
        if step == at:
            raise KeyboardInterrupt
        return real(run, optimizer, step, *rest)
    monkeypatch.setattr(train, "train_step", stop)
    assert train.main(command(**flags)) == 130
    monkeypatch.setattr(train, "train_step", real)


def interrupted(monkeypatch, command, at, **flags):
    """Run, stopped for good at step `at`; then the same command again."""
    stopped(monkeypatch, command, at, **flags)
    assert train.main(command(**flags)) == 0


def begun(run, monkeypatch, written):
    """The run, as if its teacher had written these responses before the first step (problem -> responses)."""
    monkeypatch.setattr(given, "teacher_responses", lambda run, folder: written)
    for prepare in run.before_first_step:
        prepare(run, None, None)
    return run


WEIGHTS = ("last/model.safetensors", "last/trainer.safetensors")
MARKED = {"recipe": "opd", "student": "s", "teacher": "t", "steps": 4}


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    """No test can pull the plug, so nothing here needs the seconds that fsync takes on a busy disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def result(folder):
    """What must not depend on interruptions: weights, moments, links, records and held-out answers."""
    def without_seconds(value):
        if isinstance(value, dict):
            return {key: without_seconds(item) for key, item in value.items()
                    if "second" not in key and key not in ("commit", "phases", "timings", "peak_memory")}
        return value
    texts = (folder / "metrics.jsonl").read_text().splitlines()
    texts += [(folder / name).read_text() for name in ("last/trainer.json", "summary.json")]
    return {**{name: (folder / name).read_bytes() for name in WEIGHTS}, "best": os.readlink(folder / "best"),
            "records": [without_seconds(json.loads(text)) for text in texts],
            "samples": {path.name: path.read_bytes() for path in folder.glob("samples/*")},
            "left": sorted(path.name for path in folder.iterdir())}


def disk_full():
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
