"""Teachers that are no checkpoint in this process: --teacher takes an address where it takes a folder.

ELSEWHERE maps the beginning of an address to (cfg, setup, address) -> reader, which is made before any weights are
loaded. A reader reads the student's ids and has

    context                         the longest sequence that it can read
    read(batch, sequence_b)         teacher.Part, or another Untaught with `told`, of these sequences

The rest is as for any teacher (teachers.py): several of different kinds, privileged prompts, routes.
"""
ELSEWHERE: dict[str, object] = {}


def is_elsewhere(address: str) -> bool:
    return address.startswith(tuple(ELSEWHERE))


def addresses(cfg) -> list[str]:
    """Those in --teacher."""
    if is_elsewhere(cfg.teacher):
        return [cfg.teacher]
    return [address for part in cfg.teacher.split(",") if is_elsewhere(address := part.partition("=")[2])]


def find(cfg, setup, address: str):
    return next(make for prefix, make in ELSEWHERE.items() if address.startswith(prefix))(cfg, setup, address)
