"""The shared library that CudaBackend compiles of a method: what it asks of the runtime, and what
the program says about its weights."""

import struct
from typing import NamedTuple

# What ExecuTorch's runtime gives compiled methods: backends/aoti/common_shims_slim.h and
# backends/cuda/runtime/shims of its source. A library that asks for more is not loaded.
NAMES = """
    _reinterpret_tensor assign_tensors_out check clone clone_preserve_strides copy_
    create_cuda_guard create_cuda_stream_guard create_tensor_from_blob create_tensor_from_blob_v2
    cuda__weight_int4pack_mm cuda_guard_set_index cuda_int4_plain_mm cuda_int5_plain_mm
    cuda_int6_plain_mm cuda_int8_plain_mm cuda_rand cuda_randint_low_out cuda_sort_stable
    delete_cuda_guard delete_cuda_stream_guard delete_tensor_object device_type_cpu
    device_type_cuda dtype_bfloat16 dtype_bool dtype_float16 dtype_float32 dtype_int16 dtype_int32
    dtype_int64 dtype_int8 dtype_uint8 empty_strided get_current_cuda_stream get_data_ptr
    get_device_index get_device_type get_dim get_dtype get_numel get_sizes get_storage_offset
    get_storage_size get_strides grad_mode_is_enabled grad_mode_set_enabled item_bool
    layout_strided new_tensor_handle warn
"""
PREFIX = "aoti_torch_"
SHIMS = {PREFIX + name for name in NAMES.split()}
MAGIC = b"ETCUDAFQN3"
# ELF of 64 bits, little-endian: a section's type for dynamic symbols, and no section.
DYNAMIC_SYMBOLS, UNDEFINED = 11, 0


class Constant(NamedTuple):
    """A tensor of a method: its name, and the key and size of the bytes that it is a view of."""

    name: str
    key: str
    nbytes: int


def imports(library: bytes) -> set[str]:
    """The names of an ELF library's symbols that others have to define. Errors: ValueError for
    what is no library of 64 bits."""
    if library[:6] != b"\x7fELF\x02\x01":
        raise ValueError(f"a library begins with {library[:6]!r}; ELF of 64 bits is right")
    (table,) = struct.unpack_from("<Q", library, 40)
    size, count = struct.unpack_from("<HH", library, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", library, table + i * size) for i in range(count)]
    names = set()
    for _, kind, _, _, offset, length, link, _, _, entry in headers:
        if kind != DYNAMIC_SYMBOLS:
            continue
        strings = headers[link][4]
        for place in range(offset, offset + length, entry):
            name, _, _, section = struct.unpack_from("<IBBH", library, place)
            if section == UNDEFINED and name:
                begin = strings + name
                names.add(library[begin : library.index(b"\0", begin)].decode())
    return names


def missing_shims(library: bytes) -> list[str]:
    """The functions of torch's that the library asks for and ExecuTorch's runtime lacks."""
    asked = {name for name in imports(library) if name.startswith(PREFIX)}
    return sorted(asked - SHIMS)


def decode(payload: bytes) -> tuple[str, list[Constant]]:
    """The key of a method's library and the tensors that it takes, of what the program has for its
    delegate. Errors: ValueError for another format than executorch 1.5.1 writes."""
    if not payload.startswith(MAGIC):
        raise ValueError(f"a delegate begins with {payload[:10]!r}; {MAGIC!r} is right")
    place = len(MAGIC)

    def take(layout: str) -> tuple:
        nonlocal place
        values = struct.unpack_from("<" + layout, payload, place)
        place += struct.calcsize("<" + layout)
        return values

    def text() -> str:
        return take(f"{take('I')[0]}s")[0].decode()

    library, constants = text(), []
    for _ in range(take("I")[0]):
        name, key = text(), text()
        nbytes, _, _, _, dim = take("QiiqI")
        take(f"{2 * dim}q")
        constants.append(Constant(name, key, nbytes))
    return library, constants
