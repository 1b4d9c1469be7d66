"""Grammars over an artifact's vocabulary: which tokens may come next (llguidance)."""

import json
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.request import Request
from tokenloop.runner.tokenizer import Tokenizer

# Between JSON's tokens a space, or a line break and an indentation: a model that likes white space
# cannot write it without end.
WHITE_SPACE = r" ?|\n {0,32}"
JSON_FAULT = "failed to compile JSON schema: "
# So many grammars are kept as they are compiled.
KEPT = 64
# llguidance compiles rules within rules as deep as they are, and a stack that is used up ends the
# process. It takes 65,000 rules at most. Of this memory only what is used is taken.
STACK_BYTES = 1 << 30
STACK_LOCK = threading.Lock()


def json_rule(schema: dict | bool) -> str:
    """The right side of a rule, in llguidance's Lark, for JSON that fits a schema."""
    # A schema that is true or false is one of these two objects.
    found = schema if isinstance(schema, dict) else ({} if schema else {"enum": []})
    return "%json " + json.dumps(found | {"x-guidance": {"whitespace_pattern": WHITE_SPACE}})


def grammar_of(request: Request) -> str | None:
    """What a request's output must follow, in llguidance's Lark, if anything."""
    if request.json_schema is not None:
        return f"start: value\nvalue: {json_rule(request.json_schema)}\n"
    return request.grammar


class Grammars:
    """Compiles grammars for one tokenizer. The vocabulary is read when the first one asks for it,
    which takes a second for 262,144 tokens. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        """`vocab_size` is the network's: what the tokenizer has beyond it never comes."""
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._lock = threading.Lock()
        self._vocabulary: Any = None
        # By the grammar's text, those that were asked for last at the end.
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def matcher(self, request: Request) -> Any:
        """What follows one output of the request, an llguidance.LLMatcher; None for any output.

        Errors: RunnerError where llguidance is not installed, for a grammar or schema that is wrong
        or has what llguidance does not know, and for an artifact without an end token.
        """
        text = grammar_of(request)
        if text is None:
            return None
        with self._lock:
            if text in self._compiled:
                self._compiled.move_to_end(text)
                return self._compiled[text].deep_copy()
        name = "grammar" if request.json_schema is None else "json_schema"
        try:
            from llguidance import LLMatcher
        except ImportError:
            raise RunnerError(
                f"{name} needs llguidance, which is not installed: pip install 'tokenloop[serve]'"
            ) from None
        if not self._tokenizer.eos_token_ids:
            raise RunnerError(f"{name} is given, and this artifact has no token that ends a text")
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = read_vocabulary(self._tokenizer, self._vocab_size)
        matcher = with_deep_stack(lambda: LLMatcher(self._vocabulary, text, log_level=0))
        if matcher.is_error():
            raise RunnerError(f"{name} cannot be followed: {reason_of(matcher.get_error())}")
        with self._lock:
            self._compiled[text] = matcher
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return matcher.deep_copy()


def with_deep_stack(work: Callable[[], Any]) -> Any:
    """What `work` gives, in a thread whose stack has STACK_BYTES. Errors: those of `work`, and
    RunnerError where there is no such thread to be had."""
    done: Future[Any] = Future()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    # The size is that of all threads which begin from now on.
    with STACK_LOCK:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="tokenloop grammar", daemon=True).start()
        except RuntimeError:
            raise RunnerError("a grammar cannot be compiled: there is no memory for it") from None
        finally:
            threading.stack_size(before)
    return done.result()


def reason_of(error: str) -> str:
    """The reason in an error of llguidance's, which goes on with the place in the grammar."""
    line = error.strip().splitlines()[0] if error.strip() else "no reason is given"
    return line.partition(JSON_FAULT)[2] or line


def read_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Any:
    """An llguidance.LLTokenizer of the bytes that ids have in the middle of a text. Those that give
    no text are control tokens to it, which no grammar allows but the ends of an output."""
    from llguidance import LLTokenizer, TokenizerWrapper

    class Vocabulary:
        eos_token_id = tokenizer.eos_token_ids[0]
        bos_token_id = None
        tokens = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        special_token_ids = [i for i, data in enumerate(tokens) if data is None]

        def __call__(self, text: bytes | str) -> list[int]:
            # For what is certain to come, which the loop does not ask for.
            text = text.decode(errors="replace") if isinstance(text, bytes) else text
            return tokenizer.encode(text, add_special_tokens=False)

    vocabulary = Vocabulary()
    # llguidance marks control tokens by a byte that no text has.
    vocabulary.tokens = [
        b"\xff[%d]" % i if data is None else data for i, data in enumerate(vocabulary.tokens)
    ]
    return LLTokenizer(
        TokenizerWrapper(vocabulary), n_vocab=vocab_size, eos_token=list(tokenizer.eos_token_ids)
    )
