"""Dependencies of captured kernels that let one begin before the kernels ahead of it have ended."""

from collections.abc import Iterable
from typing import Any

import torch
from cuda.bindings import driver

# In cuda-bindings 12 the functions that know such dependencies have other names.
_get_edges, _add, _remove = (
    getattr(driver, f"{name}_v2", getattr(driver, name))
    for name in ("cuGraphGetEdges", "cuGraphAddDependencies", "cuGraphRemoveDependencies")
)


def let_overlap(graph: torch.cuda.CUDAGraph, kernels: Iterable[str]) -> int:
    """Make the dependencies among the graph's kernels of these names programmatic; how many there
    are.

    The graph is captured, kept, and not instantiated. Such a kernel waits by itself, by
    `griddepcontrol.wait`, for the kernels of these names before it. It still begins only when all
    other nodes before it have ended, and all other nodes after it begin only when it has ended. See
    "Programmatic Dependent Launch" in NVIDIA's CUDA C++ programming guide.
    """
    handle = driver.CUgraph(graph.raw_cuda_graph())
    *_, count = _call(_get_edges, handle, 0)
    befores, afters, *_ = _call(_get_edges, handle, count)
    names = frozenset(kernels)
    pairs = [
        (before, after)
        for before, after in zip(befores, afters)
        if _kernel(before) in names and _kernel(after) in names
    ]
    if pairs:
        edge = driver.CUgraphEdgeData()
        edge.from_port = int(driver.CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC)
        edge.type = int(driver.CUgraphDependencyType.CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC)
        lists = [list(nodes) for nodes in zip(*pairs)]
        _call(_remove, handle, *lists, None, len(pairs))
        _call(_add, handle, *lists, [edge] * len(pairs), len(pairs))
    return len(pairs)


def _kernel(node: driver.CUgraphNode) -> str | None:
    """The name of a node's kernel, if it is one."""
    (kind,) = _call(driver.cuGraphNodeGetType, node)
    if kind != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
        return None
    (parameters,) = _call(driver.cuGraphKernelNodeGetParams, node)
    if int(parameters.func):
        (name,) = _call(driver.cuFuncGetName, parameters.func)
    else:
        (name,) = _call(driver.cuKernelGetName, parameters.kern)
    return name.decode()


def _call(function: Any, *arguments: Any) -> tuple:
    """A driver function's results without its status. Errors: RuntimeError for a failure."""
    status, *results = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{function.__name__}: {status.name}")
    return tuple(results)
