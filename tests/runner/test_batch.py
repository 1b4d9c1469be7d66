"""Batches: each request gives what it gives alone, whoever comes and goes beside it, and every copy
is counted. The program is an oracle in NumPy, so that thousands of steps cost little."""

import itertools
import time
import zlib
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tokenloop import runner
from tokenloop.export.artifact import FORMAT_VERSION, seal
from tokenloop.runner import LoopOptions, Request, RunnerError
from tokenloop.runner import model as runner_model
from tokenloop.runner.loop import Loop
from tokenloop.runner.pace import Stall
from tokenloop.runner.program import GREEDY, PARAMETERS, Program, Selected
from tokenloop.runner.transfers import Transfers

VARIANTS = [
    LoopOptions(*variant)
    for variant in itertools.product(("embed", "alias", "host"), ("device", "host"), (True, False))
]
VARIANTS += [
    LoopOptions(double_buffering=ahead, run_ahead=n) for ahead in (True, False) for n in (2, 5)
]
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
EOS, BOS, A, B, C = 1, 2, *(ALPHABET.index(letter) + 3 for letter in "abc")
VOCABULARY = 259


class Oracle(Program):
    """A program whose logits depend on all tokens of a row's sequence, in order, and on nothing
    else: a row, state, position or buffer that is mixed up changes the ids. Only EOS, A, B and
    C are ever chosen. A token's embedding has two entries, the first of which is minus the id.

    `selected_by` are the methods that chose, in order. "sample_unfiltered", which only some have,
    does not look at top_k and top_p."""

    embeds = has_logits = True

    def __init__(
        self, batch: int, max_seq_len: int, max_prefill: int, can_sample: bool = True,
        methods: tuple[str, ...] = (),
    ):  # fmt: skip
        self.batch, self.max_prefill, self.can_sample = batch, max_prefill, can_sample
        self.manifest = {
            "batch": batch, "max_seq_len": max_seq_len, "max_prefill": max_prefill,
            "vocab_size": VOCABULARY, "methods": methods,
        }  # fmt: skip
        self.selected_by, self.loaded = [], []
        self.contents = np.full((batch, max_seq_len), -1)
        self.decode_logits = np.zeros((batch, VOCABULARY), np.float32)
        self.prefill_logits = np.zeros((1, VOCABULARY), np.float32)
        names = "greedy", "sample", "sample_unfiltered"
        ways = list(itertools.product(names, (False, True)))
        self.next_ids = {way: np.zeros((2, batch, 1), np.int64) for way in ways}
        self.hidden = {way: np.zeros((2, batch, 1, 2), np.float32) for way in ways if way[1]}
        self.looked_up = np.zeros((batch, 1, 2), np.float32)
        self.row_id = np.zeros((1, 1), np.int64)
        self.transfers = Transfers()
        self.positions = []

    def load_sampling(self, method, embed):
        if not self.can_sample:
            raise RunnerError("no method sample: export it again")
        self.loaded.append((method, embed))

    def prefill(self, tokens, positions, *row):
        assert (tokens.dtype, positions.dtype, len(tokens)) == (np.int64, np.int64, 1)
        assert 1 <= tokens.size == positions.size <= self.max_prefill
        assert len(row) == (self.batch > 1)
        (where,) = row[0] if row else [0]
        self.contents[where, positions] = tokens[0]
        self.prefill_logits[0] = logits_of(self.contents[where, : positions[-1] + 1])
        return self.prefill_logits

    def decode(self, fed, position):
        if self.embedding:
            assert (fed.shape, fed.dtype) == ((self.batch, 1, 2), np.float32)
            token = -fed[:, :, 0].astype(np.int64)
        else:
            assert (fed.shape, fed.dtype) == ((self.batch, 1), np.int64)
            token = fed
        assert (position.shape, position.dtype) == ((self.batch,), np.int64)
        self.positions.append(position.tolist())
        for row, (id_, at) in enumerate(zip(token[:, 0], position)):
            self.contents[row, at] = id_
            self.decode_logits[row] = logits_of(self.contents[row, : at + 1])
        self.logits = self.decode_logits
        return self.decode_logits

    def select(self, logits, buffer, choice=GREEDY):
        way = choice.method, self.embedding
        token = fed = self._choose(self.next_ids[way][buffer], logits, choice)
        if self.embedding:
            fed = self.hidden[way][buffer]
            fed[:, :, 0] = -token
        return Selected(token, fed)

    def select_row(self, logits, choice):
        return self._choose(self.row_id, logits, choice)

    def feed(self, token, buffer):
        if not self.embedding:
            return token
        self.looked_up[:, :, 0] = -token
        return self.looked_up

    def empty(self, *shape):
        return np.full(shape, -1)

    def next_id(self, buffer):
        return self.next_ids["greedy", self.embeds][buffer]

    def _choose(self, out, logits, choice):
        assert len(logits) == len(out)
        method, inputs, _ = choice
        types = [] if method == "greedy" else [*PARAMETERS.values(), np.int64]
        assert [(x.dtype, x.shape) for x in inputs] == [(t, (len(out),)) for t in types]
        self.selected_by.append(method)
        for row in range(len(out)):
            parameters = [x[row] for x in inputs]
            if method == "sample_unfiltered":
                parameters[1:3] = 0, np.float32(1)
            out[row] = chosen(logits[row], *parameters)
        return out


def logits_of(history) -> np.ndarray:
    logits = np.zeros(VOCABULARY, np.float32)
    generator = np.random.default_rng(zlib.crc32(np.asarray(history, np.int64).tobytes()))
    logits[[EOS, A, B, C]] = 1 + generator.random(4) * (0.4, 1, 1, 1)
    return logits


def chosen(logits, temperature=0.0, top_k=0, top_p=1.0, seed=0, position=0) -> int:
    if temperature == 0:
        return int(logits.argmax())
    key = np.array([temperature, top_k, top_p, seed, position], np.float64).tobytes()
    return (A, B, C, EOS)[zlib.crc32(key + logits.tobytes()) % 9 % 4]


def alone(prompt_ids: list[int], count: int, request: Request) -> list[int]:
    """The ids that one sequence gives, from the definitions and without a loop."""
    ids, sampled = list(prompt_ids), request.temperature > 0
    parameters = (request.temperature, request.top_k, request.top_p, request.seed)
    for position in range(len(ids) - 1, len(ids) - 1 + count):
        rounded = [np.float32(x) if isinstance(x, float) else x for x in parameters]
        ids.append(chosen(logits_of(ids), *((*rounded, position) if sampled else ())))
    return ids[len(prompt_ids) :]


@dataclass(eq=False)
class Sequence:
    """A sequence whose reader has enough after `wanted` ids."""

    prompt_ids: list[int]
    limit: int
    request: Request
    wanted: int = 1000
    finish_reason: str | None = None
    logprobs: list = field(default_factory=list)
    prompt_logprobs: list = field(default_factory=list)
    restriction: None = None

    def expected(self) -> list[int]:
        return alone(self.prompt_ids, min(self.limit, self.wanted), self.request)


def drive(loop: Loop, sequences, used: int, options=None) -> list[tuple[int, int]]:
    """All (number of the sequence, id), in the order in which they come."""
    sequences, events = list(sequences), []
    counts = [0] * len(sequences)
    for sequence in sequences:
        sequence.finish_reason = None
    for sequence, token_id in loop.tokens(iter(sequences), used, loop.variant(options)):
        number = sequences.index(sequence)
        events.append((number, token_id))
        counts[number] += 1
        if counts[number] == sequence.wanted:
            sequence.finish_reason = "enough"
    return events


def ids_of(events, number: int) -> list[int]:
    return [token_id for n, token_id in events if n == number]


def copies(loop: Loop) -> dict:
    return {
        name: (entry["count"], entry["bytes"]) for name, entry in loop.transfers.as_dict().items()
    }


def make_loop(batch: int, max_seq_len: int = 40, max_prefill: int = 4, **oracle) -> Loop:
    return Loop(Oracle(batch, max_seq_len, max_prefill, **oracle))


REQUESTS = st.builds(
    Request,
    st.just(""),
    temperature=st.sampled_from([0.0, 0.0, 0.7, 1.3]),
    top_k=st.sampled_from([0, 5]),
    top_p=st.sampled_from([1.0, 0.3]),
    seed=st.sampled_from([0, 7, -(2**63), 2**63 - 1]),
)
SEQUENCES = st.builds(
    Sequence,
    st.lists(st.integers(2, 9), min_size=1, max_size=12),
    st.integers(1, 15),
    REQUESTS,
    st.sampled_from([1, 2, 3, 7, 1000, 1000]),
)


# The loop


@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 5),
    max_prefill=st.integers(1, 5),
    sequences=st.lists(SEQUENCES, max_size=12),
    methods=st.sampled_from([(), ("sample_unfiltered",)]),
    data=st.data(),
)
def test_each_sequence_gives_what_it_gives_alone_in_every_variant(
    batch, max_prefill, sequences, methods, data
):
    used = data.draw(st.integers(1, batch))
    loop = make_loop(batch, 27, max_prefill, methods=methods)
    orders = []
    for options in VARIANTS:
        events = drive(loop, sequences, used, options)
        for number, sequence in enumerate(sequences):
            assert ids_of(events, number) == sequence.expected()
        if options.run_ahead == 1:
            orders.append(events)
    # Even the order in which the tokens of different rows come is the same, one step at a time.
    assert all(events == orders[0] for events in orders)
    # The last token of a full cache is never fed.
    assert max((max(line) for line in loop.program.positions), default=0) <= 25


@settings(max_examples=100, deadline=None)
@given(batch=st.integers(1, 4), sequences=st.lists(SEQUENCES, max_size=10))
def test_a_sequence_is_one_copy_within_the_device_and_a_step_is_one_download(batch, sequences):
    loop = make_loop(batch)
    events = drive(loop, sequences, batch)
    found = copies(loop)
    joins = len(sequences) if batch > 1 else 0
    assert found["device_to_device"] == (joins, 8 * joins)
    downloads, size = found["device_to_host"]
    assert size == 8 * batch * downloads
    assert downloads <= loop.steps + len(sequences) and (downloads > 0) == bool(events)


def test_idle_rows_compute_at_position_0():
    loop = make_loop(3)
    greedy = Request("")
    drive(loop, [Sequence([5, 6], 6, greedy), Sequence([7], 3, greedy)], 3)
    assert loop.program.positions == [[2, 1, 0], [3, 2, 0], [4, 0, 0], [5, 0, 0], [6, 0, 0]]


def test_a_row_is_free_again_one_step_after_an_early_end():
    loop = make_loop(2)
    greedy = Request("")
    sequences = [Sequence([5], 30, greedy, 3), Sequence([6], 9, greedy), Sequence([7], 4, greedy)]
    drive(loop, sequences, 2)
    firsts = [line[0] for line in loop.program.positions]
    # The step at position 3 is the surplus one; then the third sequence begins at 1.
    assert firsts == [1, 2, 3, 1, 2, 3, 0, 0]
    assert [line[1] for line in loop.program.positions] == [1, 2, 3, 4, 5, 6, 7, 8]


def test_sequences_are_taken_only_when_a_row_is_free():
    loop, taken = make_loop(2), []

    def source():
        for number in itertools.count():
            taken.append(number)
            yield Sequence([number % 7 + 2], 3, Request(""))

    tokens = loop.tokens(source(), 2, loop.variant(None))
    for count, expected in ((1, 2), (5, 2), (1, 4), (6, 6)):
        for _ in range(count):
            next(tokens)
        assert len(taken) == expected


def test_rows_that_are_not_used_stay_idle():
    loop = make_loop(4)
    drive(loop, [Sequence([5], 4, Request("")) for _ in range(6)], 2)
    assert {tuple(line[2:]) for line in loop.program.positions} == {(0, 0)}


def test_a_sequence_that_is_cancelled_by_another_gives_no_more():
    loop = make_loop(2)
    first, second = (Sequence([n], 10, Request("")) for n in (5, 6))
    seen = []
    for sequence, _ in loop.tokens([first, second], 2, loop.variant(None)):
        seen.append(sequence)
        if seen.count(first) == 3:
            second.finish_reason = "cancelled"
    assert (seen.count(first), seen.count(second)) == (10, 2)


def test_a_program_that_cannot_embed_feeds_tokens_and_refuses_to_do_otherwise(monkeypatch):
    monkeypatch.setattr(Oracle, "embeds", False)
    loop = make_loop(2)
    sequences = [Sequence([5], 9, Request("")), Sequence([6, 7], 4, Request(""))]
    monkeypatch.delattr(Oracle, "feed")
    events = drive(loop, sequences, 2)
    assert [ids_of(events, i) for i in (0, 1)] == [s.expected() for s in sequences]
    with pytest.raises(RunnerError, match="^feed is 'embed', and the artifact lacks the methods"):
        loop.variant(LoopOptions(feed="embed"))
    with pytest.raises(RunnerError, match="^feed is 'wire'; it must be one of auto, embed, alias"):
        LoopOptions(feed="wire")


# Prompts between steps


class Coming:
    """Sequences of which one more is there each time that a row asks, and sometimes none."""

    def __init__(self, sequences, gaps):
        self.left, self.gaps = list(sequences), itertools.cycle(gaps)

    def __iter__(self):
        return self

    def __next__(self):
        if not self.left or next(self.gaps):
            raise StopIteration
        return self.left.pop(0)


@settings(max_examples=50, deadline=None)
@given(
    batch=st.integers(1, 5),
    max_prefill=st.integers(1, 5),
    sequences=st.lists(SEQUENCES, max_size=12),
    gaps=st.lists(st.booleans(), min_size=1, max_size=5),
    options=st.sampled_from(VARIANTS),
    can_wait=st.booleans(),
)
def test_sequences_that_come_late_and_are_prefilled_between_steps_give_what_they_give_alone(
    batch, max_prefill, sequences, gaps, options, can_wait
):
    loop = make_loop(batch, 27, max_prefill)
    loop._held.can_wait = can_wait
    coming, events = Coming(sequences, [*gaps, False]), {id(s): [] for s in sequences}
    for sequence in sequences:
        sequence.finish_reason = None
    while coming.left:
        # Without time to stall there is one chunk between two steps.
        for sequence, token_id in loop.tokens(coming, batch, loop.variant(options), Stall(0)):
            events[id(sequence)].append(token_id)
            if len(events[id(sequence)]) == sequence.wanted:
                sequence.finish_reason = "enough"
    assert [events[id(s)] for s in sequences] == [s.expected() for s in sequences]


def calls_of(loop: Loop, sequences, stall, used: int = 2) -> str:
    """P for each chunk of a prompt, D for each step, in their order."""
    calls, program = [], loop.program
    for letter, name in (("P", "prefill"), ("D", "decode")):
        method = getattr(program, name)
        setattr(program, name, lambda *a, m=method, x=letter: calls.append(x) or m(*a))
    for _ in loop.tokens(sequences, used, loop.variant(None), stall):
        pass
    return "".join(calls)


def late_prompt() -> list[Sequence]:
    """A row that runs, one that ends at once, and a prompt of three chunks that takes its place."""
    greedy = Request("")
    return [Sequence([5], 9, greedy), Sequence([6], 1, greedy), Sequence([7] * 10, 2, greedy)]


def test_a_step_waits_for_one_chunk_where_there_is_no_time_to_stall():
    assert calls_of(make_loop(2), late_prompt(), Stall(0)) == "PDPDPDPDPDDDD"
    assert calls_of(make_loop(2), late_prompt(), Stall(1e9)) == "PPDPPPDDDDDDD"
    assert calls_of(make_loop(2), late_prompt(), None) == "PPDPPPDDDDDDD"


def test_a_step_waits_for_a_whole_prompt_where_a_step_would_spoil_half_of_one():
    loop = make_loop(2)
    loop.program.manifest["state"] = [{"name": "layers.0.linear_attn.cache.recurrent"}]
    assert calls_of(Loop(loop.program), late_prompt(), Stall(0)) == "PDPDPPPDDDDDD"
    loop.program.manifest["state"] = [{"name": "layers.0.cache.k"}, {"name": "layers.0.cache.v"}]
    assert calls_of(Loop(loop.program), late_prompt(), Stall(0)) == "PDPDPDPDPDDDD"


def test_nobody_waits_for_the_rest_of_a_prompt_that_is_given_up():
    loop, sequences = make_loop(2), late_prompt()
    coming = Coming([*sequences, Sequence([8], 3, Request(""))], [False])
    found = {id(s): [] for s in coming.left}
    order = list(found)
    for sequence, token_id in loop.tokens(coming, 2, loop.variant(None), Stall(0)):
        found[id(sequence)].append(token_id)
        if loop.program.positions and loop.program.positions[-1][1] == 4:
            # One chunk of it is prefilled.
            sequences[2].finish_reason = "cancelled"
    assert found[order[2]] == [] and len(found[order[3]]) == 3
    assert found[order[0]] == sequences[0].expected()
    assert max(line[1] for line in loop.program.positions) == 4


# Log probabilities


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    sequences=st.lists(SEQUENCES, max_size=7),
    counts=st.lists(st.sampled_from([None, 0, 3, 20]), min_size=7, max_size=7),
    options=st.sampled_from(VARIANTS),
    of_prompts=st.booleans(),
)
def test_log_probabilities_are_those_of_the_logits_that_chose_the_token(
    batch, sequences, counts, options, of_prompts
):
    for sequence, count in zip(sequences, counts):
        too = of_prompts and count is not None
        sequence.request = replace(sequence.request, logprobs=count, prompt_logprobs=too)
        sequence.logprobs, sequence.prompt_logprobs = [], []
    loop = make_loop(batch, 27)
    events = drive(loop, sequences, batch, options)
    for number, sequence in enumerate(sequences):
        ids = ids_of(events, number)
        assert ids == sequence.expected()
        if sequence.request.logprobs is None:
            assert sequence.logprobs == []
            continue
        assert len(sequence.logprobs) == len(ids)
        whole, start = sequence.prompt_ids + ids, len(sequence.prompt_ids)
        if of_prompts:
            start = 1
        assert len(sequence.prompt_logprobs) == len(sequence.prompt_ids) - start
        every = sequence.prompt_logprobs + sequence.logprobs
        for i, found in enumerate(every, start):
            logits = logits_of(whole[:i]).astype(np.float64)
            expected = logits - np.log(np.exp(logits).sum())
            assert abs(found.logprob - expected[whole[i]]) < 1e-6
            # Of equal ones the lower id comes first, as in `greedy`.
            order = np.lexsort((np.arange(VOCABULARY), -logits))[: sequence.request.logprobs]
            assert [token_id for token_id, _ in found.top] == order.tolist()
            assert all(abs(value - expected[token_id]) < 1e-6 for token_id, value in found.top)


# The method that chooses


FILTERED = Request("", temperature=0.7, top_k=5)
UNFILTERED = Request("", temperature=0.7)


@pytest.mark.parametrize(
    "request_, expected",
    [
        (Request(""), "greedy"),
        # Filters of a greedy row filter nothing.
        (Request("", top_k=5, top_p=0.3), "greedy"),
        (UNFILTERED, "sample_unfiltered"),
        (FILTERED, "sample"),
        (Request("", temperature=0.7, top_p=0.99), "sample"),
        (Request("", temperature=0.7, top_k=VOCABULARY - 1), "sample"),
        (Request("", temperature=0.7, top_k=VOCABULARY), "sample_unfiltered"),
        (Request("", temperature=0.7, top_k=2**63 - 1), "sample_unfiltered"),
    ],
    ids=str,
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_row_that_is_sampled_without_filters_takes_the_method_without(batch, request_, expected):
    loop = make_loop(batch, methods=("sample_unfiltered",))
    drive(loop, [Sequence([5], 6, request_)], batch)
    assert loop.program.selected_by == [expected] * 6
    # An artifact that lacks the method filters by nothing.
    loop = make_loop(batch)
    drive(loop, [Sequence([5], 6, request_)], batch)
    assert loop.program.selected_by == [expected.removesuffix("_unfiltered")] * 6


def test_one_row_with_a_filter_decides_for_all_while_it_runs():
    loop = make_loop(3, methods=("sample_unfiltered",))
    limits = (9, 7, 4)
    sequences = [Sequence([5], n, r) for n, r in zip(limits, (Request(""), UNFILTERED, FILTERED))]
    events = drive(loop, sequences, 3)
    assert [ids_of(events, i) for i in range(3)] == [s.expected() for s in sequences]
    firsts, steps = loop.program.selected_by[:3], loop.program.selected_by[3:]
    assert firsts == ["greedy", "sample_unfiltered", "sample"]
    # Of the filtered row three steps, of the unfiltered one three more, and two greedy ones.
    assert steps == ["sample"] * 3 + ["sample_unfiltered"] * 3 + ["greedy"] * 2


# Copies


def test_uploads_are_the_prompts_and_one_schedule_for_each_change():
    loop = make_loop(3)
    greedy = Request("")
    sequences = [Sequence([5] * 6, limit, greedy) for limit in (5, 9, 12)]
    drive(loop, sequences, 3)
    table, prompts, schedule = 8 * 40, 3 * 6 * 8, 11 * 3 * 8
    # A limit that is reached is in the schedule: no upload.
    assert copies(loop) == {
        "host_to_device": (1 + 3 + 1, table + prompts + schedule),
        "device_to_device": (3, 3 * 8),
        "device_to_host": (12, 12 * 3 * 8),
    }
    # The first sequence's fifth token is read after step 5, and another one takes its row.
    before = loop.transfers.snapshot()
    drive(loop, [*sequences, Sequence([6] * 3, 4, greedy)], 3)
    found = loop.transfers.since(before)
    schedules = 8 * 3 * (11 + 6)
    assert vars(found.host_to_device) == {"count": 4 + 2, "bytes": prompts + 3 * 8 + schedules}
    assert vars(found.device_to_device) == {"count": 4, "bytes": 4 * 8}
    assert found.device_to_host.count == 12


def test_an_early_end_that_nobody_takes_the_place_of_costs_one_schedule():
    loop = make_loop(2)
    greedy = Request("")
    drive(loop, [Sequence([5], 20, greedy), Sequence([6], 20, greedy, 4)], 2)
    # 5 steps are submitted when the fourth token is read.
    assert copies(loop)["host_to_device"] == (1 + 2 + 2, 8 * 40 + 2 * 8 + 16 * (19 + 15))


def test_sampling_parameters_go_up_when_they_change():
    loop = make_loop(2)
    sampled = Request("", temperature=0.5, seed=3)

    def uploads(*requests, limits=(9, 9, 9, 9)):
        before = loop.transfers.snapshot()
        drive(loop, [Sequence([5], n, r) for n, r in zip(limits, requests)], 2)
        found = loop.transfers.since(before)
        return found.host_to_device.count - len(requests)

    assert uploads(Request(""), Request("")) == 1
    # Four arrays, two of float32 and two of int64, and the schedule.
    assert uploads(sampled, sampled) == 4 + 1
    before = copies(loop)["host_to_device"][1]
    drive(loop, [Sequence([5], 2, sampled)], 2)
    assert copies(loop)["host_to_device"][1] - before == 8 + 2 * (4 + 8 + 4 + 8) + 2 * 8
    # Another joins with another seed when the first one's 3 tokens are read.
    another = Request("", temperature=0.5, seed=4)
    assert uploads(sampled, sampled, another, limits=(3, 9, 7)) == 4 + 1 + 1 + 1
    # It is the last one that samples, and its row is set to be greedy only if others still sample.
    assert uploads(sampled, Request(""), limits=(3, 9)) == 4 + 1
    assert uploads(sampled, sampled, limits=(3, 9)) == 4 + 1 + 1


@pytest.mark.parametrize("double_buffering", [True, False])
def test_the_hosts_own_feed_and_positions_cost_one_upload_each_a_step(double_buffering):
    def uploads(**options):
        loop = make_loop(3)
        before = loop.transfers.snapshot()
        options = LoopOptions(**options, double_buffering=double_buffering)
        drive(loop, [Sequence([5] * 6, 12, Request("")) for _ in range(3)], 3, options)
        found = loop.transfers.since(before).host_to_device
        return found.count, found.bytes

    prompts, steps = 3 * 6 * 8, 11 * 3 * 8
    assert uploads() == (3 + 1, prompts + steps)
    assert uploads(feed="host") == (3 + 1 + 11, prompts + steps + steps)
    # Each prompt is two chunks.
    assert uploads(positions="host") == (3 + 3 * 2 + 11, prompts + prompts + steps)


# The Python API, on a model whose program is the oracle


@pytest.fixture
def make_model(tmp_path, monkeypatch):
    """A function (batch, methods, **Oracle's) -> model with an id for each byte."""
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<eos>", "<bos>", *ALPHABET])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<bos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "model.pte").write_bytes(b"oracle")
    entry = {
        "file": "tokenizer.json",
        "bos_token_id": BOS,
        "eos_token_ids": [EOS],
        "prefix_ids": [BOS],
        "suffix_ids": [],
        "shown_ids": [],
        "rstrip_ids": [],
        "special_tokens": {"bos_token": "<bos>", "eos_token": "<eos>"},
        "chat_template": None,
        "tool_template": None,
    }

    def make(batch: int, methods: tuple[str, ...] = (), **oracle):
        manifest = {
            "format": FORMAT_VERSION,
            "engine": "executorch",
            "backend": "portable",
            "device": "cpu",
            "methods": ["prefill", "decode", "greedy", "greedy_row", *methods],
            "dtype": "float32",
            "state": [],
            "model_type": "oracle",
            "quant": "fp32",
            "checkpoint": {"file": "oracle", "sha256": "0" * 64},
            "versions": {},
            "batch": batch,
            "max_seq_len": 60,
            "max_prefill": 4,
            "vocab_size": VOCABULARY,
            "hidden_size": 2,
            "tokenizer": entry,
            "program": {"file": "model.pte"},
        }
        seal(tmp_path, manifest)
        program = Oracle(batch, 60, 4, methods=methods, **oracle)
        monkeypatch.setattr(runner_model, "load_program", lambda *_: program)
        return runner.load(tmp_path)

    return make


PROMPTS = ["hello", "a", "", "xyz" * 6, "Once upon a time", "b", "c", "quite another one"]


def outcome(result) -> tuple:
    return result.prompt_ids, result.token_ids, result.text, result.finish_reason, result.error


def several(**parameters) -> list[Request]:
    """One Request for each prompt, with limits of their own."""
    return [
        Request(prompt, max_new_tokens=5 + 3 * i, **parameters) for i, prompt in enumerate(PROMPTS)
    ]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_request_of_a_batch_gives_what_it_gives_alone(make_model, options):
    requests = several() + several(temperature=0.8, top_k=9, top_p=0.9, seed=5, stop=("ba", "cc"))
    one = make_model(1)
    expected = [outcome(one.generate(**vars(request)).run()) for request in requests]
    assert {entry[3] for entry in expected} == {"stop", "length"}
    three = make_model(3)
    results = three.generate_batch(requests, options).run()
    assert [outcome(result) for result in results] == expected
    assert [result.index for result in results] == list(range(16))
    # One request at a time, in a program of three rows.
    assert [outcome(three.generate(**vars(r), options=options).run()) for r in requests] == expected


def test_events_are_the_tokens_of_each_request_in_their_order(make_model):
    model = make_model(3)
    batch = model.generate_batch(several())
    events = list(batch)
    for result in batch.results:
        tokens = [token for index, token in events if index == result.index]
        assert [token.id for token in tokens if token.id != EOS] == result.token_ids
        assert "".join(token.text for token in tokens) == result.text
        assert result.text == model.tokenizer.decode(result.token_ids)
    assert batch.run() is batch.results
    # The first rows' tokens come in turns.
    assert [index for index, _ in events[:6]] == [0, 1, 2, 0, 1, 2]


def test_a_result_is_unfinished_until_its_last_event(make_model):
    batch = make_model(2).generate_batch([Request("a", 3), Request("b", 6)])
    for index, _ in batch:
        result = batch.results[index]
        assert (result.finish_reason is None) == (len(result.token_ids) < result.limit)


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request("x", temperature=-0.1), "temperature is -0.1; it must be a finite number"),
        (Request("x", temperature=10**400), "0; it must be a finite number"),
        (Request("x", logit_bias={1: 10**400}), "0}; it must be a finite number"),
        (Request("x", temperature=float("nan")), "temperature is nan"),
        (Request("x", temperature=float("inf")), "temperature is inf"),
        (Request("x", temperature=1e39), "temperature is 1e+39"),
        (Request("x", temperature="hot"), "temperature is 'hot'"),
        (Request("x", top_p=0.0), "top_p is 0.0; it must be above 0 and at most 1"),
        (Request("x", top_p=1.01), "top_p is 1.01"),
        (Request("x", top_k=-1), "top_k is -1; it must be an integer, 0 (off) or more"),
        (Request("x", top_k=2.5), "top_k is 2.5"),
        (Request("x", seed=2**63), "seed is 9223372036854775808; it must be an integer of 64"),
        (Request("x", seed=-(2**63) - 1), "seed is -9223372036854775809"),
        (Request("x", max_new_tokens=0), "max_new_tokens is 0; it must be at least 1"),
        (Request("x", max_new_tokens=True), "max_new_tokens is True"),
        (Request("x", stop=("a", "")), "stop is ('a', ''); each must be a text of at least one"),
        (Request("x", stop=[3]), "stop is (3,)"),
        (Request("x", stop=None), "stop is None"),
        (Request("x", chat=True), "no chat template"),
        (Request("x" * 59), "the prompt has 60 tokens and the cache 60 positions"),
        (Request([2, 259]), "the prompt has the id 259; ids are 0 to 258"),
        (Request([-1]), "the prompt has the id -1"),
        (Request([2, "a"]), "the prompt has the id 'a', of type str; ids are integers, 0 to 258"),
        (Request(["2"]), "the prompt has the id '2', of type str"),
        (Request([True]), "the prompt has the id True, of type bool"),
        (Request([2, 70.0]), "the prompt has the id 70.0, of type float"),
        (Request([None]), "the prompt has the id None, of type NoneType"),
        (Request([[2, 70]]), "the prompt has the id [2, 70], of type list"),
        (Request([2, 2**64]), "the prompt has the id 18446744073709551616; ids are 0 to 258"),
        (Request([]), "the prompt is empty"),
        (Request(np.array([], np.int64)), "the prompt is empty"),
        (Request(3), "the prompt is 3, of type int; it must be text or a list of ids"),
        (Request(None), "the prompt is None, of type NoneType; it must be text or a list"),
        (Request(b"abc"), "the prompt is b'abc', of type bytes; it must be text or a list"),
        (Request(bytearray(b"abc")), "of type bytearray"),
        (Request({2: 70}), "the prompt is {2: 70}, of type dict"),
        (Request({2, 70}), "the prompt is {2, 70}, of type set"),
        (Request(iter([2, 70])), "of type list_iterator"),
        (Request(np.array([2.0, 70.0])), "the prompt is an array of float64 with the shape (2,)"),
        (Request(np.array([True])), "the prompt is an array of bool with the shape (1,)"),
        (Request(np.array([[2, 70]])), "the prompt is an array of int64 with the shape (1, 2)"),
        (Request(np.array(2)), "the prompt is an array of int64 with the shape ()"),
        (Request("x", chat="no"), "chat is 'no'; it must be True or False"),
        (Request("\ud800"), "lone surrogate"),
    ],
)
def test_a_wrong_request_is_refused_alone_in_one_line_with_its_number(
    make_model, request_, message
):
    model = make_model(2)
    with pytest.raises(RunnerError) as error:
        model.generate(**vars(request_))
    assert message in str(error.value) and "\n" not in str(error.value)
    good = [Request("one", 7), Request("two", 7), Request("three", 7)]
    expected = [outcome(result) for result in model.generate_batch(good).run()]
    results = model.generate_batch([*good[:1], request_, *good[1:]]).run()
    refused = results.pop(1)
    assert refused.error == f"request 2: {error.value}"
    assert (refused.finish_reason, refused.token_ids, refused.text) == ("error", [], "")
    assert [outcome(result) for result in results] == expected


@pytest.mark.parametrize(
    "kind", [tuple, np.array, lambda ids: np.array(ids, np.uint8), lambda ids: list(np.array(ids))]
)
def test_integers_of_every_kind_are_ids(make_model, kind):
    model = make_model(2)
    expected = outcome(model.generate([2, 70, 71], 9).run())
    result = model.generate(kind([2, 70, 71]), 9).run()
    assert outcome(result) == expected and {type(i) for i in result.prompt_ids} == {int}


@pytest.mark.parametrize(
    "requests, message",
    [(b"abc", "requests is b'abc', of type bytes"), ({"a": 1}, "of type dict"), (5, "of type int")],
)
def test_requests_of_another_type_are_refused_at_once(make_model, requests, message):
    with pytest.raises(RunnerError, match=message):
        make_model(2).generate_batch(requests)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"positions": "hots"}, "positions is 'hots'; it must be device or host"),
        ({"run_ahead": 2.5}, "run_ahead is 2.5; it must be at least 1"),
        ({"run_ahead": True}, "run_ahead is True"),
        ({"double_buffering": "no"}, "double_buffering is 'no'; it must be True or False"),
        ({"graph": 1}, "graph is 1; it must be True or False"),
        ({"overlap": None}, "overlap is None"),
    ],
    ids=str,
)
def test_a_variant_that_is_not_understood_is_refused(fields, message):
    with pytest.raises(RunnerError, match=message):
        LoopOptions(**fields)


def test_what_is_no_variant_number_of_rows_or_of_threads_is_refused(make_model, tmp_path):
    model = make_model(2)
    with pytest.raises(RunnerError, match="options is {'feed': 'host'}, of type dict; it must be"):
        model.generate("a", options={"feed": "host"})
    with pytest.raises(RunnerError, match="rows is 1.5; it must be at least 1"):
        model.generate_batch(["a"], rows=1.5)
    for threads in ("2", 0, True):
        with pytest.raises(RunnerError, match=f"threads is {threads!r}; it must be an integer"):
            runner.load(tmp_path, threads)


def test_thousands_of_ids_are_checked_in_less_than_a_millisecond():
    ids = [i % 259 for i in range(8192)]
    assert runner_model.checked_ids(ids, 259) == ids

    def seconds() -> float:
        start = time.perf_counter()
        runner_model.checked_ids(ids, 259)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(20)) < 1e-3


def test_a_batch_of_refused_requests_or_of_none_ends(make_model):
    model = make_model(2)
    results = model.generate_batch([Request("x", top_k=-1)] * 5).run()
    assert [result.finish_reason for result in results] == ["error"] * 5
    batch = model.generate_batch([])
    assert batch.run() == [] and batch.stats.requests == batch.stats.steps == 0


def test_prompts_alone_stand_for_requests_with_defaults(make_model):
    model = make_model(2)
    requests = ["hello", [2, 70, 71]]
    expected = [outcome(model.generate(prompt).run()) for prompt in requests]
    assert [outcome(result) for result in model.generate_batch(requests).run()] == expected


def test_requests_are_taken_from_a_generator_as_rows_are_free(make_model):
    model, taken = make_model(2), []

    def source():
        for i in itertools.count():
            taken.append(i)
            yield Request("abc"[i % 3], max_new_tokens=4)

    batch = model.generate_batch(source())
    for index, _ in batch:
        assert len(taken) == len(batch.results) <= index + 3
        if len(batch.results) == 20:
            break
    # And the model goes on with something else.
    assert model.generate("a", 4).run().token_ids == batch.results[0].token_ids


def test_an_error_of_the_iterable_is_raised_and_spoils_nothing(make_model):
    model = make_model(2)
    expected = model.generate("hello").run().token_ids

    def source():
        yield Request("a", 3)
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        model.generate_batch(source()).run()
    assert model.generate("hello").run().token_ids == expected


@pytest.mark.parametrize("rows, message", [(0, "rows is 0"), (3, "3 rows .* has 2: .* --batch 3")])
def test_rows_that_do_not_exist_are_refused(make_model, rows, message):
    with pytest.raises(RunnerError, match=message):
        make_model(2).generate_batch(["a"], rows=rows)


@pytest.mark.parametrize("single", ["one", Request("one")], ids=["text", "request"])
def test_a_single_request_is_not_taken_for_many(make_model, single):
    with pytest.raises(RunnerError, match="requests is a single one"):
        make_model(2).generate_batch(single)


def test_fewer_rows_give_the_same(make_model):
    model = make_model(4)
    outcomes = [
        [outcome(result) for result in model.generate_batch(several(), rows=rows).run()]
        for rows in (1, 2, 3, None)
    ]
    assert outcomes == [outcomes[0]] * 4


def test_a_program_without_sample_refuses_sampling_only(make_model):
    model = make_model(2, can_sample=False)
    greedy, sampled = Request("a", 5), Request("a", 5, temperature=1.0)
    results = model.generate_batch([greedy, sampled, greedy]).run()
    assert results[1].error == "request 2: no method sample: export it again"
    assert results[0].token_ids == results[2].token_ids != []
    with pytest.raises(RunnerError, match="^no method sample"):
        model.generate("a", temperature=1.0)


def test_a_request_is_generated_for_as_its_parameters_are(make_model):
    model = make_model(2)
    request = Request("hello", 9, temperature=0.8, seed=5, stop=("b",))
    expected = outcome(model.generate(**vars(request)).run())
    assert outcome(model.generate(request).run()) == expected
    with pytest.raises(RunnerError, match="^a Request is given, and seed, max_new_tokens beside"):
        model.generate(request, 9, seed=5)


@pytest.mark.parametrize("methods", [(), ("sample_unfiltered",)])
def test_only_the_method_that_a_request_needs_is_loaded(make_model, methods):
    model = make_model(2, methods)
    unfiltered = methods[0] if methods else "sample"
    for parameters, name in ({"top_k": 0}, unfiltered), ({"top_k": 9}, "sample"):
        model.generate("a", 5, LoopOptions("alias"), temperature=0.8, **parameters).run()
        assert model.loop.program.loaded.pop() == (name, False)
        assert set(model.loop.program.selected_by) == {name}
        model.loop.program.selected_by.clear()
    model.generate("a", 5, top_k=9).run()
    assert model.loop.program.loaded == []


def test_a_finished_generation_ends_quietly_when_another_has_begun(make_model):
    model = make_model(2)
    generation = model.generate("hello", 3)
    tokens = [token for token, _ in zip(generation, range(3))]
    assert len(tokens) == 3 and generation.finish_reason == "length"
    model.generate("a", 3)
    assert list(generation) == []


def test_a_generation_that_is_started_ends_a_batch_and_the_other_way_round(make_model):
    model = make_model(2)
    batch = model.generate_batch(several())
    next(iter(batch))
    generation = model.generate("hello", 20)
    with pytest.raises(RunnerError, match="another generation was started"):
        next(iter(batch))
    next(iter(generation))
    expected = [outcome(result) for result in model.generate_batch(several()).run()]
    with pytest.raises(RunnerError, match="another generation was started"):
        generation.run()
    batch = model.generate_batch(several())
    abandoned = model.generate_batch(several())
    list(itertools.islice(abandoned, 9))
    with pytest.raises(RunnerError, match="another generation was started"):
        batch.run()
    assert [outcome(result) for result in model.generate_batch(several()).run()] == expected


def test_a_cancelled_result_makes_room_and_the_others_go_on(make_model):
    model = make_model(2)
    expected = [result.token_ids for result in model.generate_batch(several()).run()]
    batch = model.generate_batch(several())
    for index, _ in batch:
        if index == 3 and len(batch.results[3].token_ids) == 2:
            batch.results[3].cancel()
    assert [result.token_ids for result in batch.results] == [
        ids[:2] if i == 3 else ids for i, ids in enumerate(expected)
    ]
    assert batch.results[3].finish_reason == "cancelled"
    batch.results[0].cancel()
    assert batch.results[0].finish_reason != "cancelled"


def test_a_cancelled_generation_ends_and_the_model_goes_on(make_model):
    model = make_model(2)
    expected = model.generate("hello", 9).run().token_ids
    generation = model.generate("hello", 9)
    for _ in generation:
        if len(generation.token_ids) == 2:
            generation.cancel()
    assert (generation.token_ids, generation.finish_reason) == (expected[:2], "cancelled")
    assert generation.stats.new_tokens == 2
    assert model.generate("hello", 9).run().token_ids == expected


def test_a_batchs_statistics_are_of_all_rows(make_model):
    batch = make_model(2).generate_batch([Request("a", 4), Request("bc", 4), Request("d", 0)])
    assert batch.stats.decode_tok_s is None and batch.stats.requests == 0
    batch.run()
    stats = batch.stats
    generated = sum(result.taken for result in batch.results)
    assert (stats.requests, stats.prompt_tokens) == (2, 5)
    assert stats.new_tokens == sum(len(result.token_ids) for result in batch.results)
    assert stats.steps >= max(result.taken for result in batch.results) - 1
    assert stats.prefill_tok_s > 0 and stats.peak_rss_mb > 1
    assert stats.time_to_first_token_s > 0
    assert (stats.decode_tok_s or 0) > 0 or generated == 2
    assert stats.transfers["device_to_device"] == {"count": 2, "bytes": 16}


def test_a_single_generations_statistics_are_those_of_a_batch_of_one(make_model):
    model = make_model(2)
    generation = model.generate("bc", 4)
    with pytest.raises(RunnerError, match="^nothing has been generated yet"):
        generation.stats.steps  # noqa: B018
    assert generation.as_dict()["stats"] is None
    stats = generation.run().stats
    assert (stats.requests, stats.prompt_tokens) == (1, 3)
    assert stats.new_tokens == len(generation.token_ids)
    assert stats.steps >= generation.taken - 1 and 0 < stats.time_to_first_token_s < 60
    # Of one prompt there is nothing to count.
    assert list(generation.as_dict()["stats"]) == [
        "prompt_tokens", "new_tokens", "time_to_first_token_s", "prefill_tok_s", "decode_tok_s",
        "peak_rss_mb", "transfers",
    ]  # fmt: skip
