"""Whole programs against the eager network: logits after every position, however they are fed."""

import copy
import functools
import gc
import warnings
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import export.attention
import export.gemma
import export.pte
from export.pte import Greedy, rescore
from export.quantize import QuantizedEmbedding, Shortlist, dot_products, quantize_rows
from runner.artifact import open_artifact
from runner.executorch_program import ExecuTorchProgram
from sampler.greedy import greedy

SLIDING, FULL = "sliding_attention", "full_attention"
ONE_HEAD = {"num_key_value_heads": 1, "num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}
ONE_LAYER = {"num_key_value_heads": 1, "num_hidden_layers": 1, "layer_types": [FULL]}
LARGE = {"vocab_size": 16384, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}
# What the config says, the recipe, FIRST_BLOCK, --max-seq-len and --max-prefill. The window is 16.
ARTIFACTS = {
    "two key heads": ({}, "fp32", 4, 200, 16),  # blocks of 4, 12, 48 and 136 slots
    "one key head": (ONE_HEAD, "fp32", 8, 200, 7),  # blocks of 8, 24, 96 and 72 slots
    "8da8w, shortlist": (LARGE, "8da8w", 8, 60, 7),  # blocks of 8, 24 and 28 slots
    "8da4w": (ONE_HEAD, "8da4w", 8, 60, 7),
    "one layer, no chunks": (ONE_LAYER, "fp32", 8, 60, 1),
}
NAN, INF = float("nan"), float("inf")
EXACT = ["two key heads", "one key head", "one layer, no chunks"]
QUANTIZED = ["8da8w, shortlist", "8da4w"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def export_of(make_checkpoint, tmp_path_factory):
    """A function: name of an artifact -> its directory, exported in this process, and a copy of the
    network that the program was made of."""

    @functools.cache
    def make(name: str):
        config, quant, first_block, max_seq_len, max_prefill = ARTIFACTS[name]
        directory = tmp_path_factory.mktemp("exported") / "artifact"
        options = export.gemma.parse_arguments(
            [
                *("--model", str(make_checkpoint(**config)), "--quant", quant),
                *("--max-seq-len", str(max_seq_len), "--max-prefill", str(max_prefill)),
                *("--output", str(directory)),
            ]
        )
        networks = []

        def build_program(model, *arguments):
            networks.append(copy.deepcopy(model))
            return build(model, *arguments)

        build = export.pte.build_program
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            patch.setattr(export.attention, "FIRST_BLOCK", first_block)
            patch.setattr(export.pte, "build_program", build_program)
            export.gemma.export(options, lambda _: None)
        return directory, *networks

    return make


@pytest.fixture(scope="module")
def load(export_of):
    """A function: name -> the artifact's program, just loaded."""
    return lambda name: ExecuTorchProgram(open_artifact(export_of(name)[0]))


@pytest.fixture(scope="module")
def text_of(export_of):
    """A function: name -> ids that fill the cache, and the eager network's logits [T, V] after
    each of them."""

    @functools.cache
    def run(name: str):
        _, model = export_of(name)
        size, generator = model.max_seq_len, torch.Generator().manual_seed(1)
        ids = torch.randint(3, model.config.vocab_size, (1, size), generator=generator)
        with torch.no_grad():
            logits = [model.decode(ids[:, [i]], torch.tensor([i])) for i in range(size)]
        return ids.numpy(), torch.cat(logits).numpy()

    return run


def feed(program, ids: np.ndarray, chunks, decoded: int = 0) -> np.ndarray:
    """Prefill chunks of these lengths from position 0 on, decode some more ids: the logits after
    each call."""
    rows, start = [], 0
    for length in chunks:
        positions = np.arange(start, start + length)
        rows.append(program.prefill(ids[:, start : start + length], positions)[0].copy())
        start += length
    for position in range(start, start + decoded):
        row = program.decode(ids[:, position : position + 1], np.array([position]))
        rows.append(row[0].copy())
    return np.array(rows)


def even(length: int, chunk: int) -> list[int]:
    """So many positions in chunks of this size, and what is left."""
    return [chunk] * (length // chunk) + [length % chunk] * (length % chunk > 0)


def assert_near(actual: np.ndarray, expected: np.ndarray) -> None:
    """The same logits but for rounding: these differ by 0.15 from token to token."""
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=1e-5)
    assert np.array_equal(actual.argmax(1), expected.argmax(1))


# Against the eager network


@pytest.mark.parametrize(
    "name, chunk", [(name, i) for name in EXACT for i in range(1, ARTIFACTS[name][4] + 1)]
)
def test_chunks_of_every_size_give_the_eager_networks_logits(load, text_of, name, chunk):
    ids, expected = text_of(name)
    chunks = even(ids.shape[1], chunk)
    ends = list(accumulate(chunks))
    assert_near(feed(load(name), ids, chunks), expected[np.array(ends) - 1])


@pytest.mark.parametrize("name", EXACT)
def test_decoding_gives_the_eager_networks_logits_at_every_position(load, text_of, name):
    ids, expected = text_of(name)
    assert_near(feed(load(name), ids, [], ids.shape[1]), expected)


@settings(deadline=None, max_examples=30)
@given(data=st.data(), name=st.sampled_from(EXACT))
def test_chunks_of_any_sizes_and_decoding_after_them_give_the_eager_networks_logits(
    load, text_of, data, name
):
    ids, expected = text_of(name)
    *_, max_seq_len, max_prefill = ARTIFACTS[name]
    chunks = data.draw(st.lists(st.integers(1, max_prefill), max_size=20))
    chunks = [n for n, end in zip(chunks, accumulate(chunks)) if end <= max_seq_len]
    decoded = data.draw(st.integers(0, min(20, max_seq_len - sum(chunks))))
    ends = [*accumulate(chunks), *range(sum(chunks) + 1, sum(chunks) + decoded + 1)]
    if ends:
        assert_near(feed(load(name), ids, chunks, decoded), expected[np.array(ends) - 1])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_program_gives_the_quantized_networks_logits(load, text_of, name):
    ids, expected = text_of(name)
    *_, max_seq_len, max_prefill = ARTIFACTS[name]
    chunks = even(30, max_prefill)
    ends = [*accumulate(chunks), *range(31, max_seq_len + 1)]
    actual, expected = feed(load(name), ids, chunks, 30), expected[np.array(ends) - 1]
    error = np.abs(actual - expected).max(1)
    # A code that lies between two may be rounded up here and down there: that shows from then on,
    # but little. Everything before is the same.
    assert error.max() < 0.02
    assert np.quantile(error, 0.2) < 1e-5


def test_logits_of_the_4_bit_weights_alone_would_be_noticed(export_of, text_of):
    name = "8da8w, shortlist"
    ids, expected = text_of(name)
    model = copy.deepcopy(export_of(name)[1])
    model.lm_head = model.lm_head.approximate
    token = torch.from_numpy(ids[:, :1])
    with torch.no_grad():
        approximate = model.decode(token, torch.tensor([0])).numpy()[0]
    best = np.argsort(expected[0])[-20:]
    assert np.abs(approximate - expected[0])[best].max() > 1e-3


# One sequence after another


@pytest.mark.parametrize("name", ARTIFACTS)
@pytest.mark.parametrize("length", [1, 4, 5, 17, 33])
def test_a_sequence_gives_exactly_what_it_gives_in_a_fresh_program(load, text_of, name, length):
    ids, _ = text_of(name)
    chunks = even(length, ARTIFACTS[name][4])
    used = load(name)
    feed(used, ids[:, ::-1].copy(), even(40, ARTIFACTS[name][4]), ids.shape[1] - 40)
    expected = feed(load(name), ids, chunks, 20)
    assert np.array_equal(feed(used, ids, chunks, 20), expected)


# Programs beside one another


@pytest.mark.parametrize("other", ["one key head", "8da8w, shortlist", "two key heads"])
def test_a_program_gives_the_same_while_others_come_and_go(load, text_of, other):
    name = "two key heads"
    ids, _ = text_of(name)
    program = load(name)
    expected = feed(program, ids, [16, 3], 30)
    others_ids, _ = text_of(other)
    chunks = even(12, ARTIFACTS[other][4])
    another = load(other)
    others_expected = feed(another, others_ids, chunks, 20)
    assert np.array_equal(feed(program, ids, [16, 3], 30), expected)
    assert np.array_equal(feed(another, others_ids, chunks, 20), others_expected)
    del program
    gc.collect()
    assert np.array_equal(feed(another, others_ids, chunks, 20), others_expected)
    del another
    gc.collect()
    assert np.array_equal(feed(load(name), ids, [16, 3], 30), expected)


@pytest.mark.parametrize("name", ARTIFACTS)
def test_two_programs_of_one_artifact_have_caches_of_their_own(load, text_of, name):
    ids, _ = text_of(name)
    expected = feed(load(name), ids, [], 30)
    one, two = load(name), load(name)
    for i in range(30):
        row = one.decode(ids[:, i : i + 1], np.array([i]))[0].copy()
        two.decode(ids[:, 59 - i : 60 - i], np.array([i]))
        assert np.array_equal(row, expected[i])


@pytest.mark.parametrize("name", ARTIFACTS)
def test_a_program_can_be_loaded_and_dropped_again_and_again(load, text_of, name):
    ids, _ = text_of(name)
    rows = []
    for _ in range(3):
        rows.append(feed(load(name), ids, [1], 20))
        gc.collect()
    assert np.array_equal(rows[0], rows[1]) and np.array_equal(rows[0], rows[2])


# Parts


def test_a_shortlist_is_rescored_as_in_the_eager_network(as_method):
    generator = torch.Generator().manual_seed(0)
    shortlist = Shortlist(QuantizedEmbedding(torch.nn.Embedding(1, 96)))
    count = shortlist.SIZE
    values, scales = quantize_rows(torch.randn(count, 96, generator=generator), 8, 32)
    call = rescore(shortlist)
    examples = torch.zeros_like(values), torch.zeros_like(scales), torch.zeros(1, 1, 96)
    run = as_method(lambda *rows: call(*rows)[0], examples)
    for _ in range(3):
        hidden = torch.randn(1, 1, 96, generator=generator)
        expected = dot_products(values, scales, hidden)
        torch.testing.assert_close(run(values, scales, hidden)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def greedy_method(as_method):
    return as_method(Greedy(), (torch.zeros(1, 4),))


@pytest.mark.parametrize(
    "logits",
    [
        [0.0, 3.0, 2.0, 1.0], [1.0, 3.0, 3.0, 3.0], [-1.0, -1.0, -1.0, -1.0], [0.0, 1.0, INF, INF],
        [-INF, -INF, -5.0, -INF], [-INF] * 4, [NAN, 1.0, 2.0, 1.5], [1.0, 2.0, NAN, 2.0],
        [NAN, -INF, NAN, -5.0], [NAN] * 4, [NAN, -INF, -INF, -INF], [NAN, 1.0, INF, 0.0],
    ],
)  # fmt: skip
def test_greedy_is_the_samplers(greedy_method, logits):
    logits = torch.tensor([logits])
    assert torch.equal(greedy_method(logits)[0], greedy(logits))


@pytest.mark.parametrize("value", [7.0, NAN])
def test_a_token_lies_in_memory_of_its_own_whatever_runs_after_it(load, text_of, value):
    name = "two key heads"
    ids, _ = text_of(name)
    program = load(name)
    logits = np.zeros((1, 259), np.float32)
    before = program.select(logits, 0)
    logits[0, [5, 200]] = value, 7.0
    token = program.select(logits, 0)
    assert np.shares_memory(before, token)
    expected = token.copy()
    program.select(program.decode(ids[:, :1], np.array([0])), 1)
    feed(program, ids, [5])
    assert np.array_equal(token, expected)
