"""The operators on CUDA: the functions of conv1d.py and delta_rule.py by Triton kernels.

They give what those give, to rounding, in one launch each that depends on shapes alone: nothing is
read back, so they can be captured in a CUDA graph. `has_initial_state` may be integers, of which 0
is False: a step's positions. They are operators too, torch.ops.tokenloop.*,
whose kernels torch.export and AOTInductor see, and whose changes to the states are declared.
"""

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from tokenloop.models.operators import conv1d, delta_rule
from tokenloop.models.operators.slots import PAD_SLOT_ID
from tokenloop.models.operators.triton_conv1d import (
    causal_conv1d_rolling_kernel,
    causal_conv1d_update_kernel,
    causal_conv1d_whole_kernel,
)
from tokenloop.models.operators.triton_delta_rule import (
    gated_delta_rule_update_kernel,
    gated_rms_norm_kernel,
)

# Where channels are adjacent in memory, a program keeps tokens in registers: the most tokens of a
# program, those loaded together (at least 2; half a block), channels, warps, and the grid's axis of
# tokens, of which 0 is that of programs that start together. Programs take fewer tokens, but a
# block, where there would be less than so many of them.
ROLLING = 16, 4, 128, 1, 1
PROGRAMS = 8192
# Of a grid's second axis.
MOST_PROGRAMS = 65535
# Elsewhere, where tokens may be adjacent: tokens, channels and warps.
WHOLE = 64, 32, 4
UPDATE_DIM = 256
# Columns of a state to one program, 32 KiB of one of 128 rows, and its warps.
COLUMNS = 64, 4


def pairs(x: Tensor) -> bool:
    """Whether x [D, T] of adjacent channels can be read as integers of two channels."""
    even = x.shape[0] % 2 == 0 and x.stride(1) % 2 == 0 and x.storage_offset() % 2 == 0
    return x.element_size() == 2 and even


def words(weight: Tensor) -> bool:
    """Whether weight [D, 4] can be read as integers of a channel's taps."""
    aligned = weight.stride() == (4, 1) and weight.storage_offset() % 4 == 0
    return weight.shape[1] == 4 and weight.element_size() == 2 and aligned


@triton_op("tokenloop::causal_conv1d", mutates_args={"conv_state"})
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_start_loc: Tensor,
    conv_state: Tensor,
    cache_indices: Tensor | None,
    has_initial_state: Tensor,
    activation: str | None = None,
    pad_slot_id: int = PAD_SLOT_ID,
) -> Tensor:
    """As conv1d.causal_conv1d. The result has x's layout."""
    conv1d.check(weight, activation)
    dim, tokens = x.shape
    rolling = x.stride(0) == 1
    if rolling:
        out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device).T
    else:
        out = torch.empty(dim, tokens, dtype=x.dtype, device=x.device)
    given = x, weight, bias, query_start_loc, conv_state, cache_indices, has_initial_state, out
    # Not how many sequences there are: torch's compiler makes a constant of 1, and Triton's then
    # fails with loads that it knows to be masked.
    sizes = dim, tokens, query_start_loc.shape[0], pad_slot_id
    strides = *weight.stride(), *conv_state.stride()
    flags = {
        "WIDTH": weight.shape[1], "HAS_BIAS": bias is not None,
        "HAS_INDICES": cache_indices is not None, "SILU": activation is not None,
    }  # fmt: skip
    if rolling:
        most, half, block_dim, warps, token_axis = ROLLING
        block, columns = 2 * half, triton.cdiv(dim, block_dim)
        # Not Python's min and max: they would decide on a number of tokens that is being exported.
        blocks = torch.sym_min(most // block, tokens * columns // (block * PROGRAMS))
        least = triton.cdiv(tokens, block * MOST_PROGRAMS)
        span = block * torch.sym_max(torch.sym_max(1, least), blocks)
        spans = triton.cdiv(tokens, span)
        wrap_triton(causal_conv1d_rolling_kernel)[
            (columns, spans) if token_axis else (spans, columns)
        ](
            *given, *sizes, span, *strides, X_STRIDE=x.stride(1), OUT_STRIDE=dim,
            PAIRS=pairs(x), WORDS=words(weight), EVEN=dim % block_dim == 0, **flags,
            TOKEN_AXIS=token_axis, HALF=half, BLOCK_DIM=block_dim, num_warps=warps,
        )  # fmt: skip
    else:
        block_tokens, block_dim, warps = WHOLE
        wrap_triton(causal_conv1d_whole_kernel)[
            (triton.cdiv(tokens, block_tokens) * triton.cdiv(dim, block_dim),)
        ](
            *given, *sizes, *x.stride(), *out.stride(), *strides,
            **flags, BLOCK_TOKENS=block_tokens, BLOCK_DIM=block_dim, num_warps=warps,
        )  # fmt: skip
    return out


@triton_op("tokenloop::causal_conv1d_update", mutates_args={"conv_state"})
def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    cache_indices: Tensor | None,
    has_initial_state: Tensor,
    activation: str | None = None,
    pad_slot_id: int = PAD_SLOT_ID,
) -> Tensor:
    """As conv1d.causal_conv1d_update."""
    conv1d.check(weight, activation)
    batch, dim = x.shape
    out = torch.empty(batch, dim, dtype=x.dtype, device=x.device)
    wrap_triton(causal_conv1d_update_kernel)[(batch, triton.cdiv(dim, UPDATE_DIM))](
        x, weight, bias, conv_state, cache_indices, has_initial_state, out, dim, pad_slot_id,
        *x.stride(), *weight.stride(), *conv_state.stride(),
        WIDTH=weight.shape[1], HAS_BIAS=bias is not None, HAS_INDICES=cache_indices is not None,
        SILU=activation is not None, BLOCK_DIM=UPDATE_DIM,
    )  # fmt: skip
    return out


@triton_op("tokenloop::gated_delta_rule_update", mutates_args={"state"})
def gated_delta_rule_update(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    state: Tensor,
    cache_indices: Tensor | None,
    has_initial_state: Tensor,
    pad_slot_id: int = PAD_SLOT_ID,
) -> Tensor:
    """As delta_rule.gated_delta_rule_update; raises ValueError besides where a head of q, k or v or
    the state is not contiguous."""
    delta_rule.check(q, v, state)
    if not state.is_contiguous() or any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError(
            f"strides of q, k, v and state are {q.stride()}, {k.stride()}, {v.stride()} and "
            f"{state.stride()}: heads of q, k and v and the whole state must be contiguous"
        )
    batch, heads, value_size = v.shape
    key_size = q.shape[2]
    out = torch.empty(batch, heads, value_size, dtype=v.dtype, device=v.device)
    columns, warps = COLUMNS
    wrap_triton(gated_delta_rule_update_kernel)[(batch * heads, triton.cdiv(value_size, columns))](
        q, k, v, a, b, A_log, dt_bias, state, cache_indices, has_initial_state, out,
        heads, heads // q.shape[1], pad_slot_id, key_size, value_size, key_size**-0.5,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *a.stride(), *b.stride(),
        HAS_INDICES=cache_indices is not None, KEYS=triton.next_power_of_2(key_size),
        BLOCK_VALUES=columns, num_warps=warps,
    )  # fmt: skip
    return out


@triton_op("tokenloop::gated_rms_norm", mutates_args={})
def gated_rms_norm(x: Tensor, gate: Tensor, weight: Tensor, eps: float) -> Tensor:
    """models.delta_net.RMSNormGated of x [B, H, V], contiguous, and gate [B, H, V], whose heads
    are; weight [V] of x's dtype."""
    batch, heads, size = x.shape
    if not x.is_contiguous() or gate.stride(-1) != 1:
        raise ValueError(f"strides of x and gate are {x.stride()} and {gate.stride()}")
    out = torch.empty_like(x)
    wrap_triton(gated_rms_norm_kernel)[(batch * heads,)](
        x, gate, weight, out, heads, size, *gate.stride()[:2], eps,
        BLOCK=triton.next_power_of_2(size), num_warps=1,
    )  # fmt: skip
    return out
