"""The binary interface of ExecuTorch's C++ runtime: its structures and functions, for ctypes.

The wheel's Python extension needs torch for its tensors; the shared libraries beside it do not.
The structures are those of one version's headers (site-packages/executorch/include/executorch),
private members and all; tests/runner/test_executorch_abi.py compares them with a compiler's.

Two traps:
- A class with a destructor, such as every Result, comes back in memory that the caller names in a
  hidden argument, however small it is. libffi does so only beyond 16 bytes: `result_of` pads.
- ctypes copies a returned structure once. From then on it may be pointed at, and then it must not
  move, nor be freed before what points at it.
"""

import importlib.util
import re
from ctypes import (
    CDLL,
    RTLD_GLOBAL,
    Structure,
    Union,
    addressof,
    c_bool,
    c_char,
    c_char_p,
    c_double,
    c_int,
    c_int8,
    c_int32,
    c_int64,
    c_size_t,
    c_ssize_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from functools import cache
from pathlib import Path
from types import SimpleNamespace

from tokenloop.runner.errors import RunnerError

VERSION = "1.5.1"  # The layouts and symbols below are this executorch's.
LIBRARIES = ("kernels_optimized", "kernels_quantized", "backend_xnnpack")
# runtime/core/error.h
ERRORS = {
    0x01: "Internal", 0x02: "InvalidState", 0x03: "EndOfMethod", 0x04: "AlreadyLoaded",
    0x10: "NotSupported", 0x11: "NotImplemented", 0x12: "InvalidArgument", 0x13: "InvalidType",
    0x14: "OperatorMissing", 0x15: "RegistrationExceedingMaxKernels",
    0x16: "RegistrationAlreadyRegistered", 0x20: "NotFound", 0x21: "MemoryAllocationFailed",
    0x22: "AccessFailed", 0x23: "InvalidProgram", 0x24: "InvalidExternalData",
    0x25: "OutOfResources", 0x30: "DelegateInvalidCompatibility",
    0x31: "DelegateMemoryAllocationFailed", 0x32: "DelegateInvalidHandle",
}  # fmt: skip


class ExecuTorchError(RuntimeError):
    """The runtime refused an action; `code` is the name of its error."""

    def __init__(self, action: str, number: int):
        self.code = ERRORS.get(number, f"error {number:#x}")
        super().__init__(f"{action}: {self.code}")


class Span(Structure):  # runtime/core/span.h, and ArrayRef of runtime/core/array_ref.h
    _fields_ = [("data", c_void_p), ("size", c_size_t)]


class Payload(Union):  # runtime/core/evalue.h
    _fields_ = [
        ("as_int", c_int64), ("as_double", c_double), ("as_bool", c_bool), ("pointer", c_void_p)
    ]  # fmt: skip


class EValue(Structure):  # runtime/core/evalue.h; a tensor's pointer is its TensorImpl
    _fields_ = [("payload", Payload), ("tag", c_uint32)]


class TensorImpl(Structure):  # runtime/core/portable_type/tensor_impl.h
    _fields_ = [
        ("sizes", c_void_p), ("dim_order", c_void_p), ("strides", c_void_p), ("data", c_void_p),
        ("dim", c_ssize_t), ("numel", c_ssize_t), ("numel_bound", c_size_t), ("type", c_int8),
        ("shape_dynamism", c_uint8), ("device_type", c_int8), ("device_index", c_int8),
    ]  # fmt: skip


class MmapDataLoader(Structure):  # extension/data_loader/mmap_data_loader.h
    _fields_ = [
        ("vtable", c_void_p), ("file_name", c_void_p), ("file_size", c_size_t),
        ("page_size", c_size_t), ("fd", c_int), ("mlock_config", c_int),
    ]  # fmt: skip


class FreeableBuffer(Structure):  # runtime/core/freeable_buffer.h
    _fields_ = [("variant", c_uint64 * 3), ("context", c_void_p), ("size", c_size_t)]


class Program(Structure):  # runtime/executor/program.h
    _fields_ = [
        ("program_data", FreeableBuffer), ("loader", c_void_p), ("internal_program", c_void_p),
        ("segment_base_offset", c_size_t), ("constant_segment_data", FreeableBuffer),
        ("pte_data_map", c_uint64 * 6),
    ]  # fmt: skip


class DataMap(Structure):  # extension/flat_tensor/flat_tensor_data_map.h
    _fields_ = [
        ("vtable", c_void_p), ("header", c_uint64 * 4), ("flat_tensor_data", FreeableBuffer),
        ("flat_tensor", c_void_p), ("loader", c_void_p),
    ]  # fmt: skip


class Device(Structure):
    """runtime/core/portable_type/device.h, and what an error would take beyond it in a Result."""

    _fields_ = [("type", c_int8), ("index", c_int8), ("rest", c_uint16)]


class Method(Structure):  # runtime/executor/method.h
    _fields_ = [("fields", c_uint64 * 20)]


class MethodMeta(Structure):  # runtime/executor/method_meta.h
    _fields_ = [("plan", c_void_p)]


class TensorInfo(Structure):  # runtime/executor/method_meta.h; name is a std::string_view
    _fields_ = [
        ("sizes", Span), ("dim_order", Span), ("name", c_uint64 * 2), ("scalar_type", c_int8),
        ("is_memory_planned", c_bool), ("nbytes", c_size_t),
    ]  # fmt: skip


class MallocMemoryAllocator(Structure):
    """extension/memory_allocator/malloc_memory_allocator.h, and what it has of memory_allocator.h.

    Its constructor is inline, so that the libraries have none. All zeros but these two it is new.
    """

    _fields_ = [
        ("vtable", c_void_p), ("begin", c_void_p), ("end", c_void_p), ("cur", c_void_p),
        ("size", c_uint32), ("prof_id", c_int32), ("blocks", c_void_p * 3),
    ]  # fmt: skip


class HierarchicalAllocator(Structure):  # runtime/core/hierarchical_allocator.h
    _fields_ = [("span_array", Span * 16), ("buffers", Span), ("devices", Span)]


class MemoryManager(Structure):  # runtime/executor/memory_manager.h
    _fields_ = [
        ("method_allocator", c_void_p), ("planned_memory", c_void_p), ("temp_allocator", c_void_p)
    ]  # fmt: skip


class OptionValue(Union):  # runtime/backend/options.h
    _fields_ = [("as_bool", c_bool), ("as_int", c_int32), ("as_string", c_char * 256)]


class BackendOption(Structure):  # runtime/backend/options.h
    _fields_ = [("key", c_char * 64), ("value", OptionValue), ("index", c_uint8)]


@cache
def result_of(value: type) -> type[Structure]:
    """runtime/core/result.h: the value, or in its place the error's number, and which it is."""
    fields = [("value", value), ("has_value", c_bool), ("padding", c_uint64 * 2)]
    return type(f"ResultOf{value.__name__}", (Structure,), {"_fields_": fields})


def value_of(result: Structure, action: str):
    if not result.has_value:
        raise ExecuTorchError(action, c_uint32.from_buffer(result).value)
    return result.value


_THIS, _INDEX = c_void_p, c_size_t
# Name here -> mangled name, result, arguments; a member function's first argument is `this`.
FUNCTIONS = {
    "runtime_init": ("_ZN10executorch7runtime12runtime_initEv", None, ()),
    "num_backends": ("_ZN10executorch7runtime27get_num_registered_backendsEv", c_size_t, ()),
    "backend_name": (
        "_ZN10executorch7runtime16get_backend_nameEm", result_of(c_char_p), (_INDEX,)
    ),
    "set_option": (
        "_ZN10executorch7runtime10set_optionEPKcNS0_4SpanINS0_13BackendOptionEEE",
        c_uint32, (c_char_p, Span),
    ),
    "open": (
        "_ZN10executorch9extension14MmapDataLoader4fromEPKcNS1_11MlockConfigE",
        result_of(MmapDataLoader), (c_char_p, c_int),
    ),
    "close": ("_ZN10executorch9extension14MmapDataLoaderD1Ev", None, (_THIS,)),
    "free_buffer": ("_ZN10executorch7runtime14FreeableBuffer4FreeEv", None, (_THIS,)),
    "free_allocator": ("_ZN10executorch9extension21MallocMemoryAllocatorD1Ev", None, (_THIS,)),
    "load_program": (
        "_ZN10executorch7runtime7Program4loadEPNS0_10DataLoaderENS1_12VerificationE",
        result_of(Program), (c_void_p, c_uint8),
    ),
    "num_methods": ("_ZNK10executorch7runtime7Program11num_methodsEv", c_size_t, (_THIS,)),
    "method_name": (
        "_ZNK10executorch7runtime7Program15get_method_nameEm",
        result_of(c_char_p), (_THIS, _INDEX),
    ),
    "method_meta": (
        "_ZNK10executorch7runtime7Program11method_metaEPKc",
        result_of(MethodMeta), (_THIS, c_char_p),
    ),
    "load_data": (
        "_ZN10executorch9extension17FlatTensorDataMap4loadEPNS_7runtime10DataLoaderE",
        result_of(DataMap), (c_void_p,),
    ),
    "load_method": (
        "_ZNK10executorch7runtime7Program11load_methodEPKcPNS0_13MemoryManagerEPNS0_11EventTracerE"
        "PKNS0_12NamedDataMapEPKNS0_21LoadBackendOptionsMapENS0_4SpanIKNS0_6KernelEEE",
        result_of(Method), (_THIS, c_char_p, c_void_p, c_void_p, c_void_p, c_void_p, Span),
    ),
    "num_inputs": ("_ZNK10executorch7runtime10MethodMeta10num_inputsEv", c_size_t, (_THIS,)),
    "num_outputs": ("_ZNK10executorch7runtime10MethodMeta11num_outputsEv", c_size_t, (_THIS,)),
    "input_tag": (
        "_ZNK10executorch7runtime10MethodMeta9input_tagEm",
        result_of(c_uint32), (_THIS, _INDEX),
    ),
    "output_tag": (
        "_ZNK10executorch7runtime10MethodMeta10output_tagEm",
        result_of(c_uint32), (_THIS, _INDEX),
    ),
    "input_info": (
        "_ZNK10executorch7runtime10MethodMeta17input_tensor_metaEm",
        result_of(TensorInfo), (_THIS, _INDEX),
    ),
    "output_info": (
        "_ZNK10executorch7runtime10MethodMeta18output_tensor_metaEm",
        result_of(TensorInfo), (_THIS, _INDEX),
    ),
    "num_planned_buffers": (
        "_ZNK10executorch7runtime10MethodMeta26num_memory_planned_buffersEv", c_size_t, (_THIS,)
    ),
    "planned_buffer_size": (
        "_ZNK10executorch7runtime10MethodMeta26memory_planned_buffer_sizeEm",
        result_of(c_int64), (_THIS, _INDEX),
    ),
    "planned_buffer_device": (
        "_ZNK10executorch7runtime10MethodMeta28memory_planned_buffer_deviceEm",
        result_of(Device), (_THIS, _INDEX),
    ),
    "set_inputs": (
        "_ZN10executorch7runtime6Method10set_inputsERKNS0_8ArrayRefINS0_6EValueEEE",
        c_uint32, (_THIS, c_void_p),
    ),
    "set_output_data_ptr": (
        "_ZN10executorch7runtime6Method19set_output_data_ptrEPvmm",
        c_uint32, (_THIS, c_void_p, c_size_t, _INDEX),
    ),
    "execute": ("_ZN10executorch7runtime6Method7executeEv", c_uint32, (_THIS,)),
    "get_output": ("_ZNK10executorch7runtime6Method10get_outputEm", c_void_p, (_THIS, _INDEX)),
    "destroy_method": ("_ZN10executorch7runtime6MethodD1Ev", None, (_THIS,)),
    "threadpool": ("_ZN10executorch9extension10threadpool14get_threadpoolEv", c_void_p, ()),
    "thread_count": (
        "_ZNK10executorch9extension10threadpool10ThreadPool16get_thread_countEv",
        c_size_t, (_THIS,),
    ),
    "reset_threadpool": (
        "_ZN10executorch9extension10threadpool10ThreadPool24_unsafe_reset_threadpoolEj",
        c_bool, (_THIS, c_uint32),
    ),
}  # fmt: skip


@cache
def functions() -> SimpleNamespace:
    """FUNCTIONS of the installed libraries. Loading these registers their kernels and backends.

    They release Python's global lock while they run. `malloc_vtable` is MallocMemoryAllocator's.

    Errors: RunnerError where executorch is missing or of another version.
    """
    # Not importlib.metadata, which takes longer than everything else that loads.
    found = importlib.util.find_spec("executorch")
    if found is None:
        raise RunnerError(f"executorch is not installed: pip install executorch=={VERSION}")
    root = Path(found.submodule_search_locations[0])
    try:
        version = re.search(r'__version__ = "([^"+]*)', (root / "version.py").read_text())[1]
        if version != VERSION:
            raise RunnerError(
                f"executorch {version} is installed, and this tokenloop runs {VERSION}: "
                f"pip install executorch=={VERSION}"
            )
        libraries = [CDLL(root / f"lib/libexecutorch_{name}.so") for name in LIBRARIES]
        core = CDLL(root / "lib/libexecutorch.so")
    except (OSError, TypeError) as error:
        raise RunnerError(
            f"{root} is no executorch {VERSION} of a wheel for Linux ({error}): "
            f"pip install executorch=={VERSION}"
        ) from None
    names = SimpleNamespace()
    for name, (symbol, result, arguments) in FUNCTIONS.items():
        # A library also finds the functions of those that it needs; the last one needs the pool's.
        function = libraries[-1][symbol]
        function.restype, function.argtypes = result, arguments
        setattr(names, name, function)
    vtable = c_void_p.in_dll(core, "_ZTVN10executorch9extension21MallocMemoryAllocatorE")
    # Before the first function come the offset to the top and the type information.
    names.malloc_vtable = addressof(vtable) + 16
    names.runtime_init()
    return names


@cache
def load_cuda() -> None:
    """Load the library that registers CudaBackend, where ExecuTorch has it: a wheel for CUDA. It
    needs CUDA's runtime, which torch has loaded. Errors: RunnerError where it cannot be loaded."""
    functions()
    (root,) = importlib.util.find_spec("executorch").submodule_search_locations
    library = Path(root, "lib/libexecutorch_backend_cuda.so")
    if library.exists():
        try:
            # Compiled methods look for its functions among those of the whole process.
            CDLL(library, RTLD_GLOBAL)
        except OSError as error:
            raise RunnerError(
                f"{library} cannot be loaded ({error}): install torch and executorch for one CUDA "
                "version"
            ) from None
