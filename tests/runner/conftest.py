"""An artifact of several rows, as the other artifacts that tests share."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tokenloop.runner import engine, ticket


@pytest.fixture(scope="session")
def batch_artifact(export_artifact, tiny_checkpoint) -> Path:
    """tiny_artifact with three rows."""
    arguments = ("--model", tiny_checkpoint, "--quant", "fp32", "--batch", 3)
    return export_artifact("tiny-batch", *arguments, "--max-seq-len", 200, "--max-prefill", 7)


@pytest.fixture
def clock(monkeypatch):
    """The time of engines' deadlines, in seconds."""
    now = SimpleNamespace(value=0.0)
    fake = SimpleNamespace(monotonic=lambda: now.value)
    monkeypatch.setattr(ticket, "time", fake)
    monkeypatch.setattr(engine, "time", fake)
    return now
