"""A teacher with another tokenizer: what it says about the student's tokens, and what the loop makes of it.

The reference reads one response at a time in plain Python: its bytes, the teacher's tokens of these bytes, one
forward pass of each model, chunks as the byte ends that both sides share. It knows nothing of align.py or
chunk_credit.py.
"""
import json
import math
import sys
from collections import Counter
from dataclasses import replace
from itertools import accumulate, groupby
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHARACTERS, write_checkpoint
from test_teachers import jsonl, sampled
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from across import AcrossArgs, Crossing  # noqa: E402
from align import Bridge  # noqa: E402
from chunk_credit import CREDIT  # noqa: E402
from losses import DIVERGENCES, LossArgs, Rows, on_shared  # noqa: E402
from weights import load_model  # noqa: E402
from rollout import from_responses  # noqa: E402
from teacher import score  # noqa: E402
from tokenizer import Tokenizer as Text  # noqa: E402
from update import chunked_backward  # noqa: E402

MERGES = ("1 2", "; 3", "+ 3", "= 4", "3 3")
MANY = tuple(dict.fromkeys((*MERGES, *(f"{a} {CHARACTERS[(k * i + k) % 17]}" for k in (3, 5, 7)
                                       for i, a in enumerate(CHARACTERS)))))
FOREIGN = dict(model_type="llama", vocab_size=80, hidden_size=24, intermediate_size=32, num_hidden_layers=2)
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.content }}*{% endfor %}"


def checkpoint(folder, seed, characters, merges, special, stop, template=None, context=64, **config):
    """A random model with a byte-level tokenizer of its own; `stop` are contents of special tokens."""
    write_checkpoint(folder, seed, **config)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": context}))
    pieces = [*characters, *(merge.replace(" ", "") for merge in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)},
                                   [tuple(merge.split()) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    backend.save(str(folder / "tokenizer.json"))
    ids = [len(pieces) + special.index(text) for text in stop]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    if template:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "bos_token": special[0]}))
    return folder


@pytest.fixture(scope="session")
def world(pair):
    """pair, with teachers of other tokenizers and a student that can cut characters and stop in two ways."""
    odd, theirs = CHARACTERS[::-1], ("<s>", "</s>", "<|think|>", "<|call|>")
    checkpoint(pair / "foreign", 3, odd, MANY, theirs, ["</s>"], TEMPLATE, context=48, **FOREIGN)
    checkpoint(pair / "two", 4, odd + "ĠÃ©", (*MERGES, "Ã ©"), theirs, ["</s>", "<|call|>"], TEMPLATE,
               context=32, **FOREIGN)
    checkpoint(pair / "rich", 5, CHARACTERS + "ĠÃ©", ("2 3", "5 6"),
               ("<|end|>", "<|eot|>", "<|think|>", "<|odd|>", "<|call|>"),
               ["<|end|>", "<|eot|>"], model_type="qwen3", vocab_size=32, hidden_size=16, intermediate_size=24,
               num_hidden_layers=1, head_dim=8)
    jsonl(pair / "kinds.jsonl", [dict(problem=f"{a}+3?", answer=str((a + 3) % 10), solution=f"{a}+3={a}",
                                      kind="ab"[a % 2]) for a in range(10)])
    return pair


def exact(a, b):
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9, equal_nan=True)


# The reference.

def forward(model, vocab, prompt, ids, temperature=1.0):
    """(states, log-probs) that predict `ids` after `prompt`: one sequence, no padding."""
    with torch.no_grad():
        hidden = model(torch.tensor([[*prompt, *ids]]))[0][len(prompt) - 1:len(prompt) + len(ids) - 1]
        logits = hidden @ model.head_weight()[:vocab].T.to(hidden.dtype)
        return hidden, (logits / temperature).log_softmax(-1)


def spelled(text):
    """id -> bytes of ordinary tokens, id -> content of control tokens. é is the only character of two bytes."""
    byte = {"Ġ": b" ", "Ã": b"\xc3", "©": b"\xa9"}
    plain = {i: b"".join(byte.get(c, c.encode()) for c in piece)
             for piece, i in text.vocab().items() if piece[0] != "<"}
    return plain, {i: piece for piece, i in text.vocab().items() if i not in plain}


def cut(mine, theirs, response, finished):
    """(teacher ids, [(student places, teacher places)] of the scored chunks); None: cannot be read."""
    (plain, control), (their_plain, their_control) = spelled(mine), spelled(theirs)
    known = {content: i for i, content in their_control.items()}
    body, ids, chunks, whole = response[:len(response) - finished], [], [], True
    for is_control, places in groupby(range(len(body)), lambda i: body[i] in control):
        places = list(places)
        if is_control:
            for i in places:
                if control[body[i]] in known:
                    chunks.append(([i], [len(ids)]))
                    ids.append(known[control[body[i]]])
            continue
        last, data = places[-1] == len(body) - 1, b"".join(plain[body[i]] for i in places)
        if last and data.endswith(b"\xc3"):             # half an é: one token
            whole, data, places = False, data[:-1], places[:-1]
        try:
            data.decode()
        except UnicodeDecodeError:
            return None
        new = theirs.encode(data.decode())
        mine_at = list(accumulate([len(plain[body[i]]) for i in places], initial=0))
        their_at = list(accumulate([len(their_plain[j]) for j in new], initial=0))
        common = sorted(set(mine_at) & set(their_at))
        found = [([i for i, at in zip(places, mine_at) if a <= at < b],
                  [j + len(ids) for j, at in enumerate(their_at[:-1]) if a <= at < b])
                 for a, b in zip(common, common[1:])]
        chunks += found[:-1] if last and not (finished and whole) else found
        ids += new
    if finished:
        if whole:
            chunks.append(([len(body)], [len(ids)]))
        ids.append(theirs.stop_ids[0])
    return ids, chunks


def advantages(mode, b, q, spell_b, spell_q, logp_q, their_plain):
    """A of one chunk's student tokens from the log-probs and bytes of both sides."""
    gap, own, size = sum(q) - sum(b), sum(b), len(b)
    if mode in ("chunk", "strict"):
        return [gap] * size if mode == "chunk" or size == len(q) == 1 else None
    if mode == "prefix" and spell_b:
        level = [0.0]
        for end in accumulate(map(len, spell_b)):
            total = j = 0
            while j < len(q) and end >= len(spell_q[j]):
                total, end, j = total + q[j], end - len(spell_q[j]), j + 1
            if end:
                starts = [i for i, text in their_plain.items() if text.startswith(spell_q[j][:end])]
                total += math.log(sum(math.exp(logp_q[j][i]) for i in starts))
            level.append(total)
        return [after - before - x for before, after, x in zip(level, level[1:], b)]
    return {"prop": [gap * x / own for x in b], "shift": [gap / size] * size, "prefix": [gap],
            "uniform": [sum(q) / size - x for x in b]}[mode]


def naive(student, teacher, mine, theirs, asked, seen, response, finished, mode="chunk", temperature=1.0):
    """What the crossing should know of one response, per student token; None: it cannot be read."""
    n, found = len(response), cut(mine, theirs, response, finished)
    _, p = forward(student, mine.vocab_size, asked, response, temperature)
    b = p.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
    out = SimpleNamespace(b=b, a=[0.0] * n, scored=[False] * n, entropy=[math.nan] * n, alone=[None] * n, place=[None] * n,
                          last=[None] * n, before=[(0.0, 0.0)] * n, total=sum(b), chunks=[], white=[False] * n)
    if found is None or len(seen) + len(found[0]) > teacher.config.context:
        return replace_none(out)
    ids, out.chunks = found
    hidden, logp = forward(teacher, theirs.vocab_size, seen, ids, temperature)
    q = [logp[j, i].item() for j, i in enumerate(ids)]
    event = list(b)
    if finished:
        event[-1] = p[-1, list(mine.stop_ids)].logsumexp(0).item()
        q[-1] = logp[-1, list(theirs.stop_ids)].logsumexp(0).item()
    (plain, _), (their_plain, _) = spelled(mine), spelled(theirs)
    out.place = [hidden[i] if i < len(ids) else None for i in range(n)]
    out.white = [plain.get(i, b"x").isspace() for i in response]
    for ours, others in out.chunks:
        is_text = response[ours[0]] in plain
        spell = [[plain[response[i]] for i in ours], [their_plain[ids[j]] for j in others]] if is_text else [None, None]
        a = advantages(mode, [event[i] for i in ours], [q[j] for j in others], *spell,
                       [logp[j].tolist() for j in others], their_plain)
        out.total += sum(q[j] for j in others) - sum(event[i] for i in ours)
        out.last[ours[-1]] = hidden[others[-1]]
        out.before[ours[-1]] = (sum(b[i] for i in ours[:-1]), sum(q[j] for j in others[:-1]))
        if len(ours) == len(others) == 1:
            out.alone[ours[0]] = hidden[others[0]]
        for k, i in enumerate(ours):
            out.entropy[i] = np.mean([-(logp[j].exp() * logp[j]).sum().item() for j in others])
            out.scored[i], out.a[i] = a is not None, a[k] if a else 0.0
    out.stop = out.a[-1] if finished and out.scored[-1] else None
    return out


def replace_none(out):
    out.stop, out.chunks = None, None
    return out


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
            shift_teacher=None, **flags):
    """(scores, rollout) of these sequences in this order."""
    order = list(range(len(w.responses))) if order is None else order
    rollout = from_responses(*([side[b] for b in order] for side in (w.asked, w.responses, w.finished)), "cpu")
    p = [forward(w.student, w.mine.vocab_size, w.asked[b], w.responses[b], temperature)[1] for b in order]
    rollout = replace(rollout, logp_BT=rollout.logp_BT.double())
    rollout.logp_BT[rollout.mask_BT] = torch.cat([sampled(p_NV, w.responses[b]) for p_NV, b in zip(p, order)])
    stop_N = torch.cat([p_NV[:, list(w.mine.stop_ids)].logsumexp(-1) for p_NV in p])
    sizes = dict(temperature=temperature, max_tokens=max_tokens, chunk_rows=chunk_rows)
    crossing = Crossing([Bridge(w.mine, w.theirs)], rollout, AcrossArgs(chunk_credit=mode, **flags),
                        divergence=divergence, stop_N=stop_N, **sizes)
    scores = score([shift_teacher or w.teacher], rollout, torch.zeros(len(order), dtype=torch.int64),
                   vocab_size=w.mine.vocab_size, prompts=[w.seen[b] for b in order], crossing=crossing, **sizes)
    return scores, rollout


def expected(w, order=None, mode="chunk", temperature=1.0):
    order = range(len(w.responses)) if order is None else order
    return [naive(w.student, w.teacher, w.mine, w.theirs, w.asked[b], w.seen[b], w.responses[b], w.finished[b], mode,
                  temperature) for b in order]


def joined(parts, name):
    return [value for part in parts for value in getattr(part, name)]


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
    scores, _ = crossed(read_world, None, mode, "reverse_kl", max_tokens, chunk_rows, temperature)
    crossing, parts = scores.crossing, expected(read_world, None, mode, temperature)
    exact(crossing.student_N, joined(parts, "b"))
    exact(scores.logp_N - crossing.student_N, joined(parts, "a"))
    assert crossing.scored_N.tolist() == joined(parts, "scored")
    exact(scores.entropy_N, joined(parts, "entropy"))
    same_states(scores.parts[0], joined(parts, "alone"))
    assert crossing.paired_N.tolist() == [state is not None for state in joined(parts, "alone")]
    if mode != "strict":        # strict: the student's own log-prob stands in for longer chunks
        exact(crossing.total_B(scores.logp_N), [part.total for part in parts])
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
    scores, _ = crossed(read_world, divergence=divergence)
    parts = expected(read_world)
    same_states(scores.parts[0], joined(parts, name))
    if divergence == "gold":
        before = torch.tensor(joined(parts, "before"), dtype=torch.float64)
        exact(scores.crossing.student_before_N, before[:, 0])
        exact(scores.crossing.teacher_before_N, before[:, 1])
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
        exact(part.logp_N, whole.logp_N[at])
        exact(part.entropy_N, whole.entropy_N[at])
        assert part.crossing.scored_N.tolist() == whole.crossing.scored_N[at].tolist()


@pytest.mark.parametrize("divergence", ["reverse_kl", "gold", "uld", "policy_gradient"])
def test_a_teacher_that_can_read_nothing_is_no_error(read_world, divergence):
    """fails if: an empty table of states is indexed, or a chunk's number counts chunks that are not there"""
    for some in ([11], [12], [11, 12], [9]):        # two that cannot be read, one of which nothing is scored
        scores, _ = crossed(read_world, some, divergence=divergence)
        part, rows = scores.parts[0], len(scores.logp_N)
        assert part.hidden_nE[part.place_N].shape == (rows, 24)
        if some != [9]:
            assert torch.equal(scores.logp_N, scores.crossing.student_N) and not scores.crossing.scored_N.any()
            assert scores.crossing.metrics()["dropped_share"] == 1 and scores.entropy_N.isnan().all()


def test_what_the_prompt_already_opened_is_read_once(read_world):
    """fails if: a chunk that is masked in front of others is given the place of a row, or numbers shift"""
    w = SimpleNamespace(**vars(read_world))
    w.responses, w.finished = [pieces(w.mine, "56 3 + 3 <|end|>"), pieces(w.mine, "7 7 <|end|>")], [True, True]
    for divergence, place in (("gold", [-1, 1, -1, 2, 3, 4, 5, 6]), ("reverse_kl", [-1, 1, -1, -1, 3, 4, 5, 6])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Bridge, "opened", lambda self, prompt: b"5")      # the teacher goes on with `6`
            found, _ = crossed(w, divergence=divergence)
        assert found.parts[0].place_N.tolist() == place
        assert found.crossing.scored_N.tolist() == [False, *[True] * 7]


def test_white_space_can_be_masked(read_world):
    """fails if: --mask_whitespace acts on the sampled rules only"""
    parts = expected(read_world)
    white_N, states = torch.tensor(joined(parts, "white")), joined(parts, "alone")
    scores, _ = crossed(read_world, mask_whitespace=True)
    kept = [scored and not white for scored, white in zip(joined(parts, "scored"), white_N.tolist())]
    assert scores.crossing.scored_N.tolist() == kept and any(white_N)
    exact(scores.logp_N - scores.crossing.student_N, torch.tensor(joined(parts, "a"), dtype=torch.float64) * ~white_N)
    assert scores.crossing.paired_N.tolist() == [state is not None and not white
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
    batch = dict(token_N=torch.tensor([0, 8, 3, 1, 2]), student_before_N=before[0], teacher_before_N=before[1])
    divergence = DIVERGENCES["topk_reverse_kl" if "topk" in name else name]
    loss_N, seen = chunked_backward(hidden, eye, head_grad, batch, scale_N, divergence, LossArgs(**flags),
                                    temperature=1.0, chunk_rows=chunk_rows, teacher_hidden_NE=y_NV,
                                    teacher_head_VE=torch.eye(12).double(), shared=SHARED, diagnose=True)
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
    rows = Rows(z_NV.log_softmax(-1), torch.zeros(5, dtype=torch.int64), z_NV.flip(0).log_softmax(-1),
                shared=(ids, ids), student_before_N=zero, teacher_before_N=zero)
    exact(DIVERGENCES["gold"](rows, LossArgs()), DIVERGENCES["jsd"](rows, LossArgs()))
    exact(on_shared(rows).student_NV, rows.student_NV)

