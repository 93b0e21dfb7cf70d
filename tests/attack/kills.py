"""Kills: a run that is killed at any instant and started again ends as one that nobody touched.

    python tests/attack/kills.py --count 1000              about ten minutes on one core
    python tests/attack/kills.py --kind two_ranks --torchrun --count 100

Three ways to die, by turns: right before the k-th change of the file system (every file that is opened for writing,
renamed, removed, linked or flushed; with a large --count every k of every setting has its turn); in the middle of
writing a file (SIGXFSZ at its n-th byte, wherever the write is, in Python or not); at a random time.

    lost        the same command does not go on: it ends with another status than 0
    different   it does, and weights, moments, records, answers, links or names are not those of the run left alone

A killed --fresh is followed by the same command without it or with it, by turns. Where the old run had other flags,
the command without it may refuse, but then the old run must still be whole.

With --torchrun it is the real torchrun that starts two processes. What dies then is one of them, and torchrun ends the
other; torchrun and both, as where the power goes; or torchrun alone, and the two must notice.
"""
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import common
from common import Child, Ended, Tally, arguments, on_changes, options, program, result, run, start_ranks, wait

SETTINGS = {            # name -> flags of the run; a small --count tries the first ones
    "plain": dict(save_every=2),
    "fresh_done": dict(save_every=1),                               # --fresh over a run that is complete
    "two_ranks": dict(save_every=1, eval_every=2),
    "twice": dict(save_every=1, eval_every=2),                      # the one that goes on is killed again, and again
    "sg": dict(recipe="sg", pts_weight=0.5, pts_hold=1, pts_end=1, pts_samples=32, save_every=1),
    "lora": dict(lora_rank=2, save_every=1, schedule="cosine"),
    "fresh_other": dict(save_every=1, lr=0.01),                     # --fresh over a complete one with other flags
    "ema": dict(recipe="sdft", teacher="self", teacher_prompt="{{solution}}|{{problem}}", skip_first=1, ema=0.5,
                save_every=1),
    "other_tokenizer": dict(recipe="xtok", teacher="{world}/foreign", min_coverage=0, save_every=1),
    "fresh_cut": dict(save_every=1),                                # --fresh over one that was killed
    "gkd": dict(recipe="gkd", save_every=1, seed=1),
    "every_step": dict(save_every=1),
    "evaluations": dict(eval_every=1, save_every=2),
    "sft": dict(recipe="sft", save_every=1, lr=0.01),
    "teacher_writes": dict(recipe="sft", responses="teacher", save_every=1),
    "no_teacher": dict(recipe="grpo", teacher="none", problems=2, samples=2, updates=2, save_every=1),
    "fresh_foreign_files": dict(save_every=1),                      # ... in which somebody has left a file
    "fresh_two_ranks": dict(save_every=1),
}


BOTH, LAUNCHER, EVERYTHING = 2, 3, 4        # what dies, where it is not the process of rank 0 or of rank 1


def killer(at: int, victims):
    """For on_changes: SIGKILL for victims() before change `at`."""
    def act(number: int, event: str, path: str) -> None:
        if number == at:
            os.write(2, f"killed before change {number}, {event} {path}\n".encode())
            kill(victims())
    return act


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):       # it ended in this moment
            os.kill(pid, signal.SIGKILL)


def die_in_writing(size: int) -> None:
    """This process, at byte `size` of any file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def count(place: Path, fresh: bool) -> None:
    """Print a number for every change of the file system. Of a --fresh only those until the answers before the first
    step are written: by then the old run is gone."""
    told = []

    def note(number, event, path):
        told.append(path)
        if not (fresh and any("step-000000.jsonl" in path for path in told)):
            os.write(1, f"\nCHANGES {number} \n".encode())
    on_changes(place, note)


class Setting:
    """One row of SETTINGS, its run that nobody touches, and what a killed run finds when it starts."""

    def __init__(self, name: str, world: Path, torchrun: bool):
        self.name, self.world, self.torchrun = name, world, torchrun
        self.fresh, self.ranks = name.startswith("fresh"), 2 if "ranks" in name else 1
        self.home = world / ("torchrun" if torchrun else "kills") / name
        calm = self.home / "calm"
        calm.mkdir(parents=True)
        ended, self.events = self.counted(calm, False)
        if ended.status:
            raise SystemExit(f"{name}: a run that nobody attacks fails\n{ended.text}")
        self.wanted, self.seconds = result(calm / "run"), ended.seconds
        self.old = calm
        if name in ("fresh_cut", "fresh_other", "fresh_foreign_files"):
            self.old = self.home / "old"
            self.old.mkdir()
            self.start(self.old, False, **({"lr": 0.02} if name == "fresh_other" else {}),
                       at=70 if name == "fresh_cut" else 0)
        if self.fresh:          # the changes in which the old run goes and the new one begins
            self.copy_of_old(self.home / "count")
            self.events = self.counted(self.home / "count", True)[1]

    def command(self, place: Path, fresh: bool, **flags) -> list[str]:
        return arguments(self.world, runs=place, fresh=fresh or None, **(SETTINGS[self.name] | flags))

    def start(self, place: Path, fresh: bool, at: int = 0, size: int = 0, seconds: float = 0, victim: int = 0,
              **flags) -> Ended:
        """The command, killed before change `at`, at byte `size` of a file, or after `seconds`; 0: left alone.
        With several processes it is number `victim` that is killed, or BOTH."""
        argv = self.command(place, fresh, **flags)
        if self.ranks > 1 and self.torchrun:
            return torchrun(argv, place, seconds, victim, at=at, size=size)

        def body(rank=0):
            if at and rank == victim % 2:
                on_changes(place, killer(at, lambda: [os.getpid()]))
            if size and rank == victim % 2:
                die_in_writing(size)
            return program(argv)
        if self.ranks == 1:
            children = [Child(body, self.world)]
        else:
            children = start_ranks([lambda: body(0), lambda: body(1)], self.world)
        if seconds:
            time.sleep(seconds)
            for rank, child in enumerate(children):
                if victim in (BOTH, rank):
                    child.kill()

        def stop():             # as torchrun: the others are asked to leave, then told
            for child in children:
                child.kill(signal.SIGKILL if victim == BOTH else signal.SIGTERM)
        return max(wait(children, 60, stop), key=lambda ended: ended.status < 0)

    def copy_of_old(self, place: Path) -> None:
        place.mkdir()
        if self.fresh:
            shutil.copytree(self.old, place, symlinks=True, dirs_exist_ok=True)
        if self.name == "fresh_foreign_files":
            (place / "run" / "notes.txt").write_text("lr 0.01 looks best")

    def counted(self, place: Path, fresh: bool) -> tuple[Ended, int]:
        """A run that nobody touches, and how many changes of the file system there are to die before."""
        argv = self.command(place, fresh)

        def body():
            count(place, fresh)
            return program(argv)
        if self.ranks == 1:
            ended = run(body, self.world)
        elif self.torchrun:
            ended = torchrun(argv, place, count=True, fresh=fresh)
        else:
            ended = wait(start_ranks([body, lambda: program(argv)], self.world), 60)[0]
        return ended, int(ended.text.rpartition("CHANGES ")[2].split()[0]) if "CHANGES" in ended.text else 0

    def way(self, index: int, rng: random.Random) -> dict:
        """How number `index` of this setting dies."""
        all_of_them = (EVERYTHING, EVERYTHING, LAUNCHER) if self.torchrun else (BOTH,)
        victim = rng.choice((0, 0, 0, 1, *all_of_them)) if self.ranks > 1 else 0
        if victim == 1 or index % 5 == 4:
            return dict(seconds=rng.uniform(0, 0.9 * self.seconds), victim=victim)
        if index % 5 == 3 and victim <= BOTH:
            return dict(size=rng.choice((rng.randint(1, 400), rng.randint(1, 20000))), victim=victim)
        turn = index // 5 * 3 + index % 5       # 7919 is a prime: so many turns pass through all changes
        return dict(at=1 + (self.events // 2 + turn * 7919) % self.events, victim=victim)


def torchrun(argv: list[str], place: Path, seconds: float = 0, victim: int = 0, **told) -> Ended:
    """The real one, and 2 processes of this file. `told` is for the first of them; at an instant it is this process
    that kills."""
    world, late = str(place.parents[2]), []
    orders = json.dumps(dict(place=str(place), victim=victim) | told)
    begun = time.perf_counter()
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__, *argv],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place,
        env={**os.environ, "ATTACK_ORDERS": orders, "ATTACK_FENCE": world, "TMPDIR": world,
             "TORCHINDUCTOR_CACHE_DIR": world})
    limit = threading.Timer(180, lambda: (late.append(True), launcher.kill()))      # the two notice that it is gone
    limit.start()
    text, ranks = "", {}        # rank -> process id
    while seconds and len(ranks) < 2 and (line := launcher.stdout.readline()):
        text += line
        if line.startswith("BEGUN"):
            rank, pid = map(int, line.split()[1:])
            ranks[rank] = pid
    if len(ranks) == 2:
        time.sleep(seconds)
        kill({EVERYTHING: [launcher.pid, *ranks.values()], LAUNCHER: [launcher.pid]}.get(victim) or [ranks[victim]])
    text += launcher.stdout.read()      # ends when all of them have ended
    status = launcher.wait()
    limit.cancel()
    took = float(text.rpartition("TOOK ")[2].split()[0]) if "TOOK " in text else time.perf_counter() - begun
    return Ended(status, text, took, 0, bool(late))


def be_a_rank() -> int:
    """What a process of the real torchrun does."""
    rank, begun, orders = int(os.environ["RANK"]), time.perf_counter(), json.loads(os.environ["ATTACK_ORDERS"])
    place, victim, mine, launcher = Path(orders["place"]), orders["victim"], os.getpid(), os.getppid()

    def victims() -> list[int]:
        both = [int(pid) for thread in Path(f"/proc/{launcher}/task").iterdir()
                for pid in (thread / "children").read_text().split()]
        return {EVERYTHING: [launcher, *sorted(both, key=lambda pid: pid == mine)], LAUNCHER: [launcher]}.get(
            victim, [mine])
    if rank == 0 and orders.get("at"):
        on_changes(place, killer(orders["at"], victims))
    if rank == 0 and orders.get("size"):
        die_in_writing(orders["size"])
    if rank == 0 and orders.get("count"):
        count(place, orders["fresh"])
    common.fence(Path(os.environ["ATTACK_FENCE"]))
    import atexit
    atexit.register(lambda: rank == 0 and print(f"TOOK {time.perf_counter() - begun:.2f}", file=sys.__stderr__))
    print(f"BEGUN {rank} {mine}", file=sys.__stderr__, flush=True)
    return program(sys.argv[1:])


def attack(setting: Setting, index: int, args, tally: Tally) -> None:
    rng = random.Random(f"{args.seed} {setting.name} {index}")
    place = setting.home / f"at{index}"
    setting.copy_of_old(place)
    told = []
    for _ in range(3 if setting.name == "twice" else 1):
        way = setting.way(index, rng)
        ended = setting.start(place, setting.fresh, **way)
        told.append(f"{way} {(ended.text.strip().splitlines() or [''])[-1][:200]}")
        index += 1 if setting.name == "twice" else 0
    index = int(place.name[2:])
    again = setting.fresh and index % 2 == 1
    ended = setting.start(place, again)
    what = f"killed at {'; '.join(told)}; then {'with' if again else 'without'} --fresh" if setting.fresh else \
        f"killed at {'; '.join(told)}"
    if ended.status == 2 and setting.name == "fresh_other" and not again:
        try:
            whole = result(place / "run") == result(setting.old / "run")
        except (OSError, ValueError):
            whole = False
        if whole:
            ended = setting.start(place, True)
    notes = list(place.rglob("notes.txt"))
    if setting.name == "fresh_foreign_files" and not notes:
        return tally.bad("different", args, setting.name, index, f"{what}: notes.txt is gone, which no run wrote")
    if notes and ended.status == 2:     # it may refuse to go on beside a stranger's file
        notes[0].rename(setting.home / "notes.txt")
        ended = setting.start(place, False)
    if ended.status:
        return tally.bad("lost", args, setting.name, index, f"{what}: status {ended.status}", ended.text)
    try:
        found = result(place / "run")
    except (OSError, ValueError) as error:
        return tally.bad("different", args, setting.name, index, f"{what}: {error}")
    found["names"] = [name for name in found["names"] if name != "notes.txt"]
    if wrong := common.differences(found, setting.wanted):
        return tally.bad("different", args, setting.name, index, what, "\n".join(wrong))
    tally.good()
    shutil.rmtree(place)


def main(argv: list[str] | None = None, world: Path | None = None) -> int:
    args = options(__doc__, SETTINGS, 1000, argv, torchrun="start two_ranks with the real torchrun, 6 s a start")
    if world is None:
        with common.worlds(args.keep) as made:
            return main(argv, made)
    tally, settings = Tally("kills", ("lost", "different"), "kills.py"), {}
    work = common.schedule(args)
    for name, index in work:
        if name not in settings:
            settings[name] = Setting(name, world, args.torchrun)
        attack(settings[name], index, args, tally)
    return tally.close(len(work))


if __name__ == "__main__":
    sys.exit(be_a_rank() if "ATTACK_FENCE" in os.environ else main())
