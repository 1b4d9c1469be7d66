"""An artifact that does not fit ends in one line on standard error, before any token is made."""

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from tests.driving import read_manifest, resealed
from tokenloop import runner
from tokenloop.runner import RunnerError, files
from tokenloop.runner.manifest import FORMAT_VERSION, open_artifact, sha256_of

METHODS = [
    *("decode", "decode_embedded", "embed", "greedy", "greedy_embed"),
    *("prefill", "sample", "sample_embed"),
]
TENSOR = {"name": "a", "shape": [2], "dtype": "int64"}
PLACE = {"of": "caches.0.k", "arena": 0, "offset": 0, "shape": [1, 16, 2, 32], "stride": [1] * 4}
# Names that lead out of the artifact, or to no file of it.
OUTSIDE = [
    *("../model.pte", "/etc/passwd", "changed/model.pte", ".", "..", "", "a\0b", "a\nb", "a\\b"),
    *("x" * 256, "\ud800", 3, True, ["model.pte"], {"file": "model.pte"}, None),
]


@pytest.fixture
def altered(tiny_artifact, tmp_path):
    """A function that copies the tiny artifact to `copy`, with other values in its manifest, as if
    an export had written it.

    `**{"program.file": 3}` sets an entry of an entry; ... removes it.
    """

    def alter(**entries):
        directory = tmp_path / "copy"
        shutil.copytree(tiny_artifact, directory)
        manifest = read_manifest(directory)
        for path, value in entries.items():
            *parents, key = path.split(".")
            entry = manifest
            for parent in parents:
                entry = entry[parent]
            assert key not in entry or entry[key] != value
            entry[key] = value
            if value is ...:
                del entry[key]
        write_manifest(directory, manifest)
        return directory

    return alter


def write_manifest(directory, manifest):
    """Write the manifest with its own hash, and those of files as it has them."""
    manifest["sha256"] = sha256_of(manifest)
    (directory / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


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


def test_a_conversation_is_no_longer_than_what_a_context_can_hold(altered):
    """A tokenizer takes 200 bytes for each character, before anything counts tokens."""
    copy = altered(**{"tokenizer.chat_template": "long.jinja"})
    (copy / "long.jinja").write_text("{{ 'a' * messages[0].content | int }}")
    tokenizer = runner.load(resealed(copy)).tokenizer
    conversation = [{"role": "user", "content": "100000"}]
    assert len(tokenizer.apply_chat_template(conversation)) == 100_000
    conversation[0]["content"] += "0"
    with pytest.raises(RunnerError, match="its text has more than 200000 characters"):
        tokenizer.apply_chat_template(conversation)


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


def test_a_manifest_without_end_is_not_read(tmp_path):
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(RunnerError, match="has 1099511627776 bytes; 256 MiB are the most"):
        open_artifact(tmp_path)


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


WRONG = {
    "max_prefill": [..., None, "many", True, 0, -1, 7.0, 2**31, [7], {}],
    "max_seq_len": [1, 2**24 + 1, 10**100],
    "batch": [True, 0],
    "engine": ["steam", ["inductor"], None],
    "backend": ["abacus", "launches", 1],
    "device": ["cqu", None],
    "methods": [None, "greedy", ["greedy", 3], ["decode", "greedy"], [*METHODS, "greedy"]],
    "dtype": ["float31", "__init__"],
    "state": [None, {}, [3], [{"name": "a"}], [TENSOR | {"dtype": "str"}], [TENSOR, TENSOR]],
    "state_places": [None, {}, [3], [], [{"of": "caches.0.k"}], [PLACE], [PLACE | {"of": "a"}]],
    "state[0].shape": [[-1], [2.0], [True], 4, [2] * 9, [2**31 - 1] * 3],
    "files": [..., None, [], {}, {"model.pte": {"bytes": 1, "sha256": "0" * 64}}],
    "files.model.pte": [..., 3, {"bytes": -1, "sha256": "0" * 64}, {"bytes": 3, "sha256": "0G"}],
    "program": [..., "model.pte", {"file": "model.pte", "bytes": 3}],
    "program.file": OUTSIDE,
    "weights": [5, {"file": None}],
    "weights.file": OUTSIDE,
    "tokenizer": [None, [], "tokenizer.json"],
    "tokenizer.file": [*OUTSIDE, "tokenizer.txt", "../tokenizer.json"],
    "tokenizer.chat_template": [..., *OUTSIDE[:-1]],
    "tokenizer.tool_template": [..., *OUTSIDE[:-1]],
    "tokenizer.bos_token_id": [..., "2", True, -1, 259, [2]],
    "tokenizer.eos_token_ids": [..., None, 1, [None], [True], [[1]], ["1"], [1.5], [259], [-1]],
    "tokenizer.prefix_ids": [..., None, 2, ["2"], [True], [259], [-1]],
    "tokenizer.rstrip_ids": [..., {}, ["a"]],
    "tokenizer.shown_ids": [..., None, [-1]],
    "tokenizer.suffix_ids": [..., None, 2, [None], [259]],
    "tokenizer.special_tokens": [..., None, [], {"bos_token": 2}, {"a\nb": "<s>"}],
    "versions": [[], {"torch": 2}, {"": None}],
    "checkpoint": [None, {"file": "x"}, {"file": "x", "sha256": "0"}],
    "sha256": [..., 3, "0" * 63],
    "unknown": [1],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_value_of_another_type_or_range_is_refused_by_name(altered, tiny_artifact, key):
    copy = altered()
    for value in WRONG[key]:
        manifest = read_manifest(tiny_artifact)
        *parents, last = ["files", "model.pte"] if key == "files.model.pte" else key.split(".")
        entry = manifest
        for parent in parents:
            entry = entry["state"][0] if parent == "state[0]" else entry.setdefault(parent, {})
        entry[last] = value
        if value is ...:
            del entry[last]
        if key != "sha256":
            manifest["sha256"] = sha256_of(manifest)
        (copy / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
        with pytest.raises(RunnerError) as caught:
            open_artifact(copy)
        line = str(caught.value)
        assert key.split("[")[0].split(".")[0] in line and "; it must be " in line, (value, line)
        assert line.isprintable() and len(line) < 600, value


def test_an_object_nested_without_end_is_refused_in_one_line(altered, refuses):
    path = altered() / "manifest.json"
    for text in ("[" * 100_000, '{"a":' * 100_000, "[" * 900 + "]" * 900):
        path.write_text(text)
        refuses("copy/manifest.json")
    path.write_text(f'{{"format": {FORMAT_VERSION}, "engine": ' + "[" * 900 + "]" * 900 + "}")
    refuses("copy/manifest.json: engine is [[[...]]]; it must be executorch, inductor or launches")


@pytest.mark.parametrize("text", ['{"format": 4, "format": 4}', '{"format": NaN}'])
def test_json_that_others_read_otherwise_is_refused(altered, refuses, text):
    (altered() / "manifest.json").write_text(text)
    refuses("copy/manifest.json is not valid JSON")


def test_a_manifest_that_was_edited_is_refused(altered, refuses):
    directory = altered()
    manifest = read_manifest(directory)
    manifest["tokenizer"]["bos_token_id"] = 3
    (directory / "manifest.json").write_text(json.dumps(manifest))
    refuses("copy/manifest.json is not as it was written", "export it again")


def test_the_layout_of_a_manifest_says_nothing(altered):
    directory = altered()
    manifest = dict(reversed(read_manifest(directory).items()))
    (directory / "manifest.json").write_text(json.dumps(manifest, indent=7, ensure_ascii=True))
    assert open_artifact(directory).manifest == manifest


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
    resealed(program.parent)
    refuses("copy/model.pte is not a program that ExecuTorch can load", "export it again")


def test_a_cut_program_whose_manifest_agrees(altered, refuses):
    directory = altered()
    os.truncate(directory / "model.pte", 30_000)
    resealed(directory)
    refuses("copy/model.pte")


def test_an_operator_that_this_executorch_lacks(altered, refuses):
    program = altered() / "model.pte"
    data = program.read_bytes()
    assert b"aten::argmax" in data
    program.write_bytes(data.replace(b"aten::argmax", b"aten::argmux"))
    resealed(program.parent)
    refuses("copy/model.pte: a method cannot be loaded (Missing operator: [", "] aten::argmux")


def test_a_backend_that_this_executorch_lacks(altered, refuses):
    altered(backend="cuda")
    refuses("this ExecuTorch has no CudaBackend", "XnnpackBackend")


def test_another_batch(altered, refuses):
    altered(batch=4, methods=[*METHODS, "greedy_row"])
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


@pytest.mark.parametrize("data", [b"", b"{}", b"\x00\xff"])
def test_a_tokenizer_that_is_broken(altered, refuses, data):
    directory = altered()
    (directory / "tokenizer.json").write_bytes(data)
    refuses(f"copy/tokenizer.json has {len(data)} bytes and should have", "export it again")
    resealed(directory)
    refuses("copy/tokenizer.json", "export the artifact again")


# Files


def refusal(directory, verify=None) -> str:
    """The one line that a look at this artifact ends in."""
    with pytest.raises(RunnerError) as caught:
        open_artifact(directory, verify).checked("program")
    (line,) = str(caught.value).splitlines()
    return line


@pytest.mark.parametrize("name", ["model.pte", "tokenizer.json", "manifest.json"])
def test_what_is_no_file_of_the_artifact_is_refused(altered, monkeypatch, tmp_path, name):
    directory = altered()
    path = directory / name
    path.rename(tmp_path / name)
    for target in Path("..", name), tmp_path / name:
        path.symlink_to(target)
        assert f"{name} is a link to" in (line := refusal(directory))
        assert "which is not in the artifact" in line
        path.unlink()
    # The name of a socket may not be long.
    monkeypatch.chdir(directory)
    makers = {
        "a directory": path.mkdir,
        "a FIFO": lambda: os.mkfifo(path),
        "a link to itself": lambda: path.symlink_to(name),
        "a device or socket": lambda: socket.socket(socket.AF_UNIX).bind(name),
    }
    for kind, make in makers.items():
        make()
        assert f"{name} is {kind}; it must be a file" in refusal(directory)
        path.rmdir() if kind == "a directory" else path.unlink()


def test_a_link_to_another_name_of_the_artifact_is_a_file(altered):
    path = altered() / "model.pte"
    path.rename(path.with_name("blob"))
    path.symlink_to("blob")
    assert open_artifact(path.parent).checked("program") == path


def test_a_flipped_byte_is_refused_wherever_it_is(altered, refuses):
    directory = altered()
    for name in ("model.pte", "tokenizer.json"):
        data = (directory / name).read_bytes()
        for place in (0, len(data) // 2, len(data) - 1):
            (directory / name).write_bytes(
                data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]
            )
            refuses(f"copy/{name} is damaged (its sha256 is ")
        (directory / name).write_bytes(data)


def hashed(monkeypatch) -> list[Path]:
    """The files that are hashed from now on."""
    found = []

    def note(file):
        found.append(Path(os.readlink(f"/proc/self/fd/{file.fileno()}")).name)
        return real(file)

    real = files._sha256
    monkeypatch.setattr(files, "_sha256", note)
    return found


@pytest.fixture
def settled(altered, monkeypatch, tmp_path):
    """A function (cache) -> a copy of the artifact that nobody has touched for a while, with that
    directory as the user's cache."""

    def make(cache):
        monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
        directory = altered()
        later = time.time_ns() + 10**10
        monkeypatch.setattr(files.time, "time_ns", lambda: later)
        return directory

    return make


def test_a_program_is_hashed_once_and_again_when_it_was_written(settled, monkeypatch, tmp_path):
    directory = settled(tmp_path / "cache")
    found = hashed(monkeypatch)
    for verify, count in (None, 1), (None, 1), (False, 1), (True, 3), (None, 3):
        open_artifact(directory, verify).checked("program")
        assert len(found) == count, verify
    program = directory / "model.pte"
    # The same contents, and another time when they were written.
    program.write_bytes(program.read_bytes())
    artifact = open_artifact(directory)
    assert [artifact.checked("program") for _ in range(3)] and len(found) == 4
    flip(program, 1000)
    with pytest.raises(RunnerError, match="model.pte is damaged"):
        artifact.checked("program")
    assert len(list((tmp_path / "cache/tokenloop/verified").iterdir())) == 2


def flip(path, place):
    """Change a byte, and nothing that a look at the directory shows but the time of the change."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_file_that_was_written_just_now_is_not_remembered(altered, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    directory, found = altered(), hashed(monkeypatch)
    for _ in range(2):
        open_artifact(directory).checked("program")
    assert found == ["model.pte"] * 2 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["file", "missing", "relative"])
def test_a_cache_that_cannot_be_written_costs_time_and_nothing_else(
    settled, monkeypatch, tmp_path, kind
):
    (tmp_path / "file").write_text("")
    if kind != "file":
        monkeypatch.setenv("HOME", "/dev/null")
    directory = settled({"file": tmp_path / "file", "missing": "", "relative": "cache"}[kind])
    found = hashed(monkeypatch)
    for _ in range(2):
        open_artifact(directory).checked("program")
    assert len(found) == 2


def test_verify_looks_at_every_file_before_anything_is_loaded(settled, tmp_path):
    directory = settled(tmp_path / "cache")
    artifact = open_artifact(directory)
    artifact.checked("program")
    for name in ("model.pte", "tokenizer.json"):
        flip(directory / name, 100)
        assert f"{name} is damaged" in refusal(directory, verify=True)
        flip(directory / name, 100)
    flip(directory / "model.pte", 100)
    assert open_artifact(directory, verify=False).checked("program")
