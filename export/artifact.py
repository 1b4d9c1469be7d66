"""The artifact directory: manifest.json beside the program and the tokenizer, written whole."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import BinaryIO

from tokenloop.export.errors import ExportError
from tokenloop.export.new_directory import new_directory

# Raised when the runner of an older tokenloop could no longer drive the artifact.
FORMAT_VERSION = 5
MANIFEST = "manifest.json"
PACKAGES = ("tokenloop", "torch", "executorch")


class SmallWrites:
    """A binary file that is written in small pieces.

    Linux keeps the contents of one large write in pages of 2 MB where the file system can. A runner
    that looks up a few hundred rows of a table would soon have all of those pages in memory.
    """

    PIECE = 1 << 16

    def __init__(self, file: BinaryIO):
        self._file = file

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        for start in range(0, len(view), self.PIECE):
            self._file.write(view[start : start + self.PIECE])
        return len(view)


@contextmanager
def new_artifact(output: Path) -> Iterator[Path]:
    """A directory to fill, which becomes `output` at the end. Nothing is left after an exception,
    and what is left after being killed goes with the next export to the same parent directory.

    An artifact that stands at `output` is replaced only at the end. A link is followed. Errors:
    ExportError where `output` cannot be written, or holds something that is not an artifact.
    """
    try:
        check_replaceable(output)
        target = output.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with new_directory(target) as directory:
            yield directory
            # Somebody may have put something there in the meantime.
            check_replaceable(target)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        raise ExportError(
            f"cannot write {output}: {error.strerror}; choose a writable --output with enough space"
        ) from error


def check_replaceable(output: Path) -> None:
    """Errors: ExportError if something is at `output` and is neither an artifact nor an empty
    directory; OSError if that cannot be found out."""
    while True:
        try:
            found = os.open(output, os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return
        try:
            directory = stat.S_ISDIR(os.fstat(found).st_mode)
            names = os.listdir(found) if directory else [output.name]
            if not names or directory and MANIFEST in names:
                return
            # Another export may have replaced it, and be removing what was listed.
            if output.exists() and os.path.samestat(os.fstat(found), output.stat()):
                raise ExportError(
                    f"{output} exists and is not an artifact; choose another --output"
                )
        finally:
            os.close(found)


def installed_version(package: str) -> str | None:
    """The package's version, None if it is not installed. Not every engine needs every package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_manifest(directory: Path, entries: dict) -> None:
    """Write manifest.json with `entries`, with what is the same for every artifact, and with the
    files' sizes and hashes.

    Errors: ExportError for a token id that the vocabulary does not have.
    """
    tokenizer, vocab_size = entries["tokenizer"], entries["vocab_size"]
    check_ids(tokenizer, vocab_size)
    versions = {name: installed_version(name) for name in PACKAGES}
    seal(directory, {"format": FORMAT_VERSION, **entries, "versions": versions})


def check_ids(tokenizer: dict, vocab_size: int) -> None:
    """Errors: ExportError for an id of the manifest's tokenizer entry that the network lacks."""
    ids = [id for key in ("eos_token_ids", "prefix_ids", "suffix_ids") for id in tokenizer[key]]
    for token_id in (tokenizer["bos_token_id"], *ids):
        if token_id is not None and not 0 <= token_id < vocab_size:
            raise ExportError(
                f"a token that the tokenizer begins or ends with has the id {token_id}; the "
                f"network's vocabulary has the ids 0 to {vocab_size - 1}"
            )


def seal(directory: Path, manifest: dict) -> None:
    """Write manifest.json with `manifest`, the sizes and hashes of the files that it names, and its
    own hash: that of its other entries as JSON without spaces, with sorted keys and in ASCII."""
    tokenizer = manifest["tokenizer"]
    names = [manifest["program"]["file"], manifest.get("weights", {}).get("file")]
    names += [tokenizer[key] for key in ("file", "chat_template", "tool_template")]
    files = {name: _digest(directory / name) for name in sorted(filter(None, names))}
    manifest = manifest | {"files": files}
    manifest.pop("sha256", None)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def _digest(path: Path) -> dict:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}
