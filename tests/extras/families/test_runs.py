"""Runs of the families of extras/families/: each learns as a student and teaches a student of another family, on one
tiny world (conftest.py); files of others are read or refused.
"""
import json
import shutil

import pytest
import torch
from family_cases import CASES, SHAPE
from helpers import adamw, one_step, ready

from model import MODELS
from support.errors import UserError
from support.memory import sized
from support.model_config import ModelConfig
from support.weights import load_model

ONE_EACH = ("mistral-window", "gemma3", "olmo2", "olmo3-yarn", "phi3-partial-window", "smollm3-window", "qwen3-moe",
            "qwen3_5")


def write_family(name, folder, pair, seed=0):
    """A checkpoint of the case's family with random weights, and conftest's tokenizer."""
    family, changes = CASES[name]
    raw = {**SHAPE, "model_type": family, **changes, "vocab_size": 24, "max_position_embeddings": 64}
    raw = {key: value for key, value in raw.items() if value is not None}
    if raw.get("sliding_window"):
        raw["sliding_window"] = 4       # shorter than what is read
    model, rng = MODELS[family](ModelConfig.from_dict(raw)).init_weights(seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25, generator=rng)
    model.save(folder)
    for file in ("tokenizer.json", "generation_config.json"):
        shutil.copy(pair / "teacher" / file, folder / file)
    return folder


@pytest.mark.parametrize("name", ONE_EACH)
def test_a_student_of_each_family_comes_closer_to_a_teacher_of_another(name, command, pair, tmp_path):
    """25 steps of opd, without and with adapters. fails if: a parameter gets no gradient, or one of the wrong sign."""
    student = write_family(name, tmp_path / "family", pair)
    for flags in (dict(lr=3e-3), dict(lora_rank=4, lr=1e-2)):
        run = ready(command, student=student, problems=8, samples=2, steps=25, max_new_tokens=8, **flags)
        optimizer = adamw(run)
        kl = [one_step(run, optimizer, step)["reverse_kl"] for step in range(25)]
        assert sum(kl[-3:]) < 0.7 * sum(kl[:3]), (flags, kl)
        assert all(parameter.grad.abs().max() > 0 for _, parameter in run.student.trainable()) or flags.get("lora_rank")


@pytest.mark.parametrize("name", ONE_EACH)
@pytest.mark.parametrize("flags", [{}, dict(teacher_memory="stream"), dict(teacher_memory="park", teacher_int8=True)],
                         ids=str)
def test_a_teacher_of_each_family_teaches_wherever_its_layers_lie(name, flags, command, pair, tmp_path):
    """Streamed layers take the steps of resident ones. fails if: a way around Transformer.forward or .embed forgets
    what the family does there."""
    teacher = write_family(name, tmp_path / "family", pair, seed=1)
    records = [one_step(ready(command, teacher=teacher, problems=4, **more)) for more in ({}, flags)]
    assert records[0]["loss"] == pytest.approx(records[1]["loss"], rel=0.05 if "teacher_int8" in flags else 1e-9)
    assert records[0]["reverse_kl"] > 0.1


# Checkpoints that also see

def with_vision(tmp_path, old_names):
    transformers = pytest.importorskip("transformers")
    family, changes = CASES["gemma3"]
    text = {**SHAPE, **changes, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16,
                  patch_size=8)
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    theirs.save_pretrained(tmp_path, save_original_format=old_names)
    return theirs


@pytest.mark.parametrize("old_names", [True, False], ids=["old names", "names of transformers 5"])
def test_of_a_checkpoint_that_sees_the_text_part_is_loaded_and_the_rest_is_named(old_names, tmp_path, capsys):
    """fails if: a prefix is not known, the line leaves a part out, or what is saved is no text model of its own."""
    transformers, theirs = pytest.importorskip("transformers"), with_vision(tmp_path, old_names)
    ours, x = load_model(tmp_path), torch.randint(97, (2, 40), generator=torch.Generator().manual_seed(0))
    line = capsys.readouterr().out.strip().splitlines()[-1]
    assert "text decoder alone" in line and "vision_tower" in line and "multi_modal_projector" in line
    ours.save(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", attn_implementation="eager")
    assert type(again).__name__ == json.loads((tmp_path / "saved/config.json").read_text())["architectures"][0]
    with torch.no_grad():
        wanted = theirs(x).logits
        for found in (ours.logits(ours(x)), again(x).logits):
            assert ((found - wanted).abs().max() / wanted.abs().max()).item() <= 1e-4


@pytest.mark.parametrize("name, changes, words", [
    ("gemma3", dict(final_logit_softcapping=30.0), "final_logit_softcapping"),
    ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention"),
    ("gemma3", dict(hidden_activation="silu"), "hidden_activation"),
    ("gemma3", dict(layer_types=["sliding_attention"]), "layer_types"),
    ("gemma3", dict(layer_types=["chunked_attention"] * 3), "layer_types"),
    ("olmo3", dict(rope_parameters=dict(full_attention=dict(rope_type="yarn", rope_theta=1e4))), "needs factor"),
    ("phi3", dict(rope_parameters=dict(rope_type="longrope")), "longrope"),
    ("phi3", dict(rope_parameters=dict(rope_type="default", partial_rotary_factor=0.1)), "partial_rotary_factor"),
    ("smollm3", dict(no_rope_layers=[1, 0]), "no_rope_layers"),
    ("smollm3", dict(no_rope_layers=["a", "b", "c"]), "no_rope_layers"),
    ("qwen3-moe", dict(num_local_experts=1, num_experts=1), "num_experts_per_tok"),
    ("qwen3-moe", dict(mlp_only_layers=["x"]), "mlp_only_layers"),
    ("qwen3-moe", dict(norm_topk_prob="yes"), "norm_topk_prob"),
], ids=lambda x: str(x)[:40])
def test_what_a_family_does_not_have_is_one_sentence_that_names_the_key(name, changes, words):
    """fails if: a key that changes what is computed is passed over."""
    family, shape = CASES[name]
    with pytest.raises(UserError, match=words):
        ModelConfig.from_dict({**SHAPE, "model_type": family, **shape, **changes})


# config.json of published shapes, with the keys that their makers leave out

GEMMA_4B = dict(model_type="gemma3", vision_config=dict(hidden_size=1152), text_config=dict(
    model_type="gemma3_text", hidden_size=2560, intermediate_size=10240, num_hidden_layers=34, sliding_window=1024,
    rope_scaling=dict(factor=8.0, rope_type="linear")))
OLMO3_7B = dict(model_type="olmo3", hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                num_attention_heads=32, num_key_value_heads=32, vocab_size=100278, max_position_embeddings=65536,
                sliding_window=4096,
                rope_theta=500000, rms_norm_eps=1e-6, rope_scaling=dict(
                    rope_type="yarn", factor=8.0, original_max_position_embeddings=8192, beta_fast=32.0, beta_slow=1.0,
                    attention_factor=1.2079441541679836))
QWEN3_30B = dict(model_type="qwen3_moe", hidden_size=2048, intermediate_size=6144, num_hidden_layers=48,
                 num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, num_experts=128,
                 num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=True, decoder_sparse_step=1,
                 mlp_only_layers=[], rope_theta=1e6, sliding_window=None, use_sliding_window=False,
                 max_window_layers=48, max_position_embeddings=40960, router_aux_loss_coef=0.001)
PHI4 = dict(model_type="phi3", hidden_size=5120, intermediate_size=17920, num_hidden_layers=40, num_attention_heads=40,
            num_key_value_heads=10, vocab_size=100352, max_position_embeddings=16384, rope_theta=250000,
            rope_scaling=None, sliding_window=None, original_max_position_embeddings=16384, rms_norm_eps=1e-5)
SMOLLM3 = dict(model_type="smollm3", hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
               num_attention_heads=16, num_key_value_heads=4, vocab_size=128256, max_position_embeddings=65536,
               rope_theta=5e6, no_rope_layer_interval=4, use_sliding_window=False, sliding_window=None)


@pytest.mark.parametrize("raw, billions", [(GEMMA_4B, 3.88), (OLMO3_7B, 7.30), (QWEN3_30B, 30.53), (PHI4, 14.66),
                                           (SMOLLM3, 3.08)], ids=lambda x: str(x)[:30])
def test_published_shapes_have_the_size_that_they_are_known_by(raw, billions):
    """fails if: a default is wrong, a matrix is missing, or experts are counted once."""
    assert sized(ModelConfig.from_dict(raw)).weights / 1e9 == pytest.approx(billions, abs=0.01)


def test_what_published_files_leave_out_is_filled_in():
    """fails if: a layer is of the other kind, or a rope belongs to the other kind of layer."""
    gemma, olmo = ModelConfig.from_dict(GEMMA_4B), ModelConfig.from_dict(OLMO3_7B)
    assert gemma.own["windows"] == [None if (layer + 1) % 6 == 0 else 1024 for layer in range(34)]
    assert [rope["rope_theta"] for rope in gemma.own["ropes"].values()] == [1e6, 1e4]
    assert [rope["rope_type"] for rope in gemma.own["ropes"].values()] == ["linear", "default"]
    assert (gemma.num_attention_heads, gemma.num_key_value_heads, gemma.head_dim) == (8, 4, 256)
    assert gemma.tie_word_embeddings is True
    assert olmo.own["windows"] == [None if (layer + 1) % 4 == 0 else 4096 for layer in range(32)]
    assert [rope["rope_type"] for rope in olmo.own["ropes"].values()] == ["yarn", "default"]
    assert [bool(turn) for turn in ModelConfig.from_dict(SMOLLM3).own["turns"]] == [(n + 1) % 4 != 0 for n in range(36)]
