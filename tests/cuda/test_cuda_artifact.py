"""Packages on a CUDA GPU: graph, plain and eager give the same ids; the profiler sees the copies
that the runner counts. Where there is no GPU all of it is skipped."""

import itertools
import json

import pytest
import torch

from tests.driving import (
    PROMPTS,
    SAMPLED,
    altered,
    assert_rows_are_those_alone,
    eager_ids,
    ids_of,
    variants,
)
from tokenloop import runner
from tokenloop.models import gemma3, qwen3
from tokenloop.runner import LoopOptions, Request, RunnerError
from tokenloop.runner.engines.torch_memory import TorchMemory
from tokenloop.runner.transfers import Transfers
from tokenloop.sampler.greedy import greedy
from tokenloop.sampler.sample import sample

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
VARIANTS = variants(graphs=(True, False))
CUDA = ("--device", "cuda", "--max-seq-len", 200, "--max-prefill", 64)


@pytest.fixture(scope="module")
def package(export_artifact, tiny_checkpoint):
    return export_artifact("tiny-cuda", "--model", tiny_checkpoint, *CUDA, "--quant", "fp32")


@pytest.fixture(scope="module")
def model(package):
    loaded = runner.load(package)
    loaded.tokenizer.eos_token_ids.clear()
    return loaded


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_every_variant_gives_the_eager_networks_ids(model, tiny_checkpoint, prompt):
    expected = eager_ids(gemma3, tiny_checkpoint, prompt, 60)
    for options in VARIANTS:
        assert ids_of(model, prompt, options=options) == expected, options


def test_every_variant_samples_the_same_ids(model):
    expected = ids_of(model, PROMPTS[2], **SAMPLED)
    assert len(set(expected)) > 20
    for options in VARIANTS:
        assert ids_of(model, PROMPTS[2], options=options, **SAMPLED) == expected, options


@pytest.fixture(scope="module")
def several(export_artifact, tiny_checkpoint):
    """The same model with three rows."""
    artifact = export_artifact(
        "tiny-cuda-batch", "--model", tiny_checkpoint, *CUDA, "--quant", "fp32", "--batch", 3
    )
    loaded = runner.load(artifact)
    loaded.tokenizer.eos_token_ids.clear()
    return loaded


def test_rows_that_join_and_leave_give_what_each_gives_alone(several, model):
    assert_rows_are_those_alone(several, model, VARIANTS)


# What rows ask for, in turn (a single row asks for the first), by the method that it takes.
UNFILTERED = {"temperature": 0.8, "seed": 3}
ASKED = {
    "greedy": [{}],
    "sample_unfiltered": [UNFILTERED, {}],
    "sample": [SAMPLED, {}, UNFILTERED],
}


def run_asked(model, method: str, count: int, options: LoopOptions | None = None) -> list:
    """Ids of `count` tokens in each row, which begin and end together."""
    asked = ASKED[method]
    requests = [
        Request([*PROMPTS[2], 40 + row], count, **asked[row % len(asked)])
        for row in range(model.batch)
    ]
    return [result.token_ids for result in model.generate_batch(requests, options).run()]


@pytest.fixture(params=["model", "several"])
def one_or_several(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("graph", [True, False])
def test_a_step_launches_as_many_kernels_as_its_rows_ask_for(one_or_several, graph):
    """Selection is 2 launches, 3 where a row has a top_k or a top_p."""
    from benchmarks.cuda_common import launches, profiled

    options, found = LoopOptions(graph=graph), {}
    for method in ASKED:
        kernels, calls = [], []
        for count in (10, 50):
            # The first run loads methods and captures graphs.
            run_asked(one_or_several, method, count, options)
            events = profiled(lambda m=method, n=count: run_asked(one_or_several, m, n, options))
            kernels.append(sum(event["cat"] == "kernel" for event in events))
            calls.append(launches(events))
        found[method] = (kernels[1] - kernels[0]) / 40
        if graph:
            assert calls[1]["graphs"] - calls[0]["graphs"] == 40
            assert calls[1]["kernels"] == calls[0]["kernels"]
    assert found["sample_unfiltered"] == found["greedy"], found
    assert found["sample"] == found["greedy"] + 1, found


@pytest.mark.parametrize("method", ASKED)
def test_every_method_gives_the_cpu_samplers_ids_of_the_same_logits(
    one_or_several, method, monkeypatch
):
    program, seen = one_or_several.loop.program, []
    select = program.select
    expected = run_asked(one_or_several, method, 40)

    def compared(logits, buffer, choice):
        selected = select(logits, buffer, choice)
        torch.cuda.synchronize()
        inputs = [x.cpu() for x in choice.inputs]
        reference = sample(logits.cpu(), *inputs) if inputs else greedy(logits.cpu())
        assert torch.equal(selected.token.cpu(), reference)
        seen.append(choice.method)
        return selected

    monkeypatch.setattr(program, "select", compared)
    assert run_asked(one_or_several, method, 40, LoopOptions(graph=False)) == expected
    assert set(seen) == {method} and len(seen) >= 39


@pytest.mark.parametrize("batch", [1, 4])
def test_experts_give_the_eager_networks_ids(make_qwen_checkpoint, run_script, tmp_path, batch):
    checkpoint, output = make_qwen_checkpoint("qwen3_moe"), tmp_path / "artifact"
    arguments = "--model", checkpoint, *CUDA, "--quant", "fp32", "--batch", batch
    done = run_script("export/qwen3.py", *arguments, "--output", output, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    model = runner.load(output)
    model.tokenizer.eos_token_ids.clear()
    expected = [eager_ids(qwen3, checkpoint, prompt, 30) for prompt in PROMPTS]
    for options in VARIANTS[::3]:
        results = model.generate_batch([Request(p, 30) for p in PROMPTS], options).run()
        assert [result.token_ids for result in results] == expected, options


def test_the_kernels_of_a_step_overlap(package, monkeypatch):
    from tokenloop.runner.engines import programmatic_launch as dependent_launch

    counts, let_overlap = [], dependent_launch.let_overlap
    monkeypatch.setattr(
        dependent_launch, "let_overlap", lambda *given: counts.append(let_overlap(*given))
    )
    runner.load(package)
    # Of each of the two steps that are captured when it is loaded all but the first kernel's. The
    # chunks' graphs follow.
    assert len(counts) > 2 and min(counts[:2]) > 10


def test_feeding_the_embedding_saves_a_kernel_in_each_step(model):
    from benchmarks.cuda_common import profiled

    kernels = {}
    for feed in ("alias", "embed"):
        options = LoopOptions(feed, graph=False)
        model.generate(PROMPTS[2], 40, options=options).run()
        events = profiled(lambda o=options: model.generate(PROMPTS[2], 40, options=o).run())
        kernels[feed] = sum(event["cat"] == "kernel" for event in events)
    assert kernels["alias"] - kernels["embed"] >= 39


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_the_profiler_sees_the_copies_that_the_runner_counts(model, options):
    from benchmarks.cuda_common import copies, profiled

    model.generate(PROMPTS[2], 40, options=options).run()
    done = []
    events = profiled(lambda: done.append(model.generate(PROMPTS[2], 40, options=options).run()))
    assert copies(events) == done[0].stats.transfers


def test_numbers_go_up_without_the_host_waiting_for_the_device():
    memory = TorchMemory(torch.device("cuda"))
    transfers, size = Transfers(memory), 1 << 14
    out = transfers.upload(range(size))
    # The first of a size takes memory, which may wait.
    transfers.upload(range(size), out=out)
    with torch.cuda.stream(memory.stream):
        torch.cuda._sleep(1 << 28)
    found = [transfers.upload(range(n, n + size)) for n in range(3)]
    for n in range(3):
        transfers.upload(range(n, n + size), out=out)
    assert not memory.stream.query(), "an upload waited for what was submitted before it"
    # The host's memory of each was not another's before it had gone up.
    assert [transfers.download(each) for each in found] == [
        list(range(n, n + size)) for n in range(3)
    ]
    assert transfers.download(out) == list(range(2, 2 + size))


def test_a_step_is_one_graph_launch_without_an_upload(model):
    from benchmarks.cuda_common import copies, launches, profiled

    seen = {}
    for count in (10, 50):
        model.generate(PROMPTS[2], count).run()
        events = profiled(lambda count=count: model.generate(PROMPTS[2], count).run())
        seen[count] = launches(events), copies(events)
    (few, few_copies), (many, many_copies) = seen.values()
    assert many["graphs"] - few["graphs"] == 40 and many["kernels"] == few["kernels"]
    assert many_copies["host_to_device"] == few_copies["host_to_device"]
    assert many_copies["host_to_device"]["count"] <= 5
    assert many_copies["device_to_device"] == few_copies["device_to_device"]
    assert many_copies["device_to_host"] == {"count": 50, "bytes": 8 * 50}


def test_two_models_do_not_disturb_each_other(package, model):
    other = runner.load(package)
    other.tokenizer.eos_token_ids.clear()
    expected = [ids_of(model, prompt) for prompt in PROMPTS[1:3]]
    first, second = model.generate(PROMPTS[1], 60), other.generate(PROMPTS[2], 60)
    for _ in itertools.zip_longest(first, second):
        pass
    assert [first.token_ids, second.token_ids] == expected


@pytest.mark.parametrize("quant", ["bf16", "int8"])
def test_other_weights_give_the_same_ids_in_every_variant(export_artifact, tiny_checkpoint, quant):
    artifact = export_artifact(
        f"tiny-cuda-{quant}", "--model", tiny_checkpoint, *CUDA, "--quant", quant
    )
    model = runner.load(artifact)
    expected = ids_of(model, PROMPTS[2])
    assert len(set(expected)) > 5
    for options in VARIANTS:
        assert ids_of(model, PROMPTS[2], options=options) == expected, options


def test_many_rows_of_integer_weights_are_those_alone(export_artifact, make_checkpoint):
    """More than 8 rows are multiplied in other tiles than a few are."""
    checkpoint = make_checkpoint(
        hidden_size=256, intermediate_size=384, head_dim=64, num_hidden_layers=2,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    arguments = "--model", checkpoint, *CUDA, "--quant", "int4", "--batch", 9
    model = runner.load(export_artifact("tiny-cuda-int4", *arguments))
    model.tokenizer.eos_token_ids.clear()
    assert_rows_are_those_alone(model, model, VARIANTS[::3])


def test_a_package_for_another_architecture_is_refused(package, tmp_path):
    with pytest.raises(RunnerError, match="compiled for sm_70, and this machine's cuda is sm_"):
        runner.load(altered(package, tmp_path / "copy", processor="sm_70"))


def test_what_does_not_fit_the_memory_is_one_line(package, tmp_path):
    state = json.loads((package / "manifest.json").read_text())["state"]
    state[0] = state[0] | {"shape": [2**40]}
    with pytest.raises(RunnerError, match="does not fit the GPU's memory") as caught:
        runner.load(altered(package, tmp_path / "copy", state=state))
    assert len(str(caught.value).splitlines()) == 1
