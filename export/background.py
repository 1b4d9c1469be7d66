"""The selection methods, exported in another process while this one exports the network.

Tracing is Python's work on one core; `sample` alone would take a fifth of the whole time.
"""

import logging
import multiprocessing
import signal
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from executorch.exir.schema import Program


class Background:
    """A function's result, computed in another process that begins at once."""

    def __init__(self, what: str, function: Callable, *arguments: Any):
        """`what` fails, says `result` where it does; `function` is of a module."""
        self._what = what
        context = multiprocessing.get_context("spawn")
        self._results, results = context.Pipe(duplex=False)
        # Being a daemon it does not outlive this process.
        process = context.Process(target=_send, args=(results, function, arguments), daemon=True)
        process.start()
        results.close()

    def result(self) -> Any:
        """Wait for it. Raises RuntimeError when the other process failed: it has written why."""
        try:
            return self._results.recv()
        except EOFError:
            raise RuntimeError(f"{self._what} could not be exported") from None


class SelectionExport(Background):
    """`result()` is the program of export.selection.selection_methods."""

    def __init__(self, batch: int, vocab_size: int, backend: str):
        super().__init__("the selection methods", _export, batch, vocab_size, backend)


def _send(results, function: Callable, arguments: tuple) -> None:
    # An interrupt is for the process that the user sees.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    results.send(function(*arguments))


def _export(batch: int, vocab_size: int, backend: str) -> "Program":
    import torch

    torch.set_num_threads(1)
    from export.pte import to_program
    from export.selection import selection_methods

    methods = selection_methods(batch, vocab_size, delegates=backend == "xnnpack")
    program = to_program(methods, {}, backend == "xnnpack", lambda what: None)
    return program.executorch_program
