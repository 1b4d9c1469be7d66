"""A depthwise causal convolution over packed sequences, and its step, in plain torch.

A sequence remembers its last width - 1 inputs, in a slot of a table that is updated in place.
Shapes: D channels, T tokens of all sequences, N sequences, W width, S slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloop.models.kernels import state_table
from tokenloop.models.kernels.state_table import PAD_SLOT_ID

WIDTHS = 2, 3, 4


def check(weight: Tensor, activation: str | None) -> None:
    """Raise ValueError for a width or an activation that is not supported."""
    if weight.shape[-1] not in WIDTHS:
        raise ValueError(f"weight has the width {weight.shape[-1]}; one of {WIDTHS} is right")
    if activation not in (None, "silu"):
        raise ValueError(f"activation = {activation!r}; None or 'silu' is right")


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, query_start_loc: Tensor, conv_state: Tensor,
    cache_indices: Tensor | None, has_initial_state: Tensor, activation: str | None = None,
    pad_slot_id: int = PAD_SLOT_ID,
) -> Tensor:  # fmt: skip
    """out[d, t] = act(bias[d] + sum over i of weight[d, i] * x[d, t - (W - 1) + i]), where a
    sequence's state stands for the inputs before its first token.

    x [D, T], of any strides, holds sequence n in columns query_start_loc[n] up to
    query_start_loc[n + 1], int32 [N + 1], ascending from 0. weight is [D, W] with W from 2 to 4,
    bias [D] or None. Sequence n begins with conv_state[cache_indices[n]], or with zeros where
    has_initial_state [N] is False or 0. conv_state is [S, D, W - 1]; cache_indices, int32 [N],
    differ from one another (None: n itself, and S is N). The sequence's last W - 1 inputs replace
    its slot; in a shorter sequence they begin with what was there, or with zeros.

    A sequence without tokens leaves its slot as it was. A sequence whose index is `pad_slot_id`
    begins with zeros and leaves nothing. Tokens after the last sequence reach no state and no other
    token; their own results are anything. Sums are float32; the result [D, T] has x's dtype. Raises
    ValueError for another width or activation.
    """
    check(weight, activation)
    count, keep = has_initial_state.shape[0], weight.shape[1] - 1
    starts, ends = query_start_loc[:-1].long(), query_start_loc[1:].long()
    sequences = torch.arange(count, device=x.device)

    # All sequences in one row, each behind its state; tokens of no sequence behind zeros.
    tokens = torch.arange(x.shape[1], device=x.device)
    owner = (tokens[:, None] >= ends).sum(-1)
    places = tokens + keep * (owner + 1)
    taps = torch.arange(keep, device=x.device)
    before = (starts + keep * sequences)[:, None] + taps
    history = state_table.load(conv_state, cache_indices, has_initial_state, pad_slot_id)
    packed = x.new_zeros(x.shape[0], x.shape[1] + keep * (count + 1))
    packed.index_copy_(1, before.flatten(), history.transpose(0, 1).flatten(1).to(x.dtype))
    packed.index_copy_(1, places, x)

    out = F.conv1d(
        packed.float()[None],
        weight.float()[:, None],
        None if bias is None else bias.float(),
        groups=x.shape[0],
    )[0]
    out = out.index_select(1, places - keep)
    if activation is not None:
        out = F.silu(out)

    # A sequence's last columns; in a short one they reach back into its state.
    last = packed.index_select(1, (before + (ends - starts)[:, None]).flatten())
    last = last.unflatten(1, (count, keep)).transpose(0, 1)
    state_table.store(conv_state, last, cache_indices, pad_slot_id, ends > starts)
    return out.to(x.dtype)


def causal_conv1d_update(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor,
    cache_indices: Tensor | None, has_initial_state: Tensor, activation: str | None = None,
    pad_slot_id: int = PAD_SLOT_ID,
) -> Tensor:  # fmt: skip
    """`causal_conv1d` of one token of each of B sequences: x [B, D], conv_state [S, D, W - 1],
    cache_indices int32 [B] or None, has_initial_state bool [B] -> [B, D]."""
    check(weight, activation)
    history = state_table.load(conv_state, cache_indices, has_initial_state, pad_slot_id)
    window = torch.cat([history, x[..., None].to(history.dtype)], -1)
    out = (window.float() * weight.float()).sum(-1)
    if bias is not None:
        out = out + bias.float()
    if activation is not None:
        out = F.silu(out)
    state_table.store(conv_state, window[..., 1:], cache_indices, pad_slot_id)
    return out.to(x.dtype)
