"""Real artifacts give the same bytes with the prefix cache and without it, whichever engine runs
them: tests/warm_cold.py, a few prompts of it. And their state can be saved."""

from pathlib import Path

import pytest

from tests.driving import altered, read_manifest
from tests.warm_cold import compare, other_chunks, some_requests
from tokenloop import runner
from tokenloop.runner import Request, RunnerError

TINY = ("--backend", "inductor", "--max-seq-len", 200, "--max-prefill", 7, "--batch", 3)


@pytest.fixture(params=["xnnpack", "portable", "inductor", "hybrid"])
def model(request, batch_artifact, portable_artifact, austen_artifact, export_artifact):
    """With rings in rows: of blocks of XNNPACK's, plain, and of AOTInductor; and a hybrid."""
    tiny = "tiny-inductor-batch", "--model", request.getfixturevalue("tiny_checkpoint"), *TINY
    find = {
        "xnnpack": lambda: batch_artifact,
        "portable": lambda: portable_artifact,
        "inductor": lambda: export_artifact(*tiny),
        "hybrid": lambda: austen_artifact,
    }
    return runner.load(find[request.param]())


def test_warm_and_cold_are_the_same_and_a_file_is_warm(model, tmp_path):
    runs = compare(model, some_requests(model, 14))["runs"]
    assert all(run["differ"] == 0 and run["cached_tokens"] > 0 for run in runs)
    assert any(run["evictions"] for run in runs)
    # A token knows its chunk, so beginnings end where chunks do.
    chunks = other_chunks(model, [[5, 9] * 20, [3 + i * i % 90 for i in range(60)]])
    assert chunks["same_chunks_differ"] == 0 < chunks["other_chunks_differ"]

    assert_a_file_is_warm(model, tmp_path)


def test_a_hybrid_of_xnnpack_is_the_same_warm_and_cold(hybrid_artifact, tmp_path):
    # Its state lies with other strides than those of its shape.
    model = runner.load(hybrid_artifact)
    runs = compare(model, some_requests(model, 14))["runs"]
    assert all(run["differ"] == 0 and run["cached_tokens"] > 0 for run in runs)
    assert_a_file_is_warm(model, tmp_path)


def assert_a_file_is_warm(model: runner.Model, tmp_path: Path) -> None:
    """What is saved of a prompt's beginning gives the bits that computing it gives."""
    prompt = [3 + i * i % 90 for i in range(50)]
    cold = model.generate(Request(prompt, 8, logprobs=3)).run()
    count = model.save(tmp_path / "state", prompt)
    model.keep_prefixes(64)
    assert model.load(tmp_path / "state") == count > 0
    warm = model.generate(Request(prompt, 8, logprobs=3)).run()
    assert warm.cached_tokens == count
    assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)
    model.keep_prefixes(0)


def test_places_that_are_not_the_programs_are_refused(batch_artifact, tmp_path):
    places = read_manifest(batch_artifact)["state_places"]
    for n, (change, text) in enumerate(
        [
            ({"arena": 9}, "arena 9, and the program's arenas have"),
            ({"offset": 10**9}, "at 1000000000 of arena"),
            ({"of": "caches.9.k"}, "state_places[0].of is 'caches.9.k'; it must be"),
            (
                {"shape": [3, 15, 2, 32]},
                "state_places is 15; it must be places of all of caches.0.k",
            ),
            ({"shape": [3, 16, 2]}, "state_places[0].shape is [3, 16, 2]; it must be"),
            ({"stride": [1]}, "state_places[0].stride is [1]; it must be a list of 4"),
            ({"stride": [2**40, 32, 1536, 1]}, "export it again"),
        ]
    ):
        wrong = [places[0] | change, *places[1:]]
        with pytest.raises(RunnerError) as caught:
            runner.load(altered(batch_artifact, tmp_path / str(n), state_places=wrong))
        assert text in str(caught.value)
