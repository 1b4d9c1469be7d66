"""Hybrids on both engines of the CPU, against transformers."""

import itertools

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tokenloop import runner
from tokenloop.runner import LoopOptions, Request

# Of one chunk, and of several.
PROMPTS = [[5], [5, 70, 71], [*range(60, 79)], [i * 37 % 250 + 3 for i in range(75)]]
VARIANTS = [
    LoopOptions(*variant)
    for variant in itertools.product(("auto", "alias", "host"), ("device", "host"), (True, False))
]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["xnnpack", "inductor"])
def exported(request, family_artifact):
    """The directories of a checkpoint and of its artifact of three rows: of Qwen3-Next's layout,
    or the trained one of Qwen3.5's."""
    return family_artifact(f"qwen3_5, {request.param}")


@pytest.fixture(scope="module")
def expected(exported):
    """A function: prompt, count -> transformers' greedy ids."""
    model = AutoModelForCausalLM.from_pretrained(exported[0], dtype=torch.float32)
    model.generation_config.eos_token_id = None

    def ids(prompt: list[int], count: int) -> list[int]:
        tokens = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(tokens), "do_sample": False}
        with torch.no_grad():
            return model.generate(tokens, max_new_tokens=count, **options)[
                0, len(prompt) :
            ].tolist()

    return ids


@pytest.fixture(scope="module")
def length(exported) -> int:
    """How long the texts are. A step of the trained network, of 30 million weights, takes as long
    as four of the other, in every variant of the loop."""
    return 24 if exported[0].name == "austen" else 64


@pytest.fixture(scope="module")
def model(exported):
    loaded = runner.load(exported[1])
    loaded.tokenizer.eos_token_ids.clear()
    return loaded


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_every_variant_of_the_loop_gives_transformers_greedy_ids(model, expected, prompt, length):
    ids = expected(prompt, length)
    for options in VARIANTS:
        assert model.generate(prompt, length, options=options).run().token_ids == ids, options


def test_rows_that_join_and_leave_give_what_each_gives_alone(model, expected, length):
    counts = range(9, 9 + length // 12 * 8, length // 12)
    requests = [Request(*row) for row in zip(PROMPTS + PROMPTS[::-1], counts)]
    ids = [expected(request.prompt, request.max_new_tokens) for request in requests]
    for options in VARIANTS:
        results = model.generate_batch(requests, options).run()
        assert [result.token_ids for result in results] == ids, options


def test_the_manifest_has_every_state_with_its_shape(exported, model):
    states = model.manifest["state"]
    config = AutoConfig.from_pretrained(exported[0])
    keys, key_size = config.linear_num_key_heads, config.linear_key_head_dim
    values, value_size = config.linear_num_value_heads, config.linear_value_head_dim
    delta_net = [
        [3, 2 * keys * key_size + values * value_size, 3],
        [3, values, key_size, value_size],
    ]
    attention = [[3, model.max_seq_len, config.num_key_value_heads, config.head_dim]] * 2
    expected = delta_net * config.layer_types.count("linear_attention")
    expected += attention * config.layer_types.count("full_attention")
    assert sorted(state["shape"] for state in states) == sorted(expected)
    assert {state["dtype"] for state in states} == {"float32"}
    assert len({state["name"] for state in states}) == len(states)
