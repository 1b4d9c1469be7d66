"""Configs at random give transformers' logits, or are refused by a field's name: some of those that
tests/compare_configs.py takes thousands of."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare_configs import outcome_of
from tests.random_configs import MODEL_TYPES, random_config

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "compared_configs.json"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@settings(deadline=None, max_examples=4)
@given(rng=st.randoms(use_true_random=False))
def test_a_config_at_random_gives_transformers_logits_or_is_refused_by_name(model_type, rng):
    config = random_config(rng, model_type)
    outcome, said = outcome_of(config)
    assert outcome != "wrong", f"{json.dumps(config)}\n{said}"


def test_some_of_the_thousands_were_read_and_none_was_wrong():
    result = json.loads(RESULT.read_text())
    assert result["count"] >= 3000 and result["wrong"] == []
    assert result["outcomes"].keys() <= set(MODEL_TYPES)
    for outcomes in result["outcomes"].values():
        assert outcomes["read"] > 0.05 * sum(outcomes.values())
