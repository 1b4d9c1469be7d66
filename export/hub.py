"""Checkpoints of the Hugging Face hub, by name. The cache, offline mode (HF_HUB_OFFLINE=1), tokens,
progress and resuming are the library huggingface_hub's own."""

import re
from pathlib import Path

from tokenloop.export.errors import ExportError

NAME = re.compile(
    r"(?P<repository>[\w-][\w.-]{0,95}/[\w.-]{1,96})(?:@(?P<revision>[\w./-]{1,200}))?", re.ASCII
)
# What an export reads of a repository besides weights.
FILES = [
    "config.json", "generation_config.json", "model.safetensors.index.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "modules.json", "*_Pooling/config.json",
    # Refused, as it is in a directory.
    "adapter_config.json",
]  # fmt: skip


def find(model: Path) -> Path:
    """The path itself where it exists or is no name of a repository; else the directory of the
    repository `organization/name`, or `organization/name@revision`, in the library's cache. The
    files that an export reads are there then, and no others are fetched.

    Errors: ExportError, in one line, where the library is not installed, the hub cannot be reached,
    or it does not give the files.
    """
    name = NAME.fullmatch(str(model))
    # What ends like a file is a mistyped path.
    if name is None or model.suffix == ".gguf" or model.exists():
        return model
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import (
            GatedRepoError,
            HFValidationError,
            HTTPError,
            XetDownloadError,
        )
    except ImportError:
        raise ExportError(
            f"{model} does not exist; to get it from the Hugging Face hub, run: "
            "pip install 'tokenloop[hub]'"
        ) from None
    # Not before: it imports torch.
    from tokenloop.export.checkpoint.safetensors_directory import weight_map

    repository, revision = name["repository"], name["revision"]
    try:
        path = Path(snapshot_download(repository, revision=revision, allow_patterns=FILES))
        if not (path / "config.json").is_file():
            raise ExportError(
                f"{repository} on the Hugging Face hub has no config.json; for GGUF download the "
                f"file and give its path: hf download {repository} FILE.gguf"
            )
        weights = {"model.safetensors"}
        if (path / "model.safetensors.index.json").is_file():
            weights = set(weight_map(path).values())
        # The same commit, whatever was pushed since.
        return Path(
            snapshot_download(repository, revision=path.name, allow_patterns=sorted(weights))
        )
    except GatedRepoError as error:
        raise ExportError(
            f"{repository} on the Hugging Face hub asks for an agreement or a token: accept it on "
            "the model's page, and run: hf auth login"
        ) from error
    except HFValidationError as error:
        raise ExportError(f"{model} does not exist, and {_line(error)}") from error
    except (HTTPError, XetDownloadError, OSError) as error:
        raise ExportError(
            f"{model} does not exist here, and cannot be got from the Hugging Face hub: "
            f"{_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    """The first line of the library's message that says something."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)
