"""Whole programs against the eager network: logits after every position, however they are fed."""

import copy
import functools
import gc
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.export.programs import (
    assert_near,
    assert_near_of_quantized,
    even,
    export_here,
    feed,
)
from tokenloop.export.gemma import FAMILY
from tokenloop.export.pte.pte_program import rescore
from tokenloop.export.pte.quantize import QuantizedEmbedding, Shortlist, dot_products, quantize_rows
from tokenloop.export.pte.selection import Greedy
from tokenloop.runner.engines.executorch import ExecuTorchProgram
from tokenloop.runner.manifest import open_artifact
from tokenloop.sampler.greedy import greedy

SLIDING, FULL = "sliding_attention", "full_attention"
ONE_HEAD = {"num_key_value_heads": 1, "num_hidden_layers": 2, "layer_types": [FULL, SLIDING]}
ONE_LAYER = {"num_key_value_heads": 1, "num_hidden_layers": 1, "layer_types": [FULL]}
LARGE = {"vocab_size": 16384, "num_hidden_layers": 2, "layer_types": [SLIDING, FULL]}


@dataclass(frozen=True)
class Made:
    """What an artifact is made of: what the config says, the recipe, the size of the first block,
    and flags. The window is 16."""

    config: dict
    quant: str
    first_block: int
    max_seq_len: int
    max_prefill: int
    backend: str = "xnnpack"
    batch: int = 1


ARTIFACTS = {
    # Blocks of 4, 12, 48 and 136 slots.
    "two key heads": Made({}, "fp32", 4, 200, 16),
    # Blocks of 8, 24, 96 and 72 slots.
    "one key head": Made(ONE_HEAD, "fp32", 8, 200, 7),
    # Blocks of 8, 24 and 28 slots.
    "8da8w, shortlist": Made(LARGE, "8da8w", 8, 60, 7),
    "8da4w": Made(ONE_HEAD, "8da4w", 8, 60, 7),
    "one layer, no chunks": Made(ONE_LAYER, "fp32", 8, 60, 1),
}
# Some of them once more, with rows: 7 are more than a linear layer takes at once.
BATCHES = {
    f"rows, {name}": replace(ARTIFACTS[name], batch=batch)
    for name, batch in [("two key heads", 3), ("8da8w, shortlist", 3), ("one layer, no chunks", 7)]
}
BATCHES["rows, portable"] = Made(ONE_HEAD, "fp32", 8, 60, 7, "portable", batch=3)
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
        made = (ARTIFACTS | BATCHES)[name]
        directory = tmp_path_factory.mktemp("exported") / "artifact"
        arguments = [
            *("--model", make_checkpoint(**made.config), "--quant", made.quant),
            *("--max-seq-len", made.max_seq_len, "--max-prefill", made.max_prefill),
            *("--backend", made.backend, "--batch", made.batch, "--output", directory),
        ]
        return directory, export_here(FAMILY, arguments, made.first_block)

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


# Against the eager network


@pytest.mark.parametrize(
    "name, chunk", [(name, i) for name in EXACT for i in range(1, ARTIFACTS[name].max_prefill + 1)]
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
    made = ARTIFACTS[name]
    chunks = data.draw(st.lists(st.integers(1, made.max_prefill), max_size=20))
    chunks = [n for n, end in zip(chunks, accumulate(chunks)) if end <= made.max_seq_len]
    decoded = data.draw(st.integers(0, min(20, made.max_seq_len - sum(chunks))))
    ends = [*accumulate(chunks), *range(sum(chunks) + 1, sum(chunks) + decoded + 1)]
    if ends:
        assert_near(feed(load(name), ids, chunks, decoded), expected[np.array(ends) - 1])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_program_gives_the_quantized_networks_logits(load, text_of, name):
    ids, expected = text_of(name)
    chunks = even(30, ARTIFACTS[name].max_prefill)
    ends = [*accumulate(chunks), *range(31, ARTIFACTS[name].max_seq_len + 1)]
    actual, expected = feed(load(name), ids, chunks, 30), expected[np.array(ends) - 1]
    assert_near_of_quantized(actual, expected, same=0.2, limit=0.02)


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
    chunks = even(length, ARTIFACTS[name].max_prefill)
    used = load(name)
    feed(used, ids[:, ::-1].copy(), even(40, ARTIFACTS[name].max_prefill), ids.shape[1] - 40)
    expected = feed(load(name), ids, chunks, 20)
    assert np.array_equal(feed(used, ids, chunks, 20), expected)


# Rows of a batch


class Eager:
    """The network that a program was made of, as the program is called."""

    def __init__(self, model: torch.nn.Module):
        self._model = copy.deepcopy(model)

    def prefill(self, *arguments: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._model.prefill(*map(torch.from_numpy, arguments)).numpy()

    def decode(self, *arguments: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return self._model.decode(*map(torch.from_numpy, arguments)).numpy()


class OneEach:
    """Programs of one row, called as one of several rows."""

    def __init__(self, programs):
        self._programs = programs

    def prefill(self, tokens, positions, row) -> np.ndarray:
        return self._programs[row[0]].prefill(tokens, positions)

    def decode(self, token, position) -> np.ndarray:
        rows = zip(self._programs, token, position, strict=True)
        return np.concatenate([one.decode(t[None], p[None]) for one, t, p in rows])


class Rows:
    """Texts in the rows of a program; a row without one computes along at position 0.

    `logits` has for each row those after each call since its text began, [V] each.
    """

    def __init__(self, program, made: Made):
        self.program, self.made = program, made
        self.texts: list[np.ndarray | None] = [None] * made.batch
        self.ends = [0] * made.batch
        self.logits: list[list[np.ndarray]] = [[] for _ in range(made.batch)]

    def begin(self, row: int, seed: int, length: int) -> None:
        """A text of its own for each seed; its first ids in chunks."""
        text = np.random.default_rng(seed).integers(3, 259, (1, self.made.max_seq_len))
        self.texts[row], self.ends[row], self.logits[row] = text, 0, []
        for count in even(length, self.made.max_prefill):
            positions = np.arange(self.ends[row], self.ends[row] + count)
            logits = self.program.prefill(text[:, positions], positions, np.array([row]))
            self.logits[row].append(logits[0].copy())
            self.ends[row] += count

    def end(self, row: int) -> None:
        self.texts[row], self.ends[row] = None, 0

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            for row, end in enumerate(self.ends):
                if end == self.made.max_seq_len:
                    self.end(row)
            token = [
                0 if text is None else text[0, end] for text, end in zip(self.texts, self.ends)
            ]
            logits = self.program.decode(np.array(token)[:, None], np.array(self.ends))
            for row, text in enumerate(self.texts):
                if text is not None:
                    self.logits[row].append(logits[row].copy())
                    self.ends[row] += 1


def join_and_begin_again(rows: Rows) -> np.ndarray:
    """Ragged prompts, rows that join the others and begin anew, in all blocks: the logits after
    each call for one of them, [N, V]."""
    kept, last, most = [], rows.made.batch - 1, rows.made.max_seq_len
    rows.begin(last, 1, 2)
    rows.step(5)
    rows.begin(0, 2, most // 2)
    rows.step(2)
    kept += rows.logits[last]
    rows.begin(last, 3, 30)
    rows.step(most // 8)
    kept += rows.logits[1]
    rows.begin(1, 4, 9)
    rows.step(most // 8)
    kept += rows.logits[1]
    rows.begin(1, 5, 1)
    rows.step(most // 4 - 2)
    for logits in rows.logits:
        kept += logits
    rows.end(0)
    rows.begin(last, 6, 13)
    rows.step(12)
    for logits in rows.logits[1:]:
        kept += logits
    return np.array(kept)


@pytest.mark.parametrize("name", BATCHES)
def test_rows_that_join_and_begin_anew_give_the_eager_networks_logits(load, export_of, name):
    made = BATCHES[name]
    actual = join_and_begin_again(Rows(load(name), made))
    expected = join_and_begin_again(Rows(Eager(export_of(name)[1]), made))
    if made.quant == "fp32":
        assert_near(actual, expected)
    else:
        assert_near_of_quantized(actual, expected, same=0.5, limit=0.1)


@settings(deadline=None, max_examples=15)
@given(
    calls=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 2), st.integers(0, 99), st.integers(1, 150)),
            st.integers(1, 15),
        ),
        max_size=8,
    )
)
def test_rows_give_the_eager_networks_logits_whatever_joins_when(load, export_of, calls):
    name = "rows, two key heads"
    results = []
    for program in (load(name), Eager(export_of(name)[1])):
        rows, kept = Rows(program, BATCHES[name]), []
        for call in calls:
            if isinstance(call, int):
                rows.step(call)
            else:
                kept += rows.logits[call[0]]
                rows.begin(*call)
        results.append(np.array([logits for part in (kept, *rows.logits) for logits in part]))
    if len(results[0]):
        assert_near(*results)


def idle(rows: Rows, others: list[int]) -> None:
    """Nothing happens in the other rows."""


def far_ahead(rows: Rows, others: list[int]) -> None:
    """Others read all blocks from the first step on."""
    for row in others:
        if rows.texts[row] is None:
            rows.begin(row, 10 + row, rows.made.max_seq_len - 32)


def come_and_go(rows: Rows, others: list[int]) -> None:
    """Before every step others are prefilled anew, some of them into other blocks."""
    for row in others:
        rows.begin(row, 20 + row, 1 + (rows.ends[row] * 7 + 5) % (rows.made.max_seq_len - 2))


def text_among_others(program, made: Made, row: int, do) -> np.ndarray:
    """One text's logits while others do something before its prompt and before every step."""
    others = [i for i in range(made.batch) if i != row]
    rows = Rows(program, made)
    do(rows, others)
    rows.begin(row, 0, 11)
    for _ in range(30):
        do(rows, others)
        rows.step()
    return np.array(rows.logits[row])


@pytest.mark.parametrize("do", [idle, far_ahead, come_and_go])
@pytest.mark.parametrize("name", BATCHES)
def test_a_row_gives_the_same_bits_whatever_the_others_do(load, name, do):
    made = BATCHES[name]
    expected = text_among_others(load(name), made, 0, idle)
    for row in range(made.batch):
        assert np.array_equal(text_among_others(load(name), made, row, do), expected)


@pytest.mark.parametrize("name", [name for name in ARTIFACTS if f"rows, {name}" in BATCHES])
def test_rows_give_the_same_bits_as_programs_of_one_row(load, name):
    made = BATCHES[f"rows, {name}"]
    alone = OneEach([load(name) for _ in range(made.batch)])
    expected = join_and_begin_again(Rows(alone, made))
    assert np.array_equal(join_and_begin_again(Rows(load(f"rows, {name}"), made)), expected)


# Programs beside one another


@pytest.mark.parametrize("other", ["one key head", "8da8w, shortlist", "two key heads"])
def test_a_program_gives_the_same_while_others_come_and_go(load, text_of, other):
    name = "two key heads"
    ids, _ = text_of(name)
    program = load(name)
    expected = feed(program, ids, [16, 3], 30)
    others_ids, _ = text_of(other)
    chunks = even(12, ARTIFACTS[other].max_prefill)
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


@pytest.mark.parametrize("rows", [1, 3])
def test_a_shortlist_is_rescored_as_in_the_eager_network(as_method, rows):
    generator = torch.Generator().manual_seed(0)
    shortlist = Shortlist(QuantizedEmbedding(torch.nn.Embedding(1, 96)))
    count = shortlist.SIZE
    values, scales = quantize_rows(torch.randn(rows * count, 96, generator=generator), 8, 32)
    values, scales = values.view(rows, count, 96), scales.view(rows, count, 3)
    call = rescore(shortlist, rows)
    examples = torch.zeros_like(values), torch.zeros_like(scales), torch.zeros(rows, 1, 96)
    run = as_method(lambda *rows: call(*rows)[0], examples)
    for _ in range(3):
        hidden = torch.randn(rows, 1, 96, generator=generator)
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
    before, _ = program.select(logits, 0)
    logits[0, [5, 200]] = value, 7.0
    token, _ = program.select(logits, 0)
    assert np.shares_memory(before, token)
    expected = token.copy()
    program.select(program.decode(ids[:, :1], np.array([0])), 1)
    feed(program, ids, [5])
    assert np.array_equal(token, expected)


# Methods that are linked of others


@pytest.mark.parametrize("name", ["two key heads", *QUANTIZED, *BATCHES])
def test_selection_looks_up_the_embedding_that_decode_would(load, export_of, name):
    _, model = export_of(name)
    program, rows = load(name), model.batch
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(rows, model.config.vocab_size)).astype(np.float32)
    program.begin(embed=True)
    token, hidden = program.select(logits, 1)
    assert token.shape == (rows, 1) and not np.shares_memory(token, hidden)
    assert np.array_equal(token[:, 0], logits.argmax(1))
    with torch.no_grad():
        expected = model.embed(torch.from_numpy(token)).numpy()
    assert np.array_equal(hidden, expected)
    assert np.array_equal(program.feed(token, 0), hidden)
    position = np.arange(rows)
    of_hidden = program.decode(hidden, position).copy()
    program.begin(embed=False)
    assert np.array_equal(program.decode(token, position), of_hidden)


@pytest.mark.parametrize("name", [*QUANTIZED, "rows, 8da8w, shortlist", "rows, portable"])
def test_the_file_holds_the_table_of_embeddings_once(export_of, name):
    directory, model = export_of(name)
    table = model.model.embed_tokens.weight.detach().numpy().tobytes()
    # All of it but its ends, where it might touch something else.
    assert (directory / "model.pte").read_bytes().count(table[8:-8]) == 1
