"""The memory plan equals the tensors of a step."""
from dataclasses import replace

import pytest
import torch
from helpers import adamw, collect, one_step, ready

import train
from extras.lora import add_lora
from model import KVCache, Transformer
from support import memory
from support.flags import parse
from support.model_config import ModelConfig
from support.setup import set_up

VOCAB = 20      # of conftest's tokenizer


@pytest.mark.parametrize("flags", [{}, {"dtype": "bfloat16"}, {"lora_rank": 2},
                                   {"dtype": "bfloat16", "lora_rank": 3}], ids=str)
def test_memory_plan_equals_the_tensors_of_a_step(command, flags):
    """Stop ids that no one samples: every response has full length.
    fails if: the plan miscounts adapters, moments, the sampler's copy, a cache entry or a hidden state."""
    run = ready(command, problems=10, samples=1, slots=7, **flags)
    run.tokenizer.stop_ids, caches, optimizer = (VOCAB + 1,), [], adamw(run)
    run.actor.cache_type = lambda *args: caches.append(KVCache(*args)) or caches[-1]
    one_step(run, optimizer)
    (part,) = run.teacher.parts(collect(run))
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    tensors = {
        "student weights, float32": run.student.parameters(), "teacher weights": run.kind.models[0].parameters(),
        "gradients and AdamW moments": moments + [p.grad for _, p in run.student.trainable()],
        "student copy for sampling": [] if run.actor is run.student else run.actor.parameters(),
        "KV cache": caches[0].keys + caches[0].values, "teacher hidden states": [part.hidden_nE]}
    student, *teachers = (memory.sized(model.config) for model in (run.student, *run.kind.models))
    plan = memory.memory_plan(run.cfg, memory.Job(run.student.device, 2**34, student, teachers, None, VOCAB,
                                              max(map(len, run.prompts))))
    assert {name: plan[name] for name in tensors} == {
        name: sum(x.numel() * x.element_size() for x in held) for name, held in tensors.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [0, 16])
@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_planned_activations_are_what_autograd_keeps(family, rank, dtype):
    """fails if: the plan forgets a tensor per layer, or counts one that is not kept, say the normed value of a frozen
    norm."""
    raw = dict(model_type=family, vocab_size=64, hidden_size=128, intermediate_size=384, num_hidden_layers=16,
               num_attention_heads=4, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True)
    model = Transformer(ModelConfig.from_dict(raw), dtype).init_weights(0)
    if rank:
        add_lora(model, rank, rank)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor      # held, so that no address comes twice
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(torch.zeros(8, 128, dtype=torch.int64))
    found = sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights)
    most = memory.kept_activations(model.config, 8 * 128, dtype.itemsize, False, rank)
    if dtype != torch.float32:      # and the weights that were cast
        most += dtype.itemsize * sum(p.numel() for name, p in model.named_parameters() if name.endswith("_proj.weight"))
    assert out.requires_grad and 0.9 < found / most < 1.0


@pytest.mark.parametrize("flags, cast", [(dict(plain="borrowed_copy"), True), (dict(plain="all"), True), ({}, False),
                                         (dict(lora_rank=4), True), (dict(dtype="float32"), False)], ids=str)
def test_weights_are_cast_once_more_unless_the_samplers_are_borrowed(command, flags, cast):
    """fails if: the plan counts the cast weights of a run that has none, or forgets them"""
    cfg, _ = parse(command(**{"dtype": "bfloat16", **flags}), train.SETTINGS)
    run = set_up(cfg, {})
    student = memory.sized(run.student.config)
    job = memory.Job(run.student.device, 2**34, student, [], None, VOCAB, 8)
    casts = sum(p.numel() for name, p in run.student.named_parameters()
                if "_proj.weight" in name or name == "model.embed_tokens.weight")
    spare = run.student.config.hidden_size * (run.student.config.vocab_size - VOCAB)     # padding rows are not cast
    assert memory.memory_plan(run.cfg, job)["weights as they are multiplied"] == 2 * cast * (casts - spare)


def test_small_kept_blocks_leave_holes_on_a_cpu_alone(command):
    """fails if: holes() counts blocks from MAPPED on, or passing() plans holes or compiled products for a GPU too"""
    raw = dict(model_type="qwen3", vocab_size=64, hidden_size=256, intermediate_size=768, num_hidden_layers=6,
               num_attention_heads=8, num_key_value_heads=4, head_dim=32, tie_word_embeddings=True)
    config = ModelConfig.from_dict(raw)
    norms, wide, mlp = (size for size, _ in memory.kept_blocks(config, 2048, 4))
    assert memory.holes(config, 2048, 4, False) == 6 * (norms + wide) // 4      # an MLP's tensors are of 6 MiB
    assert memory.holes(config, 1024, 4, True) == (norms + wide + mlp) // 8     # of one layer, half as many tokens
    assert memory.holes(config, 2**15, 4, False) == 0
    cfg, _ = parse(command(dtype="bfloat16", slots=4, micro_batch_tokens=64), train.SETTINGS)
    plans = [memory.memory_plan(cfg, memory.Job(torch.device(device), 2**34, memory.sized(config), [], None, 64, 8))
             for device in ("cpu", "cuda")]
    here, gpu = (plan["freed blocks between activations"] for plan in plans)
    assert here > 0 == gpu and "compiled products" in plans[0].keys() - plans[1].keys()


def test_compiled_products_grow_with_micro_batches_up_to_a_limit(command, monkeypatch):
    """fails if: compiled_products() counts float32, a CPU that compiles none, or goes on beyond what is kept"""
    cfg, _ = parse(command(dtype="bfloat16", problems=10, samples=1, max_new_tokens=8, micro_batch_tokens=80),
                   train.SETTINGS)
    size = memory.sized(ModelConfig.from_dict(dict(model_type="llama", vocab_size=64, hidden_size=16, head_dim=8,
                                                   intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)))
    job, (at_start, each, most) = memory.Job(torch.device("cpu"), 2**34, size, [], None, 64, 8), memory.COMPILED
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    assert memory.compiled_products(replace(cfg, steps=3), job) == at_start + 3 * 2 * each      # 160 tokens, 80 each
    assert memory.compiled_products(replace(cfg, steps=10**6), job) == most
    assert memory.compiled_products(replace(cfg, dtype="float32"), job) == 0
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert memory.compiled_products(cfg, job) == 0


def test_the_peak_counts_the_larger_phase():
    """fails if: cache and activations, which are never there together, are added up."""
    plan = {"weights": 100, "KV cache": 7, "activations of a micro-batch": 3, "logits of a chunk": 2}
    assert memory.peak(plan) == 107 and memory.peak({**plan, "logits of a chunk": 9}) == 112


def test_plan_prints_and_writes_nothing(command, tmp_path, capsys):
    """fails if: --plan loads weights into a run folder, or trains."""
    with pytest.raises(SystemExit) as stopped:
        train.main(command(plan=True))
    assert stopped.value.code == 0 and not (tmp_path / "runs").exists()
    assert capsys.readouterr().out.startswith("plan    fits: about ")
