"""One generation at a time, in one thread at a time: who comes second is refused, and disturbs
nothing. The engines' programs are used by the same loop as the one here."""

import gc
import os
import threading
import weakref

import pytest

from tests.threads import Stress, bad, yielding_model
from tokenloop import runner
from tokenloop.runner import Request, RunnerError

PROMPT, OTHER = [2, 70, 71], [2, *range(40, 60)]
UNDER_WAY = (
    "^a generation is under way on this model in the thread '.*', and .* once for each thread$"
)
IN_USE = "^this model is in use, by another thread or by the generation .* once for each$"
ENDED = "^another generation was started on this model, and its state is shared: finish one before"


@pytest.fixture
def model():
    return yielding_model(2)


def in_thread(function):
    """What the function returns or raises in a thread of its own."""
    found = []

    def call():
        try:
            found.append(function())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=call, name="another")
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    return found[0]


def assert_refused(error, message: str) -> None:
    with pytest.raises(RunnerError, match=message):
        raise error
    assert "\n" not in str(error)


@pytest.mark.parametrize("seed", range(3))
def test_of_thousands_of_calls_in_eight_threads_none_gives_a_wrong_token(seed):
    model = yielding_model(1 + seed)
    counts = Stress(model, seed).run(threads=8, calls=4000)
    assert not bad(counts) and not model.loop.program.intruders
    assert sum(counts.values()) == 4000
    assert min(counts[key] for key in ("right", "refused", "given up")) > 20


def test_a_real_programs_threads_get_right_tokens_or_a_refusal(tiny_artifact):
    counts = Stress(runner.load(tiny_artifact, 1)).run(threads=8, calls=3000)
    assert not bad(counts)
    assert min(counts[key] for key in ("right", "refused", "given up")) > 20


def test_threads_may_have_a_model_each_and_load_it_at_once(tiny_artifact):
    expected = runner.load(tiny_artifact).generate(PROMPT, 20).run().token_ids
    stderr, found = os.fstat(2).st_ino, []

    def work():
        model = runner.load(tiny_artifact)
        found.extend(model.generate(PROMPT, 20).run().token_ids for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 200
    # Native code's errors are kept out of sight while an engine is loaded.
    assert os.fstat(2).st_ino == stderr


# Another thread


@pytest.mark.parametrize("way", ["generate", "generate_batch", "sampled"])
def test_between_two_tokens_another_thread_is_refused_and_touches_nothing(model, way):
    expected = model.generate(PROMPT, 9).run().token_ids
    generation = model.generate(PROMPT, 9)
    head = [next(generation).id for _ in range(4)]
    program, calls = model.loop.program, []
    program._run, run = (lambda method: calls.append(method) or run(method)), program._run
    ways = {
        "generate": lambda: model.generate(OTHER, 5).run(),
        "generate_batch": lambda: model.generate_batch([OTHER, PROMPT]).run(),
        "sampled": lambda: model.generate(Request(OTHER, 5, temperature=1.0)).run(),
    }
    assert_refused(in_thread(ways[way]), UNDER_WAY)
    assert calls == []
    assert head + [token.id for token in generation] == expected
    # It is finished, though it is still there.
    assert in_thread(lambda: model.generate(PROMPT, 9).run().token_ids) == expected


@pytest.mark.parametrize("way", ["begin", "advance"])
def test_within_a_method_another_thread_is_refused_at_once(model, monkeypatch, way):
    expected = model.generate(PROMPT, 3).run().token_ids
    entered, left, decode = threading.Event(), threading.Event(), model.loop.program.decode

    def slow(*inputs):
        entered.set()
        assert left.wait(30)
        return decode(*inputs)

    monkeypatch.setattr(model.loop.program, "decode", slow)
    generation = model.generate(PROMPT, 3)
    thread = threading.Thread(target=generation.run)
    thread.start()
    assert entered.wait(30)
    with pytest.raises(RunnerError, match=IN_USE):
        model.generate(OTHER, 3) if way == "begin" else next(generation)
    left.set()
    thread.join()
    assert generation.token_ids == expected and model.loop.program.intruders == 0


def test_a_generation_may_be_handed_from_thread_to_thread(model):
    expected = model.generate(PROMPT, 6).run().token_ids
    generation = model.generate(PROMPT, 6)
    ids = [in_thread(lambda: next(generation)).id for _ in range(3)]
    assert ids + [token.id for token in generation] == expected


def test_a_generation_that_nobody_has_is_in_no_threads_way(model):
    expected = model.generate(OTHER, 5).run().token_ids
    gc.disable()
    try:
        for begin in (
            lambda: model.generate(PROMPT, 9),
            lambda: model.generate_batch([PROMPT] * 5),
        ):
            generation = begin()
            for _ in generation:
                break
            dropped = weakref.ref(generation)
            del generation
            # Without a search for cycles.
            assert dropped() is None
            assert in_thread(lambda: model.generate(OTHER, 5).run().token_ids) == expected
    finally:
        gc.enable()


def test_a_collected_generation_disturbs_nobody(model):
    """It is collected in another thread, while that one uses the program."""
    expected = model.generate(OTHER, 5).run().token_ids
    cycle = [model.generate(PROMPT, 9)]
    next(cycle[0])
    cycle.append(cycle)
    del cycle
    generation = model.generate(OTHER, 5)
    select = model.loop.program.select
    model.loop.program.select = lambda *inputs: [gc.collect(), select(*inputs)][1]
    assert generation.run().token_ids == expected


def test_a_generation_of_a_thread_that_has_ended_is_in_nobodys_way(model):
    generation = in_thread(lambda: model.generate(PROMPT, 9))
    token = in_thread(lambda: next(generation))
    assert isinstance(token, runner.Token)
    assert len(model.generate(OTHER, 5).run().token_ids) == 5
    with pytest.raises(RunnerError, match=ENDED):
        next(generation)


@pytest.mark.parametrize("way", ["cancel", "error"])
def test_a_generation_that_came_to_an_end_is_in_nobodys_way(model, way):
    def source():
        yield Request(PROMPT, 3)
        raise KeyError("mine")

    if way == "cancel":
        generation = model.generate(PROMPT, 9)
        next(generation)
        generation.cancel()
    else:
        generation = model.generate_batch(source())
        with pytest.raises(KeyError, match="mine"):
            generation.run()
    assert len(in_thread(lambda: model.generate(OTHER, 5).run().token_ids)) == 5
    assert list(generation) == []


def test_an_interrupt_within_a_method_does_not_keep_the_model(model, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.loop.program, "decode", interrupted)
        generation = model.generate(PROMPT, 9)
        with pytest.raises(KeyboardInterrupt):
            generation.run()
    assert len(in_thread(lambda: model.generate(OTHER, 5).run().token_ids)) == 5


# One thread


def test_one_thread_ends_a_generation_with_the_next_before_the_program_is_touched(model):
    expected = model.generate(OTHER, 9).run().token_ids
    first, second = model.generate(PROMPT, 9), model.generate(OTHER, 9)
    head = [next(second).id for _ in range(4)]
    for _ in range(2):
        with pytest.raises(RunnerError, match=ENDED):
            next(first)
    assert head + [token.id for token in second] == expected


def test_a_call_that_is_refused_ends_nothing(model):
    expected = model.generate(PROMPT, 9).run().token_ids
    generation = model.generate(PROMPT, 9)
    head = [next(generation).id]

    def cannot_sample(method, embed):
        raise RunnerError("no method sample")

    model.loop.program.load_sampling = cannot_sample
    for wrong in (Request([]), Request([2], temperature=-1), Request([2], temperature=1.0)):
        with pytest.raises(RunnerError):
            model.generate(wrong)
    assert head + [token.id for token in generation] == expected


def test_a_batch_is_not_disturbed_from_within_by_who_makes_its_requests(model):
    expected = [model.generate(prompt, 6).run().token_ids for prompt in (PROMPT, OTHER, PROMPT)]
    errors = []

    def source():
        for prompt in (PROMPT, OTHER, PROMPT):
            try:
                model.generate(prompt, 2).run()
            except RunnerError as error:
                errors.append(error)
            yield Request(prompt, 6)

    found = [result.token_ids for result in model.generate_batch(source()).run()]
    assert found == expected and len(errors) == 3
    assert_refused(errors[0], IN_USE)
