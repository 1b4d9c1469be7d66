"""An artifact for AOTInductor: model.pt2 for one device, and model.safetensors beside it."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from export.errors import ExportError


class Pt2Artifact:
    """Compiles the network's methods for the device that the options name."""

    def __init__(self, options: argparse.Namespace, vocab_size: int):
        self.device = torch.device(options.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ExportError(
                "--device cuda needs a CUDA GPU here: kernels are compiled and tried on it"
            )

    def write(
        self,
        model: nn.Module,
        max_prefill: int,
        tokenizer: dict,
        directory: Path,
        progress: Callable[[str], None],
    ) -> dict:
        """Write model.pt2 and model.safetensors, and return the manifest's entries about them."""
        progress("importing torch.export")
        from export.pt2 import constants, state_entries, write_package

        model.to(self.device)
        program, weights = directory / "model.pt2", directory / "model.safetensors"
        methods = write_package(model, max_prefill, program, progress)
        tensors, also = constants(model)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, weights)
        return {
            "program": {"file": program.name, "bytes": program.stat().st_size},
            "weights": {"file": weights.name, "bytes": weights.stat().st_size, "also": also},
            "engine": "inductor",
            "backend": "inductor",
            "device": self.device.type,
            "processor": processor(self.device),
            "methods": methods,
            "dtype": str(model.lm_head.weight.dtype).removeprefix("torch."),
            "state": state_entries(model),
        }


def processor(device: torch.device) -> str:
    """What compiled code needs of a device: "sm_90" of a GPU, "AVX512" of a CPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return f"sm_{major}{minor}"
    return torch.backends.cpu.get_cpu_capability()
