"""Qwen3.5: what the bar of all families (test_bar.py) does not ask. The recurrence, token by token in float64, is the
specification of the chunked rule; states belong to slots; a vision tower is left out; whole runs.
"""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from family_cases import CASES, SHAPE, write_peer
from model_cases import edit_tensors, gap, logits, scramble, tokens

import train
from conftest import GRAPHS_ON_MODEL, write_pair
from extras.families.qwen3_5 import CHUNK, DeltaCache, DeltaNet, delta_rule, delta_step
from extras.lora import add_lora
from model import MODELS, Transformer
from rollout import generate
from support import memory
from support.errors import UserError
from support.model_config import ModelConfig
from support.weights import load_model

ROOT = Path(__file__).resolve().parents[3]
TEXT = {**SHAPE, **CASES["qwen3_5"][1]}
LENGTHS = 1, 2, 3, 63, 64, 65, 130, 512


def built(seed=0, dtype=torch.float32, **changes):
    """A scrambled model that never was on disk; its decays are those of scramble(), about a half a token."""
    raw = {"model_type": "qwen3_5_text", **TEXT, **changes}
    return scramble(MODELS["qwen3_5_text"](ModelConfig.from_dict(raw), dtype).to(dtype), seed)


# The rule

def asked(T, seed=0, decay=0.3):
    """q, k, v, g, beta of T tokens of 2 sequences and 3 heads (K 5, V 4), and a state; float64, with gradients."""
    rng = torch.Generator().manual_seed(seed)
    q, k, v, g, beta, S = (torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in (
        (2, T, 3, 5), (2, T, 3, 5), (2, T, 3, 4), (2, T, 3), (2, T, 3), (2, 3, 5, 4)))
    k = k / k.norm(dim=-1, keepdim=True)
    return [x.requires_grad_() for x in (q, k, v, -decay * g.abs(), beta.sigmoid(), S)]


def one_by_one(q, k, v, g, beta, S):
    out = []
    for t in range(q.shape[1]):
        o, S = delta_step(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], S)
        out.append(o)
    return torch.stack(out, 1), S


def test_a_step_is_the_recurrence_written_out():
    """By the formulas, head by head. fails if: the state decays after it was asked, or keys and values swap places."""
    q, k, v, g, beta, S_BHKV = (x.detach() for x in asked(1))
    o_BHV, after = delta_step(q[:, 0], k[:, 0], v[:, 0], g[:, 0], beta[:, 0], S_BHKV)
    for b in range(2):
        for h in range(3):
            S = S_BHKV[b, h] * g[b, 0, h].exp()
            u = beta[b, 0, h] * (v[b, 0, h] - S.T @ k[b, 0, h])
            S = S + torch.outer(k[b, 0, h], u)
            assert gap(after[b, h], S) < 1e-14 and gap(o_BHV[b, h], S.T @ q[b, 0, h]) < 1e-14


@pytest.mark.parametrize("decay", [0.01, 0.3, 30.0])
@pytest.mark.parametrize("T", [1, 2, 3, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 2])
def test_the_chunked_rule_is_the_recurrence(T, decay):
    """Outputs, the last state, and the gradient of both, from a state that is not empty; decays from next to none to
    exp(-30) a token. fails if: a chunk forgets the state before it, sees what is later, or a gradient is cut."""
    inputs = asked(T, decay=decay)
    found, wanted = delta_rule(*inputs), one_by_one(*inputs)
    for mine, theirs in zip(found, wanted):
        assert gap(mine, theirs) < 1e-12
    weights = [torch.sin(torch.arange(x.numel(), dtype=x.dtype)).view_as(x) for x in wanted]
    mine, theirs = (torch.autograd.grad([(x * w).sum() for x, w in zip(out, weights)], inputs)
                    for out in (found, wanted))
    for a, b in zip(mine, theirs):
        assert torch.isfinite(a).all() and gap(a, b) < 1e-11


def test_a_token_without_decay_and_weight_leaves_the_state():
    """What stands behind a prompt. fails if: the padding of a chunk decays or writes."""
    q, k, v, g, beta, S = (x.detach() for x in asked(90))
    real = torch.arange(90)[:, None] < torch.tensor([70, 13])[:, None, None]
    _, padded = delta_rule(q, k, v, g * real, beta * real, S)
    for b, n in enumerate((70, 13)):
        _, alone = delta_rule(*(x[b:b + 1, :n] for x in (q, k, v, g, beta)), S[b:b + 1])
        assert gap(padded[b], alone[0]) < 1e-12


# Against transformers

@pytest.mark.parametrize("decays", ["as published", "fast"])
def test_logits_at_the_edges_of_chunks(decays, tmp_path):
    """fails if: a last chunk that is not full, or a sequence shorter than the convolution, is another case."""
    theirs = write_peer("qwen3_5", tmp_path)
    if decays == "fast":
        scramble(theirs).save_pretrained(tmp_path / "fast")
    ours = load_model(tmp_path / ("fast" if decays == "fast" else ""))
    for T in LENGTHS:
        with torch.no_grad():
            assert gap(logits(ours, tokens(2, T, seed=T)), theirs(tokens(2, T, seed=T)).logits) <= 1e-4, T


def test_a_checkpoint_in_bfloat16_is_read(tmp_path):
    """fails if: A_log, the norms or the convolution are read in another dtype than the rest."""
    transformers = pytest.importorskip("transformers")
    write_peer("qwen3_5-tied", tmp_path, torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours = load_model(tmp_path)
    assert ours.disk_dtype == torch.bfloat16
    with torch.no_grad():
        assert gap(logits(ours, tokens(2, 99)), theirs(tokens(2, 99)).logits) <= 1e-4


@pytest.mark.parametrize("tied", [False, True])
def test_of_a_checkpoint_with_a_vision_tower_the_text_part_is_loaded(tied, tmp_path, capsys):
    """Also with layers that draft tokens (mtp). What is saved is a text model of equal logits.
    fails if: the tower is loaded, left out in silence, or config.json is saved as that of both."""
    transformers = pytest.importorskip("transformers")
    vision = dict(depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=36, patch_size=4,
                  num_position_embeddings=16)
    config = transformers.AutoConfig.for_model("qwen3_5", text_config=TEXT, vision_config=vision,
                                               tie_word_embeddings=tied)
    theirs = scramble(transformers.Qwen3_5ForConditionalGeneration(config).float())
    theirs.save_pretrained(tmp_path / "both")
    edit_tensors(tmp_path / "both/model.safetensors", lambda data: data.update({"mtp.fc.weight": torch.zeros(2, 3)}))
    ours, x = load_model(tmp_path / "both"), tokens(2, 70)
    towers = sum("visual" in name for name, _ in theirs.named_parameters())
    assert f"left out are {towers} tensors of visual, 1 tensors of mtp" in capsys.readouterr().out
    ours.save(tmp_path / "text")
    again, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "text", output_loading_info=True)
    assert type(again).__name__ == "Qwen3_5ForCausalLM" and not any(report.values()), report
    saved = json.loads((tmp_path / "text/config.json").read_text())
    assert saved["model_type"] == "qwen3_5_text" and saved["architectures"] == ["Qwen3_5ForCausalLM"]
    with torch.no_grad():
        wanted = theirs(x).logits
        assert gap(logits(ours, x), wanted) <= 1e-4 and gap(again(x).logits, wanted) <= 1e-6


# States and slots

@torch.no_grad()
def test_in_float64_the_sampler_stores_what_training_computes():
    """Ragged prompts, refilled and moved slots, decays that are fast: what float32 would round away is seen.
    fails if: a state is that after the padding, of the slot's last sequence, or of its neighbour."""
    model = built(dtype=torch.float64)
    prompts = [tokens(n, seed=n).tolist() for n in (3, 71, 9, 1, 50, 2, 5)]
    rollout = generate(model, prompts, samples=2, max_new_tokens=[9, 40, 30, 70, 20, 10, 1], stop_ids=(0, 7), slots=4,
                       seed=3)
    hidden_ND = model.response_hidden(rollout.tokens_BT, rollout.mask_BT)
    logp_NV = (hidden_ND @ model.head_weight().T).log_softmax(-1)
    wanted_N = logp_NV.gather(1, rollout.rows(rollout.tokens_BT)[:, None])[:, 0]
    assert (rollout.rows(rollout.logp_BT) - wanted_N).abs().max() < 2e-6      # as it is stored, in float32
    alone = generate(model, prompts[1:2], samples=2, max_new_tokens=40, stop_ids=(0, 7), slots=1, seed=3)
    streams = generate(model, prompts[:2], samples=2, max_new_tokens=[9, 40], stop_ids=(0, 7), slots=3, seed=3)
    assert streams.response(2) == rollout.response(2) and len(alone.response(0)) > 0


@torch.no_grad()
@pytest.mark.parametrize("to, rows", [([2, 0, 3], [1, 0, 1]), ([0], [1])], ids=str)
def test_copied_slots_continue_like_the_original(to, rows):
    """From another cache, and within one. fails if: copy_rows forgets the states or the convolution's inputs."""
    model, lengths = built(dtype=torch.float64), torch.tensor([6, 9])
    texts = tokens(2, 12)
    source = model.cache_type(model, 2, 12)
    source.length_B = lengths.clone()
    model(texts[:, :9], source)
    source.longest = 9
    cache = source
    if len(to) > 1:
        cache = model.cache_type(model, 4, 12)
        for leftover in cache.states + cache.inputs:
            leftover.fill_(7.0)
    cache.copy_rows(torch.tensor(to), source, torch.tensor(rows))
    cache.longest = 9
    slots = torch.zeros(len(cache.length_B), 1, dtype=torch.int64)
    for slot, row in zip(to, rows):
        slots[slot] = texts[row, lengths[row]]
    hidden = model(slots, cache)
    for slot, row in zip(to, rows):
        assert gap(hidden[slot, 0], model(texts[row:row + 1, :lengths[row] + 1])[0, -1]) < 1e-12


@torch.no_grad()
def test_a_copy_in_bfloat16_computes_what_its_float32_source_does():
    """The student's weights are float32, its sampler's are not; products are bfloat16 for both.
    fails if: a decay, or the weight of a norm, is more exact in one than in the other."""
    source = built(dtype=torch.float32)
    source.compute_dtype = torch.bfloat16
    assert torch.equal(source(tokens(2, 70)), source.copy_as(torch.bfloat16)(tokens(2, 70)))


def test_planned_cache_and_adapters_are_those_of_the_model():
    """fails if: the plan counts keys for layers that have none, forgets a state, or misses a projection."""
    model = built()
    cache = DeltaCache(model, 3, 17)
    held = [*cache.keys, *cache.values, *cache.states, *cache.inputs]
    assert memory.cache(model.config, 3, 17, 4) == sum(x.nbytes for x in held)
    add_lora(model, 3, 6.0)
    assert memory.adapter_weights(model.config, 3) == sum(p.numel() for _, p in model.trainable())


def test_fresh_weights_scale_by_one_and_decay():
    """fails if: a norm of a new model doubles what it norms, or all its heads forget at the same pace."""
    model = MODELS["qwen3_5_text"](ModelConfig.from_dict({"model_type": "qwen3_5_text", **TEXT})).init_weights(0)
    layer = model.model.layers[0]
    x = torch.randn(4, SHAPE["hidden_size"])
    assert gap(layer.input_layernorm(x).square().mean(-1), torch.ones(4)) < 1e-3
    assert (layer.linear_attn.norm.weight == 1).all() and len(set(layer.linear_attn.A_log.tolist())) == 6
    assert gap(model(tokens(1, 40)).square().mean(), torch.tensor(1.0)) < 1e-2


# config.json

@pytest.mark.parametrize("changes, word", [
    (dict(layer_types=["linear_attention"] * 3), "full_attention"),
    (dict(layer_types=["full_attention"]), "layer_types"),
    (dict(layer_types=["linear_attention", "sliding_attention", "full_attention"]), "sliding_attention"),
    (dict(layer_types="full_attention"), "a list"), (dict(linear_num_value_heads=5), "linear_num_key_heads 2"),
    (dict(attn_output_gate=False), "attn_output_gate"), (dict(linear_key_head_dim=0), "linear_key_head_dim"),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=1e4, partial_rotary_factor=0.125)), "3 channels"),
    (dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)), "yarn"),
    (dict(hidden_act="gelu"), "gelu")], ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_not_supported_is_one_sentence(changes, word):
    """fails if: a config.json that means something else is built all the same."""
    with pytest.raises(UserError) as error:
        ModelConfig.from_dict({"model_type": "qwen3_5_text", **TEXT, **changes})
    assert word in str(error.value) and "\n" not in str(error.value)


def test_every_fourth_layer_attends_where_config_json_does_not_say():
    """fails if: the pattern begins with attention, or full_attention_interval is not read."""
    def kinds(**more):
        raw = {"model_type": "qwen3_5_text", **TEXT, "num_hidden_layers": 6, "layer_types": None, **more}
        return [kind[0] for kind in ModelConfig.from_dict(raw).own["layer_types"]]
    assert kinds() == list("lllfll") and kinds(full_attention_interval=2) == list("lflflf")


# Whole runs

def write_hybrid(pair, name, seed, spread=0.25, **changes):
    """A small model of this family beside the student of the pair, with its tokenizer. spread: of its matrices."""
    raw = {"model_type": "qwen3_5_text", **TEXT, "num_hidden_layers": 2, "vocab_size": 24, "hidden_size": 16,
           "intermediate_size": 24, "max_position_embeddings": 64, "tie_word_embeddings": True,
           "layer_types": ["linear_attention", "full_attention"], **changes}
    model = MODELS["qwen3_5_text"](ModelConfig.from_dict(raw)).init_weights(seed)
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.normal_(0, spread, generator=rng)
    model.save(pair / name)
    for file in ("tokenizer.json", "generation_config.json"):
        shutil.copy(pair / "student" / file, pair / name / file)
    return pair / name


@pytest.fixture(scope="module")
def hybrids(tmp_path_factory):
    folder = write_pair(tmp_path_factory.mktemp("hybrids"))
    write_hybrid(folder, "hybrid", 0)
    write_hybrid(folder, "untied", 1, tie_word_embeddings=False, hidden_size=24, vocab_size=32)
    return folder


def records(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in lines if "loss" in record]


@pytest.fixture
def run(hybrids, command, tmp_path):
    """run(name, ...) -> the records of a run in which one hybrid learns from the other."""
    def made(name="a", **flags):
        files = dict(student=hybrids / "hybrid", teacher=hybrids / "untied", data=hybrids / "train.jsonl")
        assert train.main(command(**{**files, "name": name, "eval_teacher": None, **flags})) == 0
        return records(tmp_path / "runs" / name)
    return made


@pytest.mark.parametrize("flags", [dict(teacher_memory="park"), dict(gradient_checkpointing=True),
                                   dict(micro_batch_tokens=12, slots=1), dict(plain="all")], ids=str)
def test_memory_settings_take_the_same_steps(run, flags):
    """fails if: a layer that runs twice, comes and goes, or meets another batch, keeps something of the first time."""
    for mine, theirs in zip(run("a", lr=1e-3), run("b", lr=1e-3, **flags), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_a_streamed_teacher_is_the_resident_one(run):
    """fails if: a layer needs more than what the streamed pass hands on."""
    streamed = run("b", lr=1e-3, teacher_memory="stream")
    assert [r["loss"] for r in streamed] == [r["loss"] for r in run("a", lr=1e-3)]


def test_a_new_model_learns_to_write_like_the_toy_teacher(run, hybrids):
    """From log 264 = 5.6 nats a token. fails if: gradients do not reach what has to change."""
    toy = write_hybrid(hybrids, "toy", 2, spread=0.02, vocab_size=264, hidden_size=64, intermediate_size=128,
                       num_hidden_layers=4, layer_types=None, max_position_embeddings=256)
    for file in ("tokenizer.json", "generation_config.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "toy/student" / file, toy / file)
    losses = [record["loss"] for record in run(
        student=toy, teacher=ROOT / "toy/teacher", data=ROOT / "toy/train.jsonl", eval_data=ROOT / "toy/test.jsonl",
        recipe="sft", responses="teacher", lr=3e-3, steps=40, problems=16, samples=1, max_new_tokens=40)]
    assert losses[0] > 5 and losses[-1] < 2, losses


def test_two_processes_take_the_steps_of_one(run, hybrids, command, tmp_path):
    """fails if: a shard of a convolution, of A_log or of dt_bias is taken for the whole."""
    flags = dict(student=hybrids / "hybrid", teacher=hybrids / "untied", data=hybrids / "train.jsonl", name="two",
                 problems=3, samples=2, steps=3, lr=1e-3)
    alone = run("one", **{key: flags[key] for key in ("problems", "samples", "steps", "lr")})
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
                           str(ROOT / "train.py"), *command(**flags)], capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for mine, theirs in zip(alone, records(tmp_path / "runs/two"), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


def test_ways_that_do_not_know_states_stay_away(flash, monkeypatch, tmp_path):
    """fails if: micro-batches are packed end to end, where a state would run from one sequence into the next, or the
    cache is replaced by one without states."""
    built().save(tmp_path)
    model = load_model(tmp_path)
    GRAPHS_ON_MODEL(model)
    assert model.cache_type is DeltaCache and "read" not in vars(model) and "forward" not in vars(model)
    assert type(model).read is Transformer.read


def test_a_layer_keeps_nothing_of_a_pass():
    """fails if: a state is an attribute of a module, where the next pass would find it."""
    model = built()
    before = [set(vars(module)) for module in model.modules()]
    first, _, again = (logits(model, x) for x in (tokens(2, 70), tokens(3, 9, seed=1), tokens(2, 70)))
    generate(model, tokens(3, 7).tolist(), max_new_tokens=6, stop_ids=())
    assert torch.equal(first, again) and [set(vars(module)) for module in model.modules()] == before
    assert any(isinstance(module, DeltaNet) for module in model.modules())
