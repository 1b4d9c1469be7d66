"""How fast is the causal convolution of packed sequences on a CUDA GPU, beside a copy, and beside
the same arithmetic with a grid of (sequence, block of tokens, block of channels)?
`python -m benchmarks.causal_conv1d` prints the ceiling, the figures and one JSON line; with
`--sweep` only what different cuts of the operator take beside the other grid, a line for each size
(a minute; JSON only where --output says).

Times are medians of CUDA graphs of several calls between events, over inputs that no L2 holds. A
share is of what a copy within the device moves: each input read and each output written once. The
grid by sequences is given the longest length, which a caller would have to know on the host. The
host's time is of a call without waiting for it. Several cuts of the work are measured at the end;
the one the operator uses is marked with *. bfloat16, width 4, SiLU.

The other kernel is as in other projects, a program for one block and constant strides; it has the
operator's SiLU, which is faster than theirs.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.cuda_common import (
    copy_bandwidth,
    heading,
    kernel_options,
    kernel_parser,
    median_us,
    origin,
    save,
)
from tokenloop.models.kernels.causal_conv1d import operator, reference
from tokenloop.models.kernels.causal_conv1d.triton_state import inputs_before, store_state
from tokenloop.models.kernels.causal_conv1d.triton_taps import convolved, load_bias, load_weights
from tokenloop.models.kernels.launch.state_slot import load_slot

DIMS = 4096, 8192
TOKENS = 2048, 8192, 32_768, 65_536
SEQUENCES = 1, 8, 64
WIDTH = 4
COLD_BYTES = 200e6  # several times the largest L2
# Tokens, channels and warps of one program of the grid by sequences; the better one counts.
PEER_CUTS = (16, 256, 2), (32, 128, 2)
# As operator.ROLLING.
CUTS = (
    operator.ROLLING, (8, 4, 256, 2, 1), (32, 4, 256, 2, 1), (128, 4, 256, 2, 1),
    (16, 4, 256, 2, 0), (16, 8, 256, 2, 1), (16, 4, 128, 1, 1),
)  # fmt: skip
SWEPT = (
    *((most, 4, 256, 2, 1) for most in (8, 16, 32, 128)),
    *((most, 2, 256, 2, 1) for most in (8, 16)),
    *((most, 4, 128, 1, 1) for most in (8, 16)),
    *((most, 8, 256, 2, 1) for most in (16, 32)),
    (16, 4, 256, 2, 0),
    (16, 4, 512, 4, 1),
)
SWEPT_LENGTHS = (1, False), (8, False), (64, False), (64, True)  # sequences, and whether skewed
CHECKED = 48  # channels, at either end
HEADER = (
    f"{'dim':>5}{'tokens':>8}{'sequences':>11}  {'lengths':<8}{'floor us':>9}{'ours':>9}"
    f"{'share':>7}{'by sequence':>13}{'ratio':>7}{'host':>7}{'error':>9}"
)


@triton.jit
def load_rows(x_ptrs, in_dim, begin, tokens, stride, WIDTH: tl.constexpr, COUNT: tl.constexpr):
    """The tokens of a block, each [BLOCK_DIM], after the last WIDTH - 1 before it."""
    rows = ()
    for i in tl.static_range(1 - WIDTH, COUNT):
        token = begin + i
        mask = in_dim & (token >= 0) & (token < tokens)
        rows = rows + (tl.load(x_ptrs + token.to(tl.int64) * stride, mask=mask, other=0.0),)
    return rows


@triton.jit
def roll(
    rows, out_ptrs, weights, bias, in_dim, begin, end, start, out_stride_token,
    WIDTH: tl.constexpr, SILU: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """A block of one sequence token by token, of what load_rows gave. What is before `start` counts
    as zeros, what is from `end` on is not stored."""
    past = ()
    for i in tl.static_range(WIDTH - 1):
        known = begin - (WIDTH - 1) + i >= start
        past = past + (tl.where(known, rows[i].to(tl.float32), 0.0),)
    out_row = out_ptrs + begin.to(tl.int64) * out_stride_token
    for i in tl.static_range(BLOCK_TOKENS):
        past = past + (rows[WIDTH - 1 + i].to(tl.float32),)
        out = convolved(past, weights, bias, WIDTH, SILU).to(out_row.dtype.element_ty)
        tl.store(out_row + i * out_stride_token, out, mask=in_dim & (begin + i < end))
        past = past[1:]


@triton.jit
def by_sequence_kernel(
    x_ptr, weight_ptr, query_start_loc_ptr, state_ptr, cache_indices_ptr, has_initial_ptr, out_ptr,
    dim, weight_stride_dim, state_stride_slot, state_stride_dim,
    x_stride_token: tl.constexpr, out_stride_token: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """The operator's arithmetic, a program for a block of one sequence. That of a sequence's begin
    replaces its state."""
    sequence = tl.program_id(0)
    start = tl.load(query_start_loc_ptr + sequence)
    stop = tl.load(query_start_loc_ptr + sequence + 1)
    begin = start + tl.program_id(1) * BLOCK_TOKENS
    if begin >= stop:
        return
    channels = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    in_dim = channels < dim
    x_ptrs, out_ptrs = x_ptr + channels, out_ptr + channels
    weights = load_weights(weight_ptr + channels * weight_stride_dim, 1, in_dim, WIDTH)
    bias = load_bias(weight_ptr, channels, in_dim, False)
    rows = load_rows(x_ptrs, in_dim, begin, stop, x_stride_token, WIDTH, BLOCK_TOKENS)
    if begin > start:
        roll(
            rows, out_ptrs, weights, bias, in_dim, begin, stop, start, out_stride_token,
            WIDTH, True, BLOCK_TOKENS,
        )  # fmt: skip
        return
    slot = load_slot(cache_indices_ptr, sequence, True)
    started = tl.load(has_initial_ptr + sequence) != 0
    state_ptrs = state_ptr + slot * state_stride_slot + channels * state_stride_dim
    held = start, started, x_ptrs, state_ptrs, x_stride_token, 1
    # Before the start there is the state: no token is too early.
    roll(
        inputs_before(start, *held, in_dim, WIDTH) + rows[WIDTH - 1 :], out_ptrs, weights, bias,
        in_dim, begin, stop, start - (WIDTH - 1), out_stride_token,
        WIDTH, True, BLOCK_TOKENS,
    )  # fmt: skip
    left = inputs_before(stop, *held, in_dim, WIDTH)
    store_state(left, state_ptrs, 1, in_dim, WIDTH)


@dataclass(frozen=True)
class Work:
    """Inputs of the operator: several x [D, T], of adjacent channels or of adjacent tokens, and
    what they share. Every third sequence begins anew; slots are the sequences' in reverse."""

    sets: list[Tensor]
    weight: Tensor
    query_start_loc: Tensor
    state: Tensor
    indices: Tensor
    started: Tensor
    longest: int

    def ours(self, x: Tensor) -> Tensor:
        given = self.weight, None, self.query_start_loc, self.state, self.indices, self.started
        return operator.causal_conv1d(x, *given, "silu")

    def by_sequence(self, x: Tensor, cut: tuple[int, int, int] = PEER_CUTS[0]) -> Tensor:
        block_tokens, block_dim, warps = cut
        dim, tokens = x.shape
        out = torch.empty(tokens, dim, dtype=x.dtype, device=x.device).T
        blocks = triton.cdiv(self.longest, block_tokens), triton.cdiv(dim, block_dim)
        by_sequence_kernel[(self.started.shape[0], *blocks)](
            x, self.weight, self.query_start_loc, self.state, self.indices, self.started, out,
            dim, self.weight.stride(0), *self.state.stride()[:2], x.stride(1), out.stride(1),
            WIDTH=WIDTH, BLOCK_TOKENS=block_tokens, BLOCK_DIM=block_dim, num_warps=warps,
        )  # fmt: skip
        return out

    def error(self, function: Callable[[Tensor], Tensor]) -> float:
        """The largest difference of the outputs and states from the reference's, of some channels,
        over the largest output."""
        before, x = self.state.clone(), self.sets[0]
        got = function(x)
        # Both ends: whole blocks of channels and the last one.
        dim = x.shape[0]
        some = torch.arange(min(dim, 2 * CHECKED), device=x.device)
        some[some.shape[0] // 2 :] += dim - some.shape[0]
        state = before[:, some]
        shared = self.query_start_loc, state, self.indices, self.started
        expected = reference.causal_conv1d(x[some], self.weight[some], None, *shared, "silu")
        worst = (got[some].float() - expected.float()).abs().max() / expected.float().abs().max()
        wrong = (self.state[:, some] != state).any()
        self.state.copy_(before)
        return float(torch.where(wrong, torch.inf, worst))


def lengths_of(tokens: int, sequences: int, skewed: bool) -> list[int]:
    """Lengths that add up to `tokens`: about equal, or one sequence and others of 1 to 7."""
    if skewed:
        few = [i % 7 + 1 for i in range(sequences - 1)]
        return [*few[: sequences // 2], tokens - sum(few), *few[sequences // 2 :]]
    ends = [tokens * (i + 1) // sequences for i in range(sequences)]
    return [end - begin for begin, end in zip([0, *ends], ends)]


def make_work(
    dim: int, lengths: list[int], device: str, count: int = 1, tokens_adjacent: bool = False
) -> Work:
    generator = torch.Generator(device).manual_seed(dim + len(lengths))
    new = {"device": device, "dtype": torch.bfloat16, "generator": generator}
    sequences = len(lengths)
    sets = [torch.randn(sum(lengths), dim, **new).T for _ in range(count)]
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    return Work(
        [x.contiguous() for x in sets] if tokens_adjacent else sets,
        torch.randn(dim, WIDTH, **new),
        ends.int(),
        torch.randn(sequences, dim, WIDTH - 1, **new),
        torch.arange(sequences - 1, -1, -1, dtype=torch.int32, device=device),
        torch.arange(sequences, device=device) % 3 != 2,
        max(lengths),
    )


def calls(work: Work, function: Callable[[Tensor], Tensor]) -> list[Callable[[], Tensor]]:
    return [lambda x=x: function(x) for x in work.sets]


def host_us(work: Work) -> float:
    """Microseconds of the host to launch the operator, the least of some rounds."""
    rounds = []
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            work.ours(work.sets[0])
        rounds.append((time.perf_counter() - start) * 1e6 / 20)
    return min(rounds)


@contextlib.contextmanager
def cut_into(cut: tuple[int, ...], programs: int | None = None) -> Iterator[None]:
    """Let the operator cut its work otherwise; into at least so many programs."""
    own = operator.ROLLING, operator.PROGRAMS
    operator.ROLLING, operator.PROGRAMS = cut, programs or operator.PROGRAMS
    try:
        yield
    finally:
        operator.ROLLING, operator.PROGRAMS = own


def peer_us(work: Work, repeats: int) -> float:
    return min(
        median_us(calls(work, lambda x, cut=cut: work.by_sequence(x, cut)), repeats)
        for cut in PEER_CUTS
    )


def measure(dim: int, tokens: int, sequences: int, skewed: bool, bandwidth: float, repeats: int):
    """A row of figures."""
    size = 2 * 2 * dim * tokens
    count = int(COLD_BYTES // size) + 1
    work = make_work(dim, lengths_of(tokens, sequences, skewed), "cuda", count)
    errors = [work.error(work.ours), work.error(work.by_sequence)]
    ours_us = median_us(calls(work, work.ours), repeats)
    by_sequence_us = peer_us(work, repeats)
    return {
        "dim": dim,
        "tokens": tokens,
        "sequences": sequences,
        "lengths": "skewed" if skewed else "even",
        "floor_us": size / bandwidth * 1e6,
        "ours_us": ours_us,
        "share": size / (ours_us * 1e-6) / bandwidth,
        "by_sequence_us": by_sequence_us,
        "host_us": host_us(work),
        "error": max(errors),
    }


def print_row(row: dict) -> None:
    print(
        f"{row['dim']:>5}{row['tokens']:>8}{row['sequences']:>11}  {row['lengths']:<8}"
        f"{row['floor_us']:>9.1f}{row['ours_us']:>9.1f}{row['share']:>7.1%}"
        f"{row['by_sequence_us']:>13.1f}{row['ours_us'] / row['by_sequence_us']:>7.2f}"
        f"{row['host_us']:>7.0f}{row['error']:>9.1e}",
        flush=True,
    )


def measure_cuts(dim: int, tokens: int, bandwidth: float, repeats: int) -> list[dict]:
    """Other blocks than the operator's, and inputs whose tokens are adjacent."""
    size = 2 * 2 * dim * tokens
    count = int(COLD_BYTES // size) + 1
    rows = []
    for tokens_adjacent, cuts in ((False, CUTS), (True, [operator.ROLLING])):
        work = make_work(dim, lengths_of(tokens, 8, True), "cuda", count, tokens_adjacent)
        for cut in cuts:
            with cut_into(cut):
                row = {"dim": dim, "tokens": tokens, "tokens_adjacent": tokens_adjacent, "cut": cut}
                row["error"] = work.error(work.ours)
                row["us"] = median_us(calls(work, work.ours), repeats)
            row["share"] = size / (row["us"] * 1e-6) / bandwidth
            rows.append(row)
            adjacent = "tokens adjacent" if tokens_adjacent else "channels adjacent"
            own = "*" if cut == operator.ROLLING else ""
            print(
                f"{dim:>5}{tokens:>8}  {adjacent:<18}{str(cut):>19} {own:<2}"
                f"{row['us']:>9.1f}{row['share']:>7.1%}{row['error']:>9.1e}",
                flush=True,
            )
    return rows


def sweep(repeats: int, device: str = "cuda") -> list[dict]:
    """Each size's times of all cuts, the best first, and then each cut's ratios to the other grid
    over all sizes. `rule` is the operator's own, which depends on the sizes."""
    rows = []
    for dim in DIMS:
        for tokens in TOKENS:
            for sequences, skewed in SWEPT_LENGTHS:
                count = int(COLD_BYTES // (4 * dim * tokens)) + 1
                work = make_work(dim, lengths_of(tokens, sequences, skewed), device, count)
                times, errors = {}, []
                for cut in (None, *SWEPT):
                    with cut_into(cut or operator.ROLLING, 1 if cut else None):
                        times[cut] = median_us(calls(work, work.ours), repeats)
                        # The reference takes long.
                        if tokens == TOKENS[0]:
                            errors.append(work.error(work.ours))
                sizes = {"dim": dim, "tokens": tokens, "sequences": sequences, "skewed": skewed}
                peer = peer_us(work, repeats)
                rows.append({**sizes, "peer_us": peer, "times": list(times.items())})
                best = sorted(times, key=times.get)[:5]
                print(
                    f"{dim:>5}{tokens:>6} {sequences:>2} {'skew' if skewed else 'even'}"
                    f" peer {peer:6.1f} rule {times[None]:6.1f} {times[None] / peer:.2f} | "
                    + "  ".join(f"{cut_name(cut)} {times[cut]:.1f}" for cut in best)
                    + (f"  error {max(errors):.0e}" if errors else ""),
                    flush=True,
                )
    for skewed in (False, True):
        print("skewed" if skewed else "even", "cases: ratios to the peer for each number of tokens")
        for i, cut in enumerate((None, *SWEPT)):
            line = f"{cut_name(cut):>12}"
            for tokens in TOKENS:
                ratios = [
                    row["times"][i][1] / row["peer_us"]
                    for row in rows
                    if row["tokens"] == tokens and row["skewed"] == skewed
                ]
                line += f"  {statistics.geometric_mean(ratios):.3f} (<= {max(ratios):.3f})"
            print(line, flush=True)
    return rows


def cut_name(cut: tuple[int, ...] | None) -> str:
    return "rule" if cut is None else "/".join(map(str, cut))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = kernel_parser("causal_conv1d", __doc__, 10)
    parser.add_argument("--sweep", action="store_true", help="compare cuts of the work only")
    return kernel_options(parser, arguments)


def main() -> None:
    options = parse()
    bandwidth = copy_bandwidth()
    print(heading(bandwidth))
    if options.sweep:
        rows = sweep(options.repeats)
        if options.output is not None:
            options.output.write_text(json.dumps({**origin("causal_conv1d"), "sweep": rows}) + "\n")
        return
    print(HEADER)
    rows = []
    for dim in DIMS:
        for tokens in TOKENS:
            for sequences in SEQUENCES:
                for skewed in (False, True)[: min(sequences, 2)]:
                    rows.append(measure(dim, tokens, sequences, skewed, bandwidth, options.repeats))
                    print_row(rows[-1])
    cuts = []
    for dim, tokens in ((DIMS[0], TOKENS[0]), (DIMS[-1], TOKENS[-1])):
        cuts += measure_cuts(dim, tokens, bandwidth, options.repeats)
    answer = {
        **origin("causal_conv1d"),
        "copy_tb_s": bandwidth / 1e12,
        "repeats": options.repeats,
        "rows": rows,
        "cuts": cuts,
    }
    save(answer, options.output)


if __name__ == "__main__":
    main()
