"""A GGUF file's SentencePiece vocabulary (`tokenizer.ggml.model` = llama) as a model of its own."""

from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2 as model_pb2

from tokenloop.export.checkpoint.gguf_tokens import (
    BYTE,
    CONTROL,
    ROLES,
    TOKEN_TYPES,
    UNKNOWN,
    USER_DEFINED,
    special_id,
    strip_right,
    token_types,
)
from tokenloop.export.checkpoint.vocabulary import Pieces
from tokenloop.export.errors import ExportError


def sentencepiece_model(path: Path, metadata: dict[str, Any]) -> tuple[bytes, Pieces]:
    """Rebuild a SentencePiece BPE model from GGUF's `tokenizer.ggml.*` keys; the same bytes always.
    Also what is to be said of its control pieces.

    Where texts begin with a space, llama.cpp begins anew after a user-defined token, as after a
    control token, which it then is here; and so it is where it takes the white space after it.
    `path` is for messages. Errors: ExportError for lists that are missing or differ in length, a
    token type that does not exist, or no unknown token.
    """
    tokens, scores, types = (
        _vocabulary_list(path, metadata, key) for key in ("tokens", "scores", "token_type")
    )
    if not len(tokens) == len(scores) == len(types):
        raise ExportError(
            f"{path} has {len(tokens)} tokens, {len(scores)} scores and {len(types)} token types; "
            "their number must be the same"
        )
    types = np.array(types)
    if unknown_types := set(types.tolist()) - set(TOKEN_TYPES):
        raise ExportError(f"{path}: the token type {min(unknown_types)} does not exist; 1 to 6 do")
    types = np.array(token_types(tokens, types))
    pieces = Pieces([], strip_right(metadata, types.tolist()))
    if metadata.get("tokenizer.ggml.add_space_prefix", True) or pieces.rstrip:
        pieces.shown.extend(np.flatnonzero(types == USER_DEFINED).tolist())
        types[pieces.shown] = CONTROL
    ids = {role: special_id(metadata, role) for role in ROLES}
    ids = {role: -1 if token_id is None else token_id for role, token_id in ids.items()}
    for role, token_id in ids.items():
        if not -1 <= token_id < len(tokens):
            raise ExportError(
                f"{path}: the {role} id {token_id} is not one of {len(tokens)} tokens"
            )
    if ids["unk"] == -1:
        raise ExportError(
            f"{path} has no tokenizer.ggml.unknown_token_id, which SentencePiece needs"
        )
    # A token type has the same number in GGUF and in SentencePiece.
    # llama.cpp's converter turns <unk> into a control token; SentencePiece needs its own type.
    types[ids["unk"]] = UNKNOWN
    model = model_pb2.ModelProto()
    for token, score, token_type in zip(tokens, scores.tolist(), types.tolist(), strict=True):
        # llama.cpp's converter writes spaces into user-defined tokens (Gemma's runs of spaces);
        # SentencePiece looks for them in text that has its own mark in place of each space.
        piece = token.replace(" ", "\u2581") if token_type == USER_DEFINED else token
        model.pieces.add(piece=piece, score=score, type=token_type)
    trainer = model.trainer_spec
    trainer.model_type = model_pb2.TrainerSpec.BPE
    trainer.vocab_size = len(tokens)
    trainer.byte_fallback = bool(np.any(types == BYTE))
    for role, token_id in ids.items():
        setattr(trainer, f"{role}_id", token_id)
        if token_id >= 0:
            setattr(trainer, f"{role}_piece", tokens[token_id])
    normalizer = model.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    normalizer.escape_whitespaces = True
    return model.SerializeToString(deterministic=True), pieces


def _vocabulary_list(path: Path, metadata: dict[str, Any], key: str) -> list[str] | np.ndarray:
    if f"tokenizer.ggml.{key}" not in metadata:
        raise ExportError(f"{path} has no key tokenizer.ggml.{key}, which its tokenizer needs")
    return metadata[f"tokenizer.ggml.{key}"]
