"""rollout.py: the log-prob it stores is the one training computes, a text depends on its seed and on nothing
else, and a finished sequence costs nothing. The draw itself: test_rollout_draw.py; given responses and micro-batches:
test_rollout_batches.py.
"""
import gc
import weakref

import numpy as np
import pytest
import torch
from rollout_cases import CONTEXT, LIMITS, STOPS, VOCAB, ragged, same, scored, small, texts, write

import rollout as rollout_file
from extras.fast import flash
from rollout import Request, generate
from support.errors import UserError
from support.model_config import FAMILIES, Family, ModelConfig
from torch.utils._python_dispatch import TorchDispatchMode


# what is stored

@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("slots", [1, 5, 64])
def test_stored_logp_and_entropy_equal_a_plain_forward(temperature, slots, record_property):
    """Measured: 2e-6 nats, with refilled slots as with fresh ones.
    fails if: copy_rows leaves length_B behind, free() copies one key less, sample() scores at temperature 1, or
    decode() repeats token 1."""
    model = small()
    rollout = write(model, temperature=temperature, slots=slots)
    logp_N, entropy_N = scored(model, rollout, temperature)
    gap = (rollout.rows(rollout.logp_BT) - logp_N).abs().max().item()
    record_property("largest_logp_difference", gap)
    print(f"largest log-prob difference {gap:.1e}")
    assert gap <= 1e-5
    assert (rollout.rows(rollout.entropy_BT) - entropy_N).abs().max() <= 1e-5


def test_padding_of_any_id_changes_no_training_forward():
    """fails if: response_hidden reads the state at the token instead of the one before it."""
    model = small()
    rollout = write(model)
    padded = rollout.tokens_BT.where(torch.arange(rollout.tokens_BT.shape[1]) <
                                     (rollout.prompt_len_B + rollout.length_B)[:, None], VOCAB - 1)
    hidden_ND = model.response_hidden(padded, rollout.mask_BT)
    token_N1 = rollout.rows(rollout.tokens_BT)[:, None]
    logp_N = model.logits(hidden_ND).log_softmax(-1).gather(1, token_N1)[:, 0]
    assert (logp_N - rollout.rows(rollout.logp_BT)).abs().max() <= 1e-5


def test_prompt_then_response_then_nothing():
    """fails if: the mask starts on the prompt's last token, or logp is padded with anything but 0."""
    rollout, prompts = write(small()), [p for p in ragged() for _ in range(3)]
    at_T = torch.arange(rollout.tokens_BT.shape[1])
    start_B1, length_B1 = rollout.prompt_len_B[:, None], rollout.length_B[:, None]
    assert torch.equal(rollout.mask_BT, (at_T >= start_B1) & (at_T < start_B1 + length_B1))
    assert [row[:n].tolist() for row, n in zip(rollout.tokens_BT, rollout.prompt_len_B)] == prompts
    for values in (rollout.logp_BT, rollout.entropy_BT):
        assert values.dtype == torch.float32 and not values[~rollout.mask_BT].any()
    assert (rollout.rows(rollout.logp_BT) < 0).all() and (rollout.rows(rollout.entropy_BT) > 0).all()
    assert at_T[-1] + 1 == (start_B1 + length_B1).max(), "no column that nobody uses"


def test_stop_token_is_inside_the_mask_and_ends_the_response():
    """fails if: retire() drops the stop token, knows one stop id only, or calls a cut response finished."""
    rollout, limits = write(small(), samples=8), [limit for limit in LIMITS for _ in range(8)]
    ends = set()
    for b, text in enumerate(texts(rollout)):
        assert not set(text[:-1]) & set(STOPS), "nothing follows a stop token"
        assert rollout.finished_B[b].item() == (text[-1] in STOPS)
        assert len(text) <= limits[b] and (len(text) == limits[b] or rollout.finished_B[b])
        ends.add(text[-1] if rollout.finished_B[b] else "cut")
    assert ends == {*STOPS, "cut"}, "the case shows every ending"


def test_stop_token_on_the_last_place_counts_as_finished():
    """fails if: retire() calls every response of full length cut."""
    rollout = write(small(), max_new_tokens=1, samples=64)
    stopped = torch.isin(rollout.rows(rollout.tokens_BT), torch.tensor(STOPS))
    assert torch.equal(rollout.finished_B, stopped) and 0 < stopped.sum() < len(stopped)


def test_without_stop_ids_every_response_is_cut_at_its_own_limit():
    """fails if: generate() gives every prompt the longest limit."""
    rollout = write(small(), stop_ids=())
    assert rollout.length_B.tolist() == [limit for limit in LIMITS for _ in range(3)]
    assert not rollout.finished_B.any()


# what a text depends on

def test_text_depends_on_no_slot_and_no_neighbour():
    """slots=1 is one sequence at a time; 64 is all at once, never refilled; the others refill in many ways.
    fails if: the random stream is keyed by the slot, or free() leaves a sequence's uniform numbers behind."""
    model = small()
    alone = write(model, slots=1)
    for slots in (2, 3, 5, 8, 17, 64):
        assert same(write(model, slots=slots), alone), slots


def test_passes_of_the_prefill_change_no_text(monkeypatch):
    """fails if: admit() copies the second pass' rows from the first pass."""
    model = small()
    whole = write(model, slots=64)
    monkeypatch.setattr(rollout_file, "PREFILL_TOKENS", 60)     # two prompts of 30 per pass
    assert same(write(model, slots=64), whole)


def test_first_prompt_writes_the_same_text_alone():
    """fails if: the random stream is keyed by the number of sequences."""
    model = small()
    alone = write(model, ragged()[:1], max_new_tokens=LIMITS[:1])
    assert texts(alone) == texts(write(model))[:3]


def test_longer_limit_continues_the_same_text():
    """fails if: uniform numbers are read from the end of the stream."""
    model = small()
    short, long = (texts(write(model, max_new_tokens=n)) for n in (6, 30))
    assert [text[:6] for text in long] == short


def test_samples_of_one_prompt_differ_and_so_do_seeds():
    """Negative and huge seeds are streams of their own, neighbours included.
    fails if: the stream's key leaves out the seed or the sequence, or the key is rounded to a float."""
    model = small()
    seeds = (0, 1, 2, -1, -2, 2 ** 53, 2 ** 53 + 1, 2 ** 63, 2 ** 63 + 1)
    every = [tuple(text) for seed in seeds
             for text in texts(write(model, ragged()[:1], max_new_tokens=20, stop_ids=(), seed=seed))]
    assert len(set(every)) == 3 * len(seeds)


def test_global_random_state_is_neither_read_nor_moved():
    """fails if: sample() or Slots draws from torch's or numpy's global stream."""
    model, results = small(), []
    for global_seed in (1, 2):
        torch.manual_seed(global_seed)
        np.random.seed(global_seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), np.random.get_state()[2]
        results.append(write(model))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all() and np.random.get_state()[2] == before[2]
    assert same(*results)


def test_sequences_are_prompt_major():
    """Greedy samples of one prompt are equal, so equal neighbours show the order.
    fails if: the requests run through the prompts first and the samples second."""
    rollout = write(small(), temperature=0.0, max_new_tokens=8, stop_ids=())
    alone = [generate(small(), [prompt], temperature=0.0, max_new_tokens=8, stop_ids=())
             for prompt in ragged()]
    alone = [rollout.response(0) for rollout in alone]
    assert texts(rollout) == [text for text in alone for _ in range(3)]
    assert len({tuple(text) for text in alone}) == len(alone)


# what it costs

def metered(model):
    """Two lists that fill with the shapes of the model's passes: prefill (an empty cache) and decoding."""
    prefill, decode, forward = [], [], model.forward

    def noted(tokens_BT, cache):
        (decode if cache.longest else prefill).append(tuple(tokens_BT.shape))
        return forward(tokens_BT, cache)
    model.forward = noted
    return prefill, decode


@pytest.mark.parametrize("slots", [1, 5, 64])
def test_finished_sequence_costs_nothing(slots):
    """The first token comes from the prefill, each later one from one row of one pass.
    fails if: retire() keeps finished slots until all are done, or decode() feeds every slot."""
    model = small()
    _, decode = metered(model)
    rollout = write(model, slots=slots)
    assert all(T == 1 for _, T in decode)
    assert sum(B for B, _ in decode) == rollout.length_B.sum() - len(rollout.tokens_BT)


def test_slots_are_refilled_while_others_go_on():
    """One long sequence beside many short ones: as many passes as the long one needs.
    fails if: generate() refills only when no slot is live."""
    model = small()
    _, decode = metered(model)
    write(model, ragged((3,) * 9), samples=1, max_new_tokens=[40] + [5] * 8, stop_ids=(), slots=2)
    assert len(decode) == 39


@pytest.mark.parametrize("look_every, stop_ids", [(2, STOPS), (7, STOPS), (100, ())])
def test_text_does_not_depend_on_how_often_the_host_looks(monkeypatch, look_every, stop_ids):
    """Sequences that ended go along until the host looks; token, log-prob and entropy of the live ones stay.
    fails if: an ended sequence counts on, writes over its last token, or reads past the cache."""
    wanted = write(small(), stop_ids=stop_ids)
    monkeypatch.setattr(rollout_file, "LOOK_EVERY", (1, look_every))
    found = write(small(), stop_ids=stop_ids)
    assert same(found, wanted) and torch.equal(found.finished_B, wanted.finished_B)
    assert (found.logp_BT - wanted.logp_BT).abs().max() < 1e-5


@torch.no_grad()
def test_decode_step_asks_the_host_nothing():
    """On the meta device tensors have no values: reading one, or mixing in a tensor of the host, is an error.
    fails if: step() or sample() takes a length, a stop or a count to the host."""
    pool = rollout_file.Slots(small().to("meta"), [Request([1] * 20, 20, 0)], 5, STOPS, 1.0, seed=0)
    pool.cache.longest = 7
    pool.step(3)
    with pytest.raises(RuntimeError, match="meta"):
        pool.done_S.any().item()


class MatrixCasts(TorchDispatchMode):
    """Notes the shapes of matrices that are cast to another dtype."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and args[0].dim() == 2 and len(args[0]) > 21:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def test_a_decode_step_casts_no_weight():
    """A copy in the dtype of the products writes 21 responses; only the student itself would cast.
    fails if: the copy is stored in another dtype, or a weight is cast at every step"""
    student = small()
    student.compute_dtype = torch.bfloat16
    for model, casts in ((student.copy_as(torch.bfloat16), False), (student, True)):
        with MatrixCasts() as found:
            write(model)
        assert any(shape[-1] in (32, 48) for shape in found.shapes) == casts, found.shapes


@pytest.mark.parametrize("put", [lambda model: None, flash.on_model], ids=["plain", "flash"])
def test_the_cache_is_given_back_with_the_last_token(put, gpu_paths):
    """fails if: something that outlives generate() holds on to the keys and values, which would then lie beside the
    update's activations"""
    model, caches = small(), []
    put(model)
    cache_type = model.cache_type

    def noted(*args):
        cache = cache_type(*args)
        caches.append(weakref.ref(cache.keys[0]))
        return cache
    model.cache_type = noted
    gc.disable()        # what only the collector would find counts as kept
    try:
        write(model)
        assert caches and all(cache() is None for cache in caches)
    finally:
        gc.enable()


def test_a_gpu_samples_the_rows_of_a_step_at_once():
    """256 sequences over 151,936 words.
    fails if: a GPU goes over the rows in a loop, a few kernels for each few rows"""
    assert rollout_file.SAMPLE_ENTRIES[False] >= 256 * 151_936


@pytest.mark.parametrize("slots, rows", [(64, 7), (5, 2 + 3 + 2 + 2 + 1)])
def test_prompt_is_prefilled_once_for_the_samples_admitted_together(slots, rows):
    """Three equally long samples of seven prompts: five slots take 5, 5, 5, 5 and 1 of them, which belong to
    2, 3, 2, 2 and 1 prompts.
    fails if: admit() prefills each request."""
    model = small()
    prefill, _ = metered(model)
    write(model, max_new_tokens=4, stop_ids=(), slots=slots)
    assert sum(B for B, _ in prefill) == rows


def test_prefill_is_split_into_passes_of_bounded_size(monkeypatch):
    """fails if: admit() prefills all prompts in one pass."""
    monkeypatch.setattr(rollout_file, "PREFILL_TOKENS", 60)
    model = small()
    prefill, _ = metered(model)
    write(model, slots=64)
    assert len(prefill) == 4 and all(B * T <= 60 for B, T in prefill)


# errors

@pytest.mark.parametrize("prompts, limit, message", [
    ([[1, 2], []], 5, "at least one token"), ([[1, 2]], 0, "room for one new token"),
    ([[1, 2], [3] * 61], 20, f"61 tokens plus 20 new ones exceed the model's context of {CONTEXT}"),
    ([[1] * 75, [2]], [5, 80], f"1 tokens plus 80 new ones exceed the model's context of {CONTEXT}")])
def test_request_that_cannot_be_met_is_one_sentence_before_any_pass(prompts, limit, message):
    """fails if: generate() drops the check, or compares the longest prompt with the longest limit."""
    model = small()
    prefill, _ = metered(model)
    with pytest.raises(UserError, match=message) as caught:
        generate(model, prompts, max_new_tokens=limit, stop_ids=())
    assert "\n" not in str(caught.value) and not prefill


@pytest.mark.parametrize("changes, context", [
    ({}, CONTEXT), (dict(model_type="mistral", sliding_window=24), 24)])
def test_context_can_be_filled_to_its_last_token(changes, context, monkeypatch):
    """Without extras/families/sliding.py a window ends the context (mistral), and the last allowed token is right.
    fails if: generate() compares with >=, or max_position_embeddings is asked instead of the context."""
    monkeypatch.setitem(FAMILIES, "mistral", Family())
    config = {**small().config.raw, **changes}
    model = small()
    model.config = ModelConfig.from_dict(config)
    rollout = generate(model, [[1] * 4], max_new_tokens=context - 4, stop_ids=())
    assert rollout.tokens_BT.shape == (1, context)
    assert (rollout.rows(rollout.logp_BT) - scored(model, rollout)[0]).abs().max() <= 1e-5
    with pytest.raises(UserError, match=f"context of {context}"):
        generate(model, [[1] * 4], max_new_tokens=context - 3, stop_ids=())
