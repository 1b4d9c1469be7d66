"""Packed weights as the kernels read them: int16 words, 64 of which are a span of a row.

A span holds 64 * (16 / bits) weights of consecutive inputs. Field j of word i, bits j * bits and
up, is input 64 * j + i of the span. So one load of a span is 128 bytes, a field's values in all 64
words are 64 neighbours, and two words that lie side by side in a register give the pair of bfloat16
that a tensor core takes. Rows are padded with zeros to whole spans.

Values of 4 bits are stored plus 8, and every group of a row has a scale. Values of 8 bits are two's
complement, and a row has one scale, or every group has. The scales of neighbouring rows lie side by
side: a program reads one group of many rows at a time.

Weights in float8 (e4m3: a sign, 4 bits of exponent with a bias of 7, 3 of mantissa) lie as those of
8 bits do, in tensors of that dtype, whose pairs of bytes are the words.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST_FLOAT8 = 448.0
SPAN_WORDS = 64
WORD_BITS = 16
# Inputs that share a scale. A span has a whole number of groups, and so has a field or a group of
# fields. Groups of 32, as GGUF's, are halves of a field.
GROUP_SIZES = 32, 64, 128, 256


def _round(
    weight: Tensor, group_size: int, largest: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight.shape
    grouped = weight.float().view(outputs, inputs // group_size, group_size)
    scale = (grouped.abs().amax(-1, keepdim=True).clamp(min=1e-12) / largest).to(dtype)
    values = (grouped / scale).round().clamp(-largest, largest).int()
    return values.view(outputs, inputs), scale[..., 0].T.contiguous()


def pack(values: Tensor, bits: int) -> Tensor:
    """int [N, K] values of 4 or 8 bits, symmetric around 0 -> int16 words [N, W].

    Raises ValueError for another number of bits, and for rows of 4 bits so short that they take as
    many words as rows of 8 bits.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits = {bits}: 4 or 8")
    fields = WORD_BITS // bits
    if values.shape[1] <= SPAN_WORDS * 2 and bits == 4:
        raise ValueError(f"{values.shape[1]} inputs of 4 bits: they need more than 128")
    values = F.pad(values.int(), (0, -values.shape[1] % (SPAN_WORDS * fields)))
    stored = values + 8 if bits == 4 else values & 0xFF
    stored = stored.view(values.shape[0], -1, fields, SPAN_WORDS)
    words = torch.zeros_like(stored[:, :, 0])
    for field in range(fields):
        words |= stored[:, :, field] << (bits * field)
    return words.flatten(1).to(torch.int16)


def unpack(words: Tensor, bits: int, inputs: int) -> Tensor:
    """The int32 [N, inputs] that `pack` was given."""
    fields = words.int().view(words.shape[0], -1, 1, SPAN_WORDS)
    shifts = torch.arange(0, WORD_BITS, bits, dtype=torch.int32, device=words.device)[:, None]
    stored = (fields >> shifts) & (2**bits - 1)
    values = stored - 8 if bits == 4 else stored - ((stored & 0x80) << 1)
    return values.flatten(1)[:, :inputs]


def pack_float8(values: Tensor) -> Tensor:
    """float8 [N, K] -> float8 [N, 2 * W], in the order of the words' bytes."""
    span = SPAN_WORDS * 2
    values = F.pad(values.view(torch.uint8), (0, -values.shape[1] % span))
    halves = values.view(values.shape[0], -1, 2, SPAN_WORDS)
    return halves.transpose(2, 3).flatten(1).view(FLOAT8)


def unpack_float8(packed: Tensor, inputs: int) -> Tensor:
    """The float8 [N, inputs] that `pack_float8` was given."""
    pairs = packed.view(torch.uint8).view(packed.shape[0], -1, SPAN_WORDS, 2)
    return pairs.transpose(2, 3).flatten(1)[:, :inputs].contiguous().view(FLOAT8)


def words_of(weight: Tensor) -> Tensor:
    """The int16 words [N, W] of a packed weight, be it integers or float8."""
    return weight.view(torch.int16) if weight.dtype == FLOAT8 else weight


def leaves_scale(weight: Tensor, scale: Tensor | None) -> bool:
    """Whether products are multiplied by the scales, and weights are not: float8 ones, which are
    exact in bfloat16, with a scale for each row."""
    return weight.dtype == FLOAT8 and scale is not None and scale.shape[0] == 1


def round_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [N, K] -> float8 [N, K] and scales float32 [N], by which each row's largest is the
    largest of float8."""
    scale = weight.float().abs().amax(1).clamp(min=1e-12) / LARGEST_FLOAT8
    values = (weight.float() / scale[:, None]).clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8)
    return values.to(FLOAT8), scale


def quantize_float8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [N, K] -> packed float8 [N, 2 * W] and scales float32 [1, N], those of
    `round_float8`."""
    values, scale = round_float8(weight)
    # With the strides of the transpose of rows, as the others have them.
    return pack_float8(values), scale[:, None].T


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float [N, K] -> words int16 [N, W] and scales float32 [1, N], from each row's largest."""
    values, scale = _round(weight, weight.shape[1], 127, torch.float32)
    return pack(values, 8), scale


def quantize_int4(weight: Tensor, group_size: int = 128) -> tuple[Tensor, Tensor]:
    """float [N, K] -> words int16 [N, W] and scales bfloat16 [K / group_size, N].

    Raises ValueError for a group size that is not in GROUP_SIZES or does not divide K.
    """
    if group_size not in GROUP_SIZES or weight.shape[1] % group_size:
        raise ValueError(
            f"group_size = {group_size} must be one of {GROUP_SIZES} and divide the "
            f"{weight.shape[1]} inputs"
        )
    values, scale = _round(weight, group_size, 7, torch.bfloat16)
    return pack(values, 4), scale


def weight_bits(weight: Tensor, inputs: int) -> int:
    """Bits of the packed numbers that `weight` [N, ...] of so many inputs holds: 4 or 8, or 0 for
    floating point that is not packed.

    Raises ValueError when its shape fits none.
    """
    if weight.dtype == FLOAT8:
        if weight.shape[1] == -(-inputs // (2 * SPAN_WORDS)) * 2 * SPAN_WORDS:
            return 8
        raise ValueError(f"{weight.shape[1]} bytes are not {inputs} inputs of float8")
    if weight.is_floating_point():
        if weight.shape[1] != inputs:
            raise ValueError(f"a weight of {weight.shape[1]} inputs was given {inputs}")
        return 0
    for bits in (8, 4):
        span = SPAN_WORDS * (WORD_BITS // bits)
        if weight.shape[1] == -(-inputs // span) * SPAN_WORDS:
            return bits
    raise ValueError(f"{weight.shape[1]} words are not {inputs} inputs of 4 or 8 bits")
