"""Damaged artifacts are refused in one line, or run as the whole one: a slice of what
tests/mutate_artifacts.py does, and that it sees the faults that it counts."""

import json
import os
import signal
import subprocess
import sys

import pytest

from tests import mutate_artifacts
from tests.mutate_artifacts import FAULTS, ROOT, Run, Watch, fault_of, run_forked
from tests.toy_artifact import make_toy_artifact

LINE = "tokenloop run: error: copy/model.pte is damaged: export it again\n"
ENTRY = {"prompt_ids": [1], "token_ids": [2], "text": "b"}
OUTPUT, IDS = json.dumps(ENTRY) + "\n", list(ENTRY.values())


def test_a_hundred_damaged_artifacts_end_well(once):
    artifact = once("toy", make_toy_artifact)
    command = [sys.executable, "-m", "tests.mutate_artifacts", "--artifact", artifact]
    done = subprocess.run(
        [*command, "--count", "100", "--seed", "1"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == dict.fromkeys(FAULTS, 0)
    assert found["refused"] > 60 and found["refused"] + found["ran"] == 100


@pytest.mark.parametrize(
    "run, fault",
    [
        (Run(0, OUTPUT, "", 1.0), None),
        (Run(2, "", LINE, 1.0), None),
        (Run(0, OUTPUT.replace("2", "3"), "", 1.0), "wrong ids"),
        (Run(0, "", "", 1.0), "wrong ids"),
        (Run(2, OUTPUT, LINE, 1.0), "traceback"),
        (Run(2, "", LINE * 2, 1.0), "traceback"),
        (Run(1, "", LINE, 1.0), "traceback"),
        (Run(1, "", "Traceback (most recent call last):\n", 1.0), "traceback"),
        (Run(-signal.SIGSEGV, "", LINE, 1.0), "signal"),
        (Run(None, OUTPUT, "", 1.0), "hang"),
        (Run(2, "", LINE, 50.1), "memory"),
        (Run(0, OUTPUT, "", 50.1), "memory"),
    ],
)
def test_each_fault_is_seen(run, fault):
    assert fault_of(run, IDS, 50) == fault
    assert fault_of(run, None, 50) == (None if run.output == OUTPUT.replace("2", "3") else fault)


def test_how_a_process_ends_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(mutate_artifacts, "LIMIT_S", 1)
    assert run_forked(lambda: os.kill(os.getpid(), signal.SIGKILL), tmp_path).status == -9
    assert run_forked(lambda: signal.pause(), tmp_path).status is None
    failed = run_forked(lambda: 1 // 0, tmp_path)
    assert failed.status == 1 and "ZeroDivisionError" in failed.errors
    ended = run_forked(lambda: print("out") or 0, tmp_path)
    assert (ended.status, ended.output, ended.errors) == (0, "out\n", "")


def test_whatever_is_read_in_a_directory_is_seen(tmp_path):
    (tmp_path / "file").write_text("x")
    watch = Watch(tmp_path)
    assert not watch.seen()
    subprocess.run(["cat", tmp_path / "file"], check=True, capture_output=True)
    assert watch.seen() and not watch.seen()
    (tmp_path / "file").stat()
    assert not watch.seen()
    watch.close()
