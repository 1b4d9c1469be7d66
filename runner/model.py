"""The Python API: load an artifact once, generate many times."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from numbers import Integral
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from tokenloop.runner.chat_template import most_characters
from tokenloop.runner.draft_model import DraftModel
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.generation import BatchGeneration, Generation
from tokenloop.runner.grammar import Grammars
from tokenloop.runner.loop import Loop, LoopOptions
from tokenloop.runner.manifest import Artifact, open_artifact
from tokenloop.runner.prefix_cache import MB, PrefixCache
from tokenloop.runner.program import Program, selection_method
from tokenloop.runner.ranks import check_ranks
from tokenloop.runner.request import Prompt, Request, is_integer, is_number, shown
from tokenloop.runner.restriction import Restriction
from tokenloop.runner.result import Result
from tokenloop.runner.tokenizer import Tokenizer

# Sequences of small integers in Python's eyes, and no prompts.
BYTES = bytes, bytearray, memoryview
# Engines are loaded one at a time: meanwhile they change what is the whole process's, such as where
# native code writes its errors, and how many threads there are.
LOADING = Lock()


class Nobody:
    """A user of a model's Turn that has done all it wanted."""

    is_finished = True


def load_program(artifact: Artifact, threads: int | None = None) -> Program:
    """The artifact's methods in the engine that it was exported for. Errors: RunnerError for an
    engine whose packages are missing, for more or fewer ranks than the artifact is for, and for
    what the engine's own constructor refuses."""
    place = check_ranks(artifact.directory, artifact.manifest)
    engine, backend = artifact.manifest["engine"], artifact.manifest["backend"]
    # ExecuTorch on a CPU needs no torch, which takes a second to import, and 200 MB.
    if engine == "executorch" and backend != "cuda":
        from tokenloop.runner.engines.executorch import ExecuTorchProgram as Engine
    else:
        try:
            if engine == "executorch":
                from tokenloop.runner.engines.executorch_cuda import (
                    ExecuTorchCudaProgram as Engine,
                )
            elif engine == "inductor":
                from tokenloop.runner.engines.inductor import InductorProgram as Engine
            else:
                from tokenloop.runner.engines.launches import LaunchProgram as Engine
        except ImportError as error:
            needed = {
                "executorch": "torch and executorch",
                "inductor": "torch and safetensors",
                "launches": "torch for CUDA, cuda-bindings and safetensors",
            }
            raise RunnerError(
                f"{artifact.directory} needs {needed[engine]} ({error}): install them"
            ) from None
    return Engine(artifact, threads, place) if place.count > 1 else Engine(artifact, threads)


class Model:
    """A loaded artifact. `load_s` is the time that loading took; `vocab_size`, `max_seq_len`, and
    `batch`, how many sequences it can run at a time. `prefix_cache` has beginnings of prompts,
    which later ones need not compute; there is none before `keep_prefixes`."""

    prefix_cache: PrefixCache | None = None

    def __init__(
        self, directory: str | Path, threads: int | None = None, verify: bool | None = None
    ):
        """Load everything once. `threads` is how many compute, by default one for each processor
        that this process may use; the models of a process share them. The program and the weights
        are hashed if that was not done since they were last changed; with `verify` in any case, and
        with `verify` false never.

        Errors: RunnerError, one line saying what does not fit.
        """
        start = time.perf_counter()
        if threads is not None and (not is_integer(threads) or threads < 1):
            raise RunnerError(f"threads is {threads!r}; it must be an integer, at least 1")
        artifact = open_artifact(Path(directory), verify)
        manifest = artifact.manifest
        self.manifest = manifest
        self.vocab_size: int = manifest["vocab_size"]
        self.max_seq_len: int = manifest["max_seq_len"]
        self.batch: int = manifest["batch"]
        characters = most_characters(self.max_seq_len)
        entry = manifest["tokenizer"]
        self.tokenizer = Tokenizer(artifact.directory, entry, artifact.read, characters)
        with LOADING:
            self.loop = Loop(load_program(artifact, threads))
        self.grammars = Grammars(self.tokenizer, self.vocab_size)
        self.load_s = time.perf_counter() - start
        self._directory, self._threads, self._verify = artifact.directory, threads, verify

    def generate(
        self, prompt: Request | Prompt, max_new_tokens: int | None = None,
        options: LoopOptions | None = None, **parameters: Any,
    ) -> Generation:  # fmt: skip
        """Begin to generate after `prompt`: iterate over the result or `run` it.

        `prompt` is a Request, or the prompt of one; `max_new_tokens` and the other `parameters` are
        then those of a Request, such as temperature=0.8. The sequence begins anew: nothing of an
        earlier prompt is seen.

        One generation runs at a time. Starting another one in the same thread ends this one. In
        another thread it is refused, as is every call while a token is computed, until this one is
        finished, cancelled or dropped.

        Errors: RunnerError for a parameter outside its range or beside a Request, an artifact that
        cannot sample, a prompt that is empty, too long or has ids outside the vocabulary, and a
        model that another thread uses.
        """
        if max_new_tokens is not None:
            parameters["max_new_tokens"] = max_new_tokens
        if not isinstance(prompt, Request):
            prompt = Request(prompt, **parameters)
        elif parameters:
            raise RunnerError(
                f"a Request is given, and {', '.join(parameters)} beside it: the Request must say "
                "it all"
            )
        options = self.loop.variant(options)
        fitted = self.fit(prompt)
        prepare = partial(self.load_sampling, prompt, options)
        cache = self.prefix_cache
        return Generation(self.loop, prompt, self.tokenizer, *fitted, options, prepare, cache)

    def generate_batch(
        self, requests: Iterable[Request | Prompt], options: LoopOptions | None = None,
        rows: int | None = None,
    ) -> BatchGeneration:  # fmt: skip
        """Begin to generate for any number of requests, as many at a time as the artifact has rows:
        iterate over the result or `run` it. A prompt alone stands for a Request with defaults.

        A request is taken from `requests` when a row is free for it. One that cannot run is refused
        in its Result, and the others go on. Each gives what it gives alone. At most `rows` are
        used, by default all. It is one generation, of which one runs at a time: see `generate`.

        Errors: RunnerError for more `rows` than there are, requests that are no list or the like,
        and a model that another thread uses.
        """
        if isinstance(requests, (str, Request)):
            raise RunnerError("requests is a single one; it must be a list, or use generate")
        if not isinstance(requests, Iterable) or isinstance(requests, (*BYTES, Mapping)):
            raise RunnerError(f"requests is {shown(requests)}; it must be a list of them")
        if rows is None:
            rows = self.batch
        if not is_integer(rows) or rows < 1:
            raise RunnerError(f"rows is {rows!r}; it must be at least 1")
        if rows > self.batch:
            raise RunnerError(
                f"{rows} rows are asked for and {self._directory} has {self.batch}: export it with "
                f"--batch {rows}"
            )
        options = self.loop.variant(options)
        results = self._results(requests, options)
        return BatchGeneration(self.loop, results, rows, options, cache=self.prefix_cache)

    def keep_prefixes(self, megabytes: float) -> None:
        """Keep beginnings of prompts in so many megabytes (1e6 bytes) of the device's memory, or
        none with 0. What is kept by now is forgotten. No byte of an output depends on it.

        Errors: RunnerError for a number that is too small, and an artifact whose state cannot be
        kept.
        """
        self.prefix_cache = None
        self.prefix_cache = cache_of(self.loop.program, megabytes)

    def use_draft(self, directory: str | Path) -> None:
        """Load another artifact, for any engine, whose model drafts tokens for generations with
        LoopOptions(speculate="draft"). It takes the place of an earlier one. No byte of an output
        depends on it.

        Errors: RunnerError, naming what does not fit, for a model that cannot verify drafts, and
        for a draft model of another vocabulary, with fewer positions or of several rows, or whose
        state cannot be taken back.
        """
        program = self.loop.program
        if not program.verifies:
            raise RunnerError(
                f"{self._directory} has no rounds for another model's drafts: export it with "
                "--device cuda and --draft-tokens 7"
            )
        artifact = open_artifact(Path(directory), self._verify)
        manifest, name = artifact.manifest, artifact.directory
        for key, right in ("vocab_size", f"{self.vocab_size}"), ("batch", "1"):
            if manifest[key] != int(right):
                raise RunnerError(
                    f"the draft model {name} has {key} {manifest[key]}; it must be {right}"
                )
        if manifest["max_seq_len"] < self.max_seq_len:
            raise RunnerError(
                f"the draft model {name} has {manifest['max_seq_len']} positions, and this one "
                f"{self.max_seq_len}: export it with --max-seq-len {self.max_seq_len}"
            )
        tokenizer = Tokenizer(name, manifest["tokenizer"], artifact.read)
        for token_id in range(self.vocab_size):
            mine, other = (t.token_name(token_id) for t in (self.tokenizer, tokenizer))
            if mine != other:
                raise RunnerError(
                    f"the draft model {name} has another vocabulary: its token {token_id} is "
                    f"{other!r}, and here it is {mine!r}"
                )
        with LOADING:
            draft = load_program(artifact, self._threads)
        cost = program.draft_cost, program.round_s
        try:
            self.loop.draft = DraftModel(draft, program.draft_tokens, *cost)
        except RunnerError as error:
            raise RunnerError(f"the draft model {name}: {error}") from None

    def save(self, path: str | Path, prompt: Prompt) -> int:
        """Compute a prompt, and write its state to a file, which `load` reads in another process.
        Returns how many of its tokens a prompt that begins so need not compute: a whole number of
        the prefix cache's blocks.

        Errors: RunnerError for a prompt of less than a block, an artifact whose state cannot be
        kept, and a file that cannot be written; and as of `generate`.
        """
        from tokenloop.runner.saved_state import write_state

        request = Request(prompt, 1)
        ids, *fitted = self.fit(request)
        cache = PrefixCache.for_one(self.loop.program, len(ids))
        keys, options = cache.keys(ids), self.loop.variant(None)
        # It has no more use for the program once it is computed.
        Generation(
            self.loop, request, self.tokenizer, ids, *fitted, options, lambda: None, cache
        ).run()  # fmt: skip
        count, copies = cache.copies(keys)
        write_state(Path(path), self.manifest, ids[:count], copies)
        return count

    def load(self, path: str | Path) -> int:
        """Read a file of `save` into the prefix cache, as if its prompt had just been computed.
        Returns how many tokens a prompt that begins so need not compute. It has its turn as a
        generation has.

        Errors: RunnerError without a prefix cache or without room in it, for a file that is
        damaged, of another artifact, or of another kind of processor; and as of `generate`.
        """
        from tokenloop.runner.saved_state import read_state

        if self.prefix_cache is None:
            raise RunnerError("there is no prefix cache to load into: call keep_prefixes before")
        cache = self.prefix_cache
        ids, copies = read_state(Path(path), self.manifest)
        self.loop.turn.begin(Nobody(), lambda: cache.add(cache.keys(ids), copies))
        return len(ids)

    def embed(self, prompts: Iterable[Prompt]) -> np.ndarray:
        """Each prompt's pooled output, float32 [N, P] of N prompts: the last token's hidden state,
        divided by its length. It is what an embedding model makes of a text, and their products are
        similarities. It has its turn as a generation has.

        Errors: RunnerError for an artifact that has none, and prompts that are no list or the like;
        and as of `generate` for a prompt.
        """
        if "pooled_size" not in self.manifest:
            raise RunnerError(f"{self._directory} has no pooled output: export it with --pooled")
        if isinstance(prompts, (str, *BYTES, Mapping)) or not isinstance(prompts, Iterable):
            raise RunnerError(f"prompts is {shown(prompts)}; it must be a list of them")
        all_ids = [self.fit(Request(prompt, 1))[0] for prompt in prompts]
        pooled = np.empty((len(all_ids), self.manifest["pooled_size"]), np.float32)

        def compute() -> None:
            for row, ids in enumerate(all_ids):
                pooled[row] = self._pooled(ids)

        self.loop.turn.begin(Nobody(), compute)
        return pooled

    def _pooled(self, ids: list[int]) -> np.ndarray:
        program, most = self.loop.program, self.manifest["max_prefill"]
        for first in range(0, len(ids), most):
            chunk = ids[first : first + most]
            run = program.pool if first + most >= len(ids) else program.prefill
            upload = program.transfers.upload
            out = run(upload([chunk]), upload(list(range(first, first + len(chunk)))))
        return out[0]

    def _results(
        self, requests: Iterable[Request | Prompt], options: LoopOptions
    ) -> Iterator[Result]:
        """A Result to be for each request, in their order; of one that cannot run, refused."""
        for index, request in enumerate(requests):
            if not isinstance(request, Request):
                request = Request(request)
            try:
                result = Result(request, self.tokenizer, *self.fit(request), index=index)
                self.load_sampling(request, options)
            except RunnerError as error:
                result = Result(request, self.tokenizer, [], 0, index=index)
                result.refuse(f"request {index + 1}: {error}")
            yield result

    def fit(self, request: Request) -> tuple[list[int], int, Restriction | None]:
        """The request's prompt as ids, how many tokens can come after it, and what restricts them.
        The program is not touched. Errors: RunnerError for what `generate` refuses."""
        request.check()
        if request.logprobs is not None and not self.loop.program.has_logits:
            raise RunnerError(
                f"logprobs is {request.logprobs}; an artifact of {self.manifest['engine']} for "
                f"{self.manifest['device']} gives no log probabilities: it must be None"
            )
        if request.prompt_logprobs and self.loop.program.packing is not None:
            raise RunnerError(
                "prompt_logprobs is True; an artifact for a GPU prefills no prompt by tokens: it "
                "must be False"
            )
        ids = self._prompt_ids(request)
        if len(ids) == 0:
            raise RunnerError("the prompt is empty, and no bos is put before it: give some text")
        if len(ids) >= self.max_seq_len:
            raise RunnerError(
                f"the prompt has {len(ids)} tokens and the cache {self.max_seq_len} positions, one "
                "of which is for the output: shorten it, or export with a larger --max-seq-len"
            )
        ids = checked_ids(ids, self.vocab_size)
        limit = min(request.max_new_tokens, self.max_seq_len - len(ids))
        return ids, limit, self._restriction(request, ids)

    def _restriction(self, request: Request, prompt_ids: list[int]) -> Restriction | None:
        for names, method in (request.masks, "mask"), (request.adjusts, "adjust"):
            if names and f"{method}_row" not in self.manifest["methods"]:
                raise RunnerError(
                    f"{names[0]} is given; {self._directory} has no method {method}_row: export it "
                    "again"
                )
        beyond = [i for i in request.logit_bias or () if i >= self.vocab_size]
        if beyond:
            raise RunnerError(
                f"logit_bias has the token id {beyond[0]}; ids are 0 to {self.vocab_size - 1}"
            )
        if not request.masks and not request.adjusts:
            return None
        return Restriction(request, prompt_ids, self.grammars.matcher(request))

    def load_sampling(self, request: Request, options: LoopOptions) -> None:
        """Load what the request needs besides greedy choice. Errors: RunnerError for an artifact
        that cannot sample."""
        if request.temperature > 0:
            method = selection_method([request], self.manifest)
            with LOADING:
                self.loop.program.load_sampling(method, options.feed == "embed")
        for names, method in (request.masks, "mask"), (request.adjusts, "adjust"):
            if names:
                with LOADING:
                    self.loop.program.load_change(method)

    def _prompt_ids(self, request: Request) -> Sequence | np.ndarray:
        """The prompt as what should be ids."""
        conversation = request.conversation()
        if conversation is not None:
            return self.tokenizer.encode_conversation(conversation)
        prompt = request.prompt
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        if isinstance(prompt, np.ndarray):
            if prompt.ndim != 1 or prompt.dtype.kind not in "iu":
                raise RunnerError(
                    f"the prompt is an array of {prompt.dtype} with the shape {prompt.shape}; "
                    "it must be text or a list of ids"
                )
        elif not isinstance(prompt, Sequence) or isinstance(prompt, BYTES):
            raise RunnerError(f"the prompt is {shown(prompt)}; it must be text or a list of ids")
        return prompt


def cache_of(program: Program, megabytes: float) -> PrefixCache | None:
    """A prefix cache of so many megabytes, None for 0. Errors: RunnerError as of keep_prefixes."""
    if not is_number(megabytes) or megabytes < 0:
        raise RunnerError(f"prefix_cache_mb is {megabytes!r}; it must be at least 0")
    return PrefixCache(program, int(megabytes * MB)) if megabytes else None


def checked_ids(ids: Sequence | np.ndarray, vocab_size: int) -> list[int]:
    """The ids, at least one, as Python's own integers. NumPy looks at thousands in the time that a
    loop takes for a few. Errors: RunnerError for one that is no integer or not of the vocabulary.
    """
    ids = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    if (kinds := set(map(type, ids))) != {int}:
        if strange := {kind for kind in kinds if not issubclass(kind, Integral) or kind is bool}:
            wrong = next(i for i in ids if type(i) in strange)
            raise RunnerError(
                f"the prompt has the id {shown(wrong)}; ids are integers, 0 to {vocab_size - 1}"
            )
        ids = list(map(int, ids))
    try:
        # A negative number is a large one without its sign.
        largest = np.fromiter(ids, np.int64, len(ids)).view(np.uint64).max()
    except OverflowError:  # more than 64 bits
        largest = vocab_size
    if largest >= vocab_size:
        wrong = next(i for i in ids if not 0 <= i < vocab_size)
        raise RunnerError(f"the prompt has the id {wrong}; ids are 0 to {vocab_size - 1}")
    return ids
