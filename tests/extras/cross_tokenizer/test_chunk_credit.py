"""chunk_credit.py, the credit of tokens inside chunks: exact expectations in float64, against gradients
enumerated here. Prefix masses: test_chunk_prefixes.py. The tokenizers themselves: test_align_pairs.py.
"""
import math
import random
from itertools import product

import pytest
import torch
from crossing_reference import rand

from extras.cross_tokenizer.chunk_credit import CREDIT, chunk_sums, credit, prefix_scores

CONSERVING = ("prop", "shift", "uniform", "prefix")     # their advantages add up to the chunk's log-ratio


def random_step(seed, n_chunks=40, dtype=torch.float64, masked=True):
    """Chunks of 1-4 student and 1-4 teacher tokens, some tokens masked; prefix scores that add up to log q."""
    rng = random.Random(seed)
    sizes = [(rng.randint(1, 4), rng.randint(1, 4)) if rng.random() < 0.7 else (1, 1) for _ in range(n_chunks)]
    def numbers(side):
        out = []
        for c, size in enumerate(sizes):
            out += [c] * size[side] + [-1] * (masked and c % 7 == 3)
        return torch.tensor(out)
    s, t = numbers(0), numbers(1)
    b, q = -rand(len(s), seed=seed, dtype=dtype).abs(), -2 * rand(len(t), seed=seed + 1, dtype=dtype).abs()
    shares = rand(len(s), seed=seed + 2, dtype=dtype).exp()
    chunk_share = torch.tensor([shares[s == c].sum() if c >= 0 else 1.0 for c in s.tolist()], dtype=dtype)
    total = torch.tensor([q[t == c].sum() if c >= 0 else 0.0 for c in s.tolist()], dtype=dtype)
    return b, q, s, t, total * shares / chunk_share


def advantages(mode, step, **options):
    b, q, s, t, prefix = step
    effective, scored = credit(mode, b, q, s, t, prefix_n=prefix, **options)
    return effective - b, scored


# The rules, written out chunk by chunk

def by_hand(mode, b, q, r):
    """The table of rules for one chunk: b, q, r lists of its student, teacher and prefix log-probs."""
    L_S, L_T, m = math.fsum(b), math.fsum(q), len(b)
    D = L_T - L_S
    return {"chunk": [D] * m, "strict": [D] * m, "shift": [D / m] * m, "uniform": [L_T / m - x for x in b],
            "prop": [D * x / L_S for x in b], "prefix": [y - x for x, y in zip(b, r)]}[mode]


@pytest.mark.parametrize("mode", CREDIT)
def test_each_rule_is_its_formula_on_every_chunk(mode):
    step = random_step(0)
    b, q, s, t, r = step
    A, scored = advantages(mode, step)
    for c in range(int(s.max()) + 1):
        here, there = (s == c).nonzero().squeeze(1), (t == c).nonzero().squeeze(1)
        if mode == "strict" and (len(here), len(there)) != (1, 1):
            assert not scored[here].any() and not A[here].any()
            continue
        assert scored[here].all()
        expected = by_hand(mode, b[here].tolist(), q[there].tolist(), r[here].tolist())
        torch.testing.assert_close(A[here], torch.tensor(expected, dtype=b.dtype), rtol=1e-12, atol=1e-12)
    assert not scored[s < 0].any() and not A[s < 0].any()


def test_there_are_six_rules_and_no_seventh():
    assert set(CREDIT) == {"chunk", "prop", "shift", "uniform", "strict", "prefix"}


@pytest.mark.parametrize("mode", CONSERVING)
def test_advantages_add_up_to_the_log_ratio_of_all_scored_text(mode):
    step = random_step(1)
    b, q, s, t, _ = step
    A, _ = advantages(mode, step)
    gap = chunk_sums(q, t, 40) - chunk_sums(b, s, 40)
    torch.testing.assert_close(chunk_sums(A, s, 40), gap, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(A.sum(), q[t >= 0].sum() - b[s >= 0].sum(), rtol=1e-12, atol=1e-12)


def test_the_chunk_rule_counts_the_log_ratio_once_per_token():
    step = random_step(2)
    b, q, s, t, _ = step
    sizes = torch.bincount(s[s >= 0])
    expected = sizes * (chunk_sums(q, t, 40) - chunk_sums(b, s, 40))
    torch.testing.assert_close(chunk_sums(advantages("chunk", step)[0], s, 40), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", CREDIT)
def test_a_one_to_one_chunk_gets_the_teachers_own_number(mode, dtype):
    """Exactly (==), among chunks of every other shape, with values far apart, and below the clamp."""
    b, q, s, t, r = random_step(3, dtype=dtype)
    b, q = b * torch.logspace(-6, 3, len(b), dtype=dtype), q * torch.logspace(3, -6, len(q), dtype=dtype)
    single = [c for c in range(40) if (s == c).sum() == (t == c).sum() == 1]
    here, there = (torch.tensor([int((side == c).nonzero()) for c in single]) for side in (s, t))
    r[here] = q[there]
    effective, scored = credit(mode, b, q, s, t, prefix_n=r)
    assert len(single) > 10 and scored[here].all() and torch.equal(effective[here], q[there])
    assert effective.dtype == dtype
    close = (q[there] - b[here]).abs() <= 10
    clamped, _ = credit(mode, b, q, s, t, prefix_n=r, clamp=10.0)
    assert 0 < close.sum() < len(close) and torch.equal(clamped[here][close], q[there][close])


@pytest.mark.parametrize("mode", CREDIT)
def test_the_clamp_bounds_the_chunk_then_shares_it_out(mode):
    step = random_step(4)
    b, q, s, t, r = step
    free, _ = advantages(mode, step)
    A, _ = advantages(mode, step, clamp=0.5)
    if mode in ("prop", "prefix"):      # per token
        torch.testing.assert_close(A, free.clamp(-0.5, 0.5), rtol=1e-12, atol=1e-12)
        return
    gap = chunk_sums(q, t, 40) - chunk_sums(b, s, 40)
    assert (gap > 0.5).any() and (gap < -0.5).any()
    sizes = torch.bincount(s[s >= 0])
    for c in range(40):
        here, D = s == c, gap[c].clamp(-0.5, 0.5)
        if mode == "strict" and (sizes[c] > 1 or (t == c).sum() > 1):
            continue
        expected = {"chunk": D, "strict": D, "shift": D / sizes[c],
                    "uniform": (b[here].sum() + D) / sizes[c] - b[here]}[mode]
        torch.testing.assert_close(A[here], expected.expand(int(sizes[c])), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mode", CREDIT)
def test_large_chunks_are_masked_on_request(mode):
    step = random_step(5)
    b, q, s, t, _ = step
    A, scored = advantages(mode, step, max_chunk=2)
    free, free_scored = advantages(mode, step)
    sizes = torch.stack([torch.bincount(side[side >= 0]) for side in (s, t)]).max(0).values
    small = (s >= 0) & (sizes[s.clamp(min=0)] <= 2)
    assert torch.equal(scored, free_scored & small) and (free_scored & ~small).any() == (mode != "strict")
    assert torch.equal(A, torch.where(scored, free, 0.0))


@pytest.mark.parametrize("mode", CREDIT)
def test_masked_tokens_have_no_say_and_get_none(mode):
    b, q, s, t, r = random_step(6)
    effective, scored = credit(mode, b, q, s, t, prefix_n=r)
    q2, b2 = q.masked_fill(t < 0, torch.nan), b.masked_fill(s < 0, -7.0)
    again, scored2 = credit(mode, b2, q2, s, t, prefix_n=r)
    assert torch.equal(scored, scored2) and torch.equal(again[scored], effective[scored])
    assert torch.equal(again[s < 0], b2[s < 0]) and (s < 0).sum() > 3


@pytest.mark.parametrize("mode", CREDIT)
def test_certain_tokens_and_huge_gaps_give_numbers(mode):
    """log b = 0 on one token, on all of them; D = +-1e4; tokens at the edge of float32."""
    for dtype in (torch.float32, torch.float64):
        b = torch.tensor([0.0, -1.0, 0.0, 0.0, -1e4, -1e-38, 0.0, -1e-45, 0.0, -3.0], dtype=dtype)
        s = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 5])
        q = torch.tensor([-2.0, -4.0, -1e-3, -1e4, -1.0, -6.0], dtype=dtype)
        t = torch.tensor([0, 1, 2, 3, 4, 5])
        r = torch.zeros_like(b)
        effective, scored = credit(mode, b, q, s, t, prefix_n=r)
        assert effective.isfinite().all() and scored[8:].all()
        if mode == "prop":      # shares add up to one whatever the tokens' log-probs
            gap = chunk_sums(q, t, 6) - chunk_sums(b, s, 6)
            torch.testing.assert_close(chunk_sums(effective - b, s, 6), gap, rtol=1e-6, atol=1e-6)
            assert effective[0] == 0 and effective[2] == effective[3] == -2     # a certain token; two certain ones


@pytest.mark.parametrize("mode", CREDIT)
def test_credit_of_a_step_is_the_credit_of_its_responses(mode):
    one, two = random_step(7), random_step(8)
    shift = [torch.where(chunk >= 0, chunk + 40, -1) for chunk in two[2:4]]
    both = [torch.cat(pair) for pair in zip(one, (*two[:2], *shift, two[4]))]
    parts = [torch.cat(pair) for pair in zip(advantages(mode, one), advantages(mode, two))]
    assert all(torch.equal(a, b) for a, b in zip(advantages(mode, both), parts))


def test_nothing_to_score_is_no_error():
    empty, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    b, masked = torch.tensor([-1.0, -2.0]), torch.tensor([-1, -1])
    for mode in CREDIT:
        assert credit(mode, empty, empty, none, none, prefix_n=empty)[0].shape == (0,)
        effective, scored = credit(mode, b, empty, masked, none, prefix_n=torch.zeros(2))
        assert torch.equal(effective, b) and not scored.any()
        effective, scored = credit(mode, b, empty, torch.tensor([0, 0]), none, prefix_n=torch.zeros(2))
        assert torch.equal(effective, b) and not scored.any()       # nothing on the teacher's side answers
    assert prefix_scores(empty, masked, none, none, none, empty).tolist() == [0, 0]


# Which rule is the gradient of the reverse KL

def toy_gradients(seed):
    """A chunk of two student tokens, three of each: true gradient of E[log p - log q], and what each rule expects
    in its place, by enumeration of the nine chunks. q is one teacher token per text."""
    first, second = (2 * rand(*shape, seed=seed + len(shape)) for shape in ((3,), (3, 3)))
    first, second = first.requires_grad_(), second.requires_grad_()
    teacher = torch.log_softmax(2 * rand(9, seed=seed + 3), 0)
    log_first, log_second = first.log_softmax(0), second.log_softmax(1)
    token_logp = torch.stack([torch.stack([log_first[a], log_second[a, c]]) for a, c in product(range(3), repeat=2)])
    p = token_logp.sum(1).exp()
    def gradient(loss):
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, (first, second), retain_graph=True)])
    true = gradient((p * (token_logp.sum(1) - teacher)).sum())
    chunk = torch.arange(9)
    def expected(mode):
        b = token_logp.detach().flatten()
        effective, scored = credit(mode, b, teacher, chunk.repeat_interleave(2), chunk)
        assert scored.all()
        A = (effective - b).view(9, 2)
        return gradient(-(p.detach()[:, None] * A * token_logp).sum())
    return true, expected


def test_only_the_whole_gap_on_every_token_follows_the_gradient_of_the_reverse_kl():
    worst = {}
    for seed in range(0, 800, 4):
        true, expected = toy_gradients(seed)
        for mode in ("chunk", "shift", "prop", "uniform"):
            cosine = torch.cosine_similarity(expected(mode), true, 0).item()
            worst[mode] = min(worst.get(mode, 1.0), cosine)
        torch.testing.assert_close(expected("chunk"), true, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(expected("shift"), true / 2, rtol=1e-10, atol=1e-12)
    assert worst["chunk"] > 1 - 1e-12 and worst["shift"] > 1 - 1e-12
    assert worst["prop"] < 0 and worst["uniform"] < 0.5     # they may point away from it
