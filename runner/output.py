"""What the command line writes to standard output: UTF-8, at once, and nothing lost unnoticed."""

import sys

from tokenloop.runner.errors import RunnerError


class OutputError(Exception):
    """Standard output does not take any more; `reason` is the system's error."""

    def __init__(self, reason: OSError):
        super().__init__(str(reason))
        self.reason = reason


def begin_output() -> None:
    """Output is UTF-8 whatever the locale, as prompts are. A prompt that is refused may have half a
    surrogate pair, which is then written in JSON's own notation. Errors: RunnerError where standard
    output is closed: Python would drop the text."""
    if sys.stdout is None:
        raise RunnerError("standard output is closed, and the text goes there: give it a place")
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def put(text: str) -> None:
    """Write text. Errors: OutputError."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        raise OutputError(error) from error
