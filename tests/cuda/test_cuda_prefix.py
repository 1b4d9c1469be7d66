"""On a GPU prompts with shared beginnings give the same bytes with the prefix cache and without it,
their state can be saved, and log probabilities come from the device."""

import json

import pytest
import torch

from tests.cuda.test_cuda_prefill import NETWORKS
from tests.warm_cold import compare, some_requests
from tokenloop import runner
from tokenloop.runner import Engine, LoopOptions, Request
from tokenloop.runner.logprobs import logprobs_of
from tokenloop.runner.pace import Stall

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(scope="module", params=["qwen3", "gemma3", "hybrid", "gemma4"])
def model(request, export_artifact, tmp_path_factory):
    script, config = NETWORKS[request.param]
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(json.dumps(config))
    artifact = export_artifact(
        f"prefix-{request.param}", "--random-weights", file, "--device", "cuda",
        "--max-seq-len", 2048, "--max-prefill", 512, "--batch", 5, script=script,
    )  # fmt: skip
    loaded = runner.load(artifact)
    loaded.tokenizer.eos_token_ids.clear()
    return loaded


def test_warm_and_cold_are_the_same(model):
    runs = compare(model, some_requests(model, 80))["runs"]
    assert all(run["differ"] == 0 and run["cached_tokens"] > 0 for run in runs)
    assert any(run["evictions"] for run in runs)


def test_a_file_is_warm(model, tmp_path):
    prompt = [3 + i * i % 900 for i in range(1100)]
    cold = model.generate(Request(prompt, 8, logprobs=3)).run()
    assert model.save(tmp_path / "state", prompt) == 1088
    model.keep_prefixes(500)
    assert model.load(tmp_path / "state") == 1088
    warm = model.generate(Request(prompt, 8, logprobs=3)).run()
    model.keep_prefixes(0)
    assert warm.cached_tokens == 1088
    assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)


def test_copies_stay_on_the_device(model):
    prompt = [3 + i * i % 900 for i in range(700)]
    model.keep_prefixes(500)
    copies = []
    for _ in range(2):
        before = model.loop.transfers.snapshot()
        result = model.generate(prompt, 2).run()
        copies.append(model.loop.transfers.since(before))
    model.keep_prefixes(0)
    assert result.cached_tokens == 640
    rows = model.batch
    for found in copies:
        assert found.device_to_host.bytes == 2 * 8 * rows
        assert found.device_to_device.bytes > 0


def test_chunks_between_steps_are_as_long_as_rows_may_stall(model, monkeypatch):
    requests = [
        Request(
            [3 + (n + i * i) % 900 for i in range(400 + 150 * n)], 5,
            temperature=0.9 * (n % 2), seed=n,
        )
        for n in range(6)
    ]  # fmt: skip
    alone = [model.generate(request).run().token_ids for request in requests]
    program, chunks = model.loop.program, []
    prefill = program.prefill_packed

    def noted(chunk):
        chunks.append(sum(len(part.ids) for part in chunk))
        return prefill(chunk)

    monkeypatch.setattr(program, "prefill_packed", noted)
    longest = {}
    for stall_s in (0, None, 1000):
        with (
            Engine(model, max_stall_s=stall_s) as engine,
            engine.submit(Request([5], 1900)) as running,
        ):
            next(running)
            chunks.clear()
            found = [ticket.run().token_ids for ticket in engine.submit_all(requests)]
            assert running.finish_reason is None and found == alone
        longest[stall_s] = max(chunks)
    assert longest[0] == 64 and longest[1000] == 512
    # The device's clock, of steps and chunks: a millisecond or so.
    assert 1e-5 < model.loop._pace.seconds(Stall()) < 1


@pytest.mark.parametrize("graph", [True, False])
def test_log_probabilities_are_those_of_the_logits(model, graph):
    """The first token's and a step's, of rows with other numbers of alternatives."""
    program, begun, steps = model.loop.program, [], {row: [] for row in range(5)}
    device = type(program).logprobs

    def noted(logits, token, wanted):
        readers = device(program, logits, token, wanted)
        torch.cuda.synchronize()
        for row, count in wanted:
            found = logprobs_of(logits[row].cpu().numpy(), int(token[row, 0]), count)
            (begun if len(logits) == 1 else steps[row]).append(found)
        return readers

    program.logprobs = noted
    requests = [Request([5 + n] * (9 + n), 6, logprobs=(0, 5, 20)[n % 3]) for n in range(5)]
    try:
        results = model.generate_batch(requests, LoopOptions(graph=graph)).run()
    finally:
        del program.logprobs
    for row, result in enumerate(results):
        hosts = [begun[row], *steps[row]]
        assert len(result.logprobs) == len(hosts) == 6
        for mine, its in zip(result.logprobs, hosts):
            assert abs(mine.logprob - its.logprob) < 1e-5
            assert [i for i, _ in mine.top] == [i for i, _ in its.top]


def test_plain_rows_do_not_know_of_those_that_ask(model):
    plain = [Request([7 + n] * 40, 12, temperature=0.8, seed=n) for n in range(5)]
    asking = [
        Request(r.prompt, 12, temperature=0.8, seed=r.seed, logprobs=5 if n % 2 else None)
        for n, r in enumerate(plain)
    ]
    expected = [result.token_ids for result in model.generate_batch(plain).run()]
    results = model.generate_batch(asking).run()
    assert [result.token_ids for result in results] == expected
    alone = model.generate(asking[1]).run()
    assert alone.logprobs == results[1].logprobs
    before = model.loop.transfers.snapshot()
    model.generate(Request([7] * 40, 12, logprobs=5)).run()
    copies = model.loop.transfers.since(before)
    assert copies.device_to_host.bytes == 12 * 8 * (model.batch + 1 + 2 * 5)
