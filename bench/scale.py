"""How the cost of a step grows with the length, the vocabulary, the batch, the samples per prompt and the teacher.

    python bench/scale.py                       # about two minutes on one idle core
    python bench/scale.py --device cuda --dtype bfloat16 --new 256

One size is doubled twice while the others stay: a random Qwen3 student (width 256, 6 layers) and teacher (width 512,
8 layers), vocabulary 4,096, 16 prompts of 64 tokens, 64 new tokens each, exact reverse KL. Seconds of each phase
(of processor time on a CPU), and how much more than the line above. Twice the length of a response is a little more
than twice the work, attention; twice the vocabulary is more work in the head alone. Ends with one JSON line.
"""
import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from common import interleaved, medians, qwen3, random_checkpoint  # isort: skip

import numpy as np
import torch

from phases import Phases
from support.used_memory import give_back_freed_memory
from support.weights import load_model
from train import Config


@dataclass(frozen=True)
class Size:
    new: int = 64
    vocab: int = 4096
    prompts: int = 16
    samples: int = 1
    teacher_width: int = 512


def phases(size: Size, folder: Path, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, float]:
    """Median seconds of rollout, scoring and update."""
    for name, width, layers in (("student", 256, 6), ("teacher", size.teacher_width, 8)):
        random_checkpoint(folder / name, qwen3(size.vocab, width, layers=layers, heads=width // 32,
                                               kv_heads=width // 64))
    student = load_model(folder / "student", compute_dtype=dtype, device=device)
    teacher = load_model(folder / "teacher", dtype=dtype, device=device).requires_grad_(False)
    step = Phases(student, teacher, Config(micro_batch_tokens=16_384), size.vocab)
    prompts = np.random.default_rng(0).integers(size.vocab, size=(size.prompts, 64)).tolist()

    def learning() -> None:
        step.backward()
        step.update()
    return medians(interleaved({"rollout": lambda: step.rollout(prompts, size.new, size.samples),
                                "scoring": step.scoring, "update": learning}, rounds, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--new", type=int, default=Size.new)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    give_back_freed_memory()
    base, found = Size(new=args.new), {}
    print(f"| doubled | size | {' | '.join(('rollout', 'scoring', 'update'))} | whole step |\n" + "|---" * 6 + "|")
    for name in ("new", "vocab", "prompts", "samples", "teacher_width"):
        before: dict[str, float] = {}
        for factor in (1, 2, 4):
            size = replace(base, **{name: getattr(base, name) * factor})
            if size not in found:
                with tempfile.TemporaryDirectory() as folder:
                    seconds = phases(size, Path(folder), torch.device(args.device), getattr(torch, args.dtype),
                                     args.rounds)
                found[size] = {**seconds, "step": sum(seconds.values())}
            cells = [f"{value:.2f} s" + (f" ({value / before[phase]:.1f}x)" if before else "")
                     for phase, value in found[size].items()]
            print(f"| {name} | {getattr(size, name):,} | {' | '.join(cells)} |", flush=True)
            before = found[size]
    growth = {name: found[replace(base, **{name: getattr(base, name) * 4})]["step"] / found[base]["step"]
              for name in ("new", "vocab", "prompts", "samples", "teacher_width")}
    print(json.dumps({"name": "scale", "ratio": growth["prompts"], "four_times_the": growth}))


if __name__ == "__main__":
    main()
