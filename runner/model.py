"""The Python API: load an artifact once, generate many times."""

import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from runner.artifact import open_artifact
from runner.errors import RunnerError
from runner.executorch_program import ExecuTorchProgram
from runner.loop import Loop, LoopOptions
from runner.tokenizer import Tokenizer
from runner.transfers import Transfers


@dataclass(frozen=True)
class Token:
    """One generated token: its id, and the text that became certain with it (maybe none)."""

    id: int
    text: str


@dataclass(frozen=True)
class Stats:
    """Of one generation; times in seconds, rates in tokens per second, memory in megabytes (1e6).

    `prefill_tok_s` is up to the first token, computed; `decode_tok_s` is of the tokens after it;
    `time_to_first_token_s` also has the wait until the host has read it. `transfers` are the copies
    made for this generation alone.
    """

    prompt_tokens: int
    new_tokens: int
    time_to_first_token_s: float
    prefill_tok_s: float
    decode_tok_s: float | None
    peak_rss_mb: float
    transfers: dict[str, dict[str, int]]


class Model:
    """A loaded artifact. `load_s` is the time that loading took; `vocab_size`, `max_seq_len`."""

    def __init__(self, directory: str | Path, threads: int | None = None):
        """Load everything once. `threads` is how many compute, by default one for each processor
        that this process may use; the models of a process share them.

        Errors: RunnerError, one line saying what does not fit.
        """
        start = time.perf_counter()
        artifact = open_artifact(Path(directory))
        manifest = artifact.manifest
        if manifest["engine"] != "executorch":
            raise RunnerError(
                f"{artifact.directory} is for the engine {manifest['engine']!r}, which this "
                "tokenloop does not have: executorch is what it has"
            )
        if manifest["batch"] != 1:
            raise RunnerError(
                f"{artifact.directory} has a batch of {manifest['batch']}; this tokenloop runs 1"
            )
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.max_seq_len: int = manifest["max_seq_len"]
        self.tokenizer = Tokenizer(artifact.directory, manifest["tokenizer"])
        program = ExecuTorchProgram(artifact, threads)
        self.loop = Loop(program, self.max_seq_len, manifest["max_prefill"])
        self.load_s = time.perf_counter() - start
        self._latest: Generation | None = None

    def generate(
        self,
        prompt: str | list[int],
        max_new_tokens: int = 128,
        chat: bool = False,
        options: LoopOptions | None = None,
    ) -> "Generation":
        """Begin to generate after `prompt`, text or token ids: iterate over the result or `run` it.

        With `chat` the text is a user's message, put through the artifact's chat template. Output
        ends at an end token, after `max_new_tokens`, or when prompt and output fill max_seq_len.
        The sequence begins anew: nothing of an earlier prompt is seen. Starting another generation
        ends this one.

        Errors: RunnerError for a prompt that is empty, too long or has ids outside the vocabulary.
        """
        if max_new_tokens < 1:
            raise RunnerError(f"max_new_tokens is {max_new_tokens}; it must be at least 1")
        if isinstance(prompt, str):
            if chat:
                prompt = self.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
            ids = self.tokenizer.encode(prompt)
        else:
            ids = list(prompt)
        if not ids:
            raise RunnerError("the prompt is empty and this model has no bos token: give some text")
        if len(ids) >= self.max_seq_len:
            raise RunnerError(
                f"the prompt has {len(ids)} tokens and the cache {self.max_seq_len} positions, one "
                "of which is for the output: shorten it, or export with a larger --max-seq-len"
            )
        for token_id in ids:
            if not 0 <= token_id < self.vocab_size:
                raise RunnerError(
                    f"the prompt has the id {token_id}; ids are 0 to {self.vocab_size - 1}"
                )
        limit = min(max_new_tokens, self.max_seq_len - len(ids))
        self._latest = Generation(self, ids, limit, options or LoopOptions())
        return self._latest


class Generation:
    """The tokens of one prompt as they come; afterwards `text`, `token_ids`, `stats`.

    `finish_reason` is "stop" after an end token (which is not among the ids), "length", or None
    while it is not finished.
    """

    def __init__(self, model: Model, prompt_ids: list[int], limit: int, options: LoopOptions):
        self.prompt_ids = prompt_ids
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: str | None = None
        self._model, self._limit, self._options = model, limit, options
        self._transfers: Transfers | None = None
        self._start = self._prefilled = self._first = self._last = 0.0
        self._tokens = self._run()

    def __iter__(self) -> Iterator[Token]:
        return self._tokens

    def run(self) -> "Generation":
        """Generate to the end, and return this object."""
        for _ in self._tokens:
            pass
        return self

    def _run(self) -> Iterator[Token]:
        loop, tokenizer = self._model.loop, self._model.tokenizer
        self._check_latest()
        before = loop.transfers.snapshot()
        stream = tokenizer.stream()
        self._start = time.perf_counter()
        for token_id in loop.tokens(self.prompt_ids, self._limit, self._options):
            self._last = time.perf_counter()
            if not self._first:
                self._first, self._prefilled = self._last, loop.prefilled_at
            self._transfers = loop.transfers.since(before)
            if token_id in tokenizer.eos_token_ids:
                self.finish_reason = "stop"
                break
            self.token_ids.append(token_id)
            if len(self.token_ids) == self._limit:
                break
            yield self._token(token_id, stream.push(token_id))
            self._check_latest()
        # The last token takes with it what was held back of an unfinished character.
        self.finish_reason = self.finish_reason or "length"
        if self.finish_reason == "length":
            yield self._token(token_id, stream.push(token_id) + stream.finish())
        elif rest := stream.finish():
            yield self._token(token_id, rest)

    def _check_latest(self) -> None:
        """The first step, too, would overwrite the state of the generation that is running."""
        if self._model._latest is not self:
            raise RunnerError(
                "another generation was started on this model, and its state is shared: "
                "finish one before you start the next"
            )

    def _token(self, token_id: int, text: str) -> Token:
        self.text += text
        return Token(token_id, text)

    @property
    def stats(self) -> Stats:
        """Speed and copies so far."""
        if self._transfers is None:
            raise RunnerError("nothing has been generated yet: iterate over the generation first")
        prefill, decode = self._prefilled - self._start, self._last - self._prefilled
        count = len(self.token_ids) + (self.finish_reason == "stop")
        return Stats(
            prompt_tokens=len(self.prompt_ids),
            new_tokens=len(self.token_ids),
            time_to_first_token_s=self._first - self._start,
            prefill_tok_s=len(self.prompt_ids) / prefill,
            decode_tok_s=(count - 1) / decode if count > 1 else None,
            peak_rss_mb=peak_rss_mb(),
            transfers=self._transfers.as_dict(),
        )

    def as_dict(self, prompt: str) -> dict:
        """What `run.py --json` prints of this generation."""
        return {
            "prompt": prompt,
            "prompt_ids": self.prompt_ids,
            "token_ids": self.token_ids,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "stats": asdict(self.stats) if self._transfers else None,
        }


def peak_rss_mb() -> float:
    """The process's largest resident size so far, in megabytes (1e6 bytes)."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss, which on Linux begins with the parent's.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024 / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Kibibytes, but bytes on macOS.
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6
