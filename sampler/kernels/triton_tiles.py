"""How kernels of the sampler read a row's tiles and find what is largest in them.

`maxima` is int64 [B, splits]: of each tile the largest logit and its lowest id, packed.
"""

import triton
import triton.language as tl

from tokenloop.sampler.kernels.triton_keys import ID_MASK, NOTHING, key, of_key


@triton.jit
def numbers(x):
    """Logits as float32, with NaN as -inf."""
    x = x.to(tl.float32)
    return tl.where(x == x, x, float("-inf"))


@triton.jit
def load_any(row_ptr, ids, vocab_size, column_stride, WHOLE: tl.constexpr):
    """float32 logits of the ids, with NaN; unless WHOLE, ids beyond the row give -inf."""
    at = row_ptr + ids * column_stride
    x = tl.load(at) if WHOLE else tl.load(at, mask=ids < vocab_size, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def load_tile(row_ptr, start, vocab_size, column_stride, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """What load_any gives of a tile, by offsets that are constants."""
    ids = tl.arange(0, TILE)
    start_ptr = row_ptr + start * column_stride
    return load_any(start_ptr, ids, vocab_size - start, column_stride, WHOLE)


@triton.jit
def load_logits(row_ptr, ids, vocab_size, column_stride):
    """float32 logits of the ids; NaN and ids beyond the row give -inf."""
    return numbers(load_any(row_ptr, ids, vocab_size, column_stride, False))


@triton.jit
def tile_start(tile, vocab_size, TILE: tl.constexpr, WHOLE: tl.constexpr):
    """A tile's first id. Where WHOLE, the last tile begins early enough to end with the row: a
    token that is in two tiles does no harm, and no load needs a mask."""
    start = tile * TILE
    if WHOLE:
        start = tl.multiple_of(tl.minimum(start, vocab_size - TILE), 16)
    return start


@triton.jit
def load_maxima(maxima_ptr, row, splits, SPLITS: tl.constexpr):
    offsets = tl.arange(0, SPLITS)
    return tl.load(maxima_ptr + row * splits + offsets, mask=offsets < splits, other=NOTHING)


@triton.jit
def fold(x, STRIDE: tl.constexpr):
    """[N] -> [N / STRIDE, STRIDE / 4, 4]: a thread holds all of the first and the last axis."""
    return tl.reshape(x, [x.shape[0] // STRIDE, STRIDE // 4, 4])


@triton.jit
def largest_of(x, STRIDE: tl.constexpr):
    """The largest of float32 x [N], -inf where there is only NaN."""
    largest = tl.max(tl.max(fold(x, STRIDE), axis=0), axis=1)
    # A warp finds the largest of integers in one instruction.
    return of_key(tl.max(key(numbers(largest))))


@triton.jit
def first_of_largest(x, ids, nothing, STRIDE: tl.constexpr):
    """(the largest of x; its lowest id, or `nothing` where it is -inf)."""
    largest = largest_of(x, STRIDE)
    first = nothing
    if largest > float("-inf"):
        first = tl.min(tl.where(x == largest, ids, ID_MASK))
    return largest, first
