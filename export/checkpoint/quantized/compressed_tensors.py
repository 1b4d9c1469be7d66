"""compressed-tensors (llm-compressor, vLLM): integers in int32 words, int8, or float8.

pack-quantized: `X.weight_packed` int32 [N, K * bits / 32], the first value in the lowest bits, each
plus half its range; `weight_shape` [2]; `weight_scale` [N, G] or [N, 1]; for asymmetric ones
`weight_zero_point`, packed likewise along the rows. int-quantized, float-quantized and
naive-quantized: `X.weight` int8 or float8_e4m3fn, `weight_scale` and `weight_zero_point`.
`weight_g_idx` [K], the group of each input, is that of an act order by groups.
"""

from typing import Any

import torch
from torch import Tensor

from tokenloop.export.checkpoint.contents import Grid, StoredTensor
from tokenloop.export.checkpoint.quantized.fp8 import scaled_floats
from tokenloop.export.checkpoint.quantized.settings import (
    Parts,
    Settings,
    fields,
    gather,
)
from tokenloop.models.config_fields import shown

SUFFIXES = {
    ".weight_packed": "packed",
    ".weight_shape": "shape",
    ".weight_scale": "scale",
    ".weight_zero_point": "zeros",
    ".weight_g_idx": "g_idx",
}
SCALES = "F32", "BF16", "F16"
KEYS = {
    *("config_groups", "format", "sparsity_config", "transform_config", "kv_cache_scheme"),
    *("global_compression_ratio", "ignore", "quantization_status", "version"),
    *("run_compressed", "dequantize", "use_optimized_inference"),
}
FORMATS = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
GROUP_KEYS = {"targets", "weights", "input_activations", "output_activations", "format"}
WEIGHT_KEYS = {
    *("num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", "actorder"),
    # How they were found.
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),
}


def read(settings: Settings, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Errors: those of quantized.as_floats."""
    settings.check_keys(KEYS)
    settings.only("format", *FORMATS, "mixed-precision")
    settings.only("quantization_status", "compressed", "frozen", default="compressed")
    sparsity = settings.entry.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, dict) or sparsity.get("format") != "dense"):
        settings.refuse("sparsity_config", sparsity, "a sparse format cannot be read")
    transform = settings.entry.get("transform_config")
    if transform and (not isinstance(transform, dict) or transform.get("config_groups")):
        settings.refuse("transform_config", transform, "rotations of weights cannot be read")
    schemes = _schemes(settings)
    # `X.weight` belongs to the weight where it has scales.
    scaled = {name.removesuffix("_scale") for name in stored if name.endswith(".weight_scale")}
    renamed = {name + ".codes" * (name in scaled): tensor for name, tensor in stored.items()}
    plain, weights = gather(settings, renamed, SUFFIXES | {".weight.codes": "codes"}, ".weight")
    for parts in weights:
        plain[parts.name] = _weight(parts, schemes)
    return plain


def _schemes(settings: Settings) -> list[dict[str, Any]]:
    """How the weights of each of config_groups are quantized. Errors: ExportError for what cannot
    be read."""
    groups = settings.entry.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        settings.refuse("config_groups", groups, "an object of groups is right")
    schemes = []
    for name, group in groups.items():
        where = f"config_groups.{name}"
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            settings.refuse(where, group, "a group with weights can be read")
        inner = settings._replace(name=f"{settings.name}.{where}", entry=group)
        inner.check_keys(GROUP_KEYS)
        if group.get("format"):
            inner.only("format", *FORMATS)
        inner = inner._replace(name=f"{inner.name}.weights", entry=weights)
        inner.check_keys(WEIGHT_KEYS)
        if inner.only("type", "int", "float", default="int") == "float":
            inner.only("num_bits", 8)
        else:
            inner.only("num_bits", 2, 4, 8, default=8)
        if weights.get("strategy") is None:
            # The package's own default.
            size = weights.get("group_size")
            weights = weights | {
                "strategy": "tensor" if size is None else "channel" if size == -1 else "group"
            }
            inner = inner._replace(entry=weights)
        inner.only("strategy", "tensor", "channel", "group", "block")
        inner.only("symmetric", True, False, default=True)
        schemes.append(weights)
    return schemes


def _weight(parts: Parts, schemes: list[dict[str, Any]]) -> StoredTensor:
    """The one of the schemes that the tensors fit. Errors: ExportError where none does."""
    if "packed" in parts.tensors:
        parts.expect("shape", ("I64", "I32"), (2,))
        rows, inputs = parts.read("shape").tolist()
        if min(rows, inputs) < 1:
            parts.settings.misfit(f"shape of {parts.name}", f"is {rows} by {inputs}")
        packed = parts.expect("packed", ("I32",)).shape
        kind = [
            scheme
            for scheme in schemes
            if scheme.get("type", "int") == "int"
            and packed == (rows, -(-inputs * scheme.get("num_bits", 8) // 32))
        ]
    else:
        codes = parts.expect("codes", ("I8", "F8_E4M3"))
        if len(codes.shape) != 2:
            parts.settings.misfit(parts.name, f"has the shape {codes.shape}; a matrix is right")
        rows, inputs = codes.shape
        wanted = "int" if codes.dtype == "I8" else "float"
        kind = [scheme for scheme in schemes if scheme.get("type", "int") == wanted]
    scale = parts.expect("scale", SCALES).shape
    for scheme in kind:
        block = _block(scheme, rows, inputs)
        symmetric = scheme.get("symmetric", True)
        # A symmetric one may have zero points, all zeros.
        if block is None or not (symmetric or "zeros" in parts.tensors):
            continue
        grid = -(-rows // block[0]), -(-inputs // block[1])
        # Sizes of 1 at the end may be left out.
        if scale in [grid[:end] for end in range(3) if grid[end:] == (1,) * (2 - end)]:
            break
    else:
        parts.settings.misfit(
            parts.name,
            f"fits none of config_groups: {rows} rows of {inputs} inputs, "
            f"{shown(sorted(parts.tensors))}, and scales of the shape {scale}",
        )
    if scheme.get("type") == "float":
        tensors = {"weight": parts.tensors["codes"], "scale": parts.tensors["scale"]}
        return scaled_floats(parts._replace(tensors=tensors), block if scale == grid else None)
    return _Integers(parts, rows, inputs, block, scheme.get("num_bits", 8)).stored()


def _block(scheme: dict[str, Any], rows: int, inputs: int) -> tuple[int, int] | None:
    """Rows and inputs that share a scale, None for a scheme that does not say."""
    strategy = scheme["strategy"]
    if strategy == "tensor":
        return rows, inputs
    if strategy == "channel":
        return 1, inputs
    sizes = [1, scheme.get("group_size")] if strategy == "group" else scheme.get("block_structure")
    if not isinstance(sizes, list) or len(sizes) != 2:
        return None
    return tuple(sizes) if all(type(size) is int and size > 0 for size in sizes) else None


class _Integers:
    """The weight of so many rows and inputs that `parts` stand for. A `block` of it has one scale
    and one zero point."""

    def __init__(self, parts: Parts, rows: int, inputs: int, block: tuple[int, int], bits: int):
        self.parts, self.bits, self.block = parts, bits, block
        self.rows, self.inputs = rows, inputs
        self.grid_shape = -(-rows // block[0]), -(-inputs // block[1])
        if "zeros" in parts.tensors:
            if "packed" in parts.tensors:
                groups = self.grid_shape[1]
                parts.expect("zeros", ("I32",), (-(-rows * bits // 32), groups))
            else:
                parts.expect("zeros", ("I8",), parts.tensors["scale"].shape)
        if "g_idx" in parts.tensors:
            parts.expect("g_idx", ("I32", "I64"), (inputs,))

    def stored(self) -> StoredTensor:
        return StoredTensor((self.rows, self.inputs), "F32", self.read, self.grid)

    def zeros(self) -> Tensor | None:
        """int32 of the scales' shape, or None for symmetric ones."""
        if "zeros" not in self.parts.tensors:
            return None
        zeros = self.parts.read("zeros")
        if "packed" in self.parts.tensors:
            unpacked = fields(zeros.T.contiguous(), self.bits)[:, : self.rows].T
            return unpacked - 2 ** (self.bits - 1)
        return zeros.int().view(self.grid_shape)

    def scales(self) -> Tensor:
        """[N, G], in the dtype that they are stored in."""
        return self.of_rows(self.parts.read("scale").view(self.grid_shape))

    def in_order(self) -> Tensor:
        return torch.arange(self.inputs) // self.block[1]

    def columns(self) -> Tensor:
        """The column of scales that each input has, int64 [K]. Errors: ExportError for one that is
        not there."""
        if "g_idx" not in self.parts.tensors:
            return self.in_order()
        groups = self.parts.read("g_idx").long()
        # -1 is no act order.
        if (groups == -1).any():
            return self.in_order()
        if groups.min() < 0 or groups.max() >= self.grid_shape[1]:
            self.parts.settings.misfit(
                f"weight_g_idx of {self.parts.name}",
                f"has the groups {groups.min()} to {groups.max()}; 0 to {self.grid_shape[1] - 1} "
                "are right",
            )
        return groups

    def of_rows(self, tensor: Tensor) -> Tensor:
        """For each row, of what each block of rows has."""
        if tensor.shape[0] == 1:
            return tensor.expand(self.rows, -1)
        return tensor.repeat_interleave(self.block[0], 0)[: self.rows]

    def read(self) -> Tensor:
        if "packed" in self.parts.tensors:
            codes = fields(self.parts.read("packed"), self.bits)[:, : self.inputs]
            codes = codes - 2 ** (self.bits - 1)
        else:
            codes = self.parts.read("codes").int()
        columns, zeros = self.columns(), self.zeros()
        if zeros is not None:
            codes = codes - self.of_rows(zeros)[:, columns]
        return codes.float().mul_(self.scales().float()[:, columns])

    def grid(self) -> Grid | None:
        """None where a group's inputs are not neighbours, or groups are not equally large."""
        if self.inputs % self.block[1] or not torch.equal(self.columns(), self.in_order()):
            return None
        least, zeros = -(2 ** (self.bits - 1)), self.zeros()
        most = -least - 1
        if zeros is not None:
            least, most = least - int(zeros.max()), most - int(zeros.min())
        return Grid(least, most, self.block[1], self.scales)
