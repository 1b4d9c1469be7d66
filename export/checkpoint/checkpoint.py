"""Checkpoints, GGUF or Hugging Face, as one thing: a config, and tensors read one at a time.

Knows no architecture of ours: what a tensor is called in a model is the caller's `rename`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from tokenloop.export.checkpoint.gguf_architectures import read_model
from tokenloop.export.errors import ExportError
from tokenloop.models.layers import Piece

# The dtypes whose values are the weights themselves, in safetensors' spelling. fp8, fp4 and
# integer tensors need scales that lie elsewhere.
PLAIN_FLOATS = ("F64", "F32", "F16", "BF16")
# What a multimodal config.json may say only once, outside its text_config.
SHARED_KEYS = ("bos_token_id", "eos_token_id", "tie_word_embeddings")
HASH_CHUNK_BYTES = 1 << 20


class StoredTensor(NamedTuple):
    """A tensor not read yet: `dtype` in safetensors' spelling is what `read` gives."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint. It holds no file open and no tensor data.

    `config` is Hugging Face's config.json of the text model; `metadata` a GGUF file's own keys
    and values, empty for safetensors; `stored` is in the order in which tensors are read.
    """

    path: Path
    kind: Literal["gguf", "safetensors"]
    config: dict[str, Any]
    weight_files: tuple[Path, ...]
    stored: dict[str, StoredTensor] = field(repr=False)
    metadata: dict[str, Any] = field(default_factory=dict, repr=False)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, Hugging Face's names and PyTorch's order, without reading any."""
        return {name: tensor.shape for name, tensor in self.stored.items()}

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Read every tensor, one at a time, in an order that is always the same.

        From GGUF: float32. From safetensors: the file's own dtype, as a private mapping of the
        file, so that memory is used only for what is touched.
        """
        for name, tensor in self.stored.items():
            yield name, tensor.read()

    def sha256(self) -> str:
        """Hash of the weight files' bytes, one after the other, sorted by name; hexadecimal."""
        digest = hashlib.sha256()
        for path in sorted(self.weight_files):
            with path.open("rb") as file:
                while chunk := file.read(HASH_CHUNK_BYTES):
                    digest.update(chunk)
        return digest.hexdigest()


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, or a Hugging Face directory with config.json and safetensors.

    Errors: ExportError, naming the file, where something is missing, truncated or damaged, and for
    a GGUF architecture that is not supported. All of the files are checked, no data is read.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        raise ExportError(
            f"{path} does not exist; give a .gguf file or a directory with config.json and "
            "safetensors"
        )
    model = read_model(path)
    stored = {
        name: StoredTensor(shape, "F32", model.readers[name])
        for name, shape in model.shapes.items()
    }
    return Checkpoint(path, "gguf", model.config, (path,), stored, model.metadata)


def load_weights(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    rename: Callable[[str], str | Piece | None],
    *,
    progress: Callable[[str], None] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Replace every parameter of `model` (on the meta device) by the checkpoint's tensor.

    `rename` maps a checkpoint's name to a parameter's, to the piece of one that the tensor is, or
    to None for a tensor that is dropped knowingly. A parameter that several modules share (a tied
    head) needs one tensor, under any of its names, and stays shared; it may have one under each if
    they are equal. Buffers are left alone. `progress` gets each name when it is read.

    Errors: ExportError, before any data is read, for a parameter without a tensor or without all of
    its pieces, a tensor without a parameter, a wrong shape, two tensors under one name, or a dtype
    that is not a plain float; and for tensors of one parameter that differ.
    """
    owners: dict[torch.nn.Parameter, list[tuple[torch.nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append((module, name))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    targets = {name: rename(name) for name in checkpoint.stored}
    _check_fit(checkpoint, parameters, targets)
    loaded: dict[torch.nn.Parameter, tuple[str, torch.Tensor]] = {}
    for name, target in targets.items():
        if target is None:
            continue
        if progress is not None:
            progress(name)
        tensor = checkpoint.stored[name].read().to(dtype)
        parameter = parameters[_parameter_name(target)]
        if isinstance(target, Piece):
            if parameter not in loaded:
                loaded[parameter] = name, torch.empty(parameter.shape, dtype=dtype)
            target.of(loaded[parameter][1]).copy_(tensor)
        elif parameter not in loaded:
            loaded[parameter] = name, tensor
        elif not torch.equal(loaded[parameter][1], tensor):
            raise ExportError(
                f"{checkpoint.path}: {loaded[parameter][0]} and {name} differ, and the model's "
                "config ties them"
            )
    for parameter, (_, tensor) in loaded.items():
        weight = torch.nn.Parameter(tensor, requires_grad=False)
        for module, attribute in owners[parameter]:
            setattr(module, attribute, weight)


def _parameter_name(target: str | Piece) -> str:
    return target.name if isinstance(target, Piece) else target


def _check_fit(
    checkpoint: Checkpoint,
    parameters: dict[str, torch.nn.Parameter],
    targets: dict[str, str | Piece | None],
) -> None:
    taken: dict[str | Piece, str] = {}
    elements: dict[torch.nn.Parameter, int] = {}
    for name, target in targets.items():
        if target is None:
            continue
        tensor = checkpoint.stored[name]
        if _parameter_name(target) not in parameters:
            raise ExportError(
                f"{checkpoint.path}: the model has no place for the tensor {name} "
                f"(as {_parameter_name(target)})"
            )
        parameter = place = parameters[_parameter_name(target)]
        if isinstance(target, Piece):
            try:
                place = target.of(parameter)
            except IndexError as error:
                raise ExportError(
                    f"{checkpoint.path}: {name} is number {target.entry} of "
                    f"{len(parameter)} in the model"
                ) from error
        if target in taken:
            raise ExportError(
                f"{checkpoint.path}: {taken[target]} and {name} are both "
                f"{_parameter_name(target)} in the model; one of them is right"
            )
        taken[target] = name
        elements[parameter] = elements.get(parameter, 0) + place.numel()
        if tensor.shape != tuple(place.shape):
            raise ExportError(
                f"{checkpoint.path}: {name} has the shape {tensor.shape}, the model needs "
                f"{tuple(place.shape)}"
            )
        if tensor.dtype not in PLAIN_FLOATS:
            raise ExportError(
                f"{checkpoint.path}: {name} has the dtype {tensor.dtype}; "
                f"{', '.join(PLAIN_FLOATS)} can be loaded"
            )
    missing = [
        name
        for name, parameter in parameters.items()
        if elements.get(parameter, 0) < parameter.numel()
    ]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        some = parameters[missing[0]] in elements
        raise ExportError(
            f"{checkpoint.path} has {'only a part of' if some else 'no tensor for'} the parameter "
            f"{missing[0]}{more}"
        )


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


def _open_directory(path: Path) -> Checkpoint:
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
                raise ExportError(f"{file}: another shard has the tensor {name} too")
            stored[name] = tensor
    if files[0].name != "model.safetensors":
        for name, shard in _weight_map(path).items():
            if name not in stored:
                raise ExportError(f"{path / shard} lacks the tensor {name}, which the index names")
    return Checkpoint(path, "safetensors", config, files, stored)


def read_config(path: Path) -> dict[str, Any]:
    """The text model's part of a config.json. Errors: ExportError as `read_json`, and for a file
    that names no model_type."""
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
    """The weight files, sorted. The single file is preferred, as transformers does."""
    if (path / "model.safetensors").is_file():
        return (path / "model.safetensors",)
    if (path / "model.safetensors.index.json").is_file():
        files = tuple(path / shard for shard in sorted(set(_weight_map(path).values())))
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
