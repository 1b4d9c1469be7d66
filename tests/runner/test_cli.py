"""The console command `tokenloop`, as it is installed beside the Python that runs the tests."""

import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

# Runs the command and prints what it has imported of tokenloop and of the slow libraries.
SHOW_IMPORTS = """
import sys
from tokenloop.runner.cli import main
try:
    sys.exit(main())
finally:
    others = {name for name in sys.modules if name.split(".")[0] == "tokenloop"}
    others |= {name.split(".")[0] for name in sys.modules} & {"numpy", "rich", "torch"}
    print(*sorted(others), file=sys.stderr)
"""

# Interrupts the command when it imports a module, or at exit.
INTERRUPT = """
import atexit, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
moment = sys.argv.pop(1)
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(lambda event, about: event == "import" and about[0] == moment and interrupt())
if moment == "exit":
    atexit.register(interrupt)
from tokenloop.runner.cli import main
sys.exit(main())
"""
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tokenloop(tmp_path):
    """A function that runs `tokenloop` with arguments in an empty directory."""

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [Path(sys.executable).with_name("tokenloop"), *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    return run


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_every_command(tokenloop, flag):
    done = tokenloop(flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: tokenloop COMMAND ...\n")
    assert "commands: export, run, compare, serve\n" in done.stdout


def test_the_version_is_the_installed_one(tokenloop):
    done = tokenloop("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"tokenloop {version('tokenloop')}\n"


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ([], "no command is given"),
        (["exprot", "--model", "x"], "exprot is not a command"),
        (["--artifact", "x"], "--artifact is not a command"),
    ],
)
def test_what_is_no_command_is_refused_in_one_line(tokenloop, arguments, fault):
    done = tokenloop(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr == f"tokenloop: error: {fault}; the commands are export, run, compare, serve\n"
    )


def test_closed_streams_are_no_tracebacks(tmp_path):
    command = shlex.quote(str(Path(sys.executable).with_name("tokenloop")))
    for arguments, status in (
        ("--version >&-", 0), ("exprot 2>&-", 2), ("export --model nowhere.gguf <&- >&- 2>&-", 2),
        ("run >&- 2>&-", 2),
    ):  # fmt: skip
        options = {"shell": True, "cwd": tmp_path, "capture_output": True}
        done = subprocess.run(f"{command} {arguments}", **options)
        assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"")


@pytest.mark.parametrize("moment", ["argparse", "rich.console", "torch", "exit"])
def test_ctrl_c_of_an_export_at_any_time_is_one_line_or_none(tmp_path, moment):
    command = [sys.executable, "-c", INTERRUPT, moment, "export", "--model", "nowhere.gguf"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130
    # Of the imports only torch's is part of the export.
    said = {"torch": "interrupted; nothing was written", "exit": "error: nowhere.gguf does not exi"}
    assert done.stderr.startswith(f"tokenloop export: {said[moment]}" if moment in said else "")
    assert done.stderr.count("\n") == (moment in said)


LOST = """
import os, signal, sys
from tokenloop.runner import process
process.end_when_interrupted()
try:
    with process.InterruptsRaised() as interrupts:
        interrupts.check()
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            if sys.argv[1] == "another error":
                raise ImportError("cannot import") from None
        interrupts.check()
except KeyboardInterrupt:
    print("once", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("twice")
"""


@pytest.mark.parametrize("way", ["lost", "another error"])
def test_an_interrupt_counts_whatever_libraries_make_of_it(way):
    done = subprocess.run([sys.executable, "-c", LOST, way], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "once\n", "")


def test_the_two_rooms_have_the_same_process():
    runners, exports = (ROOT / room / "process.py" for room in ("runner", "export"))
    assert runners.read_bytes() == exports.read_bytes()


@pytest.mark.parametrize("command", ["run", "compare"])
def test_a_command_calls_itself_by_the_name_it_was_called_by(tokenloop, command):
    done = tokenloop(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: tokenloop {command} ")
    done = tokenloop(command, "--threads", "0")
    assert done.returncode == 2
    assert done.stderr.endswith(
        f"tokenloop {command}: error: --threads is 0; it must be at least 1\n"
    )
    done = tokenloop(command, "--artifact", "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith(f"tokenloop {command}: error: nowhere is not an artifact")
    assert done.stderr.count("\n") == 1


def test_compare_takes_no_variant(tokenloop):
    done = tokenloop("compare", "--feed", "host")
    assert done.returncode == 2 and "leave out --feed" in done.stderr


def test_export_is_found_by_its_entry_point(tokenloop):
    done = tokenloop("export", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--model" in done.stdout and "--backend" in done.stdout
    done = tokenloop("export", "--model", "nowhere.gguf")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "nowhere.gguf" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "own"),
    [
        (["--help"], set()),
        (
            ["run", "--top-k", "-1"],
            {
                "conversation",
                "errors",
                "json_text",
                "output",
                "prompts",
                "ranks",
                "request",
                "run",
            },
        ),
    ],
)
def test_the_command_imports_no_more_than_it_needs(arguments, own, tmp_path):
    command = [sys.executable, "-c", SHOW_IMPORTS, *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    modules = {"tokenloop", "tokenloop.runner", "tokenloop.runner.cli", "tokenloop.runner.process"}
    modules |= {f"tokenloop.runner.{name}" for name in own}
    assert set(done.stderr.splitlines()[-1].split()) == modules
