"""The picture of saved results: through the command line, and what the figure holds."""

import json
import os
import resource
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import plot

ROOT = Path(__file__).resolve().parents[2]
OURS, SMALL, PEER = "tokenloop 8da8w", "tokenloop 8da4w", "llama.cpp $model$_q4_0"
SPEEDS = [key for key, _, _ in plot.PANELS if key in plot.FIGURES]


def entry(scale: float = 1.0, **changes) -> dict:
    """A contender of cpu.py; each figure is another number."""
    figures = {key: scale * (n + 1) * 11 for n, key in enumerate(SPEEDS)}
    ranges = {key: [0.9 * value, 1.1 * value] for key, value in figures.items()}
    ceiling = {plot.CEILING: 2.5 * figures["decode_tok_s"]}
    return {**figures, **ceiling, "ranges": ranges, **changes}


def speed(**peers) -> dict:
    machine = {"processor": "Test CPU", "cores": 3, "flags": {"avx2": True, "amx_int8": False}}
    about = {"quant": "8da8w", "machine": machine, "repeats": 7, "bandwidth_gb_s": 32.685}
    return {**entry(), **about, "peers": {SMALL: entry(0.7), PEER: entry(1.3), **peers}}


def quality(ratio: float | None, tokens: int = 1022, quant: str = "8da8w", **peers) -> dict:
    peers = {name: {"ratio": value, "tokens": tokens} for name, value in peers.items()}
    about = {"text": "a.txt", "quant": quant, "peers": peers}
    return {"ratio": ratio, "tokens": tokens, **about}


@pytest.fixture
def save(tmp_path):
    """A function that writes results files, and gives their paths."""

    def save(*results) -> list:
        paths = [tmp_path / f"{n}.json" for n in range(len(results))]
        for path, result in zip(paths, results):
            text = result if isinstance(result, str) else json.dumps(result)
            path.write_text(text, encoding="latin-1")
        return paths

    return save


@pytest.fixture
def figure(save):
    """A function that draws results, the quality files after those of cpu.py."""

    def figure(*results):
        paths = save(*results)
        return plot.draw(plot.collect(paths[0], paths[1:]))

    return figure


@pytest.fixture
def run(tmp_path):
    """A function that runs benchmarks/plot.py from another directory than the project's."""

    def run(*arguments, **options) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "benchmarks.plot", *map(str, arguments)]
        options |= {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}}
        return subprocess.run(command, capture_output=True, text=True, **options)

    return run


def bars(figure, key: str) -> list[tuple]:
    """The panel's bars from above: width and colour."""
    (axes,) = [axes for axes in figure.axes if axes.get_label() == key]
    found = sorted(axes.patches, key=lambda bar: bar.get_y())
    return [(bar.get_width(), bar.get_facecolor()) for bar in found]


def labels(figure, key: str) -> list[str]:
    """The texts at the panel's bars, from above."""
    (axes,) = [axes for axes in figure.axes if axes.get_label() == key]
    texts = sorted(axes.texts, key=lambda text: text.get_position()[1])
    return [text.get_text() for text in texts if text.get_text() != "ceiling"]


def caption(figure) -> str:
    lines = [
        text for text in figure.texts if text.get_fontsize() == 7 and text.get_va() == "bottom"
    ]
    lines.sort(key=lambda text: -text.get_position()[1])
    return " ".join(text.get_text() for text in lines)


def test_the_committed_results_become_a_png(run, tmp_path):
    done = run("--output", "new.png")
    assert (done.returncode, done.stdout, done.stderr) == (0, "new.png\n", "")
    data = (tmp_path / "new.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 1800 and 400 < height < 4000
    assert [path.name for path in tmp_path.iterdir()] == ["new.png"]


def test_the_same_results_give_the_same_bytes_whatever_matplotlib_is_set_to(run, save, tmp_path):
    paths = save(speed(), quality(1.02, **{PEER: 1.5}))
    flags = ("--results", paths[0], "--quality", paths[1], "--output")
    assert run(*flags, "a.png").returncode == 0
    settings = "font.size: 20\nsavefig.facecolor: black\nsavefig.bbox: tight\ntext.hinting: none\n"
    (tmp_path / "matplotlibrc").write_text(settings + "lines.linewidth: 9\naxes.grid: True\n")
    assert run(*flags, "b.png").returncode == 0
    first = (tmp_path / "a.png").read_bytes()
    assert first == (tmp_path / "b.png").read_bytes()
    paths[0].write_text(json.dumps({**speed(), "decode_tok_s": 34}))
    assert run(*flags, "c.png").returncode == 0
    assert first != (tmp_path / "c.png").read_bytes()


def test_every_contender_and_figure_is_shown_and_ours_come_first(figure):
    drawn = figure(speed(), quality(1.02, **{PEER: 1.5, SMALL: 1.25}))
    texts = [text.get_text() for text in drawn.texts]
    assert [axes.get_label() for axes in drawn.axes] == [key for key, _, _ in plot.PANELS]
    for _, title, _ in plot.PANELS:
        assert texts.count(title) == 1
    for name in (OURS, SMALL, PEER):
        assert texts.count("\n".join(name.split())) == 2  # for each row of panels
    for n, key in enumerate(SPEEDS):
        widths = [width for width, _ in bars(drawn, key)]
        assert widths == pytest.approx([scale * (n + 1) * 11 for scale in (1.0, 0.7, 1.3)])
    assert labels(drawn, "decode_tok_s") == ["33.0", "23.1", "42.9"]
    assert labels(drawn, plot.PERPLEXITY) == ["+2.00 %", "+25.0 %", "+50.0 %"]


def test_a_contender_has_one_colour_of_its_own_in_every_panel(figure):
    peers = {f"peer {n}": entry(n + 2) for n in range(5)}
    drawn = figure(speed(**peers))
    colours = [colour for _, colour in bars(drawn, SPEEDS[0])]
    assert len(set(colours)) == len(colours) == 8
    for key in SPEEDS:
        assert [colour for _, colour in bars(drawn, key)] == colours


def test_units_and_directions_are_those_of_the_benchmark(figure):
    texts = [text.get_text() for text in figure(speed()).texts]
    assert texts.count("tok/s, higher is better") == 3
    assert texts.count("ms per token, lower is better") == 2
    assert "s, lower is better" in texts and "MB, lower is better" in texts


def test_what_a_contender_lacks_is_said_and_not_drawn(figure):
    peer = {**entry(2.0, peak_rss_mb=None), "ranges": None}
    del peer["decode_tok_s"]
    drawn = figure({**speed(), "peers": {PEER: peer}}, quality(None, **{PEER: 0.99}))
    assert (
        labels(drawn, "decode_tok_s") == ["33.0", "n/a"] and len(bars(drawn, "decode_tok_s")) == 1
    )
    assert labels(drawn, "peak_rss_mb")[1] == "n/a" and len(bars(drawn, "peak_rss_mb")) == 1
    assert labels(drawn, plot.PERPLEXITY) == ["n/a", "-1.00 %"]
    assert [width for width, _ in bars(drawn, plot.PERPLEXITY)] == pytest.approx([-1.0])
    assert drawn.axes[-1].get_xlim()[0] <= -0.99


def test_a_figure_that_nobody_has_gets_no_panel(figure):
    drawn = figure({"decode_tok_s": 20})
    assert [axes.get_label() for axes in drawn.axes] == ["decode_tok_s"]
    assert "tokenloop" in [text.get_text() for text in drawn.texts]


@pytest.mark.filterwarnings("error")
def test_zero_is_a_figure(figure):
    assert labels(figure({"decode_tok_s": 0}), "decode_tok_s") == ["0.00"]


def test_the_ceiling_is_marked_where_the_results_have_it(figure):
    drawn = figure(speed(**{"no ceiling": entry(2.0, **{plot.CEILING: None})}))
    (axes,) = [axes for axes in drawn.axes if axes.get_label() == "decode_tok_s"]
    ticks = [line.get_xdata()[0] for line in axes.lines if line.get_color() == plot.RED]
    assert ticks == pytest.approx([82.5, 57.75, 107.25])
    assert [text.get_text() for text in axes.texts].count("ceiling") == 1
    for other in drawn.axes:
        assert other is axes or not any(line.get_color() == plot.RED for line in other.lines)


@pytest.mark.parametrize("ceiling", [3.0, 33.0, 36.4, 38.0, 45.0, 60.0, 4000.0])
@pytest.mark.parametrize("name", ["x", "engine " + 12 * "long-name-"])
def test_all_text_is_inside_and_no_label_is_under_a_tick(figure, ceiling, name):
    results = speed(**{name: entry(0.01), "fast": entry(1000.0)})
    del results["peers"]["fast"]["decode_tok_s"]
    drawn = figure({**results, plot.CEILING: ceiling}, quality(0.9, **{PEER: 2.0}))
    drawn.draw_without_rendering()
    width, height = drawn.canvas.get_width_height()
    for text in drawn.texts:
        box = text.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 and box.y1 <= height, text
    for axes in drawn.axes:
        ticks = [line for line in axes.lines if line.get_color() == plot.RED]
        for text in axes.texts:
            box = text.get_window_extent()
            assert box.x1 <= axes.bbox.x1 + 0.5, text
            for tick in ticks:
                mark = tick.get_window_extent()
                assert not box.overlaps(mark), text


def test_panels_of_one_scale_can_be_compared(figure):
    drawn = {axes.get_label(): axes.get_xlim() for axes in figure(speed()).axes}
    assert drawn["prefill_tok_s"] == drawn["prefill_512_tok_s"]
    assert drawn["decode_ms_at_100"] == drawn["decode_ms_at_2000"]
    assert drawn["prefill_tok_s"] != drawn["decode_tok_s"]


def test_quality_of_another_artifact_finds_its_peer_and_other_texts_are_marked(figure):
    whole, half = quality(1.2, 4640, "8da4w"), quality(1.01, **{PEER: 1.5, "b": 1.0})
    drawn = figure(speed(), quality(1.02, 4640), whole, half)
    # The file with the most contenders comes first.
    assert labels(drawn, plot.PERPLEXITY) == ["+1.00 %", "+20.0 %*", "+50.0 %", "+0.00 %"]
    text = f"Perplexity: 1,022 tokens of a.txt; * {SMALL}: 4,640 tokens of a.txt"
    assert text in caption(drawn)


def test_a_contender_of_the_quality_files_alone_is_shown(figure):
    drawn = figure({"decode_tok_s": 20, "peers": {"b": {}}}, quality(1.02, quant="fp32", c=1.5))
    assert labels(drawn, plot.PERPLEXITY) == ["n/a", "+2.00 %", "n/a", "+50.0 %"]
    assert labels(drawn, "decode_tok_s") == ["20.0", "n/a", "n/a", "n/a"]


def test_the_caption_says_what_the_results_say_and_no_more(figure):
    said = caption(figure({**speed(), "date": "2001-02-03", "artifact": "an-artifact"}))
    for part in ("an-artifact", "2001-02-03", "Test CPU; 3 cores; with avx2; without amx_int8"):
        assert part in said
    assert "7 rounds" in said and "32.7 GB/s" in said
    assert caption(figure({"decode_tok_s": 20})) == "Bars: medians."


MISTAKES = {
    "missing": (None, "0.json: No such file or directory"),
    "not JSON": ("{", "0.json is not JSON"),
    "not text": ("\xff", "0.json is not JSON"),
    "a list": ("[]", "0.json is no result of a benchmark"),
    "peers a list": ({"decode_tok_s": 1, "peers": []}, "no result of a benchmark"),
    "a peer a number": ({"decode_tok_s": 1, "peers": {"b": 5}}, "'b' is 5, not an object"),
    "nothing known": ({"speed": 1}, "0.json has no known figure"),
    "only nulls": ({"decode_tok_s": None}, "0.json has no known figure"),
    "words": ({"decode_tok_s": "fast"}, "decode_tok_s of 'tokenloop' is 'fast', not a number"),
    "NaN": ({"decode_tok_s": float("nan")}, "is nan, not a number"),
    "negative": ({"decode_tok_s": -1}, "is -1, not a number"),
    "huge": ({"decode_tok_s": 10**400}, "not a number"),
    "no ranges": ({"decode_tok_s": 1, "ranges": {"decode_tok_s": [1]}}, "are not pairs"),
    "twice": ({**speed(), "peers": {OURS: {}}}, f"two contenders called '{OURS}'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_and_leaves_the_old_picture(run, save, tmp_path, mistake):
    content, message = MISTAKES[mistake]
    (path,) = [tmp_path / "0.json"] if content is None else save(content)
    (tmp_path / "old.png").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    done = run("--results", path, "--quality", "--output", "old.png")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("python -m benchmarks.plot: error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "old.png").read_bytes() == b"old" and sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "content, message",
    [({"decode_tok_s": 1}, "no ratio"), ({"ratio": "x"}, "ratio of 'tokenloop' is 'x'")],
    ids=["cpu.json", "words"],
)
def test_a_quality_file_that_is_none_is_named(run, save, tmp_path, content, message):
    results, other = save(speed(), content)
    done = run("--results", results, "--quality", other, "--output", "new.png")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "1.json" in done.stderr and message in done.stderr
    assert not (tmp_path / "new.png").exists()


@pytest.mark.parametrize("output", ["none/new.png", "0.json/new.png", "taken.png"])
def test_an_output_that_cannot_be_is_refused(run, save, tmp_path, output):
    (path,) = save(speed())
    (tmp_path / "taken.png").mkdir()
    before = sorted(tmp_path.iterdir())
    done = run("--results", path, "--quality", "--output", output)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith(f"python -m benchmarks.plot: error: --output {output}: ")
    assert sorted(tmp_path.iterdir()) == before


def test_a_picture_that_does_not_fit_on_the_disk_leaves_the_old_one(run, save, tmp_path):
    (path,) = save(speed())
    (tmp_path / "old.png").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))  # noqa: E731
    done = run("--results", path, "--quality", "--output", "old.png", preexec_fn=limit)
    assert done.returncode == 2 and "error: --output old.png: File too large" in done.stderr
    assert (tmp_path / "old.png").read_bytes() == b"old" and sorted(tmp_path.iterdir()) == before


def test_only_a_png_is_written(run, tmp_path):
    done = run("--output", "new.svg")
    assert done.returncode == 2 and "--output is new.svg; its name must end in .png" in done.stderr
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_how_to_get_it(run, save, tmp_path):
    (path,) = save(speed())
    stub = "raise ModuleNotFoundError('none', name='matplotlib')"
    (tmp_path / "matplotlib.py").write_text(stub)
    done = run("--results", path, "--quality", "--output", "new.png")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert 'matplotlib is not installed; get it with: pip install -e ".[test]"' in done.stderr
    assert not (tmp_path / "new.png").exists()
