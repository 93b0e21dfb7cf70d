"""Wrong input ends in one sentence that names the culprit: exit status 2, no traceback, no run folder left.

Each case takes the tiny pair of conftest.py, breaks one thing, and reads what train.py or eval.py says.
"""
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import stopped
from safetensors.torch import load_file, save_file

import eval as eval_file
import train

NORM = "model.norm.weight"


@pytest.fixture
def copy(pair, tmp_path):
    """A copy of the pair that may be broken."""
    return shutil.copytree(pair, tmp_path / "copy")


@pytest.fixture
def refuses(command, tmp_path, capsys):
    """refuses("words", lr=0, ...): train.py with these flags ends as the header says, and names the words."""
    def check(*words, argv=(), **flags):
        status = train.main([*command(**flags), *argv])
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert (status, len(lines)) == (2, 1) and err.startswith("error: "), err
        assert len(err) < 500 and [word for word in words if word not in err] == [], err
        assert not list((tmp_path / "runs").glob("*"))
    return check


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, edit, name="model"):
    tensors = load_file(folder / f"{name}.safetensors")
    edit(tensors)
    save_file(tensors, folder / f"{name}.safetensors")


# flags

@pytest.mark.parametrize("flags,words", [
    (dict(recipe="opdd"), ["unknown recipe 'opdd'", "grpo"]),
    (dict(divergence="kl"), ["--divergence kl", "reverse_kl"]),
    (dict(support="all"), ["--support all", "union"]),
    (dict(device="tpu"), ["--device tpu", "cuda"]),
    (dict(lr="fast"), ["--lr", "'fast'"]),
    (dict(steps="1.5"), ["--steps", "'1.5'"]),
    (dict(steps=0), ["--steps", "at least 1"]),
    (dict(save_every=0), ["--save_every", "at least 1"]),
    (dict(samples=-1), ["--samples", "between 1 and"]),
    (dict(lora_rank=-1), ["--lora_rank", "between 0 and"]),
    (dict(chunk_rows=-3), ["--chunk_rows", "at least 0"]),
    (dict(eval_every=-1), ["--eval_every", "at least 0"]),
    (dict(eval_max_new_tokens=-1), ["--eval_max_new_tokens", "at least 0"]),
    (dict(eval_temperature=-1.0), ["--eval_temperature", "between 0 and"]),
    (dict(eval_temperature="nan"), ["--eval_temperature"]),
    (dict(eval_temperature=0.0, eval_k=2), ["--eval_temperature 0", "--eval_k 1"]),
    (dict(weight_decay=-0.1), ["--weight_decay", "at least 0"]),
    (dict(seed=-1), ["--seed", "between 0 and"]),
    (dict(seed=10**20), ["--seed", "2,147,483,647"]),
    (dict(lr=0.0), ["--lr", "above 0"]),
    (dict(lr="nan"), ["--lr", "nan"]),
    (dict(lr="inf"), ["--lr", "inf"]),
    (dict(max_grad_norm=0.0), ["--max_grad_norm", "above 0"]),
    (dict(lora_rank=2, lora_alpha=0.0), ["--lora_alpha", "above 0"]),
    (dict(temperature=0.0), ["--temperature", "between 0.01 and"]),
    (dict(temperature="inf"), ["--temperature", "inf"]),
    (dict(clip="nan"), ["--clip", "at least 0"]),
    (dict(skew=1.0), ["--skew", "below 1"]),
    (dict(recipe="gkd", beta=0.0), ["--beta", "forward_kl"]),
    (dict(recipe="gkd", beta=1.0), ["--beta", "reverse_kl"]),
    (dict(lmbda=1.5), ["--lmbda", "between 0 and 1"]),
    (dict(divergence="k2", lmbda=0.5), ["k2", "--lmbda 1"]),
    (dict(recipe="sft", lmbda=1.0), ["cross_entropy", "--lmbda"]),
    (dict(recipe="grpo", samples=1), ["grpo", "--samples", "at least 2"]),
    (dict(teacher="none"), ["--teacher none", "opd"]),
    (dict(recipe="sft", responses="teacher", teacher="none"), ["--teacher none", "sft"]),
    (dict(stop_ids="abc"), ["--stop_ids abc", "'abc'"]),
    (dict(stop_ids="3,,-1"), ["--stop_ids", "'-1'"]),
    (dict(stop_ids="20"), ["--stop_ids 20", "0 to 19"]),
    (dict(template_vars="nonsense"), ["'nonsense'", "NAME=VALUE"]),
    (dict(template_vars="messages=1"), ["messages=1"]),
    (dict(chat_template="chatml"), ["'chatml'", ".jinja"]),
    (dict(verifier="guess"), ["--verifier guess", "boxed"]),
    (dict(wandb=True), ["--wandb", "pip install wandb"]),
    (dict(tensorboard=True), ["--tensorboard", "pip install tensorboard"]),
], ids=lambda part: " ".join(f"{k}={v}" for k, v in part.items()) if isinstance(part, dict) else "")
def test_wrong_flag_values_are_refused(refuses, monkeypatch, flags, words):
    """fails if: the value reaches the run, where it is a traceback, a silent nonsense or a late error."""
    for name in ("wandb", "tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)        # as if not installed
    refuses(*words, **flags)


@pytest.mark.parametrize("argv,words", [
    (["--learning_rate", "1"], ["unknown flag --learning_rate"]),
    (["--lrr", "1"], ["--lrr", "did you mean --lr?"]),
    (["--top-k", "3"], ["--top-k", "did you mean --topk?"]), (["--nofresh"], ["did you mean --no-fresh?"]),
    (["--temper", "2"], ["unknown flag --temper", "--temperature"]), (["toy"], ["unknown flag toy"]),
    (["--zzzzzz"], ["--zzzzzz", "--help"]), (["--lr"], ["--lr", "expected one argument"]),
    (["--fresh=yes"], ["--fresh"])], ids=str)
def test_unknown_flags_name_the_nearest(refuses, argv, words):
    """fails if: an unknown flag is ignored, abbreviations are guessed, or argparse prints its usage."""
    refuses(*words, argv=argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(refuses):
    """fails if: torch's own words come out."""
    refuses("--device cuda", "--device cpu", device="cuda")


# checkpoints

@pytest.mark.parametrize("flag", ["student", "teacher", "data", "eval_data"])
def test_missing_files_and_folders_are_named(refuses, tmp_path, flag):
    """fails if: a missing path is found only when it is opened."""
    refuses(str(tmp_path / "not/here"), **{flag: tmp_path / "not/here"})


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name,words", [
    ("config.json", "config.json"), ("tokenizer.json", "tokenizer.json does not exist"),
    ("model.safetensors", "neither model.safetensors nor")])
def test_incomplete_checkpoints_are_refused(refuses, copy, side, name, words):
    """fails if: a missing file of a checkpoint ends in a traceback."""
    (copy / side / name).unlink()
    refuses(side, words, **{side: copy / side})


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("size", [0, 5, 200, -1])
def test_truncated_weights_are_refused(refuses, copy, side, size):
    """fails if: a download that was cut short is loaded, or ends in a traceback."""
    path = copy / side / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refuses(str(path), "damaged or cut short", **{side: copy / side})


@pytest.mark.parametrize("edit,words", [
    (lambda tensors: tensors.pop(NORM), [NORM, "missing"]),
    (lambda tensors: tensors.update(extra=torch.zeros(2)), ["extra", "no place"]),
    (lambda tensors: tensors.update({NORM: torch.zeros(7)}), [NORM, "[7]", "[16]"]),
    (lambda tensors: tensors.update({NORM: torch.zeros(16, dtype=torch.int64)}), [NORM, "I64"]),
], ids=["missing", "extra", "shape", "dtype"])
def test_tensors_that_do_not_fit_are_named(refuses, copy, edit, words):
    """fails if: loading is not strict."""
    edit_tensors(copy / "student", edit)
    refuses(*words, student=copy / "student")


@pytest.mark.parametrize("changes,words", [
    (dict(model_type="mamba"), ["'mamba'", "qwen3"]), (dict(hidden_size="16"), ["hidden_size"]),
    (dict(quantization_config={"bits": 4}), ["quantised"]), (dict(hidden_act="gelu"), ["gelu"])])
def test_unsupported_architectures_are_named(refuses, copy, changes, words):
    """fails if: a model that would compute something else is loaded."""
    edit_json(copy / "student/config.json", **changes)
    refuses("config.json", *words, student=copy / "student")


@pytest.mark.parametrize("name", ["../teacher/model.safetensors", "/etc/passwd", "weights.bin"])
def test_an_index_may_not_point_outside_its_folder(refuses, copy, name):
    """fails if: a checkpoint can make the program read other files, or a pickle."""
    (copy / "student/model.safetensors").unlink()
    index = {"weight_map": {NORM: name}}
    (copy / "student/model.safetensors.index.json").write_text(json.dumps(index))
    refuses("index.json", repr(name), student=copy / "student")


def test_different_vocabularies_are_refused(refuses, copy):
    """fails if: --compare_teacher reads the student's ids as other tokens."""
    path = copy / "teacher/tokenizer.json"
    path.write_text(path.read_text().replace('"*"', '"x"'))
    refuses("different vocabularies", "= id 12", report_only=True, compare_teacher=copy / "teacher")


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_fewer_rows_than_tokens_are_refused(refuses, copy, side):
    """fails if: the check is left to an index error, or to a shape error between the two heads."""
    edit_json(copy / side / "config.json", vocab_size=18)
    refuses(side, "18 rows", "end at 19", **{side: copy / side})


def test_different_stop_tokens_are_said_and_can_be_chosen(copy, command, capsys):
    """fails if: a teacher that ends with another token goes unmentioned, or --stop_ids is refused. (What becomes of
    them: test_one_stop.py.)"""
    edit_json(copy / "teacher/generation_config.json", eos_token_id=[3, 17])
    for flags, said in ((dict(), True), (dict(stop_ids="3,17", fresh=True), False)):
        assert train.main(command(teacher=copy / "teacher", **flags)) == 0
        out = capsys.readouterr().out
        assert ("the student stops at ids [17], a teacher at [3, 17]: one event here" in out) == said


def test_the_order_of_stop_tokens_does_not_matter(copy, command):
    """fails if: equal sets of stop ids are refused."""
    edit_json(copy / "student/generation_config.json", eos_token_id=[3, 17])
    edit_json(copy / "teacher/generation_config.json", eos_token_id=[17, 3])
    assert train.main(command(student=copy / "student", teacher=copy / "teacher")) == 0


@pytest.mark.parametrize("template,words", [
    ("{{ messages.__class__.__mro__ }}", "Python internals"), ("{% for %}", "line 1"),
    ("{{ ''.__class__.__subclasses__() }}", "Python internals"),
    ("{{ cycler.__init__.__globals__.os.system('true') }}", "Python internals"),
    ("{{ raise_exception('no system message') }}", "no system message"), ("{{ 1 / 0 }}", "division")])
def test_templates_that_fail_or_reach_out_are_refused(refuses, copy, template, words):
    """fails if: a checkpoint's template can run Python, or its failure is a traceback."""
    for side in ("student", "teacher"):
        (copy / side / "chat_template.jinja").write_text(template)
    refuses("chat_template.jinja", words, student=copy / "student", teacher=copy / "teacher")


@pytest.mark.parametrize("error", [OSError("no route\nsecond line"), ValueError("401"), RuntimeError()])
def test_a_hub_id_without_network_is_one_sentence(refuses, monkeypatch, error):
    """fails if: a failed download ends in a traceback, or in several lines."""
    def offline(*args, **kwargs):
        raise error
    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refuses("someone/something", "could not be downloaded", student="someone/something")


# data

GOOD = '{"problem": "1+1?", "answer": 2}\n'


@pytest.mark.parametrize("flag", ["data", "eval_data"])
@pytest.mark.parametrize("text,words", [
    ("", ["no problems"]), (GOOD + '\n{"problem": "1+', [", line 3", "JSON"]),
    (GOOD + "[1]\n", [", line 2", "object"]), ('{"answer": 2}', [", line 1", "no prompt"]),
    (GOOD + GOOD.replace("1+", "1+" * 40), [", line 2", "context of 64"]), (GOOD + "\xff", [", line 2"]),
    ('{"problem": [{"role": "user"}]}', [", line 1", "content"]),
    (GOOD + '{"problem": "\\u0000", "answer": 2}', [", line 2", "no token"])],
    ids=["empty", "cut", "list", "no prompt", "too long", "not utf-8", "message", "no token"])
def test_broken_problems_are_named_by_line(refuses, tmp_path, flag, text, words):
    """fails if: a bad record is skipped, its line is not said, or a prompt that is too long or empty is found during
    the run."""
    path = tmp_path / "broken.jsonl"
    path.write_bytes(text.encode("latin-1"))
    refuses("broken.jsonl", *words, **{flag: path, "eval_limit": None})


@pytest.mark.parametrize("flags,words", [
    (dict(recipe="grpo"), ["line 2", "no answer"]), (dict(recipe="gkd"), ["line 1", "no solution"]),
    (dict(recipe="sft"), ["line 1", "no solution", "--responses teacher"])])
def test_records_without_what_the_recipe_needs_are_named(refuses, tmp_path, flags, words):
    """fails if: a recipe learns from an answer or a solution that is not there."""
    path = tmp_path / "thin.jsonl"
    path.write_text('{"problem": "1+1?", "answer": 2}\n{"problem": "1+2?"}\n')
    refuses("thin.jsonl", *words, data=path, **flags)


@pytest.mark.parametrize("flags,words", [
    (dict(max_new_tokens=60), ["train.jsonl", "--max_new_tokens 60", "context of 64"]),
    (dict(eval_max_new_tokens=60), ["test.jsonl", "--eval_max_new_tokens 60", "context of 64"])])
def test_limits_beyond_the_context_are_refused(refuses, flags, words):
    """fails if: the held-out prompts are not checked before the run folder exists."""
    refuses(*words, **flags)


def test_the_shorter_context_counts(refuses, copy, command):
    """fails if: the teacher's context is ignored, or refused where the teacher reads nothing that long."""
    edit_json(copy / "teacher/config.json", max_position_embeddings=20)
    refuses("train.jsonl", "context of 20", teacher=copy / "teacher", max_new_tokens=18)
    refuses("test.jsonl", "context of 20", teacher=copy / "teacher", eval_max_new_tokens=18)
    assert train.main([*command(teacher=copy / "teacher", eval_max_new_tokens=18), "--no-eval_teacher"]) == 0


# the run folder

@pytest.mark.parametrize("flags,words", [
    (dict(runs="FILE"), ["cannot", "--runs"]), (dict(runs="FILE/deeper"), ["cannot", "--runs"]),
    (dict(name="n" * 300), ["--name nnn", "longer than 200 bytes"])], ids=["a file", "below a file", "long name"])
def test_a_run_folder_that_cannot_be_made(refuses, tmp_path, flags, words):
    """A file in the way, since permissions do not stop root.
    fails if: an operating system's error comes out as a traceback."""
    (tmp_path / "FILE").write_text("")
    if "runs" in flags:
        flags = {"runs": tmp_path / flags["runs"]}
    refuses(*words, **flags)


@pytest.mark.parametrize("damage,words", [
    (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "not JSON"]),
    (lambda folder: (folder / "last/trainer.json").unlink(), ["trainer.json"]),
    (lambda folder: (folder / "last/trainer.safetensors").write_bytes(b"1"), ["cannot be resumed"]),
    (lambda folder: edit_tensors(folder / "last", lambda tensors: tensors.pop("weight/" + NORM), "trainer"),
     ["cannot be resumed", NORM]),
    (lambda folder: edit_tensors(folder / "last", lambda tensors: tensors.update(
        {"weight/" + NORM: torch.ones(3)}), "trainer"), ["cannot be resumed", "--fresh"])],
    ids=["config", "state", "cut", "tensor", "shape"])
def test_a_damaged_run_folder_is_one_sentence(command, tmp_path, monkeypatch, capsys, damage, words):
    """fails if: resuming from a broken checkpoint ends in a traceback."""
    stopped(monkeypatch, command, at=1, save_every=1)
    damage(tmp_path / "runs/a")
    capsys.readouterr()
    assert train.main(command(save_every=1)) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and [word for word in words if word not in error] == []


def test_compile_without_a_compiler(command, tmp_path):
    """In a process of its own, as torch remembers the compiler that it found.
    fails if: --compile is first tried once the run folder is there."""
    nothing = {"CXX": str(tmp_path / "c++"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, train.__file__, *command(compile=True)], capture_output=True, text=True,
                          env={**os.environ, **nothing})
    assert done.returncode == 2 and "--compile does not work here" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and "C++ compiler" in done.stderr and not (tmp_path / "runs").exists()


# eval.py on its own

@pytest.mark.parametrize("flags,words", [
    (dict(model="nowhere/at/all"), ["nowhere/at/all"]), (dict(data="nowhere.jsonl"), ["nowhere.jsonl"]),
    (dict(k=0), ["k must be at least 1"]), (dict(temperature=0), ["temperature 0"]),
    (dict(limit=0), ["limit"]),
    (dict(temperature=-1), ["temperature"]), (dict(max_new_tokens=64), ["line 1", "context of 64"]),
    (dict(device="tpu"), ["--device tpu"]),
    (dict(template_var="nonsense"), ["'nonsense'"]), (dict(out="no/such/folder/x.jsonl"), ["--out"]),
    (dict(chat_template="chatml"), ["'chatml'"])], ids=str)
def test_eval_refuses_in_one_sentence(pair, capsys, flags, words):
    """fails if: eval.py ends in a traceback, prints metrics of nothing, or returns 0."""
    given = dict(model=pair / "student", data=pair / "test.jsonl", max_new_tokens=4, k=2) | flags
    status = eval_file.main([part for key, value in given.items() for part in (f"--{key}", str(value))])
    out, err = capsys.readouterr()
    assert (status, out, len(err.splitlines())) == (2, "", 1) and err.startswith("error: ")
    assert [word for word in words if word not in err] == [], err
