"""The gated delta rule's step on CUDA, in one launch.

`has_initial_state` may be integers, of which 0 is False: a step's positions.
"""

import torch
import triton
from torch import Tensor

from tokenloop.models.kernels.gated_delta_rule.reference import check
from tokenloop.models.kernels.gated_delta_rule.triton import gated_delta_rule_update_kernel
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.state_table import PAD_SLOT_ID

# A program's columns of a state, 32 KiB where it has 128 rows, and its warps.
COLUMNS = 64, 4


@operator("gated_delta_rule_update", mutates_args={"state"})
def gated_delta_rule_update(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor,
    state: Tensor, cache_indices: Tensor | None, has_initial_state: Tensor,
    pad_slot_id: int = PAD_SLOT_ID,
) -> Tensor:  # fmt: skip
    """See reference.gated_delta_rule_update. Raises ValueError also where a head of q, k or v, or
    the state, is not contiguous."""
    check(q, v, state)
    if not state.is_contiguous() or any(x.stride(-1) != 1 for x in (q, k, v)):
        raise ValueError(
            f"strides of q, k, v and state are {q.stride()}, {k.stride()}, {v.stride()} and "
            f"{state.stride()}: heads of q, k and v and the whole state must be contiguous"
        )
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
