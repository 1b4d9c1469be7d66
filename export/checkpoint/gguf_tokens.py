"""What llama.cpp makes of a GGUF vocabulary's special tokens (src/llama-vocab.cpp): ids that the
file does not say, and tokens that end a text, a turn or a message by their names."""

from collections.abc import Callable, Sequence
from typing import Any

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = TOKEN_TYPES = range(1, 7)
# The keys' names of the special tokens by transformers' names, and llama.cpp's defaults for a
# SentencePiece vocabulary. Its defaults for others are of no model.
ROLES = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
SENTENCEPIECE_DEFAULTS = {"bos": 1, "eos": 2, "unk": 0}
# What ends a turn or a text in conversations. They are control tokens whatever the file says.
END_TOKENS = (
    "<end_of_turn>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>",
    "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<turn|>", "<eos>", "<EOT>",
    "_<EOT>", "[EOT]", "[EOS]", "<end_of_utterance>", "<｜end▁of▁sentence｜>",
)  # fmt: skip
# Where a vocabulary has all of one of these, <|end|> is within a turn.
WITHIN_TURNS = ({"<|return|>", "<|call|>"}, {"<|flush|>", "<|calls|>"}, {"<|flush|>", "<|call|>"})


def special_id(metadata: dict[str, Any], role: str) -> int | None:
    """The id of a special token, None where there is none."""
    count = len(metadata["tokenizer.ggml.tokens"])
    token_id = metadata.get(f"tokenizer.ggml.{ROLES[role]}_token_id")
    if token_id is None and metadata["tokenizer.ggml.model"] == "llama":
        token_id = SENTENCEPIECE_DEFAULTS.get(role)
        return token_id if token_id is None or token_id < count else None
    # Files for byte-level BPE, which needs no padding, may have any number.
    return (
        None if role == "pad" and token_id is not None and not 0 <= token_id < count else token_id
    )


def end_tokens(tokens: Callable[[str], bool]) -> list[str]:
    """Those of END_TOKENS that a vocabulary has, which end something there. `tokens` says whether
    it has a token."""
    found = [token for token in END_TOKENS if tokens(token)]
    if any(names <= set(found) for names in WITHIN_TURNS):
        return [token for token in found if token != "<|end|>"]
    return found


def strip_right(metadata: dict[str, Any], types: Sequence[int]) -> list[int]:
    """The ids of the tokens that take the white space after them, which no key says: llama.cpp
    knows Phi-3 by its name."""
    name = str(metadata.get("general.name", "")).lower()
    if "phi-3" not in name and "phi3" not in name:
        return []
    tokens = metadata["tokenizer.ggml.tokens"]
    special = [i for i, kind in enumerate(types) if kind in (UNKNOWN, CONTROL, USER_DEFINED)]
    return [i for i in special if tokens[i] not in ("<unk>", "<s>", "<|endoftext|>")]


def token_types(tokens: Sequence[str], types: Sequence[int]) -> list[int]:
    """The types, with that of a token by whose name something ends made CONTROL."""
    ends = set(end_tokens(set(tokens).__contains__))
    return [CONTROL if token in ends else int(kind) for token, kind in zip(tokens, types)]
