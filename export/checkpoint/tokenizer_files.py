"""The tokenizer's part of an artifact: its file, the chat templates, and the manifest's entry.

The runner encodes text alone and puts ids in front and behind by itself; which ones is found here.
A SentencePiece vocabulary of a GGUF file becomes a SentencePiece model, a byte-level one a
tokenizer.json. Tokens that other files add to a Hugging Face tokenizer are added to its file.
"""

from pathlib import Path
from typing import Any

from tokenloop.export.checkpoint.contents import Checkpoint
from tokenloop.export.checkpoint.directory_tokenizer import copy_tokenizer
from tokenloop.export.checkpoint.gguf_tokenizer import rebuild_tokenizer
from tokenloop.export.checkpoint.vocabulary import (
    id_list,
    load_sentencepiece,
    load_tokenizer_json,
)
from tokenloop.export.errors import ExportError

TEMPLATE_FILE, TOOL_TEMPLATE_FILE = "chat_template.jinja", "tool_chat_template.jinja"


def write_tokenizer(checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    """Write the tokenizer, and the chat templates if there are any, into `directory` (it exists).

    Returns the manifest's entry: `file`; `bos_token_id` (or None); `eos_token_ids`, ascending;
    `prefix_ids` and `suffix_ids`, which go in front of a text and behind it; `shown_ids` and
    `rstrip_ids`, of Pieces; `chat_template` and `tool_template`, files or None; and for the
    templates `special_tokens`, texts by their names.

    Errors: ExportError for a tokenizer that is missing, damaged or of an unsupported kind, for a
    setting of the wrong type, for files that contradict one another, and for an id that the model
    does not have.
    """
    write = rebuild_tokenizer if checkpoint.kind == "gguf" else copy_tokenizer
    entry, templates = write(checkpoint, directory)
    vocab_size = checkpoint.config.get("vocab_size")
    for name in ("bos_token_id", "eos_token_ids", "prefix_ids", "suffix_ids"):
        for token_id in id_list(entry[name]):
            if vocab_size is not None and token_id >= vocab_size:
                raise ExportError(
                    f"{checkpoint.path}: the {name[:3]} id {token_id} is not one of the model's "
                    f"{vocab_size} tokens"
                )
    files = {"chat_template": None, "tool_template": None}
    for key, name, source in zip(files, (TEMPLATE_FILE, TOOL_TEMPLATE_FILE), templates):
        if source is not None:
            (directory / name).write_bytes(source.encode("utf-8"))
            files[key] = name
    return entry | files


def encode(directory: Path, entry: dict[str, Any], text: str) -> list[int]:
    """The ids of `text` with the tokenizer that was written, and what goes around it."""
    file = directory / entry["file"]
    if file.suffix == ".model":
        ids = load_sentencepiece(file).encode(text)
    else:
        ids = load_tokenizer_json(file).encode(text, add_special_tokens=False).ids
    return [*entry["prefix_ids"], *ids, *entry["suffix_ids"]]
