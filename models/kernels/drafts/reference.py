"""Drafts of tokens from what a sequence has had, in plain torch.

Shapes: N places of a history, whose token at place p is the sequence's at position p; R rows of a
round, the newest token and R - 1 drafts.
"""

import torch
from torch import Tensor

# How many of the newest tokens a place of the history is compared with.
COMPARED = 3


def next_drafts(history: Tensor, position: Tensor, tokens: Tensor, positions: Tensor) -> None:
    """Write a round's tokens and positions, int64 [R], of history int64 [N] up to its newest token
    at `position` int64 [1].

    The drafts follow the place before the newest one at which most of COMPARED tokens, from the
    newest one back, are the same; of equal ones the latest. Where the history ends they go on from
    the place after that, so that what repeats itself goes on. Where no token is the same, the place
    is the one before the newest.
    """
    newest = int(position)
    ids = history[: newest + 1].tolist()
    best, place = 0, newest - 1
    for m in range(newest):
        same = 0
        while same < min(COMPARED, m + 1) and ids[m - same] == ids[newest - same]:
            same += 1
        if same >= max(1, best):
            best, place = same, m
    count = len(tokens)
    drafts = [ids[place + 1 + i % (newest - place)] for i in range(count - 1)]
    tokens.copy_(torch.tensor([ids[newest], *drafts]))
    positions.copy_(newest + torch.arange(count))


def take_drafts(
    history: Tensor, position: Tensor, drafts: Tensor, tokens: Tensor, positions: Tensor
) -> None:
    """As `next_drafts`, with drafts int64 [R - 1] that are given."""
    tokens.copy_(torch.cat([history[position], drafts]))
    positions.copy_(position + torch.arange(len(tokens), device=positions.device))


def accept(
    tokens: Tensor, chosen: Tensor, history: Tensor, position: Tensor, accepted: Tensor
) -> None:
    """Go on by the tokens that hold: chosen int64 [R] after each of a round's tokens int64 [R].

    The first of `chosen` holds, and each one behind a draft that is the token chosen before it, if
    all before do. They go to the history behind `position` int64 [1], which becomes the last one's.
    accepted int64 [1 + R] gets how many they are, and then all of `chosen`.
    """
    count = 1
    while count < len(tokens) and tokens[count] == chosen[count - 1]:
        count += 1
    first = int(position) + 1
    history[first : first + count] = chosen[:count]
    position += count
    accepted[0] = count
    accepted[1:] = chosen


def store_drafts(
    draft_k: Tensor, draft_v: Tensor, positions: Tensor, accepted: Tensor, k_cache: Tensor,
    v_cache: Tensor,
) -> None:  # fmt: skip
    """Store keys and values [R, 1, G, Dh] of the first accepted[0] rows of a round, at positions
    int64 [R], in caches [1, S, G, Dh] that have position p in slot p % S."""
    count = int(accepted[0])
    slots = positions[:count] % k_cache.shape[1]
    k_cache[0, slots], v_cache[0, slots] = draft_k[:count, 0], draft_v[:count, 0]
