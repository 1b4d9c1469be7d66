"""One prompt through every variant of the loop, as a table: speed, copies, whether all agree."""

import io
import itertools
import json
from dataclasses import asdict, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from tokenloop.runner.loop import LoopOptions
from tokenloop.runner.model import Model
from tokenloop.runner.output import put
from tokenloop.runner.request import Request

RUN_AHEAD = 8
COPIES = {"H2D": "host_to_device", "D2D": "device_to_device", "D2H": "device_to_host"}
# The width of a table that is not for a terminal.
WIDTH = 120


def variants(model: Model) -> list[LoopOptions]:
    """Every variant that the model's artifact supports, the plainest first."""
    program = model.loop.program
    feeds = ("host", "alias", "embed") if program.embeds else ("host", "alias")
    graphs = (False, True) if program.has_graphs else (True,)
    found = [
        LoopOptions(feed, positions, double_buffering, 1, graph)
        for graph, feed, positions, double_buffering in itertools.product(
            graphs, feeds, ("host", "device"), (False, True)
        )
        # The host cannot feed a step that is submitted before its token is read.
        if not (double_buffering and feed == "host")
    ]
    found.append(LoopOptions(feeds[-1], run_ahead=RUN_AHEAD))
    if program.has_graphs:
        found.append(LoopOptions(feeds[-1], overlap=False))
    if program.draft_tokens:
        found.append(LoopOptions(feeds[-1], speculate="lookup"))
    return found


def compare(model: Model, request: Request, as_json: bool) -> int:
    """Run and print all of them; the exit status, 1 if any gives another text or other ids."""
    console = Console(stderr=True)
    rows: list[dict[str, Any]] = []
    with console.status("", refresh_per_second=4) as status:
        chosen = variants(model)
        for number, options in enumerate(chosen, 1):
            status.update(f"variant {number} of {len(chosen)}")
            rows.append(measure(model, request, options))
            rows[-1]["identical"] = all(
                rows[-1][key] == rows[0][key] for key in ("token_ids", "text")
            )
            if as_json:
                put(json.dumps(rows[-1], ensure_ascii=False) + "\n")
    if not as_json:
        # Rich would answer an output that takes no more in its own way.
        seen, text = Console(), io.StringIO()
        width = seen.width if seen.is_terminal else WIDTH
        console = Console(file=text, force_terminal=seen.is_terminal, width=width)
        program = model.loop.program
        console.print(table(rows, program.has_graphs, program.draft_tokens > 0))
        put(text.getvalue())
    return 0 if all(row["identical"] for row in rows) else 1


def measure(model: Model, request: Request, options: LoopOptions) -> dict[str, Any]:
    """One variant's ids, text and statistics."""
    # Methods are loaded, and graphs captured, when they are first needed.
    model.generate(replace(request, max_new_tokens=3), options=options).run()
    done = model.generate(request, options=options).run()
    return {
        "options": asdict(options),
        "token_ids": done.token_ids,
        "text": done.text,
        "stats": done.as_dict()["stats"],
    }


def table(rows: list[dict], has_graphs: bool, has_rounds: bool) -> Table:
    found = Table(box=None, pad_edge=False)
    for name in (
        "feed",
        "positions",
        "double buffering",
        "run ahead",
        *["graph", "overlap"] * has_graphs,
        *["speculate"] * has_rounds,
    ):
        found.add_column(name)
    for name in ("tok/s", "first token, ms", *(f"{name} / bytes" for name in COPIES)):
        found.add_column(name, justify="right")
    found.add_column("text")
    for row in rows:
        options, stats = row["options"], row["stats"]
        copies = [stats["transfers"][direction] for direction in COPIES.values()]
        found.add_row(
            options["feed"],
            options["positions"],
            on(options["double_buffering"]),
            str(options["run_ahead"]),
            *[on(options["graph"]), on(options["overlap"])] * has_graphs,
            *[options["speculate"] or "off"] * has_rounds,
            f"{stats['decode_tok_s']:.1f}" if stats["decode_tok_s"] else "",
            f"{stats['time_to_first_token_s'] * 1e3:.1f}",
            *(f"{entry['count']} / {entry['bytes']}" for entry in copies),
            "identical" if row["identical"] else "DIFFERENT",
        )
    return found


def on(flag: bool) -> str:
    return "on" if flag else "off"
