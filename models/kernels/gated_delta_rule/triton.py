"""The Triton kernel of the gated delta rule's step.

The step is bound by the state's memory: K x V float32 of each row and head, read once and written
once. Each program computes all else where it needs it. The convolution before the step is a kernel
of its own: several value heads share a key head's channels, and with them its slot.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.gated_delta_rule import reference
from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.launch.state_slot import load_slot

L2_EPS = tl.constexpr(reference.L2_EPS)


@triton.jit
def normalized(x):
    x = x.to(tl.float32)
    return x * (1.0 / tl.sqrt_rn(tl.sum(x * x) + L2_EPS))


@triton.jit
def add_both(x0, y0, x1, y1):
    return x0 + x1, y0 + y1


@triton.jit
def softplus(x):
    # As torch's: beyond 20 it is x itself.
    return tl.where(x > 20.0, x, tl.log(1.0 + tl.exp(tl.minimum(x, 20.0))))


@waits  # once it has the state, which no other kernel of a step writes
@triton.jit(do_not_specialize=["pad_slot_id"])
def gated_delta_rule_update_kernel(
    q_ptr, k_ptr, v_ptr, a_ptr, b_ptr, A_log_ptr, dt_bias_ptr, state_ptr, cache_indices_ptr,
    has_initial_ptr, out_ptr,
    heads, heads_per_key, pad_slot_id, key_size: tl.constexpr, value_size: tl.constexpr,
    scale: tl.constexpr,
    q_stride_row, q_stride_head, k_stride_row, k_stride_head, v_stride_row, v_stride_head,
    a_stride_row, a_stride_head, b_stride_row, b_stride_head,
    HAS_INDICES: tl.constexpr, KEYS: tl.constexpr, BLOCK_VALUES: tl.constexpr,
):  # fmt: skip
    """BLOCK_VALUES columns of the state of one row and head; `heads_per_key` heads share q and k.

    With S the old state, d its decay and u the update, the new state is d S + k u^T. out is q^T
    times that, d q^T S + (q^T k) u^T, so S is summed once for both out and u.
    """
    row_head = tl.program_id(0)
    row = (row_head // heads).to(tl.int64)
    head = row_head % heads
    keys = tl.arange(0, KEYS)
    values = tl.program_id(1) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    in_keys, in_values = keys < key_size, values < value_size
    out_ptrs = out_ptr + row_head.to(tl.int64) * value_size + values

    slot = load_slot(cache_indices_ptr, row, HAS_INDICES)
    is_kept = slot != pad_slot_id
    state_ptrs = (
        state_ptr + (slot * heads + head) * key_size * value_size
        + keys[:, None] * value_size + values[None, :]
    )  # fmt: skip
    in_state = in_keys[:, None] & in_values[None, :] & is_kept
    # No other kernel of a step writes the state, or these; and the load does not wait for whether
    # the row has begun.
    state = tl.load(state_ptrs, mask=in_state, other=0.0)
    rate = tl.exp(tl.load(A_log_ptr + head).to(tl.float32))
    bias = tl.load(dt_bias_ptr + head).to(tl.float32)

    row += wait(0)
    started = tl.load(has_initial_ptr + row) != 0
    key_head = head // heads_per_key
    q = tl.load(q_ptr + row * q_stride_row + key_head * q_stride_head + keys, in_keys, other=0.0)
    k = tl.load(k_ptr + row * k_stride_row + key_head * k_stride_head + keys, in_keys, other=0.0)
    v = tl.load(v_ptr + row * v_stride_row + head * v_stride_head + values, in_values, other=0.0)
    a = tl.load(a_ptr + row * a_stride_row + head * a_stride_head).to(tl.float32)
    b = tl.load(b_ptr + row * b_stride_row + head * b_stride_head).to(tl.float32)
    g = -rate * softplus(a + bias)
    beta = 1.0 / (1.0 + tl.exp(-b))
    q, k = normalized(q) * scale, normalized(k)

    decay, product = tl.exp(g), tl.sum(q * k)
    state = tl.where(started, state, 0.0)
    of_k, of_q = tl.reduce((state * k[:, None], state * q[:, None]), 0, add_both)
    update = beta * (v.to(tl.float32) - decay * of_k)
    tl.store(state_ptrs, decay * state + k[:, None] * update[None, :], mask=in_state)
    out = decay * of_q + product * update
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=in_values)
