"""A slice of the mutated checkpoints of tests/mutate_checkpoints.py is read or refused."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from safetensors.torch import save_file

from tests.conftest import ROOT
from tests.mutate_checkpoints import SLACK, Mutant, finish, virtual_memory
from tests.tiny_checkpoints import config_of, random_weights
from tokenloop.export.checkpoint import check_fit, open_checkpoint
from tokenloop.export.checkpoint.network import describe, without_memory
from tokenloop.export.errors import ExportError


def test_mutants_are_read_or_refused_in_one_line():
    command = [sys.executable, "-m", "tests.mutate_checkpoints"]
    arguments = ["--count", "80", "--seed", "7", "--workers", "1"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["mutants"] == 80 and summary["faults"] == {}
    assert set(summary["outcomes"]) == {"read", "refused"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1024}, r"has \d+ tensors, too few for num_hidden_layers = 1024$"),
        ({"num_hidden_layers": 3}, "has no tensor for the parameter model.layers.2"),
        ({"head_dim": 65_536}, r"k_norm.weight has the shape \(32,\), .* needs \(65536,\)$"),
        ({"vocab_size": 1 << 24}, "embed_tokens.weight has the shape .* needs \\(16777216, 64\\)$"),
    ],
)
def test_sizes_that_the_tensors_do_not_bear_out_take_neither_time_nor_memory(
    tmp_path, changes, message
):
    config = config_of("gemma3_text") | {"layer_types": None}
    tensors = {name: tensor.half() for name, tensor in random_weights(config).items()}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    checkpoint = open_checkpoint(tmp_path)
    start, memory = time.perf_counter(), virtual_memory("VmPeak")
    with pytest.raises(ExportError, match=message):
        described = describe(checkpoint, ("gemma3",), "tokenloop export")
        check_fit(without_memory(described), checkpoint, described.architecture.checkpoint_name)
    assert time.perf_counter() - start < 2.0
    assert virtual_memory("VmPeak") - memory < 32 << 20


@pytest.mark.parametrize(
    ("status", "changes", "fault"),
    [
        (0, {}, None),
        (0, {"outcome": "read"}, "accepted"),
        (0, {"outcome": "traceback"}, "traceback"),
        (0, {"message": "two\nlines"}, "more than a line"),
        (0, {"message": "long" * 1000}, "more than a line"),
        (0, {"stderr": "thread panicked"}, "stderr"),
        (0, {"allocated": 2 * 100 + 30 + SLACK + 1}, "memory"),
        (0, None, "traceback"),
        (signal.SIGALRM, None, "hang"),
        (signal.SIGSEGV, None, "signal 11"),
    ],
)
def test_what_must_not_happen_is_counted(tmp_path, status, changes, fault):
    said = {"outcome": "refused", "message": "x", "stderr": "", "allocated": 5, "size": 100}
    read, write = os.pipe()
    if changes is not None:
        os.write(write, json.dumps(said | changes).encode())
    os.close(write)
    mutant = Mutant("0: overlap of a.gguf", "overlap", tmp_path / "gone", read)
    assert finish(mutant, status, plain=30)["fault"] == fault
