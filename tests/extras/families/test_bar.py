"""Every family of extras/families/ against transformers, on checkpoints that transformers wrote (family_cases.py).

Figures measured on these cases stand in docs/families.md.
"""
import pytest
import torch
from family_cases import CASES, SHAPE, write_peer
from model_cases import gap, logits, run_cached, tokens

import losses
from extras.lora import add_lora
from extras.low_memory import recomputed
from rollout import generate
from support import memory
from support.memory import kept_activations, sized
from support.weights import load_model

VOCAB = SHAPE["vocab_size"]
LENGTHS = 1, 2, 3, 9, 64, 130, 512


@pytest.fixture(scope="module", params=list(CASES))
def case(request, tmp_path_factory):
    """(transformers' model, the folder that it wrote, the model that is loaded from there)."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = write_peer(request.param, folder)
    return theirs, folder, load_model(folder)


def test_logits_are_those_of_transformers(case, record_property):
    """fails if: a norm, a bias, a window or an angle is left out, off by one, or another layer's."""
    theirs, _, ours = case
    for T in LENGTHS:
        x = tokens(2, T, seed=T)
        with torch.no_grad():
            off = gap(logits(ours, x), theirs(x).logits)
        record_property(f"logits_{T}", off)
        assert off <= 1e-4, T


def test_greedy_tokens_are_those_of_transformers(case):
    """fails if: the cache forgets what the whole pass sees, or sees what is beyond the window."""
    theirs, _, ours = case
    prompts = [tokens(n, seed=n).tolist() for n in (1, 5, 40)]
    rollout = generate(ours, prompts, max_new_tokens=64, stop_ids=(), temperature=0, slots=2)
    for b, prompt in enumerate(prompts):
        with torch.no_grad():
            out = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None,
                                  attention_mask=torch.ones(1, len(prompt), dtype=torch.int64))
        assert rollout.response(b) == out[0, len(prompt):].tolist()


def write(model):
    """Ragged prompts, ragged limits, slots that are refilled and that move."""
    prompts = [tokens(n, seed=n).tolist() for n in (3, 31, 9, 1, 50, 5, 5)]
    budgets = [9, 40, 30, 60, 20, 10, 1]
    return generate(model, prompts, samples=2, max_new_tokens=budgets, stop_ids=(0, 7), slots=4, seed=3)


def test_what_the_sampler_stores_is_what_training_computes(case, record_property):
    """fails if: a refilled slot keeps something of its last sequence, or padding is seen."""
    ours, rollout = case[2], write(case[2])
    with torch.no_grad():
        logp_NV = ours.logits(ours.response_hidden(rollout.tokens_BT, rollout.mask_BT)).log_softmax(-1)
    found_N = logp_NV.gather(1, rollout.rows(rollout.tokens_BT)[:, None])[:, 0]
    off = (found_N - rollout.rows(rollout.logp_BT)).abs().max().item()
    record_property("sampler", off)
    assert off <= 1e-5


def test_a_batch_is_its_sequences_one_by_one(case):
    """Whole passes, and passes of several tokens into a cache. fails if: padding or a neighbour is seen."""
    ours, rows, lengths = case[2], tokens(3, 60), [7, 41, 23]
    with torch.no_grad():
        alone = [ours(row[None, :n])[0] for row, n in zip(rows, lengths)]
        side_by_side = ours(rows.masked_fill(torch.arange(60) >= torch.tensor(lengths)[:, None], 5))
        cache = ours.cache_type(ours, 3, 60)
        for at_BT, hidden_BTD in run_cached(ours, rows, [3, 30, 11], [1, 6, 1], cache):
            for b in range(3):
                whole = ours(rows[b:b + 1, :at_BT[b, -1] + 1])[0, at_BT[b]]
                assert gap(hidden_BTD[b], whole) <= 1e-5
    for b, n in enumerate(lengths):
        assert gap(side_by_side[b, :n], alone[b]) <= 1e-5


def reverse_kl_of_transformers(theirs, rollout, teacher_BTV):
    mask_BT = rollout.mask_BT[:, 1:]
    p_BTV = theirs(rollout.tokens_BT).logits[:, :-1].log_softmax(-1)
    return (p_BTV.exp() * (p_BTV - teacher_BTV[:, :-1])).sum(-1)[mask_BT].mean()


class Fixed:
    """losses.backward's side of a teacher whose log-probs are these rows."""

    def __init__(self, teacher_NV, sequence_b):
        self.teacher_NV, self.sequence_b = teacher_NV, sequence_b

    def fields(self, row_n):
        return {"teacher_NV": self.teacher_NV[row_n]}

    def rows(self, logits_NV, fields):
        return losses.Rows(logits_NV.log_softmax(-1), **fields)

    def top_ids(self, logits_NV, fields):
        return None


def step_gradient(ours, rollout, teacher_BTV):
    """{name: gradient} of the mean reverse KL, by the loss engine, in several micro-batches and chunks."""
    losses.zero_gradients(ours)
    teacher_NV = teacher_BTV[:, :-1][rollout.mask_BT[:, 1:]]
    N = len(teacher_NV)

    class Args(losses.LossArgs):
        temperature, chunk_rows, micro_batch_tokens = 1.0, 37, 120
    losses.backward(ours, rollout, [Fixed(teacher_NV, rollout.every_B)], {"token_N": rollout.rows(rollout.tokens_BT)},
                    torch.full((N,), 1 / N), losses.reverse_kl, Args(), lambda rows, top: {})
    return {name: p.grad.clone() for name, p in ours.trainable()}


def worst(found, wanted):
    """Largest difference of any gradient, relative to the largest entry of all."""
    assert found.keys() == wanted.keys()
    top = max(grad.abs().max() for grad in wanted.values())
    return max(((found[name] - wanted[name]).abs().max() / top).item() for name in wanted)


def test_the_gradient_of_a_step_is_plain_autograd_through_transformers(case, record_property, tmp_path):
    """Also with activations recomputed. fails if: a path of the gradient is cut, counted twice or detached."""
    theirs, folder, _ = case
    ours = load_model(folder)
    rollout = write(ours)
    rng = torch.Generator().manual_seed(5)
    teacher_BTV = torch.randn(*rollout.tokens_BT.shape, VOCAB, generator=rng).log_softmax(-1)
    theirs.zero_grad()
    reverse_kl_of_transformers(theirs, rollout, teacher_BTV).backward()
    with torch.no_grad():       # their gradients under the names and cuts of this project: a model that holds them
        weights = {name: p.clone() for name, p in theirs.named_parameters()}
        for name, p in theirs.named_parameters():
            p.copy_(p.grad)
        theirs.save_pretrained(tmp_path)
        for name, p in theirs.named_parameters():
            p.copy_(weights[name])
    wanted = load_model(tmp_path).weights()
    found = step_gradient(ours, rollout, teacher_BTV)
    off = worst(found, wanted)
    record_property("gradient", off)
    assert off <= 1e-4
    for layer in ours.model.layers:
        layer.forward = recomputed(layer.forward)
    assert worst(step_gradient(ours, rollout, teacher_BTV), found) <= 1e-6


def test_adapters_start_as_nothing_and_are_merged_when_weights_are_asked_for(case, tmp_path):
    """fails if: a projection is without its adapter, or saving forgets it."""
    _, folder, plain = case
    ours, x = load_model(folder), tokens(2, 30)
    add_lora(ours, 3, 6.0)
    assert gap(logits(ours, x), logits(plain, x)) <= 1e-6
    learned = [name for name, _ in ours.trainable()]
    assert learned and all("lora_" in name for name in learned)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, p in ours.trainable():
            p.normal_(0, 0.1, generator=rng)
    assert gap(logits(ours, x), logits(plain, x)) > 1e-3
    ours.save(tmp_path)
    assert gap(logits(load_model(tmp_path), x), logits(ours, x)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_saved_checkpoint_loads_in_transformers(case, dtype, tmp_path):
    """bfloat16: read from a checkpoint of that dtype as well.
    fails if: a tensor gets another name or place, or config.json loses a key."""
    transformers = pytest.importorskip("transformers")
    theirs, folder, ours = case
    ours.save(tmp_path / "saved", dtype)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32,
                                                              attn_implementation="eager")
    x = tokens(2, 90)
    with torch.no_grad():
        assert gap(logits(load_model(tmp_path / "saved"), x), again(x).logits) <= 1e-4
        if dtype == torch.float32:
            assert gap(again(x).logits, theirs(x).logits) <= 1e-6


def test_planned_activations_are_what_autograd_keeps(case, record_property):
    """fails if: the memory plan is more than 15 % off for a layer of this family."""
    ours = case[2]
    weights, kept = {p.untyped_storage().data_ptr() for p in ours.parameters()}, {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ours(tokens(8, 64))
    found = sum(x.untyped_storage().nbytes() for address, x in kept.items() if address not in weights)
    ratio = found / kept_activations(ours.config, 8 * 64, 4, False)
    record_property("planned", ratio)
    assert 0.85 < ratio < 1.15, ratio


def test_planned_weights_and_cache_are_those_of_the_model(case):
    """fails if: a family's weights, or what its cache holds, are counted as a plain model's."""
    ours = case[2]
    assert sized(ours.config).weights == sum(p.numel() for p in ours.parameters())
    held = vars(ours.cache_type(ours, 2, 8)).values()
    tensors = [x for kept in held if isinstance(kept, (list, tuple)) for x in kept if isinstance(x, torch.Tensor)]
    assert memory.cache(ours.config, 2, 8, 4) == sum(x.nbytes for x in tensors)
