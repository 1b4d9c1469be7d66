"""The Triton sampler gives the reference's tokens: on a GPU, else in Triton's interpreter with
tiles so small that a short row has many."""

import math

import pytest
import torch

ON_GPU = torch.cuda.is_available()
triton = pytest.importorskip("triton", reason="triton is not installed")
tl = pytest.importorskip("triton.language")

from tokenloop.sampler import cuda, philox  # noqa: E402
from tokenloop.sampler import sample as reference  # noqa: E402
from tokenloop.sampler import triton_kernels as kernels  # noqa: E402
from tokenloop.sampler.greedy import greedy  # noqa: E402

NAN, INF = math.nan, math.inf
DEVICE = "cuda" if ON_GPU else "cpu"
TILE = cuda.TILE if ON_GPU else 16
SIZES = [1, 7, 1000, 151_936, 262_144, 262_145] if ON_GPU else [1, 7, 16, 129]
# The interpreter takes seconds for each row.
BATCHES = [1, 2, 7, 32] if ON_GPU else [1, 3]
# Few values, so that ties are common.
VALUES = torch.tensor([NAN, -INF, INF, -1.5, -0.0, 0.0, 2.0, 3.4e38, -3.4e38, 1e-45])
# NumPy's, of inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Let short rows have several chunks as well."""
    if not ON_GPU:
        monkeypatch.setattr(cuda, "PART", 8)
        monkeypatch.setattr(cuda, "STRIDE", 8)
        monkeypatch.setattr(cuda, "CHUNK", 32)
        monkeypatch.setattr(cuda, "FEW", 8)


def ours(function, *tensors, **options) -> list[int]:
    """The tokens that one of cuda.py's functions gives."""
    token = function(*(x.to(DEVICE) for x in tensors), **{"tile": TILE} | options)
    assert token.dtype == torch.int64
    assert token.shape[1] == 1
    return token.flatten().tolist()


def parameters(rows: int, size: int, generator: torch.Generator) -> list[torch.Tensor]:
    """Of each row: temperature, top_k, top_p, seed and position; some of them off."""

    def some_off(x: torch.Tensor, off: float) -> torch.Tensor:
        return torch.where(torch.rand(rows, generator=generator) < 0.3, off, x)

    def integers(low: int, high: int) -> torch.Tensor:
        return torch.randint(low, high, (rows,), generator=generator)

    return [
        some_off(torch.rand(rows, generator=generator) * 2, 0.0),
        some_off(integers(0, min(size, 400) + 3), 0).long(),
        some_off(1 - torch.rand(rows, generator=generator), 1.0),
        integers(-(2**63), 2**63 - 1),
        integers(0, 2**34),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", BATCHES)
def test_greedy_decides_ties_nan_and_infinities_as_the_reference(rows, size, dtype):
    generator = torch.Generator().manual_seed(rows * size)
    logits = VALUES[torch.randint(10, (rows, size), generator=generator)].to(dtype)
    # A row each without numbers, of one tie, and with its largest last.
    for row, value in zip(logits.unbind(), (NAN, 0.0, -INF)):
        row[:] = value
    if rows > 2:
        logits[2, -1] = -1.5
    assert ours(cuda.greedy, logits) == greedy(logits).flatten().tolist()


def test_logits_need_not_be_contiguous():
    wide = torch.randn(30, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for logits in (wide[::9], wide[:5, 3:17], wide.T[1::6, 3:], wide[:1].expand(4, -1)):
        rows = logits.shape[0]
        assert ours(cuda.greedy, logits) == greedy(logits).flatten().tolist()
        values = parameters(rows, logits.shape[1], torch.Generator().manual_seed(2))
        expected = reference.sample(logits.cpu(), *values).flatten().tolist()
        assert ours(cuda.sample, logits, *values) == expected


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_select_rows_is_greedy_of_the_listed_rows(dtype):
    logits = torch.randn(9, 100, generator=torch.Generator().manual_seed(3))
    rows = torch.tensor([8, 0, 3, 3], dtype=dtype)
    expected = greedy(logits)[rows.long()].flatten().tolist()
    assert ours(cuda.select_rows, logits, rows) == expected


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", BATCHES)
def test_sampled_and_greedy_rows_of_one_batch_give_the_reference_s_tokens(rows, size):
    generator = torch.Generator().manual_seed(rows + size)
    spread = torch.tensor([1.0, 4.0, 20.0])[torch.arange(rows) % 3, None]
    logits = torch.randn(rows, size, generator=generator) * spread
    # A row each with ties, with NaN, and without numbers.
    logits[1:2] = logits[1:2].round()
    logits[2:3, ::2] = NAN
    logits[3:4] = -INF
    logits[4:5, ::5] = INF
    for _ in range(2 if ON_GPU else 1):
        values = parameters(rows, size, generator)
        expected = reference.sample(logits, *values).flatten().tolist()
        assert ours(cuda.sample, logits, *values) == expected


def test_rows_without_cuts_need_no_search_whatever_their_temperature():
    """Among them temperatures whose inverse is infinite or 0, where quick scores say nothing."""
    temperature = torch.tensor([0.0, 1e-45, 1e-38, 1e-20, 1e-3, 0.7, 1.0, 30.0, 1e20, 3e38])
    rows, size = len(temperature), 5000 if ON_GPU else 70
    generator = torch.Generator().manual_seed(11)
    for spread in (0.0, 1e-3, 3.0, 1e3, 1e30):
        logits = torch.randn(rows, size, generator=generator) * spread
        logits[:, ::7] = NAN
        if spread == 3.0:
            logits[:, 1::9] = INF
        seed = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
        off = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
        values = [temperature, *off, seed, torch.arange(rows) + 2**33]
        expected = reference.sample(logits, *values).flatten().tolist()
        assert ours(cuda.sample, logits, *values, restricted=False) == expected


def test_parts_without_numbers_do_not_end_the_search(monkeypatch):
    monkeypatch.setattr(cuda, "PART", 4)
    generator = torch.Generator().manual_seed(12)
    logits = torch.randn(6, 40, generator=generator)
    for row, part in enumerate((slice(4, 8), slice(0, 4), slice(16, 32), slice(36, 40))):
        logits[row, part] = NAN
    logits[4, 8:12] = -NAN
    values = parameters(6, 40, generator)
    values[:3] = torch.full((6,), 0.9), torch.zeros(6, dtype=torch.int64), torch.ones(6)
    expected = reference.sample(logits, *values).flatten().tolist()
    for restricted in (False, True):
        assert ours(cuda.sample, logits, *values, restricted=restricted, tile=16) == expected


# Tokens of a tile, of a part and of the stride of its runs, and groups of parts.
SHAPES = [(64, 4, 64, 1), (64, 8, 32, 8), (128, 16, 16, 4)]


@pytest.mark.parametrize("tile, part, stride, groups", SHAPES)
@pytest.mark.parametrize("size", [160, 157])
def test_how_rows_are_cut_into_parts_changes_no_token(
    monkeypatch, tile, part, stride, groups, size
):
    """Of 160 the last tile of 64 or 128 begins within the one before."""
    for name, value in (("PART", part), ("STRIDE", stride), ("GROUPS", groups)):
        monkeypatch.setattr(cuda, name, value)
    generator = torch.Generator().manual_seed(size)
    rows = 500 if ON_GPU else 6
    logits = torch.randn(rows, size, generator=generator).mul(4).round() / 2
    logits[::3, 80:] = -INF
    values = parameters(rows, size, generator)
    for restricted in (True, False):
        if not restricted:
            values[1:3] = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
        expected = reference.sample(logits, *values).flatten().tolist()
        assert ours(cuda.sample, logits, *values, restricted=restricted, tile=tile) == expected
    assert ours(cuda.greedy, logits, tile=tile) == greedy(logits).flatten().tolist()


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


@pytest.mark.parametrize("bins, few", [(1, 1), (2048, 1), (16, 128)])
def test_top_k_keeps_ties_and_top_p_drops_the_lower_ids_first(monkeypatch, bins, few):
    monkeypatch.setattr(cuda, "BINS", bins)
    monkeypatch.setattr(cuda, "FEW", few)
    draws = 500 if ON_GPU else 1
    row = torch.full((19,), -6.0)
    row[[0, 5, 6, 16, 17]] = 1.0
    row[[3, 18]] = 2.0
    top_k, top_p, kept = zip(*(case for case in SUPPORTS for _ in range(draws)))
    rows = len(kept)
    logits = row.expand(rows, -1)
    seed, position = torch.arange(rows), torch.zeros(rows, dtype=torch.int64)
    values = [torch.ones(rows), torch.tensor(top_k), torch.tensor(top_p), seed, position]
    tokens = ours(cuda.sample, logits, *values)
    assert all(token in support for token, support in zip(tokens, kept))
    assert tokens == reference.sample(logits, *values).flatten().tolist()


# Of top_k and top_p; tiles of 16 make 13 of 200 logits.
CUTS = [
    (0, 0.05), (0, 0.5), (0, 0.95), (0, 0.99999), (5, 1.0), (13, 0.9), (14, 1.0), (14, 0.3),
    (100, 0.99), (199, 0.9), (200, 1.0),
]  # fmt: skip


@pytest.mark.parametrize(
    "spread, bins, few",
    [(0.01, 4, 64), (1.0, 128, 16), (1.0, 2048, 8), (6.0, 128, 128), (60.0, 2048, 8)],
)
def test_cutoffs_are_the_reference_s_wherever_bins_part_a_row(monkeypatch, spread, bins, few):
    """Rows within one bin, across many, and mostly below all, with ties on either side."""
    monkeypatch.setattr(cuda, "BINS", bins)
    monkeypatch.setattr(cuda, "FEW", few)
    generator = torch.Generator().manual_seed(7)
    cuts = CUTS if ON_GPU else CUTS[::2] if spread == 1.0 else CUTS[1::2]
    rows = len(cuts)
    x = torch.randn(rows, 200, generator=generator)
    x[::2] = (x[::2] * 8).round() / 8
    x *= spread
    top_k, top_p = (torch.tensor(column) for column in zip(*cuts))
    temperature = torch.full((rows,), 0.8)
    inputs = [y.to(DEVICE) for y in (x, temperature, top_k, top_p)]
    cutoff = cuda._cutoffs(*inputs, TILE)[1].cpu()[:, None]

    largest = x.amax(-1, keepdim=True)
    descending = x.sort(-1, descending=True).values
    cut = reference.threshold(descending, largest, temperature, top_k, top_p)
    expected = reference.restrict(x, largest, temperature, *cut) > -INF
    bits = torch.where(x == 0, 0.0, x).view(torch.int32)
    keys = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    kept = (keys << 32 | torch.arange(200)) >= cutoff
    # What cannot win may stay.
    can_win = reference.scale(x, largest, temperature) >= kernels.HOPELESS.value
    assert torch.equal(kept & can_win, expected & can_win)


def test_neither_tiles_nor_company_change_a_token():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 150, generator=generator)
    values = parameters(6, 150, generator)
    expected = ours(cuda.sample, logits, *values)
    assert ours(cuda.sample, logits, *values, tile=64) == expected
    order = torch.tensor([5, 2, 0])
    alone = ours(cuda.sample, logits[order], *(x[order] for x in values))
    assert alone == [expected[i] for i in order]


@triton.jit
def functions_kernel(x_ptr, log_ptr, scaled_ptr, mass_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(log_ptr + offsets, kernels.log(tl.load(x_ptr + offsets)))
    scaled = tl.load(scaled_ptr + offsets)
    tl.store(mass_ptr + offsets, kernels.mass(scaled, 0.0, 1.0))


def test_logarithms_and_masses_have_the_reference_s_bits():
    block, size = 1024, 2**20 if ON_GPU else 2**14
    x = philox.uniform(torch.randint(2**23, (size,)).float())
    x[::2] = -torch.log(x[::2])
    scaled = torch.rand(size) * -30
    scaled[:4] = torch.tensor([0.0, -INF, -1e-40, -26.34])
    x, scaled = x.to(DEVICE), scaled.to(DEVICE)
    log, mass = torch.empty_like(x), torch.empty_like(x, dtype=torch.int64)
    functions_kernel[(size // block,)](x, log, scaled, mass, BLOCK=block)
    assert torch.equal(log.cpu(), philox.log(x.cpu()))
    assert torch.equal(mass.cpu(), reference.weights(scaled.cpu()))


@triton.jit
def rate_kernel(words_ptr, rate_ptr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(rate_ptr + offsets, kernels.log2_double_rate(tl.load(words_ptr + offsets)))


def test_the_bound_of_noise_is_one_and_a_close_one_where_tokens_win():
    block, size = 1024, 2**23
    values = torch.arange(size)
    if not ON_GPU:
        size = 2**17
        values = torch.cat([values[: size // 2], values[-size // 2 :]])
    words = (values << 9).to(torch.uint32).to(DEVICE)
    rate = torch.empty(size, device=DEVICE)
    rate_kernel[(size // block,)](words, rate, BLOCK=block)
    u = (values.double() + 0.5) * 2.0**-23
    expected = (-u.log()).log() / math.log(2)
    below = expected + 1 - rate.cpu()
    # The tolerance of a score of 0 is more than four times as much.
    assert below.min() > -5e-5
    # r counts from 0 in steps of 2^-23, half a step too low: at its least the bound says nothing.
    assert below[-1] == INF
    assert below[:-1].max() < 3.5
    for rate, most in ((0, 0.27), (-1.5, 0.05)):
        half_a_step = 2.0**-24 / -u.log() / math.log(2)
        is_meant = (expected < rate) & (half_a_step < 1e-3)
        assert (below - 1.1 * half_a_step)[is_meant].max() < most


@needs_gpu
def test_a_captured_graph_draws_anew_from_what_its_inputs_hold():
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(4, 5000, generator=generator), *parameters(4, 5000, generator)]
    held = [x.to(DEVICE) for x in inputs]
    cuda.sample(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = cuda.sample(*held)
    for _ in range(3):
        inputs = [torch.randn(4, 5000, generator=generator), *parameters(4, 5000, generator)]
        for x, new in zip(held, inputs):
            x.copy_(new)
        graph.replay()
        assert torch.equal(token.cpu(), reference.sample(*inputs))


@needs_gpu
def test_the_operators_can_be_exported():
    class Step(torch.nn.Module):
        def forward(self, logits, *values):
            return torch.ops.tokenloop.greedy(logits), torch.ops.tokenloop.sample(logits, *values)

    generator = torch.Generator().manual_seed(6)
    inputs = [torch.randn(3, 2000, generator=generator), *parameters(3, 2000, generator)]
    inputs = tuple(x.to(DEVICE) for x in inputs)
    program = torch.export.export(Step(), inputs)
    for got, expected in zip(program.module()(*inputs), Step()(*inputs)):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [5376, 1000] if ON_GPU else [1, 1500])
@pytest.mark.parametrize("scale", [1.0, 25.25])
def test_the_last_launch_looks_up_the_chosen_tokens_embeddings(dtype, width, scale):
    generator = torch.Generator().manual_seed(width)
    size = 129 if ON_GPU else 40
    logits = torch.randn(3, size, generator=generator)
    table = torch.randn(size, width, generator=generator).to(DEVICE, dtype)
    sampling = parameters(3, size, generator)
    for function, plain, arguments in (
        (cuda.greedy_embed, cuda.greedy, (logits,)),
        (cuda.sample_embed, cuda.sample, (logits, *sampling)),
    ):
        arguments = [x.to(DEVICE) for x in arguments]
        next_id = torch.full((3, 1), -1, device=DEVICE)
        hidden = torch.zeros(3, 1, width, dtype=dtype, device=DEVICE)
        function(*arguments, table, next_id, hidden, scale=scale, tile=TILE)
        assert torch.equal(next_id, plain(*arguments, tile=TILE))
        # The interpreter cuts bfloat16 off where a GPU rounds.
        rtol = 2**-7 if dtype == torch.bfloat16 and not ON_GPU else 0.0
        torch.testing.assert_close(hidden, table[next_id] * scale, rtol=rtol, atol=0.0)
