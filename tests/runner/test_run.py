"""The command line: what is printed where, and that no ending is a traceback."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.driving import altered, read_manifest
from tokenloop import runner
from tokenloop.runner import Request
from tokenloop.runner.compare import compare
from tokenloop.runner.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
ALICE = ROOT / "benchmarks/data/alice.txt"
KEYS = ["prompt", "prompt_ids", "token_ids", "text", "finish_reason", "stats"]
UNICODE = '日本語 🎉 naïve 👩‍👩‍👧 \u2028 \x1b \\ "'
# A prompt after which the tiny model comes to its end token, in this many tokens.
ENDING, ENDING_LENGTH = "abc", 95


@pytest.fixture
def run(run_script, tiny_artifact, tmp_path):
    """A function that runs the tiny artifact from another directory than the project's."""

    def run(*arguments, **options):
        arguments = ("--artifact", os.path.relpath(tiny_artifact, tmp_path), *arguments)
        return run_script("runner/run.py", *arguments, cwd=tmp_path, **options)

    return run


@pytest.fixture
def start(tmp_path):
    """A function that starts runner/run.py without waiting for its end."""
    processes = []

    def start(*arguments) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, ROOT / "runner/run.py", *map(str, arguments)],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Where the tests run in the background, the shell may have had it ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def lines(done) -> list[dict]:
    """The JSON lines of a run that ended well."""
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n")
    return [json.loads(line) for line in done.stdout.removesuffix("\n").split("\n")]


def read(process, count: int) -> str:
    """The first `count` bytes of standard output, as soon as they are there."""
    data = b""
    while len(data) < count:
        byte = os.read(process.stdout.fileno(), 1)
        assert byte, "the output ended"
        data += byte
    return data.decode()


def assert_error(done, *words):
    """One line on standard error, and nothing else."""
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("runner/run.py: error: ")
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


# Text


def test_text_of_every_prompt_goes_to_standard_output_and_nothing_else_does(run):
    prompts = ["one", "two", UNICODE]
    objects = lines(run("--json", "--max-new-tokens", 30, *prompts))
    done = run("--max-new-tokens", 30, *prompts)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "".join(entry["text"] + "\n" for entry in objects)
    assert len({entry["text"] for entry in objects}) == 3


def test_text_comes_while_the_rest_is_still_generated(start, default_artifact):
    process = start("--artifact", default_artifact, "--max-new-tokens", 1000, "Once upon a time")
    assert read(process, 13) == ", there was a"
    assert process.poll() is None


def test_the_default_prompt_is_used_when_there_is_none(run):
    (entry,) = lines(run("--json", "--max-new-tokens", 1))
    assert entry["prompt"] == "The capital of France is"


def test_an_empty_prompt_is_the_bos_token_alone(run):
    (entry,) = lines(run("--json", "--max-new-tokens", 5, ""))
    assert (entry["prompt"], entry["prompt_ids"]) == ("", [2])
    assert len(entry["token_ids"]) == 5


def test_an_end_token_stops_the_text_and_is_not_shown(run):
    (entry,) = lines(run("--json", ENDING))
    assert entry["finish_reason"] == "stop"
    assert len(entry["token_ids"]) == ENDING_LENGTH and 1 not in entry["token_ids"]


def test_the_end_tokens_are_those_of_the_manifest(run, run_script, tiny_artifact, tmp_path):
    (entry,) = lines(run("--json", "--max-new-tokens", 20, UNICODE))
    ids = entry["token_ids"]
    end = next(i for i in range(5, 20) if ids[i] not in ids[:i])
    tokenizer = read_manifest(tiny_artifact)["tokenizer"]
    tokenizer["eos_token_ids"].append(ids[end])
    altered(tiny_artifact, tmp_path / "copy", tokenizer=tokenizer)
    done = run_script("runner/run.py", "--artifact", "copy", "--json", UNICODE, cwd=tmp_path)
    (entry,) = lines(done)
    assert (entry["finish_reason"], entry["token_ids"]) == ("stop", ids[:end])


def test_chinese_and_emoji_of_the_real_model_arrive_whole(run_script, default_artifact, tmp_path):
    arguments = ("--artifact", default_artifact, "--max-new-tokens", 40, "日本の首都は", "🎉🎊" * 4)
    done = run_script("runner/run.py", *arguments, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "年" in done.stdout and "\ufffd" not in done.stdout


def test_output_is_utf8_in_every_locale(run):
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = run("--json", "--max-new-tokens", 3, UNICODE, env=environment)
    assert lines(done)[0]["prompt"] == UNICODE


# Prompts from elsewhere


def test_a_dash_reads_a_prompt_from_standard_input(run):
    done = run(
        "--json", "--max-new-tokens", 1, "first", "-", "last", input=f"{UNICODE}\n\n".encode()
    )
    # Only the final newline is the file's and not the prompt's.
    assert [entry["prompt"] for entry in lines(done)] == ["first", f"{UNICODE}\n", "last"]


def test_a_prompt_file_is_the_last_prompt(run, tmp_path):
    (tmp_path / "prompt.txt").write_text(UNICODE + "\n", encoding="utf-8")
    done = run("--json", "--max-new-tokens", 1, "--prompt-file", "prompt.txt", "first")
    assert [entry["prompt"] for entry in lines(done)] == ["first", UNICODE]


def test_a_file_of_3000_characters_is_a_prompt_for_the_real_model(
    run_script, default_artifact, tmp_path
):
    text = ALICE.read_text(encoding="utf-8")[:3000]
    (tmp_path / "prompt.txt").write_text(text, encoding="utf-8")
    arguments = ("--prompt-file", "prompt.txt", "--max-new-tokens", 8, "--json")
    done = run_script("runner/run.py", "--artifact", default_artifact, *arguments, cwd=tmp_path)
    (entry,) = lines(done)
    assert entry["prompt"] == text.removesuffix("\n")
    assert len(entry["prompt_ids"]) > 600 and len(entry["token_ids"]) == 8


def test_a_prompt_longer_than_the_cache_names_both_numbers(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("x" * 3000)
    done = run("--prompt-file", "prompt.txt")
    assert_error(done, "the prompt has 3001 tokens and the cache 200 positions", "--max-seq-len")


@pytest.mark.parametrize("length, count", [(198, 1), (199, None)])
def test_the_longest_prompt_leaves_one_position_for_the_output(run, length, count):
    done = run("--json", "x" * length)
    if count is None:
        assert_error(done, "the prompt has 200 tokens and the cache 200 positions")
    else:
        (entry,) = lines(done)
        assert (len(entry["token_ids"]), entry["finish_reason"]) == (count, "length")


def test_a_prompt_file_that_cannot_be_read(run):
    assert_error(run("--prompt-file", "nowhere.txt"), "--prompt-file nowhere.txt", "No such file")
    assert_error(run("--prompt-file", "."), "--prompt-file .", "directory")


def test_input_that_is_not_utf8(run, tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"abc\xff")
    assert_error(run("--prompt-file", "prompt.txt"), "prompt.txt is not UTF-8 text: byte 3")
    assert_error(run("-", input=b"\xe6\x97"), "standard input is not UTF-8 text: byte 0")
    assert_error(run(b"abc\xff".decode("utf-8", "surrogateescape")), "character 3", "UTF-8")


TEXTS = [b"a b\n", b"a b\r\n", b"a b\r", b"a b", b"\xef\xbb\xbfa b\r\n"]


@pytest.mark.parametrize("data", TEXTS, ids=repr)
def test_line_ends_and_a_byte_order_mark_are_not_the_prompts(run_batch, run, tmp_path, data):
    (tmp_path / "prompt.txt").write_bytes(data)
    flags = ("--json", "--max-new-tokens", 1)
    found = lines(run(*flags, "--prompt-file", "prompt.txt", "-", input=data))
    found += lines(run_batch(data, *flags, "--batch", 2))
    quoted = data.replace(b"a b", b'{"prompt": "a b"}')
    found += lines(run_batch(quoted, *flags, "--batch", 2, name="prompts.jsonl"))
    assert [entry["prompt"] for entry in found] == ["a b"] * 4


def test_within_a_text_every_line_end_is_the_same(run, run_batch, tmp_path):
    data = b"\xef\xbb\xbfone\r\ntwo\rthree\n\n\xef\xbb\xbffour\r\n\r\n"
    (tmp_path / "prompt.txt").write_bytes(data)
    flags = ("--json", "--max-new-tokens", 1)
    found = lines(run(*flags, "--prompt-file", "prompt.txt", "-", input=data))
    # Of the end one, and of the marks the first, is the file's.
    assert [entry["prompt"] for entry in found] == ["one\ntwo\nthree\n\n\ufefffour\n"] * 2
    found = lines(run_batch(data, *flags, "--batch", 2))
    assert [entry["prompt"] for entry in found] == ["one", "two", "three", "\ufefffour"]
    # Arguments, and what JSON itself writes so, are as they are.
    escaped = b'{"prompt": "one\\r\\n"}\r\n'
    (entry,) = lines(run_batch(escaped, *flags, "--batch", 2, name="prompts.jsonl"))
    assert entry["prompt"] == lines(run(*flags, "one\r\n"))[0]["prompt"] == "one\r\n"


# JSON and statistics


def test_json_is_one_object_for_each_prompt_with_these_keys(run):
    objects = lines(run("--json", "--max-new-tokens", 20, "one", UNICODE, "two\nlines", ENDING))
    assert [entry["prompt"] for entry in objects] == ["one", UNICODE, "two\nlines", ENDING]
    for entry in objects:
        assert list(entry) == KEYS
        assert len(entry["token_ids"]) == entry["stats"]["new_tokens"] == 20
        assert len(entry["prompt_ids"]) == entry["stats"]["prompt_tokens"]
        assert entry["finish_reason"] == "length"


def test_the_text_is_that_of_the_ids_even_where_a_character_is_cut_off(run, tiny_artifact):
    manifest = json.loads((tiny_artifact / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer(tiny_artifact, manifest["tokenizer"])
    prompts = [UNICODE[:n] for n in range(1, 16)]
    for count in (1, 12):
        objects = lines(run("--json", "--max-new-tokens", count, *prompts))
        assert [entry["text"] for entry in objects] == [
            tokenizer.decode(entry["token_ids"]) for entry in objects
        ]
        for prompt, entry in zip(prompts, objects, strict=True):
            assert tokenizer.decode(entry["prompt_ids"]) == entry["prompt"] == prompt


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_statistics_go_to_standard_error_only(run, json_flag):
    def without_times(done):
        if not json_flag:
            return done.stdout
        return [{**json.loads(line), "stats": None} for line in done.stdout[:-1].split("\n")]

    arguments = (*json_flag, "--max-new-tokens", 9, "one", "another")
    plain, done = run(*arguments), run(*arguments, "--stats")
    assert (plain.stderr, done.returncode) == ("", 0)
    assert without_times(done) == without_times(plain)
    assert done.stderr.count("decode              9 tokens") == 2
    assert done.stderr.count("host to device      1 copies, 32 bytes") == 1
    assert done.stderr.count("device to host      9 copies, 72 bytes") == 2


# Endings


def test_ctrl_c_keeps_the_text_so_far(start, default_artifact):
    process = start("--artifact", default_artifact, "--max-new-tokens", 3000, "Once upon a time")
    text = read(process, 13)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"")
    assert text == ", there was a" and rest.decode().endswith("\n")


def test_ctrl_c_marks_the_json_as_interrupted(start, default_artifact):
    arguments = ("--json", "--max-new-tokens", 100, "Once upon a time", "Alice was", "never begun")
    process = start("--artifact", default_artifact, *arguments)
    # The second prompt begins when the first one's line is there, and takes seconds.
    first = process.stdout.readline()
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"")
    finished, (interrupted,) = json.loads(first), [json.loads(line) for line in rest.splitlines()]
    assert (finished["finish_reason"], len(finished["token_ids"])) == ("length", 100)
    assert list(interrupted) == KEYS
    assert (interrupted["prompt"], interrupted["finish_reason"]) == ("Alice was", "interrupted")
    assert 0 < len(interrupted["token_ids"]) < 100


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="cannot see what is loaded")
def test_ctrl_c_while_loading_ends_without_a_word(start, tiny_artifact):
    process = start("--artifact", tiny_artifact, "hello")
    # NumPy, the first of what takes its time.
    while b"_multiarray_umath" not in Path(f"/proc/{process.pid}/maps").read_bytes():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == (b"", b"")
    assert process.returncode == 130


def test_a_reader_that_goes_away_ends_the_run_without_a_word(start, default_artifact):
    process = start("--artifact", default_artifact, "--max-new-tokens", 3000, "Once upon a time")
    assert read(process, 1) == ","
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_reader_that_was_never_there_ends_the_run_without_a_word(start, tiny_artifact, flags):
    process = start("--artifact", tiny_artifact, *flags, "hello")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_line(tiny_artifact, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, ROOT / "runner/run.py", "--artifact", tiny_artifact, "hello"],
            cwd=tmp_path,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 2
    assert done.stderr == "runner/run.py: error: standard output: No space left on device\n"


RUN = f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'runner/run.py'))} "
CLOSED_STDOUT = "standard output is closed, and the text goes there: give it a place"


@pytest.mark.parametrize(
    "arguments, status, error",
    [
        ("hello <&-", 0, None),
        ("- <&-", 2, "standard input is closed, and the prompt - reads it"),
        ("- 0>/dev/null", 2, "standard input cannot be read: Bad file descriptor"),
        ("hello >&-", 2, CLOSED_STDOUT),
        ("hello --json --batch 1 >&-", 2, CLOSED_STDOUT),
        ("hello --compare >&-", 2, CLOSED_STDOUT),
        ("hello --stats <&- >&-", 2, CLOSED_STDOUT),
        ("hello 1</dev/null", 2, "standard output: Bad file descriptor"),
        ("hello --compare --max-new-tokens 2 1</dev/null", 2, "standard output: Bad file descr"),
        ("hello --stats 2>&-", 0, None),
        ("hello --stats --batch 1 2>&-", 0, None),
        ("hello --stats <&- 2>&-", 0, None),
        ("hello --stats 2>/dev/full", 0, None),
        ("hello --stats <&- >&- 2>&-", 2, None),
        ("hello >/dev/full 2>/dev/full", 2, None),
        ("hello --stats --top-k -1 2>&-", 2, None),
        ("hello --artifact nowhere 2>&-", 2, None),
    ],
)
def test_closed_streams_end_in_one_line_or_without_a_word(
    run, tiny_artifact, tmp_path, arguments, status, error
):
    command = RUN + f"--artifact {shlex.quote(str(tiny_artifact))} {arguments}"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True)
    # Text mode would turn "\r" into "\n".
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == status
    if error is None:
        assert done.stderr == ""
    else:
        assert done.stderr.startswith(f"runner/run.py: error: {error}")
        assert done.stderr.count("\n") == 1
    # Statistics are never there.
    assert done.stdout == (run("hello").stdout if status == 0 else "")


def test_a_reader_of_the_table_that_goes_away_is_no_text_that_differs(start, tiny_artifact):
    process = start("--artifact", tiny_artifact, "--compare", "--max-new-tokens", 2, "hello")
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 141


# Interrupts the process when it imports a module, or at exit, and runs a script.
INTERRUPT = """
import atexit, os, runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
_, moment, *sys.argv = sys.argv
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
sys.addaudithook(lambda event, about: event == "import" and about[0] == moment and interrupt())
if moment == "exit":
    atexit.register(interrupt)
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "moment",
    [
        # The first that the script imports, and others up to the last.
        "tokenloop.runner.process", "argparse", "tokenloop.runner.prompts",
        "tokenloop.runner.model", "numpy", "numpy._core._multiarray_umath",
        "tokenloop.runner.engines.executorch", "tokenizers", "tokenloop.runner.progress", "exit",
    ],
)  # fmt: skip
def test_ctrl_c_at_any_time_ends_without_a_word(tiny_artifact, tmp_path, moment):
    command = [sys.executable, "-c", INTERRUPT, moment, ROOT / "runner/run.py"]
    command += ["--artifact", tiny_artifact, "--max-new-tokens", "2", "--batch", "1", "hello"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    # A shell says 130 of both.
    status = -signal.SIGINT if moment == "tokenloop.runner.process" else 130
    assert (done.returncode, done.stderr) == (status, "")


# Flags


def test_chat_with_a_base_model_is_refused(run):
    assert_error(run("--chat", "hello"), "no chat template", "without messages or --chat")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--max-new-tokens", 0), "--max-new-tokens is 0; it must be at least 1"),
        (("--max-new-tokens", -3), "--max-new-tokens is -3; it must be at least 1"),
        (("--max-new-tokens", "many"), "invalid int value: 'many'"),
        (("--threads", 0), "--threads is 0; it must be at least 1"),
        (("--threads", -2), "--threads is -2; it must be at least 1"),
        (("--threads", "all"), "invalid int value: 'all'"),
        (("--batch", 0), "--batch is 0; it must be at least 1"),
        (("--temperature", -0.5), "--temperature is -0.5; it must be a finite number"),
        (("--temperature", "nan"), "--temperature is nan; it must be a finite number"),
        (("--top-k", -1), "--top-k is -1; it must be an integer, 0 (off) or more"),
        (("--top-p", 0), "--top-p is 0.0; it must be above 0 and at most 1"),
        (("--seed", 2**63), "--seed is 9223372036854775808; it must be an integer of 64 bits"),
        (("--stop", ""), "each must be a text of at least one character"),
        (("--repetition-penalty", 0), "--repetition-penalty is 0.0; it must be a finite number a"),
        (("--presence-penalty", "inf"), "--presence-penalty is inf; it must be a finite number"),
        (("--logit-bias", "70"), "70 is no token id with a number to add, such as 15043+1.5"),
        (("--logit-bias", "70+1e999"), "--logit-bias is {70: inf}; it must be a finite number"),
        (("--json-object", "--json-schema", "x"), "--json-schema says what the JSON is"),
        (("--feed", "carrier-pigeon"), "invalid choice: 'carrier-pigeon'"),
        (("--positions", "alias"), "invalid choice: 'alias'"),
        (("-", "-"), "- is given twice"),
        (("--temprature", 1), "unrecognized arguments: --temprature"),
        (("--prompt-file",), "expected one argument"),
    ],
)
def test_a_wrong_flag_is_answered_with_usage_and_one_line(run, arguments, message):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    usage, error = done.stderr[:-1].rsplit("\n", 1)
    assert usage.startswith("usage: runner/run.py")
    assert error.startswith("runner/run.py: error: ") and message in error


def test_more_threads_than_any_machine_starts_are_refused(run):
    assert_error(run("--threads", 5000, "hello"), "threads is 5000; it must be 1 to 1024")


def test_every_variant_of_the_loop_prints_the_same_bytes(run):
    variants = [
        (), ("--feed", "host"), ("--positions", "host"), ("--no-double-buffering",),
        ("--threads", 1), ("--threads", 3),
    ]  # fmt: skip
    outputs = [run(*flags, UNICODE, ENDING, "two") for flags in (*variants, sum(variants, ()))]
    assert {(done.returncode, done.stderr) for done in outputs} == {(0, "")}
    assert len({done.stdout for done in outputs}) == 1


# How tokens are chosen


def test_a_seed_repeats_the_text_and_another_one_gives_another(run):
    flags = ("--max-new-tokens", 40, "--temperature", 1.2, "--top-p", 0.95, "--top-k", 200)
    first, second, other = (run(*flags, "--seed", seed, "one", "two") for seed in (3, 3, 4))
    assert {done.returncode for done in (first, second, other)} == {0}
    assert first.stdout == second.stdout != other.stdout
    greedy = run("--max-new-tokens", 40, "one", "two")
    assert run(*flags[:2], "--top-k", 3, "--seed", 5, "one", "two").stdout == greedy.stdout
    # One token to choose from, too, is the most likely one.
    assert run(*flags[:4], "--top-k", 1, "one", "two").stdout == greedy.stdout


def test_every_variant_of_the_loop_samples_the_same_bytes(run):
    variants = [(), ("--feed", "host"), ("--positions", "host"), ("--no-double-buffering",)]
    flags = ("--temperature", 1.0, "--seed", 11, UNICODE, "two")
    outputs = [run(*flags, *variant) for variant in variants]
    assert {(done.returncode, done.stderr) for done in outputs} == {(0, "")}
    assert len({done.stdout for done in outputs}) == 1


def test_text_ends_before_the_first_of_the_stop_strings(run):
    (entry,) = lines(run("--json", ENDING))
    text = entry["text"]
    early, late = text[9:12], text[30:33]
    (stopped,) = lines(run("--json", "--stop", late, "--stop", early, ENDING))
    assert stopped["text"] == text[: min(text.index(early), text.index(late))]
    assert stopped["finish_reason"] == "stop"
    assert stopped["token_ids"] == entry["token_ids"][: len(stopped["token_ids"])]
    assert run("--stop", late, "--stop", early, ENDING).stdout == stopped["text"] + "\n"


# Batches

BATCH_KEYS = KEYS[:-1]


@pytest.fixture
def run_batch(run_script, batch_artifact, tmp_path):
    """As `run`, with an artifact of three rows and the text of its prompt file."""

    def run(text: str | bytes, *arguments, name="prompts.txt"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        arguments = ("--artifact", batch_artifact, "--prompt-file", name, *arguments)
        return run_script("runner/run.py", *arguments, cwd=tmp_path)

    return run


def test_each_line_of_a_batchs_prompt_file_is_a_prompt(run, run_batch):
    prompts = ["one", UNICODE, ENDING, "  two  ", "three\ttimes", "four"]
    flags = ("--max-new-tokens", 30, "--json")
    expected = [{**entry, "stats": None} for entry in lines(run(*flags, *prompts))]
    text = "one\n\n" + UNICODE + "\r\n \t\n" + "\n".join([ENDING, *prompts[3:]])
    for batch in (1, 2, 3):
        entries = lines(run_batch(text, *flags, "--batch", batch))
        assert [list(entry) for entry in entries] == [BATCH_KEYS] * len(prompts)
        assert [{**entry, "stats": None} for entry in entries] == expected
    # Prompts of the command line come first, and the texts are whole lines in the same order.
    done = run_batch(text, "--max-new-tokens", 30, "--batch", 3, "zero")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("\n" + "".join(entry["text"] + "\n" for entry in expected))


def test_each_line_of_a_jsonl_file_overrides_the_flags(run, run_batch):
    flags = ("--json", "--max-new-tokens", 20, "--seed", 5)
    objects = [
        {"prompt": "one"},
        {"prompt": "two", "max_new_tokens": 35, "temperature": 1.1, "top_k": 50, "top_p": 0.9},
        {"prompt": UNICODE, "seed": 9, "temperature": 0.7, "stop": ["a", "b"]},
        {"prompt": [2, 70, 71], "stop": "e"},
    ]
    text = "".join(json.dumps(entry) + "\n\n" for entry in objects)
    found = lines(run_batch(text, *flags, "--batch", 3, name="prompts.jsonl"))
    assert [entry["prompt"] for entry in found] == [entry["prompt"] for entry in objects]
    sampled = (*flags, "--max-new-tokens", 35, "--temperature", 1.1, "--top-k", 50, "--top-p", 0.9)
    expected = [
        *lines(run(*flags, "one")),
        *lines(run(*sampled, "two")),
        *lines(
            run(*flags, "--seed", 9, "--temperature", 0.7, "--stop", "a", "--stop", "b", UNICODE)
        ),
    ]
    for entry, alone in zip(found, expected):
        assert {**entry, "stats": alone["stats"]} == alone


SCHEMA = {"type": "array", "items": {"enum": [1, "b"]}, "minItems": 2, "maxItems": 3}


def test_the_output_is_json_with_biases_and_penalties_as_the_flags_ask(run, run_batch, tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    (entry,) = lines(run("--json", "--json-schema", "schema.json", "--temperature", 1.2))
    assert len(json.loads(entry["text"])) in (2, 3) and entry["finish_reason"] == "stop"
    flags = ("--json", "--max-new-tokens", 12)
    choosing = ("--repetition-penalty", 1.5, "--presence-penalty", 0.5)
    choosing += ("--frequency-penalty", -0.2, "--logit-bias", "70+2.5", "--logit-bias", "71-100")
    (plain,), (changed,) = lines(run(*flags, "x")), lines(run(*flags, *choosing, "x"))
    assert plain["token_ids"] != changed["token_ids"]
    line = {
        "prompt": "x", "repetition_penalty": 1.5, "presence_penalty": 0.5,
        "frequency_penalty": -0.2, "logit_bias": {"70": 2.5, "71": -100},
    }  # fmt: skip
    text = f"{json.dumps(line)}\n" + json.dumps({"prompt": "x", "json_schema": SCHEMA})
    found = lines(run_batch(text, *flags, "--batch", 2, name="prompts.jsonl"))
    assert found[0]["token_ids"] == changed["token_ids"]
    assert set(found[1]["text"]) <= set('[1,"b] \n')


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "--json-schema schema.json is not JSON: "),
        ("[]", "--json-schema schema.json holds no JSON schema; an object is right"),
        ('{"type": 5}', "json_schema cannot be followed: "),
        (None, "--json-schema schema.json: No such file or directory"),
    ],
)
def test_a_file_that_holds_no_schema_is_named(run, tmp_path, content, words):
    (tmp_path / "schema.json").unlink(missing_ok=True)
    if content is not None:
        (tmp_path / "schema.json").write_text(content)
    assert_error(run("--json-schema", "schema.json"), words)


def test_an_empty_file_of_prompts_gives_nothing(run_batch):
    done = run_batch("\n \n", "--batch", 2)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"prompt": "x", "temprature": 1}', "has the key 'temprature'; the keys are prompt, max"),
        ('{"prompt": "x"', "is not JSON: "),
        ('{"prompt": "x", "prompt": "y"}', "is not JSON: the key 'prompt' stands there twice"),
        ('{"prompt": ' + "[" * 100_000, "is not JSON: it is nested too deeply"),
        ('["x"]', 'is ["x"]; it must be an object with a prompt'),
        ('{"top_k": 3}', 'is {"top_k": 3}; it must be an object with a prompt'),
    ],
)
def test_a_wrong_line_of_a_jsonl_file_is_named(run_batch, line, words):
    text = '{"prompt": "good"}\n\n' + line + "\n"
    done = run_batch(text, "--batch", 2, name="prompts.jsonl")
    assert_error(done, f"--prompt-file prompts.jsonl: line 3 {words}")


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_a_refused_request_is_an_error_of_its_own_and_the_others_finish(run_batch, json_flag):
    objects = [
        {"prompt": "one"},
        {"prompt": "x", "temperature": -1},
        {"prompt": "y" * 300},
        {"prompt": "\ud800"},
        {"prompt": "two"},
    ]
    text = "\n".join(map(json.dumps, objects))
    flags = ("--batch", 3, "--max-new-tokens", 9, *json_flag)
    done = run_batch(text, *flags, name="prompts.jsonl")
    good = run_batch("one\ntwo", *flags)
    assert (done.returncode, good.returncode, good.stderr) == (2, 0, "")
    errors = [
        "request 2: temperature is -1; it must be a finite number, 0 (greedy) or more",
        "request 3: the prompt has 301 tokens and the cache 200 positions, one of which is for the "
        "output: shorten it, or export with a larger --max-seq-len",
        "request 4: the text has the lone surrogate U+D800 at character 0: it must be valid "
        "Unicode (UTF-8 input)",
    ]
    assert done.stderr == "".join(f"runner/run.py: error: {error}\n" for error in errors)
    if not json_flag:
        assert done.stdout == good.stdout
        return
    entries = [json.loads(line) for line in done.stdout[:-1].split("\n")]
    assert [entry.pop("error", None) for entry in entries] == [None, *errors, None]
    assert [entry["prompt"] for entry in entries] == [entry["prompt"] for entry in objects]
    assert [entry["finish_reason"] for entry in entries] == ["length", *["error"] * 3, "length"]
    assert [entries[0], entries[4]] == [json.loads(line) for line in good.stdout[:-1].split("\n")]


def test_more_rows_than_the_artifact_has_are_refused(run, run_batch):
    assert_error(run_batch("one", "--batch", 4), "4 rows are asked for", "has 3", "--batch 4")
    assert_error(run("--batch", 2, "one"), "2 rows are asked for", "has 1", "--batch 2")


def test_a_batchs_statistics_are_its_totals(run_batch):
    done = run_batch("one\ntwo\nhey", "--batch", 3, "--max-new-tokens", 9, "--stats")
    assert done.returncode == 0
    names = [line[:19].strip() for line in done.stderr.splitlines()]
    assert names == [
        "load", "requests", "steps", "prefill", "decode", "peak memory",
        "host to device", "device to device", "device to host",
    ]  # fmt: skip
    assert (
        "requests            3\nsteps               8\nprefill             12 tokens, "
        in done.stderr
    )
    assert "decode              27 tokens, " in done.stderr
    # Three prompts of 4 tokens, and 8 steps of 3 positions.
    assert "host to device      4 copies, 288 bytes\n" in done.stderr
    assert "device to device    3 copies, 24 bytes\n" in done.stderr
    assert "device to host      9 copies, 216 bytes\n" in done.stderr


def test_ctrl_c_prints_what_a_batch_has_so_far(start, default_artifact):
    arguments = ("--json", "--max-new-tokens", 100, "--batch", 1)
    prompts = ("Once upon a time", "Alice was", "never begun")
    process = start("--artifact", default_artifact, *arguments, *prompts)
    first = json.loads(process.stdout.readline())
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, b"")
    (interrupted,) = [json.loads(line) for line in rest.splitlines()]
    assert (first["finish_reason"], len(first["token_ids"])) == ("length", 100)
    assert list(interrupted) == BATCH_KEYS
    assert (interrupted["prompt"], interrupted["finish_reason"]) == ("Alice was", "interrupted")
    assert 0 < len(interrupted["token_ids"]) < 100


def test_progress_is_shown_on_a_terminal_and_leaves_the_output_alone(batch_artifact, tmp_path):
    pty = pytest.importorskip("pty")
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\n")
    command = [sys.executable, ROOT / "runner/run.py", "--artifact", batch_artifact]
    command += ["--batch", "2", "--prompt-file", "prompts.txt"]
    plain = subprocess.run(command, cwd=tmp_path, capture_output=True)
    terminal, stderr = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "80"}
    try:
        options = {"cwd": tmp_path, "env": environment, "stdout": subprocess.PIPE}
        done = subprocess.run(command, stderr=stderr, **options)
        shown = os.read(terminal, 100_000).decode()
    finally:
        os.close(terminal)
        os.close(stderr)
    assert (done.returncode, done.stdout) == (0, plain.stdout)
    assert "0/4 requests" in shown
    # The line is erased in the end.
    assert shown.rstrip().endswith("\x1b[2K") and plain.stderr == b""


# The runner alone

SHOW_IMPORTS = """
import sys
from tokenloop.runner.run import main
try:
    sys.exit(main())
finally:
    print(*sorted(sys.modules), file=sys.stderr)
"""


def imported(*arguments, cwd: Path) -> set[str]:
    """The modules that a run with these arguments has imported when it ends."""
    command = [sys.executable, "-c", SHOW_IMPORTS, *arguments]
    done = subprocess.run(command, cwd=cwd, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return set(done.stderr.decode().splitlines()[-1].split())


def test_the_runner_imports_nothing_that_only_the_export_needs(tiny_artifact, tmp_path):
    modules = imported("--artifact", tiny_artifact, "hello", cwd=tmp_path)
    assert {"tokenloop.runner.loop", "numpy"} <= modules
    others = {"benchmarks", "torch", "torchao", "transformers"}
    # Not even the package: only its libraries are loaded.
    assert not (others | {"executorch"}) & {name.split(".")[0] for name in modules}
    rooms = {name.split(".")[1] for name in modules if name.startswith("tokenloop.")}
    assert rooms == {"runner"}
    # Nobody sees how far a batch is where standard error is no terminal.
    batch = imported("--artifact", tiny_artifact, "--batch", "1", "hello", cwd=tmp_path)
    assert "tokenloop.runner.generation" in batch and "rich" not in modules | batch


def test_wrong_arguments_are_answered_before_numpy_is_imported(tmp_path):
    for arguments in (("--max-new-tokens", "0"), ("--prompt-file", "nowhere.txt")):
        modules = imported(*arguments, cwd=tmp_path)
        assert "tokenloop.runner.run" in modules and "numpy" not in modules


# Every variant at once


def test_compare_runs_every_variant_and_prints_a_table(run):
    done = run("--compare", "--max-new-tokens", 20, "abc")
    assert (done.returncode, done.stderr) == (0, "")
    header, *rows = done.stdout.splitlines()
    assert header.split()[:2] == ["feed", "positions"] and header.split()[-1] == "text"
    # Of the host's feed two; of the two others' four each; and one that runs ahead.
    assert [row.split()[0] for row in rows] == ["host"] * 2 + ["alias"] * 4 + ["embed"] * 5
    assert all(row.split()[-1] == "identical" for row in rows)


def test_compare_gives_a_json_line_for_each_variant(run):
    found = lines(run("--compare", "--json", "--max-new-tokens", 20, "abc"))
    expected = lines(run("--json", "--max-new-tokens", 20, "abc"))[0]
    for entry in found:
        assert entry["identical"] and entry["token_ids"] == expected["token_ids"]
        fed = 19 * (entry["options"]["feed"] == "host")
        positions = (1 + 19) * (entry["options"]["positions"] == "host")
        assert entry["stats"]["transfers"]["host_to_device"]["count"] == 1 + fed + positions
    assert len({json.dumps(entry["options"]) for entry in found}) == len(found) == 11


def test_a_variant_that_differs_is_shown_and_is_the_exit_status(tiny_artifact, monkeypatch, capsys):
    model = runner.load(tiny_artifact)
    select = model.loop.program.select

    def wrong_where_it_embeds(logits, buffer, choice):
        if model.loop.program.embedding:
            logits[:, 70] = 1e3
        return select(logits, buffer, choice)

    monkeypatch.setattr(model.loop.program, "select", wrong_where_it_embeds)
    assert compare(model, Request([2, 70, 71], 8), as_json=False) == 1
    verdicts = [row.split()[-1] for row in capsys.readouterr().out.splitlines()[1:]]
    assert verdicts == ["identical"] * 6 + ["DIFFERENT"] * 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare", "--feed", "host"], "leave out --feed"),
        (["--compare", "--no-double-buffering"], "leave out --double-buffering"),
        (["--compare", "--batch", 2], "leave out --batch"),
        (["--compare", "a", "b"], "--compare takes one prompt, and 2 are given"),
    ],
)
def test_compare_takes_one_prompt_and_no_variant(run, arguments, message):
    done = run(*arguments)
    assert done.returncode == 2 and message in done.stderr
