"""extras/fast/packed.py: a decode step in fewer calls writes and notes what the plain one does, to the last bit where
the products are as wide as a processor's vectors."""
import pytest
import torch
from model_cases import CASES, small
from rollout_cases import same, write

from extras.fast import packed
from extras.lora import add_lora
from model import KVCache, Layer, Transformer


def is_packed(model):
    """Do the decode steps of a generate() call take the packed way?"""
    packed.on_model(model)
    return model.cache_type is packed.packed_cache and model.cache_type(model, 2, 4).layers is not None


@pytest.mark.parametrize("name", CASES)
def test_every_family_writes_what_it_writes_the_plain_way(name, monkeypatch):
    """Ragged prompts, slots that end and are filled again, biases, norms of heads, shared keys.
    fails if: a bias or a norm is left out, q, k, v or gate and up change places, or a row of the rope table is another
    position's."""
    family, changes = CASES[name]
    model, steps = small(family, **changes), []
    plain = write(model)
    assert is_packed(model)
    layer = packed.decode_layer
    monkeypatch.setattr(packed, "decode_layer", lambda *given: steps.append(0) or layer(*given))
    fast = write(model)
    assert steps and same(plain, fast)
    assert (plain.logp_BT - fast.logp_BT).abs().max() < 1e-5
    assert (plain.entropy_BT - fast.entropy_BT).abs().max() < 1e-5


def test_a_call_reads_the_weights_of_its_time():
    """fails if: packed weights outlive the generate() call that packed them"""
    model, other = small("qwen3"), small("qwen3")
    assert is_packed(model)
    write(model)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters()):
            theirs.mul_(1.5)
            mine.copy_(theirs)
    assert same(write(model), write(other))


def test_a_pass_with_a_gradient_is_the_plain_one():
    """fails if: a decode step under autograd reads the copies that generate() made, and the weights get no gradient"""
    model = small("qwen3")
    assert is_packed(model)
    keys = model.cache_type(model, 2, 4)
    with torch.no_grad():
        assert keys.layers is not None
    model(torch.tensor([[1, 2], [3, 4]]), keys)
    keys.length_B, keys.longest, keys.keys, keys.values = (
        torch.tensor([2, 2]), 2, [key.detach() for key in keys.keys], [value.detach() for value in keys.values])
    model(torch.tensor([[5], [6]]), keys).sum().backward()
    assert all(parameter.grad is not None for parameter in model.model.layers.parameters())


def test_what_is_not_plain_small_and_float32_on_a_cpu_keeps_its_way(monkeypatch):
    """fails if: adapters are left out of the packed weights, or another layer, device or dtype, or a large model is
    packed"""
    class Other(Layer):
        pass
    adapted, other, half, large = (small("qwen3") for _ in range(4))
    add_lora(adapted, 2, 4.0)
    other.model.layers[1].__class__ = Other
    half.compute_dtype = torch.bfloat16
    assert is_packed(small("qwen3"))
    assert not any(map(is_packed, (adapted, other, half, small("qwen3").to("meta"))))
    monkeypatch.setattr(packed, "MOST_WEIGHTS", sum(p.numel() for p in large.parameters()) - 1)
    assert not is_packed(large) and large.cache_type is KVCache
    assert large.forward.__func__ is Transformer.forward
