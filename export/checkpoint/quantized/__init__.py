"""Quantized Hugging Face checkpoints, read as floats: one reader for each quant_method.

A reader replaces the tensors that stand for one weight (codes, scales, zero points) by one tensor
of floats, which is made when it is read. So no more than one weight is ever there as floats and as
codes. What a config asks for and a reader does not know is refused by name.
"""

from pathlib import Path
from typing import Any

from tokenloop.export.checkpoint.contents import StoredTensor
from tokenloop.export.checkpoint.quantized import (
    bitsandbytes,
    compressed_tensors,
    fp8,
    mxfp4,
    packed_words,
)
from tokenloop.export.checkpoint.quantized.settings import Settings
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown

READERS = {
    "fp8": fp8.read,
    "fbgemm_fp8": fp8.read_rows,
    "compressed-tensors": compressed_tensors.read,
    "gptq": packed_words.read_gptq,
    "awq": packed_words.read_awq,
    "mxfp4": mxfp4.read,
    "bitsandbytes": bitsandbytes.read,
}
# What describes activations and caches, by the last part of a tensor's name.
ACTIVATIONS = {
    *("input_scale", "input_zero_point", "input_global_scale", "activation_scale"),
    *("output_scale", "output_zero_point", "input_scale_ub"),
    *("q_scale", "k_scale", "v_scale", "q_zero_point", "k_zero_point", "v_zero_point"),
}


def as_floats(
    path: Path, config: dict[str, Any], stored: dict[str, StoredTensor]
) -> tuple[dict[str, StoredTensor], str | None, tuple[str, ...]]:
    """The tensors of a directory whose config.json is `config`, with floats for quantized weights;
    the quant_method, None where there is none; and the names of tensors that describe activations,
    which are left out.

    Errors: ExportError for a quant_method without a reader, for a setting that the reader does not
    know, and for tensors that do not belong together.
    """
    text = config.get("text_config")
    found = {
        name: entry
        for owner in (config, text if isinstance(text, dict) else {})
        for name in ("quantization_config", "compression_config")
        if (entry := owner.get(name))
    }
    if not found:
        return stored, None, ()
    name, entry = next(iter(found.items()))
    if not isinstance(entry, dict):
        raise ExportError(f"{path}: {name} is {shown(entry)}; an object is right")
    if any(other != entry for other in found.values()):
        raise ExportError(f"{path}: {' and '.join(found)} differ; keep one of them")
    method = entry.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        raise ExportError(
            f"{path}: {name}.quant_method is {shown(method)}; {', '.join(READERS)} can be read"
        )
    unused = tuple(name for name in stored if name.rpartition(".")[2] in ACTIVATIONS)
    weights = {name: tensor for name, tensor in stored.items() if name not in unused}
    return READERS[method](Settings(path, name, entry), weights), method, unused
