"""What the docs point at is there: links, headings, files, flags."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
# A file of this project, in backticks.
FILE = re.compile(r"`((?:benchmarks|docs|export|models|runner|sampler|tests)/[\w./-]+\.\w+)`")
FLAG = re.compile(r"--[a-z][a-z-]+")


def prose(page: Path) -> str:
    """The page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)


def anchors(page: Path) -> set[str]:
    """The headings as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page):
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    missing = [name for name in FILE.findall(prose(page)) if not (ROOT / name).exists()]
    assert not missing


@pytest.mark.parametrize(
    ("script", "page"),
    [("export/gemma.py", "cli.md"), ("runner/run.py", "cli.md"), ("runner/serve.py", "serve.md")],
)
def test_every_flag_is_described(script, page):
    command = [sys.executable, str(ROOT / script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    flags = set(FLAG.findall(done.stdout)) - {"--help"}
    assert len(flags) > 5
    described = set(FLAG.findall((ROOT / "docs" / page).read_text(encoding="utf-8")))
    assert flags <= described


def test_the_test_command_is_the_line_that_ci_runs():
    (command,) = re.findall(r"^python3 -m venv .*pytest.*$", PAGES[0].read_text(), flags=re.M)
    assert command.endswith("-m pytest -q -n 2 --dist loadfile --no-loadscope-reorder")
