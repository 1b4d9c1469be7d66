"""A depthwise causal convolution over packed sequences, and its step: the torch reference.

What a sequence remembers is its last width - 1 inputs, in a slot of a table that is updated in
place. Shapes: D channels, T tokens of all sequences, N sequences, W width, S slots.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tokenloop.models.operators import slots
from tokenloop.models.operators.slots import PAD_SLOT_ID

WIDTHS = 2, 3, 4


def check(weight: Tensor, activation: str | None) -> None:
    """Raise ValueError for a width or an activation that there is not."""
    if weight.shape[-1] not in WIDTHS:
        raise ValueError(f"weight has the width {weight.shape[-1]}; one of {WIDTHS} is right")
    if activation not in (None, "silu"):
        raise ValueError(f"activation = {activation!r}; None or 'silu' is right")


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
    """out[d, t] = act(bias[d] + sum over i of weight[d, i] * x[d, t - (W - 1) + i]), where what
    lies before a sequence's first token is its state.

    x [D, T], of any strides, holds sequence n in columns query_start_loc[n] up to
    query_start_loc[n + 1], int32 [N + 1], ascending from 0. weight is [D, W] with W from 2 to 4,
    bias [D] or None. Sequence n begins with conv_state[cache_indices[n]], of a table [S, D, W - 1]
    and int32 [N] different from one another (None: n itself, and S is N); or with zeros where
    has_initial_state, bool [N], is False. Its last W - 1 inputs replace that slot; in a sequence
    shorter than that they begin with what was there, or with zeros.

    A sequence without tokens leaves its slot as it was. One whose index is `pad_slot_id` begins
    with zeros and leaves nothing, and so does what follows the last sequence. Sums are float32; the
    result [D, T] has x's dtype. Raises ValueError for another width or activation.
    """
    check(weight, activation)
    count, keep = has_initial_state.shape[0], weight.shape[1] - 1
    starts, ends = query_start_loc[:-1].long(), query_start_loc[1:].long()
    sequences = torch.arange(count, device=x.device)

    # All in one row, each sequence behind its state; tokens of no sequence behind zeros.
    tokens = torch.arange(x.shape[1], device=x.device)
    owner = (tokens[:, None] >= ends).sum(-1)
    places = tokens + keep * (owner + 1)
    taps = torch.arange(keep, device=x.device)
    before = (starts + keep * sequences)[:, None] + taps
    history = slots.load(conv_state, cache_indices, has_initial_state, pad_slot_id)
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

    # A sequence's last columns, which in a short one reach back into its state.
    last = packed.index_select(1, (before + (ends - starts)[:, None]).flatten())
    last = last.unflatten(1, (count, keep)).transpose(0, 1)
    slots.store(conv_state, last, cache_indices, pad_slot_id, ends > starts)
    return out.to(x.dtype)


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
    """`causal_conv1d` of one token of each of B sequences: x [B, D], conv_state [S, D, W - 1],
    cache_indices int32 [B] or None, has_initial_state bool [B] -> [B, D]."""
    check(weight, activation)
    history = slots.load(conv_state, cache_indices, has_initial_state, pad_slot_id)
    window = torch.cat([history, x[..., None].to(history.dtype)], -1)
    out = (window.float() * weight.float()).sum(-1)
    if bias is not None:
        out = out + bias.float()
    if activation is not None:
        out = F.silu(out)
    slots.store(conv_state, window[..., 1:], cache_indices, pad_slot_id)
    return out.to(x.dtype)
