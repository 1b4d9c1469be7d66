"""How operators launch kernels: by torch, or into a list that an exporter keeps.

An operator is torch.ops.tokenloop.NAME, which torch.export sees. Its function makes tensors by
`torch.empty` and calls `launch`, and does nothing else with tensors but make views of them. So an
exporter can call the function with tensors that have no memory, and gets all that the operator
does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple
from unittest import mock

import triton
from torch import Tensor
from torch._library import triton as torch_triton
from torch._subclasses.fake_tensor import FakeTensor
from torch.library import triton_op, wrap_triton
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.runtime.jit import JITFunction

# Functions of the operators by name, "tokenloop::linear" and so on.
FUNCTIONS: dict[str, Callable] = {}


class Launch(NamedTuple):
    """A kernel, the programs along up to three axes, and its arguments by position and by name.
    Options of the compiler such as `num_warps` are among `named`."""

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    arguments: tuple
    named: dict[str, Any]


_kept: ContextVar[list[Launch] | None] = ContextVar("launches", default=None)


def operator(name: str, mutates_args: set[str] | None = None) -> Callable[[Callable], Callable]:
    """Make a function torch.ops.tokenloop.`name`; `mutates_args` are the arguments that it writes
    to."""

    def register(function: Callable) -> Callable:
        FUNCTIONS[f"tokenloop::{name}"] = function
        # torch reads the source of all that an operator may call, for the kernels that it wraps.
        # For all operators that takes two seconds, and there are none: `launch` is given them.
        with mock.patch.object(torch_triton, "get_inner_triton_kernels", lambda _: [], create=True):
            return triton_op(f"tokenloop::{name}", mutates_args=mutates_args or {})(function)

    return register


def _has_no_memory(x: Any) -> bool:
    return isinstance(x, Tensor) and (isinstance(x, FakeTensor) or x.is_meta)


def launch(kernel: triton.JITFunction, grid: tuple[int, ...]) -> Callable[..., None]:
    """A function that launches `kernel` with its arguments, which tensors may be, and options."""

    def with_arguments(*arguments: Any, **named: Any) -> None:
        launches = _kept.get()
        if launches is not None:
            launches.append(Launch(kernel, grid, arguments, named))
        elif isinstance(kernel, JITFunction) and not isinstance(kernel, GluonJITFunction):
            wrap_triton(kernel)[grid](*arguments, **named)
        # torch would analyse a kernel that it wraps, and knows none of Gluon's. One that Triton
        # interprets is no JITFunction, and reads memory.
        elif not any(map(_has_no_memory, (*arguments, *named.values()))):
            kernel[grid](*arguments, **named)

    return with_arguments


@contextmanager
def kept_launches() -> Iterator[list[Launch]]:
    """Keep all launches in a list, in their order, and run none of them."""
    launches: list[Launch] = []
    token = _kept.set(launches)
    try:
        yield launches
    finally:
        _kept.reset(token)
