"""The names that `--quant` takes, readable without importing torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How to store a model: bits of the blocks' linear weights, and of the output head.

    `group_size` None means one scale per output channel. Layers named in `int8` are stored in 8
    bits whatever `bits` says. The best tokens of a 4-bit head are scored again with the embedding's
    rows. Those are int8 in groups of 32, which loses nothing of a Q8_0 checkpoint.
    """

    bits: int
    group_size: int | None
    head_bits: int
    int8: tuple[str, ...] = ()

    def of(self, layer: str) -> tuple[int, int | None]:
        """Bits and group size of the linear layers called `layer`."""
        return (8, None) if layer in self.int8 else (self.bits, self.group_size)


RECIPES: dict[str, Recipe | None] = {
    "fp32": None,
    # What is not kept stays floating point.
    "keep": None,
    "8da8w": Recipe(bits=8, group_size=None, head_bits=4),
    "8da4w": Recipe(bits=4, group_size=32, head_bits=4, int8=("v_proj", "o_proj", "down_proj")),
}

# Weights of layers in float8, with a scale for each row.
FP8 = "fp8"

# What --quant takes with each --backend, both with the default first.
FOR_BACKEND = {
    "xnnpack": ("8da8w", "8da4w", "fp32", "keep"),
    "inductor": ("fp32", "bf16", "int8", "int4", "keep"),
    "launches": ("bf16", "fp32", "fp8", "int8", "int4", "keep"),
    "portable": ("fp32",),
    "cuda": ("bf16", "fp32"),
}
# How layers' weights are packed with --backend inductor or launches: bits of integers, FP8, or 0
# where they are not.
PACKING: dict[str, int | str] = {
    "fp32": 0, "bf16": 0, "fp8": FP8, "int8": 8, "int4": 4, "keep": 0,
}  # fmt: skip
