"""Every key of a config that changes what transformers computes is read, or refused by its name."""

import dataclasses

import pytest
import torch

from tests.models.tiny_models import CASES, ROW_OF, keys, model_type_of

# Keys of transformers' config classes that do not change logits.
HARMLESS = {
    "architectures", "attention_dropout", "bos_token_id", "chunk_size_feed_forward", "dtype",
    "embd_pdrop", "eos_token_id", "id2label", "initializer_range", "label2id",
    "output_hidden_states", "output_router_logits", "pad_token_id", "pretraining_tp",
    "problem_type", "resid_pdrop", "return_dict", "router_aux_loss_coef", "transformers_version",
    "use_cache",
}  # fmt: skip
# Those that do nothing, or nothing beside another one, which has one value only.
IDLE = {
    # In training.
    "gemma3n_text": {"altup_coef_clip"},
    # Without experts, and without layers of Mamba.
    "granitemoehybrid": {
        "intermediate_size", "num_experts_per_tok", "time_step_limit",
        *(f"mamba_{key}" for key in (
            "chunk_size", "conv_bias", "d_conv", "d_head", "d_state", "expand", "n_groups",
            "n_heads", "proj_bias",
        )),
    },
    # Without use_sliding_window.
    "qwen2": {"sliding_window", "max_window_layers"},
    "qwen3": {"sliding_window", "max_window_layers"},
    "qwen3_moe": {"sliding_window"},
}  # fmt: skip
# What transformers takes besides what its classes declare, and a value that matters.
UNDECLARED = {
    "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    "partial_rotary_factor": 0.3,
    "per_layer_config": {"0": {"head_dim": 4, "num_key_value_heads": 1}},
    "is_causal": False,
}
# A case of each model_type with all that its config can ask for.
FULLEST = {case.split(",")[0]: case for case in CASES} | {
    "gemma4_text": "gemma4_text, per-layer inputs and experts, a window beyond the cache",
    "granitemoehybrid": "granitemoehybrid, dense",
    "lfm2": "lfm2",
    "qwen3_next": "qwen3_next, experts in some layers",
    "qwen3_5_text": "qwen3_5_text",
}


def others(value) -> list:
    """Values of the same kind, and of every kind where it is None."""
    if value is None:
        return [True, 3, 0.5, "odd", ["odd"], {"odd": 1}]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (int, float)):
        return [2 * value + 2, 3 * value, value / 2 + 0.01]
    return ["odd"] if isinstance(value, str) else [[], ["odd"]]


def asked() -> list[tuple[str, str]]:
    found = []
    for model_type, case in FULLEST.items():
        config_class = ROW_OF[case].classes[model_type_of(case)][0]
        declared = {field.name for field in dataclasses.fields(config_class)}
        names = declared - HARMLESS - IDLE.get(model_type, set())
        found += [(model_type, name) for name in sorted(names | UNDECLARED.keys())]
    return found


def test_every_model_type_is_looked_at():
    assert {model_type for model_type, _ in asked()} == {
        name for row in ROW_OF.values() for name in row.classes
    }


@pytest.mark.parametrize(("model_type", "name"), asked())
def test_a_key_that_transformers_reads_is_read_or_refused_by_its_name(model_type, name):
    row, config = ROW_OF[FULLEST[model_type]], keys(FULLEST[model_type])
    read = row.networks.Config.from_dict
    unchanged, seen = read(config), False
    defaults = {
        field.name: field.default
        for field in dataclasses.fields(row.classes[model_type][0])
        if field.default is not dataclasses.MISSING
    }
    values = [UNDECLARED[name]] if name in UNDECLARED else others(
        config.get(name, defaults.get(name))
    )  # fmt: skip
    for value in values:
        try:
            seen |= read(config | {name: value}) != unchanged
        except ValueError as error:
            # An object may be refused by a name in it.
            names = [name, *value] if isinstance(value, dict) else [name]
            seen |= any(each in str(error) for each in names)
    assert seen, f"{name} changes nothing, and is not on a list of such keys"


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        (
            "qwen3_moe", {"num_experts": 7, "num_local_experts": 5},
            "num_local_experts = 5 and num_experts = 7 differ",
        ),
        (
            "gemma3_text, one key head, 5 sliding to 1 full",
            {"sliding_window_pattern": 3, "_sliding_window_pattern": 2},
            "sliding_window_pattern = 3 and _sliding_window_pattern = 2 differ",
        ),
        (
            "gemma3_text, one key head, 5 sliding to 1 full", {"_sliding_window_pattern": 2},
            "sliding_window_pattern = 6 and _sliding_window_pattern = 2 differ",
        ),
        ("qwen3_5_moe_text", {"norm_topk_prob": False}, "norm_topk_prob = False is not supported"),
        ("qwen3_5_moe_text", {"decoder_sparse_step": 2}, "decoder_sparse_step = 2 is not"),
        ("qwen3_5_moe_text", {"mlp_only_layers": [0]}, "mlp_only_layers = .0. is not supported"),
        (
            "qwen3_5_moe_text", {"shared_expert_intermediate_size": 0},
            "shared_expert_intermediate_size = 0: a whole number from 1 is right",
        ),
        ("qwen3_5_text", {"num_experts": 4, "decoder_sparse_step": 1}, "num_experts = 4 is not"),
        ("qwen3_next, experts in some layers", {"num_local_experts": 3}, "num_local_experts = 3"),
        (
            "qwen3",
            {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
             "rope_scaling": {"rope_type": "default"}},
            "rope_scaling = .* and rope_parameters = .* differ: keep one",
        ),
        (
            "qwen3",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
             "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                              "original_max_position_embeddings": 64}},
            "rope_scaling = .* and rope_parameters = .* differ: keep one",
        ),
        (
            "qwen2",
            {"original_max_position_embeddings": 99,
             "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                              "original_max_position_embeddings": 64}},
            "original_max_position_embeddings = 99 and the rotary embedding's 64 differ",
        ),
    ],
)  # fmt: skip
def test_two_names_of_a_field_that_differ_are_refused(case, changes, message):
    config = {key: value for key, value in (keys(case) | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        ROW_OF[case].networks.Config.from_dict(config)


@pytest.mark.parametrize("model_type", FULLEST)
def test_a_key_that_is_null_is_read_or_refused(model_type):
    case = FULLEST[model_type]
    networks = ROW_OF[case].networks
    for key in keys(case).keys() - {"model_type"}:
        try:
            config = networks.Config.from_dict(keys(case) | {key: None})
        except ValueError as error:
            assert "\n" not in str(error)
        else:
            with torch.device("meta"):
                networks.Network(config, 1, batch=0)
