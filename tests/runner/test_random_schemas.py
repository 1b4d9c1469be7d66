"""A slice of tests/random_schemas.py, and that it sees what does not fit."""

from types import SimpleNamespace

import pytest

from tests.random_schemas import judged, requests_of, run
from tokenloop import runner
from tokenloop.runner import Request


def test_outputs_fit_random_schemas(batch_artifact):
    found = run(runner.load(batch_artifact), requests_of(30, 1, 1.0))
    # The cache of 200 positions cuts some short.
    assert not set(found) - {"fits", "length", "same", "tokens"}
    assert found["fits"] >= 20 and found["fits"] + found["length"] == 30 and found["same"] == 8


@pytest.mark.parametrize(
    "text, reason, verdict",
    [
        ('"ab"', "stop", "fits"), ('"abc"', "stop", "ValidationError"), ('"', "length", "length"),
        ('"', "stop", "JSONDecodeError"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_seen(text, reason, verdict):
    request = Request("", json_schema={"type": "string", "maxLength": 2})
    result = SimpleNamespace(text=text, finish_reason=reason, request=request, error=None)
    assert judged(result) == verdict
