"""A prompt that begins as an earlier one did computes the rest alone, and gives the same bytes."""

import io
import itertools
import os
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.stateful import FULL, KINDS, StatefulProgram, stateful_model
from tokenloop.runner import Engine, EngineError, Request, RunnerError, row_state, saved_state
from tokenloop.runner.loop import Loop
from tokenloop.runner.pace import Stall
from tokenloop.runner.prefix_cache import MB, PrefixCache
from tokenloop.runner.row_state import runs

EVERY = list(itertools.product(KINDS, (False, True)))
PLENTY = 10**6


def make(kind="dense", packed=False, batch=3, budget=PLENTY):
    """A model, and a cache of so many bytes for it."""
    model = stateful_model(batch, kind, packed)
    return model, PrefixCache(model.loop.program, budget)


def ids_after(prompt, count=3, kind="dense", packed=False, seed=None) -> list[int]:
    """What a prompt gives alone, without a cache."""
    sampled = {} if seed is None else {"temperature": 0.9, "seed": seed}
    model = stateful_model(1, kind, packed)
    return model.generate(Request(prompt, count, **sampled)).run().token_ids


def run(model, cache, prompts, rows=None, count=3):
    """Results of these prompts in their order, `rows` at a time."""
    from tokenloop.runner.result import Result

    requests = [Request(prompt, count) for prompt in prompts]
    results = [Result(r, model.tokenizer, *model.fit(r), i) for i, r in enumerate(requests)]
    loop = model.loop
    rows = rows or model.batch
    for result, token_id in loop.tokens(results, rows, loop.variant(None), Stall(0), cache):
        result.take(token_id)
    return results


def cached_of(results) -> list[int]:
    return [result.cached_tokens for result in results]


# Bytes


beginnings = st.lists(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 9, 12, 17, 24]), min_size=1, max_size=4)


@settings(max_examples=30, deadline=None)
@given(
    way=st.sampled_from(EVERY),
    batch=st.integers(1, 5),
    prompts=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 26), st.lists(st.integers(2, 4), max_size=9)),
        min_size=1, max_size=12,
    ),
    budget=st.sampled_from([250, 600, 2000, PLENTY]),
    wanted=st.lists(st.integers(1, 6), min_size=12, max_size=12),
    cancelled=st.sets(st.integers(0, 11), max_size=3),
)  # fmt: skip
def test_warm_and_cold_are_the_same(way, batch, prompts, budget, wanted, cancelled):
    kind, packed = way
    # Three texts, of which prompts are beginnings with something behind.
    texts = [[2 + (i * (n + 3) + n) % 7 for i in range(26)] for n in range(3)]
    prompts = [(texts[n][:size] + rest) or [5] for n, size, rest in prompts]
    expected = [
        ids_after(p, count, kind, packed, n if n % 2 else None)
        for n, (p, count) in enumerate(zip(prompts, wanted))
    ]
    model = stateful_model(batch, kind, packed)
    with Engine(model, max_stall_s=0, prefix_cache_mb=budget / MB) as engine:
        tickets = []
        for n, (prompt, count) in enumerate(zip(prompts, wanted)):
            sampled = {"temperature": 0.9, "seed": n} if n % 2 else {}
            tickets.append(engine.submit(Request(prompt, count, **sampled)))
            if n in cancelled:
                tickets[-1].cancel()
        for n, ticket in enumerate(tickets):
            ids = ticket.run().token_ids
            assert ids == expected[n] or (n in cancelled and ids == expected[n][: len(ids)])
            assert ticket.cached_tokens < len(prompts[n])
        counts = engine.counts
    assert counts.failed == 0 and counts.cache_bytes <= budget
    # A cancelled prompt may have found something, and not have ended.
    assert counts.cached_tokens >= sum(ticket.cached_tokens for ticket in tickets)


@pytest.mark.parametrize("kind, packed", EVERY)
def test_what_is_kept_is_not_computed_again(kind, packed):
    model, cache = make(kind, packed)
    text = [2 + i % 5 for i in range(21)]
    first, again, longer, other = run(
        model, cache, [text, text, text + [9] * 7, text[:9] + [50] * 6], rows=1
    )
    assert cached_of([first, again, longer, other][:3]) == [0, 20, 20]
    # Where only some places are kept, this one is kept now.
    assert other.cached_tokens == (8 if kind == "dense" else 0)
    (last,) = run(model, cache, [text[:10] + [60] * 3])
    assert last.cached_tokens == 8
    assert last.token_ids == ids_after(text[:10] + [60] * 3, 3, kind, packed)
    computed = 21 + 1 + 8 + 15 + 13 - other.cached_tokens - 8
    assert model.loop.program.computed == computed


@pytest.mark.parametrize("kind, packed", EVERY)
def test_one_id_at_least_is_computed(kind, packed):
    model, cache = make(kind, packed)
    results = run(model, cache, [[5] * 8, [5] * 8, [5] * 9, [5] * 4, [5]], rows=1)
    assert [result.token_ids for result in results] == [
        ids_after([5] * n, 3, kind, packed) for n in (8, 8, 9, 4, 1)
    ]
    assert cached_of(results)[1] == 4 and cached_of(results)[3:] == [0, 0]


def test_what_steps_wrote_is_not_kept():
    model, cache = make()
    (first,) = run(model, cache, [[5] * 6], count=9)
    after = [5] * 6 + first.token_ids + [7]
    (second,) = run(model, cache, [after])
    assert second.cached_tokens == 4 and second.token_ids == ids_after(after)


# At once


@pytest.mark.parametrize("kind, packed", EVERY)
def test_of_prompts_that_come_at_once_the_second_takes_what_the_first_leaves(kind, packed):
    model, cache = make(kind, packed, batch=4)
    prompts = [[7] * 18, [7] * 18, [9] * 3, [7] * 17 + [8] * 5]
    results = run(model, cache, prompts)
    assert cached_of(results) == [0, 16, 0, 16]
    assert [r.token_ids for r in results] == [ids_after(p, 3, kind, packed) for p in prompts]


def test_who_waits_for_a_prompt_that_is_given_up_begins_itself():
    model = stateful_model(2, "dense", True)
    with Engine(model, max_stall_s=0, prefix_cache_mb=1) as engine:
        tickets = engine.submit_all([Request([7] * 30, 3), Request([7] * 30, 3)])
        tickets[0].cancel()
        assert tickets[1].run().token_ids == ids_after([7] * 30, packed=True)


# Memory


@given(st.lists(st.integers(0, 9), max_size=20))
def test_runs_are_the_numbers(numbers):
    found = runs(numbers)
    assert [number + i for _, number, count in found for i in range(count)] == numbers
    assert [begin for begin, _, _ in found] == [
        sum(count for _, _, count in found[:i]) for i in range(len(found))
    ]


@pytest.mark.parametrize("most_runs", [0, 1, 99])
@pytest.mark.parametrize("kind, packed", EVERY)
def test_blocks_that_lie_apart_are_copied_too(monkeypatch, kind, packed, most_runs):
    monkeypatch.setattr(row_state, "MOST_RUNS", most_runs)
    model, cache = make(kind, packed)
    # Every other place is taken.
    cache._free_blocks = cache._free_blocks[-40::2]
    text = [2 + i % 5 for i in range(21)]
    for prompt in (text, [*text, 9], text[:9] + [50] * 9, text[:9] + [60] * 9):
        (result,) = run(model, cache, [prompt])
        assert result.token_ids == ids_after(prompt, 3, kind, packed)
    assert result.cached_tokens == 8


def block_bytes(kind="dense", packed=False) -> int:
    return make(kind, packed)[1]._rows.block_bytes


@pytest.mark.parametrize("packed", [False, True])
def test_the_one_that_was_used_least_recently_goes_first(packed):
    model, cache = make("dense", packed, budget=6 * block_bytes())
    a, b, c = ([n] * 9 for n in (5, 6, 7))
    run(model, cache, [a, b, c], rows=1)
    assert cache.used_bytes == 6 * block_bytes() and cache.evictions == 0
    run(model, cache, [a])  # so b is the oldest
    run(model, cache, [[8] * 9], rows=1)
    assert cache.evictions == 2
    assert cached_of(run(model, cache, [a, c, [8] * 9, b], rows=1)) == [8, 8, 8, 0]


def test_ends_go_before_what_they_end():
    model, cache = make(budget=4 * block_bytes())
    long = list(range(2, 18))
    run(model, cache, [long, long[:4] + [50] * 5], rows=1)
    # One block was taken for the second end, which the first one lost.
    (found,) = run(model, cache, [[*long, 3]])
    assert found.cached_tokens == 12 and found.token_ids == ids_after([*long, 3])


def test_a_prompt_that_is_longer_than_the_budget_keeps_its_beginning():
    model, cache = make(budget=2 * block_bytes())
    results = run(model, cache, [[5] * 17, [5] * 17], rows=1)
    assert cached_of(results) == [0, 8]
    assert results[1].token_ids == ids_after([5] * 17)


@pytest.mark.parametrize("kind", ["rings", "hybrid", "running"])
def test_states_that_are_kept_whole_go_too(kind):
    _, cache = make(kind)
    rows = cache._rows
    budget = 2 * (rows.row_bytes + 3 * rows.block_bytes) + rows.row_bytes
    model, cache = make(kind, budget=budget)
    assert cache.states >= 1
    for n in range(12):
        prompt = [5 + n % 4] * (9 + n)
        (result,) = run(model, cache, [prompt])
        assert result.token_ids == ids_after(prompt, 3, kind)
        assert cache.used_bytes <= budget
    assert cache.evictions > 0


def test_what_a_row_took_may_be_given_up_while_it_runs():
    model, cache = make(batch=2, budget=2 * block_bytes())
    run(model, cache, [[5] * 9])
    prompts = [[5] * 10, *([n] * 9 for n in range(6, 12))]
    results = run(model, cache, prompts, count=30)
    assert results[0].cached_tokens == 8 and cache.evictions > 2
    assert [r.token_ids for r in results] == [ids_after(p, 30) for p in prompts]


def test_copies_stay_on_the_device_and_are_counted():
    model, cache = make("rings", batch=1)
    copies = model.loop.transfers
    run(model, cache, [[5] * 9])
    before = copies.snapshot()
    run(model, cache, [[5] * 9])
    row = cache._rows
    found = copies.since(before)
    assert found.device_to_device.bytes == 2 * row.block_bytes + row.row_bytes
    assert found.device_to_host.bytes == 3 * 8  # the tokens


# What goes wrong


def test_a_program_that_fails_leaves_nothing_behind():
    model = stateful_model(1, "dense", False)
    with Engine(model, prefix_cache_mb=1) as engine:
        engine.submit(Request([5] * 9, 2)).run()
        assert engine.counts.cache_bytes > 0
        prefill = model.loop.program.prefill

        def failing(*arguments):
            raise RuntimeError("the device is gone")

        model.loop.program.prefill = failing
        with pytest.raises(EngineError):
            engine.submit(Request([5] * 9, 2)).run()
        assert engine.counts.cache_bytes == 0
        model.loop.program.prefill = prefill
        ticket = engine.submit(Request([5] * 9, 2)).run()
        assert ticket.cached_tokens == 0 and ticket.token_ids == ids_after([5] * 9, 2)


def test_prompts_that_go_by_tokens_take_and_keep_nothing():
    model = stateful_model(1, "dense", False)
    with Engine(model, prefix_cache_mb=1) as engine:
        by_token = Request([5] * 9, 2, logprobs=0, prompt_logprobs=True)
        cold = engine.submit(by_token).run()
        assert engine.counts.cache_bytes == 0
        assert engine.submit(Request([5] * 9, 2)).run().token_ids == ids_after([5] * 9, 2)
        warm = engine.submit(by_token).run()
    assert (cold.token_ids, cold.logprobs, cold.prompt_logprobs) == (
        warm.token_ids, warm.logprobs, warm.prompt_logprobs,
    )  # fmt: skip
    assert warm.cached_tokens == 0


def fault(change, budget=PLENTY) -> str:
    program = StatefulProgram(1, "hybrid", False)
    change(program)
    with pytest.raises(RunnerError) as caught:
        PrefixCache(program, budget)
    return str(caught.value)


def test_a_program_whose_state_is_not_known_is_refused():
    assert "cannot be read" in fault(lambda program: setattr(program, "state", None))

    def strange(program):
        program.state["layers.3.mamba.cache.ssm"] = program.state[FULL]

    assert "layers.3.mamba.cache.ssm" in fault(strange)


def test_a_budget_that_is_too_small_is_refused_and_the_default_is_then_none():
    assert "prefix_cache_mb is 5e-05" in fault(lambda program: None, 50)
    model = stateful_model(1, "hybrid", False)
    for wrong in (-1, float("nan"), "2", 1e-6):
        with pytest.raises(RunnerError, match="prefix_cache_mb is "):
            Engine(model, prefix_cache_mb=wrong)
    model.loop.program.state["strange"] = []
    with Engine(model, prefix_cache_mb=None) as engine:
        assert engine.prefix_cache is None and "strange" in engine.cache_fault


def test_a_tensor_of_no_row_is_left_alone():
    program = StatefulProgram(2, "dense", False)
    program.state["kernel_semaphores"] = [np.zeros(3, np.int32)]
    cache = PrefixCache(program, PLENTY)
    assert cache._rows.block_bytes == block_bytes()
    assert Loop(program)._held.can_wait


# Files


@pytest.mark.parametrize("kind, packed", EVERY)
def test_a_saved_beginning_is_that_of_another_process(kind, packed, tmp_path):
    path, text = tmp_path / "state", [2 + i % 6 for i in range(22)]
    model = saving_model(kind, packed)
    assert model.save(path, text[:17]) == 16
    other = saving_model(kind, packed)
    with pytest.raises(RunnerError, match="keep_prefixes"):
        other.load(path)
    other.keep_prefixes(1)
    assert other.load(path) == 16
    warm = other.generate(Request(text, 5)).run()
    assert warm.cached_tokens == 16 and warm.token_ids == ids_after(text, 5, kind, packed)
    (row,) = other.generate_batch([Request(text, 5)]).run()
    assert row.cached_tokens in (16, 20) and row.token_ids == warm.token_ids
    # An engine takes what its model has.
    with Engine(other) as engine:
        assert engine.submit(Request(text, 5)).run().cached_tokens in (16, 20)
        with pytest.raises(RunnerError):
            other.load(path)


def saving_model(kind="hybrid", packed=False, sha256="5" * 64, batch=2):
    model = stateful_model(batch, kind, packed)
    model.manifest |= {"sha256": sha256, "device": "cpu"}
    return model


def test_a_file_that_is_not_this_artifacts_is_refused(tmp_path, monkeypatch):
    path, model = tmp_path / "state", saving_model()
    model.save(path, [5] * 9)

    def fault(path=path, **options) -> str:
        other = saving_model(**options)
        other.keep_prefixes(1)
        with pytest.raises(RunnerError) as caught:
            other.load(path)
        assert other.prefix_cache.used_bytes == 0
        (line,) = str(caught.value).splitlines()
        return line

    assert "the state of the artifact 555555555555, and this is 666666666666" in fault(
        sha256="6" * 64
    )
    assert "has [" in fault(kind="rings")
    with monkeypatch.context() as patch:
        patch.setattr(saved_state, "processor", lambda manifest: "another one")
        assert "the state of a processor" in fault()
    assert "cannot be read: No such file" in fault(tmp_path / "none")
    data = bytearray(path.read_bytes())
    for damage in (b"", b"PK", bytes(data[:-40]), bytes(data[: len(data) // 2])):
        path.write_bytes(damage)
        assert "is no saved state, or damaged" in fault()
    # A bit of the state itself.
    place = bytes(data).index(b"state.0.npy") + 200
    data[place] ^= 1
    path.write_bytes(data)
    assert "is no saved state, or damaged" in fault()


def archive_of(**arrays: bytes) -> bytes:
    """An archive of NumPy's with such files."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in arrays.items():
            archive.writestr(f"{name}.npy", data)
    return file.getvalue()


def array_of(shape: str, data: bytes, kind: str = "|u1") -> bytes:
    """An array of NumPy's with a header that may be wrong."""
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}}}".encode()
    return b"\x93NUMPY\x01\0" + len(header).to_bytes(2, "little") + header + data


def test_a_state_that_was_changed_on_purpose_is_refused(tmp_path):
    path, model = tmp_path / "state", saving_model()
    model.save(path, [5] * 9)
    model.keep_prefixes(1)
    with zipfile.ZipFile(path) as archive:
        right = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    path.write_bytes(archive_of(**right))
    assert model.load(path) == 8
    data = path.read_bytes()
    method, flags = data.index(b"PK\1\2") + 10, data.index(b"PK\1\2") + 8
    deep = b"[" * 100_000
    for damaged in (
        data[:method] + b"\x99" + data[method + 1 :],  # A compression that zipfile has not.
        data[:flags] + b"\1" + data[flags + 1 :],  # A password.
        archive_of(**right | {"header": array_of(f"({len(deep)},)", deep)}),
        archive_of(**right | {"ids": array_of(f"({10**12},)", bytes(8), "<i8")}),
        archive_of(**right | {"ids": array_of(f"({10**30},)", bytes(8), "<i8")}),
        # Its sum was not compared: numpy.load does not read to the end of such a file.
        archive_of(**right | {"ids": right["ids"].replace(b"(8,)", b"(4,)")}),
    ):
        path.write_bytes(damaged)
        with pytest.raises(RunnerError, match="is no saved state, or damaged"):
            model.load(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RunnerError, match="is no regular file"):
        model.load(tmp_path / "pipe")


def test_what_cannot_be_saved_is_refused(tmp_path):
    model = saving_model()
    for prompt, path, text in (
        ([5] * 4, tmp_path / "state", "the prompt has 4 tokens; 5 are the least"),
        ([], tmp_path / "state", "the prompt is empty"),
        ([5] * 9, tmp_path / "none" / "state", "cannot be written: No such file"),
    ):
        with pytest.raises(RunnerError, match=text):
            model.save(path, prompt)
    assert list(tmp_path.iterdir()) == []
    model.save(tmp_path / "state", [5] * 20)
    small = saving_model()
    rows = make("hybrid")[1]._rows
    small.keep_prefixes((rows.block_bytes + 2 * rows.row_bytes) / MB)
    with pytest.raises(RunnerError, match="16 are to be kept: give it more"):
        small.load(tmp_path / "state")
    model.loop.program.state["strange"] = []
    with pytest.raises(RunnerError, match="strange"):
        model.save(tmp_path / "state", [5] * 20)
