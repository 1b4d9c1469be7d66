"""The artifact directory as the runner sees it: a manifest and files that have been checked."""

import hashlib
import json
import os
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.files import Digest, Identity, check, check_size, read_file
from tokenloop.runner.json_text import parse_json
from tokenloop.runner.manifest_schema import Fault, check_manifest, named_files

# The one manifest format that this runner drives; export/artifact.py writes it.
FORMAT_VERSION = 5
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest has every entry the runner needs, and whose files have the sizes
    that it says. `verify` says whether what native code reads is hashed before: files.check."""

    directory: Path
    manifest: dict
    verify: bool | None = None
    _checked: set[Identity] = field(default_factory=set)

    @property
    def program_file(self) -> Path:
        """Where the program is, for messages."""
        return self.directory / self.manifest["program"]["file"]

    def checked(self, key: str) -> Path:
        """The path of the "program" or the "weights", for native code that opens the file next.
        Errors: RunnerError for a file that is not what the manifest says."""
        name = self.manifest[key]["file"]
        return check(self.directory, name, self._digest(name), self.verify, self._checked)

    def read(self, name: str) -> bytes:
        """The contents of a file that the manifest names. Errors: as `checked`."""
        return read_file(self.directory, name, self._digest(name))

    def check_files(self) -> None:
        """Look at every file: its size, or with `verify` its hash, too. Errors: as `checked`."""
        for name in named_files(self.manifest).values():
            if self.verify:
                check(self.directory, name, self._digest(name), True, self._checked)
            else:
                check_size(self.directory, name, self._digest(name))

    def _digest(self, name: str) -> Digest:
        return Digest(**self.manifest["files"][name])

    def sampling_methods(self, present: Iterable[str], method: str, embed: bool) -> list[str]:
        """The names of `method`, which samples: for all rows, where it looks up the embeddings with
        `embed`, and for one row of several. Errors: RunnerError where they are not among those
        `present`."""
        names = [method + "_embed" * embed] + [f"{method}_row"] * (self.manifest["batch"] > 1)
        if missing := set(names) - set(present):
            raise RunnerError(
                f"{self.directory} has no method {' or '.join(sorted(missing))}, and so only "
                "temperature 0 is possible: export it again"
            )
        return names


def open_artifact(directory: Path, verify: bool | None = None) -> Artifact:
    """Read and check the manifest, and the sizes of all files. `verify` as files.check has it; true
    hashes all files at once. Errors: RunnerError, one line naming what does not fit."""
    directory = Path(directory)
    path = directory / MANIFEST
    if not os.path.isdir(directory):
        raise RunnerError(
            f"{directory} is not an artifact directory; make one with: tokenloop export"
        )
    if not os.path.lexists(path):
        raise RunnerError(f"{directory} has no manifest.json, so it is not a whole artifact")
    manifest = _parse(path, read_file(directory, MANIFEST))
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if type(found) is not int or found != FORMAT_VERSION:
        raise RunnerError(
            f"{path} has the format {reprlib.repr(found)}, and this tokenloop runs format "
            f"{FORMAT_VERSION}: export it again"
        )
    try:
        check_manifest(manifest)
    except Fault as fault:
        raise RunnerError(f"{path}: {fault}") from None
    if manifest["sha256"] != sha256_of(manifest):
        raise RunnerError(
            f"{path} is not as it was written (its own sha256 is {manifest['sha256'][:12]}..., and "
            f"{sha256_of(manifest)[:12]}... is right): export it again"
        )
    artifact = Artifact(directory, manifest, verify)
    artifact.check_files()
    return artifact


def sha256_of(manifest: dict[str, Any]) -> str:
    """The hash of a manifest's entries but for "sha256" itself, however they are laid out."""
    entries = {key: value for key, value in manifest.items() if key != "sha256"}
    text = json.dumps(entries, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _parse(path: Path, data: bytes) -> Any:
    """Errors: RunnerError for what `parse_json` does not take."""
    try:
        return parse_json(data.decode())
    except ValueError as error:
        raise RunnerError(
            f"{path} is not valid JSON: {error}; it must be the manifest that an export wrote"
        ) from None
