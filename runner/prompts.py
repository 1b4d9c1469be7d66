"""The command line's prompts and requests: from its arguments, standard input and files.

Text that is read is UTF-8. A byte order mark at its beginning is dropped, "\\r\\n" and "\\r" are
line ends as "\\n" is, and the last line's end is not part of the text. Arguments are as they are.

Imports no NumPy, so that run.py can answer a wrong file at once.
"""

import sys
from argparse import Namespace
from dataclasses import fields, replace
from pathlib import Path
from typing import BinaryIO

from tokenloop.runner.conversation import Conversation, as_conversation
from tokenloop.runner.errors import RunnerError
from tokenloop.runner.json_text import parse_json
from tokenloop.runner.request import Prompt, Request, is_id

DEFAULT_PROMPT = "The capital of France is"
# Of a file or standard input. Some never end, such as /dev/zero.
MOST_BYTES, PIECE = 1 << 28, 1 << 20
KEYS = (
    "prompt", "max_new_tokens", "temperature", "top_k", "top_p", "seed", "stop", "logit_bias",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "json_schema",
)  # fmt: skip


def read_requests(options: Namespace) -> list[Request]:
    """The requests, in the order of the command line, the files' last. With --batch --prompt-file
    has one on each line. Errors: RunnerError for what cannot be read."""
    flags = flags_of(options)
    requests = [replace(flags, prompt=text) for text in read_arguments(options.prompts)]
    path = options.prompt_file
    if path is not None:
        text = read_file(path)
        if options.batch is None:
            requests.append(replace(flags, prompt=text))
        elif path.suffix == ".jsonl":
            requests += [
                replace(flags, **entry(f"--prompt-file {path}: line {n}", line))
                for n, line in lines(text)
            ]
        else:
            requests += [replace(flags, prompt=line) for _, line in lines(text)]
    if options.messages is not None:
        requests.append(replace(flags, prompt=read_conversation(options.messages)))
    if path is None and not requests:
        requests = [replace(flags, prompt=DEFAULT_PROMPT)]
    if options.system is None:
        return requests
    return [replace(r, prompt=with_system(r.prompt, options.system)) for r in requests]


def read_conversation(path: Path) -> Conversation:
    """The file of --messages: a list of messages, or an object with them and what else a
    Conversation has."""
    where = f"--messages {path}"
    text = read_file(path, "--messages")
    try:
        found = parse_json(text)
    except ValueError as error:
        raise RunnerError(f"{where} is not JSON: {error}") from None
    if isinstance(found, list):
        found = {"messages": found}
    if not isinstance(found, dict) or "messages" not in found:
        raise RunnerError(f"{where} holds no messages; a list of them, or an object, is right")
    names = [own.name for own in fields(Conversation)]
    for key in found:
        if key not in names:
            raise RunnerError(f"{where} has the key {key!r}; the keys are {', '.join(names)}")
    conversation = Conversation(**found)
    try:
        conversation.check()
    except RunnerError as error:
        raise RunnerError(f"{where}: {error}") from None
    return conversation


def with_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt with a system's message in front. Errors: RunnerError where it has one, or is
    token ids."""
    message = {"role": "system", "content": system}
    if isinstance(prompt, str):
        return [message, {"role": "user", "content": prompt}]
    conversation = as_conversation(prompt)
    if conversation is None:
        raise RunnerError("--system is given, and a prompt is token ids: give that one as text")
    conversation.check()
    if conversation.messages[0]["role"] == "system":
        raise RunnerError("--system is given, and a conversation has a system's message: leave one")
    return replace(conversation, messages=[message, *conversation.messages])


def flags_of(options: Namespace) -> Request:
    """What the flags ask for, whatever the prompt is. Errors: RunnerError for a file of
    --json-schema that holds none."""
    chat = options.chat or options.system is not None
    found = {key: getattr(options, key) for key in KEYS[1:]}
    if options.json_object:
        found["json_schema"] = {"type": "object"}
    elif options.json_schema is not None:
        found["json_schema"] = read_schema(options.json_schema)
    return Request("", chat=chat, **found)


def read_schema(path: Path) -> dict | bool:
    """The file of --json-schema."""
    where, text = f"--json-schema {path}", read_file(path, "--json-schema")
    try:
        found = parse_json(text)
    except ValueError as error:
        raise RunnerError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, (dict, bool)):
        raise RunnerError(f"{where} holds no JSON schema; an object is right")
    return found


def read_arguments(prompts: list[str]) -> list[str]:
    return [read_stdin() if prompt == "-" else prompt for prompt in prompts]


def read_stdin() -> str:
    if sys.stdin is None:
        raise RunnerError("standard input is closed, and the prompt - reads it")
    try:
        return text_of(read_all(sys.stdin.buffer, "standard input"), "standard input")
    except OSError as error:
        raise RunnerError(f"standard input cannot be read: {error.strerror}") from None


def read_file(path: Path, flag: str = "--prompt-file") -> str:
    try:
        with path.open("rb") as file:
            return text_of(read_all(file, f"{flag} {path}"), str(path))
    except OSError as error:
        raise RunnerError(f"{flag} {path}: {error.strerror}") from None


def read_all(file: BinaryIO, source: str) -> bytes:
    """What is left of the file. Errors: RunnerError for more than MOST_BYTES."""
    data = bytearray()
    while piece := file.read(PIECE):
        data += piece
        if len(data) > MOST_BYTES:
            raise RunnerError(f"{source} has more than {MOST_BYTES >> 20} MiB: divide it")
    return bytes(data)


def text_of(data: bytes, source: str) -> str:
    """The text of a file, as the module says."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RunnerError(f"{source} is not UTF-8 text: byte {error.start} is wrong") from None
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    return text.removesuffix("\n")


def lines(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank, with their numbers from 1 on."""
    # Not splitlines: a prompt may well hold U+2028.
    return [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]


def entry(where: str, line: str) -> dict:
    """A line of a .jsonl file. What its values should be is the request's own concern."""
    try:
        found = parse_json(line)
    except ValueError as error:
        raise RunnerError(f"{where} is not JSON: {error}") from None
    if not isinstance(found, dict) or "prompt" not in found:
        raise RunnerError(f"{where} is {line.strip()}; it must be an object with a prompt")
    for key in found:
        if key not in KEYS:
            raise RunnerError(f"{where} has the key {key!r}; the keys are {', '.join(KEYS)}")
    if isinstance(bias := found.get("logit_bias"), dict):
        # Keys of JSON are texts. What else they are, the request refuses.
        found["logit_bias"] = {int(i) if is_id(i) else i: b for i, b in bias.items()}
    return found
