"""What exports keep between them: computed once, and again where anything it comes from differs."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tokenloop.export import build_cache
from tokenloop.export.errors import ExportError


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """A directory with the sources of a small project, and a cache beside it."""
    for name in build_cache.SOURCES:
        (tmp_path / "project" / name).mkdir(parents=True)
        (tmp_path / "project" / name / "code.py").write_text("x = 1\n")
    monkeypatch.setattr(build_cache, "ROOT", tmp_path / "project")
    monkeypatch.setenv("TOKENLOOP_CACHE", str(tmp_path / "cache" / "of exports"))
    return tmp_path / "project"


@pytest.fixture
def compute():
    """A function that adds to its own list of calls."""

    def compute(*arguments):
        compute.calls.append(arguments)
        return {"bytes": b"\0" * 100, "of": {"arguments": repr(arguments).encode()}}

    compute.calls = []
    return compute


def result_of(function, *arguments, processor=""):
    file = build_cache.place(function, arguments, processor)
    return build_cache.unpack(build_cache.result_of(function, arguments, file))


def result(*arguments) -> dict:
    return {"bytes": b"\0" * 100, "of": {"arguments": repr(arguments).encode()}}


def test_without_a_directory_nothing_is_kept(compute, monkeypatch):
    for value in (None, ""):
        monkeypatch.delenv("TOKENLOOP_CACHE", raising=False)
        if value is not None:
            monkeypatch.setenv("TOKENLOOP_CACHE", value)
        assert build_cache.place(compute, (1,), "") is None
        assert result_of(compute, 1) == result(1)
    assert compute.calls == [(1,), (1,)]


def test_a_result_is_computed_once(sources, compute):
    results = [result_of(compute, 1, "cpu") for _ in range(3)]
    assert compute.calls == [(1, "cpu")]
    assert results == [result(1, "cpu")] * 3


@pytest.mark.parametrize("changed", build_cache.SOURCES)
def test_a_changed_source_makes_it_another_result(sources, compute, changed):
    result_of(compute, 1)
    (sources / changed / "code.py").write_text("x = 2\n")
    result_of(compute, 1)
    assert compute.calls == [(1,), (1,)]


def test_arguments_processors_compilers_and_versions_make_it_another_result(
    sources, compute, monkeypatch
):
    result_of(compute, 1)
    result_of(compute, 2)
    result_of(compute, 1, processor="AVX512")
    monkeypatch.setenv("CXX", "another-compiler")
    result_of(compute, 1)
    monkeypatch.setattr(build_cache, "installed_version", lambda package: "0.0")
    result_of(compute, 1)
    assert len(compute.calls) == 5


def test_exports_that_want_the_same_at_once_wait_for_one(sources, compute):
    file = build_cache.place(compute, (1,), "")
    with ThreadPoolExecutor(4) as pool:
        jobs = [pool.submit(build_cache.result_of, compute, (1,), file) for _ in range(8)]
    assert len({job.result() for job in jobs}) == 1
    assert compute.calls == [(1,)]


def test_a_full_disk_keeps_nothing_and_harms_nothing(sources, compute, monkeypatch):
    def fail(self, data):
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", fail)
        assert result_of(compute, 1) == result(1)
    file = build_cache.place(compute, (1,), "")
    assert not list(file.parent.glob("*.zip")) + list(file.parent.glob("*.tmp"))
    assert result_of(compute, 1) == result(1)
    assert len(compute.calls) == 2


def test_a_directory_that_cannot_be_is_named(compute, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENLOOP_CACHE", str(tmp_path / "file"))
    with pytest.raises(ExportError, match=f"TOKENLOOP_CACHE: cannot make {tmp_path}/file: "):
        build_cache.place(compute, (1,), "")


def the_file(compute) -> Path:
    """What is kept of compute(1)."""
    result_of(compute, 1)
    (file,) = build_cache.place(compute, (1,), "").parent.glob("*.zip")
    return file


def test_what_is_kept_is_the_users_alone(sources, compute):
    old = os.umask(0)
    try:
        file = the_file(compute)
    finally:
        os.umask(old)
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_a_directory_that_others_may_write_is_not_used(sources, compute, capsys, mode):
    directory = the_file(compute).parent
    directory.chmod(mode)
    assert result_of(compute, 1) == result(1)
    assert len(compute.calls) == 2
    error = capsys.readouterr().err
    assert error == (
        f"TOKENLOOP_CACHE: {directory} may be written by others (mode {mode:o}; try chmod go-w): "
        "it is not used\n"
    )


@pytest.mark.parametrize("place", ["directory", "file"])
def test_what_belongs_to_another_is_not_read(sources, compute, capsys, monkeypatch, place):
    file = the_file(compute)
    other = file if place == "file" else file.parent
    lstat = Path.lstat

    def others(self):
        status = lstat(self)
        if self != other:
            return status
        return os.stat_result([*status[:4], status.st_uid + 1, *status[5:]])

    monkeypatch.setattr(Path, "lstat", others)
    assert result_of(compute, 1) == result(1)
    assert len(compute.calls) == 2
    user, end = os.geteuid(), "made again" if place == "file" else "not used"
    line = f"TOKENLOOP_CACHE: {other} belongs to user {user + 1}, not to {user}: it is {end}\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("harm", ["flipped", "cut", "empty", "link", "writable", "pickle"])
def test_a_file_that_is_not_as_it_was_kept_is_made_again(sources, compute, capsys, tmp_path, harm):
    file = the_file(compute)
    data = file.read_bytes()
    if harm == "flipped":
        file.write_bytes(data[:-30] + bytes([data[-30] ^ 1]) + data[-29:])
    elif harm in ("cut", "empty"):
        file.write_bytes(data[: 50 if harm == "cut" else 0])
    elif harm == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    elif harm == "writable":
        file.chmod(0o622)
    else:
        # It would end the process if it were read as one.
        file.write_bytes(b"cposix\n_exit\n(I7\ntR.")
    assert result_of(compute, 1) == result(1)
    assert len(compute.calls) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"TOKENLOOP_CACHE: {file} ") and error.endswith("it is made again\n")
    assert file.read_bytes() == data and not file.is_symlink()
    assert result_of(compute, 1) == result(1)
    assert len(compute.calls) == 2


def test_what_is_kept_comes_back_as_it_was():
    files = {"a": b"", "b": {"c": b"1" * 1000, "d.so": b"\x7fELF"}, "ü": b"x"}
    assert build_cache.unpack(build_cache.pack(files)) == files
    assert build_cache.pack(files) == build_cache.pack(files)
