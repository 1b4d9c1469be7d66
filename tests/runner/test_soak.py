"""A slice of the long run: results stay what they are alone, and the run notices when not."""

import pytest

from tests.soak import Memory, Soak
from tests.threads import yielding_model


@pytest.mark.parametrize("seed", range(2))
def test_thousands_of_tokens_are_those_of_each_request_alone(seed):
    soak = Soak(yielding_model(1 + 3 * seed), seed)
    growth = soak.run(3000)
    assert soak.tokens >= 3000 and soak.counts["wrong"] == 0
    assert all(soak.counts[ended] for ended in ("whole", "cancelled", "given up"))
    assert growth["resident"] < 2


def test_a_token_of_another_row_is_noticed():
    soak = Soak(yielding_model(3))
    soak.expected[5] = soak.expected[5][:-1] + [soak.expected[5][-1] ^ 1]
    soak.run(2000)
    assert soak.counts["wrong"] > 0


def test_growth_is_that_of_the_memory_that_is_used():
    assert Memory(100, 0).growth_to(Memory(103, 0)) == {"resident": 1.03}
    assert Memory(100, 50).growth_to(Memory(100, 100)) == {"resident": 1.0, "gpu": 2.0}
    assert Memory.now(False).resident > 10e6
