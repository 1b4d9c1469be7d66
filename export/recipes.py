"""The names that `--quant` takes, readable without importing torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How to store a model: bits of the blocks' linear weights, and of the output head.

    `group_size` None means one scale per output channel. The embedding is int8 in groups of 32,
    which loses nothing of a Q8_0 checkpoint.
    """

    bits: int
    group_size: int | None
    head_bits: int = 8


RECIPES: dict[str, Recipe | None] = {
    "fp32": None,
    "8da8w": Recipe(bits=8, group_size=None),
    "8da4w": Recipe(bits=4, group_size=32),
}
