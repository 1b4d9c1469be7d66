"""Captured steps without a GPU: which graph a step replays, and where its positions come from. The
graphs are made up: they note what is called while they are captured, and call it in a replay."""

from contextlib import contextmanager

import pytest
import torch

from tokenloop.runner.engines.step_graphs import CHOICE, NETWORK, WHOLE, StepGraphs
from tokenloop.runner.engines.torch_memory import TorchMemory
from tokenloop.runner.program import GREEDY, Change, Choice, Step
from tokenloop.runner.transfers import Transfers

LINES = torch.tensor([[3, 0], [4, 1], [5, 0], [6, 0]])
PARAMETERS = [torch.tensor([0.5, 0.0]), torch.tensor([0, 5])]


class Graph:
    """A graph that is captured while `capturing` is this one."""

    capturing = None

    def __init__(self, keep_graph: bool):
        self.calls, self.replays = [], 0

    def instantiate(self):
        assert Graph.capturing is None

    def replay(self):
        self.replays += 1
        for call in self.calls:
            call()


@contextmanager
def capture(graph, **_):
    Graph.capturing = graph
    yield
    Graph.capturing = None


def submitted(function):
    """The function as the device runs it: at once, or whenever the graph is that captures it."""

    def call(*arguments):
        if Graph.capturing is None:
            function(*arguments)
        else:
            Graph.capturing.calls.append(lambda: function(*arguments))

    return call


class Device:
    """StepGraphs over a step that notes (buffer, method, positions, the inputs of selection)."""

    def __init__(self):
        self.ran, self.transfers = [], Transfers(TorchMemory(torch.device("cpu")))
        self.parts = []
        self.graphs = StepGraphs(
            submitted(self.run), submitted(self.next_positions), LINES, torch.arange(9), PARAMETERS,
            self.transfers, None, [],
        )  # fmt: skip

    def run(self, step, buffer, part):
        method, inputs, changes = step.choice
        inputs = [x.tolist() for x in inputs]
        self.ran.append((buffer, method, step.positions.tolist(), inputs))
        self.parts.append((part, *(change.method for change in changes)))

    def next_positions(self, lines, next_line, position):
        position.copy_(lines[next_line.item()])
        next_line += 1

    def submit(self, line, buffer, choice=GREEDY, embed=True, overlap=True, positions=None):
        """The step that runs, and how many copies within the device it takes."""
        before = self.transfers.device_to_device.count
        positions = LINES[line] if positions is None else positions
        self.graphs.submit(Step(positions, line, choice), buffer, embed, overlap)
        return self.ran.pop(), self.transfers.device_to_device.count - before


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    return Device()


def test_steps_in_a_row_take_the_next_line_without_a_copy(device):
    for step, line in enumerate((0, 1, 2, 3)):
        expected = step % 2, "greedy", LINES[line].tolist(), []
        assert device.submit(line, step % 2) == (expected, 0)
    assert device.ran == []


def test_a_line_that_is_not_the_next_one_is_one_copy_of_its_number(device):
    for line, copies in (2, 1), (3, 0), (0, 1), (1, 0), (1, 1):
        (*_, positions, _), made = device.submit(line, 0)
        assert (positions, made) == (LINES[line].tolist(), copies)


def test_the_hosts_positions_are_copied_and_count_no_line(device):
    device.submit(0, 0)
    for positions in ([7, 8], [8, 0]):
        (*_, ran, _), made = device.submit(None, 1, positions=torch.tensor(positions))
        assert (ran, made) == (positions, 1)
    assert device.submit(1, 0)[1] == 0


def test_selection_is_given_the_parameters_where_they_are_and_the_steps_positions(device):
    expected = [*(x.tolist() for x in PARAMETERS), [3, 0]]
    for method in ("sample", "sample_unfiltered"):
        for _ in range(3):
            (_, ran, _, inputs), _ = device.submit(0, 0, Choice(method, (1, 2, 3)))
            assert (ran, inputs) == (method, expected)


def test_each_kind_of_step_is_captured_once_and_then_replayed(device):
    kinds = [
        (buffer, Choice(method), embed, overlap)
        for buffer in (0, 1)
        for method in ("greedy", "sample", "sample_unfiltered")
        for embed in (False, True)
        for overlap in (False, True)
    ]
    for times in range(1, 4):
        for kind in kinds:
            (buffer, method, *_), _ = device.submit(0, *kind)
            assert (buffer, method) == (kind[0], kind[1].method)
        graphs = device.graphs._graphs.values()
        assert len(graphs) == len(kinds)
        # The first time the step runs as it is.
        assert {graph.replays for graph in graphs} == {times - 1}


def test_the_parts_of_a_step_take_one_line_and_every_kind_of_choice_is_captured(device):
    changes = [(), (Change("mask", {}),), (Change("adjust", {}), Change("mask", {}))]
    for _ in range(3):
        for number, change in enumerate(changes):
            line = number % 3
            device.graphs.submit(Step(LINES[line], line, GREEDY), 0, True, True, NETWORK)
            choice = Choice("sample", (), change)
            device.graphs.submit(Step(LINES[line], line, choice), 0, True, True, CHOICE)
            # A whole step goes on with the line after it.
            device.submit(line + 1, 1)
            names = [one.method for one in change]
            assert device.parts[-3:] == [(NETWORK,), (CHOICE, *names), (WHOLE,)]
            (network, chosen) = device.ran[-2:]
            assert network[2] == chosen[2] == LINES[line].tolist()
            assert chosen[3][-1] == LINES[line].tolist()
        assert len(device.graphs._graphs) == 1 + len(changes) + 1
    # Each network's line but the very first is another than the one after the last.
    assert device.transfers.device_to_device.count == 8
