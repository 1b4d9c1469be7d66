"""The operators of the sampler on CUDA: they give what greedy.py and sample.py give.

They are torch.ops.tokenloop.greedy and so on, whose kernels torch.export and AOTInductor see.
Launches depend on shapes alone and nothing is read back, so they can be captured in a CUDA graph.

    greedy     2 launches: the tiles' maxima, one reduction
    sample     the same 2; 7 where rows have a top_k or top_p: between them the row's bins, the plan
               of what to search, a list of that, the cutoff, the bounds
    ..._embed  as many: the last one looks up the tokens' embeddings as well
    mask       1, before these, where a row has a grammar
    adjust     1, before that, where a row has penalties or biases
"""

from functools import partial

import torch
import triton
from torch import Tensor

from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.sampler.kernels.triton_bins import PLAN, bins_kernel, list_kernel, plan_kernel
from tokenloop.sampler.kernels.triton_cutoff import cutoff_kernel
from tokenloop.sampler.kernels.triton_maxima import bounds_kernel, tile_maxima_kernel
from tokenloop.sampler.kernels.triton_restrict import adjust_kernel, mask_kernel
from tokenloop.sampler.kernels.triton_token import token_kernel

# 4 KiB of float32 to a program: a vocabulary of 262,144 alone makes 256 of them.
TILE = 1024
# Where there are more tiles than this, they are taken twice as large.
MANY_TILES = 2048
# Tokens that share a bound: the last launch scores all of them or none.
PART = 128
# Warps of a program of the first launch. A part is a run of each STRIDE tokens of its tile: these
# warps hold so many where each thread holds 4 of them.
WARPS, STRIDE = 4, 512
# Parts that the last launch scores at once, and its warps: one for each.
GROUPS = 4
# Bins of a row where it is searched for a cutoff: 76 to a factor of e. Flat rows of 262,144 logits
# have hundreds of tokens to a bin, others a few. A power of two.
BINS = 2048
# Up to FEW listed tokens are compared each with each; longer lists are searched digit by digit,
# CHUNK tokens at once, by this many warps.
FEW, CHUNK, CUTOFF_WARPS = 128, 512, 16
PLAN_WARPS = 8
# Tokens of a row that a program adjusts.
ADJUSTED = 1024


def _tile_maxima(
    logits: Tensor, tile: int, bins: Tensor | None = None,
    sampling: tuple[Tensor, ...] = (None, None, None), bounds: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """int64 [B, splits]. With temperature, seed and position in `sampling`, the bounds of the
    scores of the tiles' parts are written to bounds int32 [B, splits * parts]."""
    batch, splits = logits.shape[0], triton.cdiv(logits.shape[1], tile)
    count = 0 if bins is None else bins.shape[2]
    maxima = torch.empty(batch, splits, dtype=torch.int64, device=logits.device)
    launch(tile_maxima_kernel, (splits, batch))(
        logits, maxima, bins, *sampling, bounds,
        logits.shape[1], logits.stride(0), logits.stride(1), splits,
        SAMPLED=bounds is not None, **_cut(tile, logits.shape[1]),
        BINS=count, ZEROS=triton.next_power_of_2(triton.cdiv(2 * count, splits)), num_warps=WARPS,
    )  # fmt: skip
    return maxima


def _cut(tile: int, vocab_size: int) -> dict[str, int]:
    """How tiles are cut into parts. Philox makes noise for 4 tokens at once: no run is shorter."""
    stride = min(tile, STRIDE)
    parts = min(max(1, tile // PART), stride // 4)
    whole = vocab_size >= tile >= 16 and vocab_size % 16 == 0
    return {"TILE": tile, "PARTS": parts, "STRIDE": stride, "WHOLE": whole}


def _tile_size(rows: int, vocab_size: int) -> int:
    return TILE if rows * triton.cdiv(vocab_size, TILE) <= MANY_TILES else 2 * TILE


def _cutoffs(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, tile: int
) -> tuple[Tensor, Tensor]:
    """The tiles' maxima, and each row's last kept token, packed: int64 [B]."""
    batch, vocab_size = logits.shape
    layout = (vocab_size, logits.stride(0), logits.stride(1))
    filters = (temperature, top_k, top_p)
    new = {"dtype": torch.int64, "device": logits.device}
    bins = torch.empty(batch, 2, BINS, **new)
    plan, cutoff = torch.empty(batch, PLAN.value, **new), torch.empty(batch, **new)
    listed = torch.empty(batch, vocab_size, dtype=torch.int32, device=logits.device)

    maxima = _tile_maxima(logits, tile, bins=bins)
    splits = maxima.shape[1]
    padded = triton.next_power_of_2(splits)
    tiles = {"TILE": tile, "SPLITS": padded, "BINS": BINS}
    launch(bins_kernel, (splits, batch))(logits, maxima, *filters, bins, *layout, **tiles)
    launch(plan_kernel, (batch,))(*filters, bins, plan, vocab_size, BINS=BINS, num_warps=PLAN_WARPS)
    launch(list_kernel, (splits, batch))(
        logits, maxima, temperature, plan, listed, *layout, **tiles
    )
    launch(cutoff_kernel, (batch,))(
        logits, maxima, *filters, plan, listed, cutoff, *layout, splits,
        FEW=FEW, CHUNK=CHUNK, SPLITS=padded, ID_DIGITS=triton.cdiv(vocab_size.bit_length(), 4),
        num_warps=CUTOFF_WARPS,
    )  # fmt: skip
    return maxima, cutoff


def _tokens(
    logits: Tensor, maxima: Tensor, tile: int, sampling: tuple[Tensor, ...] = (None, None, None),
    bounds: Tensor | None = None, cutoff: Tensor | None = None, out: Tensor | None = None,
    table: Tensor | None = None, hidden: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """int64 [B, 1], or `out`; with a table `hidden` is written as well."""
    batch, splits = maxima.shape
    cut, padded = _cut(tile, logits.shape[1]), triton.next_power_of_2(splits)
    token, width = out, 0 if table is None else table.shape[1]
    if token is None:
        token = torch.empty(batch, 1, dtype=torch.int64, device=maxima.device)
    launch(token_kernel, (batch,))(
        logits, maxima, cutoff, *sampling, bounds, token, table, hidden,
        logits.shape[1], logits.stride(0), logits.stride(1), splits, width, scale,
        SAMPLED=bounds is not None, RESTRICTED=cutoff is not None, EMBED=table is not None,
        **cut, SPLITS=padded, GROUPS=min(GROUPS, padded * cut["PARTS"]),
        BLOCK_D=triton.next_power_of_2(width), num_warps=4 if bounds is None else GROUPS,
    )  # fmt: skip
    return token


@operator("greedy")
def greedy(logits: Tensor, *, tile: int | None = None) -> Tensor:
    """The most likely token of each row: logits float [B, V] -> token int64 [B, 1].

    Ties, NaN and rows without numbers are decided as sampler.greedy decides them. `tile`, a power
    of two, is how many logits a program takes.
    """
    tile = tile or _tile_size(*logits.shape)
    return _tokens(logits, _tile_maxima(logits, tile), tile)


@operator("sample")
def sample(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor,
    position: Tensor, *, restricted: bool = True, tile: int | None = None,
) -> Tensor:  # fmt: skip
    """One token of each row, as sampler.sample draws it: logits float [B, V]; temperature and
    top_p float32 [B]; top_k, seed and position int64 [B], contiguous -> token int64 [B, 1].

    `restricted` may be False where no row has a top_k or top_p: they are not looked at then.
    `tile`, a power of two from 4 on, is how many logits a program takes; it does not change a
    token. Thousands of logits that tie at the cutoff make it slow.
    """
    arguments = logits, temperature, top_k, top_p, seed, position
    return _sampled(*arguments, restricted, tile)


@operator("greedy_embed", mutates_args={"next_id", "hidden"})
def greedy_embed(
    logits: Tensor, table: Tensor, next_id: Tensor, hidden: Tensor, *, scale: float = 1.0,
    tile: int | None = None,
) -> None:  # fmt: skip
    """`greedy`, written to next_id int64 [B, 1], and the tokens' rows of the embedding `table`
    [V, D] times `scale`, rounded once, to hidden [B, 1, D] of its dtype. All are contiguous."""
    tile = tile or _tile_size(*logits.shape)
    maxima = _tile_maxima(logits, tile)
    _tokens(logits, maxima, tile, out=next_id, table=table, hidden=hidden, scale=scale)


@operator("sample_embed", mutates_args={"next_id", "hidden"})
def sample_embed(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor,
    position: Tensor, table: Tensor, next_id: Tensor, hidden: Tensor, *, scale: float = 1.0,
    restricted: bool = True, tile: int | None = None,
) -> None:  # fmt: skip
    """`sample`, with the outputs of greedy_embed."""
    arguments = logits, temperature, top_k, top_p, seed, position
    written = {"out": next_id, "table": table, "hidden": hidden, "scale": scale}
    _sampled(*arguments, restricted, tile, **written)


@operator("mask", mutates_args={"logits"})
def mask(logits: Tensor, allowed: Tensor) -> None:
    """sampler.restrict.mask in place: logits float32 [B, V], allowed uint8 [B, W], contiguous. Rows
    whose bits are all 1 are not touched."""
    batch, vocab_size = logits.shape
    launch(mask_kernel, (triton.cdiv(vocab_size, TILE), batch))(
        logits, allowed, vocab_size, logits.stride(0), allowed.shape[1], TILE=TILE
    )


@operator("adjust", mutates_args={"logits"})
def adjust(logits: Tensor, ids: Tensor, scale: Tensor, bias: Tensor) -> None:
    """sampler.restrict.adjust in place: logits float32 [B, V], ids int64 [B, K], scale and bias
    float32 [B, K], contiguous. An id of -1 stands for none; no two of a row are equal but these."""
    batch, count = ids.shape
    launch(adjust_kernel, (triton.cdiv(count, ADJUSTED), batch))(
        logits, ids, scale, bias, count, logits.stride(0), BLOCK=ADJUSTED
    )


def _sampled(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, seed: Tensor,
    position: Tensor, restricted: bool, tile: int | None, **written: Tensor | float,
) -> Tensor:  # fmt: skip
    sampling, cutoff = (temperature, seed, position), None
    tile = tile or (TILE if restricted else _tile_size(*logits.shape))
    batch, splits = logits.shape[0], triton.cdiv(logits.shape[1], tile)
    cut = _cut(tile, logits.shape[1])
    bounds = torch.empty(batch, splits * cut["PARTS"], dtype=torch.int32, device=logits.device)
    if restricted:
        maxima, cutoff = _cutoffs(logits, temperature, top_k, top_p, tile)
        launch(bounds_kernel, (splits, batch))(
            logits, maxima, cutoff, *sampling, bounds,
            logits.shape[1], logits.stride(0), logits.stride(1),
            **cut, SPLITS=triton.next_power_of_2(splits), num_warps=WARPS,
        )  # fmt: skip
    else:
        maxima = _tile_maxima(logits, tile, sampling=sampling, bounds=bounds)
    return _tokens(logits, maxima, tile, sampling, bounds, cutoff, **written)


# What selects for a method of an artifact, by the method's name.
SELECTION = {
    "greedy": greedy,
    "sample": sample,
    # 2 launches do what otherwise takes 7, where no row has a top_k or a top_p.
    "sample_unfiltered": partial(sample, restricted=False),
}
