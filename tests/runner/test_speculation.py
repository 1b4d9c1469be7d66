"""Speculation gives the tokens of the plain loop, whatever was drafted, and counts what held."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from tests.driving import PROMPTS, SAMPLED
from tokenloop import runner
from tokenloop.runner import LoopOptions, Request, RunnerError, speculation
from tokenloop.runner.program import PARAMETERS, Choice
from tokenloop.runner.speculation import Budget, Repetition

PLAIN = LoopOptions("alias")
DRAFTS, ROOM = 3, 200


class SteppedRounds:
    """Rounds of a program that has none: its steps, one by one, as long as the drafts hold. The
    drafts are the tokens that will come, but for each `every`-th, which is another."""

    def __init__(self, program, every: int = 5):
        self.program, self.coming, self.every = program, [], every
        self.tries, self.accepted = [], [np.zeros(2 + DRAFTS, np.int64) for _ in range(2)]

    def begin(self, ids, token, request):
        self.ids, self.prompt, self.request = [*ids, int(token[0, 0])], len(ids), request

    def submit(self, drafted, method, buffer, given=None):
        first = len(self.ids) - 1
        done = first - self.prompt + 1
        rows = 1 + DRAFTS * drafted
        # Nothing is written where no position is.
        assert first + rows <= ROOM
        self.tries.append(drafted)
        drafts = [
            token_id if place % self.every else token_id + 1
            for place, token_id in enumerate(self.coming[done : done + rows - 1], done)
        ]
        drafts += [0] * (rows - 1 - len(drafts))
        if given is not None:
            assert drafted and len(given) == DRAFTS
            drafts = given
        chosen = []
        for i, draft in enumerate([*drafts, None]):
            position = np.array([first + i])
            logits = self.program.decode(np.array([[self.ids[-1]]]), position)
            given = [np.array([getattr(self.request, n)], d) for n, d in PARAMETERS.items()]
            inputs = () if method == "greedy" else (*given, position)
            # The first token may lie unread in the other buffer.
            token = self.program.select(logits, 1, Choice(method, inputs)).token
            chosen.append(int(token[0, 0]))
            self.ids.append(chosen[-1])
            if chosen[-1] != draft:
                break
        values = [len(chosen), *chosen, *[-1] * (rows - len(chosen))]
        self.accepted[buffer][: 1 + rows] = values
        return self.accepted[buffer][: 1 + rows]


@pytest.fixture(scope="module")
def tiny(tiny_artifact):
    return runner.load(tiny_artifact)


@pytest.fixture
def rounds(tiny, monkeypatch):
    """Rounds of the tiny model, which always try drafts where there is room."""
    monkeypatch.setattr(tiny.tokenizer, "eos_token_ids", [])
    program = tiny.loop.program
    rounds = SteppedRounds(program)
    for name, value in {
        "draft_tokens": DRAFTS, "draft_cost": 1.0, "begin_rounds": rounds.begin,
        "submit_round": rounds.submit,
    }.items():  # fmt: skip
        monkeypatch.setattr(program, name, value, raising=False)
    monkeypatch.setattr(Repetition, "add", lambda self, token_id: None)
    monkeypatch.setattr(Repetition, "__init__", lambda self, ids: setattr(self, "found", True))
    return rounds


def both(model, rounds, request, options):
    """What steps give for a request, and what rounds give."""
    plain = model.generate(request, options=PLAIN).run()
    ids = model.generate(replace(request, stop=[]), options=PLAIN).run().token_ids
    rounds.coming, rounds.tries = ids, []
    return plain, model.generate(request, options=options).run()


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("kind", [{}, SAMPLED, {"temperature": 1.1, "seed": 3}], ids=str)
def test_rounds_give_the_tokens_of_steps(tiny, rounds, kind, ahead):
    options = LoopOptions("alias", double_buffering=ahead, speculate="lookup")
    # One token, each number within a round of all drafts, and up to the last position.
    cases = [(PROMPTS[1], n) for n in (1, 2, 4, 5, 9)]
    cases += [(PROMPTS[2], 40), (PROMPTS[0], 40), (PROMPTS[3], ROOM)]
    for (prompt, count), every in zip(cases, itertools.cycle((5, 1, 10**6))):
        rounds.every = every
        plain, drafted = both(tiny, rounds, Request(prompt, count, **kind), options)
        assert drafted.token_ids == plain.token_ids, (len(prompt), count)
        assert drafted.finish_reason == plain.finish_reason
        stats = drafted.stats
        assert stats.draft_rounds <= sum(rounds.tries)
        assert stats.drafted_tokens == DRAFTS * stats.draft_rounds
        assert stats.accepted_tokens <= stats.drafted_tokens
        assert plain.stats.draft_rounds == plain.stats.drafted_tokens == 0
        assert "draft_rounds" not in plain.as_dict()["stats"]
        assert ("draft_rounds" in drafted.as_dict()["stats"]) == (stats.draft_rounds > 0)
        if every == 10**6 and count == 40:
            assert stats.accepted_tokens > 20
        if every == 1:
            assert stats.accepted_tokens == 0


def test_a_round_s_tokens_behind_an_end_are_dropped(tiny, rounds, monkeypatch):
    options = LoopOptions("alias", speculate="lookup")
    ids = tiny.generate(PROMPTS[2], 30, options=PLAIN).run().token_ids
    rounds.every = 10**6
    for place in range(3, 12):
        # One that has not come before.
        if ids[place] in ids[:place]:
            continue
        monkeypatch.setattr(tiny.tokenizer, "eos_token_ids", [ids[place]])
        rounds.coming = ids
        drafted = tiny.generate(PROMPTS[2], 30, options=options).run()
        plain = tiny.generate(PROMPTS[2], 30, options=PLAIN).run()
        assert (drafted.token_ids, drafted.finish_reason) == (plain.token_ids, "stop")
    monkeypatch.setattr(tiny.tokenizer, "eos_token_ids", [])
    text = tiny.generate(PROMPTS[2], 30, options=PLAIN).run().text
    plain, drafted = both(tiny, rounds, Request(PROMPTS[2], 30, stop=[text[7:9]]), options)
    assert (drafted.text, drafted.finish_reason) == (plain.text, plain.finish_reason)
    assert drafted.finish_reason == "stop"


def test_what_rounds_cannot_give_comes_from_steps_and_others_go_on(tiny, rounds):
    options = LoopOptions("alias", speculate="lookup")
    requests = [
        Request(PROMPTS[1], 12),
        Request(PROMPTS[1], 12, logprobs=2),
        Request(PROMPTS[1], 12, repetition_penalty=1.3),
        Request(PROMPTS[2], 12, prompt_logprobs=True, logprobs=0),
        Request(PROMPTS[2], 12, **SAMPLED),
    ]
    plain, drafted = (tiny.generate_batch(requests, way).run() for way in (PLAIN, options))
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
    assert [r.logprobs for r in drafted] == [r.logprobs for r in plain]
    assert len(drafted[1].logprobs) == 12
    # Two of them had rounds.
    assert len(rounds.tries) >= 2


def test_a_generation_that_is_given_up_leaves_the_next_one_whole(tiny, rounds):
    options = LoopOptions("alias", speculate="lookup")
    for _ in range(2):
        generation = tiny.generate(PROMPTS[2], 30, options=options)
        for _ in range(5):
            next(generation)
        generation.cancel()
        plain, drafted = both(tiny, rounds, Request(PROMPTS[0], 20), options)
        assert drafted.token_ids == plain.token_ids


def test_without_rounds_it_is_refused(tiny):
    with pytest.raises(RunnerError, match="has no rounds for it: export it with .* --draft-tokens"):
        tiny.generate([2], options=LoopOptions(speculate="lookup"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"speculate": "drafts"}, "speculate is 'drafts', of type str; it must be lookup or dr"),
        ({"speculate": "lookup", "feed": "host"}, "speculate is 'lookup' and feed 'host'"),
        ({"speculate": "lookup", "positions": "host"}, "and positions 'host': how many tokens"),
        ({"speculate": "lookup", "run_ahead": 2}, "and run_ahead 2; it must be 1"),
    ],
)
def test_variants_that_make_no_sense_are_refused(options, line):
    with pytest.raises(RunnerError, match=line):
        LoopOptions(**options)


def test_a_text_repeats_itself_where_two_tokens_did_before():
    text = Repetition([1, 2, 3])
    found = []
    for token_id in (9, 1, 2, 3, 3, 3, 3, 9, 1):
        text.add(token_id)
        found.append(text.found)
    assert found == [False, False, True, True, False, True, True, True, True]


@pytest.mark.parametrize("cost", [1.05, 1.3, 2.5])
def test_drafts_that_never_hold_cost_a_percent_and_one_try(cost):
    for count in (50, 400):
        budget, time = Budget(cost), 0.0
        for _ in range(count):
            drafted = budget.is_enough
            budget.spend(drafted)
            if drafted:
                budget.earn(0)
            time += cost if drafted else 1
        # And one try in the beginning.
        assert count < time <= (1 + speculation.ALLOWED) * count + (cost - 1) + 1e-9


def test_drafts_that_hold_are_tried_again_and_again():
    budget = Budget(1.5)
    for _ in range(100):
        assert budget.is_enough
        budget.spend(True)
        budget.earn(2)
    # But what was saved once does not pay for everything later.
    failed = 0
    while budget.is_enough:
        budget.spend(True)
        failed += 1
    assert failed <= speculation.MOST_CREDIT / 0.5 + 1
