"""Graphs written node by node: each node computes what torch does, also for other sizes."""

import functools

import pytest
import torch
from torch.export import Dim

from tokenloop.export.pte.xnnpack_graph import GraphBuilder, GraphDelegate


class Plain:
    """GraphBuilder's nodes on tensors."""

    add, subtract, multiply = torch.add, torch.sub, torch.mul
    relu = torch.relu
    softmax = staticmethod(lambda x: torch.softmax(x, -1))
    reshape = staticmethod(lambda x, *shape: x.reshape(shape))
    slice = staticmethod(lambda x, begin, size: x[..., begin : begin + size])
    concatenate = staticmethod(torch.cat)

    @staticmethod
    def matmul(a, b, transpose_b=False):
        return a @ (b.transpose(1, 2) if transpose_b else b)


# For each node what to do with an Ops (GraphBuilder or Plain) and inputs, the sizes of the inputs
# in the example, and others. Where an axis is not 1, different axes have different sizes.
EXACT = {
    "add": (lambda ops, a, b: ops.add(a, b), [(3, 4), (3, 4)], [(7, 2), (7, 2)]),
    "subtract": (lambda ops, a, b: ops.subtract(a, b), [(3, 4), (3, 4)], [(2, 5), (2, 5)]),
    "multiply": (lambda ops, a, b: ops.multiply(a, b), [(3, 4), (3, 4)], [(1, 9), (1, 9)]),
    "add, a row": (lambda ops, a, b: ops.add(a, b), [(2, 3, 4), (1, 4)], [(2, 5, 6), (1, 6)]),
    "add, a scalar": (lambda ops, a, b: ops.add(a, b), [(3, 4), (1,)], [(8, 7), (1,)]),
    "subtract from a row": (
        lambda ops, a, b: ops.subtract(a, b),
        [(1, 4), (2, 3, 4)],
        [(1, 7), (2, 6, 7)],
    ),
    "subtract, an outer difference": (
        lambda ops, a, b: ops.subtract(a, b),
        [(1, 5), (3, 1)],
        [(1, 2), (8, 1)],
    ),
    "multiply, columns": (
        lambda ops, a, b: ops.multiply(a, b),
        [(2, 3, 4, 5), (2, 3, 4, 1)],
        [(3, 2, 4, 5), (3, 2, 4, 1)],
    ),
    "relu": (lambda ops, a: ops.relu(a), [(3, 4)], [(7, 9)]),
    "a node of a node": (
        lambda ops, a, b, c: ops.multiply(ops.relu(ops.subtract(a, b)), c),
        [(3, 4), (3, 4), (3, 1)],
        [(5, 6), (5, 6), (5, 1)],
    ),
    "an input taken twice": (
        lambda ops, a, b: ops.subtract(ops.add(a, b), ops.multiply(b, a)),
        [(3, 4), (3, 4)],
        [(2, 6), (2, 6)],
    ),
    "reshape": (
        lambda ops, a: ops.reshape(a, 2, -1, 5),
        [(2, 3, 10)],
        [(2, 7, 10)],
    ),
    "reshape, more axes": (
        lambda ops, a: ops.reshape(a, -1, 2, 3, 1),
        [(4, 6)],
        [(9, 6)],
    ),
    "reshape, fewer axes": (lambda ops, a: ops.reshape(a, -1), [(2, 3, 4)], [(5, 3, 7)]),
    "slice, the begin": (lambda ops, a: ops.slice(a, 0, 3), [(2, 4, 8)], [(5, 3, 8)]),
    "slice, the middle": (lambda ops, a: ops.slice(a, 2, 3), [(2, 4, 8)], [(5, 3, 8)]),
    "slice, the end": (lambda ops, a: ops.slice(a, 7, 1), [(2, 4, 8)], [(5, 3, 8)]),
    "slice, everything": (lambda ops, a: ops.slice(a, 0, 8), [(2, 4, 8)], [(5, 3, 8)]),
}
NEAR = {
    "softmax": (lambda ops, a: ops.softmax(a), [(2, 3, 4)], [(1, 5, 17)]),
    "matmul": (lambda ops, a, b: ops.matmul(a, b), [(2, 3, 4), (2, 4, 5)], [(2, 6, 9), (2, 9, 8)]),
    "matmul, transposed": (
        lambda ops, a, b: ops.matmul(a, b, transpose_b=True),
        [(2, 3, 4), (2, 5, 4)],
        [(2, 6, 4), (2, 33, 4)],
    ),
    "matmul, of one row": (
        lambda ops, a, b: ops.matmul(a, b),
        [(1, 3, 4), (1, 4, 5)],
        [(1, 1, 4), (1, 4, 40)],
    ),
    "softmax of a product": (
        lambda ops, a, b: ops.softmax(ops.matmul(a, b, transpose_b=True)),
        [(2, 3, 4), (2, 5, 4)],
        [(2, 8, 4), (2, 9, 4)],
    ),
}
PART_SIZES = (3, 2, 4, 9, 6, 5, 7)
for parts, axis in zip(range(2, 8), (0, 1, 2, 1, 2, 0)):
    examples, others = [[2, 3, 4] for _ in range(parts)], [[5, 8, 6] for _ in range(parts)]
    for example, other, size in zip(examples, others, PART_SIZES):
        example[axis], other[axis] = size, size + 10
    EXACT[f"concatenate {parts} on axis {axis}"] = (
        functools.partial(lambda axis, ops, *parts: ops.concatenate(parts, axis), axis),
        examples,
        others,
    )
CASES = EXACT | NEAR


def dynamic_shapes(examples, others) -> list[dict[int, Dim]]:
    """Axes that may change; those whose sizes change from the same to the same are one."""
    dims: dict[tuple[int, int], Dim] = {}

    def dim(size: int, other: int) -> Dim:
        if (size, other) not in dims:
            dims[size, other] = Dim(f"from_{size}_to_{other}", min=1, max=max(size, other))
        return dims[size, other]

    return [
        {i: dim(size, other) for i, (size, other) in enumerate(zip(a, b)) if size != other}
        for a, b in zip(examples, others)
    ]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def graph_of(as_method):
    """A function: name of a case -> the case's graph as a function of tensors."""

    @functools.cache
    def load(name: str):
        build, examples, others = CASES[name]
        graph = GraphBuilder()
        result = build(graph, *(graph.input(*shape) for shape in examples))
        reference = functools.partial(build, Plain)
        call = GraphDelegate(graph.serialize(result), lambda *inputs: [reference(*inputs)])
        inputs = [torch.zeros(*shape) for shape in examples]
        return as_method(call, inputs, dynamic_shapes(examples, others))

    return load


@pytest.mark.parametrize("size", ["the example's", "another"])
@pytest.mark.parametrize("name", CASES)
def test_a_node_gives_what_torch_gives(graph_of, name, size):
    build, *sizes = CASES[name]
    inputs = [random(*shape, seed=i) for i, shape in enumerate(sizes[size == "another"])]
    (actual,) = graph_of(name)(*inputs)
    tolerance = 0.0 if name in EXACT else 1e-5
    torch.testing.assert_close(actual, build(Plain, *inputs), rtol=tolerance, atol=tolerance)


def test_a_graph_can_go_back_to_the_sizes_that_it_had(graph_of):
    build, *sizes = CASES["softmax of a product"]
    for shapes in (sizes[0], sizes[1], sizes[0]):
        inputs = [random(*shape, seed=i) for i, shape in enumerate(shapes)]
        (actual,) = graph_of("softmax of a product")(*inputs)
        torch.testing.assert_close(actual, build(Plain, *inputs), rtol=1e-5, atol=1e-5)


def test_softmax_stands_numbers_whose_exponentials_are_infinite(graph_of):
    x = torch.tensor([[[1e30, 1e30, -1e30, 0.0]]]).expand(2, 3, 4)
    (actual,) = graph_of("softmax")(x)
    assert torch.equal(actual, torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(2, 3, 4))


@pytest.mark.parametrize("rows", [3, 1, 256])
def test_an_int8_input_is_its_codes_as_floats(as_method, rows):
    graph = GraphBuilder()
    codes, factor = graph.int8_input(3, 4), graph.input(1, 4)
    binary = graph.serialize(graph.multiply(codes, factor))
    call = GraphDelegate(binary, lambda codes, factor: [codes * factor])
    shapes = {0: Dim("rows", min=1, max=256)}, {}
    examples = torch.zeros(3, 4, dtype=torch.int8), torch.zeros(1, 4)
    run = as_method(call, examples, shapes)
    every = torch.arange(-128, 128, dtype=torch.int8)[:, None].expand(-1, 4)[-rows:]
    factor = torch.tensor([[1.0, -1.0, 0.5, 3.0]])
    assert torch.equal(run(every, factor)[0], every.float() * factor)


def test_outputs_come_in_the_order_in_which_serialize_is_given_them(as_method):
    graph = GraphBuilder()
    a, b = graph.input(3), graph.input(3)
    total = graph.add(a, b)
    positive = graph.relu(total)
    # The sum is an output and what another node takes.
    call = GraphDelegate(
        graph.serialize(positive, total, graph.subtract(a, b)),
        lambda a, b: [torch.relu(a + b), a + b, a - b],
        outputs=3,
    )
    run = as_method(call, (torch.zeros(3), torch.zeros(3)))
    a, b = random(3, seed=1), random(3, seed=2)
    assert all(map(torch.equal, run(a, b), [torch.relu(a + b), a + b, a - b]))


def test_inputs_are_numbered_in_the_order_of_their_definition(as_method):
    graph = GraphBuilder()
    a, b = graph.input(3), graph.input(3)
    binary = graph.serialize(graph.subtract(b, a))
    call = GraphDelegate(binary, lambda a, b: [b - a])
    run = as_method(call, (torch.zeros(3), torch.zeros(3)))
    a, b = random(3, seed=1), random(3, seed=2)
    assert torch.equal(run(a, b)[0], b - a)
