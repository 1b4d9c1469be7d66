"""How a package's methods are compiled."""

import errno
import resource
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch._inductor.package import package_aoti

from tokenloop.export.errors import ExportError
from tokenloop.export.packed_weights import PackedLinear, parts_by_storage
from tokenloop.export.pt2 import package as pt2
from tokenloop.export.tensors import DTYPES, write_weights


def test_the_same_code_is_compiled_by_one_export_at_a_time(monkeypatch, tmp_path):
    compiling, places = threading.Lock(), []

    def aot_compile(graph, example, options):
        """As Inductor does: where it is told to, in place."""
        assert compiling.acquire(blocking=False)
        file = Path(options["aot_inductor.output_path"], "c0.wrapper.so")
        places.append(file)
        file.write_bytes(b"")
        time.sleep(0.1)
        file.write_bytes(b"compiled")
        source = file.with_suffix(".cpp")
        source.write_bytes(b"// of this place")
        compiling.release()
        return [str(file), str(source)]

    monkeypatch.setattr(pt2, "aot_compile", aot_compile)
    monkeypatch.setattr(pt2, "cache_dir", lambda: str(tmp_path))
    graph = pt2.trace(nn.Linear(2, 2), (torch.ones(1, 2),), None)
    with ThreadPoolExecutor() as pool:
        compiled = list(pool.map(lambda _: pt2.compile_graph(graph, ()), range(3)))
    assert compiled == [{"c0.wrapper.so": b"compiled", "c0.wrapper.cpp": b""}] * 3
    assert len(places) == 3 and len(set(places)) == 1


def test_rows_that_another_vocabulary_of_this_size_was_exported_with_are_not_compiled_again(
    monkeypatch, tmp_path
):
    compiled = []

    def compile_method(method, example, dynamic_shapes=None):
        name = getattr(method, "function", type(method)).__name__
        compiled.append((name, len(example[0])))
        return {name: str(len(example[0])).encode()}

    monkeypatch.setattr(pt2, "compile_method", compile_method)
    monkeypatch.setenv("TOKENLOOP_CACHE", str(tmp_path / "cache"))
    one = pt2.compile_selection(1, 50, 8, 1.0, torch.float32)
    changes = [("MaskRow", 1), ("AdjustRow", 1)]
    assert compiled == [("Embed", 1), ("greedy", 1), ("sample", 1), *changes]
    compiled.clear()
    three = pt2.compile_selection(3, 50, 16, 2.0, torch.bfloat16)
    assert compiled == [("Embed", 3), ("greedy", 3), ("sample", 3)]
    names = ["greedy", "sample", "mask_row", "adjust_row", "greedy_row", "sample_row"]
    assert list(three) == ["embed", *names]
    for name in ("greedy", "sample"):
        assert one[name] == three[f"{name}_row"] == {name: b"1"}
        assert three[name] == {name: b"3"}
    compiled.clear()
    assert pt2.compile_selection(1, 51, 8, 1.0, torch.float32) == one
    assert len(compiled) == 5


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        (
            CppCompileError(["g++"], "In file x.cpp:\nx.cpp:1: fatal error: no space\nended."),
            "^the C\\+\\+ compiler failed: x.cpp:1: fatal error: no space$",
        ),
        (CppCompileError(["g++"], ""), "^the C\\+\\+ compiler failed: $"),
        (InvalidCxxCompiler("nosuch"), "needs a C\\+\\+ compiler: install g\\+\\+, or set CXX$"),
    ],
)
def test_a_compiler_that_fails_is_one_line(monkeypatch, tmp_path, cause, message):
    with pytest.raises(ExportError, match=message):
        compile_with(cause, monkeypatch, tmp_path)


@pytest.mark.parametrize("cause", [OSError(errno.ENOSPC, "full"), KeyError("a fault of Inductor")])
def test_what_is_not_the_compilers_fault_is_not_called_so(monkeypatch, tmp_path, cause):
    with pytest.raises(OSError if isinstance(cause, OSError) else InductorError):
        compile_with(cause, monkeypatch, tmp_path)


def compile_with(cause: Exception, monkeypatch, tmp_path) -> None:
    """Compile where Inductor raises an error for this cause."""

    def aot_compile(*_, **__):
        raise InductorError(cause, None)

    monkeypatch.setattr(pt2, "aot_compile", aot_compile)
    monkeypatch.setattr(pt2, "cache_dir", lambda: str(tmp_path))
    graph = pt2.trace(nn.Linear(2, 2), (torch.ones(1, 2),), None)
    pt2.compile_graph(graph, ())


def files_of_a_method(directory: Path) -> dict[str, list[str]]:
    names = "c0.wrapper.so", "c0.wrapper_metadata.json", "c0.wrapper.cpp"
    for name in names:
        (directory / name).write_bytes(b"{}" if name.endswith("json") else bytes(100_000))
    return {"decode-": [str(directory / name) for name in names]}


def test_an_archive_is_written_as_torch_writes_it(tmp_path):
    (tmp_path / "files").mkdir()
    methods = files_of_a_method(tmp_path / "files")
    pt2.write_archive(tmp_path / "model.pt2", methods, tmp_path / "files")
    (tmp_path / "torchs").mkdir()
    package_aoti(str(tmp_path / "torchs" / "model.pt2"), methods)
    assert (tmp_path / "model.pt2").read_bytes() == (tmp_path / "torchs/model.pt2").read_bytes()


def test_a_full_disk_is_an_error_and_no_crash(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "model.pt2").symlink_to("/dev/full")
    with pytest.raises(OSError) as error:
        methods = files_of_a_method(tmp_path / "files")
        pt2.write_archive(tmp_path / "model.pt2", methods, tmp_path / "files")
    assert error.value.errno == errno.ENOSPC


def test_a_disk_that_is_too_full_for_the_weights_is_a_users_error(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ExportError, match="cannot write model.safetensors: .*too large") as e:
            write_weights({"weight": torch.zeros(100_000)}, tmp_path, random=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(e.value)


def test_weights_in_parts_are_the_file_that_safetensors_writes(tmp_path):
    """Of every dtype, with names of every kind."""
    torch.manual_seed(0)
    places, tensors, parts = {}, {}, {}
    for i, dtype in enumerate(DTYPES):
        for name in (f"b.{i}", f"a.{i}", f"Z{i}.weight", f"ü{i}"):
            tensors[name] = torch.randint(0, 99, (5, 3)).to(dtype)
            places[name] = torch.empty(5, 3, dtype=dtype)
            parts[places[name].untyped_storage()._cdata] = tensors[name].split([2, 3])
    places["whole"] = tensors["whole"] = torch.tensor(1.5)
    (tmp_path / "parts").mkdir()
    assert write_weights(places, tmp_path / "parts", False, parts) == {"file": "model.safetensors"}
    write_weights(tensors, tmp_path, random=False)
    written = (tmp_path / "model.safetensors").read_bytes()
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == written


def test_floats_that_are_joined_when_written_take_no_memory_before(tmp_path):
    rows = [nn.Linear(300, size, bias=False, dtype=torch.bfloat16) for size in (40, 8)]
    joined, place = PackedLinear(rows, 0), PackedLinear(rows, None)
    assert place.parts[1] is rows[1].weight and place.weight.shape == joined.weight.shape
    views = place.views(rows)
    assert [view.out_features for view in views] == [40, 8]
    alone = PackedLinear(rows[:1], None)
    assert alone.weight.data_ptr() == rows[0].weight.data_ptr() and not alone.parts
    parts = parts_by_storage(nn.ModuleList([place, alone]))
    (tmp_path / "parts").mkdir()
    write_weights({"rows": place.weight, "one": alone.weight}, tmp_path / "parts", False, parts)
    write_weights({"rows": joined.weight, "one": alone.weight}, tmp_path, random=False)
    written = (tmp_path / "model.safetensors").read_bytes()
    assert (tmp_path / "parts" / "model.safetensors").read_bytes() == written


def test_a_disk_that_is_too_full_for_weights_in_parts_is_a_users_error(tmp_path):
    place, part = torch.empty(100_000), torch.zeros(50_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(ExportError, match="cannot write model.safetensors: .*too large"):
            parts = {place.untyped_storage()._cdata: [part, part]}
            write_weights({"weight": place}, tmp_path, False, parts)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
