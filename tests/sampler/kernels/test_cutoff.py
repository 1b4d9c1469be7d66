"""Rows are cut where top-k and top-p say."""

import math

import pytest
import torch

from tests.sampler.kernels.drawing import DEVICE, ON_GPU, TILE, ours
from tokenloop.models.kernels.launch.launches import kept_launches
from tokenloop.sampler import sample as reference
from tokenloop.sampler.kernels import operator
from tokenloop.sampler.kernels.triton_bins import CUTOFF
from tokenloop.sampler.kernels.triton_filter import HOPELESS

INF = math.inf
LAUNCHES = ["tile_maxima_kernel", "narrow_kernel", "choose_kernel"]
# NumPy's, of inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Of 19 tokens two are above, at 3 and 18; five tie at 0, 5, 6, 16 and 17; the rest follow.
SUPPORTS = [
    (0, 1.0, set(range(19))),
    (1, 1.0, {3, 18}),
    (2, 1.0, {3, 18}),
    (3, 1.0, {0, 3, 5, 6, 16, 17, 18}),
    (7, 0.2, {18}),
    (7, 0.45, {3, 18}),
    (7, 0.6, {3, 17, 18}),
    (7, 0.7, {3, 16, 17, 18}),
    (0, 0.5, {3, 18}),
    (0, 0.6, {3, 17, 18}),
    (2, 0.5, {18}),
    (2, 0.51, {3, 18}),
    (0, 1e-9, {18}),
]
# Of top_k and top_p; tiles of 16 make 13 of 200 logits.
CUTS = [
    (0, 0.05), (0, 0.5), (0, 0.95), (0, 0.99999), (5, 1.0), (13, 0.9), (14, 1.0), (14, 0.3),
    (100, 0.99), (199, 0.9), (200, 1.0),
]  # fmt: skip


@pytest.mark.parametrize("bins, few", [(1, 1), (2048, 1), (16, 128)])
def test_top_k_keeps_ties_and_top_p_drops_the_lower_ids_first(monkeypatch, bins, few):
    monkeypatch.setattr(operator, "BINS", bins)
    monkeypatch.setattr(operator, "FEW", few)
    draws = 500 if ON_GPU else 1
    row = torch.full((19,), -6.0)
    row[[0, 5, 6, 16, 17]] = 1.0
    row[[3, 18]] = 2.0
    top_k, top_p, kept = zip(*(case for case in SUPPORTS for _ in range(draws)))
    rows = len(kept)
    logits = row.expand(rows, -1)
    seed, position = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    values = [torch.ones(rows), torch.tensor(top_k), torch.tensor(top_p), seed, position]
    tokens = ours(operator.sample, logits, *values)
    assert all(token in support for token, support in zip(tokens, kept))
    assert tokens == reference.sample(logits, *values).flatten().tolist()


def cutoffs(x, temperature, top_k, top_p) -> torch.Tensor:
    """The packed cutoffs of rows, int64 [B], which choose_kernel leaves in the plan."""
    zeros = torch.zeros_like(top_k)
    inputs = [y.to(DEVICE) for y in (x, temperature, top_k, top_p, zeros, zeros)]
    with kept_launches() as launches:
        operator._sampled(*inputs, True, TILE)
    for launch in launches:
        launch.kernel[launch.grid](*launch.arguments, **launch.named)
    assert [launch.kernel.__name__ for launch in launches] == LAUNCHES
    sums = launches[-1].arguments[3]
    return sums[:, 2 * operator.BINS + CUTOFF.value]


@pytest.mark.parametrize(
    "spread, bins, few",
    [(0.01, 4, 64), (1.0, 128, 16), (1.0, 2048, 8), (6.0, 128, 128), (60.0, 2048, 8)],
)
def test_cutoffs_are_the_reference_s_wherever_bins_part_a_row(monkeypatch, spread, bins, few):
    """Rows within one bin, across many, and mostly below all, with ties on either side."""
    monkeypatch.setattr(operator, "BINS", bins)
    monkeypatch.setattr(operator, "FEW", few)
    # No row has its token from one program.
    monkeypatch.setattr(operator, "LISTED", 1)
    generator = torch.Generator().manual_seed(7)
    cuts = CUTS if ON_GPU else CUTS[::2] if spread == 1.0 else CUTS[1::2]
    rows = len(cuts)
    x = torch.randn(rows, 200, generator=generator)
    x[::2] = (x[::2] * 8).round() / 8
    x *= spread
    top_k, top_p = (torch.tensor(column) for column in zip(*cuts))
    temperature = torch.full((rows,), 0.8)
    cutoff = cutoffs(x, temperature, top_k, top_p).cpu()[:, None]

    largest = x.amax(-1, keepdim=True)
    descending = x.sort(-1, descending=True).values
    cut = reference.threshold(descending, largest, temperature, top_k, top_p)
    expected = reference.restrict(x, largest, temperature, *cut) > -INF
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    kept = (keys << 32 | torch.arange(200)) >= cutoff
    # What cannot win may stay.
    can_win = reference.scale(x, largest, temperature) >= HOPELESS.value
    assert torch.equal(kept & can_win, expected & can_win)


@pytest.mark.parametrize("listed", [1, 8])
def test_a_token_in_two_tiles_counts_once(monkeypatch, listed):
    """The last tile of 80 logits begins within the one before. With the largest logit there, twice
    among the tiles' maxima, the second largest was taken for the third, and a top-k cut nothing."""
    monkeypatch.setattr(operator, "LISTED", listed)
    rows, size = 4, 5 * operator.TILE // 2 if ON_GPU else 80
    x = torch.randn(rows, size, generator=torch.Generator().manual_seed(13))
    tile = operator.TILE if ON_GPU else 32
    shared = torch.arange(rows) + size - tile
    x[torch.arange(rows), shared] = 4.0
    x[:, 3] = 3.9
    values = [torch.ones(rows), torch.full((rows,), 2), torch.ones(rows)]
    values += [torch.arange(rows), torch.arange(rows)]
    expected = reference.sample(x, *values).flatten().tolist()
    assert ours(operator.sample, x, *values, tile=tile) == expected
