"""Processes that an export starts."""

import os
import signal
import subprocess
import sys

import pytest

from tokenloop.export.background import Background
from tokenloop.export.checkpoint import read_json
from tokenloop.export.errors import ExportError

# The first process that is started has multiprocessing start one of its own before it.
START = """
import signal, sys
from multiprocessing import get_context
from tokenloop.export.background import interrupts_for_this_process
signal.signal(signal.SIGINT, signal.default_int_handler)
process = get_context("spawn").Process(target=signal.raise_signal, args=(signal.SIGINT,))
with interrupts_for_this_process():
    process.start()
process.join()
print(process.exitcode, flush=True)
try:
    with interrupts_for_this_process():
        signal.raise_signal(signal.SIGINT)
        print("later", flush=True)
except KeyboardInterrupt:
    print("heard", flush=True)
"""


def test_an_interrupt_is_for_the_process_that_the_user_sees():
    done = subprocess.run([sys.executable, "-c", START], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == ["0", "later", "heard"]


def test_what_another_process_refuses_is_refused_here(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENLOOP_CACHE", raising=False)
    (tmp_path / "x.json").write_text("[")
    begun = Background("a file", read_json, tmp_path / "x.json")
    with pytest.raises(ExportError, match="x.json is not valid JSON"):
        begun.result()


def test_what_the_system_refuses_another_process_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("TOKENLOOP_CACHE", raising=False)
    begun = Background("a directory", os.listdir, tmp_path / "nowhere")
    with pytest.raises(ExportError, match="nowhere: No such file or directory$"):
        begun.result()


def variable(name: str) -> dict[str, bytes]:
    return {"value": os.environ.get(name, "none").encode()}


@pytest.mark.parametrize("mode", [0o700, 0o777], ids=["own", "everybody's"])
def test_no_part_is_kept_where_the_whole_is_not(tmp_path, monkeypatch, capsys, mode):
    directory = tmp_path / "cache"
    directory.mkdir()
    directory.chmod(mode)
    monkeypatch.setenv("TOKENLOOP_CACHE", str(directory))
    used = mode == 0o700
    expected = str(directory) if used else "none"
    begun = Background("a variable", variable, "TOKENLOOP_CACHE")
    assert begun.result() == {"value": expected.encode()}
    assert capsys.readouterr().err.count("it is not used") == (0 if used else 1)


def test_what_ends_another_process_is_one_line(monkeypatch):
    """The system kills the largest process where memory is short."""
    monkeypatch.delenv("TOKENLOOP_CACHE", raising=False)
    begun = Background("a signal", signal.raise_signal, signal.SIGKILL)
    expected = "a signal could not be exported, for its process was ended by SIGKILL: free some"
    with pytest.raises(ExportError, match=expected):
        begun.result()
