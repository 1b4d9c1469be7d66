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
    from executorch.exir import ExecutorchProgramManager
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
    """`result()` is the program of export.selection.selection_methods, `methods` has names."""

    def __init__(self, batch: int, vocab_size: int, backend: str):
        self.methods = ["greedy", "sample"]
        if batch > 1:
            self.methods += ["greedy_row", "sample_row"]
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


def merge(manager: "ExecutorchProgramManager", other: "Program"):
    """The bytes (a Cord) of a .pte with the methods of both: `other` has neither named data nor
    mutable buffers with contents. (ExecuTorch has no way of its own to add emitted methods.)"""
    from executorch.exir._serialize._program import PTEFile, serialize_pte_binary
    from executorch.exir.schema import DataLocation, Tensor

    program = manager.executorch_program
    # Buffer 0 stands for "no constant" in both.
    constants = len(program.constant_buffer) - 1
    delegates = len(program.backend_delegate_data)
    for plan in other.execution_plan:
        for value in plan.values:
            if isinstance(value.val, Tensor) and value.val.data_buffer_idx > 0:
                value.val.data_buffer_idx += constants
        for delegate in plan.delegates:
            assert delegate.processed.location == DataLocation.INLINE
            delegate.processed.index += delegates
    program.execution_plan += other.execution_plan
    program.constant_buffer += other.constant_buffer[1:]
    program.backend_delegate_data += other.backend_delegate_data
    file = PTEFile(program, manager._emitter_output.mutable_data, manager._named_data)
    return serialize_pte_binary(file, extract_delegate_segments=True)
