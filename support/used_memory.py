"""Used memory: what this process takes, what nobody does, and how its heap gives freed blocks back. memory.py says what
a run will need."""
import ctypes
import os
import sys
from pathlib import Path

import torch

from support import memory


def resident(field: str) -> int:
    """Bytes of this process, from a Linux kernel: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise ValueError(field)


def used_memory(device: torch.device, since: int = 0) -> int:
    """Bytes: the most that was ever in use on a GPU; of a process the most resident memory, less `since`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if os.path.exists("/proc/self/status"):     # rusage's peak begins at that of the process that started this one
        return resident("VmHWM") - since
    import resource     # not on Windows
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most * (1 if sys.platform == "darwin" else 1024) - since


def free_memory(device: torch.device) -> int | None:
    """Bytes that nobody uses at the moment; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def trim() -> None:
    """Hands the free pages of the heap back to the system, once; elsewhere than under glibc nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        pass


def give_back_freed_memory() -> None:
    """Tell glibc to hand large freed blocks back to the system at once instead of keeping them in pieces: chunk after
    chunk of logits otherwise leaves a heap of 1.1 full logits tensors behind, with this 0.1 (bench/loss.py). Large is
    above 4 MB: blocks that are paged in anew at every use cost more than the arithmetic on them. Smaller ones stay in
    the heap, whose free end is handed back only beyond 64 MB, for the same reason. Elsewhere: nothing."""
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, memory.MAPPED)         # M_MMAP_THRESHOLD, which grows by itself unless it is set
        libc.mallopt(-1, memory.FREE_HEAP)      # M_TRIM_THRESHOLD
    except (OSError, AttributeError):
        pass
