"""The eager model against transformers, on random checkpoints of a few thousand weights."""

import functools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma4ForCausalLM, Gemma4ForConditionalGeneration, Gemma4TextConfig

from tests.models.driving import Batch, assert_near, even_ends, generate, prefill, prompt
from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.models.gemma4 import AttentionConfig, Gemma4, Gemma4Config, checkpoint_name
from tokenloop.models.layers import RopeConfig

SLIDING, FULL = "sliding_attention", "full_attention"
MAX_SEQ_LEN = 96
# Both kinds of layer differ in head size and heads, and no product of them is the hidden size.
SMALL = {
    "vocab_size": 97, "hidden_size": 44, "intermediate_size": 78, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 3, "num_global_key_value_heads": 2,
    "head_dim": 14, "global_head_dim": 26, "attention_k_eq_v": True,
    "sliding_window": 7, "max_position_embeddings": 256, "final_logit_softcapping": 5.0,
    "layer_types": [SLIDING, FULL, SLIDING, FULL], "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision", "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
ROPE = {
    SLIDING: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.6,
        "rope_theta": 300.0,
        "factor": 3.0,
    },
    FULL: {"rope_type": "default", "rope_theta": 5_000.0},
}
CASES = {
    "5 sliding to 1 full": {"num_hidden_layers": 7, "layer_types": None},
    "values of their own, no cap": {"attention_k_eq_v": False, "final_logit_softcapping": None},
    "all full": {"layer_types": [FULL] * 3, "num_hidden_layers": 3, "num_key_value_heads": 1},
    "other rotations": {"rope_parameters": ROPE, "vocab_size": 131, "head_dim": 22},
    "a window beyond the cache": {"sliding_window": 200},
    "a window of one, another epsilon": {"sliding_window": 1, "rms_norm_eps": 0.1},
}  # fmt: skip
PUBLISHED = "5 sliding to 1 full"


pytestmark = pytest.mark.usefixtures("one_thread")


def randomize(model: torch.nn.Module) -> None:
    """Weights under which neither embedding, attention nor feed-forward drowns the others, and
    positions matter."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if "layer_scalar" in name:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("weight"):
            std = 0.25 if "embed_tokens" in name else 0.5
            torch.nn.init.normal_(parameter, std=std, generator=generator)
            if "norm" in name:
                parameter.data += 1.0


@functools.cache
def reference(case: str) -> Gemma4ForCausalLM:
    config = Gemma4TextConfig(**SMALL | CASES[case])
    # What eager attention computes is written out in transformers' own file.
    model = Gemma4ForCausalLM._from_config(config, attn_implementation="eager").eval()
    randomize(model)
    return model


def ours(case: str, max_seq_len: int = MAX_SEQ_LEN, batch: int = 1) -> Gemma4:
    hf = reference(case)
    model = Gemma4(Gemma4Config.from_dict(hf.config.to_dict()), max_seq_len, batch)
    model.load_state_dict(hf.state_dict())
    return model.eval()


@functools.cache
def logits_of_one_pass(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt of the whole cache, and transformers' logits [T, V] after each of its tokens."""
    tokens = prompt(MAX_SEQ_LEN)
    with torch.no_grad():
        return tokens, reference(case)(tokens).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_a_random_checkpoint_can_tell_models_apart(case):
    """The other tests would pass on logits that do not vary; these do, also with the position."""
    tokens, logits = logits_of_one_pass(case)
    assert (logits.amax(-1) - logits.amin(-1)).min() > 3.0
    assert logits.argmax(-1).unique().numel() > 8
    with torch.no_grad():
        moved = reference(case)(torch.cat([tokens[:, :20].flip(1), tokens[:, 20:26]], 1)).logits[0]
    assert (moved[25] - logits[25]).abs().max() > 0.05


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 7, 8, 30])
def test_greedy_ids_and_logits_are_those_of_transformers(case, length):
    tokens = prompt(length)
    ids, logits = generate(ours(case), tokens, 64)
    # One causal pass over what was chosen: each id must be the best after those before it.
    with torch.no_grad():
        whole = torch.cat([tokens, torch.tensor([ids])], 1)
        expected = reference(case)(whole).logits[0, length - 1 : -1]
    assert ids == expected.argmax(-1).tolist()
    assert_near(logits, expected)


def test_greedy_ids_are_those_of_transformers_own_generation():
    tokens = prompt(11)
    expected = reference(PUBLISHED).generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=64
    )
    assert generate(ours(PUBLISHED), tokens, 64)[0] == expected[0, 11:].tolist()


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_may_fill_the_cache(case):
    model, (tokens, expected) = ours(case), logits_of_one_pass(case)
    ends = even_ends(MAX_SEQ_LEN, model.max_chunk)
    assert_near(torch.cat(prefill(model, tokens, ends)), expected[[end - 1 for end in ends]])


@settings(deadline=None, max_examples=30)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=14).filter(lambda x: sum(x) <= 80))
def test_chunks_of_any_lengths_give_the_logits_of_one_pass(lengths):
    tokens, expected = logits_of_one_pass(PUBLISHED)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert_near(torch.cat(prefill(ours(PUBLISHED), tokens, ends)), expected[[e - 1 for e in ends]])


@pytest.mark.parametrize("case", CASES)
def test_a_second_prompt_gives_exactly_what_a_fresh_model_gives(case):
    used, tokens = ours(case), prompt(12, seed=2)
    generate(used, prompt(45, seed=1), 20)
    ids, logits = generate(used, tokens, 15)
    fresh_ids, fresh_logits = generate(ours(case), tokens, 15)
    assert ids == fresh_ids
    assert torch.equal(logits, fresh_logits)


@pytest.mark.parametrize("case", CASES)
def test_rows_of_ragged_prompts_that_join_and_are_used_again_are_transformers_texts(case):
    batch = Batch(ours(case, batch=3), reference(case))
    batch.begin(1, prompt(23))
    batch.step(5)
    batch.begin(2, prompt(1))
    batch.step(9)
    batch.check(1)
    # Shorter than what was there.
    batch.begin(1, prompt(2))
    batch.begin(0, prompt(17))
    batch.step(20)
    for row in range(3):
        batch.check(row)


@pytest.mark.parametrize("case", CASES)
def test_a_row_of_a_batch_gives_the_logits_of_a_model_of_one_row(case):
    batch = Batch(ours(case, batch=3), reference(case))
    for row, length in enumerate((40, 2, 8)):
        batch.begin(row, prompt(length))
    batch.step(15)
    for row, length in enumerate((40, 2, 8)):
        ids, logits = generate(ours(case), prompt(length), 16)
        assert batch.texts[row][length:] == ids
        assert_near(torch.cat(batch.logits[row]), logits)


def test_caches_have_the_shape_of_their_kind_of_layer():
    model = ours(PUBLISHED, max_seq_len=50, batch=2)
    assert model.max_chunk == 7
    shapes = {
        layer.self_attn.layer_type: layer.self_attn.cache.k.shape for layer in model.model.layers
    }
    assert shapes == {SLIDING: (2, 7, 3, 14), FULL: (2, 50, 2, 26)}


def test_logits_stay_within_the_cap():
    model = ours(PUBLISHED)
    (logits,) = prefill(model, prompt(5), [5])
    assert logits.abs().max() <= 5.0
    hidden = torch.full((1, 1, SMALL["hidden_size"]), 1e4)
    with torch.no_grad():
        model.model.norm.weight *= 1e4
        assert model.logits(hidden).abs().max() == 5.0


# Reading a config

# What google/gemma-4-31b's text_config says of the network, in the keys that it was published with.
GEMMA_4_31B = {
    "attention_bias": False, "attention_k_eq_v": True, "enable_moe_block": False,
    "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 5376,
    "hidden_size_per_layer_input": 0, "intermediate_size": 21504,
    "layer_types": ([SLIDING] * 5 + [FULL]) * 10, "max_position_embeddings": 262_144,
    "model_type": "gemma4_text", "num_attention_heads": 32, "num_global_key_value_heads": 4,
    "num_hidden_layers": 60, "num_key_value_heads": 16, "num_kv_shared_layers": 0,
    "rms_norm_eps": 1e-6, "sliding_window": 1024, "tie_word_embeddings": True,
    "use_bidirectional_attention": "vision", "use_double_wide_mlp": False, "vocab_size": 262_144,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip


@pytest.mark.parametrize(
    "keys",
    [GEMMA_4_31B, {"hidden_size_per_layer_input": 0}, *(SMALL | case for case in CASES.values())],
)
def test_a_config_means_what_transformers_reads_in_it(keys):
    read_by_transformers = Gemma4TextConfig(**keys).to_dict()
    assert Gemma4Config.from_dict(keys) == Gemma4Config.from_dict(read_by_transformers)


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
    shapes = {name: tensor.shape for name, tensor in hf.state_dict().items()}
    model = on_meta(GEMMA_4_31B, max_seq_len=8)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_size_per_layer_input": 256}, "hidden_size_per_layer_input = 256"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers = 2"),
        ({"enable_moe_block": True}, "enable_moe_block = True"),
        ({"use_double_wide_mlp": True}, "use_double_wide_mlp = True"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping = 0"),
        ({"hidden_size": None, "head_dim": None}, "lacks hidden_size, head_dim"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 .* 4 .* of sliding_attention"),
        ({"num_global_key_value_heads": 5}, "num_attention_heads = 6 .* 5 .* of full_attention"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for 4 layers"),
        ({"layer_types": [FULL, FULL, FULL, "chunked"]}, r"unknown kinds \['chunked'\]"),
        ({"per_layer_config": {"3": {"head_dim": 26}}}, "layer 3 {'head_dim': 26.*full_attention"),
        ({"per_layer_config": {"01": {"sliding_window": 9}}}, "sets sliding_window of layer 1"),
        ({"rope_parameters": {FULL: {"rope_theta": 1e6}}}, "lacks rope_theta of sliding_attention"),
        ({"rope_parameters": ROPE | {FULL: {"rope_type": "yarn", "rope_theta": 9.0}}}, "'yarn'"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_the_name_of_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        Gemma4Config.from_dict(SMALL | change)


def test_a_config_that_says_nothing_of_per_layer_inputs_has_them_and_is_refused():
    config = {key: SMALL[key] for key in SMALL if key != "hidden_size_per_layer_input"}
    with pytest.raises(ValueError, match="hidden_size_per_layer_input = 256"):
        Gemma4Config.from_dict(config)


# Reading a checkpoint


@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
@pytest.mark.parametrize("name", ["norm.weight", "layers.11.layer_scalar"])
def test_a_text_model_is_found_under_every_prefix(prefix, name):
    assert checkpoint_name(prefix + name) == f"model.{name}"


@pytest.mark.parametrize(
    "name",
    [
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
        "model.embed_vision.embedding_projection.weight",
        "model.audio_tower.layers.0.norm_out.weight",
        "model.embed_audio.embedding_projection.weight",
    ],
)
def test_other_parts_are_left_out(name):
    assert checkpoint_name(name) is None


def on_meta(config: dict, max_seq_len: int = MAX_SEQ_LEN) -> Gemma4:
    with torch.device("meta"):
        return Gemma4(Gemma4Config.from_dict(config), max_seq_len)


def test_a_model_on_meta_has_its_buffers_and_none_of_its_weights():
    model = on_meta(SMALL, 32)
    assert all(parameter.is_meta for parameter in model.parameters())
    real = Gemma4(Gemma4Config.from_dict(SMALL), 32)
    for (name, buffer), (_, expected) in zip(
        model.named_buffers(), real.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, expected), name


@pytest.mark.parametrize("case", [PUBLISHED, "values of their own, no cap", "other rotations"])
def test_a_text_checkpoint_loads_into_a_model_on_meta(tmp_path, case):
    reference(case).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config["model_type"] == "gemma4_text"
    model = on_meta(checkpoint.config)
    load_weights(model, checkpoint, checkpoint_name)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens, expected = logits_of_one_pass(case)
    assert_near(prefill(model, tokens, [5, 12])[-1][0], expected[11])


def test_the_text_part_of_a_multimodal_checkpoint_loads(tmp_path):
    config = transformers.Gemma4Config(
        text_config=SMALL,
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 4,
            "position_embedding_size": 16,
        },
        audio_config=None,
    )  # fmt: skip
    hf = Gemma4ForConditionalGeneration(config).eval()
    randomize(hf)
    hf.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert any("vision_tower" in name for name in checkpoint.stored)
    assert any("embed_vision" in name for name in checkpoint.stored)
    model = on_meta(checkpoint.config)
    load_weights(model, checkpoint, checkpoint_name)
    tokens = prompt(12)
    with torch.no_grad():
        expected = hf(input_ids=tokens).logits[0]
    assert (expected.amax(-1) - expected.amin(-1)).min() > 3.0
    assert_near(torch.cat(prefill(model, tokens, [5, 12])), expected[[4, 11]])
