"""Tokenizers and chat templates at random, as transformers has them: python -m
tests.differential_tokenizers

Hypothesis draws a Hugging Face directory's tokenizer: byte-level BPE, BPE with bytes to fall back
on as Llama and Gemma have it, a SentencePiece model, or WordPiece; its normalizer, pre-tokenizer
and post-processor; and the files beside it, which add and name tokens: tokenizer_config.json,
special_tokens_map.json, added_tokens.json. The exporter writes its artifact, the runner loads it,
and for texts, ids and conversations drawn as well

- the ids are those of transformers' AutoTokenizer, with and without what goes around a text, but
  that ids in front are not put there twice;
- the text of ids is its `decode` without special tokens;
- a conversation's text and ids are its `apply_chat_template`, and where that raises, the runner
  refuses in one line.

A directory that is refused must be one of those that `expected_refusal` describes.

Prints the versions, the counts and one JSON line. `--count 4000 --seed 0` takes some minutes.
"""

import argparse
import io
import json
import sys
import tempfile
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
import transformers
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from tokenloop.export.checkpoint import Checkpoint
from tokenloop.export.checkpoint.tokenizer_files import write_tokenizer
from tokenloop.export.errors import ExportError
from tokenloop.runner.conversation import Conversation
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.tokenizer import Tokenizer as RunnerTokenizer

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# In every vocabulary, at the ids 0 to 4, and those that a file may add.
OWN = ("<unk>", "<s>", "</s>", "[INST]", "ab")
NEW = ("<|im_start|>", "<|im_end|>", "<think>", "<pad>", "<|a b|>", "é!", "<image>", "[MASK]")
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_PAIRS = [("a", "b"), ("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("l", "l"), ("Ġ", "Ġ"), ("1", "2")]
PAIRS = [("a", "b"), ("h", "e"), ("▁", "t"), ("▁t", "he"), ("l", "l"), ("▁", "▁"), ("1", "2")]

# The vocabularies


def byte_level(pre: str, composed: bool) -> Tokenizer:
    letters = [*OWN, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in BYTE_PAIRS)])
    made = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, BYTE_PAIRS))
    made.normalizer = normalizers.NFC() if composed else None
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=pre == "prefix", use_regex=pre != "qwen")
    made.pre_tokenizer = {
        "qwen": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(QWEN), behavior="isolated"), to_bytes]
        ),
        "digits": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), to_bytes]),
    }.get(pre, to_bytes)
    made.decoder = decoders.ByteLevel()
    return made


def fallback(pre: str) -> Tokenizer:
    """BPE with bytes to fall back on. Llama's forms mark a text's first word as others."""
    letters = [*OWN, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdehlt12!é"]
    tokens = dict.fromkeys([*letters, *("".join(pair) for pair in PAIRS)])
    model = models.BPE(
        {t: i for i, t in enumerate(tokens)}, PAIRS, unk_token="<unk>", fuse_unk=True,
        byte_fallback=True,
    )  # fmt: skip
    made = Tokenizer(model)
    mark = normalizers.Replace(" ", "▁")
    if pre == "gemma":
        made.normalizer = mark
        made.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    elif pre == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), mark])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=pre, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [] if pre in ("gemma", "never") else [decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps + strip)
    return made


def word_pieces() -> Tokenizer:
    tokens = [*OWN, *"abcdehlt12!é", *(f"##{c}" for c in "abcdehlt12!é")]
    made = Tokenizer(models.WordPiece({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.decoder = decoders.WordPiece()
    return made


@cache
def sentencepiece_model(dummy_prefix: bool) -> bytes:
    """A tokenizer.model of OWN and of words."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the hello ab ll 12 the cab held late 1 2 tell!"] * 20),
        model_writer=written, model_type="bpe", vocab_size=300, hard_vocab_limit=False,
        byte_fallback=True, add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", control_symbols=["[INST]"], unk_id=0, bos_id=1,
        eos_id=2, minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


# What is drawn

KINDS = {
    "byte-level": st.builds(
        byte_level, st.sampled_from(("plain", "prefix", "qwen", "digits")), st.booleans()
    ),
    "fallback": st.builds(
        fallback, st.sampled_from(("gemma", "prepend", "first", "always", "never"))
    ),
    "word pieces": st.builds(word_pieces),
}
# transformers 5 makes a tokenizer of its own of these, whatever normalizer and pre-tokenizer the
# file has: they are compared for those that are the same, and files that agree on added tokens.
FAMILIES = {
    "GemmaTokenizer": ("gemma3_text", lambda: fallback("gemma")),
    "LlamaTokenizer": ("llama", lambda: fallback("first")),
    "Qwen2Tokenizer": ("qwen3", lambda: byte_level("qwen", True)),
}


@st.composite
def post_processors(draw, tokenizer: Tokenizer) -> Any:
    """None, or one that puts up to two ids in front and one behind."""

    def token() -> tuple[str, int]:
        text = draw(st.sampled_from(OWN[:4]))
        return text, tokenizer.token_to_id(text)

    kind = draw(st.sampled_from(("none", "bytes", "template", "sequence", "bert", "roberta")))
    bytes_only = processors.ByteLevel(trim_offsets=False)
    if kind in ("bert", "roberta"):
        make = processors.BertProcessing if kind == "bert" else processors.RobertaProcessing
        return make(token(), token())
    if kind in ("template", "sequence"):
        front = [token() for _ in range(draw(st.integers(0, 2)))]
        behind = [token() for _ in range(draw(st.integers(0, 1)))]
        single = [*(text for text, _ in front), "$A", *(text for text, _ in behind)]
        made = processors.TemplateProcessing(
            single=single, pair=[*single, "$B"], special_tokens=list(dict(front + behind).items())
        )
        return processors.Sequence([bytes_only, made]) if kind == "sequence" else made
    return bytes_only if kind == "bytes" else None


FLAGS = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(
        ("lstrip", "rstrip", "single_word", "normalized", "special"), st.booleans()
    ),
)


# What a SentencePiece model's added tokens may have.
OF_PIECES = st.fixed_dictionaries({}, optional=dict.fromkeys(("rstrip", "special"), st.booleans()))


@st.composite
def token_values(draw, text: str, typed: bool, flags: bool = True) -> Any:
    """A token as a file has it: its text or an object."""
    if draw(st.booleans()):
        return text
    mark = {"__type": "AddedToken"} if typed else {}
    return {**mark, "content": text, **(draw(FLAGS) if flags else {})}


@st.composite
def directories(draw) -> dict[str, Any]:
    """The files of a directory: JSON values, a Tokenizer, or bytes."""
    family = draw(st.sampled_from((None, None, None, *FAMILIES)))
    kind = draw(st.sampled_from(("byte-level", "byte-level", "fallback", "fallback", "word pieces",
                                 "sentencepiece")))  # fmt: skip
    files: dict[str, Any] = {"config.json": {"model_type": "llama"}}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    is_model = kind == "sentencepiece" and family is None
    if is_model:
        files["tokenizer.model"] = data = sentencepiece_model(draw(st.booleans()))
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        size = len(processor)
        own = []
    else:
        if family is not None:
            files["config.json"]["model_type"], make = FAMILIES[family]
            config["tokenizer_class"] = family
            made = make()
        else:
            made = draw(KINDS[kind])
        processor = draw(post_processors(made))
        if processor is not None:
            made.post_processor = processor
        size = made.get_vocab_size()
        own = draw(st.lists(st.sampled_from([*OWN, *NEW]), unique=True, max_size=5))
        if family is not None:
            own = [*OWN[:3], *(text for text in own if text not in OWN[:3])]
            own = [text for text in own if text != "ab"]
        for text in own:
            flags = draw(FLAGS) if family is None else {"special": text in OWN}
            made.add_tokens([AddedToken(text, **flags)])
        files["tokenizer.json"] = made
        known = [text for text in NEW if made.token_to_id(text) is not None]
        size = made.get_vocab_size()
    known = [text for text in NEW if text in own]
    fresh = [text for text in draw(st.permutations(NEW)) if text not in known]

    # Ids that go on where the vocabulary ends, but for a mistake now and then.
    count = draw(st.integers(0, 3))
    declared = {text: size + n for n, text in enumerate(fresh[:count])}
    if declared and draw(st.integers(0, 9)) == 5:
        declared[fresh[0]] += 7
    place = draw(st.sampled_from(("decoder", "added_tokens.json", "nowhere")))
    if family is not None and place == "decoder":
        place = "added_tokens.json"
    plain = OF_PIECES if is_model else FLAGS
    if place == "decoder":
        entries = {text: draw(plain) | {"content": text} for text in declared}
        config["added_tokens_decoder"] = {
            str(token_id): entries[text] for text, token_id in declared.items()
        }
    elif place == "added_tokens.json":
        files["added_tokens.json"] = declared
    else:
        declared = {}
    # Qwen's class gives all that has a name other flags in the end.
    is_qwen = family == "Qwen2Tokenizer"
    usable = [*OWN[:4]] if is_qwen else [*OWN[:4], *own, *declared]

    def roles(typed: bool) -> dict[str, Any]:
        found = {}
        # transformers 5 reads a SentencePiece model's unknown piece from text if no other is named.
        names = [role for role in ROLES if not (is_model and role == "unk_token")]
        for role in draw(st.lists(st.sampled_from(names), unique=True, max_size=4)):
            texts = usable if is_qwen or role in ROLES[:2] else [*usable, *NEW]
            text = draw(st.sampled_from(texts))
            found[role] = draw(token_values(text, typed, not is_model and not is_qwen))
        return found

    if family is not None:
        # Its class would have others by default, and add them.
        config |= dict(zip(ROLES, ("<s>", "</s>", "<unk>", "</s>", "</s>", "</s>", "<unk>")))
    config |= roles(True)
    if draw(st.booleans()):
        config["image_token"] = draw(st.sampled_from(usable))
    # From a SentencePiece model transformers 5 takes its control pieces for these, or forgets them.
    special = is_model or is_qwen
    names = () if special else ("additional", "extra")
    for key in draw(st.lists(st.sampled_from(names), unique=True)) if names else ():
        texts = draw(st.lists(st.sampled_from([*usable, *NEW]), max_size=3, unique=True))
        config[f"{key}_special_tokens"] = texts
    for key in draw(st.lists(st.sampled_from(("add_bos_token", "add_eos_token")), unique=True)):
        config[key] = draw(st.booleans())
    if is_model:
        config.setdefault("add_bos_token", draw(st.booleans()))
        config.setdefault("bos_token", "<s>")
        config.setdefault("eos_token", "</s>")
    if draw(st.booleans()):
        files["special_tokens_map.json"] = roles(False)
        if not special and draw(st.booleans()):
            texts = draw(st.lists(st.sampled_from(usable), max_size=2, unique=True))
            files["special_tokens_map.json"]["additional_special_tokens"] = texts
    template = draw(templates())
    where = draw(st.sampled_from(("file", "config", "list", "folder")))
    if where == "file":
        files["chat_template.jinja"] = template
        config["chat_template"] = "not this one"
    elif where == "config":
        config["chat_template"] = template
    else:
        tools = "tools{% for m in messages %}{{ m.content }}{% endfor %}" + template
        if where == "list":
            config["chat_template"] = [
                {"name": "default", "template": template}, {"name": "tool_use", "template": tools},
            ]  # fmt: skip
        else:
            files["chat_template.jinja"] = template
            files["additional_chat_templates/tool_use.jinja"] = tools
    files["tokenizer_config.json"] = config
    return files


TURNS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}",
    "{% for m in messages %}\n  {%- if m.role == 'system' %}{{ m.content | trim }}\n"
    "  {% continue %}\n  {% endif %}[INST] {{ m.content | trim }}{{ eos_token }}\n{% endfor %}\n",
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m.content }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{{ part['text'] }}{% endfor %}{% endif %}</s>{% endfor %}",
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate, not ' + m.role) }}{% endif %}{{ m.content }}"
    "{% endfor %}",
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% set ns.last = loop.index %}"
    "{{ m.reasoning_content }}{{ m.thinking }}{{ m.content }}{% endfor %}{{ ns.last }}",
    "{% for m in messages if m.role != 'system' %}{{ m | tojson }}{{ m.content }}"
    "{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}",
    "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}"
    "{{ messages[-1].content }}{{ messages | length }}",
)
PIECES = (
    "{{ bos_token }}", "{{ unk_token }}{{ pad_token }}", "{{ image_token }}", "{{ cls_token }}",
    "{% if bos_token is defined %}+{% else %}-{% endif %}",
    "{% if tools is not none %}{{ tools | tojson(indent=1) }}{% endif %}",
    "{% for d in documents or [] %}{{ d.title }}: {{ d.text }}\n{% endfor %}",
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>{% endif %}",
    "{{ strftime_now('%Y') }}", "{{ dict(a=1, b='<&>') | tojson }}", "<s>", "  \n", "é!",
    "{{ messages | selectattr('role', 'equalto', 'tool') | list | length }}",
    "{%- if add_generation_prompt -%} <|im_start|>assistant\n {%- endif -%}",
    "{% for m in messages if m.tool_calls %}{{ m.tool_calls | tojson }}{% endfor %}",
    "{% set ns = namespace(_a=1) %}", "{{ undefined.attribute }}", "{{ {}.__class__ }}",
    "{{ additional_special_tokens }}", "{{ namespace.__init__ }}", "{{ dict.fromkeys(['a']) }}",
)  # fmt: skip


@st.composite
def templates(draw) -> str:
    """Some of PIECES and TURNS. What raises is seldom among them, but for what checks roles."""
    common = PIECES[:16]
    pieces = st.lists(st.sampled_from(common), max_size=3)
    middle = draw(st.lists(st.sampled_from(TURNS), min_size=1, max_size=2))
    rare = [draw(st.sampled_from(PIECES[16:]))] if draw(st.integers(0, 9)) == 5 else []
    return "".join([*draw(pieces), *middle, *rare, *draw(pieces)])


WORDS = st.sampled_from(
    [
        *OWN,
        *NEW,
        " ",
        "  ",
        "\n",
        "the",
        " the",
        "hello",
        "12",
        "é",
        "e\u0301",
        "日本",
        "🎉",
        "!",
        "'s",
    ]
) | st.text("ab l1\n<|>", max_size=6)
TEXTS = st.lists(WORDS, max_size=8).map("".join)
PARTS = st.lists(TEXTS.map(lambda text: {"type": "text", "text": text}), min_size=1, max_size=2)
# Most templates know contents of text alone.
CONTENTS = st.sampled_from([TEXTS] * 9 + [PARTS]).flatmap(lambda contents: contents)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(("user", "assistant", "system", "tool")), "content": CONTENTS},
        optional={
            "reasoning_content": TEXTS, "reasoning": TEXTS, "name": st.none() | TEXTS,
            "tool_calls": st.none() | st.just([{"function": {"name": "f", "arguments": {"a": 1}}}]),
        },
    ),
    min_size=1, max_size=4,
)  # fmt: skip
CONVERSATIONS = st.builds(
    Conversation,
    messages=MESSAGES,
    tools=st.none() | st.just([{"type": "function", "function": {"name": "f", "x": "<é>"}}]),
    documents=st.none() | st.just([{"title": "t", "text": "12"}]),
    continue_final_message=st.sampled_from((False, False, False, True)),
    chat_template_kwargs=st.sampled_from(({}, {"enable_thinking": False}, {"bos_token": "[INST]"})),
)

# The comparison


def write_directory(directory: Path, files: dict[str, Any]) -> None:
    directory.mkdir()
    for name, value in files.items():
        path = directory / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(value, Tokenizer):
            value.save(str(path))
        elif isinstance(value, bytes):
            path.write_bytes(value)
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            path.write_text(text, encoding="utf-8")


def expected_refusal(files: dict[str, Any], reference: Any, message: str) -> bool:
    """Whether there is a reason to refuse the directory that transformers took."""
    if "the decoder step WordPiece is not supported" in message:
        return True
    if "is said to have the id" in message:
        # It took another id than the file says.
        said = files.get("added_tokens.json", {})
        decoder = files["tokenizer_config.json"].get("added_tokens_decoder", {})
        said = said | {token["content"]: int(key) for key, token in decoder.items()}
        found = {text: reference.convert_tokens_to_ids(text) for text in said}
        return found != said
    # What a tokenizer.model has no way to say.
    return "tokenizer.model cannot say" in message


def compare(directory: Path, files: dict[str, Any], data: st.DataObject) -> str:
    """Export, load, and compare; what came of it. Errors: AssertionError."""
    source, target = directory / "source", directory / "target"
    write_directory(source, files)
    target.mkdir()
    try:
        reference = transformers.AutoTokenizer.from_pretrained(str(source))
    except ValueError as error:
        # It looks for a token with a space in it by the parts, where it makes a post-processor.
        assert "Missing SpecialToken(s)" in str(error)
        return "transformers refuses"
    try:
        entry = write_tokenizer(
            Checkpoint(source, "safetensors", files["config.json"], (), {}), target
        )
        ours = RunnerTokenizer(target, entry)
    except (ExportError, RunnerError) as error:
        assert "\n" not in str(error)
        assert expected_refusal(files, reference, str(error)), error
        return "refused"
    for text in data.draw(st.lists(TEXTS, min_size=2, max_size=4), label="texts"):
        alone = reference.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_special_tokens=False) == alone, (text, alone)
        whole = reference.encode(text)
        prefix, suffix = entry["prefix_ids"], entry["suffix_ids"]
        assert whole == prefix + alone + suffix
        twice = bool(prefix) and alone[: len(prefix)] == prefix
        assert ours.encode(text) == (alone + suffix if twice else whole), text
        compare_decoding(reference, ours, entry, alone)
    ids = data.draw(st.lists(st.integers(0, len(reference) - 1), max_size=12), label="ids")
    compare_decoding(reference, ours, entry, ids)
    rendered = sum(compare_conversation(reference, ours, data.draw(CONVERSATIONS)) for _ in "12")
    return f"read, {rendered} of 2 conversations rendered"


def compare_decoding(reference: Any, ours: RunnerTokenizer, entry: dict, ids: list[int]) -> None:
    # The runner never shows these, special or not.
    hidden = {entry["bos_token_id"], *entry["eos_token_ids"]}
    # And special tokens never. `tokenizers` shows one whose text the normalizer changes.
    added = reference.added_tokens_decoder.items()
    hidden |= {i for i, token in added if token.special and token.normalized and " " in str(token)}
    ids = [token_id for token_id in ids if token_id not in hidden]
    text = reference.decode(ids, skip_special_tokens=True)
    if entry["file"] == "tokenizer.model":
        # SentencePiece has its own text for an unknown character.
        ids = [token_id for token_id in ids if token_id != 0]
        text = reference.decode(ids, skip_special_tokens=True)
    found = ours.decode(ids)
    # Among byte tokens a bad byte makes `tokenizers` spoil the valid characters around it.
    assert found == text or "\ufffd" in text + found, (ids, found, text)


def compare_conversation(reference: Any, ours: RunnerTokenizer, asked: Conversation) -> bool:
    """Whether there is a text; where there is none, both refuse."""
    template_arguments = {
        "tools": asked.tools, "documents": asked.documents, **asked.chat_template_kwargs,
        "continue_final_message": asked.continue_final_message,
        "add_generation_prompt": not asked.continue_final_message,
    }  # fmt: skip
    try:
        text = reference.apply_chat_template(asked.messages, tokenize=False, **template_arguments)
        ids = reference.apply_chat_template(asked.messages, **template_arguments)["input_ids"]
    except Exception:  # jinja2's, and a TypeError of whatever a template adds to whatever
        text = ids = None
    try:
        found = ours.apply_chat_template(asked)
    except RunnerError as error:
        assert "\n" not in str(error)
        # transformers takes templates that do not know contents in parts, and write Python's form
        # of a list.
        expected = ("content in parts", "the last message has no text")
        assert text is None or any(reason in str(error) for reason in expected), (error, text)
        return False
    tag = "CONTINUE_FINAL_MESSAGE_TAG"
    if tag in text:
        # Where a template writes the last message twice, transformers leaves its tag in the first.
        assert found == text.replace(f"{tag} ", "").replace(tag, ""), (found, text)
        return True
    assert found == text, (found, text)
    assert ours.encode_conversation(asked) == ids
    return True


def differential(count: int, random_seed: int, root: Path) -> Counter:
    """Draw and compare `count` directories, in directories under `root`. Errors: AssertionError,
    with the smallest example that was found."""
    outcomes: Counter = Counter()

    @seed(random_seed)
    @settings(
        max_examples=count, deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(files=directories(), data=st.data())
    def run(files, data):
        with tempfile.TemporaryDirectory(dir=root) as directory:
            outcomes[compare(Path(directory), files, data)] += 1

    transformers.logging.set_verbosity_error()
    run()
    return outcomes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="a file for the JSON line")
    options = parser.parse_args()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        outcomes = differential(options.count, options.seed, Path(directory))
    summary = {
        "count": sum(outcomes.values()), "seed": options.seed,
        "seconds": round(time.perf_counter() - begin), "outcomes": dict(sorted(outcomes.items())),
        "transformers": transformers.__version__, "tokenizers": tokenizers.__version__,
        "sentencepiece": sentencepiece.__version__,
    }  # fmt: skip
    print(json.dumps(summary))
    if options.save is not None:
        options.save.write_text(json.dumps(summary) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
