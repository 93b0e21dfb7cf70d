"""Start: from a command line to a run that goes on where it was stopped, and every way to end it.

Exit status: 0 done, 1 --plan does not fit, 2 wrong input (one sentence on stderr), 128 + signal stopped.
"""
import functools
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path

import torch

from support.checkpoint import RunFolder, run_path, started
from support.errors import NotFinite, UserError, one_line
from support.extras import offers
from support.flags import Settings, check_ranges, parse, run_name
from support.plan import chosen
from support.report import check_trackers, closing_line
from support.setup import check_combinations, set_up
from support.tokenizer import Tokenizer
from support.used_memory import give_back_freed_memory, used_memory

# flags that say where and how a run is watched: they may change when it goes on, and no result depends on them
NOT_THE_RUN = ("name", "runs", "fresh", "quiet", "token_view", "wandb", "tensorboard", "plan", "plan_memory",
               "self_check", "report_only", "compare_teacher", "teacher_token", "teacher_deadline")


@contextmanager
def graceful_stop():
    """Yields a list that SIGINT or SIGTERM fills: the step is finished first. A second signal acts at once."""
    caught = []

    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        # not print: a handler that interrupts a print would be refused as a reentrant call, and end the run
        text = f"\n{signal.Signals(number).name}: finishing this step, then saving (once more to stop at once)\n"
        if sys.stdout.name != os.devnull:       # several processes: the first speaks
            os.write(2, text.encode())
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def advice(complaint: str, cfg, path: Path) -> str:
    """What to do when numbers went bad, by whose they are."""
    if "the student" not in complaint:
        return f"look at its checkpoint, or pass --dtype float32; the checkpoints in {path} stay as they were"
    return (f"--lr {cfg.lr:g} is too high, or --temperature {cfg.temperature:g} too low, or its checkpoint is damaged; "
            f"the checkpoints in {path} are from before and stay: change a flag and pass another --name")


def complain(sentence: str) -> None:
    print(sentence, file=sys.stderr)


def now() -> datetime:
    return datetime.now()


def open_folder(path: Path, config: dict, fresh: bool = False) -> RunFolder:
    return RunFolder(path, config, fresh)


def go(cfg, given: list[str], defaults, train) -> int:
    """One run, or a look at what it would be."""
    path = run_path(cfg.runs, cfg.name or run_name(cfg, given, NOT_THE_RUN))
    lasting = {key: value for key, value in asdict(cfg).items() if key not in NOT_THE_RUN}
    look_only = [look for look in offers("look") if look(cfg)]
    # os.path.exists: False where the path itself is impossible
    if os.path.exists(path / "summary.json") and not (cfg.fresh or cfg.plan or look_only):
        folder = open_folder(path, lasting)
        print(f"{path} is complete; pass --fresh to run it again, or change a flag for another run")
        print(folder.summary(lambda summary: closing_line(folder, summary)))
        return 0
    give_back_freed_memory()
    memory_before = used_memory(torch.device("cpu"))
    torch.manual_seed(cfg.seed)     # nothing draws from the global stream; if a fork does, it is at least fixed
    stored = {} if cfg.fresh or cfg.plan or look_only else started(path)
    Tokenizer.started = datetime.fromisoformat(stored["date"]) if stored.get("date") else now()
    run = set_up(cfg, stored)
    run.memory_before = memory_before
    defaults(run)
    for attach in offers("attach"):
        attach(run)
    for look in look_only:
        return look(cfg)(run)
    folder = open_folder(path, lasting, cfg.fresh)
    folder.note_start({"date": Tokenizer.started.isoformat(), "torch": torch.__version__, **chosen(run.cfg)})
    return train(run, folder)


def start(argv: list[str], settings: Settings, defaults, train) -> int:
    """The command; extras may put something around it."""
    command = functools.partial(attempt, argv, settings, defaults, train)
    for wrap in offers("around"):
        command = wrap(command)
    return command()


def attempt(argv: list[str], settings: Settings, defaults, train) -> int:
    """Wrong input is one sentence and status 2."""
    cfg, path = None, Path("runs")
    try:
        cfg, given = parse(argv, settings)
        check_ranges(cfg)
        check_combinations(cfg)
        check_trackers(cfg)
        return go(cfg, given, defaults, train)
    except NotFinite as error:
        path = run_path(cfg.runs, cfg.name or run_name(cfg, given, NOT_THE_RUN))
        complain(f"error: {one_line(error)}; {advice(str(error), cfg, path)}")
    except UserError as error:
        complain(f"error: {one_line(error)}")
    except KeyboardInterrupt:       # before the loop, or the second signal in it
        complain("stopped at once; the same command goes on from the last checkpoint, if there is one")
        return 130
    return 2
