"""Programs for ExecuTorch's CudaBackend on a CUDA GPU: compiled there, and run where there is an
ExecuTorch with that backend, which PyPI's wheel has not. Where there is no GPU all of it is
skipped."""

import json

import pytest
import torch

from tests.conftest import AUSTEN
from tests.driving import PROMPTS, SAMPLED, assert_rows_are_those_alone, eager_ids, ids_of
from tokenloop import runner
from tokenloop.models import gemma3, qwen3_5
from tokenloop.runner import LoopOptions

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
SHAPE = ("--backend", "cuda", "--max-seq-len", 200, "--max-prefill", 16)
KINDS = {
    "tiny-1": ("export/gemma.py", "fp32", 1), "tiny-3": ("export/gemma.py", "fp32", 3),
    "tiny-bf16": ("export/gemma.py", "bf16", 1),
    "austen-1": ("export/qwen3_5.py", "fp32", 1), "austen-3": ("export/qwen3_5.py", "fp32", 3),
}  # fmt: skip
OPTIONS = [
    LoopOptions(), LoopOptions("host", "host", double_buffering=False), LoopOptions("alias"),
    LoopOptions("embed", "device", double_buffering=False),
]  # fmt: skip


def has_backend() -> bool:
    from tokenloop.runner.engines.executorch_abi import load_cuda
    from tokenloop.runner.engines.executorch_runtime import registered_backends

    load_cuda()
    return "CudaBackend" in registered_backends()


@pytest.fixture(scope="module")
def exported(export_artifact, tiny_checkpoint):
    """A function: kind -> artifact."""

    def export(kind: str):
        script, quant, batch = KINDS[kind]
        model = tiny_checkpoint if kind.startswith("tiny") else AUSTEN
        arguments = ("--model", model, *SHAPE, "--quant", quant, "--batch", batch)
        return export_artifact(f"et-{kind}", *arguments, script=script)

    return export


@pytest.fixture(scope="module")
def loaded(exported):
    """A function: kind -> model, whose text ends nowhere."""
    models = {}

    def load(kind: str):
        if not has_backend():
            pytest.skip("this ExecuTorch has no CudaBackend")
        if kind not in models:
            models[kind] = runner.load(exported(kind))
            models[kind].tokenizer.eos_token_ids.clear()
        return models[kind]

    return load


@pytest.mark.parametrize("kind", KINDS)
def test_every_method_is_one_delegate_on_the_gpu(exported, kind):
    from benchmarks.pte_listing import listing

    entry = listing(exported(kind))
    manifest = json.loads((exported(kind) / "manifest.json").read_text())
    assert sorted(entry["methods"]) == manifest["methods"]
    for method in entry["methods"].values():
        assert [each["backend"] for each in method["delegates"]] == ["CudaBackend"]
        assert (method["calls"], method["other_instructions"], method["operators"]) == (1, 0, [])
        assert all(tensor.endswith(" cuda") for tensor in method["inputs"] + method["outputs"])
        assert method["delegates"][0]["missing_shims"] == []


@pytest.mark.parametrize("kind", ["tiny-1", "austen-1"])
@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_every_variant_gives_the_eager_networks_ids(loaded, tiny_checkpoint, kind, prompt):
    networks, model = (gemma3, tiny_checkpoint) if kind == "tiny-1" else (qwen3_5, AUSTEN)
    expected = eager_ids(networks, model, prompt, 40)
    for options in OPTIONS:
        assert ids_of(loaded(kind), prompt, 40, options=options) == expected, options


@pytest.mark.parametrize("kind", ["tiny-1", "tiny-bf16", "austen-1"])
def test_every_variant_samples_the_same_ids(loaded, kind):
    for parameters in (SAMPLED, {"temperature": 0.8, "seed": 3}):
        expected = ids_of(loaded(kind), PROMPTS[2], **parameters)
        assert len(set(expected)) > 10
        for options in OPTIONS:
            assert ids_of(loaded(kind), PROMPTS[2], options=options, **parameters) == expected


@pytest.mark.parametrize("name", ["tiny", "austen"])
def test_rows_are_those_alone(loaded, name):
    assert_rows_are_those_alone(loaded(f"{name}-3"), loaded(f"{name}-1"), OPTIONS)


def test_two_models_have_caches_of_their_own(loaded, exported):
    """Both read one file of weights, and its names are the same."""
    one, other = loaded("tiny-1"), runner.load(exported("tiny-1"))
    other.tokenizer.eos_token_ids.clear()
    expected = ids_of(one, PROMPTS[3])
    first = iter(one.generate(PROMPTS[3], 60))
    begun = [next(first) for _ in range(5)]
    ids_of(other, PROMPTS[2])
    assert begun + list(first) == expected
