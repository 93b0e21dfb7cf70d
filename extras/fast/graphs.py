"""Decode steps as CUDA graphs: a step is recorded once per number of rows, and from then on replayed without the host's
some thousand launches.

In place of rollout.Slots.decode, where the cache reads each slot's own length (how far a masked pass reads changes from
step to step, and a recorded step cannot change).
"""
import torch

import rollout
from extras.fast.flash import FlashCache, flash_cache
from extras.fast.ways import put, stand_aside, way

plain_decode = rollout.Slots.decode


def on_model(model) -> None:
    if model.cache_type is flash_cache:
        put("graphs", rollout.Slots, "decode", decode)


@way("graphs", instead_of=plain_decode)
def decode(pool: rollout.Slots) -> None:
    """One step of all live slots."""
    if not isinstance(pool.cache, FlashCache):
        plain_decode(pool)
        return
    pool.cache.longest = min(max(pool.length), pool.cache.keys[0].shape[2] - 1)
    pool.length = [length + 1 for length in pool.length]
    graphs = pool.__dict__.setdefault("graphs", {})     # rows -> its step; None = ran once, not recorded
    # up to a power of two: few graphs, and free rows cost next to nothing
    n = min(1 << (len(pool.request) - 1).bit_length(), len(pool.count_S))
    if n in graphs and graphs[n] is None:       # the first step of its kind also loads kernels: it cannot be recorded
        try:
            graphs[n] = record(pool, graphs, n)
        except Exception as error:              # recording runs nothing, so the step is still to be done
            stand_aside("graphs", error)
    if graphs.setdefault(n) is None:
        pool.step(n)
    else:
        graphs[n].replay()


def record(pool: rollout.Slots, graphs: dict, n: int) -> torch.cuda.CUDAGraph:
    """The step of n rows, noted and not run. Without torch.cuda.graph(), which would also collect garbage and empty the
    allocator's cache, each time."""
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    shared = [other.pool() for other in graphs.values() if other][:1]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graph.capture_begin(*shared, capture_error_mode="thread_local")    # NCCL's watchdog may go on asking
        try:
            pool.step(n)
        finally:
            graph.capture_end()     # a stream left in capture would refuse everything that comes after
    return graph
