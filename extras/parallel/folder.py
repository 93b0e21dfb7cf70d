"""Folder: the first process writes the run folder. The others read it, take part in gathering what is saved, and write
nothing."""
from pathlib import Path

from extras.parallel.group import Group, barrier
from support.checkpoint import RunFolder, trainer_tensors


class First(RunFolder):
    """The run folder of the process that writes."""

    def keep(self, name: str, text: str) -> None:
        super().keep(name, text)
        barrier()


class Follower(RunFolder):
    """The run folder of the other processes."""

    def __init__(self, path: Path, config: dict):
        self.path, self.config = Path(path), config

    def save(self, step: int, model, tokenizer, optimizer, state: dict, best: bool, also: dict) -> None:
        for _ in model.weights().values():          # as model.save does on the first
            pass
        trainer_tensors(model, optimizer, also)

    def keep(self, name: str, text: str) -> None:
        barrier()                       # until the first has written it: it is read next

    def write_summary(self, summary: dict) -> None:
        self.summary = lambda describe: describe(summary)       # the file may not be there yet

    def nothing(self, *args) -> None:
        pass

    link = prune = trim_metrics = log = write_samples = write_page = note_start = nothing


def open_folder(path: Path, config: dict, fresh: bool = False) -> RunFolder:
    """support.start.open_folder"""
    if Group.rank == 0:
        folder = First(path, config, fresh)
        barrier()
        return folder
    barrier()                           # until the first has emptied the folder, or refused it
    return Follower(path, config)
