"""The sampler on CUDA: the functions of greedy.py and sample.py by Triton kernels.

They give what those give, in launches that depend on shapes alone: nothing is read back, so they
can be captured in a CUDA graph. They are operators too, torch.ops.tokenloop.greedy and so on, whose
kernels torch.export and AOTInductor see.

    greedy, select_rows  2 launches: the tiles' maxima, one reduction
    sample               3: the tiles' maxima, perturbed, one reduction
                         and 2 between them where rows have a top_k or top_p: candidates, cutoff
"""

import torch
import triton
from torch import Tensor
from torch.library import triton_op, wrap_triton

from sampler.triton_cutoff import candidates_kernel, cutoff_kernel
from sampler.triton_kernels import perturbed_kernel, tile_maxima_kernel, token_kernel

# 4 KiB of float32 to a program: a vocabulary of 262,144 alone makes 256 of them.
TILE = 1024
# Where there are more tiles than this, greedy takes them twice as large.
MANY_TILES = 2048
# Candidates listed for each row before its cutoff is searched for in the whole row.
CAPACITY = 65_536
# What that search holds at once, and the warps it has.
CHUNK, CUTOFF_WARPS = 512, 16


def _tile_maxima(
    logits: Tensor, rows: Tensor | None, tile: int, found: Tensor | None, total: Tensor | None
) -> Tensor:
    batch = logits.shape[0] if rows is None else rows.shape[0]
    splits = triton.cdiv(logits.shape[1], tile)
    maxima = torch.empty(batch, splits, dtype=torch.int64, device=logits.device)
    wrap_triton(tile_maxima_kernel)[(splits, batch)](
        logits, rows, maxima, found, total,
        logits.shape[1], logits.stride(0), logits.stride(1),
        HAS_ROWS=rows is not None, FILTERS=found is not None, TILE=tile,
    )  # fmt: skip
    return maxima


def _greedy_tile(rows: int, vocab_size: int) -> int:
    return TILE if rows * triton.cdiv(vocab_size, TILE) <= MANY_TILES else 2 * TILE


def _tokens(maxima: Tensor, scores: Tensor | None, temperature: Tensor | None) -> Tensor:
    batch, splits = maxima.shape
    token = torch.empty(batch, 1, dtype=torch.int64, device=maxima.device)
    wrap_triton(token_kernel)[(batch,)](
        maxima, scores, temperature, token, splits,
        SAMPLED=scores is not None, SPLITS=triton.next_power_of_2(splits),
    )  # fmt: skip
    return token


@triton_op("tokenloop::greedy", mutates_args={})
def greedy(logits: Tensor, *, tile: int | None = None) -> Tensor:
    """The most likely token of each row: logits float [B, V] -> token int64 [B, 1].

    Ties, NaN and rows without numbers are decided as sampler.greedy decides them. `tile`, a power
    of two, is the logits of one program.
    """
    tile = tile or _greedy_tile(*logits.shape)
    return _tokens(_tile_maxima(logits, None, tile, None, None), None, None)


@triton_op("tokenloop::select_rows", mutates_args={})
def select_rows(logits: Tensor, rows: Tensor, *, tile: int | None = None) -> Tensor:
    """`greedy` of some rows: logits float [B, V], rows int [N] below B -> token int64 [N, 1]."""
    tile = tile or _greedy_tile(rows.shape[0], logits.shape[1])
    return _tokens(_tile_maxima(logits, rows, tile, None, None), None, None)


@triton_op("tokenloop::sample", mutates_args={})
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    seed: Tensor,
    position: Tensor,
    *,
    restricted: bool = True,
    tile: int = TILE,
    capacity: int = CAPACITY,
) -> Tensor:
    """One token of each row, as sampler.sample draws it: logits float [B, V]; temperature and
    top_p float32 [B]; top_k, seed and position int64 [B], contiguous -> token int64 [B, 1].

    `restricted` may be False where no row has a top_k or top_p, which are then not looked at.
    `tile`, a power of two from 4 on, is the logits of one program, `capacity` the length of a row's
    list of candidates; neither changes a token. A top_k above the number of tiles, or a top_p that
    more than `capacity` tokens could be within, is searched for in the whole row: slowly.
    """
    batch, vocab_size = logits.shape
    layout = (vocab_size, logits.stride(0), logits.stride(1))
    found = total = cutoff = None
    if restricted:
        new = {"dtype": torch.int64, "device": logits.device}
        found = torch.empty(batch, dtype=torch.int32, device=logits.device)
        total, cutoff = torch.empty(batch, **new), torch.empty(batch, **new)
        candidates = torch.empty(batch, capacity, **new)

    maxima = _tile_maxima(logits, None, tile, found, total)
    splits = maxima.shape[1]
    padded = triton.next_power_of_2(splits)
    if restricted:
        filters = (temperature, top_k, top_p, candidates, found, total)
        wrap_triton(candidates_kernel)[(splits, batch)](
            logits, maxima, *filters, *layout, capacity, TILE=tile, SPLITS=padded
        )
        wrap_triton(cutoff_kernel)[(batch,)](
            logits, maxima, *filters, cutoff, *layout, splits, capacity,
            CHUNK=CHUNK, SPLITS=padded, ID_DIGITS=triton.cdiv(vocab_size.bit_length(), 4),
            num_warps=CUTOFF_WARPS,
        )  # fmt: skip
    scores = torch.empty_like(maxima)
    wrap_triton(perturbed_kernel)[(splits, batch)](
        logits, maxima, cutoff, temperature, seed, position, scores, *layout,
        RESTRICTED=restricted, TILE=tile, SPLITS=padded,
    )  # fmt: skip
    return _tokens(maxima, scores, temperature)
