"""Serve an artifact by OpenAI's protocol: `tokenloop serve`, and from a checkout
`python runner/serve.py`."""

if __name__ == "__main__":
    # Before the imports, which take longest. That of the handler is one.
    from _signal import SIG_DFL, SIGINT, default_int_handler, getsignal, signal

    if getsignal(SIGINT) is default_int_handler:
        signal(SIGINT, SIG_DFL)
    from tokenloop.runner.process import end_when_interrupted

    end_when_interrupted()

import argparse
import gc
import os
import re
import socket
import sys
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tokenloop.runner import process
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.ranks import end_ranks, leave, place, tell
from tokenloop.runner.run import DEFAULT_ARTIFACT, add_loading, flag_of, reason

if TYPE_CHECKING:
    from tokenloop.runner.model import Model

HOST, PORT = "127.0.0.1", 8000
MAX_QUEUE, TIMEOUT_S, PREFIX_CACHE_MB = 256, 600, 256
KEY_VARIABLE = "TOKENLOOP_API_KEY"
# What those that run have when the server is told to end.
GRACE_S = 5
# So long one thread may hold Python's lock while another waits for it, where the device computes by
# itself. By default that is 5 ms, and a GPU has nothing to do if the engine's thread waits for
# longer than a step, about 3 ms.
SWITCH_S = 0.0005


def parse_arguments(arguments: list[str] | None, program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program,
        description="Serve an artifact that export/ made, by OpenAI's protocol.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--artifact", type=Path, default=DEFAULT_ARTIFACT, help="its directory")
    parser.add_argument("--host", default=HOST, help="the address to listen at")
    parser.add_argument("--port", type=int, default=PORT, help="0 takes one that is free")
    parser.add_argument(
        "--api-key", metavar="KEY",
        help=f"what clients must send as their key (default: the variable {KEY_VARIABLE}, which "
        "other users of the machine do not see in the list of processes)",
    )  # fmt: skip
    parser.add_argument(
        "--model-name", metavar="NAME", help="what clients call it (default: the directory's name)"
    )
    parser.add_argument(
        "--max-queue", type=int, default=MAX_QUEUE, metavar="N",
        help="how many requests may wait for a row; more are answered with status 429",
    )  # fmt: skip
    parser.add_argument(
        "--max-stall-ms", type=float, default=argparse.SUPPRESS, metavar="MS",
        help="how long running rows stand still for others' prompts between two steps: so long at "
        "most, or as long as one chunk takes (default: as long as two steps take)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_S, metavar="S",
        help="seconds after which a request ends, wherever it is",
    )  # fmt: skip
    parser.add_argument(
        "--prefix-cache-mb", type=float, default=argparse.SUPPRESS, metavar="MB",
        help="memory of the device for beginnings of prompts, which later ones need not compute; 0 "
        f"is none (default: {PREFIX_CACHE_MB}, where the artifact's state can be kept)",
    )  # fmt: skip
    add_loading(parser)
    parser.add_argument(
        "--log-prompts", action="store_true", help="put prompts and outputs in the log"
    )
    options = parser.parse_args(arguments)
    for name, least in (("threads", 1), ("max_queue", 0)):
        if (value := getattr(options, name)) is not None and value < least:
            parser.error(f"{flag_of(name)} is {value}; it must be at least {least}")
    options.max_stall_ms = stall = getattr(options, "max_stall_ms", None)
    if stall is not None and not 0 <= stall < float("inf"):
        parser.error(f"--max-stall-ms is {stall}; it must be a finite number, 0 or more")
    options.prefix_cache_mb = cache = getattr(options, "prefix_cache_mb", None)
    if cache is not None and not 0 <= cache < float("inf"):
        parser.error(f"--prefix-cache-mb is {cache}; it must be a finite number, 0 or more")
    if not 0 < options.timeout < float("inf"):
        parser.error(f"--timeout is {options.timeout}; it must be a finite number above 0")
    if not 0 <= options.port <= 65535:
        parser.error(f"--port is {options.port}; it must be 0 to 65535")
    if options.api_key is None:
        options.api_key = os.environ.get(KEY_VARIABLE)
    # Others cannot be sent in a header, or not without loss.
    if options.api_key is not None and not re.fullmatch("[!-~]+", options.api_key):
        parser.error("--api-key must be of one or more ASCII characters without spaces")
    return options


def bound_socket(host: str, port: int) -> socket.socket:
    """A socket at the address, which does not listen yet. Errors: RunnerError."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RunnerError(f"--host {host}: {getattr(error, 'strerror', error)}") from None
    family, kind, number, _, address = found[0]
    listener = socket.socket(family, kind, number)
    # What a server before this one has left behind there is no other's.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise RunnerError(f"--port {port} of {host}: {error.strerror}") from None
    return listener


def serve(options: argparse.Namespace) -> int:
    """Serve until a signal ends it; the exit status. Errors: RunnerError."""
    start = time.perf_counter()
    own = place()
    if not own.leads:
        return follow(options)
    listener = bound_socket(options.host, options.port)
    try:
        import logging

        from tokenloop.runner.server.app import Server, Settings
        from tokenloop.runner.server.listening import Listening, is_loopback
    except ImportError as error:
        raise RunnerError(
            f"serving needs starlette, uvicorn, pydantic and prometheus-client ({error}): "
            "pip install 'tokenloop[serve]'"
        ) from None
    from tokenloop.runner.engine import Engine

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model = loaded(options)
    if model.loop.program.is_asynchronous:
        sys.setswitchinterval(SWITCH_S)
    name = options.model_name or options.artifact.absolute().name
    host, port = listener.getsockname()[:2]
    only_here = is_loopback(host)
    settings = Settings(name, options.api_key, options.timeout, only_here, options.log_prompts)
    if not only_here and options.api_key is None:
        process.say(f"{options.program}: warning: whoever reaches {host} can use it: --api-key")
    stall = options.max_stall_ms
    leading = fail = None
    if own.count > 1:
        from tokenloop.runner.rank_decisions import Leading

        fail = partial(end_ranks, options.program)
        leading = Leading(model, fail)
    with leading or nullcontext(), Engine(
        model, max_queue=options.max_queue, max_stall_s=None if stall is None else stall / 1000,
        prefix_cache_mb=options.prefix_cache_mb, fail=fail,
    ) as engine:  # fmt: skip
        host = f"[{host}]" if ":" in host else host
        rows = f"{engine.rows} row{'s' * (engine.rows > 1)}"

        def ready() -> None:
            # What is there now stays, and looking through it takes longer than a step.
            gc.freeze()
            seconds = time.perf_counter() - start
            process.say(f"{name}, {rows}, on http://{host}:{port} after {seconds:.1f} s")

        # Signals end the process as soon as nothing is served any more.
        closed = leading.end if leading else lambda: None
        Listening(Server(engine, settings), engine, GRACE_S, ready, closed).run(sockets=[listener])
    return 0


def loaded(options: argparse.Namespace) -> "Model":
    """The model, and what samples. Errors: RunnerError."""
    from tokenloop.runner.model import Model
    from tokenloop.runner.request import Request

    with process.InterruptsRaised() as interrupts:
        model = Model(options.artifact, options.threads, options.verify)
        interrupts.check()
    # Not when the first request samples, while others run. An artifact that cannot refuses it then.
    with suppress(RunnerError):
        for top_p in (1.0, 0.5):
            sampled = Request("", temperature=1.0, top_p=top_p)
            model.load_sampling(sampled, model.loop.variant(None))
    return model


def follow(options: argparse.Namespace) -> int:
    """Compute what rank 0 serves until it ends; the exit status. Errors: RunnerError."""
    model = loaded(options)
    from tokenloop.runner.rank_decisions import Following

    return Following(model).follow()


def main(arguments: list[str] | None = None, program: str = "tokenloop serve") -> int:
    """Run the command line that `program` is the name of; the exit status."""
    return leave(serve_command(arguments, program))


def serve_command(arguments: list[str] | None, program: str) -> int:
    process.open_streams()
    options = parse_arguments(arguments, program)
    options.program = program
    try:
        return serve(options)
    except RunnerError as error:
        tell(program, error)
        return 2
    except KeyboardInterrupt:
        return process.INTERRUPTED
    except OSError as error:
        process.say(f"{program}: error: {reason(error)}")
        return 2


if __name__ == "__main__":
    sys.exit(main(program="runner/serve.py"))
