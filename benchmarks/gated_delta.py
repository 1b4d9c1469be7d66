"""How fast is a step of the gated delta rule, and of the convolution before it, on a CUDA GPU?
`python -m benchmarks.gated_delta` prints the ceiling, the figures and one JSON line.

Times are medians of CUDA graphs of many calls between events, over states that no L2 holds. A share
is of what a copy within the device moves: the state read once and written once, and the inputs.
Several cuts of the work are measured; the one the operator uses is marked with *. torch's is the
reference in plain operations. 32 heads of 128 x 128 with 16 key heads, bfloat16 inputs.
"""

import argparse
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
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
from tokenloop.models.kernels import cuda
from tokenloop.models.kernels.causal_conv1d import reference as conv1d
from tokenloop.models.kernels.gated_delta_rule import operator
from tokenloop.models.kernels.gated_delta_rule import reference as delta_rule

BATCHES = 1, 2, 4, 8, 16, 32, 64
HEADS, KEY_HEADS, SIZE = 32, 16, 128
WIDTH = 4
# Columns of the state in one program, and its warps; the operator's own first.
CUTS = operator.COLUMNS, (128, 8), (32, 4), (32, 2), (16, 2)
COLD_BYTES = 200e6  # several times the largest L2
HEADER = f"{'batch':>5}  {'what':<28}{'floor us':>9}{'us':>9}{'share':>8}{'error':>9}"


@dataclass(frozen=True)
class Work:
    """Inputs of a step: of each set its states, and what they share. Where there are several rows
    the last begins anew."""

    convs: list[Tensor]
    states: list[Tensor]
    x: Tensor
    weight: Tensor
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor
    started: Tensor

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as they lie in what the convolution gives."""
        size = self.states[0].shape[-1]
        heads = self.states[0].shape[1]
        key_heads = (self.x.shape[1] // size - heads) // 2
        q, k, v = self.x.unflatten(1, (-1, size)).split([key_heads, key_heads, heads], 1)
        return q, k, v

    def step(self, operators, state: Tensor) -> Tensor:
        gates = self.a, self.b, self.A_log, self.dt_bias
        return operators.gated_delta_rule_update(*self.heads(), *gates, state, None, self.started)

    def convolve(self, operators, conv: Tensor) -> Tensor:
        given = self.x, self.weight, None, conv, None, self.started, "silu"
        return operators.causal_conv1d_update(*given)

    def error(self, function: Callable, reference, table: Tensor) -> float:
        """The largest difference from the reference, of outputs and of the states left behind, each
        over the largest value."""
        tables = table.clone(), table.clone()
        got, expected = function(cuda, tables[0]), function(reference, tables[1])
        pairs = (got, expected), tables
        return max(
            float((x.float() - y.float()).abs().max() / y.float().abs().max()) for x, y in pairs
        )


def make_work(batch: int, heads: int, key_heads: int, size: int, device: str, count: int) -> Work:
    generator = torch.Generator(device).manual_seed(batch)
    new = {"device": device, "generator": generator}
    inputs = new | {"dtype": torch.bfloat16}
    channels = (2 * key_heads + heads) * size
    started = torch.ones(batch, dtype=torch.bool, device=device)
    started[1:][-1:] = False
    return Work(
        [torch.randn(batch, channels, WIDTH - 1, **inputs) for _ in range(count)],
        [torch.randn(batch, heads, size, size, **new) for _ in range(count)],
        torch.randn(batch, channels, **inputs),
        torch.randn(channels, WIDTH, **inputs),
        torch.randn(batch, heads, **inputs),
        torch.randn(batch, heads, **inputs),
        torch.randn(heads, **new),
        torch.randn(heads, **new),
        started,
    )


@contextlib.contextmanager
def cut_into(cut: tuple[int, int]) -> Iterator[None]:
    """Let the operator's programs have so many columns of a state, and warps."""
    own, operator.COLUMNS = operator.COLUMNS, cut
    try:
        yield
    finally:
        operator.COLUMNS = own


def measure(batch: int, bandwidth: float, repeats: int) -> list[dict]:
    """Rows of figures: the step's cuts, torch's step, and the convolution's step."""
    state_bytes = batch * HEADS * SIZE * SIZE * 4
    count = int(COLD_BYTES // (2 * state_bytes)) + 2
    work = make_work(batch, HEADS, KEY_HEADS, SIZE, "cuda", count)
    inputs = work.x.nbytes + 2 * work.a.nbytes
    step_bytes = 2 * state_bytes + inputs + batch * HEADS * SIZE * 2
    conv_bytes = 2 * work.convs[0].nbytes + 2 * work.x.nbytes + work.weight.nbytes
    rows = []

    def add(what: str, size: int, calls: list[Callable[[], Tensor]], error: float | None) -> None:
        us = median_us(calls, repeats)
        row = {"batch": batch, "what": what, "floor_us": size / bandwidth * 1e6, "us": us}
        row |= {"share": size / (us * 1e-6) / bandwidth, "error": error}
        rows.append(row)
        shown = "" if error is None else f"{error:.1e}"
        print(
            f"{batch:>5}  {what:<28}{row['floor_us']:>9.2f}{us:>9.2f}{row['share']:>8.1%}"
            f"{shown:>9}",
            flush=True,
        )

    def calls(function: Callable, operators, tables: list[Tensor]) -> list[Callable[[], Tensor]]:
        return [lambda table=table: function(operators, table) for table in tables]

    for cut in CUTS:
        with cut_into(cut):
            error = work.error(work.step, delta_rule, work.states[0])
            own = " *" if cut == CUTS[0] else ""
            add(
                f"step, {cut[0]} columns, {cut[1]} warps{own}",
                step_bytes,
                calls(work.step, cuda, work.states),
                error,
            )
    add("step, torch", step_bytes, calls(work.step, delta_rule, work.states), None)
    error = work.error(work.convolve, conv1d, work.convs[0])
    add("convolution", conv_bytes, calls(work.convolve, cuda, work.convs), error)
    return rows


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    return kernel_options(kernel_parser("gated_delta", __doc__, 10), arguments)


def main() -> None:
    options = parse()
    bandwidth = copy_bandwidth()
    print(heading(bandwidth))
    print(HEADER)
    rows = []
    for batch in BATCHES:
        rows += measure(batch, bandwidth, options.repeats)
    answer = {
        **origin("gated_delta"),
        "copy_tb_s": bandwidth / 1e12,
        "repeats": options.repeats,
        "rows": rows,
    }
    save(answer, options.output)


if __name__ == "__main__":
    main()
