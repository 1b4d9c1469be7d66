"""The program that needs CudaBackend, as far as there is none: what it refuses, and all the rest of
it on the CPU, with a program for ExecuTorch's plain kernels."""

import functools
import json
import re

import pytest
import torch

from tests import driving
from tokenloop import runner
from tokenloop.runner.engines.executorch_cuda import ExecuTorchCudaProgram
from tokenloop.runner.engines.torch_memory import ALIGNMENT, Aligned
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.manifest import open_artifact
from tokenloop.runner.transfers import Transfers

PROMPTS = [[2, 70, 40, 121, 33, 56, 78, 99, 104], [2], [2, 90, 91]]
SAMPLING = {"temperature": 0.9, "top_k": 50, "top_p": 0.9, "seed": 7}
RESTRICTED = {
    "json_schema": {"type": "object"},
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.2,
}


@pytest.fixture
def altered(portable_artifact, tmp_path):
    """A function (**entries) -> a copy of the artifact with these entries in its manifest."""
    return functools.partial(driving.altered, portable_artifact, tmp_path / "copy")


def generated(model):
    """Ids of all prompts, greedy and sampled, in every variant of the loop that matters here."""
    variants = [runner.LoopOptions(), runner.LoopOptions("host", "host", double_buffering=False)]
    results = []
    for options in variants:
        for sampling in ({}, SAMPLING, RESTRICTED):
            requests = [runner.Request(prompt, 12, **sampling) for prompt in PROMPTS]
            done = model.generate_batch(requests, options).run()
            results.append([result.token_ids for result in done])
    return results


def test_both_programs_for_executorch_give_the_same_tokens(portable_artifact, monkeypatch):
    expected = generated(runner.load(portable_artifact))
    monkeypatch.setattr(
        "tokenloop.runner.model.load_program",
        lambda artifact, threads: ExecuTorchCudaProgram(artifact),
    )
    assert generated(runner.load(portable_artifact)) == expected


def test_outputs_lie_in_memory_of_the_programs_own(portable_artifact):
    program = ExecuTorchCudaProgram(open_artifact(portable_artifact))
    batch = program.next_id(0).shape[0]
    token, position = program.empty(batch, 1).fill_(70), torch.zeros(batch, dtype=torch.int64)
    logits = program.decode(token, position)
    (first, _), before = program.select(logits, 0), logits.clone()
    second, _ = program.select(logits, 1)
    assert first.data_ptr() == program.next_id(0).data_ptr() != second.data_ptr()
    assert torch.equal(first, second) and torch.equal(logits, before)
    assert program.decode(token, position).data_ptr() == logits.data_ptr()


def test_a_missing_backend_is_refused_with_where_to_get_it(altered):
    with pytest.raises(RunnerError, match="this ExecuTorch has no CudaBackend") as caught:
        runner.load(altered(backend="cuda", device="cuda"))
    assert "ExecuTorch's CUDA wheel" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_gpu_is_refused(altered):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RunnerError, match="copy is for a CUDA GPU, and torch sees none here"):
        ExecuTorchCudaProgram(open_artifact(altered(device="cuda")))


def test_a_program_for_another_processor_is_refused(altered):
    with pytest.raises(RunnerError, match="was compiled for sm_70, and this machine's cpu is"):
        ExecuTorchCudaProgram(open_artifact(altered(processor="sm_70")))


def test_an_output_that_is_not_the_gpus_is_refused(altered, monkeypatch):
    backends = "tokenloop.runner.engines.executorch_runtime.registered_backends"
    monkeypatch.setattr(backends, lambda: ["CudaBackend"])
    message = "prefill's output lies in memory of the host; it must be exported with alloc_graph_ou"
    with pytest.raises(RunnerError, match=re.escape(message)):
        runner.load(altered(backend="cuda"))


def test_a_program_of_zeros_is_refused_in_one_line(altered):
    directory = altered()
    path = directory / "model.pte"
    program = path.read_bytes()
    path.write_bytes(program[:8] + b"\0" * (len(program) - 8))
    driving.resealed(directory)
    with pytest.raises(RunnerError, match="model.pte is not a program") as caught:
        ExecuTorchCudaProgram(open_artifact(directory))
    assert "\n" not in str(caught.value)


def test_an_artifact_that_cannot_sample_says_so(altered, portable_artifact):
    methods = json.loads((portable_artifact / "manifest.json").read_text())["methods"]
    program = ExecuTorchCudaProgram(
        open_artifact(altered(methods=[name for name in methods if "sample" not in name]))
    )
    with pytest.raises(RunnerError, match="has no method sample.*only temperature 0"):
        program.load_sampling("sample", False)


def test_inputs_are_copied_where_a_kernel_could_not_read_them_and_not_over_each_other():
    transfers = Transfers()
    table = torch.arange(6)
    odd, whole, other = table[1:2], table[2:4], table[3:4]
    assert Aligned(transfers, False)(odd)[0].data_ptr() == odd.data_ptr()
    assert transfers.device_to_device.count == 0
    inputs = Aligned(transfers, True)(odd, whole, other)
    assert [x.tolist() for x in inputs] == [[1], [2, 3], [3]]
    assert all(x.data_ptr() % ALIGNMENT == 0 for x in inputs)
    assert inputs[1].data_ptr() == whole.data_ptr()
    assert transfers.device_to_device.count == 2
