"""Qwen's programs against the eager network."""

import functools
import multiprocessing
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import pytest
import torch

from tests.export.programs import (
    assert_near,
    assert_near_of_quantized,
    assert_rows_near,
    even,
    export_here,
    feed,
)
from tokenloop.export.errors import ExportError
from tokenloop.export.qwen3 import FAMILY
from tokenloop.runner.engines.executorch import ExecuTorchProgram
from tokenloop.runner.manifest import open_artifact

MAX_SEQ_LEN, MAX_PREFILL = 40, 7


@dataclass(frozen=True)
class Made:
    """What an artifact is made of."""

    model_type: str
    config: dict = field(default_factory=dict)
    quant: str = "fp32"
    backend: str = "xnnpack"
    batch: int = 1


LARGE = {"vocab_size": 16384, "num_hidden_layers": 1}
# Both are seen in fewer positions than there are.
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1 + i for i in range(16)],
    "original_max_position_embeddings": 16, "attention_factor": 1.1,
}  # fmt: skip
# Each is an export of its own: what Gemma's tests do not show.
EXACT = {
    "qwen2, tied, yarn": Made("qwen2", {"tie_word_embeddings": True, "rope_scaling": YARN}),
    "qwen3_moe": Made("qwen3_moe"),
    "qwen3_moe, portable, longrope": Made(
        "qwen3_moe", {"rope_scaling": LONGROPE}, backend="portable"
    ),
}
# Biases, and a shortlist whose rows are not the embedding's; experts.
QUANTIZED = {
    "qwen2, 8da4w, shortlist": Made("qwen2", LARGE, "8da4w"),
    "qwen3_moe, 8da8w": Made("qwen3_moe", quant="8da8w"),
}
# Of 3 rows two experts each are fewer than 7, of 4 rows they are not.
ONE_LAYER = {"num_hidden_layers": 1}
BATCHES = {f"qwen3_moe, {n} rows": Made("qwen3_moe", ONE_LAYER, batch=n) for n in (3, 4)}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def export_of(make_qwen_checkpoint, tmp_path_factory):
    """A function: name of an artifact -> its directory, and a copy of the network in it."""

    @functools.cache
    def make(name: str):
        made = (EXACT | QUANTIZED | BATCHES)[name]
        directory = tmp_path_factory.mktemp("exported") / "artifact"
        arguments = [
            *("--model", make_qwen_checkpoint(made.model_type, **made.config)),
            *("--quant", made.quant, "--backend", made.backend, "--batch", made.batch),
            *("--max-seq-len", MAX_SEQ_LEN, "--max-prefill", MAX_PREFILL, "--output", directory),
        ]
        return directory, export_here(FAMILY, arguments, first_block=8)

    return make


def program_of(directory) -> ExecuTorchProgram:
    return ExecuTorchProgram(open_artifact(directory))


def text_of(model: torch.nn.Module) -> tuple[np.ndarray, np.ndarray]:
    """Ids that fill the cache, and the eager network's logits [T, V] after each of them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, model.config.vocab_size, (1, MAX_SEQ_LEN), generator=generator)
    with torch.no_grad():
        logits = [model.decode(ids[:, [i]], torch.tensor([i])) for i in range(MAX_SEQ_LEN)]
    return ids.numpy(), torch.cat(logits).numpy()


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("chunk", [1, 5, 7])
def test_chunks_and_steps_give_the_eager_networks_logits(export_of, name, chunk):
    directory, model = export_of(name)
    ids, expected = text_of(model)
    chunks = even(17, chunk)
    ends = [*accumulate(chunks), *range(18, MAX_SEQ_LEN + 1)]
    actual = feed(program_of(directory), ids, chunks, MAX_SEQ_LEN - 17)
    assert_near(actual, expected[np.array(ends) - 1])


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_program_gives_the_quantized_networks_logits(export_of, name):
    directory, model = export_of(name)
    ids, expected = text_of(model)
    chunks = even(17, MAX_PREFILL)
    ends = [*accumulate(chunks), *range(18, MAX_SEQ_LEN + 1)]
    actual = feed(program_of(directory), ids, chunks, MAX_SEQ_LEN - 17)
    assert_near_of_quantized(actual, expected[np.array(ends) - 1], same=0.2, limit=0.1)


@pytest.mark.parametrize("name", BATCHES)
def test_rows_of_a_program_give_the_eager_networks_logits(export_of, name):
    directory, model = export_of(name)
    program, rows = program_of(directory), model.batch
    ids = np.random.default_rng(0).integers(3, 258, (rows, 20))
    lengths = [9, 1, 5, 12][:rows]
    assert_rows_near(program, model, ids, lengths, MAX_PREFILL, 8, assert_near)


def test_experts_are_not_made_integers_of_without_a_word(make_qwen_checkpoint, tmp_path):
    arguments = ["--model", make_qwen_checkpoint("qwen3_moe"), "--backend", "inductor"]
    arguments += ["--quant", "int8", "--output", tmp_path / "artifact"]
    with pytest.raises(ExportError, match="--quant int8 is not for experts with --backend induct"):
        export_here(FAMILY, arguments, first_block=8)
    assert not any(tmp_path.iterdir())
    # Nothing was begun for it.
    assert not multiprocessing.active_children()
