"""Parallel: the same step over several processes, one per GPU. With one process, every function here hands
back what it was given.

    torchrun --nproc_per_node 4 train.py ...

Place in the loop: around it. N processes hold one student between them and take the same optimizer steps as one
process would, up to rounding:

    whole on every process   the rollout (token ids, a few numbers per token), rewards, signals, credit,
                             metrics. So a filter or a group statistic sees the whole step, and there is one
                             denominator
    divided                  writing: problem i is asked on process i mod N. Reading, forward and backward:
                             sequence b on process b mod N. Evaluation like writing
    sharded (FSDP2)          parameters, gradients and moments of the student; the teachers' parameters. A layer
                             is gathered for as long as it is in use

Sampling reads a whole copy of the model: gathering every layer for every token would cost more than decoding.
The head's gradient is added by hand (update.chunked_backward), so the whole head is gathered once per backward
pass and its whole gradient summed back into shards once at the end. Every process must make the same collective
calls: a process with fewer micro-batches than another makes up for them with empty ones.

Not here: tensor or pipeline parallelism. Memory that does not shrink with N: the sampling copy, the head with
its gradient, the hidden states of teachers with another tokenizer (their chunks are aligned over the whole
step), and, while it is loaded, one whole checkpoint.
"""
import atexit
import functools
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor

from model import Transformer
from tokenizer import UserError

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


def rank() -> int:
    return Group.rank


def world() -> int:
    return Group.world


# Beginning and end

def start() -> None:
    """Join the processes that torchrun started (its environment says how many). All but the first fall
    silent."""
    if "LOCAL_RANK" not in os.environ or os.environ["WORLD_SIZE"] == "1":    # schedulers set WORLD_SIZE alone, too
        return
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
    """End this process when another is in trouble: waiting in a collective it would never find out."""
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
    """Print to stderr, once however many processes say it, and end the others."""
    if Group.world == 1:
        print(sentence, file=sys.stderr)
    elif alarm():
        print(sentence, file=sys.__stderr__, flush=True)


def stop() -> None:
    """Wait for all, then leave the group."""
    if Group.world > 1:
        import torch.distributed as dist
        wait()
        Group.world, Group.rank = 1, 0
        Group.over.set()
        Group.watcher.join()        # a thread inside the store when the interpreter goes would abort it
        dist.destroy_process_group()


def run(main) -> int:
    """main() in each of the processes that torchrun started, or in the only one. Returns its exit status."""
    start()
    if Group.world == 1:
        return main()
    try:
        status = main()
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


def leave(status: int) -> None:
    """End this process without tearing the interpreter down: of one in forty, threads of the collectives that are still
    there then abort it."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def check(cfg) -> None:
    """What does not work on several processes is refused before anything is loaded."""
    if Group.world == 1:
        return
    if cfg.offload_optimizer:
        raise UserError("--offload_optimizer runs in one process: several already share the moments out; leave it out")
    if cfg.device == "mps":
        raise UserError("--device mps runs in one process; start it with python instead of torchrun")
    if cfg.device != "cpu" and torch.cuda.is_available() and Group.local >= torch.cuda.device_count():
        raise UserError(f"there are more processes than the {torch.cuda.device_count()} GPUs here; lower "
                        f"--nproc_per_node, or pass --device cpu")


# Words between the processes

def wait() -> None:
    largest(0)


def largest(number: int) -> int:
    """The largest of all processes' numbers."""
    if Group.world == 1:
        return number
    import torch.distributed as dist
    out = torch.tensor(number)
    dist.all_reduce(out, dist.ReduceOp.MAX)
    return int(out)


def gather(part_N: Tensor) -> list[Tensor]:
    """Every process's tensor (N, ...) on the CPU, by rank; N may differ. Numbers only: torch sends objects as pickles,
    which run as programs where they arrive, and the port is open to whoever can reach it."""
    if Group.world == 1:
        return [part_N]
    import torch.distributed as dist
    sizes = torch.zeros(Group.world, dtype=torch.int64)
    sizes[Group.rank] = len(part_N)
    dist.all_reduce(sizes)
    padded = part_N.new_zeros(int(sizes.max()), *part_N.shape[1:])
    padded[:len(part_N)] = part_N
    parts = [torch.empty_like(padded) for _ in range(Group.world)]
    dist.all_gather(parts, padded)
    return [part[:size] for part, size in zip(parts, sizes.tolist())]


def joined(value, mine_N: Tensor):
    """A tensor (N, ...), or a dict of them, with every row from the process to which it belongs: here those
    of mine_N."""
    if Group.world == 1:
        return value
    if isinstance(value, dict):
        return {name: joined(tensor, mine_N) for name, tensor in value.items()}
    import torch.distributed as dist
    value = value.clone()
    value[~mine_N] = 0          # whatever stands there, NaN too: one number and zeros sum to that number
    dist.all_reduce(value)
    return value


def spread(parts: list[Tensor], place_N: Tensor) -> Tensor:
    """(N,): the concatenated parts, whose entry place_N[n] belongs to row n; -1 = another process has it."""
    if Group.world == 1:
        return torch.cat(parts)
    mine_N = place_N >= 0
    out_N = torch.zeros(len(place_N), device=place_N.device, dtype=parts[0].dtype if parts else torch.float32)
    out_N[mine_N] = torch.cat(parts)[place_N[mine_N]] if parts else 0.0
    return joined(out_N, mine_N)


def same(tensor: Tensor | None) -> Tensor | None:
    """The first process's tensor. All computed it from the same numbers, but a GPU adds in any order, and a
    filter that falls differently on two processes would belong to neither step."""
    if Group.world > 1 and tensor is not None:
        import torch.distributed as dist
        tensor = tensor.contiguous()
        dist.broadcast(tensor, 0)
    return tensor


def on_first(function, *args) -> None:
    """function(*args) on the first process only; the others wait until it is done."""
    if Group.rank == 0:
        function(*args)
    wait()


# Dividing the work

def owned(number: Tensor) -> Tensor:
    """Of these sequence numbers, which are this process's?  bool, same shape."""
    return number % Group.world == Group.rank


def in_step(micro_batches):
    """Decorates a generator of (tokens_bt, mask_bt, lengths, row_n): as many on every process, the missing ones
    without a row. A layer is gathered by all processes together, so each has to run it as often as the
    others."""
    @functools.wraps(micro_batches)
    def wrapped(*args, **kwargs):
        if Group.world == 1:
            return micro_batches(*args, **kwargs)
        batches = list(micro_batches(*args, **kwargs))
        missing = largest(len(batches)) - len(batches)
        device = args[0].tokens_BT.device
        tokens_bt = torch.zeros(1, 2, dtype=torch.int64, device=device)
        return batches + [(tokens_bt, tokens_bt.bool(), None, tokens_bt.new_empty(0))] * missing
    return wrapped


def divided(generate):
    """Decorates rollout.generate: every process writes its share of the prompts and gets the whole rollout.
    The random streams are numbered by the whole step, so the text does not depend on the number of
    processes."""
    @functools.wraps(generate)
    def wrapped(model, prompts, *, samples=1, max_new_tokens, **settings):
        if Group.world == 1:
            return generate(model, prompts, samples=samples, max_new_tokens=max_new_tokens, **settings)
        from rollout import assemble        # which imports this file
        if isinstance(model, Sharded):
            model = model.copy_as(model.compute_dtype)
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else max_new_tokens
        mine = list(range(Group.rank, len(prompts), Group.world))
        tokens_N3, ends_S2 = torch.zeros(0, 3, dtype=torch.float64), torch.zeros(0, 2, dtype=torch.int64)
        if mine:
            out = generate(model, [prompts[i] for i in mine], samples=samples, numbers=mine,
                           max_new_tokens=[limits[i] for i in mine], **settings)
            mask_BT = out.mask_BT.cpu()     # float64 holds ids and float32 numbers exactly
            tokens_N3 = torch.stack([x_BT.cpu()[mask_BT].double()
                                     for x_BT in (out.tokens_BT, out.logp_BT, out.entropy_BT)], 1)
            ends_S2 = torch.stack([mask_BT.sum(1), out.finished_B.cpu().long()], 1)
        parts = [list(zip(rows_N3.split(sizes_S2[:, 0].tolist()), sizes_S2[:, 1].tolist()))
                 for rows_N3, sizes_S2 in zip(gather(tokens_N3), gather(ends_S2))]
        whole = [parts[i % Group.world][i // Group.world * samples + sample]
                 for i in range(len(prompts)) for sample in range(samples)]
        tokens, logps, entropies = ([rows_N3[:, column].float() if column else rows_N3[:, column].long()
                                     for rows_N3, _ in whole] for column in range(3))
        return assemble([prompt for prompt in prompts for _ in range(samples)], tokens, logps, entropies,
                        [bool(finished) for _, finished in whole], model.device)
    return wrapped


# Sharded models

class Sharded(Transformer):
    """A Transformer whose parameters are DTensors, cut along their first axis. What it hands out is whole."""

    def head_weight(self) -> Tensor:
        return whole(super().head_weight().detach())

    def weights(self) -> Mapping:
        return Gathered(super().weights())


class Gathered(Mapping):
    """Checkpoint name -> whole tensor, gathered when it is asked for and not kept. All processes have to ask
    for the same names in the same order."""

    def __init__(self, shards: dict[str, Tensor]):
        self.shards = shards

    def __getitem__(self, name: str) -> Tensor:
        return whole(self.shards[name])

    def __iter__(self):
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)


def shard(*models: Transformer | None) -> None:
    """Cut the parameters over all processes, in place; a model that was cut before stays. Adapters come first.

    Gradients are summed over processes, not averaged: the scale of a row already holds the denominator of the
    whole step. Every module gathers for its own forward or backward pass and lets go at once (the outermost
    too, which FSDP2 would keep): between passes a parameter is always its shard. Layers are gathered in the
    dtype of the products, their gradients summed in float32.
    """
    if Group.world == 1:
        return
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    for model in models:
        if model is None or isinstance(model, Sharded):
            continue
        model.__class__ = Sharded
        settings = dict(mesh=Group.mesh(model.device.type), reshard_after_forward=True)
        policy = MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32)
        for layer in model.model.layers:
            fully_shard(layer, mp_policy=policy, **settings)
        if not model.config.tie_word_embeddings:
            fully_shard(model.lm_head, **settings)      # its forward is never called: only head_weight gathers it
        fully_shard(model, **settings)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)      # gloo cannot scale while it sums


def take_head(student: Transformer) -> Tensor:
    """The head with a .grad to add to: the parameter itself, or of a sharded student a whole copy whose
    gradient starts at 0."""
    if not isinstance(student, Sharded):
        return student.head_weight()
    head = student.head_weight().requires_grad_(Transformer.head_weight(student).requires_grad)
    head.grad = torch.zeros_like(head) if head.requires_grad else None
    return head


def give_head(student: Transformer, head: Tensor) -> None:
    """Sum the gradients that the processes added to their copies, and add each shard to its owner's .grad."""
    if isinstance(student, Sharded) and head.requires_grad:
        from torch.distributed.tensor import DTensor, Partial
        shard = Transformer.head_weight(student)
        summed = DTensor.from_local(head.grad, shard.device_mesh, [Partial()], run_check=False)
        shard.grad += summed.redistribute(placements=shard.placements)


def whole(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor; any other as it is."""
    return tensor.full_tensor() if Group.world > 1 and hasattr(tensor, "full_tensor") else tensor


def on_host(tensor: Tensor) -> Tensor:
    """The whole tensor on the CPU of the process that writes it; the others help to gather it and keep
    nothing."""
    found = whole(tensor.detach())
    return found.cpu() if Group.rank == 0 else found.new_empty(0)


def like(full: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor, cut as the parameter is; any other (AdamW's step count) as it is."""
    if Group.world == 1 or not hasattr(parameter, "placements") or full.shape != parameter.shape:
        return full
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(full.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def per_process(plan: dict[str, int]) -> dict[str, int]:
    """memory.memory_plan of one of the processes."""
    if Group.world == 1:
        return plan
    divided = ("student weights, float32", "gradients and AdamW moments", "teacher weights", "teacher hidden states")
    copy = "student copy for sampling"
    plan = {**plan, copy: plan[copy] or plan["student weights, float32"]}
    return {name: size // Group.world if name in divided else size for name, size in plan.items()}


# The run folder

class Follower:
    """Mixed into RunFolder on every process but the first: reads, takes part in gathering, writes nothing."""

    def __init__(self, path, config: dict, fresh: bool = False):
        self.path, self.config = Path(path), config

    def save(self, step, model, tokenizer, optimizer, state, best, average=None) -> None:
        from checkpoint import trainer_tensors      # which imports this file
        for _ in model.weights().values():          # as model.save does on the first
            pass
        trainer_tensors(model, optimizer, average)

    def write_summary(self, summary: dict) -> None:
        self.summary = lambda describe: describe(summary)       # the file may not be there yet

    def nothing(self, *args) -> None:
        pass

    link = prune = trim_metrics = log = write_samples = note_start = nothing


def run_folder(kind, path, config: dict, fresh: bool = False):
    """kind(path, config, fresh), which is RunFolder; on all processes but the first, its Follower."""
    if Group.rank == 0:
        folder = kind(path, config, fresh)
        wait()
        return folder
    wait()                          # until the first has emptied the folder, or refused it
    return type("Follower", (Follower, kind), {})(path, config)
