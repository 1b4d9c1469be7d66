"""A method that is linked of two gives what they give one after the other."""

import itertools

import numpy as np
import pytest
import torch
from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
from torch import nn
from torch._higher_order_ops.cond import cond_op

from tokenloop.export.pte.linking import chained
from tokenloop.export.pte.pte_program import to_program
from tokenloop.runner.engines.executorch_runtime import Program


class First(nn.Module):
    def forward(self, x):
        return cond_op(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,)) * 2


class Second(nn.Module):
    """Has a constant of its own, and lists of values."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.5, -3.0, 2.0]))

    def forward(self, y, z):
        y = cond_op(z.sum() > 0, lambda y, z: y * z, lambda y, z: y - z, (y, z))
        return torch.cat([y, z], dim=0).view(4, 3) * self.scale, y.sum(dim=1)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """first, second, and of both: linked, and linked_kept, which gives what is between them too."""
    x, z = torch.zeros(2, 3), torch.ones(2, 3)
    methods = {
        "first": torch.export.export(First(), (x,)),
        "second": torch.export.export(Second(), (x, z)),
    }
    manager = to_program(methods, {}, True, lambda what: None)
    emitted = manager.executorch_program
    first, second = emitted.execution_plan
    emitted.execution_plan += [
        chained("linked", first, second),
        chained("linked_kept", first, second, keep=True),
    ]
    file = PTEFile(emitted, manager._emitter_output.mutable_data, manager._named_data)
    path = tmp_path_factory.mktemp("linked") / "linked.pte"
    path.write_bytes(bytes(serialize_pte_binary(file, extract_delegate_segments=True)))
    return Program(path)


@pytest.mark.parametrize("signs", itertools.product([1, -1], repeat=2))
def test_linked_methods_give_what_they_give_one_after_the_other(program, signs):
    x, z = (
        (sign * np.arange(1, 7, dtype=np.float32) * step).reshape(2, 3)
        for sign, step in zip(signs, (1.5, 0.25))
    )
    between = program.load_method("first").call([x])[0].copy()
    expected = [a.copy() for a in program.load_method("second").call([between, z])]
    linked = program.load_method("linked").call([x, z])
    assert len(linked) == 2 and all(map(np.array_equal, linked, expected))
    kept = program.load_method("linked_kept").call([x, z])
    assert len(kept) == 3 and all(map(np.array_equal, kept, [between, *expected]))


def test_the_methods_that_were_linked_are_as_before(program):
    x, z = np.ones((2, 3), np.float32), np.ones((2, 3), np.float32)
    between = program.load_method("first").call([x])[0].copy()
    program.load_method("linked").call([-x, z])
    assert np.array_equal(program.load_method("first").call([x])[0], between)
