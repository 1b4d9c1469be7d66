"""Tables of states [S, ...]: each of N sequences has a slot, named by its index, int [N]. Without
indices sequence n has slot n, and there are no other slots."""

import torch
from torch import Tensor

# The index of a sequence that has no slot: batches are padded with it.
PAD_SLOT_ID = -1


def load(
    table: Tensor, cache_indices: Tensor | None, has_initial_state: Tensor, pad_slot_id: int
) -> Tensor:
    """The states [N, ...]; zeros without a slot, or where has_initial_state [N] is False or 0."""
    states, seen = table, has_initial_state
    if seen.dtype != torch.bool:
        seen = seen != 0
    if cache_indices is not None:
        states = table.index_select(0, cache_indices.clamp(min=0))
        seen = seen & (cache_indices != pad_slot_id)
    seen = seen.view(-1, *[1] * (table.dim() - 1))
    return torch.where(seen, states, torch.zeros_like(states))


def store(
    table: Tensor, states: Tensor, cache_indices: Tensor | None, pad_slot_id: int,
    replaced: Tensor | None = None,
) -> None:  # fmt: skip
    """Put states [N, ...] into their slots, in place; a slot stays as it was where `replaced`,
    bool [N], is False.

    No size depends on which slots are replaced, so this can be exported; the price is that the
    whole table is written.
    """
    states = states.to(table.dtype)
    if cache_indices is None and replaced is None:
        table.copy_(states)
        return
    numbers = torch.arange(states.shape[0], device=table.device)
    places = torch.arange(table.shape[0], device=table.device)[:, None]
    if cache_indices is None:
        new = places == numbers
    else:
        new = (places == cache_indices) & (cache_indices != pad_slot_id)
    if replaced is not None:
        new = new & replaced
    source = (new * numbers).sum(-1)
    new = new.any(-1).view(-1, *[1] * (table.dim() - 1))
    table.copy_(torch.where(new, states.index_select(0, source), table))
