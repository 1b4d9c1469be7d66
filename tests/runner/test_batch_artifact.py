"""Batches in real artifacts: a row gives what it gives alone, and its token stays in place."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.driving import altered
from tokenloop import runner
from tokenloop.export.pte.selection import CANDIDATES, TOKENS_PER_GROUP
from tokenloop.runner import LoopOptions, Request, RunnerError

VARIANTS = [
    LoopOptions(*variant)
    for variant in itertools.product(("embed", "alias", "host"), ("device", "host"), (True, False))
]
# Each chunk is 7 tokens and the window 16: within one, across both, and the least.
PROMPTS = [[2], [2, 70, 71], [2, *range(60, 79)], [2, *(i * 37 % 256 + 3 for i in range(50))]]
TEXTS = ["Once upon a time", "The capital of France is", "def fibonacci(n):", "1, 2, 3, 4,", "日本"]


@pytest.fixture(scope="module")
def one(tiny_artifact):
    return runner.load(tiny_artifact)


@pytest.fixture(scope="module")
def three(batch_artifact):
    return runner.load(batch_artifact)


@pytest.fixture
def endless(one, three, monkeypatch):
    """The model of three rows; neither has an end token, so that a limit is always reached."""
    for model in (one, three):
        monkeypatch.setattr(model.tokenizer, "eos_token_ids", [])
    return three


def mixed() -> list[Request]:
    """Greedy and sampled requests, of prompts and limits that let rows come and go."""
    return [
        Request(
            prompt,
            max_new_tokens=5 + 9 * i + 17 * n,
            temperature=(0.0, 0.8, 1.5)[(i + n) % 3],
            top_k=(0, 40)[n],
            top_p=(0.95, 1.0)[i % 2],
            seed=i - 2,
        )
        for n in range(2)
        for i, prompt in enumerate(PROMPTS)
    ]


def outcome(result) -> tuple:
    return result.prompt_ids, result.token_ids, result.text, result.finish_reason


def alone(model, requests) -> list[tuple]:
    return [outcome(model.generate(**vars(request)).run()) for request in requests]


def together(model, requests, options=None, rows=None) -> list[tuple]:
    return [outcome(result) for result in model.generate_batch(requests, options, rows).run()]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_row_gives_what_the_artifact_of_one_row_gives(one, endless, options):
    expected = alone(one, mixed())
    assert together(endless, mixed(), options) == expected
    assert [len(ids) for _, ids, *_ in expected] == [r.max_new_tokens for r in mixed()]


def test_one_request_in_an_artifact_of_three_rows_is_as_in_one_of_one(one, endless):
    assert alone(endless, mixed()) == alone(one, mixed())


REQUESTS = st.builds(
    Request,
    st.lists(st.integers(3, 258), min_size=1, max_size=60),
    max_new_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.0, 0.6, 1.0]),
    top_k=st.sampled_from([0, 1, 20]),
    top_p=st.sampled_from([0.5, 1.0]),
    seed=st.integers(-(2**63), 2**63 - 1),
    stop=st.sampled_from([(), ("e",), ("a", "bc")]),
)


@settings(max_examples=20, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=9), rows=st.integers(1, 3))
def test_requests_that_come_and_go_disturb_no_other(one, three, requests, rows):
    assert together(three, requests, rows=rows) == alone(one, requests)


def test_the_longest_sequences_fill_the_cache_in_every_row(one, endless):
    requests = [Request([2, *range(3, 3 + n)], 1000) for n in (0, 120, 198, 60, 197)]
    expected = alone(one, requests)
    assert {len(prompt) + len(ids) for prompt, ids, *_ in expected} == {200}
    assert together(endless, requests) == expected


def test_rows_of_8_bits_with_a_shortlist_give_what_they_give_alone(
    export_artifact, make_checkpoint
):
    """The default's recipe, and a vocabulary of as many groups as the default's way to sample one
    takes at least; the default itself takes two minutes to export for several rows."""
    checkpoint = make_checkpoint(
        vocab_size=TOKENS_PER_GROUP * CANDIDATES, num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    arguments = ("--model", checkpoint, "--quant", "8da8w", "--batch", 3)
    model = runner.load(
        export_artifact("large-batch", *arguments, "--max-seq-len", 100, "--max-prefill", 7)
    )
    requests = [Request(text, 24) for text in TEXTS]
    requests += [Request(text, 24, temperature=1.0, top_p=0.95, seed=3) for text in TEXTS]
    requests += [Request(text, 24, temperature=0.8, top_k=40, seed=4) for text in TEXTS[:2]]
    expected = alone(model, requests)
    assert together(model, requests) == expected
    assert len({tuple(ids) for _, ids, *_ in expected}) == len(requests)


# The token is handed on in place


class Spy:
    """Addresses of what a program's methods take and give, in the order of the calls."""

    def __init__(self, model, monkeypatch):
        self.fed, self.selected, self.looked_up, self.copied = [], [], [], []
        program, transfers = model.loop.program, model.loop.transfers
        decode, select, copy = program.decode, program.select, transfers.copy
        feed = program.feed

        def spied_decode(fed, positions):
            self.fed.append(fed.ctypes.data)
            return decode(fed, positions)

        def spied_select(*arguments):
            selected = select(*arguments)
            self.selected.append(selected.fed.ctypes.data)
            return selected

        def spied_feed(*arguments):
            fed = feed(*arguments)
            self.looked_up.append((len(self.fed), fed.ctypes.data))
            return fed

        def spied_copy(source, destination):
            self.copied.append((len(self.fed), destination.ctypes.data))
            copy(source, destination)

        monkeypatch.setattr(program, "decode", spied_decode)
        monkeypatch.setattr(program, "select", spied_select)
        monkeypatch.setattr(program, "feed", spied_feed)
        monkeypatch.setattr(transfers, "copy", spied_copy)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_decode_reads_where_select_wrote_and_a_first_token_is_copied_there(
    endless, monkeypatch, temperature
):
    spy = Spy(endless, monkeypatch)
    requests = [Request(PROMPTS[1], 9 + 3 * i, temperature=temperature) for i in range(5)]
    endless.generate_batch(requests, LoopOptions("alias")).run()
    assert spy.fed[1:] == spy.selected[:-1]
    assert len(set(spy.selected)) == 2 and spy.selected[0] != spy.selected[1]
    # The first three begin together, and the others in rows 0 and 1.
    rows = [(address - spy.fed[step]) // 8 for step, address in spy.copied]
    assert rows == [0, 1, 2, 0, 1]


def test_decode_reads_what_select_or_for_a_row_that_joins_the_lookup_wrote(endless, monkeypatch):
    spy = Spy(endless, monkeypatch)
    requests = [Request(PROMPTS[1], 9 + 3 * i) for i in range(5)]
    endless.generate_batch(requests, LoopOptions("embed")).run()
    joined = dict(spy.looked_up)
    assert len(spy.looked_up) == 5 and len(joined) == 3 and spy.selected[0] != spy.selected[1]
    assert spy.fed == [
        joined.get(step, selected) for step, selected in enumerate([None, *spy.selected[:-1]])
    ]


def test_a_step_uploads_nothing_and_downloads_8_bytes_for_each_row(endless):
    def transfers(count):
        requests = [Request(PROMPTS[2], count) for _ in range(3)]
        batch = endless.generate_batch(requests)
        batch.run()
        return {k: tuple(v.values()) for k, v in batch.stats.transfers.items()}

    for count in (2, 20, 150):
        assert transfers(count) == {
            "host_to_device": (3 + 1, 3 * 8 * 20 + 3 * 8 * (count - 1)),
            "device_to_device": (3, 3 * 8),
            "device_to_host": (count, 3 * 8 * count),
        }


# Sampling is loaded when it is needed


def test_greedy_users_do_not_load_what_samples(batch_artifact):
    model = runner.load(batch_artifact)
    program, loaded = model.loop.program._program, []
    load = program.load_method
    program.load_method = lambda name: loaded.append(name) or load(name)
    together(model, [Request("hello", 5), Request("x", 5, temperature=-1.0)])
    assert loaded == []
    for _ in range(2):
        together(model, [Request("hello", 5), Request("x", 5, temperature=1.0)])
        assert sorted(loaded) == ["sample_embed", "sample_embed", "sample_row"]


def test_an_artifact_without_sample_is_greedy_only(batch_artifact, monkeypatch):
    model = runner.load(batch_artifact)
    expected = alone(model, [Request("hello", 20)])
    monkeypatch.setattr(
        model.loop.program._program, "method_names", lambda: ["prefill", "decode", "greedy"]
    )
    assert alone(model, [Request("hello", 20)]) == expected
    with pytest.raises(
        RunnerError, match="no method sample_embed or sample_row, .*: export it again$"
    ):
        model.generate("hello", temperature=0.5)


@pytest.mark.parametrize("batch, slot", [(1, "prefill has 3 inputs"), (2, "decode's token is")])
def test_a_manifest_of_another_batch_is_refused(batch_artifact, tmp_path, batch, slot):
    copy = altered(batch_artifact, tmp_path / "copy", batch=batch)
    with pytest.raises(RunnerError, match=slot):
        runner.load(copy)
