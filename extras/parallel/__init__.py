"""Parallel: the same step over several processes, one per GPU.

    torchrun --nproc_per_node 4 train.py ...

N processes hold one student between them and take the same optimizer steps as one process would, up to rounding:

    whole on every process   the rollout (token ids, a few numbers per token), rewards, signals, credit, metrics. So a
                             filter or a group statistic sees the whole step, and there is one denominator
    divided                  writing: the responses to prompt i on process i mod N. Reading, forward and backward:
                             sequence b on process b mod N. Evaluation like writing (divided.py)
    sharded (FSDP2)          parameters, gradients and moments of the student; the teachers' parameters (sharded.py)
    on the first alone       what is printed and what is written to the run folder (group.py, folder.py)

All of it is put in place of named functions when the processes meet (put_in_place); with one process nothing is
touched. Every process must make the same collective calls in the same order.

Not here: tensor or pipeline parallelism. Memory that does not shrink with N: the sampling copy, the head with its
gradient, the hidden states of teachers with another tokenizer (their chunks are aligned over the whole step), and,
while it is loaded, one whole checkpoint.
"""
import functools
import sys
from datetime import datetime

import torch

import losses
import rollout
import teacher as teacher_file
from extras.parallel import divided, folder, group, sharded
from extras.parallel.group import Group
from model import Transformer
from support import memory, report, start, tensors


def around(command):
    """What support.start runs; where torchrun started several processes, the command of one among them."""
    return functools.partial(run, command) if group.launched() and Group.world == 1 else command


def run(command) -> None:
    """command() in each of the processes that torchrun started. Ends this process with its exit status."""
    group.join()
    put_in_place()
    group.finish(command)


def put_in_place() -> None:
    start.complain, start.open_folder, start.now = group.complain, folder.open_folder, now
    memory.processes, memory.per_process = (lambda: Group.world), sharded.per_process
    tensors.on_host, tensors.like = sharded.on_host, sharded.like
    rollout.respond, losses.backward = divided.respond, divided.backward
    teacher_file.Teacher.read, teacher_file.Part.told = divided.read, functools.cached_property(divided.told)
    teacher_file.Part.told.__set_name__(teacher_file.Part, "told")
    for module in ("teacher", "support.held_out", "extras.report"):
        put(module, "disagreement", divided.disagreement)
    put("extras.cross_tokenizer.crossing", "whole_states", divided.whole_states)
    put("extras.cross_tokenizer.crossing", "whole_rows", divided.whole_rows)
    put("extras.teachers", "update_average", sharded.update_average)
    if compiling := sys.modules.get("extras.compile"):
        compiling.compile_model = functools.partial(compile_copy, compiling.compile_model)
    if Group.rank:
        report.trackers = lambda cfg, folder: []


def put(module: str, name: str, function) -> None:
    """`function` as module.name, where that module is used at all."""
    if module in sys.modules:
        setattr(sys.modules[module], name, function)


def compile_copy(compile_model, model) -> None:
    """extras.compile.compile_model of the student's copy to sample from; of the others each layer is, or will be,
    gathered around its own pass."""
    if model.title == "the student" and not sharded.is_sharded(model):
        compile_model(model)


def now() -> datetime:
    """The first process's: prompts may hold it."""
    moment = torch.tensor(datetime.now().timestamp(), dtype=torch.float64)
    return datetime.fromtimestamp(group.broadcast(moment).item())


def rules(cfg) -> list[tuple[bool, str]]:
    """What does not work on several processes is refused before anything is loaded."""
    if Group.world == 1:
        return []
    spare = cfg.device != "cpu" and torch.cuda.is_available() and Group.local >= torch.cuda.device_count()
    return [
        (not getattr(cfg, "offload_optimizer", False),
         "--offload_optimizer runs in one process: several already share the moments out; leave it out"),
        (cfg.device != "mps", "--device mps runs in one process; start it with python instead of torchrun"),
        (not spare, f"there are more processes than the {torch.cuda.device_count()} GPUs here; lower --nproc_per_node, "
                    f"or pass --device cpu"),
    ]


def student(cfg, model) -> None:
    if Group.world > 1:
        sharded.shard(model)


def attach(run) -> None:
    if Group.world == 1:
        return
    for model in (*run.kind.models, *run.more_models.values()):     # not Run.models(): a set has no order
        if isinstance(model, Transformer):      # else its weights are on another machine
            sharded.shard(model)
    clip, run.agree = run.clip, group.all_reduce_max
    run.clip = lambda parameters, max_norm: sharded.whole(clip(parameters, max_norm))
