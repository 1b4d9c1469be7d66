"""The process of a command: its standard streams, and how an interrupt ends it.

runner/process.py and export/process.py are the same file, for neither room imports the other. It
imports what Python has loaded anyway: until `end_when_interrupted` an interrupt is a traceback, or
in a script, which says so in its first lines, the system's own end of the process.
"""

import os
import sys
from _signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal
from io import TextIOBase

INTERRUPTED = 130


def end_when_interrupted() -> None:
    """From now on an interrupt ends the process, with INTERRUPTED and without a word.

    Python would raise KeyboardInterrupt wherever it is: in an import, which may make another error
    of it, in a finalizer, which prints it and goes on, or at exit, where nobody catches it. Where
    interrupts are ignored, as in the background of a shell, they still are.
    """
    if getsignal(SIGINT) in (default_int_handler, SIG_DFL):
        signal(SIGINT, _end_interrupted_process)
        sys.unraisablehook = _end_if_interrupted


class InterruptsRaised:
    """Within this the first interrupt is a KeyboardInterrupt, whatever error others make of it, and
    one more ends the process. After `end_when_interrupted`; without, nothing is changed."""

    def __enter__(self) -> "InterruptsRaised":
        self._changed = _interrupts_end()
        if self._changed:
            signal(SIGINT, _raise_once)
        return self

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was one, which native code may have dropped."""
        if self._changed and _interrupts_end():
            raise KeyboardInterrupt

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        if not self._changed:
            return
        interrupted = _interrupts_end()
        signal(SIGINT, _end_interrupted_process)
        if interrupted and isinstance(error, Exception):
            raise KeyboardInterrupt from error


def open_streams() -> None:
    """Give closed standard streams a place, before a file gets their numbers: what native code
    writes to standard error would land in it. What goes to a closed standard error is dropped;
    print would take standard output instead."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def say(line: str) -> None:
    """Print to standard error. Where that is full or nobody reads it, there is nobody to tell."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        discard(sys.stderr)


def discard(stream: TextIOBase) -> None:
    """Drop what the stream still holds and what is written to it from now on. Python would complain
    once more when it flushes it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _end_interrupted_process(*_: object) -> None:
    os._exit(INTERRUPTED)


def _interrupts_end() -> bool:
    # By name: `tokenloop export` has begun with the runner's, and goes on with the export's.
    return getattr(getsignal(SIGINT), "__name__", None) == _end_interrupted_process.__name__


def _raise_once(*_: object) -> None:
    signal(SIGINT, _end_interrupted_process)
    raise KeyboardInterrupt


def _end_if_interrupted(found: object) -> None:
    if issubclass(found.exc_type, KeyboardInterrupt):
        _end_interrupted_process()
    sys.__unraisablehook__(found)
