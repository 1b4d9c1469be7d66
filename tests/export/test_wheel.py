"""What `pip install .` gives: one package, `tokenloop`, that exports and runs where there is no
checkout."""

import json
import re
import subprocess
import sys
import venv
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = "export", "models", "runner", "sampler"
# Prints where the package's rooms are.
WHERE = f"""
from importlib import import_module
print(*(import_module(f"tokenloop.{{room}}").__path__[0] for room in {ROOMS}), sep="\\n")
"""


@pytest.fixture(scope="module")
def sources() -> set[str]:
    """The files of the package's folders, as Git lists them or would."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return {name for name in done.stdout.splitlines() if (ROOT / name).exists()}
    files = (path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file())
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory) -> Path:
    """The wheel of a copy of what pyproject.toml names, so that nothing built is left here."""
    copy = tmp_path_factory.mktemp("source")
    for name in {"pyproject.toml", "README.md", "LICENSE", *sources}:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((ROOT / name).read_bytes())
    directory = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", directory, copy)
    (path,) = directory.iterdir()
    return path


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Path:
    """The programs' directory of a new virtual environment with the wheel. What the package needs
    is this environment's own, which it sees behind its own: without the .pth files there, by one of
    which a checkout may be installed."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, symlinks=True)
    programs = directory / "bin"
    pip("--python", programs / "python", "install", "--no-deps", wheel)
    (packages,) = directory.glob("lib/python*/site-packages")
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(others))
    return programs


def pip(*arguments) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where the commands run: not the checkout."""
    return tmp_path_factory.mktemp("elsewhere")


@pytest.fixture(scope="module")
def run(directory):
    """A function that runs a command there, and gives its standard output and standard error. No
    PYTHONPATH leads to a checkout, and no export finds what another one has kept."""

    def run(*command) -> tuple[str, str]:
        command, variables = list(map(str, command)), {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        done = subprocess.run(command, cwd=directory, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return run


@pytest.fixture(scope="module")
def exported(environment, run) -> tuple[str, str]:
    """What `tokenloop export` says when it makes the demo model's artifact."""
    return run(environment / "tokenloop", "export")


def test_the_wheel_has_every_file_of_the_package_under_one_name(wheel, sources):
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"tokenloop/{name}" for name in sources}
    assert "tokenloop/export/pte/calibration.txt" in names
    assert "tokenloop/runner/server/page.html" in names


def test_nothing_of_the_installed_package_is_the_checkouts(environment, run):
    where = [Path(path) for path in run(environment / "python", "-c", WHERE)[0].splitlines()]
    assert [path.name for path in where] == list(ROOMS)
    assert all(path.is_relative_to(environment.parent) for path in where)


def test_exporting_twice_gives_the_same_bytes(exported, directory, default_artifact):
    # The other export had a random seed for its hashes, as every Python process has, and may have
    # found its selection methods kept by another.
    said, errors = exported
    assert errors == ""
    assert re.fullmatch(r"artifacts/gemma3-xnnpack: \d+ MB in \d+ s\n", said)
    artifact = directory / "artifacts/gemma3-xnnpack"
    assert hashes(artifact) == hashes(default_artifact)


def hashes(directory: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_the_installed_commands_run_what_they_exported(
    environment, run, run_script, exported, default_artifact, tmp_path
):
    prompt = "The capital of France is"
    flags = "--json", "--stats", "--max-new-tokens", 32, prompt
    answer, stats = run(environment / "tokenloop", "run", *flags)
    checkouts = run_script("runner/run.py", "--artifact", default_artifact, *flags, cwd=tmp_path)
    ids = json.loads(answer)["token_ids"]
    assert ids == json.loads(checkouts.stdout)["token_ids"] and len(ids) == 32
    assert stats.startswith("load ") and "host to device      1 copies, 48 bytes" in stats
    table, errors = run(environment / "tokenloop", "compare", "--max-new-tokens", 4, prompt)
    header, *rows = table.splitlines()
    assert (errors, header.split()[0]) == ("", "feed")
    assert rows and all(row.endswith("identical") for row in rows)
