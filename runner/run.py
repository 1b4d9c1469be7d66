"""Generate text from an artifact: `tokenloop run "The capital of France is"`, and from a checkout
`python runner/run.py "The capital of France is"`."""

if __name__ == "__main__":
    # Before the imports, which take longest. That of the handler is one.
    from _signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal

    if getsignal(SIGINT) is default_int_handler:
        signal(SIGINT, SIG_DFL)
    from tokenloop.runner.process import end_when_interrupted

    end_when_interrupted()

import argparse
import json
import re
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from tokenloop.runner import process
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.output import OutputError, begin_output, put
from tokenloop.runner.prompts import DEFAULT_PROMPT, flags_of, read_requests
from tokenloop.runner.ranks import end_ranks, leave, place, tell
from tokenloop.runner.request import RULES, Request, fault_of

DEFAULT_ARTIFACT = Path("artifacts/gemma3-xnnpack")


def parse_arguments(arguments: list[str] | None, program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Generate text from an artifact that export/ made.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(program=program)
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
        help="one more prompt: the file's whole text, without a final newline; with --batch a "
        "prompt for each line, in a .jsonl file as an object with what differs from the flags",
    )
    parser.add_argument(
        "--batch", type=int, metavar="N",
        help="generate for N prompts at a time; each text is printed when it is complete",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=int, default=Request.max_new_tokens, metavar="N")
    parser.add_argument("--chat", action="store_true", help="use the artifact's chat template")
    parser.add_argument(
        "--system", metavar="TEXT",
        help="a system's message before each prompt, which is then a chat's (as with --chat)",
    )  # fmt: skip
    parser.add_argument(
        "--messages", type=Path, metavar="FILE",
        help="one more prompt: a conversation, as a JSON list of messages with role and content",
    )  # fmt: skip
    add_loading(parser)
    choice = parser.add_argument_group("how tokens are chosen")
    choice.add_argument(
        "--temperature", type=float, default=Request.temperature, metavar="T",
        help="0 takes the most likely token",
    )  # fmt: skip
    choice.add_argument(
        "--top-k", type=int, default=Request.top_k, metavar="K",
        help="sample from the K most likely tokens only; 0 for all",
    )  # fmt: skip
    choice.add_argument(
        "--top-p", type=float, default=Request.top_p, metavar="P",
        help="sample from the most likely tokens that together have this probability",
    )  # fmt: skip
    choice.add_argument("--seed", type=int, default=Request.seed, help="of the sampling")
    choice.add_argument(
        "--stop", action="append", default=[], metavar="STR",
        help="a text before which the output ends; may be given several times",
    )  # fmt: skip
    choice.add_argument(
        "--repetition-penalty", type=float, default=Request.repetition_penalty, metavar="R",
        help="divide the logits of tokens of the prompt and the output by R, or multiply those "
        "below 0 with it; 1 for none",
    )  # fmt: skip
    choice.add_argument(
        "--presence-penalty", type=float, default=Request.presence_penalty, metavar="P",
        help="subtract P from the logits of tokens of the output",
    )  # fmt: skip
    choice.add_argument(
        "--frequency-penalty", type=float, default=Request.frequency_penalty, metavar="P",
        help="subtract P from the logits of tokens for each time that they are in the output",
    )  # fmt: skip
    choice.add_argument(
        "--logit-bias", action="append", default=[], metavar="ID+BIAS", type=as_bias,
        help="add a number to the logit of the token ID, as in 15043+1.5 or 15043-100; may be "
        "given several times",
    )  # fmt: skip
    choice.add_argument(
        "--json-schema", type=Path, metavar="FILE",
        help="the output is JSON that fits the JSON schema in this file",
    )  # fmt: skip
    choice.add_argument(
        "--json-object", action="store_true", help="the output is a JSON object",
    )  # fmt: skip
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON line for each prompt")
    output.add_argument(
        "--interactive", action="store_true",
        help="a chat: answer each line of standard input, with all before it in mind",
    )  # fmt: skip
    output.add_argument("--stats", action="store_true", help="speed and copies, on standard error")
    loop = parser.add_argument_group("the loop, for comparison (the text is always the same)")
    loop.add_argument(
        "--feed", choices=("auto", "embed", "alias", "host"), default="auto",
        help="hand the token's embedding on in place, or the token, or read the token and upload "
        "it again; auto takes the first that the artifact has the methods for",
    )  # fmt: skip
    loop.add_argument(
        "--positions", choices=("device", "host"), default="device",
        help="from a table uploaded once, or uploaded for each step",
    )  # fmt: skip
    loop.add_argument(
        "--double-buffering", action=argparse.BooleanOptionalAction, default=True,
        help="submit step n + 1 before token n is read (never with --feed host)",
    )  # fmt: skip
    loop.add_argument(
        "--run-ahead", type=int, default=1, metavar="K",
        help="submit K steps at once, and read their tokens together",
    )  # fmt: skip
    loop.add_argument(
        "--graph", action=argparse.BooleanOptionalAction, default=True,
        help="launch a step as one captured graph, where the artifact is for a GPU",
    )  # fmt: skip
    loop.add_argument(
        "--overlap", action=argparse.BooleanOptionalAction, default=True,
        help="let the graph's kernels begin while the ones ahead of them end",
    )  # fmt: skip
    loop.add_argument(
        "--speculate", metavar="lookup|DIR",
        help="where the artifact was exported with --draft-tokens, let steps try tokens that "
        "followed the newest ones earlier in the text, or those of the model of another artifact",
    )  # fmt: skip
    loop.add_argument(
        "--compare", action="store_true",
        help="run the prompt through every variant of the loop, and print a table of their speed "
        "and copies, or with --json a line for each; exit status 1 if any text differs",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    options.logit_bias = dict(options.logit_bias) or None
    if options.json_object and options.json_schema is not None:
        parser.error("--json-schema says what the JSON is: leave out --json-object")
    for name in (name for name in RULES if name in options and name != "json_schema"):
        if fault := fault_of(name, getattr(options, name)):
            parser.error(f"{flag_of(name)} is {getattr(options, name)}; {fault}")
    for name in ("threads", "batch", "run_ahead"):
        if (value := getattr(options, name)) is not None and value < 1:
            parser.error(f"{flag_of(name)} is {value}; it must be at least 1")
    if options.run_ahead > 1 and options.feed == "host":
        parser.error("--run-ahead and --feed host: the host cannot feed what it has not read")
    if options.compare:
        names = (
            "feed", "positions", "double_buffering", "run_ahead", "graph", "overlap", "speculate",
            "batch",
        )  # fmt: skip
        for name in names:
            if getattr(options, name) != parser.get_default(name):
                parser.error(f"--compare runs every variant of one row: leave out {flag_of(name)}")
    if options.interactive:
        for name in ("prompts", "prompt_file", "messages", "batch", "compare", "json", "stats"):
            if getattr(options, name):
                flag = "the prompts" if name == "prompts" else flag_of(name)
                parser.error(f"--interactive reads what is asked line by line: leave out {flag}")
    if options.prompts.count("-") > 1:
        parser.error("- is given twice, and there is one standard input")
    return options


def as_bias(text: str) -> tuple[int, float]:
    """The id and the number of --logit-bias."""
    found = re.fullmatch(r"([0-9]+)([+-][0-9.eE+-]+)", text)
    try:
        return int(found[1]), float(found[2])
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(
            f"{text} is no token id with a number to add, such as 15043+1.5 or 15043-100"
        ) from None


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a model is loaded."""
    parser.add_argument(
        "--threads", type=int, metavar="N",
        help="how many threads compute (default: the processors that this process may use)",
    )  # fmt: skip
    parser.add_argument(
        "--verify", action=argparse.BooleanOptionalAction, default=None,
        help="hash every file before it is read, or neither program nor weights (default: those "
        "that were not hashed since they were last changed)",
    )  # fmt: skip


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def print_stats(model, stats, *own_lines: str) -> None:
    lines = [
        f"load                {model.load_s:.2f} s",
        *own_lines,
        f"prefill             {stats.prompt_tokens} tokens, {stats.prefill_tok_s:.1f} tok/s",
        f"decode              {stats.new_tokens} tokens"
        + (f", {stats.decode_tok_s:.1f} tok/s" if stats.decode_tok_s else ""),
        f"peak memory         {stats.peak_rss_mb:.0f} MB",
    ]
    for direction, copies in stats.transfers.items():
        name = direction.replace("_", " ")
        lines.append(f"{name:<19} {copies['count']} copies, {copies['bytes']} bytes")
    if stats.draft_rounds:
        counts = f"{stats.accepted_tokens} of {stats.drafted_tokens} tokens accepted"
        lines.append(f"drafts              {counts}, {stats.draft_rounds} rounds")
    process.say("\n".join(lines))


def run(options: argparse.Namespace) -> int:
    """Generate for every prompt; the exit status. Errors: RunnerError, OutputError."""
    own = place()
    requests = own.read(
        lambda: [flags_of(options)] if options.interactive else read_requests(options)
    )
    # The modules that run models are imported only now: wrong arguments are answered at once.
    from tokenloop.runner.loop import LoopOptions
    from tokenloop.runner.model import Model

    if options.compare and requests is not None and len(requests) > 1:
        raise RunnerError(f"--compare takes one prompt, and {len(requests)} are given")
    with process.InterruptsRaised() as interrupts:
        model = Model(options.artifact, options.threads, options.verify)
        if own.count > 1:
            requests = model.loop.program.ranks.share(requests)
        interrupts.check()
        if options.compare:
            from tokenloop.runner.compare import compare

            return compare(model, requests[0], options.json)
        given = {f.name: getattr(options, f.name) for f in fields(LoopOptions)}
        if options.speculate not in (None, "lookup"):
            model.use_draft(options.speculate)
            given["speculate"] = "draft"
        loop = LoopOptions(**given)
        if options.batch is not None:
            return run_batch(model, requests, loop, options)
        if not options.interactive:
            return run_each(model, requests, loop, options)
    # There an interrupt ends an answer and not the chat.
    from tokenloop.runner.interactive import chat

    if own.count == 1:
        return chat(model, requests[0], loop, options.system)
    from tokenloop.runner.rank_decisions import Following, Leading

    if not own.leads:
        return Following(model).follow()
    with Leading(model, partial(end_ranks, options.program)):
        return chat(model, requests[0], loop, options.system)


def run_each(model, requests: list[Request], loop, options: argparse.Namespace) -> int:
    """Generate for one prompt after the other, and print each text as it comes; the exit status.
    Errors: as `run`."""
    for request in requests:
        generation = model.generate(request, options=loop)
        interrupted = False
        try:
            for token in generation:
                if not options.json:
                    put(token.text)
        except KeyboardInterrupt:
            interrupted = True
            generation.finish_reason = "interrupted"
        print_line(generation, options.json, "")
        if options.stats and generation.token_ids and place().leads:
            stats = generation.stats
            first = f"time to first token {stats.time_to_first_token_s:.3f} s"
            print_stats(model, stats, first)
        if interrupted:
            return process.INTERRUPTED
    return 0


def run_batch(model, requests: list[Request], loop, options: argparse.Namespace) -> int:
    """Generate for all prompts, several at a time, and print each text when it and all before it
    are complete; the exit status. Errors: as `run`."""
    from tokenloop.runner.progress import progress

    batch, printed, status = model.generate_batch(requests, loop, options.batch), 0, 0

    def print_finished() -> None:
        nonlocal printed, status
        for result in batch.results[printed:]:
            if result.finish_reason is None:
                return
            hide_progress()
            printed += 1
            if result.error is not None:
                if place().leads:
                    process.say(f"{options.program}: error: {result.error}")
                status = 2
            if options.json or result.error is None:
                print_line(result, options.json, result.text)

    with progress(len(requests), place().leads) as (show_progress, hide_progress):
        try:
            for _ in batch:
                print_finished()
                show_progress(batch)
            print_finished()
        except KeyboardInterrupt:
            for result in batch.results:
                result.finish_reason = result.finish_reason or "interrupted"
            print_finished()
            status = process.INTERRUPTED
    stats = batch.stats
    if options.stats and stats.requests and place().leads:
        counts = f"requests            {stats.requests}", f"steps               {stats.steps}"
        print_stats(model, stats, *counts)
    return status


def print_line(result, as_json: bool, text: str) -> None:
    """The line for a result: all of it as JSON, or the text that is not printed yet."""
    line = json.dumps(result.as_dict(), ensure_ascii=False) if as_json else text
    put(f"{line}\n")


def main(arguments: list[str] | None = None, program: str = "tokenloop run") -> int:
    """Run the command line that `program` is the name of; the exit status."""
    return leave(run_command(arguments, program))


def run_command(arguments: list[str] | None, program: str) -> int:
    process.open_streams()
    options = parse_arguments(arguments, program)
    try:
        begin_output()
        return run(options)
    except RunnerError as error:
        tell(program, error)
        return 2
    except KeyboardInterrupt:
        return process.INTERRUPTED
    except OutputError as error:
        process.discard(sys.stdout)
        if isinstance(error.reason, BrokenPipeError):
            return 141  # The reader has gone (| head).
        process.say(f"{program}: error: standard output: {error.reason.strerror}")
        return 2
    except OSError as error:
        process.say(f"{program}: error: {reason(error)}")
        return 2


def reason(error: OSError) -> str:
    """What the system says, and of which file."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def main_compare(arguments: list[str]) -> int:
    """`tokenloop compare`: `tokenloop run --compare`; the exit status."""
    return main(["--compare", *arguments], "tokenloop compare")


if __name__ == "__main__":
    sys.exit(main(program="runner/run.py"))
