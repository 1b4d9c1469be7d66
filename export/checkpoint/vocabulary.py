"""A tokenizer's vocabulary, whichever file it has, and the files themselves."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from tokenloop.export.errors import ExportError


class Vocabulary(NamedTuple):
    """Both directions; None for a token or an id that the vocabulary does not have."""

    id_of: Callable[[str], int | None]
    token_of: Callable[[int], str | None]

    def text_of(self, token_id: int | None) -> str | None:
        return None if token_id is None else self.token_of(token_id)


class Pieces(NamedTuple):
    """What a tokenizer.model does not say of its control pieces, by their ids: those that are
    shown, and those that take the white space after them."""

    shown: list[int]
    rstrip: list[int]

    def entries(self) -> dict[str, list[int]]:
        """The manifest's."""
        return {"shown_ids": sorted(self.shown), "rstrip_ids": sorted(self.rstrip)}


class Templates(NamedTuple):
    """The sources of the chat templates: the usual one, and the one for conversations with tools,
    where that is another."""

    chat: str | None
    tools: str | None = None


def id_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def contents(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror}") from error


def load_tokenizer_json(path: Path) -> Tokenizer:
    return parse_tokenizer_json(path, contents(path))


def parse_tokenizer_json(path: Path, data: bytes) -> Tokenizer:
    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:  # the tokenizers package raises nothing more precise
        raise ExportError(f"{path} is not a tokenizer that can be read: {error}") from error


def load_sentencepiece(path: Path) -> SentencePieceProcessor:
    return parse_sentencepiece(path, contents(path))


def parse_sentencepiece(path: Path, serialized: bytes) -> SentencePieceProcessor:
    if not serialized:
        raise ExportError(f"{path} is empty; a SentencePiece model is right")
    try:
        processor = SentencePieceProcessor(model_proto=serialized)
        # Its strings need not be text.
        processor.id_to_piece(list(range(len(processor))))
    except (RuntimeError, ValueError) as error:
        raise ExportError(f"{path} holds no valid SentencePiece model: {error}") from error
    return processor


def sentencepiece_vocabulary(processor: SentencePieceProcessor) -> Vocabulary:
    def token_of(token_id: int) -> str | None:
        return processor.id_to_piece(token_id) if token_id < len(processor) else None

    def id_of(token: str) -> int | None:
        # A user-defined piece has SentencePiece's mark in place of each space.
        for piece in (token, token.replace(" ", "\u2581")):
            # It answers with the unknown id for what it does not have.
            token_id = processor.piece_to_id(piece)
            if token_of(token_id) == piece:
                return token_id
        return None

    return Vocabulary(id_of, token_of)
