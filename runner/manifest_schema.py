"""What may stand in a manifest: types, ranges, and what must agree with what.

docs/artifact.md has the keys' meanings. Anything else is a Fault, which names the key, its value
and what would be right.
"""

import reprlib
from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from tokenloop.runner.files import PLAIN_NAME, is_plain_name

# Backends of each engine.
BACKENDS = {
    "executorch": ("xnnpack", "portable", "cuda"),
    "inductor": ("inductor",),
    "launches": ("launches",),
}
DTYPE_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "float16": 2,
    "bfloat16": 2, "float32": 4, "float64": 8, "float8_e4m3fn": 1,
}  # fmt: skip
# The runner has a table of all positions.
MAX_POSITIONS = 2**24
MAX_INT = 2**31 - 1
MAX_DRAFTS = 1023
MAX_BYTES = 2**62


class Fault(ValueError):
    """A value that is not what it must be, in words."""


class Missing:
    """What stands for the value of a key that is not there."""

    def __repr__(self) -> str:
        return "missing"


class Rule(NamedTuple):
    """What a value must be, in words, and whether it is."""

    text: str
    holds: Callable[[Any], bool]


class Maybe(NamedTuple):
    """An object's entry that need not be there."""

    rule: Any


class Named(NamedTuple):
    """An object with any names, and the rule of each of its values."""

    rule: Any


def integer(low: int, high: int) -> Rule:
    text = f"an integer of {low} to {high}"
    return Rule(text, lambda x: isinstance(x, int) and not isinstance(x, bool) and low <= x <= high)


def one_of(*names: str) -> Rule:
    *others, last = names
    text = f"{', '.join(others)} or {last}" if others else last
    return Rule(text, lambda x: isinstance(x, str) and x in names)


def or_null(rule: Rule) -> Rule:
    return Rule(f"{rule.text}, or null", lambda x: x is None or rule.holds(x))


def up_to_8(rule: Rule) -> Rule:
    return Rule(
        f"a list of at most 8, each {rule.text}",
        lambda x: isinstance(x, list) and len(x) <= 8 and all(map(rule.holds, x)),
    )


def is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


def is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value.isprintable()


MISSING = Missing()
TEXT = Rule("a string", lambda x: isinstance(x, str))
NAME = Rule("a name", is_name)
FILE = Rule(PLAIN_NAME, is_plain_name)
SHA256 = Rule("a sha256 of 64 hexadecimal digits", is_sha256)
STEP = integer(0, MAX_BYTES)
SIZES = up_to_8(STEP)
TENSOR = {"name": NAME, "shape": SIZES, "dtype": one_of(*DTYPE_BYTES)}
PLACE = {"of": NAME, "arena": STEP, "offset": STEP, "shape": SIZES, "stride": SIZES}
TOKEN = integer(0, MAX_INT)
VIEWS = Named({"of": NAME, "offset": STEP, "shape": SIZES, "stride": SIZES})

# A list with one rule is a list of any length.
COMMON = {
    "format": integer(0, MAX_INT),
    "sha256": SHA256,
    "files": Named({"bytes": integer(0, MAX_BYTES), "sha256": SHA256}),
    "engine": one_of(*BACKENDS),
    "backend": NAME,
    "device": one_of("cpu", "cuda"),
    "methods": [NAME],
    "dtype": one_of(*DTYPE_BYTES),
    "state": [TENSOR],
    "model_type": NAME,
    "batch": integer(1, 2**20),
    "max_seq_len": integer(2, MAX_POSITIONS),
    "max_prefill": integer(1, MAX_INT),
    "vocab_size": integer(1, MAX_INT),
    "hidden_size": integer(1, MAX_INT),
    "quant": NAME,
    "tokenizer": {
        "file": Rule(
            "tokenizer.model or tokenizer.json, or another plain name that ends so",
            lambda x: is_plain_name(x) and x.endswith((".model", ".json")),
        ),
        "bos_token_id": or_null(TOKEN),
        "eos_token_ids": [TOKEN],
        "prefix_ids": [TOKEN],
        "suffix_ids": [TOKEN],
        "shown_ids": [TOKEN],
        "rstrip_ids": [TOKEN],
        "special_tokens": Named(TEXT),
        "chat_template": or_null(FILE),
        "tool_template": or_null(FILE),
    },
    "program": {"file": FILE},
    "checkpoint": {"file": TEXT, "sha256": SHA256},
    "versions": Named(or_null(TEXT)),
}
WEIGHTS = {"file": Maybe(FILE), "random": Maybe([TENSOR]), "views": VIEWS}
RANKS = {"ranks": integer(2, 2**10), "sharded": [NAME]}
MAILBOX = {"slots": integer(1, 2**16), "slot_bytes": integer(1, 2**24)}
OF_ENGINE = {
    "executorch": {
        "processor": Maybe(NAME),
        "weights": Maybe({"file": FILE}),
        "state_places": Maybe([PLACE]),
        "pooled_size": Maybe(integer(1, MAX_INT)),
    },
    "inductor": {
        "processor": NAME,
        "weights": WEIGHTS,
        "versions": {"torch": TEXT},
        "tensor_parallel": Maybe(RANKS),
    },
    "launches": {
        "processor": NAME,
        "weights": WEIGHTS,
        "waiting_kernels": [NAME],
        "chunk_multiple": integer(1, MAX_INT),
        "draft_tokens": Maybe(integer(1, MAX_DRAFTS)),
        "tensor_parallel": Maybe(RANKS | {"mailboxes": {"exchange": MAILBOX, "sums": MAILBOX}}),
    },
}
NEEDED_METHODS = {
    "executorch": {"prefill", "decode", "greedy"},
    "inductor": {"prefill", "embed", "decode_embedded", "greedy"},
    "launches": {"embed", "decode_embedded", "greedy", "greedy_embed", "next_positions"},
}


def check_manifest(manifest: dict[str, Any]) -> None:
    """Errors: Fault for the first value that is not what it must be."""
    _check("engine", manifest.get("engine", MISSING), COMMON["engine"])
    own = OF_ENGINE[manifest["engine"]]
    _check("", manifest, COMMON | own | {"versions": COMMON["versions"]})
    for name, rule in own.get("versions", {}).items():
        _check(f"versions.{name}", manifest["versions"].get(name, MISSING), rule)
    _check("backend", manifest["backend"], one_of(*BACKENDS[manifest["engine"]]))
    _check_tokens(manifest)
    _check_methods(manifest)
    _check_files(manifest)
    _check_tensors(manifest)
    if "state_places" in manifest:
        _check_places(manifest)


def draft_methods(manifest: dict[str, Any]) -> set[str]:
    """The methods that an artifact with `draft_tokens` has besides, of those that it cannot do
    without."""
    if "draft_tokens" not in manifest:
        return set()
    rows = 1 + manifest["draft_tokens"]
    return {"round_1", "accept_1", f"round_{rows}", f"accept_{rows}", "greedy_round"}


def named_files(manifest: dict[str, Any]) -> dict[str, str]:
    """The files that a checked manifest names, by the key that names them."""
    tokenizer, weights = manifest["tokenizer"], manifest.get("weights", {})
    names = {
        "program.file": manifest["program"]["file"],
        "weights.file": weights.get("file"),
        "tokenizer.file": tokenizer["file"],
        "tokenizer.chat_template": tokenizer["chat_template"],
        "tokenizer.tool_template": tokenizer["tool_template"],
    }
    return {key: name for key, name in names.items() if name is not None}


def _fault(where: str, value: Any, right: str) -> Fault:
    shown = reprlib.Repr()
    shown.maxstring = shown.maxother = 80
    shown.maxlevel = 2
    return Fault(f"{where} is {shown.repr(value)}; it must be {right}")


def _check(where: str, value: Any, rule: Any) -> None:
    """Errors: Fault for a value, found under the key `where`, that does not follow the rule."""
    if isinstance(rule, Rule):
        if not rule.holds(value):
            raise _fault(where, value, rule.text)
    elif isinstance(rule, list):
        if not isinstance(value, list):
            raise _fault(where, value, "a list")
        for i, item in enumerate(value):
            _check(f"{where}[{i}]", item, rule[0])
    elif not isinstance(value, dict):
        raise _fault(where, value, "an object")
    elif isinstance(rule, Named):
        for name, item in value.items():
            if not is_name(name):
                raise _fault(f"a key of {where}", name, NAME.text)
            _check(f"{where}.{name}", item, rule.rule)
    else:
        prefix = f"{where}." if where else ""
        for name in value:
            if name not in rule:
                raise _fault(f"a key of {where or 'the manifest'}", name, f"one of {_list(rule)}")
        for name, item in rule.items():
            if not isinstance(item, Maybe):
                _check(prefix + name, value.get(name, MISSING), item)
            elif name in value:
                _check(prefix + name, value[name], item.rule)


def _check_places(manifest: dict[str, Any]) -> None:
    """What lies in several places is the whole tensor, one behind the other along axis 1."""
    whole = {tensor["name"]: tensor["shape"] for tensor in manifest["state"]}
    slots: dict[str, int] = {}
    for i, place in enumerate(manifest["state_places"]):
        where, shape = f"state_places[{i}]", place["shape"]
        if place["of"] not in whole:
            raise _fault(f"{where}.of", place["of"], "the name of a tensor of the state")
        right = whole[place["of"]]
        if (
            len(shape) != len(right)
            or len(shape) < 2
            or shape[:1] + shape[2:] != right[:1] + right[2:]
        ):
            raise _fault(f"{where}.shape", shape, f"{right}, or a part along axis 1")
        if len(place["stride"]) != len(shape):
            raise _fault(f"{where}.stride", place["stride"], f"a list of {len(shape)}")
        slots[place["of"]] = slots.get(place["of"], 0) + shape[1]
    for name, shape in whole.items():
        if len(shape) < 2 or slots.get(name) != shape[1]:
            text = f"places of all of {name} along axis 1, whose shape is {shape}"
            raise _fault("state_places", slots.get(name, 0), text)


def _list(names: Any) -> str:
    return ", ".join(sorted(names))


def _check_tokens(manifest: dict[str, Any]) -> None:
    tokenizer, right = manifest["tokenizer"], f"below vocab_size, {manifest['vocab_size']}"
    bos = tokenizer["bos_token_id"]
    if bos is not None and bos >= manifest["vocab_size"]:
        raise _fault("tokenizer.bos_token_id", bos, right)
    for key in ("eos_token_ids", "prefix_ids", "suffix_ids"):
        for i, token_id in enumerate(tokenizer[key]):
            if token_id >= manifest["vocab_size"]:
                raise _fault(f"tokenizer.{key}[{i}]", token_id, right)


def _check_methods(manifest: dict[str, Any]) -> None:
    methods, engine = manifest["methods"], manifest["engine"]
    needed = NEEDED_METHODS[engine] | ({"greedy_row"} if manifest["batch"] > 1 else set())
    if engine == "launches":
        needed = needed | {f"prefill_{manifest['max_prefill']}"} | draft_methods(manifest)
        if "draft_tokens" in manifest and manifest["batch"] > 1:
            raise _fault("batch", manifest["batch"], "1 where there are draft_tokens")
        if manifest["max_prefill"] % manifest["chunk_multiple"]:
            right = f"a divisor of max_prefill, {manifest['max_prefill']}"
            raise _fault("chunk_multiple", manifest["chunk_multiple"], right)
    if len(set(methods)) < len(methods) or needed - set(methods):
        raise _fault("methods", methods, f"different names with {_list(needed)} among them")


def _check_files(manifest: dict[str, Any]) -> None:
    named = named_files(manifest)
    if set(manifest["files"]) != set(named.values()):
        right = f"an object of the files that the manifest names: {_list(set(named.values()))}"
        raise _fault("files", manifest["files"], right)
    if len(set(named.values())) < len(named):
        raise _fault("files", manifest["files"], "an object with a file for each purpose")


def _check_tensors(manifest: dict[str, Any]) -> None:
    weights = manifest.get("weights", {})
    if "weights" in manifest and ("file" in weights) == ("random" in weights):
        raise _fault("weights", weights, "an object with either file or random")
    whole: dict[str, int] = {}
    for key, tensors in ("state", manifest["state"]), ("weights.random", weights.get("random", [])):
        for i, tensor in enumerate(tensors):
            if tensor["name"] in whole:
                raise _fault(f"{key}[{i}].name", tensor["name"], "another name than all before it")
            whole[tensor["name"]] = prod(tensor["shape"])
            if whole[tensor["name"]] > MAX_BYTES // DTYPE_BYTES[tensor["dtype"]]:
                raise _fault(f"{key}[{i}].shape", tensor["shape"], f"of {MAX_BYTES} bytes at most")
    for name, view in weights.get("views", {}).items():
        where, shape, stride = f"weights.views.{name}", view["shape"], view["stride"]
        if len(shape) != len(stride):
            raise _fault(f"{where}.stride", stride, f"a list of {len(shape)}, as the shape is")
        # Those in a file are looked up when it is read.
        if "random" in weights and view["of"] not in whole:
            raise _fault(f"{where}.of", view["of"], "the name of a tensor of weights or state")
        last = view["offset"] + sum((n - 1) * step for n, step in zip(shape, stride))
        if view["of"] in whole and 0 not in shape and last >= whole[view["of"]]:
            numbers = whole[view["of"]]
            raise _fault(where, view, f"within the {numbers} numbers of {view['of']}")
