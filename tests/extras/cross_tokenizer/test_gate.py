"""The start gate asks for what the loss of the run can learn from, on a pair cut as Llama 3 and Mistral are: numbers in
groups of three digits on one side, digit by digit on the other.

tests/data/gsm8k_solutions.jsonl: the first 60 solutions of GSM8K's training set (Cobbe et al. 2021, MIT license).
"""
import json
import re

import pytest
import torch
from conftest import TESTS, write_checkpoint
from helpers import look, ready
from tokenizer_kinds import BYTES, WORDS
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from extras.cross_tokenizer.chunk_credit import CREDIT
from extras.cross_tokenizer.gate import check_tokenizers, coverage
from support.responses import from_responses
from support.errors import UserError
from teacher import Batch

SOLUTIONS = [json.loads(line)["solution"] for line in
             (TESTS / "data" / "gsm8k_solutions.jsonl").read_text(encoding="utf-8").splitlines()]


def three_digits() -> tuple[Tokenizer, str]:
    """Byte-level BPE that takes numbers three digits at a time, as Llama 3 does."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS.format(digits="{1,3}")), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(SOLUTIONS, trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return backend, "<|eot_id|>"


def one_digit() -> tuple[Tokenizer, str]:
    """SentencePiece-style BPE that takes every digit alone, as Mistral and Llama 2 do."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True),
                                                     pre_tokenizers.Split(Regex("(?=▁)"), "isolated")])
    backend.train_from_iterator(SOLUTIONS, trainers.BpeTrainer(vocab_size=700, show_progress=False))
    learnt = json.loads(backend.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *BYTES, *sorted(learnt["vocab"], key=learnt["vocab"].get)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [tuple(m) for m in learnt["merges"]],
                                   unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>"])
    return backend, "</s>"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    for seed, (name, build) in enumerate((("three", three_digits), ("one", one_digit))):
        backend, stop = build()
        backend.add_special_tokens([stop])
        write_checkpoint(root / name, seed, model_type="llama", vocab_size=1600, hidden_size=16, intermediate_size=16,
                         num_hidden_layers=1)
        backend.save(str(root / name / "tokenizer.json"))
        path = root / name / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 2048}))
        (root / name / "generation_config.json").write_text(json.dumps({"eos_token_id": backend.token_to_id(stop)}))
    rows = [{"problem": f"{i} + 1?", "answer": str(i + 1)} for i in range(len(SOLUTIONS))]
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def solving(digits, command, student, teacher, **flags):
    """The run of a student that answers with the solutions of GSM8K, in its own tokens."""
    run = ready(command, student=digits / student, teacher=digits / teacher, data=digits / "data.jsonl",
                eval_data=digits / "data.jsonl", samples=1, max_new_tokens=700,
                **{"divergence": "policy_gradient", **flags})
    ids = [run.tokenizer.encode(text) + [run.tokenizer.stop_ids[0]] for text in SOLUTIONS]
    rollout = from_responses([run.prompts[i] for i in range(len(ids))], ids, [True] * len(ids), "cpu")
    batch = Batch(rollout, list(range(len(ids))), run.train, True, 0, run.tokenizer)
    run.sources = [(lambda step: True, lambda run, step: batch)]
    return run


@pytest.mark.parametrize("student, teacher", [("one", "three"), ("three", "one")])
def test_one_digit_and_three_digit_tokenizers_train_with_chunk_credit_as_they_are(digits, command, capsys,
                                                                                  student, teacher):
    """fails if: the gate asks for 1:1 tokens where chunks of several tokens get credit too"""
    found = {}
    for mode in CREDIT:
        run = solving(digits, command, student, teacher, chunk_credit=mode)
        capsys.readouterr()
        try:
            check_tokenizers(run, None, None)
        except UserError as refused:
            assert mode == "strict"
            sentence = str(refused)
        found[mode] = float(re.search(r"([\d.]+)% get no credit", capsys.readouterr().out)[1]) / 100
    assert "of the student's tokens have a teacher token of their own, and --min_coverage is 70.0%" in sentence
    assert "--chunk_credit chunk" in sentence
    assert 0.4 < 1 - found.pop("strict") < 0.7 and max(found.values()) < 0.01


@pytest.mark.parametrize("divergence", ["reverse_kl", "gold", "uld"])
def test_a_dense_loss_asks_for_tokens_beside_a_distribution(digits, command, divergence):
    """fails if: credit, which a dense loss never sees, opens its gate"""
    run = solving(digits, command, "one", "three", divergence=divergence)
    look(run)
    crossing = run.teacher.crossing
    share, *_ = coverage(run.cfg, crossing)
    assert share == crossing.paired_N.double().mean() and crossing.scored_N.double().mean() > 0.99
    if divergence == "reverse_kl":
        assert share == crossing.metrics()["strict_coverage"] < 0.7
        with pytest.raises(UserError, match="have a teacher token of their own, .* learn from longer chunks too"):
            check_tokenizers(run, None, None)


@pytest.mark.parametrize("flags, words", [
    (dict(divergence="policy_gradient", chunk_credit="prop"), "get credit (--chunk_credit prop)"),
    (dict(divergence="policy_gradient", chunk_credit="strict"), "have a teacher token of their own"),
    (dict(divergence="reverse_kl"), "have a teacher token of their own"),
    (dict(divergence="gold"), "stand beside a distribution of the teacher (gold)")], ids=str)
def test_the_sentence_names_its_share(world, command, flags, words):
    """fails if: a user is told of another share than the one that is held against the flag"""
    run = ready(command, teacher=world / "foreign", min_coverage=1.0, max_new_tokens=9, **flags)
    with pytest.raises(UserError) as refused:
        check_tokenizers(run, None, None)
    assert f"of the student's tokens {words}, and --min_coverage is 100.0%" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_imitation_asks_no_coverage(world, command):
    """fails if: a loss that never asks the teacher about tokens is refused for tokens that it cannot score"""
    run = ready(command, teacher=world / "foreign", min_coverage=1.0, max_new_tokens=9, recipe="sft")
    check_tokenizers(run, None, None)


def test_a_probe_without_a_foreign_response_is_no_refusal(world, command):
    """fails if: none of none counts as nothing covered"""
    run = ready(command, teacher=world / "foreign", divergence="policy_gradient")
    look(run)
    crossing = run.teacher.crossing
    crossing.across_N = torch.zeros_like(crossing.across_N)
    assert coverage(run.cfg, crossing)[0] == 1.0
