"""The loop's claims: the token stays where it is, copies are counted exactly, and every variant of
the loop, in every state that an earlier prompt left, gives the same tokens."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tokenloop import runner
from tokenloop.runner import LoopOptions, RunnerError

ROOT = Path(__file__).resolve().parents[2]
ALICE = (ROOT / "benchmarks/data/alice.txt").read_text(encoding="utf-8")
VARIANTS = [
    LoopOptions(*variant)
    for variant in itertools.product(("embed", "alias", "host"), ("device", "host"), (True, False))
]
VARIANTS += [LoopOptions(double_buffering=ahead, run_ahead=4) for ahead in (True, False)]
PLAIN = LoopOptions(double_buffering=False)
# Each chunk is 7 tokens and the window 16 (tiny_artifact): within one, across both, and the least.
PROMPTS = [[2], [2, 70, 71], [2, *range(60, 79)], [2, *(i * 37 % 256 + 3 for i in range(50))]]


@pytest.fixture(scope="module")
def tiny(tiny_artifact):
    return runner.load(tiny_artifact)


@pytest.fixture(scope="module")
def default_model(default_artifact):
    return runner.load(default_artifact)


@pytest.fixture
def endless(tiny, monkeypatch):
    """The tiny model without an end token, so that a limit is always reached."""
    monkeypatch.setattr(tiny.tokenizer, "eos_token_ids", [])
    return tiny


class Spy:
    """Notes, without copying, what goes into and comes out of a model's program, in order.

    `events` has a tuple for each call: ("prefill" or "decode", token address, positions, positions'
    address, logits' address), ("select", logits' address, buffer, address of what
    is fed, token address) or ("download", address, number of calls before it).
    """

    def __init__(self, model, monkeypatch):
        self.events = []
        self.kept = []
        program, transfers = model.loop.program, model.loop.transfers
        run, select, download = {}, program.select, transfers.download
        for name in ("prefill", "decode"):
            run[name] = getattr(program, name)

            def forward(tokens, positions, name=name):
                logits = run[name](tokens, positions)
                # What is kept cannot be freed, and so no address can be given out twice.
                self.kept += [tokens, positions, logits]
                where = [x.ctypes.data for x in (tokens, positions, logits)]
                self.events.append((name, where[0], positions.tolist(), *where[1:]))
                return logits

            monkeypatch.setattr(program, name, forward)

        def spied_select(logits, buffer, choice):
            selected = select(logits, buffer, choice)
            self.kept += [logits, *selected]
            where = [x.ctypes.data for x in (selected.fed, selected.token)]
            self.events.append(("select", logits.ctypes.data, buffer, *where))
            return selected

        def spied_download(values):
            self.events.append(("download", values.ctypes.data))
            return download(values)

        monkeypatch.setattr(program, "select", spied_select)
        monkeypatch.setattr(transfers, "download", spied_download)

    def calls(self, name: str) -> list[tuple]:
        return [event for event in self.events if event[0] == name]


@pytest.fixture
def spy(endless, monkeypatch):
    return Spy(endless, monkeypatch)


def copies(model, prompt, count, **options) -> dict:
    """(copies, bytes) by direction of one generation of exactly `count` tokens."""
    generation = model.generate(prompt, count, options=LoopOptions(**options)).run()
    assert len(generation.token_ids) == count
    return {
        name: (entry["count"], entry["bytes"]) for name, entry in generation.stats.transfers.items()
    }


# The token is handed on in place


@pytest.mark.parametrize("feed", ["alias", "embed"])
@pytest.mark.parametrize("double_buffering", [True, False])
def test_every_decode_reads_what_it_is_fed_where_select_put_it(
    endless, spy, feed, double_buffering
):
    options = LoopOptions(feed, double_buffering=double_buffering)
    endless.generate(PROMPTS[2], 20, options=options).run()
    fed, tokens = ([event[place] for event in spy.calls("select")] for place in (3, 4))
    assert [event[1] for event in spy.calls("decode")] == fed[:-1]
    assert len(fed) == 20 and (fed == tokens) == (feed == "alias")
    # Two of each alternate.
    assert len(set(fed[:2])) == 2 and fed == fed[:2] * 10


def test_every_select_reads_the_logits_where_the_method_put_them(endless, spy):
    endless.generate(PROMPTS[2], 20).run()
    calls = [event for event in spy.events if event[0] != "download"]
    pairs = [(a, b) for a, b in itertools.pairwise(calls) if b[0] == "select"]
    assert [a[0] for a, _ in pairs] == ["prefill"] + ["decode"] * 19
    assert all(a[-1] == b[1] for a, b in pairs)


def test_the_two_next_id_buffers_alternate_and_never_move(endless, spy):
    endless.generate(PROMPTS[0], 20).run()
    addresses = [event[-1] for event in spy.calls("select")]
    assert len(set(addresses[:2])) == 2
    assert addresses == addresses[:2] * 10


def test_a_token_is_the_methods_memory_and_not_a_copy_of_it(endless):
    program = endless.loop.program
    logits = np.zeros((1, endless.vocab_size), np.float32)
    logits[0, 41] = 1.0
    token, _ = program.select(logits, 0)
    logits[0, 43] = 2.0
    other, _ = program.select(logits, 1)
    assert (token.item(), other.item()) == (41, 43)
    program.select(logits, 0)
    assert token.item() == 43


def test_positions_are_views_of_the_one_table(endless, spy):
    endless.generate(PROMPTS[3], 20).run()
    table = endless.loop._table.ctypes.data
    passed = spy.calls("prefill") + spy.calls("decode")
    assert [p for event in passed for p in event[2]] == list(range(len(PROMPTS[3]) + 19))
    assert all(event[3] == table + 8 * event[2][0] for event in passed)


def test_chunks_of_the_prompt_are_views_of_one_upload(endless, spy):
    endless.generate(PROMPTS[3], 1).run()
    chunks = spy.calls("prefill")
    assert [len(event[2]) for event in chunks] == [7] * 7 + [2]
    assert [event[1] for event in chunks] == [chunks[0][1] + 8 * 7 * i for i in range(8)]


# Copies


def test_the_position_table_goes_up_once_when_the_program_is_loaded(tiny_artifact):
    model = runner.load(tiny_artifact)
    transfers = model.loop.transfers
    assert vars(transfers.host_to_device) == {"count": 1, "bytes": 8 * 200}
    for prompt in PROMPTS:
        model.generate(prompt, 3).run()
    prompts = 8 * sum(map(len, PROMPTS))
    assert vars(transfers.host_to_device) == {
        "count": 1 + len(PROMPTS),
        "bytes": 8 * 200 + prompts,
    }


@pytest.mark.parametrize("count", [1, 2, 32, 128])
@pytest.mark.parametrize("double_buffering", [True, False])
def test_a_token_costs_8_bytes_down_and_only_the_prompt_goes_up(endless, count, double_buffering):
    assert copies(endless, PROMPTS[2], count, double_buffering=double_buffering) == {
        "host_to_device": (1, 8 * len(PROMPTS[2])),
        "device_to_device": (0, 0),
        "device_to_host": (count, 8 * count),
    }


@pytest.mark.parametrize("double_buffering", [True, False])
@pytest.mark.parametrize("count", [1, 32])
def test_a_fed_token_adds_one_upload_of_8_bytes_for_each_step(endless, count, double_buffering):
    found = copies(endless, PROMPTS[2], count, feed="host", double_buffering=double_buffering)
    assert found["host_to_device"] == (1 + count - 1, 8 * (len(PROMPTS[2]) + count - 1))
    assert found["device_to_host"] == (count, 8 * count)


def test_positions_from_the_host_add_one_upload_for_each_chunk_and_step(endless):
    prompt = PROMPTS[3]
    found = copies(endless, prompt, 32, positions="host")
    assert found["host_to_device"] == (1 + 8 + 31, 8 * (len(prompt) + len(prompt) + 31))
    assert found["device_to_host"] == (32, 8 * 32)


# Double buffering


def test_the_next_step_is_submitted_before_a_token_is_read(endless, spy):
    endless.generate(PROMPTS[1], 4).run()
    names = [event[0] for event in spy.events]
    step = ["decode", "select"]
    assert names == ["prefill", "select"] + [*step, "download"] * 3 + ["download"]
    # Token n is read from the buffer that step n + 1 did not write.
    downloads = [event[1] for event in spy.calls("download")]
    assert downloads == [event[-1] for event in spy.calls("select")]


def test_without_double_buffering_a_token_is_read_before_the_next_step(endless, spy):
    endless.generate(PROMPTS[1], 4, options=PLAIN).run()
    names = [event[0] for event in spy.events]
    assert names == ["prefill", "select", "download"] + ["decode", "select", "download"] * 3


@pytest.mark.parametrize("options, surplus", [(LoopOptions(), 1), (PLAIN, 0)])
def test_an_end_tokens_surplus_step_is_dropped_and_never_shown(
    endless, spy, monkeypatch, options, surplus
):
    ids = endless.generate(PROMPTS[1], 30).run().token_ids
    end = next(i for i in range(10, 30) if ids[i] not in ids[:i])
    monkeypatch.setattr(endless.tokenizer, "eos_token_ids", [ids[end]])
    spy.events.clear()
    generation = endless.generate(PROMPTS[1], 30, options=options)
    shown = [token.id for token in generation]
    assert shown == generation.token_ids == ids[:end]
    assert generation.text == endless.tokenizer.decode(ids[:end])
    assert generation.finish_reason == "stop"
    assert len(spy.calls("decode")) == end + surplus
    assert generation.stats.transfers["device_to_host"]["count"] == end + 1


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("length", [1, 150, 199])
def test_a_full_cache_ends_the_output_and_no_step_passes_it(endless, spy, length, options):
    prompt = [2, *(i * 37 % 256 + 3 for i in range(length - 1))]
    generation = endless.generate(prompt, 1000, options=options).run()
    assert len(prompt) + len(generation.token_ids) == endless.max_seq_len == 200
    assert generation.finish_reason == "length"
    positions = [event[2][0] for event in spy.calls("decode")]
    # The last token is never fed, so the last position is never used.
    assert positions == list(range(length, 199))


def test_no_more_steps_run_ahead_than_there_are_positions(endless):
    alone = endless.generate(PROMPTS[0], 1000).run().token_ids
    far = endless.generate(PROMPTS[0], 1000, options=LoopOptions(run_ahead=10**12)).run()
    assert far.token_ids == alone


@pytest.mark.parametrize("options", [LoopOptions(), PLAIN], ids=str)
def test_an_end_token_in_the_last_position_runs_no_surplus_step(endless, spy, monkeypatch, options):
    ids = endless.generate(PROMPTS[0], 200).run().token_ids
    last = ids[-1]
    # The prompt takes in every earlier place of the id that ends the full cache.
    start = max((i + 1 for i in range(198) if ids[i] == last), default=0)
    prompt = PROMPTS[0] + ids[:start]
    monkeypatch.setattr(endless.tokenizer, "eos_token_ids", [last])
    spy.events.clear()
    generation = endless.generate(prompt, 1000, options=options).run()
    assert (generation.finish_reason, generation.token_ids) == ("stop", ids[start:-1])
    assert max(event[2][0] for event in spy.calls("decode")) == 198


# State


def test_a_prompts_output_does_not_depend_on_the_prompt_before_it(endless, tiny_artifact):
    long = [2, *(i * 91 % 256 + 3 for i in range(120))]
    fresh = runner.load(tiny_artifact)
    fresh.tokenizer.eos_token_ids = []
    for prompt in PROMPTS:
        expected = fresh.generate(prompt, 40).run().token_ids
        endless.generate(long, 70).run()
        assert endless.generate(prompt, 40).run().token_ids == expected
        # Only once is the fresh model's memory as it was loaded.
        fresh = runner.load(tiny_artifact)
        fresh.tokenizer.eos_token_ids = []


def test_the_same_generation_repeats_itself(endless):
    first, second = (endless.generate(PROMPTS[3], 60).run() for _ in range(2))
    assert first.token_ids == second.token_ids and first.text == second.text
    assert len(set(first.token_ids)) > 20


@pytest.mark.parametrize("options", [LoopOptions(), PLAIN], ids=str)
def test_an_abandoned_generation_leaves_nothing_behind(endless, options):
    expected = endless.generate(PROMPTS[1], 40).run().token_ids
    for stop in (1, 2, 30):
        abandoned = endless.generate(PROMPTS[3], 100, options=options)
        assert len(list(itertools.islice(abandoned, stop))) == stop
        assert endless.generate(PROMPTS[1], 40, options=options).run().token_ids == expected


def test_a_superseded_generation_raises(endless):
    first = endless.generate(PROMPTS[1], 40)
    next(iter(first))
    second = endless.generate(PROMPTS[2], 40)
    with pytest.raises(RunnerError, match="another generation was started"):
        next(iter(first))
    assert len(second.run().token_ids) == 40


def test_a_superseded_generation_that_never_began_spoils_nothing(endless):
    expected = endless.generate(PROMPTS[2], 40).run().token_ids
    first = endless.generate(PROMPTS[1], 40)
    second = endless.generate(PROMPTS[2], 40)
    head = [token.id for token in itertools.islice(second, 20)]
    with pytest.raises(RunnerError, match="another generation was started"):
        first.run()
    assert head + [token.id for token in second] == expected


# All variants are one


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_all_variants_of_the_loop_give_the_same_tokens_and_text(endless, prompt):
    results = Counter()
    for options in VARIANTS:
        generation = endless.generate(prompt, 100, options=options).run()
        results[tuple(generation.token_ids), generation.text, generation.finish_reason] += 1
    assert list(results.values()) == [len(VARIANTS)]
    assert len(set(next(iter(results))[0])) > 20


# 128 tokens past the window of 512 that the model slides over, and across its end.
@pytest.mark.parametrize("start, length", [(0, 600), (2000, 490)])
def test_all_variants_give_the_same_text_past_the_real_models_window(default_model, start, length):
    prompt = default_model.tokenizer.encode(ALICE[start:])[:length]
    results = set()
    for options in VARIANTS:
        if options.feed == "host" and options.double_buffering:
            continue  # Not another loop: see LoopOptions.
        generation = default_model.generate(prompt, 40, options=options).run()
        results.add((tuple(generation.token_ids), generation.text, generation.finish_reason))
    ((ids, _, reason),) = results
    assert (len(ids), reason) == (40, "length")


# Against the references


def load_golden(name: str) -> list[dict]:
    return json.loads((ROOT / "tests" / name).read_text(encoding="utf-8"))["cases"]


def gaps_of(model, prompt_ids: list[int], output_ids: list[int]) -> list[float]:
    """For each of the output's ids how far its logit is below the largest, after all before it."""
    program, upload = model.loop.program, model.loop.transfers.upload
    program.begin(embed=False)
    most = program.manifest["max_prefill"]
    for start in range(0, len(prompt_ids), most):
        chunk = prompt_ids[start : start + most]
        logits = program.prefill(upload([chunk]), upload(range(start, start + len(chunk))))[0]
    gaps = []
    for position, token in enumerate(output_ids, len(prompt_ids)):
        gaps.append(float(logits.max() - logits[token]))
        logits = program.decode(upload([[token]]), upload([position]))[0]
    return gaps


def test_the_default_artifacts_text_is_the_pinned_text_up_to_near_ties(default_model):
    for case in load_golden("gemma3_270m_8da8w_greedy.json"):
        expected = case["output_ids"]
        # XNNPACK has other kernels for other processors: their sums are rounded otherwise, and a
        # near tie may fall the other way. The logits of a text have a deviation of 4.
        gaps = gaps_of(default_model, case["prompt_ids"], expected)
        assert max(gaps) < 0.5
        same = next((i for i, gap in enumerate(gaps) if gap), len(expected))
        generation = default_model.generate(case["prompt"], len(expected)).run()
        assert generation.prompt_ids == case["prompt_ids"]
        assert generation.token_ids[:same] == expected[:same]
        if same == len(expected):
            assert generation.text.encode() == case["text"].encode()


def test_the_float32_program_gives_the_tokens_and_text_of_transformers(fp32_artifact):
    model = runner.load(fp32_artifact)
    for case in load_golden("gemma3_270m_fp32_greedy.json"):
        generation = model.generate(case["prompt"], len(case["output_ids"])).run()
        assert generation.prompt_ids == case["prompt_ids"]
        assert generation.token_ids == case["output_ids"]
        assert generation.text == case["text"]
        from_ids = model.generate(case["prompt_ids"], 16).run()
        assert from_ids.token_ids == case["output_ids"][:16]


@pytest.fixture(scope="module")
def reference(tiny_checkpoint):
    """(prompt, count) -> the ids that transformers generates after it, without an end token."""
    import torch
    from transformers import Gemma3ForCausalLM

    model = Gemma3ForCausalLM.from_pretrained(tiny_checkpoint).eval()

    def generate(prompt: list[int], count: int) -> list[int]:
        output = model.generate(
            torch.tensor([prompt]), max_new_tokens=count, do_sample=False, eos_token_id=[]
        )
        return output[0, len(prompt) :].tolist()

    return generate


@pytest.mark.parametrize("artifact", ["tiny_artifact", "portable_artifact"])
def test_a_float32_artifact_gives_the_tokens_of_transformers(request, reference, artifact):
    model = runner.load(request.getfixturevalue(artifact))
    model.tokenizer.eos_token_ids = []
    for prompt in PROMPTS:
        ids = model.generate(prompt, 40).run().token_ids
        assert ids == reference(prompt, 40)
        assert len(set(ids)) > 10
