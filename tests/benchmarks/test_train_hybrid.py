"""The text that the small hybrid learns, and that it is trained as the network computes."""

import struct
import zlib

import pytest
import torch

from benchmarks.train_hybrid import (
    CONFIG,
    END,
    initialize,
    logits_of,
    read_novels,
    train_tokenizer,
    unwrapped,
)
from tests.models.eager import assert_near, prefill, prompt
from tokenloop.models.qwen3_5 import Qwen3_5, Qwen3_5Config

pytestmark = pytest.mark.usefixtures("one_thread")


def stored(lines: list[str], version: int = 3, kind: int = 16) -> bytes:
    """A character vector as R keeps it in a lazy-load database."""
    data = b"X\n" + struct.pack(">iii", version, 0x40100, 0x30500)
    if version == 3:
        data += struct.pack(">i", 5) + b"UTF-8"
    data += struct.pack(">ii", kind, len(lines))
    for line in lines:
        text = line.encode()
        data += struct.pack(">ii", 0x40009, len(text)) + text
    return struct.pack(">I", len(data)) + zlib.compress(data)


@pytest.mark.parametrize("version", [2, 3])
def test_novels_are_read_out_of_an_r_package(tmp_path, version):
    path = tmp_path / "Rdata.rdb"
    path.write_bytes(stored(["EMMA", "", "née Größe"], version) + stored([], version))
    assert read_novels(path) == ["EMMA\n\nnée Größe", ""]


def test_another_kind_of_object_is_named(tmp_path):
    (tmp_path / "Rdata.rdb").write_bytes(stored(["x"], kind=19))
    with pytest.raises(ValueError, match="R's type 19"):
        read_novels(tmp_path / "Rdata.rdb")


def test_a_paragraph_becomes_a_line():
    assert unwrapped("\nCHAPTER I\n\n\nIt was\na  day.\n\nShe left.\n") == (
        "CHAPTER I\nIt was a day.\nShe left."
    )


def test_tokens_are_byte_level_and_the_first_ends_a_text():
    text = "She was not aware of what she was.\n" * 3
    tokenizer = train_tokenizer(text, 280)
    ids = tokenizer.encode(f"é{text}{END}").ids
    assert tokenizer.decode(ids) == f"é{text}" and ids[-1] == 0
    assert len(ids) < 0.7 * len(text)


def test_what_is_trained_is_what_the_network_computes():
    small = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4}
    model = Qwen3_5(Qwen3_5Config.from_dict(CONFIG | small), 100)
    torch.manual_seed(0)
    initialize(model)
    tokens = prompt(70)
    with torch.no_grad():
        logits = logits_of(model, tokens)[0]
    ends = [1, 30, 70]
    assert_near(torch.cat(prefill(model, tokens, ends)), logits[[end - 1 for end in ends]])


def test_every_weight_is_trained():
    small = {"vocab_size": 60, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 4}
    model = Qwen3_5(Qwen3_5Config.from_dict(CONFIG | small), 70)
    initialize(model)
    logits_of(model, prompt(66)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())
