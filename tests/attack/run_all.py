"""All attacks, one after the other. Exit status 1 if any of them found something.

    python tests/attack/run_all.py                  full sizes: 1,000 kills, 100 more under real torchrun, 600 disks,
                                                    10,000 inputs, 1,000 numbers, 6,000 gradings where math-verify
                                                    is installed; about two hours on one core
    python tests/attack/run_all.py --share 0.01     a hundredth of each, a minute

What each does, and what counts as a failure, stands at the top of its file; README.md beside this one has it in short.
"""
import argparse
import importlib.util
import sys

import bad_numbers
import common
import disks
import inputs
import kills
import verifier

SIZES = {"kills": (kills, 1000), "disks": (disks, 600), "inputs": (inputs, 10000), "numbers": (bad_numbers, 1000)}


def grade(count: int, seed: int) -> int:
    if count and importlib.util.find_spec("math_verify") is None:
        print("verifier  not compared: math-verify is missing (pip install math-verify[antlr4_13_2]==0.9.*)")
        return 0
    return verifier.main([f"--count={count}", f"--seed={seed}"]) if count else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--share", type=float, default=1.0, help="of the full sizes (default 1)")
    parser.add_argument("--seed", type=int, default=0)
    sizes = {name: size for name, (_, size) in SIZES.items()} | {"verifier": 6000}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, metavar="COUNT", help=f"instead of a share of {size:,}; 0 = none")
    args = parser.parse_args()
    counts = {name: round(size * args.share) if vars(args)[name] is None else vars(args)[name]
              for name, size in sizes.items()}
    status, gradings = 0, counts.pop("verifier")
    with common.worlds(keep=False) as world:
        for name, count in counts.items():
            if count:
                status |= SIZES[name][0].main([f"--count={count}", f"--seed={args.seed}"], world)
        if counts["kills"] >= 1000:         # 15 s a start: a sample does without
            status |= kills.main(["--count=100", f"--seed={args.seed}", "--kind=two_ranks", "--torchrun"],
                                 world)
    return status | grade(gradings, args.seed)


if __name__ == "__main__":
    sys.exit(main())
