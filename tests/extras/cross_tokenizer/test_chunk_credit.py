"""chunk_credit.py, the credit of tokens inside chunks: exact expectations in float64, against gradients and
probabilities enumerated here. The tokenizers themselves are in test_align_pairs.py.
"""
import json
import math
import random
from itertools import product

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from extras.cross_tokenizer import chunk_credit
from extras.cross_tokenizer.align import Bridge
from extras.cross_tokenizer.chunk_credit import CREDIT, chunk_sums, credit, prefix_scores, slice_mass
from support.tokenizer import Tokenizer

CONSERVING = ("prop", "shift", "uniform", "prefix")     # their advantages add up to the chunk's log-ratio


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


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


# Prefix masses

VOCAB = [b"a", b"b", b"ab", b"ba", b"aba", b"bb", b"\xff", b"\xffa"]
MERGES = [("a", "b"), ("b", "a"), ("ab", "a"), ("b", "b"), ("\xff", "a")]


def write_tokenizer(folder, pieces, merges):
    backend = Backend(models.BPE({piece: i for i, piece in enumerate([*pieces, "<end>"])}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>"])
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": len(pieces)}))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A student of single bytes and `aa`, a teacher of VOCAB."""
    root = tmp_path_factory.mktemp("toy")
    student = write_tokenizer(root / "student", ["a", "b", "aa"], [("a", "a")])
    teacher = write_tokenizer(root / "teacher", [text.decode("latin1") for text in VOCAB], MERGES)
    return student, teacher, Bridge(student, teacher)


def lm(vocab_size, seed):
    """log-probs of the next token after a tuple of ids: some fixed random language model."""
    memo = {}
    def next_logp(ids):
        if ids not in memo:
            memo[ids] = torch.log_softmax(rand(vocab_size, seed=seed + hash(ids) % 10_000), 0)
        return memo[ids]
    return next_logp


def test_slices_are_the_tokens_that_start_with_the_bytes(toy):
    _, _, bridge = toy
    for text in (b"a", b"b", b"ab", b"aba", b"bb", b"\xff", b"\xff\xff", b"\xffa", b"c", b"abc"):
        lo, hi = bridge.starting_with(text)
        assert sorted(bridge.order[lo:hi].tolist()) == [i for i, word in enumerate(VOCAB) if word.startswith(text)]


def test_slice_masses_are_sums_of_probabilities(toy, monkeypatch):
    order, logp = toy[2].order, torch.log_softmax(30 * rand(5, 9), -1)
    spans = [(row, lo, hi) for row in (4, 0, 2) for lo in range(8) for hi in range(lo + 1, 9)]
    rows, lo, hi = (torch.tensor(column) for column in zip(*spans))
    got = slice_mass(logp, order, rows, lo, hi)
    expected = [math.log(math.fsum(math.exp(logp[r, i]) for i in order[a:b].tolist())) for r, a, b in spans]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=got.dtype), rtol=1e-12, atol=1e-12)
    assert slice_mass(logp, order, rows[:0], lo[:0], hi[:0]).shape == (0,)
    monkeypatch.setattr(chunk_credit, "SLICE_ENTRIES", 10)     # the same, a few cuts at a time
    torch.testing.assert_close(slice_mass(logp, order, rows, lo, hi), got, rtol=0, atol=0)
    far = torch.full((1, 9), -2000.0)       # masses below the smallest float stay numbers
    one = torch.tensor([1])
    assert slice_mass(far, order, one - 1, one, one + 2).item() == pytest.approx(-2000 + math.log(2))


def test_a_cut_reads_the_row_of_its_own_token_only(toy):
    order, logp = toy[2].order, rand(4, 9)
    rows, lo, hi = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0]), torch.tensor([3, 4, 5, 8])
    before = slice_mass(logp, order, rows, lo, hi)
    for row in range(4):
        moved = logp.clone()
        moved[row] += rand(9, seed=5)
        changed = slice_mass(moved, order, rows, lo, hi) != before
        assert changed.tolist() == [row == other for other in range(4)]


def prefix_of(reading, teacher_lm, bridge):
    """(log q of the teacher's tokens, r of the student's) for one reading."""
    logp = torch.stack([teacher_lm(tuple(reading.ids[:j])) for j in range(len(reading.ids))])
    q = logp.gather(1, torch.tensor(reading.ids)[:, None]).squeeze(1)
    i, j, lo, hi = torch.tensor(reading.cuts, dtype=torch.int64).view(-1, 4).T
    mass = slice_mass(logp, bridge.order, j, lo, hi)
    return q, prefix_scores(q, torch.tensor(reading.student_chunk), torch.tensor(reading.teacher_chunk), i, j, mass)


def covers(data, teacher_lm, ids=()):
    """Probability, over every segmentation, that the text starts with these bytes."""
    if not data:
        return 1.0
    total = 0.0
    for word, i, p in zip(VOCAB, range(8), teacher_lm(ids).exp().tolist()):
        if word.startswith(data):
            total += p
        elif data.startswith(word):
            total += p * covers(data[len(word):], teacher_lm, (*ids, i))
    return total


def test_prefix_scores_telescope_and_never_exceed_the_true_prefix_probability(toy):
    student, teacher, bridge = toy
    spells, cases, inside = [b"a", b"b", b"aa"], 0, 0
    for seed in range(3):
        teacher_lm = lm(9, 100 * seed)
        for n in range(1, 6):
            for ids in product(range(3), repeat=n):
                reading = bridge.read([*ids, 3], True)
                q, r = prefix_of(reading, teacher_lm, bridge)
                assert (r <= 1e-12).all()
                chunk, theirs = torch.tensor(reading.student_chunk), torch.tensor(reading.teacher_chunk)
                size = int(chunk.max()) + 1
                total = chunk_sums(q, theirs, size)
                torch.testing.assert_close(chunk_sums(r, chunk, size), total, rtol=1e-12, atol=1e-12)
                data, level = b"", 0.0
                for i, token_id in enumerate(ids):
                    data, level = data + spells[token_id], level + r[i].item()
                    assert level <= math.log(covers(data, teacher_lm)) + 1e-12
                cases, inside = cases + 1, inside + len(reading.cuts)
    assert cases == 3 * (3 + 9 + 27 + 81 + 243) and inside > 500


def test_a_prefix_mass_is_the_realised_tokens_times_the_slice(toy):
    """Text abaa: teacher [aba][a]; student a, b, a, a."""
    _, _, bridge = toy
    teacher_lm = lm(9, 7)
    reading = bridge.read([0, 1, 0, 0, 3], True)
    assert [VOCAB[i] for i in reading.ids[:-1]] == [b"aba", b"a"] and reading.student_chunk == [0, 0, 0, 1, 2]
    q, r = prefix_of(reading, teacher_lm, bridge)
    p = teacher_lm(()).exp()
    starts = [sum(p[i] for i, word in enumerate(VOCAB) if word.startswith(text)) for text in (b"a", b"ab")] + [p[4]]
    expected = torch.stack([starts[0].log(), (starts[1] / starts[0]).log(), (starts[2] / starts[1]).log(), q[1], q[2]])
    torch.testing.assert_close(r, expected, rtol=1e-12, atol=1e-12)
    assert r[3] == q[1] and r[4] == q[2]


def test_a_masked_token_inside_a_chunk_is_passed_over():
    one, chunk = torch.tensor([0]), torch.tensor([0, -1, 0])
    r = prefix_scores(torch.tensor([-3.0]), chunk, one, one, one, torch.tensor([-1.0]))
    assert r.tolist() == [-1, 0, -2]


def test_prefix_scores_of_a_long_step_do_not_drift():
    """A chunk's score comes from its own tokens, wherever it stands among 100,000."""
    n = 100_000
    q = -rand(n, dtype=torch.float32).abs() * 10
    chunk = torch.arange(n // 2).repeat_interleave(2)       # two teacher tokens, one cut in the second
    cut = torch.arange(n // 2) * 2
    mass = q[1::2] / 2
    r = prefix_scores(q, chunk, chunk, cut, cut + 1, mass)
    torch.testing.assert_close(r[::2], q[::2] + mass, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(r[1::2], q[1::2] - mass, rtol=1e-6, atol=1e-6)
    backwards = torch.cat([torch.tensor([-1]), chunk.flip(0)])     # any numbering; a masked token in front
    masked = torch.cat([torch.tensor([torch.nan]), q])
    again = prefix_scores(masked, backwards, backwards, cut + 1, cut + 2, mass)
    torch.testing.assert_close(again, torch.cat([torch.zeros(1), r]), rtol=1e-6, atol=1e-6)


# What is minimised

def test_the_log_ratio_of_a_response_is_the_text_kl_less_two_segmentation_terms(toy):
    """E[log P_S(s) - log P_T(canon)] = KL(P_S(y) || P_T(y)) - H_S(s | y) + E[log P_T(y) - log P_T(canon)], all
    student responses of up to three tokens enumerated; the left side from credit."""
    _, _, bridge = toy
    student_lm, teacher_lm, spells = lm(4, 11), lm(9, 12), [b"a", b"b", b"aa"]
    def text_probability(data, ids=()):     # of exactly this text, over every segmentation
        if not data:
            return teacher_lm(ids)[8].exp().item()
        return sum(teacher_lm(ids)[i].exp().item() * text_probability(data[len(word):], (*ids, i))
                   for i, word in enumerate(VOCAB) if data.startswith(word))
    left, texts, responses = 0.0, {}, []
    for n in range(4):
        for ids in product(range(3), repeat=n):
            b = [student_lm(ids[:k])[i].item() for k, i in enumerate(ids)]
            b += [student_lm(ids)[3].item() if n < 3 else 0.0]      # after three tokens it must stop
            reading = bridge.read([*ids, 3], True)
            q, _ = prefix_of(reading, teacher_lm, bridge)
            b = torch.tensor(b, dtype=torch.float64)
            s, t = torch.tensor(reading.student_chunk), torch.tensor(reading.teacher_chunk)
            effective, scored = credit("shift", b, q, s, t)
            assert scored.all()
            p, data = b.sum().exp().item(), b"".join(spells[i] for i in ids)
            left += p * (b - effective).sum().item()
            texts[data] = texts.get(data, 0.0) + p
            responses.append((p, data, q.sum().item()))
    assert math.fsum(texts.values()) == pytest.approx(1, abs=1e-12) and len(texts) < len(responses)
    kl = sum(p * (math.log(p) - math.log(text_probability(data))) for data, p in texts.items())
    entropy = -sum(p * math.log(p / texts[data]) for p, data, _ in responses)
    slack = sum(p * (math.log(text_probability(data)) - canon) for p, data, canon in responses)
    assert left == pytest.approx(kl - entropy + slack, abs=1e-12) and min(kl, entropy, slack) > 1e-3


def test_chunk_sums_leave_masked_tokens_out():
    value, chunk = torch.tensor([1.0, 2.0, torch.nan, 4.0]), torch.tensor([1, 1, -1, 3])
    assert chunk_sums(value, chunk, 5).tolist() == [0, 3, 0, 4, 0]
