"""A chat template, which is a program of whoever published the checkpoint.

It runs in a process of its own (template_process.py), for nothing else bounds everything that it
can do: a multiplication, a format or a filter of one line can take all time and memory there is.
The process is started at the first conversation and kept for the next ones. Starting it takes
about 20 ms more than importing jinja2 here would.
"""

import json
import signal
import sys
import threading
import weakref
from contextlib import suppress
from os import getpid
from pathlib import Path
from typing import TYPE_CHECKING

from tokenloop.runner.errors import RunnerError

if TYPE_CHECKING:
    import subprocess

# What a conversation may take. A context of a million tokens is about 4 million characters, which
# published templates render in a tenth of a second.
PROCESSOR_SECONDS = 2
SECONDS = 15
MEMORY = 512 << 20
CHARACTERS = 8_000_000
# A text with more characters for each position of a context does not fit it. Tokenizers take some
# 200 bytes of memory for a character.
CHARACTERS_OF_A_POSITION, SHORTEST_LIMIT = 1_000, 100_000
# json.dumps writes a character in up to 12.
LONGEST_ANSWER = 12 * CHARACTERS + 100
# A template may give its own reason.
LONGEST_REASON = 500
REMEDY = "mend the template or the messages, or run without --chat"


def most_characters(positions: int) -> int:
    """How many characters a conversation's text may have for a context of so many positions."""
    return min(CHARACTERS, max(SHORTEST_LIMIT, CHARACTERS_OF_A_POSITION * positions))


class ChatTemplate:
    """A jinja2 template in the environment that transformers gives it, sandboxed and limited. Any
    thread may use it: conversations are rendered one at a time."""

    def __init__(self, path: Path, source: bytes, characters: int = CHARACTERS):
        """`path` is what errors name, and `characters` how many a text may have. Errors:
        RunnerError if `source` is not UTF-8."""
        self._path, self._characters = path, characters
        try:
            self.source = source.decode()
        except UnicodeDecodeError as error:
            raise self._refusal(str(error)) from None
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._owner = 0

    def render(self, context: dict) -> str:
        """The text for the names and values of `context`.

        Errors: RunnerError if the template is broken, refuses the conversation, or takes more than
        it may, or if a value is no JSON.
        """
        try:
            line = json.dumps(context).encode() + b"\n"
        except (TypeError, ValueError, RecursionError) as error:
            raise self._refusal(f"the messages are no JSON ({error})") from None
        return self._answer(line)

    def check(self) -> None:
        """Errors: RunnerError if `source` is no template."""
        self._answer(b"null\n", "it must be a jinja2 template")

    def _answer(self, line: bytes, right: str = REMEDY) -> str:
        with self._lock:
            answer = self._ask(line)
        if "error" in answer:
            raise self._refusal(answer["error"], right)
        return answer["text"]

    def _ask(self, line: bytes) -> dict:
        # A process that was forked from the one that started it must not read its answers.
        if self._process is None or self._owner != getpid():
            self._start()
        process, answer = self._process, b""
        timer = threading.Timer(SECONDS, process.kill)
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            answer = process.stdout.readline(LONGEST_ANSWER)
        # It has ended, as the empty answer says.
        except BrokenPipeError:
            answer = b""
        finally:
            timer.cancel()
            if not answer.endswith(b"\n"):
                self._process = None
                self._finish()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        if process.returncode == -signal.SIGPROF:
            return {"error": f"it takes more than {PROCESSOR_SECONDS} s of a processor"}
        if process.returncode == -signal.SIGKILL:
            return {"error": f"it takes more than {SECONDS} s"}
        return {"error": f"its process ended with status {process.returncode}"}

    def _start(self) -> None:
        # Most runs have no conversation, and the import takes 10 ms.
        import subprocess

        setup = {
            "path": sys.path, "source": self.source, "seconds": PROCESSOR_SECONDS,
            "memory": MEMORY, "characters": self._characters,
        }  # fmt: skip
        # -S: the modules' directories are those of this process, which are found already.
        script = Path(__file__).with_name("template_process.py")
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", script], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise self._refusal(f"no process to render it ({error.strerror})") from error
        self._owner = getpid()
        self._finish = weakref.finalize(self, _end, self._process)
        # Asking it finds whether it has ended.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(setup).encode() + b"\n")

    def _refusal(self, reason: str, right: str = REMEDY) -> RunnerError:
        reason = " ".join(reason[:LONGEST_REASON].split()).rstrip(".")
        return RunnerError(f"{self._path}: {reason}: {right}")


def _end(process: "subprocess.Popen") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        # What it was not there to read.
        with suppress(BrokenPipeError):
            pipe.close()
