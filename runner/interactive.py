"""A chat in the terminal: `tokenloop run --interactive`."""

import sys
from dataclasses import replace

from tokenloop.runner import process
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.loop import LoopOptions
from tokenloop.runner.model import Model
from tokenloop.runner.output import put
from tokenloop.runner.request import Request

ASK, ANEW = "> ", "/new"


def chat(model: Model, request: Request, options: LoopOptions, system: str | None) -> int:
    """Answer lines of standard input until it ends, each with all before it; the exit status.

    A chat begins with the `system` message, if there is one. `request` says how tokens are chosen,
    and how many at most in each answer. An interrupt ends an answer, and where a line is awaited
    the chat. The line ANEW begins another one.

    Errors: RunnerError for an artifact without a chat template, and a chat that does not fit.
    """
    if sys.stdin is None:
        raise RunnerError("standard input is closed, and --interactive reads it")
    # As prompts are read elsewhere; what is no UTF-8 is refused when it is encoded.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
    if sys.stdin.isatty():
        # Lines can be edited, and recalled.
        import readline  # noqa: F401

        process.say(f"{ANEW} begins a new chat, Ctrl-C ends an answer, Ctrl-D the chat")
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = list(first)
    while (line := next_line()) is not None:
        if line == ANEW:
            messages = list(first)
        elif line.strip():
            messages.append({"role": "user", "content": line})
            text = answer(model, replace(request, prompt=list(messages)), options)
            messages.append({"role": "assistant", "content": text})
    return 0


def next_line() -> str | None:
    """The next line, or None at the end of them all."""
    try:
        return input(ASK if sys.stdin.isatty() else "")
    except EOFError:
        if sys.stdin.isatty():
            put("\n")
        return None


def answer(model: Model, request: Request, options: LoopOptions) -> str:
    """Print an answer as it comes; what it says until its end, or until an interrupt."""
    generation = model.generate(request, options=options)
    try:
        with process.InterruptsRaised():
            for token in generation:
                put(token.text)
    except KeyboardInterrupt:
        generation.cancel()
    put("\n")
    return generation.text
