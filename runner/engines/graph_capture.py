"""How launches become one CUDA graph, whose kernels may begin while the ones ahead of them end."""

from collections.abc import Callable

import torch


def captured(
    run: Callable[[], object], pool: tuple[int, int], stream: torch.cuda.Stream,
    overlapping: list[str],
) -> torch.cuda.CUDAGraph:  # fmt: skip
    """A graph of what `run` submits on `stream`; it loads no kernel, and takes memory from `pool`.
    Kernels of the names `overlapping` wait by themselves for what they read."""
    graph = torch.cuda.CUDAGraph(keep_graph=True)
    with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
        run()
    if overlapping:
        # It takes a package that torch has only where it is built for CUDA.
        from tokenloop.runner.engines.programmatic_launch import let_overlap

        let_overlap(graph, overlapping)
    graph.instantiate()
    return graph
