"""extras/fast/cpu.py: the packed head and the grouped attention of a bfloat16 decode step are the plain ones."""
import pytest
import torch
from model_cases import reads_the_keys_before_it
from rollout_cases import same, small, write

import model as model_file
import rollout as rollout_file
from extras.fast import cpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 32, 33])
@torch.no_grad()
def test_projected_logits_are_states_times_head(rows, dtype):
    """The memory holds what an earlier step left there. In float64 a head is never packed.
    fails if: the packed head is another one, more rows than it serves go to it, or float64 is refused."""
    rng = torch.Generator().manual_seed(0)
    hidden_BD, head_VD = (torch.randn(n, 16, generator=rng).to(dtype) for n in (rows, 50))
    packed, product = cpu.prepacked(head_VD), cpu.head_product(head_VD, 33)
    assert packed is None or dtype != torch.float64
    first_BV = product(torch.full_like(hidden_BD, torch.nan))
    found_BV = product(hidden_BD)
    torch.testing.assert_close(found_BV, hidden_BD @ head_VD.T)
    assert (found_BV.data_ptr() == first_BV.data_ptr()) == (packed is None or rows > 32)


def test_a_packed_head_writes_the_same_text():
    """fails if: the head is packed before the padding rows are cut off, or of another model"""
    model = small()
    model.vocab_size = 50
    prompts = [[1, 2, 3], [4, 5]]
    plain = write(model, prompts, max_new_tokens=20)
    rollout_file.head_product = cpu.head_product
    fast = write(model, prompts, max_new_tokens=20)
    assert same(plain, fast) and (plain.logp_BT - fast.logp_BT).abs().max() < 1e-5
    assert (fast.rows(fast.tokens_BT) < 50).all()


def test_only_a_model_on_a_cpu_brings_them():
    """fails if: on_model() asks for no device, or a float32 model changes how bfloat16 attention is done"""
    plain = rollout_file.head_product, model_file.masked_attention
    cpu.on_model(small().to("meta"))
    assert (rollout_file.head_product, model_file.masked_attention) == plain
    cpu.on_model(small())
    assert (rollout_file.head_product, model_file.masked_attention) == (cpu.head_product, plain[1])
    model = small()
    model.compute_dtype = torch.bfloat16
    cpu.on_model(model)
    assert model_file.masked_attention is cpu.masked_attention


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)],
                         ids=str)
def test_one_query_per_slot_reads_the_keys_before_it(dtype, tolerance):
    """Grouped heads, three slots of other lengths, leftovers behind them.
    fails if: a query reads another head's keys or a leftover, or the way of one dtype forgets the mask."""
    reads_the_keys_before_it(cpu.masked_attention, dtype, tolerance)
