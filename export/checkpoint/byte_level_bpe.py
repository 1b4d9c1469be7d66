"""A GGUF file's byte-level BPE vocabulary (`tokenizer.ggml.model` = gpt2) as a tokenizer.json.

GGUF has the tokens and merges, but only a name for how text is cut and normalised before them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from tokenloop.export.checkpoint.gguf_tokens import (
    CONTROL,
    TOKEN_TYPES,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    strip_right,
    token_types,
)
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown


class PreTokenizer(NamedTuple):
    """What `tokenizer.ggml.pre` stands for.

    `cuts` are done to text before merging, after it is put into Unicode's composed form if it is
    to be `composed`. With `ignore_merges` a piece that is a token as a whole is not merged.
    `adds_bos` is llama.cpp's default where the file does not say.
    """

    cuts: tuple[pre_tokenizers.PreTokenizer, ...]
    composed: bool = False
    ignore_merges: bool = False
    adds_bos: bool = False


def cuts_at(pattern: str) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    """Cut text into what matches the pattern, and what lies between; the pieces become bytes."""
    return (
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    )


def tiktoken_cuts(
    digits: str, letter: str = r"\p{L}", symbol: str = r"[^\s\p{L}\p{N}]"
) -> tuple[pre_tokenizers.PreTokenizer, ...]:
    """Cut text into words, symbols, space and numbers as tiktoken's cl100k_base does, but for the
    patterns of `digits` and of a word's letters."""
    return cuts_at(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
        rf"|[^\r\n\p{{L}}\p{{N}}]?{letter}+"
        rf"|{digits}"
        rf"| ?{symbol}+[\r\n]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+"
    )


def cased_cuts(digits: str, ending: str = "") -> tuple[pre_tokenizers.PreTokenizer, ...]:
    """Likewise, as o200k_base does: a word's capitals come before its small letters, and then
    `ending`."""
    lead, others = r"[^\r\n\p{L}\p{N}]?", r"\p{Lm}\p{Lo}\p{M}"
    capital, small = rf"[\p{{Lu}}\p{{Lt}}{others}]", rf"[\p{{Ll}}{others}]"
    return cuts_at(
        rf"{lead}{capital}*{small}+{ending}"
        rf"|{lead}{capital}+{small}*{ending}"
        rf"|{digits}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n/]*"
        r"|\s*[\r\n]+"
        r"|\s+(?!\S)"
        r"|\s+"
    )


GPT2_CUTS = (pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),)
LLAMA3_CUTS = tiktoken_cuts(r"\p{N}{1,3}")
# By `tokenizer.ggml.pre`, as published in the models' own tokenizer.json; which of them are the
# same, which take a piece that is a token whole and which add bos, as in llama.cpp.
PRE_TOKENIZERS = {
    "qwen2": PreTokenizer(tiktoken_cuts(r"\p{N}"), composed=True),
    "qwen35": PreTokenizer(
        tiktoken_cuts(r"\p{N}", r"[\p{L}\p{M}]", r"[^\s\p{L}\p{M}\p{N}]"), composed=True
    ),
    **dict.fromkeys(
        ("llama-bpe", "llama3", "llama-v3", "lfm2", "falcon3"),
        PreTokenizer(LLAMA3_CUTS, ignore_merges=True, adds_bos=True),
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), PreTokenizer(LLAMA3_CUTS)),
    "tekken": PreTokenizer(cased_cuts(r"\p{N}"), ignore_merges=True, adds_bos=True),
    **dict.fromkeys(
        ("gpt-4o", "llama4"),
        PreTokenizer(cased_cuts(r"\p{N}{1,3}", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?")),
    ),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo"), PreTokenizer(GPT2_CUTS)),
    **dict.fromkeys(
        ("smollm", "refact", "starcoder", "command-r"),
        PreTokenizer((pre_tokenizers.Digits(individual_digits=True), *GPT2_CUTS)),
    ),
}


def byte_level_tokenizer(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    """Rebuild the tokenizer from the keys `tokenizer.ggml.*`; the same every time.

    Control tokens are special, and so are unknown ones. User-defined tokens are found in text and
    shown. Unused tokens pad the vocabulary to the embedding's size and are left out. `path` is for
    messages. Errors: ExportError for a key that is missing, an unknown pre-tokenizer, lists of
    different lengths, a token type that does not exist, a token with two ids, or a merge of tokens
    that do not exist.
    """
    pre = metadata.get("tokenizer.ggml.pre")
    if pre not in PRE_TOKENIZERS:
        raise ExportError(
            f"{path}: tokenizer.ggml.pre is {shown(pre)}; {', '.join(PRE_TOKENIZERS)} can be "
            "rebuilt. For others export from the Hugging Face directory"
        )
    tokens, types, vocabulary, merges = bpe_parts(path, metadata)
    try:
        model = models.BPE(vocabulary, merges, ignore_merges=PRE_TOKENIZERS[pre].ignore_merges)
    except Exception as error:  # the tokenizers package raises nothing more precise
        raise ExportError(f"{path} holds no valid byte-level BPE: {error}") from error
    tokenizer = Tokenizer(model)
    if PRE_TOKENIZERS[pre].composed:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(list(PRE_TOKENIZERS[pre].cuts))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added_tokens(metadata, tokens, types))
    return tokenizer


def bpe_parts(
    path: Path, metadata: dict[str, Any]
) -> tuple[list[str], list[int], dict[str, int], list[tuple[str, ...]]]:
    """The tokens with their types, the vocabulary without what is unused, and the merges. Errors:
    those of `byte_level_tokenizer` about these."""
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
    if unknown_types := set(types) - set(TOKEN_TYPES):
        raise ExportError(f"{path}: the token type {min(unknown_types)} does not exist; 1 to 6 do")
    types = token_types(tokens, types)
    vocabulary: dict[str, int] = {}
    for i, (token, kind) in enumerate(zip(tokens, types)):
        if kind == UNUSED:
            continue
        if (first := vocabulary.setdefault(token, i)) != i:
            raise ExportError(f"{path}: the tokens {first} and {i} are both {shown(token)}")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    return tokens, types, vocabulary, merges


def added_tokens(
    metadata: dict[str, Any], tokens: Sequence[str], types: Sequence[int]
) -> list[AddedToken]:
    """The tokens that are found in text before it is cut."""
    rstrip = set(strip_right(metadata, types))
    return [
        AddedToken(token, special=kind != USER_DEFINED, normalized=False, rstrip=i in rstrip)
        for i, (token, kind) in enumerate(zip(tokens, types))
        if kind in (CONTROL, UNKNOWN, USER_DEFINED)
    ]
