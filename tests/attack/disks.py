"""Disks: a run that cannot write ends with one sentence, and goes on when it can.

    python tests/attack/disks.py --count 300               about three minutes on one core

The k-th change of the file system below the run folder fails, by turns with ENOSPC, EIO, EROFS, EACCES and EDQUOT:
only that one, or that one and all that follow (on a full disk removing still works; on a broken one nothing does).
Writes inside libraries cannot be caught that way: there a file may not grow past n bytes (EFBIG), and, where this
process may mount one, the run folder lies on a disk of n bytes that is really full.

    traceback   it does not end with status 2 and one sentence (or 0, when the failure did not matter)
    lost        with the disk in order again the same command does not go on
    different   it goes on and ends otherwise than the run left alone, or the checkpoint that was there is gone
"""
import ctypes
import errno
import os
import random
import shutil
import sys
from pathlib import Path

import common
from common import Tally, arguments, on_changes, options, program, result, run, trouble

ERRORS = ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT")
GOING = ("os.remove", "os.rmdir", "shutil.rmtree")      # a full disk does not mind
SETTINGS = {
    "once": dict(save_every=1, eval_every=2),           # one failure, and all is well again
    "from_then_on": dict(save_every=1, eval_every=2),
    "teacher_writes": dict(recipe="sft", responses="teacher", save_every=1),
    "fresh": dict(save_every=1),                        # --fresh over a complete run
    "size": dict(save_every=1, eval_every=2),
    "full": dict(save_every=1, eval_every=2),
}


def failing(place: Path, at: int, name: str, lasting: bool) -> None:
    """From now on change number `at` below `place` fails, and those after it if `lasting`."""
    def act(number, event, path):
        if number == at or lasting and number > at and not (name in ("ENOSPC", "EDQUOT") and event in GOING):
            code = getattr(errno, name)
            raise OSError(code, os.strerror(code), path)
    on_changes(place, act)


class Setting:
    def __init__(self, name: str, world: Path):
        self.name, self.world, self.home = name, world, world / "disks" / name
        calm = self.home / "calm"
        calm.mkdir(parents=True)
        ended = run(lambda: program(self.command(calm)), world)
        if ended.status:
            raise SystemExit(f"{name}: a run that nobody attacks fails\n{ended.text}")
        self.wanted, self.calm = result(calm / "run"), calm
        self.mounts = name != "full" or mount(self.home / "calm", 10**6)
        if name == "full" and self.mounts:
            unmount(self.home / "calm")
        place = self.home / "count"
        self.prepare(place)

        def body():
            on_changes(place, lambda number, *what: os.write(1, f"\nCHANGES {number} \n".encode()))
            return program(self.command(place, name == "fresh"))
        self.events = int(run(body, world).text.rpartition("CHANGES ")[2].split()[0])
        shutil.rmtree(place)

    def command(self, place: Path, fresh: bool = False) -> list[str]:
        return arguments(self.world, runs=place, fresh=fresh or None, **SETTINGS[self.name])

    def prepare(self, place: Path) -> None:
        place.mkdir()
        if self.name == "fresh":
            shutil.copytree(self.calm, place, symlinks=True, dirs_exist_ok=True)


def mount(place: Path, size: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return libc.mount(b"none", os.fsencode(place), b"tmpfs", 0, f"size={size}".encode()) == 0


def unmount(place: Path) -> None:
    ctypes.CDLL(None).umount2(os.fsencode(place), 2)        # 2: once nobody looks at it any more


def attack(setting: Setting, index: int, args, tally: Tally) -> None:
    rng = random.Random(f"{args.seed} {setting.name} {index}")
    place, name, fresh = setting.home / f"at{index}", rng.choice(ERRORS), setting.name == "fresh"
    setting.prepare(place)
    at, lasting = 1 + index * 7919 % setting.events, setting.name == "from_then_on" or fresh and index % 2 == 1
    size = rng.choice((rng.randint(1, 300), rng.randint(1, 5000), rng.randint(1, 25000)))
    if setting.name == "size":
        what = f"no file may have more than {size} bytes"
        ended = run(lambda: program(setting.command(place)), setting.world, file_size=size)
    elif setting.name == "full":
        size = 4096 * rng.randint(1, 40)        # in pages; a complete run takes about 40
        what = f"a disk of {size} bytes"
        mount(place, size)
        ended = run(lambda: program(setting.command(place)), setting.world)
        shutil.copytree(place, setting.home / f"copy{index}", symlinks=True)
        unmount(place)
        place.rmdir()
        (setting.home / f"copy{index}").rename(place)
    else:
        what = f"change {at} of {setting.events} fails with {name}{', and all that follow' * lasting}"

        def body():
            failing(place, at, name, lasting)
            return program(setting.command(place, fresh))
        ended = run(body, setting.world)
    if wrong := trouble(ended):
        return tally.bad("traceback", args, setting.name, index, f"{what}: {wrong}", ended.text)
    said = ended.text
    if ended.status and "DIFFERENT" in (state := damage(place / "run")):
        return tally.bad("different", args, setting.name, index, f"{what}: {state}", said)
    # also where the failure did not matter: what could not be removed then, the next command removes
    ended = run(lambda: program(setting.command(place)), setting.world)
    if ended.status:
        return tally.bad("lost", args, setting.name, index, f"{what}; then it says", said + ended.text)
    try:
        found = result(place / "run")
    except (OSError, ValueError) as error:
        return tally.bad("different", args, setting.name, index, f"{what}: {error}", said)
    if wrong := common.differences(found, setting.wanted):
        return tally.bad("different", args, setting.name, index, what, said + "\n".join(wrong[:4]))
    tally.good()
    shutil.rmtree(place)


def damage(folder: Path) -> str:
    """Does `last` lead to a checkpoint that is whole, if it is there at all?"""
    last = folder / "last"
    if not os.path.lexists(last):
        return "no checkpoint"
    wanted = ("config.json", "model.safetensors", "tokenizer.json", "trainer.json", "trainer.safetensors")
    missing = [name for name in wanted if not (last / name).is_file()]
    return f"DIFFERENT: last/ has no {missing[0]}" if missing else "whole"


def main(argv: list[str] | None = None, world: Path | None = None) -> int:
    args = options(__doc__, SETTINGS, 300, argv)
    if world is None:
        with common.worlds(args.keep) as made:
            return main(argv, made)
    tally, settings, work = Tally("disks", ("traceback", "lost", "different"), "disks.py"), {}, common.schedule(args)
    for name, index in work:
        if name not in settings:
            settings[name] = Setting(name, world)
        if settings[name].mounts:
            attack(settings[name], index, args, tally)
        else:
            tally.skip()
    return tally.close(len(work))


if __name__ == "__main__":
    sys.exit(main())
