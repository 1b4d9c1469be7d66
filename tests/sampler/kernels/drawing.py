"""How tests of the sampler's kernels draw tokens: on a GPU, else in Triton's interpreter with tiles
so small that a short row has many."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tokenloop.sampler.kernels import operator  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
TILE = operator.TILE if ON_GPU else 16


def ours(function, *tensors, **options) -> list[int]:
    """The tokens that one of the operators gives."""
    token = function(*(x.to(DEVICE) for x in tensors), **{"tile": TILE} | options)
    assert token.dtype == torch.int64
    assert token.shape[1] == 1
    return token.flatten().tolist()


def parameters(rows: int, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Of each row: temperature, top_k, top_p, seed and position; some of them off."""

    def some_off(x: torch.Tensor, off: float) -> torch.Tensor:
        return torch.where(torch.rand(rows, generator=generator) < 0.3, off, x)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (rows,), generator=generator)

    return [
        some_off(torch.rand(rows, generator=generator) * 2, 0.0),
        some_off(integers(0, min(size, 400) + 3), 0).long(),
        some_off(1 - torch.rand(rows, generator=generator), 1.0),
        integers(-(2**63), 2**63 - 1),
        integers(0, 2**34),
    ]
