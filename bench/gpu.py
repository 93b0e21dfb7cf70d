"""Everything that is to be measured on one GPU, in one call of some eight minutes on an H200.

    python bench/gpu.py                         # Qwen3-shaped models with random weights, bfloat16
    python bench/gpu.py --device cpu --small    # the same commands on toys: does the script work?

    1. decoding, batch 64 and 256, up to length 1,024: share of the byte floor, and against transformers' generate()
    2. scoring by a 4B and an 8B teacher, the update of a 0.6B and a 1.7B student: share of the matrix rate
    3. whole steps of 64 x 1,024 tokens against the sum of the three floors; peak memory
    4. the same beside what budget.py predicts, not compiled

Each line is a command of its own (roofline.py, budget.py, generate.py), printed before its output; one that fails
or takes longer than its share of --minutes is reported and the others go on. Goals stand beside what was found.
Ends with one JSON line.
"""
import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
GOALS = {"decode_step": 0.60, "scoring": 0.60, "update": 0.45, "step": 1 / 1.6, "generate": 10.0}


def commands(args) -> list[tuple[str, list[str]]]:
    """(what is measured, command), the most telling first."""
    device = ["--device", args.device, "--dtype", "bfloat16"]
    small, large = (("qwen3-0.6b", "qwen3-4b"), ("qwen3-1.7b", "qwen3-8b"))
    new, batches, peer_new = "1024", ("64", "256"), "256"
    if args.small:
        small = large = ("", "")
        new, batches, peer_new = "24", ("4", "8"), "16"

    def roofline(pair, batch, *more):
        models = ["--student", pair[0], "--teacher", pair[1]] if pair[0] else []
        return ["roofline.py", *device, *models, "--batch", batch, "--new", new, "--rounds", "1", "--compile", *more]

    def peers(batch):
        model = ["--model", small[0]] if small[0] else []
        return ["generate.py", *device, *model, "--lengths", "equal", "--batch", batch, "--new", peer_new, "--rounds",
                "1", "--peers", "dynamic", "vllm"]
    # on paper there is no toy, and without a GPU nothing to hold the paper against
    budget = [("0.6B under 4B, not compiled, beside its budget", ["budget.py", "--models", "qwen3-0.6b", "--measure"])]
    return [(f"0.6B under 4B, batch {batches[0]}", roofline(small, batches[0])),
            *(budget if args.device == "cuda" and not args.small else []),
            (f"0.6B, batch {batches[1]}", roofline(small, batches[1], "--decode_only")),
            (f"0.6B against transformers, batch {batches[0]}", peers(batches[0])),
            (f"1.7B under 8B, batch {batches[0]}", roofline(large, batches[0])),
            (f"0.6B under 4B, batch {batches[0]}, not compiled", roofline(small, batches[0])[:-1]),
            (f"0.6B against transformers, batch {batches[1]}", peers(batches[1]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="toy models in place of Qwen3's shapes, short responses")
    parser.add_argument("--minutes", type=float, default=9.0, help="what the whole may take")
    args = parser.parse_args()
    deadline, found = time.monotonic() + 60 * args.minutes, {}
    for what, command in commands(args):
        left = deadline - time.monotonic()
        if left < 20:
            print(f"== {what}: no time left", flush=True)
            continue
        print(f"== {what}: python bench/{' '.join(command)}", flush=True)
        try:
            done = subprocess.run([sys.executable, HERE / command[0], *command[1:]], capture_output=True, text=True,
                                  timeout=left)
        except subprocess.TimeoutExpired:
            print("   stopped: the time is over", flush=True)
            continue
        if done.returncode:
            print("   failed:\n" + "\n".join(done.stderr.strip().splitlines()[-12:]), flush=True)
            continue
        lines = done.stdout.strip().splitlines()
        print("\n".join(lines[:-1]), flush=True)
        found[what] = json.loads(lines[-1])
    print("\n| measured | share or ratio | goal |\n|---|---|---|")
    for what, result in found.items():
        shares = {"generate": result["ratio"]} if "dynamic" in result else result
        for name, goal in GOALS.items():
            if name in shares:
                print(f"| {what}: {name.replace('_', ' ')} | {shares[name]:.2f} | {goal:.2f} |")
    print(json.dumps({"name": "gpu", "ratio": next(iter(found.values()), {}).get("step"), "found": found}))


if __name__ == "__main__":
    main()
