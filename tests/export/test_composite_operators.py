"""Composite operators are looked up once, and again when there is a new one."""

import torch
from torch._export import utils

from tokenloop.export.pte.composite_operators import composite_operators_once


def test_operators_are_looked_up_once_until_there_is_a_new_one(monkeypatch):
    look_up, times = utils._materialize_cpp_cia_ops, []
    monkeypatch.setattr(utils, "_materialize_cpp_cia_ops", lambda: times.append(1) or look_up())
    expected = utils._collect_all_valid_cia_ops()
    namespaces = len(times)
    with composite_operators_once():
        times.clear()
        for _ in range(3):
            assert utils._collect_all_valid_cia_ops() == expected
        assert len(times) == 1 < namespaces
        library = torch.library.Library("tokenloop_composite", "DEF")
        library.define("twice(Tensor x) -> Tensor", tags=())
        library.impl("twice", lambda x: x + x, "CompositeImplicitAutograd")
        new = utils._collect_all_valid_cia_ops() - expected
        assert new == {torch.ops.tokenloop_composite.twice.default} and len(times) == 2
    library._destroy()
