"""The toy world: solutions are right, held-out problems are new, checkpoints are what make.py promises.

The files that ship are tested; what is pretrained here is tiny. Solutions are checked by an evaluator of
their own, which reads a problem by character and knows nothing of make.py.
"""
import json
import random
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "toy")]
import make  # noqa: E402
from eval import evaluate  # noqa: E402
from support.problems import load_problems  # noqa: E402
from support.tokenizer import Tokenizer  # noqa: E402
from support.verifier import grade  # noqa: E402
from support.weights import load_model  # noqa: E402

TOY = ROOT / "toy"
PAIRS = [(prefix + "train.jsonl", prefix + "test.jsonl") for prefix in ("", "mixed_")]
FILES = [name for pair in PAIRS for name in pair]
ASKED = {"bytes": "<|user|>3+8*2?<|assistant|>", "pieces": "<s>[INST] 3+8*2? [/INST]",
         "long_words": "<|im_start|>user\n3+8*2?<|im_end|>\n<|im_start|>assistant\n"}
ANSWERED = {"bytes": "3+8=1;1*2=2#2<|end|>", "pieces": "3+8=1;1*2=2#2</s>",
            "long_words": "3+8=1;1*2=2#2<|im_end|>\n"}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads gain nothing on tensors this small, and cost a factor of ten when the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def records(name):
    return [json.loads(line) for line in (TOY / name).read_text().splitlines()]


def results(problem):
    """Every running result of a problem, in order, by a table of its own."""
    total, found = int(problem[0]), []
    for place in range(1, len(problem) - 1, 2):
        digit = int(problem[place + 1])
        total = {"+": (total + digit) % 10, "-": (total + 10 - digit) % 10,
                 "*": sum(total for _ in range(digit)) % 10}[problem[place]]
        found.append(total)
    return found


def test_the_example_of_the_header():
    """fails if: a step is not modulo 10 (2-4 gives -2), or precedence is honoured (8*2 before 3+)."""
    assert make.write_out("3+8*2-4+1?") == ("3+8=1;1*2=2;2-4=8;8+1=9#9", [])
    assert make.write_out("3+8*2-4+1?")[0] in make.__doc__ and make.write_out("3+8*2?")[0] == "3+8=1;1*2=2#2"


@pytest.mark.parametrize("name", FILES)
def test_solutions_are_right(name):
    """fails if: a solution skips a step, a running result is wrong, or the answer is not the last result."""
    for record in records(name):
        problem, found, left = record["problem"], results(record["problem"]), record["problem"][0]
        steps = []
        for place, result in enumerate(found):
            steps.append(f"{left}{problem[1 + 2 * place]}{problem[2 + 2 * place]}={result}")
            left = result
        assert record["solution"] == f"{';'.join(steps)}#{found[-1]}"
        assert record["answer"] == str(found[-1])


@pytest.mark.parametrize("train, test", PAIRS)
def test_held_out_problems_are_new(train, test):
    """fails if: train and test share a problem, or a file holds one twice."""
    problems = [record["problem"] for name in (train, test) for record in records(name)]
    assert len(set(problems)) == len(problems)


def test_the_mixed_problems_are_new_to_the_student():
    """fails if: a problem of mixed_test.jsonl, where the specialists are judged, is in any training file."""
    trained = {record["problem"] for name in FILES if "train" in name for record in records(name)}
    assert not trained & {record["problem"] for record in records("mixed_test.jsonl")}


def test_counts_shape_and_operators():
    """fails if: a file is short, a problem has not five digits, or an operator is missing in a file."""
    for name, count in (("train.jsonl", make.N_TRAIN), ("test.jsonl", make.N_TEST)):
        problems = [record["problem"] for record in records(name)]
        assert len(problems) == count
        assert all(p[0::2][:5].isdigit() and p[-1] == "?" and len(p) == 10 for p in problems)
        shares = [sum(p.count(op) for p in problems) / (4 * count) for op in "+-*"]
        assert all(0.28 < share < 0.39 for share in shares), shares
    kinds = {record["kind"] for record in records("mixed_test.jsonl")}
    assert kinds == {"low", "high"}
    for record in (r for name in FILES if "mixed" in name for r in records(name)):
        assert set(record["problem"][1:-1:2]) <= set({"low": "+-", "high": "*"}[record["kind"]])


def test_problems_are_what_the_script_writes(tmp_path, monkeypatch):
    """fails if: the seed or the drawing in make.py changed and the files were not remade."""
    monkeypatch.setattr(make, "TOY", tmp_path)
    make.write_problems()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (TOY / name).read_bytes(), name


def test_problems_are_read_and_graded():
    """fails if: eval.py finds no answer in a record, or does not accept its solution."""
    problems = load_problems(TOY / "test.jsonl", need_answer=True)
    assert all(grade(p.solution, p.answer) for p in problems)
    assert not any(grade(p.solution[:-1] + str((int(p.answer) + 1) % 10), p.answer) for p in problems)


def test_slips_are_marked_and_followed_correctly():
    """fails if: a slip is unmarked, a marked place lies beside its slip, or the calculation returns to the
    right value after a slip instead of going on from what is written."""
    rng, n_slips = random.Random(0), 0
    for _ in range(500):
        problem, text, slips = make.stumbling(rng)
        value = problem[0]
        for number, step in enumerate(text[:-2].split(";")):
            wanted = value + problem[1 + 2 * number:3 + 2 * number] + "="
            wanted += str(results(step[:3] + "?")[0])
            odd = [6 * number + place for place in range(5) if step[place] != wanted[place]]
            assert set(odd) <= set(slips) and len(odd) <= 1
            n_slips += len(odd)
            value = step[4]
        assert text[-1] == value
    assert n_slips > 300        # of 2000 steps 3 in 10 have a slip, a few of which change nothing


def test_the_unreliable_teacher_takes_7_for_8_in_products_only():
    """fails if: `confused` touches sums, differences or other products, or is not consistent."""
    for left in range(10):
        assert make.confused(left, "*", 7) == left * 8 % 10 and make.confused(left, "*", 8) == left * 7 % 10
        for operator in "+-*":
            for right in (0, 1, 2, 3, 4, 5, 6, 9) if operator == "*" else range(10):
                assert make.confused(left, operator, right) == make.apply(left, operator, right)


def answers(name, problems):
    _, samples = evaluate(load_model(TOY / name), Tokenizer(TOY / name), problems, k=1, seed=0, temperature=1.0,
                          max_new_tokens=make.MAX_NEW_TOKENS, slots=200)
    return samples


def test_the_unreliable_teacher_errs_on_what_it_was_taught_wrong():
    """fails if: its errors are spread over all problems (then a verifier's sign says nothing about the teacher)."""
    problems = load_problems(TOY / "test.jsonl", need_answer=True)
    hit = [any(f"*{digit}" in p.prompt for digit in "78") for p in problems]
    right = [sample["correct"] for sample in answers("teacher_unreliable", problems)]
    assert sum(r for r, h in zip(right, hit) if h) < 0.35 * sum(hit)
    assert sum(r for r, h in zip(right, hit) if not h) > 0.97 * (len(hit) - sum(hit))


def test_self_is_right_when_it_is_shown_a_calculation():
    """fails if: the shown calculation is not used: a self-teacher that knows no more than the student."""
    problems = load_problems(TOY / "test.jsonl", need_answer=True, limit=100)
    shown = [replace(p, prompt=f"{p.solution}|{p.prompt}") for p in problems]
    assert sum(sample["correct"] for sample in answers("self", shown)) >= 95
    assert sum(sample["correct"] for sample in answers("self", problems)) <= 50


def test_untrained_places_are_outside_the_mask():
    """fails if: the mask is shifted by one, covers the prompt, leaves out the stop token or trains a slip."""
    tokenizer = Tokenizer(TOY / "teacher")
    example = ("1+2+3+4+5?", "1+2=9;9+3=2;2+4=6;6+5=1#1", [4])
    phase = make.Phase(1, 1e-3, {lambda rng: example: 1.0})
    tokens_BT, mask_BT = make.batch(phase, random.Random(0), tokenizer, set())
    trained = tokenizer.decode(tokens_BT[0][mask_BT[0]], skip_special=False)
    assert trained == "1+2=;9+3=2;2+4=6;6+5=1#1<|end|>"
    assert tokenizer.decode(tokens_BT[0][~mask_BT[0]]) == "1+2+3+4+5?9"


def test_a_word_that_a_slip_changed_is_not_trained():
    """fails if: untrained places are taken for tokens, a word is trained although a slip is in it, or one that ends
    early because of a slip (`1;` before a wrong digit, else `1;1`): the teacher would learn to make slips."""
    tokenizer, calculation = Tokenizer(TOY / "teacher_bpe"), "1+2=3;4*3=2;2-1=5;5+0=5#5"
    ids = tokenizer.encode(calculation)
    kept = make.trained(tokenizer, ids, [6, 16])
    assert [(tokenizer.decode([i]), k) for i, k in zip(ids, kept)] == [
        ("1", True), ("+2=", True), ("3;", False), ("4", False), ("*3=", True), ("2;2", True), ("-1=", False),
        ("5;5", False), ("+0=", True), ("5", True), ("#", True), ("5", True)]


def test_held_out_problems_are_never_trained_on():
    """fails if: batch() hands out a problem of the held-out set."""
    tokenizer, draws = Tokenizer(TOY / "teacher"), iter(["9+9+9+9+9?", "1+1+1+1+1?"] * 64)
    phase = make.Phase(1, 1e-3, {lambda rng: (next(draws), "#0", []): 1.0})
    tokens_BT, _ = make.batch(phase, random.Random(0), tokenizer, {"9+9+9+9+9?"})
    assert {tokenizer.decode(row)[:10] for row in tokens_BT} == {"1+1+1+1+1?"}


@pytest.mark.parametrize("name", make.CHECKPOINTS)
def test_tokenizer_round_trip(name):
    """fails if: a text does not come back, or a checkpoint's tokenizer is not the one that make.py names."""
    tokenizer, kind = Tokenizer(TOY / name), make.CHECKPOINTS[name].tokenizer
    for text in ("3+8*2-4+1?", "3+8=1;1*2=2#2", " two  spaces\n", "é, 数, 🙂"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert kind != "bytes" or len(tokenizer.encode(text)) == len(text.encode())
    assert [tokenizer.decode([i], skip_special=False) for i in tokenizer.stop_ids] == [make.TOKENIZERS[kind]()[1][0]]
    if kind == "bytes":
        assert tokenizer.encode("<|end|><|user|><|assistant|>") == [256, 257, 258]
        assert (tokenizer.vocab_size, tokenizer.stop_ids) == (259, (256,))


@pytest.mark.parametrize("name, words", [
    ("teacher_sp", "3 + 8 = 1 ;1 * 2 = 2 ;2 - 4 = 8 ;8 + 1 = 9 # 9"),
    ("teacher_bpe", "3 +8= 1;1 *2= 2;2 -4= 8;8 +1= 9 # 9")])
def test_another_tokenizer_cuts_a_calculation_elsewhere(name, words):
    """fails if: a merge is lost, or ranks below another that it should come before."""
    tokenizer = Tokenizer(TOY / name)
    ids = tokenizer.encode("3+8=1;1*2=2;2-4=8;8+1=9#9")
    assert [tokenizer.decode([i]) for i in ids] == words.split()


def test_a_character_without_a_piece_is_written_in_bytes():
    """fails if: byte_fallback is off (then it is <unk>), or a piece <0xHH> has another id than 3 + the byte."""
    assert Tokenizer(TOY / "teacher_sp").encode("é") == [3 + byte for byte in "é".encode()]


@pytest.mark.parametrize("name", ["teacher", "teacher_sp", "teacher_bpe"])
def test_transformers_reads_the_tokenizer_alike(name):
    """fails if: transformers cannot read the files, or cuts a text or renders a chat otherwise."""
    transformers = pytest.importorskip("transformers")
    ours, theirs = Tokenizer(TOY / name), transformers.AutoTokenizer.from_pretrained(TOY / name)
    for text in ("3+8=1;1*2=2#2", " é, 数"):
        assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    chat = [{"role": "user", "content": "3+8*2?"}]
    assert theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False) == ours.prompt_ids(chat)
    assert theirs.eos_token_id == ours.stop_ids[0]


@pytest.mark.parametrize("name", make.CHECKPOINTS)
def test_chat_template(name):
    """fails if: a turn is rendered otherwise than it was trained, the prompt does not end where the answer begins,
    or the assistant's turn is not closed."""
    tokenizer, kind = Tokenizer(TOY / name), make.CHECKPOINTS[name].tokenizer
    chat = [{"role": "user", "content": "3+8*2?"}, {"role": "assistant", "content": "3+8=1;1*2=2#2"}]
    assert tokenizer.render(chat[:1]) == ASKED[kind]
    assert tokenizer.render(chat, add_generation_prompt=False) == ASKED[kind] + ANSWERED[kind]
    assert tokenizer.prompt_ids("3+8*2?") == tokenizer.encode(ASKED[kind])


@pytest.mark.parametrize("name", make.CHECKPOINTS)
def test_accuracy_is_as_promised(name):
    """fails if: a checkpoint does not load, was trained on another tokenizer, lies outside the range that
    make.py promises (widened by 3 standard errors of 50 problems, at most 0.1), or does not stop on problems
    that it knows. Half of the specialists' problems are strange to them: there they may ramble."""
    c, tokenizer, model = make.CHECKPOINTS[name], Tokenizer(TOY / name), load_model(TOY / name)
    assert model.disk_dtype == torch.bfloat16
    assert 0 < model.config.vocab_size - tokenizer.vocab_size <= 8
    problems = load_problems(TOY / c.test, need_answer=True, limit=50)
    metrics, _ = evaluate(model, tokenizer, problems, k=4, seed=1, temperature=1.0,
                          max_new_tokens=make.MAX_NEW_TOKENS, slots=200)
    low, high = c.accuracy
    spread = 3 * (metrics["avg@4"] * (1 - metrics["avg@4"]) / 50) ** 0.5
    assert low - min(spread, 0.1) <= metrics["avg@4"] <= high + min(spread, 0.1), metrics["avg@4"]
    assert c.test != "test.jsonl" or metrics["truncation_rate"] <= 0.02


def test_the_student_answers_directly():
    """fails if: the student is replaced by one that always writes out (nothing to be reminded of), or by one
    that never does (nothing to remind it of)."""
    tokenizer, problems = Tokenizer(TOY / "student"), load_problems(TOY / "test.jsonl", limit=100)
    _, samples = evaluate(load_model(TOY / "student"), tokenizer, problems, k=4, seed=0, temperature=1.0,
                          max_new_tokens=make.MAX_NEW_TOKENS, slots=400)
    assert 0.03 < sum("=" in sample["text"] for sample in samples) / len(samples) < 0.3


def teacher_reads(examples):
    """(the teacher's probabilities (B, T, V) at each response token, those tokens (B, T), trained (B, T))."""
    tokenizer, model = Tokenizer(TOY / "teacher"), load_model(TOY / "teacher")
    prompts = [tokenizer.prompt_ids(problem) for problem, _, _ in examples]
    ids = torch.tensor([p + tokenizer.encode(text) + [256] for p, (_, text, _) in zip(prompts, examples)])
    start = len(prompts[0])
    with torch.no_grad():
        p_BTV = model.logits(model(ids)[:, start - 1:-1])[..., :tokenizer.vocab_size].softmax(-1)
    trained_BT = torch.ones(ids[:, start:].shape, dtype=torch.bool)
    for row, (_, _, untrained) in enumerate(examples):
        trained_BT[row, untrained] = False
    return p_BTV, ids[:, start:], trained_BT


def test_the_teacher_goes_on_from_a_wrong_step():
    """fails if: the teacher was never shown slips. Then 2 % of the results that follow one are wrong, instead
    of 0.6 %: few, since a step after a slip looks like any other, but students learn from these scores."""
    rng = random.Random(7)
    p_BTV, token_BT, trained_BT = teacher_reads([make.stumbling(rng) for _ in range(1000)])
    p_BT = p_BTV.gather(2, token_BT[..., None])[..., 0]
    after_BT = trained_BT & ((~trained_BT).cumsum(1) > 0)
    result_BT = after_BT & (torch.arange(p_BT.shape[1]) % 6 == 4)
    assert result_BT.sum() > 1000 and (p_BT[result_BT] < 0.5).float().mean() < 0.012
    assert (p_BT[after_BT] < 0.5).float().mean() < 0.002


def test_the_teacher_knows_that_a_direct_answer_is_a_guess():
    """fails if: `#` as a first token is trained (then the teacher answers directly), or the teacher never saw
    what follows it: then it is sure of a digit (0.2 nats) that is wrong five times in six."""
    rng = random.Random(7)
    p_BTV, token_BT, _ = teacher_reads([make.blurted(rng) for _ in range(200)])
    assert p_BTV.gather(2, token_BT[..., None])[:, 0].max() < 0.01
    entropy_B = torch.special.entr(p_BTV[:, 1]).sum(-1)
    assert entropy_B.mean() > 1.5


def test_checkpoints_hold_only_data_and_are_small():
    """fails if: toy/ grows beyond 8 MB, a folder of an interrupted run stays behind, or a file that could be
    executed is among a checkpoint's."""
    files = [path for path in TOY.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 8_000_000
    assert {path.name for path in TOY.iterdir() if path.is_dir()} - {"__pycache__"} == set(make.CHECKPOINTS)
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".py"}
    assert sorted(path for path in files if path.suffix == ".py") == [
        TOY / name for name in ("dry_pair.py", "families.py", "made.py", "make.py")]


def test_a_missed_promise_changes_nothing(tmp_path, monkeypatch):
    """fails if: make() replaces the folder before it has measured, or does not say that it missed."""
    untrained = make.Checkpoint(32, 1, 0, [make.Phase(1, 1e-3, {make.direct: 1.0})], (0.99, 1.0))
    monkeypatch.setattr(make, "TOY", tmp_path)
    monkeypatch.setattr(make, "CHECKPOINTS", {"x": untrained})
    monkeypatch.setattr(make, "N_TEST", 4)
    held_out = make.write_problems()
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("kept")
    with pytest.raises(SystemExit, match="misses its promise"):
        make.make("x", held_out)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["old"]


def test_one_seed_gives_the_same_bytes(tmp_path, monkeypatch):
    """fails if: first weights or examples depend on more than the checkpoint's seed, or a leftover stays."""
    phase = make.Phase(3, 1e-3, {make.direct: 0.5, make.stumbling: 0.5})
    tiny = make.Checkpoint(32, 1, 0, [phase], (0.0, 1.0))
    monkeypatch.setattr(make, "TOY", tmp_path)
    monkeypatch.setattr(make, "CHECKPOINTS", {"x": tiny})
    monkeypatch.setattr(make, "N_TEST", 4)
    held_out, weights = make.write_problems(), []
    for _ in range(2):
        torch.rand(3), random.random()
        make.make("x", held_out)
        weights.append((tmp_path / "x" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["x"]
