"""What only hybrids promise: the delta rule takes whole chunks, remembers what came long before,
and gives on a GPU what it gives on a CPU."""

import pytest
import torch

from tests.models.architectures import FULL, LINEAR
from tests.models.eager import Method, assert_near, prefill, prompt
from tests.models.tiny_models import (
    CASES,
    ROW_OF,
    keys,
    logits_of_one_pass,
    ours,
    reference,
    shallow,
)
from tokenloop.export.methods import prompt_chunk
from tokenloop.export.pt2 import package as pt2
from tokenloop.models import qwen3_5
from tokenloop.models.kernels.gated_delta_rule.reference import CHUNK
from tokenloop.models.layers import RopeConfig
from tokenloop.models.qwen3_5 import MODEL_TYPES, Qwen3_5Config

HYBRIDS = [case for case in CASES if ROW_OF[case].networks is qwen3_5]
LAYOUTS = ["qwen3_5_text", "qwen3_next"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", HYBRIDS)
def test_the_first_token_changes_the_logits_after_ninety(case):
    tokens, logits = logits_of_one_pass(case)
    moved = reference(case)(torch.cat([tokens[:, :1] + 1, tokens[:, 1:90]], 1)).logits[0]
    assert (moved[89] - logits[89]).abs().max() > 0.005


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 3, CHUNK])
def test_a_prefill_and_a_step_give_what_a_prefill_of_one_more_gives(layout, length):
    tokens, model = prompt(length + 1), ours(layout)
    (expected,) = prefill(model, tokens, [length + 1])
    prefill(model, tokens[:, :length], [length])
    assert_near(model.decode(tokens[:, length:], torch.tensor([length])), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_may_fill_the_rule_s_chunks_whole(layout):
    """As .pt2 packages are traced, whose conditions on T are asserted when they run."""
    model, plain = shallow(layout), shallow(layout)
    model.limit_chunks(2 * CHUNK)
    example, shapes = prompt_chunk(1, model.max_chunk)
    program = pt2.trace(Method(model, "prefill"), example, [tuple(shapes)])
    for count in (1, model.max_chunk - 1, model.max_chunk):
        chunk = prompt(count), torch.arange(count)
        assert_near(program(*chunk), plain.prefill(*chunk))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_on_a_gpu_kernels_give_what_torch_gives_on_the_cpu(layout):
    plain, model = ours(layout, batch=2), ours(layout, batch=2).cuda()
    step = torch.tensor([[3], [5]]), torch.tensor([0, 68])
    for begin, count in ((0, 2), (2, 66)):
        chunk = prompt(count), torch.arange(begin, begin + count), torch.tensor([1])
        assert_near(model.prefill(*(x.cuda() for x in chunk)).cpu(), plain.prefill(*chunk))
    for _ in range(2):
        assert_near(model.decode(*(x.cuda() for x in step)).cpu(), plain.decode(*step))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_config_that_says_little_has_attention_in_every_fourth_layer(model_type):
    said = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8}
    config = Qwen3_5Config.from_dict(said | {"model_type": model_type})
    assert config.layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 2
    assert (config.rope, config.rotary_dim) == (RopeConfig(10_000.0), 64)


def test_keys_of_transformers_4_are_read():
    old = keys("qwen3_next") | {"rope_theta": 1e7, "partial_rotary_factor": 0.5}
    config = Qwen3_5Config.from_dict(old | {"rope_scaling": None})
    assert (config.rope, config.rotary_dim) == (RopeConfig(1e7), 12)
