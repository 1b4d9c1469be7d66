"""A directory that appears whole or not at all, beside killed processes and others that live."""

import errno
import json
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.kill_exports import Exports
from tokenloop.export import artifact, new_directory
from tokenloop.export.errors import ExportError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["exchanged", "renamed twice"])
def way(request, monkeypatch):
    """Both ways to replace a directory: at once, and where the system cannot do that."""
    if request.param == "renamed twice":
        monkeypatch.setattr(new_directory, "exchange", lambda first, second: False)
    return request.param


def fill(directory: Path, text: str) -> None:
    for name in ("model", "manifest.json"):
        (directory / name).write_text(text)


def texts(directory: Path) -> set[str]:
    return {path.read_text() for path in directory.iterdir()}


def leave(parent: Path, name: str, text: str = "half") -> Path:
    """What a killed process leaves."""
    (parent / name).mkdir(parents=True)
    (parent / name / "model").write_text(text)
    return parent / name


def names(parent: Path) -> list[str]:
    return sorted(path.name for path in parent.iterdir())


def test_an_artifact_replaces_the_one_before_it(way, tmp_path):
    for text in ("old", "new"):
        with artifact.new_artifact(tmp_path / "artifact") as directory:
            fill(directory, text)
    assert texts(tmp_path / "artifact") == {"new"}
    assert names(tmp_path) == ["artifact"]


def test_what_killed_exports_left_is_removed(tmp_path):
    for name in ("artifact-abcdefg1.unfinished", "other-a_cdefgh.unfinished", "a-abcdefgh.removed"):
        leave(tmp_path, f".{name}")
    with artifact.new_artifact(tmp_path / "artifact") as directory:
        assert names(tmp_path) == [directory.name]
        fill(directory, "new")
    assert names(tmp_path) == ["artifact"]


@pytest.mark.parametrize(
    "name", [".artifact-backup", ".artifact-abcdefgh", "a.unfinished", ".a-ABCDEFGH.unfinished"]
)
def test_a_name_that_is_not_of_the_scheme_is_left_alone(tmp_path, name):
    leave(tmp_path, name)
    with artifact.new_artifact(tmp_path / "artifact") as directory:
        fill(directory, "new")
    assert names(tmp_path) == sorted(["artifact", name])


def test_files_and_links_are_left_alone(tmp_path):
    mine = leave(tmp_path / "mine", "precious")
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/.a-abcdefgh.unfinished").symlink_to(mine)
    (tmp_path / "artifacts/.b-abcdefgh.replaced").symlink_to(mine)
    (tmp_path / "artifacts/.c-abcdefgh.unfinished").write_text("a file")
    before = names(tmp_path / "artifacts")
    with artifact.new_artifact(tmp_path / "artifacts/artifact") as directory:
        fill(directory, "new")
    assert names(tmp_path / "artifacts") == sorted([*before, "artifact"])
    assert texts(mine) == {"half"}


def test_a_directory_that_is_being_filled_stays(way, tmp_path):
    with artifact.new_artifact(tmp_path / "artifact") as first:
        fill(first, "first")
        with artifact.new_artifact(tmp_path / "artifact") as second:
            fill(second, "second")
        assert texts(tmp_path / "artifact") == {"second"}
        assert texts(first) == {"first"}
    assert texts(tmp_path / "artifact") == {"first"}
    assert names(tmp_path) == ["artifact"]


def test_what_was_moved_away_by_a_killed_process_is_put_back(tmp_path):
    leave(tmp_path, ".artifact-abcdefgh.replaced", "old")
    leave(tmp_path, ".artifact-abcdefgh.unfinished", "new")
    with (
        pytest.raises(ValueError),
        artifact.new_artifact(tmp_path / "other") as directory,
    ):
        assert names(tmp_path) == sorted([directory.name, "artifact"])
        raise ValueError
    assert texts(tmp_path / "artifact") == {"old"}


def test_what_was_moved_away_is_removed_where_something_took_its_place(tmp_path):
    leave(tmp_path, ".artifact-abcdefgh.replaced", "old")
    leave(tmp_path, "artifact", "new")
    new_directory.clear(tmp_path)
    assert names(tmp_path) == ["artifact"]
    assert texts(tmp_path / "artifact") == {"new"}


def test_what_a_living_process_moved_away_is_not_put_back(tmp_path, monkeypatch):
    """It would be in the way of what takes its place."""
    fill(leave(tmp_path, "artifact"), "old")
    monkeypatch.setattr(new_directory, "exchange", lambda first, second: False)
    rename, between = Path.rename, []

    def rename_and_look(self, target):
        rename(self, target)
        if target.suffix == new_directory.REPLACED:
            new_directory.clear(tmp_path)
            between.append((tmp_path / "artifact").exists())

    monkeypatch.setattr(Path, "rename", rename_and_look)
    with artifact.new_artifact(tmp_path / "artifact") as directory:
        fill(directory, "new")
    assert between == [False]
    assert texts(tmp_path / "artifact") == {"new"}


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, OSError(28, "disk full")])
def test_an_exception_keeps_what_was_there(way, tmp_path, failure):
    fill(leave(tmp_path, "artifact"), "old")
    with (
        pytest.raises((ValueError, KeyboardInterrupt)),
        artifact.new_artifact(tmp_path / "artifact") as directory,
    ):
        fill(directory, "new")
        raise failure
    assert texts(tmp_path / "artifact") == {"old"}
    assert names(tmp_path) == ["artifact"]


@pytest.mark.parametrize("exists", [True, False])
def test_a_link_is_followed_and_stays_a_link(way, tmp_path, exists):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    if exists:
        fill(leave(tmp_path, "real"), "old")
    with artifact.new_artifact(tmp_path / "link") as directory:
        fill(directory, "new")
    assert (tmp_path / "link").is_symlink()
    assert texts(tmp_path / "real") == {"new"}
    assert names(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC, errno.EACCES])
def test_a_failure_of_the_last_step_keeps_what_was_there(way, tmp_path, monkeypatch, code):
    fill(leave(tmp_path, "artifact"), "old")

    def fail(self, target):
        if (self / "manifest.json").read_text() == "new":
            raise OSError(code, os.strerror(code))
        return rename(self, target)

    rename = Path.rename
    monkeypatch.setattr(Path, "rename", fail)
    with (
        pytest.raises(ExportError, match=f"cannot write .*artifact: {os.strerror(code)}; "),
        artifact.new_artifact(tmp_path / "artifact") as directory,
    ):
        fill(directory, "new")
    assert texts(tmp_path / "artifact") == {"old"}
    assert names(tmp_path) == ["artifact"]


def test_what_came_to_the_output_in_the_meantime_is_kept(tmp_path):
    with (
        pytest.raises(ExportError, match="exists and is not an artifact"),
        artifact.new_artifact(tmp_path / "artifact") as directory,
    ):
        fill(directory, "new")
        leave(tmp_path, "artifact", "somebody's")
    assert texts(tmp_path / "artifact") == {"somebody's"}
    assert names(tmp_path) == ["artifact"]


def test_a_file_system_without_locks_takes_artifacts_and_keeps_what_is_left(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    monkeypatch.setattr(new_directory.fcntl, "flock", flock)
    leave(tmp_path, ".artifact-abcdefgh.unfinished")
    with artifact.new_artifact(tmp_path / "artifact") as directory:
        fill(directory, "new")
    assert names(tmp_path) == [".artifact-abcdefgh.unfinished", "artifact"]


def test_an_output_that_links_to_itself_is_a_users_error(tmp_path):
    (tmp_path / "artifact").symlink_to(tmp_path / "artifact")
    with (
        pytest.raises(ExportError, match="cannot write .*artifact: Too many levels of symbolic"),
        artifact.new_artifact(tmp_path / "artifact"),
    ):
        pass


def test_one_of_several_threads_that_make_an_artifact_wins_whole(way, tmp_path):
    def make(text):
        for _ in range(20):
            with artifact.new_artifact(tmp_path / "artifact") as directory:
                fill(directory, text)

    threads = [threading.Thread(target=make, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(texts(tmp_path / "artifact")) == 1
    assert names(tmp_path) == ["artifact"]


def test_killed_processes_leave_whole_artifacts_and_nothing_beside_them():
    command = [sys.executable, "-m", "tests.kill_exports", "--fillings", "120"]
    command += ["--kills", "0", "--starve", "0", "--pairs", "0", "--seed", "7"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    for name in ("fillings, exchanged", "fillings, renamed twice"):
        assert results[name]["kills"] >= 60
        # Otherwise they were killed when there was nothing to leave.
        assert results[name]["left"] > 0


def test_killed_exports_are_given_all_that_a_program_is_built_of():
    exports = object.__new__(Exports)
    exports.built, exports.build = {}, lambda model, *_: (b"program", ["decode"], [{"place": 1}])
    for _ in range(2):
        program, *others = exports.build_once(SimpleNamespace(max_seq_len=5), "portable", {})
        assert (bytes(program), others) == (b"program", [["decode"], [{"place": 1}]])


def sleep_for_ever(connection) -> dict:
    connection.send(os.getpid())
    threading.Event().wait()
    return {}


def start_and_be_killed(connection) -> None:
    from tokenloop.export.background import Background

    Background("nothing", sleep_for_ever, connection)
    threading.Event().wait()


def test_a_part_in_the_background_ends_when_the_export_is_killed(monkeypatch):
    monkeypatch.delenv("TOKENLOOP_CACHE", raising=False)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    export = context.Process(target=start_and_be_killed, args=(there,))
    export.start()
    there.close()
    assert here.poll(60), "the part in the background has not begun"
    assert here.recv() != export.pid
    export.kill()
    export.join()
    # Nobody has the other end any more.
    assert here.poll(20)
    with pytest.raises(EOFError):
        here.recv()
