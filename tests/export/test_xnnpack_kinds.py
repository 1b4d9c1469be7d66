"""XNNPACK programs of networks whose layers differ in shape or in kind, or have sinks, give the
network's logits."""

import functools
from itertools import accumulate

import numpy as np
import pytest
import torch

from tests.conftest import VOCAB_SIZE, write_byte_tokenizer
from tests.export.programs import assert_rows_near, even, export_here, feed
from tests.models.architectures import FULL, SLIDING
from tests.models.tiny_models import make_reference
from tokenloop.export.command import ANY
from tokenloop.runner.engines.executorch import ExecuTorchProgram
from tokenloop.runner.manifest import open_artifact

MAX_SEQ_LEN, MAX_PREFILL = 40, 7
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "vocab_size": VOCAB_SIZE}
# Of each a case, what changes, and the rows.
PROGRAMS = {
    # A ring and a full cache that are shared, experts, and layers' own inputs.
    "gemma4": (
        "gemma4_text, per-layer inputs and experts, a window beyond the cache",
        {
            "num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 9,
            "num_kv_shared_layers": 2, "vocab_size_per_layer_input": VOCAB_SIZE,
        },
        1,
    ),
    # Streams of a token, sparse gates, and layers of two widths.
    "gemma3n": (
        "gemma3n_text, three streams, widths of layers, a full table",
        {
            "num_hidden_layers": 4, "layer_types": [SLIDING, FULL] * 2, "sliding_window": 9,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
        1,
    ),
    "lfm2": (
        "lfm2, untied, biases, a width of 2", {"conv_L_cache": 3, "layer_types": ["conv", FULL]},
        1,
    ),
    "gpt_oss, 2 rows": ("gpt_oss", {"num_experts_per_tok": 2, "sliding_window": 20}, 2),
}  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def program_of(tmp_path_factory):
    """A function: one of PROGRAMS -> its program, and a copy of the network in it."""

    @functools.cache
    def make(name: str):
        case, changes, batch = PROGRAMS[name]
        directory = tmp_path_factory.mktemp("checkpoint")
        make_reference(case, **TWO_LAYERS | changes).save_pretrained(directory)
        write_byte_tokenizer(directory, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
        (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        output = tmp_path_factory.mktemp("exported") / "artifact"
        arguments = [
            *("--model", directory, "--quant", "fp32", "--backend", "xnnpack", "--batch", batch),
            *("--max-seq-len", MAX_SEQ_LEN, "--max-prefill", MAX_PREFILL, "--output", output),
        ]
        network = export_here(ANY, arguments, first_block=8)
        return ExecuTorchProgram(open_artifact(output)), network

    return make


@pytest.mark.parametrize("chunk", [1, 5, 7])
@pytest.mark.parametrize("name", ["gemma3n", "gemma4", "lfm2"])
def test_chunks_and_steps_give_the_eager_networks_logits(program_of, name, chunk):
    program, network = program_of(name)
    ids = np.random.default_rng(1).integers(3, VOCAB_SIZE, (1, MAX_SEQ_LEN))
    with torch.no_grad():
        given = torch.from_numpy(ids)
        steps = [network.decode(given[:, [i]], torch.tensor([i])) for i in range(MAX_SEQ_LEN)]
    chunks = even(17, chunk)
    ends = [*accumulate(chunks), *range(18, MAX_SEQ_LEN + 1)]
    actual = feed(program, ids, chunks, MAX_SEQ_LEN - 17)
    assert_logits(actual, torch.cat(steps).numpy()[np.array(ends) - 1])


def test_rows_give_the_eager_networks_logits(program_of):
    program, network = program_of("gpt_oss, 2 rows")
    ids = np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 34))
    assert_rows_near(program, network, ids, [19, 4], MAX_PREFILL, 12, assert_logits)


def assert_logits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for rounding, which is of logits as large as these."""
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=1e-4 * np.abs(expected).max())
    assert np.array_equal(actual.argmax(1), expected.argmax(1))
