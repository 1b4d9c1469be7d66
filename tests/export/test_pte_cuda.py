"""The program for ExecuTorch's CUDA backend. Its kernels are compiled on a GPU; everything around
them is looked at here, with the methods as CudaBackend is given them in the place of kernels."""

import ctypes
import json
import multiprocessing
import os
import signal
import subprocess
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from executorch.exir._serialize._named_data_store import NamedDataStore
from executorch.exir._serialize._program import deserialize_pte_binary
from executorch.exir.backend.backend_details import PreprocessResult
from executorch.exir.schema import DelegateCall, DeviceType
from torch._inductor import codecache
from torch._inductor import config as inductor_config
from torch._inductor.cpu_vec_isa import invalid_vec_isa, pick_vec_isa, valid_vec_isa_list
from torch._inductor.virtualized import V

from benchmarks.pte_listing import listing, table
from tokenloop.export.artifact import seal
from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.export.errors import ExportError
from tokenloop.models import gemma3
from tokenloop.sampler.greedy import greedy

# ExecuTorch's CUDA backend imports it.
pytest.importorskip("triton", reason="triton is not installed")
from executorch.backends.cuda.cuda_weight_collector import (  # noqa: E402
    AOTI_DEVICE_TYPE_CUDA,
    encode_cuda_weight_metadata,
)

from tokenloop.export.pte import cuda_backend  # noqa: E402
from tokenloop.export.pte.cuda_backend import (  # noqa: E402
    CudaBackend,
    build_program,
    check_shims,
    refused,
    write_program,
)
from tokenloop.export.pte.cuda_inductor import OneChoice, one_form  # noqa: E402
from tokenloop.export.pte.cuda_library import missing_shims  # noqa: E402
from tokenloop.export.pte.side_by_side import SideBySide  # noqa: E402

CHUNK = 7
# The methods' inputs, by the number of rows.
SELECTION = {"greedy": 1, "sample": 6, "sample_unfiltered": 6}
INPUTS = {
    1: {"decode": 2, "decode_embedded": 2, "decode_greedy": 2, "embed": 1, "prefill": 2}
    | SELECTION | {f"{name}_embed": count for name, count in SELECTION.items()},
}  # fmt: skip
INPUTS[3] = INPUTS[1] | {f"{name}_row": n for name, n in SELECTION.items()} | {"prefill": 3}


# Any library that asks for nothing of torch's.
(ROOT,) = find_spec("executorch").submodule_search_locations
LIBRARY = Path(ROOT, "lib/libexecutorch_etdump.so")


def preprocess(edge_programs, compile_specs, received):
    """Stands for CudaBackend's: stores each tensor by its name, as that does, and a library with no
    kernels, as `received.library`."""
    received.programs = {name: program for name, (program,) in edge_programs.items()}
    received.specs = {name: specs for name, (specs,) in compile_specs.items()}
    received.options = CudaBackend.get_aoti_compile_options(received.specs["decode"])
    received.inductor, received.choices = inductor_config.get_config_copy(), V.choices
    received.instructions = pick_vec_isa()
    store = NamedDataStore()
    for program in received.programs.values():
        for name, tensor in {**program.state_dict, **program.constants}.items():
            data = bytes(tensor.contiguous().flatten().view(torch.uint8).numpy())
            store.add_named_data(name, data, external_tag="aoti_cuda_blob")
    store.add_named_data("library", received.library, 1, None)
    output = store.get_named_data_store_output()
    payload = encode_cuda_weight_metadata("library", [])
    return {name: [PreprocessResult(payload, data_store_output=output)] for name in edge_programs}


@pytest.fixture(scope="module", params=[(3, "bfloat16"), (1, "float32")], ids=str)
def made(request, make_checkpoint, tmp_path_factory, one_thread):
    """A program of a tiny network: what it is made of, and its files."""
    rows, dtype = request.param[0], getattr(torch, request.param[1])
    layers = ["sliding_attention", "full_attention"]
    checkpoint = open_checkpoint(make_checkpoint(num_hidden_layers=2, layer_types=layers))
    with torch.device("meta"):
        config = gemma3.Config.from_dict(checkpoint.config)
        model = gemma3.Network(config, 60, rows, dtype)
    load_weights(model, checkpoint, gemma3.checkpoint_name, dtype=dtype)
    model.eval().requires_grad_(False)
    model.limit_chunks(CHUNK)
    made = SimpleNamespace(
        model=model, rows=rows, path=tmp_path_factory.mktemp("program") / "model.pte",
        library=LIBRARY.read_bytes(),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        fake = lambda programs, specs: preprocess(programs, specs, made)  # noqa: E731
        patch.setattr(CudaBackend, "preprocess_multimethod", fake)
        patch.setattr(torch.cuda, "mem_get_info", lambda: (0, 0))
        progress = lambda what: None  # noqa: E731
        made.program, made.methods = build_program(model, {"get_x": 5}, progress, made.path.parent)
        made.kept_instructions = valid_vec_isa_list.cache_info().currsize
    made.data = write_program(made.program, made.path)
    file = deserialize_pte_binary(made.path.read_bytes())
    made.plans = {plan.name: plan for plan in file.program.execution_plan}
    return made


def compile_here(program, specs, collector):
    """Stands for a method's compilation by CudaBackend: its tensors, and a library with no kernels
    but with the method's name at its end."""
    name = CudaBackend.method_name_from_compile_specs(specs)
    store = NamedDataStore()
    store.add_named_data(f"library of {name}", LIBRARY.read_bytes() + name.encode(), 1, None)
    result = PreprocessResult(
        f"library of {name}\nnone".encode(), data_store_output=store.get_named_data_store_output()
    )
    values = {**program.state_dict, **program.constants}
    weights = {name: (tensor, None) for name, tensor in values.items()}
    # The files are removed with what holds them.
    directory = tempfile.gettempdir()
    artifact = collector.materialize(weights, directory, lambda tensor: AOTI_DEVICE_TYPE_CUDA)
    collector.add_preprocess_result(result, artifact, "cuda")
    return result


def lower_here(model, names):
    """lower_for_one, with the method's compilation above."""
    CudaBackend._preprocess_with_weight_collector = compile_here
    cuda_backend.lower_for_one(model, names)


def refuse_here(model, names):
    """lower_for_one, where the runtime lacks an operator."""
    with refused():
        raise RuntimeError("Method embed missing fallback kernels (1 total):\n  - at::a\nPlease")


def tensors(plan, values):
    return [plan.values[i].val for i in values]


def run(program, **inputs):
    """What a method gives as its delegate, whose inputs are in the order of their use."""
    (output,) = program.module()(*(inputs[name] for name in program.graph_signature.user_inputs))
    return output


def test_the_methods_are_those_of_the_other_backends_and_a_step_in_one(made):
    assert made.methods == sorted(INPUTS[made.rows])
    assert set(made.plans) == {*made.methods, "get_x"}


def test_a_method_is_one_call_of_a_delegate_and_no_copy(made):
    for name in made.methods:
        (chain,) = made.plans[name].chains
        (instruction,) = chain.instructions
        assert isinstance(instruction.instr_args, DelegateCall)
        assert made.plans[name].operators == []
        assert [delegate.id for delegate in made.plans[name].delegates] == ["CudaBackend"]


def test_inputs_are_the_callers_and_outputs_planned_memory_of_the_gpu(made):
    for name, count in INPUTS[made.rows].items():
        plan = made.plans[name]
        inputs, outputs = tensors(plan, plan.inputs), tensors(plan, plan.outputs)
        assert (len(inputs), len(outputs)) == (count, 2 if name.endswith("_embed") else 1)
        assert all(tensor.allocation_info is None for tensor in inputs)
        assert all(tensor.allocation_info is not None for tensor in outputs)
        for tensor in (*inputs, *outputs):
            assert tensor.extra_tensor_info.device_type == DeviceType.CUDA


def test_prefill_and_decode_share_weights_and_state_by_name(made):
    state = {f"network.model.layers.{i}.self_attn.cache.{n}" for i in range(2) for n in "kv"}
    weights = []
    for name in ("prefill", "decode"):
        program = made.programs[name]
        assert set(program.graph_signature.buffers_to_mutate.values()) == state
        assert state <= set(program.constants)
        weights.append({n: t for n, t in program.state_dict.items() if n.startswith("network.")})
    assert weights[0].keys() == weights[1].keys()
    # The embedding is the head: one name.
    assert Counter(t.shape for t in weights[0].values())[made.model.lm_head.weight.shape] == 1


def test_tensors_of_one_name_in_two_methods_are_equal(made):
    first = {}
    for program in made.programs.values():
        for name, tensor in {**program.state_dict, **program.constants}.items():
            assert torch.equal(first.setdefault(name, tensor), tensor), name


def test_weights_are_stored_once_in_a_file_of_their_own(made):
    assert made.data == made.path.with_suffix(".ptd")
    files = {file.name for file in made.path.parent.iterdir()}
    assert files == {"model.pte", "model.ptd"}
    weights = sum(p.nbytes for p in made.model.parameters())
    state = sum(b.nbytes for b in made.model.buffers())
    assert weights + state / 3 < made.data.stat().st_size
    # All caches are zeros of two shapes; each tensor begins at a multiple of some bytes.
    assert made.data.stat().st_size < weights + state + 40_000
    assert made.path.stat().st_size < 100_000


def test_attention_has_the_mask_that_the_backends_kernel_takes(made):
    for name, rows in {"prefill": 1, "decode": made.rows}.items():
        nodes = made.programs[name].graph.nodes
        calls = [n for n in nodes if "scaled_dot_product_attention" in str(n.target)]
        assert len(calls) == 2
        for call in calls:
            query, key, _, mask = (argument.meta["val"] for argument in call.args[:4])
            assert mask.dtype == torch.bool
            assert mask.shape == (rows, 1, query.shape[2], key.shape[2])


def test_the_backends_kernel_is_for_bfloat16_alone(made):
    mode = b"ON" if made.model.lm_head.weight.dtype == torch.bfloat16 else b"OFF"
    for name in made.methods:
        specs = {spec.key: spec.value for spec in made.specs[name]}
        assert specs["triton_kernel_mode"] == mode and specs["method_name"] == name.encode()


def test_selection_is_the_samplers(made):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, made.model.config.vocab_size, generator=generator)
    logits[1, 40:60] = logits[1].max()
    logits[2, 5] = torch.nan
    row = "_row" if made.rows > 1 else ""
    for rows, suffix in [(slice(0, made.rows), ""), *((slice(i, i + 1), row) for i in range(3))]:
        chosen = run(made.programs["greedy" + suffix], logits=logits[rows])
        assert torch.equal(chosen, greedy(logits[rows]))


def test_the_networks_methods_give_the_networks_logits(made):
    prompt = {"tokens": torch.tensor([[2, 70, 40, 121]]), "positions": torch.arange(4)}
    prompt |= {"row": torch.tensor([1])} if made.rows > 1 else {}
    actual = run(made.programs["prefill"], **prompt)
    torch.testing.assert_close(actual, made.model.prefill(**prompt))
    position = torch.zeros(made.rows, dtype=torch.int64)
    step = {"token": torch.full((made.rows, 1), 70), "position": position}
    actual = run(made.programs["decode"], **step)
    expected = made.model.decode(**step)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(run(made.programs["decode_greedy"], **step), greedy(expected))


def test_nothing_is_timed(made):
    assert made.options["max_autotune"] is False and made.inductor["max_autotune_gemm"] is True
    assert made.options["aot_inductor.emit_multi_arch_kernel"] is False
    assert made.inductor["deterministic"] is True and type(made.choices) is OneChoice
    # The CPU's instructions are not looked for either, and are by what comes later.
    assert made.instructions is invalid_vec_isa and made.kept_instructions == 0
    # Afterwards all of it is as it was.
    assert not inductor_config.deterministic and type(V.choices) is not OneChoice
    assert isinstance(vars(CudaBackend)["get_aoti_compile_options"], classmethod)


@pytest.mark.parametrize(
    ("blocks", "chosen"),
    [
        ([(16, 32, 16), (16, 64, 64), (16, 32, 128), (16, 128, 128)], (16, 32, 128)),
        ([(16, 16, 32), (16, 32, 32), (16, 64, 32)], (16, 32, 32)),
        ([(32, 32, 16), (64, 32, 128), (64, 64, 64), (128, 128, 64)], (64, 64, 64)),
    ],
)
def test_a_product_has_one_form_by_its_blocks(blocks, chosen):
    params = [{f"BLOCK_{axis}": n for axis, n in zip("MNK", each)} for each in blocks]
    params.append({"k_split": 4})  # another kind of product
    choices = [Mock(**{"params.to_kwargs.return_value": each}) for each in params]
    (one,) = OneChoice()._finalize_template_configs({"mm": iter(choices)}, None, [], "mm")
    assert one is choices[blocks.index(chosen)]


ASKS = """
extern "C" int aoti_torch_cuda_mm_out(), aoti_torch_new_tensor_handle(), elsewhere();
int method() { return aoti_torch_cuda_mm_out() + aoti_torch_new_tensor_handle() + elsewhere(); }
"""


@pytest.mark.parametrize("made", [(1, "float32")], indirect=True, scope="module")
def test_methods_compiled_side_by_side_are_those_compiled_one_after_the_other(
    made, tmp_path, monkeypatch
):
    every = cuda_backend.modules
    few = lambda model: {n: every(model)[n] for n in ("embed", "greedy_embed")}  # noqa: E731
    monkeypatch.setattr(cuda_backend, "modules", few)
    monkeypatch.setattr(CudaBackend, "_preprocess_with_weight_collector", compile_here)
    written = []
    for free, process in [(0, None), (1 << 40, lower_here)]:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, free))
        monkeypatch.setattr(cuda_backend, "lower_for_one", process)
        directory = tmp_path / str(free)
        directory.mkdir()
        program, _ = build_program(made.model, {"get_x": 5}, lambda what: None, directory)
        data = write_program(program, directory / "model.pte")
        written.append([(directory / "model.pte").read_bytes(), data.read_bytes()])
    assert written[0] == written[1] and min(map(len, written[0])) > 10_000


def test_what_a_process_refuses_is_refused_here(tmp_path):
    lists = [["embed"], ["decode"], ["prefill"]]
    message = "the method embed needs at::a, which"
    with (
        pytest.raises(ExportError, match=message),
        SideBySide(refuse_here, torch.nn.Linear(1, 1), lists, tmp_path) as beside,
    ):
        assert len(multiprocessing.active_children()) == 3
        for process in beside._processes[1:]:
            os.kill(process.pid, signal.SIGSTOP)
        beside.preprocess_multimethod({"embed": [None]}, {})
    # Those that would have gone on are killed.
    assert multiprocessing.active_children() == []


LINKED = """
extern "C" const char __a_start[], __a_end[], __b_start[], __b_end[];
extern "C" unsigned long size_of(int kernel) {
    return kernel ? __b_end - __b_start : __a_end - __a_start;
}
extern "C" int byte_of(int kernel, int place) { return (kernel ? __b_start : __a_start)[place]; }
"""


def test_two_kernels_of_one_binary_link(tmp_path):
    binary, wrapper = tmp_path / "same.cubin", tmp_path / "wrapper.cpp"
    binary.write_bytes(bytes(range(100)))
    wrapper.write_text(LINKED)
    with one_form():
        objects = [codecache.convert_cubin_to_obj(str(binary), n, "ld", "objcopy") for n in "ab"]
    assert len({*objects}) == 2
    built = tmp_path / "method.so"
    subprocess.run(["c++", "-shared", "-fPIC", wrapper, *objects, "-o", built], check=True)
    library = ctypes.CDLL(str(built))
    for kernel in range(2):
        assert library.size_of(kernel) == 100
        assert [library.byte_of(kernel, place) for place in range(100)] == [*range(100)]


def test_what_the_runtime_lacks_is_refused_by_name(made, tmp_path):
    source, built = tmp_path / "method.cpp", tmp_path / "method.so"
    source.write_text(ASKS)
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", built], check=True)
    library = built.read_bytes()
    assert missing_shims(library) == ["aoti_torch_cuda_mm_out"]
    check_shims(made.program)
    named = made.program._named_data
    buffers = [library if bytes(each) == made.library else each for each in named.buffers]
    other = SimpleNamespace(
        _named_data=SimpleNamespace(buffers=buffers, pte_data=named.pte_data),
        executorch_program=made.program.executorch_program,
    )
    with pytest.raises(ExportError, match=r"the method \w+ needs aoti_torch_cuda_mm_out, which"):
        check_shims(other)


def test_a_listing_has_every_method_and_the_files_size(made):
    directory = made.path.parent
    keys = "file", "chat_template", "tool_template"
    manifest = {
        "program": {"file": made.path.name}, "tokenizer": dict.fromkeys(keys), "versions": {},
        "batch": made.rows, "dtype": "float32", "max_seq_len": 60,
    }  # fmt: skip
    seal(directory, manifest)
    head, *methods, total = table(listing(directory))
    assert head.split()[0] == "method"
    listed = [line.split()[:2] for line in methods]
    assert listed == [[name, "CudaBackend"] for name in sorted(made.methods)]
    assert total == f"{made.path.stat().st_size / 1e6:.1f} MB in 1 files"


def test_operators_without_kernels_are_refused_by_name():
    message = "Method decode missing fallback kernels (2 total):\n  - at::a\n  - at::b\nPlease add"
    lacks = "the method decode needs at::a, at::b, which"
    with pytest.raises(ExportError, match=lacks), refused():
        raise RuntimeError(message)
    with pytest.raises(RuntimeError, match="another"), refused():
        raise RuntimeError("another")


def test_a_gpu_is_needed(run_here, tiny_checkpoint, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    arguments = ("--model", tiny_checkpoint, "--backend", "cuda")
    done = run_here("export/gemma.py", *arguments, "--output", tmp_path / "x")
    assert done.returncode == 2 and not (tmp_path / "x").exists()
    assert done.stderr == (
        "export/gemma.py: error: --backend cuda needs a CUDA GPU here: kernels are compiled and "
        "tried on it\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cpu"], "--device cpu is not for --backend cuda"),
        (["--quant", "int4"], "--quant int4 is not for --backend cuda, which has bf16, fp32"),
        (["--random-weights", "x"], "--random-weights needs --backend inductor or launches"),
    ],
)
def test_flags_that_are_not_for_cuda_are_refused(run_script, tmp_path, arguments, message):
    done = run_script("export/gemma.py", "--backend", "cuda", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="kernels are compiled on a GPU")
def test_an_artifact_made_on_a_gpu(export_artifact, tiny_checkpoint):
    limits = ("--max-seq-len", 60, "--max-prefill", CHUNK)
    arguments = ("--model", tiny_checkpoint, "--backend", "cuda", *limits)
    artifact = export_artifact("tiny-cuda-pte", *arguments)
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert (manifest["backend"], manifest["device"]) == ("cuda", "cuda")
    assert (manifest["quant"], manifest["dtype"]) == ("bf16", "bfloat16")
    assert manifest["methods"] == sorted(INPUTS[1])
    file = deserialize_pte_binary((artifact / "model.pte").read_bytes())
    for plan in file.program.execution_plan:
        assert plan.operators == []
    assert set(manifest["files"]) == {"model.pte", "model.ptd", manifest["tokenizer"]["file"]}
