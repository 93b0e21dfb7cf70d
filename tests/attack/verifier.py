r"""The verifier against math-verify 0.9, on answers that are made here.

    pip install "math-verify[antlr4_13_2]==0.9.*"
    python tests/attack/verifier.py --count 6000                    about a minute and a half on one core
    python tests/attack/verifier.py --seed 1 --held_out --misses    other answers in other texts, and what is missed
    python tests/attack/verifier.py --count 600 --seed 35 --write tests/data/gradings.jsonl
                                                                    for a machine without math-verify

A grading is a truth, a response (gradings.py), and what the two verifiers say.

    ours only     called right here and wrong there: must be 0
    excepted      the same, for one of the reasons in EXCEPTIONS
    theirs only   missed here; at most 3 % of what is called right there
    unread        math-verify finds no answer in the response, `unread, right` the ones of them called right here
"""
import argparse
import json
import logging
import re
import sys
import time
from collections import Counter
from pathlib import Path

from gradings import gradings

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from support.verifier import extract, grade  # noqa: E402

# Where math-verify calls wrong what is right: why, and a change of the response after which it has to agree.
EXCEPTIONS = [("but for the full stop", re.compile(r"((?:/|\^-)[0-9]+)\.(?![0-9])"), r"\1")]      # 7/3. is 7/3.0 there


def theirs(truth: str, text: str) -> str:
    """What math-verify says of a response: right, wrong, unread, or a reason of EXCEPTIONS."""
    from math_verify import parse, verify
    wanted, read = parse(f"\\boxed{{{truth}}}"), parse(text)
    if verify(wanted, read):
        return "right"
    reasons = [why for why, pattern, new in EXCEPTIONS
               if pattern.search(text) and verify(wanted, parse(pattern.sub(new, text)))]
    return reasons[0] if reasons else "wrong" if read else "unread"


def outcome(right: bool, verdict: str) -> str:
    if verdict == "right":
        return "both right" if right else "theirs only"
    if not right:
        return "both wrong"
    return {"wrong": "ours only", "unread": "unread, right"}.get(verdict, "excepted")


def compare(rows: list[tuple], ours: list[bool], verdicts: list[str], misses: bool) -> dict[str, Counter]:
    table = {}
    for (kind, truth, text), right, verdict in zip(rows, ours, verdicts):
        found = outcome(right, verdict)
        counts = table.setdefault(kind, Counter())
        counts["gradings"] += 1
        counts[found] += 1
        counts["unread"] += verdict == "unread"
        if found == "ours only" or misses and found in ("theirs only", "unread, right", "excepted"):
            print(f"{found:13s} {kind:16s} truth {truth!r}, response {text!r}: {extract(text)!r} here")
    return table | {"all": sum(table.values(), Counter())}


def main(argv: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--count", type=int, default=6000, help="gradings")
    flags.add_argument("--seed", type=int, default=0, help="of the answers")
    flags.add_argument("--held_out", action="store_true", help="other texts, units, words and letters")
    flags.add_argument("--misses", action="store_true", help="print each grading that is right there and wrong here")
    flags.add_argument("--write", metavar="FILE", help="the gradings, one JSON object a line")
    args = flags.parse_args(argv)
    try:
        import math_verify  # noqa: F401
    except ImportError:
        print('error: math-verify is missing: pip install "math-verify[antlr4_13_2]==0.9.*"', file=sys.stderr)
        return 2
    logging.disable(logging.CRITICAL)           # it reports each of its own time limits
    rows = list(gradings(args.count, args.seed, args.held_out))
    start = time.process_time()
    ours = [grade(text, truth) for _, truth, text in rows]
    spent, start = time.process_time() - start, time.process_time()
    verdicts = [theirs(truth, text) for _, truth, text in rows]
    there = time.process_time() - start
    table = compare(rows, ours, verdicts, args.misses)
    names = ["gradings", "both right", "both wrong", "ours only", "excepted", "theirs only", "unread", "unread, right"]
    print(f"\n{'kind':16s}" + "".join(f"{name:>15s}" for name in names))
    for kind, counts in table.items():
        print(f"{kind:16s}" + "".join(f"{counts[name]:15d}" for name in names))
    alone, missed, both = (table["all"][name] for name in ("ours only", "theirs only", "both right"))
    share = missed / max(missed + both, 1)
    print(f"\nverifier {args.count} gradings, seed {args.seed}{', held out' * args.held_out}: {alone} right here "
          f"alone, {share:.2%} of what is right there missed; {spent / args.count * 1e6:.0f} us a grading here, "
          f"{there / args.count * 1e6:.0f} us there")
    if args.write:
        lines = [json.dumps(dict(truth=truth, response=text, ours=right, theirs=verdict)) + "\n"
                 for (_, truth, text), right, verdict in zip(rows, ours, verdicts)]
        Path(args.write).write_text("".join(lines))
    return int(alone > 0 or share > 0.03)


if __name__ == "__main__":
    sys.exit(main())
