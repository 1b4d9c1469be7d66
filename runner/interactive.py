"""A chat in the terminal: `tokenloop run --interactive`."""

import sys
from contextlib import nullcontext
from dataclasses import replace

from tokenloop.runner import process
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.loop import LoopOptions
from tokenloop.runner.model import Model
from tokenloop.runner.output import put
from tokenloop.runner.prompts import MOST_BYTES, text_of
from tokenloop.runner.ranks import LostRank
from tokenloop.runner.request import Request

ASK, ANEW = "> ", "/new"


def chat(model: Model, request: Request, options: LoopOptions, system: str | None) -> int:
    """Answer lines of standard input until it ends, each with all before it; the exit status.

    A chat begins with the `system` message, if there is one. `request` says how tokens are chosen,
    and how many at most in each answer. An interrupt ends an answer, and where a line is awaited
    the chat. Of several ranks it ends the chat, for torchrun has it as well and ends them. The line
    ANEW begins another one.

    Errors: RunnerError for an artifact without a chat template, and for a line that is no UTF-8 or
    makes the chat too long. In a terminal that line is taken back and the chat goes on.
    """
    if sys.stdin is None:
        raise RunnerError("standard input is closed, and --interactive reads it")
    # As prompts are read elsewhere; what is no UTF-8 is refused when it is asked.
    sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    in_terminal = sys.stdin.isatty()
    if in_terminal:
        # Lines can be edited, and recalled.
        import readline  # noqa: F401

        process.say(f"{ANEW} begins a new chat, Ctrl-C ends an answer, Ctrl-D the chat")
    first = [] if system is None else [{"role": "system", "content": system}]
    messages = list(first)
    while (line := next_line(in_terminal)) is not None:
        if line.strip() == ANEW:
            messages = list(first)
        elif line.strip():
            try:
                text = text_of(line.encode("utf-8", "surrogateescape"), "what was asked")
                asked = [*messages, {"role": "user", "content": text}]
                said = answer(model, replace(request, prompt=asked), options)
            except RunnerError as error:
                if not in_terminal or isinstance(error, LostRank):
                    raise
                process.say(f"error: {error} ({ANEW} begins a new chat)")
                continue
            messages = [*asked, {"role": "assistant", "content": said}]
    return 0


def next_line(in_terminal: bool) -> str | None:
    """The next line, or None at the end of them all."""
    if not in_terminal:
        line = sys.stdin.readline(MOST_BYTES)
        if len(line) == MOST_BYTES:
            raise RunnerError(f"a line of standard input has no end in {MOST_BYTES >> 20} MiB")
        return line.removesuffix("\n") if line else None
    try:
        return input(ASK)
    except EOFError:
        put("\n")
        return None


def answer(model: Model, request: Request, options: LoopOptions) -> str:
    """Print an answer as it comes; what it says until its end, or until an interrupt."""
    generation = model.generate(request, options=options)
    alone = model.loop.program.ranks is None
    try:
        with process.InterruptsRaised() if alone else nullcontext():
            for token in generation:
                put(token.text)
    except KeyboardInterrupt:
        if not alone:
            # Others may wait for what this rank was about to do.
            raise
        generation.cancel()
    put("\n")
    return generation.text
