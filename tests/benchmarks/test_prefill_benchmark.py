"""What benchmarks/prefill.py refuses."""

import pytest
import torch

from benchmarks import hybrid, prefill


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--config", "qwen3"], "invalid choice: 'qwen3'"),
        (["--tokens", "128", "0"], "--tokens is 0; it must be at least 1"),
        (["--together", "-1"], "--together is -1; it must be at least 0"),
        (["--repeats", "0"], "--repeats is 0; it must be at least 1"),
        ([], "torch sees no CUDA GPU"),
    ],
)
def test_what_cannot_be_measured_is_one_line(monkeypatch, capsys, flags, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        prefill.parse(flags)
    assert line in capsys.readouterr().err.splitlines()[-1]


def test_a_config_that_is_not_there_is_one_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        hybrid.parse(["--config", "qwen3"])
    assert "invalid choice: 'qwen3'" in capsys.readouterr().err
