"""Checkpoints by name, from a stand-in of the Hugging Face hub on loopback."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.tiny_checkpoints import write_directory
from tokenloop.export import hub
from tokenloop.export.checkpoint import open_checkpoint
from tokenloop.export.checkpoint.tokenizer_files import write_tokenizer
from tokenloop.export.errors import ExportError

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
SHARDS = "model-1-of-2.safetensors", "model-2-of-2.safetensors"
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}}
OTHERS = "pytorch_model.bin", "consolidated.safetensors", "onnx/config.json", "README.md"
REPOSITORIES = {
    "some/sharded": {
        "config.json": b"{}", "tokenizer.json": b"{ }",
        "model.safetensors.index.json": json.dumps(INDEX).encode(),
        **{name: name.encode() * 1000 for name in SHARDS}, **dict.fromkeys(OTHERS, b"large"),
    },
    "some/single": {"config.json": b"{}", "model.safetensors": b"weights"},
    "some/gguf": {"model.gguf": b"GGUF"},
    "some/gated": {"config.json": b"{}", "model.safetensors": b"weights"},
}  # fmt: skip
TOKEN = "hf_" + "t" * 34
RUN = """
import sys
from pathlib import Path
from tokenloop.export import hub
for name in sys.argv[1:]:
    try:
        print(hub.find(Path(name)))
    except hub.ExportError as error:
        print("error:", error)
"""


class Hub(BaseHTTPRequestHandler):
    """What snapshot_download asks for: a revision's commit, its files, and each of them."""

    def do_HEAD(self) -> None:  # noqa: N802
        self.answer()

    def do_GET(self) -> None:  # noqa: N802
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0].strip("/")
        self.server.asked.append((self.command, path, self.headers.get("Authorization")))
        parts = path.removeprefix("api/models/").split("/")
        files = REPOSITORIES.get("/".join(parts[:2]))
        if files is None:
            return self.refuse(404, "RepoNotFound")
        if (
            path.startswith(("some/gated", "api/models/some/gated"))
            and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        ):
            return self.refuse(403, "GatedRepo")
        repository, kind, rest = "/".join(parts[:2]), parts[2], parts[3:]
        commit = COMMITS.get(rest[0], rest[0])
        if commit not in COMMITS.values():
            return self.refuse(404, "RevisionNotFound")
        if kind == "revision":
            return self.send({"id": repository, "sha": commit, "siblings": []})
        if kind == "tree":
            return self.send(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": digest(data)}
                    for name, data in files.items()
                ]
            )
        name = "/".join(rest[1:])
        data = files[name]
        return self.send(data, {"X-Repo-Commit": commit, "ETag": f'"{digest(data)}"'})

    def refuse(self, status: int, code: str) -> None:
        self.send({"error": code}, {"X-Error-Code": code}, status)

    def send(self, content, headers: dict | None = None, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def find(server, tmp_path):
    """A function: names, variables -> the lines that are printed. Its cache lasts for the test."""

    def run(*names: str, **variables: str) -> list[str]:
        # The library reads them when it is imported.
        own = {
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "NO_PROXY": "*",
            "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }  # fmt: skip
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        result = subprocess.run(
            [sys.executable, "-c", RUN, *names], env=kept | own | variables, cwd=tmp_path,
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        return result.stdout.splitlines()

    return run


def names(directory: str) -> set[str]:
    root = Path(directory)
    return {str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()}


def test_the_files_that_are_read_are_fetched_and_no_others(server, find):
    path, revision, gated = find("some/sharded", "some/single@v1", "some/gated", HF_TOKEN=TOKEN)
    needed = set(REPOSITORIES["some/sharded"]) - set(OTHERS)
    assert names(path) == needed and Path(path).name == COMMITS["main"]
    assert (Path(path) / SHARDS[1]).read_bytes() == SHARDS[1].encode() * 1000
    fetched = [path for kind, path, _ in server.asked if kind == "GET" and "/resolve/" in path]
    assert sorted(file for file in fetched if "sharded" in file) == sorted(
        f"some/sharded/resolve/{COMMITS['main']}/{name}" for name in needed
    )
    assert Path(revision).name == COMMITS["v1"]
    assert names(gated) == {"config.json", "model.safetensors"}
    server.asked.clear()
    # The hub need not be there again.
    again, other = find("some/sharded", "some/single", HF_HUB_OFFLINE="1")
    assert again == path and server.asked == []
    assert other.startswith("error: some/single does not exist here") and "HF_HUB_OFFLINE" in other


def test_what_cannot_be_got_is_said_in_one_line(find):
    said = {
        "some/other": "some/other does not exist here, and cannot be got from the Hugging Face hub",
        "some/single@v2": "cannot be got from the Hugging Face hub",
        "some/gated": "asks for an agreement or a token",
        "some/gguf": "has no config.json; for GGUF download the file",
        "some/si--ngle": "some/si--ngle does not exist, and",
    }
    lines = find(*said)
    assert len(lines) == len(said)
    for line, words in zip(lines, said.values()):
        assert line.startswith("error: ") and words in line
    # Nobody listens there.
    (line,) = find("some/single", HF_ENDPOINT="http://127.0.0.1:9")
    assert line.startswith("error: some/single does not exist here, and cannot be got")


def test_whatever_an_export_looks_for_is_fetched(tmp_path, monkeypatch):
    """Otherwise a model of the hub is another one than the same files in a directory."""
    path = write_directory(tmp_path / "model", "llama", "tokenizer.json", sharded=True)
    asked = set()

    def listen(name):
        method = getattr(Path, name)

        def recorded(own, *arguments):
            found = own.joinpath(*arguments)
            if found.is_relative_to(path):
                asked.add(str(found.relative_to(path)))
            return method(own, *arguments)

        monkeypatch.setattr(Path, name, recorded)

    for name in ("is_file", "glob"):
        listen(name)
    write_tokenizer(open_checkpoint(path), tmp_path)
    # The index says which weights.
    asked -= {"model.safetensors", "model-1-of-2.safetensors", "model-2-of-2.safetensors"}
    assert {"adapter_config.json", "additional_chat_templates/*.jinja"} < asked
    assert [name for name in asked if not any(fnmatch(name, known) for known in hub.FILES)] == []


def test_a_path_that_exists_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some" / "single").mkdir(parents=True)
    for name in ("some/single", "/no/where", "nowhere", "some/model.gguf", "../no/where"):
        assert hub.find(Path(name)) == Path(name)


def test_without_the_library_its_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ExportError, match=r"pip install 'tokenloop\[hub\]'"):
        hub.find(Path("some/single"))
