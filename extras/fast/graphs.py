"""Decode steps as CUDA graphs: a step is recorded once per number of rows, and from then on replayed without the host's
some thousand launches.

In place of rollout.Slots.decode, where the cache reads each slot's own length (how far a masked pass reads changes from
step to step, and a recorded step cannot change).
"""
import torch

import rollout
from extras.fast.flash import FlashCache

CUDA_GRAPHS = True          # False: launch every kernel of every decode step
plain_decode = rollout.Slots.decode


def on_model(model) -> None:
    if model.cache_type is FlashCache:
        rollout.Slots.decode = decode


def decode(pool: rollout.Slots) -> None:
    """One step of all live slots."""
    if not (CUDA_GRAPHS and isinstance(pool.cache, FlashCache)):
        plain_decode(pool)
        return
    pool.cache.longest = min(max(pool.length), pool.cache.keys[0].shape[1] - 1)
    pool.length = [length + 1 for length in pool.length]
    graphs = pool.__dict__.setdefault("graphs", {})     # rows -> its step; None = ran once, not recorded
    # up to a power of two: few graphs, and free rows cost next to nothing
    n = min(1 << (len(pool.request) - 1).bit_length(), len(pool.count_S))
    if n not in graphs:         # the first step of its kind also loads kernels, which cannot be recorded
        graphs[n] = None
        pool.step(n)
        return
    if graphs[n] is None:
        graphs[n] = record(pool, graphs, n)
    graphs[n].replay()


def record(pool: rollout.Slots, graphs: dict, n: int) -> torch.cuda.CUDAGraph:
    """The step of n rows, noted and not run. Without torch.cuda.graph(), which would also collect garbage and empty the
    allocator's cache, each time."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    shared = [other.pool() for other in graphs.values() if other][:1]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin(*shared, capture_error_mode="thread_local")    # NCCL's watchdog may go on asking
        pool.step(n)
        graph.capture_end()
    return graph
