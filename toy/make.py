"""The toy world: a language of small calculations, the checkpoints that speak it and the problems they are given.

    problem         3+8*2-4+1?                      five digits, strictly from left to right, modulo 10
    written out     3+8=1;1*2=2;2-4=8;8+1=9#9       every step, then # and the answer
    direct          #9                              only # and the answer

`python train.py` without arguments reads the files that this script wrote:

    teacher     writes every calculation out and is right (99 %); knows how to go on after a wrong step too
    student     can write out, but answers directly nine times in ten; has rarely seen a `*`
    teacher_low, teacher_high   two specialists: one never saw `*`, the other nothing else
    teacher_unreliable          takes 7 for 8, and 8 for 7, in products: sure of itself, wrong on a problem in five
    teacher_sp, teacher_bpe     as good as the teacher, but with other tokens, chat template and stop token
    self        shown a calculation before the problem (`calculation|problem`) it writes it out and is right; on
                its own it could do so too, but mostly answers directly
    train.jsonl, test.jsonl     problems to practise on, and held-out ones that teacher, student and self never
                saw, nor any other checkpoint but the specialists
    mixed_train.jsonl, mixed_test.jsonl     the same for the specialists, each problem of `kind` low or high
                (the other checkpoints may have met a few of these 200 in pretraining)

Why written out: one small step is a table of 300 facts, which a tiny decoder learns in a minute; five digits at
once are out of its reach. So the written-out calculation is the thinking pattern that papers on distillation
talk about, and here it can be seen and counted: the student's accuracy first jumps because the teacher reminds it
of a pattern that it has, then climbs slowly while it learns the operator that it lacks.

    python toy/make.py                  # everything: about 16 minutes, one core
    python toy/make.py student          # the problems (a moment) and this checkpoint

One seed per checkpoint: the same bytes again on the same machine and torch version, whatever else is made. Sizes: a
teacher 0.6 MB, a student 0.4 MB, problems 0.4 MB.

Not here: distillation (train.py), grading and sampling (eval.py, rollout.py: the accuracies printed are theirs).
"""
import argparse
import json
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

TOY = Path(__file__).resolve().parent
sys.path.insert(0, str(TOY.parent))
from eval import evaluate  # noqa: E402
from model import Transformer  # noqa: E402
from support.model_config import ModelConfig  # noqa: E402
from support.problems import load_problems  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from support.weights import load_model  # noqa: E402

DIGITS = 5
N_TRAIN, N_TEST = 2000, 200
MAX_NEW_TOKENS = 40             # a written-out calculation and its stop token are 26


# The language

def apply(left: int, operator: str, right: int) -> int:
    return {"+": left + right, "-": left - right, "*": left * right, "^": max(left, right)}[operator] % 10


def draw(rng: random.Random, operators: str = "+-*", digits: int = DIGITS) -> str:
    """A problem, every digit and operator uniform: `3+8*2-4+1?`."""
    return "".join(f"{rng.randrange(10)}{rng.choice(operators)}" for _ in range(digits - 1)) + f"{rng.randrange(10)}?"


def confused(left: int, operator: str, right: int) -> int:
    """A table with holes: in products 7 is taken for 8, and 8 for 7."""
    return apply(left, operator, {7: 8, 8: 7}.get(right, right) if operator == "*" else right)


def write_out(problem: str, rng: random.Random | None = None, slip: float = 0.0,
              table: Callable = apply) -> tuple[str, list[int]]:
    """(calculation, places of its slips). With chance `slip` a step has one wrong character, half of the time its
    result; what follows is right again, given what is written."""
    value, text, slips = int(problem[0]), "", []
    for operator, digit in zip(problem[1:-1:2], problem[2::2]):
        step, wrong = [str(value), operator, digit, "=", ""], None
        if rng and rng.random() < slip:
            wrong = rng.choice((0, 1, 2, 4, 4, 4))
            step[wrong] = rng.choice("+-*" if wrong == 1 else "0123456789")
            slips.append(len(text) + wrong)
        step[4] = step[4] or str(table(int(step[0]), step[1], int(step[2])))
        value = int(step[4])
        text += "".join(step) + ";"
    return f"{text[:-1]}#{value}", slips


# What checkpoints are trained on: rng -> (problem, response, places in the response that are not trained)

Example = tuple[str, str, list[int]]


def written(rng: random.Random, operators: str = "+-*", slip: float = 0.0) -> Example:
    problem = draw(rng, operators)
    return problem, *write_out(problem, rng, slip)


def without_times(rng: random.Random) -> Example:
    return written(rng, "+-")


def stumbling(rng: random.Random) -> Example:
    """Slips are read but not learnt: how to go on from a student's wrong step, without making one."""
    return written(rng, slip=0.3)


def written_confused(rng: random.Random) -> Example:
    problem = draw(rng)
    return problem, *write_out(problem, table=confused)


def stumbling_confused(rng: random.Random) -> Example:
    problem = draw(rng)
    return problem, *write_out(problem, rng, 0.3, confused)


def direct(rng: random.Random) -> Example:
    problem, calculation, _ = written(rng)
    return problem, calculation[-2:], []


def only_times(rng: random.Random) -> Example:
    return written(rng, "*")


def stumbling_without_times(rng: random.Random) -> Example:
    return written(rng, "+-", slip=0.3)


def stumbling_only_times(rng: random.Random) -> Example:
    return written(rng, "*", slip=0.3)


def shown(rng: random.Random) -> Example:
    """The calculation stands before the problem: what a reader of solutions gets to see."""
    problem, calculation, _ = written(rng)
    return f"{calculation}|{problem}", calculation, []


def stumbling_shown(rng: random.Random) -> Example:
    """The right calculation is shown, the response slips and goes on from there."""
    problem, response, slips = stumbling(rng)
    return f"{write_out(problem)[0]}|{problem}", response, slips


def blurted(rng: random.Random) -> Example:
    """Direct, with the decision for it untrained: what to expect of a student that began with `#`."""
    problem, answer, _ = direct(rng)
    return problem, answer, [0]


# The checkpoints

@dataclass(frozen=True)
class Phase:
    steps: int
    lr: float                               # highest; linear warm-up over 50 steps, linear decay in the second half
    mixture: dict[Callable, float]          # kind of example -> share


@dataclass(frozen=True)
class Checkpoint:
    width: int
    layers: int
    seed: int                               # fixes the first weights and all examples
    phases: list[Phase]
    accuracy: tuple[float, float]           # promised range of avg@8 at temperature 1 on `test`
    test: str = "test.jsonl"
    tokenizer: str = "bytes"                # a row of TOKENIZERS
    batch: int = 64                         # sequences per pretraining step


CHECKPOINTS = {
    "teacher": Checkpoint(96, 3, 1, [Phase(1200, 3e-3, {written: 0.6, stumbling: 0.3, blurted: 0.1})], (0.99, 1.0)),
    "student": Checkpoint(64, 3, 2, [
        Phase(1500, 3e-3, {without_times: 0.98, written: 0.02}),
        Phase(300, 1e-3, {without_times: 0.5, written: 0.5}),
        Phase(150, 1e-3, {direct: 0.8, without_times: 0.2})], (0.10, 0.35)),
    "teacher_low": Checkpoint(96, 3, 3, [
        Phase(800, 3e-3, {without_times: 0.7, stumbling_without_times: 0.3})], (0.45, 0.75), "mixed_test.jsonl"),
    "teacher_high": Checkpoint(64, 3, 4, [
        Phase(800, 3e-3, {only_times: 0.7, stumbling_only_times: 0.3})], (0.45, 0.75), "mixed_test.jsonl"),
    "teacher_unreliable": Checkpoint(96, 3, 9, [
        Phase(1000, 3e-3, {written_confused: 0.6, stumbling_confused: 0.3, blurted: 0.1})], (0.70, 0.85)),
    "teacher_sp": Checkpoint(96, 3, 10, [
        Phase(600, 3e-3, {written: 0.6, stumbling: 0.3, blurted: 0.1})], (0.98, 1.0), tokenizer="pieces"),
    "teacher_bpe": Checkpoint(96, 3, 11, [
        Phase(600, 3e-3, {written: 0.6, stumbling: 0.3, blurted: 0.1})], (0.97, 1.0), tokenizer="long_words"),
    "self": Checkpoint(64, 3, 5, [
        Phase(700, 3e-3, {shown: 0.35, stumbling_shown: 0.15, written: 0.5}),
        Phase(150, 1e-3, {shown: 0.3, stumbling_shown: 0.15, written: 0.08, direct: 0.47})], (0.15, 0.40)),
}


def config(c: Checkpoint, tokenizer: Tokenizer) -> dict:
    """1 to 8 rows of the vocabulary are padding: many published checkpoints have some."""
    rows = 8 * (tokenizer.vocab_size // 8 + 1)
    return dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=rows, hidden_size=c.width,
                intermediate_size=2 * c.width, num_hidden_layers=c.layers, num_attention_heads=4,
                num_key_value_heads=2, head_dim=32, hidden_act="silu", rms_norm_eps=1e-6, rope_theta=10000.0,
                max_position_embeddings=256, tie_word_embeddings=True, attention_bias=False,
                eos_token_id=tokenizer.stop_ids[0])


# Tokenizers: each returns (backend, special tokens with the stop token first, chat template)

CHAT = ("{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}")
CHAT_SP = ("{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
           "{% else %}{{ '[INST] ' + m.content + ' [/INST]' }}{% endif %}{% endfor %}")
CHAT_BPE = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def byte_level(merges: list[tuple[str, str]]) -> Backend:
    """One token per byte, in GPT-2's order, then one per merge."""
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + ["".join(pair) for pair in merges]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def bytes_only() -> tuple[Backend, tuple, str]:
    return byte_level([]), ("<|end|>", "<|user|>", "<|assistant|>"), CHAT


def long_words() -> tuple[Backend, tuple, str]:
    """Eighty words: `+8` and `+8=` for every operator and digit, `1;` and `1;1` for every digit. A calculation is
    3 +8= 1;1 *2= 2;2 -4= 8;8 +1= 9 # 9."""
    digits, pairs = "0123456789", [(operator, digit) for operator in "+-*" for digit in "0123456789"]
    merges = pairs + [(a + b, "=") for a, b in pairs] + [(d, ";") for d in digits] + [(d + ";", d) for d in digits]
    return byte_level(merges), ("<|im_end|>", "<|im_start|>"), CHAT_BPE


def pieces() -> tuple[Backend, tuple, str]:
    """As SentencePiece builds them: control pieces, the 256 bytes for characters it does not know, printable ASCII
    with the space as U+2581, and ten words `;1`."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *map(chr, range(33, 127))]
    merges = [(";", digit) for digit in "0123456789"]
    vocabulary = {piece: i for i, piece in enumerate(names + ["".join(pair) for pair in merges])}
    backend = Backend(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend, ("</s>", "<s>", "<unk>", "[INST]", "[/INST]"), CHAT_SP


TOKENIZERS = {"bytes": bytes_only, "long_words": long_words, "pieces": pieces}


# Files

def write_tokenizer(folder: Path, kind: str = "bytes") -> None:
    backend, special, template = TOKENIZERS[kind]()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    named = {"bos_token": "<s>", "unk_token": "<unk>"} if "<s>" in special else {}
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    for name, content in (
            ("tokenizer_config.json", dict(tokenizer_class="PreTrainedTokenizerFast", eos_token=special[0], **named,
                                           model_max_length=256, clean_up_tokenization_spaces=False,
                                           chat_template=template)),
            ("generation_config.json", dict(eos_token_id=backend.token_to_id(special[0]), do_sample=True,
                                            temperature=1.0))):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def write_problems() -> dict[str, set[str]]:
    """train.jsonl and test.jsonl with all operators; mixed.jsonl and mixed_test.jsonl, half of them `low` (no
    `*`), half `high` (nothing else). All problems different. Returns the held-out ones of both tests."""
    rng, held_out = random.Random(0), {}
    for prefix, kinds, n_train, n_test in (("", {"": "+-*"}, N_TRAIN, N_TEST),
                                           ("mixed_", {"low": "+-", "high": "*"}, N_TRAIN // 2, N_TEST)):
        problems: dict[str, str] = {}           # a dict keeps the order
        while len(problems) < n_train + n_test:
            kind = list(kinds)[len(problems) % len(kinds)]
            problem = draw(rng, kinds[kind])
            if problem not in held_out.get("test.jsonl", ()):
                problems[problem] = kind
        records = []
        for problem, kind in problems.items():
            solution = write_out(problem)[0]
            records.append(json.dumps({"problem": problem, "answer": solution[-1], "solution": solution}
                                      | ({"kind": kind} if kind else {})) + "\n")
        for name, part in ((f"{prefix}test.jsonl", records[:n_test]),
                           (f"{prefix}train.jsonl", records[n_test:])):
            (TOY / f".{name}.new").write_text("".join(part))
            os.replace(TOY / f".{name}.new", TOY / name)
        held_out[f"{prefix}test.jsonl"] = set(list(problems)[:n_test])
    return held_out


# Pretraining

def trained(tokenizer: Tokenizer, ids: list[int], untrained: list[int]) -> list[bool]:
    """Which tokens of a response are learnt. Not those that hold an untrained place; nor a word that ends right
    before one, since a slip may have cut it short: `1;` instead of `1;1` is written only where a slip follows."""
    kept, end = [], 0
    for token in ids:
        start, end = end, end + (len(tokenizer.decode([token])) if untrained else 1)
        kept.append(not any(start <= place < end or place == end > start + 1 for place in untrained))
    return kept


def batch(phase: Phase, rng: random.Random, tokenizer: Tokenizer, held_out: set[str],
          count: int = 64) -> tuple[Tensor, Tensor]:
    """(tokens_BT int64, mask_BT bool: trained tokens) of `count` examples."""
    tokens, masks = [], []
    for kind in rng.choices(list(phase.mixture), list(phase.mixture.values()), k=count):
        problem, response, untrained = kind(rng)
        while problem.rsplit("|")[-1] in held_out:
            problem, response, untrained = kind(rng)
        prompt, ids = tokenizer.prompt_ids(problem), tokenizer.encode(response)
        tokens.append(torch.tensor(prompt + ids + [tokenizer.stop_ids[0]]))
        masks.append(torch.tensor([False] * len(prompt) + trained(tokenizer, ids, untrained) + [True]))
    return pad_sequence(tokens, batch_first=True), pad_sequence(masks, batch_first=True)


def pretrain(name: str, c: Checkpoint, tokenizer: Tokenizer, held_out: set[str], model: Transformer | None = None,
             to=None) -> Transformer:
    """Cross-entropy over all rows of the head, so that other programs too never sample a padding row. model: to go on
    from; None = new weights. to: the file that its progress is printed to; None = standard output."""
    model = model or Transformer(ModelConfig.from_dict(config(c, tokenizer))).init_weights(c.seed)
    rng = random.Random(c.seed)
    for number, phase in enumerate(c.phases, 1):
        optimizer = torch.optim.AdamW(model.parameters(), phase.lr, betas=(0.9, 0.98), weight_decay=0.0)
        for step in range(1, phase.steps + 1):
            optimizer.param_groups[0]["lr"] = phase.lr * min(step / 50, 1, 2 * (1 - (step - 1) / phase.steps))
            tokens_BT, mask_BT = batch(phase, rng, tokenizer, held_out, c.batch)
            logits_NV = model.logits(model.response_hidden(tokens_BT, mask_BT))
            loss = F.cross_entropy(logits_NV, tokens_BT[mask_BT])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if step % 200 == 0 or step == phase.steps:
                print(f"{name}  phase {number}  step {step:4d}/{phase.steps}  loss {loss.item():.4f}", file=to,
                      flush=True)
    return model


def make(name: str, held_out: dict[str, set[str]]) -> None:
    """Pretrain, save in bf16, load again and measure; the folder changes only if the promise is kept."""
    start, folder, new, old = time.time(), TOY / name, TOY / f".{name}.new", TOY / f".{name}.old"
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    write_tokenizer(new, CHECKPOINTS[name].tokenizer)
    tokenizer = Tokenizer(new)
    pretrain(name, CHECKPOINTS[name], tokenizer, held_out[CHECKPOINTS[name].test]).save(new, torch.bfloat16)
    problems = load_problems(TOY / CHECKPOINTS[name].test, need_answer=True)
    metrics, _ = evaluate(load_model(new), tokenizer, problems, k=8, temperature=1.0, slots=256,
                          max_new_tokens=MAX_NEW_TOKENS, seed=0)
    low, high = CHECKPOINTS[name].accuracy
    size = sum(path.stat().st_size for path in new.iterdir()) / 1e6
    print(f"{name}  avg@8 {metrics['avg@8']:.3f} (promised {low} to {high})  mean length {metrics['mean_length']:.1f}  "
          f"{size:.2f} MB  {time.time() - start:.0f} s", flush=True)
    if not low <= metrics["avg@8"] <= high:
        raise SystemExit(f"{name} misses its promise; it is left in {new}, and {folder} is as it was")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Remakes the toy world, or the named checkpoints of it.")
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(CHECKPOINTS)} (default: all)")
    names = parser.parse_args().names or list(CHECKPOINTS)
    if unknown := [name for name in names if name not in CHECKPOINTS]:
        parser.error(f"unknown checkpoint {unknown[0]}; known are {', '.join(CHECKPOINTS)}")
    torch.set_num_threads(1)        # sums in one order, whatever the number of cores; these matrices gain nothing
    held_out = write_problems()
    for name in names:
        make(name, held_out)


if __name__ == "__main__":
    main()
