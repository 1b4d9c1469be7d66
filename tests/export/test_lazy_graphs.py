"""Graphs get their Python code when they are called, and compute what they would have."""

import copy
import operator

import pytest
import torch
from torch.fx import Graph, GraphModule

from tokenloop.export.pte.lazy_graphs import lazy_graphs


def graph_of(function, inner: GraphModule | None = None) -> GraphModule:
    """x -> function(x, 2), after `inner` if there is one."""
    graph = Graph()
    x = graph.placeholder("x")
    root = torch.nn.Module()
    if inner is not None:
        root.inner = inner
        x = graph.call_module("inner", (x,))
    graph.output(graph.call_function(function, (x, 2)))
    return GraphModule(root, graph)


def change(graph: GraphModule, function) -> None:
    (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
    node.target = function


@pytest.mark.parametrize("after", [False, True], ids=["within", "afterwards"])
def test_a_graph_computes_what_it_was_changed_to(after):
    x = torch.tensor(5.0)
    with lazy_graphs():
        inner = graph_of(operator.add)
        outer = graph_of(operator.mul, inner)
        assert outer(x) == 14
        # As torch.fx has it, one call for the outer graph is enough.
        change(outer.inner, operator.sub)
        change(outer, operator.truediv)
        outer.recompile()
        other = copy.deepcopy(outer)
        change(other, operator.mul)
        other.recompile()
        if not after:
            assert (outer(x), other(x)) == (1.5, 6)
            assert "x - 2" in inner.code and "inner / 2" in str(outer)
    assert (outer(x), other(x)) == (1.5, 6)
    assert "x - 2" in inner.code and "inner / 2" in str(outer)
    change(outer, operator.add)
    outer.recompile()
    assert outer(x) == 5


def test_a_graph_that_nobody_calls_gets_no_code(monkeypatch):
    written, python_code = [], Graph.python_code

    def write(graph, *arguments, **options):
        written.append(graph)
        return python_code(graph, *arguments, **options)

    monkeypatch.setattr(Graph, "python_code", write)
    with lazy_graphs():
        outer = graph_of(operator.mul, graph_of(operator.add))
        for _ in range(3):
            outer.recompile()
        assert not written
        outer(torch.tensor(1.0))
        outer(torch.tensor(1.0))
        assert len(written) == 2
