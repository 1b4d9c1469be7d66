"""The sampler's operators give the reference's tokens."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.sampler import extremes
from tests.sampler.kernels.drawing import DEVICE, ON_GPU, TILE, ours, parameters
from tokenloop.sampler import sample as reference
from tokenloop.sampler.greedy import greedy
from tokenloop.sampler.kernels import operator

NAN, INF = math.nan, math.inf
SIZES = [1, 7, 1000, 151_936, 262_144, 262_145] if ON_GPU else [1, 7, 16, 129]
# The interpreter takes seconds for each row.
BATCHES = [1, 2, 7, 32] if ON_GPU else [1, 3]
# Few values, so that ties are common.
VALUES = torch.tensor([NAN, -INF, INF, -1.5, -0.0, 0.0, 2.0, 3.4e38, -3.4e38, 1e-45])
# Tokens of a tile, of a part and of the stride of its runs, and groups of parts.
SHAPES = [(64, 4, 64, 1), (64, 8, 32, 8), (128, 16, 16, 4)]
# NumPy's, of inf - inf.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
needs_gpu = pytest.mark.skipif(not ON_GPU, reason="needs a GPU")


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
    assert ours(operator.greedy, logits) == greedy(logits).flatten().tolist()


def test_logits_need_not_be_contiguous():
    whole = torch.randn(30, 20, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for logits in (whole[::9], whole[:5, 3:17], whole.T[1::6, 3:], whole[:1].expand(4, -1)):
        rows = logits.shape[0]
        assert ours(operator.greedy, logits) == greedy(logits).flatten().tolist()
        values = parameters(rows, logits.shape[1], torch.Generator().manual_seed(2))
        expected = reference.sample(logits.cpu(), *values).flatten().tolist()
        assert ours(operator.sample, logits, *values) == expected


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
        assert ours(operator.sample, logits, *values) == expected


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
        assert ours(operator.sample, logits, *values, restricted=False) == expected


@pytest.mark.parametrize("size", [7, 1000] if ON_GPU else [7, 50])
@pytest.mark.parametrize("restricted", [True, False])
@given(data=st.data())
@settings(
    derandomize=True, deadline=None, database=None, max_examples=1000 if ON_GPU else 6,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)  # fmt: skip
def test_tokens_are_the_reference_s_for_all_that_the_types_can_hold(size, restricted, data):
    rows = data.draw(st.lists(extremes.rows_of(size), min_size=2, max_size=2))
    values = extremes.arguments(rows, size)
    if not restricted:
        values[2:4] = torch.zeros(2, dtype=torch.int64), torch.ones(2)
    expected = reference.sample(*values).flatten().tolist()
    assert ours(operator.sample, *values, restricted=restricted) == expected


@pytest.mark.parametrize("top_k", [0, 2, 60])
def test_a_top_p_that_float32_rounds_to_0_leaves_one_of_many_ties(top_k):
    logits = torch.zeros(2, 100)
    logits[1, 90:] = -1.0
    off = torch.full((2,), top_k), torch.zeros(2), torch.arange(2), torch.arange(2)
    values = [torch.tensor([1.0, 1e-45]), *off]
    assert reference.sample(logits, *values).flatten().tolist() == [99, 89]
    assert ours(operator.sample, logits, *values) == [99, 89]


def test_parts_without_numbers_do_not_end_the_search(monkeypatch):
    monkeypatch.setattr(operator, "PART", 4)
    generator = torch.Generator().manual_seed(12)
    logits = torch.randn(6, 40, generator=generator)
    for row, part in enumerate((slice(4, 8), slice(0, 4), slice(16, 32), slice(36, 40))):
        logits[row, part] = NAN
    logits[4, 8:12] = -NAN
    values = parameters(6, 40, generator)
    values[:3] = torch.full((6,), 0.9), torch.zeros(6, dtype=torch.int64), torch.ones(6)
    expected = reference.sample(logits, *values).flatten().tolist()
    for restricted in (False, True):
        assert ours(operator.sample, logits, *values, restricted=restricted, tile=16) == expected


@pytest.mark.parametrize("top_k", [0, 3, 70])
def test_rows_without_numbers_write_nothing_past_their_end(monkeypatch, top_k):
    """Of 9 tiles and of 18 parts, so that what a program holds goes past the row's end."""
    monkeypatch.setattr(operator, "PART", 8)
    given, guarded, real = [], 64, torch.empty

    def empty(*shape, **options):
        whole = real(math.prod(shape) + guarded, **options).fill_(77)
        given.append(whole)
        return whole[:-guarded].view(shape)

    monkeypatch.setattr(operator.torch, "empty", empty)
    logits = torch.randn(3, 142, generator=torch.Generator().manual_seed(3))
    logits[0], logits[2] = -INF, NAN
    values = torch.full((3,), 0.9), torch.full((3,), top_k), torch.full((3,), 0.8)
    values = [*values, torch.arange(3), torch.arange(3)]
    expected = reference.sample(logits, *values).flatten().tolist()
    assert ours(operator.sample, logits, *values, tile=16) == expected
    assert len(given) > 5
    assert all((whole[-guarded:] == 77).all() for whole in given)


@pytest.mark.parametrize("tile, part, stride, groups", SHAPES)
@pytest.mark.parametrize("size", [160, 157])
def test_how_rows_are_cut_into_parts_changes_no_token(
    monkeypatch, tile, part, stride, groups, size
):
    """Of 160 the last tile of 64 or 128 begins within the one before."""
    for name, value in (("PART", part), ("STRIDE", stride), ("GROUPS", groups)):
        monkeypatch.setattr(operator, name, value)
    generator = torch.Generator().manual_seed(size)
    rows = 500 if ON_GPU else 6
    logits = torch.randn(rows, size, generator=generator).mul(4).round() / 2
    logits[::3, 80:] = -INF
    values = parameters(rows, size, generator)
    for restricted in (True, False):
        if not restricted:
            values[1:3] = torch.zeros(rows, dtype=torch.int64), torch.ones(rows)
        expected = reference.sample(logits, *values).flatten().tolist()
        assert ours(operator.sample, logits, *values, restricted=restricted, tile=tile) == expected
    assert ours(operator.greedy, logits, tile=tile) == greedy(logits).flatten().tolist()


def test_neither_tiles_nor_company_change_a_token():
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(6, 150, generator=generator)
    values = parameters(6, 150, generator)
    expected = ours(operator.sample, logits, *values)
    assert ours(operator.sample, logits, *values, tile=64) == expected
    order = torch.tensor([5, 2, 0])
    alone = ours(operator.sample, logits[order], *(x[order] for x in values))
    assert alone == [expected[i] for i in order]


@needs_gpu
def test_a_captured_graph_draws_anew_from_what_its_inputs_hold():
    generator = torch.Generator().manual_seed(5)
    inputs = [torch.randn(4, 5000, generator=generator), *parameters(4, 5000, generator)]
    held = [x.to(DEVICE) for x in inputs]
    operator.sample(*held)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        token = operator.sample(*held)
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
        (operator.greedy_embed, operator.greedy, (logits,)),
        (operator.sample_embed, operator.sample, (logits, *sampling)),
    ):
        arguments = [x.to(DEVICE) for x in arguments]
        next_id = torch.full((3, 1), -1, device=DEVICE)
        hidden = torch.zeros(3, 1, width, dtype=dtype, device=DEVICE)
        function(*arguments, table, next_id, hidden, scale=scale, tile=TILE)
        assert torch.equal(next_id, plain(*arguments, tile=TILE))
        # The interpreter cuts bfloat16 off where a GPU rounds.
        rtol = 2**-7 if dtype == torch.bfloat16 and not ON_GPU else 0.0
        torch.testing.assert_close(hidden, table[next_id] * scale, rtol=rtol, atol=0.0)
