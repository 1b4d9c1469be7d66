"""Masks, penalties and biases on logits, in place. What no row asks for is read and not written."""

import triton
import triton.language as tl

from tokenloop.sampler.kernels.triton_exact import mul


@triton.jit
def mask_kernel(
    logits_ptr, allowed_ptr, vocab_size, stride, allowed_bytes, TILE: tl.constexpr
):  # fmt: skip
    """A program writes -inf to the tokens of its tile, of one row, that have no bit."""
    row, token = tl.program_id(1).to(tl.int64), tl.program_id(0) * TILE + tl.arange(0, TILE)
    inside = token < vocab_size
    byte = tl.load(allowed_ptr + row * allowed_bytes + token // 8, mask=inside, other=255)
    is_banned = inside & (((byte.to(tl.int32) >> (token % 8)) & 1) == 0)
    tl.store(logits_ptr + row * stride + token, float("-inf"), mask=is_banned)


@triton.jit
def adjust_kernel(
    logits_ptr, ids_ptr, scale_ptr, bias_ptr, count, stride, BLOCK: tl.constexpr
):  # fmt: skip
    """A program changes the logits of a part of a row's ids, of which no two are equal."""
    row, i = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place, inside = row * count + i, i < count
    token = tl.load(ids_ptr + place, mask=inside, other=-1)
    is_one = token >= 0
    scale = tl.load(scale_ptr + place, mask=is_one, other=1.0)
    bias = tl.load(bias_ptr + place, mask=is_one, other=0.0)
    logit_ptr = logits_ptr + row * stride + token
    x = tl.load(logit_ptr, mask=is_one, other=0.0)
    x = tl.where(x < 0, mul(x, scale), tl.div_rn(x, scale)) + bias
    tl.store(logit_ptr, x, mask=is_one)
