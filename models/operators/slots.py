"""Tables of states: a slot for each sequence, addressed by an index or in the sequences' order."""

import torch
from torch import Tensor

# The index of a sequence that is not there: batches are padded with it.
PAD_SLOT_ID = -1


def load(table: Tensor, cache_indices: Tensor | None, has_initial_state: Tensor) -> Tensor:
    """The states [N, ...] of N sequences in a table [S, ...]: of sequence n its slot
    cache_indices[n], int [N] (None: n itself), or zeros where has_initial_state, bool [N], is
    False."""
    states = table
    if cache_indices is not None:
        states = table.index_select(0, cache_indices.clamp(min=0))
    seen = has_initial_state.view(-1, *[1] * (table.dim() - 1))
    return torch.where(seen, states, torch.zeros_like(states))


def store(table: Tensor, states: Tensor, cache_indices: Tensor | None, kept: Tensor) -> None:
    """Put states [N, ...] into their slots, in place, but for those where `kept`, bool [N], is
    True.

    No size depends on which are kept, so that this can be exported; the price is that the whole
    table is written.
    """
    numbers = torch.arange(states.shape[0], device=table.device)
    slots = numbers if cache_indices is None else cache_indices
    places = torch.arange(table.shape[0], device=table.device)[:, None]
    new = (places == slots) & ~kept
    source = (new * numbers).sum(-1)
    new = new.any(-1).view(-1, *[1] * (table.dim() - 1))
    table.copy_(torch.where(new, states.index_select(0, source).to(table.dtype), table))
