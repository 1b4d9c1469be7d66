"""What is asked for: a prompt, its limits, and how its tokens are chosen.

Imports no NumPy, so that run.py can answer a wrong flag at once.
"""

import math
import re
import reprlib
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, TypeAlias

from tokenloop.runner.conversation import Conversation, as_conversation
from tokenloop.runner.errors import RunnerError

Prompt: TypeAlias = str | list[int] | list[dict[str, Any]] | Conversation
FLOAT32_MAX = (2 - 2**-23) * 2.0**127
MOST_LOGPROBS = 20
MOST_BIASES = 1024


@dataclass(frozen=True)
class Request:
    """One prompt, and what to do with it: text, token ids, or a conversation, of which a list of
    messages ({"role": ..., "content": ...}) is the shortest form.

    Output ends at an end token, after `max_new_tokens`, when prompt and output fill the cache, or
    before the first of the texts `stop` (one text, or several). With `chat` a prompt of text is a
    user's message, put through the artifact's chat template.

    `temperature` 0 always takes the most likely token. Above 0 a token is drawn from
    softmax(logits / temperature). `top_k` restricts it to so many most likely tokens (0: to none),
    and `top_p` to the most likely of these that together have that probability (1: to none). A
    draw is determined by `seed` (int64), the position and the token id, and by nothing else.

    `logprobs` asks for the log probability of each token and of so many of the likeliest, and
    `prompt_logprobs` for those of the prompt's tokens, too. The prompt is then prefilled token by
    token, which takes as long as steps do, and may round otherwise than longer chunks. An artifact
    for a GPU gives none of the prompt's, and one of ExecuTorch's for CUDA none at all.

    `logit_bias` adds a number to the logits of tokens, by their ids. `repetition_penalty` r divides
    the logits of tokens of the prompt and the output by r, or multiplies those below 0 with it (1:
    as they are). Of tokens of the output `presence_penalty` is subtracted once, and
    `frequency_penalty` as often as they are there. Restriction has the formula, in which all of
    them go together. Log probabilities are those without any of this.

    With `json_schema`, a JSON schema, the output is JSON that fits it, unless it is cut short: at
    each step only tokens remain that can go on so. True asks for JSON of any kind. `grammar` is a
    grammar in llguidance's form of Lark, of which the same is true. Both need an artifact with an
    end token, and llguidance.

    `shown_tokens` are control tokens that are part of the output's text, such as those that a model
    writes around a call of a tool; others give no text.
    """

    prompt: Prompt
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    chat: bool = False
    logprobs: int | None = None
    prompt_logprobs: bool = False
    shown_tokens: tuple[str, ...] = ()
    logit_bias: dict[int, float] | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    json_schema: dict[str, Any] | bool | None = None
    grammar: str | None = None

    def __post_init__(self):
        if isinstance(self.stop, (str, list)):
            stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
            object.__setattr__(self, "stop", stop)

    def check(self) -> None:
        """Errors: RunnerError for a parameter outside its range, with its value."""
        for name, default in DEFAULTS.items():
            value = getattr(self, name)
            if value is not default and (fault := fault_of(name, value)):
                raise RunnerError(f"{name} is {value!r}; {fault}")
        if self.prompt_logprobs and self.logprobs is None:
            raise RunnerError("prompt_logprobs is True; logprobs must then be a number, 0 or more")
        if self.json_schema is not None and self.grammar is not None:
            raise RunnerError("json_schema and grammar are given: give one")

    @property
    def adjusts(self) -> list[str]:
        """The names of the penalties and biases that are asked for."""
        return [name for name, idle in IDLE.items() if (getattr(self, name) or 0) != idle]

    @property
    def masks(self) -> list[str]:
        """The name of what is asked for that says which tokens may come next, if anything is."""
        return [name for name in MASKING if getattr(self, name) is not None]

    def conversation(self) -> Conversation | None:
        """What is put through the chat template, if anything is."""
        if self.chat and isinstance(self.prompt, str):
            return Conversation([{"role": "user", "content": self.prompt}])
        return as_conversation(self.prompt)

    def prompt_as_json(self) -> Any:
        """The prompt as JSON has it: text, or a list of ids or messages."""
        found = as_conversation(self.prompt)
        return self.prompt if found is None else found.messages


def fault_of(name: str, value: Any) -> str | None:
    """What the parameter `name` of a Request must be, if `value` is not that."""
    holds, rule = RULES[name]
    return None if holds(value) else rule


def is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # An integer, or a fraction, beyond all floats.
        return False


def is_id(text: str) -> bool:
    """Whether it is a token id as JSON has it for a key: decimal, without zeros before it, so that
    no two texts are one id. Python takes other digits for decimal ones, and no more than 4300."""
    return re.fullmatch("0|[1-9][0-9]{0,18}", text) is not None


def shown(value: Any) -> str:
    """A value of the wrong type, for an error: what it is, if that is short, and its type."""
    return f"{' '.join(reprlib.repr(value).split())}, of type {type(value).__name__}"


def is_bias(value: Any) -> bool:
    """Whether it is a dictionary of numbers by token ids."""
    return (
        isinstance(value, dict)
        and len(value) <= MOST_BIASES
        and all(is_integer(i) and i >= 0 for i in value)
        and all(is_number(b) and abs(b) <= FLOAT32_MAX for b in value.values())
    )


# What changes logits, with the values that change nothing; None is 0. And what masks them.
IDLE = {
    "logit_bias": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0,
}  # fmt: skip
MASKING = "json_schema", "grammar"
PENALTY = (
    lambda x: is_number(x) and abs(x) <= FLOAT32_MAX,
    "it must be a finite number, 0 for none",
)
RULES = {
    "max_new_tokens": (lambda x: is_integer(x) and x >= 1, "it must be at least 1"),
    "temperature": (
        lambda x: is_number(x) and 0 <= x <= FLOAT32_MAX,
        "it must be a finite number, 0 (greedy) or more",
    ),
    "top_k": (
        lambda x: is_integer(x) and 0 <= x < 2**63,
        "it must be an integer, 0 (off) or more, below 2**63",
    ),
    "top_p": (lambda x: is_number(x) and 0 < x <= 1, "it must be above 0 and at most 1 (off)"),
    "seed": (
        lambda x: is_integer(x) and -(2**63) <= x < 2**63,
        "it must be an integer of 64 bits, -2**63 to 2**63 - 1",
    ),
    "stop": (
        lambda x: isinstance(x, (tuple, list)) and all(isinstance(s, str) and s for s in x),
        "each must be a text of at least one character",
    ),
    "chat": (lambda x: isinstance(x, bool), "it must be True or False"),
    "logprobs": (
        lambda x: x is None or (is_integer(x) and 0 <= x <= MOST_LOGPROBS),
        f"it must be 0 to {MOST_LOGPROBS}, or None",
    ),
    "prompt_logprobs": (lambda x: isinstance(x, bool), "it must be True or False"),
    "shown_tokens": (
        lambda x: isinstance(x, tuple) and all(isinstance(s, str) for s in x),
        "it must be a tuple of tokens, each a text",
    ),
    "logit_bias": (
        lambda x: x is None or is_bias(x),
        f"it must be a finite number for each of at most {MOST_BIASES} token ids, or None",
    ),
    "repetition_penalty": (
        lambda x: is_number(x) and 2.0**-126 <= x <= FLOAT32_MAX,
        "it must be a finite number above 0, 1 for none",
    ),
    "presence_penalty": PENALTY,
    "frequency_penalty": PENALTY,
    "json_schema": (
        lambda x: x is None or isinstance(x, (dict, bool)),
        "it must be a JSON schema, an object or True, or None",
    ),
    "grammar": (lambda x: x is None or isinstance(x, str), "it must be a text, or None"),
}
DEFAULTS = {field.name: field.default for field in fields(Request) if field.name in RULES}
