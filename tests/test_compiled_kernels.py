"""Every Triton kernel compiles for a Hopper GPU, in its operators' tiles; what Triton's interpreter
runs need not. In a process of its own: where the interpreter is on, nothing is compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# And how many kernels each compiles at least.
GROUPS = {
    "chunks": 30, "linear": 30, "attention": 15, "experts": 60, "positions": 2, "drafts": 8,
    "hybrids": 26, "sampler": 15, "attention_chunk": 20, "per_layer": 15, "ranks": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[dict[str, int], str]:
    """How many kernels of each group were compiled, up to one that cannot be, and why it cannot."""
    cache = str(tmp_path_factory.mktemp("cache"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    command = [sys.executable, str(SCRIPT), *GROUPS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    counts = (line.split() for line in done.stdout.splitlines())
    return {name: int(count) for name, count in counts}, done.stderr[-3000:]


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_compile(group, compiled):
    counts, errors = compiled
    assert counts.get(group, 0) >= GROUPS[group], errors
