"""What only Gemma 3 promises: chunks as long as its window, and its configs' several spellings."""

import pytest

from tests.models.architectures import (
    FULL,
    GEMMA_3,
    GEMMA_3_4B,
    GEMMA_3_LINEAR_ROPE,
    GEMMA_3_OF_TRANSFORMERS_4,
    SLIDING,
)
from tests.models.tiny_models import states
from tokenloop.models.gemma3 import Gemma3, Gemma3Config
from tokenloop.models.layers import RopeConfig


@pytest.mark.parametrize(("window", "max_seq_len", "chunk"), [(7, 80, 7), (200, 80, 80), (9, 9, 9)])
def test_a_chunk_is_at_most_the_window_and_the_cache(window, max_seq_len, chunk):
    config = Gemma3Config.from_dict(GEMMA_3 | {"sliding_window": window})
    model = Gemma3(config, max_seq_len)
    assert model.max_chunk == chunk
    # Keys and values of each layer.
    slots = [state.shape[1] for state in states(model).values()]
    assert slots == [chunk, chunk, max_seq_len, max_seq_len, chunk, chunk]


def test_keys_of_transformers_4_are_read():
    config = Gemma3Config.from_dict(GEMMA_3_OF_TRANSFORMERS_4)
    assert config.layer_types == (SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING)
    assert config.rope == {FULL: RopeConfig(500_000, 4.0), SLIDING: RopeConfig(2_000, 1.0)}


def test_keys_of_transformers_5_are_read():
    config = Gemma3Config.from_dict(GEMMA_3 | {"rope_parameters": GEMMA_3_LINEAR_ROPE})
    assert config.layer_types == (SLIDING, FULL, SLIDING)
    assert config.rope == {FULL: RopeConfig(300_000.0, 8.0), SLIDING: RopeConfig(500.0, 1.0)}


def test_the_scaling_kind_may_have_its_oldest_name():
    config = Gemma3Config.from_dict(GEMMA_3 | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope[FULL].factor == 2.0


def test_a_config_that_says_little_is_the_published_one():
    config = Gemma3Config.from_dict(GEMMA_3_4B)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262_208, 131_072)
    assert config.layer_types[:6] == (SLIDING,) * 5 + (FULL,)
    assert config.rope == {FULL: RopeConfig(1e6, 8.0), SLIDING: RopeConfig(1e4, 1.0)}
