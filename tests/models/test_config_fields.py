"""A field of a config.json that is not of its kind is refused with its value, at once."""

import time

import pytest

from tests.models.tiny_models import ROW_OF, TYPICAL, keys
from tokenloop.models.config_fields import FIELDS, PRODUCTS, check, shown

typical_cases = pytest.mark.parametrize("case", TYPICAL)


def from_dict(case: str, **changes):
    return ROW_OF[case].networks.Config.from_dict(keys(case) | changes)


@typical_cases
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "64"}, "^hidden_size = '64': a whole number from 1 to 16777216 is right$"),
        ({"hidden_size": 64.0}, "^hidden_size = 64.0: a whole"),
        ({"hidden_size": [64]}, r"^hidden_size = \[64\]: a whole"),
        ({"hidden_size": -64}, "^hidden_size = -64: a whole"),
        ({"hidden_size": 1 << 63}, f"^hidden_size = {1 << 63}: a whole"),
        ({"num_hidden_layers": True}, "^num_hidden_layers = True: a whole number from 1 to 1024"),
        ({"num_hidden_layers": 1 << 31}, "^num_hidden_layers = 2147483648: a whole"),
        ({"num_attention_heads": 0}, "^num_attention_heads = 0: a whole"),
        ({"num_key_value_heads": 0}, "^num_key_value_heads = 0: a whole"),
        ({"head_dim": 1_000_000}, "^head_dim = 1000000: a whole number from 1 to 65536 is right$"),
        ({"vocab_size": None}, "lacks vocab_size"),
        ({"rms_norm_eps": 2.0**40}, "^rms_norm_eps = 1099511627776.0: a number from 1e-30 to 1 is"),
        ({"rms_norm_eps": float("nan")}, "^rms_norm_eps = nan: a number"),
        ({"rms_norm_eps": False}, "^rms_norm_eps = False: a number"),
        ({"rope_theta": float("inf")}, r"^rope_theta = inf: a number from 1 to 1e\+12 is right$"),
        ({"rope_scaling": 3}, "^rope_scaling = 3: an object is right$"),
        ({"rope_parameters": 3}, "^rope_parameters = 3: an object is right$"),
        ({"rope_parameters": [1]}, r"^rope_parameters = \[1\]: an object is right$"),
        ({"rope_scaling": {"factor": "x"}}, "^rope_scaling.factor = 'x': a number from 1e-06 to"),
        ({"rope_scaling": {"type": ["linear"]}}, r"^rope_scaling.type = \['linear'\]: a string"),
        (
            {"rope_parameters": {"full_attention": "default"}},
            "^rope_parameters.full_attention = 'default': an object is right$",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": "x"}}},
            "^rope_parameters.full_attention.rope_theta = 'x': a number",
        ),
        ({"layer_types": "full_attention"}, "^layer_types = 'full_attention': a list of strings"),
        ({"layer_types": [1, 2, 3]}, r"^layer_types = \[1, 2, 3\]: a list of strings"),
        ({"tie_word_embeddings": "no"}, "^tie_word_embeddings = 'no': true or false is right$"),
        ({"max_position_embeddings": 1 << 31}, "^max_position_embeddings = 2147483648: a whole"),
        ({"eos_token_id": [1, True]}, r"^eos_token_id = \[1, True\]: a whole number"),
        ({"bos_token_id": -1}, "^bos_token_id = -1: a whole number from 0"),
        (
            {"hidden_size": 1 << 24, "vocab_size": 1 << 24, "head_dim": 16},
            "^vocab_size . hidden_size = 16777216 . 16777216: at most 1099511627776 is right$",
        ),
        ({"head_dim": 1 << 16, "num_attention_heads": 1 << 12}, "num_attention_heads . head_dim"),
        ({"model_type": ["llama"]}, "^model_type = "),
        ({"per_layer_config": {"x": {}}}, "^per_layer_config.'x' is for no layer"),
        ({"per_layer_config": {"0": 3}}, "^per_layer_config.'0' = 3: an object is right$"),
        ({"per_layer_config": {"0": {"head_dim": None}}}, "^per_layer_config.'0'.head_dim = None"),
    ],
)
def test_a_field_of_another_kind_is_refused_with_its_value_at_once(case, changes, message):
    start = time.perf_counter()
    with pytest.raises(ValueError, match=message) as raised:
        from_dict(case, **changes)
    assert "\n" not in str(raised.value)
    assert time.perf_counter() - start < 1.0


@typical_cases
def test_every_field_that_is_known_is_looked_at_whichever_the_value(case):
    class Other:
        """No value of a JSON file."""

    for name in FIELDS:
        with pytest.raises(ValueError, match=name):
            from_dict(case, **{name: Other()})


@typical_cases
def test_a_config_of_nulls_says_what_is_missing(case):
    nulls = {name: None for name in FIELDS if name != "model_type"}
    with pytest.raises(ValueError, match="lacks .*hidden_size"):
        from_dict(case, **nulls)
    for name in FIELDS:
        if name != "model_type":
            try:
                from_dict(case, **{name: None})
            except ValueError as error:
                assert "lacks" in str(error) or "is not a multiple" in str(error), name


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        *(
            (case, {"head_dim": 17}, "^head_dim.* = 17: an even number is right")
            for case in TYPICAL
            if case.startswith(("gemma", "llama", "qwen3,", "qwen3_moe"))
        ),
        ("llama", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
        ("llama", {"head_dim": None, "hidden_size": 50}, "hidden_size = 50 is not a multiple of"),
        (
            "llama, tied, llama3 rope",
            {"rope_scaling": keys("llama, tied, llama3 rope")["rope_scaling"]
             | {"low_freq_factor": 4.0}},
            "high_freq_factor = 4.0 must be above low_freq_factor = 4.0",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "factors", "factors": [1.0, 2.0]}},
            "factors of the rotary embedding has 2 numbers; 9, one for each pair of a head, are",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "factors", "factors": [1.0, "x"]}},
            r"rope_scaling.factors = \[1.0, 'x'\]: a list of numbers",
        ),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 3 layers"),
        ("qwen3_moe", {"num_experts": -1}, "num_experts = -1: a whole number from 0"),
        ("qwen3_moe", {"moe_intermediate_size": None}, "lacks moe_intermediate_size"),
        ("qwen3_next", {"decoder_sparse_step": 0}, "decoder_sparse_step = 0: a whole number"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval = 0: a whole"),
        ("qwen3_next", {"partial_rotary_factor": None}, "lacks partial_rotary_factor"),
        ("qwen3_next", {"partial_rotary_factor": 1e-5}, "partial_rotary_factor = 0: an even"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_one_another_are_refused(case, changes, message):
    with pytest.raises(ValueError, match=message):
        from_dict(case, **changes)


def test_the_fields_of_products_are_known():
    for products in PRODUCTS.values():
        assert {name for names in products for name in names} <= FIELDS.keys()


def test_a_value_of_any_length_is_shown_in_a_line():
    assert len(shown("x" * 10**6)) < 100 and len(shown(list(range(10**6)))) < 100
    deep = []
    for _ in range(900):
        deep = [deep]
    with pytest.raises(ValueError, match="hidden_size = "):
        check({"hidden_size": deep})
