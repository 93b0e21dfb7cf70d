"""Several processes take the steps that one would take.

The runs of JOBS are made in this process, then by torchrun with 2 and with 4 processes (gloo, CPU), each
started once for all of them. Six sequences answer three problems: two processes do not ask equally many, and of
four one asks nothing and two have fewer micro-batches than the others.
"""
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed import distributed_c10d

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import losses
import rollout
import train
from extras import parallel
from extras.parallel import group, sharded
from extras.parallel.group import Group
from support import memory, start, tensors
from support.errors import UserError
from support.flags import parse
from support.setup import check_combinations
from teacher import Part, Teacher

COMMON = dict(problems=3, samples=2, max_new_tokens=6, steps=2, lr=1e-4, warmup_steps=0, eval_k=2, eval_every=0,
              device="cpu", save_every=1)
SELF = dict(teacher="self", teacher_prompt="{solution}|{problem}", privileged="solution")
RESUMED = dict(recipe="sdft", skip_first=1, ema=0.5, steps=3, **SELF)   # its checkpoint holds a running average too
JOBS = {        # name -> flags; what it is here for
    "opd": dict(steps=3, eval_teacher=True, self_check=True),               # tied head, the gradient added by hand
    "fire": dict(recipe="fire", micro_batch_tokens=12),                     # a filter and a mean over the whole step
    "grpo": dict(recipe="grpo", teacher="none", verifier="number"),         # group statistics; nobody scores
    "lora": dict(lora_rank=2, gradient_checkpointing=True, micro_batch_tokens=12, **SELF),  # fewer rows than processes
    "multi": dict(teacher="odd={teacher},even={student}", route="kind", samples=1),     # a process without a row of one
    "tip": dict(weight="tip", seed=3),                                      # a share of all tokens, chosen by their KL
    "exopd": dict(recipe="exopd", student="{teacher}", teacher="{student}", reference="{teacher}", updates=2,
                  micro_batch_tokens=12),                                   # untied head, a third model, small batches
    "across": dict(align="always", divergence="gold", stop_ids="17,3", min_coverage=0.0),       # read by its bytes
    "one": dict(problems=1, samples=1, weight="tip"),                       # a process without a row
    "moe": dict(student="{moe}", micro_batch_tokens=12),                    # a family: experts in one tensor, cut too
    "gkd": dict(recipe="gkd", lmbda=0.0, responses="teacher"),              # the teacher writes
}
FOUR = ("fire", "grpo", "lora")     # those that are run with 4 processes too


def arguments(folder: Path, world: int, name: str, flags: dict) -> list[str]:
    paths = {side: str(folder / side) for side in ("student", "teacher", "moe")}
    files = dict(student=paths["student"], teacher=paths["teacher"], data=folder / "train.jsonl",
                 eval_data=folder / "test.jsonl", runs=folder / f"runs{world}", name=name, eval_teacher=False)
    given = {**COMMON, **files, **flags}
    given |= {side: given[side].format(**paths) for side in ("student", "teacher", "reference") if side in given}
    recipe = ["--recipe", given.pop("recipe")] if "recipe" in given else []
    return recipe + [f"--no-{key}" if value is False else f"--{key}" if value is True else f"--{key}={value}"
                     for key, value in given.items()]


def one_run(folder: Path, world: int, name: str, flags: dict, before_step=None) -> int:
    """train.main() in this process, the responses of its steps kept beside it. before_step(step) may interfere."""
    written, train_step = [], train.train_step

    def noted(run, optimizer, number, clock):
        if before_step:
            before_step(number)
        record = train_step(run, optimizer, number, clock)
        written.append([run.batch.rollout.response(b) for b in range(len(run.batch.asked))])
        return record

    train.train_step = noted
    try:
        status = train.main(arguments(folder, world, name, flags))
    finally:
        train.train_step = train_step
    if Group.rank == 0 and status == 0:
        (folder / f"runs{world}" / f"{name}.json").write_text(json.dumps(written))
    return status


def signalled(number: int) -> None:
    """Ctrl-C reaches the last process only, during its second step."""
    if number == 1 and Group.rank == Group.world - 1:
        os.kill(os.getpid(), signal.SIGINT)


def broken(number: int) -> None:
    if number == 1 and Group.rank == 1:
        raise UserError("the second process has met its match")


def no_pickles(*_):
    raise AssertionError("a pickle came from another process, or from whoever else found the port")


def worker(folder: Path) -> int:
    """What each process of torchrun does."""
    distributed_c10d._tensor_to_object = no_pickles
    world = Group.world
    for name, flags in JOBS.items():
        if world == 2 or name in FOUR:
            assert one_run(folder, world, name, flags) == 0, name
    if world == 2:
        assert one_run(folder, 1, "from1", RESUMED) == 0
        assert one_run(folder, 2, "from2", RESUMED, signalled) == 128 + signal.SIGINT
        return one_run(folder, 2, "broken", JOBS["opd"], broken)
    return 0


if __name__ == "__main__":
    sys.exit(parallel.run(lambda: worker(Path(sys.argv[1]))))

from conftest import write_checkpoint  # noqa: E402


def torchrun(folder: Path, world: int) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__,
               str(folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of all runs, and what torchrun printed with 2 and 4 processes."""
    folder = tmp_path_factory.mktemp("parallel")
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    tied = dict(model_type="qwen3", vocab_size=24, head_dim=8, tie_word_embeddings=True)
    write_checkpoint(folder / "student", 0, **tied, **small)
    write_checkpoint(folder / "teacher", 1, model_type="llama", vocab_size=30, **small)
    write_checkpoint(folder / "moe", 2, model_type="qwen3_moe", vocab_size=24, head_dim=8, num_experts=5,
                     num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True, **small)
    for name, number in (("train", 9), ("test", 5)):
        records = [{"problem": f"{a}+3" + "?" * (1 + a % 3), "answer": "3", "solution": f"{a}+3",
                    "kind": ("even", "odd")[a % 2]} for a in range(number)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, flags in JOBS.items():
        assert one_run(folder, 1, name, flags) == 0, name
    assert one_run(folder, 1, "straight", RESUMED) == 0
    assert one_run(folder, 1, "from1", RESUMED, signalled) == 128 + signal.SIGINT
    printed = {world: torchrun(folder, world) for world in (2, 4)}
    assert one_run(folder, 2, "from2", RESUMED) == 0
    return SimpleNamespace(folder=folder, printed=printed)


def numbers(path: Path) -> list[dict]:
    """The records of metrics.jsonl, flat, without wall times."""
    def flat(record, prefix=""):
        for key, value in record.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            elif "second" not in key:
                yield prefix + key, value
    return [dict(flat(json.loads(line))) for line in (path / "metrics.jsonl").read_text().splitlines()[1:]]


def assert_same_run(a: Path, b: Path) -> None:
    for mine, theirs in zip(numbers(a), numbers(b), strict=True):
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            expected = pytest.approx(value, rel=1e-5, abs=1e-5) if isinstance(value, float) else value
            assert theirs[key] == expected, (key, mine["step"])
    for file in ("model", "trainer"):
        mine, theirs = (load_file(path / "last" / f"{file}.safetensors") for path in (a, b))
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-6, msg=lambda text: f"{name}: {text}")
    for file in ("config.json", "tokenizer.json"):
        assert (a / "last" / file).read_text() == (b / "last" / file).read_text()
    mine, theirs = (sorted((path / "samples").iterdir()) for path in (a, b))
    assert [file.name for file in mine] == [file.name for file in theirs]
    for one, other in zip(mine, theirs):
        assert [json.loads(line)["tokens"] for line in one.read_text().splitlines()] == \
            [json.loads(line)["tokens"] for line in other.read_text().splitlines()]


@pytest.mark.parametrize("world, name", [(2, name) for name in JOBS] + [(4, name) for name in FOUR])
def test_processes_sample_the_same_tokens_and_take_the_same_steps_as_one(runs, world, name):
    one, several = (runs.folder / f"runs{n}" for n in (1, world))
    assert (one / f"{name}.json").read_text() == (several / f"{name}.json").read_text()
    records = [record for record in numbers(one / name) if "grad_norm" in record]
    assert any(record["grad_norm"] > 1e-3 for record in records)        # two runs that stand still prove nothing
    assert_same_run(one / name, several / name)


def test_a_run_goes_on_with_another_number_of_processes(runs):
    assert_same_run(runs.folder / "runs1" / "straight", runs.folder / "runs1" / "from1")       # 1, then 2
    assert_same_run(runs.folder / "runs1" / "straight", runs.folder / "runs2" / "from2")       # 2, then 1


def test_a_signal_to_one_process_stops_all_after_the_same_step(runs):
    text = runs.printed[2].stdout
    assert text.count("stopped after step 2;") == 1, text


def test_trouble_in_one_process_ends_all_with_one_sentence(runs):
    done = runs.printed[2]
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert said == ["error: the second process has met its match"], done.stderr
    assert not (runs.folder / "runs2" / "broken" / "summary.json").exists()


def test_only_the_first_process_prints(runs):
    done = runs.printed[4]
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done    held-out") == len(FOUR)
    assert done.stdout.count("step 1/") == len(FOUR)


# Without other processes

def test_the_only_process_runs_the_plain_functions(runs):
    """`runs` has trained in this process."""
    plain = {start: ("complain", "open_folder", "now"), memory: ("processes", "per_process"),
             tensors: ("on_host", "like"), rollout: ("respond",), losses: ("backward",), Teacher: ("read",)}
    for place, names in plain.items():
        assert not [name for name in names if "parallel" in getattr(place, name).__module__]
    assert "parallel" not in Part.told.func.__module__

    def command():
        return 0
    assert Group.world == 1 and parallel.around(command) is command and parallel.rules(None) == []
    assert parallel.student(None, None) is None and parallel.attach(None) is None


def test_a_process_that_waits_ends_when_another_is_in_trouble(monkeypatch):
    def leave(status):
        raise SystemExit(status)
    monkeypatch.setattr(group, "LOOK_EVERY", 0)
    monkeypatch.setattr(group.os, "_exit", leave)
    for found in (lambda keys: True, lambda keys: torch.zeros(1).view(2)):      # the key is there; the store is not
        monkeypatch.setattr(Group, "store", SimpleNamespace(check=found))
        with pytest.raises(SystemExit, match="2"):
            group.watch()


def test_gathered_weights_are_made_one_at_a_time():
    class Shard:
        def full_tensor(self):
            raise AssertionError("nobody asked for this one")
    weights = sharded.Gathered({"a": torch.ones(2), "b": Shard()})
    assert isinstance(weights, Mapping) and list(weights) == ["a", "b"] and weights["a"].sum() == 2


@pytest.mark.parametrize("flags, words", [(["--device", "mps"], "--device mps"),
                                          (["--offload_optimizer"], "one process"),
                                          (["--device", "cuda"], "more processes than")])
def test_what_processes_cannot_do_is_refused(monkeypatch, flags, words):
    monkeypatch.setattr(Group, "world", 2)
    monkeypatch.setattr(Group, "local", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match=words):
        check_combinations(parse(flags, train.SETTINGS)[0])
