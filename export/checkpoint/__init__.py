"""Checkpoints, GGUF or Hugging Face, as one thing: a config, tensors and a tokenizer."""

from pathlib import Path

from tokenloop.export.checkpoint.contents import Checkpoint, StoredTensor
from tokenloop.export.checkpoint.gguf_architectures import open_gguf
from tokenloop.export.checkpoint.loading import check_fit, load_weights
from tokenloop.export.checkpoint.safetensors_directory import (
    open_directory,
    read_config,
    read_json,
)
from tokenloop.export.errors import ExportError

__all__ = [
    "Checkpoint", "StoredTensor", "check_fit", "load_weights", "open_checkpoint", "read_config",
    "read_json",
]  # fmt: skip


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, or a Hugging Face directory with config.json and safetensors.

    Every file is checked, and no weights are read. Errors: ExportError that names the file, where
    something is missing, truncated or damaged, and for a GGUF architecture that is not supported.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return open_directory(path)
        if path.is_file():
            return open_gguf(path)
        what = "is neither a file nor a directory" if path.exists() else "does not exist"
    except OSError as error:
        raise ExportError(f"{error.filename or path} cannot be read: {error.strerror}") from error
    raise ExportError(
        f"{path} {what}; give a .gguf file or a directory with config.json and safetensors"
    )
