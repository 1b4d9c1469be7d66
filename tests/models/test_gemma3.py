"""The eager float32 model against transformers, on random checkpoints of a few thousand weights."""

import copy
import functools

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration, Gemma3TextConfig

from tests.models.driving import Batch, assert_near, even_ends, generate, prefill, prompt
from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.models.gemma3 import Gemma3, Gemma3Config, checkpoint_name
from tokenloop.models.layers import RopeConfig

SLIDING, FULL = "sliding_attention", "full_attention"
MAX_SEQ_LEN = 80
# The heads' 4 * 16 values are not the hidden size, and 24 is not the head size, in every case.
SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "query_pre_attn_scalar": 24, "sliding_window": 7, "max_position_embeddings": 256,
    "layer_types": [SLIDING, FULL, SLIDING], "pad_token_id": 0, "eos_token_id": None,
}  # fmt: skip
LINEAR = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 300_000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 500.0},
}
CASES = {
    "one key head, 5 sliding to 1 full": {
        "num_key_value_heads": 1, "num_hidden_layers": 7, "layer_types": None,
    },
    "two key heads, all sliding": {"layer_types": [SLIDING] * 3},
    "four key heads, all full": {"num_key_value_heads": 4, "layer_types": [FULL] * 3},
    "linear rope": {"rope_parameters": LINEAR, "vocab_size": 131},
    "wide heads": {"head_dim": 34, "query_pre_attn_scalar": 101, "vocab_size": 53},
    "one layer, three query heads": {
        "num_hidden_layers": 1, "layer_types": [FULL], "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "a window beyond the cache": {"sliding_window": 200},
    "a window of one": {"sliding_window": 1},
    "another epsilon": {"rms_norm_eps": 0.1},
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


def randomize(model: torch.nn.Module) -> None:
    """Weights under which neither embedding, attention nor feed-forward drowns the others, and
    positions matter."""
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        std = 0.25 if "embed_tokens" in name else 0.5
        torch.nn.init.normal_(parameter, std=std, generator=generator)
        if "post_" in name:
            parameter.data += 1.0
        if "q_norm" in name or "k_norm" in name:
            parameter.data += 0.5


@functools.cache
def reference(case: str) -> Gemma3ForCausalLM:
    config = Gemma3TextConfig(**SMALL | CASES[case])
    # What eager attention computes is written out in transformers' own file.
    model = Gemma3ForCausalLM._from_config(config, attn_implementation="eager").eval()
    randomize(model)
    return model


def ours(case: str, max_seq_len: int = MAX_SEQ_LEN, batch: int = 1) -> Gemma3:
    hf = reference(case)
    model = Gemma3(Gemma3Config.from_dict(hf.config.to_dict()), max_seq_len, batch)
    model.load_state_dict(hf.state_dict())
    return model.eval()


@functools.cache
def logits_of_one_pass(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt of the whole cache, and transformers' logits [T, V] after each of its tokens."""
    tokens = prompt(MAX_SEQ_LEN)
    with torch.no_grad():
        return tokens, reference(case)(tokens).logits[0]


def batch_of(case: str) -> Batch:
    return Batch(ours(case, batch=3), reference(case))


@pytest.mark.parametrize("case", CASES)
def test_a_random_checkpoint_can_tell_models_apart(case):
    """The other tests would pass on logits that do not vary; these do, also with the position."""
    tokens, logits = logits_of_one_pass(case)
    assert (logits.amax(-1) - logits.amin(-1)).min() > 3.0
    assert logits.argmax(-1).unique().numel() > 8
    with torch.no_grad():
        moved = reference(case)(torch.cat([tokens[:, :20].flip(1), tokens[:, 20:26]], 1)).logits[0]
    if CASES[case].get("sliding_window") != 1:
        assert (moved[25] - logits[25]).abs().max() > 0.05


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2, 7, 8, 30])
def test_greedy_ids_and_logits_are_those_of_transformers(case, length):
    tokens, steps = prompt(length), 40
    ids, logits = generate(ours(case), tokens, steps)
    # One causal pass over what was chosen: each id must be the best after those before it.
    with torch.no_grad():
        whole = torch.cat([tokens, torch.tensor([ids])], 1)
        expected = reference(case)(whole).logits[0, length - 1 : -1]
    assert ids == expected.argmax(-1).tolist()
    assert_near(logits, expected)


def test_greedy_ids_are_those_of_transformers_own_generation():
    case = "one key head, 5 sliding to 1 full"
    tokens = prompt(11)
    mask = torch.ones_like(tokens)
    expected = reference(case).generate(
        tokens, attention_mask=mask, do_sample=False, max_new_tokens=60
    )
    assert generate(ours(case), tokens, 60)[0] == expected[0, 11:].tolist()


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode_give_the_logits_of_one_pass_over_everything(case):
    model, (tokens, expected) = ours(case), logits_of_one_pass(case)
    rows = prefill(model, tokens[:, :19], even_ends(19, model.max_chunk))[-1:]
    with torch.no_grad():
        for i in range(19, MAX_SEQ_LEN):
            rows.append(model.decode(tokens[:, i : i + 1], torch.tensor([i])))
    assert_near(torch.cat(rows), expected[18:])


@pytest.mark.parametrize("case", CASES)
def test_a_prompt_may_fill_the_cache(case):
    model, (tokens, expected) = ours(case), logits_of_one_pass(case)
    ends = even_ends(MAX_SEQ_LEN, model.max_chunk)
    assert_near(torch.cat(prefill(model, tokens, ends)), expected[[end - 1 for end in ends]])


@pytest.mark.parametrize("case", ["one key head, 5 sliding to 1 full", "linear rope"])
@settings(deadline=None, max_examples=40)
@given(lengths=st.lists(st.integers(1, 7), min_size=1, max_size=14).filter(lambda x: sum(x) <= 80))
def test_chunks_of_any_lengths_give_the_logits_of_one_pass(case, lengths):
    tokens, expected = logits_of_one_pass(case)
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    assert_near(torch.cat(prefill(ours(case), tokens, ends)), expected[[end - 1 for end in ends]])


@settings(deadline=None, max_examples=25)
@given(cuts=st.sets(st.integers(1, 59)))
def test_chunks_give_what_the_whole_prompt_gives_at_once(cuts):
    case = "a window beyond the cache"
    tokens, model = prompt(60), ours(case)
    (expected,) = prefill(model, tokens, [60])
    assert_near(prefill(model, tokens, [*sorted(cuts), 60])[-1], expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 5, 33])
def test_a_second_prompt_gives_exactly_what_a_fresh_model_gives(case, length):
    used, tokens = ours(case), prompt(length, seed=2)
    generate(used, prompt(45, seed=1), 30)
    ids, logits = generate(used, tokens, 20)
    fresh_ids, fresh_logits = generate(ours(case), tokens, 20)
    assert ids == fresh_ids
    assert torch.equal(logits, fresh_logits)


@pytest.mark.parametrize("case", CASES)
def test_rows_of_a_batch_are_transformers_texts_of_ragged_prompts(case):
    batch = batch_of(case)
    for row, length in enumerate((23, 1, 9)):
        batch.begin(row, prompt(length))
    batch.step(30)
    for row in range(3):
        batch.check(row)


@pytest.mark.parametrize("case", CASES)
def test_rows_that_join_and_are_used_again_are_transformers_texts_as_well(case):
    batch = batch_of(case)
    batch.begin(1, prompt(12))
    batch.step(5)
    batch.begin(2, prompt(30))
    batch.step(9)
    batch.check(1)
    # Shorter than what was there, and longer.
    batch.begin(1, prompt(2))
    batch.begin(0, prompt(17))
    batch.step(11)
    batch.check(0)
    batch.begin(0, prompt(33))
    batch.step(12)
    for row in range(3):
        batch.check(row)


@pytest.mark.parametrize("case", CASES)
def test_a_row_of_a_batch_gives_the_logits_of_a_model_of_one_row(case):
    batch = batch_of(case)
    for row, length in enumerate((40, 2, 8)):
        batch.begin(row, prompt(length))
    batch.step(15)
    for row, length in enumerate((40, 2, 8)):
        ids, logits = generate(ours(case), prompt(length), 16)
        assert batch.texts[row][length:] == ids
        assert_near(torch.cat(batch.logits[row]), logits)


@pytest.mark.parametrize("case", CASES)
def test_a_prefill_of_a_row_leaves_the_state_of_the_others_as_it_was(case):
    batch = batch_of(case)
    for row, length in enumerate((20, 5, 11)):
        batch.begin(row, prompt(length))
    batch.step(3)
    caches = [layer.self_attn.cache for layer in batch.model.model.layers]
    before = copy.deepcopy(caches)
    batch.begin(1, prompt(31))
    for now, then in zip(caches, before, strict=True):
        for buffer, old in ((now.k, then.k), (now.v, then.v)):
            assert torch.equal(buffer[[0, 2]], old[[0, 2]])
            assert not torch.equal(buffer[1], old[1])


@pytest.mark.parametrize("case", CASES)
def test_a_longer_cache_changes_no_logits(case):
    tokens = prompt(6)
    _, short = generate(ours(case, max_seq_len=26), tokens, 20)
    _, long = generate(ours(case, max_seq_len=300), tokens, 20)
    assert_near(short, long)


@pytest.mark.parametrize(("window", "max_seq_len", "chunk"), [(7, 80, 7), (200, 80, 80), (9, 9, 9)])
def test_a_chunk_is_at_most_the_window_and_the_cache(window, max_seq_len, chunk):
    config = Gemma3Config.from_dict(SMALL | {"sliding_window": window})
    model = Gemma3(config, max_seq_len)
    assert model.max_chunk == chunk
    slots = [layer.self_attn.cache.slots for layer in model.model.layers]
    assert slots == [chunk, max_seq_len, chunk]


# Reading a config

# What google/gemma-3-4b-it's text_config says of the network, and all that it says.
GEMMA_3_4B = {
    "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
    "num_hidden_layers": 34, "sliding_window": 1024,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}  # fmt: skip
# google/gemma-3-1b-it's keys, as transformers 4 wrote them, with numbers of our own.
VERSION_4 = {key: value for key, value in SMALL.items() if key != "layer_types"} | {
    "num_hidden_layers": 7, "sliding_window_pattern": 3, "rope_theta": 500_000,
    "rope_local_base_freq": 2_000, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
}  # fmt: skip


@pytest.mark.parametrize(
    "keys", [VERSION_4, GEMMA_3_4B, SMALL, SMALL | {"rope_parameters": LINEAR}]
)
def test_a_config_means_what_transformers_reads_in_it(keys):
    read_by_transformers = Gemma3TextConfig(**keys).to_dict()
    assert Gemma3Config.from_dict(keys) == Gemma3Config.from_dict(read_by_transformers)


def test_keys_of_transformers_4_are_read():
    config = Gemma3Config.from_dict(VERSION_4)
    assert config.layer_types == (SLIDING, SLIDING, FULL, SLIDING, SLIDING, FULL, SLIDING)
    assert config.rope == {FULL: RopeConfig(500_000, 4.0), SLIDING: RopeConfig(2_000, 1.0)}


def test_keys_of_transformers_5_are_read():
    config = Gemma3Config.from_dict(SMALL | {"rope_parameters": LINEAR})
    assert config.layer_types == (SLIDING, FULL, SLIDING)
    assert config.rope == {FULL: RopeConfig(300_000.0, 8.0), SLIDING: RopeConfig(500.0, 1.0)}


def test_the_scaling_kind_may_have_its_oldest_name():
    config = Gemma3Config.from_dict(SMALL | {"rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope[FULL].factor == 2.0


def test_a_config_that_says_little_is_the_published_one():
    config = Gemma3Config.from_dict(GEMMA_3_4B)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (8, 4, 256)
    assert (config.vocab_size, config.max_position_embeddings) == (262_208, 131_072)
    assert config.layer_types[:6] == (SLIDING,) * 5 + (FULL,)
    assert config.rope == {FULL: RopeConfig(1e6, 8.0), SLIDING: RopeConfig(1e4, 1.0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"hidden_size": None}, "lacks hidden_size"),
        ({"head_dim": None, "sliding_window": None}, "lacks head_dim, sliding_window"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for 3 layers"),
        ({"layer_types": [FULL, FULL, "chunked"]}, r"layer_types .*unknown kinds \['chunked'\]"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'"),
        ({"rope_parameters": {SLIDING: {"rope_type": "llama3"}}}, "rope_type = 'llama3'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "full_attention lacks its factor"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters must have an entry for each"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_the_name_of_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        Gemma3Config.from_dict(SMALL | change)


@pytest.mark.parametrize("field", ["hidden_size", "intermediate_size", "num_hidden_layers"])
def test_a_config_without_a_size_is_refused_by_its_name(field):
    config = {key: value for key, value in SMALL.items() if key != field}
    with pytest.raises(ValueError, match=f"lacks {field}$"):
        Gemma3Config.from_dict(config)


# Reading a checkpoint


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "model.language_model."])
@pytest.mark.parametrize(
    "name", ["embed_tokens.weight", "norm.weight", "layers.11.self_attn.q_proj.weight"]
)
def test_a_text_model_is_found_under_every_prefix(prefix, name):
    assert checkpoint_name(prefix + name) == f"model.{name}"


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.vision_model.embeddings.patch_embedding.bias",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.mm_input_projection_weight",
        "model.multi_modal_projector.mm_soft_emb_norm.weight",
    ],
)
def test_the_vision_part_is_left_out(name):
    assert checkpoint_name(name) is None


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_head_of_its_own_is_not_left_out_for_it_must_equal_the_embedding(name):
    assert checkpoint_name(name) == "lm_head.weight"


def on_meta(config: dict, max_seq_len: int = 32) -> Gemma3:
    with torch.device("meta"):
        return Gemma3(Gemma3Config.from_dict(config), max_seq_len)


def test_a_model_on_meta_has_its_buffers_and_none_of_its_weights():
    model = on_meta(SMALL)
    assert all(parameter.is_meta for parameter in model.parameters())
    real = Gemma3(Gemma3Config.from_dict(SMALL), 32)
    for (name, buffer), (_, expected) in zip(
        model.named_buffers(), real.named_buffers(), strict=True
    ):
        assert torch.equal(buffer, expected), name


@pytest.mark.parametrize("case", ["one key head, 5 sliding to 1 full", "linear rope"])
def test_a_text_checkpoint_loads_into_a_model_on_meta(tmp_path, case):
    hf = reference(case)
    hf.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    model = on_meta(checkpoint.config, MAX_SEQ_LEN)
    load_weights(model, checkpoint, checkpoint_name)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens, expected = logits_of_one_pass(case)
    assert_near(prefill(model, tokens, [5, 12])[-1][0], expected[11])


def test_the_text_part_of_a_multimodal_checkpoint_loads(tmp_path):
    config = transformers.Gemma3Config(
        text_config=SMALL | {"rope_parameters": LINEAR},
        vision_config={
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        mm_tokens_per_image=4, image_token_index=96, boi_token_index=94, eoi_token_index=95,
    )  # fmt: skip
    hf = Gemma3ForConditionalGeneration(config).eval()
    randomize(hf)
    hf.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    assert any("vision_tower" in name for name in checkpoint.stored)
    model = on_meta(checkpoint.config)
    load_weights(model, checkpoint, checkpoint_name)
    tokens = prompt(12)
    with torch.no_grad():
        expected = hf(input_ids=tokens).logits[0]
    assert (expected.amax(-1) - expected.amin(-1)).min() > 3.0
    assert_near(torch.cat(prefill(model, tokens, [5, 12])), expected[[4, 11]])
