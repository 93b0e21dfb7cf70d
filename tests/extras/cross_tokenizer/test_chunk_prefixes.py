"""chunk_credit.py: the prefix masses of a teacher's next-token probabilities, and what their credit minimises, against
probabilities enumerated here.
"""
import json
import math
from itertools import product

import pytest
import torch
from crossing_reference import rand
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from extras.cross_tokenizer import chunk_credit
from extras.cross_tokenizer.align import Bridge
from extras.cross_tokenizer.chunk_credit import chunk_sums, credit, prefix_scores, slice_mass
from support.tokenizer import Tokenizer

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
