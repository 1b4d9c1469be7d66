"""A GGUF file's BPE vocabulary of characters (`tokenizer.ggml.model` = gemma4) as a tokenizer.json:
a space is the character of SentencePiece, and a character without a token becomes its bytes.
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers

from tokenloop.export.checkpoint.byte_level_bpe import added_tokens, bpe_parts
from tokenloop.export.checkpoint.gguf_tokens import special_id
from tokenloop.export.errors import ExportError

SPACE = "\u2581"


def spaced_tokenizer(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer from the keys `tokenizer.ggml.*`; the same every time. `path` is for
    messages. Errors: ExportError as byte_level_tokenizer, and for texts that begin with a space of
    their own."""
    if metadata.get("tokenizer.ggml.add_space_prefix", False):
        raise ExportError(
            f"{path}: tokenizer.ggml.add_space_prefix is true; false is supported for gemma4"
        )
    tokens, types, vocabulary, merges = bpe_parts(path, metadata)
    unknown = special_id(metadata, "unk")
    if unknown is not None and not unknown < len(tokens):
        raise ExportError(f"{path}: the unk id {unknown} is not one of {len(tokens)} tokens")
    try:
        model = models.BPE(
            vocabulary, merges, byte_fallback=True, fuse_unk=True,
            unk_token=None if unknown is None else tokens[unknown],
        )  # fmt: skip
    except Exception as error:  # the tokenizers package raises nothing more precise
        raise ExportError(f"{path} holds no valid BPE: {error}") from error
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    # Text is merged whole, as Gemma's own tokenizer.json has it. llama.cpp cuts it at newlines,
    # which changes nothing: no token has newlines beside other characters.
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens(added_tokens(metadata, tokens, types))
    return tokenizer
