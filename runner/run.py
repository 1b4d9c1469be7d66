"""Generate text from an artifact: `python runner/run.py "The capital of France is"`."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

# As a script, the project's root must be importable, and runner/ itself must not shadow packages.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from runner.errors import RunnerError

DEFAULT_ARTIFACT = Path("artifacts/gemma3-xnnpack")
DEFAULT_PROMPT = "The capital of France is"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="runner/run.py",
        description="Generate text from an artifact that export/ made.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "prompts",
        nargs="*",
        metavar="PROMPT",
        help=f"prompts, one after the other; - reads one from standard input (default: "
        f"{DEFAULT_PROMPT!r})",
    )
    parser.add_argument("--artifact", type=Path, default=DEFAULT_ARTIFACT, help="its directory")
    parser.add_argument(
        "--prompt-file",
        type=Path,
        metavar="FILE",
        help="one more prompt: the file's whole text, without a final newline",
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--chat", action="store_true", help="use the artifact's chat template")
    parser.add_argument(
        "--threads", type=int, metavar="N",
        help="how many threads compute (default: the processors that this process may use)",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON line for each prompt")
    output.add_argument("--stats", action="store_true", help="speed and copies, on standard error")
    loop = parser.add_argument_group("the loop, for comparison (the text is always the same)")
    loop.add_argument(
        "--feed", choices=("alias", "host"), default="alias",
        help="hand the token on in place, or read it and upload it again",
    )  # fmt: skip
    loop.add_argument(
        "--positions", choices=("device", "host"), default="device",
        help="from a table uploaded once, or uploaded for each step",
    )  # fmt: skip
    loop.add_argument(
        "--double-buffering", action=argparse.BooleanOptionalAction, default=True,
        help="submit step n + 1 before token n is read (never with --feed host)",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.max_new_tokens < 1:
        parser.error(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 1")
    if options.threads is not None and options.threads < 1:
        parser.error(f"--threads is {options.threads}; it must be at least 1")
    if options.prompts.count("-") > 1:
        parser.error("- is given twice, and there is one standard input")
    return options


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts' texts, in the order of the command line, the file's last."""
    prompts = []
    for prompt in options.prompts:
        text = prompt
        if prompt == "-":
            text = decode_utf8(sys.stdin.buffer.read(), "standard input")
        prompts.append(text)
    if options.prompt_file is not None:
        try:
            data = options.prompt_file.read_bytes()
        except OSError as error:
            raise RunnerError(f"--prompt-file {options.prompt_file}: {error.strerror}") from None
        prompts.append(decode_utf8(data, str(options.prompt_file)))
    return prompts or [DEFAULT_PROMPT]


def decode_utf8(data: bytes, source: str) -> str:
    try:
        return data.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise RunnerError(f"{source} is not UTF-8 text: byte {error.start} is wrong") from None


def print_stats(model, stats) -> None:
    lines = [
        f"load                {model.load_s:.2f} s",
        f"time to first token {stats.time_to_first_token_s:.3f} s",
        f"prefill             {stats.prompt_tokens} tokens, {stats.prefill_tok_s:.1f} tok/s",
        f"decode              {stats.new_tokens} tokens"
        + (f", {stats.decode_tok_s:.1f} tok/s" if stats.decode_tok_s else ""),
        f"peak memory         {stats.peak_rss_mb:.0f} MB",
    ]
    for direction, copies in stats.transfers.items():
        name = direction.replace("_", " ")
        lines.append(f"{name:<19} {copies['count']} copies, {copies['bytes']} bytes")
    print("\n".join(lines), file=sys.stderr)


def run(options: argparse.Namespace) -> int:
    """Generate for every prompt; the exit status. Errors: RunnerError."""
    prompts = read_prompts(options)
    # What runs models is imported only now, so that wrong arguments are answered at once.
    # NumPy makes an error of its own of an interrupt while it is imported.
    previous = signal.getsignal(signal.SIGINT)
    if previous is signal.default_int_handler:
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from runner.loop import LoopOptions
    from runner.model import Model

    signal.signal(signal.SIGINT, previous)
    model = Model(options.artifact, options.threads)
    loop = LoopOptions(options.feed, options.positions, options.double_buffering)
    for prompt in prompts:
        generation = model.generate(prompt, options.max_new_tokens, options.chat, loop)
        interrupted = False
        try:
            for token in generation:
                if not options.json:
                    print(token.text, end="", flush=True)
        except KeyboardInterrupt:
            interrupted = True
            generation.finish_reason = "interrupted"
        last = json.dumps(generation.as_dict(prompt), ensure_ascii=False) if options.json else ""
        print(last, flush=True)
        if options.stats and generation.token_ids:
            print_stats(model, generation.stats)
        if interrupted:
            return 130
    return 0


def main() -> int:
    options = parse_arguments()
    # As prompts are read, whatever the locale: a model's text is in no other encoding.
    sys.stdout.reconfigure(encoding="utf-8")
    try:
        return run(options)
    except RunnerError as error:
        print(f"runner/run.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        # Python would complain once more when it flushes standard output at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141  # The reader has gone (| head).
        where = error.filename or "standard output"
        print(f"runner/run.py: error: {where}: {error.strerror}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
