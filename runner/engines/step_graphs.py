"""A decode step as one launch: CUDA graphs of the position, the network and the selection."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokenloop.runner.transfers import Transfers

if TYPE_CHECKING:
    from tokenloop.runner.engines.inductor import InductorProgram


class StepGraphs:
    """Captured steps. One reads the token in one next_id buffer, or what is embedded beside it, and
    writes the other; it takes its positions from the next of some lines, or from where the host
    puts them.

    Which line is next is a number on the device that every such step adds 1 to. Of a step's kernels
    those that wait by themselves for what they read begin while the ones ahead of them end, unless
    a step is asked for without that.
    """

    def __init__(
        self,
        program: "InductorProgram",
        lines: Tensor,
        table: Tensor,
        parameters: list[Tensor],
        transfers: Transfers,
        stream: torch.cuda.Stream,
        waiting_kernels: list[str],
    ):
        """lines int64 [N, B] are positions, table int64 [N] the numbers from 0 on, `parameters`
        what `sample` takes between the logits and the position; `waiting_kernels` are those that
        wait by themselves."""
        self._program, self._lines = program, lines
        self._table, self._parameters, self._transfers = table, parameters, transfers
        self._stream, self._waiting = stream, waiting_kernels
        self._position, self._next_line = lines[0].clone(), table[:1].clone()
        # The host's idea of what `_next_line` will be once all that was submitted has run.
        self._expected = 0
        self._graphs: dict[tuple[int, bool, bool, bool, bool], torch.cuda.CUDAGraph] = {}
        # One graph runs at a time, so all of them use the same memory.
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self) -> None:
        """Capture the steps of greedy selection, at position 0, which every sequence overwrites."""
        embed = self._program.embeds
        for buffer in (0, 1):
            self._program.next_id(1 - buffer).zero_()
            fed = self._program.fed(1 - buffer, embed)
            self.step(fed, self._lines[0], buffer, embed=embed, overlap=True)

    def step(
        self, fed: Tensor, positions: Tensor, buffer: int, *sampling: Tensor, embed: bool,
        overlap: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Submit a step: `fed` and what it gives as of `decode` and `select`; positions int64 [B]
        (one of `lines`, if they are not the host's), with `sampling` the parameters."""
        # A token that the host fed is in the buffer; so is every other.
        assert fed.data_ptr() == self._program.fed(1 - buffer, embed).data_ptr()
        line = self._line_of(positions)
        if line is None:
            self._transfers.copy(positions, self._position)
        elif line != self._expected:
            self._transfers.copy(self._table[line : line + 1], self._next_line)
        what = buffer, bool(sampling), line is not None, embed
        key = *what, overlap
        with torch.cuda.stream(self._stream):
            if key in self._graphs:
                self._graphs[key].replay()
            else:
                # The first of its kind runs as it is, which loads kernels: no capture may do that.
                self._run(*what)
                self._graphs[key] = self._capture(what, overlap)
        if line is not None:
            self._expected = line + 1
        return self._program.next_id(buffer), self._program.fed(buffer, embed)

    def _run(self, buffer: int, sampled: bool, from_lines: bool, embed: bool) -> None:
        program = self._program
        if from_lines:
            program.next_positions(self._lines, self._next_line, self._position)
        logits = program.decode(program.fed(1 - buffer, embed), self._position, embed)
        sampling = (*self._parameters, self._position) if sampled else ()
        program.select(logits, buffer, *sampling, embed=embed)

    def _capture(self, what: tuple[int, bool, bool, bool], overlap: bool) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            self._run(*what)
        if overlap and self._waiting:
            # It takes a package that torch has only where it is built for CUDA.
            from tokenloop.runner.engines.programmatic_launch import let_overlap

            let_overlap(graph, self._waiting)
        graph.instantiate()
        return graph

    def _line_of(self, positions: Tensor) -> int | None:
        """Which of the lines these positions are, if they are one."""
        offset = positions.data_ptr() - self._lines.data_ptr()
        if not 0 <= offset < self._lines.nbytes:
            return None
        return offset // self._lines[0].nbytes
