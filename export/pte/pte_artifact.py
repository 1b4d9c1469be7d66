"""Artifacts for ExecuTorch. For a CPU, model.pte holds the network calibrated and quantized. For
CUDA, it holds the network as it is, with model.ptd beside it."""

import argparse
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch

from tokenloop.export.artifact import SmallWrites
from tokenloop.export.background import Background
from tokenloop.export.checkpoint.tokenizer_files import encode
from tokenloop.export.errors import ExportError
from tokenloop.export.kept_weights import Keeping
from tokenloop.export.methods import Decode, processor
from tokenloop.export.recipes import RECIPES
from tokenloop.export.tensors import entries, tensors_of
from tokenloop.models.decoder import CausalLM

if TYPE_CHECKING:
    from executorch.exir.schema import Program


class SelectionExport(Background):
    """`result()` is the program of selection.selection_methods."""

    def __init__(self, batch: int, vocab_size: int, backend: str):
        super().__init__("the selection methods", _export_selection, batch, vocab_size, backend)

    def result(self) -> "Program":
        # The import takes seconds, and is needed later anyway.
        from tokenloop.export.pte.program_json import from_json

        return from_json(super().result()["program.json"])


def _export_selection(batch: int, vocab_size: int, backend: str) -> dict[str, bytes]:
    import torch

    torch.set_num_threads(1)
    from tokenloop.export.pte.program_json import to_json
    from tokenloop.export.pte.pte_program import to_program
    from tokenloop.export.pte.selection import selection_methods

    methods = selection_methods(batch, vocab_size, delegates=backend == "xnnpack")
    program = to_program(methods, {}, backend == "xnnpack", lambda what: None)
    return {"program.json": to_json(program.executorch_program)}


class PteArtifact:
    """`begin` starts exporting the selection methods in another process. `write` does the rest.
    `lines` is what the user should know after that."""

    # The dtype of the weights as they are read, and of the caches.
    dtype = torch.float32
    lines: tuple[str, ...] | list[str] = ()

    def __init__(self, options: argparse.Namespace):
        self.options = options

    def begin(self, model: CausalLM) -> None:
        """Begin with what needs no weights."""
        vocab_size = model.config.vocab_size
        self.selection = SelectionExport(model.batch, vocab_size, self.options.backend)

    def write(
        self, model: CausalLM, tokenizer: dict, directory: Path, progress: Callable[[str], None]
    ) -> dict:
        """Write model.pte and return the manifest's entries about it.

        The model's weights are loaded, and the model is changed in place. Errors: ExportError for a
        recipe that does not fit.
        """
        progress("importing executorch")
        from tokenloop.export.packed_weights import separate
        from tokenloop.export.pte.calibrate import TEXT, calibrate
        from tokenloop.export.pte.pte_program import build_program, state_entries
        from tokenloop.export.pte.quantize import keep, quantize

        # 1. Weights as the recipe says.
        if self.options.backend == "xnnpack":
            separate(model)
        if self.options.quant == "keep":
            progress("keeping integers")
            keeping = Keeping("xnnpack", self.dtype)
            keep(model, keeping)
            self.lines = keeping.lines()
        recipe = RECIPES[self.options.quant]
        means = None
        if recipe is not None:
            progress("looking at activations")
            ids = encode(directory, tokenizer, TEXT.read_text(encoding="utf-8"))
            means = calibrate(model, ids)
        progress("quantizing")
        try:
            quantize(model, recipe, means)
        except ValueError as error:
            raise ExportError(
                f"--quant {self.options.quant} does not fit this checkpoint: {error}"
            ) from error

        # 2. The program.
        constants = metadata(model, tokenizer)
        program, methods, places = build_program(
            model, self.options.backend, constants, self.selection, progress, self.options.pooled
        )
        progress("writing")
        path = directory / "model.pte"
        with path.open("wb") as file:
            program.write_to_file(SmallWrites(file))
        return {
            "program": {"file": path.name},
            "engine": "executorch",
            "backend": self.options.backend,
            "device": "cpu",
            "methods": methods,
            "dtype": "float32",
            "state": state_entries(model),
            "state_places": places,
            **({"pooled_size": model.config.hidden_size} if self.options.pooled else {}),
        }


class CudaPteArtifact:
    """Compiles the network's methods for the GPU that is here, with ExecuTorch's CudaBackend. It
    writes model.pte, and model.ptd with the weights and the state."""

    lines = ()

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.dtype = torch.float32 if options.quant == "fp32" else torch.bfloat16
        if not torch.cuda.is_available():
            raise ExportError(
                "--backend cuda needs a CUDA GPU here: kernels are compiled and tried on it"
            )

    def begin(self, model: CausalLM) -> None:
        """Nothing is begun before the weights are there."""

    def write(
        self, model: CausalLM, tokenizer: dict, directory: Path, progress: Callable[[str], None]
    ) -> dict:
        """Write model.pte and model.ptd, and return the manifest's entries about them."""
        progress("importing executorch")
        from tokenloop.export.pte.cuda_backend import build_program, write_program

        constants = metadata(model, tokenizer)
        path = directory / "model.pte"
        # Killed compilers may have begun a file.
        with TemporaryDirectory(
            dir=directory, prefix="methods-", ignore_cleanup_errors=True
        ) as place:
            program, methods = build_program(model, constants, progress, Path(place))
            progress("writing")
            weights = write_program(program, path)
            del program
        _, _, state = tensors_of(Decode(model))
        return {
            "program": {"file": path.name},
            "weights": {"file": weights.name},
            "engine": "executorch",
            "backend": "cuda",
            "device": "cuda",
            "processor": processor(torch.device("cuda")),
            "methods": methods,
            "dtype": str(self.dtype).removeprefix("torch."),
            "state": entries(state),
        }


def metadata(model: CausalLM, tokenizer: dict) -> dict:
    """The program's constants, by the names that ExecuTorch's own runners ask for."""
    return {
        "get_bos_id": next(iter(tokenizer["prefix_ids"]), -1),
        "get_eos_ids": tokenizer["eos_token_ids"],
        "get_max_seq_len": model.max_chunk,
        "get_max_context_len": model.max_seq_len,
        "get_vocab_size": model.config.vocab_size,
        "use_kv_cache": True,
        "enable_dynamic_shape": True,
    }
