"""Scaled rotary embeddings are those of transformers, also past the original length, and do not
depend on how a prompt is cut."""

import pytest
import torch
from torch.export import Dim

from tests.models.eager import Method, assert_near, even_ends, feed, generate, prefill, prompt
from tests.models.tiny_models import ROW_OF, keys, make_reference, network_of
from tokenloop.models import llama

pytestmark = pytest.mark.usefixtures("one_thread")

ORIGINAL, LENGTH = 32, 80
# Of 9 pairs, none of them like another.
SHORT, LONG = [1 + i / 9 for i in range(9)], [2 + i * 1.5 for i in range(9)]
LONGROPE = {
    "rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": ORIGINAL}
LLAMA_3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": ORIGINAL,
}  # fmt: skip
GEMMA = {"sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}
# 24 * 0.5 elements of a head rotate.
PART = {"rope_theta": 700.0, "partial_rotary_factor": 0.5}
SCALED = {
    "llama, yarn": ("llama", {"rope_scaling": YARN}),
    "llama, yarn of numbers of its own": ("llama", {
        "rope_scaling": YARN
        | {"beta_fast": 4, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.2,
           "truncate": False},
    }),
    "llama, yarn of an attention factor": ("llama", {
        "rope_scaling": YARN | {"attention_factor": 0.8},
    }),
    "llama, llama3": ("llama", {"rope_scaling": LLAMA_3}),
    "llama, longrope": ("llama", {"rope_scaling": LONGROPE}),
    "qwen3, longrope of an attention factor": ("qwen3", {
        "rope_scaling": LONGROPE | {"attention_factor": 1.3},
    }),
    "qwen3, longrope of a factor": ("qwen3", {"rope_scaling": LONGROPE | {"factor": 3.0}}),
    "qwen3, yarn": ("qwen3", {"rope_scaling": YARN}),
    "qwen3_5_text, yarn": ("qwen3_5_text", {"rope_parameters": YARN | PART}),
    "qwen3_5_text, longrope": ("qwen3_5_text", {
        "rope_parameters": LONGROPE | PART | {"short_factor": SHORT[:6], "long_factor": LONG[:6]},
    }),
    "olmo3, yarn": ("olmo3, sliding and full", {
        "rope_parameters": GEMMA | {"full_attention": YARN | {"rope_theta": 700.0}},
    }),
    "ministral, yarn": ("ministral, sliding and full", {"rope_scaling": YARN}),
    "phi3, longrope": ("phi3, three quarters of a head turn", {
        "rope_scaling": LONGROPE | {"short_factor": SHORT[:6], "long_factor": LONG[:6]},
        "original_max_position_embeddings": ORIGINAL,
    }),
    "gemma3_text, yarn": ("gemma3_text, four key heads, all full", {
        "rope_parameters": GEMMA | {"full_attention": YARN | {"rope_theta": 700.0}},
        "head_dim": 18,
    }),
    "gemma4_text, yarn": ("gemma4_text, all full", {
        "rope_parameters": GEMMA | {"full_attention": YARN | {"rope_theta": 700.0}},
        "global_head_dim": 18,
    }),
}  # fmt: skip


def unscaled(changes: dict) -> dict:
    """The changes, with each rope_type the default one."""
    kept = "rope_theta", "partial_rotary_factor"

    def plain(entry: dict) -> dict:
        if "rope_type" not in entry:
            return {name: plain(of_type) for name, of_type in entry.items()}
        return {"rope_type": "default"} | {key: entry[key] for key in kept if key in entry}

    return {
        key: plain(value) if key.startswith("rope_") else value for key, value in changes.items()
    }


@pytest.mark.parametrize("name", SCALED)
def test_chunks_and_steps_past_the_original_length_are_transformers_one_pass(name):
    case, changes = SCALED[name]
    hf, tokens = make_reference(case, **changes), prompt(LENGTH)
    expected = hf(tokens).logits[0]
    for chunk in (9, 70):
        model = network_of(ROW_OF[case], hf, LENGTH)
        ends = even_ends(70, min(chunk, model.max_chunk))
        logits = torch.cat(prefill(model, tokens, ends) + feed(model, tokens, 70))
        assert_near(logits, expected[[end - 1 for end in ends] + list(range(70, LENGTH))])
    # The scaling is seen.
    other = make_reference(case, **unscaled(changes))(tokens).logits[0]
    assert (other - expected)[-40:].abs().amax(1).min() > 0.005 * expected.abs().max()


def test_longrope_is_short_in_networks_that_reach_no_further_than_the_original_length():
    hf, tokens = make_reference("llama", rope_scaling=LONGROPE), prompt(ORIGINAL)
    expected = hf(tokens).logits[0]
    model = network_of(ROW_OF["llama"], hf, ORIGINAL)
    logits = torch.cat(prefill(model, tokens, [5, 20]) + feed(model, tokens, 20))
    assert_near(logits, expected[[4, 19, *range(20, ORIGINAL)]])
    longer = network_of(ROW_OF["llama"], hf, ORIGINAL + 1)
    assert (torch.cat(prefill(longer, tokens, [20])) - expected[19]).abs().max() > 0.1


def test_dynamic_ntk_is_transformers_generation_up_to_the_model_s_positions_and_no_further():
    scaling = {"rope_type": "dynamic", "factor": 4.0}
    hf = make_reference("llama", rope_scaling=scaling, max_position_embeddings=60)
    hf.generation_config.eos_token_id = None
    tokens = prompt(11)
    expected = hf.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=49
    )
    model = network_of(ROW_OF["llama"], hf, 60)
    assert generate(model, tokens, 49)[0] == expected[0, 11:].tolist()
    with pytest.raises(ValueError, match="'dynamic' with 61 positions: at most .* = 60 is right"):
        network_of(ROW_OF["llama"], hf, 61)


def test_what_transformers_answers_past_dynamic_ntk_s_length_depends_on_how_a_prompt_is_cut():
    """The reason for the refusal."""
    changes = {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0},
        "max_position_embeddings": 20,
    }
    # It keeps the frequencies of the longest text that it was given, too.
    one, other = (make_reference("llama", **changes) for _ in range(2))
    tokens = prompt(40)
    whole = one(tokens).logits[0, -1]
    first = other(tokens[:, :30], use_cache=True)
    cut = other(tokens[:, 30:], cache=first.past_key_values).logits[0, -1]
    assert (whole - cut).abs().max() > 0.05 * whole.abs().max()


@pytest.mark.parametrize("rope_scaling", [YARN, LONGROPE], ids=["yarn", "longrope"])
def test_methods_with_a_scaled_embedding_can_be_exported(rope_scaling):
    row = ROW_OF["llama"]
    hf = make_reference("llama", rope_scaling=rope_scaling, **row.shallow)
    model, tokens = network_of(row, hf, LENGTH), prompt(LENGTH)
    expected = hf(tokens).logits[0]
    length = Dim("length", max=model.max_chunk)
    chunk = torch.zeros(1, 3, dtype=torch.int64), torch.arange(3)
    program = torch.export.export(
        Method(model, "prefill"), chunk, dynamic_shapes=((({1: length}, {0: length})),)
    ).module()
    for start, end in ((0, 13), (13, 50), (50, 51)):
        logits = program(tokens[:, start:end], torch.arange(start, end))
        assert_near(logits[0], expected[end - 1])
    step = torch.export.export(Method(model, "decode"), (chunk[0][:, :1], chunk[1][:1])).module()
    for position in range(50):
        logits = step(tokens[:, [position]], torch.tensor([position]))
        assert_near(logits[0], expected[position])


def test_yarn_reaches_its_factor_times_the_original_length():
    def reach(**scaling) -> int:
        return llama.Config.from_dict(keys("llama", rope_scaling=scaling)).max_position_embeddings

    assert reach(**YARN) == 256
    assert reach(**YARN | {"factor": 32.0}) == 1024
    # What the config says is the original length where the scaling does not.
    assert reach(rope_type="yarn", factor=2.0) == 512
    assert reach(**LONGROPE) == reach(**LLAMA_3) == 256


def test_a_longrope_of_another_number_of_pairs_is_refused():
    for name, count in (("short_factor", 8), ("long_factor", 10)):
        scaling = LONGROPE | {name: [1.0] * count}
        with pytest.raises(ValueError, match=f"{name} of .* has {count} numbers; 9, one for"):
            llama.Config.from_dict(keys("llama", rope_scaling=scaling))
