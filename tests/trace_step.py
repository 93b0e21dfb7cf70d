"""What a reader opens to follow one plain training step: files, functions, and changes of file in the order of first
calls.

    python tests/trace_step.py [--list] [--extras]

Counts the project's own named functions (comprehensions and lambdas belong to the line they stand in) that one
train_step of the default run enters, by sys.setprofile. Without --extras as if that folder were not there: what extras
put in the place of a plain function is not part of what has to be read. tests/test_house.py holds the counts to their
limits.
"""
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from support import extras  # noqa: E402

if "--extras" not in sys.argv:
    extras.load_extras = lambda: ()
import train  # noqa: E402
from support.extras import offers  # noqa: E402
from support.flags import parse  # noqa: E402
from support.report import Clock  # noqa: E402
from support.setup import set_up  # noqa: E402


def entered() -> list[tuple[str, str]]:
    """(file, function) in the order of first calls."""
    with tempfile.TemporaryDirectory() as folder:
        cfg, _ = parse(["--steps", "2", "--eval_limit", "4", "--runs", folder], train.SETTINGS)
        run = set_up(cfg, {})
        train.defaults(run)
        for attach in offers("attach"):
            attach(run)
        optimizer = run.make_optimizer(run.student, run.cfg)
        run.step(run, optimizer, 0, Clock())            # the first one loads what later ones have
        seen: dict[tuple[str, str], None] = {}
        ours = {str(path) for pattern in ("*.py", "support/**/*.py", "extras/**/*.py") for path in ROOT.glob(pattern)}

        def note(frame, event, argument):
            code = frame.f_code
            if event == "call" and code.co_filename in ours and not code.co_name.startswith("<"):
                seen.setdefault((str(Path(code.co_filename).relative_to(ROOT)),
                                 f"{code.co_name}:{code.co_firstlineno}"))
        clock = Clock()
        sys.setprofile(note)
        try:
            run.step(run, optimizer, 1, clock)
        finally:
            sys.setprofile(None)
    return list(seen)


def counts(found: list[tuple[str, str]]) -> dict[str, int]:
    files = [file for file, _ in found]
    return {"files": len(set(files)), "functions": len(found),
            "changes of file": sum(a != b for a, b in zip(files, files[1:]))}


if __name__ == "__main__":
    found = entered()
    if "--list" in sys.argv:
        print("\n".join(f"{file:24}{function}" for file, function in found))
    print(counts(found))
