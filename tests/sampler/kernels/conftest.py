"""What all tests of the sampler's kernels share."""

import pytest


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Let short rows have several chunks as well."""
    from tests.sampler.kernels.drawing import ON_GPU, operator

    if not ON_GPU:
        monkeypatch.setattr(operator, "PART", 8)
        monkeypatch.setattr(operator, "STRIDE", 8)
        monkeypatch.setattr(operator, "AT_ONCE", 4)
        monkeypatch.setattr(operator, "LISTED", 8)
        monkeypatch.setattr(operator, "TOKENS", 16)
        monkeypatch.setattr(operator, "PROGRAMS", 6)
        monkeypatch.setattr(operator, "CHUNK", 32)
        monkeypatch.setattr(operator, "FEW", 8)
