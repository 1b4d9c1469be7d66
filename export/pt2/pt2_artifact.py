"""An artifact for AOTInductor: model.pt2 for one device, and model.safetensors beside it."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tokenloop.export.background import Background
from tokenloop.export.errors import ExportError
from tokenloop.export.methods import DecodeEmbedded, Embed, Prefill, processor
from tokenloop.export.pt2.packed_weights import IntegerHead, pack_blocks
from tokenloop.export.recipes import INTEGER_BITS
from tokenloop.export.tensors import entries, tensors_of
from tokenloop.models.decoder import CausalLM


class Pt2Artifact:
    """Compiles the methods for the device that the options name. `begin` starts compiling those of
    selection in another process, and `write` compiles the others."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device(options.device)
        # The dtype of the weights as they are read, of activations and of caches.
        self.dtype = torch.float32 if options.quant == "fp32" else torch.bfloat16
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ExportError(
                "--device cuda needs a CUDA GPU here: kernels are compiled and tried on it"
            )

    def begin(self, model: CausalLM) -> None:
        """Begin with what needs no weights."""
        self.selection = Background(
            "the selection methods", _compile_selection, model.batch, model.config.vocab_size,
            model.max_seq_len, model.config.hidden_size, model.model.embed_scale, self.dtype,
            self.device.type, processor=processor(self.device),
        )  # fmt: skip

    def write(
        self, model: CausalLM, tokenizer: dict, directory: Path, progress: Callable[[str], None]
    ) -> dict:
        """Write model.pt2 and model.safetensors, and return the manifest's entries about them.

        Errors: ExportError for experts that would have to be integers.
        """
        bits = INTEGER_BITS[self.options.quant]
        if bits and any(block.mlp.moe is not None for block in model.model.layers):
            raise ExportError(
                f"--quant {self.options.quant} is not for experts with --backend inductor; bf16 "
                "and fp32 are"
            )
        progress("importing torch.export")
        from tokenloop.export.pt2.package import write_package

        model.to(self.device)
        # Modules with the whole tensors, of which the step's tensors are views.
        whole = []
        if self.device.type == "cuda":
            from tokenloop.export.pt2.cuda_step import CudaStep

            decode = CudaStep(model, bits)
        else:
            if bits:
                whole = [nn.ModuleDict({"layers": nn.ModuleList(pack_blocks(model, bits))})]
                model.lm_head = IntegerHead(model.lm_head)
            decode = DecodeEmbedded(model)
        program = directory / "model.pt2"
        methods = write_package(model, decode, self.selection, program, progress)
        tensors, views, state = tensors_of(Prefill(model), decode, Embed(model.model), *whole)
        return {
            "program": {"file": program.name, "bytes": program.stat().st_size},
            "weights": self._write_weights(tensors, directory) | {"views": views},
            "engine": "inductor",
            "backend": "inductor",
            "device": self.device.type,
            "processor": processor(self.device),
            "methods": methods,
            "waiting_kernels": _waiting_kernels() if self.device.type == "cuda" else [],
            "dtype": str(self.dtype).removeprefix("torch."),
            "state": entries(state),
        }

    def _write_weights(self, tensors: dict[str, Tensor], directory: Path) -> dict:
        if self.options.random_weights:
            return {"random": entries(tensors)}
        path = directory / "model.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return {"file": path.name, "bytes": path.stat().st_size}


def _waiting_kernels() -> list[str]:
    # Importing operators registers their kernels. These imports register all that there are.
    from tokenloop.models.kernels import cuda  # noqa: F401
    from tokenloop.models.kernels.launch.dependent_launch import WAITING
    from tokenloop.sampler.kernels import operator  # noqa: F401

    return sorted(WAITING)


def _compile_selection(*arguments) -> dict[str, dict[str, bytes]]:
    # The import takes seconds, so the other process does it.
    from tokenloop.export.pt2.package import compile_selection

    return compile_selection(*arguments)
