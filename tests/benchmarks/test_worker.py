"""What benchmarks/worker.py says about an artifact."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]


def work(task: str, lines: int = 0, **spec) -> tuple[dict, bytes]:
    """The JSON line of a task which is asked for more this many times, and what else it wrote."""
    text = json.dumps(spec) + "\n" + "next\n" * lines
    command = [sys.executable, "-m", "benchmarks.worker", task, "-"]
    done = subprocess.run(command, input=text.encode(), capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr.decode()
    line, _, rest = done.stdout.partition(b"\n")
    return json.loads(line), rest


def test_weights_are_the_bytes_of_the_linear_layers(tiny_artifact):
    answer, _ = work("weights", program=str(tiny_artifact / "model.pte"))
    size, heads, kv_heads, hidden = 64, 4 * 32, 2 * 32, 96
    layer = size * (heads + kv_heads + kv_heads) + heads * size + 3 * size * hidden
    expected = 4 * (3 * layer + 259 * size) / 1e6
    # What is more are the rows of ones with which norms are computed.
    assert expected <= answer["weights_mb"] < 1.01 * expected


def test_scores_are_the_logits_after_every_token(tiny_artifact):
    from tokenloop.runner.model import Model

    windows = [[2, *range(70, 140)], [2, 60, 61]]
    spec = {"engine": "tokenloop", "path": str(tiny_artifact), "ids": [2, 80, 90], "limit": 5}
    answer, blocks = work("score", lines=3, windows=windows, **spec)
    model = Model(tiny_artifact)
    assert answer["ids"] == model.generate([2, 80, 90], 5).run().token_ids
    actual = np.frombuffer(blocks, np.float32).reshape(-1, 259)
    program = model.loop.program
    for window in windows:
        rows, actual = actual[: len(window)], actual[len(window) :]
        for start in range(0, len(window), 7):
            end = min(start + 7, len(window))
            row = program.prefill(np.array([window[start:end]]), np.arange(start, end))[0]
            np.testing.assert_allclose(rows[end - 1], row, rtol=0.0, atol=1e-5)
    assert len(actual) == 0
