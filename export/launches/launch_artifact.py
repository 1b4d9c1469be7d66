"""An artifact for CUDA: model.launches for one kind of GPU, and model.safetensors beside it. No GPU
need be there, and none is used."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import torch

from tokenloop.export import tensor_parallel
from tokenloop.export.errors import ExportError
from tokenloop.export.kept_weights import Keeping
from tokenloop.export.launches.cubins import ARCHITECTURES
from tokenloop.export.packed_weights import check_recipe, parts_by_storage
from tokenloop.export.recipes import PACKING
from tokenloop.export.tensors import entries, tensors_of, write_shards, write_weights
from tokenloop.models.decoder import CausalLM

# Tokens that chunks of prompts are rounded up to. Each has launches, and a graph, of its own.
CHUNKS = 64, 128, 256, 512, 1024, 2048, 4096, 8192
# The rows of a round are its newest token and drafts, and a product's tile has at most 32.
MOST_DRAFTS = 31
# Where a prompt may be cut: the delta rule's blocks begin there.
CHUNK_MULTIPLE = 64


class LaunchArtifact:
    """Makes lists of launches of the methods, and compiles the kernels. `lines` is what the user
    should know after `write`."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        # Weights that are made up when they are loaded need no memory before.
        self.device = torch.device("meta" if options.random_weights else "cpu")
        # The dtype of the weights as they are read, of activations and of caches.
        self.dtype = torch.float32 if options.quant == "fp32" else torch.bfloat16
        if options.gpu_arch not in ARCHITECTURES:
            raise ExportError(
                f"--gpu-arch is {options.gpu_arch}; kernels are for {', '.join(ARCHITECTURES)}, "
                "an H100 or H200"
            )
        if options.max_prefill % CHUNK_MULTIPLE:
            raise ExportError(
                f"--max-prefill is {options.max_prefill}; with --device cuda it must be a multiple "
                f"of {CHUNK_MULTIPLE}"
            )
        if options.draft_tokens > MOST_DRAFTS:
            raise ExportError(
                f"--draft-tokens is {options.draft_tokens}; at most {MOST_DRAFTS} are possible"
            )
        if options.tensor_parallel > 1 and options.draft_tokens:
            raise ExportError(
                f"--draft-tokens is {options.draft_tokens}; with --tensor-parallel it must be 0"
            )
        if os.environ.get("TRITON_INTERPRET", "0") == "1":
            raise ExportError("TRITON_INTERPRET is 1, so no kernel would be compiled: unset it")
        try:
            import triton  # noqa: F401
        except ImportError:
            raise ExportError(
                "--device cuda needs Triton, which is not installed: pip install 'tokenloop[cuda]'"
            ) from None

    def begin(self, model: CausalLM) -> None:
        """Errors: ExportError for what several ranks cannot have."""
        if self.options.tensor_parallel > 1:
            tensor_parallel.check_launches(model, self.options.tensor_parallel)
            if self.options.quant == "keep":
                raise ExportError(
                    "--quant keep is not for --tensor-parallel: another --quant makes integers anew"
                )

    def write(
        self, model: CausalLM, tokenizer: dict, directory: Path, progress: Callable[[str], None]
    ) -> dict:
        """Write model.launches and model.safetensors, and return the manifest's entries about them.

        Errors: ExportError for experts that would have to be integers, for heads that the kernels
        cannot take, for drafts that the layers cannot take back, and for a kernel that cannot be
        compiled.
        """
        keep = self.options.quant == "keep"
        bits = Keeping("launches", self.dtype) if keep else PACKING[self.options.quant] or None
        check_recipe(model, self.options.quant)
        progress("importing Triton")
        from tokenloop.export.launches.cuda_drafts import draft_methods
        from tokenloop.export.launches.cuda_prefill import CudaPrefill
        from tokenloop.export.launches.cuda_step import CudaStep
        from tokenloop.export.launches.launch_file import write_launches
        from tokenloop.export.launches.lowering import lower, names_of
        from tokenloop.export.launches.methods import Lookup, prefill_inputs, selection_methods
        from tokenloop.models.kernels.launch.dependent_launch import WAITING

        progress("packing weights")
        ranks, of_ranks = self.options.tensor_parallel, {}
        networks = [model] if ranks == 1 else tensor_parallel.shards(model, ranks, True)
        # All ranks' launches are those of the first.
        model = networks[0]
        backbone, batch, config = model.model, model.batch, model.config
        drafts = self.options.draft_tokens
        steps = [CudaStep(each, bits, max(batch, drafts + 1), ranks) for each in networks]
        step = steps[0]
        prefill = CudaPrefill(step, model)
        self.lines = bits.lines() if keep else []
        with self.device:
            hidden = torch.zeros(batch, 1, backbone.embedded_size, dtype=self.dtype)
            position = torch.zeros(batch, dtype=torch.int64)
        methods = {"decode_embedded": (step, {"hidden": hidden, "position": position})}
        methods |= selection_methods(backbone, batch, config.vocab_size, model.max_seq_len)
        if drafts:
            limits = config.vocab_size, model.max_seq_len
            methods |= draft_methods(step, backbone, drafts, *limits)
        # A chunk need not hold more than all rows together can.
        rows = -(-model.max_seq_len // CHUNK_MULTIPLE) * CHUNK_MULTIPLE
        largest = min(self.options.max_prefill, batch * rows)
        widest = max(x.shape[0] for x in step.network_parameters() if x.dim() == 2)
        if largest * widest >= 2**31:
            raise ExportError(
                f"--max-prefill is {largest}; a layer of this network gives {widest} numbers a "
                f"token, and kernels count to 2^31: at most "
                f"{(2**31 - 1) // widest // CHUNK_MULTIPLE * CHUNK_MULTIPLE} are possible"
            )
        chunks = [size for size in CHUNKS if size < largest] + [largest]
        progress("tracing")
        tensors, views, state = tensors_of(prefill, *(method for method, _ in methods.values()))
        names = names_of(tensors | state)
        parts = {place: some for each in steps for place, some in parts_by_storage(each).items()}
        lowered = {
            name: (lower(method, [tuple(inputs.values())], names)[0], list(inputs))
            for name, (method, inputs) in methods.items()
        }
        inputs = [prefill_inputs(size, batch) for size in chunks]
        lists = lower(prefill, [tuple(given.values()) for given in inputs], names)
        for size, low, given in zip(chunks, lists, inputs):
            lowered[f"prefill_{size}"] = low, list(given)
        program = directory / "model.launches"
        kernels = write_launches(program, lowered, self.options.gpu_arch, progress)
        progress("writing")
        random = self.options.random_weights
        if ranks == 1:
            weights = write_weights(tensors, directory, random, parts)
        else:
            others = [
                tensors_of(CudaPrefill(each, network), each, Lookup(network.model))[0]
                for each, network in zip(steps[1:], networks[1:])
            ]
            each = [tensors, *({name: x[name] for name in tensors} for x in others)]
            weights, of_ranks = write_shards(each, directory, random, parts)
            of_ranks["tensor_parallel"]["mailboxes"] = step.mailboxes()
        return {
            "program": {"file": program.name},
            "weights": weights | {"views": views},
            "engine": "launches",
            "backend": "launches",
            "device": "cuda",
            "processor": self.options.gpu_arch,
            "methods": sorted(lowered),
            "waiting_kernels": sorted(WAITING & set(kernels)),
            "chunk_multiple": CHUNK_MULTIPLE,
            "max_prefill": largest,
            "dtype": str(self.dtype).removeprefix("torch."),
            "state": entries(state),
            **({"draft_tokens": drafts} if drafts else {}),
            **of_ranks,
        }
