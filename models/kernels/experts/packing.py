"""Matrices of routed experts as the kernels read those of quantized checkpoints.

MXFP4 (OCP Microscaling Formats 1.0): float4 numbers, e2m1, 32 neighbours of which share a power of
2. Their words are int16 [E, N, K / 4], 8 for a group of 32 inputs. Field j of word i, bits 4 j and
up, is input 8 j + i of the group. So the fields j of a group are 8 neighbours, and two words that
lie side by side in a register give the pair of bfloat16 that a tensor core takes. The powers are
exponents uint8 [E, N, K / 32], plus 127.

float8 [E, N, K] (e4m3) lies row by row. Its scales are float32 [E, N], one for each row, or
[E, N, G] for G groups of neighbours.
"""

import torch
from torch import Tensor

GROUP = 32
# Words of a group, and fields of a word.
WORDS, FIELDS = 8, 4
# By a code without its sign, which is the highest of 4 bits.
FLOAT4 = 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0
EXPONENT_BIAS = 127
# Sizes of float8's groups: multiples of the inputs that a program multiplies at a time. No size of
# float4's is among them.
GROUP_SIZES = 128, 64


def float4_codes(values: Tensor) -> Tensor:
    """uint8 codes of float values that are float4. Another value gets that of the next larger one,
    or of the largest."""
    steps = torch.tensor(FLOAT4, dtype=torch.float32, device=values.device)
    codes = torch.bucketize(values.abs(), steps).clamp_(max=len(FLOAT4) - 1)
    return (codes | values.signbit() << 3).to(torch.uint8)


def float4_values(codes: Tensor) -> Tensor:
    """float32 of uint8 codes."""
    values = torch.tensor([*FLOAT4, *(-value for value in FLOAT4)], device=codes.device)
    return values[codes.int()]


def pack_float4(codes: Tensor) -> Tensor:
    """uint8 [..., K] codes -> words int16 [..., K / 4]."""
    fields = codes.int().unflatten(-1, (-1, FIELDS, WORDS))
    words = sum(fields[..., field, :] << 4 * field for field in range(FIELDS))
    return words.flatten(-2).to(torch.int16)


def unpack_float4(words: Tensor) -> Tensor:
    """float32 [..., K] of words int16 [..., K / 4]."""
    shifts = torch.arange(0, 4 * FIELDS, 4, dtype=torch.int32, device=words.device)[:, None]
    codes = words.int().unflatten(-1, (-1, 1, WORDS)) >> shifts & 15
    return float4_values(codes.flatten(-3))


def powers_of(exponents: Tensor) -> Tensor:
    """float32 2^(exponent - 127) of exponents uint8."""
    ones = torch.ones_like(exponents, dtype=torch.float32)
    return torch.ldexp(ones, exponents.int() - EXPONENT_BIAS)


def dequantize(table: Tensor, scale: Tensor | None) -> Tensor:
    """float32 [E, N, K] of experts' matrices in any layout."""
    if scale is None:
        return table.float()
    if table.dtype == torch.int16:
        values = unpack_float4(table).unflatten(-1, (-1, GROUP))
        return (values * powers_of(scale)[..., None]).flatten(-2)
    if scale.ndim == 2:
        return table.float() * scale[..., None]
    groups = table.float().unflatten(-1, (scale.shape[-1], -1))
    return (groups * scale[..., None]).flatten(-2)
