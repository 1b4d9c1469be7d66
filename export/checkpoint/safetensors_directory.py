"""A Hugging Face directory: config.json, and safetensors in one file or in several.

Weight files lie in the directory itself. An entry of it may be a link, as in Hugging Face's cache;
what an index says may not lead anywhere else.
"""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from tokenloop.export.checkpoint.contents import Checkpoint, StoredTensor
from tokenloop.export.checkpoint.quantized import as_floats
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown

# A multimodal config.json may have these keys only outside its text_config.
SHARED_KEYS = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
FILE_NAME = re.compile(r"[^/\\\0]+\.safetensors", re.DOTALL)


def open_directory(path: Path) -> Checkpoint:
    """Open a Hugging Face directory. Errors: those of `open_checkpoint`."""
    if not (path / "config.json").is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"; for GGUF give the file itself, {path / found[0]}" if found else ""
        raise ExportError(f"{path} has no config.json{hint or '; a Hugging Face model has one'}")
    if (path / "adapter_config.json").is_file():
        # transformers would add the adapter to the weights.
        raise ExportError(
            f"{path} has an adapter_config.json: merge the adapter into the weights first, with "
            "peft's merge_and_unload, or take the file out"
        )
    config = read_config(path / "config.json")
    files = _safetensors_files(path)
    stored: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _safetensors_header(file):
            if name in stored:
                raise ExportError(f"{file}: another file has the tensor {name} too")
            stored[name] = tensor
    if files[0].name != "model.safetensors":
        for name, file in weight_map(path).items():
            if name not in stored:
                raise ExportError(f"{path / file} lacks the tensor {name}, which the index names")
    whole = read_json(path / "config.json")
    stored, quantization, unused = as_floats(path, whole, stored)
    if "embed_tokens.weight" in stored:
        # Saved of a model without a head, which transformers reads likewise.
        stored = {
            name if name.startswith("lm_head.") else f"model.{name}": tensor
            for name, tensor in stored.items()
        }
    return Checkpoint(
        path, "safetensors", config, files, stored, quantization=quantization, unused=unused
    )


def read_config(path: Path) -> dict[str, Any]:
    """The text model's part of a config.json.

    Errors: those of `read_json`, and ExportError for a file that names no model_type.
    """
    config = read_json(path)
    text = config.get("text_config", config)
    if not isinstance(text, dict):
        raise ExportError(f"{path}: text_config is {shown(text)}; an object is right")
    if not isinstance(text.get("model_type"), str):
        raise ExportError(
            f"{path}: model_type is {shown(text.get('model_type'))}; a name such as gemma3_text is "
            "right"
        )
    unset = [key for key in SHARED_KEYS if text.get(key) is None and key in config]
    for key in ("rope_scaling", "rope_parameters"):
        if text is not config and config.get(key):
            raise ExportError(f"{path}: {key} is beside text_config, and not read there: put it in")
    tied = text.get("tie_word_embeddings"), config.get("tie_word_embeddings")
    if None not in tied and tied[0] != tied[1]:
        raise ExportError(
            f"{path}: tie_word_embeddings = {shown(tied[1])} and that of text_config = "
            f"{shown(tied[0])} differ: keep one of them"
        )
    return text | {key: config[key] for key in unset}


def _safetensors_files(path: Path) -> tuple[Path, ...]:
    """The weight files, sorted. A single file is preferred, as in transformers."""
    if (path / "model.safetensors").is_file():
        return (path / "model.safetensors",)
    if (path / "model.safetensors.index.json").is_file():
        files = tuple(path / name for name in sorted(set(weight_map(path).values())))
        for file in files:
            if not file.is_file():
                raise ExportError(f"{file} is missing; model.safetensors.index.json names it")
        return files
    pickled = sorted(file.name for file in path.glob("*.bin"))
    hint = f"; {pickled[0]} is a pickle: convert it to safetensors" if pickled else ""
    raise ExportError(
        f"{path} has neither model.safetensors nor model.safetensors.index.json{hint}"
    )


def weight_map(path: Path) -> dict[str, str]:
    """Tensors' names to files' names. Errors: ExportError for a value that is no name of a file in
    the directory, such as a path."""
    index = path / "model.safetensors.index.json"
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise ExportError(f"{index} has no weight_map from tensors to files")
    for name, file in found.items():
        if not isinstance(file, str) or FILE_NAME.fullmatch(file) is None:
            raise ExportError(
                f"{index}: weight_map has {shown(file)} for {shown(name)}; the name of a "
                ".safetensors file in the same directory is right"
            )
    return found


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
    try:
        with safe_open(file, "pt") as opened:
            return opened.get_tensor(name)
    except SafetensorError as error:
        raise ExportError(f"{file}: {name} cannot be read: {error}") from error


def read_json(path: Path, kind: type = dict) -> Any:
    """Read a JSON object, or with list a list, whose strings are all text, and so can be written as
    UTF-8 again.

    Errors: ExportError naming the file and what is wrong with it.
    """
    if path.exists() and not path.is_file():
        raise ExportError(f"{path} is no file; a file with a JSON object is right")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        # A string may have one half of a surrogate pair as \\ud800.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise ExportError(f"{path} is not valid JSON: it is nested too deeply") from error
    if not isinstance(value, kind):
        right = "object" if kind is dict else "list"
        raise ExportError(f"{path} holds a {type(value).__name__}; a JSON {right} is right")
    return value
