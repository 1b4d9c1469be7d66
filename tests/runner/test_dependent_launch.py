"""Which dependencies of a captured graph are made programmatic: with a driver that is made up, for
CUDA's has to see a GPU."""

import importlib
import sys
from enum import Enum, IntEnum
from types import ModuleType, SimpleNamespace

import pytest

Status = Enum("CUresult", ["CUDA_SUCCESS", "CUDA_ERROR_INVALID_VALUE"])
Kind = Enum("CUgraphNodeType", ["CU_GRAPH_NODE_TYPE_KERNEL", "CU_GRAPH_NODE_TYPE_MEMCPY"])
Dependency = IntEnum("CUgraphDependencyType", {"CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC": 1})


class Driver(ModuleType):
    """The functions of cuda.bindings.driver that are called, of graphs {(before, after): edge}
    whose nodes are kernels' names, or None for copies."""

    CUresult, CUgraphNodeType, CUgraphDependencyType = Status, Kind, Dependency
    CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC = 1
    CUgraphNode = str

    def __init__(self, suffix: str):
        super().__init__("cuda.bindings.driver")
        for name in ("cuGraphGetEdges", "cuGraphAddDependencies", "cuGraphRemoveDependencies"):
            setattr(self, name, self.of_another_time)
            setattr(self, name + suffix, getattr(self, name.removeprefix("cuGraph")))

    def of_another_time(self, *_):
        raise AssertionError("it does not know of programmatic dependencies")

    def CUgraph(self, handle):
        return handle

    def CUgraphEdgeData(self):
        return SimpleNamespace(from_port=0, to_port=0, type=0)

    def GetEdges(self, graph, count):
        if not count:
            return Status.CUDA_SUCCESS, None, None, None, len(graph)
        return Status.CUDA_SUCCESS, *zip(*graph), list(graph.values()), count

    def RemoveDependencies(self, graph, befores, afters, data, count):
        assert data is None and count == len(befores)
        for pair in zip(befores, afters):
            del graph[pair]
        return (Status.CUDA_SUCCESS,)

    def AddDependencies(self, graph, befores, afters, data, count):
        assert count == len(befores) == len(data)
        graph.update(zip(zip(befores, afters), data))
        return (Status.CUDA_SUCCESS,)

    def cuGraphNodeGetType(self, node):
        kinds = Kind.CU_GRAPH_NODE_TYPE_KERNEL, Kind.CU_GRAPH_NODE_TYPE_MEMCPY
        return Status.CUDA_SUCCESS, kinds[node.startswith("copy")]

    def cuGraphKernelNodeGetParams(self, node):
        # Kernels of libraries may have no function of a module.
        handle = FUNCTIONS.index(node) if node in FUNCTIONS else 0
        return Status.CUDA_SUCCESS, SimpleNamespace(func=handle, kern=node)

    def cuFuncGetName(self, function):
        return Status.CUDA_SUCCESS, FUNCTIONS[function].encode()

    def cuKernelGetName(self, kernel):
        return Status.CUDA_SUCCESS, kernel.encode()


FUNCTIONS = [None, "dot_kernel", "norm_kernel"]


@pytest.fixture(params=["", "_v2"], ids=["bindings 13", "bindings 12"])
def module(request, monkeypatch):
    driver = Driver(request.param)
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    bindings = ModuleType("cuda.bindings")
    bindings.driver = driver
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.delitem(sys.modules, "tokenloop.runner.engines.programmatic_launch", raising=False)
    yield importlib.import_module("tokenloop.runner.engines.programmatic_launch")
    sys.modules.pop("tokenloop.runner.engines.programmatic_launch")


def graph_of(edges):
    return SimpleNamespace(raw_cuda_graph=lambda: edges)


def test_kernels_that_wait_depend_on_one_another_by_programmatic_edges(module):
    pairs = [
        ("copy_in", "dot_kernel"), ("dot_kernel", "norm_kernel"), ("norm_kernel", "pointwise"),
        ("pointwise", "dot_kernel"), ("dot_kernel", "dot_kernel"), ("norm_kernel", "copy_out"),
    ]  # fmt: skip
    edges = dict.fromkeys(pairs)
    count = module.let_overlap(graph_of(edges), ["dot_kernel", "norm_kernel"])
    assert count == 2 and set(edges) == set(pairs)
    programmatic = {pair for pair, data in edges.items() if data}
    assert programmatic == {("dot_kernel", "norm_kernel"), ("dot_kernel", "dot_kernel")}
    assert all((edges[p].from_port, edges[p].type) == (1, 1) for p in programmatic)


def test_a_graph_without_such_kernels_stays_as_it_is(module):
    edges = {("a", "b"): None}
    assert module.let_overlap(graph_of(edges), ["dot_kernel"]) == 0
    assert edges == {("a", "b"): None}


def test_a_fault_of_the_driver_is_named(module, monkeypatch):
    monkeypatch.setattr(
        module.driver, "cuGraphNodeGetType", lambda node: (Status.CUDA_ERROR_INVALID_VALUE,)
    )
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE"):
        module.let_overlap(graph_of({("a", "b"): None}), ["dot_kernel"])
