"""One engine in a process of its own: `python -m benchmarks.worker TASK SPEC`, SPEC as JSON.

Runs in each engine's own interpreter, so it knows the standard library and, once it is asked for,
that engine. An engine has `load_s` (libraries imported; until it could prefill), `context`,
`weights_mb` read for each token where it can tell, `tokens(ids, limit)` (greedy), `logits(window)`:
blocks float32 [<= BLOCK, V] for every position of a window, and some `rows(prompts, limit)`: the
tokens of all prompts at once, step by step.
"""

import itertools
import json
import logging
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

BLOCK = 64  # positions whose logits are handed over at once
BATCH = 512  # llama.cpp's own default for n_ubatch
PREFILL_REPEATS = 3
DECODE_STEPS = 128
STEPS_AT_CONTEXT = 32


class TokenLoop:
    def __init__(self, spec: dict):
        import numpy

        from tokenloop.runner.model import Model

        self.numpy, self.weights_mb = numpy, None
        start = time.perf_counter()
        self.model = Model(spec["path"])
        self.load_s = time.perf_counter() - start
        self.context = self.model.max_seq_len

    def tokens(self, ids: list[int], limit: int) -> Iterator[int]:
        for token in self.model.generate(ids, limit):
            yield token.id

    def rows(self, prompts: list[list[int]], limit: int) -> Iterator[int]:
        from tokenloop.runner.request import Request

        requests = [Request(ids, max_new_tokens=limit) for ids in prompts]
        for _, token in self.model.generate_batch(requests):
            yield token.id

    def logits(self, window: list[int]) -> Iterator:
        program = self.model.loop.program
        program.begin(embed=False)
        tokens = self.numpy.array([window], self.numpy.int64)
        positions = self.numpy.arange(len(window), dtype=self.numpy.int64)
        for start in range(0, len(window), BLOCK):
            shape = (min(BLOCK, len(window) - start), self.model.vocab_size)
            block = self.numpy.empty(shape, self.numpy.float32)
            for row, n in zip(block, range(start, len(window))):
                call = program.decode if n else program.prefill
                row[:] = call(tokens[:, n : n + 1], positions[n : n + 1])[0]
            yield block


class LlamaCpp:
    """llama.cpp through its C API, with its own defaults but for threads and context."""

    def __init__(self, spec: dict):
        import llama_cpp
        import numpy

        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        self.llama, self.numpy = llama_cpp, numpy
        start = time.perf_counter()
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            spec["path"].encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {spec['path']}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.context = spec["context"]
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = spec["threads"]
        params.n_seq_max = spec.get("rows", 1)
        self.state = llama_cpp.llama_init_from_model(self.model, params)
        self.load_s = time.perf_counter() - start
        self.weights_mb = llama_cpp.llama_model_size(self.model) / 1e6
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(vocabulary)

    def _decode(self, batch) -> None:
        if status := self.llama.llama_decode(self.state, batch):
            raise ValueError(f"llama_decode gave {status}")

    def _clear(self) -> None:
        self.llama.llama_memory_clear(self.llama.llama_get_memory(self.state), False)

    def _next(self, ids: list[int]) -> int:
        """Evaluate `ids`, of which only the last one's logits are computed, and choose."""
        for start in range(0, len(ids), BATCH):
            chunk = ids[start : start + BATCH]
            array = (self.llama.llama_token * len(chunk))(*chunk)
            self._decode(self.llama.llama_batch_get_one(array, len(chunk)))
        return self._best(-1)

    def _best(self, i: int) -> int:
        logits = self.llama.llama_get_logits_ith(self.state, i)
        return int(self.numpy.ctypeslib.as_array(logits, shape=(self.vocab_size,)).argmax())

    def tokens(self, ids: list[int], limit: int) -> Iterator[int]:
        self._clear()
        token = self._next(ids)
        yield token
        for _ in range(limit - 1):
            token = self._next([token])
            yield token

    def rows(self, prompts: list[list[int]], limit: int) -> Iterator[int]:
        self._clear()
        batch = self.llama.llama_batch_init(BATCH, 0, 1)

        def evaluate(tokens: list[tuple[int, int, int]]) -> list[int]:
            """The next token of each row after tokens (row, position, id), of which a row's last
            one comes last."""
            batch.n_tokens = len(tokens)
            last = {row: i for i, (row, _, _) in enumerate(tokens)}
            for i, (row, position, token) in enumerate(tokens):
                batch.token[i], batch.pos[i] = token, position
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, row
                batch.logits[i] = last[row] == i
            self._decode(batch)
            return [self._best(i) for i in last.values()]

        new = [
            evaluate([(row, i, token) for i, token in enumerate(ids)])[0]
            for row, ids in enumerate(prompts)
        ]
        yield from new
        for n in range(limit - 1):
            new = evaluate([(row, len(prompts[row]) + n, token) for row, token in enumerate(new)])
            yield from new
        self.llama.llama_batch_free(batch)

    def logits(self, window: list[int]) -> Iterator:
        self._clear()
        batch = self.llama.llama_batch_init(BLOCK, 0, 1)
        for start in range(0, len(window), BLOCK):
            block = window[start : start + BLOCK]
            batch.n_tokens = len(block)
            for i, token in enumerate(block):
                batch.token[i], batch.pos[i], batch.logits[i] = token, start + i, 1
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            self._decode(batch)
            shape = (len(block), self.vocab_size)
            yield self.numpy.ctypeslib.as_array(self.llama.llama_get_logits(self.state), shape)
        self.llama.llama_batch_free(batch)


class Transformers:
    """transformers' own model and its growing cache, driven by the plainest loop."""

    def __init__(self, spec: dict):
        import torch
        import transformers

        self.torch, self.transformers = torch, transformers
        transformers.logging.disable_progress_bar()
        start = time.perf_counter()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(spec["path"]).eval()
        self.load_s = time.perf_counter() - start
        self.context = self.model.config.max_position_embeddings
        self.weights_mb = sum(p.nbytes for p in self.model.parameters()) / 1e6

    def tokens(self, ids: list[int], limit: int) -> Iterator[int]:
        cache = self.transformers.DynamicCache(config=self.model.config)
        token = self.torch.tensor([ids])
        for _ in range(limit):
            # Not around the yield, where the mode would leak into the caller.
            with self.torch.inference_mode():
                logits = self.model(token, past_key_values=cache, logits_to_keep=1).logits
                token = logits[:, -1].argmax(-1, keepdim=True)
            yield token.item()


ENGINES = {"tokenloop": TokenLoop, "llama_cpp": LlamaCpp, "transformers": Transformers}


def start(spec: dict) -> None:
    """The first token from a process that has just begun: print it as soon as it is there."""
    engine = ENGINES[spec["engine"]](spec)
    print(next(engine.tokens(spec["ids"], 1)), flush=True)


def generate(spec: dict) -> dict:
    """So many tokens after the ids, and nothing else: what a process needs for it."""
    engine = ENGINES[spec["engine"]](spec)
    return {"tokens": len(list(engine.tokens(spec["ids"], spec["limit"])))}


def speed(spec: dict) -> dict:
    """Prefill, first token and decode of the ids in `spec`; None for what does not fit."""
    engine, ids = ENGINES[spec["engine"]](spec), spec["ids"]
    for _ in engine.tokens(ids[:128], 8):  # caches and arenas are touched before any timing
        pass

    def prefill_tok_s(length: int) -> float | None:
        if not fits(length, 1):
            return None
        seconds = [token_times(length, 1)[0] for _ in range(PREFILL_REPEATS)]
        return length / statistics.median(seconds)

    def decode_s(length: int, steps: int) -> tuple[float | None, float | None]:
        """Seconds to the first token, and for each step after it."""
        # The loop may be a step ahead of what it has shown, except with the last token: that one
        # is asked for but not timed.
        if not fits(length, steps + 2):
            return None, None
        times = token_times(length, steps + 2)[: steps + 1]
        return times[0], (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None

    def fits(length: int, new: int) -> bool:
        return length <= len(ids) and length + new <= engine.context

    def token_times(length: int, limit: int) -> list[float]:
        begin = time.perf_counter()
        return [time.perf_counter() - begin for _ in engine.tokens(ids[:length], limit)]

    prefill = {length: prefill_tok_s(length) for length in (128, 512)}
    first, step = decode_s(128, DECODE_STEPS)
    at = {length: decode_s(length, STEPS_AT_CONTEXT)[1] for length in (100, 2000)}
    return {
        "prefill_tok_s": prefill[128],
        "prefill_512_tok_s": prefill[512],
        "decode_tok_s": step and 1 / step,
        "decode_ms_at_100": at[100] and 1e3 * at[100],
        "decode_ms_at_2000": at[2000] and 1e3 * at[2000],
        "ttft_s": first,
        "load_s": engine.load_s,
        "weights_mb": engine.weights_mb,
    }


def batch(spec: dict) -> dict:
    """Decode in all rows at once: tokens per second of the rows together, from when each has its
    first token. Prompts are 128 of the ids, each row's from another place on."""
    engine, ids, rows = ENGINES[spec["engine"]](spec), spec["ids"], spec["rows"]
    prompts = [ids[start : start + 128] for start in range(0, 16 * rows, 16)]
    for _ in engine.rows(prompts, 2):  # caches and arenas are touched before any timing
        pass
    times = [time.perf_counter() for _ in engine.rows(prompts, DECODE_STEPS)]
    return {"decode_tok_s": (len(times) - rows) / (times[-1] - times[rows - 1])}


def score(spec: dict) -> None:
    """Write a JSON line with the greedy continuation of `ids`, then the logits of all windows, a
    block for each line on standard input."""
    engine = ENGINES[spec["engine"]](spec)
    ids = list(itertools.islice(engine.tokens(spec["ids"], spec["limit"]), spec["limit"]))
    out = sys.stdout.buffer
    out.write(json.dumps({"ids": ids}).encode() + b"\n")
    out.flush()
    blocks = itertools.chain.from_iterable(map(engine.logits, spec["windows"]))
    while sys.stdin.readline():
        out.write(next(blocks).data)
        out.flush()


def system_info(spec: dict) -> dict:
    import llama_cpp

    info = llama_cpp.llama_print_system_info().decode()
    return {"version": llama_cpp.__version__, "system_info": info}


def texts(spec: dict) -> dict:
    """The artifact's manifest, the ids of each text, and the first text's beginning of 128 ids."""
    from tokenloop.runner.manifest import open_artifact
    from tokenloop.runner.tokenizer import Tokenizer

    manifest = open_artifact(Path(spec["path"])).manifest
    tokenizer = Tokenizer(Path(spec["path"]), manifest["tokenizer"])
    ids = [tokenizer.encode(text) for text in spec["texts"]]
    return {"manifest": manifest, "ids": ids, "prompt": tokenizer.decode(ids[0][:128])}


def ceiling(spec: dict) -> dict:
    """Plain read bandwidth in GB/s, of sums and dot products of 1 GiB by all threads: the best
    reading is the ceiling."""
    import torch

    torch.set_num_threads(spec["threads"])
    buffer = torch.ones(1 << 28)
    half = buffer.numel() // 2
    seconds = []
    for read in (buffer.sum, lambda: torch.dot(buffer[:half], buffer[half:])):
        for _ in range(8):
            begin = time.perf_counter()
            read()
            seconds.append(time.perf_counter() - begin)
    return {"bandwidth_gb_s": buffer.nbytes / min(seconds) / 1e9}


def weights(spec: dict) -> dict:
    """The megabytes of a .pte's weights that every decoded token reads: those of XNNPACK's linear
    layers with their scales, which are the file's named data. Of the constants beside them,
    where the embedding table is, a token reads rows; but all of them where there is no XNNPACK.
    """
    from executorch.exir._serialize._program import _flatbuffer_to_program, _get_extended_header

    with open(spec["program"], "rb") as file:
        header = _get_extended_header(file.read(64))
        file.seek(0)
        program = _flatbuffer_to_program(file.read(header.program_size))
    segments = [entry.segment_index for entry in program.named_data]
    segments = segments or [program.constant_segment.segment_index]
    return {"weights_mb": sum(program.segments[i].size for i in segments) / 1e6}


def save_transformers(spec: dict) -> dict:
    """Write the checkpoint's weights as transformers would have published them: one model
    directory for each dtype."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from tokenloop.export.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(Path(spec["model"]))
    state = {name: tensor.read() for name, tensor in checkpoint.stored.items()}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model = Gemma3ForCausalLM(Gemma3TextConfig(**checkpoint.config))
    model.load_state_dict(state, strict=True)
    for name, directory in spec["directories"].items():
        model.to(getattr(torch, name)).save_pretrained(directory)
    return {}


TASKS = (
    start, generate, speed, batch, score, system_info, texts, ceiling, weights, save_transformers,
)  # fmt: skip


def main() -> int:
    task, spec = sys.argv[1:]
    (function,) = (f for f in TASKS if f.__name__ == task)
    try:
        # A specification too long for a command line comes on standard input.
        answer = function(json.loads(sys.stdin.readline() if spec == "-" else spec))
    except (ValueError, ImportError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    if answer is not None:
        print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
