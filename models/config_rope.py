"""Reading a config.json's rotary embedding, under the names of transformers 4 and 5."""

from collections.abc import Collection, Mapping
from typing import Any

from tokenloop.models.config_fields import LAYER_TYPES, shown
from tokenloop.models.layers import RopeConfig
from tokenloop.models.rope_scaling import (
    DynamicNtkScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    longrope_attention_factor,
    yarn_attention_factor,
)

ORIGINAL = "original_max_position_embeddings"


def rope_entry(config: Mapping[str, Any]) -> dict[str, Any]:
    """The rotary embedding's fields of a model with one: those of transformers 4 (rope_theta,
    rope_scaling) and those of transformers 5 (rope_parameters), which win over fields beside them.

    Raises ValueError for a rope_scaling that changes what rope_parameters say, because transformers
    reads rope_scaling alone, for entries for each type of layer, and for another
    original_max_position_embeddings beside them.
    """
    own = {key: config[key] for key in ("rope_theta", "partial_rotary_factor") if key in config}
    scaling, parameters = _renamed(config.get("rope_scaling")), config.get("rope_parameters") or {}
    if types := [name for name in LAYER_TYPES if name in parameters or name in scaling]:
        raise ValueError(
            f"rope_parameters has an entry for {types[0]}: one for all layers is right"
        )
    entry = own | scaling | _renamed(parameters)
    if scaling and parameters and entry != own | scaling:
        raise _differ(scaling, parameters)
    if ORIGINAL in entry and config.get(ORIGINAL) not in (None, entry[ORIGINAL]):
        raise ValueError(
            f"{ORIGINAL} = {config[ORIGINAL]} and the rotary embedding's {entry[ORIGINAL]} differ"
        )
    return completed(entry, config)


def merged(scaling: Mapping[str, Any] | None, parameters: Mapping[str, Any] | None) -> dict:
    """The fields of rope_scaling and of an entry of rope_parameters. Raises ValueError where a
    field of the first is another in the second: transformers would take one of them."""
    scaling, parameters = _renamed(scaling), _renamed(parameters)
    if parameters and any(parameters.get(key) != value for key, value in scaling.items()):
        raise _differ(scaling, parameters)
    return scaling | parameters


def _renamed(entry: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entry, whose `type` is its rope_type."""
    entry = dict(entry or {})
    kind = entry.pop("type", None)
    return ({} if kind is None else {"rope_type": kind}) | entry


def _differ(scaling: Mapping[str, Any], parameters: Mapping[str, Any]) -> ValueError:
    return ValueError(
        f"rope_scaling = {shown(scaling)} and rope_parameters = {shown(parameters)} differ: keep "
        "one of them"
    )


def completed(entry: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with what its scaling takes from the rest of the config, as in transformers: the
    original length is the config's, or its max_position_embeddings. LongRoPE's factor is their
    ratio."""
    entry, positions = dict(entry), config["max_position_embeddings"]
    kind = entry.get("rope_type")
    if kind in ("llama3", "yarn", "longrope") and entry.get(ORIGINAL) is None:
        entry[ORIGINAL] = config.get(ORIGINAL) or positions
    if kind == "longrope" and entry.get("factor") is None:
        entry["factor"] = positions / entry[ORIGINAL]
    if kind == "dynamic":
        entry["max_position_embeddings"] = positions
    return entry


def reaching(config: dict[str, Any], rope: RopeConfig) -> dict[str, Any]:
    """The config, whose max_position_embeddings are those that YaRN extends it to."""
    positions = config["max_position_embeddings"]
    if isinstance(scaling := rope.scaling, YarnScaling):
        positions = max(positions, int(scaling.factor * scaling.original_max_position_embeddings))
    return config | {"max_position_embeddings": positions}


# What each rope_type needs besides rope_theta.
NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": ("factor", ORIGINAL),
    "longrope": ("short_factor", "long_factor", ORIGINAL),
    "proportional": (),
    "factors": ("factors",),
}
ROPE_TYPES = "default", "linear", "dynamic", "llama3", "yarn", "longrope"


def rope(
    entry: Mapping[str, Any], supported: Collection[str] = ROPE_TYPES, of: str = "",
    partial: bool = False,
) -> RopeConfig:  # fmt: skip
    """The rotary embedding that an entry of rope_parameters describes, `of` a layer type. The entry
    is `completed`.

    Raises ValueError for a rope_type that is not `supported`, for a missing number, for one that
    its rope_type does not scale by, and for a partial_rotary_factor where the network does not
    rotate a part of its heads, `partial`.
    """
    kind = entry.get("rope_type", entry.get("type", "default"))
    if kind not in supported:
        names = " or ".join(sorted(supported))
        raise ValueError(f"rope_type = {shown(kind)} is not supported: {names}")
    share = entry.get("partial_rotary_factor")
    share = 1.0 if share is None else share
    if share != 1.0 and not partial and kind != "proportional":
        raise ValueError(f"partial_rotary_factor = {share} is not supported: only 1.0")
    owner = f" of {of}" if of else ""
    for name in ("rope_theta", *NUMBERS[kind]):
        if not entry.get(name):
            raise ValueError(f"rope_type = {kind!r}{owner} lacks its {name}")
    if kind == "default" and entry.get("factor") not in (None, 1):
        raise ValueError(
            f"factor = {entry['factor']}{owner} has no rope_type: {' or '.join(ROPE_TYPES[1:])} is "
            "right beside it"
        )
    theta = entry["rope_theta"]
    if kind == "linear":
        return RopeConfig(theta, entry["factor"])
    if kind == "proportional":
        return RopeConfig(theta, entry.get("factor") or 1.0, share)
    if kind == "factors":
        return RopeConfig(theta, factors=tuple(entry["factors"]))
    scale = SCALINGS.get(kind)
    return RopeConfig(theta, scaling=None if scale is None else scale(entry, bool(of)))


def _llama3(entry: Mapping[str, Any], nested: bool) -> Llama3Scaling:
    low, high = entry["low_freq_factor"], entry["high_freq_factor"]
    if low >= high:
        raise ValueError(f"high_freq_factor = {high} must be above low_freq_factor = {low}")
    return Llama3Scaling(*(entry[name] for name in NUMBERS["llama3"]))


def _yarn(entry: Mapping[str, Any], nested: bool) -> YarnScaling:
    given = entry.get("attention_factor")
    if given is None:
        scales = entry.get("mscale"), entry.get("mscale_all_dim")
        given = yarn_attention_factor(entry["factor"], *scales)
    fast, slow = entry.get("beta_fast") or 32.0, entry.get("beta_slow") or 1.0
    if fast < slow:
        raise ValueError(f"beta_fast = {fast} must not be below beta_slow = {slow}")
    truncate = entry.get("truncate") is not False
    # transformers does not look for it there.
    if nested and not truncate:
        raise ValueError("truncate = False of one type of layer is not supported: only True")
    return YarnScaling(entry["factor"], entry[ORIGINAL], given, fast, slow, truncate)


def _longrope(entry: Mapping[str, Any], nested: bool) -> LongRopeScaling:
    given, original = entry.get("attention_factor"), entry[ORIGINAL]
    if given is None:
        given = longrope_attention_factor(entry["factor"], original)
    short, long = tuple(entry["short_factor"]), tuple(entry["long_factor"])
    return LongRopeScaling(short, long, original, given)


def _dynamic(entry: Mapping[str, Any], nested: bool) -> DynamicNtkScaling:
    return DynamicNtkScaling(entry["factor"], entry["max_position_embeddings"])


SCALINGS = {"llama3": _llama3, "yarn": _yarn, "longrope": _longrope, "dynamic": _dynamic}


def fitting(rope: RopeConfig, rotary_dim: int) -> RopeConfig:
    """The rotary embedding of heads of which `rotary_dim` elements rotate. Raises ValueError where
    it has a divisor for each pair, and another number of them."""
    divisors = {"factors": rope.factors}
    if isinstance(rope.scaling, LongRopeScaling):
        divisors = {name: getattr(rope.scaling, name) for name in ("short_factor", "long_factor")}
    for name, values in divisors.items():
        if values is not None and len(values) != rotary_dim // 2:
            raise ValueError(
                f"{name} of the rotary embedding has {len(values)} numbers; {rotary_dim // 2}, one "
                "for each pair of a head, are right"
            )
    return rope
