"""A package of AOTInductor on the CPU gives what the .pte gives, in every variant of the loop; its
weights and state exist once; what does not fit is one line."""

import functools
import itertools
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file

from tests.driving import (
    PROMPTS,
    SAMPLED,
    altered,
    assert_rows_are_those_alone,
    ids_of,
    resealed,
    variants,
)
from tokenloop import runner
from tokenloop.models.kernels.linear.reference import dequantize
from tokenloop.runner import LoopOptions, RunnerError
from tokenloop.runner.program import Choice
from tokenloop.sampler.greedy import greedy
from tokenloop.sampler.sample import sample

NAN, INF = math.nan, math.inf

VARIANTS = variants()
INDUCTOR = ("--backend", "inductor", "--max-seq-len", 200, "--max-prefill", 7)


@pytest.fixture(scope="module")
def package(export_artifact, tiny_checkpoint):
    """The tiny checkpoint as a package of one row, float32."""
    return export_artifact("tiny-inductor", "--model", tiny_checkpoint, *INDUCTOR)


@pytest.fixture(scope="module")
def rows_package(export_artifact, tiny_checkpoint):
    """The same of three rows."""
    return export_artifact(
        "tiny-inductor-batch", "--model", tiny_checkpoint, *INDUCTOR, "--batch", 3
    )


@pytest.fixture(scope="module")
def model(package):
    return runner.load(package)


@pytest.fixture(scope="module")
def pte(tiny_artifact):
    return runner.load(tiny_artifact)


# What it gives


@pytest.mark.parametrize("prompt", PROMPTS, ids=len)
def test_greedy_ids_are_those_of_the_pte_in_every_variant(model, pte, prompt):
    expected = ids_of(pte, prompt)
    for options in VARIANTS:
        assert ids_of(model, prompt, options=options) == expected


def test_sampled_ids_are_those_of_the_pte_in_every_variant(model, pte):
    expected = ids_of(pte, PROMPTS[2], **SAMPLED)
    for options in VARIANTS:
        assert ids_of(model, PROMPTS[2], options=options, **SAMPLED) == expected


def test_rows_that_join_and_leave_give_what_each_gives_alone(rows_package, pte):
    assert_rows_are_those_alone(runner.load(rows_package), pte, VARIANTS)


def test_the_cache_can_be_filled_to_its_last_position(model, pte):
    prompt = [2, *(i * 31 % 256 + 3 for i in range(150))]
    result, expected = (m.generate(prompt, 1000).run() for m in (model, pte))
    assert result.token_ids == expected.token_ids
    assert result.finish_reason == expected.finish_reason
    assert result.finish_reason == "stop" or len(result.token_ids) == 49


# What is copied, and what is there once


@pytest.mark.parametrize("count", [1, 8, 40])
def test_a_step_uploads_nothing_and_downloads_one_token(model, monkeypatch, count):
    monkeypatch.setattr(model.tokenizer, "eos_token_ids", [])
    stats = model.generate(PROMPTS[2], count).run().stats
    assert {name: tuple(entry.values()) for name, entry in stats.transfers.items()} == {
        "host_to_device": (1, 8 * len(PROMPTS[2])),
        "device_to_device": (0, 0),
        "device_to_host": (count, 8 * count),
    }


def test_running_ahead_reads_several_tokens_at_once(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "eos_token_ids", [])
    options = LoopOptions(run_ahead=4)
    transfers = model.generate(PROMPTS[2], 41, options=options).run().stats.transfers
    # The first token, and ten times four.
    assert transfers["device_to_host"] == {"count": 11, "bytes": 8 * 41}
    assert transfers["host_to_device"]["count"] == 1


def test_all_methods_read_the_same_weights_in_place(package):
    model = runner.load(package)
    program = model.loop.program
    tokens, positions = torch.tensor([[5, 6, 7]]), torch.arange(3)

    def logits():
        return (
            program.prefill(tokens, positions).clone(),
            program.decode(torch.tensor([[9]]), torch.tensor([3])).clone(),
        )

    before = logits()
    (weight,) = {
        tensor.data_ptr(): tensor
        for name, tensor in program.constants.items()
        if name.endswith(("embed_tokens.weight", "lm_head.weight"))
    }.values()
    weight *= 0.5
    after = logits()
    for old, new in zip(before, after):
        assert not torch.equal(old, new)


def test_prefill_and_decode_share_the_state(package):
    model = runner.load(package)
    program = model.loop.program
    program.prefill(torch.tensor([[5, 6, 7]]), torch.arange(3))
    cache = program.constants["network.model.layers.2.self_attn.cache.k"]
    assert cache[0, :3].abs().sum() > 0 and not cache[0, 3:].any()
    held = cache[0, :3].clone()
    program.decode(torch.tensor([[9]]), torch.tensor([3]))
    assert torch.equal(cache[0, :3], held) and cache[0, 3].any()


def test_selection_looks_up_the_embedding_that_decode_would(package):
    program = runner.load(package).loop.program
    logits = torch.randn(1, 259, generator=torch.Generator().manual_seed(0))
    program.begin(embed=True)
    token, hidden = program.select(logits, 1)
    assert token.item() == logits.argmax()
    assert torch.equal(hidden, program.feed(token, 0)) and hidden.any()
    actual = program.decode(hidden, torch.tensor([0])).clone()
    program.begin(embed=False)
    assert torch.equal(program.decode(token, torch.tensor([0])), actual)
    tables = {
        program.constants[name].data_ptr()
        for name in ("embed_tokens.weight", "network.model.embed_tokens.weight")
    }
    assert len(tables) == 1


def test_the_artifact_holds_every_weight_once(package, tiny_checkpoint):
    stored = (package / "model.safetensors").stat().st_size
    # The frequencies, and a header of its own.
    assert stored < (tiny_checkpoint / "model.safetensors").stat().st_size + 4096
    views = json.loads((package / "manifest.json").read_text())["weights"]["views"]
    assert any(view["shape"] == [259, 64] for view in views.values())


def test_two_models_of_one_artifact_do_not_disturb_each_other(package, model):
    other, expected = runner.load(package), [ids_of(model, prompt) for prompt in PROMPTS[1:3]]
    first, second = model.generate(PROMPTS[1], 60), other.generate(PROMPTS[2], 60)
    for _ in itertools.zip_longest(first, second):
        pass
    assert [first.token_ids, second.token_ids] == expected


def test_tokens_of_every_kind_of_row_are_the_samplers(rows_package):
    size, program = 259, runner.load(rows_package).loop.program
    kinds = itertools.product([0.0, 1.0, 0.7], [0, 5], [1.0, 0.9, 0.3])
    for i, kind in enumerate(kinds):
        logits = torch.randn(3, size, generator=torch.Generator().manual_seed(i)) * 3.0
        logits[1] = logits[1].round()
        logits[2, :3] = torch.tensor([NAN, INF, -INF]) if i % 2 else NAN
        rows = zip(kind, kind, (1.3, 0, 0.99))
        sampling = *map(torch.tensor, rows), torch.tensor([i, -i, 9]), torch.arange(3) + 2**33
        token, _ = program.select(logits, i % 2, Choice("sample", sampling))
        assert torch.equal(token, sample(logits, *sampling))
        assert torch.equal(program.select(logits, i % 2)[0], greedy(logits))


# Weights of other types


@pytest.fixture(scope="module")
def one_layer(make_checkpoint):
    """A checkpoint of one layer, whose rows 4 bits can hold: they are of more than 128 inputs."""
    return make_checkpoint(
        hidden_size=256, intermediate_size=384, head_dim=64, num_hidden_layers=1,
        layer_types=["sliding_attention"],
    )  # fmt: skip


@pytest.fixture(scope="module")
def integer_package(export_artifact, one_layer):
    """A function: "int8" or "int4" -> a package of such weights."""

    def make(quant):
        arguments = ("--model", one_layer, *INDUCTOR, "--quant", quant)
        return export_artifact(f"one-layer-{quant}", *arguments)

    return make


def test_two_exports_give_the_same_bytes(integer_package, run_script, one_layer, tmp_path):
    """The second one finds nothing that the first one kept."""
    first, second = integer_package("int8"), tmp_path / "again"
    done = run_script(
        *("export/gemma.py", "--model", one_layer, *INDUCTOR, "--quant", "int8"),
        *("--output", second),
        cwd=tmp_path,
        env=os.environ | {"TOKENLOOP_CACHE": ""},
    )
    assert done.returncode == 0, done.stderr
    for file in ("model.safetensors", "manifest.json", "model.pt2"):
        assert (first / file).read_bytes() == (second / file).read_bytes(), file


def test_random_bf16_weights_are_the_same_each_time(export_artifact, one_layer):
    config = one_layer / "config.json"
    arguments = "--random-weights", config, *INDUCTOR, "--quant", "bf16"
    directory = export_artifact("tiny-random", *arguments)
    assert not (directory / "model.safetensors").exists()
    first, second = (assert_that_variants_agree(runner.load(directory)) for _ in range(2))
    assert first == second


def assert_that_variants_agree(model) -> list[int]:
    # Greedily one layer settles down to repeating itself.
    expected = ids_of(model, PROMPTS[2], 20, **SAMPLED)
    for options in VARIANTS[::3]:
        assert ids_of(model, PROMPTS[2], 20, options, **SAMPLED) == expected
    return expected


@pytest.mark.parametrize("quant", ["int8", "int4"])
def test_integer_weights_are_the_checkpoint_s_within_half_a_step(integer_package, one_layer, quant):
    directory = integer_package(quant)
    model = runner.load(directory)
    constants, weights = model.loop.program.constants, load_file(one_layer / "model.safetensors")
    attention = [f"self_attn.{name}_proj" for name in "qkvo"]
    for layer in attention + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]:
        name = f"model.layers.0.{layer}"
        weight = weights[f"{name}.weight"].bfloat16().float()
        words, scale = (constants[f"network.{name}.{part}"] for part in ("weight", "scale"))
        error = (dequantize(words, scale, weight.shape[1]) - weight).abs()
        step = scale.float().T.repeat_interleave(weight.shape[1] // scale.shape[0], 1)
        assert (error <= 0.501 * step).all(), layer
    # They are of float32 there; the embedding stays bfloat16, beside an integer head.
    size = (directory / "model.safetensors").stat().st_size
    assert size < 0.56 * (one_layer / "model.safetensors").stat().st_size
    assert len(set(assert_that_variants_agree(model))) > 5


# What does not fit


@pytest.fixture
def change(package, tmp_path):
    """A function: changes of the manifest -> the artifact's copy with them."""
    return functools.partial(altered, package, tmp_path / "altered")


def refused(directory) -> str:
    with pytest.raises(RunnerError) as caught:
        runner.load(directory)
    (line,) = str(caught.value).splitlines()
    return line


def test_a_package_of_another_torch_is_refused(change):
    line = refused(change(versions={"torch": "1.2.3"}))
    assert "compiled by torch 1.2.3" in line and torch.__version__.split("+")[0] in line


def test_a_package_for_another_processor_is_refused(change):
    assert "compiled for SSE9, and this machine's cpu is" in refused(change(processor="SSE9"))


def test_missing_and_truncated_weights_are_refused(change):
    directory = change()
    weights = directory / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert "model.safetensors has" in refused(directory)
    weights.unlink()
    assert "model.safetensors is missing" in refused(directory)


def test_damaged_weights_are_refused(change):
    directory = change()
    weights = directory / "model.safetensors"
    weights.write_bytes(b"\xff" * weights.stat().st_size)
    assert "model.safetensors is damaged (its sha256 is" in refused(directory)
    resealed(directory)
    assert "model.safetensors is damaged" in refused(directory)


def test_a_damaged_program_is_refused(change):
    directory = change()
    program = directory / "model.pt2"
    program.write_bytes(b"\xff" * program.stat().st_size)
    assert "model.pt2 is damaged (its sha256 is" in refused(directory)
    resealed(directory)
    assert "model.pt2 cannot be loaded" in refused(directory)


def test_a_tensor_that_is_nowhere_is_named(change, package):
    manifest = json.loads((package / "manifest.json").read_text())
    state = [e for e in manifest["state"] if not e["name"].endswith("layers.1.self_attn.cache.v")]
    line = refused(change(state=state))
    assert "needs the tensor network.model.layers.1.self_attn.cache.v" in line


def test_a_package_that_cannot_sample_says_so(change, package):
    methods = json.loads((package / "manifest.json").read_text())["methods"]
    model = runner.load(change(methods=[name for name in methods if name != "sample"]))
    with pytest.raises(RunnerError, match="has no method sample"):
        model.generate([2], 4, temperature=1.0)


def test_run_ahead_needs_tokens_that_the_host_does_not_feed():
    with pytest.raises(RunnerError, match="run_ahead is 2 and feed 'host'"):
        LoopOptions("host", run_ahead=2)
    with pytest.raises(RunnerError, match="run_ahead is 0"):
        LoopOptions(run_ahead=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "xnnpack", "--device", "cuda"], "--device cuda is not for --backend"),
        (["--backend", "xnnpack", "--quant", "int4"], "--quant int4 is not for --backend xnnpack"),
        (["--backend", "inductor", "--quant", "8da4w"], "--quant 8da4w is not for --backend ind"),
        (["--backend", "xnnpack", "--random-weights", "x"], "--random-weights needs --backend"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(run_script, tmp_path, arguments, message):
    done = run_script("export/gemma.py", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr
