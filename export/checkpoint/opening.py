"""Opening a checkpoint of either kind, GGUF or Hugging Face."""

from pathlib import Path

from tokenloop.export.checkpoint.contents import Checkpoint
from tokenloop.export.checkpoint.gguf_architectures import open_gguf
from tokenloop.export.checkpoint.safetensors_directory import open_directory
from tokenloop.export.errors import ExportError


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, or a Hugging Face directory with config.json and safetensors.

    Every file is checked, and no weights are read. Errors: ExportError that names the file, where
    something is missing, truncated or damaged, and for a GGUF architecture that is not supported.
    """
    path = Path(path)
    if path.is_dir():
        return open_directory(path)
    if not path.exists():
        raise ExportError(
            f"{path} does not exist; give a .gguf file or a directory with config.json and "
            "safetensors"
        )
    return open_gguf(path)
