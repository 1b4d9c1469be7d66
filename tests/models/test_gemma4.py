"""What only Gemma 4 promises: capped logits, and the published 31B, whose kinds of layer differ."""

import pytest
import torch
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

from tests.models.architectures import FULL, GEMMA_4, GEMMA_4_31B, SLIDING
from tests.models.eager import prefill, prompt
from tests.models.tiny_models import ours
from tokenloop.models.gemma4 import AttentionConfig, Gemma4, Gemma4Config
from tokenloop.models.layers import RopeConfig

pytestmark = pytest.mark.usefixtures("one_thread")


def test_logits_stay_within_the_cap():
    model = ours("gemma4_text, 5 sliding to 1 full")
    (logits,) = prefill(model, prompt(5), [5])
    assert logits.abs().max() <= 5.0
    hidden = torch.full((1, 1, GEMMA_4["hidden_size"]), 1e4)
    model.model.norm.weight *= 1e4
    assert model.logits(hidden).abs().max() == 5.0


def test_the_published_31b_is_read():
    config = Gemma4Config.from_dict(GEMMA_4_31B)
    assert config.attention == {
        SLIDING: AttentionConfig(256, 16, False, RopeConfig(1e4)),
        FULL: AttentionConfig(512, 4, True, RopeConfig(1e6, partial=0.25)),
    }
    assert config.layer_types == ((SLIDING,) * 5 + (FULL,)) * 10


def test_full_layers_own_shape_may_be_written_layer_by_layer():
    config = {key: value for key, value in GEMMA_4_31B.items() if "global" not in key}
    own = {"head_dim": 512, "num_key_value_heads": 4}
    config["per_layer_config"] = {f"{i:02}": own for i in range(5, 60, 6)}
    assert Gemma4Config.from_dict(config) == Gemma4Config.from_dict(GEMMA_4_31B)


def test_the_published_31b_has_the_tensors_of_transformers_own():
    with torch.device("meta"):
        hf = Gemma4ForCausalLM(Gemma4TextConfig(**GEMMA_4_31B))
        model = Gemma4(Gemma4Config.from_dict(GEMMA_4_31B), 8)
    shapes = {name: tensor.shape for name, tensor in hf.state_dict().items()}
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


def test_a_config_that_says_nothing_of_per_layer_inputs_has_them():
    config = {key: GEMMA_4[key] for key in GEMMA_4 if key != "hidden_size_per_layer_input"}
    # transformers' table of them has its own number of tokens.
    with pytest.raises(ValueError, match="vocab_size_per_layer_input = 262144: only vocab_size ="):
        Gemma4Config.from_dict(config)
    config |= {"vocab_size_per_layer_input": GEMMA_4["vocab_size"]}
    assert Gemma4Config.from_dict(config).hidden_size_per_layer_input == 256
