"""Kernels compiled for a GPU that need not be there: each that differs once, on all processors."""

import hashlib
import importlib
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch

from tokenloop.export.background import end_with_parent, interrupts_for_this_process
from tokenloop.export.errors import ExportError
from tokenloop.export.launches.lowering import Pointer
from tokenloop.models.kernels.launch.launches import Launch

ARCHITECTURES = ("sm_90",)
TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64",
    torch.int32: "i32", torch.int16: "i16", torch.bool: "i1", torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
}  # fmt: skip
POINTER_ALIGNMENT = 16


class Variant(NamedTuple):
    """A kernel of a module, and all that its code depends on: types of arguments, constants,
    arguments that 16 divides, and options of the compiler."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


class Cubin(NamedTuple):
    """A compiled kernel: its symbol, code, bytes of shared memory and warps of a program, bytes of
    scratch memory that a program needs, and how many pointers follow its own arguments, the first
    of them to that memory."""

    symbol: str
    code: bytes
    shared: int
    warps: int
    scratch: int
    hidden: int

    @property
    def file(self) -> str:
        return f"{self.symbol}-{hashlib.sha256(self.code).hexdigest()[:16]}.cubin"


def variant(launch: Launch) -> tuple[Variant, list[Any]]:
    """What must be compiled for a launch, and the arguments that the compiled kernel takes:
    Pointers and ints. Triton makes a constant of any 1."""
    kernel = launch.kernel
    known = set(kernel.arg_names)
    options = {name: value for name, value in launch.named.items() if name not in known}
    values = dict(zip(kernel.arg_names, launch.arguments))
    values |= {name: value for name, value in launch.named.items() if name in known}
    signature, constants, aligned, arguments = [], [], [], []
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, values.get(parameter.name, parameter.default)
        special = not parameter.do_not_specialize
        if isinstance(value, Pointer):
            kind, fits = "*" + TYPES[value.dtype], value.offset % POINTER_ALIGNMENT == 0
        elif (
            parameter.is_constexpr
            or value is None
            or (special and value is not True and value == 1)
        ):
            signature.append((name, "constexpr"))
            constants.append((name, value))
            continue
        elif isinstance(value, int):
            kind, fits = "i32" if abs(value) < 2**31 else "i64", special and value % 16 == 0
        else:
            raise ExportError(f"{kernel.__name__} is given {name} = {value!r}, which is no integer")
        signature.append((name, kind))
        arguments.append(value)
        if fits:
            aligned.append(i)
    key = Variant(
        kernel.fn.__module__, kernel.fn.__name__, tuple(signature), tuple(constants),
        tuple(aligned), tuple(sorted(options.items())),
    )  # fmt: skip
    return key, arguments


def compile_variants(
    variants: list[Variant], architecture: str, progress: Callable[[str], None]
) -> list[Cubin]:
    """The compiled kernels, in the order of `variants`. Errors: ExportError naming the kernel that
    the compiler refuses, and why."""
    workers = max(1, min(len(os.sched_getaffinity(0)), len(variants)))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin)
    cubins: dict[int, Cubin] = {}
    with pool:
        with interrupts_for_this_process():
            jobs = {pool.submit(_compile, v, architecture): i for i, v in enumerate(variants)}
        try:
            for done in as_completed(jobs):
                cubins[jobs[done]] = done.result()
                progress(f"compiling kernels, {len(cubins)} of {len(variants)}")
        except BrokenProcessPool as error:
            raise ExportError(
                "a process that compiles kernels was killed: free some memory"
            ) from error
        except RuntimeError as error:
            raise ExportError(str(error)) from error
        finally:
            pool.shutdown(cancel_futures=True)
    return [cubins[i] for i in range(len(variants))]


def _begin() -> None:
    # Each of them holds both ends of the jobs' pipe, so none sees that it has ended.
    end_with_parent()
    warnings.filterwarnings("ignore")
    # Code that says where its source was would differ from one checkout to the next.
    os.environ["TRITON_DISABLE_LINE_INFO"] = "1"
    os.environ.pop("TRITON_INTERPRET", None)


def _compile(variant: Variant, architecture: str) -> Cubin:
    import triton
    from triton.backends.compiler import GPUTarget

    kernel = getattr(importlib.import_module(variant.module), variant.name)
    attributes = {(i,): [["tt.divisibility", 16]] for i in variant.aligned}
    try:
        if type(kernel).__name__ == "GluonJITFunction":
            from triton.experimental.gluon._runtime import GluonASTSource as Source
        else:
            from triton.compiler import ASTSource as Source
        source = Source(kernel, dict(variant.signature), dict(variant.constants), attributes)
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        compiled = triton.compile(source, target=target, options=dict(variant.options))
    except OSError as error:
        place = triton.knobs.cache.dir
        raise RuntimeError(f"kernels cannot be compiled in {place}: {error.strerror}") from None
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise RuntimeError(f"{variant.name} cannot be compiled: {reason[-1]}") from None
    metadata = compiled.metadata
    own = sum(kind != "constexpr" for _, kind in variant.signature)
    entry = compiled.asm["ptx"].split(f".entry {metadata.name}(")[1].split(")")[0]
    return Cubin(
        metadata.name, compiled.asm["cubin"], metadata.shared, metadata.num_warps,
        getattr(metadata, "global_scratch_size", 0) or 0, entry.count(".param") - own,
    )  # fmt: skip
