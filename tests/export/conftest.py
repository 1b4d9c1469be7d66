"""What tests of the export share: small functions as the runner runs them."""

import pytest


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
