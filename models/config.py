"""Reading a Hugging Face config.json: defaults, refusals and layer types.

Each family says what its fields are. What can be wrong with a field is said here, once. Types and
ranges are in models/config_fields.py, and the rotary embedding in models/config_rope.py.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from tokenloop.models.config_fields import check, check_products, shown
from tokenloop.models.config_rope import ROPE_TYPES as ROPE_TYPES
from tokenloop.models.config_rope import completed as completed
from tokenloop.models.config_rope import fitting as fitting
from tokenloop.models.config_rope import merged as merged
from tokenloop.models.config_rope import reaching as reaching
from tokenloop.models.config_rope import rope as rope
from tokenloop.models.config_rope import rope_entry as rope_entry

# What transformers reads in any config, and no network here has another value of.
EVERYWHERE = {"is_causal": True, "is_encoder_decoder": False}


def read(
    config: Mapping[str, Any], *, defaults: Mapping[str, Any], only: Mapping[str, Any],
    needed: Iterable[str],
    multiples: Iterable[tuple[str, str]] = (("num_attention_heads", "num_key_value_heads"),),
) -> dict[str, Any]:  # fmt: skip
    """The config over its `defaults`, checked: every field that is known is of its kind.

    `only` has the value of each field for which no other is implemented, besides EVERYWHERE. A null
    is the same as that value, and so is any empty value if that is empty. `needed` fields must not
    be null. The first of each pair in `multiples` is a multiple of the second.

    Raises ValueError naming the field, its value and what would be right.
    """
    check(config)
    config = {**defaults, **config}
    for key, supported in (EVERYWHERE | dict(only)).items():
        value = config.get(key)
        if value is not None and value != supported and (value or supported):
            raise ValueError(f"{key} = {shown(value)} is not supported: only {supported!r}")
    if missing := [key for key in needed if config.get(key) is None]:
        raise ValueError(f"the checkpoint's config lacks {', '.join(missing)}")
    for many, few in multiples:
        if not config[few] or config[many] % config[few]:
            raise ValueError(f"{many} = {config[many]} is not a multiple of {few} = {config[few]}")
    check_products(config)
    return config


def rotated(name: str, size: int) -> int:
    """The size of a head, or of its part that rotates. Raises ValueError for one that is not made
    of pairs."""
    if size < 2 or size % 2:
        raise ValueError(f"{name} = {size}: an even number is right, for pairs rotate")
    return size


def with_heads(config: dict[str, Any]) -> dict[str, Any]:
    """The config, checked, with num_key_value_heads and head_dim filled in where they are missing.
    Key/value heads are as many as query heads, and head_dim is what the hidden size leaves to each.

    Raises ValueError as `read`, and for a hidden size that heads do not divide.
    """
    check(config)
    heads, size = config.get("num_attention_heads"), config.get("hidden_size")
    if config.get("head_dim") is None and size and heads and size % heads:
        raise ValueError(
            f"hidden_size = {size} is not a multiple of num_attention_heads = {heads}, and "
            "head_dim is not given"
        )
    own = {"num_key_value_heads": heads, "head_dim": size // heads if size and heads else None}
    return config | {key: value for key, value in own.items() if config.get(key) is None}


def known_type(config: Mapping[str, Any], known: Collection[str]) -> str:
    """The config's model_type. Raises ValueError for one that is not `known`."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in known:
        raise ValueError(f"model_type = {shown(model_type)} is none of {', '.join(known)}")
    return model_type


def one_of(config: Mapping[str, Any], name: str, other: str) -> None:
    """Raises ValueError for a config that has both of two names of a field, with two values."""
    values = config.get(name), config.get(other)
    if None not in values and values[0] != values[1]:
        raise ValueError(f"{name} = {shown(values[0])} and {other} = {shown(values[1])} differ")


def layer_types(config: Mapping[str, Any], usual: str, interval: int) -> tuple[str, ...]:
    """Each layer's type as `layer_types` lists them. Without a list every `interval`-th layer is
    full_attention and the others are `usual`.

    Raises ValueError for a list of another length, or with a type that is neither.
    """
    count, full = config["num_hidden_layers"], "full_attention"
    types = config.get("layer_types") or [
        usual if (i + 1) % interval else full for i in range(count)
    ]
    unknown = set(types) - {usual, full}
    if unknown or len(types) != count:
        raise ValueError(
            f"layer_types has {len(types)} entries for {count} layers"
            + (f" and unknown kinds {shown(sorted(unknown))}" if unknown else "")
        )
    return tuple(types)
