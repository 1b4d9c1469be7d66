"""A decode step as one launch: CUDA graphs of the position, the network and the selection."""

from collections.abc import Callable

import torch
from torch import Tensor

from runner.transfers import Transfers


class StepGraphs:
    """Captured steps. One reads the token in one next_id buffer and writes the other, and takes its
    positions from the next of some lines, or from where the host puts them.

    Which line is next is a number on the device that every such step adds 1 to.
    """

    def __init__(
        self,
        method: Callable[..., Tensor | None],
        next_ids: list[Tensor],
        lines: Tensor,
        table: Tensor,
        parameters: list[Tensor],
        transfers: Transfers,
        stream: torch.cuda.Stream,
    ):
        """`method` runs a method of the program by its name; `lines` int64 [N, B] are positions,
        `table` int64 [N] the numbers from 0 on, `parameters` what `sample` takes between the logits
        and the position."""
        self._method, self._next_ids, self._lines = method, next_ids, lines
        self._table, self._parameters, self._transfers = table, parameters, transfers
        self._stream = stream
        self._position, self._next_line = lines[0].clone(), table[:1].clone()
        # The host's idea of what `_next_line` will be once all that was submitted has run.
        self._expected = 0
        self._graphs: dict[tuple[int, bool, bool], torch.cuda.CUDAGraph] = {}
        # One graph runs at a time, so all of them use the same memory.
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self) -> None:
        """Capture the steps of greedy selection, at position 0, which every sequence overwrites."""
        for buffer in (0, 1):
            self._next_ids[1 - buffer].zero_()
            self.step(self._next_ids[1 - buffer], self._lines[0], buffer)

    def step(self, token: Tensor, positions: Tensor, buffer: int, *sampling: Tensor) -> Tensor:
        """Submit a step: token int64 [B, 1], positions int64 [B] (one of `lines`, if they are not
        the host's), with `sampling` the parameters. Its tokens are in that next_id buffer."""
        # A token that the host fed is in the buffer; so is every other.
        assert token.data_ptr() == self._next_ids[1 - buffer].data_ptr()
        line = self._line_of(positions)
        if line is None:
            self._transfers.copy(positions, self._position)
        elif line != self._expected:
            self._transfers.copy(self._table[line : line + 1], self._next_line)
        key = buffer, bool(sampling), line is not None
        with torch.cuda.stream(self._stream):
            if key in self._graphs:
                self._graphs[key].replay()
            else:
                # The first of its kind runs as it is, which loads kernels: no capture may do that.
                self._run(*key)
                self._graphs[key] = self._capture(key)
        if line is not None:
            self._expected = line + 1
        return self._next_ids[buffer]

    def _run(self, buffer: int, sampled: bool, from_lines: bool) -> None:
        if from_lines:
            self._method("next_positions", self._lines, self._next_line, self._position)
        logits = self._method("decode", self._next_ids[1 - buffer], self._position)
        out = self._next_ids[buffer]
        if sampled:
            self._method("sample", logits, *self._parameters, self._position, out)
        else:
            self._method("greedy", logits, out)

    def _capture(self, key: tuple[int, bool, bool]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            self._run(*key)
        return graph

    def _line_of(self, positions: Tensor) -> int | None:
        """Which of the lines these positions are, if they are one."""
        offset = positions.data_ptr() - self._lines.data_ptr()
        if not 0 <= offset < self._lines.nbytes:
            return None
        return offset // self._lines[0].nbytes
