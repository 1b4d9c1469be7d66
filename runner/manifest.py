"""The artifact directory as the runner sees it: a manifest that has been checked."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenloop.runner.errors import RunnerError

# The one manifest format that this runner drives; export/artifact.py writes it.
FORMAT_VERSION = 3
KEYS = {
    "engine": str, "backend": str, "device": str, "methods": list, "batch": int, "max_seq_len": int,
    "max_prefill": int, "vocab_size": int, "hidden_size": int, "tokenizer": dict, "program": dict,
}  # fmt: skip

# What only some engines need.
ENGINE_KEYS = {
    "inductor": {"processor": str, "weights": dict, "state": list, "versions": dict},
    "launches": {
        "processor": str,
        "weights": dict,
        "state": list,
        "waiting_kernels": list,
        "chunk_multiple": int,
    },
}


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest has every entry the runner needs."""

    directory: Path
    manifest: dict

    @property
    def program_file(self) -> Path:
        return self.directory / self.manifest["program"]["file"]

    def sampling_methods(self, present: Iterable[str], method: str, embed: bool) -> list[str]:
        """The names of `method`, which samples: for all rows, where it looks up the embeddings with
        `embed`, and for one row of several. Errors: RunnerError where they are not among those
        `present`."""
        names = [method + "_embed" * embed] + [f"{method}_row"] * (self.manifest["batch"] > 1)
        if missing := set(names) - set(present):
            # What is exported for CudaBackend never samples.
            cuda = self.manifest["backend"] == "cuda"
            raise RunnerError(
                f"{self.directory} has no method {' or '.join(sorted(missing))}, and so only "
                "temperature 0 is possible: export it "
                + ("with --backend launches" if cuda else "again")
            )
        return names


def open_artifact(directory: Path) -> Artifact:
    """Read and check the manifest. Errors: RunnerError, one line naming what does not fit."""
    directory = Path(directory)
    path = directory / "manifest.json"
    if not directory.is_dir():
        raise RunnerError(
            f"{directory} is not an artifact directory; make one with: tokenloop export"
        )
    if not path.is_file():
        raise RunnerError(f"{directory} has no manifest.json, so it is not a whole artifact")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunnerError(f"{path} is not valid JSON: {error}") from None
    except OSError as error:
        raise RunnerError(f"{path} cannot be read: {error.strerror}") from None
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT_VERSION:
        raise RunnerError(
            f"{path} has the format {found!r}, and this tokenloop runs format {FORMAT_VERSION}: "
            "export it again"
        )
    _check_types(path, manifest, KEYS)
    _check_types(path, manifest, ENGINE_KEYS.get(manifest["engine"], {}))
    _check_file(directory, "program", manifest["program"])
    # Weights that are made when they are loaded have no file.
    weights = manifest.get("weights")
    if weights is not None and not (isinstance(weights, dict) and "random" in weights):
        _check_file(directory, "weights", weights)
    return Artifact(directory, manifest)


def _check_types(path: Path, manifest: dict, keys: dict[str, type]) -> None:
    for key, kind in keys.items():
        if not isinstance(manifest.get(key), kind):
            raise RunnerError(
                f"{path}: {key} is {manifest.get(key)!r}, but it must be of type {kind.__name__}"
            )


def _check_file(directory: Path, key: str, entry: Any) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("file"), str):
        raise RunnerError(
            f"{directory / 'manifest.json'}: {key} is {entry}, but it must name a file"
        )
    path, size = directory / entry["file"], entry.get("bytes")
    if not path.is_file():
        raise RunnerError(f"{path} is missing, though the manifest names it: export it again")
    if path.stat().st_size != size:
        raise RunnerError(
            f"{path} has {path.stat().st_size} bytes and should have {size}: it is "
            "truncated or of another export; export it again"
        )
