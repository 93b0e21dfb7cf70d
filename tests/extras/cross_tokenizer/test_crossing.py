"""crossing.py: what a teacher with another tokenizer says about the student's tokens, held against the reference of one
response at a time (crossing_reference.py); and the losses of two vocabularies.
"""
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from extras.teachers import with_prompts
from crossing_reference import cross_rows, exact, forward, joined, naive
from helpers import sampled

from extras.cross_tokenizer.align import Bridge
from extras.cross_tokenizer.bridge import Flags
from extras.cross_tokenizer.chunk_credit import CREDIT
from extras.cross_tokenizer.crossing import Crossing, CrossPart
from losses import DIVERGENCES, LossArgs, Rows, chunked_backward
from support.responses import from_responses
from support.metrics import observe
from support.tokenizer import Tokenizer as Text
from support.weights import load_model


# Crossing.read.

def pieces(text, names):
    return [text.vocab()[name] for name in names.split()]


WRITTEN = [     # pieces of the student `rich`; the stop token, where there is one, stands last
    "1 23 + 3 <|end|>", "= 4 = Ã © <|eot|>", "3 3 3 1 2", "<|end|>", "7 <|think|> 8 <|odd|> 9 <|eot|>", "7 Ã",
    "7 8 Ã <|end|>",
    "Ġ 56 Ġ Ġ 1 2 <|end|>", "5 6 ; 3 1 23 3 + <|end|>", "Ã © Ã © =", "1 2 <|think|>", "7 Ã 8 <|end|>",
    "+ 1 " * 20 + "<|end|>", "7 <|call|> 8 <|end|>"]      # the teacher would stop at the second


@pytest.fixture(scope="session")
def read_world(world):
    """Both texts and float64 models, prompts of both sides, the student's rollout with its log-probs."""
    mine, theirs = Text(world / "rich"), Text(world / "two")
    student, teacher = (load_model(world / name, dtype=torch.float64) for name in ("rich", "two"))
    teacher.vocab_size = theirs.vocab_size      # its rows beyond are padding
    rng = np.random.default_rng(0)
    responses = [pieces(mine, names) for names in WRITTEN]
    responses += [[*rng.integers(0, 18, rng.integers(1, 12)).tolist(), *([mine.stop_ids[k % 2]] * (k % 3 > 0))]
                  for k in range(9)]
    finished = [response[-1] in mine.stop_ids for response in responses]
    asked = [rng.integers(0, 17, rng.integers(1, 6)).tolist() for _ in responses]
    seen = [rng.integers(0, 17, rng.integers(1, 9)).tolist() for _ in responses]
    return SimpleNamespace(mine=mine, theirs=theirs, student=student, teacher=teacher, responses=responses,
                           finished=finished, asked=asked, seen=seen)


def crossed(w, order=None, mode="chunk", divergence="reverse_kl", max_tokens=16384, chunk_rows=64, temperature=1.0,
            **flags):
    """(part, rollout) of these sequences in this order."""
    order = list(range(len(w.responses))) if order is None else order
    rollout = from_responses(*([side[b] for b in order] for side in (w.asked, w.responses, w.finished)), "cpu")
    p = [forward(w.student, w.mine.vocab_size, w.asked[b], w.responses[b], temperature)[1] for b in order]
    rollout = replace(rollout, logp_BT=rollout.logp_BT.double())
    rollout.logp_BT[rollout.mask_BT] = torch.cat([sampled(p_NV, w.responses[b]) for p_NV, b in zip(p, order)])
    stop_N = torch.cat([p_NV[:, list(w.mine.stop_ids)].logsumexp(-1) for p_NV in p])
    cfg = SimpleNamespace(**asdict(Flags(chunk_credit=mode, **flags)), divergence=divergence, temperature=temperature,
                          micro_batch_tokens=max_tokens, chunk_rows=chunk_rows)
    crossing = Crossing([Bridge(w.mine, w.theirs)], rollout, cfg, stop_N)
    return crossing.read(0, w.teacher, rollout.every_B, with_prompts(rollout, [w.seen[b] for b in order])), rollout


def expected(w, order=None, mode="chunk", temperature=1.0):
    order = range(len(w.responses)) if order is None else order
    return [naive(w.student, w.teacher, w.mine, w.theirs, w.asked[b], w.seen[b], w.responses[b], w.finished[b], mode,
                  temperature) for b in order]


def same_states(part, wanted):
    """Rows stand beside exactly the teacher states that the reference names."""
    assert [place >= 0 for place in part.place_N.tolist()] == [state is not None for state in wanted]
    at = [n for n, state in enumerate(wanted) if state is not None]
    exact(part.hidden_nE[part.place_N[at]], torch.stack([wanted[n] for n in at]))


@pytest.mark.parametrize("mode", list(CREDIT))
@pytest.mark.parametrize("sizes", [(1, 1, 1.0), (60, 5, 0.7)])
def test_every_rule_equals_one_response_at_a_time(read_world, mode, sizes):
    """fails if: rows, chunks or cuts of a neighbour are taken, a stop token is text or one of two, the entropy
    is the first token's, a cut tail is scored, or the temperature or the padding rows reach one side only"""
    max_tokens, chunk_rows, temperature = sizes
    part, _ = crossed(read_world, None, mode, "reverse_kl", max_tokens, chunk_rows, temperature)
    crossing, parts = part.crossing, expected(read_world, None, mode, temperature)
    exact(crossing.behavior_logp_N, joined(parts, "b"))
    exact(part.told["teacher_logp_N"] - crossing.behavior_logp_N, joined(parts, "a"))
    assert crossing.scored_N.tolist() == joined(parts, "scored")
    exact(part.told["teacher_entropy_N"], joined(parts, "entropy"))
    same_states(part, joined(parts, "alone"))
    assert crossing.paired_N.tolist() == [state is not None for state in joined(parts, "alone")]
    if mode != "strict":        # strict: the student's own log-prob stands in for longer chunks
        exact(crossing.total_B(part.told["teacher_logp_N"]), [part.total for part in parts])
    assert crossing.dropped == {"its bytes are not UTF-8": 1, "longer than the teacher's context": 1}
    assert sorted(crossing.readings) == [b for b, part in enumerate(parts) if part.chunks is not None]
    found, rows = crossing.metrics(), len(joined(parts, "b"))
    alone = sum(state is not None for state in joined(parts, "alone"))
    sizes_of = Counter(min(4, len(ours)) for part in parts for ours, _ in part.chunks or [])
    assert found["strict_coverage"] == pytest.approx(alone / rows) and max(sizes_of) > 2
    assert found["masked_share"] == pytest.approx(1 - sum(joined(parts, "scored")) / rows)
    assert found["dropped_share"] == 2 / len(parts)
    for size in (1, 2, 3, 4):
        assert found[f"chunks_of_{size}{'+' * (size == 4)}"] == pytest.approx(sizes_of[size] / sizes_of.total())
    assert found["stop_advantage"] == pytest.approx(np.mean([part.stop for part in parts if part.stop is not None]))
    for other in CREDIT:
        if other != "prefix" or mode == "prefix":
            total = sum(joined(expected(read_world, None, other, temperature), "a"))
            assert found[f"advantage_sum/{other}"] == pytest.approx(total / len(parts))


@pytest.mark.parametrize("divergence,name", [("uld", "place"), ("gold", "last")])
def test_which_state_a_dense_loss_stands_beside(read_world, divergence, name):
    """fails if: a chunk's first row is taken, or the earlier tokens of a chunk land on another row"""
    part, _ = crossed(read_world, divergence=divergence)
    parts = expected(read_world)
    same_states(part, joined(parts, name))
    if divergence == "gold":
        before = torch.tensor(joined(parts, "before"), dtype=torch.float64)
        exact(part.crossing.student_before_N, before[:, 0])
        exact(part.crossing.teacher_before_N, before[:, 1])
        assert (before < -1).any(0).all()


@pytest.mark.parametrize("mode", ["chunk", "prefix"])
def test_order_and_sizes_do_not_matter(read_world, mode):
    """fails if: sequences that could not be read shift those behind them"""
    whole, rollout = crossed(read_world, mode=mode)
    start = [0, *rollout.length_B.cumsum(0).tolist()]
    order = np.random.default_rng(1).permutation(len(read_world.responses)).tolist()
    for some in (order, *([b] for b in order[:6]), [11], [11, 12], [5, 11]):
        part, _ = crossed(read_world, some, mode, max_tokens=30, chunk_rows=3)
        at = [n for b in some for n in range(start[b], start[b + 1])]
        exact(part.told["teacher_logp_N"], whole.told["teacher_logp_N"][at])
        exact(part.told["teacher_entropy_N"], whole.told["teacher_entropy_N"][at])
        assert part.crossing.scored_N.tolist() == whole.crossing.scored_N[at].tolist()


@pytest.mark.parametrize("divergence", ["reverse_kl", "gold", "uld", "policy_gradient"])
def test_a_teacher_that_can_read_nothing_is_no_error(read_world, divergence):
    """fails if: an empty table of states is indexed, or a chunk's number counts chunks that are not there"""
    for some in ([11], [12], [11, 12], [9]):        # two that cannot be read, one of which nothing is scored
        part, _ = crossed(read_world, some, divergence=divergence)
        rows, logp_N, entropy_N = len(part.place_N), part.told["teacher_logp_N"], part.told["teacher_entropy_N"]
        assert len(logp_N) == rows and part.hidden_nE[part.place_N].shape == (rows, 24)
        if some != [9]:
            assert torch.equal(logp_N, part.crossing.behavior_logp_N) and not part.crossing.scored_N.any()
            assert part.crossing.metrics()["dropped_share"] == 1 and entropy_N.isnan().all()


def test_what_the_prompt_already_opened_is_read_once(read_world):
    """fails if: a chunk that is masked in front of others is given the place of a row, or numbers shift"""
    w = SimpleNamespace(**vars(read_world))
    w.responses, w.finished = [pieces(w.mine, "56 3 + 3 <|end|>"), pieces(w.mine, "7 7 <|end|>")], [True, True]
    for divergence, place in (("gold", [-1, 1, -1, 2, 3, 4, 5, 6]), ("reverse_kl", [-1, 1, -1, -1, 3, 4, 5, 6])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bridge, "opened", lambda self, prompt: b"5")      # the teacher goes on with `6`
            found, _ = crossed(w, divergence=divergence)
        assert found.place_N.tolist() == place
        assert found.crossing.scored_N.tolist() == [False, *[True] * 7]


def test_white_space_can_be_masked(read_world):
    """fails if: --mask_whitespace acts on the sampled rules only"""
    parts = expected(read_world)
    white_N, states = torch.tensor(joined(parts, "white")), joined(parts, "alone")
    part, _ = crossed(read_world, mask_whitespace=True)
    kept = [scored and not white for scored, white in zip(joined(parts, "scored"), white_N.tolist())]
    assert part.crossing.scored_N.tolist() == kept and any(white_N)
    wanted_N = torch.tensor(joined(parts, "a"), dtype=torch.float64) * ~white_N
    exact(part.told["teacher_logp_N"] - part.crossing.behavior_logp_N, wanted_N)
    assert part.crossing.paired_N.tolist() == [state is not None and not white
                                               for state, white in zip(states, white_N.tolist())]


# Losses of two vocabularies.

SHARED = torch.tensor([8, 0, 3, 5, 6]), torch.tensor([2, 11, 0, 7, 4])


def two_sides(rows=5, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(rows, size, generator=rng, dtype=torch.float64) for size in (9, 12))


def softmax(z):
    e = np.exp(z - z.max())
    return e / e.sum()


def divided(z, ids):
    p = softmax(z)[ids.numpy()]
    return p / p.sum()


def kl(p, q):
    return float((p * np.log(p / q)).sum())


def top(form):
    def value(z, y, *_):
        p, q = divided(z, SHARED[0]), divided(y, SHARED[1])
        best = np.argsort(-p)[:3]
        if form == "renormalised":
            return kl(p[best] / p[best].sum(), q[best] / q[best].sum())
        p, q = (np.append(x[best], 1 - x[best].sum()) for x in (p, q))
        return kl(p, q)
    return value


def gap(p, q):
    p, q = (np.sort(np.append(x, np.zeros(12)))[::-1][:12] for x in (p, q))
    return np.abs(p - q).sum()


def gold_by_hand(z, y, before):
    p, q = divided(z, SHARED[0]), divided(y, SHARED[1])
    m = (p + q) / 2
    rest = [np.delete(softmax(x), ids.numpy()) * np.exp(b) for x, ids, b in zip((z, y), SHARED, before)]
    return 5 / 12 * (kl(p, m) + kl(q, m)) / 2 + 7 / 12 * gap(*rest)


TWO = {"reverse_kl": (lambda z, y, _: kl(divided(z, SHARED[0]), divided(y, SHARED[1])), {}),
       "forward_kl": (lambda z, y, _: kl(divided(y, SHARED[1]), divided(z, SHARED[0])), {}),
       "topk renormalised": (top("renormalised"), dict(topk=3, topk_form="renormalised")),
       "topk tail": (top("tail"), dict(topk=3, topk_form="tail")),
       "uld": (lambda z, y, _: gap(softmax(z), softmax(y)), {}), "gold": (gold_by_hand, {})}


@pytest.mark.parametrize("name", list(TWO))
@pytest.mark.parametrize("chunk_rows", [1, 2, 100])
def test_losses_of_two_vocabularies(name, chunk_rows):
    """fails if: a side is not divided by its shared mass, ids pair up wrongly, earlier tokens do not scale the
    rest, or a chunk of rows reads another chunk's fields"""
    by_hand, flags = TWO[name]
    z_NV, y_NV = two_sides()
    before = torch.tensor([[-0.3, 0.0, -2.0, -1.0, 0.0], [-0.5, -1.5, 0.0, -0.1, 0.0]], dtype=torch.float64)
    scale_N = torch.linspace(0.5, 1, 5, dtype=torch.float64)
    hidden, eye, head_grad = z_NV.clone().requires_grad_(), torch.eye(9).double(), torch.zeros(9, 9).double()
    args = SimpleNamespace(**vars(LossArgs(**flags)), temperature=1.0, chunk_rows=chunk_rows)
    fields_N = dict(token_N=torch.tensor([0, 8, 3, 1, 2]), behavior_logp_N=torch.zeros(5).double())
    notes = SimpleNamespace(token_N=fields_N["token_N"], cfg=args, student_before_N=before[0],
                            teacher_before_N=before[1])
    rows = torch.arange(5)
    part = CrossPart(rows, rows, y_NV, torch.eye(12).double(), notes, SimpleNamespace(shared=SHARED), {})
    divergence = DIVERGENCES["topk_reverse_kl" if "topk" in name else name]
    loss_N, seen = chunked_backward(hidden, rows, (eye, head_grad), part, fields_N, scale_N, divergence, args, observe)
    for n in range(5):
        z, y, b = z_NV[n].numpy(), y_NV[n].numpy(), before[:, n].numpy()
        assert loss_N[n].item() == pytest.approx(by_hand(z, y, b), abs=1e-12)
        slope = [(by_hand(z + e, y, b) - by_hand(z - e, y, b)) / 2e-6 for e in 1e-6 * np.eye(9)]
        exact(hidden.grad[n] / scale_N[n] * 1e-3, torch.tensor(slope) * 1e-3)
        assert seen["reverse_kl"][n].item() == pytest.approx(TWO["reverse_kl"][0](z, y, b), abs=1e-12)
    if name not in ("uld", "gold"):
        assert hidden.grad[:, [1, 2, 4, 7]].abs().max() < 1e-15
    exact(head_grad, hidden.grad.T @ z_NV)


def test_one_vocabulary_is_shared_whole():
    """fails if: no token stands alone and an empty rest is sorted"""
    z_NV, ids, zero = next(two_sides()), torch.arange(9), torch.zeros(5).double()
    p_NV, q_NV = z_NV.log_softmax(-1), z_NV.flip(0).log_softmax(-1)
    rows = cross_rows(p_NV, q_NV, torch.zeros(5, dtype=torch.int64), (ids, ids), (zero, zero))
    exact(DIVERGENCES["gold"](rows, LossArgs()), DIVERGENCES["jsd"](Rows(p_NV, rows.token_N, q_NV), LossArgs()))
    exact(rows.student_NV, p_NV)

