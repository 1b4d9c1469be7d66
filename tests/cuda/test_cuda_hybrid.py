"""Hybrids compiled for a GPU: the eager network's ids in every variant of the loop, rows alone and
together, and a step that is one launch."""

from pathlib import Path

import pytest
import torch

from tests.driving import eager_ids, ids_of, variants
from tokenloop import runner
from tokenloop.models import qwen3_5
from tokenloop.models.kernels.gated_delta_rule.reference import CHUNK
from tokenloop.runner import Request

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
VARIANTS = variants(("auto", "alias", "host"), (True, False))
# Chunks of a prompt are as long as the delta rule's own.
PROMPTS = [[2], [2, 70, 71], [*range(60, 79)], [i * 37 % 250 + 3 for i in range(130)]]
# Each layout, and experts; some with several rows.
ROWS = {"qwen3_5_text": 1, "qwen3_next": 3, "qwen3_5_moe_text": 2}


@pytest.fixture(scope="module")
def export_hybrid(make_hybrid_checkpoint, export_artifact):
    """A function: layout, rows, recipe -> the checkpoint's and the artifact's directories."""

    def make(layout: str, batch: int, quant: str) -> tuple[Path, Path]:
        checkpoint = make_hybrid_checkpoint(layout)
        arguments = (
            *("--model", checkpoint, "--device", "cuda", "--quant", quant, "--batch", batch),
            *("--max-seq-len", 200, "--max-prefill", CHUNK),
        )
        name = f"{layout}-{batch}-{quant}"
        return checkpoint, export_artifact(name, *arguments, script="export/qwen3_5.py")

    return make


@pytest.fixture(scope="module", params=ROWS)
def exported(request, export_hybrid):
    """A loaded model in float32, and the checkpoint that it is of."""
    checkpoint, artifact = export_hybrid(request.param, ROWS[request.param], "fp32")
    model = runner.load(artifact)
    model.tokenizer.eos_token_ids.clear()
    return model, checkpoint


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_every_variant_gives_the_eager_networks_ids(exported, prompt):
    model, checkpoint = exported
    expected = eager_ids(qwen3_5, checkpoint, prompt, 64)
    assert len(set(expected)) > 10
    for options in VARIANTS:
        assert ids_of(model, prompt, 64, options) == expected, options


def test_rows_that_join_and_leave_give_what_each_gives_alone(exported):
    model, checkpoint = exported
    requests = [Request(prompt, 9 + 5 * i) for i, prompt in enumerate(PROMPTS + PROMPTS[::-1])]
    expected = [eager_ids(qwen3_5, checkpoint, r.prompt, r.max_new_tokens) for r in requests]
    for options in VARIANTS:
        results = model.generate_batch(requests, options).run()
        assert [result.token_ids for result in results] == expected, options


def test_a_step_is_one_graph_launch_without_an_upload(exported):
    from benchmarks.cuda_common import copies, launches, profiled

    model, _ = exported
    seen = {}
    for count in (10, 50):
        model.generate(PROMPTS[2], count).run()
        events = profiled(lambda count=count: model.generate(PROMPTS[2], count).run())
        seen[count] = launches(events), copies(events)
    (few, few_copies), (many, many_copies) = seen.values()
    assert many["graphs"] - few["graphs"] == 40 and many["kernels"] == few["kernels"]
    # Of several rows the lines of positions go up at once, whose size depends on the steps.
    for direction in ("host_to_device", "device_to_device"):
        assert many_copies[direction]["count"] == few_copies[direction]["count"]
    assert many_copies["device_to_host"] == {"count": 50, "bytes": 8 * 50 * model.batch}


@pytest.mark.parametrize("quant", ["bf16", "int8"])
def test_other_weights_give_the_same_ids_in_every_variant(export_hybrid, quant):
    model = runner.load(export_hybrid("qwen3_5_text", 1, quant)[1])
    expected = ids_of(model, PROMPTS[2])
    assert len(set(expected)) > 5
    for options in VARIANTS:
        assert ids_of(model, PROMPTS[2], options=options) == expected, options
