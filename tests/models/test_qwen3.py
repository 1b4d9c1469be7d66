"""Eager float32 models against transformers, on random checkpoints of a few thousand weights."""

import functools

import pytest
import torch
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers import Qwen3Config as HfQwen3Config

from tests.models.driving import Batch, assert_near, generate, prefill, prompt
from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.models.layers import RopeConfig, Shard
from tokenloop.models.moe import MoeConfig, SparseMoe
from tokenloop.models.qwen3 import Qwen3, Qwen3Config, checkpoint_name

MAX_SEQ_LEN = 80
# The heads' 4 * 18 values are not the hidden size.
SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 18,
    "max_position_embeddings": 256, "rope_theta": 700.0, "eos_token_id": None,
}  # fmt: skip
EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}
CLASSES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (HfQwen3Config, Qwen3ForCausalLM),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM),
}
CASES = {
    "qwen2": {"head_dim": None, "tie_word_embeddings": True},
    "qwen2, untied, one key head": {"head_dim": None, "num_key_value_heads": 1},
    "qwen3": {},
    "qwen3, tied, as many key heads": {"tie_word_embeddings": True, "num_key_value_heads": 4},
    "qwen3, linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "qwen3_moe": EXPERTS,
    "qwen3_moe, weights that add up to one": EXPERTS | {"norm_topk_prob": True},
    "qwen3_moe, all experts chosen": EXPERTS | {"num_experts_per_tok": 7},
}

pytestmark = pytest.mark.usefixtures("one_thread")


def keys(case: str) -> dict:
    """config.json's keys."""
    merged = {"model_type": case.split(",")[0]} | SMALL | CASES[case]
    return {key: value for key, value in merged.items() if value is not None}


@functools.cache
def reference(case: str) -> torch.nn.Module:
    """Weights under which nothing drowns the rest, and positions matter."""
    config_class, model_class = CLASSES[case.split(",")[0]]
    config = config_class(**keys(case))
    model = model_class._from_config(config, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        std = 0.25 if "embed_tokens" in name else 0.4
        torch.nn.init.normal_(parameter, std=std, generator=generator)
        if "norm" in name:
            parameter.data += 1.0
    return model


def ours(case: str, max_seq_len: int = MAX_SEQ_LEN, batch: int = 1) -> Qwen3:
    hf = reference(case)
    model = Qwen3(Qwen3Config.from_dict(hf.config.to_dict()), max_seq_len, batch)
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
    """The other tests would pass on logits that do not vary; these do, also with the position."""
    tokens, logits = logits_of_one_pass(case)
    assert (logits.amax(-1) - logits.amin(-1)).min() > 2.0
    assert logits.argmax(-1).unique().numel() > 8
    with torch.no_grad():
        moved = reference(case)(torch.cat([tokens[:, :20].flip(1), tokens[:, 20:26]], 1)).logits[0]
    assert (moved[25] - logits[25]).abs().max() > 0.05


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("length", [1, 2, 16])
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
@pytest.mark.parametrize("ends", [[80], [1, 2, 9, 10, 43, 80], list(range(1, 81))])
def test_chunks_of_any_lengths_give_the_logits_of_one_pass(case, ends):
    tokens, expected = logits_of_one_pass(case)
    logits = torch.cat(prefill(ours(case), tokens, ends))
    assert_near(logits, expected[[end - 1 for end in ends]])


@pytest.mark.parametrize("case", CASES)
def test_ragged_rows_of_a_batch_are_transformers_texts_and_those_of_models_of_one_row(case):
    batch, lengths = Batch(ours(case, batch=3), reference(case)), (23, 1, 9)
    for row, length in enumerate(lengths):
        batch.begin(row, prompt(length))
    batch.step(11)
    for row, length in enumerate(lengths):
        batch.check(row)
        ids, logits = generate(ours(case), prompt(length), 12)
        assert batch.texts[row][length:] == ids
        assert_near(torch.cat(batch.logits[row]), logits)


@pytest.mark.parametrize("case", CASES)
def test_a_token_may_come_as_its_embedding(case):
    plain, embedded = ours(case, batch=2), ours(case, batch=2)
    token, position = torch.tensor([[5], [60]]), torch.tensor([3, 0])
    hidden = embedded.embed(token)
    assert hidden.shape == (2, 1, 48)
    actual = embedded.decode_embedded(hidden, position)
    assert torch.equal(actual, plain.decode(token, position))


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "qwen3_moe"])
def test_a_saved_checkpoint_loads_into_a_model_on_meta(tmp_path, case):
    reference(case).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    with torch.device("meta"):
        model = Qwen3(Qwen3Config.from_dict(checkpoint.config), MAX_SEQ_LEN)
    load_weights(model, checkpoint, checkpoint_name)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == CASES[case].get("tie_word_embeddings", False)
    tokens, expected = logits_of_one_pass(case)
    with torch.no_grad():
        assert_near(prefill(model, tokens, [5, 12])[-1][0], expected[11])


def test_caches_hold_the_dtype_asked_for():
    config = Qwen3Config.from_dict(keys("qwen3"))
    model = Qwen3(config, 8, batch=2, dtype=torch.bfloat16).to(torch.bfloat16)
    cache = model.model.layers[0].self_attn.cache
    assert cache.k.dtype == torch.bfloat16 and cache.k.shape == (2, 8, 2, 18)
    with torch.no_grad():
        logits = model.prefill(torch.tensor([[1, 2]]), torch.arange(2), torch.tensor([0]))
    assert logits.dtype == torch.float32 and model.max_chunk == 8


# Experts


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_reading_the_chosen_experts_gives_what_reading_all_gives(tokens):
    torch.manual_seed(tokens)
    moe = SparseMoe(24, MoeConfig(11, 4, 6, norm_topk_prob=False)).requires_grad_(False)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(tokens, 24)
    routed = moe.route(moe.gate(x))
    torch.testing.assert_close(moe.experts(x, *routed), moe.experts.all(x, *routed))


def test_experts_that_are_not_chosen_are_not_read():
    moe = SparseMoe(8, MoeConfig(6, 2, 4, norm_topk_prob=True)).requires_grad_(False)
    for parameter in moe.experts.parameters():
        torch.nn.init.normal_(parameter)
        parameter[[0, 2, 4, 5]] = torch.nan
    chosen, weights = torch.tensor([[3, 1]]), torch.tensor([[0.6, 0.4]])
    assert moe.experts(torch.ones(1, 8), chosen, weights).isfinite().all()


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "qwen3_moe"])
def test_both_methods_export_with_any_prompt_length(case):
    model = ours(case)
    length = torch.export.Dim("T", min=1, max=40)
    exported = torch.export.export(
        Method(model.prefill, model),
        (torch.zeros(1, 3, dtype=torch.int64), torch.arange(3)),
        dynamic_shapes=({1: length}, {0: length}),
    ).module()
    for count in (1, 2, 40):
        tokens, positions = prompt(count), torch.arange(count)
        assert_near(exported(tokens, positions), model.prefill(tokens, positions))
    example = torch.tensor([[7]]), torch.tensor([40])
    decode = torch.export.export(Method(model.decode, model), example).module()
    # The exported methods have caches of their own.
    for module in (decode, model):
        for buffer in module.buffers():
            if buffer.ndim == 4:
                buffer.zero_()
    assert_near(decode(*example), model.decode(*example))


class Method(torch.nn.Module):
    """A method of a model as a module's forward."""

    def __init__(self, method, model: Qwen3):
        super().__init__()
        self.model, self.method = model, method

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return self.method(tokens, positions)


# Reading a config


@pytest.mark.parametrize("case", CASES)
def test_a_config_means_what_transformers_reads_in_it(case):
    read_by_transformers = reference(case).config.to_dict()
    assert Qwen3Config.from_dict(keys(case)) == Qwen3Config.from_dict(read_by_transformers)


@pytest.mark.parametrize("model_type", CLASSES)
def test_what_a_config_does_not_say_is_transformers_default(model_type):
    said = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1}
    full = CLASSES[model_type][0](**said).to_dict()
    config = Qwen3Config.from_dict(said | {"model_type": model_type})
    assert config == Qwen3Config.from_dict(full)
    assert config.rope == RopeConfig(10_000.0)
    assert config.head_dim == {"qwen2": 2, "qwen3": 128, "qwen3_moe": 2}[model_type]


def test_linear_rope_divides_positions():
    assert Qwen3Config.from_dict(keys("qwen3, linear rope")).rope == RopeConfig(700.0, 3.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "qwen2_moe"}, "model_type = 'qwen2_moe' is none of qwen2, qwen3"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_att"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"num_experts_per_tok": 8}, "num_experts_per_tok = 8 is not among num_experts = 7"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type = 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_type = 'dynamic'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks its factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"hidden_size": None, "head_dim": None}, "lacks hidden_size, head_dim"),
        ({"intermediate_size": None}, "lacks intermediate_size$"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused_by_the_name_of_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        Qwen3Config.from_dict(keys("qwen3_moe") | change)


# Reading a checkpoint


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("model.layers.3.mlp.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.gate_proj.weight"),
        ("a.mlp.experts.12.gate_proj.weight", Shard("a.mlp.experts.gate_up_proj", 0, 2, 12)),
        ("a.mlp.experts.12.up_proj.weight", Shard("a.mlp.experts.gate_up_proj", 1, 2, 12)),
        ("a.mlp.experts.0.down_proj.weight", Shard("a.mlp.experts.down_proj", 0, 1, 0)),
        ("a.mlp.experts.up_proj.weight", Shard("a.mlp.experts.gate_up_proj", 1, 2, None)),
        ("a.mlp.experts.gate_up_proj", "a.mlp.experts.gate_up_proj"),
    ],
)
def test_experts_are_pieces_of_what_is_stacked(name, target):
    assert checkpoint_name(name) == target
