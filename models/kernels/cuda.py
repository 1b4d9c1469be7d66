"""All of a network's operators on CUDA. Importing them registers torch.ops.tokenloop.*, and the
names of the kernels that wait (launch/dependent_launch.py).

Some take `semaphores`, int32 zeros by which programs that make parts of a result find the last of
them. Every launch leaves them 0, so one tensor serves a whole network. No row's result depends on
the number of rows.
"""

import triton

from tokenloop.models.kernels.attention.attend_tiles import FAN, most_splits
from tokenloop.models.kernels.attention.operator import attend_drafts, attend_step
from tokenloop.models.kernels.attention_chunk.operator import (
    attend_chunk,
    filled_slots,
    rotate_chunk,
    store_ring,
)
from tokenloop.models.kernels.causal_conv1d.operator import causal_conv1d, causal_conv1d_update
from tokenloop.models.kernels.drafts.operator import (
    accept,
    next_drafts,
    store_drafts,
    take_drafts,
)
from tokenloop.models.kernels.embedding.operator import (
    embed_both,
    embed_chunk,
    embed_into,
    last_tokens,
)
from tokenloop.models.kernels.experts.operator import (
    experts,
    experts_chunk,
    route,
    route_experts,
)
from tokenloop.models.kernels.experts.scores_operator import add_norm_scores, fits_one_launch
from tokenloop.models.kernels.gated_delta_rule.operator import (
    gated_delta_rule_chunk,
    gated_delta_rule_update,
)
from tokenloop.models.kernels.gated_rms_norm.operator import gated_rms_norm
from tokenloop.models.kernels.linear.operator import add_norm_linear, linear, norm_linear
from tokenloop.models.kernels.linear_chunk.operator import dequantize, linear_chunk
from tokenloop.models.kernels.next_positions.operator import next_positions
from tokenloop.models.kernels.per_layer.operator import gate_input, layer_inputs
from tokenloop.models.kernels.reduce_ranks.operator import (
    gather_columns,
    reduce_add_norm,
    sum_ranks,
)
from tokenloop.models.kernels.rms_norm.operator import add_branch, add_norm, norm, norm_heads
from tokenloop.models.kernels.sigmoid_gate.operator import sigmoid_gate

__all__ = [
    "accept", "add_branch", "add_norm", "add_norm_linear", "add_norm_scores", "attend_chunk",
    "attend_drafts", "attend_step", "causal_conv1d", "causal_conv1d_update", "dequantize",
    "embed_both", "embed_chunk", "embed_into", "experts", "experts_chunk", "filled_slots",
    "fits_one_launch", "gate_input", "gated_delta_rule_chunk", "gated_delta_rule_update",
    "gated_rms_norm", "gather_columns", "last_tokens", "layer_inputs", "linear", "linear_chunk",
    "next_drafts", "next_positions", "norm", "norm_heads", "norm_linear", "reduce_add_norm",
    "rotate_chunk", "route", "route_experts", "semaphores_size", "sigmoid_gate", "store_drafts",
    "store_ring", "sum_ranks", "take_drafts",
]  # fmt: skip


def semaphores_size(rows: int, outputs: int, kv_heads: int) -> int:
    """How many `semaphores` the operators need for so many rows, outputs of a linear layer, and
    key/value heads."""
    groups = triton.cdiv(most_splits(kv_heads), FAN)
    return max(triton.cdiv(rows, 16) * triton.cdiv(outputs, 16), rows * kv_heads * (1 + groups))
