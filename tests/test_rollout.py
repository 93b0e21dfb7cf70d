"""rollout.py: the log-prob it stores is the one training computes, a text depends on its seed and on nothing
else, the draw has exactly the model's distribution, and a finished sequence costs nothing.

A small scrambled llama writes from ragged prompts. Token 0, the value of the padding, is also a stop token.
"""
import numpy as np
import pytest
import torch

import rollout as rollout_file
import sampler
from model import ModelConfig, Transformer
from rollout import assemble, from_responses, generate, sample
from tokenizer import UserError

VOCAB, CONTEXT = 60, 80
PROMPT_LENGTHS = (3, 17, 9, 1, 30, 5, 5)
LIMITS = [5, 40, 30, 50, 20, 10, 1]
STOPS = (0, 7, 11)
LARGEST_UNIFORM = 1 - 2.0 ** -24        # the largest float32 below 1


def small(seed=0, **more):
    config = dict(model_type="llama", vocab_size=VOCAB, hidden_size=32, intermediate_size=48,
                  num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                  max_position_embeddings=CONTEXT, **more)
    model, rng = Transformer(ModelConfig.from_dict(config)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.15 if p.dim() > 1 else 0.3, generator=rng)
    return model.eval()


def ragged(lengths=PROMPT_LENGTHS):
    rng = torch.Generator().manual_seed(1)
    return [torch.randint(VOCAB, (n,), generator=rng).tolist() for n in lengths]


def write(model, prompts=None, **changes):
    """Seven ragged prompts with their own limits, three samples each, five slots, unless changed."""
    options = dict(samples=3, max_new_tokens=LIMITS, stop_ids=STOPS, seed=3, slots=5)
    return generate(model, prompts or ragged(), **{**options, **changes})


def texts(rollout):
    return [rollout.response(b) for b in range(len(rollout.tokens_BT))]


@torch.no_grad()
def scored(model, rollout, temperature=1.0, vocab_size=VOCAB):
    """logp_N and entropy_N of the sampled tokens, from plain passes over one unpadded sequence at a time."""
    logps, entropies = [], []
    for b, start in enumerate(rollout.prompt_len_B.tolist()):
        response = torch.tensor(rollout.response(b))
        sequence = torch.cat([rollout.tokens_BT[b, :start], response])
        hidden = model(sequence[None])[0, start - 1:-1]
        logp_NV = (model.logits(hidden)[:, :vocab_size] / temperature).log_softmax(-1)
        logps.append(logp_NV[torch.arange(len(response)), response])
        entropies.append(torch.distributions.Categorical(logits=logp_NV).entropy())
    return torch.cat(logps), torch.cat(entropies)


def same(a, b):
    return torch.equal(a.tokens_BT, b.tokens_BT) and torch.equal(a.mask_BT, b.mask_BT)


# what is stored

@pytest.mark.parametrize("temperature", [1.0, 0.6, 1.7])
@pytest.mark.parametrize("slots", [1, 5, 64])
def test_stored_logp_and_entropy_equal_a_plain_forward(temperature, slots, record_property):
    """Measured: 2e-6 nats, with refilled slots as with fresh ones.
    fails if: free() leaves length_B behind, sample() scores at temperature 1, or decode() repeats token 1."""
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
    fails if: prompt_of runs through the prompts first and the samples second."""
    rollout = write(small(), temperature=0.0, max_new_tokens=8, stop_ids=())
    alone = [generate(small(), [prompt], temperature=0.0, max_new_tokens=8, stop_ids=())
             for prompt in ragged()]
    alone = [rollout.response(0) for rollout in alone]
    assert texts(rollout) == [text for text in alone for _ in range(3)]
    assert len({tuple(text) for text in alone}) == len(alone)


# temperature and vocabulary

@torch.no_grad()
def test_temperature_zero_is_the_argmax_path():
    """fails if: sample() at temperature 0 draws, or scores at anything but temperature 1."""
    model, prompts = small(), ragged()
    rollout = write(model, samples=1, temperature=0.0, max_new_tokens=25)
    for b, prompt in enumerate(prompts):
        text = []
        while len(text) < 25 and not set(text) & set(STOPS):
            text.append(model.logits(model(torch.tensor([prompt + text]))[0, -1]).argmax().item())
        assert rollout.response(b) == text
    assert (rollout.rows(rollout.logp_BT) - scored(model, rollout)[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    """fails if: sample() multiplies by the temperature."""
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    token, logp, entropy = sample(logits.expand(1000, 3), temperature, grid(1000))
    p = (logits[0] / temperature).softmax(0)
    assert (torch.bincount(token, minlength=3) / 1000 - p).abs().max() < 0.002
    assert torch.allclose(logp, p.log()[token]) and torch.allclose(entropy, -(p * p.log()).sum().expand(1000))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padded_rows_of_the_head_are_never_written_and_never_counted(temperature):
    """Ten of sixty rows are padding, and some of them have the largest logit everywhere.
    fails if: write() ignores vocab_size, or cuts after the softmax."""
    model = small()
    with torch.no_grad():
        model.lm_head.weight[50:] = 100 * torch.randn(10, 32, generator=torch.Generator().manual_seed(2))
    prompts = [[token % 50 for token in prompt] for prompt in ragged()]
    free, cut = (write(model, prompts, temperature=temperature, vocab_size=v) for v in (None, 50))
    assert (free.rows(free.tokens_BT) >= 50).all()
    assert (cut.rows(cut.tokens_BT) < 50).all()
    assert (cut.rows(cut.logp_BT) - scored(model, cut, vocab_size=50)[0]).abs().max() <= 1e-5


# the draw

def grid(n):
    """n uniform numbers in the middle of n equal cells."""
    return (torch.arange(n) + 0.5) / n


def shapes(V):
    """Logits of several distributions over V words."""
    rng = torch.Generator().manual_seed(V)
    noise, holes = torch.randn(V, generator=rng), torch.rand(V, generator=rng) < 0.7
    holes[V // 2] = False
    peak = torch.zeros(V)
    peak[V - 1] = 30.0
    holed = noise.masked_fill(holes, -1e4)
    return dict(flat=torch.zeros(V), noise=noise, steep=6 * noise, peak=peak, holed=holed)


@pytest.mark.parametrize("V", [1, 2, 3, 7, 10, 16, 97, 300])
def test_draw_has_exactly_the_models_distribution(V):
    """A grid of uniform numbers hits each token as often as its probability says, up to one cell, and in the
    order of ids: together, the inverse CDF. Widths of blocks that divide V and that do not.
    fails if: the draw inside a block forgets the mass before it, or blocks overlap."""
    n = 8192
    for name, logits in shapes(V).items():
        token, logp, _ = sample(logits.expand(n, V), 1.0, grid(n))
        p = logits.double().softmax(0)
        frequency = torch.bincount(token, minlength=V).double() / n
        assert len(frequency) == V and (frequency - p).abs().max() < 1.01 / n + 1e-6, name
        assert (token.diff() >= 0).all(), name
        assert torch.allclose(logp.double(), p.log()[token], atol=1e-5), name


@pytest.mark.parametrize("V", [1, 2, 10, 97, 300])
@pytest.mark.parametrize("uniform", [0.0, 2.0 ** -24, 0.5, LARGEST_UNIFORM])
def test_token_of_probability_zero_is_never_drawn(V, uniform):
    """3,000 random rows, most of their words impossible, at the ends of the unit interval.
    fails if: first_above takes the first entry that reaches the target, or lets a target pass the end."""
    rng = torch.Generator().manual_seed(V)
    logits = torch.randn(3000, V, generator=rng) * 3
    impossible = torch.rand(3000, V, generator=rng) < 0.8
    impossible[torch.arange(3000), torch.randint(V, (3000,), generator=rng)] = False
    token, logp, entropy = sample(logits.masked_fill(impossible, -1e4), 1.0, torch.full((3000,), uniform))
    assert not impossible[torch.arange(3000), token].any()
    assert logp.isfinite().all() and entropy.isfinite().all()


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_passes_of_the_sampler_change_no_draw(temperature, monkeypatch):
    """Nine rows at once, one at a time, and four at a time.
    fails if: block_masses() leaves rows of an earlier pass in its buffers, or takes the maximum over them."""
    rng = torch.Generator().manual_seed(0)
    logits, uniform = 4 * torch.randn(9, 300, generator=rng), torch.rand(9, generator=rng)
    drawn = []
    for entries in (2**20, 1, 4 * 300):
        monkeypatch.setattr(sampler, "SAMPLE_ENTRIES", (entries, entries))
        drawn.append(sample(logits, temperature, uniform))
    assert all(torch.equal(a, b) for other in drawn[1:] for a, b in zip(drawn[0], other))


@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_logp_and_entropy_over_a_large_vocabulary_are_exact(temperature):
    """151,936 words against float64, in which the plain formula is right. Measured: 1e-6 nats for both.
    fails if: the last, shorter block is left out of the normaliser, or the maximum is not taken off."""
    logits = 3 * torch.randn(4, 151_936, generator=torch.Generator().manual_seed(0)) + 100
    token, logp, entropy = sample(logits, temperature, grid(4))
    exact = (logits.double() / temperature).log_softmax(-1)
    assert (logp - exact.gather(1, token[:, None])[:, 0]).abs().max() < 1e-5
    assert (entropy + (exact.exp() * exact).sum(-1)).abs().max() < 1e-5


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


@pytest.mark.parametrize("biases", [False, True])
def test_compiled_decode_step_is_traced_a_few_times_and_writes_the_same_text(monkeypatch, biases):
    """Traced as for a real backend, run as plain torch. Live slots go from three to one, lengths up to 29.
    fails if: the decode step is specialised on a length or a number of slots, Slots.step skips the cache, or the
    product with the weight as left factor loses its bias."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile(function, backend="eager", **options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = dict(prompts=ragged()[:4], samples=1, max_new_tokens=[6, 12, 9, 3], slots=3)
    model = small(attention_bias=biases)
    assert same(write(model, **case, compile=True), write(model, **case))
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 32, 33])
@torch.no_grad()
def test_projected_logits_are_states_times_head(rows, dtype):
    """The memory holds what an earlier step with other rows left there. In float64 a head is never packed.
    fails if: the packed head is another one, more rows than it serves go to it, or float64 is refused."""
    rng = torch.Generator().manual_seed(0)
    hidden_BD, head_VD = (torch.randn(n, 16, generator=rng).to(dtype) for n in (rows, 50))
    out = torch.full((rows, 50), torch.nan, dtype=dtype)
    packed = rollout_file.prepacked(head_VD)
    assert packed is None or dtype != torch.float64
    for memory in (packed, None):
        found_BV = rollout_file.project(hidden_BD, head_VD, memory, out.fill_(torch.nan))
        torch.testing.assert_close(found_BV, hidden_BD @ head_VD.T)
        assert (found_BV is out) == (memory is None or rows > 32)


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
    pool = rollout_file.Slots(small().to("meta"), 5, 40, 20, VOCAB, STOPS, 1.0)
    pool.cache.longest = 7
    pool.step(3)
    with pytest.raises(RuntimeError, match="meta"):
        pool.done_S.any().item()


@pytest.mark.parametrize("slots", [5, 64])
def test_recorded_steps_write_the_same_text(slots, gpu_paths, monkeypatch):
    """Rows are rounded up to a power of two or all slots, and the rows to spare decode along.
    fails if: the step that is recorded is not replayed, a free slot counts on, or each number of rows is recorded."""
    monkeypatch.setattr(rollout_file, "LOOK_EVERY", (1, 3))
    (recorded, replayed, launched), asked, decode = gpu_paths, [], rollout_file.Slots.decode
    monkeypatch.setattr(rollout_file.Slots, "decode", lambda pool: asked.append(1) or decode(pool))
    found = write(small(), slots=slots)
    monkeypatch.undo()
    wanted = write(small(), slots=slots)
    assert same(found, wanted) and (found.logp_BT - wanted.logp_BT).abs().max() < 1e-5
    assert len(set(recorded)) == len(recorded) and set(recorded) <= {1, 2, 4, 8, 16, 21, slots}
    assert len(asked) == len(launched) + len(replayed) and len(set(launched)) == len(launched)
    assert len(replayed) > len(recorded) and set(replayed) == set(recorded)


@pytest.mark.parametrize("max_tokens", [1, 60, 200, 10 ** 6])
def test_packed_micro_batches_hold_every_row_once_and_no_padding(max_tokens):
    """fails if: padding is laid end to end too, a length is the padded one, or rows are renumbered."""
    rollout = write(small())
    seen, tokens_N, real = [], rollout.rows(rollout.tokens_BT), 0
    for tokens_bt, mask_bt, lengths, row_n in rollout.micro_batches(max_tokens, pack=True):
        assert torch.equal(tokens_bt[mask_bt], tokens_N[row_n])
        assert tokens_bt.shape == (1, sum(lengths)) and (sum(lengths) <= max_tokens or len(lengths) == 1)
        starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
        assert not mask_bt[0, starts].any()
        seen += row_n.tolist()
        real += sum(lengths)
    assert sorted(seen) == list(range(len(tokens_N)))
    assert real == (rollout.prompt_len_B + rollout.length_B).sum()


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
def test_context_can_be_filled_to_its_last_token(changes, context):
    """A sliding window ends the context (mistral), and the last allowed token is still right.
    fails if: generate() compares with >=, or max_position_embeddings is asked instead of the context."""
    config = {**small().config.raw, **changes}
    model = small()
    model.config = ModelConfig.from_dict(config)
    rollout = generate(model, [[1] * 4], max_new_tokens=context - 4, stop_ids=())
    assert rollout.tokens_BT.shape == (1, context)
    assert (rollout.rows(rollout.logp_BT) - scored(model, rollout)[0]).abs().max() <= 1e-5
    with pytest.raises(UserError, match=f"context of {context}"):
        generate(model, [[1] * 4], max_new_tokens=context - 3, stop_ids=())


# given responses

def test_given_responses_take_the_shape_of_a_rollout():
    """Token 0 is a word here: only the mask says what is padding.
    fails if: assemble() builds the mask from ids, or pads on the left."""
    rollout = from_responses([[5, 0], [6], [7, 8]], [[1, 0], [2, 3, 0], [0]], [True, True, False], "cpu")
    assert rollout.tokens_BT.tolist() == [[5, 0, 1, 0], [6, 2, 3, 0], [7, 8, 0, 0]]
    assert rollout.mask_BT.int().tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0]]
    assert rollout.prompt_len_B.tolist() == [2, 1, 2] and rollout.length_B.tolist() == [2, 3, 1]
    assert rollout.finished_B.tolist() == [True, True, False]
    assert not rollout.logp_BT.any() and not rollout.entropy_BT.any()
    assert texts(rollout) == [[1, 0], [2, 3, 0], [0]]
    assert {t.dtype for t in (rollout.tokens_BT, rollout.prompt_len_B)} == {torch.int64}


def test_columns_of_an_assembled_rollout_line_up():
    """rows() of every field runs through the same tokens in the same order, sequence after sequence.
    fails if: assemble() swaps logp and entropy, or rows() goes column by column."""
    responses = [torch.tensor([1, 2]), torch.tensor([3]), torch.tensor([4, 5, 6])]
    logps, entropies = [-r.float() for r in responses], [10.0 * r for r in responses]
    rollout = assemble([[9], [9, 9, 9], [9, 9]], responses, logps, entropies, [True, False, True], "cpu")
    assert rollout.rows(rollout.tokens_BT).tolist() == [1, 2, 3, 4, 5, 6]
    assert rollout.rows(rollout.logp_BT).tolist() == [-1, -2, -3, -4, -5, -6]
    assert rollout.rows(rollout.entropy_BT).tolist() == [10, 20, 30, 40, 50, 60]


def test_written_and_given_rollouts_agree():
    """fails if: from_responses() and generate() disagree on where a response starts."""
    rollout = write(small())
    prompts, finished = [p for p in ragged() for _ in range(3)], rollout.finished_B.tolist()
    given = from_responses(prompts, texts(rollout), finished, "cpu")
    assert same(rollout, given) and torch.equal(rollout.prompt_len_B, given.prompt_len_B)
    assert torch.equal(rollout.finished_B, given.finished_B)


def test_other_prompts_leave_the_rows_as_they_are():
    """fails if: with_prompts() keeps the old prompt lengths, or takes whole rows without the mask."""
    rollout = write(small())
    other = rollout.with_prompts([[9] * (1 + b % 4) for b in range(len(rollout.tokens_BT))])
    for field in ("tokens_BT", "logp_BT", "entropy_BT"):
        assert torch.equal(other.rows(getattr(other, field)), rollout.rows(getattr(rollout, field))), field
    assert other.prompt_len_B.tolist() == [1 + b % 4 for b in range(21)] and texts(other) == texts(rollout)
    assert torch.equal(other.finished_B, rollout.finished_B)


@pytest.mark.parametrize("max_tokens", [1, 60, 200, 10 ** 6])
@pytest.mark.parametrize("chosen", [None, [0, 5, 20], []])
def test_micro_batches_hold_every_chosen_row_once(max_tokens, chosen):
    """fails if: micro_batches() forgets the last group, lets one outgrow max_tokens, or renumbers rows."""
    rollout = write(small())
    number_BT = torch.full(rollout.mask_BT.shape, -1).masked_scatter(rollout.mask_BT, torch.arange(1000))
    sequence_b = None if chosen is None else torch.tensor(chosen, dtype=torch.int64)
    wanted = number_BT if chosen is None else number_BT[sequence_b]
    seen, tokens_N = [], rollout.rows(rollout.tokens_BT)
    for tokens_bt, mask_bt, _, row_n in rollout.micro_batches(max_tokens, sequence_b):
        assert torch.equal(tokens_bt[mask_bt], tokens_N[row_n])
        assert tokens_bt.numel() <= max_tokens or len(tokens_bt) == 1
        seen += row_n.tolist()
    assert sorted(seen) == sorted(wanted[wanted >= 0].tolist())


def test_micro_batches_hold_little_padding():
    """Lognormal lengths, which one group would pad by more than half.
    fails if: micro_batches() fills every group up to max_tokens."""
    lengths = np.random.default_rng(0).lognormal(4, 0.8, 200).clip(2, 400).astype(int).tolist()
    texts = [torch.zeros(n - 1, dtype=torch.int64) for n in lengths]
    zeros = [torch.zeros(n - 1) for n in lengths]
    rollout = assemble([[1]] * 200, texts, zeros, zeros, [True] * 200, "cpu")
    assert rollout.tokens_BT.numel() > 2 * sum(lengths)
    groups = [tokens_bt for tokens_bt, *_ in rollout.micro_batches(10**6)]
    assert sum(tokens_bt.numel() for tokens_bt in groups) < 1.1 * sum(lengths) + 128 * len(groups)
    assert len(groups) < 20
