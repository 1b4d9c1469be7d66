"""An artifact of several rows, as the other artifacts that tests share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def batch_artifact(export_artifact, tiny_checkpoint) -> Path:
    """tiny_artifact with three rows."""
    arguments = ("--model", tiny_checkpoint, "--quant", "fp32", "--batch", 3)
    return export_artifact("tiny-batch", *arguments, "--max-seq-len", 200, "--max-prefill", 7)
