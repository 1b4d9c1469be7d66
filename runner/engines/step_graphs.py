"""A decode step as one launch: CUDA graphs of the position, the network and the selection."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tokenloop.runner.engines.graph_capture import captured
from tokenloop.runner.program import Change, Choice, Step
from tokenloop.runner.transfers import Transfers

# A step, or its two parts, between which the host sees the newest tokens.
WHOLE, NETWORK, CHOICE = "step", "network", "choice"


class StepGraphs:
    """Captured steps. A step reads what one next_id buffer has and writes the other one. It takes
    its positions from the next of some lines, or from where the host puts them.

    The next line's number is on the device, and every step that reads a line adds 1 to it. Kernels
    that wait by themselves for what they read begin while the ones ahead of them end, unless a step
    is asked for without that.
    """

    def __init__(
        self, run: Callable[[Step, int, str], None],
        next_positions: Callable[[Tensor, Tensor, Tensor], None], lines: Tensor, table: Tensor,
        parameters: list[Tensor], transfers: Transfers, stream: torch.cuda.Stream,
        waiting_kernels: list[str],
    ):  # fmt: skip
        """`run` runs a step that writes a buffer, or a part of one. `next_positions` fills position
        int64 [B] from lines int64 [N, B] at next_line int64 [1], and adds 1 to that. `lines` are
        the positions, `table` int64 [N] has the numbers from 0 on, `parameters` are what sampling
        takes between the logits and the position; `waiting_kernels` are the names of those that
        wait by themselves."""
        self._run_step, self._next_positions = run, next_positions
        self._lines, self._table, self._parameters = lines, table, parameters
        self._transfers, self._stream, self._waiting = transfers, stream, waiting_kernels
        self._position, self._next_line = lines[0].clone(), table[:1].clone()
        # What `_next_line` will be once all that was submitted has run.
        self._expected = 0
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        # One graph runs at a time, so all of them use the same memory.
        self._pool = torch.cuda.graph_pool_handle()

    def submit(
        self, step: Step, buffer: int, embed: bool, overlap: bool, part: str = WHOLE
    ) -> None:
        """Submit a step that writes this buffer, or a part of it; `embed` says whether it is fed
        embeddings. What sampling takes lies in `parameters` already, and what changes take is
        always in the same place, too."""
        from_lines = step.line is not None and part != CHOICE
        if part == CHOICE:
            pass  # The positions are there.
        elif not from_lines:
            self._transfers.copy(step.positions, self._position)
        elif step.line != self._expected:
            self._transfers.copy(self._table[step.line : step.line + 1], self._next_line)
        changes = tuple(change.method for change in step.choice.changes)
        what = buffer, step.choice.method, from_lines, part, step.choice.changes
        key = buffer, step.choice.method, from_lines, part, changes, embed, overlap
        with torch.cuda.stream(self._stream):
            if key in self._graphs:
                self._graphs[key].replay()
            else:
                # The first of its kind runs as it is, which loads kernels: no capture may do that.
                self._run(*what)
                names = self._waiting if overlap else []
                run = partial(self._run, *what)
                self._graphs[key] = captured(run, self._pool, self._stream, names)
        if from_lines:
            self._expected = step.line + 1

    def _run(
        self, buffer: int, method: str, from_lines: bool, part: str, changes: tuple[Change, ...]
    ) -> None:
        if from_lines:
            self._next_positions(self._lines, self._next_line, self._position)
        inputs = () if method == "greedy" else (*self._parameters, self._position)
        choice = Choice(method, inputs, changes)
        self._run_step(Step(self._position, None, choice), buffer, part)
