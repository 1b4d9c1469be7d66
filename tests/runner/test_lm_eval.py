"""Log probabilities and texts as lm-eval gets them from the server, and from its transformers."""

from importlib.util import find_spec

import pytest

from tests.evaluate_server import WAYS, compare, is_right


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="pip install 'lm-eval[api,hf]'")
def test_lm_eval_gets_from_the_server_what_transformers_give_it(tiny_checkpoint, batch_artifact):
    result = compare(tiny_checkpoint, batch_artifact)
    assert is_right(result), result
    assert set(result["tasks"]) == {"austen_choice", "austen_continued", "austen_words"}
    # Its texts begin with <bos>, which lm-eval would write into the texts.
    assert set(result["ways_with_the_same_bits"]) == {way for way in WAYS if "texts" not in way}
