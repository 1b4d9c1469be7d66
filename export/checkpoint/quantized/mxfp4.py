"""MXFP4 weights of gpt-oss: blocks of 32 float4 (e2m1) values with an exponent that they share.

`X_blocks` uint8 [E, N, K / 32, 16] has two values a byte, the low half first. `X_scales` uint8
[E, N, K / 32] is the exponent plus 127 (OCP Microscaling Formats 1.0). As in transformers the
weight is [E, K, N], the layout of the model's own parameters. Its values are exact in bfloat16.
"""

from functools import partial

import torch
from torch import Tensor

from tokenloop.export.checkpoint.contents import Grid, StoredTensor
from tokenloop.export.checkpoint.quantized.settings import (
    Parts,
    Settings,
    gather,
    nibbles,
)
from tokenloop.models.kernels.experts.packing import EXPONENT_BIAS, float4_values, powers_of

# By code.
VALUES = float4_values(torch.arange(16)).bfloat16()
BLOCK_BYTES = 16


def read(settings: Settings, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Errors: those of quantized.as_floats."""
    settings.check_keys({"modules_to_not_convert", "dequantize"})
    suffixes = {"_blocks": "blocks", "_scales": "scales"}
    plain, weights = gather(settings, stored, suffixes, "")
    for parts in weights:
        blocks = parts.expect("blocks", ("U8",))
        if len(blocks.shape) != 4 or blocks.shape[-1] != BLOCK_BYTES:
            settings.misfit(
                f"{parts.name}_blocks",
                f"has the shape {blocks.shape}; (experts, rows, blocks, {BLOCK_BYTES}) is right",
            )
        parts.expect("scales", ("U8",), blocks.shape[:-1])
        experts, rows, count, _ = blocks.shape
        shape = experts, count * BLOCK_BYTES * 2, rows
        read = partial(_dequantize, parts)
        plain[parts.name] = StoredTensor(shape, "BF16", read, partial(_grid, parts))
    return plain


def _grid(parts: Parts) -> Grid:
    return Grid(-6, 6, 2 * BLOCK_BYTES, partial(_scales, parts), is_float4=True)


def _scales(parts: Parts) -> Tensor:
    """bfloat16 [E, K / 32, N]."""
    return powers_of(parts.read("scales").transpose(1, 2)).bfloat16()


def _dequantize(parts: Parts) -> Tensor:
    blocks, exponents = parts.read("blocks"), parts.read("scales").int() - EXPONENT_BIAS
    weight = torch.empty(*blocks.shape[:2], blocks.shape[2] * BLOCK_BYTES * 2, dtype=VALUES.dtype)
    # An expert at a time: indices take eight bytes.
    for row, block, exponent in zip(weight, blocks, exponents):
        values = VALUES[nibbles(block).long()].float()
        row.copy_(torch.ldexp(values, exponent[..., None]).flatten(-2))
    return weight.transpose(1, 2).contiguous()
