"""Selection as the runner runs it: the sampler's own tokens, whichever way a row goes."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.sampler import extremes
from tokenloop.export.pte.pte_program import to_program
from tokenloop.export.pte.selection import CANDIDATES, TOKENS_PER_GROUP, methods_of_rows
from tokenloop.runner.engines.executorch_runtime import Program
from tokenloop.sampler.greedy import greedy
from tokenloop.sampler.philox import gumbel
from tokenloop.sampler.sample import sample

NAN, INF = math.nan, math.inf
# A tiny vocabulary, one that is not whole groups, one of a few more groups than there are
# candidates, and a real one.
GROUPED = 65_536 + TOKENS_PER_GROUP
SIZES = [(8, 7), (1000, 2), (GROUPED, 3), (262_144, 1)]


def arguments(logits, *settings):
    """sample's arguments: for each row a temperature, top_k, top_p and seed, over and over."""
    rows = [settings[i % len(settings)] for i in range(len(logits))]
    columns = [torch.tensor(column) for column in zip(*rows)]
    return [logits, *columns, torch.arange(len(logits)) * 3 + 2**33]


def row(temperature=1.0, top_k=0, top_p=1.0, seed=-(2**40)):
    return temperature, top_k, top_p, seed


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """A function (V, B) -> Program with the methods `greedy` and `sample`."""
    programs = {}

    def load(size, rows):
        if (size, rows) not in programs:
            path = tmp_path_factory.mktemp("selection") / "selection.pte"
            methods = methods_of_rows(rows, size)
            path.write_bytes(to_program(methods, {}, True, lambda what: None).buffer)
            program = Program(path)
            programs[size, rows] = [program.load_method(name) for name in methods]
        return programs[size, rows]

    return load


def run(method, arrays) -> torch.Tensor:
    (token,) = method.call([x.contiguous().numpy() for x in arrays])
    return torch.from_numpy(token.copy())


def check(program, logits, *settings):
    """That both methods give each row what the sampler gives."""
    rows, size = logits.shape
    greedy_method, sample_method = program(size, rows)
    assert torch.equal(run(greedy_method, [logits]), greedy(logits))
    given = arguments(logits, *settings)
    assert torch.equal(run(sample_method, given), sample(*given))


def random_logits(size, rows, seed=0, spread=3.0):
    return torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.mark.parametrize("size, rows", SIZES)
@pytest.mark.parametrize("spread", [0.0, 1.0, 6.0])
def test_tokens_are_the_samplers_for_all_parameters(program, size, rows, spread):
    kinds = list(product([1.0, 0.7], [0, 1, 5, 40, CANDIDATES, 2 * size], [1.0, 0.95, 0.2]))
    kinds = [row(*kind, seed=i - 9) for i, kind in enumerate(kinds)]
    kinds.insert(2, row(0.0, 3, 0.5))
    # Where everything is sorted, a large vocabulary takes a while, most of all if it is flat.
    kinds = kinds if size < 10_000 else kinds[:: 9 if spread == 0.0 or rows == 1 else 4]
    logits = random_logits(size, rows, 1, spread)
    for i in range(0, len(kinds), rows):
        check(program, logits, *(kinds[i:] + kinds)[:rows])


@pytest.mark.parametrize("size, rows", SIZES)
def test_rows_with_nan_and_infinities_are_decided_as_documented(program, size, rows):
    for kind in (row(), row(0.0), row(0.8, 3), row(1.0, 0, 0.5)):
        for i, value in enumerate((NAN, INF, -INF)):
            logits = random_logits(size, rows, i)
            logits[0, [1, size // 2]] = value
            logits[-1] = value
            logits[rows // 2, size - 1] = NAN
            check(program, logits, kind)
            logits[0] = NAN
            logits[0, 5] = -7.0
            check(program, logits, kind)


@pytest.mark.parametrize("size, rows", [(GROUPED, 3), (262_144, 1)])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_cuts_around_the_number_of_candidates(program, size, rows, extra):
    """As many tokens as candidates, one less and one more stay: by top-k, by top-p, and by ties."""
    count = CANDIDATES + extra
    logits = torch.full((rows, size), -40.0)
    places = torch.randperm(size, generator=torch.Generator().manual_seed(count))[:count]
    logits[:, places] = torch.linspace(0.0, 1.0, count)
    check(program, logits, row(1.0, count), row(1.0, count - 1), row(1.0, 0, 0.99999))
    check(program, logits, row(1.0, 0, 1 - 1e-4), row(1.0, count + 1, 0.9))
    tied = logits.clamp(max=0.0)
    check(program, tied, row(1.0, 3), row(1.0, count), row(1.0, 0, 0.5), row(1.0, 7, 0.7))
    tied[:, places[:10]] = 1.0
    for seed in range(3):
        kinds = row(1.0, 10, seed=seed), row(1.0, 11, 0.9, seed), row(1.0, 0, 0.4, seed)
        for shift in range(3):
            check(program, tied, *kinds[shift:], *kinds[:shift])


@pytest.mark.parametrize("size, rows", SIZES)
@given(data=st.data())
@settings(derandomize=True, deadline=None, database=None, max_examples=12)
def test_tokens_are_the_samplers_for_all_that_the_types_can_hold(program, size, rows, data):
    drawn = data.draw(st.lists(extremes.rows_of(size), min_size=rows, max_size=rows))
    given = extremes.arguments(drawn, size)
    greedy_method, sample_method = program(size, rows)
    assert torch.equal(run(greedy_method, given[:1]), greedy(given[0]))
    assert torch.equal(run(sample_method, given), sample(*given))


@pytest.mark.parametrize("size, rows", SIZES)
@pytest.mark.parametrize("temperature", [1e-45, 1e-39, 2.0**-126, 2.0**-100, 2.0**-64, 1e-10])
def test_next_to_no_temperature_takes_one_of_the_largest(program, size, rows, temperature):
    logits = random_logits(size, rows)
    kinds = [row(temperature, *cut) for cut in ((0, 1.0), (0, 0.5), (5, 1.0), (40, 1e-45))]
    for kind in kinds:
        check(program, logits, kind)
        assert torch.equal(sample(*arguments(logits, kind)), greedy(logits))
    tied = logits.clamp(max=0.5)
    for kind in kinds:
        check(program, tied, kind)


@pytest.mark.parametrize("size, rows", [(1000, 2), (GROUPED, 3)])
@pytest.mark.parametrize("temperature", [0.7, 1.3, 3e38])
def test_a_quotient_is_no_product_with_an_inverse(program, size, rows, temperature):
    """Where they differ by a rounding, and the noise is such that it decides the token."""
    positions, temperature = torch.arange(50_000), torch.tensor(temperature)
    noise = gumbel(torch.zeros_like(positions), positions, torch.arange(2))
    logit = (noise[:, 1] - noise[:, 0]) * temperature
    scaled = logit / temperature, logit * (1 / temperature)
    is_first = [x + noise[:, 0] >= noise[:, 1] for x in scaled]
    chosen = ((is_first[0] != is_first[1]) & (logit < 0)).nonzero()[:rows, 0]
    assert len(chosen) == rows
    logits = torch.full((rows, size), -INF)
    logits[:, 0], logits[:, 1] = logit[chosen], 0.0
    for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 0.999999)):
        settings = [temperature.item(), top_k, top_p, 0]
        given = [*arguments(logits, settings)[:-1], positions[chosen]]
        assert torch.equal(run(program(size, rows)[1], given), sample(*given))


def test_a_row_goes_its_own_way_beside_others(program):
    logits = random_logits(GROUPED, 3, 5, 4.0)
    logits[2, 8] = NAN
    kinds = [
        row(0.0), row(1.0, 40), row(1.0, 0, 0.3), row(0.0), row(1.0), row(1.0, 0, 0.999),
        row(0.5, 600, 0.9),
    ]  # fmt: skip
    for shift in range(7):
        check(program, logits, *kinds[shift:], *kinds[:shift])


@pytest.mark.parametrize("size, rows", SIZES)
def test_tokens_lie_in_memory_of_their_own(program, size, rows):
    methods = program(size, rows)
    logits = random_logits(size, rows)
    given = arguments(logits, row(1.0, 4), row())
    first = methods[1].call([x.numpy() for x in given])[0]
    expected = first.copy()
    logits[:, 0] = NAN
    run(methods[0], [logits])
    assert np.array_equal(first, expected)
    second = methods[0].call([logits.numpy()])[0]
    expected = second.copy()
    run(methods[1], arguments(random_logits(size, rows, 1), row(), row(2.0, 0, 0.9)))
    assert np.array_equal(second, expected)
