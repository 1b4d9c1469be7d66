"""How a step's products of routed experts are cut, by shape: constants, so that an export repeats.

Nothing depends on the number of rows: a program's sums are rounded.
"""

from typing import NamedTuple

import triton

from tokenloop.models.kernels.experts import packing

# Weights of the second products that a program reads at once, of all of a row's experts.
DOWN = 8192


class StepTiles(NamedTuple):
    """Outputs of a program, inputs of one of its steps, and warps."""

    block_n: int
    block_k: int
    warps: int


def _block_k(inputs: int, group: int) -> int:
    # Words of float4 are a quarter as many.
    most = 1024 if group == packing.GROUP else 512
    return min(most, triton.next_power_of_2(inputs))


def gate_up_tiles(inputs: int, group: int) -> StepTiles:
    """For gates and ups of so many inputs, of which `group` share a scale, or 0."""
    if group:
        return StepTiles(8, _block_k(inputs, group), 4)
    return StepTiles(4, _block_k(inputs, group), 2)


def down_tiles(count: int, inputs: int, group: int) -> StepTiles:
    """For the second products of a row's `count` experts. Those of groups come one after the
    other."""
    if group:
        return StepTiles(8, _block_k(inputs, group), 4)
    choices = triton.next_power_of_2(count)
    block_n = 2 if choices <= 8 else 1
    most = max(32, DOWN // (choices * block_n))
    return StepTiles(block_n, min(most, 512, triton.next_power_of_2(inputs)), 2)
