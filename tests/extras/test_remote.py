"""extras/remote.py: a served teacher gives the digits of the same teacher in this process; what it cannot is said."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import write_checkpoint
from helpers import adamw, metrics, one_step, ready, settings, steps_of, with_third
from serving import own_cache, serving  # noqa: F401 (a fixture)

import eval as eval_file
import train
from extras import remote
from extras.fast import ways
from support import memory
from support.errors import UserError
from support.setup import set_up

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def several(pair):
    return with_third(pair)


@pytest.fixture
def served(pair):
    with serving(pair / "teacher") as url:
        yield url


def digits(records: list[dict]) -> str:
    """Text, in which NaN is NaN and a float has all its digits; without times."""
    return repr([{key: value for key, value in record.items() if "second" not in key} for record in records])


def two_steps(run) -> tuple[str, list]:
    """The records and the weights after them."""
    optimizer = adamw(run, lr=0.05)
    records = [one_step(run, optimizer, step) for step in range(2)]
    return digits(records), [parameter.tolist() for parameter in run.student.parameters()]


ROUTED = dict(recipe="multi", route="kind", data="{pair}/routed.jsonl", eval_data="{pair}/routed.jsonl")
RUNS = {
    "opd": {},
    "many passes": dict(micro_batch_tokens=1, problems=6),
    "bfloat16": dict(dtype="bfloat16"),
    "fire": dict(recipe="fire"),
    "one-sided": dict(recipe="topk", topk=3),
    "tip": dict(recipe="tip"),
    "privileged": dict(privileged="solution", teacher_prompt="{solution};{problem}"),
    "given": dict(recipe="sft", lmbda=0.0, divergence="reverse_kl"),
    "two updates": dict(divergence="policy_gradient", updates=2),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_same_steps_are_taken_bit_for_bit(pair, command, name):
    """fails if: a state comes back in another place, a micro-batch is cut otherwise, padding or dtype differ"""
    flags = {"micro_batch_tokens": 40, **RUNS[name]}
    here = two_steps(ready(command, **flags))
    with serving(pair / "teacher", "--dtype", flags.get("dtype", "auto")) as url:
        assert two_steps(ready(command, **flags, teacher=url)) == here


def test_some_of_several_teachers_may_be_elsewhere(several, command):
    """fails if: a problem goes to another teacher, or one in this process is asked over the line"""
    flags = {key: value.format(pair=several) for key, value in ROUTED.items()}
    here = two_steps(ready(command, **flags, teacher=f"a={several / 'teacher'},b={several / 'third'}"))
    with serving(several / "third") as b:
        assert two_steps(ready(command, **flags, teacher=f"a={several / 'teacher'},b={b}")) == here
        with serving(several / "teacher") as a:
            run = ready(command, **flags, teacher=f"a={a},b={b}")
            assert two_steps(run) == here
            assert all(isinstance(model, remote.RemoteModel) for model in run.kind.models)


def test_a_served_teacher_may_have_another_tokenizer(world, command):
    """fails if: the server's tokenizer files are not what it reads with, or chunks meet other states"""
    flags = dict(recipe="xtok", min_coverage=0)
    here = two_steps(ready(command, **flags, teacher=world / "foreign"))
    with serving(world / "foreign") as url:
        assert two_steps(ready(command, **flags, teacher=url)) == here


def test_a_served_teacher_may_stop_otherwise(pair, command, tmp_path):
    """fails if: the stop ids of the server are lost, or two stop tokens are two events"""
    write_checkpoint(tmp_path / "stops", 1, model_type="llama", vocab_size=32, hidden_size=24, intermediate_size=32,
                     num_hidden_layers=2)
    (tmp_path / "stops/generation_config.json").write_text(json.dumps({"eos_token_id": 18}))
    here = two_steps(ready(command, teacher=tmp_path / "stops"))
    with serving(tmp_path / "stops") as url:
        run = ready(command, teacher=url)
        assert run.kind.one_stop and two_steps(run) == here


def test_sequences_end_to_end_are_read_so_there(pair, command, flash):
    """fails if: a server that packs is sent padded micro-batches, or loses where sequences begin"""
    ways.begin("")
    here = two_steps(ready(command, problems=6, micro_batch_tokens=40))
    with serving(pair / "teacher") as url:
        run = ready(command, problems=6, micro_batch_tokens=40, teacher=url)
        assert run.kind.models[0].said["lengths"] and two_steps(run) == here


def test_the_whole_command_takes_the_same_steps(served, command, tmp_path):
    """fails if: any part of a run but the teacher's own evaluation depends on where the teacher is"""
    assert train.main(command(steps=3, name="here")) == 0
    assert train.main(command(steps=3, name="there", teacher=served)) == 0
    here, there = (steps_of(tmp_path / "runs" / name) for name in ("here", "there"))
    assert len(here) == 3
    assert digits(here) == digits(there)
    for name in ("last/model.safetensors", "samples/step-000003.jsonl"):
        assert (tmp_path / "runs/here" / name).read_bytes() == (tmp_path / "runs/there" / name).read_bytes()
    assert metrics(tmp_path / "runs/there")[1]["eval_teacher"] is None


@pytest.mark.parametrize("flags", [dict(recipe="tip"), dict(recipe="fire", teacher_topk=3)], ids=["tip", "short"])
def test_several_processes_take_the_same_steps(served, pair, command, tmp_path, flags):
    """fails if: a process asks for others' responses, waits for a pass that never comes, or shards what is elsewhere"""
    local = {key: value for key, value in flags.items() if key != "teacher_topk"}
    assert train.main(command(**local, steps=2, name="one")) == 0
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           "train.py", *command(**flags, steps=2, name="two", teacher=served)], cwd=ROOT, timeout=180,
                          capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (steps_of(tmp_path / "runs" / name) for name in ("one", "two"))
    for mine, theirs in zip(two, one, strict=True):
        for key in ("loss", "grad_norm", "student_entropy", "teacher_entropy"):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-4), key


def test_the_distance_of_held_out_answers_is_the_same(pair, served, tmp_path, capsys):
    """fails if: eval.py takes an address for a hub id, or compares with something else"""
    found = []
    for teacher in (pair / "teacher", served):
        assert eval_file.main(["--model", str(pair / "student"), "--data", str(pair / "test.jsonl"), "--k", "1",
                               "--max_new_tokens", "6", "--teacher", str(teacher)]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0]["reverse_kl"] == found[1]["reverse_kl"] > 0


# What cannot be

WRONG = {
    "writes": (dict(recipe="sft", responses="teacher"), "does not write responses"),
    "cold start": (dict(cold_start_steps=1), "does not write responses"),
    "parked": (dict(teacher_memory="park"), "in another process"),
    "int8": (dict(teacher_int8=True), "in another process"),
    "student": (dict(student="http://127.0.0.1:1"), "--student .* works in this process"),
    "reference": (dict(recipe="exopd", reference="http://127.0.0.1:1"), "--reference .* works in this process"),
    "k without": (dict(teacher="{pair}/teacher", teacher_topk=4), "about a teacher on another machine"),
    "token and wandb": (dict(teacher_token="x", wandb=True), "OPD_TEACHER_TOKEN"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_is_said_before_anything_is_asked(pair, command, name):
    flags, said = WRONG[name]
    flags = {key: value.format(pair=pair) if isinstance(value, str) else value for key, value in flags.items()}
    with pytest.raises(UserError, match=said):
        settings(command, **{"teacher": "http://127.0.0.1:1", **flags})


@pytest.mark.parametrize("address", ["http://", "http://h:99999", "http://me:secret@h:1", "http://h:1?x",
                                     "http://ü:1"])
def test_no_address_is_one_sentence(address):
    with pytest.raises(UserError, match="no address"):
        remote.served_folder(address)


def test_another_dtype_is_refused(served, command):
    """fails if: states are cast silently"""
    with pytest.raises(UserError, match="multiplies in float32, this run in bfloat16"):
        ready(command, teacher=served, dtype="bfloat16")


def test_a_served_model_writes_nothing(served, capsys, pair):
    assert eval_file.main(["--model", served, "--data", str(pair / "test.jsonl"), "--k", "1",
                           "--max_new_tokens", "6"]) == 2
    assert "reads and does not write" in capsys.readouterr().err


def test_a_run_goes_on_with_the_teacher_it_began_with(several, command, tmp_path, capsys):
    """fails if: another model at the same address teaches the second half of a run, or the same one is refused"""
    with serving(several / "teacher") as url:
        port = url.rpartition(":")[2]
        assert train.main(command(teacher=url, steps=1)) == 0
    for name, status in (("third", 2), ("teacher", 0)):
        (tmp_path / "runs/a/summary.json").unlink(missing_ok=True)
        with serving(several / name, port=port):
            assert train.main(command(teacher=url, steps=1)) == status
    assert capsys.readouterr().err.count("serves another teacher") == 1


def test_fresh_takes_what_such_a_run_wrote(served, command):
    """fails if: --fresh finds a file in the run folder that it calls a stranger's"""
    for fresh in (None, True):
        assert train.main(command(teacher=served, steps=1, fresh=fresh)) == 0


def test_the_plan_counts_the_head_and_the_states_alone(pair, served, command, monkeypatch):
    """fails if: a served teacher's layers are counted here, or those of a teacher in this process are not"""
    jobs = []
    monkeypatch.setattr("support.setup.announce", lambda cfg, job: jobs.append((cfg, job)) or 0)
    for flags in (dict(), dict(teacher=served), dict(teacher=served, teacher_topk=2, divergence="k2")):
        set_up(settings(command, **flags), {})
    here, exact, short = (memory.memory_plan(*job) for job in jobs)
    rows = 2 * 2 * 6
    assert exact["teacher weights"] == 32 * 24 * 4 < here["teacher weights"]
    assert exact["teacher hidden states"] == here["teacher hidden states"] == rows * 24 * 4
    assert short["teacher weights"] == 0 and short["teacher hidden states"] == rows * 7 * 4
    assert exact["teacher's pass over a micro-batch"] < here["teacher's pass over a micro-batch"]


def test_small_files_are_asked_for_once(served, monkeypatch):
    """fails if: every start loads the tokenizer's files over the line again"""
    asked = []
    real = remote.Line.ask
    monkeypatch.setattr(remote.Line, "ask", lambda line, path, *rest, **more: (
        asked.append(path), real(line, path, *rest, **more))[1])
    first, second = remote.served_folder(served), remote.served_folder(served + "/")
    assert first == second and asked.count("/hello") == 2 and asked.count("/file/tokenizer.json") == 1


def test_the_head_is_checked(served, command):
    """fails if: a head with another hash is used"""
    run = ready(command, teacher=served)
    model = run.kind.models[0]
    model.said["head"] = "0" * 64
    with pytest.raises(UserError, match="head is not what the server says"):
        model.head()
    assert torch.is_tensor(ready(command, teacher=served).kind.models[0].head())
