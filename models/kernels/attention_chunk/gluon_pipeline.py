"""How queries, keys and values come to the consumers of the Gluon kernels: through shared memory.

One warp, the producer, asks for them (TMA); one or two warpgroups, the consumers, take them. Every
buffer has two barriers: one is passed when it is full, one when all that take it have given it
back. Blocks of keys, and of values, are numbered through all tiles of a program: block `at` has
stage at % STAGES. Elements are bfloat16.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from tokenloop.models.kernels.attention_chunk.gluon_sequences import ROWS

# Of queries and results [ROWS, columns], and of keys and values [1, BLOCK_N, columns]. A row of a
# cache is an axis of its own, so that a block of keys does not reach into the next.
QUERIES = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16))
KEYS = gl.constexpr(gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3))


class Queries(NamedTuple):
    """Buffers of queries [.., ROWS, columns] and their barriers [consumers, 1]; or one consumer's,
    without the first axis."""

    bufs: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Pipeline(NamedTuple):
    """Buffers of keys and of values [stages, 1, BLOCK_N, columns], and barriers [stages, 1]."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    k_empty: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    v_empty: gl.shared_memory_descriptor


@gluon.jit
def describe_queries(ptr, tokens, WIDTH: gl.constexpr, COLUMNS: gl.constexpr):
    """A descriptor of queries, or of results, [tokens, WIDTH]."""
    return tma.make_tensor_descriptor(ptr, [tokens, WIDTH], [WIDTH, 1], [ROWS, COLUMNS], QUERIES)


@gluon.jit
def describe_keys(
    ptr, rows, slots, row_stride, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, COLUMNS: gl.constexpr
):
    """A descriptor of keys, or of values, [rows, slots, WIDTH] whose rows are row_stride apart."""
    return tma.make_tensor_descriptor(
        ptr, [rows, slots, WIDTH], [row_stride, WIDTH, 1], [1, BLOCK_N, COLUMNS], KEYS
    )


@gluon.jit
def open_stage(full, empty, stage, CONSUMERS: gl.constexpr):
    """Begin a stage's barriers: so many consumers give it back."""
    mbarrier.init(full.index(stage), count=1)
    mbarrier.init(empty.index(stage), count=CONSUMERS)


@gluon.jit
def make_queries(bufs, CONSUMERS: gl.constexpr):
    """The Queries of so many consumers."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], BARRIER)
    for i in gl.static_range(CONSUMERS):
        open_stage(full, empty, i, 1)
    return Queries(bufs, full, empty)


@gluon.jit
def make_pipeline(k, v):
    """The Pipeline of these buffers, whose stages are not open yet."""
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    K_STAGES: gl.constexpr = k.type.shape[0]
    V_STAGES: gl.constexpr = v.type.shape[0]
    k_full = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [K_STAGES, 1], BARRIER)
    v_full = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [V_STAGES, 1], BARRIER)
    return Pipeline(k, v, k_full, k_empty, v_full, v_empty)


@gluon.jit
def of_consumer(queries, CONSUMER: gl.constexpr):
    """The Queries of one consumer, which are one buffer."""
    return Queries(
        queries.bufs.index(CONSUMER), queries.full.index(CONSUMER), queries.empty.index(CONSUMER)
    )


@gluon.jit
def ask_queries(q_desc, round, token, head, queries):
    """Ask for the queries of a round, from a token on and of a head, once there is room."""
    CONSUMERS: gl.constexpr = queries.full.type.shape[0]
    CHUNKS: gl.constexpr = queries.bufs.type.shape[0] // CONSUMERS
    COLUMNS: gl.constexpr = queries.bufs.type.shape[2]
    for i in gl.static_range(CONSUMERS):
        mbarrier.wait(queries.empty.index(i), (round & 1) ^ 1)
        ready = queries.full.index(i)
        mbarrier.expect(ready, ROWS * CHUNKS * COLUMNS * 2)
        for c in gl.static_range(CHUNKS):
            tma.async_copy_global_to_shared(
                q_desc, [token + i * ROWS, head * (CHUNKS * COLUMNS) + c * COLUMNS], ready,
                queries.bufs.index(i * CHUNKS + c),
            )  # fmt: skip


@gluon.jit
def make_room(at, bufs, full, empty):
    """The barrier and the stage for block `at` of keys or values, once it is empty."""
    STAGES: gl.constexpr = bufs.type.shape[0]
    BYTES: gl.constexpr = bufs.type.shape[2] * bufs.type.shape[3] * 2
    mbarrier.wait(empty.index(at % STAGES), ((at // STAGES) & 1) ^ 1)
    ready = full.index(at % STAGES)
    mbarrier.expect(ready, BYTES)
    return ready, at % STAGES


@gluon.jit
def await_stage(at, full):
    """The stage of block `at`, once it is full."""
    STAGES: gl.constexpr = full.type.shape[0]
    stage = at % STAGES
    mbarrier.wait(full.index(stage), (at // STAGES) & 1)
    return stage


@gluon.jit
def find_stage(at, full):
    """The stage of block `at`, and the phase to wait for."""
    STAGES: gl.constexpr = full.type.shape[0]
    return at % STAGES, (at // STAGES) & 1
