"""Rounds without a GPU: which graph a round replays, what goes up, and where its tokens lie. The
graphs are made up (test_step_graphs.py), and so is the network, which looks at a token and its
position alone."""

import pytest
import torch

from tests.runner.test_step_graphs import Graph, capture
from tokenloop.models.kernels.drafts import reference
from tokenloop.runner import Request
from tokenloop.runner.engines.draft_rounds import TIMED, DraftRounds
from tokenloop.runner.engines.torch_memory import TorchMemory
from tokenloop.runner.transfers import Transfers

DRAFTS, ROOM, PERIOD = 3, 50, 5


class Event:
    """An event whose time is the number of those before it."""

    count = 0

    def __init__(self, enable_timing: bool):
        assert enable_timing

    def record(self, stream):
        Event.count += 1
        self.time = Event.count

    def synchronize(self):
        pass

    def elapsed_time(self, other):
        return other.time - self.time


class Device:
    """Rounds of a network after whose tokens 10, 11, ... comes the next of PERIOD tokens."""

    def __init__(self):
        self.calls = []
        memory = TorchMemory(torch.device("cpu"))
        self.transfers = Transfers(memory)
        self.rounds = DraftRounds(self.call, DRAFTS, ROOM, memory, self.transfers, [])

    def call(self, name, *inputs):
        """A method of the program, now or whenever the graph is that captures it."""
        is_network = name.startswith(("round", "verify"))
        if is_network:
            # The method's own memory.
            self.logits = torch.zeros(len(inputs[-1]), 64)
        logits = self.logits
        if Graph.capturing is None:
            self.run(name, inputs, logits)
        else:
            Graph.capturing.calls.append(lambda: self.run(name, inputs, logits))
        return logits if is_network else None

    def run(self, name, inputs, logits):
        self.calls.append(name)
        if name.startswith(("round", "verify")):
            way = reference.next_drafts if name.startswith("round") else reference.take_drafts
            way(*inputs)
            tokens = inputs[-2]
            following = 10 + (tokens - 9) % PERIOD
            logits.zero_().scatter_(1, following[:, None], 1.0)
        elif name.startswith("accept"):
            tokens, _, chosen, *rest = inputs
            reference.accept(tokens, chosen[:, 0], *rest)
        else:
            given, *sampling, chosen = inputs
            self.sampling = [x.tolist() for x in sampling]
            chosen.copy_(given.argmax(1, keepdim=True))


@pytest.fixture
def device(monkeypatch):
    for name, value in {
        "CUDAGraph": Graph, "graph": capture, "graph_pool_handle": lambda: None, "Event": Event,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return Device()


def tokens_of(device, kinds, method="greedy", **how) -> list[int]:
    """What rounds give after a prompt that has come around twice; of `kinds` with drafts or not."""
    prompt = [10 + i % PERIOD for i in range(2 * PERIOD)]
    device.rounds.begin(prompt, torch.tensor([[10]]), Request(prompt, **how.pop("asked", {})))
    found = []
    for number, drafted in enumerate(kinds):
        accepted = device.rounds.submit(drafted, method, number % 2, **how)
        assert len(accepted) == 2 + DRAFTS * drafted
        count, *chosen = accepted.tolist()
        assert count == (1 + DRAFTS if drafted else 1)
        found += chosen[:count]
    return found


@pytest.mark.parametrize("graph", [True, False])
def test_rounds_go_on_from_what_the_ones_before_them_left(device, graph):
    kinds = [False, True, True, False, True]
    found = tokens_of(device, kinds, graph=graph, overlap=True)
    assert found == [10 + (1 + i) % PERIOD for i in range(len(found))]
    assert len(found) == 2 + 3 * (1 + DRAFTS)
    # And the next sequence begins anew.
    assert tokens_of(device, [True], graph=graph, overlap=True) == found[:4]


@pytest.mark.parametrize("graph", [True, False])
def test_drafts_that_are_given_are_those_that_are_tried(device, graph):
    prompt = [10 + i % PERIOD for i in range(7)]
    device.rounds.begin(prompt, torch.tensor([[12]]), Request(prompt))
    copies = device.transfers.host_to_device
    # The same graph, with other drafts: of the first all hold, and of the others the first alone.
    for number, (drafts, right) in enumerate(
        [([13, 14, 10], [4, 13, 14, 10, 11]), ([12, 11, 14], [2, 12, 13, 12, 10])]
    ):
        before = copies.count
        found = device.rounds.submit(True, "greedy", number, graph, True, drafts)
        assert found.tolist() == right
        assert copies.count == before + 1
    # What the text suggests goes on from there.
    assert device.rounds.submit(True, "greedy", 0, graph, True).tolist() == [4, 14, 10, 11, 12]
    assert device.calls.count("verify_4") == 2


def test_what_is_measured_captures_the_greedy_rounds(device):
    assert device.rounds.cost == 1.0
    assert len(device.rounds._graphs) == 4
    # The first of each kind runs as it is.
    replays = [graph.replays for graph in device.rounds._graphs.values()]
    assert sum(replays) == 2 * (2 + TIMED) - 4 and min(replays) > 0
    tokens_of(device, [True, False], graph=True, overlap=True)
    assert len(device.rounds._graphs) == 4
    device.calls.clear()
    tokens_of(device, [True, False], graph=True, overlap=False)
    assert len(device.rounds._graphs) == 6
    assert device.calls == ["round_4", "greedy_round", "accept_4", "round_1", "greedy", "accept_1"]


def test_what_sampling_takes_goes_up_once_for_all_rows(device):
    asked = {"temperature": 0.5, "top_k": 3, "seed": 7}
    copies = device.transfers.host_to_device

    def uploads(**changes) -> int:
        before = copies.count
        tokens_of(device, [True, False], "sample", graph=True, overlap=True, asked=asked | changes)
        return copies.count - before

    assert uploads() == 2 + 4
    assert device.sampling == [[0.5], [3], [1.0], [7], [14]]
    assert uploads() == 2
    assert uploads(seed=8) == 3
    tokens_of(device, [True], "sample", graph=False, overlap=True, asked=asked)
    rows = 1 + DRAFTS
    assert device.sampling == [[0.5] * rows, [3] * rows, [1.0] * rows, [7] * rows, [10, 11, 12, 13]]
