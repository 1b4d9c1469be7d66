"""A prompt's state in a file, for a later process.

It is an archive of NumPy's (.npz): `header`, JSON as uint8; `ids` int64 [N]; and `state.0` and so
on, the bytes of each tensor as PrefixCache.copies gives them. The archive checks its own sums.
"""

import hashlib
import io
import json
import math
import os
import platform
import stat
import tempfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tokenloop.runner.errors import RunnerError

FORMAT = 1


def write_state(
    path: Path, manifest: dict[str, Any], ids: list[int], copies: list[np.ndarray]
) -> None:
    """Write the state after `ids`, in place of what is there once all is written. Errors:
    RunnerError where it cannot be written."""
    header = {
        "format": FORMAT, "artifact": manifest["sha256"], "processor": processor(manifest),
        "tensors": len(copies),
    }  # fmt: skip
    arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
    arrays["ids"] = np.asarray(ids, np.int64)
    arrays |= {f"state.{i}": copy for i, copy in enumerate(copies)}
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, **arrays)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise RunnerError(f"{path} cannot be written: {error.strerror}") from None


def read_state(path: Path, manifest: dict[str, Any]) -> tuple[list[int], list[np.ndarray]]:
    """The ids and the bytes of the state after them. Errors: RunnerError for a file that is none,
    is damaged, or is of another artifact or kind of processor."""
    try:
        with _open(path) as file, zipfile.ZipFile(file) as archive:
            header = json.loads(_array(archive, "header").tobytes())
            if header.get("format") != FORMAT:
                raise RunnerError(
                    f"{path} has the format {header.get('format')!r}, and this tokenloop reads "
                    f"{FORMAT}: save it again"
                )
            for key, what, right in (
                ("artifact", "the artifact", manifest["sha256"]),
                ("processor", "a processor", processor(manifest)),
            ):
                if header[key] != right:
                    raise RunnerError(
                        f"{path} is the state of {what} {str(header[key])[:12]}, and this is "
                        f"{right[:12]}, which gives other bytes: save it again with this one"
                    )
            ids = _array(archive, "ids")
            copies = [_array(archive, f"state.{i}") for i in range(header["tensors"])]
    except RunnerError:
        raise
    except OSError as error:
        raise RunnerError(f"{path} cannot be read: {error.strerror or error}") from None
    # A RuntimeError is what zipfile says of features that it does not have, and json of depth.
    except (
        AttributeError, EOFError, KeyError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile,
    ) as error:  # fmt: skip
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunnerError(
            f"{path} is no saved state, or damaged ({reason[:80]}): save it again"
        ) from None
    if ids.dtype != np.int64 or ids.ndim != 1 or any(copy.dtype != np.uint8 for copy in copies):
        raise RunnerError(f"{path} is no saved state: it has other types: save it again")
    return ids.tolist(), copies


def _open(path: Path) -> BinaryIO:
    # Another kind of file would keep us waiting for a writer.
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise RunnerError(f"{path} is no regular file: give one that was saved")
    return path.open("rb")


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of the archive, which numpy.savez wrote. All of its bytes are read, for their sum is
    compared at their end, and no memory is taken for a size that the file does not bear out.
    Errors: those of zipfile, and ValueError."""
    entry = archive.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    data = archive.read(entry)
    header = io.BytesIO(data)
    if np.lib.format.read_magic(header) != (1, 0):
        raise ValueError(f"{name} is an array of another version")
    shape, _, dtype = np.lib.format.read_array_header_1_0(header)
    start = header.tell()
    if math.prod(shape) * dtype.itemsize != len(data) - start:
        raise ValueError(f"{name} has {len(data) - start} bytes and the shape {shape}")
    return np.frombuffer(data, dtype, offset=start).reshape(shape)


def processor(manifest: dict[str, Any]) -> str:
    """What may decide how numbers are rounded beside the artifact: a CPU's features, by which
    libraries choose kernels. Code for a GPU is the artifact's own."""
    if manifest["device"] != "cpu":
        return manifest["processor"]
    lines = []
    if os.path.isfile("/proc/cpuinfo"):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = [line.partition(":") for line in text.splitlines()]
        names = ("vendor_id", "cpu family", "model", "flags", "Features", "CPU part")
        lines = sorted({f"{a.strip()}:{b.strip()}" for a, _, b in found if a.strip() in names})
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return f"{digest[:12]} {platform.machine()}"
