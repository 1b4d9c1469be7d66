"""An artifact for CUDA is refused in one line where it cannot run."""

import pytest
import torch

from tests.driving import altered
from tokenloop import runner
from tokenloop.runner import RunnerError
from tokenloop.runner.engines.tensors import _random


def test_random_float8_is_finite_of_both_signs_and_the_same_each_time():
    entry = {"name": "weight", "shape": [64, 128], "dtype": "float8_e4m3fn"}
    first, again = (_random([entry], torch.device("cpu"))["weight"].float() for _ in range(2))
    assert torch.equal(first, again)
    assert -2 < first.min() < -1.5 and 1.5 < first.max() < 2 and first.unique().numel() > 100


def refused(directory) -> str:
    with pytest.raises(RunnerError) as caught:
        runner.load(directory)
    (line,) = str(caught.value).splitlines()
    return line


@pytest.fixture
def change(export_artifact, tiny_checkpoint, tmp_path):
    """A function: changes of the manifest -> a copy with them of the tiny artifact for CUDA."""
    pytest.importorskip("triton", reason="triton is not installed")
    limits = "--max-seq-len", 200, "--max-prefill", 128
    arguments = "--model", tiny_checkpoint, "--device", "cuda", *limits
    artifact = export_artifact("tiny-launches", *arguments)
    return lambda **entries: altered(artifact, tmp_path / "copy", **entries)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_what_is_missing_is_named(change):
    line = refused(change())
    assert "is for a CUDA GPU, and torch sees none here" in line or "cuda-bindings" in line


@pytest.mark.parametrize("key", ["processor", "waiting_kernels", "chunk_multiple", "state"])
def test_a_manifest_without_what_the_engine_needs_is_refused(change, key):
    assert f"{key} is None; it must be " in refused(change(**{key: None}))


def test_missing_and_truncated_files_are_refused(change):
    directory = change()
    for name in ("model.safetensors", "model.launches"):
        path = directory / name
        data = path.read_bytes()
        path.write_bytes(data[:-1])
        assert f"{name} has" in refused(directory)
        path.unlink()
        assert f"{name} is missing" in refused(directory)
