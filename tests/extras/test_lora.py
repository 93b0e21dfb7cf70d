"""extras/lora.py: adapters change nothing until they are trained, are all that is trained, and merge into files."""
import shutil

import pytest
import torch
from model_cases import SHAPE, edit_json, gap, gradients, logits, old_spelling, small, tokens, written

from extras.lora import add_lora, lora_off, projections
from support.weights import load_model


def scramble_adapters(model):
    """A training step, in effect: the B matrices leave 0."""
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for linear in projections(model):
            linear.lora_B.normal_(0.0, 0.1, generator=rng)


def test_saved_checkpoint_of_adapters_loads_in_transformers(peer, tmp_path):
    """fails if: save() forgets the merge, or drops the embedding."""
    transformers = pytest.importorskip("transformers")
    shutil.copytree(peer[1], tmp_path / "in")
    edit_json(tmp_path / "in" / "config.json", old_spelling)
    ours = load_model(tmp_path / "in")
    add_lora(ours, 2, 4.0)
    scramble_adapters(ours)
    ours.save(tmp_path / "out")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs, report = load(tmp_path / "out", output_loading_info=True)
    assert not any(report.values()), report
    assert gap(theirs(tokens(2, 40)).logits, logits(ours, tokens(2, 40))) < 1e-5


def test_untouched_adapter_changes_no_bit_and_covers_seven_projections_per_layer():
    """fails if: B starts above 0, or PROJECTIONS loses one."""
    model = small("qwen2")
    before = logits(model, tokens(2, 9))
    add_lora(model, 3, 6.0)
    assert torch.equal(logits(model, tokens(2, 9)), before)
    assert len(projections(model)) == 7 * SHAPE["num_hidden_layers"]
    assert {tuple(linear.lora_A.shape)[0] for linear in projections(model)} == {3}


def test_lora_off_is_the_initial_model_bit_for_bit_after_training():
    """fails if: lora_off leaves a projection on, or does not restore the scale after an exception."""
    model = small()
    before = logits(model, tokens(2, 9))
    add_lora(model, 3, 6.0)
    for _ in range(2):      # the first step moves B only: A's gradient is 0 while B is
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        gradients(model)
        optimizer.step()
    trained = logits(model, tokens(2, 9))
    assert gap(trained, before) > 1e-3
    with pytest.raises(KeyError), lora_off(model):
        assert torch.equal(logits(model, tokens(2, 9)), before)
        raise KeyError
    assert torch.equal(logits(model, tokens(2, 9)), trained)


def test_only_adapters_get_gradients():
    """fails if: add_lora does not freeze the checkpoint's own weights."""
    model = small("qwen2")
    add_lora(model, 2, 4.0)
    scramble_adapters(model)
    names = set(gradients(model)[0])
    assert len(names) == 2 * 7 * SHAPE["num_hidden_layers"] and all("lora_" in name for name in names)


def test_adapter_is_scale_times_b_a_and_survives_the_merge(tmp_path):
    """fails if: lora_scale is alpha instead of alpha / rank, or merged_weight leaves it out."""
    model = small("qwen3", head_dim=12)
    add_lora(model, 4, 2.0, seed=1)
    scramble_adapters(model)
    by_hand = small("qwen3", head_dim=12)
    with torch.no_grad():
        for plain, adapted in zip(projections(by_hand), projections(model)):
            plain.weight += 2.0 / 4 * adapted.lora_B @ adapted.lora_A
    model.save(tmp_path)
    for same in (by_hand, load_model(tmp_path)):
        assert gap(logits(same, tokens(2, 9)), logits(model, tokens(2, 9))) < 1e-5


def test_adapters_of_a_bfloat16_model_stay_float32_and_merge_before_rounding(tmp_path):
    """fails if: add_lora takes the weights' dtype, or merged_weight adds in bfloat16."""
    model = load_model(written(tmp_path / "a"), dtype=torch.bfloat16)
    add_lora(model, 2, 4.0)
    scramble_adapters(model)
    assert {gradient.dtype for gradient in gradients(model)[0].values()} == {torch.float32}
    model.save(tmp_path / "b", dtype=torch.float32)
    merged, linear = projections(load_model(tmp_path / "b"))[0].weight, projections(model)[0]
    assert torch.allclose(merged, linear.weight.float() + 2.0 * linear.lora_B @ linear.lora_A, atol=1e-6)


def test_adapters_follow_their_seed_alone():
    """fails if: add_lora draws A from the global stream."""
    first, second, other = (small() for _ in range(3))
    for seed, model in ((1, first), (1, second), (2, other)):
        add_lora(model, 2, 4.0, seed=seed)
    a, b, c = (projections(model)[0].lora_A for model in (first, second, other))
    assert torch.equal(a, b) and not torch.equal(a, c)
