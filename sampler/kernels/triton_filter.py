"""Triton kernels of rows with top-k or top-p: what follows triton_maxima.py's, in two launches.

    narrow_kernel  short rows (a top-k of up to LISTED) and greedy ones get their token from one
                   program. Others are added up in bins, and the last of the row's programs plans
                   where to search (triton_bins.py).
    choose_kernel  what the plan says is listed, and what stays gets bounds. The last program of
                   the row finds the cutoff (triton_cutoff.py), and the token (triton_token.py).

Which way a row goes depends on that row's arguments and logits alone, and is seen on the device.
"""

import triton
import triton.language as tl

from tokenloop.models.kernels.launch.dependent_launch import wait, waits
from tokenloop.models.kernels.launch.semaphores import arrive
from tokenloop.sampler.kernels.triton_bins import (
    CUTOFF,
    DONE,
    SEMAPHORES,
    add_to_bins,
    add_to_list,
    bin_of,
    filters,
    list_parts,
    load_parts,
    make_plan,
    plan_everything,
)
from tokenloop.sampler.kernels.triton_cutoff import find_cutoff
from tokenloop.sampler.kernels.triton_exact import scaled
from tokenloop.sampler.kernels.triton_keys import ID_MASK, LOWEST_KEY, NOTHING
from tokenloop.sampler.kernels.triton_maxima import score_bounds
from tokenloop.sampler.kernels.triton_noise import log2_double_rate, philox_words
from tokenloop.sampler.kernels.triton_short import short_token
from tokenloop.sampler.kernels.triton_tiles import load_maxima
from tokenloop.sampler.kernels.triton_token import by_group, noisiest, store_token

# Gumbel noise of 23 bits lies in [-2.82, 16.64]: what is scaled below this cannot win a row.
HOPELESS = tl.constexpr(-20.0)


@triton.jit
def _load_tops(tops_ptr, count, TOPS: tl.constexpr):
    offsets = tl.arange(0, TOPS)
    return tl.load(tops_ptr + offsets, mask=offsets < count, other=float("-inf"))


@waits  # at once
@triton.jit
def narrow_kernel(
    logits_ptr, maxima_ptr, tops_ptr, sums_ptr, parts_ptr, short_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, seed_ptr, position_ptr,
    token_ptr, table_ptr, hidden_ptr,
    vocab_size, row_stride, column_stride, splits, width, embed_scale: tl.constexpr,
    EMBED: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr,
    WHOLE: tl.constexpr, SPLITS: tl.constexpr, TOPS: tl.constexpr, BINS: tl.constexpr,
    AT_ONCE: tl.constexpr, LISTED: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (row, i) takes its share of what the row's programs look at."""
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    zero = wait(0)
    temperature = tl.load(temperature_ptr + row)
    k, p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    k, p = filters(temperature, k, p, vocab_size)
    row_ptr = logits_ptr + zero + row * row_stride
    count = splits * PARTS
    tops_ptr += zero + row * count
    parts_ptr += zero + row * count
    sums_ptr += zero + row * (2 * BINS + 2 * SEMAPHORES)
    is_short = (temperature == 0) | ((k > 0) & (k <= LISTED))
    if is_short:
        if program == 0:
            is_found = temperature == 0
            best = tl.full([], NOTHING | ID_MASK, tl.int64)
            if is_found:
                best = tl.max(load_maxima(maxima_ptr + zero, row, splits, SPLITS))
            else:
                seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + zero + row)
                best, is_found = short_token(
                    row_ptr, _load_tops(tops_ptr, count, TOPS), count, parts_ptr,
                    short_ptr + zero + row * TOKENS, sums_ptr + 2 * BINS + SEMAPHORES + 2,
                    temperature, k, p, seed, position, vocab_size, column_stride,
                    TILE, PARTS, STRIDE, WHOLE, TOPS, LISTED, TOKENS,
                )  # fmt: skip
            if is_found:
                tl.store(sums_ptr + 2 * BINS + DONE, tl.full([], 1, tl.int64))
                store_token(
                    best, row, token_ptr, table_ptr, hidden_ptr, width, embed_scale, EMBED, BLOCK_D
                )
            else:
                plan_everything(sums_ptr, BINS)
    elif (k > 0) | (p < 1):
        tops = _load_tops(tops_ptr, count, TOPS)
        add_to_bins(
            row_ptr, tops, parts_ptr, sums_ptr, program, tl.num_programs(1), tl.max(tops),
            temperature, k, p, count, vocab_size, column_stride,
            BINS, TOPS, AT_ONCE, TILE, PARTS, STRIDE, WHOLE,
        )  # fmt: skip
        if arrive(sums_ptr + 2 * BINS + SEMAPHORES, tl.num_programs(1)):
            make_plan(sums_ptr, k, p, BINS)


@triton.jit
def _bound_parts(
    row_ptr, tops, parts_ptr, bounds_ptr, list_ptr, plan_ptr, program, programs, is_cut,
    largest, temperature, seed, position, count, vocab_size, column_stride,
    BINS: tl.constexpr, TOPS: tl.constexpr, AT_ONCE: tl.constexpr,
    TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """List the tokens of the planned bins in a program's share of a row's parts, and bound the
    scores of those that may stay. Parts that cannot hold the row's token have no bounds."""
    first, last = tl.load(plan_ptr).to(tl.int32), tl.load(plan_ptr + 1).to(tl.int32)
    kth = tl.load(plan_ptr + 2).to(tl.int32)
    s = scaled(tops, largest, temperature)
    is_needed = s >= HOPELESS
    if is_cut:
        bins = bin_of(s, BINS)
        is_needed = (is_needed & (bins <= last)) | (bins <= tl.maximum(last, kth))
    if program == 0:
        offsets = tl.arange(0, TOPS)
        none = (is_needed == 0) & (offsets < count)
        tl.store(bounds_ptr + offsets, tl.full([TOPS], LOWEST_KEY, tl.int32), mask=none)
    needed = list_parts(parts_ptr, is_needed, count, TOPS)
    for start in range(program * AT_ONCE, needed, programs * AT_ONCE):
        x, ids, is_own, counters, parts = load_parts(
            row_ptr, parts_ptr, start, needed, vocab_size, column_stride, AT_ONCE,
            TILE, PARTS, STRIDE, WHOLE,
        )  # fmt: skip
        # Noise does not wait for logits.
        rates = log2_double_rate(philox_words(counters, seed, position))
        if is_cut:
            bins = bin_of(scaled(x, largest, temperature), BINS)
            listed = ((bins >= first) & (bins <= last)) | (bins == kth)
            add_to_list(list_ptr, plan_ptr, ids, listed & is_own)
            x = tl.where(bins <= last, x, float("-inf"))
        bounds = score_bounds(tl.reshape(x, [x.numel]), rates, temperature, AT_ONCE, x.numel)[1]
        bounds = tl.max(tl.reshape(bounds, [AT_ONCE, counters.shape[0] // AT_ONCE]), axis=1)
        tl.store(bounds_ptr + parts, bounds, mask=parts >= 0)


@waits  # at once
@triton.jit
def choose_kernel(
    logits_ptr, maxima_ptr, tops_ptr, sums_ptr, parts_ptr, list_ptr, bounds_ptr,
    temperature_ptr, top_k_ptr, top_p_ptr, seed_ptr, position_ptr,
    token_ptr, table_ptr, hidden_ptr,
    vocab_size, row_stride, column_stride, splits, width, embed_scale: tl.constexpr,
    EMBED: tl.constexpr, TILE: tl.constexpr, PARTS: tl.constexpr, STRIDE: tl.constexpr,
    WHOLE: tl.constexpr, SPLITS: tl.constexpr, TOPS: tl.constexpr, BINS: tl.constexpr,
    AT_ONCE: tl.constexpr, GROUPS: tl.constexpr,
    FEW: tl.constexpr, CHUNK: tl.constexpr, ID_DIGITS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The tokens of the rows that narrow_kernel has not given one."""
    row, program = tl.program_id(0).to(tl.int64), tl.program_id(1)
    zero = wait(0)
    temperature = tl.load(temperature_ptr + row)
    k, p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row)
    sums_ptr += zero + row * (2 * BINS + 2 * SEMAPHORES)
    plan_ptr = sums_ptr + 2 * BINS
    is_done = tl.load(plan_ptr + DONE) > 0
    if is_done == 0:
        k, p = filters(temperature, k, p, vocab_size)
        count = splits * PARTS
        row_ptr = logits_ptr + zero + row * row_stride
        bounds_ptr += zero + row * count
        list_ptr += zero + row * vocab_size
        seed, position = tl.load(seed_ptr + row), tl.load(position_ptr + zero + row)
        # A row without filters has no plan.
        is_cut = (k > 0) | (p < 1)
        is_cut = is_cut & (tl.maximum(tl.load(plan_ptr + 1), tl.load(plan_ptr + 2)) >= 0)
        tops = _load_tops(tops_ptr + zero + row * count, count, TOPS)
        largest = tl.max(tops)
        _bound_parts(
            row_ptr, tops, parts_ptr + zero + row * count, bounds_ptr, list_ptr, plan_ptr,
            program, tl.num_programs(1), is_cut, largest, temperature, seed, position, count,
            vocab_size, column_stride, BINS, TOPS, AT_ONCE, TILE, PARTS, STRIDE, WHOLE,
        )  # fmt: skip
        if arrive(plan_ptr + SEMAPHORES + 1, tl.num_programs(1)):
            cutoff = tl.full([], NOTHING, tl.int64)
            if is_cut:
                cutoff = find_cutoff(
                    row_ptr, list_ptr, plan_ptr, largest, temperature, k, p, vocab_size,
                    column_stride, FEW, CHUNK, ID_DIGITS,
                )  # fmt: skip
            tl.store(plan_ptr + CUTOFF, cutoff)
            maxima = load_maxima(maxima_ptr + zero, row, splits, SPLITS)
            bounds, offsets = by_group(bounds_ptr, count, SPLITS, PARTS, GROUPS)
            best = noisiest(
                row_ptr, maxima, bounds, offsets, cutoff, temperature, seed, position,
                vocab_size, column_stride, True, TILE, PARTS, STRIDE, WHOLE, GROUPS,
            )  # fmt: skip
            store_token(
                best, row, token_ptr, table_ptr, hidden_ptr, width, embed_scale, EMBED, BLOCK_D
            )
