"""Devices, sizes and tolerances of the operators' tests: on a GPU at the networks' sizes, else in
Triton's interpreter with odd small ones."""

import pytest
import torch

from tokenloop.models.kernels.linear.packing import (
    FLOAT8,
    pack,
    pack_float8,
    quantize_float8,
    quantize_int4,
    quantize_int8,
)

pytest.importorskip("triton", reason="triton is not installed")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16]
# A rounding to bfloat16 is 2^-8 of a value; float32 sums differ in their order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}
EPS = 1e-6
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


def quantize_groups(weight: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Words of 8 bits and scales [K / size, N] of groups, as `keep` makes them of GGUF's Q8_0."""
    groups = weight.float().unflatten(1, (-1, size))
    scale = (groups.abs().amax(2, keepdim=True) / 127).half().float()
    codes = (groups / scale).round().clamp(-128, 127).int().flatten(1)
    return pack(codes, 8), scale[..., 0].T.contiguous()


def quantized(weight: torch.Tensor, kind: int | str, group_size: int = 0):
    """Words and scales: `kind` is 4 or 8 bits, or "fp8"; group_size 0 is a scale for each row, or
    of 4 bits the recipe's."""
    if kind == "fp8" and group_size:
        groups = weight.float().unflatten(1, (-1, group_size))
        # Scales of a checkpoint's blocks are no powers of 2.
        scale = groups.abs().amax(2, keepdim=True) / 448 * 1.003
        codes = (groups / scale).flatten(1).to(FLOAT8)
        return pack_float8(codes), scale[..., 0].T.contiguous()
    if kind == "fp8":
        return quantize_float8(weight)
    if kind == 4:
        return quantize_int4(weight, group_size or 128)
    return quantize_groups(weight, group_size) if group_size else quantize_int8(weight)


def assert_close(got: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    difference = (got.float() - expected.float()).abs().max()
    assert difference <= TOLERANCE[dtype] * max(1.0, expected.float().abs().max())


def on_device(*values):
    return [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in values]
