"""FP8 weights: float8_e4m3fn times a scale of the tensor, of each row, or of each block.

The layout is that of DeepSeek-V3 and Qwen3 (README_WEIGHTS.md of deepseek-ai/DeepSeek-V3):
`X.weight` and `X.weight_scale_inv`, which is multiplied in spite of its name. AutoFP8 and vLLM have
one `X.weight_scale` for a tensor, and fbgemm one for each row.
"""

from functools import partial

import torch
from torch import Tensor

from tokenloop.export.checkpoint.contents import Grid, StoredTensor
from tokenloop.export.checkpoint.quantized.settings import Parts, Settings, spread

LARGEST = 448  # of float8_e4m3fn
SCALES = "F32", "BF16", "F16", "F8_E8M0", "U8"
KEYS = {
    "fmt", "weight_block_size", "scale_fmt", "expert_dtype",
    # Of activations, and what is in which dtype, which the tensors say themselves.
    "activation_scheme", "modules_to_not_convert", "ignored_layers", "modules_to_convert",
    "dequantize",
}  # fmt: skip
ROW_KEYS = {"activation_scale_ub", "modules_to_not_convert"}


def read(settings: Settings, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Errors: those of quantized.as_floats."""
    settings.check_keys(KEYS)
    settings.only("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    settings.only("scale_fmt", "float", "ue8m0", default="float")
    settings.only("expert_dtype", "fp8", default="fp8")
    block = settings.entry.get("weight_block_size")
    if block is not None:
        if (
            not isinstance(block, (list, tuple))
            or len(block) != 2
            or any(type(size) is not int or size < 1 for size in block)
        ):
            settings.refuse("weight_block_size", block, "null or two sizes are right")
        block = tuple(block)
    return _read(settings, stored, block)


def read_rows(settings: Settings, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """fbgemm_fp8. Errors: those of quantized.as_floats."""
    settings.check_keys(ROW_KEYS)
    return _read(settings, stored, None)


def _read(
    settings: Settings, stored: dict[str, StoredTensor], block: tuple[int, int] | None
) -> dict[str, StoredTensor]:
    scales = {}
    for suffix in ("_scale_inv", "_scale"):
        for name in stored:
            if name.endswith(suffix) and name.removesuffix(suffix) in stored:
                weight = name.removesuffix(suffix)
                if weight in scales:
                    settings.misfit(weight, f"has two scales, {scales[weight]} and {name}")
                scales[weight] = name
    read = {}
    for name, tensor in stored.items():
        if name in scales.values():
            continue
        if name not in scales:
            read[name] = tensor
            continue
        parts = Parts(settings, name, {"weight": tensor, "scale": stored[scales[name]]})
        read[name] = scaled_floats(parts, block)
    return read


def scaled_floats(parts: Parts, block: tuple[int, int] | None) -> StoredTensor:
    """The float8 `weight` times its `scale`: one for each `block` of rows and columns; without
    blocks one for each row or one in all. Errors: ExportError for other dtypes and shapes."""
    weight = parts.expect("weight", ("F8_E4M3",))
    if len(weight.shape) < 2:
        parts.settings.misfit(parts.name, f"has the shape {weight.shape}; a matrix is right")
    *outer, rows, columns = weight.shape
    if block is not None:
        grids = [(*outer, -(-rows // block[0]), -(-columns // block[1]))]
        written = dict(zip(grids, grids))
    else:
        one = (1,) * len(weight.shape)
        grids = [(*outer, rows, 1), (*outer, 1, 1), one]
        # Sizes of 1 at the end may be left out.
        written = {shape[:end]: shape for shape in grids for end in (-2, -1, len(shape))}
        written |= {(): one, (1,): one}
    scale = parts.expect("scale", SCALES, *written)
    grid = written[scale.shape]
    block = block or (1, columns)
    dequantize = partial(_dequantize, parts, grid, block)
    # More than the matrices of experts is nothing that a backend has a layout for.
    lies_on = None if outer[1:] else partial(_grid, parts, weight.shape, grid, block)
    return StoredTensor(weight.shape, "F32", dequantize, lies_on)


def _dequantize(parts: Parts, grid: tuple[int, ...], block: tuple[int, int]) -> Tensor:
    weight = parts.read("weight").float()
    return weight.mul_(spread(_scale(parts).view(grid), weight.shape, block))


def _scale(parts: Parts) -> Tensor:
    scale = parts.read("scale")
    # A byte is an exponent: that of float8_e8m0fnu, whatever it is called.
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def _grid(
    parts: Parts, shape: tuple[int, ...], grid: tuple[int, ...], block: tuple[int, int]
) -> Grid | None:
    """None where the last block of a row is cut off."""
    *outer, rows, columns = shape
    size = columns if grid[-1] == 1 else block[1]
    if columns % size:
        return None

    def scales() -> Tensor:
        scale = _scale(parts).view(grid)
        if grid[-2] == 1:
            return scale.expand(*outer, rows, -1)
        return scale.repeat_interleave(block[0], -2)[..., :rows, :]

    return Grid(-LARGEST, LARGEST, size, scales, is_float8=True)
