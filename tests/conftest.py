"""The tiny world of the tests that run the whole loop: 20 tokens, a student and a teacher of one or two
layers.

Weights are scrambled, so that the two models disagree, answers are sometimes right and responses sometimes
stop. The models differ in family, width, depth, tying and padding rows, as published pairs do.
"""
import json
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TESTS = Path(__file__).resolve().parent
for folder in (TESTS, TESTS.parent):        # so that tests in any folder find conftest, helpers and the code
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
pytest.register_assert_rewrite("loss_reference", "signal_lists", "crossing_reference", "tokenizer_kinds",
                               "tokenizer_folders")
import losses  # noqa: E402
import model as model_file  # noqa: E402
import rollout  # noqa: E402
from model import MODELS  # noqa: E402
from model_cases import peer  # noqa: E402, F401 (a fixture)
from support.extras import load_extras  # noqa: E402
from support.model_config import ModelConfig  # noqa: E402
from tokenizer_folders import checkpoints  # noqa: E402, F401 (a fixture)

load_extras()       # an extra remembers at import the plain function that it replaces
from extras import fast, token_view  # noqa: E402
from extras.fast import flash as flash_file, graphs, ways  # noqa: E402

torch.set_num_threads(1)        # models this small lose more to waiting threads than they gain
CHARACTERS = "0123456789+-*=?#;"
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")
END = len(CHARACTERS)       # id of <|end|>
TINY = dict(problems=2, samples=2, max_new_tokens=6, steps=2, eval_k=1, eval_limit=2, eval_every=0,
            warmup_steps=0, device="cpu", name="a")


def write_checkpoint(folder, seed, **config):
    raw = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, **config)
    model, rng = MODELS[raw["model_type"]](ModelConfig.from_dict(raw)), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if "norm" in name else 0.0, 0.25, generator=rng)
    model.save(folder)
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(CHARACTERS)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": END, "top_p": 0.9}))


def write_pair(folder: Path) -> Path:
    """student/, teacher/, train.jsonl (10 problems) and test.jsonl (4), in a folder that is there."""
    write_checkpoint(folder / "student", 0, model_type="qwen3", vocab_size=24, hidden_size=16,
                     intermediate_size=24, num_hidden_layers=1, head_dim=8, tie_word_embeddings=True)
    write_checkpoint(folder / "teacher", 1, model_type="llama", vocab_size=32, hidden_size=24,
                     intermediate_size=32, num_hidden_layers=2)
    for name, problems in (("train", [(a, 3) for a in range(10)]), ("test", [(a, 5) for a in range(4)])):
        records = [{"problem": f"{a}+{b}" + "?" * (1 + a % 3), "answer": str((a + b) % 10),
                    "solution": f"{a}+{b}={(a + b) % 10}"} for a, b in problems]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture(scope="session")
def pair(tmp_path_factory):
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="session")
def world(pair):
    """pair, with teachers of other tokenizers."""
    from crossing_reference import write_world
    return write_world(pair)


@pytest.fixture
def command(pair, tmp_path):
    """command(lr=0.1, ...) -> the arguments of a tiny run in tmp_path/runs/a, which keywords change; None
    leaves a flag out, True gives it without a value."""
    def arguments(**flags):
        files = dict(student=pair / "student", teacher=pair / "teacher", data=pair / "train.jsonl",
                     eval_data=pair / "test.jsonl", runs=tmp_path / "runs")
        given = {key: value for key, value in {**files, **TINY, **flags}.items() if value is not None}
        return [part for key, value in given.items()
                for part in ([f"--{key}"] if value is True else [f"--{key}", str(value)])]
    return arguments


def reference_flash(q_NQH, k_MRH, v_MRH, at):
    """What the kernel computes, from its arguments alone, one sequence after the other."""
    out, group = torch.empty_like(q_NQH), q_NQH.shape[1] // k_MRH.shape[1]
    for s, (begin, end) in enumerate(zip(at.first_q[:-1].tolist(), at.first_q[1:].tolist())):
        first = int(at.first_k[s])
        used = int(at.first_k[s + 1]) - first if at.used_k is None else int(at.used_k[s])
        assert end - begin <= at.longest_q and used <= at.longest_k
        q_QnH = q_NQH[begin:end].transpose(0, 1)
        k_QmH, v_QmH = (x[first:first + used].transpose(0, 1).repeat_interleave(group, 0) for x in (k_MRH, v_MRH))
        scores = q_QnH @ k_QmH.mT / q_QnH.shape[2] ** 0.5
        # the last query sees the last key
        back = torch.arange(used - (end - begin), used)[:, None] - torch.arange(used)
        if at.used_k is None:
            scores = scores.masked_fill(back < 0, -torch.inf)
        if at.window >= 0:
            scores = scores.masked_fill(back > at.window, -torch.inf)
        out[begin:end] = (scores.softmax(-1) @ v_QmH).transpose(0, 1)
    return out


GRAPHS_ON_MODEL = graphs.on_model
PLAIN = [(rollout, "head_product"), (rollout, "respond"), (rollout.Slots, "decode"), (model_file, "masked_attention"),
         (model_file.Linear, "forward"), (losses, "few_rows")]
PLAIN = [(place, name, getattr(place, name)) for place, name in PLAIN]


@pytest.fixture(autouse=True)
def plain_ways(monkeypatch):
    """Each test begins with the plain functions of the core, whatever faster ones a model of an earlier test put in
    their place. The proof at start, half a second a run, is left to its own tests (tests/extras/test_ways.py), and so
    are the tokens that a run keeps for its report (tests/extras/test_token_view.py)."""
    monkeypatch.setattr(fast, "prove", lambda run, folder, state: None)
    monkeypatch.setattr(token_view, "begin", lambda run, folder, state: None)
    for place, name, function in PLAIN:
        setattr(place, name, function)
    ways.begin("")


@pytest.fixture
def flash(monkeypatch):
    """The paths of a GPU, with a slow and plain kernel, for every model that is loaded from now on (one that is there
    already: extras.fast.flash.on_model). Decode steps are launched one by one."""
    monkeypatch.setattr(flash_file, "flash_ready", lambda *_: True)
    monkeypatch.setattr(flash_file, "flash", reference_flash)
    monkeypatch.setattr(graphs, "on_model", lambda model: None)


@pytest.fixture
def gpu_paths(flash, monkeypatch):
    """Flash attention in slow motion, and CUDA graphs that note a step instead of running it, then run it when
    replayed. Returns the numbers of rows of the steps that were recorded, replayed, and run as they are."""
    recorded, replayed, launched, now, step = [], [], [], [], rollout.Slots.step

    class Graph:
        pools = []

        def capture_begin(self, *pool, capture_error_mode):
            self.pools.append(pool)
            now.append(self)

        def capture_end(self):
            now.pop()
            if hasattr(self, "noted"):      # else what was to be recorded raised an error
                recorded.append(self.noted[1])

        def replay(self):
            replayed.append(self.noted[1])
            step(*self.noted)

        def pool(self):
            return "pool"

    def step_or_note(pool, n):
        if now:
            now[0].noted = pool, n
        else:
            launched.append(n)
            step(pool, n)
    monkeypatch.setattr(graphs, "on_model", GRAPHS_ON_MODEL)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(rollout.Slots, "step", step_or_note)
    return recorded, replayed, launched
