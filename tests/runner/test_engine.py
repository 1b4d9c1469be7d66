"""An engine: requests of many threads and event loops queue for one model, and each gives what it
gives alone. The tests say themselves how far the program goes, so that nothing depends on time."""

import asyncio
import logging
import threading
from types import SimpleNamespace

import pytest

from tests.threads import yielding_model
from tokenloop.runner import (
    Engine,
    EngineClosed,
    EngineError,
    QueueFull,
    Request,
    RunnerError,
)

SECONDS = 120  # after which a test gives up, and fails


class Gate:
    """Stops a model's program before each call of a method, until it is let go on. `calls` has P
    and the row for a chunk of a prompt, D for a step."""

    def __init__(self, model):
        self.calls: list[str] = []
        self._allowed, self._reached = threading.Semaphore(0), threading.Semaphore(0)
        self._is_open = False
        program = model.loop.program
        for name in ("prefill", "decode"):
            setattr(program, name, self._gated(name, getattr(program, name)))

    def _gated(self, name, method):
        def call(tokens, positions, *row):
            self._reached.release()
            assert self._is_open or self._allowed.acquire(timeout=SECONDS)
            self.calls.append(f"P{row[0][0] if row else 0}" if name == "prefill" else "D")
            return method(tokens, positions, *row)

        return call

    def reached(self) -> None:
        """Wait until the program is at its next call."""
        assert self._reached.acquire(timeout=SECONDS)

    def go(self, calls: int = 1) -> None:
        """Let the program make so many calls, and wait until it is at the one after them."""
        for _ in range(calls):
            self._allowed.release()
            self.reached()

    def open(self) -> None:
        self._is_open = True
        self._allowed.release()


@pytest.fixture
def model():
    return yielding_model(3)


def alone(request: Request) -> list[int]:
    return yielding_model(1).generate(request).run().token_ids


def some_requests(count: int) -> list[Request]:
    sizes = (1, 2, 7, 12, 31)
    return [
        Request(
            [(n * 7 + i) % 90 + 2 for i in range(sizes[n % 5])], n % 6 + 1,
            temperature=0.8 * (n % 3 == 0), seed=n,
        )
        for n in range(count)
    ]  # fmt: skip


def test_requests_of_threads_and_event_loops_give_what_they_give_alone(model):
    requests = some_requests(60)
    expected = [alone(request) for request in requests]
    found: list = [None] * 60

    def in_thread(numbers):
        for n in numbers:
            with engine.submit(requests[n]) as mine:
                found[n] = [token.id for token in mine], mine.token_ids, mine.finish_reason

    async def read(n):
        with engine.submit(requests[n]) as mine:
            found[n] = [token.id async for token in mine], mine.token_ids, mine.finish_reason

    async def read_all(numbers):
        await asyncio.gather(*map(read, numbers))

    with Engine(model, max_stall_s=0) as engine:
        ways = [(in_thread, range(0, 20)), (in_thread, range(20, 30))]
        ways += [(lambda n: asyncio.run(read_all(n)), r) for r in (range(30, 45), range(45, 60))]
        threads = [threading.Thread(target=way, args=(numbers,)) for way, numbers in ways]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
        counts = engine.counts
    assert found == [(ids, ids, "length") for ids in expected]
    assert (counts.waiting, counts.running, counts.failed) == (0, 0, 0)
    assert counts.prompt_tokens == sum(len(request.prompt) for request in requests)
    assert counts.new_tokens == sum(map(len, expected))
    assert not model.loop.program.intruders


def test_who_comes_first_is_served_first(model):
    gate = Gate(model)
    with Engine(model, rows=1) as engine:
        first = engine.submit(Request([5], 1))
        gate.reached()
        # They differ in length, so that the order shows.
        others = [engine.submit(Request([6] * n, 1)) for n in (8, 2, 4)]
        gate.open()
        order = [mine.run().prompt_ids for mine in (first, *others)]
    assert order == [[5], [6] * 8, [6] * 2, [6] * 4]
    assert gate.calls == ["P0", "P0", "P0", "P0", "P0"]


def test_more_than_may_wait_are_refused_all_together(model):
    gate = Gate(model)
    with Engine(model, rows=2, max_queue=1) as engine:
        tickets = [engine.submit(Request([5], 9)) for _ in range(3)]
        gate.reached()
        with pytest.raises(QueueFull, match="^3 requests are running or waiting and 1 more are"):
            engine.submit(Request([5]))
        # Who waits no more makes room for another.
        tickets[2].cancel()
        with pytest.raises(QueueFull, match="2 more are too many; 3 are the most: try again later"):
            engine.submit_all([Request([5])] * 2)
        tickets.append(engine.submit(Request([7], 2)))
        assert (engine.counts.waiting, engine.counts.running) == (1, 2)
        gate.open()
        assert tickets[3].run().token_ids == alone(Request([7], 2))


def test_a_request_that_is_given_up_frees_its_row_after_one_step(model):
    gate = Gate(model)
    with Engine(model, rows=1) as engine:
        long, next_one = engine.submit(Request([5], 50)), engine.submit(Request([6], 2))
        gate.reached()
        gate.go(4)
        assert gate.calls == ["P0", "D", "D", "D"]
        long.cancel()
        gate.open()
        assert next_one.run().token_ids == alone(Request([6], 2))
        # The step that was under way is the last one.
        assert gate.calls == ["P0", "D", "D", "D", "D", "P0", "D"]
        assert long.run().finish_reason == "cancelled"
        assert long.token_ids == alone(Request([5], 50))[: len(long.token_ids)]


def test_a_prompt_that_is_given_up_is_not_prefilled_to_its_end(model):
    gate = Gate(model)
    with Engine(model, rows=1) as engine:
        long, next_one = engine.submit(Request([5] * 50, 9)), engine.submit(Request([6], 1))
        gate.reached()
        gate.go(2)
        long.cancel()
        gate.open()
        next_one.run()
    assert gate.calls == ["P0", "P0", "P0", "P0"]
    assert long.token_ids == []


def test_time_is_up_wherever_a_request_is(model, clock):
    gate = Gate(model)
    with Engine(model, rows=1) as engine:
        running = engine.submit(Request([5], 50), timeout_s=7)
        waiting = engine.submit(Request([6], 1), timeout_s=7)
        patient = engine.submit(Request([7], 1), timeout_s=8)
        gate.reached()
        gate.go(3)
        clock.value = 7.0
        # Whoever reads need not wait for the engine.
        assert waiting.run().finish_reason == "timeout"
        gate.open()
        assert patient.run().finish_reason == "length"
        assert running.run().finish_reason == "timeout"
        assert running.token_ids == alone(Request([5], 50))[: len(running.token_ids)]
    assert gate.calls.count("P0") == 2
    with pytest.raises(RunnerError, match="^timeout_s is 0; it must be above 0$"):
        engine.submit(Request([5]), timeout_s=0)


def test_an_event_loop_is_told_once_of_all_tokens_of_a_step(model, monkeypatch):
    calls = []

    async def read_all():
        loop = asyncio.get_running_loop()
        tell = loop.call_soon_threadsafe
        monkeypatch.setattr(
            loop, "call_soon_threadsafe", lambda *call: calls.append(call) or tell(*call)
        )
        gate = Gate(model)
        with Engine(model) as engine:
            # For these times alone there would be alarms, too: one for each ticket.
            tickets = [engine.submit(Request([5 + n], 20), timeout_s=SECONDS) for n in range(3)]
            reading = [asyncio.ensure_future(ids_of(ticket)) for ticket in tickets]
            await asyncio.sleep(0)
            gate.open()
            return await asyncio.gather(*reading)

    async def ids_of(ticket):
        return [token.id async for token in ticket]

    assert asyncio.run(read_all()) == [alone(Request([5 + n], 20)) for n in range(3)]
    # Three rows in 20 steps. One that joins later makes a step or two more.
    assert len(calls) <= 24


def test_a_reader_that_is_given_up_leaves_no_alarm(model):
    gate = Gate(model)

    async def read():
        loop = asyncio.get_running_loop()
        before = len(loop._scheduled)
        ticket = engine.submit(Request([5], 3), timeout_s=SECONDS)
        with ticket, pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(anext(ticket), 0.01)
        return [timer for timer in loop._scheduled[before:] if not timer.cancelled()]

    with Engine(model) as engine:
        assert asyncio.run(read()) == []
        gate.open()


def test_an_event_loop_is_told_that_time_is_up(model):
    gate = Gate(model)

    async def read():
        return [token.id async for token in engine.submit(Request([5], 3), timeout_s=0.01)]

    with Engine(model) as engine:
        assert asyncio.run(read()) == []
        gate.open()


def test_an_error_in_one_requests_text_ends_that_one_alone(model, monkeypatch, caplog):
    requests = [Request([5], 6), Request([6], 6)]
    expected = [alone(request) for request in requests]
    spoilt = expected[0][3]
    assert spoilt not in expected[0][:3] + expected[1]

    def push(token_id):
        if token_id == spoilt:
            raise ArithmeticError
        return f"{token_id} "

    stream = lambda: SimpleNamespace(push=push, finish=lambda: "")  # noqa: E731
    monkeypatch.setattr(type(model.tokenizer), "stream", lambda self, shown: stream())
    with Engine(model) as engine:
        one, other = engine.submit_all(requests)
        with pytest.raises(EngineError, match="^generating failed; the reason is in the log"):
            one.run()
        assert one.token_ids[:3] == expected[0][:3]
        assert other.run().finish_reason == "length" and other.token_ids == expected[1]
    assert "ArithmeticError" in caplog.text


def test_a_program_that_fails_ends_the_rows_it_had_and_no_later_request(model, monkeypatch, caplog):
    decode, left = model.loop.program.decode, [2]

    def failing(*inputs):
        left[0] -= 1
        if left[0] == 0:
            raise OSError("the device is gone")
        return decode(*inputs)

    monkeypatch.setattr(model.loop.program, "decode", failing)
    with Engine(model, rows=2) as engine, caplog.at_level(logging.ERROR):
        tickets = engine.submit_all([Request([n], 9) for n in (5, 6, 7)])
        for mine in tickets[:2]:
            with pytest.raises(EngineError):
                mine.run()
        assert tickets[2].run().token_ids == alone(Request([7], 9))
        assert engine.counts.failed == 1
    assert "the device is gone" in caplog.text


def test_a_request_that_cannot_run_is_refused(model, monkeypatch):
    def load_sampling(method, embed):
        raise RunnerError("this artifact cannot sample")

    monkeypatch.setattr(model.loop.program, "load_sampling", load_sampling)
    with Engine(model) as engine:
        for wrong, reason in ((Request([]), "the prompt is empty"), ([500], "the id 500")):
            with pytest.raises(RunnerError, match=reason):
                engine.submit(wrong)
        with pytest.raises(RunnerError, match="^this artifact cannot sample$"):
            next(engine.submit(Request([5], temperature=1.0)))
        assert engine.submit([5]).run().finish_reason == "length"


@pytest.mark.parametrize("grace_s, ends", [(0.0, ["cancelled"] * 2), (SECONDS, ["length"] * 2)])
def test_closing_ends_what_runs_and_frees_the_model(model, grace_s, ends):
    gate = Gate(model)
    engine = Engine(model, rows=2)
    tickets = engine.submit_all([Request([n], 9) for n in (5, 6, 7)])
    gate.reached()
    gate.go(3)
    closing = threading.Thread(target=engine.close, args=(grace_s,))
    closing.start()
    # It waits no more, and has no part in the grace.
    assert tickets[2].run().finish_reason == "cancelled"
    with pytest.raises(EngineClosed, match="^the engine is closed: it takes no more requests$"):
        engine.submit(Request([5]))
    if not grace_s:
        assert tickets[1].run().finish_reason == "cancelled"
    gate.open()
    closing.join(SECONDS)
    assert [mine.run().finish_reason for mine in tickets[:2]] == ends
    if grace_s:
        assert [mine.token_ids for mine in tickets[:2]] == [alone(Request([n], 9)) for n in (5, 6)]
    assert model.generate(Request([5], 9)).run().token_ids == alone(Request([5], 9))


def test_the_model_is_the_engines_alone_until_it_is_closed(model):
    generation = model.generate([5], 9)
    with pytest.raises(RunnerError, match="^a generation is under way on this model in the thread"):
        Engine(model)
    generation.cancel()
    with Engine(model) as engine:
        with pytest.raises(RunnerError, match="in the thread 'tokenloop engine'"):
            model.generate([5], 9)
        assert engine.submit(Request([5], 9)).run().token_ids == alone(Request([5], 9))
    assert not engine.is_open


def test_numbers_out_of_their_range_are_refused(model):
    for arguments, reason in (
        ({"rows": 4}, "^rows is 4; it must be 1 to 3$"),
        ({"rows": 0}, "^rows is 0; it must be 1 to 3$"),
        ({"max_queue": -1}, "^max_queue is -1; it must be at least 0$"),
        ({"max_stall_s": -0.5}, "^max_stall_s is -0.5; it must be at least 0$"),
    ):
        with pytest.raises(RunnerError, match=reason):
            Engine(model, **arguments)
