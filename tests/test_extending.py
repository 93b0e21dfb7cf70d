"""The examples of docs/extending.md, each put into a copy of the project as its reader would, and run."""
import json
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = dict(re.findall(r"```python\n# extras/(\w+)\.py\n(.*?)```", (ROOT / "docs/extending.md").read_text(),
                           re.DOTALL))
SMALL = "--problems 4 --steps 2 --eval_limit 2 --eval_k 1 --eval_every 0 --max_new_tokens 24 --threads 1 --device cpu"


def copy_of(tmp_path, *examples):
    """The project with these examples in extras/, first in its list."""
    left_out = shutil.ignore_patterns(".git", "runs", ".venv", "tests", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "copy", ignore=left_out)
    listed = tmp_path / "copy/extras/__init__.py"
    for name in examples:
        (tmp_path / f"copy/extras/{name}.py").write_text(EXAMPLES[name])
        text = listed.read_text().replace("ALL = [", f"ALL = [{name}, ", 1)
        listed.write_text(text.replace("ALL = [", f"from extras import {name}  # noqa: E402\nALL = [", 1))
    return tmp_path / "copy"


def train(copy, *flags):
    done = subprocess.run([sys.executable, "train.py", *SMALL.split(), "--name", "x", *flags], cwd=copy, text=True,
                          capture_output=True, env={"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}, timeout=240)
    assert "Traceback" not in done.stderr, done.stderr
    return done


def losses_of(copy, name="x"):
    lines = (copy / f"runs/{name}/metrics.jsonl").read_text().splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


def test_the_document_holds_the_six_examples():
    assert set(EXAMPLES) == {"hellinger", "sure", "gemma", "muon", "http_teacher", "choices"}


def test_a_loss_trains_with_either_kind_of_teacher(tmp_path):
    """fails if: the new divergence is no choice of its flag, or is wrong or refused across tokenizers"""
    copy = copy_of(tmp_path, "hellinger")
    for flags in ((), ("--teacher", "toy/teacher_bpe", "--min_coverage", "0", "--fresh")):
        assert train(copy, "--divergence", "hellinger", *flags).returncode == 0
        assert all(0 < loss < 1 for loss in losses_of(copy))


def test_a_weight_reads_its_new_signal_and_is_refused_where_no_teacher_gives_it(tmp_path):
    """fails if: the signal is constant, or zeros fill it in across tokenizers"""
    copy = copy_of(tmp_path, "sure")
    assert train(copy, "--weight", "sure").returncode == 0
    record = json.loads((copy / "runs/x/metrics.jsonl").read_text().splitlines()[2])
    assert 0.2 < record["weight"] < 1
    refused = train(copy, "--weight", "sure", "--recipe", "xtok", "--fresh")
    assert refused.returncode == 2 and refused.stderr.count("error:") == 1 and "--weight sure" in refused.stderr


def test_a_family_gives_the_logits_of_transformers(tmp_path):
    """A random Gemma written by transformers. fails if: a norm's weight lies about 1, or decoding differs"""
    transformers = pytest.importorskip("transformers")
    copy = copy_of(tmp_path, "gemma")
    config = transformers.GemmaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, head_dim=10,
                                      max_position_embeddings=64)
    torch.manual_seed(0)
    theirs = transformers.GemmaForCausalLM(config).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.1 * torch.randn_like(p))
    theirs.save_pretrained(tmp_path / "gemma")
    tokens = torch.randint(0, 40, (2, 9))
    with torch.no_grad():
        expected = theirs(tokens).logits
    torch.save((tokens, expected), tmp_path / "expected.pt")
    code = ("import sys, torch, train; from support.weights import load_model; from rollout import generate\n"
            "tokens, expected = torch.load(sys.argv[2]); model = load_model(sys.argv[1])\n"
            "assert torch.allclose(model.logits(model(tokens)), expected, atol=1e-4)\n"
            "out = generate(model, tokens.tolist(), max_new_tokens=5, stop_ids=())\n"
            "hidden = model.response_hidden(out.tokens_BT, out.mask_BT)\n"
            "logp = model.logits(hidden).log_softmax(-1).gather(1, out.rows(out.tokens_BT)[:, None]).squeeze(1)\n"
            "assert torch.allclose(logp, out.rows(out.logp_BT), atol=1e-4)\n")
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "gemma"), str(tmp_path / "expected.pt")],
                          cwd=copy, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_another_optimizer_trains_and_goes_on_exactly(tmp_path):
    """Steps 1-2, then 3-4 by a second process, against four steps in one. fails if: moments are lost or swapped"""
    copy = copy_of(tmp_path, "muon")
    assert train(copy, "--steps", "4", "--name", "whole").returncode == 0
    stopping = copy / "stop.py"
    stopping.write_text("import os, signal, sys, train\nreal = train.train_step\n"
                        "def step(run, optimizer, number, clock):\n"
                        "    if number == 1: os.kill(os.getpid(), signal.SIGTERM)\n"
                        "    return real(run, optimizer, number, clock)\n"
                        "train.train_step = step\nsys.exit(train.main(sys.argv[1:]))\n")
    flags = [*SMALL.split(), "--steps", "4", "--name", "parts"]
    first = subprocess.run([sys.executable, "stop.py", *flags], cwd=copy, capture_output=True, text=True, timeout=240)
    assert first.returncode == 143, first.stderr
    assert train(copy, "--steps", "4", "--name", "parts").returncode == 0
    assert losses_of(copy, "parts") == losses_of(copy, "whole") and len(losses_of(copy, "whole")) == 4


def test_a_teacher_behind_http_gives_the_losses_of_the_same_model_here(tmp_path):
    """fails if: a position is off by one, or a loss that it cannot serve is not refused"""
    sys.path.insert(0, str(ROOT))
    from support.weights import load_model
    model = load_model(ROOT / "toy/teacher")

    class Server(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["ids"]
            rows = []
            for ids in asked:
                with torch.no_grad():
                    logp = model.logits(model(torch.tensor([ids])))[0].log_softmax(-1)
                rows.append([0.0] + [logp[t, i].item() for t, i in enumerate(ids[1:])])
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"logprobs": rows}).encode())

        def log_message(self, *args):
            pass
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url, copy = f"http://127.0.0.1:{server.server_port}", copy_of(tmp_path, "http_teacher")
    try:
        done = train(copy, "--divergence", "policy_gradient", "--teacher", url, "--no-eval_teacher")
        assert done.returncode == 0, done.stderr
        assert train(copy, "--divergence", "policy_gradient", "--no-eval_teacher", "--name", "here").returncode == 0
        assert losses_of(copy) == pytest.approx(losses_of(copy, "here"), rel=1e-4)
        refused = train(copy, "--teacher", url, "--name", "y")
        assert refused.returncode == 2 and "policy_gradient" in refused.stderr
    finally:
        server.shutdown()


def test_a_data_format_is_read(tmp_path):
    """fails if: options or answer are lost"""
    copy = copy_of(tmp_path, "choices")
    (copy / "q.jsonl").write_text(json.dumps({"stem": "1*2?", "options": ["2", "3"], "key": 0}) + "\n")
    code = ("import train; from support.problems import load_problems; (p,) = load_problems('q.jsonl')\n"
            "assert p.answer == 'A' and p.prompt.endswith('(B) 3'), p\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
