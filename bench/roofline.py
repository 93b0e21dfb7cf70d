"""How close rollout, scoring and update come to what this machine can do.

    python bench/roofline.py                                                     # random pair, this CPU, one thread
    python bench/roofline.py --device cuda --dtype bfloat16 --student qwen3-0.6b --teacher qwen3-4b --batch 64 \\
        --new 1024 --compile

First what the machine can do: bytes per second of a large copy, products per second of a large square matrix. Then
the floors. A decode step reads the weights once and the cache of every live sequence, and multiplies every weight
with every sequence; whichever takes longer. Scoring takes 2 FLOPs per weight and token, an update 6 (8 with
gradient checkpointing), both with the head on response tokens only; an update also projects the teacher's head.
Attention's own products are left out, so floors are a little too low. `share` is floor / measured, 1 = nothing left
to gain; of a whole step (prefill, optimizer and all) with the sum of the three as its floor. On a CPU seconds are of
processor time. Ends with one JSON line.
"""
import argparse
import json

from common import QWEN3, interleaved, medians, peak_memory, random_model, reset_peak, shape  # isort: skip

import torch

from extras.low_memory import recomputed
from model import Transformer
from phases import Phases
from support.used_memory import give_back_freed_memory
from support.model_config import ModelConfig
from support.weights import checkpoint_folder, load_model
from train import Config


def machine(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """(bytes per second, FLOPs per second) of a copy and a product large enough to hide everything else."""
    big = device.type == "cuda"
    source = torch.ones(2**30 if big else 2**26, device=device)     # 4 GB, 256 MB: past every cache but a server's last
    target, n = torch.empty_like(source), 8192 if big else 1536
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in "ab")
    product = torch.empty(n, n, dtype=dtype, device=device)
    seconds = interleaved({
        "copy": lambda: target.copy_(source), "product": lambda: torch.mm(a, b, out=product)}, 9, device)
    return 2 * source.nbytes / min(seconds["copy"]), 2 * n**3 / min(seconds["product"])    # a ceiling: the best of nine


def sizes(config: ModelConfig) -> tuple[int, int]:
    """(weights of the layers, weights of the head)."""
    with torch.device("meta"):
        model = Transformer(config)
    layers = sum(p.numel() for p in model.model.layers.parameters())
    return layers, config.vocab_size * config.hidden_size


def floors(args, student: ModelConfig, teacher: ModelConfig, item: int, bandwidth: float,
           rate: float) -> dict[str, float]:
    """Seconds of a decode step (mean length), of scoring and of an update."""
    layers, head = sizes(student)
    teacher_layers, teacher_head = sizes(teacher)
    rows, tokens = args.batch * args.new, args.batch * (args.prompt + args.new)
    cache = 2 * student.num_hidden_layers * student.num_key_value_heads * student.head_dim * item
    read = (layers + head) * item + args.batch * (args.prompt + args.new / 2) * cache
    passes = 8 if args.gradient_checkpointing else 6
    return {"decode step": max(read / bandwidth, 2 * (layers + head) * args.batch / rate),
            "scoring": 2 * (teacher_layers * tokens + teacher_head * rows) / rate,
            "update": (passes * layers * tokens + (6 * head + 2 * teacher_head) * rows) / rate}


def load(name: str | None, args, dtype: torch.dtype, compute_dtype: torch.dtype, **default) -> Transformer:
    """A checkpoint folder or hub id; or random weights in a shape of common.QWEN3, or in the default's."""
    device = torch.device(args.device)
    if name and name not in QWEN3:
        return load_model(checkpoint_folder(name), dtype=dtype, compute_dtype=compute_dtype, device=device)
    return random_model(shape(name, args.vocab, **default), dtype, compute_dtype, device)


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--student", help=f"folder, hub id, or one of {', '.join(QWEN3)} with random weights; "
                                          f"default: random, width 256, 6 layers")
    parser.add_argument("--teacher", help="likewise; default: random, width 512, 8 layers")
    parser.add_argument("--vocab", type=int, help="of random models; default 4,096, of the Qwen3 shapes 151,936")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--micro_batch_tokens", type=int, default=16_384)
    parser.add_argument("--compile", action="store_true", help="the decode step and the layers through torch.compile")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--decode_only", action="store_true")
    return parser.parse_args(argv)


def measure(args) -> tuple[dict[str, float], dict]:
    """Prints what is measured beside its floors. Returns the seconds of a decode step and, unless --decode_only, of
    scoring, of an update's backward pass and of a whole step; and what the JSON line says."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    student = load(args.student, args, torch.float32, dtype)
    teacher = load(args.teacher, args, dtype, dtype, width=512, layers=8, head_dim=64).requires_grad_(False)
    for layer in student.model.layers if args.gradient_checkpointing else ():
        layer.forward = recomputed(layer.forward)
    vocab = min(student.config.vocab_size, teacher.config.vocab_size)
    one = Phases(student, teacher, Config(micro_batch_tokens=args.micro_batch_tokens), vocab, args.compile)
    prompts = torch.randint(vocab, (args.batch, args.prompt), generator=torch.Generator().manual_seed(0)).tolist()

    def rollout() -> None:
        one.rollout(prompts, args.new)

    def step() -> None:
        for phase in (one.refresh, rollout, one.scoring, one.backward, one.update):
            phase()
    phases = {"prefill": lambda: one.rollout(prompts, 1), "rollout": rollout}
    if not args.decode_only:
        phases |= {"scoring": one.scoring, "update": one.backward, "step": step}
    before = reset_peak(device)
    seconds = medians(interleaved(phases, args.rounds, device))
    peak = peak_memory(device)
    bandwidth, rate = machine(device, dtype)
    floor = floors(args, student.config, teacher.config, dtype.itemsize, bandwidth, rate)
    floor["step"] = floor["decode step"] * args.new + floor["scoring"] + floor["update"]
    measured = {"decode step": (seconds["rollout"] - seconds["prefill"]) / (args.new - 1),
                **{name: seconds[name] for name in ("scoring", "update", "step") if name in seconds}}
    print(f"{args.device}, {args.dtype}: copy {bandwidth / 1e9:.1f} GB/s, products {rate / 1e12:.3f} TFLOP/s")
    print(f"{args.student or 'random'} under {args.teacher or 'random'}: {args.batch} sequences of {args.prompt} + "
          f"{args.new} tokens, vocabulary {vocab}")
    for name, value in measured.items():
        print(f"{name:>12}: floor {1e3 * floor[name]:9.2f} ms, measured {1e3 * value:9.2f} ms, "
              f"share {floor[name] / value:.2f}")
    print(f" peak memory: {peak / 2**30:.2f} GiB, {(peak - before) / 2**30:.2f} above the models")
    share = {name.replace(" ", "_"): round(floor[name] / value, 3) for name, value in measured.items()}
    return measured, {"name": f"roofline_{args.device}_{args.dtype}_{args.student}_{args.batch}",
                      "ratio": share["decode_step"], **share,
                      "tokens_per_second": round(args.batch / measured["decode step"], 1),
                      "peak_gib": round(peak / 2**30, 2), "gigabytes_per_second": round(bandwidth / 1e9, 2),
                      "teraflops": round(rate / 1e12, 4)}


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    give_back_freed_memory()
    print(json.dumps(measure(args)[1]))


if __name__ == "__main__":
    main()
