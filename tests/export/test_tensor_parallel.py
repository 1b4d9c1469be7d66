"""A network that is divided by ranks gives what the whole one gives."""

import threading

import pytest
import torch

from tests.models.eager import assert_near, even_ends, prefill, prompt
from tests.models.tiny_models import TYPICAL, ours
from tokenloop.export import tensor_parallel
from tokenloop.export.errors import ExportError
from tokenloop.runner.engines.ranks import Ranks

pytestmark = pytest.mark.usefixtures("one_thread")
GEMMA_3N = "gemma3n_text"


class Threads:
    """Ranks that are threads of this process."""

    def __init__(self, count: int):
        self.count, self.calls = count, 0
        self._parts: list[torch.Tensor | None] = [None] * count
        self._barrier = threading.Barrier(count, timeout=60)
        self._own = threading.local()

    def gather_within(self, x: torch.Tensor) -> torch.Tensor:
        self._parts[self._own.rank] = x
        self._barrier.wait()
        out = torch.stack(self._parts)
        self.calls += self._own.rank == 0
        self._barrier.wait()
        return out

    def run(self, function, *arguments) -> list:
        """What function(argument[rank], ...) gives on each rank."""
        found: list = [None] * self.count

        def work(rank: int) -> None:
            self._own.rank = rank
            try:
                found[rank] = function(*(each[rank] for each in arguments))
            except BaseException as error:
                found[rank] = error
                self._barrier.abort()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for error in found:
            if isinstance(error, BaseException) and not isinstance(
                error, threading.BrokenBarrierError
            ):
                raise error
        return found


@pytest.fixture
def threads(monkeypatch):
    def begin(count: int) -> Threads:
        found = Threads(count)
        monkeypatch.setattr(Ranks, "joined", found)
        return found

    return begin


def logits(network: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """After the last chunks of a prompt, and after two steps more."""
    found = prefill(network, tokens, even_ends(tokens.shape[1], network.max_chunk))
    with torch.no_grad():
        for position in (tokens.shape[1], tokens.shape[1] + 1):
            found.append(network.decode(torch.tensor([[3]]), torch.tensor([position])))
    return torch.cat(found)


def divided(network: torch.nn.Module, ranks: int) -> list[torch.nn.Module]:
    networks = tensor_parallel.shards(network, ranks)
    for each in networks:
        tensor_parallel.connect(each, ranks)
    return networks


def least_ranks(network: torch.nn.Module) -> int:
    """The fewest that divide it."""
    for ranks in range(2, tensor_parallel.MOST_RANKS + 1):
        try:
            tensor_parallel.check(network, ranks)
        except ExportError:
            continue
        return ranks
    raise AssertionError("nothing divides the network")


@pytest.mark.parametrize("case", [case for case in TYPICAL if case != GEMMA_3N])
def test_ranks_give_together_what_a_network_gives_alone(threads, case):
    whole = ours(case)
    tokens, ranks = prompt(11), least_ranks(whole)
    networks = divided(whole, ranks)
    group = threads(ranks)
    first, *others = group.run(lambda network: logits(network, tokens), networks)
    assert all(torch.equal(first, other) for other in others)
    assert_near(first, logits(whole, tokens))
    assert group.calls


@pytest.mark.parametrize(
    "case, ranks, said",
    [
        ("qwen3", 3, "does not divide the 4 query heads and the 2 key/value heads"),
        ("gpt_oss", 16, "would do"),
    ],
)
def test_numbers_that_do_not_divide_a_network_are_refused_with_those_that_do(case, ranks, said):
    network = ours(case)
    with pytest.raises(ExportError, match=f"--tensor-parallel {ranks} .*") as refused:
        tensor_parallel.shards(network, ranks)
    assert said in str(refused.value)
    assert f"{least_ranks(network)}" in str(refused.value).partition(" of a layer: ")[2]


def test_a_network_that_cannot_be_divided_is_refused_by_name():
    with pytest.raises(ExportError, match=r"is not for networks with alternating updates"):
        tensor_parallel.shards(ours(GEMMA_3N), 2)


def test_ranks_share_the_parameters_out(threads):
    """Nothing is there twice but what every rank needs, and nothing is left out."""
    whole = ours("llama")
    networks = tensor_parallel.shards(whole, 2)
    sizes = [sum(p.numel() for p in each.parameters()) for each in (whole, *networks)]
    common = sum(p.numel() for name, p in whole.named_parameters() if "norm" in name)
    padding = sum(
        (2 * len(each.model.embed_tokens.weight) - len(whole.model.embed_tokens.weight))
        * whole.model.embed_tokens.weight.shape[1]
        for each in networks[:1]
    )
    tables = 1 if whole.lm_head.weight is whole.model.embed_tokens.weight else 2
    assert sizes[1] == sizes[2]
    assert sizes[1] + sizes[2] == sizes[0] + common + tables * padding
