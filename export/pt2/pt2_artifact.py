"""An artifact for AOTInductor: model.pt2 for this machine's processor, and model.safetensors beside
it."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tokenloop.export.background import Background
from tokenloop.export.kept_weights import Keeping
from tokenloop.export.methods import DecodeEmbedded, Embed, Prefill, processor
from tokenloop.export.packed_weights import check_recipe, pack_blocks, pack_head, pack_inputs
from tokenloop.export.recipes import PACKING
from tokenloop.export.tensors import entries, tensors_of, write_weights
from tokenloop.models.decoder import CausalLM


class Pt2Artifact:
    """Compiles the methods for the CPU. `begin` starts compiling those of selection in another
    process, and `write` compiles the others. `lines` is what the user should know after that."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.device = options, torch.device("cpu")
        # The dtype of the weights as they are read, of activations and of caches.
        self.dtype = torch.float32 if options.quant == "fp32" else torch.bfloat16

    def begin(self, model: CausalLM) -> None:
        """Begin with what needs no weights. Errors: ExportError for experts that would have to be
        integers."""
        check_recipe(model, self.options.quant)
        own = model.model.per_layer
        self.selection = Background(
            "the selection methods", _compile_selection, model.batch, model.config.vocab_size,
            model.config.hidden_size, model.model.scale_in(self.dtype), self.dtype,
            None if own is None else (own.rows, own.layers, own.size),
            processor=processor(self.device),
        )  # fmt: skip

    def write(
        self, model: CausalLM, tokenizer: dict, directory: Path, progress: Callable[[str], None]
    ) -> dict:
        """Write model.pt2 and model.safetensors, and return the manifest's entries about them."""
        keep = self.options.quant == "keep"
        bits = Keeping("inductor", self.dtype) if keep else PACKING[self.options.quant]
        progress("importing torch.export")
        from tokenloop.export.pt2.package import write_package

        # Modules with the whole tensors, of which the layers' tensors are views.
        whole = []
        if bits:
            parts = {"layers": nn.ModuleList(pack_blocks(model, bits))}
            inputs = pack_inputs(model, bits)
            whole = [nn.ModuleDict(parts if inputs is None else parts | {"per_layer": inputs})]
            pack_head(model, bits)
        self.lines = bits.lines() if keep else []
        decode = DecodeEmbedded(model)
        program = directory / "model.pt2"
        methods = write_package(model, decode, self.selection, program, progress)
        tensors, views, state = tensors_of(Prefill(model), decode, Embed(model.model), *whole)
        return {
            "program": {"file": program.name},
            "weights": write_weights(tensors, directory, self.options.random_weights)
            | {"views": views},
            "engine": "inductor",
            "backend": "inductor",
            "device": "cpu",
            "processor": processor(self.device),
            "methods": methods,
            "dtype": str(self.dtype).removeprefix("torch."),
            "state": entries(state),
        }


def _compile_selection(*arguments) -> dict[str, dict[str, bytes]]:
    # The import takes seconds, so the other process does it.
    from tokenloop.export.pt2.package import compile_selection

    return compile_selection(*arguments)
