"""The causal convolution on CUDA, in one launch.

`has_initial_state` may be integers, of which 0 is False: a step's positions.
"""

import torch
import triton
from torch import Tensor

from tokenloop.models.kernels.causal_conv1d.reference import check
from tokenloop.models.kernels.causal_conv1d.triton_rolling import causal_conv1d_rolling_kernel
from tokenloop.models.kernels.causal_conv1d.triton_update import causal_conv1d_update_kernel
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.state_table import PAD_SLOT_ID

# A program keeps tokens in registers: the most tokens of a program, those loaded together (at least
# 2; half a block), channels, warps, and the grid's axis of tokens; programs along axis 0 start
# together. Programs take fewer tokens, but a block at least, where there would be fewer than
# PROGRAMS of them.
ROLLING = 16, 4, 128, 1, 1
PROGRAMS = 8192
# The most programs along a grid's second axis.
MOST_PROGRAMS = 65535
UPDATE_DIM = 256


def pairs(x: Tensor) -> bool:
    """Whether x [D, T] of adjacent channels can be read as integers that hold two channels."""
    even = x.shape[0] % 2 == 0 and x.stride(1) % 2 == 0 and x.storage_offset() % 2 == 0
    return x.element_size() == 2 and even


def packed_taps(weight: Tensor) -> bool:
    """Whether weight [D, 4] can be read as integers that hold a channel's taps."""
    aligned = weight.stride() == (4, 1) and weight.storage_offset() % 4 == 0
    return weight.shape[1] == 4 and weight.element_size() == 2 and aligned


@operator("causal_conv1d", mutates_args={"conv_state"})
def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, query_start_loc: Tensor, conv_state: Tensor,
    cache_indices: Tensor | None, has_initial_state: Tensor, activation: str | None = None,
    pad_slot_id: int = PAD_SLOT_ID,
) -> Tensor:  # fmt: skip
    """See reference.causal_conv1d. Channels of the result are adjacent; where those of x are not, x
    is copied."""
    check(weight, activation)
    dim, tokens = x.shape
    if x.stride(0) != 1:
        x = x.T.contiguous().T
    out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device).T
    given = x, weight, bias, query_start_loc, conv_state, cache_indices, has_initial_state, out
    # The number of bounds, not of sequences: torch's compiler makes a constant of a 1, and Triton's
    # then fails with loads that it knows to be masked.
    sizes = dim, tokens, query_start_loc.shape[0], pad_slot_id
    strides = *weight.stride(), *conv_state.stride()
    flags = {
        "WIDTH": weight.shape[1], "HAS_BIAS": bias is not None,
        "HAS_INDICES": cache_indices is not None, "SILU": activation is not None,
    }  # fmt: skip
    most, half, block_dim, warps, token_axis = ROLLING
    block, columns = 2 * half, triton.cdiv(dim, block_dim)
    # Python's min and max would decide on a number of tokens that is being exported.
    blocks = torch.sym_min(most // block, tokens * columns // (block * PROGRAMS))
    least = triton.cdiv(tokens, block * MOST_PROGRAMS)
    span = block * torch.sym_max(torch.sym_max(1, least), blocks)
    spans = triton.cdiv(tokens, span)
    launch(causal_conv1d_rolling_kernel, (columns, spans) if token_axis else (spans, columns))(
        *given, *sizes, span, *strides, X_STRIDE=x.stride(1), OUT_STRIDE=dim,
        PAIRS=pairs(x), PACKED_TAPS=packed_taps(weight), EVEN=dim % block_dim == 0, **flags,
        TOKEN_AXIS=token_axis, HALF=half, BLOCK_DIM=block_dim, num_warps=warps,
    )  # fmt: skip
    return out


@operator("causal_conv1d_update", mutates_args={"conv_state"})
def causal_conv1d_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor,
    cache_indices: Tensor | None, has_initial_state: Tensor, activation: str | None = None,
    pad_slot_id: int = PAD_SLOT_ID,
) -> Tensor:  # fmt: skip
    """See reference.causal_conv1d_update."""
    check(weight, activation)
    batch, dim = x.shape
    out = torch.empty(batch, dim, dtype=x.dtype, device=x.device)
    launch(causal_conv1d_update_kernel, (batch, triton.cdiv(dim, UPDATE_DIM)))(
        x, weight, bias, conv_state, cache_indices, has_initial_state, out, dim, pad_slot_id,
        *x.stride(), *weight.stride(), *conv_state.stride(),
        WIDTH=weight.shape[1], HAS_BIAS=bias is not None, HAS_INDICES=cache_indices is not None,
        SILU=activation is not None, BLOCK_DIM=UPDATE_DIM,
    )  # fmt: skip
    return out
