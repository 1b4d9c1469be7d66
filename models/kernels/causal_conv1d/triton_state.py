"""How kernels of the convolution read and replace a sequence's state, its last WIDTH - 1 inputs."""

import triton
import triton.language as tl


@triton.jit
def load_state(state_ptrs, stride, started, in_dim, WIDTH: tl.constexpr):
    """The inputs before a sequence's first token, float32: its state, or zeros."""
    inputs = ()
    for i in tl.static_range(WIDTH - 1):
        x = tl.load(state_ptrs + i * stride, mask=in_dim & started, other=0.0)
        inputs = inputs + (x.to(tl.float32),)
    return inputs


@triton.jit
def inputs_before(
    token, start, started, x_ptrs, state_ptrs, x_stride_token, state_stride_tap, in_dim,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """The WIDTH - 1 inputs before a token of a sequence, float32. Before the sequence's start they
    are its state, or zeros where it is not `started`."""
    inputs = ()
    for i in tl.static_range(1 - WIDTH, 0):
        source = token + i
        x = tl.load(
            x_ptrs + source.to(tl.int64) * x_stride_token, in_dim & (source >= start), other=0.0
        )
        before = tl.load(
            state_ptrs + (source - start + (WIDTH - 1)) * state_stride_tap,
            mask=in_dim & (source < start) & started, other=0.0,
        )  # fmt: skip
        inputs = inputs + (tl.where(source >= start, x.to(tl.float32), before.to(tl.float32)),)
    return inputs


@triton.jit
def store_state(inputs, state_ptrs, stride, in_dim, WIDTH: tl.constexpr):
    """Replace a state by the WIDTH - 1 last inputs."""
    # Threads may store here what others have read.
    tl.debug_barrier()
    for i in tl.static_range(WIDTH - 1):
        state = inputs[i].to(state_ptrs.dtype.element_ty)
        tl.store(state_ptrs + i * stride, state, mask=in_dim)
