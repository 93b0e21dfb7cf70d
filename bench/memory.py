"""Is the memory that train.py announces the memory that it takes?

    python bench/memory.py                      # six settings, about four minutes on one idle core

Random Qwen3 student (width 256, 6 layers) and teacher (width 512, 8 layers), two steps of 16 to 48 responses of
128 tokens. `planned` is the estimate printed before anything is loaded, `peak` what the finished run reports:
resident memory at most, less what the interpreter and torch held before. Ends with one JSON line.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from common import qwen3, random_checkpoint  # isort: skip

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from support.memory import size_text

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
SETTINGS = {
    "4k": ("4096", []), "4k, jsd, 32 responses": ("4096", ["--problems", "32", "--divergence", "jsd"]),
    "4k, checkpointing, 32": ("4096", ["--problems", "32", "--gradient_checkpointing"]),
    "4k, LoRA 16, 32": ("4096", ["--problems", "32", "--lora_rank", "16"]),
    "4k, bfloat16, 48": ("4096", ["--problems", "48", "--dtype", "bfloat16"]),
    "152k": ("151936", [])}
SPECIAL = ("<|end|>", "<|user|>", "<|assistant|>")


def checkpoint(folder: Path, vocab: int, **size) -> Path:
    """A random model with a byte tokenizer of `vocab` tokens, most of which no text ever needs."""
    random_checkpoint(folder, qwen3(vocab, **size))
    words = sorted(pre_tokenizers.ByteLevel.alphabet()) + [f"word{i}" for i in range(vocab - 256 - len(SPECIAL))]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": vocab - len(SPECIAL)}))
    return folder


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False).parse_args()
    ratios = {}
    print("| setting | planned | peak | planned / peak |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, (vocab, flags)) in enumerate(SETTINGS.items()):
            here = Path(folder) / vocab
            if not here.exists():
                checkpoint(here / "student", int(vocab))
                checkpoint(here / "teacher", int(vocab), width=512, layers=8, heads=16, kv_heads=8)
            command = [sys.executable, str(TRAIN),
                       "--student", str(here / "student"), "--teacher", str(here / "teacher"),
                       "--problems", "16", "--max_new_tokens", "128", "--steps", "2", "--eval_every", "0",
                       "--eval_k", "1", "--eval_limit", "2", "--no-eval_teacher",
                       "--runs", folder, "--name", str(number), *flags]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                raise SystemExit(done.stderr[-2000:])
            summary = json.loads((Path(folder) / str(number) / "summary.json").read_text())
            ratios[name] = summary["planned_memory"] / summary["peak_memory"]
            print(f"| {name} | {size_text(summary['planned_memory'])} | {size_text(summary['peak_memory'])} "
                  f"| {ratios[name]:.2f} |", flush=True)
    print(json.dumps({"name": "memory", "ratio": min(ratios.values()), "settings": ratios}))


if __name__ == "__main__":
    main()
