"""Every Triton kernel compiles for a Hopper GPU, in its operators' tiles; what Triton's interpreter
runs need not. In processes of their own: where the interpreter is on, nothing is compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# And how many kernels each compiles at least.
GROUPS = {
    "chunks": 30, "linear": 30, "attention": 11, "experts": 30, "positions": 2, "ranks": 2,
    "hybrids": 26, "sampler": 15, "attention_chunk": 20,
}  # fmt: skip


@pytest.mark.parametrize("group", GROUPS)
def test_kernels_compile(group, tmp_path):
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(SCRIPT), group]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) >= GROUPS[group]
