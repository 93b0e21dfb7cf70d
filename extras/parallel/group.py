"""Group: the processes that torchrun started; how they meet, end, and speak to each other.

Trouble in one process has to end all of them, and with one sentence: a process that waits in a collective would never
find out. So the one in trouble says so in the store of torchrun, and a thread in each of the others looks there.

What is exchanged is numbers, never Python objects: torch sends those as pickles, which run as programs where they
arrive, and the port is open to whoever can reach it.
"""
import atexit
import functools
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from datetime import timedelta

import torch
from torch import Tensor

TROUBLE = "trouble"         # the key under which processes in trouble count themselves
LOOK_EVERY = 0.3            # seconds between looks for it
PATIENCE = timedelta(hours=2)   # a collective waits this long: the first process may be writing a large checkpoint


class Group:
    """The processes, as this one sees them."""
    rank, world, local = 0, 1, 0    # local: the rank among the processes of this machine
    mesh = None             # device type -> FSDP2's name for all processes
    store = None            # how trouble gets around when a collective cannot
    watcher = None          # the thread that ends this process when another is in trouble
    over = threading.Event()    # set: it need not look any more


# Beginning and end

def launched() -> bool:
    """Did torchrun start several processes? Schedulers set WORLD_SIZE alone, too."""
    return "LOCAL_RANK" in os.environ and os.environ["WORLD_SIZE"] != "1"


def join() -> None:
    """Meet the others. All but the first fall silent."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    Group.local, cuda = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available()
    if cuda and Group.local < torch.cuda.device_count():
        torch.cuda.set_device(Group.local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    Group.rank, Group.world = dist.get_rank(), dist.get_world_size()
    Group.mesh = functools.cache(lambda device: init_device_mesh(device, (Group.world,)))
    Group.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    Group.watcher = threading.Thread(target=watch, daemon=True)
    Group.watcher.start()
    if Group.rank:
        sys.stdout = sys.stderr = open(os.devnull, "w")


def watch() -> None:
    """End this process when another is in trouble."""
    while not Group.over.wait(LOOK_EVERY):
        try:
            trouble = Group.store.check([TROUBLE])
        except RuntimeError:        # the process that holds the store is gone
            trouble = True
        if trouble and not Group.over.is_set():
            os._exit(2)


def alarm() -> bool:
    """End the other processes. Was this one the first to call for it?"""
    Group.over.set()
    return Group.store.add(TROUBLE, 1) == 1


def complain(sentence: str) -> None:
    """support.start.complain: once however many processes say it, and the others end."""
    if alarm():
        print(sentence, file=sys.__stderr__, flush=True)


def finish(command) -> None:
    """The command, then the end of this process with its exit status."""
    try:
        status = command()
    except SystemExit as end:       # --help and --plan
        status = end.code or 0
    except BaseException:
        complain(f"{traceback.format_exc()}error: process {Group.rank} of {Group.world} failed, the others stop too")
        status = 2
    if Group.over.is_set():         # this process complained: no use in waiting for the others
        time.sleep(4 * LOOK_EVERY)  # the others see the key first, and not a connection that breaks
        os._exit(status)
    stop()
    leave(status)


def stop() -> None:
    """Wait for all, then leave the group."""
    import torch.distributed as dist
    barrier()
    Group.world, Group.rank = 1, 0
    Group.over.set()
    Group.watcher.join()        # a thread inside the store when the interpreter goes would abort it
    dist.destroy_process_group()


def leave(status: int) -> None:
    """End this process without tearing the interpreter down: of one in forty, threads of the collectives that are still
    there then abort it."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


# Words between the processes

def barrier() -> None:
    all_reduce_max(0)


def all_reduce_max(number: int) -> int:
    """The largest of all processes' numbers."""
    import torch.distributed as dist
    out = torch.tensor(number)
    dist.all_reduce(out, dist.ReduceOp.MAX)
    return int(out)


def broadcast(tensor: Tensor) -> Tensor:
    """The first process's tensor, written over this one's where its memory allows."""
    import torch.distributed as dist
    tensor = tensor.contiguous()
    dist.broadcast(tensor, 0)
    return tensor


def gather(part_N: Tensor) -> list[Tensor]:
    """Every process's tensor (N, ...) on the CPU, by rank; N may differ."""
    import torch.distributed as dist
    sizes = torch.zeros(Group.world, dtype=torch.int64)
    sizes[Group.rank] = len(part_N)
    dist.all_reduce(sizes)
    if not sizes.any():
        return [part_N] * Group.world
    padded = part_N.new_zeros(int(sizes.max()), *part_N.shape[1:])
    padded[:len(part_N)] = part_N
    parts = [torch.empty_like(padded) for _ in range(Group.world)]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes.tolist())]


def all_names(mine: Iterable[str]) -> list[str]:
    """The names that any process has, those of the first process first."""
    texts = gather(torch.tensor(list("\n".join(mine).encode()), dtype=torch.uint8))
    return list(dict.fromkeys(name for text in texts for name in bytes(text.tolist()).decode().split("\n") if name))


def joined(value_N: Tensor, mine_N: Tensor) -> Tensor:
    """(N, ...): every row from the process to which it belongs, here those of mine_N. A row of nobody is NaN."""
    import torch.distributed as dist
    value_N, owners_N = value_N.clone(), mine_N.to(torch.int32)
    value_N[~mine_N] = 0        # whatever stands there, NaN too: one number and zeros sum to that number
    dist.all_reduce(value_N)
    dist.all_reduce(owners_N)
    value_N[owners_N == 0] = torch.nan
    return value_N


def all_joined(found: dict[str, Tensor], mine_N: Tensor, nothing_N: Tensor) -> dict[str, Tensor]:
    """joined() of each tensor. A process without a row has found nothing under a name: nothing_N takes its place."""
    return {name: joined(found.get(name, nothing_N), mine_N) for name in all_names(found)}
