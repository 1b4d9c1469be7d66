"""Some of what `python -m tests.differential_tokenizers` draws by the thousand."""

from tests.differential_tokenizers import differential


def test_tokenizers_and_conversations_at_random_are_those_of_transformers(tmp_path):
    outcomes = differential(12, 0, tmp_path)
    assert outcomes["refused"] < 6 < sum(outcomes.values())
    assert outcomes["read, 2 of 2 conversations rendered"] > 1
