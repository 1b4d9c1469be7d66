"""A checkpoint's settings for generating that nothing here reads are named."""

import json
from pathlib import Path

import gguf
import pytest
from transformers import GenerationConfig

from tokenloop.export.checkpoint import Checkpoint
from tokenloop.export.checkpoint.generation_settings import (
    DIRECTORY_KEYS,
    GGUF_KEYS,
    OF_REQUESTS,
    unread_settings,
)


def note(directory: Path, **settings) -> str | None:
    (directory / "generation_config.json").write_text(json.dumps(settings))
    return unread_settings(Checkpoint(directory, "safetensors", {}, (), {}))


def test_keys_are_those_of_the_formats_and_their_defaults_ask_for_nothing(tmp_path):
    assert {*DIRECTORY_KEYS, *OF_REQUESTS} <= vars(GenerationConfig()).keys()
    defaults = GenerationConfig._get_default_generation_params()
    assert note(tmp_path, **{key: defaults.get(key) for key in DIRECTORY_KEYS}) is None
    sampling = vars(gguf.Keys.General)
    assert GGUF_KEYS.keys() <= {sampling[name] for name in sampling if name.startswith("SAMPLING")}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"repetition_penalty": 1.05, "temperature": 0.7},
         "asks for repetition_penalty = 1.05, which no artifact does by itself: give "
         "--repetition-penalty 1.05"),
        ({"repetition_penalty": 1.1, "num_beams": 4},
         "num_beams = 4, which is not built: texts are without it; and for repetition_penalty = 1"),
        ({"suppress_tokens": [3], "num_beams": 4}, "asks for num_beams = 4, suppress_tokens = "),
        ({"stop_strings": "END"}, "stop_strings = 'END', which is not built: texts are without it"),
    ],
)  # fmt: skip
def test_what_changes_a_greedy_text_is_named(tmp_path, settings, words):
    assert words in note(tmp_path, **settings)


def test_what_a_request_says_itself_is_not(tmp_path):
    plain = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.1}
    assert note(tmp_path, **plain, repetition_penalty=1.0, bad_words_ids=[]) is None
    (tmp_path / "generation_config.json").unlink()
    assert unread_settings(Checkpoint(tmp_path, "safetensors", {}, (), {})) is None


def test_a_gguf_headers_penalty_is_named():
    metadata = {"general.sampling.penalty_repeat": 1.1, "general.sampling.temp": 0.6}
    found = unread_settings(Checkpoint(Path("a.gguf"), "gguf", {}, (), {}, metadata))
    assert found.startswith("a.gguf asks for general.sampling.penalty_repeat = 1.1, which is not")
    metadata["general.sampling.penalty_repeat"] = 1.0
    assert unread_settings(Checkpoint(Path("a.gguf"), "gguf", {}, (), {}, metadata)) is None
