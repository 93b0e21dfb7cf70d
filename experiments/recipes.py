"""Every recipe once, as it stands: does it learn, and is it quick?

    python experiments/recipes.py               # about 7 minutes on two idle cores

Claim      Each recipe (python train.py --help) improves its own toy student with its own defaults in under two
           minutes.
Paper      Those beside each row; this says nothing about which is best (compare.py does, over seeds).
Design     `python train.py --recipe NAME --no-eval_teacher` for every NAME, seed 0.
Against    `after` not above the 95 % interval of `before` over problems (opsa aside, a control without a
           teacher); more than 120 seconds. The exit status is then 1.
"""
import sys

from compare import accuracy_key, options, run_all, summary, table
import train

ARMS = {name: name for name in train.SETTINGS.recipes}
CONTROL = "opsa"                # has no teacher and no reward, and need not gain
FLAGS = "--no-eval_teacher"


def stages(runs) -> dict[str, tuple[dict[str, str], str]]:
    return {"recipes": (ARMS, FLAGS)}


def main() -> int:
    args = options(__doc__, "recipes", seeds=1)
    found, rows, failed = run_all(ARMS, FLAGS, args.seeds, args.runs), [], []
    for name, folders in found.items():
        for folder in folders:
            result, key = summary(folder), accuracy_key(folder)
            before, after, seconds = result["before"], result["after"], result["seconds"]
            learns, quick = after[key] > before[f"{key}_ci"][1], seconds < 120
            rows.append([f"`{name}`", f"{before[key]:.1%}", f"{after[key]:.1%}", f"{seconds:.0f}",
                         "yes" if learns and quick else "no gain" if quick else "slow"])
            failed += [name] * (not (learns and quick) and name != CONTROL)
    table(["recipe", "before", "after", "seconds", "learns in time"], rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
