"""Real models on a GPU give the ids that transformers gives in float32.

The checkpoints come from the packages that ship them, or from the directory that
TOKENLOOP_CHECKPOINTS names.
"""

import json
import os
from pathlib import Path

import pytest
import torch

from tokenloop import runner
from tokenloop.export import demo
from tokenloop.export.errors import ExportError

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
MODELS = {
    "gemma3_270m": ("gemma-3-270m-q4_k_m.gguf", demo.gemma3_270m, "export/gemma.py"),
    "smollm2_135m": (
        "SmolLM2-135M-Instruct.Q4_1.gguf", demo.smollm2_135m, "export/llama.py",
    ),
}  # fmt: skip


def checkpoint(name: str) -> Path:
    file, package, _ = MODELS[name]
    if directory := os.environ.get("TOKENLOOP_CHECKPOINTS"):
        return Path(directory, file)
    try:
        return package()
    except ExportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_float32_gives_the_reference_s_ids(export_artifact, name, batch):
    artifact = export_artifact(
        f"real-{name}-{batch}", "--model", checkpoint(name), "--device", "cuda", "--quant", "fp32",
        "--max-seq-len", 512, "--batch", batch, script=MODELS[name][2],
    )  # fmt: skip
    model = runner.load(artifact)
    model.tokenizer.eos_token_ids.clear()
    golden = Path(__file__).parents[1] / f"{name}_fp32_greedy.json"
    cases = json.loads(golden.read_text(encoding="utf-8"))["cases"]
    requests = [runner.Request(case["prompt_ids"], len(case["output_ids"])) for case in cases]
    results = model.generate_batch(requests).run()
    for case, result in zip(cases, results):
        assert result.token_ids == case["output_ids"], case["prompt"]
