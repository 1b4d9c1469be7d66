"""Artifacts for CUDA are made without a GPU: their files, what repeats, and what is refused."""

import json
import os
import subprocess
import sys
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("triton", reason="triton is not installed")

from tokenloop.export.errors import ExportError  # noqa: E402
from tokenloop.export.launches.cubins import Variant, compile_variants  # noqa: E402
from tokenloop.runner.manifest_schema import Fault, check_manifest  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CUDA = ("--device", "cuda", "--max-seq-len", 200, "--max-prefill", 128)
METHODS = {
    "adjust", "adjust_row", "decode_embedded", "embed", "greedy", "greedy_embed", "mask",
    "mask_row", "next_positions", "prefill_128", "prefill_64", "sample", "sample_embed",
    "sample_unfiltered", "sample_unfiltered_embed",
}  # fmt: skip


def read(artifact: Path) -> tuple[dict, dict, dict[str, bytes]]:
    """The manifest, the program and the kernels' code."""
    with zipfile.ZipFile(artifact / "model.launches") as archive:
        program = json.loads(archive.read("program.json"))
        codes = {entry["file"]: archive.read(entry["file"]) for entry in program["kernels"]}
    return json.loads((artifact / "manifest.json").read_text()), program, codes


@pytest.fixture(scope="module")
def package_artifact(export_artifact, tiny_checkpoint):
    return export_artifact("tiny-launches", "--model", tiny_checkpoint, *CUDA)


def test_the_artifact_has_every_method_and_says_what_it_needs(package_artifact):
    manifest, program, codes = read(package_artifact)
    assert set(program["methods"]) == set(manifest["methods"]) == METHODS
    expected = {
        "engine": "launches", "device": "cuda", "processor": "sm_90", "chunk_multiple": 64,
        "max_prefill": 128, "dtype": "bfloat16",
    }  # fmt: skip
    assert {key: manifest[key] for key in expected} == expected
    symbols = {entry["symbol"] for entry in program["kernels"]}
    assert set(manifest["waiting_kernels"]) <= symbols
    # An ELF file for CUDA.
    assert all(code[:4] == b"\x7fELF" for code in codes.values())
    known = {entry["name"] for entry in manifest["state"]} | set(manifest["weights"]["views"])
    from safetensors import safe_open

    with safe_open(package_artifact / "model.safetensors", "pt") as file:
        known |= set(file.keys())
    for method in program["methods"].values():
        assert set(method["tensors"]) <= known
        assert method["launches"]
    names = "greedy", "sample_unfiltered", "sample", "sample_embed"
    assert [len(program["methods"][name]["launches"]) for name in names] == [2, 2, 3, 3]


def test_exports_at_once_give_the_same_bytes(tiny_checkpoint, tmp_path):
    """Two at once have one cache of kernels, and at first it is empty; their directories differ."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    outputs = [tmp_path / "one", tmp_path / "other"]
    exports = []
    for output in outputs:
        # The last of the lengths wins.
        arguments = "--model", tiny_checkpoint, *CUDA, "--max-prefill", 64, "--output", output
        arguments = *arguments, "--draft-tokens", 3
        command = [sys.executable, str(ROOT / "export/gemma.py"), *map(str, arguments)]
        exports.append(subprocess.Popen(command, cwd=tmp_path, env=environment))
    assert [export.wait() for export in exports] == [0, 0]
    files = [sorted(path.name for path in output.iterdir()) for output in outputs]
    assert files[0] == files[1]
    for name in files[0]:
        assert (outputs[0] / name).read_bytes() == (outputs[1] / name).read_bytes(), name
    # It tries drafts, and the runner takes its manifest.
    manifest, program, _ = read(outputs[0])
    rounds = {"round_1", "round_4", "accept_1", "accept_4", "greedy_round"}
    rounds |= {"sample_round", "sample_unfiltered_round", "verify_4"}
    assert manifest["draft_tokens"] == 3
    assert set(program["methods"]) == METHODS - {"prefill_128"} | rounds
    check_manifest(manifest)
    for changes in {"batch": 2}, {"draft_tokens": 4}:
        with pytest.raises(Fault):
            check_manifest(manifest | changes)


def test_a_kernel_that_cannot_be_compiled_is_named_in_one_line():
    module = "tokenloop.models.kernels.rms_norm.triton"
    types = {"x_ptr": "*fp32", "norm_ptr": "*fp32", "h_ptr": "*fp32", "K": "i32"}
    # A block of three elements is none: blocks are powers of two.
    constants = {"eps": 1e-6, "offset": 0.0, "ADD": False, "BLOCK_K": 3} | dict.fromkeys(
        ("branch_ptr", "post_ptr", "scalar_ptr", "total_ptr", "count_ptr")
    )
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    variant = Variant(module, "norm_kernel", (*signature.items(),), (*constants.items(),), (), ())
    with pytest.raises(ExportError, match="norm_kernel cannot be compiled: .+") as caught:
        compile_variants([variant], "sm_90", lambda _: None)
    assert len(str(caught.value).splitlines()) == 1


# The process that compiles kills the one that had started it, and holds its standard output.
KILL = """
import os, signal
from tokenloop.export.launches import cubins
cubins._compile = os.kill
cubins.compile_variants([os.getpid()], signal.SIGKILL, print)
"""


def test_processes_that_compile_end_with_the_one_that_is_killed():
    command = [sys.executable, "-c", KILL]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == -9, done.stderr


def test_layers_of_a_kind_share_their_kernels(export_artifact, make_qwen_checkpoint):
    found = {}
    for layers in (2, 5):
        checkpoint = make_qwen_checkpoint("qwen3", num_hidden_layers=layers)
        arguments = "--model", checkpoint, *CUDA, "--quant", "fp8"
        name = f"launches-{layers}-layers"
        artifact = export_artifact(name, *arguments, script="export/qwen3.py")
        found[layers] = read(artifact)
        assert found[layers][0]["quant"] == "fp8"
        tensors = load_file(artifact / "model.safetensors")
        dtypes = Counter(tensor.dtype for tensor in tensors.values())
        assert dtypes[torch.float8_e4m3fn] == 4 * layers and dtypes[torch.int16] == 1
    assert found[2][2].keys() == found[5][2].keys()
    counts = {
        n: len(program["methods"]["prefill_64"]["launches"]) for n, (_, program, _) in found.items()
    }
    assert counts[5] > 2 * counts[2] - 6


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--gpu-arch", "sm_80"], "--gpu-arch is sm_80; kernels are for sm_90"),
        (["--max-prefill", 100], "--max-prefill is 100; with --device cuda it must be a multiple"),
        (["--gpu-arch", "sm_90", "--backend", "cuda"], "--gpu-arch sm_90 is not for --backend"),
        (["--backend", "inductor"], "--device cuda is not for --backend inductor, which is for"),
    ],
)  # fmt: skip
def test_what_no_kernel_is_for_is_refused_in_one_line(
    run_here, tiny_checkpoint, tmp_path, flags, line
):
    arguments = "--model", tiny_checkpoint, "--device", "cuda", *flags, "--output", tmp_path / "x"
    done = run_here("export/gemma.py", *arguments)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert not any(tmp_path.iterdir())


def test_an_interpreter_that_would_compile_nothing_is_refused(
    run_script, tiny_checkpoint, tmp_path
):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    arguments = "--model", tiny_checkpoint, *CUDA, "--output", tmp_path / "x"
    done = run_script("export/gemma.py", *arguments, cwd=tmp_path, env=environment)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "TRITON_INTERPRET is 1" in done.stderr
