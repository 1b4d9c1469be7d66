"""What finds where top-k and top-p cut a row, among the tokens that triton_bins.py lists.

A row's cutoff is a packed int64 (logit, id): the last kept token in descending order, where of
equal logits the higher id comes first. A row that cuts nothing leaves at once.
"""

import triton
import triton.language as tl

from tokenloop.sampler.kernels.triton_exact import mass
from tokenloop.sampler.kernels.triton_keys import NOTHING, pack, value
from tokenloop.sampler.kernels.triton_tiles import load_logits


@triton.jit
def _load_tokens(row_ptr, list_ptr, start, size, vocab_size, column_stride, CHUNK: tl.constexpr):
    """Packed (logit, id) [CHUNK] of a row's list; past its end -inf, which no list has."""
    offsets = start + tl.arange(0, CHUNK)
    ids = tl.load(list_ptr + offsets, mask=offsets < size, other=vocab_size)
    return pack(load_logits(row_ptr, ids, vocab_size, column_stride), ids)


@triton.jit
def _weights(packed, cutoff, largest, temperature, BY_MASS: tl.constexpr):
    if BY_MASS:
        return tl.where(packed >= cutoff, mass(value(packed), largest, temperature), 0)
    else:
        return tl.full(packed.shape, 1, tl.int64)


@triton.jit
def _reached(packed, weights, thresholds):
    """The weight, int64 [M], of the tokens [N] from each of M thresholds upwards."""
    return tl.sum(tl.where(packed[None, :] >= thresholds[:, None], weights[None, :], 0), axis=1)


@triton.jit
def _search(
    row_ptr, list_ptr, size, vocab_size, column_stride,
    above, target, cutoff, largest, temperature,
    BY_MASS: tl.constexpr, LEVELS: tl.constexpr, FEW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The largest packed value from which upwards there are at least `target` (float64) tokens, or
    that much mass. `above` (int64) of it is before the list; the rest is the list's tokens from
    `cutoff` on."""
    if size <= FEW:
        packed = _load_tokens(row_ptr, list_ptr, 0, size, vocab_size, column_stride, FEW)
        weights = _weights(packed, cutoff, largest, temperature, BY_MASS)
        enough = (above + _reached(packed, weights, packed)).to(tl.float64) >= target
        floor = tl.max(tl.where(enough, packed, NOTHING))
    else:
        # 4 bits a level: 8 levels of the logit, then the id's, without digits that no id here has.
        floor = tl.full([], -0x8000000000000000, tl.int64)
        digits = tl.arange(0, 16).to(tl.int64)
        for level in range(LEVELS):
            shift = tl.where(level < 8, 60 - 4 * level, 4 * (LEVELS - 1 - level)).to(tl.int64)
            thresholds = floor + (digits << shift)
            reached = above + tl.zeros([16], tl.int64)
            start = tl.full([], 0, tl.int32)
            while start < size:
                packed = _load_tokens(
                    row_ptr, list_ptr, start, size, vocab_size, column_stride, CHUNK
                )
                weights = _weights(packed, cutoff, largest, temperature, BY_MASS)
                reached += _reached(packed, weights, thresholds)
                start += CHUNK
            digit = tl.sum((reached.to(tl.float64) >= target).to(tl.int32)) - 1
            floor += tl.maximum(digit, 0).to(tl.int64) << shift
    # All that tie with the k-th largest stay.
    return floor if BY_MASS else (floor >> 32) << 32


@triton.jit
def find_cutoff(
    row_ptr, list_ptr, plan_ptr, largest, temperature, k, p, vocab_size, column_stride,
    FEW: tl.constexpr, CHUNK: tl.constexpr, ID_DIGITS: tl.constexpr,
):  # fmt: skip
    """The last kept token of a row, packed with its id: tokens from it upwards are kept.

    First the k-th largest logit, of whatever id. Then the token with which top_p of the remaining
    mass is reached; of equal logits the higher id comes first.
    """
    cutoff = tl.full([], NOTHING, tl.int64)
    first, kth = tl.load(plan_ptr), tl.load(plan_ptr + 2)
    if tl.maximum(first, kth) >= 0:
        size = tl.load(plan_ptr + 6).to(tl.int32)
        total = tl.load(plan_ptr + 5)
        if kth >= 0:
            cutoff = _search(
                row_ptr, list_ptr, size, vocab_size, column_stride,
                tl.load(plan_ptr + 3), k.to(tl.float64),
                cutoff, largest, temperature, False, 8, FEW, CHUNK,
            )  # fmt: skip
        if p < 1:
            if kth >= 0:
                start = tl.full([], 0, tl.int32)
                while start < size:
                    packed = _load_tokens(
                        row_ptr, list_ptr, start, size, vocab_size, column_stride, CHUNK
                    )
                    total += tl.sum(_weights(packed, cutoff, largest, temperature, True))
                    start += CHUNK
            cutoff = _search(
                row_ptr, list_ptr, size, vocab_size, column_stride,
                # With a top_p of 0 the first token stays.
                tl.load(plan_ptr + 4), tl.maximum(p.to(tl.float64) * total.to(tl.float64), 1.0),
                cutoff, largest, temperature, True, 8 + ID_DIGITS, FEW, CHUNK,
            )  # fmt: skip
    return cutoff
