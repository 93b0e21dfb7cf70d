"""Plan: what memory.py estimates, in words; the device that is planned for; and which flags would help.

    plan    does not fit: about 26.2 GiB of 23.0 GiB, 3.2 GiB too many; --gradient_checkpointing would save the most,
            9.8 GiB

support/setup.py prints the verdict before anything is loaded, and with --plan all of it.
"""
import re
from dataclasses import replace

import torch

from support import memory as memory_file
from support.errors import UserError, shown
from support.extras import offers
from support.memory import (CHOSEN, PHASES, ROOM, Job, compute_dtype, fit, flag, fullest, host_plan, memory_plan,
                            peak, size_text, total_memory)
from support.used_memory import free_memory

UNITS = {"mib": 2**20, "gib": 2**30, "tib": 2**40, "mb": 10**6, "gb": 10**9, "tb": 10**12}


# The device

def parse_memory(text: str) -> int:
    """Bytes of `24GiB`, `80 GB`, `512MiB`."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?) ?([kmgt]i?b)", text.strip(), re.IGNORECASE | re.ASCII)
    size = float(found[1]) * UNITS.get(found[2].lower(), 0) if found else 0
    if not 2**20 <= size <= 2**50:
        raise UserError(f"--plan_memory {shown(text, 80)} is no size of a memory; write a number and its unit, as in "
                        f"24GiB, 80GB or 512MiB")
    return int(size)


def planned_device(cfg) -> tuple[torch.device, int]:
    """(the device of --plan, its bytes). Nothing is allocated there, and with --plan_memory it need not be here."""
    gpu = torch.cuda.is_available()
    device = torch.device(cfg.device if cfg.device != "auto" else "cuda" if gpu else "cpu")
    if cfg.plan_memory:
        return device, parse_memory(cfg.plan_memory) // (memory_file.processes() if device.type == "cpu" else 1)
    if device.type == "cuda" and not gpu or device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--plan --device {device.type}: there is none here that could be asked for its memory; say "
                        f"how much it has, as in --plan_memory 24GiB")
    return device, total_memory(device)


# What would help

def trials(cfg, job: Job) -> list[tuple[dict, bool]]:
    """(changed flags, whether the run stays the same but for rounding and speed): one change each; none undoes one."""
    sequences, length = cfg.problems * cfg.samples, job.prompt + cfg.max_new_tokens
    tokens, slots = min(cfg.micro_batch_tokens, sequences * length), max(sequences, job.held_out[0] * cfg.eval_k)
    found = [({"gradient_checkpointing": True}, True),
             ({"micro_batch_tokens": max(tokens // 2, length)}, True),
             ({"slots": max(min(cfg.slots, slots) // 2, 1)}, True),
             ({"chunk_rows": max(cfg.chunk_rows // 2, 16)}, True),
             ({"max_new_tokens": max(cfg.max_new_tokens // 2, 1)}, False),
             ({"problems": max(cfg.problems // 2, 1)}, False),
             ({"samples": max(cfg.samples // 2, min(cfg.samples, 2))}, False)]      # groups need two
    if job.device.type != "cpu":
        found += [({"offload_optimizer": True}, True), ({"teacher_memory": "stream"}, True),
                  ({"teacher_int8": True}, False)]
        found += [({"teacher_memory": "park"}, True)] * (flag(cfg, "teacher_memory") == "resident")
    if flag(cfg, "lora_rank") == 0 or flag(cfg, "lora_rank") > 16:
        found.append(({"lora_rank": 16}, False))
    if compute_dtype(cfg, job.device) == torch.float32:
        found.append(({"dtype": "bfloat16"}, False))
    return [(flags, same) for flags, same in found if all(hasattr(cfg, name) for name in flags)
            and all(holds for rules in offers("rules") for holds, _ in rules(replace(cfg, **flags)))]


def savings(cfg, job: Job) -> list[tuple[int, dict, bool]]:
    """(bytes saved at the peak, changed flags, same run?) of every flag that saves anything, the most first. The sizes
    that were chosen stay: a run with the flag would choose larger ones, for speed."""
    whole = peak(memory_plan(cfg, job))
    found = [(whole - peak(memory_plan(replace(cfg, **flags), job)), flags, same) for flags, same in trials(cfg, job)]
    return sorted((saved for saved in found if saved[0] >= max(2**20, whole // 100)), key=lambda saved: -saved[0])


def way_to_fit(cfg, job: Job) -> tuple[dict, int]:
    """(flags with which it fits, the bytes it then takes); ({}, 0) when nothing that is tried here is enough. Flags
    that leave the run as it is are tried alone first; each time the one that saves most, at the peak or else in sum:
    where two phases need nearly the same, each has to be made smaller."""
    def needs(flags: dict) -> tuple[int, int]:
        plan = memory_plan(replace(cfg, **flags), job)
        return peak(plan), sum(plan.values())
    for allowed in ((True,), (True, False)):
        changed, now = {}, needs({})
        while now[0] > job.memory:
            tried = [changed | flags for flags, same in trials(replace(cfg, **changed), job) if same in allowed]
            best = min(tried, key=needs)
            if needs(best) >= now:
                break
            changed, now = best, needs(best)
        else:
            for name in list(changed):      # what was tried early may not be needed in the end
                without = {other: value for other, value in changed.items() if other != name}
                changed = without if needs(without)[0] <= job.memory else changed
            return changed, needs(changed)[0]
    return {}, 0


def flag_text(flags: dict) -> str:
    return " ".join(f"--{name}" if value is True else f"--{name} {value}" for name, value in flags.items())


# In words

def verdict(cfg, job: Job) -> str:
    """Does it fit, by how much, and if not, which flag buys the most?"""
    need = peak(memory_plan(cfg, job))
    said = f"about {size_text(need)} of {size_text(job.memory)}"
    if need <= job.memory:
        return f"fits: {said}, {size_text(job.memory - need)} left"
    found = savings(cfg, job)
    best = f"{flag_text(found[0][1])} would save the most, {size_text(found[0][0])}" if found else "no flag saves much"
    return f"does not fit: {said}, {size_text(need - job.memory)} too many; {best}"


def way_text(cfg, job: Job) -> str:
    flags, need = way_to_fit(cfg, job)
    if flags:
        return f"it would fit with {flag_text(flags)}: about {size_text(need)}"
    return "no flags tried here make it fit: take smaller models, or more memory"


def chosen_text(cfg) -> str:
    return f"{cfg.slots} slots, micro-batches of {cfg.micro_batch_tokens:,} tokens, chunks of {cfg.chunk_rows:,} rows"


def largest_first(plan: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(((name, size) for name, size in plan.items() if size), key=lambda part: -part[1])


def host_text(cfg, job: Job) -> str:
    parts = largest_first(host_plan(cfg, job))
    whole = sum(size for _, size in parts)
    return (f"about {size_text(whole)} of the machine's own memory besides Python and CUDA: "
            + ", ".join(f"{name} {size_text(size)}" for name, size in parts))


def plan_lines(cfg, job: Job) -> list[str]:
    """All of --plan, the verdict first."""
    plan, found = memory_plan(cfg, job), savings(cfg, job)
    fits, phase = peak(plan) <= job.memory, fullest(plan)
    phase_of = {name: phase for phase, names in PHASES.items() for name in names}
    lines = [f"plan    {verdict(cfg, job)}", *([] if fits else [f"        {way_text(cfg, job)}"]),
             f"parts   on {job.device.type} in {str(compute_dtype(cfg, job.device)).removeprefix('torch.')}, largest "
             f"first; of what only a phase needs, the fullest phase's counts, here {phase}"]
    lines += [f"        {size_text(size):>10}  {name}" + (f"  ({phase_of[name]})" if name in phase_of else "")
              for name, size in largest_first(plan)]
    smallest = "" if fits else ": the smallest that are tried, where no flag names them"
    lines.append(f"chosen  {chosen_text(cfg)}{smallest}")
    if job.device.type != "cpu":
        lines.append(f"host    {host_text(cfg, job)}")
    for same, title in ((True, "the same steps but for rounding"), (False, "another run")):
        if flags := [f"{flag_text(flags)} {size_text(saved)}" for saved, flags, alike in found if alike is same]:
            lines.append(f"saves   {', '.join(flags)}  ({title})")
    return lines + ([] if cfg.plan_memory else host_warning(cfg, job))


def print_plan(cfg, job: Job) -> int:
    """Returns the exit status: 0 when it fits, 1 when it does not."""
    print("\n".join(plan_lines(cfg, job)))     # at once: a reader may stop after the first line
    return 0 if peak(memory_plan(cfg, job)) <= job.memory else 1


def announce(cfg, job: Job) -> int:
    """The verdict of a run that is about to load its models, on this machine. Returns the bytes at the peak."""
    plan = memory_plan(cfg, job)
    need, parts = peak(plan), ", ".join(f"{name} {size_text(size)}" for name, size in largest_first(plan)[:4])
    lines = [f"memory  {verdict(cfg, job)} ({chosen_text(cfg)})", f"        {parts} ... (--plan shows all)"]
    if need > job.memory:
        lines.append(f"        warning: it goes on, since this is an estimate; {way_text(cfg, job)}")
    elif (free := free_memory(job.device)) is not None and need > free:
        lines.append(f"        warning: only {size_text(free)} are free at the moment; end what else is running")
    if job.device.type != "cpu" and (flag(cfg, "offload_optimizer") or host_plan(cfg, job)["teacher weights"]):
        lines.append(f"        {host_text(cfg, job)}")
    print("\n".join(lines + host_warning(cfg, job)))
    return need


def host_warning(cfg, job: Job) -> list[str]:
    host, whole = sum(host_plan(cfg, job).values()), total_memory(torch.device("cpu"))
    if host <= whole:
        return []
    return [f"        warning: this machine has {size_text(whole)}, its own part of the run is about "
            f"{size_text(host)}; adapters (--lora_rank) need less"]


# What a run chose at its first start

def settle(cfg, job: Job, stored: dict | None = None):
    """cfg with slots, micro_batch_tokens and chunk_rows filled in where they are 0, and threads if they are stored:
    what the run's first start chose (`stored`), else what fits here. They decide in which order sums are taken, so a
    run that goes on keeps them, unless by the plan there is no memory for them here."""
    kept = {name: size for name in (*CHOSEN, "threads")
            if (size := (stored or {}).get(name)) and not getattr(cfg, name)}
    now = fit(replace(cfg, **kept), job)
    here = fit(replace(cfg, threads=now.threads), job)
    need, instead = (peak(memory_plan(sizes, job)) for sizes in (now, here))
    began = f"memory  this run began with {chosen_text(now)}"
    if need > job.memory and instead < need:
        print(f"{began}, about {size_text(need)} of the {size_text(job.memory)} here; they are chosen anew, and sums "
              f"are rounded differently from here on")
        return here
    if need > ROOM * job.memory and instead < need:
        print(f"{began}, more than would be chosen here; they are kept, so that every sum is rounded as before")
    return now


def chosen(cfg) -> dict[str, int]:
    """What a run folder keeps for settle(); after prepare.set_up, which sets the threads."""
    return {**{name: getattr(cfg, name) for name in CHOSEN}, "threads": torch.get_num_threads()}
