"""The Triton kernel for what blocks of a packed chunk need, whatever state they begin with.

A block is BLOCK tokens of one sequence, from the sequence's own start. Of each value head it has
the inverse of a unit lower triangular matrix, the attention of its queries to its keys, and factors
for its tokens (arXiv:2412.06464, section 3.3, and reference.py). All blocks are computed at once.

Queries and keys enter products as they are given, and their lengths are factors of the results. So
products of 16-bit numbers are exact. The inverse and all factors are computed in float32.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.gated_delta_rule import reference
from tokenloop.models.kernels.gated_delta_rule.triton import L2_EPS, softplus
from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.launch.dot import dot

BLOCK = tl.constexpr(reference.CHUNK)
# The search looks at so many sequences together, so that one kernel serves any number of them.
MOST_SEQUENCES = tl.constexpr(reference.MOST_SEQUENCES)
# Factors of a block's tokens, float32 [FACTORS, BLOCK]: of what a token writes, of the state that
# its key and its query see, and of its key where the state takes it up.
FACTORS = tl.constexpr(4)
# The inverse begins with blocks of so many rows: a dot takes no fewer.
SMALL = tl.constexpr(16)


@triton.jit
def place_of(start, sequence):
    """Where the work buffers hold a sequence's first block. The sequence's number makes room for
    blocks that are not whole, so no two sequences share a place."""
    return start // BLOCK + sequence


@triton.jit
def find_block(starts_ptr, place, sequences):
    """The first token of the block at `place`, and where its sequence stops: not after the first
    token where there is no such block."""
    i = tl.arange(0, MOST_SEQUENCES)
    starts = tl.load(starts_ptr + i, mask=i < sequences, other=0)
    is_before = (i < sequences) & (place_of(starts, i) <= place)
    sequence = tl.sum(is_before.to(tl.int32), 0) - 1
    start = tl.load(starts_ptr + sequence)
    stop = tl.load(starts_ptr + sequence + 1)
    return start + (place - place_of(start, sequence)) * BLOCK, stop


@triton.jit
def product(a, b):
    """a times b, float32 [..., M, K] and [..., K, N]."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def is_corner(SIZE: tl.constexpr):
    """Which elements [1, SMALL, SMALL] are in the lower left quarter of a block of 2 * SIZE
    rows."""
    block = tl.arange(0, SMALL) // SIZE
    return ((block[:, None] == block[None, :] + 1) & (block[:, None] % 2 == 1))[None]


@triton.jit
def halves(x):
    """x[:, 0] and x[:, 1], of x [N, 2, SMALL, SMALL]."""
    number = tl.arange(0, 2)[None, :, None, None]
    return tl.sum(tl.where(number == 0, x, 0.0), 1), tl.sum(tl.where(number == 1, x, 0.0), 1)


@triton.jit
def unit_inverse(lower):
    """(I + lower)^-1 of a strictly lower triangular matrix [BLOCK, BLOCK], as its quarters
    [BLOCK / 2, BLOCK / 2]: the upper left, the lower left and the lower right one.

    As in reference.py, blocks on the diagonal are inverted and joined two by two. Up to SMALL rows
    all of these are in one tensor.
    """
    TILES: tl.constexpr = BLOCK // SMALL
    HALF: tl.constexpr = BLOCK // 2
    tile, row, side = tl.arange(0, TILES), tl.arange(0, SMALL), tl.arange(0, 2)
    tiles = tl.permute(tl.reshape(lower, (TILES, SMALL, TILES, SMALL)), (0, 2, 1, 3))
    down = (tile[:, None] - tile[None, :])[:, :, None, None]
    blocks = tl.sum(tl.where(down == 0, tiles, 0.0), 1)
    inverse = (row[:, None] == row[None, :]).to(tl.float32)[None]
    inverse = inverse - tl.where(is_corner(1), blocks, 0.0)
    for level in tl.static_range(1, 4):
        corner = tl.where(is_corner(2**level), blocks, 0.0)
        inverse -= product(product(inverse, corner), inverse)

    # Two by two: [TILES / 2, SMALL, SMALL].
    first, second = halves(tl.reshape(inverse, (TILES // 2, 2, SMALL, SMALL)))
    below = tl.sum(tl.where(down == 1, tiles, 0.0), 1)
    _, below = halves(tl.reshape(below, (TILES // 2, 2, SMALL, SMALL)))
    below = -product(product(second, below), first)
    # Joined: [2, BLOCK / 2, BLOCK / 2].
    i, j = side[None, :, None, None, None], side[None, None, None, :, None]
    diagonal = tl.where(i == 0, first[:, None, :, None, :], second[:, None, :, None, :])
    joined = tl.where(i == j, diagonal, tl.where(i > j, below[:, None, :, None, :], 0.0))
    joined = tl.reshape(joined, (2, HALF, HALF))
    first = tl.sum(tl.where(side[:, None, None] == 0, joined, 0.0), 0)
    second = tl.sum(tl.where(side[:, None, None] == 1, joined, 0.0), 0)

    quarter = (side[:, None, None, None] == 1) & (side[None, None, :, None] == 0)
    below = tl.where(quarter, tl.reshape(lower, (2, HALF, 2, HALF)), 0.0)
    below = tl.sum(tl.sum(below, 2), 0)
    return first, -product(product(second, below), first), second


@waits  # once it has its head's constants, and the place of its block, which the host wrote
@triton.jit(do_not_specialize=["sequences"])
def gated_delta_rule_blocks_kernel(
    q_ptr, k_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, starts_ptr,
    inverse_ptr, attention_ptr, factors_ptr, kept_ptr,
    sequences, heads_per_key: tl.constexpr, key_size: tl.constexpr, scale: tl.constexpr,
    q_stride_row: tl.constexpr, q_stride_head: tl.constexpr,
    k_stride_row: tl.constexpr, k_stride_head: tl.constexpr,
    a_stride_row, a_stride_head, b_stride_row, b_stride_head,
    BLOCK_KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The block at a place, of one value head."""
    HALF: tl.constexpr = BLOCK // 2
    head, place = tl.program_id(0), tl.program_id(1)
    begin, stop = find_block(starts_ptr, place, sequences)
    rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    bias = tl.load(dt_bias_ptr + head).to(tl.float32)
    token = tl.arange(0, BLOCK)
    exists = token < stop - begin
    key = tl.arange(0, BLOCK_KEYS)
    zero = wait(0)
    if begin + zero >= stop:
        return
    begin = begin.to(tl.int64) + zero
    key_head = head // heads_per_key

    # 1. Gates. What is not there neither changes a state nor lets it decay. The decay's logarithm
    # is float64, and two float32 in the matrices. A token may let a state decay by exp(-100) and
    # the next one by hardly anything: a difference of float32 sums does not tell that well.
    a_ptrs = a_ptr + begin * a_stride_row + head * a_stride_head + token * a_stride_row
    b_ptrs = b_ptr + begin * b_stride_row + head * b_stride_head + token * b_stride_row
    a = tl.load(a_ptrs, mask=exists, other=0.0).to(tl.float32)
    b = tl.load(b_ptrs, mask=exists, other=0.0).to(tl.float32)
    decay = tl.cumsum(tl.where(exists, -rate * softplus(a + bias), 0.0).to(tl.float64), 0)
    end = tl.sum(tl.where(token == BLOCK - 1, decay, 0.0), 0)
    after, before = tl.exp((end - decay).to(tl.float32)), tl.exp(decay.to(tl.float32))
    high = decay.to(tl.float32)
    low = (decay - high.to(tl.float64)).to(tl.float32)
    beta = 1.0 / (1.0 + tl.exp(-b))

    # 2. Products of keys and queries, and their lengths.
    q_ptrs = q_ptr + begin * q_stride_row + key_head * q_stride_head
    q_ptrs = q_ptrs + token[:, None] * q_stride_row + key[None, :]
    k_ptrs = k_ptr + begin * k_stride_row + key_head * k_stride_head
    k_ptrs = k_ptrs + token[:, None] * k_stride_row + key[None, :]
    of_keys = tl.zeros([BLOCK, BLOCK], tl.float32)
    of_queries = tl.zeros([BLOCK, BLOCK], tl.float32)
    q_squares = tl.zeros([BLOCK], tl.float32)
    k_squares = tl.zeros([BLOCK], tl.float32)
    for part in tl.range(0, key_size // BLOCK_KEYS, num_stages=STAGES):
        q = tl.load(q_ptrs + part * BLOCK_KEYS, mask=exists[:, None], other=0.0)
        k = tl.load(k_ptrs + part * BLOCK_KEYS, mask=exists[:, None], other=0.0)
        of_keys = dot(k, tl.trans(k), of_keys)
        of_queries = dot(q, tl.trans(k), of_queries)
        q, k = q.to(tl.float32), k.to(tl.float32)
        q_squares += tl.sum(q * q, 1)
        k_squares += tl.sum(k * k, 1)
    q_factor = scale / tl.sqrt_rn(q_squares + L2_EPS)
    k_factor = 1.0 / tl.sqrt_rn(k_squares + L2_EPS)

    # 3. Both matrices.
    between = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    factor = tl.exp(tl.where(token[:, None] >= token[None, :], between, float("-inf")))
    factor = factor * k_factor[None, :]
    attention = of_queries * factor * q_factor[:, None]
    lower = tl.where(
        token[:, None] > token[None, :], of_keys * factor * (beta * k_factor)[:, None], 0.0
    )

    number = place.to(tl.int64) * tl.num_programs(0) + head + zero
    square = token[:, None] * BLOCK + token[None, :]
    attention_ptrs = attention_ptr + number * BLOCK * BLOCK + square
    tl.store(attention_ptrs, attention.to(attention_ptr.dtype.element_ty))
    factor_ptrs = factors_ptr + number * FACTORS * BLOCK + token
    tl.store(factor_ptrs, beta)
    tl.store(factor_ptrs + BLOCK, before * k_factor)
    tl.store(factor_ptrs + 2 * BLOCK, before * q_factor)
    tl.store(factor_ptrs + 3 * BLOCK, after * k_factor)
    tl.store(kept_ptr + number, tl.exp(end.to(tl.float32)))

    upper_left, lower_left, lower_right = unit_inverse(lower)
    i = tl.arange(0, HALF)
    quarter = inverse_ptr + number * BLOCK * BLOCK + i[:, None] * BLOCK + i[None, :]
    dtype: tl.constexpr = inverse_ptr.dtype.element_ty
    tl.store(quarter, upper_left.to(dtype))
    tl.store(quarter + HALF, tl.zeros([HALF, HALF], dtype))
    tl.store(quarter + HALF * BLOCK, lower_left.to(dtype))
    tl.store(quarter + HALF * BLOCK + HALF, lower_right.to(dtype))
