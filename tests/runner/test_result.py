"""Ids become text that ends before a stop string, however it is divided into tokens."""

import itertools

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tokenloop.runner.request import Request
from tokenloop.runner.result import Result, StopStream

EOS = 0


class Pieces:
    """A tokenizer whose ids stand for texts. One that holds "~" back gives it with the next, as a
    tokenizer does with half a character, or in the end as "?"."""

    eos_token_ids = [EOS]

    def __init__(self, *pieces: str):
        self.pieces = pieces
        self.held = ""

    def stream(self, shown_tokens=()) -> "Pieces":
        return Pieces(*self.pieces)

    def push(self, token_id: int) -> str:
        text = self.held + self.pieces[token_id - 1]
        whole = text.rstrip("~")
        self.held = text[len(whole) :]
        return whole

    def finish(self) -> str:
        return "?" * len(self.held)


def take_all(pieces, stop=(), limit=1000, end=False) -> tuple[Result, list]:
    """The result of all the pieces, or of as many as it takes, and what was shown."""
    result = Result(Request("", stop=stop), Pieces(*pieces), [7], limit)
    shown = []
    for token_id in [*range(1, len(pieces) + 1), *([EOS] if end else [])]:
        shown.append(result.take(token_id))
        if result.finish_reason is not None:
            break
    return result, shown


def cut(text: str, stops) -> str | None:
    """`text` before the stop string that is complete first, read character by character."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if text[:end].endswith(s)]
        if found:
            return text[: end - max(map(len, found))]
    return None


def texts(alphabet: str, most: int):
    return st.text(alphabet, min_size=1, max_size=most)


@settings(max_examples=1000, deadline=None)
@given(
    pieces=st.lists(st.text("ab", max_size=4), max_size=12),
    stops=st.lists(texts("ab", 6), max_size=4),
    end=st.booleans(),
)
@example(pieces=["ab", "c"], stops=["abcd", "bc"], end=True)
@example(pieces=["aab"], stops=["ab", "b"], end=False)
@example(pieces=["aa", "aab"], stops=["aab"], end=False)
def test_text_ends_before_the_stop_string_that_is_complete_first(pieces, stops, end):
    limit = max(len(pieces), 1)
    result, shown = take_all(pieces, stops, limit if not end else 1000, end)
    before = cut("".join(pieces), stops)
    if pieces or end:
        assert result.text == ("".join(pieces) if before is None else before)
        assert result.finish_reason == ("length" if before is None and not end else "stop")
    # What was shown is never taken back.
    assert "".join(token.text for token in shown if token) == result.text


@given(pieces=st.lists(texts("abc", 3), min_size=1, max_size=8), stop=texts("abc", 4))
def test_only_what_may_begin_a_stop_string_is_held_back(pieces, stop):
    stream, shown, text = StopStream(Pieces(*pieces), [stop]), "", ""
    for token_id, piece in enumerate(pieces, 1):
        shown, text = shown + stream.push(token_id), text + piece
        if stream.stopped:
            break
        held = text[len(shown) :]
        assert text.startswith(shown) and stop.startswith(held) and held != stop
        longer = (text[-n:] for n in range(len(held) + 1, len(text) + 1))
        assert not any(stop.startswith(end) for end in longer)


def test_tokens_up_to_the_end_of_the_stop_string_are_among_the_ids():
    result, shown = take_all(["one", " t", "w", "o three", " four"], [" two"])
    assert (result.token_ids, result.text, result.finish_reason) == ([1, 2, 3, 4], "one", "stop")
    assert [token.text for token in shown] == ["one", "", "", ""]


def test_the_end_token_is_not_among_the_ids_and_shows_what_was_held_back():
    result, shown = take_all(["one", " t"], [" two"], end=True)
    assert (result.token_ids, result.text, result.finish_reason) == ([1, 2], "one t", "stop")
    assert [(token.id, token.text) for token in shown] == [(1, "one"), (2, ""), (EOS, " t")]
    _, shown = take_all(["one"], end=True)
    assert shown[-1] is None


def test_the_last_token_shows_what_was_held_back():
    for stop in ((), ("xy",)):
        result, shown = take_all(["ab", "x~"], stop, limit=2)
        assert (result.text, result.finish_reason) == ("abx?", "length")
        assert shown[-1].text == "x?"


def test_half_a_character_can_complete_a_stop_string_in_the_end():
    result, _ = take_all(["ab", "x~"], ["x?"], limit=2)
    assert (result.text, result.finish_reason) == ("ab", "stop")


@pytest.mark.parametrize("count", [1, 3])
def test_a_stop_string_in_the_last_token_is_a_stop(count):
    pieces = list(itertools.repeat("ab", count))
    result, _ = take_all(pieces, ["ab" * count], limit=count)
    assert (result.text, result.finish_reason) == ("", "stop")


def test_one_stop_string_needs_no_list():
    assert Request("", stop="ab").stop == ("ab",)
    assert Request("", stop=["ab", "c"]).stop == ("ab", "c")
