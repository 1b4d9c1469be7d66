"""What benchmarks/hybrid.py takes for a step's work, and its network."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen3_5MoeTextConfig, Qwen3_5TextConfig

from benchmarks.cuda_common import CONFIGS
from benchmarks.hybrid import step_bytes
from tokenloop.models import qwen3_5


@pytest.mark.parametrize(
    ("name", "config", "billions"),
    [("qwen3.5-9b", Qwen3_5TextConfig, 9.0), ("qwen3.5-35b-a3b", Qwen3_5MoeTextConfig, 34.7)],
)
def test_the_shapes_are_transformers_defaults(name, config, billions):
    keys = json.loads((CONFIGS / f"{name}.json").read_text())
    read = qwen3_5.Config.from_dict(keys)
    assert read == qwen3_5.Config.from_dict(config().to_dict())
    with torch.device("meta"):
        model = qwen3_5.Network(read, 8, 1, torch.bfloat16)
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size / 1e9 == pytest.approx(billions, abs=0.5)


def test_bytes_of_a_step_are_weights_filled_slots_and_states_twice():
    def entry(name, dtype, *shape):
        return {"name": name, "dtype": dtype, "shape": list(shape)}

    manifest = {
        "weights": {
            "random": [
                entry("embed_tokens.weight", "bfloat16", 100, 8),
                entry("head.weight", "bfloat16", 100, 8),
            ]
        },
        "state": [
            entry("layers.0.cache.recurrent", "float32", 1, 2, 4, 4),
            entry("layers.0.cache.conv", "bfloat16", 1, 16, 3),
            entry("layers.1.cache.k", "bfloat16", 1, 50, 2, 4),
            entry("semaphores", "int32", 64),
        ],
    }
    expected = 1600 + 2 * 128 + 2 * 96 + 10 * 16
    model = SimpleNamespace(manifest=manifest)
    assert step_bytes(model, {}, 9) == pytest.approx(expected)
    # Of 10 experts a token reads 2.
    manifest["weights"]["random"].append(entry("layers.0.experts.down_proj", "bfloat16", 10, 8, 3))
    keys = {"num_experts": 10, "num_experts_per_tok": 2}
    assert step_bytes(model, keys, 9) == pytest.approx(expected + 2 * 24 * 2)
