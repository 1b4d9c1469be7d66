"""The AOTInductor package: every method compiled for the CPU, without weights and state."""

import hashlib
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor, nn
from torch._inductor import aot_compile
from torch._inductor.exc import CppCompileError, InductorError, InvalidCxxCompiler
from torch._inductor.package import package_aoti
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.fx import GraphModule

from tokenloop.export.background import Background
from tokenloop.export.build_cache import place, result_of, unpack
from tokenloop.export.errors import ExportError
from tokenloop.export.methods import (
    AdjustRow,
    Embed,
    MaskRow,
    Prefill,
    Select,
    adjust_example,
    integers,
    mask_example,
    processor,
    prompt_chunk,
)
from tokenloop.models.decoder import Backbone
from tokenloop.models.per_layer import PerLayerInputs
from tokenloop.sampler.greedy import greedy
from tokenloop.sampler.sample import sample

OPTIONS = {
    "aot_inductor.package": True,
    # The runner loads weights and state once for all methods.
    "aot_inductor.package_constants_in_so": False,
    # The wrapper only launches code that is compiled apart from it. Optimizing the wrapper takes a
    # third of the whole time.
    "aot_inductor.compile_wrapper_opt_level": "O0",
}


def write_package(
    model: nn.Module, decode: nn.Module, selection: Background, path: Path,
    progress: Callable[[str], None], of_ranks: bool = False,
) -> list[str]:  # fmt: skip
    """Compile the methods into a .pt2 file, and return their names.

    `decode` is DecodeEmbedded(model), or does the same. There is no method "decode". It would be
    compiled once more, and round otherwise where an embedding is not rounded between two methods.
    Constants have their names in the method, and those of prefill begin with "network". `selection`
    computes compile_selection. If the network is one `of_ranks`, its lookup is compiled as well,
    and no value of its tensors is in the code: other ranks have others.
    """
    weight = model.model.embed_tokens.weight
    hidden = torch.zeros(model.batch, 1, model.model.embedded_size, dtype=weight.dtype)
    position = integers(model.batch)
    chunk, shapes = prompt_chunk(model.batch, model.max_chunk)
    options = {"always_keep_tensor_constants": True} if of_ranks else {}
    progress("compiling prefill")
    files = {"prefill": compile_method(Prefill(model), chunk, shapes, options)}
    progress("compiling decode")
    files["decode_embedded"] = compile_method(decode, (hidden, position), options=options)
    progress("compiling the selection methods")
    files |= selection.result()
    if of_ranks:
        lookup = Embed(model.model), (integers(model.batch, 1),)
        files["embed"] = compile_method(*lookup, options=options)
    progress("writing")
    # What a killed export leaves here goes with its artifact.
    with TemporaryDirectory(dir=path.parent) as directory:
        paths = {}
        for method, contents in files.items():
            # The loader of torch 2.11 takes all files whose path begins with a method's name, so
            # greedy would get those of greedy_embed. No name with its end marked begins another.
            folder = Path(directory, f"{method}-")
            folder.mkdir()
            paths[folder.name] = [str(folder / name) for name in contents]
            for name, content in contents.items():
                (folder / name).write_bytes(content)
        write_archive(path, paths, Path(directory))
    return sorted(files)


def write_archive(path: Path, methods: dict[str, list[str]], directory: Path) -> None:
    """Write the .pt2 of each method's files. Errors: OSError, of a full disk among others.

    Torch's writer ends the process where a disk is full. So it writes to memory, on Linux, through
    a link in `directory` that has the file's name, for that is in the file.
    """
    if not hasattr(os, "memfd_create"):
        package_aoti(str(path), methods)
        return
    memory = os.memfd_create(path.name)
    with open(memory, "rb") as written:
        link = directory / path.name
        link.symlink_to(f"/proc/self/fd/{memory}")
        package_aoti(str(link), methods)
        with path.open("wb") as file:
            shutil.copyfileobj(written, file)


def constants_of(path: Path, method: str) -> list[str]:
    """The names of the tensors that a method of a .pt2 file is given when it is loaded."""
    from torch._C._aoti import AOTIModelPackageLoader

    return AOTIModelPackageLoader(str(path), f"{method}-", True, 1, -1).get_constant_fqns()


def compile_selection(
    batch: int, vocab_size: int, hidden_size: int, embed_scale: float, dtype: torch.dtype,
    per_layer: tuple[int, int, int] | None = None, embeds: bool = True,
) -> dict[str, dict[str, bytes]]:  # fmt: skip
    """The compiled files, by method and name, of what is between a step's logits and the next step.

    These are the lookup, selection, selection of one row of several, and what changes the logits of
    one row. The table is [vocab_size, hidden_size] of `dtype`, "embed_tokens.weight". `per_layer`
    are the rows of the table of the layers' inputs, the layers and the size of each one's, where
    there are any: "per_layer.embed_tokens.weight". There is no lookup unless it `embeds`.
    """
    files = {}
    if embeds:
        files["embed"] = _compile_lookup(
            batch, vocab_size, hidden_size, embed_scale, dtype, per_layer
        )
    # Networks of one vocabulary have these in common, and one row with several.
    parts = [(compile_rows, (batch, vocab_size), ""), (compile_changes, (vocab_size,), "_row")]
    if batch > 1:
        parts.append((compile_rows, (1, vocab_size), "_row"))
    for function, arguments, suffix in parts:
        found = kept_files(function, *arguments)
        files |= {name + suffix: contents for name, contents in found.items()}
    return files


def _compile_lookup(
    batch: int, vocab_size: int, hidden_size: int, embed_scale: float, dtype: torch.dtype,
    per_layer: tuple[int, int, int] | None,
) -> dict[str, bytes]:  # fmt: skip
    # Compiled code is given its weights when it is loaded. These are never looked at.
    table = torch.empty(vocab_size, hidden_size, dtype=dtype)
    table = nn.Embedding.from_pretrained(table)
    own = None
    if per_layer is not None:
        with torch.device("meta"):
            clips = per_layer[0] < vocab_size
            own = PerLayerInputs(*per_layer, 1, lambda *_: nn.Identity(), clips)
        table_of_all = torch.empty(own.rows, own.width, dtype=dtype)
        own.embed_tokens = nn.Embedding.from_pretrained(table_of_all)
    backbone = Backbone(table, [], nn.Identity(), {}, embed_scale, False, own)
    with torch.no_grad():
        return compile_method(Embed(backbone), (integers(batch, 1),))


def kept_files(function: Callable, *arguments: int) -> dict[str, dict[str, bytes]]:
    """function(*arguments), compiled for this processor, or what an earlier export kept of it."""
    file = place(function, arguments, processor(torch.device("cpu")))
    return unpack(result_of(function, arguments, file))


def compile_rows(rows: int, vocab_size: int) -> dict[str, dict[str, bytes]]:
    """The compiled files of selection for so many rows, as in compile_selection."""
    logits, next_id = torch.zeros(rows, vocab_size), integers(rows, 1)
    numbers, counts = torch.ones(rows), integers(rows)
    sampling = numbers, counts, numbers.clone(), counts.clone(), counts.clone()
    with torch.no_grad():
        return {
            "greedy": compile_method(Select(greedy), (logits, next_id)),
            "sample": compile_method(Select(sample), (logits, *sampling, next_id)),
        }


def compile_changes(vocab_size: int) -> dict[str, dict[str, bytes]]:
    """The compiled files of what changes the logits of one row, as in compile_selection."""
    with torch.no_grad():
        return {
            "mask": compile_method(MaskRow(), mask_example(vocab_size)),
            "adjust": compile_method(AdjustRow(), *adjust_example(vocab_size)),
        }


def compile_method(
    method: nn.Module, example: tuple[Tensor, ...], dynamic_shapes: list | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, bytes]:  # fmt: skip
    """The files of a package's method by name, compiled for the device of its example inputs, with
    `options` of Inductor beside ours."""
    return compile_graph(trace(method, example, dynamic_shapes), example, options)


def compile_graph(
    graph: GraphModule, example: tuple[Tensor, ...], options: Mapping[str, Any] | None = None
) -> dict[str, bytes]:
    """`compile_method` of what `trace` gives.

    Sources are left empty. They say where they were compiled, so that no two exports would be the
    same. Nobody reads them, but the loader finds the metadata by the source's name.

    Errors: ExportError where there is no C++ compiler, or it fails.
    """
    # Two exports compile the same code in the same place, where a compiler writes. One works at a
    # time, until its files are read. Another place would give the files other names.
    directory = Path(cache_dir(), hashlib.sha256(graph.code.encode()).hexdigest())
    directory.mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "lock"):
        options = OPTIONS | (options or {}) | {"aot_inductor.output_path": str(directory)}
        try:
            files = map(Path, aot_compile(graph, example, options=options))
        except InductorError as error:
            raise compiler_fault(error) from error
        return {file.name: b"" if file.suffix == ".cpp" else file.read_bytes() for file in files}


def compiler_fault(error: InductorError) -> Exception:
    """What to raise for an error of Inductor: one line where the C++ compiler is missing or has
    failed, the system's own error, of a full disk among others, and else the error itself."""
    cause = error.inner_exception
    if isinstance(cause, InvalidCxxCompiler):
        return ExportError("--backend inductor needs a C++ compiler: install g++, or set CXX")
    if isinstance(cause, CppCompileError):
        lines = cause.output.splitlines() or [""]
        line = next((line for line in lines if "error" in line), lines[-1])
        return ExportError(f"the C++ compiler failed: {line.strip()}")
    return cause if isinstance(cause, OSError) else error


def trace(
    method: nn.Module, example: tuple[Tensor, ...], dynamic_shapes: list | None
) -> GraphModule:
    """The method as torch.export sees it."""
    # Conditions of attention's strides on T, which torch 2.11 cannot decide, are checked later.
    program = torch.export.export(
        method, example, dynamic_shapes=dynamic_shapes,
        prefer_deferred_runtime_asserts_over_guards=True,
    )  # fmt: skip
    return program.module()
