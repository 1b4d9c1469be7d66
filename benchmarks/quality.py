"""How much of the model is left in an artifact? `python -m benchmarks.quality` measures perplexity
on a text, and how far the predictions are from those of the eager network in float32.

Windows of 512 tokens, each beginning with bos, and every token given (teacher forcing). An
artifact is fed as in use: prefill of the first token, then one decode step for each. llama.cpp
gets the same ids, 64 at a time, and the same arithmetic is applied to its logits.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.common import (
    DEFAULT_TEXT,
    ROOT,
    WORKER,
    BenchmarkError,
    Contender,
    add_arguments,
    check_paths,
    finish,
    llama_cpp_peers,
    tokenloops,
)

WINDOW = 512
BLOCK = 64  # as in worker.py
PROMPT, PROMPT_TOKENS = "def fibonacci(n):", 40


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description="Perplexity of an artifact, and its distance from the network in float32.",
    )
    add_arguments(parser)
    parser.add_argument(
        "--reference",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="compare with the eager network in float32 (default: yes)",
    )
    parser.add_argument(
        "--text", type=Path, default=DEFAULT_TEXT, help="UTF-8 (default: benchmarks/data/alice.txt)"
    )
    parser.add_argument(
        "--tokens", type=int, metavar="N", help="predict at most so many (default: the whole text)"
    )
    options = parser.parse_args(arguments)
    if options.tokens is not None and options.tokens < 1:
        parser.error(f"--tokens is {options.tokens}; it must be at least 1")
    return options


class Logits:
    """The logits that a contender computes in a process of its own, when it is asked: so only one
    of them computes at a time. `continuation` is what it makes of the prompt."""

    def __init__(self, contender: Contender, windows: list[list[int]], prompt: list[int], log):
        spec = {**contender.spec, "ids": prompt, "limit": PROMPT_TOKENS}
        # Nothing is to be predicted after a window's last token.
        spec["windows"] = [window[:-1] for window in windows]
        self.name, self._log = contender.name, log
        self._process = subprocess.Popen(
            [contender.python, *WORKER, "score", "-"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, cwd=ROOT,
        )  # fmt: skip
        self._send(json.dumps(spec))
        line = self._process.stdout.readline()
        self.continuation: list[int] = json.loads(line)["ids"] if line else self._fail()

    def __enter__(self) -> "Logits":
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()
        self._process.communicate()

    def read(self, rows: int, vocab_size: int):
        """The next logits, float32 [rows, V]. Errors: BenchmarkError where they end too soon."""
        import torch

        self._send("next")
        block = torch.empty(rows, vocab_size)
        if self._process.stdout.readinto(block.numpy().data.cast("B")) != block.nbytes:
            self._fail()
        return block

    def _send(self, line: str) -> None:
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail()

    def _fail(self):
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        raise BenchmarkError(f"{self.name}: {lines[-1] if lines else 'ended too soon'}")


@dataclass
class Score:
    """Sums over the predicted tokens; KL divergence is that of the reference from this, in nats."""

    tokens: int = 0
    loss: float = 0.0
    divergence: float = 0.0
    agreements: int = 0

    def add(self, predicted, targets, reference=None) -> None:
        """Log-probabilities float32 [R, V], the true next ids int64 [R], and the reference's."""
        self.tokens += len(targets)
        self.loss -= predicted.gather(1, targets[:, None]).double().sum().item()
        if reference is not None:
            difference = reference.exp() * (reference - predicted)
            self.divergence += difference.sum(1).double().sum().item()
            self.agreements += (reference.argmax(1) == predicted.argmax(1)).sum().item()

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss / self.tokens)


class Reference:
    """The eager network with the checkpoint's weights in float32."""

    def __init__(self, path: Path, vocab_size: int):
        import torch

        from tokenloop.export.checkpoint import load_weights, open_checkpoint
        from tokenloop.models import gemma3

        checkpoint = open_checkpoint(path)
        if checkpoint.config["model_type"] not in gemma3.MODEL_TYPES:
            raise BenchmarkError(
                f"{path} is a {checkpoint.config['model_type']} model, and the reference is "
                "models/gemma3.py: give --no-reference"
            )
        config = gemma3.Gemma3Config.from_dict(checkpoint.config)
        if config.vocab_size != vocab_size:
            raise BenchmarkError(
                f"{path} has a vocabulary of {config.vocab_size} and the artifact {vocab_size}: "
                "give --model the artifact's checkpoint, or --no-reference"
            )
        with torch.device("meta"):
            self.model = gemma3.Gemma3(config, WINDOW).eval().requires_grad_(False)
        load_weights(self.model, checkpoint, gemma3.checkpoint_name)
        self.sha256 = checkpoint.sha256()

    def logits(self, window) -> Iterator:
        """Blocks float32 [<= BLOCK, V] after every token of window int64 [T]."""
        import torch

        positions = torch.arange(len(window))
        hidden = self.model.model.prefill(window[None], positions, None)
        for block in hidden[0].split(BLOCK):
            yield self.model.lm_head(self.model.model.norm(block))


def cut_windows(ids: list[int], bos: int | None, limit: int | None) -> list[list[int]]:
    """Windows whose tokens after the first are each predicted once; at most `limit` of them."""
    lead = [] if bos is None else [bos]
    ids = ids[len(lead) :] if ids[:1] == lead else ids
    if limit is not None:
        ids = ids[:limit] if lead else ids[: limit + math.ceil(limit / (WINDOW - 1))]
    step = WINDOW - len(lead)
    windows = [lead + ids[start : start + step] for start in range(0, len(ids), step)]
    return [window for window in windows if len(window) > 1]


def compare(sources: list[Logits], windows, reference: Reference | None, vocab_size: int):
    """Score all sources, and the reference, on the same predictions."""
    import torch

    scores = {source.name: Score() for source in sources}
    eager = Score() if reference is not None else None
    done, total = 0, sum(len(window) - 1 for window in windows)
    for window in windows:
        tokens = torch.tensor(window)
        blocks = iter(reference.logits(tokens[:-1]) if reference is not None else ())
        for targets in tokens[1:].split(BLOCK):
            expected = None
            if eager is not None:
                expected = next(blocks).log_softmax(1)
                eager.add(expected, targets)
            for source in sources:
                logits = source.read(len(targets), vocab_size)
                scores[source.name].add(logits.log_softmax(1), targets, expected)
            done += len(targets)
            print(f"\r{done} of {total} tokens", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return scores, eager


def summarize(score: Score, eager: Score | None, text: str) -> dict:
    """The figures of one contender; those that need the reference may be None."""
    result = {"perplexity": round(score.perplexity, 4)}
    result |= dict.fromkeys(("perplexity_fp32", "ratio", "kl", "top1_agreement"))
    if eager is not None:
        result["perplexity_fp32"] = round(eager.perplexity, 4)
        result["ratio"] = round(score.perplexity / eager.perplexity, 5)
        # Rounding may bring it below zero, which it cannot be.
        result["kl"] = round(max(score.divergence / score.tokens, 0.0), 6)
        result["top1_agreement"] = round(score.agreements / score.tokens, 5)
    return result | {"tokens": score.tokens, "fibonacci": text}


def print_table(results: dict[str, dict], eager: Score | None) -> None:
    width = max(map(len, (*results, "eager float32")))
    print(f"\n{'':<{width}} {'perplexity':>11} {'/ fp32':>8} {'KL, nats':>9} {'same top-1':>11}")
    if eager is not None:
        print(f"{'eager float32':<{width}} {eager.perplexity:>11.3f}")
    for name, result in results.items():
        line = f"{name:<{width}} {result['perplexity']:>11.3f}"
        if eager is not None:
            line += f" {result['ratio']:>8.4f} {result['kl']:>9.5f}"
            line += f" {result['top1_agreement']:>11.2%}"
        print(line)
    for name, result in results.items():
        print(f"\n{name}, after {PROMPT!r}:\n{result['fibonacci']}")
    print(flush=True)


def benchmark(options: argparse.Namespace) -> dict:
    check_paths(options)
    if options.reference and options.model is None:
        raise BenchmarkError("the demo model is not installed: give --model, or --no-reference")
    import torch

    from tokenloop.runner.manifest import open_artifact
    from tokenloop.runner.tokenizer import Tokenizer

    manifest = open_artifact(options.artifact).manifest
    if manifest["max_seq_len"] < WINDOW:
        raise BenchmarkError(
            f"{options.artifact} has {manifest['max_seq_len']} positions; the windows have {WINDOW}"
        )
    tokenizer = Tokenizer(options.artifact, manifest["tokenizer"])
    bos = next(iter(manifest["tokenizer"]["prefix_ids"]), None)
    try:
        text = options.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchmarkError(f"--text {options.text}: {error}") from None
    windows = cut_windows(tokenizer.encode(text), bos, options.tokens)
    if not windows:
        raise BenchmarkError(f"--text {options.text} has nothing to predict: give a longer text")
    peers, line = llama_cpp_peers(options, WINDOW)
    print(line, flush=True)

    reference = None
    if options.reference:
        reference = Reference(options.model, manifest["vocab_size"])
        if reference.sha256 != manifest["checkpoint"]["sha256"]:
            print(f"note: {options.artifact} was exported from another file than {options.model}")
    start = time.perf_counter()
    contenders = [*tokenloops(options), *peers]
    with ExitStack() as stack, torch.inference_mode():
        prompt = tokenizer.encode(PROMPT)
        sources = []
        for contender in contenders:
            log = stack.enter_context(tempfile.TemporaryFile())
            try:
                source = Logits(contender, windows, prompt, log)
            except BenchmarkError as error:
                if contender is contenders[0]:
                    raise
                print(f"without {error}", flush=True)
                continue
            sources.append(stack.enter_context(source))
        scores, eager = compare(sources, windows, reference, manifest["vocab_size"])
        results = {
            source.name: summarize(
                scores[source.name], eager, tokenizer.decode(source.continuation)
            )
            for source in sources
        }
    print_table(results, eager)
    result = results.pop(contenders[0].name)
    return {
        **result,
        "peers": results,
        "text": options.text.name,
        "windows": len(windows),
        "seconds": round(time.perf_counter() - start, 1),
        "artifact": options.artifact.name,
        "quant": manifest["quant"],
        "llama_cpp": line,
    }


def main() -> int:
    options = parse_arguments()
    try:
        finish(benchmark(options), options.save)
    except ValueError as error:  # BenchmarkError, RunnerError, ExportError
        print(f"python -m benchmarks.quality: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
