"""Speculation on a CUDA GPU: the plain loop's tokens, from logits with the same bits, in rounds of
one graph launch each. Where there is no GPU all of it is skipped."""

from dataclasses import replace

import pytest
import torch

from tests.driving import PROMPTS, SAMPLED, ids_of
from tokenloop import runner
from tokenloop.runner import LoopOptions, Request
from tokenloop.runner.speculation import Repetition

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
DRAFTS, ROOM = 5, 200
FLAGS = ("--device", "cuda", "--max-seq-len", ROOM, "--max-prefill", 64, "--draft-tokens", DRAFTS)
KINDS = [{}, SAMPLED, {"temperature": 0.4, "seed": 3}]
VARIANTS = [
    LoopOptions(speculate="lookup"),
    LoopOptions(speculate="lookup", double_buffering=False),
    LoopOptions(speculate="lookup", overlap=False),
    LoopOptions(speculate="lookup", feed="alias"),
]


@pytest.fixture(scope="module", params=["fp32", "bf16", "int4"])
def model(request, export_artifact, make_checkpoint):
    """A window of 16, which is gone around many times, and a network whose text repeats itself."""
    checkpoint = make_checkpoint(
        hidden_size=256, intermediate_size=384, head_dim=64, num_hidden_layers=3
    )
    arguments = "--model", checkpoint, *FLAGS, "--quant", request.param
    loaded = runner.load(export_artifact(f"tiny-drafts-{request.param}", *arguments))
    loaded.tokenizer.eos_token_ids.clear()
    return loaded


@pytest.fixture(params=[False, True], ids=["as it is", "always drafted"])
def drafted(request, model, monkeypatch):
    """Rounds as the text suggests them, and always, whatever it suggests."""
    assert model.loop.program.draft_cost > 0
    if request.param:
        monkeypatch.setattr(model.loop.program, "draft_cost", 1.0)
        monkeypatch.setattr(Repetition, "add", lambda self, token_id: None)
        monkeypatch.setattr(Repetition, "__init__", lambda self, ids: setattr(self, "found", True))
    return request.param


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_rounds_give_the_plain_loop_s_tokens(model, drafted, kind):
    # What repeats itself, and what does not; one token, and up to the last position.
    prompts = [*PROMPTS, [2, *[40, 41, 42, 43, 44] * 6, 40, 41]]
    for prompt, count in [*((prompt, 100) for prompt in prompts), (PROMPTS[0], 1), ([2], ROOM)]:
        expected = ids_of(model, prompt, count, **kind)
        for options in VARIANTS:
            done = model.generate(prompt, count, options=options, **kind).run()
            assert done.token_ids == expected, (len(prompt), count, options)
            if drafted and count > 1:
                assert done.stats.draft_rounds > 0
    # Others that came between changed nothing.
    assert ids_of(model, PROMPTS[2], 100, **kind) == ids_of(
        model, PROMPTS[2], 100, options=VARIANTS[0], **kind
    )


def test_the_logits_of_rounds_have_the_bits_of_steps(model, monkeypatch):
    """Of each row whose token, and all before it, are the sequence's. The history has most of what
    will come in the prompt's place, so that most of what is drafted holds."""
    program, seen = model.loop.program, []
    monkeypatch.setattr(program, "draft_cost", 1.0)
    monkeypatch.setattr(Repetition, "add", lambda self, token_id: None)
    monkeypatch.setattr(Repetition, "__init__", lambda self, ids: setattr(self, "found", True))
    call, begin, history = program._call, program._rounds.begin, program._rounds._history

    def spied_call(name, *inputs):
        output = call(name, *inputs)
        if name.startswith("round_") or name == "decode_embedded":
            with program._on_stream():
                seen.append((name, [x.clone() for x in inputs], output.clone()))
        return output

    def spied_begin(*arguments):
        begin(*arguments)
        coming = torch.tensor(ids[count:])
        coming[5::9] = 4
        with program._on_stream():
            history[:count] = coming.to(history.device)

    count = 80
    prompt = [2, *(i * 37 % 256 + 3 for i in range(count - 1))]
    plain, speculated = LoopOptions(graph=False), LoopOptions(graph=False, speculate="lookup")
    for target, name, spy in (
        (program, "_call", spied_call), (program._rounds, "_call", spied_call),
        (program._rounds, "begin", spied_begin),
    ):  # fmt: skip
        monkeypatch.setattr(target, name, spy)
    for kind in KINDS:
        seen.clear()
        ids = prompt + ids_of(model, prompt, count, options=plain, **kind)
        torch.cuda.synchronize()
        steps = {int(inputs[1][0]): logits[0] for _, inputs, logits in seen}
        assert len(steps) >= count - 1
        seen.clear()
        done = model.generate(prompt, count, options=speculated, **kind).run()
        torch.cuda.synchronize()
        assert prompt + done.token_ids == ids
        compared = [0] * (1 + DRAFTS)
        for _, (_, _, tokens, positions), logits in seen:
            rows = zip(tokens.tolist(), positions.tolist(), logits)
            for i, (token_id, position, row) in enumerate(rows):
                if position >= len(ids) - 1 or ids[position] != token_id:
                    break
                assert torch.equal(row, steps[position]), (kind, i, position)
                compared[i] += 1
        # The last rows of many rounds were among them.
        assert compared[-1] > 2, compared
        assert done.stats.accepted_tokens > count // 4


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_model_s_drafts_give_the_plain_loop_s_tokens(model, monkeypatch, kind):
    """Its own, which hold where the most likely token is taken, and wrong ones among them."""
    model.use_draft(model._directory)
    draft, wrong = model.loop.draft, []
    monkeypatch.setattr(type(draft.budget), "is_enough", True)
    propose = draft.propose

    def proposed(ids, count):
        drafts = propose(ids, count)
        if len(ids) % 3 == 0 and wrong:
            drafts[len(ids) % count] = 5
        return drafts

    monkeypatch.setattr(draft, "propose", proposed)
    for _ in range(2):
        for prompt, count in (*((prompt, 100) for prompt in PROMPTS), ([2], ROOM)):
            expected = ids_of(model, prompt, count, **kind)
            for options in VARIANTS:
                options = replace(options, speculate="draft")
                done = model.generate(prompt, count, options=options, **kind).run()
                assert done.token_ids == expected, (len(prompt), count, options)
                stats = done.stats
                assert stats.draft_rounds > 0
                if not kind and not wrong:
                    assert stats.accepted_tokens > 0.8 * stats.drafted_tokens
        wrong.append(True)


def test_a_round_is_one_graph_launch_without_an_upload(model):
    from benchmarks.cuda_common import copies, launches, profiled

    seen = {}
    for count in (10, 60):
        run = model.generate(PROMPTS[2], count, options=VARIANTS[0]).run
        run()
        done = []

        def again(count=count, done=done):
            done.append(model.generate(PROMPTS[2], count, options=VARIANTS[0]).run())

        events = profiled(again)
        assert copies(events) == done[0].stats.transfers
        seen[count] = launches(events), copies(events), done[0]._batch.stats.steps
    (few, few_copies, few_steps), (many, many_copies, many_steps) = seen.values()
    assert many["graphs"] - few["graphs"] == many_steps - few_steps
    assert many["kernels"] == few["kernels"]
    assert many_copies["host_to_device"]["count"] == few_copies["host_to_device"]["count"]
    assert many_copies["device_to_device"] == few_copies["device_to_device"]


def test_requests_of_all_kinds_one_after_the_other(model, drafted):
    requests = [
        Request(PROMPTS[i % len(PROMPTS)], 20, logprobs=1 if i == 2 else None, **KINDS[i % 3])
        for i in range(6)
    ]
    plain, found = (
        model.generate_batch(requests, options).run() for options in (None, VARIANTS[0])
    )
    assert [r.token_ids for r in found] == [r.token_ids for r in plain]
    assert [r.logprobs for r in found] == [r.logprobs for r in plain]
