"""The tokenizer of a GGUF file, as llama.cpp reads its keys (src/llama-vocab.cpp)."""

from pathlib import Path
from typing import Any

from tokenloop.export.checkpoint.byte_level_bpe import PRE_TOKENIZERS, byte_level_tokenizer
from tokenloop.export.checkpoint.contents import Checkpoint
from tokenloop.export.checkpoint.gguf_tokens import ROLES, end_tokens, special_id
from tokenloop.export.checkpoint.sentencepiece_bpe import sentencepiece_model
from tokenloop.export.checkpoint.spaced_bpe import spaced_tokenizer
from tokenloop.export.checkpoint.vocabulary import (
    Pieces,
    Templates,
    Vocabulary,
    parse_sentencepiece,
    sentencepiece_vocabulary,
)
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown

ENDS = "eot", "eom"


def rebuild_tokenizer(checkpoint: Checkpoint, directory: Path) -> tuple[dict[str, Any], Templates]:
    """Write the tokenizer's file; the manifest's entry but for the templates, and these."""
    path, metadata = checkpoint.path, checkpoint.metadata
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "llama":
        file, adds_bos = "tokenizer.model", True
        data, pieces = sentencepiece_model(path, metadata)
        vocabulary = sentencepiece_vocabulary(parse_sentencepiece(path, data))
    elif kind in ("gpt2", "gemma4"):
        file, pieces = "tokenizer.json", Pieces([], [])
        if kind == "gemma4":
            tokenizer, adds_bos = spaced_tokenizer(path, metadata), True
        else:
            tokenizer = byte_level_tokenizer(path, metadata)
            adds_bos = PRE_TOKENIZERS[metadata["tokenizer.ggml.pre"]].adds_bos
        data = tokenizer.to_str().encode("utf-8")
        vocabulary = Vocabulary(tokenizer.token_to_id, tokenizer.id_to_token)
    else:
        raise ExportError(
            f"{path}: tokenizer.ggml.model is {shown(kind)}, which is not supported; llama "
            "(SentencePiece BPE), gpt2 (byte-level BPE) and gemma4 are. For others export from the "
            "Hugging Face directory"
        )
    template = metadata.get("tokenizer.chat_template")
    (directory / file).write_bytes(data)
    ids = {role: special_id(metadata, role) for role in ROLES}
    # Of a text, a turn, a message.
    eos_ids = {ids["eos"], *(metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ENDS)}
    if template is not None:
        # Files often name the text's end token and not the turn's, or the other way round.
        ends = end_tokens(lambda token: vocabulary.id_of(token) is not None)
        eos_ids.update(map(vocabulary.id_of, ends))
    around = {}
    for role, default in (("bos", adds_bos), ("eos", False)):
        adds = metadata.get(f"tokenizer.ggml.add_{role}_token", default)
        if adds and ids[role] is None and kind != "llama":
            raise ExportError(
                f"{path} has no key tokenizer.ggml.{role}_token_id, and a text is to have that "
                f"token; with the key, or add_{role}_token false, it can be exported"
            )
        around[role] = [ids[role]] if adds and ids[role] is not None else []
    special = {
        f"{role}_token": text
        for role, token_id in ids.items()
        if (text := vocabulary.text_of(token_id)) is not None
    }
    entry = {
        "file": file,
        "bos_token_id": ids["bos"],
        "eos_token_ids": sorted(eos_ids - {None}),
        "prefix_ids": around["bos"],
        "suffix_ids": around["eos"],
        **pieces.entries(),
        "special_tokens": special,
    }
    return entry, Templates(template, metadata.get("tokenizer.chat_template.tool_use"))
