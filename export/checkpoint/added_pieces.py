"""Tokens that the files beside a tokenizer.model declare, as pieces of the model.

A special token becomes a control piece, which the runner finds in text and does not show. Another
one becomes a piece that SentencePiece itself finds in text; or a control piece that is shown, where
the text after an added token begins with a space as a text does, or without the space it has.
"""

from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as model_pb2
from tokenizers import AddedToken

from tokenloop.export.checkpoint.declared_tokens import CONFIG, DeclaredTokens, all_tokens
from tokenloop.export.checkpoint.vocabulary import Pieces
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
REMEDY = "save the tokenizer with transformers, as a tokenizer.json, and export that"


def add_pieces(
    path: Path, data: bytes, declared: DeclaredTokens, settings: dict[str, Any]
) -> tuple[bytes, Pieces]:
    """The model with the tokens, which is `data` itself, a valid model, where they change nothing;
    and what is to be said of its control pieces.

    `path` is for messages, `settings` is tokenizer_config.json. Errors: ExportError for a token
    that cannot be a piece, as one that takes the spaces before it.
    """
    model = model_pb2.ModelProto.FromString(data)
    prefixed = model.normalizer_spec.add_dummy_prefix
    if prefixed and settings.get("legacy") is False:
        raise ExportError(
            f"{path.parent / CONFIG}: legacy is false, so that only a text's beginning gets a "
            f"space, and not what comes after a special token; {path.name} cannot say that: "
            f"{REMEDY}"
        )
    ids = {piece.piece: token_id for token_id, piece in enumerate(model.pieces)}
    changed, pieces = False, Pieces([], [])
    for token in all_tokens(declared, set()):
        if not token.content:
            continue
        _check(path, token)
        kind = CONTROL if token.special or token.rstrip or prefixed else USER_DEFINED
        # SentencePiece looks for them in text that has its own mark in place of each space.
        text = token.content.replace(" ", "\u2581") if kind == USER_DEFINED else token.content
        if text not in ids:
            ids[text] = len(model.pieces)
            model.pieces.add(piece=text, score=0.0, type=NORMAL)
        piece = model.pieces[ids[text]]
        if token.rstrip:
            pieces.rstrip.append(ids[text])
        if piece.type == kind or piece.type not in (NORMAL, USER_DEFINED, UNUSED):
            continue
        piece.type, changed = kind, True
        if kind == CONTROL and not token.special:
            pieces.shown.append(ids[text])
    return (model.SerializeToString(deterministic=True) if changed else data), pieces


def _check(path: Path, token: AddedToken) -> None:
    flags = [flag for flag in ("single_word", "lstrip") if getattr(token, flag)]
    if token.rstrip and token.normalized:
        # It takes the white space that is left where each space has become a mark.
        flags.append("rstrip and normalized")
    if flags:
        raise ExportError(
            f"{path.parent}: the added token {shown(token.content)} has {flags[0]}, which "
            f"{path.name} cannot say: {REMEDY}"
        )
