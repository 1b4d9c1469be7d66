"""Tiny checkpoints of compressed-tensors: linear weights of 4 bits in groups."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.tiny_checkpoints import write_directory


def pack_compressed(weight: torch.Tensor, size: int, symmetric: bool, scale_dtype: torch.dtype):
    """The parts of compressed-tensors of 4 bits in groups of `size`."""
    groups = weight.float().unflatten(1, (-1, size))
    scale = (groups.abs().amax(-1) / 7.5).to(scale_dtype)
    zeros = torch.zeros_like(scale, dtype=torch.int32)
    if not symmetric:
        zeros = (zeros + torch.arange(scale.shape[1])) % 5 - 2
    codes = (groups / scale.float()[..., None]).round() + zeros[..., None]
    codes = (codes.clamp(-8, 7) + 8).long().flatten(1)

    def words(values: torch.Tensor) -> torch.Tensor:
        packed = (values.unflatten(1, (-1, 8)) << (4 * torch.arange(8))).sum(-1)
        return (packed - (packed >> 31 << 32)).int()

    parts = {
        "weight_packed": words(codes), "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }  # fmt: skip
    if not symmetric:
        parts["weight_zero_point"] = words((zeros + 8).long().T.contiguous()).T.contiguous()
    return parts


def compressed_checkpoint(
    path: Path, size: int, symmetric: bool = True, scale_dtype=torch.bfloat16,
    model_type: str = "llama", **changes,
) -> Path:  # fmt: skip
    """A tiny checkpoint whose layers' linear weights are 4 bits in groups of `size`."""
    write_directory(path, model_type, "tokenizer.json", sharded=False, **changes)
    tensors = {}
    for name, weight in load_file(path / "model.safetensors").items():
        is_linear = weight.ndim == 2 and "layers" in name and weight.shape[1] % size == 0
        if not is_linear or weight.shape[0] % 8 != 0 or "mlp.gate.weight" in name:
            tensors[name] = weight
            continue
        for part, tensor in pack_compressed(weight, size, symmetric, scale_dtype).items():
            tensors[name.removesuffix("weight") + part] = tensor
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    weights = {"num_bits": 4, "strategy": "group", "group_size": size, "symmetric": symmetric}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    return path
