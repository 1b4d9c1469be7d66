"""Eager float32 hybrids against transformers, on random checkpoints of a few thousand weights."""

import copy
import functools

import pytest
import torch
from transformers import (
    Qwen3_5ForCausalLM,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

from tests.models.driving import Batch, assert_near, generate, prefill, prompt
from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.export.methods import prompt_chunk
from tokenloop.export.pt2 import package as pt2
from tokenloop.models.kernels.gated_delta_rule import reference as delta_rule
from tokenloop.models.layers import RopeConfig
from tokenloop.models.qwen3_5 import MODEL_TYPES, Qwen3_5, Qwen3_5Config, checkpoint_name

FULL, LINEAR = "full_attention", "linear_attention"
MAX_SEQ_LEN = 150  # three chunks of the delta rule
# Every size of a gated delta net is another one.
SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
    "linear_num_key_heads": 2, "linear_num_value_heads": 6,
    "linear_key_head_dim": 10, "linear_value_head_dim": 14,
    "max_position_embeddings": 256, "pad_token_id": 0,
}  # fmt: skip
CLASSES = {
    "qwen3_5_text": (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    "qwen3_5_moe_text": (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
    "qwen3_next": (Qwen3NextConfig, Qwen3NextForCausalLM),
}
CASES = {
    "qwen3_5_text": {},
    "qwen3_5_text, tied, as many key heads": {
        "tie_word_embeddings": True, "linear_num_key_heads": 6, "linear_conv_kernel_dim": 2,
    },
    "qwen3_5_text, half of a head turns": {
        "layer_types": [FULL, LINEAR], "num_hidden_layers": 2, "linear_conv_kernel_dim": 3,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5,
            "mrope_interleaved": True, "mrope_section": [2, 2, 2],
        },
    },
    "qwen3_next": {"num_experts": 0},
    "qwen3_next, every other layer": {
        "num_experts": 4, "mlp_only_layers": [0, 1, 2, 3], "full_attention_interval": 2,
    },
    "qwen3_5_moe_text": {
        "num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
    },
    "qwen3_next, experts in some layers": {
        "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 20, "decoder_sparse_step": 2, "norm_topk_prob": False,
    },
}  # fmt: skip
LAYOUTS = ["qwen3_5_text", "qwen3_next"]

pytestmark = pytest.mark.usefixtures("one_thread")


def keys(case: str) -> dict:
    """config.json's keys."""
    return {"model_type": case.split(",")[0]} | SMALL | CASES[case]


@functools.cache
def reference(case: str) -> torch.nn.Module:
    """Weights under which nothing drowns the rest, and heads forget at different speeds."""
    config_class, model_class = CLASSES[case.split(",")[0]]
    config = config_class(**keys(case))
    model = model_class._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        std = {"A_log": 1.0, "dt_bias": 1.0, "conv1d.weight": 0.6}.get(name.split("attn.")[-1], 0.4)
        torch.nn.init.normal_(parameter, std=std, generator=generator)
        if "linear_attn.norm" in name:
            parameter.data += 1.0
        if name.endswith("A_log"):
            parameter.data -= 2.0
    return model


def ours(case: str, max_seq_len: int = MAX_SEQ_LEN, batch: int = 1) -> Qwen3_5:
    hf = reference(case)
    model = Qwen3_5(Qwen3_5Config.from_dict(hf.config.to_dict()), max_seq_len, batch)
    model.load_state_dict(hf.state_dict())
    return model.eval().requires_grad_(False)


@functools.cache
def logits_of_one_pass(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt of the whole cache, and transformers' logits [T, V] after each of its tokens."""
    tokens = prompt(MAX_SEQ_LEN)
    with torch.no_grad():
        return tokens, reference(case)(tokens).logits[0]


@pytest.mark.parametrize("case", CASES)
def test_a_random_checkpoint_can_tell_models_apart(case):
    """The other tests would pass on logits that do not vary; these do, also with what came long
    before."""
    tokens, logits = logits_of_one_pass(case)
    assert (logits.amax(-1) - logits.amin(-1)).min() > 2.0
    assert logits.argmax(-1).unique().numel() > 8
    other = torch.cat([tokens[:, :1] + 1, tokens[:, 1:90]], 1)
    with torch.no_grad():
        moved = reference(case)(other).logits[0]
    assert (moved[89] - logits[89]).abs().max() > 0.005


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2, 67])
def test_greedy_ids_and_logits_are_those_of_transformers(case, length):
    tokens = prompt(length)
    ids, logits = generate(ours(case), tokens, 64)
    # One causal pass over what was chosen: each id must be the best after those before it.
    with torch.no_grad():
        whole = torch.cat([tokens, torch.tensor([ids])], 1)
        expected = reference(case)(whole).logits[0, length - 1 : -1]
    assert ids == expected.argmax(-1).tolist()
    assert_near(logits, expected)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "ends", [[150], [1, 2, 4, 7, 70, 134, 135, 150], list(range(1, 12))], ids=len
)
def test_chunks_of_any_lengths_give_the_logits_of_one_pass(case, ends):
    tokens, expected = logits_of_one_pass(case)
    logits = torch.cat(prefill(ours(case), tokens, ends))
    assert_near(logits, expected[[end - 1 for end in ends]])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("length", [1, 3, 64])
def test_a_prefill_and_a_step_give_what_a_prefill_of_one_more_gives(layout, length):
    tokens, model = prompt(length + 1), ours(layout)
    (expected,) = prefill(model, tokens, [length + 1])
    prefill(model, tokens[:, :length], [length])
    assert_near(model.decode(tokens[:, length:], torch.tensor([length])), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_at_position_0_begins_anew_as_a_prefill_does(layout):
    model = ours(layout)
    (expected,) = prefill(model, prompt(1), [1])
    prefill(model, prompt(20), [20])
    assert_near(model.decode(prompt(1), torch.tensor([0])), expected)


@pytest.mark.parametrize("case", CASES)
def test_ragged_rows_that_join_and_leave_are_transformers_texts(case):
    batch = Batch(ours(case, batch=3), reference(case))
    batch.begin(1, prompt(12))
    batch.step(5)
    batch.begin(2, prompt(70))
    batch.step(3)
    batch.check(1)
    # Shorter than what was there, and longer.
    batch.begin(1, prompt(2))
    batch.begin(0, prompt(17))
    batch.step(7)
    batch.check(0)
    batch.begin(0, prompt(33))
    batch.step(6)
    for row in range(3):
        batch.check(row)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_of_a_batch_gives_the_logits_of_a_model_of_one_row(layout):
    batch, lengths = Batch(ours(layout, batch=3), reference(layout)), (66, 1, 9)
    for row, length in enumerate(lengths):
        batch.begin(row, prompt(length))
    batch.step(11)
    for row, length in enumerate(lengths):
        ids, logits = generate(ours(layout), prompt(length), 12)
        assert batch.texts[row][length:] == ids
        assert_near(torch.cat(batch.logits[row]), logits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prefill_of_a_row_leaves_the_state_of_the_others_as_it_was(layout):
    batch = Batch(ours(layout, batch=3), reference(layout))
    for row, length in enumerate((20, 5, 11)):
        batch.begin(row, prompt(length))
    batch.step(3)
    caches = [layer.mixer.cache for layer in batch.model.model.layers]
    before = copy.deepcopy(caches)
    batch.begin(1, prompt(31))
    for now, then in zip(caches, before, strict=True):
        for buffer, old in zip(now.buffers(), then.buffers(), strict=True):
            assert torch.equal(buffer[[0, 2]], old[[0, 2]])
            assert not torch.equal(buffer[1], old[1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_states_are_updated_in_place(layout):
    model = ours(layout)
    before = [buffer.data_ptr() for buffer in model.buffers()]
    generate(model, prompt(5), 3)
    assert [buffer.data_ptr() for buffer in model.buffers()] == before


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_second_prompt_gives_exactly_what_a_fresh_model_gives(layout):
    used, tokens = ours(layout), prompt(9, seed=2)
    generate(used, prompt(45), 10)
    ids, logits = generate(used, tokens, 20)
    fresh_ids, fresh_logits = generate(ours(layout), tokens, 20)
    assert ids == fresh_ids
    assert torch.equal(logits, fresh_logits)


def test_a_token_may_come_as_its_embedding():
    plain, embedded = ours("qwen3_5_text", batch=2), ours("qwen3_5_text", batch=2)
    token, position = torch.tensor([[5], [60]]), torch.tensor([3, 0])
    hidden = embedded.embed(token)
    assert hidden.shape == (2, 1, 48)
    actual = embedded.decode_embedded(hidden, position)
    assert torch.equal(actual, plain.decode(token, position))


def test_states_are_of_the_dtype_asked_for_but_the_recurrent_one():
    model = Qwen3_5(Qwen3_5Config.from_dict(keys("qwen3_5_text")), 8, 2, torch.bfloat16)
    linear, full = (model.model.layers[i].mixer.cache for i in (0, 3))
    assert linear.conv.shape == (2, 2 * 20 + 84, 3) and linear.conv.dtype == torch.bfloat16
    assert linear.recurrent.shape == (2, 6, 10, 14) and linear.recurrent.dtype == torch.float32
    assert full.k.shape == (2, 8, 2, 24) and full.k.dtype == torch.bfloat16
    assert model.max_chunk == 8 and not [name for name in model.state_dict() if "cache" in name]


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


class Method(torch.nn.Module):
    """A method of a model as a module's forward."""

    def __init__(self, model: Qwen3_5, method: str):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return getattr(self.model, self.method)(*inputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_both_methods_export_with_any_prompt_length_and_row(layout):
    # What is exported may share its states with the model, and must not be driven twice.
    model, plain = ours(layout, batch=2), ours(layout, batch=2)
    length = torch.export.Dim("T", min=1, max=model.max_chunk)
    rows = torch.tensor([0]), torch.tensor([1])
    exported = torch.export.export(
        Method(model, "prefill"),
        (torch.zeros(1, 3, dtype=torch.int64), torch.arange(3), rows[0]),
        dynamic_shapes=(({1: length}, {0: length}, None),),
    ).module()
    begin = 0
    # Each continues the one before, but the last, which is as long as can be.
    for count, row in ((1, 1), (2, 1), (63, 1), (64, 1), (20, 1), (150, 0)):
        begin = begin if row else 0
        chunk = prompt(count), torch.arange(begin, begin + count), rows[row]
        assert_near(exported(*chunk), plain.prefill(*chunk))
        begin += count

    example = torch.tensor([[7], [3]]), torch.tensor([0, 5])
    exported = torch.export.export(Method(ours(layout, batch=2), "decode"), example).module()
    plain = ours(layout, batch=2)
    for token, position in (example, (example[0] + 1, example[1] + 1)):
        assert_near(exported(token, position), plain.decode(token, position))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_may_fill_the_rule_s_chunks_whole(layout):
    """As .pt2 packages are traced, whose conditions on T are asserted when they run."""
    model, plain = ours(layout), ours(layout)
    model.limit_chunks(2 * delta_rule.CHUNK)
    example, shapes = prompt_chunk(1, model.max_chunk)
    prefill = pt2.trace(Method(model, "prefill"), example, [tuple(shapes)])
    for count in (1, model.max_chunk - 1, model.max_chunk):
        chunk = prompt(count), torch.arange(count)
        assert_near(prefill(*chunk), plain.prefill(*chunk))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_checkpoint_loads_into_a_model_on_meta(tmp_path, layout):
    reference(layout).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with torch.device("meta"):
        model = Qwen3_5(Qwen3_5Config.from_dict(checkpoint.config), MAX_SEQ_LEN)
    load_weights(model, checkpoint, checkpoint_name)
    tokens, expected = logits_of_one_pass(layout)
    assert_near(prefill(model, tokens, [5, 12])[-1][0], expected[11])


# Reading a config


@pytest.mark.parametrize("case", CASES)
def test_a_config_means_what_transformers_reads_in_it(case):
    read_by_transformers = reference(case).config.to_dict()
    assert Qwen3_5Config.from_dict(keys(case)) == Qwen3_5Config.from_dict(read_by_transformers)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_what_a_config_does_not_say_is_transformers_default(model_type):
    said = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 8}
    config = Qwen3_5Config.from_dict(said | {"model_type": model_type})
    assert config == Qwen3_5Config.from_dict(CLASSES[model_type][0](**said).to_dict())
    assert config.layer_types == (LINEAR, LINEAR, LINEAR, FULL) * 2
    assert (config.rope, config.rotary_dim) == (RopeConfig(10_000.0), 64)


def test_keys_of_transformers_4_are_read():
    old = keys("qwen3_next") | {"rope_theta": 1e7, "partial_rotary_factor": 0.5}
    config = Qwen3_5Config.from_dict(old | {"rope_scaling": None})
    assert (config.rope, config.rotary_dim) == (RopeConfig(1e7), 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen3_5_omni"}, "'qwen3_5_omni' is none of qwen3_5_text"),
        ({"num_experts": 4}, "num_experts_per_tok = 10 is not among num_experts = 4"),
        ({"num_experts": 4, "moe_intermediate_size": None}, "lacks moe_intermediate_size"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"attn_output_gate": False}, "attn_output_gate = False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"linear_conv_kernel_dim": 5}, "linear_conv_kernel_dim = 5"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads = 5 .* linear_num_key_heads = 2"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 .* num_key_value_heads = 3"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for 4 layers"),
        ({"layer_types": [FULL] * 3 + ["chunked"]}, r"unknown kinds \['chunked'\]"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
        ({"hidden_size": None, "head_dim": None}, "lacks hidden_size, head_dim"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_the_name_of_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        Qwen3_5Config.from_dict(keys("qwen3_next") | change)


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.3.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"),
        ("model.language_model.norm.weight", "model.norm.weight"),
        ("model.visual.blocks.0.attn.qkv.weight", None),
        ("mtp.layers.0.mlp.up_proj.weight", None),
    ],
)
def test_the_text_model_is_found_in_every_checkpoint(name, parameter):
    assert checkpoint_name(name) == parameter
