"""Host memory from which numbers go up to a GPU without the host waiting for it."""

from functools import partial

import numpy as np
import torch
from torch import Tensor


class Staging:
    """Host memory for numbers that go up to the beginning of `destination` [N] again and again. On
    CUDA the host does not wait for a copy: it fills one of two buffers, which take turns, while the
    device may read the other one."""

    def __init__(self, destination: Tensor, stream: torch.cuda.Stream | None):
        """Copies are made on `stream`, which is None where there is no GPU."""
        self._destination, self._stream = destination, stream
        on_gpu = stream is not None
        self._buffers = [
            torch.zeros(destination.shape, dtype=destination.dtype, pin_memory=on_gpu)
            for _ in range(2)
        ]
        self.arrays = [buffer.numpy() for buffer in self._buffers]
        if on_gpu:
            # They take a package that torch has only where it is built for CUDA. torch's own copy
            # takes the host ten times as long, which is 1 % of a short prompt's time.
            from cuda.bindings.driver import cuMemcpyHtoDAsync

            from tokenloop.runner.engines.launch_list import call

            self._copy = partial(call, cuMemcpyHtoDAsync)
        # Of a buffer's newest copy.
        self._events = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._newest = 0

    def take(self) -> int:
        """Which of `arrays` is to be filled next, once its last copy is done. It has what it had
        then."""
        self._newest = 1 - self._newest
        if self._events:
            self._events[self._newest].synchronize()
        return self._newest

    def send(self, count: int) -> np.ndarray:
        """Copy the first `count` numbers of the array that was taken last. Returns those."""
        buffer, sent = self._buffers[self._newest], self.arrays[self._newest][:count]
        if self._stream is None:
            self._destination[:count] = buffer[:count]
            return sent
        to, stream = self._destination.data_ptr(), self._stream.cuda_stream
        self._copy(to, buffer.data_ptr(), sent.nbytes, stream)
        self._events[self._newest].record(self._stream)
        return sent
