"""An artifact that does not fit ends in one line on standard error, before any token is made."""

import json
import os
import shutil

import pytest

from tokenloop.runner.manifest import FORMAT_VERSION


@pytest.fixture
def altered(tiny_artifact, tmp_path):
    """A function that copies the tiny artifact to `copy`, with other values in its manifest.

    `**{"program.bytes": 3}` sets an entry of an entry; None removes it.
    """

    def alter(**entries):
        directory = tmp_path / "copy"
        shutil.copytree(tiny_artifact, directory)
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        for path, value in entries.items():
            *parents, key = path.split(".")
            entry = manifest
            for parent in parents:
                entry = entry[parent]
            assert entry.get(key) != value
            entry[key] = value
            if value is None:
                del entry[key]
        (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        return directory

    return alter


@pytest.fixture
def refuses(run_script, tmp_path):
    """A function that runs the artifact `copy` and checks that one line is all, and what it says.

    It runs in the artifact's parent, so that its name in the message is short."""

    def run(*words, artifact="copy"):
        done = run_script("runner/run.py", "--artifact", artifact, "hello", cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert done.stderr.startswith("runner/run.py: error: ")
        assert done.stderr.count("\n") == 1 and done.stderr.endswith("\n"), done.stderr
        for word in words:
            assert str(word) in done.stderr

    return run


def test_an_unaltered_copy_runs(altered, run_script, tmp_path):
    altered()
    done = run_script("runner/run.py", "--artifact", "copy", "hello", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_directory_that_does_not_exist(refuses):
    refuses("nowhere is not an artifact directory", "tokenloop export", artifact="nowhere")


def test_the_default_artifact_before_any_export(run_script, tmp_path):
    done = run_script("runner/run.py", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "runner/run.py: error: artifacts/gemma3-xnnpack is not an artifact directory; make one "
        "with: tokenloop export\n"
    )


def test_a_file_instead_of_a_directory(altered, refuses):
    altered()
    refuses("model.pte is not an artifact directory", artifact="copy/model.pte")


def test_no_manifest(altered, refuses):
    (altered() / "manifest.json").unlink()
    refuses("copy has no manifest.json")


@pytest.mark.parametrize("data", [b"", b'{"format": 1,', b'{"format": "\xff"}'])
def test_a_manifest_that_is_not_json(altered, refuses, data):
    (altered() / "manifest.json").write_bytes(data)
    refuses("copy/manifest.json is not valid JSON")


@pytest.mark.parametrize("data, found", [(b"[]", None), (b"{}", None), (b'{"format": 1}', 1)])
def test_a_manifest_of_another_format(altered, refuses, data, found):
    (altered() / "manifest.json").write_bytes(data)
    refuses(f"has the format {found}", f"runs format {FORMAT_VERSION}", "export it again")


@pytest.mark.parametrize("key, value", [("max_prefill", None), ("vocab_size", "many")])
def test_an_entry_that_is_missing_or_of_another_type(altered, refuses, key, value):
    altered(**{key: value})
    refuses(f"{key} is {value!r}", "type int")


def test_an_engine_that_is_no_name(altered, refuses):
    altered(engine=["inductor"])
    refuses("engine is ['inductor'], but it must be of type str")


def test_weights_that_are_no_file(altered, refuses):
    altered(weights=5)
    refuses("copy/manifest.json: weights is 5, but it must name a file")


def test_a_manifest_that_names_no_program(altered, refuses):
    altered(**{"program.file": None})
    refuses("copy/manifest.json: program is", "must name a file")


def test_a_missing_program(altered, refuses):
    (altered() / "model.pte").unlink()
    refuses("copy/model.pte is missing")


def test_a_truncated_program(altered, refuses):
    program = altered() / "model.pte"
    size = program.stat().st_size
    os.truncate(program, size - 1)
    refuses(f"{size - 1} bytes and should have {size}", "truncated")


@pytest.mark.parametrize("kept", [0, 64, 4096])
def test_garbage_of_the_right_size(altered, refuses, kept):
    program = altered() / "model.pte"
    data = program.read_bytes()
    garbage = bytes(i * 167 % 251 for i in range(len(data) - kept))
    program.write_bytes(data[:kept] + garbage)
    refuses("copy/model.pte is not a program that ExecuTorch can load", "export it again")


def test_a_cut_program_whose_manifest_agrees(altered, refuses):
    directory = altered(**{"program.bytes": 30_000})
    os.truncate(directory / "model.pte", 30_000)
    refuses("copy/model.pte")


def test_an_operator_that_this_executorch_lacks(altered, refuses):
    program = altered() / "model.pte"
    data = program.read_bytes()
    assert b"aten::argmax" in data
    program.write_bytes(data.replace(b"aten::argmax", b"aten::argmux"))
    refuses("copy/model.pte: a method cannot be loaded (Missing operator: [", "] aten::argmux")


def test_a_backend_that_this_executorch_lacks(altered, refuses):
    altered(backend="cuda")
    refuses("this ExecuTorch has no CudaBackend", "XnnpackBackend")


def test_a_backend_that_nobody_knows(altered, refuses):
    altered(backend="abacus")
    refuses("backend 'abacus' is unknown", "xnnpack, portable, cuda")


def test_another_engine(altered, refuses):
    altered(engine="steam")
    refuses("the engine 'steam'", "executorch, inductor, launches are what it has")


def test_another_batch(altered, refuses):
    altered(batch=4)
    refuses("copy/model.pte: prefill has 2 inputs and 1 outputs; 3 and 1 are right")


@pytest.mark.parametrize(
    "key, slot",
    [
        ("max_prefill", "prefill's tokens is (1, 7)"),
        ("vocab_size", "prefill's logits is (1, 259)"),
        ("hidden_size", "decode_embedded's hidden is (1, 1, 64)"),
        ("max_seq_len", "caches have 200 positions"),
    ],
)
@pytest.mark.parametrize("value", [5, 300])
def test_a_size_that_the_program_does_not_have_names_the_slot(altered, refuses, key, slot, value):
    altered(**{key: value})
    refuses(f"copy/model.pte: {'its' if key == 'max_seq_len' else ''}", slot, value)


@pytest.mark.parametrize("data", [None, b"", b"{}", b"\x00\xff"])
def test_a_tokenizer_that_is_missing_or_broken(altered, refuses, data):
    path = altered() / "tokenizer.json"
    path.unlink()
    if data is not None:
        path.write_bytes(data)
    refuses("copy/tokenizer.json", "export the artifact again")


def test_a_tokenizer_entry_that_is_incomplete(altered, refuses):
    altered(**{"tokenizer.eos_token_ids": None})
    refuses("eos_token_ids")
