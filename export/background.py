"""A part of an export that runs in another process, beside the rest.

Python traces on one core. Tracing `sample` alone would take a fifth of the whole time.
"""

import ctypes
import gc
import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

from tokenloop.export import build_cache
from tokenloop.export.errors import ExportError

# Of malloc.h.
M_MMAP_THRESHOLD = -3


class Background:
    """A function's result, which an earlier export kept or another process computes from now on."""

    def __init__(
        self, what: str, function: Callable[..., build_cache.Files], *arguments: Any,
        processor: str = "",
    ):  # fmt: skip
        """`what` names the failed part in the error of `result`. `function` is defined in a module.
        Compiled code is kept for one `processor`."""
        self._what = what
        file = build_cache.place(function, arguments, processor)
        self._kept = build_cache.kept(file)
        if self._kept is not None:
            return
        context = multiprocessing.get_context("spawn")
        self._results, results = context.Pipe(duplex=False)
        # A daemon does not outlive this process.
        arguments = results, function, arguments, file
        self._process = context.Process(target=_send, args=arguments, daemon=True)
        with interrupts_for_this_process():
            self._process.start()
        results.close()

    def result(self) -> Any:
        """Wait for the result. Raises ExportError if the other process did or was killed, and
        RuntimeError if it failed otherwise and wrote why."""
        if self._kept is not None:
            return build_cache.unpack(self._kept)
        try:
            error, result = self._results.recv(), self._results.recv_bytes()
        except EOFError:
            raise failure(self._process, f"{self._what} could not be exported") from None
        if error is not None:
            raise ExportError(error)
        return build_cache.unpack(result)


def failure(process: multiprocessing.Process, what: str) -> Exception:
    """The error for a process that ended before it sent its result: ExportError if a signal ended
    it, as the system does where memory is short, else RuntimeError, for it wrote why."""
    process.join()
    if process.exitcode >= 0:
        return RuntimeError(what)
    name = signal.Signals(-process.exitcode).name
    cure = ": free some memory" if name == "SIGKILL" else ""
    return ExportError(f"{what}, for its process was ended by {name}{cure}")


@contextmanager
def interrupts_for_this_process() -> Iterator[None]:
    """A process that is started within this is not interrupted. From the keyboard it would be, with
    the one that the user sees, and write where its imports were. An interrupt that comes meanwhile
    is heard afterwards."""
    # This is started before the first of them, and lets signals through again afterwards.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def collect_seldom() -> None:
    """Have Python look for cycles less often. Tracing makes many small objects that live on, and
    looking for cycles among them as often as by default takes an eighth of an export."""
    gc.set_threshold(50_000, 20, 20)


def return_memory() -> None:
    """Have the C library give blocks of a mebibyte back to the system when they are freed
    (mallopt(3)). By default glibc raises that size to what was freed before, up to 32 MiB. What
    lives on then keeps as much as a model's weights from being given back."""
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "mallopt"):
        library.mallopt(M_MMAP_THRESHOLD, 1 << 20)


def _send(results, function: Callable, arguments: tuple, file: Path | None) -> None:
    # An interrupt is for the process that the user sees.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    collect_seldom()
    return_memory()
    if file is None:
        # No part of the result is kept either, and why has been said.
        os.environ.pop("TOKENLOOP_CACHE", None)
    error, result = None, b""
    try:
        result = build_cache.result_of(function, arguments, file)
    except ExportError as fault:
        error = str(fault)
    except OSError as fault:
        # A full disk, for one.
        error = f"{fault.filename or tempfile.gettempdir()}: {fault.strerror}"
    results.send(error)
    results.send_bytes(result)


def end_with_parent() -> None:
    """Have this process end as soon as the one that started it has: a killed parent cannot end its
    daemons."""

    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
