"""Pooled outputs of embedding models are transformers' last hidden states."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import VOCAB_SIZE, write_byte_tokenizer
from tests.export.programs import export_here
from tests.models.tiny_models import make_reference
from tokenloop.export.command import ANY
from tokenloop.runner import RunnerError, load

# Of one token, of a chunk, and of several.
PROMPTS = [[7], [9, 8, 7, 6, 5], list(range(20, 37))]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def embedding_model(tmp_path_factory):
    """transformers' model, and a checkpoint of it as sentence-transformers has one: its names are
    those of a model without a head."""
    directory = tmp_path_factory.mktemp("embedding")
    model = make_reference(
        "qwen3", vocab_size=VOCAB_SIZE, tie_word_embeddings=True, num_hidden_layers=1
    )
    model.save_pretrained(directory)
    path = directory / "model.safetensors"
    tensors = {name.removeprefix("model."): each for name, each in load_file(path).items()}
    save_file(tensors, path)
    write_byte_tokenizer(directory, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"path": path, "type": f"sentence_transformers.models.{kind}"}
        for path, kind in kinds.items()
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    write_modes(directory, "lasttoken")
    return model, directory


def write_modes(directory, *modes: str) -> None:
    flags = {f"pooling_mode_{name}": name in modes for name in ("cls_token", "lasttoken")}
    path = directory / "1_Pooling/config.json"
    path.write_text(json.dumps({"word_embedding_dimension": 48} | flags))


def arguments(directory, output, backend: str) -> list:
    return [
        "--model", directory, "--quant", "fp32", "--backend", backend, "--pooled",
        "--max-seq-len", 40, "--max-prefill", 7, "--output", output,
    ]  # fmt: skip


def test_the_pooled_output_is_the_last_hidden_state_with_length_1(embedding_model, tmp_path):
    hf, directory = embedding_model
    export_here(ANY, arguments(directory, tmp_path / "artifact", "xnnpack"), first_block=8)
    model = load(tmp_path / "artifact")
    with torch.no_grad():
        last = [hf.model(torch.tensor([ids])).last_hidden_state[:, -1] for ids in PROMPTS]
    expected = torch.nn.functional.normalize(torch.cat(last), dim=-1).numpy()
    pooled = model.embed(PROMPTS)
    np.testing.assert_allclose(pooled, expected, rtol=0, atol=1e-5)
    # No prompt sees one before it, nor the generation that it ends.
    generation = model.generate([3, 4], max_new_tokens=9)
    next(iter(generation))
    np.testing.assert_array_equal(model.embed(PROMPTS[::-1]), pooled[::-1])
    text = model.embed(["Dear"])
    np.testing.assert_array_equal(text, model.embed([model.tokenizer.encode("Dear")]))
    (greedy,) = hf.generate(torch.tensor([PROMPTS[1]]), max_new_tokens=4, do_sample=False).tolist()
    assert list(model.generate(PROMPTS[1], max_new_tokens=4).run().token_ids) == greedy[5:]
    for prompts, message in (
        ("Dear", "prompts is 'Dear', of type str; it must be a list of them"),
        ([[]], "the prompt is empty"),
        ([[VOCAB_SIZE]], f"the prompt has the id {VOCAB_SIZE}"),
    ):
        with pytest.raises(RunnerError, match=message):
            model.embed(prompts)


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (["cls_token"], "asks for ['cls_token']; --pooled gives the last token's hidden state"),
        (["cls_token", "lasttoken"], "asks for ['cls_token', 'lasttoken']; --pooled"),
        ([], "asks for []; --pooled gives"),
    ],
)
def test_another_pooling_is_refused(embedding_model, run_here, tmp_path, modes, message):
    _, directory = embedding_model
    write_modes(directory, *modes)
    done = run_here("export/qwen3.py", *arguments(directory, tmp_path / "artifact", "portable"))
    write_modes(directory, "lasttoken")
    assert done.returncode == 2 and message in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--backend", "inductor"], "--pooled is not for --backend inductor: xnnpack and portable"),
        (["--backend", "launches"], "--pooled is not for --backend launches: xnnpack and portable"),
        (["--batch", 2], "--pooled is for one row, and --batch is 2"),
    ],
)
def test_a_backend_without_pooled_outputs_is_refused(run_here, flags, message):
    done = run_here("export/qwen3.py", "--model", "nowhere", "--pooled", *flags)
    assert done.returncode == 2 and message in done.stderr


def test_an_artifact_without_them_says_how_to_get_one(tiny_artifact):
    with pytest.raises(RunnerError, match="has no pooled output: export it with --pooled"):
        load(tiny_artifact).embed(["Dear"])
