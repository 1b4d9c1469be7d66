"""What every export command does: arguments, checkpoint, weights, and the engine's own writer."""

import argparse
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tokenloop.export import hub, process
from tokenloop.export.background import collect_seldom, return_memory
from tokenloop.export.demo import gemma3_270m
from tokenloop.export.errors import ExportError
from tokenloop.export.recipes import FOR_BACKEND
from tokenloop.models import ARCHITECTURES

if TYPE_CHECKING:
    from tokenloop.models.decoder import CausalLM

# More are a mistake: each has caches of its own.
MOST_ROWS = 1 << 16
DEFAULT_OUTPUT = "artifacts/{architecture}-{backend}"
DEFAULT_MAX_SEQ_LEN = 4096
DEFAULT_GPU_ARCH = "sm_90"
ON_GPU = "cuda", "launches"
# Those with a method that gives pooled outputs.
POOLING = "xnnpack", "portable"
# Prompt tokens at once: what CPUs compute well, and what fills a GPU.
DEFAULT_MAX_PREFILL = {"cpu": 128, "cuda": 8192}


@dataclass(frozen=True)
class Family:
    """The architectures that one command exports, by their modules' names in models/. `demo`, if
    any, gives the checkpoint that is exported without --model, or raises ExportError."""

    command: str
    title: str
    architectures: tuple[str, ...]
    demo: Callable[[], Path] | None = None


ANY = Family("tokenloop export", "text model", ARCHITECTURES, gemma3_270m)


def parse_arguments(family: Family, arguments: list[str] | None = None) -> argparse.Namespace:
    """The options. Those that depend on the backend are None where the backend is not given."""
    parser = argparse.ArgumentParser(
        prog=family.command,
        description=f"Export a {family.title} checkpoint as one multi-method artifact.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a .gguf file or a Hugging Face directory, or a repository of the Hugging Face hub, "
        "organization/name or organization/name@revision; without it the installed demo model",
    )
    parser.add_argument(
        "--backend",
        choices=tuple(FOR_BACKEND),
        help="ExecuTorch's XNNPACK, its plain kernels or its CUDA backend (a .pte), AOTInductor "
        "for a CPU (a .pt2), or our kernels for a GPU (a .launches); by default xnnpack, inductor "
        "for recipes that xnnpack does not have, or launches with --device cuda",
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="each backend has one device; with cuda alone the backend is launches",
    )
    parser.add_argument(
        "--quant",
        choices=tuple(dict.fromkeys(name for names in FOR_BACKEND.values() for name in names)),
        help="xnnpack: 8da8w or 8da4w, weights of 8 bits per output channel or most of them of 4 "
        "in groups of 32, with int8 activations and a head of 4 bits whose best tokens are scored "
        "again in 8; cuda: bf16; inductor: bf16, or with it layers of int8 or int4 "
        "weights; launches: those, and fp8, weights of float8 per output channel; all: fp32; keep: "
        "a quantized checkpoint's own numbers, where the backend has a layout for them (default: "
        "keep for a quantized directory, else 8da8w with xnnpack, bf16 with a GPU, fp32)",
    )
    parser.add_argument(
        "--max-seq-len",
        type=int,
        help=f"prompt and output tokens (default: {DEFAULT_MAX_SEQ_LEN}, or what the model has)",
    )
    parser.add_argument(
        "--random-weights",
        type=Path,
        metavar="CONFIG",
        help="a config.json to measure the speed of: weights are made up when they are loaded",
    )
    parser.add_argument(
        "--max-prefill",
        type=int,
        help=f"prompt tokens at once (default: {DEFAULT_MAX_PREFILL['cpu']}, or "
        f"{DEFAULT_MAX_PREFILL['cuda']} with --backend launches)",
    )
    parser.add_argument(
        "--gpu-arch",
        help=f"what --backend launches compiles kernels for; the GPU need not be there (default: "
        f"{DEFAULT_GPU_ARCH})",
    )
    parser.add_argument("--batch", type=int, default=1, help="sequences at once, each in its row")
    parser.add_argument(
        "--draft-tokens", type=int, default=0, metavar="K",
        help="with --device cuda and one row: let a step try K tokens that the text so far "
        "suggests (tokenloop run --speculate); 0 for none",
    )  # fmt: skip
    parser.add_argument(
        "--tensor-parallel",
        type=int,
        default=1,
        metavar="N",
        help="divide every layer by N processes, which torchrun starts; with --backend "
        "inductor or launches",
    )
    parser.add_argument(
        "--pooled", action="store_true",
        help="one more method, that gives the last token's hidden state with the length 1: what an "
        "embedding model makes of a text (Model.embed); with --backend xnnpack or portable",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, help=f"the artifact's directory (default: {DEFAULT_OUTPUT})"
    )
    options = parser.parse_args(arguments)
    if options.random_weights is not None:
        if options.model is not None:
            parser.error("--random-weights and --model are two sources of one network")
        options.backend = options.backend or (
            "launches" if options.device == "cuda" else "inductor"
        )
        if options.backend not in ("inductor", "launches"):
            parser.error("--random-weights needs --backend inductor or launches")
    if options.device == "cuda":
        options.backend = options.backend or "launches"
    # The shortest sequence is a token of the prompt and one of the output.
    leasts = {
        "max_seq_len": 2, "max_prefill": 1, "batch": 1, "draft_tokens": 0, "tensor_parallel": 1,
    }  # fmt: skip
    for name, least in leasts.items():
        value = getattr(options, name)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {value}; it must be at least {least}")
    if options.batch > MOST_ROWS:
        parser.error(f"--batch is {options.batch}; it must be at most {MOST_ROWS}")
    if options.draft_tokens and options.batch > 1:
        parser.error(
            f"--draft-tokens is {options.draft_tokens} and --batch {options.batch}: the tokens "
            "that a step tries are of one row"
        )
    if options.pooled and options.batch > 1:
        parser.error(f"--pooled is for one row, and --batch is {options.batch}")
    if options.backend is not None and (fault := choose_backend(options, options.backend)):
        parser.error(fault)
    return options


def choose_backend(options: argparse.Namespace, backend: str) -> str | None:
    """Set the backend, and the device and recipe that follow from it where they are not given.
    Returns what is wrong with those that are given, or None."""
    options.backend = backend
    device = "cuda" if backend in ON_GPU else "cpu"
    if options.device not in (None, device):
        others = [name for name in FOR_BACKEND if (name in ON_GPU) == (options.device == "cuda")]
        return (
            f"--device {options.device} is not for --backend {backend}, which is for {device}; "
            f"{' and '.join(others)} are for {options.device}"
        )
    options.device = device
    if options.draft_tokens and backend != "launches":
        return (
            f"--draft-tokens is {options.draft_tokens} and --backend {backend}: there a token's "
            "bits depend on how many are computed together, so the text would not stay what it is; "
            "it is for --device cuda"
        )
    if backend != "launches" and options.gpu_arch is not None:
        return (
            f"--gpu-arch {options.gpu_arch} is not for --backend {backend}: launches is right, "
            "which --device cuda chooses"
        )
    if backend == "launches" and options.gpu_arch is None:
        options.gpu_arch = DEFAULT_GPU_ARCH
    if options.max_prefill is None:
        options.max_prefill = DEFAULT_MAX_PREFILL["cuda" if backend == "launches" else "cpu"]
    if options.tensor_parallel > 1 and backend not in ("inductor", "launches"):
        return (
            f"--tensor-parallel {options.tensor_parallel} is not for --backend {backend}: "
            "inductor and launches are right"
        )
    if options.pooled and backend not in POOLING:
        return f"--pooled is not for --backend {backend}: {' and '.join(POOLING)} are right"
    options.quant_by_default = options.quant is None
    if options.quant is None:
        options.quant = "bf16" if options.device == "cuda" else FOR_BACKEND[backend][0]
    if options.quant not in FOR_BACKEND[backend]:
        names = ", ".join(FOR_BACKEND[backend])
        return f"--quant {options.quant} is not for --backend {backend}, which has {names}"
    return None


def export(
    family: Family, options: argparse.Namespace, progress: Callable[[str], None]
) -> list[str]:
    """Make the artifact that `options` (of parse_arguments) describe, and return lines about what
    of the checkpoint is not in it. Sets those options that follow from the checkpoint.

    `progress` is called with what is being done. Errors: ExportError.
    """
    # Heavy imports wait until the arguments are known to be right. ExecuTorch's import takes
    # seconds and waits until the checkpoint is known to be right, too.
    import torch

    from tokenloop.export.artifact import new_artifact, write_manifest
    from tokenloop.export.checkpoint import check_fit, load_weights, open_checkpoint
    from tokenloop.export.checkpoint.directory_tokenizer import ignored_setting
    from tokenloop.export.checkpoint.generation_settings import unread_settings
    from tokenloop.export.checkpoint.network import describe, names_of, without_memory
    from tokenloop.export.checkpoint.pooling import check_pooling
    from tokenloop.export.checkpoint.tokenizer_files import write_tokenizer
    from tokenloop.export.kept_weights import can_keep
    from tokenloop.export.random_weights import make_parameters, open_config, write_byte_tokenizer
    from tokenloop.export.tensors_in_files import tensors_in_files
    from tokenloop.export.tokenizer_check import check_tokenizer

    # 1. The checkpoint, the network it describes, and the backend for that.
    if options.random_weights is not None:
        checkpoint = open_config(options.random_weights)
    elif options.model is None and family.demo is None:
        raise ExportError("no --model; give it a .gguf file or a Hugging Face directory")
    else:
        checkpoint = open_checkpoint(options.model or family.demo())
    described = describe(checkpoint, family.architectures, family.command)
    model_type, architecture, config = described
    smallest = without_memory(described)
    find_backend(options, checkpoint.path, model_type, smallest)
    if options.pooled:
        check_pooling(checkpoint)
    if options.quant == "keep" and not can_keep(checkpoint, options.backend):
        from tokenloop.export.support import supporting

        others = [name for name in supporting(smallest) if can_keep(checkpoint, name)]
        raise ExportError(
            f"--quant keep: {checkpoint.path} has no integers or float8 that --backend "
            f"{options.backend} has a layout for; {' and '.join(others) or 'no backend'} can keep "
            "some of it"
        )
    is_default = options.quant_by_default and checkpoint.quantization is not None
    if is_default and can_keep(checkpoint, options.backend):
        options.quant = "keep"
    if options.random_weights is None:
        # Before memory is taken for sizes that only the config has.
        check_fit(smallest, checkpoint, names_of(architecture, smallest))
    positions = config.max_position_embeddings
    max_seq_len = options.max_seq_len or min(DEFAULT_MAX_SEQ_LEN, positions)
    if max_seq_len > positions:
        raise ExportError(
            f"--max-seq-len {max_seq_len} is more than the model's {positions} positions"
        )
    if options.output is None:
        name = architecture.__name__.rpartition(".")[2]
        options.output = Path(DEFAULT_OUTPUT.format(architecture=name, backend=options.backend))
    if options.backend == "launches":
        from tokenloop.export.launches.launch_artifact import LaunchArtifact as Artifact
    elif options.backend == "inductor":
        from tokenloop.export.pt2.pt2_artifact import Pt2Artifact as Artifact
    elif options.backend == "cuda":
        from tokenloop.export.pte.pte_artifact import CudaPteArtifact as Artifact
    else:
        from tokenloop.export.pte.pte_artifact import PteArtifact as Artifact
    with (
        new_artifact(options.output) as directory,
        tensors_in_files(directory),
        torch.no_grad(),
    ):
        engine = Artifact(options)
        try:
            with torch.device("meta"):
                model = architecture.Network(config, max_seq_len, options.batch, engine.dtype)
        except RuntimeError as error:
            # Caches are in memory, for they begin with zeros.
            if "you tried to allocate" not in str(error):
                raise
            raise ExportError(
                f"the caches of --batch {options.batch} and --max-seq-len {max_seq_len} are more "
                "than the memory: give less of either"
            ) from None
        model.limit_chunks(options.max_prefill)
        engine.begin(model)
        if options.random_weights is None:
            tokenizer = write_tokenizer(checkpoint, directory)
            progress("checking the tokenizer")
            check_tokenizer(checkpoint.path, directory, tokenizer)
            for note in (ignored_setting(checkpoint, tokenizer), unread_settings(checkpoint)):
                if note is not None:
                    process.say(f"{family.command}: note: {note}")
        else:
            tokenizer = write_byte_tokenizer(directory, config.vocab_size)

        # 2. Weights, one tensor at a time.
        if options.random_weights is not None:
            make_parameters(model, engine.device, engine.dtype)
        else:
            load_weights(
                model,
                checkpoint,
                names_of(architecture, model),
                progress=lambda name: progress(f"reading {name}"),
                dtype=engine.dtype,
                grids=options.quant == "keep",
            )
        model.eval().requires_grad_(False)

        # 3. The program, and whatever else the engine needs.
        entries = engine.write(model, tokenizer, directory, progress)
        write_manifest(
            directory,
            {
                "model_type": model_type,
                "batch": options.batch,
                "max_seq_len": max_seq_len,
                "max_prefill": model.max_chunk,
                **entries,
                "vocab_size": config.vocab_size,
                "hidden_size": model.model.embedded_size,
                "quant": options.quant,
                "tokenizer": tokenizer,
                "checkpoint": {"file": checkpoint.path.name, "sha256": checkpoint.sha256()},
            },
        )
    lines = list(engine.lines)
    if checkpoint.quantization is not None and options.quant != "keep":
        lines.append(
            f"weights in {checkpoint.quantization} were read as floats: --quant {options.quant} "
            "says how they are stored"
        )
    if checkpoint.unused:
        lines.append(
            f"{len(checkpoint.unused)} tensors about activations, such as {checkpoint.unused[0]}, "
            "are not used: activations are as --quant says"
        )
    return lines


def find_backend(
    options: argparse.Namespace, path: Path, model_type: str, model: "CausalLM"
) -> None:
    """Choose a backend that takes the model, whatever its cache, or check that the chosen one does.
    Errors: ExportError for one that does not."""
    from tokenloop.export.support import supporting, unsupported

    names = supporting(model)
    if options.backend is None:
        fitting = [name for name in names if options.quant in (None, *FOR_BACKEND[name])]
        if fault := choose_backend(options, (fitting or names)[0]):
            raise ExportError(fault)
    elif what := unsupported(model, options.backend):
        raise ExportError(
            f"{path} is a {model_type} model; --backend {options.backend} does not take {what}: "
            f"{', '.join(names)} do"
        )


def main(arguments: list[str] | None = None, family: Family = ANY) -> int:
    """Run a command and return the exit status."""
    process.open_streams()
    options = parse_arguments(family, arguments)
    # Being terminated cleans up like any other end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # torch, torchao and executorch warn about one another. The user can mend none of it.
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    collect_seldom()
    return_memory()
    start = time.perf_counter()
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console,
        transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    try:
        with process.InterruptsRaised() as interrupts:
            if options.model is not None:
                # With progress of its own.
                options.model = hub.find(options.model)
                interrupts.check()
            with bar:
                task = bar.add_task("importing torch", total=None)

                def progress(what: str) -> None:
                    interrupts.check()
                    bar.update(task, description=what)

                lines = export(family, options, progress)
    except ExportError as error:
        process.say(f"{family.command}: error: {error}")
        return 2
    except KeyboardInterrupt:
        process.say(f"{family.command}: interrupted; nothing was written")
        return process.INTERRUPTED
    for line in lines:
        process.say(line)
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: {size / 1e6:.0f} MB in {time.perf_counter() - start:.0f} s")
    return 0
