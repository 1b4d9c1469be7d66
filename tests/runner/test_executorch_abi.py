"""The structures and numbers are those of the installed headers, as a compiler lays them out."""

import ctypes
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tokenloop.runner import RunnerError
from tokenloop.runner.engines import executorch_abi as abi
from tokenloop.runner.engines import executorch_runtime

ROOT = Path(importlib.util.find_spec("executorch").submodule_search_locations[0])
COMPILER = shutil.which("g++") or shutil.which("clang++")
# Structure -> its C++ type, and the members for its fields; - is a field that has none.
LAYOUTS = [
    (abi.Span, "runtime::Span<uint8_t>", "data_ length_"),
    (abi.Span, "runtime::ArrayRef<runtime::EValue>", "Data Length"),
    (abi.EValue, "runtime::EValue", "payload tag"),
    (
        abi.TensorImpl,
        "runtime::etensor::TensorImpl",
        "sizes_ dim_order_ strides_ data_ dim_ numel_ numel_bound_ type_ shape_dynamism_ "
        "device_.type_ device_.index_",
    ),
    (
        abi.MmapDataLoader,
        "extension::MmapDataLoader",
        "- file_name_ file_size_ page_size_ fd_ mlock_config_",
    ),
    (abi.FreeableBuffer, "runtime::FreeableBuffer", "data_ free_fn_context_ size_"),
    (
        abi.Program,
        "runtime::Program",
        "program_data_ loader_ internal_program_ segment_base_offset_ constant_segment_data_ "
        "pte_data_map_",
    ),
    (
        abi.DataMap,
        "extension::FlatTensorDataMap",
        "- header_ flat_tensor_data_ flat_tensor_ loader_",
    ),
    (abi.Method, "runtime::Method", "-"),
    (abi.MethodMeta, "runtime::MethodMeta", "s_plan_"),
    (
        abi.TensorInfo,
        "runtime::TensorInfo",
        "sizes_ dim_order_ name_ scalar_type_ is_memory_planned_ nbytes_",
    ),
    (
        abi.MallocMemoryAllocator,
        "extension::MallocMemoryAllocator",
        "- begin_ end_ cur_ size_ prof_id_ mem_ptrs_",
    ),
    (
        abi.HierarchicalAllocator,
        "runtime::HierarchicalAllocator",
        "span_array_ buffers_ planned_buffer_devices_",
    ),
    (
        abi.MemoryManager,
        "runtime::MemoryManager",
        "method_allocator_ planned_memory_ temp_allocator_",
    ),
    (abi.BackendOption, "runtime::BackendOption", "key value -"),
]
RESULTS = [
    (ctypes.c_char_p, "const char*"),
    (ctypes.c_uint32, "runtime::Tag"),
    (ctypes.c_int64, "int64_t"),
    (abi.MmapDataLoader, "extension::MmapDataLoader"),
    (abi.Program, "runtime::Program"),
    (abi.DataMap, "extension::FlatTensorDataMap"),
    (abi.Device, "runtime::etensor::Device"),
    (abi.Method, "runtime::Method"),
    (abi.MethodMeta, "runtime::MethodMeta"),
    (abi.TensorInfo, "runtime::TensorInfo"),
]
SCALAR_TYPES = "Byte Char Short Int Long Half Float Double Bool UInt16 UInt32 UInt64"
HEADER = """
#include <cinttypes>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <new>
#include <executorch/extension/data_loader/mmap_data_loader.h>
#include <executorch/extension/flat_tensor/flat_tensor_data_map.h>
#include <executorch/extension/memory_allocator/malloc_memory_allocator.h>
#include <executorch/runtime/backend/options.h>
#include <executorch/runtime/executor/program.h>
using namespace executorch;
template <typename T> void print_bytes(const char* name, const T& object) {
  printf("\\"%s\\": \\"", name);
  for (size_t i = 0; i < sizeof(T); i++)
    printf("%02x", reinterpret_cast<const unsigned char*>(&object)[i]);
  printf("\\",\\n");
}
template <typename T> void print_option(const char* name, T value) {
  alignas(8) static unsigned char memory[sizeof(runtime::BackendOption)];
  memset(memory, 0, sizeof memory);
  auto* option = new (memory) runtime::BackendOption;
  strcpy(option->key, "some_key");
  option->value = value;
  print_bytes(name, *option);
}
int main() {
  printf("{");
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """What a C++ program prints that was compiled against the wheel's headers."""
    if COMPILER is None:
        pytest.skip("there is no C++ compiler")
    lines = [HEADER]

    def number(name, expression):
        lines.append(f'printf("\\"%s\\": %lld,\\n", "{name}", (long long)({expression}));')

    for _, kind, members in LAYOUTS:
        number(kind, f"sizeof({kind})")
        for member in members.split():
            if member != "-":
                number(f"{kind}.{member}", f"offsetof({kind}, {member})")
    for _, kind in RESULTS:
        number(f"Result<{kind}>", f"sizeof(runtime::Result<{kind}>)")
        number(f"Result<{kind}>.hasValue_", f"offsetof(runtime::Result<{kind}>, hasValue_)")
    for code in range(64):
        lines.append(
            f'printf("\\"error {code}\\": \\"%s\\",\\n", '
            f"runtime::to_string(static_cast<runtime::Error>({code})));"
        )
    for name in SCALAR_TYPES.split():
        number(name, f"runtime::etensor::ScalarType::{name}")
    for name in ("None", "Tensor", "Double", "Int", "Bool"):
        number(f"Tag::{name}", f"runtime::Tag::{name}")
    number("NO_MLOCK", "extension::MmapDataLoader::MlockConfig::NoMlock")
    number("INTERNAL_CONSISTENCY", "runtime::Program::Verification::InternalConsistency")
    lines.append('print_option("bool", true); print_option("int", -7);')
    lines.append('std::array<char, 256> text{}; strcpy(text.data(), "text");')
    lines.append('print_option("str", text);')
    lines.append('print_bytes("allocator", extension::MallocMemoryAllocator());')
    lines.append('printf("\\"end\\": 0}");}')
    directory = tmp_path_factory.mktemp("layout")
    (directory / "layout.cpp").write_text("\n".join(lines))
    include = ROOT / "include"
    command = [
        COMPILER, "-std=c++17", "-w", "-fno-access-control", "-DC10_USING_CUSTOM_GENERATED_MACROS",
        "-I", include, "-I", include / "executorch/runtime/core/portable_type/c10",
        directory / "layout.cpp", ROOT / "lib/libexecutorch.so", f"-Wl,-rpath,{ROOT / 'lib'}",
        "-o", directory / "layout",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    done = subprocess.run([directory / "layout"], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("structure, kind, members", LAYOUTS, ids=[kind for _, kind, _ in LAYOUTS])
def test_a_structure_is_laid_out_as_the_headers_are(compiled, structure, kind, members):
    assert ctypes.sizeof(structure) == compiled[kind]
    for (field, *_), member in zip(structure._fields_, members.split(), strict=True):
        if member != "-":
            assert getattr(structure, field).offset == compiled[f"{kind}.{member}"], field


@pytest.mark.parametrize("value, kind", RESULTS, ids=[kind for _, kind in RESULTS])
def test_a_result_has_its_flag_where_the_headers_do_and_is_large_enough(compiled, value, kind):
    structure = abi.result_of(value)
    assert structure.has_value.offset == compiled[f"Result<{kind}>.hasValue_"]
    # Up to 16 bytes come back in registers, for libffi, and never so for C++.
    assert ctypes.sizeof(structure) >= max(17, compiled[f"Result<{kind}>"])


def test_every_function_that_returns_a_result_is_declared_with_a_padded_one():
    structures = {result for _, result, _ in abi.FUNCTIONS.values() if hasattr(result, "_fields_")}
    assert structures == {abi.result_of(value) for value, _ in RESULTS}


def test_errors_have_the_headers_names(compiled):
    names = {code: compiled[f"error {code}"].removeprefix("Error::") for code in range(1, 64)}
    assert {code: name for code, name in names.items() if name != "Unknown"} == abi.ERRORS


def test_numbers_are_the_headers(compiled):
    runtime = executorch_runtime
    assert list(runtime.DTYPES) == [compiled[name] for name in SCALAR_TYPES.split()]
    assert (compiled["Tag::None"], compiled["Tag::Tensor"]) == (runtime.NONE, runtime.TENSOR)
    assert {
        compiled["Tag::Double"]: "as_double",
        compiled["Tag::Int"]: "as_int",
        compiled["Tag::Bool"]: "as_bool",
    } == runtime.SCALARS
    assert compiled["NO_MLOCK"] == runtime.NO_MLOCK
    assert compiled["INTERNAL_CONSISTENCY"] == runtime.INTERNAL_CONSISTENCY


@pytest.mark.parametrize("value", [True, -7, "text"])
def test_a_backend_option_has_the_bytes_that_cpp_gives_it(compiled, value):
    option = executorch_runtime.backend_option("some_key", value)
    assert bytes(option).hex() == compiled[type(value).__name__]


def test_a_new_allocator_has_the_bytes_that_its_constructor_gives_it(compiled):
    allocator = abi.MallocMemoryAllocator(prof_id=-1)
    assert bytes(allocator)[8:].hex() == compiled["allocator"][16:]


# The installation


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """A function that puts an executorch with this version.py first on the path, in its place."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "executorch", raising=False)
    abi.functions.cache_clear()

    def install(text: str | None):
        (tmp_path / "executorch/lib").mkdir(parents=True)
        (tmp_path / "executorch/__init__.py").touch()
        if text is not None:
            (tmp_path / "executorch/version.py").write_text(text)

    yield install
    abi.functions.cache_clear()


@pytest.mark.parametrize("version", ["1.5.0", "1.6.0a0", "1.5.10"])
def test_another_version_is_named_beside_the_one_that_is_needed(installed, version):
    installed(f'__version__ = "{version}+cpu"\n')
    with pytest.raises(RunnerError, match=f"executorch {version} is installed.*runs 1.5.1: pip"):
        abi.functions()


@pytest.mark.parametrize("text", [None, "", '__version__ = "1.5.1"\n'])
def test_an_executorch_without_version_or_libraries_is_named(installed, tmp_path, text):
    installed(text)
    with pytest.raises(RunnerError, match=f"{tmp_path}/executorch is no executorch 1.5.1"):
        abi.functions()


def test_no_executorch_at_all(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    abi.functions.cache_clear()
    with pytest.raises(RunnerError, match="executorch is not installed: pip install"):
        abi.functions()
    abi.functions.cache_clear()
