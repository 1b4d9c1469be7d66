"""Prompts between steps take as long as they may, as it is learnt from the chunks before."""

import itertools
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.stateful import stateful_model
from tests.threads import yielding_model
from tests.timed import MULTIPLE, TimedProgram
from tokenloop.runner.loop import Loop
from tokenloop.runner.pace import DRIFT, Pace, Stall
from tokenloop.runner.prefill import Part
from tokenloop.runner.request import Request

STEP_S = 3e-3


def chunk_s(chunk) -> float:
    """About that of Qwen3-4B on an H200, with a sixteenth of the tokens: the weights are read once,
    and what is far from the beginning attends to more."""
    return 2.4e-3 + sum(len(p.ids) * (0.23e-3 + p.first * 0.2e-6) for p in chunk)


@dataclass
class Sequence:
    prompt_ids: list[int]
    limit: int
    finish_reason: str | None = None
    cached_tokens: int = 0
    restriction: None = None
    request: Request = field(default_factory=lambda: Request(""))
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def expected(self) -> list[int]:
        return yielding_model(1, 4096).generate(self.prompt_ids, self.limit).run().token_ids


def gaps_of(loop: Loop, sequences, rows: int, stall: Stall | None) -> list[float]:
    """The times between two tokens of one sequence, in the order of their ends."""
    gaps = []
    for sequence, token_id in loop.tokens(sequences, rows, loop.variant(None), stall):
        now = loop.program.reached_s
        if sequence.times:
            gaps.append(now - sequence.times[-1])
        sequence.times.append(now)
        sequence.ids.append(token_id)
    return gaps


def joining(prompts: int, size: int, steps: int = 300) -> list[Sequence]:
    """Three that run for so many steps, and prompts one after the other."""
    found = [Sequence([2 + n] * 3, steps) for n in range(3)]
    return found + [Sequence([5 + n % 80] * size, 2) for n in range(prompts)]


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[int(share * len(values))]


def test_long_prompts_that_join_all_the_time_let_others_wait_for_three_steps():
    sequences = joining(40, 128)
    loop = Loop(TimedProgram(4, chunk_s, STEP_S))
    gaps = gaps_of(loop, sequences, 4, Stall())
    assert percentile(gaps, 0.99) <= 3 * STEP_S
    # Not for less than there is time for.
    assert percentile(gaps, 0.5) > 2.6 * STEP_S
    assert [s.ids for s in sequences] == [s.expected() for s in sequences]
    # It is the stall that does it.
    loop = Loop(TimedProgram(4, chunk_s, STEP_S))
    assert percentile(gaps_of(loop, joining(40, 128), 4, None), 0.9) > 10 * STEP_S


@pytest.mark.parametrize("stall_ms", [0, 3.4, 6, 12, 50])
def test_a_stall_is_as_long_as_it_is_told(stall_ms):
    loop = Loop(TimedProgram(4, chunk_s, STEP_S))
    gaps = gaps_of(loop, joining(60, 512), 4, Stall(stall_ms / 1e3))
    # A chunk of the fewest tokens may take longer, and one far from the beginning of its prompt
    # takes longer than the one before it.
    least = chunk_s([Part(0, 512, [5] * MULTIPLE, False)])
    assert percentile(gaps, 0.99) <= STEP_S + 1.1 * max(stall_ms / 1e3, least)
    sizes = sorted(loop.program.chunks[3:])
    usual = sizes[len(sizes) // 2]
    assert usual % MULTIPLE == 0
    most = max(MULTIPLE, (stall_ms / 1e3 - 2.4e-3) / 0.28e-3)
    assert most / 2 <= usual <= max(MULTIPLE, 1.25 * most)


def test_while_no_row_runs_chunks_are_whole_and_so_they_are_without_a_stall():
    loop = Loop(TimedProgram(4, chunk_s, STEP_S))
    gaps_of(loop, [Sequence([5] * 2000, 3) for _ in range(3)], 1, Stall(0))
    assert loop.program.chunks == [1024, 976] * 3
    for stall in None, Stall(1e308):
        loop = Loop(TimedProgram(4, chunk_s, STEP_S))
        gaps_of(loop, joining(3, 4000), 4, stall)
        assert max(loop.program.chunks) == 1024


def test_whole_prompts_are_chunks_where_a_prompt_cannot_wait(monkeypatch):
    program = TimedProgram(4, chunk_s, STEP_S)
    program.manifest["state"] = [{"name": "layers.0.linear_attn.cache.recurrent"}]
    gaps_of(Loop(program), joining(3, 600), 4, Stall(0))
    # Those that come together share one.
    assert program.chunks == [609, 600, 600]
    # Its state can be reached, and then there is no memory to keep it in.
    program.state = {"layers.0.linear_attn.cache.recurrent": [np.zeros((4, 3, 2))]}
    program.chunks.clear()
    gaps_of(Loop(program), joining(3, 600, 500), 4, Stall(0))
    assert program.chunks == [609, *[MULTIPLE] * 300]
    program.chunks.clear()

    def no_room(shape, like):
        raise MemoryError

    monkeypatch.setattr(program.transfers, "room", no_room)
    sequences = joining(3, 600)
    gaps_of(Loop(program), sequences, 4, Stall(0))
    assert program.chunks == [609, MULTIPLE, 600 - MULTIPLE, MULTIPLE, 600 - MULTIPLE]
    assert all(sequence.ids == sequence.expected() for sequence in sequences)


@pytest.mark.parametrize("packed", [False, True])
def test_a_state_that_goes_on_with_every_step_waits_for_its_prompts_next_chunk(packed):
    model = stateful_model(3, "hybrid", packed)
    prompts = [[5], [6], [7 + n % 3 for n in range(31)], [8] * 17, [9] * 30]
    sequences = [Sequence(p, n) for p, n in zip(prompts, (25, 1, 3, 5, 4))]
    calls, program = [], model.loop.program
    for letter, name in (("P", "prefill"), ("P", "prefill_packed"), ("D", "decode")):
        method = getattr(program, name)
        setattr(program, name, lambda *a, m=method, x=letter: calls.append(x) or m(*a))
    for sequence, token_id in model.loop.tokens(
        sequences, 3, model.loop.variant(None), Stall(0)
    ):  # fmt: skip
        sequence.ids.append(token_id)
    assert "PDPDPDPD" in "".join(calls) and "PP" not in "".join(calls)[3:]
    for sequence in sequences:
        alone = stateful_model(1, "hybrid", packed).generate(sequence.prompt_ids, sequence.limit)
        assert sequence.ids == alone.run().token_ids


def test_ids_are_told_when_the_device_has_its_next_step():
    program = TimedProgram(4, chunk_s, STEP_S)
    loop, come, told = Loop(program), [], []

    def have_come():
        if come:
            told.append((len(come), program.submitted_s - program.reached_s))
            come.clear()

    options = loop.variant(None)
    for found in loop.tokens(joining(1, 9, 30), 4, options, Stall(), None, have_come):
        come.append(found)
    assert len(told) >= 29
    # All of a step at once. The device works on what was submitted before the ids came, and on
    # another step, unless these are the last.
    assert {count for count, _ in told[3:-2]} <= {3, 4}
    assert all(left >= 2 * STEP_S - 1e-9 for _, left in told[:-2])


def test_a_prompt_that_waits_sends_up_one_line_of_positions_a_step():
    loop = Loop(TimedProgram(2, chunk_s, STEP_S))
    copies, before = loop.transfers, loop.transfers.snapshot()
    sequences = [Sequence([5], 1500), Sequence([6], 1), Sequence([6] * 400, 2)]
    gaps_of(loop, sequences, 2, Stall(0))
    copied = copies.since(before).host_to_device
    waits = len(loop.program.chunks)
    assert waits > 90
    # As rows begin and end there are 512 at a time, for the first row's 1,500 steps.
    assert copied.bytes < (1500 + 3 * 512 + waits) * 2 * 8 + 1000
    assert [s.ids for s in sequences] == [s.expected() for s in sequences]


@settings(max_examples=60, deadline=None)
@given(
    fixed=st.floats(0, 5), slope=st.floats(0.001, 3), wanted=st.floats(0, 60),
    noise=st.lists(st.floats(0.9, 1.1), min_size=7, max_size=7),
    before=st.lists(st.tuples(st.integers(1, 5000), st.floats(0.01, 90)), max_size=6),
)  # fmt: skip
@example(0, 1, 18.75, [0.92, 1, 1, 0.91, 1, 1, 0.97], [])
def test_sizes_settle_where_there_is_time_for_them_whatever_was_measured_before(
    fixed, slope, wanted, noise, before
):
    program = TimedProgram(1, chunk_s, STEP_S)
    program.reached_s = float("inf")
    pace = Pace(program)
    for tokens, taken in before:
        pace.add_chunk(tokens, 0.0, taken)
    noises = itertools.cycle(noise)
    sizes = []
    for _ in range(250):
        sizes.append(pace.tokens(wanted))
        assert sizes[-1] >= MULTIPLE and sizes[-1] % MULTIPLE == 0
        pace.add_chunk(sizes[-1], 0.0, (fixed + slope * sizes[-1] / MULTIPLE) * next(noises))
    # A time is wrong by up to a tenth, and then a drift of all times is seen in it.
    wrong = DRIFT / 0.9
    least, most = (max(1.0, (w - fixed) / slope) for w in (wanted / wrong, wanted * wrong))
    newest = [size / MULTIPLE for size in sizes[-100:]]
    assert min(newest) >= least - 1
    assert max(newest) <= most + 1


def test_a_stall_that_was_longer_than_was_expected_makes_the_next_ones_shorter():
    program = TimedProgram(1, chunk_s, STEP_S)
    program.reached_s = float("inf")

    def sizes(pace, count, overrun, share=1):
        """Of chunks that take a second for MULTIPLE tokens, and what follows them so much more of
        the 40 s that there are."""
        found = []
        for _ in range(count):
            found.append(pace.tokens(40) // MULTIPLE)
            tokens = int(found[-1] * share) * MULTIPLE
            taken = tokens / MULTIPLE
            pace.add_chunk(tokens, 0.0, taken)
            pace.add_steps(1, taken * overrun, taken * overrun + 1)
        return found

    pace = Pace(program)
    assert sizes(pace, 30, 1)[-1] == 40
    assert sizes(pace, 3, 1.1)[-1] in (36, 37)
    # It is forgotten, and what may be another process is not all put down to it.
    assert sizes(pace, 120, 1)[-1] == 40
    assert sizes(pace, 3, 9)[-1] == 32
    # A chunk that had less than there was time for says nothing.
    pace = Pace(program)
    sizes(pace, 30, 1)
    assert sizes(pace, 3, 1.1, 0.9)[-1] == 40
    # Nor does the least one, of which there may be no time for any.
    pace = Pace(program)
    for _ in range(9):
        assert pace.tokens(0.1) == MULTIPLE
        pace.add_chunk(MULTIPLE, 0.0, 1.0)
        pace.add_steps(1, 1.0, 2.0)
    assert not pace._overruns


def test_the_time_of_a_step_is_that_of_the_newest_ones():
    program = TimedProgram(1, chunk_s, STEP_S)
    pace = Pace(program)
    assert pace.seconds(Stall()) == 0 and pace.seconds(Stall(0.7)) == 0.7
    for n in range(9):
        pace.add_steps(2, n, n + (4 if n < 5 else 6))
    pace.add_steps(0, 0, 99)
    # Nothing is known of what is under way.
    assert pace.seconds(Stall()) == 0
    program.reached_s = 100
    assert pace.seconds(Stall()) == 6.0
    assert pace.seconds(Stall(0)) == 0
