"""A slice of the mutated checkpoints of tests/mutate_checkpoints.py is read or refused."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.mutate_checkpoints import SLACK, Mutant, finish


def test_mutants_are_read_or_refused_in_one_line():
    command = [sys.executable, "-m", "tests.mutate_checkpoints"]
    arguments = ["--count", "150", "--seed", "7", "--workers", "1"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["mutants"] == 150 and summary["faults"] == {}
    assert set(summary["outcomes"]) == {"read", "refused"}


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
