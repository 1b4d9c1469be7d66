"""The Triton kernel of the ranks' sum gives what its reference gives, with the same bits on every
rank, sum after sum. One process stands for all ranks: each has a mailbox of its own."""

import pytest
import torch

from tests.models.kernels.checking import DEVICE, DTYPES, EPS, ON_GPU, assert_close
from tokenloop.models.kernels.reduce_ranks import operator, reference
from tokenloop.models.kernels.rms_norm import operator as rms_norm

ROWS = 5


class Group:
    """Mailboxes and epochs of ranks that are one process's."""

    def __init__(self, ranks: int, rows: int, size: int, dtype: torch.dtype):
        new = {"device": DEVICE}
        self.flags = [torch.zeros(ranks, rows, dtype=torch.int32, **new) for _ in range(ranks)]
        self.rooms = [torch.zeros(2, ranks, rows, size, dtype=dtype, **new) for _ in range(ranks)]
        self.epochs = [torch.zeros(rows, dtype=torch.int32, **new) for _ in range(ranks)]
        addresses = [x.data_ptr() for x in (*self.flags, *self.rooms)]
        self.peers = [torch.tensor([*addresses, r], **new) for r in range(ranks)]
        self.streams = [torch.cuda.Stream() for _ in range(ranks)] if ON_GPU else []

    def reduce(self, x, parts, *weights, **options) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What every rank has. On a GPU all run at once; otherwise all push, and then all pull."""
        own = list(zip(parts, self.peers, self.epochs))
        if not ON_GPU:
            for part, peers, epochs in own:
                operator.launch_reduce(
                    x, part, *weights, peers, epochs, **options, PUSH=True, PULL=False
                )
            return [
                operator.launch_reduce(
                    x, part, *weights, peers, epochs, **options, PUSH=False, PULL=True
                )
                for part, peers, epochs in own
            ]
        found, graphs = [], []
        before = [tensor.clone() for tensor in (*self.flags, *self.epochs)]
        for stream, (part, peers, epochs) in zip(self.streams, own):
            # Nobody is waited for where all flags are up. A kernel that waits must find all loaded.
            for flags in self.flags:
                flags.copy_(epochs + 1)
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                operator.reduce_add_norm(x, part, *weights, peers, epochs, **options)
            torch.cuda.synchronize()
            graphs.append(torch.cuda.CUDAGraph())
            with torch.cuda.graph(graphs[-1], stream=stream):
                found.append(operator.reduce_add_norm(x, part, *weights, peers, epochs, **options))
        for tensor, value in zip((*self.flags, *self.epochs), before):
            tensor.copy_(value)
        torch.cuda.synchronize()
        for stream, graph in zip(self.streams, graphs):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        self.graphs = graphs  # whose memory the results are
        return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("with_post, with_scalar", [(False, False), (True, True)])
def test_sums_are_the_reference_s_on_every_rank(normal, dtype, ranks, with_post, with_scalar):
    size = 5376 if ON_GPU else 40
    group = Group(ranks, ROWS, size, dtype)
    post = normal(size, dtype=dtype) if with_post else None
    scalar = normal(1, dtype=dtype) if with_scalar else None
    weights = post, scalar, normal(size, dtype=dtype)
    options = {"eps": EPS, "offset": 1.0}
    # Rows have different numbers of sums behind them, and both halves of the room are used again.
    for rows in (3, 5, 1, 4, 5):
        x = normal(rows, size, dtype=dtype)
        parts = [normal(rows, size, dtype=dtype) for _ in range(ranks)]
        expected = reference.reduce_add_norm(x, parts, *weights, **options)
        first, *others = group.reduce(x, parts, *weights, **options)
        for got, right in zip(first, expected):
            assert_close(got, right, dtype)
        # The bits of the norm's own launch, after a branch that is no sum. The interpreter rounds
        # to bfloat16 in a way of its own.
        if ON_GPU or dtype == torch.float32:
            branch = sum(part.float() for part in parts).to(dtype)
            for got, right in zip(first, rms_norm.add_norm(x, branch, *weights, **options)):
                assert torch.equal(got, right)
        for other in others:
            assert all(map(torch.equal, first, other))
    assert all(epochs.tolist() == [5, 4, 4, 3, 2] for epochs in group.epochs)


def test_epochs_wrap_around(normal):
    group = Group(2, 1, 40, torch.float32)
    last = 2**31 - 1
    for tensor in (*group.flags, *group.epochs):
        tensor.fill_(last)
    x, parts = normal(1, 40), [normal(1, 40), normal(1, 40)]
    weights = None, None, normal(40)
    for number in (-(2**31), 1 - 2**31):
        expected = reference.reduce_add_norm(x, parts, *weights, eps=EPS)
        for got in group.reduce(x, parts, *weights, eps=EPS):
            assert_close(got[0], expected[0], torch.float32)
        assert group.epochs[0].item() == number


def test_more_rows_than_wait_for_one_another_are_refused(normal):
    group = Group(2, 4, 40, torch.float32)
    x, norm = normal(5, 40), normal(40)
    with pytest.raises(ValueError, match="5 rows: at most 4"):
        operator.reduce_add_norm(x, x, None, None, norm, group.peers[0], group.epochs[0], eps=EPS)
