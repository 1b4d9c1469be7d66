"""The gated delta rule on CUDA: its step in one launch, a packed chunk in two.

`has_initial_state` may be integers, of which 0 is False: a step's positions.
"""

import torch
import triton
from torch import Tensor

from tokenloop.models.kernels.gated_delta_rule.reference import CHUNK, check, check_chunk
from tokenloop.models.kernels.gated_delta_rule.triton import gated_delta_rule_update_kernel
from tokenloop.models.kernels.gated_delta_rule.triton_blocks import (
    FACTORS,
    gated_delta_rule_blocks_kernel,
)
from tokenloop.models.kernels.gated_delta_rule.triton_states import gated_delta_rule_states_kernel
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.state_table import PAD_SLOT_ID

# A program's columns of a state, 32 KiB where it has 128 rows, and its warps.
COLUMNS = 64, 4
# Of a packed chunk, by the bytes of an input. BLOCKS: the numbers of a key that a product takes at
# once, warps, stages. STATES: the same numbers, columns, warps, stages. None of them may depend on
# how many tokens or sequences there are.
BLOCKS = {4: (16, 8, 1), 2: (32, 4, 3)}
STATES = {4: (16, 16, 8, 1), 2: (128, 32, 4, 2)}


def _check_strides(q: Tensor, k: Tensor, v: Tensor, state: Tensor) -> None:
    if not state.is_contiguous() or any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError(
            f"strides of q, k, v and state are {q.stride()}, {k.stride()}, {v.stride()} and "
            f"{state.stride()}: heads of q, k and v and the whole state must be contiguous"
        )


@operator("gated_delta_rule_update", mutates_args={"state"})
def gated_delta_rule_update(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
    state: Tensor, cache_indices: Tensor | None, has_initial_state: Tensor,
    pad_slot_id: int = PAD_SLOT_ID,
) -> Tensor:  # fmt: skip
    """See reference.gated_delta_rule_update. Raises ValueError also where a head of q, k or v, or
    the state, is not contiguous."""
    check(q, v, state)
    _check_strides(q, k, v, state)
    batch, heads, value_size = v.shape
    key_size = q.shape[2]
    out = torch.empty(batch, heads, value_size, dtype=v.dtype, device=v.device)
    columns, warps = COLUMNS
    launch(gated_delta_rule_update_kernel, (batch * heads, triton.cdiv(value_size, columns)))(
        q, k, v, a, b, A_log, dt_bias, state, cache_indices, has_initial_state, out,
        heads, heads // q.shape[1], pad_slot_id, key_size, value_size, key_size**-0.5,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *a.stride(), *b.stride(),
        HAS_INDICES=cache_indices is not None, KEYS=triton.next_power_of_2(key_size),
        BLOCK_VALUES=columns, num_warps=warps,
    )  # fmt: skip
    return out


@operator("gated_delta_rule_chunk", mutates_args={"state"})
def gated_delta_rule_chunk(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
    state: Tensor, starts: Tensor, rows: Tensor, first: Tensor,
) -> Tensor:  # fmt: skip
    """See reference.gated_delta_rule_chunk. Raises ValueError also where a head of q, k or v, or
    the state, is not contiguous.

    A token's result and a row's state are bit for bit the same whatever else is in the chunk, and
    however a sequence is cut into chunks: blocks are those of the sequence, every block has the
    same operations in the same order, and one kernel serves all numbers of tokens and sequences.
    """
    check(q, v, state)
    check_chunk(q, v, starts)
    _check_strides(q, k, v, state)
    tokens, heads, value_size = v.shape
    key_size, sequences = q.shape[2], rows.shape[0]
    places = tokens // CHUNK + sequences
    new = {"dtype": q.dtype, "device": q.device}
    inverse = torch.empty(places, heads, CHUNK, CHUNK, **new)
    attention = torch.empty(places, heads, CHUNK, CHUNK, **new)
    new["dtype"] = torch.float32
    factors = torch.empty(places, heads, FACTORS.value, CHUNK, **new)
    kept = torch.empty(places, heads, **new)
    out = torch.empty(tokens, heads, value_size, dtype=v.dtype, device=v.device)
    shared, made = heads // q.shape[1], (inverse, attention, factors, kept)
    qk_strides = *q.stride()[:2], *k.stride()[:2]
    block_keys, warps, stages = BLOCKS[q.element_size()]
    launch(gated_delta_rule_blocks_kernel, (heads, places))(
        q, k, a, b, A_log, dt_bias, starts, *made, sequences, shared, key_size, key_size**-0.5,
        *qk_strides, *a.stride(), *b.stride(), BLOCK_KEYS=min(block_keys, key_size),
        STAGES=stages, num_warps=warps,
    )  # fmt: skip
    block_keys, columns, warps, stages = STATES[q.element_size()]
    if q.element_size() == 4 and key_size > 128:
        columns //= 2  # or registers do not suffice
    columns = min(columns, value_size)
    launch(gated_delta_rule_states_kernel, (heads * (value_size // columns), sequences))(
        q, k, v, state, starts, rows, first, *made, out, heads, shared, key_size, value_size,
        *qk_strides, *v.stride()[:2], BLOCK_KEYS=min(block_keys, key_size), BLOCK_VALUES=columns,
        STAGES=stages, num_warps=warps,
    )  # fmt: skip
    return out
