"""The file of a program for CUDA: a zip archive of kernels, and program.json, which lists launches.

The same methods give the same bytes. runner/engines/launch_list.py reads the file.
"""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenloop.export.launches.cubins import compile_variants, variant
from tokenloop.export.launches.lowering import Lowered, Pointer

# Bytes between the scratch memories of two launches.
SCRATCH_ALIGNMENT = 256
# The earliest date that an archive can have.
DATE = (1980, 1, 1, 0, 0, 0)


def write_launches(
    path: Path, methods: dict[str, tuple[Lowered, list[str]]], architecture: str,
    progress: Callable[[str], None],
) -> list[str]:  # fmt: skip
    """Compile the kernels of `methods`, each with the names of its inputs, and write the file.
    Returns the names of the kernels. Errors: ExportError for a kernel that cannot be compiled."""
    prepared = {name: list(map(variant, low.launches)) for name, (low, _) in methods.items()}
    variants = list(dict.fromkeys(v for pairs in prepared.values() for v, _ in pairs))
    cubins = compile_variants(variants, architecture, progress)
    # Variants can come to the same code.
    files = {cubin.file: cubin for cubin in cubins}
    numbers = {file: i for i, file in enumerate(files)}
    kernel_of = {v: (numbers[cubin.file], cubin) for v, cubin in zip(variants, cubins)}
    entries = {}
    for name, (low, inputs) in methods.items():
        workspace, launches, tensors = low.workspace, [], {}
        for (key, arguments), launch in zip(prepared[name], low.launches):
            number, cubin = kernel_of[key]
            grid = [*launch.grid, 1, 1][:3]
            words: list[Any] = []
            for argument in arguments:
                if isinstance(argument, Pointer):
                    if argument.memory == "tensor":
                        tensors[argument.which] = None
                    words.append([argument.memory, argument.which, argument.offset])
                else:
                    words.append(int(argument))
            if cubin.hidden:
                # The first of them is to scratch memory, and profilers have the second.
                words += [["workspace", "", workspace] if cubin.scratch else 0]
                words += [0] * (cubin.hidden - 1)
                size = cubin.scratch * grid[0] * grid[1] * grid[2]
                workspace += -(-size // SCRATCH_ALIGNMENT) * SCRATCH_ALIGNMENT
            launches.append([number, grid, words])
        entries[name] = {
            "inputs": [_layout(x) | {"name": given} for x, given in zip(low.inputs, inputs)],
            "outputs": [_layout(x) for x in low.outputs],
            "workspace": workspace,
            "tensors": list(tensors),
            "launches": launches,
        }
    kernels = [
        {"file": f"kernels/{file}", "symbol": c.symbol, "shared": c.shared, "warps": c.warps}
        for file, c in files.items()
    ]
    program = json.dumps({"kernels": kernels, "methods": entries}, separators=(",", ":"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        _write(archive, "program.json", program.encode())
        for entry, cubin in zip(kernels, files.values()):
            _write(archive, entry["file"], cubin.code)
    return sorted({cubin.symbol for cubin in files.values()})


def _layout(pointer: Pointer) -> dict[str, Any]:
    dtype = str(pointer.dtype).removeprefix("torch.")
    return {"shape": list(pointer.shape), "dtype": dtype}


def _write(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, DATE), content, zipfile.ZIP_DEFLATED)
