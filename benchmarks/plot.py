"""What do the saved results look like? `python -m benchmarks.plot` draws those of cpu.py and
quality.py, peers side by side, as one PNG. The same results give the same bytes.

Results may hold several tokenloop artifacts: a peer whose name begins with "tokenloop" counts as
ours. "tokenloop" itself is called by its recipe as well ("tokenloop 8da8w"), so that a quality
file of another artifact finds its peer of that name.
"""

import argparse
import itertools
import json
import math
import os
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from benchmarks.common import BenchmarkError
from benchmarks.cpu import FIGURES

RESULTS = Path(__file__).resolve().parent / "results"
PERPLEXITY = "perplexity_over_fp32"
# Key, title and scale; panels of one scale can be compared by eye.
PANELS = (
    ("prefill_tok_s", "Prefill, 128 tokens", "prefill"),
    ("prefill_512_tok_s", "Prefill, 512 tokens", "prefill"),
    ("decode_tok_s", "Decode, context 128–256", "decode"),
    ("start_to_first_token_s", "Start to first token", "start"),
    ("decode_ms_at_100", "Decode, context 100", "step"),
    ("decode_ms_at_2000", "Decode, context 2,000", "step"),
    ("peak_rss_mb", "Peak memory (RSS)", "memory"),
    (PERPLEXITY, "Perplexity over fp32", "perplexity"),
)
CEILING = "ceiling_decode_tok_s"
OURS = ("#0969da", "#54aeff", "#0a3069", "#80ccff")
PEERS = ("#c9b48a", "#a3b18f", "#c3a3a6", "#9fb0bd", "#b5a8c9", "#b9b9b4", "#8f9a86", "#d0bfae")
INK, GREY, RED = "#1f2328", "#59636e", "#cf222e"
# Inches; shown 900 pixels wide, an inch is 100 of them and a point 1.4.
WIDTH, DPI, COLUMNS = 9.0, 200, 4
MARGIN, GAP, HEAD, ROW, BAR, LINE, PAD = 0.12, 0.2, 0.42, 0.33, 0.205, 0.145, 0.04


@dataclass(frozen=True)
class Plot:
    """Contenders in their order, each a dict of figures (number or None) and `ranges`; the
    caption's paragraphs; and which perplexities are of other predictions, and of which."""

    contenders: dict[str, dict]
    caption: list[str]
    elsewhere: dict[str, str]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description="Draw saved benchmark results as one PNG."
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS / "cpu.json",
        metavar="FILE",
        help="saved by cpu.py (default: benchmarks/results/cpu.json)",
    )
    parser.add_argument(
        "--quality",
        type=Path,
        nargs="*",
        default=sorted(RESULTS.glob("quality*.json")),
        metavar="FILE",
        help="saved by quality.py (default: benchmarks/results/quality*.json)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=RESULTS / "cpu.png",
        metavar="FILE",
        help="(default: benchmarks/results/cpu.png)",
    )
    options = parser.parse_args(arguments)
    if options.output.suffix.lower() != ".png":
        parser.error(f"--output is {options.output}; its name must end in .png")
    return options


def read(path: Path) -> dict:
    """A results file. Errors: BenchmarkError for what is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchmarkError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise BenchmarkError(f"{path} is not JSON: {error}") from None
    if not isinstance(result, dict) or not isinstance(result.get("peers", {}), dict):
        raise BenchmarkError(f"{path} is no result of a benchmark: no object with 'peers'")
    return result


def entries(path: Path, result: dict) -> Iterator[tuple[str, dict]]:
    """The contenders of a results file, tokenloop's first."""
    quant = result.get("quant")
    named = [(f"tokenloop {quant}" if quant else "tokenloop", result)]
    named += result.get("peers", {}).items()
    names = set()
    for name, entry in sorted(named, key=lambda pair: not pair[0].startswith("tokenloop")):
        # JSON can hold halves of surrogate pairs, which no font can.
        name = " ".join(name.encode(errors="replace").decode().split())
        if name in names:
            raise BenchmarkError(f"{path} has two contenders called {name!r}")
        if not isinstance(entry, dict):
            raise BenchmarkError(f"{path}: {name!r} is {entry!r}, not an object")
        names.add(name)
        yield name, entry


def number(value, where: str) -> float | None:
    """A figure. Errors: BenchmarkError for what is none and not null either."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e12:
        raise BenchmarkError(f"{where} is {value!r}, not a number from 0 to 1e12")
    return value


def read_speed(path: Path, result: dict) -> dict[str, dict]:
    """Each contender's figures that have a panel, and their ranges."""
    keys = [key for key, _, _ in PANELS if key != PERPLEXITY]
    contenders = {}
    for name, entry in entries(path, result):
        where = f"{path}: {{}} of {name!r}"
        figures = {key: number(entry.get(key), where.format(key)) for key in (*keys, CEILING)}
        figures["ranges"] = {}
        for key in keys:
            try:
                low, high = (entry.get("ranges") or {}).get(key) or (None, None)
            except (AttributeError, TypeError, ValueError):
                raise BenchmarkError(where.format("ranges") + " are not pairs") from None
            low, high = (number(end, where.format(f"range of {key}")) for end in (low, high))
            if None not in (low, high):
                figures["ranges"][key] = (low, high)
        contenders[name] = figures
    if all(figures[key] is None for figures in contenders.values() for key in keys):
        raise BenchmarkError(f"{path} has no known figure, such as {', '.join(keys[:3])}")
    return contenders


def add_quality(contenders: dict[str, dict], paths: list[Path]) -> tuple[str, dict[str, str]]:
    """Perplexity over that of fp32, in percent, into `contenders`: what it is of, and for whom it
    is of something else. Files of the same predictions go together; of several such groups,
    the one with the most contenders comes first and others only fill its holes."""
    groups: dict[str, dict[str, float]] = {}
    for path in paths:
        result, known = read(path), False
        for name, entry in entries(path, result):
            known |= "ratio" in entry
            ratio = number(entry.get("ratio"), f"{path}: ratio of {name!r}")
            if ratio is not None:
                tokens = number(entry.get("tokens"), f"{path}: tokens of {name!r}")
                what = "an unknown text" if tokens is None else f"{tokens:,} tokens"
                what += f" of {result['text']}" if "text" in result else ""
                groups.setdefault(what, {}).setdefault(name, (ratio - 1) * 100)
        if not known:
            raise BenchmarkError(f"{path} has no known figure: no ratio of perplexities")
    shown, elsewhere = "", {}
    for what, ratios in sorted(groups.items(), key=lambda group: -len(group[1])):
        shown = shown or what
        for name, percent in ratios.items():
            figures = contenders.setdefault(name, {})
            if PERPLEXITY not in figures:
                figures[PERPLEXITY] = percent
                elsewhere |= {name: what} if what != shown else {}
    return shown, elsewhere


def describe(path: Path, result: dict) -> str:
    """The artifact, the machine and the date, as far as the results have them."""
    machine = result["machine"] if isinstance(result.get("machine"), dict) else {}
    flags = machine["flags"] if isinstance(machine.get("flags"), dict) else {}
    bandwidth = number(result.get("bandwidth_gb_s"), f"{path}: bandwidth_gb_s")
    parts = [
        ("{}", result.get("artifact")),
        ("{}", result.get("date") or machine.get("date")),
        ("{}", machine.get("processor")),
        ("{} cores", machine.get("cores")),
        ("with {}", " ".join(flag for flag in flags if flags[flag])),
        ("without {}", " ".join(flag for flag in flags if not flags[flag])),
        ("memory read at {:.3g} GB/s", bandwidth),
        ("load {} before the start", machine.get("load_average")),
        ("{}", str(result.get("llama_cpp") or "").partition(": ")[0]),
    ]
    return "; ".join(text.format(value) for text, value in parts if value not in (None, ""))


def collect(results: Path, quality: list[Path]) -> Plot:
    """All that the picture shows. Errors: BenchmarkError for a file that is no result."""
    result = read(results)
    contenders = read_speed(results, result)
    shown, elsewhere = add_quality(contenders, quality)
    # Those of the quality files alone came last.
    ours = [name for name in contenders if name.startswith("tokenloop")]
    contenders = {name: contenders[name] for name in (*ours, *contenders)}

    repeats = result.get("repeats")
    legend = f"Bars: medians of {repeats} rounds" if repeats else "Bars: medians"
    if any(figures.get("ranges") for figures in contenders.values()):
        legend += "; lines: least to most"
    if any(figures.get(CEILING) for figures in contenders.values()):
        legend += "; ceiling: bandwidth / weights read per token"
    if shown:
        others = "".join(f"; * {name}: {what}" for name, what in elsewhere.items())
        legend += f". Perplexity: {shown}{others}"
    return Plot(contenders, [legend + ".", describe(results, result)], elsewhere)


def number_text(key: str, value: float | None) -> str:
    """Three digits, or more before the point."""
    if value is None:
        return "n/a"
    sign, unit = ("+", " %") if key == PERPLEXITY else ("", "")
    digits = 0 if abs(value) >= 99.95 else 1 if abs(value) >= 9.995 else 2
    return f"{value:{sign},.{digits}f}{unit}"


def colours_of(names: list[str]) -> dict[str, str]:
    """Strong ones for tokenloop's, pale ones for peers."""
    ours, peers = itertools.cycle(OURS), itertools.cycle(PEERS)
    return {name: next(ours if name.startswith("tokenloop") else peers) for name in names}


@contextmanager
def own_style():
    """matplotlib's own settings, whatever the user's are. DejaVu Sans comes with it."""
    import matplotlib.style

    with matplotlib.style.context("default"), matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        yield


def draw(plot: Plot):
    """The picture: a matplotlib Figure for Agg, its axes labelled with their figure's key."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with own_style():
        figure = Figure(dpi=DPI, facecolor="white")
        FigureCanvasAgg(figure)
        compose(figure, plot)
        return figure


def wrap_name(name: str) -> str:
    """The engine on a line of its own, its model below."""
    engine, _, rest = name.partition(" ")
    return "\n".join((*textwrap.wrap(engine, 22), *textwrap.wrap(rest, 22)))


def inches(text) -> float:
    """How wide a text is on its figure."""
    return text.get_window_extent().width / DPI


def compose(figure, plot: Plot) -> None:
    """Lay the panels out in rows, the names on their left and the caption below."""
    names = list(plot.contenders)
    panels = [
        panel
        for panel in PANELS
        if any(figures.get(panel[0]) is not None for figures in plot.contenders.values())
    ]
    caption = [line for text in plot.caption for line in textwrap.wrap(text, 165)]
    wrapped = [wrap_name(name) for name in names]
    # Two lines of a name fit into a row.
    rows = [ROW + LINE * max(0, text.count("\n") - 1) for text in wrapped]
    centres = [sum(rows[:n]) + row / 2 for n, row in enumerate(rows)]
    bars = sum(rows)
    pitch = HEAD + bars + GAP
    lines = math.ceil(len(panels) / COLUMNS)
    height = MARGIN + lines * pitch + LINE * len(caption) + MARGIN
    figure.set_size_inches(WIDTH, height)

    def write(x: float, y: float, text: str, **style):
        """Text at inches from the figure's upper left."""
        style = {"color": INK, "fontsize": 7.5, "parse_math": False, **style}
        return figure.text(x / WIDTH, 1 - y / height, text, **style)

    # 1. The widest name sets the left margin.
    written = []
    for line, (text, centre) in itertools.product(range(lines), zip(wrapped, centres)):
        y = MARGIN + line * pitch + HEAD + centre
        weight = "bold" if text.startswith("tokenloop") else "normal"
        style = {"ha": "right", "va": "center", "fontweight": weight, "linespacing": 1.1}
        written.append(write(0, y, text, **style))
    left = MARGIN + max(map(inches, written))
    for text in written:
        text.set_x(left / WIDTH)
    left += 0.08

    # 2. One panel for each figure.
    width = (WIDTH - left - MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
    scales: dict[str, list] = {}
    for n, (key, title, scale) in enumerate(panels):
        x, y = left + n % COLUMNS * (width + GAP), MARGIN + n // COLUMNS * pitch
        unit, more = "increase, ", False
        if key in FIGURES:
            text, more = FIGURES[key]
            unit = text.rpartition(", ")[2] + ", "
        write(x, y, title, fontsize=8.5, fontweight="bold", va="top")
        unit += "higher is better" if more else "lower is better"
        write(x, y + 0.17, unit, fontsize=7, color=GREY, va="top")
        box = (x / WIDTH, 1 - (y + HEAD + bars) / height, width / WIDTH, bars / height)
        axes = figure.add_axes(box, label=key, ylim=(bars, 0))
        axes.set_axis_off()
        labels = draw_bars(axes, key, plot, dict(zip(names, centres)))
        scales.setdefault(scale, []).append((axes, labels))

    # 3. Scales on which every label has room, on either side of a tick.
    for shared in scales.values():
        labels = [label for _, labels in shared for label in labels]
        low = min(0, *(bar.get_width() for axes, _ in shared for bar in axes.patches))
        per_inch = max(
            (end - low) / (width - 2 * PAD - inches(text)) for text, *ends in labels for end in ends
        )
        per_inch = per_inch or 1 / width
        for axes, labels in shared:
            axes.set_xlim(low, low + per_inch * width)
            for text, end, tick in labels:
                reach = end + per_inch * (inches(text) + 2 * PAD)
                text.set_x((tick if end <= tick < reach else end) + per_inch * PAD)

    for n, line in enumerate(reversed(caption)):
        y = height - MARGIN - n * LINE
        write(MARGIN, y, line, fontsize=7, color=GREY, va="bottom")


def draw_bars(axes, key: str, plot: Plot, centres: dict[str, float]) -> list[tuple]:
    """A bar for each contender; for each a label yet to be placed, where bar and range end, and
    where its ceiling is (or that end again). Vertically the axes' unit is the inch."""
    colours, labels, ceilings = colours_of(list(centres)), [], []
    for name, y in centres.items():
        figures, ours = plot.contenders[name], name.startswith("tokenloop")
        value = figures.get(key)
        star = "*" if key == PERPLEXITY and name in plot.elsewhere else ""
        style = {"fontweight": "bold" if ours else "normal", "color": INK}
        if value is None:
            style = {"color": GREY}
        label = axes.text(0, y, number_text(key, value) + star, fontsize=7.5, va="center", **style)
        end = max(value or 0.0, 0.0)
        tick = figures.get(CEILING) if key == "decode_tok_s" and value is not None else None
        if value is not None:
            axes.barh(y, value, height=BAR, color=colours[name])
        if value is not None and key in figures.get("ranges", {}):
            low, high = figures["ranges"][key]
            axes.plot((low, high), (y, y), color=INK, linewidth=0.8, solid_capstyle="butt")
            end = max(end, high)
        if tick is not None:
            axes.plot((tick, tick), (y - 0.6 * BAR, y + 0.6 * BAR), color=RED, linewidth=1.4)
            ceilings.append((tick, y - 0.65 * BAR))
        labels.append((label, end, end if tick is None else tick))
    for x, y in ceilings[:1]:
        axes.text(x, y, "ceiling", ha="center", va="bottom", fontsize=6.5, color=RED)
    axes.axvline(0, color=GREY, linewidth=0.8)
    return labels


def save(figure, output: Path) -> None:
    """Write the PNG, whole or not at all. Errors: BenchmarkError where it cannot be."""
    buffer = BytesIO()
    with own_style():
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    part = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        part.write_bytes(buffer.getvalue())
        part.replace(output)
    except OSError as error:
        raise BenchmarkError(f"--output {output}: {error.strerror}") from None
    finally:
        with suppress(OSError):
            part.unlink()


def main() -> int:
    options = parse_arguments()
    try:
        save(draw(collect(options.results, options.quality)), options.output)
    except ModuleNotFoundError as error:
        hint = f'{error.name} is not installed; get it with: pip install -e ".[test]"'
        print(f"python -m benchmarks.plot: error: {hint}", file=sys.stderr)
        return 2
    except BenchmarkError as error:
        print(f"python -m benchmarks.plot: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(options.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
