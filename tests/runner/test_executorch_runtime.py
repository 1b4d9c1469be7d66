"""Programs run without torch: memory is used in place and shared, and what does not fit raises."""

import gc
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tokenloop.runner import RunnerError
from tokenloop.runner.engines import executorch_runtime
from tokenloop.runner.engines.executorch_runtime import ExecuTorchError, Program

# Values that count up, so that a wrong address or order shows.
ROWS = np.arange(32, dtype=np.float32).reshape(8, 4)
BUFFER_MB = 64


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """A function (name, methods, ...) -> path of a .pte. `methods` has for each name a function or
    module, and its example inputs."""
    import torch
    from executorch.exir import ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass

    class Function(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, *arguments):
            return self.function(*arguments)

    def export(name, methods, planned=False, dynamic_shapes=None, **options):
        programs = {}
        for method, (function, inputs) in methods.items():
            module = function if isinstance(function, torch.nn.Module) else Function(function)
            shapes = (dynamic_shapes or {}).get(method)
            programs[method] = torch.export.export(module, inputs, dynamic_shapes=shapes)
        edge = to_edge_transform_and_lower(programs, **options)
        planning = MemoryPlanningPass(
            alloc_graph_input=planned, alloc_graph_output=planned, share_mutable_buffers=not planned
        )
        config = ExecutorchBackendConfig(
            memory_planning_pass=planning, emit_mutable_buffer_names=not planned
        )
        path = tmp_path_factory.mktemp("programs") / f"{name}.pte"
        path.write_bytes(edge.to_executorch(config).buffer)
        return path

    return export


@pytest.fixture(scope="module")
def path(export) -> Path:
    """A program whose methods `write` and `read` share a table [8, 4].

    write(rows [n, 4], places [n]) -> (rows * 2, the places' sum); read(scale [4]) -> table * scale
    """
    import torch

    class Table(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(8, 4))
            self.register_buffer("reads", torch.zeros(1))

    class Write(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.state = state

        def forward(self, rows, places):
            self.state.table.index_put_((places,), rows)
            return rows * 2.0, places.sum()

    class Read(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.state = state

        def forward(self, scale):
            self.state.reads.add_(1.0)
            return self.state.table * scale

    state = Table()
    n = torch.export.Dim("n", min=1, max=8)
    return export(
        "table",
        {
            "write": (Write(), (torch.ones(8, 4), torch.arange(8))),
            "read": (Read(), (torch.ones(4),)),
        },
        dynamic_shapes={"write": {"rows": {0: n}, "places": {0: n}}},
        constant_methods={"n": 7, "ids": [1, 106], "flag": True, "off": False, "half": 0.5},
    )


@pytest.fixture
def program(path):
    return Program(path)


def write(method, *places: int) -> list:
    return method.call([ROWS[list(places)], np.array(places)])


def table(program) -> np.ndarray:
    """The shared table, copied."""
    return program.load_method("read").call([np.ones(4, np.float32)])[0].copy()


# What a program has


def test_methods_have_names_and_slots(program):
    assert set(program.method_names()) == {"write", "read", "n", "ids", "flag", "off", "half"}
    meta = program.method_meta("write")
    slots = [(slot.dtype, slot.shape, slot.nbytes) for slot in meta.inputs + meta.outputs]
    assert slots == [
        (np.float32, (8, 4), 128), (np.int64, (8,), 64),
        (np.float32, (8, 4), 128), (np.int64, (), 8),
    ]  # fmt: skip
    assert not any(slot.is_memory_planned for slot in meta.inputs + meta.outputs)
    meta = program.method_meta("ids")
    assert (meta.inputs, meta.outputs) == ([], [None, None])


@pytest.mark.parametrize(
    "name, values",
    [("n", [7]), ("ids", [1, 106]), ("flag", [True]), ("off", [False]), ("half", [0.5])],
)
def test_a_constant_methods_values_are_pythons_own(program, name, values):
    outputs = program.load_method(name).call([])
    assert outputs == values
    assert [type(output) for output in outputs] == [type(value) for value in values]


def test_the_xnnpack_backend_is_registered():
    assert "XnnpackBackend" in executorch_runtime.registered_backends()


# Calls


@pytest.mark.parametrize("places", [(5,), (7, 0), (1, 3, 5), range(8)])
def test_a_dynamic_size_may_be_anything_up_to_its_bound(program, places):
    method = program.load_method("write")
    rows, total = write(method, *places)
    assert rows.dtype == np.float32 and rows.tolist() == (ROWS[list(places)] * 2).tolist()
    assert (total.shape, total.dtype, total.item()) == ((), np.int64, sum(places))


def test_sizes_that_change_from_call_to_call(program):
    method = program.load_method("write")
    for count in (8, 1, 3, 3, 8, 2):
        rows, total = write(method, *range(count))
        assert rows.tolist() == (ROWS[:count] * 2).tolist()
        assert total.item() == sum(range(count))


def test_mutable_buffers_are_shared_and_begin_as_zeros(program):
    assert table(program).tolist() == np.zeros((8, 4)).tolist()
    first, second = program.load_method("write"), program.load_method("write")
    write(first, 1, 3)
    write(second, 3, 6)
    expected = np.zeros((8, 4))
    expected[[1, 3, 6]] = ROWS[[1, 3, 6]]
    assert table(program).tolist() == expected.tolist()


def test_two_programs_of_one_file_share_nothing(path, program):
    write(program.load_method("write"), 2)
    assert table(Program(path)).tolist() == np.zeros((8, 4)).tolist()


def test_an_output_is_a_view_of_the_instances_own_memory(program):
    first, second = program.load_method("write"), program.load_method("write")
    rows, _ = write(first, 1, 2)
    others, _ = write(second, 3, 4)
    assert rows.ctypes.data != others.ctypes.data
    assert rows.tolist() == (ROWS[1:3] * 2).tolist()
    again, _ = write(first, 5, 6)
    assert again.ctypes.data == rows.ctypes.data and again.ctypes.data % 64 == 0
    assert rows.tolist() == again.tolist() == (ROWS[5:7] * 2).tolist()


def test_an_output_is_an_input_as_it_is(program):
    write(program.load_method("write"), *range(8))
    scale = program.load_method("read").call([np.full(4, 2, np.float32)])[0]
    again = program.load_method("write").call([scale, np.arange(8)])[0]
    assert again.tolist() == (ROWS * 4).tolist()


def test_outputs_outlive_their_method_and_program(path):
    rows, _ = write(Program(path).load_method("write"), 1, 2)
    gc.collect()
    # Memory that had been freed would soon be another's.
    others = [np.full(rows.shape, 9, np.float32) for _ in range(1000)]
    assert rows.tolist() == (ROWS[1:3] * 2).tolist() and len(others) == 1000


def test_a_method_outlives_the_program_it_is_of(path):
    method = Program(path).load_method("write")
    gc.collect()
    assert write(method, 2, 3)[1].item() == 5


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="cannot see what is mapped")
def test_what_nobody_uses_any_more_is_unmapped(path):
    def mapped() -> bool:
        return str(path) in Path("/proc/self/maps").read_text()

    gc.collect()
    assert not mapped()
    program = Program(path)
    method = program.load_method("write")
    del program
    assert mapped()
    del method
    assert not mapped()


def test_two_threads_may_run_two_programs(path):
    wrong = []

    def work(place):
        method = Program(path).load_method("write")
        for _ in range(300):
            if write(method, place)[0].tolist() != (ROWS[[place]] * 2).tolist():
                wrong.append(place)

    threads = [threading.Thread(target=work, args=(place,)) for place in (1, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_every_dtype_goes_in_and_comes_out(export):
    import torch

    names = ["uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64", "bool"]
    inputs = tuple(torch.ones(3, dtype=getattr(torch, name)) for name in names)
    path = export("dtypes", {"copy": (lambda *xs: tuple(x.clone() for x in xs), inputs)})
    method = Program(path).load_method("copy")
    arrays = [np.array([1, 0, 3]).astype(name) for name in names]
    outputs = method.call(arrays)
    assert [output.dtype.name for output in outputs] == names
    assert [output.tolist() for output in outputs] == [array.tolist() for array in arrays]


def test_an_input_or_a_constant_that_comes_back_is_a_copy(export):
    import torch

    weight = torch.arange(3.0)
    path = export("back", {"back": (lambda x: (x, weight, x + weight), (torch.ones(3),))})
    method = Program(path).load_method("back")
    outputs = method.call([np.array([5, 6, 7], np.float32)])
    del method
    gc.collect()
    assert [output.tolist() for output in outputs] == [[5, 6, 7], [0, 1, 2], [5, 7, 9]]


def test_planned_inputs_and_outputs_lie_in_the_arenas(export):
    import torch

    path = export("planned", {"double": (lambda x: x * 2.0, (torch.ones(2, 3),))}, planned=True)
    program = Program(path)
    assert program.method_meta("double").outputs[0].is_memory_planned
    inputs = np.arange(6, dtype=np.float32).reshape(2, 3)
    (output,) = program.load_method("double").call([inputs])
    arena = program.arenas[0]
    assert arena.address <= output.ctypes.data < arena.address + arena.bytes.size
    del program
    gc.collect()
    assert output.tolist() == (inputs * 2).tolist()


def test_a_delegate_gives_what_torch_gives(export):
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner

    torch.manual_seed(0)
    linear = torch.nn.Linear(64, 48)
    n = torch.export.Dim("n", min=1, max=16)
    path = export(
        "linear",
        {"linear": (linear, (torch.ones(16, 64),))},
        dynamic_shapes={"linear": ({0: n},)},
        partitioner={"linear": [XnnpackPartitioner()]},
    )
    program = Program(path)
    methods = [program.load_method("linear") for _ in range(2)]
    for count in (16, 1, 5):
        x = torch.randn(count, 64)
        outputs = [method.call([x.numpy()])[0] for method in methods]
        expected = linear(x).detach().numpy()
        for output in outputs:
            np.testing.assert_allclose(output, expected, rtol=1e-5, atol=1e-5)


# What does not fit


@pytest.mark.parametrize(
    "inputs, message",
    [
        ([ROWS], "write takes 2 inputs, not 1"),
        ([ROWS, np.arange(8), np.arange(8)], "write takes 2 inputs, not 3"),
        ([ROWS.astype(np.float64), np.arange(8)], "input 0 is float64; float32 is right"),
        ([ROWS, np.arange(8, dtype=np.int32)], "input 1 is int32; int64 is right"),
        ([ROWS, np.arange(8, dtype=">i8")], "input 1 is >i8; int64 is right"),
        ([ROWS.tolist(), np.arange(8)], "input 0 is list; float32 is right"),
        ([ROWS, 3], "input 1 is int; int64 is right"),
        ([ROWS, None], "input 1 is NoneType; int64 is right"),
        ([ROWS[0], np.arange(8)], r"input 0 is \(4,\); at most \(8, 4\) is right"),
        ([np.ones((9, 4), np.float32), np.arange(8)], r"is \(9, 4\); at most \(8, 4\)"),
        ([np.ones((4, 8), np.float32), np.arange(8)], r"is \(4, 8\); at most \(8, 4\)"),
        ([ROWS[::2], np.arange(4)], "input 0 is not contiguous"),
        ([np.asfortranarray(ROWS), np.arange(8)], "input 0 is not contiguous"),
    ],
)
def test_inputs_that_do_not_fit_are_named(program, inputs, message):
    method = program.load_method("write")
    with pytest.raises(ValueError, match=message):
        method.call(inputs)
    assert write(method, 1, 2)[1].item() == 3


def test_a_static_size_that_differs_raises(program, capfd):
    method = program.load_method("read")
    with pytest.raises(ExecuTorchError, match=r"read with inputs of \[\(3,\)\]: NotSupported"):
        method.call([np.ones(3, np.float32)])
    assert method.call([np.ones(4, np.float32)])[0].shape == (8, 4)


def test_sizes_that_do_not_agree_raise(program, capfd):
    method = program.load_method("write")
    with pytest.raises(ExecuTorchError, match="write: InvalidArgument") as raised:
        method.call([ROWS, np.arange(7)])
    assert raised.value.code == "InvalidArgument"
    assert write(method, 1, 2)[1].item() == 3


def test_an_index_out_of_range_raises(program, capfd):
    method = program.load_method("write")
    with pytest.raises(ExecuTorchError):
        method.call([ROWS[:1], np.array([8])])
    assert table(program).tolist() == np.zeros((8, 4)).tolist()


def test_a_method_that_is_not_there(program, capfd):
    for load in (program.load_method, program.method_meta):
        with pytest.raises(ExecuTorchError, match="nothing: InvalidArgument"):
            load("nothing")


def test_an_operator_that_is_not_registered(path, tmp_path, capfd):
    data = path.read_bytes()
    assert b"aten::mul" in data
    (tmp_path / "other.pte").write_bytes(data.replace(b"aten::mul", b"aten::mux"))
    with pytest.raises(ExecuTorchError, match="load read: OperatorMissing"):
        Program(tmp_path / "other.pte").load_method("read")


def test_a_file_that_is_not_there(tmp_path, capfd):
    with pytest.raises(ExecuTorchError, match=f"open {tmp_path}/nothing.pte: AccessFailed"):
        Program(tmp_path / "nothing.pte")


@pytest.mark.parametrize("kept", [0, 3, 63, 64, 500, -100, -1])
def test_a_truncated_file_is_refused(path, tmp_path, kept, capfd):
    (tmp_path / "cut.pte").write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ExecuTorchError, match="load .*cut.pte: Invalid"):
        Program(tmp_path / "cut.pte")


@pytest.mark.parametrize("kept", [0, 8, 64, 200])
def test_garbage_is_refused(path, tmp_path, kept, capfd):
    data = path.read_bytes()
    garbage = bytes(i * 167 % 251 for i in range(len(data) - kept))
    (tmp_path / "garbage.pte").write_bytes(data[:kept] + garbage)
    with pytest.raises(ExecuTorchError, match="load .*garbage.pte: Invalid"):
        Program(tmp_path / "garbage.pte")


# Options, threads, memory: of a process of their own


def alone(code: str, *arguments) -> dict:
    """What `code` prints as JSON in a new process, whose `runtime` is the module under test."""
    head = """
import json, os, sys
import numpy as np
from tokenloop.runner.engines import executorch_runtime as runtime
def fails(call, *arguments):
    try:
        return call(*arguments)
    except (runtime.ExecuTorchError, runtime.RunnerError) as error:
        return str(error)
def status(key):
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines[key].split()[0]) // 1024
"""
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_torch_is_not_imported_by_a_program_that_runs(path):
    code = """
method = runtime.Program(sys.argv[1]).load_method("read")
method.call([np.ones(4, np.float32)])
print(json.dumps([name for name in sys.modules if name.split(".")[0] in ("torch", "executorch")]))
"""
    assert alone(code, path) == []


def test_a_backends_options_are_checked_by_the_backend():
    code = """
set_option = runtime.set_backend_option
print(json.dumps([
    fails(set_option, "XnnpackBackend", "weight_cache_enabled", value) for value in (True, 1, "on")
] + [fails(set_option, "AbacusBackend", "beads", 10)]))
"""
    refused = "set_option(XnnpackBackend, weight_cache_enabled): InvalidArgument"
    missing = "set_option(AbacusBackend, beads): NotFound"
    assert alone(code) == [None, refused, refused, missing]


@pytest.mark.skipif(not hasattr(executorch_runtime.os, "sched_setaffinity"), reason="not Linux")
def test_there_are_as_many_threads_as_processors_that_may_be_used():
    code = """
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
runtime.set_num_threads()
default = runtime.num_threads()
runtime.set_num_threads(3)
print(json.dumps([default, runtime.num_threads()]))
"""
    assert alone(code) == [1, 3]


def test_methods_in_use_keep_their_threads(path):
    code = """
runtime.set_num_threads(2)
method = runtime.Program(sys.argv[1]).load_method("read")
results = [fails(runtime.set_num_threads, count) for count in (None, 2, 3)]
del method
print(json.dumps(results + [fails(runtime.set_num_threads, 3), runtime.num_threads()]))
"""
    *kept, refused, reset, count = alone(code, path)
    assert (kept, reset, count) == ([None, None], None, 3)
    assert refused.startswith("threads is 3, but a model that is in use was loaded with 2")


@pytest.mark.parametrize("count", [0, -1, 1025, 2**32 + 1])
def test_an_impossible_number_of_threads_is_refused(count):
    with pytest.raises(RunnerError, match=f"threads is {count}; it must be 1 to 1024"):
        executorch_runtime.set_num_threads(count)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="cannot see the memory")
def test_memory_that_is_not_used_is_not_resident(export):
    import torch

    class Store(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(BUFFER_MB * 256, 1024))

        def forward(self, row, place):
            self.state.index_put_((place,), row)
            return row + 1.0

    inputs = (torch.ones(1, 1024), torch.zeros(1, dtype=torch.int64))
    path = export("large", {"store": (Store(), inputs)})
    code = """
runtime.registered_backends()
before = status("VmRSS")
program = runtime.Program(sys.argv[1])
method = program.load_method("store")
sizes = [arena.bytes.size for arena in program.arenas]
loaded = status("VmRSS") - before
method.call([np.ones((1, 1024), np.float32), np.array([0])])
print(json.dumps([sum(sizes) // 2**20, loaded, status("VmRSS") - before, status("VmLck")]))
"""
    planned, loaded, used, locked = alone(code, path)
    # The portable index_put writes all of it, so that the memory can be seen to come with its use.
    assert planned >= BUFFER_MB and used >= BUFFER_MB
    assert loaded < BUFFER_MB / 4
    assert locked == 0
