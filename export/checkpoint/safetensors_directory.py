"""A Hugging Face directory: config.json, and safetensors in one file or in several."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tokenloop.export.checkpoint.contents import Checkpoint, StoredTensor
from tokenloop.export.errors import ExportError

# A multimodal config.json may have these keys only outside its text_config.
SHARED_KEYS = ("bos_token_id", "eos_token_id", "tie_word_embeddings")


def open_directory(path: Path) -> Checkpoint:
    """Open a Hugging Face directory. Errors: those of `open_checkpoint`."""
    if not (path / "config.json").is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; for GGUF give the file itself, {path / found[0]}" if found else ""
        raise ExportError(f"{path} has no config.json{hint or '; a Hugging Face model has one'}")
    config = read_config(path / "config.json")
    files = _safetensors_files(path)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _safetensors_header(file):
            if name in stored:
                raise ExportError(f"{file}: another file has the tensor {name} too")
            stored[name] = tensor
    if files[0].name != "model.safetensors":
        for name, file in _weight_map(path).items():
            if name not in stored:
                raise ExportError(f"{path / file} lacks the tensor {name}, which the index names")
    return Checkpoint(path, "safetensors", config, files, stored)


def read_config(path: Path) -> dict[str, Any]:
    """The text model's part of a config.json.

    Errors: those of `read_json`, and ExportError for a file that names no model_type.
    """
    config = read_json(path)
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise ExportError(f"{path}: text_config is {text!r}; an object is right")
    if not isinstance(text.get("model_type"), str):
        raise ExportError(
            f"{path}: model_type is {text.get('model_type')!r}; a name such as gemma3_text is right"
        )
    unset = [key for key in SHARED_KEYS if text.get(key) is None and key in config]
    return text | {key: config[key] for key in unset}


def _safetensors_files(path: Path) -> tuple[Path, ...]:
    """The weight files, sorted. A single file is preferred, as in transformers."""
    if (path / "model.safetensors").is_file():
        return (path / "model.safetensors",)
    if (path / "model.safetensors.index.json").is_file():
        files = tuple(path / name for name in sorted(set(_weight_map(path).values())))
        for file in files:
            if not file.is_file():
                raise ExportError(f"{file} is missing; model.safetensors.index.json names it")
        return files
    pickled = sorted(file.name for file in path.glob("*.bin"))
    hint = f"; {pickled[0]} is a pickle: convert it to safetensors" if pickled else ""
    raise ExportError(
        f"{path} has neither model.safetensors nor model.safetensors.index.json{hint}"
    )


def _weight_map(path: Path) -> dict[str, str]:
    index = path / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ExportError(f"{index} has no weight_map from tensors to files")
    return weight_map


def _safetensors_header(file: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        # Opening compares the header with the file's size, and so finds a truncated file.
        with safe_open(file, "pt") as opened:
            for name in sorted(opened.keys()):
                header = opened.get_slice(name)
                shape = tuple(header.get_shape())
                yield name, StoredTensor(shape, header.get_dtype(), partial(_read, file, name))
    except SafetensorError as error:
        raise ExportError(f"{file} is truncated or damaged: {error}; get the whole file") from error


def _read(file: Path, name: str) -> torch.Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Errors: ExportError naming the file and what is wrong with it."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} holds a {type(value).__name__}; a JSON object is right")
    return value
