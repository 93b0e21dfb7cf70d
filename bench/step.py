"""One whole on-policy distillation step of this project against TRL's GKDTrainer and DistillationTrainer.

    python bench/step.py                                        # vocabulary 4,096, batch 16, float32, two CPU cores
    python bench/step.py --vocab 151936 --batch 8 --dtype bfloat16
    python bench/step.py --lengths ragged                       # responses end when they end, as in a real run
    python bench/step.py --device cuda --vocab 151936 --batch 64 --dtype bfloat16

The same random Qwen3 student (width 256, 6 layers) and teacher (width 512, 8 layers), prompts of 64 tokens, 128
new tokens each, exact reverse KL over the whole vocabulary, AdamW. bfloat16: float32 student weights, bfloat16
products and teacher, everywhere. `gkd` is GKDTrainer with gradient checkpointing switched off; `gkd_shipped` has
its default, under which its generation runs without a KV cache. Ragged responses have lognormal lengths (mean 94, at
most 256), the same for every variant; TRL writes a batch until its longest has ended. Each variant has its own
process; median seconds of the steps after the first, and of their rollouts; peak memory above what is held before
the first step, that is above the models.
Ends with one JSON line: ratios are the variant over this project.
"""
import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from common import (in_own_process, peak_memory, qwen3, ragged_lengths, random_checkpoint,  # isort: skip
                    reset_peak, wait)

import numpy as np
import torch

VARIANTS = ("ours", "gkd", "distillation", "gkd_shipped")
PROMPT = 64


def prompts_of(args) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return rng.integers(args.vocab - 2, size=(args.batch * (args.steps + 1), PROMPT)).tolist()


def lengths_of(args) -> list[list[int]]:
    """Of the responses of each step."""
    shape = args.steps + 1, args.batch
    if args.lengths == "equal":
        return np.full(shape, 128).tolist()
    return ragged_lengths(np.random.default_rng(1), shape, 256).tolist()


class Timer:
    """Seconds per step; on a CPU of processor time (see common.interleaved)."""

    def __init__(self, device: torch.device):
        self.device, self.clock = device, time.process_time if device.type == "cpu" else time.perf_counter
        self.seconds: list[float] = []
        self.phases: dict[str, list[float]] = {}
        self.before = reset_peak(device)

    def start(self) -> None:
        wait(self.device)
        self.at = self.phase_at = self.clock()

    def phase(self, name: str) -> None:
        wait(self.device)
        self.phases.setdefault(name, []).append(self.clock() - self.phase_at)
        self.phase_at = self.clock()

    def stop(self) -> None:
        wait(self.device)
        self.seconds.append(self.clock() - self.at)

    def result(self) -> dict:
        return {"seconds": statistics.median(self.seconds[1:]), "first": self.seconds[0],
                "peak": peak_memory(self.device) - self.before,
                "phases": {name: round(statistics.median(taken[1:]), 2) for name, taken in self.phases.items()}}


def ours(args, folder: Path) -> dict:
    from phases import Phases
    from support.used_memory import give_back_freed_memory
    from support.weights import load_model
    from train import Config
    give_back_freed_memory()
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    student = load_model(folder / "student", compute_dtype=dtype, device=device)
    teacher = load_model(folder / "teacher", dtype=dtype, device=device).requires_grad_(False)
    # a third of the batch at a time: as fast, and a third of the activations
    cfg = Config(chunk_rows=args.chunk_rows, micro_batch_tokens=1024)
    one = Phases(student, teacher, cfg, args.vocab, args.compile)
    prompts, lengths, timer = prompts_of(args), lengths_of(args), Timer(device)
    for step in range(args.steps + 1):
        timer.start()
        one.refresh()
        one.rollout(prompts[step * args.batch:(step + 1) * args.batch], lengths[step], seed=step)
        timer.phase("rollout")
        one.scoring()
        timer.phase("scores")
        one.backward()
        timer.phase("backward")
        one.update()
        timer.phase("optimizer")
        timer.stop()
    return timer.result()


def word_tokenizer(vocab: int):
    """One word per id, so that TRL has a text of exactly PROMPT tokens to read."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {f"w{i}": i for i in range(vocab - 2)} | {"<eos>": vocab - 2, "<pad>": vocab - 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", padding_side="left")


def trl(args, folder: Path) -> dict:
    from transformers import AutoModelForCausalLM, TrainerCallback
    from trl_trainers import build
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name, dtype=kind).to(device)
                        for name, kind in (("student", torch.float32), ("teacher", dtype)))
    settings = dict(output_dir=str(folder / "out"), per_device_train_batch_size=args.batch, max_steps=args.steps + 1,
                    learning_rate=1e-5, bf16=dtype == torch.bfloat16, use_cpu=device.type == "cpu",
                    gradient_checkpointing=args.variant == "gkd_shipped")
    tokenizer, prompts, lengths = word_tokenizer(args.vocab), prompts_of(args), lengths_of(args)
    most, timer, write = max(map(max, lengths)), Timer(device), student.generate

    def generate(**settings):
        """Every response of the step ends with <eos> at its length."""
        end_B = PROMPT + torch.tensor(lengths[len(timer.seconds)], device=device) - 1

        def end(ids_BT, logits_BV):
            ends_B, eos = end_B == ids_BT.shape[1], args.vocab - 2
            logits_BV[:, eos] = torch.where(ends_B, logits_BV[:, eos], -torch.inf)
            logits_BV[ends_B, :eos] = logits_BV[ends_B, eos + 1:] = -torch.inf
            return logits_BV
        out = write(**settings, logits_processor=[end] if args.lengths == "ragged" else None)
        timer.phase("rollout")
        return out
    student.generate = generate
    if args.lengths == "ragged":
        student.generation_config.eos_token_id = args.vocab - 2

    class Watch(TrainerCallback):
        def on_step_begin(self, *_, **__):
            timer.start()

        def on_step_end(self, *_, **__):
            timer.stop()

    texts = [" ".join(f"w{i}" for i in prompt) for prompt in prompts]
    build(args.variant, student, teacher, tokenizer, texts, most, settings, callbacks=[Watch()]).train()
    return timer.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lengths", default="equal", choices=("equal", "ragged"), help="of the responses")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=3, help="steps measured, after one that is not")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--chunk_rows", type=int, default=0, help="as in train.py")
    parser.add_argument("--compile", action="store_true", help="this project through torch.compile")
    parser.add_argument("--variants", nargs="*", default=VARIANTS[:3], choices=VARIANTS)
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.variant:
        print(json.dumps((ours if args.variant == "ours" else trl)(args, args.folder)))
        return
    results = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        random_checkpoint(folder / "student", qwen3(args.vocab))
        random_checkpoint(folder / "teacher", qwen3(args.vocab, 512, layers=8, head_dim=64), seed=1)
        for variant in args.variants:
            found = in_own_process(variant, "--variant", variant, "--folder", scratch)
            if found is None:
                continue
            results[variant] = found
            print(f"{variant:>13}: {found['seconds']:7.2f} s a step (the first {found['first']:.2f}), "
                  f"peak {found['peak'] / 2**30:5.2f} GiB above the weights  "
                  + ", ".join(f"{name} {taken}" for name, taken in found["phases"].items()), flush=True)
    ratios = {name: {"rollout": round(found["phases"]["rollout"] / results["ours"]["phases"]["rollout"], 2),
                     **{key: round(found[key] / results["ours"][key], 2) for key in ("seconds", "peak")}}
              for name, found in results.items() if name != "ours" and "ours" in results}
    print(json.dumps({"name": f"step_{args.lengths}_{args.vocab}_{args.dtype}_{args.batch}",
                      "ratio": min((r["seconds"] for r in ratios.values()), default=None), **ratios}))


if __name__ == "__main__":
    main()
