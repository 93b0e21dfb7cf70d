"""The student's distribution over texts becomes that of a teacher with another tokenizer.

Both models look up the last token, so that all of it can be enumerated (crossing_reference.write_table).
"""
from itertools import product

import pytest
import torch
from crossing_reference import checkpoint, write_table
from helpers import adamw, close, jsonl, look, one_step, ready

STOP = 2


def tables(command, folder, student_table=None, teacher_table=None, **flags):
    """The run of a student over {a, b}, teacher over {b, a, ab}, both with a stop token. Tables are (last, next)."""
    config = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1)
    checkpoint(folder / "ab", 7, "ab", (), ("<|end|>",), ["<|end|>"], model_type="qwen3", vocab_size=3, head_dim=4,
               **config)
    checkpoint(folder / "ba", 8, "ba", ("a b",), ("</s>",), ["</s>"], model_type="llama", vocab_size=4, **config)
    data = jsonl(folder / "ab.jsonl", [dict(problem="b", answer="a")])
    run = ready(command, student=folder / "ab", teacher=folder / "ba", data=data, eval_data=data, problems=1,
                divergence="policy_gradient", **{**dict(samples=64, max_new_tokens=8), **flags})
    for model, table in ((run.student, student_table), (run.kind.models[0], teacher_table)):
        if table is not None:
            write_table(model, table)
    return run


def log_prob(model, vocab, sequences):
    """log-probs of token sequences after the prompt `b`, in one padded batch."""
    longest = max(map(len, sequences))
    padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in sequences])
    prompt = torch.full((len(sequences), 1), 1 if vocab == 3 else 0)
    with torch.no_grad():
        logp = (model(torch.cat([prompt, padded], 1))[:, :-1] @ model.head_weight()[:vocab].T).double().log_softmax(-1)
    there = torch.arange(longest) < torch.tensor([[len(ids)] for ids in sequences])
    return (logp.gather(2, padded[..., None]).squeeze(2) * there).sum(1)


def segmentations(text):
    """Every way to spell a text with the teacher's tokens b = 0, a = 1, ab = 2."""
    if not text:
        return [[]]
    tails = [[{"b": 0, "a": 1}[text[0]], *tail] for tail in segmentations(text[1:])]
    return tails + [[2, *tail] for tail in segmentations(text[2:])] if text[:2] == "ab" else tails


def text_kl(run):
    """KL(P_S || P_T) over all texts of at most 4 characters and one bucket for the longer ones; the teacher's
    probability of a text is summed over all its segmentations."""
    texts = ["".join(letters) for size in range(5) for letters in product("ab", repeat=size)]
    p = log_prob(run.student, 3, [["ab".index(c) for c in text] + [STOP] for text in texts]).exp()
    spelled = [(n, [*ids, 3]) for n, text in enumerate(texts) for ids in segmentations(text)]
    q = torch.zeros(len(texts)).double().index_add(0, torch.tensor([n for n, _ in spelled]),
                                                   log_prob(run.kind.models[0], 4, [ids for _, ids in spelled]).exp())
    p, q = (torch.cat([x, 1 - x.sum(0, keepdim=True)]) for x in (p, q))
    return (p * (p / q).log()).sum().item()


@pytest.mark.parametrize("mode", ["chunk", "prefix"])
def test_the_students_texts_become_the_teachers(command, tmp_path, mode):
    """fails if: credit has the wrong sign or lands on the wrong tokens: the exact divergence of the two
    distributions over texts would not fall"""
    table = torch.randn(4, 4, generator=torch.Generator().manual_seed(3))
    table[1, 0] = -30.0         # no b after a: like a trained model, it spells every text in one way
    run = tables(command, tmp_path, None, table.log_softmax(-1), lr=0.05, chunk_credit=mode, max_new_tokens=6)
    optimizer, before = adamw(run), text_kl(run)
    for step in range(40):
        one_step(run, optimizer, step)
    assert before > 0.3 and text_kl(run) < 0.3 * before


def test_a_teacher_of_the_same_texts_gives_no_credit(command, tmp_path):
    """fails if: log q of a response is not the sum over its chunks, or the stop token is left out: a teacher that
    writes the same texts in tokens of its own has nothing to say on average"""
    a, b, stop, never = 0.35, 0.35, 0.3, -30.0
    student = torch.tensor([[a, b, stop]] * 3).log()
    after = torch.tensor([b, a * (1 - b), a * b, stop]).log()      # next token b, a (and no b behind it), ab, stop
    after_a = torch.cat([torch.tensor([never]), (torch.tensor([a * (1 - b), a * b, stop]) / (1 - b)).log()])
    teacher = torch.stack([after, after_a, after, after])
    run = tables(command, tmp_path, student, teacher, samples=256, max_new_tokens=40)
    assert text_kl(run) == pytest.approx(0, abs=1e-5)
    batch, s, _ = look(run)
    assert batch.rollout.finished_B.all()
    own_B = torch.zeros(256).index_add(0, s.sequence_N, s.behavior_logp_N)
    close(s.teacher_total_B, own_B, 1e-4)
    found = run.teacher.crossing.metrics()
    assert found["chunks_of_2"] > 0.1 and abs(found["advantage_sum/shift"]) < 1e-5
    advantage_N = s.teacher_logp_N - s.behavior_logp_N
    assert abs(advantage_N.mean().item()) < 0.05 < advantage_N.abs().mean().item()
