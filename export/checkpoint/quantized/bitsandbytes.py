"""bitsandbytes weights: 4 bits of a code book (nf4, fp4), or int8 with a scale for each row.

4 bits: `X.weight` has two codes a byte, the high half first. Each stands for the entry of
`X.weight.quant_map` [16] times the `X.weight.absmax` of its block, counted over the whole weight.
Where absmax is uint8 it is quantized itself: entry of `nested_quant_map` [256], times
`nested_absmax`, plus an offset. `X.weight.quant_state.bitsandbytes__nf4` holds sizes, as JSON.
int8: `X.weight` times `X.SCB` [N] / 127.
"""

import json
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from tokenloop.export.checkpoint.contents import Grid, StoredTensor
from tokenloop.export.checkpoint.quantized.settings import Parts, Settings, gather
from tokenloop.models.config_fields import shown

KEYS = {
    *("load_in_4bit", "load_in_8bit", "_load_in_4bit", "_load_in_8bit"),
    *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_quant_storage"),
    # Of computing, and what is in which dtype, which the tensors say themselves.
    *("bnb_4bit_compute_dtype", "llm_int8_threshold", "llm_int8_skip_modules"),
    *("llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
}
KINDS = "nf4", "fp4"
SUFFIXES_4 = {
    ".weight.absmax": "absmax",
    ".weight.quant_map": "quant_map",
    ".weight.nested_absmax": "nested_absmax",
    ".weight.nested_quant_map": "nested_quant_map",
    **{f".weight.quant_state.bitsandbytes__{kind}": "state" for kind in KINDS},
}
SUFFIXES_8 = {".SCB": "scale", ".weight_format": "format"}
BYTES = "U8", "I8", "BF16", "F16", "F32"
MAX_BLOCK = 1 << 16
# What `weight_format` 0 is: rows one after the other.
ROW = 0


def read(settings: Settings, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Errors: those of quantized.as_floats."""
    settings.check_keys(KEYS)
    suffixes = SUFFIXES_4 | SUFFIXES_8
    # `X.weight` belongs to the weight where it has a state or scales.
    others = {
        name.removesuffix(suffix) + ".weight"
        for name in stored
        for suffix in suffixes
        if name.endswith(suffix)
    }
    renamed = {name + ".codes" * (name in others): tensor for name, tensor in stored.items()}
    plain, weights = gather(settings, renamed, suffixes | {".weight.codes": "codes"}, ".weight")
    for parts in weights:
        make = _four_bits if "state" in parts.tensors else _eight_bits
        plain[parts.name] = make(parts)
    return plain


def _eight_bits(parts: Parts) -> StoredTensor:
    codes = parts.expect("codes", ("I8",))
    if len(codes.shape) != 2:
        parts.settings.misfit(parts.name, f"has the shape {codes.shape}; a matrix is right")
    rows, inputs = codes.shape
    parts.expect("scale", ("F32",), (rows,))
    if "format" in parts.tensors:
        parts.expect("format", ("U8",), (), (1,))
        if (kind := int(parts.read("format"))) != ROW:
            parts.settings.misfit(
                f"{parts.name}_format", f"is {kind}; {ROW}, rows one after the other, can be read"
            )

    def scales() -> Tensor:
        return parts.read("scale")[:, None] / 127

    def dequantize() -> Tensor:
        return parts.read("codes").float().mul_(scales())

    grid = Grid(-128, 127, inputs, scales)
    return StoredTensor(codes.shape, "F32", dequantize, lambda: grid)


def _four_bits(parts: Parts) -> StoredTensor:
    codes = parts.expect("codes", BYTES)
    state = _state(parts)
    shape = tuple(state["shape"])
    size = {"U8": 1, "I8": 1, "BF16": 2, "F16": 2, "F32": 4}[codes.dtype]
    count = math.prod(shape)
    if math.prod(codes.shape) * size != -(-count // 2):
        parts.settings.misfit(
            parts.name, f"has {math.prod(codes.shape) * size} bytes for 4 bits of {count} values"
        )
    parts.expect("quant_map", ("F32",), (16,))
    blocks = -(-count // state["blocksize"])
    absmax = parts.expect("absmax", ("F32", "U8"), (blocks,))
    if absmax.dtype == "U8":
        parts.expect("nested_quant_map", ("F32",), (256,))
        parts.expect("nested_absmax", ("F32",), (-(-blocks // state["nested_blocksize"]),))
    return StoredTensor(shape, "F32", partial(_dequantize, parts, state))


def _state(parts: Parts) -> dict[str, Any]:
    """The sizes, checked."""
    tensor = parts.expect("state", ("U8",))
    name = f"quant_state of {parts.name}"
    if math.prod(tensor.shape) > 1 << 16:
        parts.settings.misfit(name, f"has the shape {tensor.shape}; a short JSON object is right")
    try:
        state = json.loads(bytes(parts.read("state").flatten().tolist()))
    except ValueError as error:
        parts.settings.misfit(name, f"is no JSON: {error}")
    if not isinstance(state, dict):
        parts.settings.misfit(name, f"is {shown(state)}; an object is right")
    shape = state.get("shape")
    if (
        not isinstance(shape, list)
        or len(shape) < 2
        or any(type(size) is not int or size < 1 for size in shape)
    ):
        parts.settings.misfit(name, f"has the shape {shown(shape)}; positive sizes are right")
    if state.get("quant_type") not in KINDS:
        parts.settings.misfit(
            name, f"has the quant_type {shown(state.get('quant_type'))}; nf4 and fp4 can be read"
        )
    nested = parts.tensors.get("absmax") is not None and parts.tensors["absmax"].dtype == "U8"
    for key in ("blocksize", "nested_blocksize")[: 1 + nested]:
        if type(state.get(key)) is not int or not 1 <= state[key] <= MAX_BLOCK:
            parts.settings.misfit(
                name, f"has the {key} {shown(state.get(key))}; 1 to {MAX_BLOCK} are right"
            )
    if nested and type(state.get("nested_offset")) not in (int, float):
        parts.settings.misfit(
            name, f"has the nested_offset {shown(state.get('nested_offset'))}; a number is right"
        )
    return state


def _dequantize(parts: Parts, state: dict[str, Any]) -> Tensor:
    packed = parts.read("codes").contiguous().view(torch.uint8).flatten()
    count = math.prod(state["shape"])
    values = parts.read("quant_map")[torch.stack([packed >> 4, packed & 0xF], -1).flatten().int()]
    absmax = parts.read("absmax")
    if absmax.dtype == torch.uint8:
        outer = parts.read("nested_absmax").repeat_interleave(state["nested_blocksize"])
        absmax = parts.read("nested_quant_map")[absmax.int()] * outer[: len(absmax)]
        absmax += state["nested_offset"]
    scale = absmax.repeat_interleave(state["blocksize"])[:count]
    return values[:count].mul_(scale).view(state["shape"])
