"""Grammars, penalties and biases on a CUDA GPU: every variant gives the same, the tokens are the
reference's of the same logits, and steps without a restricted row stay what they were."""

import json

import numpy as np
import pytest
import torch

from tests.driving import PROMPTS, variants
from tests.runner.test_restriction import ALL, JSON, JSON_SAMPLED, PENALIZED, PLAIN, changed
from tokenloop import runner
from tokenloop.runner import LoopOptions, Request
from tokenloop.runner.restriction import mask_bytes
from tokenloop.sampler.greedy import greedy
from tokenloop.sampler.sample import sample

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
VARIANTS = variants(graphs=(True, False))
CUDA = ("--device", "cuda", "--max-seq-len", 200, "--max-prefill", 64, "--quant", "fp32")
PENALTIES = [
    PENALIZED,
    Request(PROMPTS[1], 40, frequency_penalty=0.7),
    Request(PROMPTS[2], 40, logit_bias={70: 2.0}, temperature=1.0, top_k=20, seed=4),
]


@pytest.fixture(scope="module", params=[1, 3])
def model(request, export_artifact, tiny_checkpoint):
    name = "tiny-cuda" if request.param == 1 else "tiny-cuda-batch"
    batch = () if request.param == 1 else ("--batch", 3)
    return runner.load(export_artifact(name, "--model", tiny_checkpoint, *CUDA, *batch))


def alone(model, requests, options=None) -> list:
    return [model.generate(request, options=options).run().token_ids for request in requests]


def restricted() -> list[Request]:
    try:
        import llguidance  # noqa: F401
    except ImportError:
        return PENALTIES
    return [JSON, JSON_SAMPLED, ALL, *PENALTIES]


def test_the_output_fits_the_schema(model):
    pytest.importorskip("llguidance")
    for request in (JSON, JSON_SAMPLED, ALL):
        result = model.generate(request).run()
        assert list(json.loads(result.text)) == ["name", "kind", "size"]
        assert result.finish_reason == "stop"


def test_every_variant_gives_the_same_and_so_do_rows_beside(model):
    requests = [r for pair in zip(restricted(), PLAIN * 2) for r in pair]
    expected = alone(model, requests)
    plain = alone(model, PLAIN)
    for options in VARIANTS:
        results = model.generate_batch(requests, options).run()
        assert [result.token_ids for result in results] == expected, options
    # Nothing is left of a restriction in the rows.
    assert [r.token_ids for r in model.generate_batch(PLAIN).run()] == plain


@pytest.mark.parametrize("request_", PENALTIES, ids=range(len(PENALTIES)))
def test_tokens_are_those_of_logits_that_the_formula_changes(model, request_, monkeypatch):
    given, program = [], model.loop.program
    select, select_row = program.select, program.select_row

    def kept(method):
        def call(logits, *arguments):
            given.append(logits[0].cpu().numpy())
            return method(logits, *arguments)

        return call

    expected = alone(model, [request_])[0]
    monkeypatch.setattr(program, "select", kept(select))
    monkeypatch.setattr(program, "select_row", kept(select_row))
    options = LoopOptions(graph=False, double_buffering=False)
    ids = alone(model, [request_], options)[0]
    assert ids == expected
    for step, (token_id, logits) in enumerate(zip(ids, given)):
        x = torch.from_numpy(changed(logits, request_, request_.prompt, ids[:step]))[None]
        position = torch.tensor([len(request_.prompt) + step - 1])
        settings = [
            torch.tensor([value])
            for value in (request_.temperature, request_.top_k, request_.top_p, request_.seed)
        ]
        expected_id = sample(x, *settings, position) if request_.temperature else greedy(x)
        assert expected_id.item() == token_id


def test_a_restricted_step_is_two_graphs_and_its_row_s_bits(model):
    pytest.importorskip("llguidance")
    from benchmarks.cuda_common import copies, launches, profiled

    seen = {}
    for count in (10, 50):
        request = Request(PROMPTS[2], count, grammar="start: /[a-z]{100}/")
        plain = [Request(PROMPTS[2], 9)] * (model.batch - 1)

        def run(requests=(request, *plain)):
            model.generate_batch(requests).run()

        run()
        events = profiled(run)
        seen[count] = launches(events), copies(events)["host_to_device"]
    (few, few_copies), (many, many_copies) = seen.values()
    assert many["graphs"] - few["graphs"] == 2 * 40 and many["kernels"] == few["kernels"]
    size = np.array([many_copies[key] - few_copies[key] for key in ("count", "bytes")])
    assert size.tolist() == [40, 40 * mask_bytes(model.vocab_size)]
