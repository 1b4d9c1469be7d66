"""What a consumer of the Gluon kernels does with 64 queries: scores, their online softmax
(https://arxiv.org/abs/1805.02867), and sums of values.

Tensor cores sum the values of a block of keys while exponents of the next block's scores are
computed. Operands of products are bfloat16, all else is float32.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from tokenloop.models.kernels.attention_chunk.gluon_pipeline import await_stage, find_stage
from tokenloop.models.kernels.attention_chunk.gluon_sequences import ROWS


@gluon.jit
def matrix(bufs, stage):
    """Keys or values [BLOCK_N, columns] of a stage."""
    BLOCK_N: gl.constexpr = bufs.type.shape[2]
    COLUMNS: gl.constexpr = bufs.type.shape[3]
    return bufs.index(stage).reshape([BLOCK_N, COLUMNS])


@gluon.constexpr_function
def product_layout(columns):
    """Of a product of 64 rows: an instruction takes all its columns."""
    return gl.NVMMADistributedLayout(
        version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16]
    )


@gluon.constexpr_function
def weights_layout(values):
    """Of the weights in a product with values, which has layout `values`."""
    return gl.DotOperandLayout(operand_index=0, parent=values, k_width=2)


@gluon.jit
def ask_scores(q, stage, pipes, SCORES: gl.constexpr):
    """Scores of the block of keys in a stage, still under way."""
    BLOCK_N: gl.constexpr = pipes.k.type.shape[2]
    zero = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=SCORES)
    return warpgroup_mma(
        q, matrix(pipes.k, stage).permute((1, 0)), zero, use_acc=False, is_async=True
    )


@gluon.jit
def ask_values(s, stage, weights, o, last, phase, pipes):
    """The scores that were under way, of the keys in `stage`; and `o` with the values in stage
    `last`, of given weights, which are under way now."""
    WEIGHTS: gl.constexpr = weights_layout(o.type.layout)
    # As float32 they came here: bfloat16 would be packed in pairs anew.
    p = gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS)
    mbarrier.wait(pipes.v_full.index(last), phase)
    o = warpgroup_mma(p, matrix(pipes.v, last), o, is_async=True)
    s = warpgroup_mma_wait(num_outstanding=1, deps=(s,))
    mbarrier.arrive(pipes.k_empty.index(stage), count=1)
    return s, o


@gluon.jit
def first_scores(at, q, pipes, SCORES: gl.constexpr):
    """Scores of a tile's first block."""
    stage = await_stage(at, pipes.k_full)
    s = ask_scores(q, stage, pipes, SCORES)
    s = warpgroup_mma_wait(num_outstanding=0, deps=(s,))
    mbarrier.arrive(pipes.k_empty.index(stage), count=1)
    return s


@gluon.jit
def next_scores(at, weights, o, q, pipes):
    """Scores of block `at`, and `o` with the values of the block before, still under way."""
    SCORES: gl.constexpr = weights.type.layout
    stage, phase = find_stage(at, pipes.k_full)
    last, last_phase = find_stage(at - 1, pipes.v_full)
    mbarrier.wait(pipes.k_full.index(stage), phase)
    s = ask_scores(q, stage, pipes, SCORES)
    return ask_values(s, stage, weights, o, last, last_phase, pipes)


@gluon.jit
def weigh(s, top, total, shift, UNIT: gl.constexpr):
    """Exponents of a block's scores less `shift`, the new sum, and the factor of what was before:
    of `total`, and of the sum of values. `top` was the maximum before."""
    less = shift * UNIT
    p = gl.exp2(gl.fma(s, UNIT, -less[:, None]))
    # Exactly 1 where the maximum stays.
    factor = gl.exp2((top - shift) * UNIT)
    return p, gl.fma(total, factor, gl.sum(p, 1)), factor


@gluon.jit
def end_values(at, weights, o, factor, pipes):
    """The weights of the next block, and `o` with the values of block `at`, times its factor."""
    stage, phase = find_stage(at, pipes.v_full)
    # That the wait takes the weights keeps LLVM from computing them after it, and a barrier that
    # has long been passed, which is a loop, keeps ptxas.
    mbarrier.wait(pipes.v_full.index(stage), phase)
    o, weights = warpgroup_mma_wait(num_outstanding=0, deps=(o, weights))
    mbarrier.arrive(pipes.v_empty.index(stage), count=1)
    o = o * gl.convert_layout(factor, gl.SliceLayout(1, o.type.layout))[:, None]
    return weights, o


@gluon.jit
def last_values(at, weights, o, pipes):
    """`o` with the values of a tile's last block."""
    WEIGHTS: gl.constexpr = weights_layout(o.type.layout)
    stage = await_stage(at, pipes.v_full)
    p = gl.convert_layout(weights.to(gl.bfloat16), WEIGHTS)
    o = warpgroup_mma(p, matrix(pipes.v, stage), o, is_async=True)
    o = warpgroup_mma_wait(num_outstanding=0, deps=(o,))
    mbarrier.arrive(pipes.v_empty.index(stage), count=1)
    return o


@gluon.jit
def divide(o, total):
    """bfloat16 results, of the sums of values and of weights."""
    LAYOUT: gl.constexpr = o.type.layout
    shrink = gl.convert_layout(1 / total, gl.SliceLayout(1, LAYOUT))
    return (o * shrink[:, None]).to(gl.bfloat16)


@gluon.jit
def store_rows(out_ptr, o, token, count, part, WIDTH: gl.constexpr):
    """Store the first `count` results, which are columns of a part of the heads, from a token on.
    The next sequence's tokens may lie behind them."""
    LAYOUT: gl.constexpr = o.type.layout
    COLUMNS: gl.constexpr = o.type.shape[1]
    t = gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    column = part * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    to = (token + t).to(gl.int64)[:, None] * WIDTH + column[None, :]
    gl.store(out_ptr + to, o, mask=(t < count)[:, None])
