"""Files of a checkpoint: which of them may be opened.

A checkpoint folder is often a stranger's: an unpacked archive may hold links to private files, pipes that never end,
names that climb out. So every file of a checkpoint is asked for here before it is opened or copied.
"""
import os
import stat
from pathlib import Path

from support.errors import UserError, read_json, shown


def checkpoint_file(folder: str | Path, name: str, optional: bool = False) -> Path | None:
    """folder / name, if that is a regular file which lies in the folder itself. None for a missing `optional` one.

    The folder may be a link. A file may be a link to another file of its folder, or into the blobs of the hub's cache
    (<repository>/snapshots/<revision>/name -> <repository>/blobs/<hash>); all other links are refused: what they lead
    to was never part of the checkpoint, and would be published with the next one that is saved.
    """
    path = Path(folder) / name
    if name in ("", ".", "..") or "/" in name or "\0" in name:
        raise UserError(f"{shown(name)} is no plain file name, so no file of {shown(folder)} is meant; refused")
    try:
        if optional and not os.path.lexists(path):
            return None
        root, target = Path(os.path.realpath(folder)), Path(os.path.realpath(path, strict=True))
        kind = os.stat(target).st_mode
    except FileNotFoundError as error:
        what = f"is a link to {shown(os.readlink(path))}, which does not exist" if path.is_symlink() else "is missing"
        raise UserError(f"{shown(path)} {what}; is the folder complete?") from error
    except (OSError, ValueError) as error:      # too long, a circle of links, no permission
        raise UserError(f"{shown(path)} cannot be read ({getattr(error, 'strerror', error)}); correct the name or the "
                        f"folder") from error
    blobs = [snapshot.parents[1] / "blobs" for snapshot in (root, *root.parents) if snapshot.parent.name == "snapshots"]
    if target.parent not in (root, *blobs):
        raise UserError(f"{shown(path)} is a link to {shown(target)}, outside the checkpoint's folder; put the file "
                        f"itself into the folder")
    if not stat.S_ISREG(kind):
        raise UserError(f"{shown(path)} is a folder, a pipe or a device, not a file; remove or rename it")
    return path


def checkpoint_json(folder: str | Path, name: str, optional: bool = False) -> dict:
    """The object in a JSON file of a checkpoint; {} for a missing `optional` one."""
    path = checkpoint_file(folder, name, optional)
    return {} if path is None else read_json(path)
