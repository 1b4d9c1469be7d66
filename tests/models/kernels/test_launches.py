"""What makes a function an operator."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._library import triton as torch_triton

pytest.importorskip("triton", reason="triton is not installed")

from tokenloop.models.kernels.launch import launches  # noqa: E402

ROOT = Path(__file__).resolve().parents[3]


def test_torch_looks_for_no_kernels_in_an_operators_source(monkeypatch):
    def search(function):
        raise AssertionError(function)

    monkeypatch.setattr(torch_triton, "get_inner_triton_kernels", search)

    def doubled(x: Tensor) -> Tensor:
        return x * 2

    launches.operator("doubled")(doubled)
    assert launches.FUNCTIONS.pop("tokenloop::doubled") is doubled
    assert str(torch.ops.tokenloop.doubled.default._schema).endswith("doubled(Tensor x) -> Tensor")


def test_no_operator_wraps_a_kernel_itself():
    """Torch would have to find it: graphs that it keeps go by the kernels' source."""
    sources = {path for room in ("models", "sampler") for path in (ROOT / room).rglob("*.py")}
    found = [path for path in sources if "wrap_triton" in path.read_text(encoding="utf-8")]
    assert found == [Path(launches.__file__).resolve()]
