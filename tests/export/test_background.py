"""Processes that an export starts."""

import subprocess
import sys

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
