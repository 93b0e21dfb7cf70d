"""The memory plan: what it counts, what it says, for which device, and what a run that goes on keeps of it.

Models that are planned for here are config.json files of published sizes; only the tiny pair is ever loaded.
"""
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import eval as eval_file  # noqa: E402
import train  # noqa: E402
from model import Transformer  # noqa: E402
from support import memory, setup  # noqa: E402
from support.model_config import ModelConfig  # noqa: E402
from extras import teachers  # noqa: E402
from helpers import ready  # noqa: E402
from support import plan  # noqa: E402
from support.errors import UserError  # noqa: E402
from support.flags import parse, run_name  # noqa: E402
from support.start import NOT_THE_RUN  # noqa: E402

GIB, CPU, CUDA = 2**30, torch.device("cpu"), torch.device("cuda")
QWEN3 = dict(model_type="qwen3", vocab_size=151936, head_dim=128, num_key_value_heads=8, tie_word_embeddings=True,
             max_position_embeddings=40960, torch_dtype="bfloat16")
SMALL = dict(QWEN3, hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_hidden_layers=28)      # 0.6B
LARGE = dict(QWEN3, hidden_size=2560, intermediate_size=9728, num_attention_heads=32, num_hidden_layers=36)      # 4B
SIZES = {"slots": 16, "micro_batch_tokens": 2048, "chunk_rows": 442}


@pytest.fixture(scope="module")
def models():
    return [memory.sized(ModelConfig.from_dict(raw)) for raw in (SMALL, LARGE)]


@pytest.fixture
def job(models):
    """job(memory in GiB, device) of Qwen3-0.6B under Qwen3-4B, 200 held-out problems."""
    def make(size=24, device=CUDA, **more):
        student, teacher = models
        return memory.Job(device, int(size * GIB), **{
            "student": student, "teachers": [teacher], "reference": None, "vocab_size": 151669, "prompt": 200,
            "held_out": (200, 200), **more})
    return make


def cfg_of(*flags, **more):
    return replace(parse(list(flags), train.SETTINGS)[0], **{"max_new_tokens": 512, "eval_k": 1, **SIZES, **more})


def first_lines(capsys):
    return capsys.readouterr().out.splitlines()


# The command

@pytest.fixture
def folders(pair, tmp_path):
    """Two folders with nothing but a large config.json and the tiny tokenizer, and no weights."""
    for name, raw in (("student", SMALL), ("teacher", LARGE)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(raw))
        for file in ("tokenizer.json", "generation_config.json"):
            shutil.copy(pair / name / file, tmp_path / name / file)
    return {name: tmp_path / name for name in ("student", "teacher")}


@pytest.fixture
def no_device(monkeypatch):
    """A machine without a GPU on which every question to one fails."""
    def never(*_, **__):
        raise AssertionError("the device was touched")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("get_device_properties", "mem_get_info", "init", "current_device"):
        monkeypatch.setattr(torch.cuda, name, never)
    for name in ("choose_device", "load_model", "total_memory"):
        monkeypatch.setattr(setup, name, never)


def planned(arguments):
    with pytest.raises(SystemExit) as stopped:
        train.main(arguments)
    return stopped.value.code


def test_a_plan_needs_two_configs_and_a_tokenizer(folders, no_device, command, tmp_path, capsys):
    """fails if: weights are looked for, the device is asked, or the dtype is not that of the device planned for."""
    status = planned(command(**folders, device="cuda", plan_memory="24GiB", compile=True, problems=64, dtype="auto"))
    lines = first_lines(capsys)
    assert status == 0 and not (tmp_path / "runs").exists()
    assert lines[0].startswith("plan    fits: about ") and " of 24.0 GiB, " in lines[0] and lines[0].endswith(" left")
    assert lines[1].startswith("parts   on cuda in bfloat16, largest first")
    sizes = [float(line.split()[0]) * (1024 if line.split()[1] == "GiB" else 1) for line in lines[2:]
             if line.startswith(" ") and line.split()[1] in ("GiB", "MiB")]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 10
    chosen = next(line for line in lines if line.startswith("chosen"))
    assert "slots, micro-batches of" in chosen and any(line.startswith("host    about") for line in lines)


def test_a_plan_that_does_not_fit_names_flags_with_which_it_does(folders, no_device, command, capsys):
    """fails if: the status is 0, the numbers of the first line do not add up, or the flags that are named are too
    few."""
    given = dict(folders, device="cuda", plan_memory="20GiB", dtype="auto", problems=64)
    assert planned(command(**given)) == 1
    first, second, *_ = first_lines(capsys)
    assert first.startswith("plan    does not fit: about ") and " of 20.0 GiB, " in first
    words = first.split()
    need, many, saved = (float(words[i]) for i in (words.index("about") + 1, words.index("GiB,") + 1, -2))
    assert abs(need - 20.0 - many) < 0.11 and "would save the most" in first and saved > many
    flags = second.split("it would fit with ")[1].split(": about ")[0]
    assert flags == "--teacher_memory stream"      # --lora_rank 16 saves more, but is another run
    assert planned(command(**given) + flags.split()) == 0
    assert first_lines(capsys)[0].startswith("plan    fits: about ")


@pytest.mark.parametrize("text", ["24", "GiB", "0GiB", "-3GiB", "nanGiB", "1e9GiB", "24GiBs", "24 G B", "²GiB",
                                  "9" * 400, "999999999TiB", "1kib"])
def test_a_memory_that_is_none_is_one_sentence(text, command, capsys):
    """fails if: float() or the table of units raises, or nothing, everything and superscripts pass."""
    assert train.main(command() + [f"--plan_memory={text}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --plan_memory ") and "24GiB" in error and error.count("\n") == 1


def test_memories_are_read_with_their_units():
    """fails if: decimal and binary units are mixed up."""
    assert [plan.parse_memory(text) for text in ("24GiB", "80 GB", "1.5gib", "512MiB", "300MB", "1TB")] == [
        24 * GIB, 80 * 10**9, 3 * GIB // 2, 2**29, 3 * 10**8, 10**12]


def test_a_device_that_is_not_here_must_be_given_its_memory(no_device, command, capsys):
    """fails if: a traceback, the memory of the machine, or the sentence for runs is given."""
    assert train.main(command(plan=True, device="cuda")) == 2
    assert "--plan_memory 24GiB" in capsys.readouterr().err


def test_the_memory_planned_for_is_no_part_of_the_run():
    """fails if: --plan_memory makes another run, or trains when it is given without --plan."""
    cfg, given = parse(["--plan_memory", "24GiB", "--lr", "1e-4"], train.SETTINGS)
    assert cfg.plan and run_name(cfg, given, NOT_THE_RUN) == "opd,lr=0.0001"


def test_a_plan_has_no_weights_downloaded(folders, command, monkeypatch):
    """fails if: student, teacher or reference of a plan are downloaded whole, or those of a run are not."""
    asked = {}

    def download(name, allow_patterns, **_):
        asked[name] = allow_patterns
        return str(folders["student"])
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    flags = dict(student="a/student", teacher="x=a/one,y=a/two", reference="a/reference", recipe="exopd", dtype="auto",
                 plan_memory="24GiB", device="cuda")
    monkeypatch.setattr(teachers.Teachers, "which", lambda *args, **more: 0)
    planned(command(**flags))
    assert len(asked) == 4 and all("*.safetensors" not in patterns for patterns in asked.values())
    asked.clear()
    train.main(command(**{**flags, "plan_memory": None, "device": "cpu"}))
    assert asked and all("*.safetensors" in patterns for patterns in asked.values())


def test_a_run_that_does_not_fit_says_so_and_goes_on(command, monkeypatch, capsys):
    """fails if: it is refused, or starts without a word."""
    monkeypatch.setattr(setup, "total_memory", lambda device: 100 * 2**20)
    assert train.main(command()) == 0
    lines = first_lines(capsys)
    assert lines[0].startswith("memory  does not fit: about 12") and " of 100.0 MiB, 2" in lines[0]
    assert "8 slots, micro-batches of 64 tokens" in lines[0] and lines[2].startswith("        warning: it goes on")


def test_a_run_that_others_leave_no_room_for_is_warned(command, monkeypatch, capsys):
    """fails if: what is free is not looked at, or decides what is chosen."""
    monkeypatch.setattr(plan, "free_memory", lambda device: 50 * 2**20)
    assert train.main(command()) == 0
    lines = first_lines(capsys)
    assert lines[0].startswith("memory  fits: ") and "(256 slots, micro-batches of 2,048 tokens" in lines[0]
    assert "only 50.0 MiB are free" in lines[2]


# What is counted

def test_every_part_that_passes_belongs_to_a_phase(job):
    """fails if: a part of one phase is counted all the time, or a phase names a part that is not planned."""
    names = {name for names in memory.PHASES.values() for name in names}
    assert set(memory.passing(cfg_of(), job())) == names
    assert not names & set(memory.lasting(cfg_of(), job()))


@pytest.mark.parametrize("flags", [{}, {"lora_rank": 2}, {"self_teacher": "ema"}, {"self_teacher": "live"},
                                   {"self_teacher": "ema", "lora_rank": 2}, {"dtype": "bfloat16"},
                                   {"self_teacher": "ema", "dtype": "bfloat16"}], ids=str)
def test_planned_weights_of_a_self_teacher_are_those_loaded(command, flags):
    """fails if: a student that is its own teacher is counted twice, or a running average in the dtype of products."""
    run = ready(command, teacher="self", **flags)
    cfg = run.cfg
    job = memory.Job(CPU, GIB, memory.sized(run.student.config), [], None, run.student.vocab_size, 9)
    held = [p for model in run.kind.models if model is not run.student for p in model.parameters()]
    assert memory.frozen_weights(cfg, job) == sum(p.numel() * p.element_size() for p in held)
    rows = cfg.problems * cfg.samples * cfg.max_new_tokens
    assert memory.lasting(cfg, job)["teacher hidden states"] == rows * 16 * (2 if flags.get("dtype") else 4)


def test_the_evaluation_has_a_cache_of_its_own(command, monkeypatch, capsys):
    """fails if: held-out answers are taken to be as few as those of a step, or a teacher's, which come before gradients
    and moments do, are counted beside those."""
    caches, real = [], Transformer.cache_type
    monkeypatch.setattr(Transformer, "cache_type", staticmethod(
        lambda *args: caches.append(real(*args)) or caches[-1]))
    run = ready(command, eval_k=4, eval_limit=4, eval_max_new_tokens=9, problems=1, samples=1)
    cfg = run.cfg
    config_of, longest = run.student.config, max(len(run.tokenizer.prompt_ids(p.prompt)) for p in run.held_out)
    eval_file.test(run, "student")
    taken = [sum(x.numel() * x.element_size() for x in cache.keys + cache.values) for cache in caches]
    assert max(taken) == memory.cache(config_of, 16, longest + 9, 4)
    job = memory.Job(CPU, GIB, memory.sized(config_of), [], None, run.student.vocab_size, 9, (4, longest))
    logits = head = 16 * run.student.vocab_size * 4
    assert memory.evaluation(cfg, job) == max(taken) + logits + head
    teacher = memory.sized(run.kind.models[0].config)
    job, cache = replace(job, teachers=[teacher]), memory.cache(teacher.config, 16, longest + 9, 4)
    assert memory.evaluation(replace(cfg, eval_teacher=False), job) == max(taken) + logits + head
    assert memory.evaluation(cfg, job) == cache + logits + head * 24 // 16 - 12 * job.student.weights


def test_moments_in_host_memory_are_announced_there_and_visit(job):
    """fails if: offloading saves what the optimizer step needs all the same, or a CPU is thought to have two
    memories."""
    whole, away = cfg_of(), cfg_of("--offload_optimizer")
    weights = job().student.weights
    plans = [memory.memory_plan(cfg, job()) for cfg in (whole, away)]
    assert plans[0]["gradients and AdamW moments"] == 12 * weights and plans[1]["gradients"] == 4 * weights
    assert plans[1]["AdamW moments on their visit"] == memory.host_plan(away, job())["AdamW moments"] == 8 * weights
    assert memory.host_plan(whole, job())["AdamW moments"] == 0
    on_cpu = [memory.memory_plan(cfg, job(device=CPU)) for cfg in (whole, away)]
    assert on_cpu[0] == on_cpu[1] and memory.host_plan(away, job(device=CPU)) == {}


def test_another_tokenizer_is_counted(command):
    """fails if: tokenizers and bridges cost nothing, or only one of them is counted."""
    jobs = []
    for flags in ([], ["--recipe", "xtok"]):
        cfg = parse(flags, train.SETTINGS)[0]
        small = setup.read_small_files(cfg, CPU)
        kind = setup.teacher_kind(cfg, small)
        jobs.append((setup.describe(cfg, small, kind, 9, GIB), small.tokenizer, kind.other_tokenizers))
    mine, theirs = ((one.folder / "tokenizer.json").stat().st_size for one in (jobs[1][1], jobs[1][2][0]))
    for (job, _, others), tokenizers, bridges in ((jobs[0], mine, 0), (jobs[1], mine + theirs, mine + theirs)):
        cfg = cfg_of(max_new_tokens=40)
        plan = memory.memory_plan(cfg, job)
        assert plan["tokenizers"] == int(memory.PER_TOKENIZER * tokenizers)
        assert plan["bridges between tokenizers"] == int(memory.PER_BRIDGE * bridges)
        assert job.teacher_vocab == (others[0].vocab_size if bridges else 0)


# What would help

@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_what_a_flag_saves_is_what_the_plan_with_it_lacks(job, device):
    """fails if: flags are tried together, the largest is not first, or the sizes chosen grow into what was saved."""
    cfg = cfg_of()
    found = plan.savings(cfg, job(device=device))
    whole = memory.peak(memory.memory_plan(cfg, job(device=device)))
    assert [saved for saved, _, _ in found] == sorted((saved for saved, _, _ in found), reverse=True)
    for saved, flags, _ in found:
        with_it = memory.peak(memory.memory_plan(replace(cfg, **flags), job(device=device)))
        assert len(flags) == 1 and with_it == whole - saved
    names = {name for _, flags, _ in found for name in flags}
    assert {"gradient_checkpointing", "lora_rank"} <= names and ("offload_optimizer" in names) == (device == CUDA)
    said = f"; {plan.flag_text(found[0][1])} would save the most, {memory.size_text(found[0][0])}"
    assert plan.verdict(cfg, job(1, device)).endswith(said) and said not in plan.verdict(cfg, job(99, device))


def test_flags_that_keep_the_run_are_tried_first(job):
    """fails if: adapters are advised where recomputing is enough, nothing where only both are, a flag that is not
    needed, or the search stops where two phases need nearly the same."""
    cfg, wide = cfg_of(), job()
    least = memory.peak(memory.memory_plan(replace(cfg, gradient_checkpointing=True), wide)) / GIB
    assert plan.way_to_fit(cfg, job(least + 0.1))[0] == {"teacher_memory": "stream"}
    both = {"teacher_memory": "stream", "offload_optimizer": True}
    assert plan.way_to_fit(cfg, job(16))[0] == both
    assert plan.way_to_fit(cfg, job(12))[0] == {**both, "gradient_checkpointing": True}
    for size, more in ((8, {}), (6.7, {"chunk_rows": 221})):        # less needs both the update and the saving smaller
        flags, need = plan.way_to_fit(cfg, job(size))
        assert flags == {"lora_rank": 16, "teacher_memory": "stream", "gradient_checkpointing": True, **more}
        assert need == memory.peak(memory.memory_plan(replace(cfg, **flags), job())) <= size * GIB
    many = replace(cfg, slots=256)      # half of the tokens saves most at first, and nothing in the end
    assert plan.way_to_fit(many, job(16.5))[0] == {"slots": 100, "teacher_memory": "stream", "offload_optimizer": True}
    assert plan.way_to_fit(cfg, job(2)) == ({}, 0) and "take smaller models" in plan.way_text(cfg, job(2))


# What is chosen, and kept

def test_what_a_flag_names_is_kept_and_all_else_is_chosen(job):
    """fails if: fit() changes a size that was given, or leaves one at 0."""
    free = cfg_of(slots=0, micro_batch_tokens=0, chunk_rows=0)
    chosen = plan.settle(free, job(400))
    assert (chosen.slots, chosen.micro_batch_tokens, chosen.chunk_rows) == (256, 65536, 2**26 // 151669)
    for name, size in (("slots", 3), ("micro_batch_tokens", 777), ("chunk_rows", 5)):
        one = plan.settle(replace(free, **{name: size}), job(400))
        assert getattr(one, name) == size and 0 not in (one.slots, one.micro_batch_tokens, one.chunk_rows)
    assert plan.chosen(chosen) == {"slots": 256, "micro_batch_tokens": 65536, "chunk_rows": 442,
                                   "threads": torch.get_num_threads()}


def test_a_run_that_goes_on_keeps_its_sizes(job, capsys):
    """fails if: another memory chooses anew what fits, a flag gives way to what is stored, or a word is said for
    nothing."""
    free, stored = cfg_of(slots=0, micro_batch_tokens=0, chunk_rows=0), {"date": "2026-01-01", "threads": 3, **SIZES}
    found = plan.settle(free, job(400), stored)
    assert {name: getattr(found, name) for name in SIZES} == SIZES and found.threads == 3
    assert plan.settle(replace(free, slots=5, threads=2), job(400), stored).slots == 5
    assert plan.settle(replace(free, threads=2), job(400), stored).threads == 2
    assert plan.settle(free, job(400), {}) == plan.settle(free, job(400)) == plan.settle(free, job(400), None)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("share,kept,word", [(1.4, True, ""), (1.1, True, "are kept"), (0.99, False, "chosen anew")])
def test_sizes_that_this_machine_has_no_room_for_are_chosen_anew(job, capsys, share, kept, word):
    """share: the machine's memory over what the run needs with its own sizes.
    fails if: a tight machine changes how sums round, a small one runs out of memory, or either is silent."""
    free = cfg_of("--gradient_checkpointing", slots=0, micro_batch_tokens=0, chunk_rows=0)
    stored = {"slots": 256, "micro_batch_tokens": 65536, "chunk_rows": 442, "threads": 3}
    need = memory.peak(memory.memory_plan(replace(free, **stored), job()))
    found = plan.settle(free, job(share * need / GIB), stored)
    assert ({name: getattr(found, name) for name in stored} == stored) == kept and found.threads == 3
    said = capsys.readouterr().out
    assert word in said and said.count("\n") == bool(word)


def test_the_set_up_of_a_run_that_goes_on_takes_what_is_stored(command):
    """fails if: set_up() drops what it is handed, or the loop goes by another number of rows than the plan."""
    threads = torch.get_num_threads()
    try:
        run = setup.set_up(parse(command(), train.SETTINGS)[0], {"slots": 3, "chunk_rows": 7, "threads": 2})
        cfg = run.cfg
        assert (cfg.slots, cfg.chunk_rows, torch.get_num_threads()) == (3, 7, 2)
        assert plan.chosen(cfg) == {"slots": 3, "micro_batch_tokens": 2048, "chunk_rows": 7, "threads": 2}
    finally:
        torch.set_num_threads(threads)


def test_a_container_has_the_memory_that_it_is_given(monkeypatch):
    """fails if: the limit of a control group is not read, or no limit is taken for a number."""
    whole, real = memory.total_memory(CPU), Path.read_text
    for text, found in (("1073741824\n", min(whole, GIB)), ("max\n", whole)):
        monkeypatch.setattr(Path, "read_text", lambda path: text if "cgroup" in str(path) else real(path))
        assert memory.total_memory(CPU) == found


def test_nothing_that_was_asked_for_is_a_user_error(job):
    """fails if: the error of a wrong memory is another kind, which main() would not print."""
    with pytest.raises(UserError, match="no size of a memory"):
        plan.planned_device(replace(cfg_of(), plan=True, plan_memory="a lot"))
