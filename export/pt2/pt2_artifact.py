"""An artifact for AOTInductor: model.pt2 for this machine's processor, and model.safetensors beside
it."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from tokenloop.export import tensor_parallel
from tokenloop.export.background import Background
from tokenloop.export.errors import ExportError
from tokenloop.export.kept_weights import Keeping
from tokenloop.export.methods import DecodeEmbedded, Embed, Prefill, processor
from tokenloop.export.packed_weights import check_recipe, pack_blocks, pack_head, pack_inputs
from tokenloop.export.recipes import PACKING
from tokenloop.export.tensors import entries, tensors_of, write_shards, write_weights
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
        if self.options.tensor_parallel > 1:
            tensor_parallel.check(model, self.options.tensor_parallel)
            if self.options.quant == "keep":
                raise ExportError(
                    "--quant keep is not for --tensor-parallel: another --quant makes integers anew"
                )
        own = model.model.per_layer
        self.selection = Background(
            "the selection methods", _compile_selection, model.batch, model.config.vocab_size,
            model.config.hidden_size, model.model.scale_in(self.dtype), self.dtype,
            None if own is None else (own.rows, own.layers, own.size),
            self.options.tensor_parallel == 1,
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

        ranks, own = self.options.tensor_parallel, {}
        networks = [model] if ranks == 1 else tensor_parallel.shards(model, ranks)
        # Of each network modules with the whole tensors, of which the layers' tensors are views.
        whole = [self._pack(network, bits) for network in networks]
        self.lines = bits.lines() if keep else []
        model = networks[0]
        if ranks > 1:
            tensor_parallel.connect(model, ranks)
        decode = DecodeEmbedded(model)
        program = directory / "model.pt2"
        methods = write_package(model, decode, self.selection, program, progress, ranks > 1)
        found = [
            tensors_of(Prefill(network), DecodeEmbedded(network), Embed(network.model), *packed)
            for network, packed in zip(networks, whole)
        ]
        tensors, views, state = found[0]
        if ranks == 1:
            weights = write_weights(tensors, directory, self.options.random_weights)
        else:
            each = [weights for weights, _, _ in found]
            weights, own = write_shards(each, directory, self.options.random_weights)
            _check_constants(program, model, decode, views, own["tensor_parallel"]["sharded"])
        return {
            "program": {"file": program.name},
            "weights": weights | {"views": views},
            "engine": "inductor",
            "backend": "inductor",
            "device": "cpu",
            "processor": processor(self.device),
            "methods": methods,
            "dtype": str(self.dtype).removeprefix("torch."),
            "state": entries(state),
            **own,
        }

    def _pack(self, network: CausalLM, bits: int | str | Keeping) -> list[nn.Module]:
        if not bits:
            return []
        parts = {"layers": nn.ModuleList(pack_blocks(network, bits))}
        inputs = pack_inputs(network, bits)
        pack_head(network, bits)
        return [nn.ModuleDict(parts if inputs is None else parts | {"per_layer": inputs})]


def _check_constants(
    program: Path, model: CausalLM, decode: nn.Module, views: dict[str, dict], sharded: list[str]
) -> None:
    """Errors: ExportError where the code of a method has one rank's values in place of a tensor
    that every rank has another one of."""
    from tokenloop.export.pt2.package import constants_of

    methods = {"prefill": Prefill(model), "decode_embedded": decode, "embed": Embed(model.model)}
    for name, method in methods.items():
        used = {**dict(method.named_parameters()), **dict(method.named_buffers())}
        if name == "decode_embedded":
            used = [key for key in used if ".embed_tokens." not in key]
        owners = {views[key]["of"] if key in views else key for key in used}
        given = {views[key]["of"] if key in views else key for key in constants_of(program, name)}
        if lost := owners & set(sharded) - given:
            raise ExportError(f"the compiler has made {min(lost)} a constant of {name}")


def _compile_selection(*arguments) -> dict[str, dict[str, bytes]]:
    # The import takes seconds, so the other process does it.
    from tokenloop.export.pt2.package import compile_selection

    return compile_selection(*arguments)
