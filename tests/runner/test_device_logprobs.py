"""Log probabilities that the device computes are those that the host would, of every row as it is
alone; and they may be read when the logits are long gone."""

import math

import numpy as np
import pytest
import torch

from tests.stateful import stateful_model
from tokenloop.runner import Engine, Request, RunnerError
from tokenloop.runner.engines.device_logprobs import DeviceLogprobs, device_logprobs
from tokenloop.runner.engines.torch_memory import TorchMemory
from tokenloop.runner.logprobs import logprobs_of
from tokenloop.runner.transfers import Transfers


def found_of(logits, tokens, wanted):
    """What is read of a device's logits after they were overwritten."""
    transfers = Transfers(TorchMemory(torch.device("cpu")))
    values, chosen = torch.tensor(logits), torch.tensor(tokens)[:, None]
    readers = DeviceLogprobs(transfers, values, chosen, wanted).readers()
    values.fill_(math.nan)
    chosen.zero_()
    return [read() for read in readers], transfers


def some_logits(rows: int, size: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    logits = draw.normal(0, 4, (rows, size)).astype(np.float32)
    # Many are equal.
    logits[:, :: max(1, size // 7)] = draw.integers(-2, 3, logits[:, :: max(1, size // 7)].shape)
    logits[:, -1] = -0.0
    logits[0, 0] = -math.inf
    return logits


@pytest.mark.parametrize("rows, size", [(1, 3), (3, 259), (5, 1000), (2, 70_000)])
def test_they_are_the_hosts(rows, size):
    logits = some_logits(rows, size)
    tokens = np.random.default_rng(1).integers(0, size, rows)
    wanted = [(row, (0, 5, 20)[row % 3]) for row in range(rows)]
    found, transfers = found_of(logits, tokens, wanted)
    for (row, count), mine in zip(wanted, found):
        expected = logprobs_of(logits[row], tokens[row], count)
        assert mine.logprob == pytest.approx(expected.logprob, abs=2e-6)
        assert [i for i, _ in mine.top] == [i for i, _ in expected.top]
        values = [value for _, value in expected.top]
        assert [value for _, value in mine.top] == pytest.approx(values, abs=2e-6)
    most = min(size, max(count for _, count in wanted))
    # One copy for all rows: the chosen one's, and the likeliest ones' with their ids.
    assert transfers.device_to_host.count == 1
    assert transfers.device_to_host.bytes == 8 * rows * (1 + 2 * most)


def test_their_sum_is_one_to_float32s_last_bit():
    logits = some_logits(1, 262_144)
    values = device_logprobs(torch.tensor(logits), torch.tensor([[5]]), 0).view(torch.float64)
    exact = logits[0].astype(np.float64)
    total = math.log(math.fsum(np.exp(exact - exact.max()))) + exact.max()
    assert values[0, 0].item() == pytest.approx(exact[5] - total, abs=1e-8)


def test_a_row_is_what_it_is_alone():
    logits = torch.tensor(some_logits(6, 5003))
    tokens = torch.arange(6)[:, None]
    together = device_logprobs(logits, tokens, 20)
    for row in range(6):
        alone = device_logprobs(logits[row : row + 1], tokens[row : row + 1], 20)
        assert torch.equal(alone[0], together[row])
    # The sum is one of integers: no order of the vocabulary changes it.
    order = torch.randperm(5003)
    place = torch.argsort(order)[tokens]
    assert torch.equal(device_logprobs(logits[:, order], place, 0), together[:, :1])


def test_rows_that_do_not_ask_are_left_out():
    logits = some_logits(5, 50)
    tokens = np.arange(5)
    found, transfers = found_of(logits, tokens, [(1, 2), (4, 0)])
    assert [len(one.top) for one in found] == [2, 0]
    for row, one in zip((1, 4), found):
        expected = logprobs_of(logits[row], row, 0).logprob
        assert one.logprob == pytest.approx(expected, abs=2e-6)
    assert transfers.device_to_host.bytes == 8 * 2 * 5


class OnDevice:
    """Makes a program of NumPy's compute log probabilities as one for a GPU does."""

    def __init__(self, program):
        self._transfers = Transfers(TorchMemory(torch.device("cpu")))
        program.logprobs = self

    def __call__(self, logits, token, wanted):
        values, chosen = torch.tensor(logits), torch.tensor(token)
        return DeviceLogprobs(self._transfers, values, chosen, wanted).readers()


@pytest.mark.parametrize("packed", [False, True])
def test_the_loop_gives_each_row_its_own(packed):
    requests = [
        Request([5 + n] * (1 + 4 * n), 3 + n, logprobs=(None, 0, 3)[n % 3], seed=n,
                temperature=0.9 * (n % 2))
        for n in range(9)
    ]  # fmt: skip
    alone = stateful_model(1, "hybrid", packed)
    expected = [alone.generate(request).run() for request in requests]
    model = stateful_model(3, "hybrid", packed)
    OnDevice(model.loop.program)
    with Engine(model, max_stall_s=0, prefix_cache_mb=1) as engine:
        tickets = engine.submit_all(requests)
        for ticket, right in zip(tickets, expected):
            assert ticket.run().token_ids == right.token_ids
            assert len(ticket.logprobs) == len(right.logprobs)
            for mine, its in zip(ticket.logprobs, right.logprobs):
                assert mine.logprob == pytest.approx(its.logprob, abs=2e-6)
                assert [i for i, _ in mine.top] == [i for i, _ in its.top]


def test_a_packed_prompt_has_none():
    model = stateful_model(1, "dense", True)
    with pytest.raises(RunnerError, match="prompt_logprobs is True; an artifact for a GPU"):
        model.generate(Request([5] * 3, 2, logprobs=1, prompt_logprobs=True))
