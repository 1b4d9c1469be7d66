"""The operators of the sampler on CUDA: they give what greedy.py and sample.py give.

They are torch.ops.tokenloop.greedy and so on, whose kernels torch.export and AOTInductor see.
Launches depend on shapes alone and nothing is read back, so they can be captured in a CUDA graph.

    greedy     2 launches: the tiles' maxima, one reduction
    sample     the same 2; 3 where rows have a top_k or top_p: triton_filter.py's after the maxima
    ..._embed  as many: the last one looks up the tokens' embeddings as well
    mask       1, before these, where a row has a grammar
    adjust     1, before that, where a row has penalties or biases
"""

from functools import partial

import torch
import triton
from torch import Tensor

from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.sampler.kernels.triton_bins import SEMAPHORES
from tokenloop.sampler.kernels.triton_filter import choose_kernel, narrow_kernel
from tokenloop.sampler.kernels.triton_maxima import tile_maxima_kernel
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
# CHUNK tokens at once.
FEW, CHUNK = 128, 512
# Programs of the launches that filter, of all rows together, each with so many warps: as many as
# run at once. A program looks at so many parts at a time.
PROGRAMS, WIDE_WARPS, AT_ONCE = 132, 16, 32
# A top_k of up to LISTED is short: the row's token is found among so many parts, and then among
# TOKENS tokens, by one program.
LISTED, TOKENS = 64, 128
# Tokens of a row that a program adjusts.
ADJUSTED = 1024


def _tile_maxima(
    logits: Tensor, tile: int, sampling: tuple[Tensor, ...] = (None, None, None),
    bounds: Tensor | None = None, tops: Tensor | None = None, sums: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """int64 [B, splits]. With temperature, seed and position in `sampling`, the bounds of the
    scores of the tiles' parts are written to bounds int32 [B, splits * parts]. With tops float32
    [B, splits * parts] the parts' largest logits are, and sums int64 [B, N] are zeroed."""
    batch, splits = logits.shape[0], triton.cdiv(logits.shape[1], tile)
    words = 0 if sums is None else sums.shape[1]
    maxima = torch.empty(batch, splits, dtype=torch.int64, device=logits.device)
    launch(tile_maxima_kernel, (splits, batch))(
        logits, maxima, tops, sums, *sampling, bounds,
        logits.shape[1], logits.stride(0), logits.stride(1), splits,
        SAMPLED=bounds is not None, TOPS=tops is not None, **_cut(tile, logits.shape[1]),
        WORDS=words, ZEROS=triton.next_power_of_2(triton.cdiv(words, splits)), num_warps=WARPS,
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


def _filtered(
    logits: Tensor, sampling: tuple[Tensor, ...], tile: int, out: Tensor | None = None,
    table: Tensor | None = None, hidden: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """int64 [B, 1], or `out`, where rows may have a top_k or top_p: `sampling` are temperature,
    top_k, top_p, seed and position. With a table `hidden` is written as well."""
    batch, vocab_size = logits.shape
    splits = triton.cdiv(vocab_size, tile)
    programs = min(splits, max(1, PROGRAMS // batch))
    cut, padded = _cut(tile, vocab_size), triton.next_power_of_2(splits)
    count = splits * cut["PARTS"]

    def new(size: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(batch, size, dtype=dtype, device=logits.device)

    token = new(1) if out is None else out
    tops, sums = new(count, torch.float32), new(2 * BINS + 2 * SEMAPHORES.value)
    parts, short = new(count, torch.int32), new(TOKENS)
    listed, bounds = new(vocab_size, torch.int32), new(count, torch.int32)
    width = 0 if table is None else table.shape[1]
    # What both launches take at the end.
    last = (
        *sampling, token, table, hidden,
        vocab_size, logits.stride(0), logits.stride(1), splits, width, scale,
    )  # fmt: skip
    both = cut | {
        "EMBED": table is not None, "SPLITS": padded, "TOPS": triton.next_power_of_2(count),
        "BINS": BINS, "AT_ONCE": AT_ONCE, "BLOCK_D": triton.next_power_of_2(width),
        "num_warps": WIDE_WARPS,
    }  # fmt: skip
    maxima = _tile_maxima(logits, tile, tops=tops, sums=sums)
    launch(narrow_kernel, (batch, programs))(
        logits, maxima, tops, sums, parts, short, *last, **both, LISTED=LISTED, TOKENS=TOKENS
    )
    launch(choose_kernel, (batch, programs))(
        logits, maxima, tops, sums, parts, listed, bounds, *last, **both,
        GROUPS=min(WIDE_WARPS, padded * cut["PARTS"]),
        FEW=FEW, CHUNK=CHUNK, ID_DIGITS=triton.cdiv(vocab_size.bit_length(), 4),
    )  # fmt: skip
    return token


def _tokens(
    logits: Tensor, maxima: Tensor, tile: int, sampling: tuple[Tensor, ...] = (None, None, None),
    bounds: Tensor | None = None, out: Tensor | None = None,
    table: Tensor | None = None, hidden: Tensor | None = None, scale: float = 1.0,
) -> Tensor:  # fmt: skip
    """int64 [B, 1], or `out`; with a table `hidden` is written as well."""
    batch, splits = maxima.shape
    cut, padded = _cut(tile, logits.shape[1]), triton.next_power_of_2(splits)
    token, width = out, 0 if table is None else table.shape[1]
    if token is None:
        token = torch.empty(batch, 1, dtype=torch.int64, device=maxima.device)
    launch(token_kernel, (batch,))(
        logits, maxima, *sampling, bounds, token, table, hidden,
        logits.shape[1], logits.stride(0), logits.stride(1), splits, width, scale,
        SAMPLED=bounds is not None, EMBED=table is not None,
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
    tile = tile or _tile_size(*logits.shape)
    if restricted:
        return _filtered(logits, (temperature, top_k, top_p, seed, position), tile, **written)
    batch, splits = logits.shape[0], triton.cdiv(logits.shape[1], tile)
    cut, sampling = _cut(tile, logits.shape[1]), (temperature, seed, position)
    bounds = torch.empty(batch, splits * cut["PARTS"], dtype=torch.int32, device=logits.device)
    maxima = _tile_maxima(logits, tile, sampling, bounds)
    return _tokens(logits, maxima, tile, sampling, bounds, **written)


# What selects for a method of an artifact, by the method's name.
SELECTION = {
    "greedy": greedy,
    "sample": sample,
    # 2 launches do what otherwise takes 3, where no row has a top_k or a top_p.
    "sample_unfiltered": partial(sample, restricted=False),
}
