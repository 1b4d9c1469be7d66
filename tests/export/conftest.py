"""What tests of the export share: small functions as the runner runs them, and an artifact of each
family of models."""

import functools
import subprocess

import pytest

from tests.conftest import AUSTEN, export_here


@pytest.fixture(scope="session")
def as_method(tmp_path_factory):
    """A function (function, examples, dynamic_shapes=None) -> the function of tensors, exported
    and run by the runner: it takes tensors, and gives a list of them."""
    import numpy as np
    import torch
    from executorch.exir import ExecutorchBackendConfig, to_edge
    from executorch.exir.passes import MemoryPlanningPass

    from tokenloop.export.pte.xnnpack_regions import COMPILE_CONFIG
    from tokenloop.runner.engines.executorch_runtime import Program

    directory = tmp_path_factory.mktemp("functions")

    class Module(torch.nn.Module):
        def __init__(self, function):
            super().__init__()
            self.function = function

        def forward(self, *arguments):
            return self.function(*arguments)

    def load(function, examples, dynamic_shapes=None):
        shapes = dynamic_shapes and (tuple(dynamic_shapes),)
        program = torch.export.export(Module(function), tuple(examples), dynamic_shapes=shapes)
        planning = MemoryPlanningPass(alloc_graph_input=False, alloc_graph_output=False)
        edge = to_edge(program, compile_config=COMPILE_CONFIG)
        path = directory / f"{len(list(directory.iterdir()))}.pte"
        path.write_bytes(
            edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=planning)).buffer
        )
        method = Program(path).load_method("forward")

        def run(*tensors):
            outputs = method.call([tensor.contiguous().numpy() for tensor in tensors])
            return [torch.from_numpy(np.array(output)) for output in outputs]

        return run

    return load


@pytest.fixture
def run_here(shared, tmp_path, monkeypatch, capsys):
    """A function (script, *arguments) that runs an export in `tmp_path` as `run_script` does, but
    in this process: one of its own takes seconds to start."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TOKENLOOP_CACHE", str(shared / "cache"))

    def run(script: str, *arguments) -> subprocess.CompletedProcess:
        capsys.readouterr()
        status = export_here(script, arguments)
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    return run


def exported(get, name: str, checkpoint, script: str, *flags):
    """The checkpoint and its float32 artifact."""
    arguments = ("--model", checkpoint, "--quant", "fp32", *flags)
    return checkpoint, get("export_artifact")(name, *arguments, script=script)


# A row for each family of models and engine: given a function that gets a fixture, the directories
# of a checkpoint and of its artifact.
FAMILIES = {
    "gemma": lambda get: (get("tiny_checkpoint"), get("tiny_artifact")),
    "llama": lambda get: exported(
        get,
        "tiny-llama",
        get("make_qwen_checkpoint")("llama"),
        "export/llama.py",
        *("--max-seq-len", 200, "--max-prefill", 20),
    ),
    "qwen3": lambda get: exported(
        get,
        "tiny-qwen3",
        get("make_qwen_checkpoint")("qwen3"),
        "export/qwen3.py",
        *("--max-seq-len", 100, "--max-prefill", 1),
    ),
    "qwen3_5, xnnpack": lambda get: (get("hybrid_checkpoint"), get("hybrid_artifact")),
    "qwen3_5, inductor": lambda get: (AUSTEN, get("austen_artifact")),
}


@pytest.fixture(scope="session")
def family_artifact(request):
    """A function: one of FAMILIES -> the directories of a checkpoint and of its artifact. Nothing
    is exported that no test asks for."""
    return functools.cache(lambda family: FAMILIES[family](request.getfixturevalue))
