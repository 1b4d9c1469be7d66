"""Text to token ids and back, for whichever tokenizer file the artifact carries.

Ids become text through bytes: each id has its bytes, and one incremental UTF-8 decoder turns the
bytes of all ids into text. `decode` and the stream are that same decoder, so they cannot disagree.

Knows nothing about models, logits or tensors. sentencepiece and tokenizers are imported only when
an artifact needs them: together they would cost more than loading the vocabulary.
"""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from tokenloop.runner.chat_template import CHARACTERS, ChatTemplate
from tokenloop.runner.conversation import Conversation, as_conversation
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.files import read_file

ENTRY_KEYS = (
    "file", "bos_token_id", "eos_token_ids", "prefix_ids", "suffix_ids", "shown_ids",
    "rstrip_ids", "special_tokens", "chat_template", "tool_template",
)  # fmt: skip
# Unicode's, which is that of `tokenizers`.
WHITE_SPACE = re.compile(r"[^\S\x1c-\x1f]*")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """The tokenizer of one artifact.

    Args:
        directory: the artifact's directory.
        entry: the "tokenizer" object of its manifest, with the keys `ENTRY_KEYS`. `file` is
            "tokenizer.model" (SentencePiece) or "tokenizer.json" (Hugging Face tokenizers),
            `chat_template` and `tool_template` the names of jinja2 files or None; the latter is
            for conversations with tools.
        read: gives the contents of the artifact's file of a name, checked; by default as it is.
        characters: how many the text of a conversation may have.

    Raises:
        RunnerError: a key or a file is missing, or the tokenizer file is broken or of a kind
            whose ids have no bytes of their own (see `_TokenizerJson`).
    """

    def __init__(
        self, directory: Path, entry: dict, read: Callable[[str], bytes] | None = None,
        characters: int = CHARACTERS,
    ):  # fmt: skip
        missing = [key for key in ENTRY_KEYS if key not in entry]
        if missing:
            raise RunnerError(
                f"the manifest's tokenizer entry has no {', '.join(missing)}: "
                f"it needs {', '.join(ENTRY_KEYS)}"
            )
        path = Path(directory) / entry["file"]
        if read is None:
            read = partial(read_file, Path(directory))
        if path.suffix == ".model":
            shown, rstrip = frozenset(entry["shown_ids"]), frozenset(entry["rstrip_ids"])
            self._vocabulary = _SentencePiece(path, read(entry["file"]), shown, rstrip)
        elif path.suffix == ".json":
            self._vocabulary = _TokenizerJson(path, read(entry["file"]))
        else:
            raise RunnerError(
                f"the manifest's tokenizer file is {entry['file']!r}: "
                "it must be tokenizer.model or tokenizer.json"
            )
        self.bos_token_id: int | None = entry["bos_token_id"]
        self.eos_token_ids: list[int] = list(entry["eos_token_ids"])
        self._prefix: list[int] = list(entry["prefix_ids"])
        self._suffix: list[int] = list(entry["suffix_ids"])
        self._special_tokens: dict[str, str] = dict(entry["special_tokens"])
        # An end token need not be a control token of the vocabulary, but it is never shown.
        self._hidden = frozenset(self.eos_token_ids + [self.bos_token_id])
        self._templates = {
            key: ChatTemplate(Path(directory) / entry[key], read(entry[key]), characters)
            for key in ("chat_template", "tool_template")
            if entry[key] is not None
        }

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Return the ids of `text`, with the ids in front and behind that the tokenizer's
        post-processor puts there; those in front not twice.

        Without `add_special_tokens` it is the ids of the text alone, as for a conversation, whose
        template has written all. Control tokens written out in the text (`<start_of_turn>`) become
        their ids in either case. An empty text gives [bos], say, or [] where nothing is added.

        Raises:
            RunnerError: the text holds a lone surrogate, which UTF-8 cannot express.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RunnerError(
                f"the text has the lone surrogate U+{ord(text[error.start]):04X} at character "
                f"{error.start}: it must be valid Unicode (UTF-8 input)"
            ) from None
        ids = self._vocabulary.encode(text)
        if not add_special_tokens:
            return ids
        prefix = [] if ids[: len(self._prefix)] == self._prefix else self._prefix
        return prefix + ids + self._suffix

    def encode_conversation(self, conversation: Conversation | list[dict]) -> list[int]:
        """The ids of a conversation, or of its messages alone. Raises: as `apply_chat_template`
        and `encode`."""
        return self.encode(self.apply_chat_template(conversation), add_special_tokens=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`.

        Control tokens (bos, eos, pad and the like) and ids outside the vocabulary (the rows that
        pad an output head) give no text. Bytes that are not UTF-8 give U+FFFD.
        """
        stream = self.stream()
        return "".join([stream.push(token_id) for token_id in ids]) + stream.finish()

    def token_bytes(self, token_id: int) -> bytes | None:
        """Return the bytes that the id has in the middle of a text, or None for one that gives no
        text there, such as a control token."""
        if token_id in self._hidden:
            return None
        return self._vocabulary.token_bytes(token_id, False)[0] or None

    def token_name(self, token_id: int) -> str:
        """Return what the vocabulary calls the id; nothing for one outside of it."""
        return self._vocabulary.token_name(token_id)

    def stream(self, shown_tokens: Sequence[str] = ()) -> "StreamDecoder":
        """Return a decoder for one text whose ids arrive one at a time. In it the control tokens
        `shown_tokens` are text, if they are tokens and none that ends an output."""
        shown = {}
        for token in shown_tokens:
            ids = self._vocabulary.encode(token)
            if len(ids) == 1 and self._vocabulary.token_name(ids[0]) == token:
                shown[ids[0]] = token.encode()
        return StreamDecoder(self._vocabulary, self._hidden, shown)

    def template_source(self, with_tools: bool = False) -> str | None:
        """Return the chat template, or the one for conversations with tools; None without one."""
        template = self._template(with_tools)
        return None if template is None else template.source

    def _template(self, with_tools: bool) -> ChatTemplate | None:
        has_own = with_tools and "tool_template" in self._templates
        return self._templates.get("tool_template" if has_own else "chat_template")

    def apply_chat_template(
        self, conversation: Conversation | list[dict], add_generation_prompt: bool | None = None
    ) -> str:
        """Return a conversation, or one of messages alone, as one prompt text: with a begun turn of
        the assistant, unless the last message is continued or `add_generation_prompt` says not so.

        Raises:
            RunnerError: there is no template, the conversation is not what it must be, or the
                template is broken, refuses it, leaves something of it out, or takes more time or
                memory than it may (see chat_template.py).
        """
        found = as_conversation(conversation) or Conversation(conversation)
        found.check()
        template = self._template(found.tools is not None)
        if template is None:
            raise RunnerError(
                "this artifact has no chat template (a base model?): give it plain prompts, "
                "without messages or --chat"
            )
        context = self._special_tokens | found.context(add_generation_prompt)
        return found.finish(template.render(context))

    def check_templates(self) -> None:
        """Raises: RunnerError for a chat template that is none."""
        for template in self._templates.values():
            template.check()


class StreamDecoder:
    """Turns ids into text one at a time, and never gives out half a character.

    The pushes and `finish` joined are `Tokenizer.decode` of all the ids, whatever the ids. At
    most 3 bytes wait between two calls, so the cost of a token does not grow with the text.
    """

    def __init__(
        self, vocabulary: "_SentencePiece | _TokenizerJson", hidden: frozenset[int],
        shown: dict[int, bytes],
    ):  # fmt: skip
        """`hidden` ids give no text, and those of `shown` these bytes, whatever the vocabulary
        says."""
        self._vocabulary = vocabulary
        self._hidden, self._shown = hidden, shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")(vocabulary.utf8_errors)
        self._at_start = True

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` makes certain: possibly none, never to be revoked."""
        if token_id in self._hidden:
            return ""
        if token_id in self._shown:
            data, self._at_start = self._shown[token_id], False
        else:
            data, self._at_start = self._vocabulary.token_bytes(token_id, self._at_start)
        return self._utf8.decode(data)

    def finish(self) -> str:
        """Return the rest: U+FFFD for a character whose last bytes never came, else nothing."""
        return self._utf8.decode(b"", final=True)


class _SentencePiece:
    """A tokenizer.model. Its byte pieces decode as sentencepiece does: one U+FFFD per bad byte."""

    utf8_errors = "tokenloop.replace_each_byte"

    def __init__(self, path: Path, data: bytes, shown: frozenset[int], rstrip: frozenset[int]):
        """`path` is where `data` comes from, for messages. `shown` are control pieces that are
        text: added tokens, after which a text begins anew as after other control pieces. Those of
        `rstrip` take the white space after them."""
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor()
        try:
            self._processor.load_from_serialized_proto(data)
        except RuntimeError:
            raise RunnerError(
                f"{path}: not a SentencePiece model ({len(data)} bytes): export the artifact again"
            ) from None
        self._size = self._processor.get_piece_size()
        is_control = self._processor.is_control(list(range(self._size)))
        # The unknown token, written out, is itself too, in transformers and llama.cpp.
        read = {i for i in range(self._size) if is_control[i]} | {self._processor.unk_id()}
        self._control_tokens = {self._processor.id_to_piece(i): i for i in sorted(read)}
        self._control_lengths = sorted({len(token) for token in self._control_tokens}, reverse=True)
        starts = {re.escape(token[0]) for token in self._control_tokens}
        self._shown = {i: self._processor.id_to_piece(i).encode() for i in shown if i < self._size}
        self._rstrip = rstrip
        self._control_start = re.compile(f"[{''.join(starts)}]" if starts else r"(?!)")
        space = self._processor.piece_to_id("▁")
        # remove_extra_whitespaces strips every leading space piece, add_dummy_prefix only one.
        self._strips_all = (
            not self._processor.is_unknown(space) and self._processor.decode([space, space]) == ""
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; sentencepiece itself reads no control pieces from text, and not
        the unknown one.

        Each stretch between control tokens is encoded as a text of its own, dummy prefix
        included, as Llama's and llama.cpp's chat encoders do.
        """
        ids, done = [], 0
        for match in self._control_start.finditer(text):
            start = match.start()
            if start < done:
                continue
            for length in self._control_lengths:
                control_id = self._control_tokens.get(text[start : start + length])
                if control_id is not None:
                    ids += self._processor.encode(text[done:start])
                    ids.append(control_id)
                    done = start + length
                    if control_id in self._rstrip:
                        done = WHITE_SPACE.match(text, done).end()
                    break
        return ids + self._processor.encode(text[done:])

    def token_name(self, token_id: int) -> str:
        return self._processor.id_to_piece(token_id) if 0 <= token_id < self._size else ""

    def token_bytes(self, token_id: int, at_start: bool) -> tuple[bytes, bool]:
        """Return the bytes of `token_id`, and whether the text still has not begun after it."""
        processor = self._processor
        if token_id in self._shown:
            return self._shown[token_id], False
        if not 0 <= token_id < self._size or processor.is_control(token_id):
            return b"", at_start
        piece = processor.id_to_piece(token_id)
        if processor.is_byte(token_id):
            return bytes([int(piece[3:5], 16)]), False
        # Alone, a piece decodes as at the start of a text: without the dummy prefix.
        if at_start or processor.is_unknown(token_id):
            surface = processor.decode([token_id])
        else:
            surface = piece.replace("▁", " ")
        return surface.encode(), at_start and not surface and self._strips_all


class _TokenizerJson:
    """A tokenizer.json whose ids have bytes of their own, which all this project's models have.

    That is a decoder of ByteLevel (Qwen), or of Replace, ByteFallback, Fuse and Strip (Gemma,
    Llama). In the latter a bad byte among byte tokens makes `tokenizers` spoil the valid characters
    around it, so that no prefix of a run would be certain. Here only the bad bytes give U+FFFD, as
    in sentencepiece.
    """

    def __init__(self, path: Path, data: bytes):
        """`path` is where `data` comes from, for messages."""
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(data)
        # tokenizers raises bare Exception for every fault of the file.
        except Exception as error:
            reason = " ".join(str(error).split())
            raise RunnerError(
                f"{path}: not a tokenizer.json ({reason}): export the artifact again"
            ) from None
        # Some published files carry their training's settings, which would cut prompts short.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        added = self._tokenizer.get_added_tokens_decoder()
        self._special = frozenset(i for i, token in added.items() if token.special)
        self._byte_level = self._byte_fallback = self._strips_one = False
        self._replacements = []
        self._read_decoder(path)
        self.utf8_errors = "replace" if self._byte_level else _SentencePiece.utf8_errors

    def _read_decoder(self, path: Path) -> None:
        decoder = self._tokenizer.decoder
        state = json.loads(decoder.__getstate__()) if decoder is not None else {"type": "none"}
        steps = state["decoders"] if state["type"] == "Sequence" else [state]
        for step in steps:
            match step:
                case {"type": "ByteLevel"} if len(steps) == 1:
                    self._byte_level = True
                case {"type": "Replace", "pattern": {"String": old}, "content": new}:
                    self._replacements.append((old, new))
                case {"type": "ByteFallback"}:
                    self._byte_fallback = True
                case {"type": "Fuse"}:
                    continue
                case {"type": "Strip", "content": " ", "start": start, "stop": 0} if start <= 1:
                    self._strips_one = start == 1
                case _:
                    raise RunnerError(
                        f"{path}: the decoder step {step['type']} is not supported: it must be "
                        "ByteLevel, or Replace, ByteFallback, Fuse and Strip"
                    )

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`; `tokenizers` reads added tokens from text by itself."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def token_name(self, token_id: int) -> str:
        return self._tokenizer.id_to_token(token_id) or "" if 0 <= token_id < 2**32 else ""

    def token_bytes(self, token_id: int, at_start: bool) -> tuple[bytes, bool]:
        """Return the bytes of `token_id`, and whether the text still has not begun after it."""
        token = None
        if 0 <= token_id < 2**32 and token_id not in self._special:
            token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return b"", at_start
        if self._byte_level:
            try:
                return bytes([BYTE_OF_CHARACTER[character] for character in token]), False
            except KeyError:  # An added token, which is text and not in the byte alphabet.
                return token.encode(), False
        for old, new in self._replacements:
            token = token.replace(old, new)
        byte = BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        data = bytes.fromhex(byte[1]) if byte else token.encode()
        if self._strips_one and at_start:
            return data.removeprefix(b" "), not data
        return data, at_start and not data


def _byte_alphabet() -> dict[str, int]:
    """Return the byte of each printable character that byte-level BPE writes for one (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)
    }


def _replace_each_byte(error: UnicodeDecodeError) -> tuple[str, int]:
    return "\ufffd" * (error.end - error.start), error.end


BYTE_OF_CHARACTER = _byte_alphabet()
codecs.register_error(_SentencePiece.utf8_errors, _replace_each_byte)
