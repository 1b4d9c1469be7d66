"""How a checkpoint of an embedding model pools: what sentence-transformers' files and GGUF's keys
say of it, of which the last token's hidden state with the length 1 is built."""

from pathlib import Path

from tokenloop.export.checkpoint.contents import Checkpoint
from tokenloop.export.checkpoint.safetensors_directory import read_json
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown

MODES = "pooling_mode_"
# llama.cpp's numbers for none and for the last token.
LAST_TOKEN = 0, 3


def check_pooling(checkpoint: Checkpoint) -> None:
    """Errors: ExportError for a checkpoint that asks for another pooled output."""
    architecture = checkpoint.metadata.get("general.architecture")
    kind = checkpoint.metadata.get(f"{architecture}.pooling_type", 0)
    if kind not in LAST_TOKEN:
        raise ExportError(
            f"{checkpoint.path}: {architecture}.pooling_type is {shown(kind)}; --pooled gives the "
            "last token's hidden state, which is 3"
        )
    path = checkpoint.path / "modules.json"
    if checkpoint.kind == "gguf" or not path.is_file():
        return
    modules = read_json(path, kind=list)
    for module in modules:
        fields = module if isinstance(module, dict) else {}
        name = str(fields.get("type")).rpartition(".")[2]
        if name not in ("Transformer", "Pooling", "Normalize"):
            raise ExportError(
                f"{path} has a module of the type {shown(fields.get('type'))}; Transformer, "
                "Pooling and Normalize are supported"
            )
        if name == "Pooling":
            _check_modes(path.parent / str(fields.get("path")) / "config.json")


def _check_modes(path: Path) -> None:
    config = read_json(path)
    flags = {name.removeprefix(MODES): on for name, on in config.items() if name.startswith(MODES)}
    modes = [name for name, on in flags.items() if on]
    modes += [config["pooling_mode"]] if "pooling_mode" in config else []
    if modes != ["lasttoken"]:
        raise ExportError(
            f"{path} asks for {shown(modes)}; --pooled gives the last token's hidden state, "
            "['lasttoken']"
        )
