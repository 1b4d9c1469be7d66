"""The methods of a program for CUDA compiled beside each other, each by a process of its own.

Inductor compiles a method mostly in Python, on one core: 26 to 60 s for each that has the whole
network. A process takes the model from a file, traces its methods and compiles them; this one
traces all methods meanwhile, and puts together what the others compiled.
"""

import multiprocessing
import os
import pickle
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from executorch.backends.cuda.cuda_backend import CudaBackend
from executorch.backends.cuda.cuda_weight_collector import (
    CudaWeightArtifact,
    CudaWeightCollector,
    CudaWeightEntry,
)
from executorch.exir._serialize._cord import FileBackedData
from executorch.exir.backend.backend_details import PreprocessResult
from executorch.exir.backend.compile_spec_schema import CompileSpec
from torch import nn
from torch._inductor import config
from torch.export import ExportedProgram

from tokenloop.export.background import end_with_parent, failure, interrupts_for_this_process
from tokenloop.export.errors import ExportError

# What a process that has sent everything gets to end.
END_S = 10
# Compiles what the methods of these names are traced to: build_program's way through ExecuTorch.
Lower = Callable[[nn.Module, list[str]], Any]


class Compiled(NamedTuple):
    """A method as CudaBackend compiled it: what it takes, its library, its weights' entries, and
    where their bytes are, with their SHA-256."""

    signature: list[str]
    result: PreprocessResult
    entries: list[CudaWeightEntry]
    storages: dict[str, tuple[str, bytes]]


class AllCompiled(Exception):
    """Ends the way through ExecuTorch in a process that has compiled what it was to."""


class Keeping(CudaWeightCollector):
    """Keeps what a method compiles to, in place of putting methods together."""

    def add_preprocess_result(
        self, result: PreprocessResult, artifact: CudaWeightArtifact, device_name: str
    ) -> None:
        self.kept = result, artifact


class SideBySide:
    """Processes that compile the methods of a model, a list of names each. `directory` is for their
    files and outlives what is made of the program. After a `with` none of them is left to write
    there: they end by themselves, or are killed."""

    def __init__(self, lower: Lower, model: nn.Module, lists: list[list[str]], directory: Path):
        file = directory / "model.pt"
        torch.save(model, file)
        threads = max(2, (os.cpu_count() or 1) // 3)
        context = multiprocessing.get_context("spawn")
        self._results, self._processes = {}, []
        with interrupts_for_this_process():
            for names in lists:
                results, sender = context.Pipe(duplex=False)
                arguments = sender, lower, file, names, directory, threads
                process = context.Process(target=_compile_and_send, args=arguments, daemon=True)
                process.start()
                sender.close()
                self._processes.append(process)
                self._results |= dict.fromkeys(names, (results, process))

    def __enter__(self) -> "SideBySide":
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        for process in self._processes:
            if kind is None:
                process.join(END_S)
            process.kill()
            process.join()

    def preprocess_multimethod(
        self, programs: dict[str, list[ExportedProgram]],
        compile_specs: dict[str, list[list[CompileSpec]]],
    ) -> dict[str, list[PreprocessResult]]:  # fmt: skip
        """CudaBackend's, of what the processes compile."""
        collector, results = CudaWeightCollector(), {}
        for name, (program,) in programs.items():
            compiled = self._take(name)
            if compiled.signature != signature(program):
                raise RuntimeError(f"the method {name} was traced in two ways")
            storages = {
                key: FileBackedData.move_from(path, digest)
                for key, (path, digest) in compiled.storages.items()
            }
            artifact = CudaWeightArtifact(compiled.entries, storages)
            device = CudaBackend.get_device_name()
            collector.add_preprocess_result(compiled.result, artifact, device)
            results[name] = [compiled.result]
        collector.finish()
        return results

    def _take(self, name: str) -> Compiled:
        """The method that its process sends next. Errors: ExportError and RuntimeError as there,
        and those of `failure` for a process that ended."""
        results, process = self._results[name]
        try:
            sent = results.recv()
        except EOFError:
            raise failure(process, f"the method {name} could not be compiled") from None
        if isinstance(sent, Exception):
            raise sent
        return pickle.loads(sent.read_bytes())


def signature(program: ExportedProgram) -> list[str]:
    """What a method takes and gives: each tensor's kind, and name or shape, in order."""
    lines = []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            value = node.meta.get("val")
            lines.append(f"{node.name} {getattr(value, 'dtype', None)} {_shape(value)}")
    specs = program.graph_signature.input_specs + program.graph_signature.output_specs
    return lines + [f"{spec.kind} {spec.target}" for spec in specs]


def _shape(value: Any) -> list[str]:
    # A dynamic size has another symbol in each process.
    sizes = getattr(value, "shape", ())
    return [str(size) if isinstance(size, int) else "dynamic" for size in sizes]


def compile_one(program: ExportedProgram, specs: list[CompileSpec], directory: Path) -> Compiled:
    """What CudaBackend compiles of a method. Its weights are copied to files in `directory`."""
    keeping, takes = Keeping(), signature(program)
    CudaBackend._preprocess_with_weight_collector(program, specs, keeping)
    result, artifact = keeping.kept
    storages = {}
    for number, (key, data) in enumerate(artifact.storages.items()):
        path = directory / f"{CudaBackend.method_name_from_compile_specs(specs)}.{number}"
        with path.open("wb") as file:
            data.write_to_file(file)
        storages[key] = str(path), data.sha256()
        data.close()
    return Compiled(takes, result, artifact.entries, storages)


def _compile_and_send(
    results: Connection, lower: Lower, file: Path, names: list[str], directory: Path, threads: int
) -> None:
    # An interrupt is for the process that the user sees.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    # Two processes that compile one kernel would write and remove the same files.
    own = directory / f"inductor.{names[0]}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(own)
    config.compile_threads = threads

    def send_compiled(programs, specs):
        for name in names:
            (program,), (of_program,) = programs[name], specs[name]
            # Not through the pipe, which would keep this process until the other one reads it.
            kept = directory / f"{name}.compiled"
            kept.write_bytes(pickle.dumps(compile_one(program, of_program, directory)))
            results.send(kept)
        raise AllCompiled

    CudaBackend.preprocess_multimethod = send_compiled
    try:
        with torch.no_grad():
            lower(torch.load(file, weights_only=False, mmap=True), names)
    except AllCompiled:
        pass
    except ExportError as error:
        results.send(ExportError(str(error)))
    except RuntimeError as error:
        traceback.print_exc()
        results.send(RuntimeError(str(error)))
