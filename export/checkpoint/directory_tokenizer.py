"""The tokenizer of a Hugging Face directory: its own file, with the tokens that other files add."""

from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from tokenloop.export.checkpoint.added_pieces import add_pieces
from tokenloop.export.checkpoint.contents import Checkpoint
from tokenloop.export.checkpoint.declared_tokens import (
    CONFIG,
    KINDS,
    add_tokens,
    check_ends,
    check_ids,
    declared_tokens,
)
from tokenloop.export.checkpoint.safetensors_directory import read_json
from tokenloop.export.checkpoint.vocabulary import (
    Pieces,
    Templates,
    Vocabulary,
    contents,
    id_list,
    parse_sentencepiece,
    parse_tokenizer_json,
    sentencepiece_vocabulary,
)
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
NAMED_TEMPLATE = Kind(
    lambda value: (
        isinstance(value, dict)
        and all(isinstance(value.get(key), str) for key in ("name", "template"))
    ),
    "a name and a template",
)
SETTINGS = KINDS | {
    "add_bos_token": FLAG,
    "add_eos_token": FLAG,
    "legacy": FLAG,
    "chat_template": either(TEXT, list_of(NAMED_TEMPLATE, "objects with a name and a template")),
}
# What transformers makes of any tokenizer.json, without tokens of its own.
GENERAL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")
IDS = {name: FIELDS[name] for name in ("bos_token_id", "eos_token_id")}


def copy_tokenizer(checkpoint: Checkpoint, directory: Path) -> tuple[dict[str, Any], Templates]:
    """Write the tokenizer's file; the manifest's entry but for the templates, and these."""
    source = checkpoint.path
    settings = _settings(source / CONFIG, SETTINGS)
    generation = _settings(source / "generation_config.json", IDS)
    _check(source / "config.json", checkpoint.config, IDS)
    for file in ("tokenizer.json", "tokenizer.model"):
        if (source / file).is_file():
            break
    else:
        raise ExportError(f"{source} has neither tokenizer.json nor tokenizer.model")
    data = contents(source / file)
    if file == "tokenizer.json":
        pieces = Pieces([], [])
        tokenizer = parse_tokenizer_json(source / file, data)
        declared = declared_tokens(source, settings, _own_tokens(tokenizer))
        check_ends(source / file, declared, tokenizer.token_to_id)
        before = _added_tokens(tokenizer)
        add_tokens(tokenizer, declared)
        if _added_tokens(tokenizer) != before:
            data = tokenizer.to_str().encode("utf-8")
        vocabulary = Vocabulary(tokenizer.token_to_id, tokenizer.id_to_token)
    else:
        tokenizer = None
        processor = parse_sentencepiece(source / file, data)
        own = sentencepiece_vocabulary(processor)
        settings = _own_roles(processor) | settings
        declared = declared_tokens(source, settings, [])
        check_ends(source / file, declared, own.id_of)
        data, pieces = add_pieces(source / file, data, declared, settings)
        vocabulary = sentencepiece_vocabulary(parse_sentencepiece(source / file, data))
    check_ids(source / file, declared, vocabulary.id_of)
    named = declared.texts()

    configs = (generation, checkpoint.config)
    ids = {key: vocabulary.id_of(named[key]) for key in ("bos_token", "eos_token") if key in named}
    bos_ids = [ids.get("bos_token"), *(config.get("bos_token_id") for config in configs)]
    bos_id = next((value for value in bos_ids if value is not None), None)
    eos_ids = {value for config in configs for value in id_list(config.get("eos_token_id"))}
    eos_ids.update(id_list(ids.get("eos_token")))
    # A key of tokenizer_config.json wins even if it is null (Qwen): transformers then has no token,
    # and none by default in a class for all models.
    is_general = tokenizer is not None and settings.get("tokenizer_class") in GENERAL_CLASSES
    for key, token_id in (("bos_token", bos_id), ("eos_token", min(eos_ids, default=None))):
        if key not in settings and key not in named and not is_general:
            text = vocabulary.text_of(token_id)
            named |= {} if text is None else {key: text}
    if tokenizer is not None:
        prefix, suffix = around(source / file, tokenizer)
    else:
        # SentencePiece has no post-processor.
        adds_bos = settings.get("add_bos_token") is not False and bos_id is not None
        prefix = [bos_id] if adds_bos else []
        adds_eos = settings.get("add_eos_token") and "eos_token" in ids
        suffix = [ids["eos_token"]] if adds_eos else []
    (directory / file).write_bytes(data)
    entry = {
        "file": file,
        "bos_token_id": bos_id,
        "eos_token_ids": sorted(eos_ids),
        "prefix_ids": prefix,
        "suffix_ids": suffix,
        **pieces.entries(),
        "special_tokens": named,
    }
    return entry, _directory_templates(source, settings)


def around(path: Path, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts in front of a text, and behind it. `path` is for
    messages. Errors: ExportError for one that does anything else."""
    # The file may ask for padding of any length. The runner does neither.
    tokenizer.no_padding()
    tokenizer.no_truncation()
    for text in ("a", "1", "\n", " a"):
        try:
            whole = tokenizer.encode(text)
            alone = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the tokenizers package raises nothing more precise
            raise ExportError(
                f"{path} is a tokenizer that cannot encode {text!r}: {error}"
            ) from error
        if alone or not whole.ids:
            break
    ids, added = whole.ids, whole.special_tokens_mask
    start = added.index(0) if 0 in added else len(ids)
    if not alone and ids or ids[start : start + len(alone)] != alone:
        raise ExportError(
            f"{path}: the post-processor makes {shown(ids)} of {text!r}, whose ids are "
            f"{shown(alone)}; one that puts ids in front or behind is right"
        )
    return ids[:start], ids[start + len(alone) :]


def _own_tokens(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    added = tokenizer.get_added_tokens_decoder()
    return [{"id": token_id, **token.__getstate__()} for token_id, token in added.items()]


def _added_tokens(tokenizer: Tokenizer) -> list[str]:
    return sorted(map(str, _own_tokens(tokenizer)))


def _directory_templates(source: Path, settings: dict[str, Any]) -> Templates:
    """The templates of files of their own, or those of tokenizer_config.json."""
    files = {"default": source / TEMPLATE_FILE}
    for path in sorted((source / "additional_chat_templates").glob("*.jinja")):
        files[path.stem] = path
    named = {name: _template_text(path) for name, path in files.items() if path.is_file()}
    if not named:
        template = settings.get("chat_template")
        if not isinstance(template, list):
            return Templates(template)
        named = {item["name"]: item["template"] for item in template}
    return Templates(named.get("default"), named.get("tool_use"))


def _template_text(path: Path) -> str:
    try:
        return contents(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ExportError(f"{path} is no UTF-8: {error}") from error


def ignored_setting(checkpoint: Checkpoint, entry: dict[str, Any]) -> str | None:
    """A line where tokenizer_config.json says otherwise than what goes in front of texts."""
    if checkpoint.kind == "gguf" or entry["file"] != "tokenizer.json":
        return None
    says = _settings(checkpoint.path / CONFIG, SETTINGS).get("add_bos_token")
    adds = entry["bos_token_id"] in entry["prefix_ids"]
    if says is None or says == adds:
        return None
    return (
        f"{checkpoint.path / CONFIG} has add_bos_token {str(says).lower()}, and tokenizer.json's "
        f"post-processor puts {'a' if adds else 'no'} bos in front of texts: the latter decides, "
        "as in transformers 5"
    )


def _own_roles(processor: SentencePieceProcessor) -> dict[str, Any]:
    """The special tokens that a SentencePiece model names itself."""
    ids = {
        "bos_token": processor.bos_id(),
        "eos_token": processor.eos_id(),
        "unk_token": processor.unk_id(),
    }
    return {role: processor.id_to_piece(i) for role, i in ids.items() if i >= 0}


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
