"""rollout.py: the draw has exactly the model's distribution at the temperature asked for, over real tokens only."""
import pytest
import torch
from rollout_cases import STOPS, ragged, scored, small, write

import rollout as rollout_file
from rollout import sample

LARGEST_UNIFORM = 1 - 2.0 ** -24        # the largest float32 below 1


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
    fails if: head() ignores vocab_size, or Slots cuts after the softmax."""
    model = small()
    with torch.no_grad():
        model.lm_head.weight[50:] = 100 * torch.randn(10, 32, generator=torch.Generator().manual_seed(2))
    prompts = [[token % 50 for token in prompt] for prompt in ragged()]
    free = write(model, prompts, temperature=temperature)
    model.vocab_size = 50
    cut = write(model, prompts, temperature=temperature)
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
        monkeypatch.setattr(rollout_file, "SAMPLE_ENTRIES", (entries, entries))
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [1, 8, 32, 33])
@torch.no_grad()
def test_projected_logits_are_states_times_head(rows, dtype):
    """The memory holds what an earlier step left there, and fewer rows than there is room for are one part of it.
    fails if: a product adds to what is there, or fewer rows are refused."""
    rng = torch.Generator().manual_seed(0)
    hidden_BD, head_VD = (torch.randn(n, 16, generator=rng).to(dtype) for n in (rows, 50))
    product = rollout_file.head_product(head_VD, 33)
    first_BV = product(torch.full_like(hidden_BD, torch.nan))
    found_BV = product(hidden_BD)
    torch.testing.assert_close(found_BV, hidden_BD @ head_VD.T)
    assert found_BV.data_ptr() == first_BV.data_ptr()
