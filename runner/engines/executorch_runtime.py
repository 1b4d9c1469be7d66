"""ExecuTorch programs over NumPy arrays, without torch, or over the arrays of another library.

Knows nothing of language models: a Program has methods, a Method takes arrays and gives arrays.
"""

import ctypes
import math
import os
import weakref
from collections.abc import Sequence
from ctypes import addressof, byref
from dataclasses import dataclass
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tokenloop.runner.engines import executorch_abi as abi
from tokenloop.runner.engines.executorch_abi import ExecuTorchError, value_of
from tokenloop.runner.errors import RunnerError

# runtime/core/portable_type/scalar_type.h
DTYPES = {
    number: np.dtype(name)
    for number, name in {
        0: "uint8", 1: "int8", 2: "int16", 3: "int32", 4: "int64", 5: "float16", 6: "float32",
        7: "float64", 11: "bool", 27: "uint16", 28: "uint32", 29: "uint64",
    }.items()
}  # fmt: skip
NUMBERS = {dtype: number for number, dtype in DTYPES.items()}
NONE, TENSOR = 0, 1  # runtime/core/tag.h
CPU, CUDA = 0, 1  # runtime/core/portable_type/device.h
SCALARS = {3: "as_double", 4: "as_int", 5: "as_bool"}
NO_MLOCK = 0  # extension/data_loader/mmap_data_loader.h; locked pages would all be resident.
INTERNAL_CONSISTENCY = 1  # runtime/executor/program.h
XNN_EXTRA_BYTES = 16  # How far past the end of a tensor XNNPACK may read (xnnpack.h).
MAX_THREADS = 1024  # The process crashes where the system refuses to start a pool's threads.


class Device(NamedTuple):
    """Where memory lies: runtime/core/portable_type/device.h."""

    type: int = CPU
    index: int = 0


@dataclass(frozen=True)
class TensorMeta:
    """A tensor that goes in or out, at its largest. `dtype` is ScalarType's number where NumPy has
    no such type. A tensor that is not planned lies in memory of the caller's or of the Method's."""

    dtype: np.dtype | int
    shape: tuple[int, ...]
    nbytes: int
    is_memory_planned: bool


@dataclass(frozen=True)
class MethodMeta:
    """A method's inputs and outputs; None stands for one that is no tensor, such as an int."""

    inputs: list[TensorMeta | None]
    outputs: list[TensorMeta | None]


def registered_backends() -> list[str]:
    """The names of the backends that programs can use."""
    runtime = abi.functions()
    results = [runtime.backend_name(i) for i in range(runtime.num_backends())]
    return [value_of(result, "get_backend_name").decode() for result in results]


def set_backend_option(backend: str, key: str, value: bool | int | str) -> None:
    """Set an option of a backend, for methods that are loaded from then on.

    Errors: ExecuTorchError NotFound for a backend that is not registered, InvalidArgument for a
    value of another type than the option has.
    """
    option = backend_option(key, value)
    error = abi.functions().set_option(backend.encode(), abi.Span(addressof(option), 1))
    if error:
        raise ExecuTorchError(f"set_option({backend}, {key})", error)


def backend_option(key: str, value: bool | int | str) -> abi.BackendOption:
    """An option as set_option takes it."""
    index, member = {bool: (0, "as_bool"), int: (1, "as_int"), str: (2, "as_string")}[type(value)]
    option = abi.BackendOption(key=key.encode(), index=index)
    setattr(option.value, member, value.encode() if isinstance(value, str) else value)
    return option


def num_threads() -> int:
    """How many threads kernels and delegates use."""
    runtime = abi.functions()
    return runtime.thread_count(runtime.threadpool())


def set_num_threads(count: int | None = None) -> None:
    """Use `count` threads; by default as many as there are processors that this process may use,
    or what an earlier call chose while methods that were loaded since are still in use.

    Errors: RunnerError for less than 1, for more than MAX_THREADS, and for another number than
    those methods have.
    """
    if count is not None and not 1 <= count <= MAX_THREADS:
        raise RunnerError(f"threads is {count}; it must be 1 to {MAX_THREADS}")
    current = num_threads()
    # Delegates keep the address of the pool that they were loaded with, which a reset frees.
    if _methods and count not in (None, current):
        raise RunnerError(
            f"threads is {count}, but a model that is in use was loaded with {current}, and a "
            f"process has one pool of threads: it must be {current}"
        )
    if not _methods:
        # By itself ExecuTorch would also count processors that taskset or a container forbids.
        allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else current
        runtime = abi.functions()
        runtime.reset_threadpool(runtime.threadpool(), count or min(allowed, MAX_THREADS))


class Program:
    """A .pte file. It is mapped, so that only what is used becomes resident.

    All methods share one set of memory-planned arenas: mutable buffers, which several methods
    may have in common, keep their contents in them from call to call.
    """

    def __init__(
        self, path: str | Path, data: str | Path | None = None, arrays: "Arrays | None" = None
    ):
        """`data` is a .ptd file with tensors that are not in the program. `arrays` are what methods
        take and give, by default NumPy's.

        Errors: ExecuTorchError for a file that cannot be read or is not a program.
        """
        runtime = self._runtime = abi.functions()
        self.arrays = arrays or Arrays()
        self._files = _Files(runtime, path, data)
        self.native, self.data = self._files.program, self._files.data
        # Buffers of one number on two devices are two arenas.
        plans = {name: self._planned(name) for name in self.method_names()}
        sizes: dict[tuple[int, Device], int] = {}
        for plan in plans.values():
            for i, (device, size) in enumerate(plan):
                sizes[i, device] = max(sizes.get((i, device), 0), size)
        arenas = {key: self.arrays.memory(size, key[1]) for key, size in sizes.items()}
        self.arenas = list(arenas.values())
        self._memories = {
            name: _planned_memory([(device, arenas[i, device]) for i, (device, _) in enumerate(p)])
            for name, p in plans.items()
        }

    def planned_memory(self, name: str) -> abi.HierarchicalAllocator:
        """The arenas of a method."""
        return self._memories[name][0]

    def _planned(self, name: str) -> list[tuple[Device, int]]:
        """The devices and sizes of a method's arenas."""
        runtime, meta = self._runtime, byref(self._native_meta(name))
        found = []
        for i in range(runtime.num_planned_buffers(meta)):
            size = value_of(runtime.planned_buffer_size(meta, i), "planned_buffer_size")
            device = value_of(runtime.planned_buffer_device(meta, i), "planned_buffer_device")
            found.append((Device(device.type, device.index), size))
        return found

    def method_names(self) -> list[str]:
        """The names of the methods, in the order of the file."""
        runtime, program = self._runtime, byref(self.native)
        results = [runtime.method_name(program, i) for i in range(runtime.num_methods(program))]
        return [value_of(result, "get_method_name").decode() for result in results]

    def method_meta(self, name: str) -> MethodMeta:
        """The method's inputs and outputs, without loading it."""
        runtime, meta = self._runtime, byref(self._native_meta(name))

        def tensors(count, tag, info):
            for i in range(count(meta)):
                if value_of(tag(meta, i), f"{name}'s tensor {i}") != TENSOR:
                    yield None
                    continue
                found = value_of(info(meta, i), f"{name}'s tensor {i}")
                shape = _integers(ctypes.c_int32, found.sizes.data, found.sizes.size)
                dtype = DTYPES.get(found.scalar_type, found.scalar_type)
                yield TensorMeta(dtype, shape, found.nbytes, found.is_memory_planned)

        return MethodMeta(
            list(tensors(runtime.num_inputs, runtime.input_tag, runtime.input_info)),
            list(tensors(runtime.num_outputs, runtime.output_tag, runtime.output_info)),
        )

    def load_method(self, name: str) -> "Method":
        """A new instance of the method, with memory of its own for outputs that are not planned.

        Errors: ExecuTorchError, such as InvalidArgument where there is no such method, and
        OperatorMissing.
        """
        return Method(self, name)

    def _native_meta(self, name: str) -> abi.MethodMeta:
        return value_of(self._runtime.method_meta(byref(self.native), name.encode()), name)


class Method:
    """A loaded method. No two of a Program's methods may run at once, for they share its arenas."""

    def __init__(self, program: Program, name: str):
        runtime = abi.functions()
        self.name = name
        meta = program.method_meta(name)
        allocator = abi.MallocMemoryAllocator(vtable=runtime.malloc_vtable, prof_id=-1)
        # Without an allocator for temporary memory the runtime takes malloc for it.
        planned = addressof(program.planned_memory(name))
        manager = abi.MemoryManager(addressof(allocator), planned, None)
        data = None if program.data is None else byref(program.data)
        result = runtime.load_method(
            byref(program.native), name.encode(), byref(manager), None, data, None, abi.Span()
        )
        try:
            native = value_of(result, f"load {name}")
        except ExecuTorchError:
            runtime.free_allocator(byref(allocator))
            raise
        # The arguments keep alive what the method points at, until it is no more.
        kept = (manager, program)
        weakref.finalize(self, _destroy, runtime, native, allocator, kept).atexit = False
        _methods.add(self)
        self._this = byref(native)
        self._set_inputs, self._execute = runtime.set_inputs, runtime.execute
        self._values = (abi.EValue * len(meta.inputs))()
        self._value_list = abi.Span(addressof(self._values), len(meta.inputs))
        self._inputs = [
            Input(f"{name}'s input {i}", tensor, value, program.arrays)
            for i, (tensor, value) in enumerate(zip(meta.inputs, self._values))
        ]
        self._outputs = []
        for i, tensor in enumerate(meta.outputs):
            memories = program.arenas
            if tensor is not None and not tensor.is_memory_planned:
                memories = [program.arrays.memory(tensor.nbytes, Device())]
                span = span_of(memories[0])
                error = runtime.set_output_data_ptr(self._this, span.data, span.size, i)
                if error:
                    raise ExecuTorchError(f"{name}'s output {i}", error)
            value = abi.EValue.from_address(runtime.get_output(self._this, i))
            self._outputs.append(Output(f"{name}'s output {i}", value, memories))

    def call(self, inputs: Sequence[Any]) -> list:
        """Run the method on `inputs`, whose memory is used in place; their shapes may be smaller
        than the method's where those are dynamic.

        Gives a view of an output's memory for each tensor, valid until the next call (or, where
        it is planned, until the next call of any method), and Python's own int, float or bool.

        Errors: ValueError for inputs that do not fit; ExecuTorchError.
        """
        if len(inputs) != len(self._inputs):
            raise ValueError(f"{self.name} takes {len(self._inputs)} inputs, not {len(inputs)}")
        for target, array in zip(self._inputs, inputs):
            target.bind(array)
        error = self._set_inputs(self._this, byref(self._value_list))
        if error:
            shapes = [array.shape for array in inputs]
            raise ExecuTorchError(f"{self.name} with inputs of {shapes}", error)
        error = self._execute(self._this)
        if error:
            raise ExecuTorchError(self.name, error)
        return self.outputs()

    def outputs(self) -> list:
        """What `call` gave last. Before any call, an output that is not planned is its memory."""
        return [output.read() for output in self._outputs]


class Input:
    """One input's tensor. It is made once; mostly only its address changes from call to call."""

    def __init__(
        self, name: str, meta: TensorMeta | None, value: abi.EValue, arrays: "Arrays"
    ):  # fmt: skip
        self._name, self._meta, self._arrays = name, meta, arrays
        if meta is None:
            return
        dim = len(meta.shape)
        self._shape: tuple[int, ...] | None = None
        self._sizes, self._strides = (ctypes.c_int32 * dim)(), (ctypes.c_int32 * dim)()
        self._order = (ctypes.c_uint8 * dim)(*range(dim))
        self._tensor = abi.TensorImpl(
            sizes=addressof(self._sizes),
            dim_order=addressof(self._order),
            strides=addressof(self._strides),
            dim=dim,
            type=NUMBERS.get(meta.dtype, meta.dtype if isinstance(meta.dtype, int) else -1),
            device_type=arrays.device.type,
            device_index=arrays.device.index,
        )
        value.tag = TENSOR
        value.payload.pointer = addressof(self._tensor)

    def bind(self, array: Any) -> None:
        """Point at the array's memory. Errors: ValueError for an array that does not fit."""
        meta, arrays = self._meta, self._arrays
        dtype = arrays.dtype_of(array)
        if meta is None or dtype is None or dtype != meta.dtype:
            found = type(array).__name__ if dtype is None else dtype
            raise ValueError(f"{self._name} is {found}; {meta and meta.dtype} is right")
        if array.shape != self._shape:
            shape = tuple(array.shape)
            if len(shape) != len(meta.shape) or any(map(int.__gt__, shape, meta.shape)):
                raise ValueError(f"{self._name} is {shape}; at most {meta.shape} is right")
            self._shape = shape
            self._sizes[:] = shape
            self._strides[:] = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
            self._tensor.numel = self._tensor.numel_bound = math.prod(shape)
        self._tensor.data = arrays.address_of(array, self._name)


class Output:
    """One output's value, and the memory that it can lie in."""

    def __init__(self, name: str, value: abi.EValue, memories: "list[Memory]"):
        self._name = name
        self._value = value
        self._memories = memories

    def read(self):
        """The value after a call: an array, an int, a float, a bool or None."""
        tag, payload = self._value.tag, self._value.payload
        if tag in SCALARS:
            return getattr(payload, SCALARS[tag])
        if tag == NONE:
            return None
        tensor = abi.TensorImpl.from_address(payload.pointer) if tag == TENSOR else None
        address = 0 if tensor is None else tensor.data or 0
        shape = () if tensor is None else _integers(ctypes.c_int32, tensor.sizes, tensor.dim)
        for memory in self._memories:
            start = address - memory.address
            if tensor is not None and 0 <= start < memory.size:
                return memory.view(start, tensor.type, shape, self._name)
        if tensor is None or tensor.type not in DTYPES:
            kind = f"tag {tag}" if tensor is None else f"scalar type {tensor.type}"
            raise TypeError(f"{self._name} is of {kind}, which NumPy does not have")
        dtype = DTYPES[tensor.type]
        if tensor.numel == 0:
            return np.empty(shape, dtype)
        # Constants of the program, and inputs that come back, can be gone before the array is.
        data = ctypes.string_at(address, tensor.numel * dtype.itemsize)
        return np.frombuffer(data, dtype).reshape(shape)


class Memory:
    """Zeros that begin with a page. Only the pages that are touched become resident."""

    def __init__(self, size: int):
        # Not np.zeros, which asks for huge pages.
        pages = mmap(-1, size + XNN_EXTRA_BYTES, flags=MAP_PRIVATE | MAP_ANONYMOUS)
        self.bytes = np.frombuffer(pages, np.uint8)[:size]
        self.address: int = self.bytes.ctypes.data
        self.size = size

    def view(self, start: int, number: int, shape: tuple[int, ...], name: str) -> np.ndarray:
        """The array of ScalarType `number` that begins at the byte `start`. Errors: TypeError."""
        if number not in DTYPES:
            raise TypeError(f"{name} is of scalar type {number}, which NumPy does not have")
        dtype = DTYPES[number]
        size = math.prod(shape) * dtype.itemsize
        return self.bytes[start : start + size].view(dtype).reshape(shape)


class Arrays:
    """What a Program's methods take and give: NumPy arrays in the host's memory. Another library's
    has the same methods; `device` is where its arrays lie."""

    device = Device()

    def memory(self, size: int, device: Device) -> Memory:
        """New memory on a device. Errors: RunnerError for a device that this library has not."""
        if device.type != CPU:
            raise RunnerError(f"the program has memory on a device of type {device.type}")
        return Memory(size)

    def dtype_of(self, array: Any) -> Any:
        """As TensorMeta has it. None for what is no array."""
        return array.dtype if isinstance(array, np.ndarray) else None

    def address_of(self, array: np.ndarray, name: str) -> int:
        """Where its memory begins. Errors: ValueError for an array that is not contiguous."""
        if not array.flags.c_contiguous:
            raise ValueError(f"{name} is not contiguous; its strides are {array.strides}")
        return array.ctypes.data


def span_of(memory: Memory) -> abi.Span:
    return abi.Span(memory.address, memory.size)


def _planned_memory(arenas: list[tuple[Device, Memory]]) -> tuple:
    """A HierarchicalAllocator of these arenas, and what it points at."""
    count = len(arenas)
    spans = (abi.Span * count)(*(span_of(memory) for _, memory in arenas))
    buffers = abi.Span(addressof(spans), count)
    if all(device.type == CPU for device, _ in arenas):
        return abi.HierarchicalAllocator(buffers=buffers), spans
    # runtime/core/portable_type/device.h: two bytes each.
    devices = (ctypes.c_int8 * (2 * count))(*(n for device, _ in arenas for n in device))
    allocator = abi.HierarchicalAllocator(
        buffers=buffers, devices=abi.Span(addressof(devices), count)
    )
    return allocator, spans, devices


class _Files:
    """A mapped program, and the mapped data beside it, until nobody has this any more."""

    def __init__(self, runtime: Any, path: str | Path, data: str | Path | None):
        self.data = None
        opened: list[abi.MmapDataLoader] = []

        def loader(file: str | Path) -> abi.MmapDataLoader:
            opened.append(value_of(runtime.open(os.fsencode(file), NO_MLOCK), f"open {file}"))
            return opened[-1]

        try:
            result = runtime.load_program(byref(loader(path)), INTERNAL_CONSISTENCY)
            self.program = value_of(result, f"load {path}")
            buffers = [self.program.program_data, self.program.constant_segment_data]
            if data is not None:
                self.data = value_of(runtime.load_data(byref(loader(data))), f"load {data}")
                buffers.append(self.data.flat_tensor_data)
        except ExecuTorchError:
            for each in opened:
                runtime.close(byref(each))
            raise
        # Not at exit, when the system takes everything back at once.
        weakref.finalize(self, _close, runtime, opened, buffers).atexit = False


def _integers(kind: type, address: int | None, count: int) -> tuple[int, ...]:
    return tuple((kind * count).from_address(address)) if count else ()


def _close(
    runtime: Any, loaders: list[abi.MmapDataLoader], buffers: list[abi.FreeableBuffer]
) -> None:
    # ~Program and ~FlatTensorDataMap are inline, and do this.
    for buffer in buffers:
        runtime.free_buffer(byref(buffer))
    for loader in loaders:
        runtime.close(byref(loader))


def _destroy(runtime, method: abi.Method, allocator: abi.MallocMemoryAllocator, kept) -> None:
    runtime.destroy_method(byref(method))
    runtime.free_allocator(byref(allocator))


_methods: weakref.WeakSet[Method] = weakref.WeakSet()
