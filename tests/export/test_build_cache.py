"""What exports keep between them: computed once, and again where anything it comes from differs."""

import pickle
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
        return {"bytes": b"\0" * 100, "arguments": arguments}

    compute.calls = []
    return compute


def result_of(function, *arguments, processor=""):
    file = build_cache.place(function, arguments, processor)
    return pickle.loads(build_cache.result_of(function, arguments, file))


def test_without_a_directory_nothing_is_kept(compute, monkeypatch):
    for value in (None, ""):
        monkeypatch.delenv("TOKENLOOP_CACHE", raising=False)
        if value is not None:
            monkeypatch.setenv("TOKENLOOP_CACHE", value)
        assert build_cache.place(compute, (1,), "") is None
        assert result_of(compute, 1) == {"bytes": b"\0" * 100, "arguments": (1,)}
    assert compute.calls == [(1,), (1,)]


def test_a_result_is_computed_once(sources, compute):
    results = [result_of(compute, 1, "cpu") for _ in range(3)]
    assert compute.calls == [(1, "cpu")]
    assert results == [{"bytes": b"\0" * 100, "arguments": (1, "cpu")}] * 3


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
        assert result_of(compute, 1) == {"bytes": b"\0" * 100, "arguments": (1,)}
    file = build_cache.place(compute, (1,), "")
    assert not list(file.parent.glob("*.pickle")) + list(file.parent.glob("*.tmp"))
    assert result_of(compute, 1) == {"bytes": b"\0" * 100, "arguments": (1,)}
    assert len(compute.calls) == 2


def test_a_directory_that_cannot_be_is_named(compute, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOKENLOOP_CACHE", str(tmp_path / "file"))
    with pytest.raises(ExportError, match=f"TOKENLOOP_CACHE: cannot make {tmp_path}/file: "):
        build_cache.place(compute, (1,), "")
