"""A GGUF file's byte-level BPE vocabulary (`tokenizer.ggml.model` = gpt2) as a tokenizer.json.

GGUF has the tokens and merges, but only a name for how text is cut and normalised before them.
"""

from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tokenloop.export.errors import ExportError

CONTROL, USER_DEFINED, UNUSED = 3, 4, 5


class PreTokenizer(NamedTuple):
    """What is done to text before merging: the pattern of a piece, and whether it is put into
    Unicode's composed form first."""

    pattern: str
    compose: bool


# By `tokenizer.ggml.pre`; patterns as published in the models' own tokenizer.json.
PRE_TOKENIZERS = {
    "qwen2": PreTokenizer(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        r"|[^\r\n\p{L}\p{N}]?\p{L}+"
        r"|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+",
        compose=True,
    ),
}


def byte_level_tokenizer(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer from the keys `tokenizer.ggml.*`; the same every time.

    Control tokens are special, user-defined ones are found in text and shown; unused ones, which
    pad the vocabulary to the embedding's size, are left out. `path` is for messages. Errors:
    ExportError for a key that is missing, an unknown pre-tokenizer, lists of different lengths, or
    a merge of tokens that do not exist.
    """
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ExportError(
            f"{path}: tokenizer.ggml.pre is {pre!r}; {', '.join(PRE_TOKENIZERS)} can be rebuilt. "
            "For others export from the Hugging Face directory"
        )
    missing = [
        f"tokenizer.ggml.{key}"
        for key in ("tokens", "token_type", "merges")
        if f"tokenizer.ggml.{key}" not in metadata
    ]
    if missing:
        raise ExportError(f"{path} has no key {', '.join(missing)}, which its tokenizer needs")
    tokens = metadata["tokenizer.ggml.tokens"]
    types = [int(kind) for kind in metadata["tokenizer.ggml.token_type"]]
    if len(tokens) != len(types):
        raise ExportError(
            f"{path} has {len(tokens)} tokens and {len(types)} token types; their number must be "
            "the same"
        )
    vocabulary = {token: i for i, (token, kind) in enumerate(zip(tokens, types)) if kind != UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    try:
        tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    except Exception as error:  # the tokenizers package raises nothing more precise
        raise ExportError(f"{path} holds no valid byte-level BPE: {error}") from error
    pattern, compose = PRE_TOKENIZERS[pre]
    if compose:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in zip(tokens, types)
            if kind in (CONTROL, USER_DEFINED)
        ]
    )
    return tokenizer
