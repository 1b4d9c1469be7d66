"""The Triton kernel of the causal convolution's step."""

import triton
import triton.language as tl

from tokenloop.models.kernels.causal_conv1d.triton_taps import activated, load_bias, load_weights
from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.launch.state_slot import load_slot


@waits  # once it has the weights and the state, which no other kernel of a step writes
@triton.jit(do_not_specialize=["pad_slot_id"])
def causal_conv1d_update_kernel(
    x_ptr, weight_ptr, bias_ptr, state_ptr, cache_indices_ptr, has_initial_ptr, out_ptr,
    dim, pad_slot_id,
    x_stride_row, x_stride_dim, weight_stride_dim, weight_stride_tap,
    state_stride_slot, state_stride_dim, state_stride_tap,
    WIDTH: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_INDICES: tl.constexpr, SILU: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One token of one row, BLOCK_DIM channels."""
    row = tl.program_id(0)
    channels = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_dim = channels < dim
    slot = load_slot(cache_indices_ptr, row, HAS_INDICES)
    kept = in_dim & (slot != pad_slot_id)
    weight_ptrs = weight_ptr + channels * weight_stride_dim
    state_ptrs = state_ptr + slot * state_stride_slot + channels * state_stride_dim
    weights = load_weights(weight_ptrs, weight_stride_tap, in_dim, WIDTH)
    sums = load_bias(bias_ptr, channels, in_dim, HAS_BIAS)
    # A step's positions are there before the first kernel that overlaps begins.
    started = kept & (tl.load(has_initial_ptr + row) != 0)
    before = ()
    for tap in tl.static_range(WIDTH - 1):
        before = before + (tl.load(state_ptrs + tap * state_stride_tap, mask=started, other=0.0),)
    zero = wait(0)
    x_ptrs = x_ptr + zero + row.to(tl.int64) * x_stride_row + channels * x_stride_dim
    for tap in tl.static_range(WIDTH):
        if tap < WIDTH - 1:  # noqa: SIM108 - Triton decides it
            x = before[tap]
        else:
            x = tl.load(x_ptrs, mask=in_dim, other=0.0)
        sums = tl.fma(weights[tap], x.to(tl.float32), sums)
        # Each column moves on by one, into the column that has been read.
        if tap > 0:
            column = x.to(state_ptr.dtype.element_ty)
            tl.store(state_ptrs + (tap - 1) * state_stride_tap, column, mask=kept)
    out = activated(sums, SILU).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row.to(tl.int64) * dim + channels, out, mask=in_dim)
