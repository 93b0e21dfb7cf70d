"""Kill the teacher: a run whose teacher is on another machine ends as one that nobody touched, whoever is killed when.

    python tests/attack/kill_teacher.py --count 200        about ten minutes on one core

The server (extras/serve_teacher.py), the run, or both are killed at a random instant and started again; or the server
is stopped for a while and goes on, or is killed and stays away until the run has given up.

    lost        the run hangs beyond its deadline, ends in more or less than one sentence, or the same command does not
                go on
    different   it does, and weights, moments, records, answers, links or names are not those of the run left alone

Not in run_all.py: it listens at a port of this machine.
"""
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import common
from common import Child, Ended, Tally, arguments, differences, options, program, result, trouble, wait

KINDS = {           # what happens -> (flags of the run, seconds of its deadline)
    "server": (dict(), 20),                                                 # killed, and soon back
    "client": (dict(recipe="fire"), 20),                                    # killed, the same command again
    "both": (dict(micro_batch_tokens=1), 20),                               # killed; first one is back, then the other
    "frozen": (dict(privileged="solution", teacher_prompt="{{solution}};{{problem}}"), 20),     # stopped for a while
    "gone": (dict(), 2),                                                    # killed, and back when the run has ended
    "short": (dict(divergence="topk_reverse_kl", support="teacher", topk=4, teacher_topk=4), 20),   # server, k words
}
SLACK = 15          # seconds that a start and a few steps may take on a busy machine


class Setting:
    """One kind, its run that nobody touches, and the port of its server."""

    def __init__(self, kind: str, world: Path):
        self.kind, self.world, self.home, self.port = kind, world, world / "teacher" / kind, common.free_port()
        self.flags, self.deadline = KINDS[kind]
        calm = self.home / "calm"
        calm.mkdir(parents=True)
        server, client = self.serve(), self.start(calm)
        ended = self.end(client)
        gone(server)
        if ended.status:
            raise SystemExit(f"{kind}: a run that nobody attacks fails\n{ended.text}")
        self.wanted, self.seconds = result(calm / "run"), ended.seconds

    def serve(self) -> Child:
        def body():
            from extras import serve_teacher
            return serve_teacher.main(["--model", str(self.world / "teacher"), "--port", str(self.port)])
        return Child(body, self.world)

    def start(self, place: Path) -> Child:
        argv = arguments(self.world, runs=place, teacher=f"http://127.0.0.1:{self.port}", steps=6, save_every=1,
                         teacher_deadline=self.deadline, **self.flags)
        return Child(lambda: program(argv), self.world)

    def end(self, client: Child) -> Ended:
        """Of a run that has to end by itself."""
        return wait([client], self.deadline + self.seconds + SLACK if hasattr(self, "seconds") else 60)[0]


def gone(child: Child, number=signal.SIGKILL) -> None:
    child.kill(number)
    child.reap(False)


def attack(setting: Setting, index: int, args, tally: Tally) -> None:
    rng = random.Random(f"{args.seed} {setting.kind} {index}")
    place, kind = setting.home / f"at{index}", setting.kind
    place.mkdir()
    at, away = rng.uniform(0, setting.seconds), rng.choice((0.0, rng.uniform(0, 1.5)))
    what = f"{kind} after {at:.2f} s, for {away:.2f} s"
    server, client = setting.serve(), setting.start(place)
    time.sleep(at)
    if kind in ("client", "both"):
        client.kill()
        client.reap(False)
    if kind == "frozen":
        server.kill(signal.SIGSTOP)
        time.sleep(away)
        server.kill(rng.choice((signal.SIGCONT, signal.SIGKILL)))
    elif kind != "client":
        server.kill()
    if kind == "gone":
        ended = setting.end(client)
        if wrong := trouble(ended):
            gone(server)
            return tally.bad("lost", args, kind, index, f"{what}: {wrong}", ended.text)
    elif kind != "frozen":
        time.sleep(away)
    if kind != "client":
        gone(server)
        server = setting.serve()
    ended = setting.end(client if kind in ("server", "frozen", "short") else setting.start(place))
    gone(server)
    if ended.status or ended.late:
        return tally.bad("lost", args, kind, index, f"{what}: status {ended.status}", ended.text)
    try:
        wrong = differences(result(place / "run"), setting.wanted)
    except (OSError, ValueError) as error:
        wrong = [str(error)]
    if wrong:
        return tally.bad("different", args, kind, index, what, "\n".join(wrong))
    tally.good()
    shutil.rmtree(place)


def main(argv: list[str] | None = None, world: Path | None = None) -> int:
    args = options(__doc__, KINDS, 200, argv)
    if world is None:
        with common.worlds(args.keep) as made:
            return main(argv, made)
    os.environ.pop("XDG_CACHE_HOME", None)      # the children's home is the world
    tally, settings, work = Tally("teacher", ("lost", "different"), "kill_teacher.py"), {}, common.schedule(args)
    for kind, index in work:
        if kind not in settings:
            settings[kind] = Setting(kind, world)
        attack(settings[kind], index, args, tally)
    return tally.close(len(work))


if __name__ == "__main__":
    sys.exit(main())
