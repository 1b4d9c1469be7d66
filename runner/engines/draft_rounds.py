"""Rounds of drafts on a CUDA GPU: each is one launch of a graph, which is given nothing. What the
sequence has had so far is on the device, and so is what follows from it."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tokenloop.runner.engines.graph_capture import captured
from tokenloop.runner.engines.torch_memory import TorchMemory
from tokenloop.runner.program import PARAMETERS
from tokenloop.runner.request import Request
from tokenloop.runner.transfers import Transfers

# Rounds of each kind whose time is taken when a program is loaded.
TIMED = 5


class DraftRounds:
    """What rounds of one row and of 1 + `draft_tokens` rows read and write, and their graphs.

    `cost` is the time of a round with drafts, in rounds without, which take `plain_s` seconds.
    """

    def __init__(
        self, call: Callable[..., Tensor | None], draft_tokens: int, max_seq_len: int,
        memory: TorchMemory, transfers: Transfers, waiting_kernels: list[str],
    ):  # fmt: skip
        """`call` runs a method by its name, on its inputs, and gives its output."""
        self._call, self._rows, self._transfers = call, 1 + draft_tokens, transfers
        self._stream, self._waiting = memory.stream, waiting_kernels

        def integers(*shape: int) -> Tensor:
            return memory.new(np.zeros(shape, np.int64))

        self._history, self._position = integers(max_seq_len + self._rows), integers(1)
        # By the number of rows: tokens, their positions, and the tokens chosen after them.
        self._places = {
            rows: (integers(rows), integers(rows), integers(rows, 1)) for rows in (1, self._rows)
        }
        # How many tokens hold, and all of them. One is written while the other is read.
        self._accepted = [integers(1 + self._rows) for _ in range(2)]
        self._parameters = {
            name: memory.new(np.zeros(self._rows, dtype)) for name, dtype in PARAMETERS.items()
        }
        # Those of another model.
        self._drafts = integers(draft_tokens)
        self._given: dict[str, list] = {}
        self._graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.cost, self.plain_s = self._measured()

    def begin(self, ids: list[int], token: Tensor, request: Request) -> None:
        """Begin with a prompt, and with the token int64 [1, 1] that was chosen after it."""
        count, upload = len(ids), self._transfers.upload
        upload(ids, out=self._history[:count])
        self._transfers.copy(token[0], self._history[count : count + 1])
        upload([count], out=self._position)
        if request.temperature > 0:
            for name, dtype in PARAMETERS.items():
                values = [getattr(request, name)] * self._rows
                if self._given.get(name) != values:
                    self._given[name] = values
                    upload(values, dtype, self._parameters[name])

    def submit(
        self, drafted: bool, method: str, buffer: int, graph: bool, overlap: bool,
        drafts: list[int] | None = None,
    ) -> Tensor:  # fmt: skip
        """As Program.submit_round."""
        if drafts is not None:
            self._transfers.upload(drafts, out=self._drafts)
        key = drafted, drafts is not None, method, buffer, overlap
        run = partial(self._run, drafted, drafts is not None, method, buffer)
        with torch.cuda.stream(self._stream):
            if graph and key in self._graphs:
                self._graphs[key].replay()
            else:
                # The first of its kind runs as it is, which loads kernels: no capture may do that.
                run()
            if graph and key not in self._graphs:
                names = self._waiting if overlap else []
                self._graphs[key] = captured(run, self._pool, self._stream, names)
        return self._accepted[buffer][: 1 + (self._rows if drafted else 1)]

    def _run(self, drafted: bool, given: bool, method: str, buffer: int) -> None:
        rows = self._rows if drafted else 1
        tokens, positions, chosen = self._places[rows]
        where, call = (self._history, self._position), self._call
        if given:
            logits = call(f"verify_{rows}", *where, self._drafts, tokens, positions)
        else:
            logits = call(f"round_{rows}", *where, tokens, positions)
        parameters = [array[:rows] for array in self._parameters.values()]
        inputs = () if method == "greedy" else (*parameters, positions)
        call(method + "_round" * drafted, logits, *inputs, chosen)
        accepted = self._accepted[buffer][: 1 + rows]
        call(f"accept_{rows}", tokens, positions, chosen, *where, accepted)

    def _measured(self) -> tuple[float, float]:
        """See `cost` and `plain_s`. The graphs of greedy rounds are captured by this."""
        times = []
        for drafted in (False, True):
            taken = []
            for i in range(2 + TIMED):
                # Where any sequence begins, so that what is written is nobody's.
                with torch.cuda.stream(self._stream):
                    self._position.zero_()
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record(self._stream)
                self.submit(drafted, "greedy", i % 2, graph=True, overlap=True)
                end.record(self._stream)
                end.synchronize()
                if i >= 2:
                    taken.append(begin.elapsed_time(end))
            times.append(min(taken))
        return times[1] / times[0], times[0] / 1e3
