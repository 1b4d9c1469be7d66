"""What `pip install .` gives: one package, `tokenloop`, that exports and runs where there is no
checkout."""

import json
import subprocess
import sys
import venv
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]
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


@pytest.fixture
def run(shared, tmp_path):
    """A function that runs a command in an empty directory, and gives its standard output. Of the
    environment's variables it has none, so that no PYTHONPATH leads to a checkout."""

    def run(*command) -> str:
        command = [str(part) for part in command]
        variables = {"LANG": "C.UTF-8", "TOKENLOOP_CACHE": str(shared / "cache")}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def test_the_wheel_has_every_file_of_the_package_under_one_name(wheel, sources):
    with ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == {f"tokenloop/{name}" for name in sources}
    assert "tokenloop/export/pte/calibration.txt" in names


def test_its_commands_export_and_run_in_another_directory(
    environment, run, tiny_checkpoint, tmp_path
):
    # 1. Nothing of it is the checkout's.
    where = run(environment / "python", "-c", WHERE).splitlines()
    assert [Path(path).name for path in where] == list(ROOMS)
    assert all(Path(path).is_relative_to(environment.parent) for path in where)
    # 2. The default recipe, which is calibrated with a text of the package.
    tokenloop = environment / "tokenloop"
    said = run(tokenloop, "export", "--model", tiny_checkpoint)
    artifact = tmp_path / "artifacts/gemma3-xnnpack"
    assert said.startswith("artifacts/gemma3-xnnpack: ")
    assert json.loads((artifact / "manifest.json").read_text())["quant"] == "8da8w"
    # 3. The same text as this environment's package makes of it.
    flags = ["--stats", "--json", "--max-new-tokens", 32, "The capital of France is"]
    answer = json.loads(run(tokenloop, "run", *flags))
    assert answer["finish_reason"] == "length" and len(answer["token_ids"]) == 32
    script = ROOT / "runner/run.py"
    again = json.loads(run(sys.executable, script, "--artifact", artifact, *flags))
    assert again["text"] == answer["text"]
    # 4. Every variant of the loop.
    table = run(tokenloop, "compare", "--max-new-tokens", 8).splitlines()
    assert len(table) > 2 and all(row.endswith("identical") for row in table[1:])
