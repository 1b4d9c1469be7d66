"""A GGUF file's vocabulary of Gemma 4 encodes as transformers' own tokenizer of it does."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, trainers
from transformers import GemmaTokenizer

from tests.export.test_byte_level_bpe import TEXTS as ALL_TEXTS
from tests.export.test_byte_level_bpe import streamed
from tokenloop.export.checkpoint import Checkpoint
from tokenloop.export.checkpoint.tokenizer_files import write_tokenizer
from tokenloop.export.errors import ExportError
from tokenloop.runner.tokenizer import Tokenizer as RunnerTokenizer

# The others have names of tokens that end something.
TEXTS = [text for text in ALL_TEXTS if "<|im_end|>" not in text]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _, BYTE = range(1, 7)
SPECIAL = [("<pad>", CONTROL), ("<eos>", CONTROL), ("<bos>", CONTROL), ("<unk>", CONTROL)]
ADDED = [("<|turn>", CONTROL), ("<turn|>", CONTROL), ("<|tool_call>", USER_DEFINED)]
BYTES = [(f"<0x{byte:02X}>", BYTE) for byte in range(256)]


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, int], list[list[str]]]:
    """A vocabulary and merges, trained on the texts, of whose characters some have no token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    first = [token for token, _ in (*SPECIAL, *BYTES)]
    trainer = trainers.BpeTrainer(
        vocab_size=500, limit_alphabet=90, show_progress=False, special_tokens=first
    )
    tokenizer.train_from_iterator([line for text in TEXTS for line in text.split("\n")], trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], model["merges"]


@pytest.fixture(scope="module")
def reference(trained) -> GemmaTokenizer:
    """transformers' tokenizer of the same vocabulary, with the same tokens added."""
    vocabulary, merges = trained
    tokenizer = GemmaTokenizer(
        vocab=dict(vocabulary), merges=[tuple(merge) for merge in merges], mask_token="<unk>"
    )
    tokenizer.add_tokens(
        [AddedToken(text, special=kind == CONTROL, normalized=False) for text, kind in ADDED]
    )
    return tokenizer


def checkpoint_of(trained, **changes) -> Checkpoint:
    """A file with that vocabulary, as a header's keys, and other values; None leaves a key out."""
    vocabulary, merges = trained
    tokens = sorted(vocabulary, key=vocabulary.get)
    kinds = dict((*SPECIAL, *BYTES))
    keys = {
        "model": "gemma4", "tokens": tokens + [text for text, _ in ADDED],
        "token_type": [kinds.get(token, NORMAL) for token in tokens] + [k for _, k in ADDED],
        "merges": [" ".join(merge) for merge in merges], "bos_token_id": 2, "eos_token_id": 1,
        "unknown_token_id": 3, "padding_token_id": 0, "add_bos_token": True,
        "add_space_prefix": False,
    }  # fmt: skip
    metadata = {f"tokenizer.ggml.{k}": v for k, v in (keys | changes).items() if v is not None}
    return Checkpoint(Path("gemma.gguf"), "gguf", {}, (), {}, metadata)


@pytest.fixture(scope="module")
def runner(trained, tmp_path_factory) -> RunnerTokenizer:
    directory = tmp_path_factory.mktemp("artifact")
    return RunnerTokenizer(directory, write_tokenizer(checkpoint_of(trained), directory))


def check(runner: RunnerTokenizer, reference: GemmaTokenizer, text: str) -> None:
    ids = runner.encode(text)
    assert ids == [2, *reference(text, add_special_tokens=False).input_ids]
    shown = reference.decode(ids, skip_special_tokens=True)
    assert runner.decode(ids) == streamed(runner, ids) == shown


@pytest.mark.parametrize(
    "text", [*TEXTS, "<|turn>user\nhi<turn|>\n<|tool_call>call", "\n\n a\n  b"]
)
def test_ids_are_those_of_transformers_and_come_back_as_the_text(runner, reference, text):
    check(runner, reference, text)


@settings(deadline=None, max_examples=100)
@given(text=st.text("a e\n\u2581<|turn>é𝄞the", max_size=40))
def test_ids_of_any_text_are_those_of_transformers(runner, reference, text):
    assert runner.encode(text)[1:] == reference(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"add_space_prefix": True}, "add_space_prefix is true; false is supported"),
        ({"merges": None}, "has no key tokenizer.ggml.merges"),
        ({"unknown_token_id": 10_000}, "the unk id 10000 is not one of"),
        ({"merges": ["no_such token_here"]}, "holds no valid BPE"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(trained, tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        write_tokenizer(checkpoint_of(trained, **changes), tmp_path)
