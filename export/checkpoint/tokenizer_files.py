"""The tokenizer's part of an artifact: its file, the chat template, and the manifest's entry.

The runner puts the bos id in front by itself and encodes without special tokens, so the ids and
`add_bos` are found here. A SentencePiece vocabulary of a GGUF file becomes a SentencePiece model,
a byte-level one a tokenizer.json.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from tokenloop.export.checkpoint.byte_level_bpe import PRE_TOKENIZERS, byte_level_tokenizer
from tokenloop.export.checkpoint.contents import Checkpoint
from tokenloop.export.checkpoint.safetensors_directory import read_json
from tokenloop.export.checkpoint.sentencepiece_bpe import sentencepiece_model
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import (
    FIELDS,
    FLAG,
    TEXT,
    Kind,
    check_fields,
    either,
    list_of,
    shown,
)

TEMPLATE_FILE = "chat_template.jinja"
# What ends a turn or a text in conversations.
END_TOKENS = (
    "<end_of_turn>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
)  # fmt: skip
# What is read of tokenizer_config.json, and of config.json and generation_config.json.
TOKEN = Kind(
    lambda value: isinstance(value.get("content") if isinstance(value, dict) else value, str),
    "a string, or an object with one as its content",
)
NAMED_TEMPLATE = Kind(
    lambda value: (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("name", "template"))
    ),
    "a name and a template",
)
SETTINGS = {
    "bos_token": TOKEN,
    "eos_token": TOKEN,
    "add_bos_token": FLAG,
    "chat_template": either(TEXT, list_of(NAMED_TEMPLATE, "objects with a name and a template")),
}
IDS = {name: FIELDS[name] for name in ("bos_token_id", "eos_token_id")}


class Vocabulary(NamedTuple):
    """Both directions; None for a token or an id that the vocabulary does not have."""

    id_of: Callable[[str], int | None]
    token_of: Callable[[int], str | None]


def write_tokenizer(checkpoint: Checkpoint, directory: Path) -> dict[str, Any]:
    """Write the tokenizer, and the chat template if there is one, into `directory` (it exists).

    Returns the manifest's entry: `file`; `bos_token_id` (or None); `eos_token_ids`, ascending;
    `add_bos`, whether a prompt begins with the bos id; `chat_template`, a file or None; and for the
    template `bos_token` and `eos_token`, strings or None.

    Errors: ExportError for a tokenizer that is missing, damaged or of an unsupported kind, for a
    setting of the wrong type, and for a bos id that the model does not have.
    """
    write = _write_gguf if checkpoint.kind == "gguf" else _copy_files
    entry, template = write(checkpoint, directory)
    bos_id, vocab_size = entry["bos_token_id"], checkpoint.config.get("vocab_size")
    if None not in (bos_id, vocab_size) and bos_id >= vocab_size:
        raise ExportError(
            f"{checkpoint.path}: the bos id {bos_id} is not one of the model's {vocab_size} tokens"
        )
    if template is not None:
        (directory / TEMPLATE_FILE).write_bytes(template.encode("utf-8"))
    return entry | {"chat_template": TEMPLATE_FILE if template is not None else None}


def encode(directory: Path, entry: dict[str, Any], text: str) -> list[int]:
    """The ids of `text` with the tokenizer that was written, after the bos id if there is one."""
    file = directory / entry["file"]
    if file.suffix == ".model":
        ids = _load_sentencepiece(file).encode(text)
    else:
        ids = _load_tokenizer_json(file).encode(text, add_special_tokens=False).ids
    return [entry["bos_token_id"], *ids] if entry["add_bos"] else ids


def _copy_files(checkpoint: Checkpoint, directory: Path) -> tuple[dict[str, Any], str | None]:
    source = checkpoint.path
    settings = _settings(source / "tokenizer_config.json", SETTINGS)
    generation = _settings(source / "generation_config.json", IDS)
    _check(source / "config.json", checkpoint.config, IDS)
    for file in ("tokenizer.json", "tokenizer.model"):
        if (source / file).is_file():
            break
    else:
        raise ExportError(f"{source} has neither tokenizer.json nor tokenizer.model")
    data = _contents(source / file)
    if file == "tokenizer.json":
        tokenizer = _parse_tokenizer_json(source / file, data)
        vocabulary = Vocabulary(tokenizer.token_to_id, tokenizer.id_to_token)
    else:
        tokenizer = None
        vocabulary = _sentencepiece_vocabulary(_parse_sentencepiece(source / file, data))

    def named(key: str) -> int | None:
        token = _token_text(settings.get(key))
        if token is not None and vocabulary.id_of(token) is None:
            raise ExportError(
                f"{source / 'tokenizer_config.json'}: {key} is {shown(token)}, which is not in "
                f"{file}"
            )
        return None if token is None else vocabulary.id_of(token)

    configs = (generation, checkpoint.config)
    bos_ids = [named("bos_token"), *(config.get("bos_token_id") for config in configs)]
    bos_id = next((value for value in bos_ids if value is not None), None)
    eos_ids = {value for config in configs for value in _id_list(config.get("eos_token_id"))}
    eos_ids.update(_id_list(named("eos_token")))
    # A key of tokenizer_config.json wins even if it is null (Qwen): transformers then has no token.
    strings = {
        key: _token_text(settings[key]) if key in settings else _token_text_of(vocabulary, token_id)
        for key, token_id in (("bos_token", bos_id), ("eos_token", min(eos_ids, default=None)))
    }
    add_bos = settings.get("add_bos_token")
    if add_bos is None and tokenizer is not None:
        # Only the ids tell what a post-processor does.
        add_bos = bos_id is not None and _first_id(source / file, tokenizer) == bos_id
    (directory / file).write_bytes(data)
    entry = {
        "file": file,
        "bos_token_id": bos_id,
        "eos_token_ids": sorted(eos_ids),
        # SentencePiece has no post-processor. transformers adds bos to it unless told otherwise.
        "add_bos": bos_id is not None and add_bos is not False,
        **strings,
    }
    return entry, _directory_template(source, settings)


def _directory_template(source: Path, settings: dict[str, Any]) -> str | None:
    if (source / TEMPLATE_FILE).is_file():
        try:
            return _contents(source / TEMPLATE_FILE).decode("utf-8")
        except UnicodeDecodeError as error:
            raise ExportError(f"{source / TEMPLATE_FILE} is no UTF-8: {error}") from error
    template = settings.get("chat_template")
    if isinstance(template, list):
        named = {item["name"]: item["template"] for item in template}
        template = named.get("default")
    return template


def _write_gguf(checkpoint: Checkpoint, directory: Path) -> tuple[dict[str, Any], str | None]:
    path, metadata = checkpoint.path, checkpoint.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        file, adds_bos = "tokenizer.model", True
        data = sentencepiece_model(path, metadata)
        vocabulary = _sentencepiece_vocabulary(_parse_sentencepiece(path, data))
    elif kind == "gpt2":
        tokenizer = byte_level_tokenizer(path, metadata)
        file, adds_bos = "tokenizer.json", PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]].adds_bos
        data = tokenizer.to_str().encode("utf-8")
        vocabulary = Vocabulary(tokenizer.token_to_id, tokenizer.id_to_token)
    else:
        raise ExportError(
            f"{path}: tokenizer.ggml.model is {shown(kind)}, which is not supported; llama "
            "(SentencePiece BPE) and gpt2 (byte-level BPE) are. For others export from the Hugging "
            "Face directory"
        )
    template = metadata.get("tokenizer.chat_template")
    (directory / file).write_bytes(data)
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    eos_id = metadata.get("tokenizer.ggml.eos_token_id")
    ends = ("eos", "eot", "eom")  # of a text, a turn, a message
    eos_ids = {metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ends}
    if template is not None:
        # Files often name the text's end token and not the turn's, or the other way round.
        eos_ids.update(map(vocabulary.id_of, END_TOKENS))
    entry = {
        "file": file,
        "bos_token_id": bos_id,
        "eos_token_ids": sorted(eos_ids - {None}),
        # The defaults are llama.cpp's.
        "add_bos": bos_id is not None and metadata.get("tokenizer.ggml.add_bos_token", adds_bos),
        "bos_token": _token_text_of(vocabulary, bos_id),
        "eos_token": _token_text_of(vocabulary, eos_id),
    }
    return entry, template


def _contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error


def _load_tokenizer_json(path: Path) -> Tokenizer:
    return _parse_tokenizer_json(path, _contents(path))


def _parse_tokenizer_json(path: Path, data: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the tokenizers package raises nothing more precise
        raise ExportError(f"{path} is not a tokenizer that can be read: {error}") from error


def _first_id(path: Path, tokenizer: Tokenizer) -> int | None:
    """The first id of a short text, with what the post-processor puts before it."""
    # The file may ask for padding of any length. The runner does neither.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    try:
        return next(iter(tokenizer.encode("a").ids), None)
    except Exception as error:  # as above
        raise ExportError(f"{path} is a tokenizer that cannot encode 'a': {error}") from error


def _load_sentencepiece(path: Path) -> SentencePieceProcessor:
    return _parse_sentencepiece(path, _contents(path))


def _parse_sentencepiece(path: Path, serialized: bytes) -> SentencePieceProcessor:
    if not serialized:
        raise ExportError(f"{path} is empty; a SentencePiece model is right")
    try:
        processor = SentencePieceProcessor(model_proto=serialized)
        # Its strings need not be text.
        processor.id_to_piece(list(range(len(processor))))
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"{path} holds no valid SentencePiece model: {error}") from error
    return processor


def _sentencepiece_vocabulary(processor: SentencePieceProcessor) -> Vocabulary:
    def token_of(token_id: int) -> str | None:
        return processor.id_to_piece(token_id) if token_id < len(processor) else None

    def id_of(token: str) -> int | None:
        # SentencePiece answers with the unknown id for what it does not have.
        token_id = processor.piece_to_id(token)
        return token_id if token_of(token_id) == token else None

    return Vocabulary(id_of, token_of)


def _settings(path: Path, kinds: dict[str, Kind]) -> dict[str, Any]:
    """The object of a JSON file whose fields are of their kinds; empty where there is no file."""
    settings = read_json(path) if path.is_file() else {}
    _check(path, settings, kinds)
    return settings


def _check(path: Path, settings: dict[str, Any], kinds: dict[str, Kind]) -> None:
    try:
        check_fields(settings, kinds)
    except ValueError as error:
        raise ExportError(f"{path}: {error}") from error


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    """tokenizer_config.json has a token as a string, or as an object with its flags."""
    return token["content"] if isinstance(token, dict) else token


def _token_text_of(vocabulary: Vocabulary, token_id: int | None) -> str | None:
    return None if token_id is None else vocabulary.token_of(token_id)


def _id_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
