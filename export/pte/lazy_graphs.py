"""Graphs whose Python code is made when they are called, if they are.

torch.fx writes and compiles a function for every graph that a pass makes, and for the graphs within
it once more. Few of them are called before the next pass makes others. Where a program is lowered,
that takes a sixth of the time.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch.fx import GraphModule


@contextmanager
def lazy_graphs() -> Iterator[None]:
    """GraphModules that are made or changed within this get their code when it is asked for."""
    recompile = GraphModule.recompile

    def forward(graph: GraphModule, *arguments, **options):
        recompile(graph)
        return type(graph).forward(graph, *arguments, **options)

    class Code:
        """An instance's own attribute, once there is one, comes before this."""

        def __get__(self, graph: GraphModule, _) -> str:
            recompile(graph)
            return vars(graph)["_code"]

    def mark(graph: GraphModule) -> None:
        # Each GraphModule has a class of its own.
        type(graph).forward, type(graph)._code = forward, Code()
        vars(graph).pop("_code", None)
        specs = getattr(graph.graph._codegen, "pytree_info", None)
        if specs is not None:
            graph._in_spec, graph._out_spec = specs.in_spec, specs.out_spec
        graph._recompile_submodules()

    with mock.patch.object(GraphModule, "recompile", mark):
        yield
