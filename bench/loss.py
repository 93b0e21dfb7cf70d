"""Exact divergences over a large vocabulary: chunked (losses.chunked_backward) against materialised (plain
torch).

    python bench/loss.py                                # 4,096 rows x 151,936 words; materialised needs 20 GB
    python bench/loss.py --rows 1024 --divergence jsd

Each variant runs in its own process; peak memory is what the process held at most, minus what it held before
the loss. Both compute the same value and the same gradients of states and head. Ends with one JSON line.
"""
import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import losses  # noqa: E402
from memory import give_back_freed_memory  # noqa: E402


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(variant: str, rows: int, vocab: int, width: int, divergence: str, chunk_rows: int) -> dict:
    rng = torch.Generator().manual_seed(0)
    states_ND, teacher_ND = (torch.randn(rows, width, generator=rng) for _ in range(2))
    head_VD, teacher_VD = (torch.randn(vocab, width, generator=rng) / width ** 0.5 for _ in range(2))
    head_grad_VD = torch.zeros(vocab, width)
    token_N, scale_N = torch.zeros(rows, dtype=torch.int64), torch.full((rows,), 1 / rows)
    function, args = losses.DIVERGENCES[divergence], losses.LossArgs()
    if variant == "chunked":        # as train.py does; the other one holds everything at once anyway
        give_back_freed_memory()
    before, start = peak_bytes(), time.perf_counter()
    if variant == "chunked":
        states_ND.requires_grad_()
        loss_N, _ = losses.chunked_backward(
            states_ND * 1.0, head_VD, head_grad_VD, {"token_N": token_N}, scale_N, function, args, temperature=1.0,
            chunk_rows=chunk_rows, teacher_hidden_NE=teacher_ND, teacher_head_VE=teacher_VD)
        loss = (loss_N * scale_N).sum()
    else:
        states_ND.requires_grad_(), head_VD.requires_grad_()
        with torch.no_grad():
            teacher_NV = (teacher_ND @ teacher_VD.T).log_softmax(-1)
        student_NV = (states_ND @ head_VD.T).log_softmax(-1)
        loss = (function(losses.Rows(student_NV, token_N, teacher_NV), args) * scale_N).sum()
        loss.backward()
        head_grad_VD = head_VD.grad
    return {"peak": peak_bytes() - before, "seconds": time.perf_counter() - start, "loss": loss.item(),
            "gradients": [states_ND.grad.norm().item(), head_grad_VD.norm().item()]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--chunk_rows", type=int, default=32)
    parser.add_argument("--divergence", default="reverse_kl", choices=("reverse_kl", "forward_kl", "jsd"))
    parser.add_argument("--variant", choices=("chunked", "materialised"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    settings = (args.rows, args.vocab, args.width, args.divergence, args.chunk_rows)
    if args.variant:
        print(json.dumps(measure(args.variant, *settings)))
        return
    unit, results = args.rows * args.vocab * 4, {}
    for variant in ("chunked", "materialised"):
        run = subprocess.run([sys.executable, *sys.argv, "--variant", variant], capture_output=True, text=True)
        if run.returncode:
            print(f"{variant:>13}: failed ({run.stderr.strip().splitlines()[-1] if run.stderr.strip() else 'out of memory'})")
            continue
        results[variant] = found = json.loads(run.stdout)
        print(f"{variant:>13}: {found['peak'] / 2**30:6.2f} GiB = {found['peak'] / unit:5.2f} logits tensors, "
              f"{found['seconds']:6.1f} s, loss {found['loss']:.6f}, gradient norms "
              + ", ".join(f"{norm:.6f}" for norm in found["gradients"]))
    if len(results) == 2:
        a, b = results["chunked"], results["materialised"]
        print(json.dumps({"name": f"loss_{args.divergence}", "ratio": a["peak"] / b["peak"],
                          "seconds_ratio": a["seconds"] / b["seconds"], "rows": args.rows, "vocab": args.vocab}))


if __name__ == "__main__":
    main()
