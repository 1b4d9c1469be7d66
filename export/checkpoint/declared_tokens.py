"""What the files beside a Hugging Face tokenizer say of its tokens, and adding those to it.

The precedence is that of transformers 5.24 (`_from_pretrained` in tokenization_utils_base.py, and
`TokenizersBackend.__init__`):

1. tokenizer_config.json has `added_tokens_decoder`. It is all there is: special_tokens_map.json and
   added_tokens.json are not looked at.
2. Otherwise special_tokens_map.json wins over tokenizer_config.json, and tokenizer.json's own added
   tokens over added_tokens.json.
3. `additional_special_tokens` counts where there is no `extra_special_tokens`, its newer name, and
   that of tokenizer_config.json before that of the map.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Tokenizer

from tokenloop.export.checkpoint.safetensors_directory import read_json
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import (
    FLAG,
    TEXT,
    TOKEN_ID,
    Kind,
    check_fields,
    either,
    list_of,
    shown,
)

IdOf = Callable[[str], int | None]
CONFIG, MAP, ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
# The special tokens that transformers has a name for, in its order.
ROLES = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# "__type" says no more than that it is one.
TOKEN_KEYS = {"content", "id", "__type", *FLAGS}


def _is_token(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return (
        isinstance(value, dict)
        and isinstance(value.get("content"), str)
        and value.keys() <= TOKEN_KEYS
        and all(isinstance(value.get(flag, False), bool) for flag in FLAGS)
    )


TOKEN = Kind(_is_token, "a string, or an object with one as its content")
TOKENS = list_of(TOKEN, "tokens, each a string or an object with one as its content")
NAMED_TOKENS = Kind(
    lambda value: isinstance(value, dict) and all(map(_is_token, value.values())),
    "an object of names and tokens",
)
DECODER = Kind(
    lambda value: (
        isinstance(value, dict)
        and all(key.isascii() and key.isdigit() and len(key) < 10 for key in value)
        and all(isinstance(token, dict) and _is_token(token) for token in value.values())
    ),
    "an object of ids, and tokens as objects",
)
KINDS = {
    **dict.fromkeys(ROLES, TOKEN),
    "additional_special_tokens": TOKENS,
    "extra_special_tokens": either(TOKENS, NAMED_TOKENS),
    "added_tokens_decoder": DECODER,
    "split_special_tokens": FLAG,
    "fast_tokenizer_files": list_of(TEXT, "files' names"),
}
IDS = Kind(
    lambda value: isinstance(value, dict) and all(map(TOKEN_ID.fits, value.values())),
    "an object of tokens and ids",
)


class DeclaredTokens(NamedTuple):
    """`roles` are the named special tokens, such as bos_token; `ids` the tokens that are said to
    have an id, in the order of the ids; `others` the special tokens without a name."""

    roles: dict[str, str | AddedToken]
    ids: dict[int, AddedToken]
    others: list[str | AddedToken]

    def texts(self) -> dict[str, str]:
        """The named tokens as text. An empty one is none."""
        return {role: _text(token) for role, token in self.roles.items() if _text(token)}


def declared_tokens(
    source: Path, settings: dict[str, Any], own: list[dict[str, Any]]
) -> DeclaredTokens:
    """Read the files. `settings` is tokenizer_config.json, whose values are of their KINDS, and
    `own` the added tokens of tokenizer.json. Errors: ExportError for a file that is damaged, or a
    value of the wrong type."""
    if settings.get("split_special_tokens"):
        raise ExportError(
            f"{source / CONFIG}: split_special_tokens is true, which is not supported; without it "
            "special tokens in a text become their ids"
        )
    for name in settings.get("fast_tokenizer_files") or []:
        if name != "tokenizer.json":
            raise ExportError(
                f"{source / CONFIG}: fast_tokenizer_files has {shown(name)}, which transformers "
                "would take instead of tokenizer.json; leave that key out, or put the file there"
            )
    # What tokenizer_config.json says under its own names goes before what is said elsewhere.
    own_names: dict[str, Any] = {}
    roles: dict[str, Any] = {}
    for key, value in settings.items():
        if _is_named(key, value):
            first = own_names if key not in ROLES and isinstance(value, str) else roles
            first[key] = _token(value)
    extra, additional = (settings.get(f"{name}_special_tokens") for name in ("extra", "additional"))
    listed = "extra_special_tokens" in settings
    if "additional_special_tokens" in settings and not extra:
        extra, additional, listed = additional, None, True
    if isinstance(extra, dict):
        own_names |= {name: _token(value) for name, value in extra.items()}
        extra, listed = None, False

    ids: dict[int, AddedToken] = {}
    # Null is nothing to go by, but neither is it absence: what stands there is all there is.
    if "added_tokens_decoder" in settings:
        for key, value in (settings["added_tokens_decoder"] or {}).items():
            ids[int(key)] = _added(value)
    else:
        mapped = _read(source / MAP, KINDS)
        for key, value in mapped.items():
            if _is_named(key, value):
                roles[key] = _token(value, special=True)
            elif value is None:
                roles.pop(key, None)
        additional = mapped.get("additional_special_tokens", additional)
        more = mapped.get("extra_special_tokens")
        if isinstance(more, dict):
            own_names |= {name: _token(value) for name, value in more.items()}
            extra, listed = None, False
        elif more is not None:
            known = set(map(_text, extra or []))
            extra = [*(extra or []), *(value for value in more if _text(value) not in known)]
            listed = True
        special = {_text(roles[role]) for role in ROLES if role in roles}
        special.update(map(_text, extra or []))
        for text, token_id in _read_ids(source / ADDED).items():
            is_special = text in special
            ids[token_id] = AddedToken(text, normalized=not is_special, special=is_special)
        for value in own:
            ids[value["id"]] = _added(value)
    by_text = {token.content: token for token in ids.values()}
    named = {role: by_text.get(_text(roles[role]), roles[role]) for role in ROLES if role in roles}
    others = (extra if listed else additional) or []
    return DeclaredTokens(
        named | roles | named | own_names, dict(sorted(ids.items())), [_token(t) for t in others]
    )


def all_tokens(declared: DeclaredTokens, known: set[str]) -> list[AddedToken]:
    """The tokens to add, in transformers' order: those that are said to have an id, then those that
    are neither among them nor `known` as added tokens."""
    found: list[str | AddedToken] = list(declared.ids.values())
    known = known | set(map(_text, found))
    for token in (*declared.roles.values(), *declared.others):
        # One with other flags is another one, and the last one's flags stay.
        if _text(token) not in known and token not in found:
            found.append(token)
    named = set(map(_text, declared.roles.values()))
    added = [
        AddedToken(token, special=True) if isinstance(token, str) else token for token in found
    ]
    for token in added:
        token.special = token.special or token.content in named
    return added


def add_tokens(tokenizer: Tokenizer, declared: DeclaredTokens) -> None:
    """Add the tokens to a tokenizer.json's tokenizer, as transformers does when it loads it."""
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens(all_tokens(declared, known))


def check_ends(path: Path, declared: DeclaredTokens, id_of: IdOf) -> None:
    """Errors: ExportError for a beginning or an end of texts that has a name and that no file has:
    it would be a new token, which the model never saw. `id_of` is that of the vocabulary at `path`,
    before anything is added."""
    said = {token.content for token in declared.ids.values()}
    for role in ("bos_token", "eos_token"):
        token = declared.texts().get(role)
        if token is not None and token not in said and id_of(token) is None:
            raise ExportError(
                f"{path.parent / CONFIG}: {role} is {shown(token)}, which is not in {path.name}"
            )


def check_ids(path: Path, declared: DeclaredTokens, id_of: IdOf) -> None:
    """Errors: ExportError for a token that has another id than the one that is said. `id_of` gives
    a token's id; `path` is the vocabulary's."""
    for token_id, token in declared.ids.items():
        if token.content and (found := id_of(token.content)) != token_id:
            raise ExportError(
                f"{path.parent}: the token {shown(token.content)} is said to have the id "
                f"{token_id}, and with {path.name} it has {found}; the files must agree"
            )


def _is_named(key: str, value: Any) -> bool:
    """Whether the entry is a special token with a name: any name may be one that ends so."""
    return key.endswith("_token") and _is_token(value)


def _token(value: str | dict[str, Any], special: bool | None = None) -> str | AddedToken:
    return value if isinstance(value, str) else _added(value, special)


def _added(value: dict[str, Any], special: bool | None = None) -> AddedToken:
    flags = {flag: value[flag] for flag in FLAGS if flag in value}
    return AddedToken(value["content"], **flags | ({} if special is None else {"special": special}))


def _text(token: str | AddedToken | dict[str, Any]) -> str:
    if isinstance(token, dict):
        return token["content"]
    return token if isinstance(token, str) else token.content


def _read(path: Path, kinds: dict[str, Kind]) -> dict[str, Any]:
    found = read_json(path) if path.is_file() else {}
    try:
        check_fields(found, kinds)
    except ValueError as error:
        raise ExportError(f"{path}: {error}") from error
    return found


def _read_ids(path: Path) -> dict[str, int]:
    found = read_json(path) if path.is_file() else {}
    if not IDS.fits(found):
        raise ExportError(f"{path} holds {shown(found)}; {IDS.right} is right")
    return found
