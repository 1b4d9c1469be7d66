"""Quantized weights as the formats' own packages write and read them: tests/data/quantized.

    python -m tests.quantized_references

needs compressed-tensors, bitsandbytes, auto-round (GPTQ) and autoawq, none of which the tests need.
A file has the tensors of one layer, and `expected`, the float32 weight that the package makes of
them. Its metadata has the quantization_config, and what wrote it.
"""

import importlib.util
import json
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

DIRECTORY = Path(__file__).parent / "data" / "quantized"
OUTPUTS, INPUTS = 32, 128
LAYER = "model.layers.0.self_attn.q_proj"


def save(
    name: str, config: dict, tensors: dict[str, Tensor], expected: Tensor, package: str
) -> None:
    """`tensors` by the ends of their names."""
    tensors = {LAYER + end: tensor.contiguous() for end, tensor in tensors.items()}
    metadata = {"config": json.dumps(config), "source": f"{package} {version(package)}"}
    expected = expected.float().contiguous()
    save_file(tensors | {"expected": expected}, DIRECTORY / f"{name}.safetensors", metadata)


def weight() -> Tensor:
    return torch.randn(OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))


def write_compressed_tensors() -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    cases = {
        "w4a16": ("pack-quantized", {"num_bits": 4, "strategy": "group", "group_size": 32}),
        "w4a16_asymmetric": (
            "pack-quantized",
            {"num_bits": 4, "strategy": "group", "group_size": 64, "symmetric": False},
        ),
        "w8a16": ("pack-quantized", {"num_bits": 8, "strategy": "channel"}),
        "w4_channel_asymmetric": (
            "pack-quantized", {"num_bits": 4, "strategy": "channel", "symmetric": False},
        ),
        "w8a8": ("int-quantized", {"num_bits": 8, "strategy": "channel"}),
        "w8a8_asymmetric": (
            "int-quantized", {"num_bits": 8, "strategy": "channel", "symmetric": False},
        ),
        "w8a8_tensor": ("int-quantized", {"num_bits": 8, "strategy": "tensor"}),
        "fp8_channel": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
        "fp8_tensor": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
        "fp8_block": (
            "float-quantized",
            {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 64]},
        ),
    }  # fmt: skip
    for name, (kind, options) in cases.items():
        args = QuantizationArgs(**options)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(kind)
        size = {
            "tensor": (OUTPUTS, INPUTS), "channel": (1, INPUTS),
            "group": (1, options.get("group_size")), "block": options.get("block_structure"),
        }[options["strategy"]]  # fmt: skip
        w = weight()
        blocks = w.view(OUTPUTS // size[0], size[0], INPUTS // size[1], size[1])
        low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        if options["strategy"] == "tensor":
            low, high = low.view(1), high.view(1)
        scale, zeros = calculate_qparams(low, high, args)
        # Scales are of the model's dtype.
        scale = scale.bfloat16().float()
        state = {"weight": w, "weight_scale": scale, "weight_zero_point": zeros}
        state = compressor.compress(state, scheme)
        expected = compressor.decompress(state, scheme)["weight"]
        state["weight_scale"] = scale.bfloat16()
        group = {"targets": ["Linear"], "weights": args.model_dump(mode="json")}
        config = {
            "quant_method": "compressed-tensors", "format": kind, "config_groups": {"g": group},
            "quantization_status": "compressed", "ignore": ["lm_head"],
        }  # fmt: skip
        tensors = {f".{key}": value for key, value in state.items()}
        save(f"compressed_{name}", config, tensors, expected, "compressed-tensors")


def write_bitsandbytes() -> None:
    from bitsandbytes import functional

    for name, kind, nested in (
        ("nf4", "nf4", False), ("nf4_nested", "nf4", True), ("fp4", "fp4", False),
    ):  # fmt: skip
        packed, state = functional.quantize_4bit(
            weight(), quant_type=kind, blocksize=64, compress_statistics=nested
        )
        config = {
            "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
            "bnb_4bit_use_double_quant": nested, "bnb_4bit_quant_storage": "uint8",
        }  # fmt: skip
        tensors = {f".weight.{key}": value for key, value in state.as_dict(packed=True).items()}
        expected = functional.dequantize_4bit(packed, state)
        save(name, config, tensors | {".weight": packed}, expected, "bitsandbytes")
    codes, scales, _ = functional.int8_vectorwise_quant(weight().half())
    expected = functional.int8_vectorwise_dequant(codes, scales)
    tensors = {
        ".weight": codes, ".SCB": scales.float(), ".weight_format": torch.tensor(0).byte(),
    }  # fmt: skip
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0}
    save("bnb_int8", config, tensors, expected, "bitsandbytes")


def steps(bits: int, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales float16 values and zero points, both [N, G], that fit `weight`."""
    groups = weight().view(OUTPUTS, -1, group_size)
    if symmetric:
        scale = groups.abs().amax(-1) / (2 ** (bits - 1))
        zeros = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
        zeros = (-groups.amin(-1) / scale).round().clamp(1, 2**bits - 1)
    return scale.half().float(), zeros


def linear() -> nn.Linear:
    layer = nn.Linear(INPUTS, OUTPUTS, bias=False)
    layer.weight.data = weight()
    return layer


def write_gptq() -> None:
    from auto_round_extension.torch import qlinear_torch, qlinear_torch_zp

    for bits in (2, 4, 8):
        for symmetric in (True, False):
            for version_name, module in (("gptq", qlinear_torch_zp), ("gptq_v2", qlinear_torch)):
                scale, zeros = steps(bits, 32, symmetric)
                packed = module.QuantLinear(bits, 32, INPUTS, OUTPUTS, bias=False, g_idx=True)
                packed.device = torch.device("cpu")
                packed.pack(linear(), scale, zeros, None, device="cpu")
                packed.scales = packed.scales.float()
                expected = packed(torch.eye(INPUTS)).T
                tensors = {
                    ".qweight": packed.qweight, ".qzeros": packed.qzeros,
                    ".scales": packed.scales.half(), ".g_idx": packed.g_idx,
                }  # fmt: skip
                config = {
                    "quant_method": "gptq", "bits": bits, "group_size": 32, "sym": symmetric,
                    "desc_act": False, "checkpoint_format": version_name, "damp_percent": 0.1,
                }  # fmt: skip
                name = f"{version_name}_{bits}{'' if symmetric else '_asymmetric'}"
                save(name, config, tensors, expected, "auto-round")


def write_awq() -> None:
    # The package's own imports want an older transformers.
    root = Path(importlib.util.find_spec("awq").submodule_search_locations[0])
    spec = importlib.util.spec_from_file_location("packing", root / "utils" / "packing_utils.py")
    packing = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(packing)
    scale, zeros = steps(4, 64, False)
    codes = (weight() / scale.repeat_interleave(64, 1) + zeros.repeat_interleave(64, 1)).round()
    words = []
    for values in (codes.clamp(0, 15).int().T, zeros.int().T):
        ordered = values.reshape(values.shape[0], -1, 8)[..., packing.AWQ_ORDER]
        words.append((ordered << (4 * torch.arange(8))).sum(-1).int())
    qweight, qzeros = words
    scale = scale.T.contiguous()
    expected = packing.dequantize_gemm(qweight, qzeros, scale, 4, 64).T
    tensors = {".qweight": qweight, ".qzeros": qzeros, ".scales": scale.half()}
    config = {
        "quant_method": "awq", "bits": 4, "group_size": 64, "zero_point": True, "version": "gemm",
    }  # fmt: skip
    save("awq", config, tensors, expected, "autoawq")


if __name__ == "__main__":
    DIRECTORY.mkdir(exist_ok=True)
    for write in (write_compressed_tensors, write_bitsandbytes, write_gptq, write_awq):
        write()
    sys.exit(0)
