"""What the tests of a teacher with another tokenizer share: a world of such teachers, and the reference.

The reference reads one response at a time in plain Python: its bytes, the teacher's tokens of these bytes, one forward
pass of each model, chunks as the byte ends that both sides share. It knows nothing of extras/cross_tokenizer/, but for
cross_rows, which puts together what a divergence is shown.
"""
import json
import math
from itertools import accumulate, groupby
from types import SimpleNamespace

import numpy as np
import torch
from conftest import CHARACTERS, write_checkpoint
from helpers import jsonl, ready
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from extras.cross_tokenizer.rows import CrossRows, on_shared

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


def write_table(model, table):
    """Writes log-probs (last, next) into a model of width 8 with a head of its own: layers that add nothing leave the
    last token, which the head looks up."""
    with torch.no_grad():
        weights = dict(model.named_parameters())
        for name, weight in weights.items():
            weight.fill_(1.0 if "norm" in name else 0.0)
        weights["model.embed_tokens.weight"][:, :len(table)].copy_(torch.eye(len(table)))
        weights["lm_head.weight"][:, :len(table)].copy_(table.T / 8 ** 0.5)


def write_world(pair):
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
    out = SimpleNamespace(b=b, a=[0.0] * n, scored=[False] * n, entropy=[math.nan] * n, alone=[None] * n,
                          place=[None] * n, last=[None] * n, before=[(0.0, 0.0)] * n, total=sum(b), chunks=[],
                          white=[False] * n)
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


def joined(parts, name):
    return [value for part in parts for value in getattr(part, name)]


def cross_rows(student_NV, teacher_NV, token_N, shared, before):
    """Rows of two vocabularies, all of them beside a distribution of the teacher."""
    student_NK, teacher_NK, place_N = on_shared(student_NV, teacher_NV, token_N, shared)
    return CrossRows(student_NK, place_N, teacher_NK, student_NV, teacher_NV, token_N, shared, *before,
                     torch.ones_like(token_N, dtype=torch.bool))


def foreign(world, command, **flags):
    """(run, its tokenizer) with a teacher of another tokenizer, the last one where there are several."""
    run = ready(command, **{**dict(teacher=world / "foreign", divergence="policy_gradient", max_grad_norm=1e9,
                                   problems=3, max_new_tokens=9), **flags})
    return run, run.kind.bridges[-1].teacher


def prompt_of(theirs, text):
    return theirs.encode(f"<s>{text}*")


def told(run, theirs, batch, mode="chunk", seen=None, only=None):
    """The reference of every response that the last teacher reads (all, or those in `only`; else None)."""
    return [None if only is not None and b not in only else
            naive(run.student, run.kind.models[-1], run.tokenizer, theirs, run.prompts[i],
                  seen[b] if seen else prompt_of(theirs, run.train[i].prompt), batch.rollout.response(b),
                  bool(batch.rollout.finished_B[b]), mode) for b, i in enumerate(batch.asked)]


def rand(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
