"""A draft model proposes what it would generate, whatever was rejected before, and the loop's
tokens stay those of the model that it drafts for."""

import random
from dataclasses import replace

import pytest

from tests.driving import PROMPTS, SAMPLED, altered, ids_of
from tests.runner.test_inductor import INDUCTOR
from tests.runner.test_speculation import DRAFTS, PLAIN, ROOM, SteppedRounds
from tokenloop import runner
from tokenloop.runner import LoopOptions, Request, RunnerError
from tokenloop.runner.draft_model import DraftModel
from tokenloop.runner.manifest import open_artifact
from tokenloop.runner.model import load_program
from tokenloop.runner.run import main
from tokenloop.runner.speculation import Budget
from tokenloop.runner.tokenizer import Tokenizer

DRAFTED = LoopOptions("alias", speculate="draft")


@pytest.fixture(scope="module")
def tiny(tiny_artifact):
    """A window of 16, which texts go around many times."""
    model = runner.load(tiny_artifact)
    model.tokenizer.eos_token_ids.clear()
    return model


@pytest.fixture
def rounds(tiny, monkeypatch):
    """The tiny model verifies drafts, by steps, and tries are always worth their while."""
    rounds = SteppedRounds(tiny.loop.program)
    for name, value in {
        "draft_tokens": DRAFTS, "draft_cost": 1.0, "round_s": 1e6, "verifies": True,
        "begin_rounds": rounds.begin, "submit_round": rounds.submit,
    }.items():  # fmt: skip
        monkeypatch.setattr(tiny.loop.program, name, value, raising=False)
    monkeypatch.setattr(tiny.loop, "draft", None)
    return rounds


@pytest.fixture(scope="module", params=["executorch", "inductor"])
def draft(request, tiny_artifact, export_artifact, tiny_checkpoint):
    """A program of the tiny model's weights, for either engine."""
    directory = tiny_artifact
    if request.param == "inductor":
        directory = export_artifact("tiny-inductor", "--model", tiny_checkpoint, *INDUCTOR)
    program = load_program(open_artifact(directory, None))
    return DraftModel(program, DRAFTS, 1.0, 1.0)


def test_what_is_proposed_is_what_the_model_would_generate(tiny, draft):
    """After texts that go on from what was proposed, or from its beginning, or otherwise."""
    picks, ids = random.Random(0), [2, 70]
    for number in range(40):
        drafts = draft.propose(ids, DRAFTS)
        assert drafts == ids_of(tiny, ids, DRAFTS), (number, len(ids))
        # So many hold, and a token that no draft foresaw.
        held = picks.choice((0, 0, 1, 2, DRAFTS))
        ids = ids + drafts[:held] + [picks.randrange(3, 259)]
        if number % 9 == 5:
            # Another text, a part of this one, and much more.
            ids = picks.choice((PROMPTS[3], ids[: len(ids) // 2], ids + PROMPTS[3][1:21]))
    assert len(ids) > 40


def test_the_same_text_again_and_one_that_was_interrupted(tiny, draft, monkeypatch):
    ids = PROMPTS[3]
    expected = ids_of(tiny, ids, DRAFTS)
    for again in (ids, ids, ids[:20], ids):
        assert draft.propose(again, DRAFTS) == ids_of(tiny, again, DRAFTS)
    step, calls = draft.program.step, []

    def interrupted(*given):
        calls.append(given)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return step(*given)

    longer = [*ids, *expected[:2], 9]
    monkeypatch.setattr(draft.program, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draft.propose(longer, DRAFTS)
    assert draft.propose(longer, DRAFTS) == ids_of(tiny, longer, DRAFTS)


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("kind", [{}, SAMPLED, {"temperature": 0.2, "seed": 3}], ids=str)
def test_a_model_s_drafts_give_the_tokens_of_steps(tiny, rounds, tiny_artifact, kind, ahead):
    tiny.use_draft(tiny_artifact)
    options = replace(DRAFTED, double_buffering=ahead)
    for prompt, count in (PROMPTS[1], 1), (PROMPTS[1], 2), (PROMPTS[2], 40), (PROMPTS[3], ROOM):
        plain = tiny.generate(prompt, count, options=PLAIN, **kind).run()
        drafted = tiny.generate(prompt, count, options=options, **kind).run()
        assert drafted.token_ids == plain.token_ids
        stats = drafted.stats
        assert (stats.draft_rounds > 0) == (count > 1)
        if count > 2:
            # Its own drafts hold where the most likely token is taken, and seldom where any is.
            share = stats.accepted_tokens / stats.drafted_tokens
            assert share > 0.9 if not kind else share < 0.9
    requests = [Request(PROMPTS[i], 12, logprobs=1 if i == 1 else None, **kind) for i in range(3)]
    plain, drafted = (tiny.generate_batch(requests, way).run() for way in (PLAIN, options))
    assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]


def test_as_many_are_tried_as_held_and_as_there_is_a_budget_for(draft):
    draft.budget, draft._count = Budget(1.0), 1
    draft._round_cost, draft._draft_cost = 1.25, 0.5
    draft.budget.earn(3)
    tried = []
    for held in (9, 9, 9, 0, 9, 1, 0, 0, 0):
        count = draft.wanted()
        tried.append(count)
        if count:
            draft.budget.spend(True)
            draft.budget.earn(min(held, count))
            draft.see(count, min(held, count))
    # A draft costs more than half of what it may save. In the end the budget is spent.
    assert tried == [1, 2, 3, 3, 1, 2, 2, 1, 1]
    for _ in range(9):
        if count := draft.wanted():
            draft.budget.spend(True)
            draft.see(count, 0)
    assert draft.wanted() == 0
    # It grows with every round, up to a single draft.
    for _ in range(80):
        draft.budget.spend(False)
    assert draft.wanted() == 1


def test_drafts_that_never_hold_are_soon_given_up(tiny, rounds, tiny_artifact, monkeypatch):
    program = tiny.loop.program
    # A round with drafts takes three without.
    monkeypatch.setattr(program, "draft_cost", 3.0)
    tiny.use_draft(tiny_artifact)
    propose = tiny.loop.draft.propose
    wrong = lambda ids, count: [(i + 1) % 259 for i in propose(ids, count)]  # noqa: E731
    monkeypatch.setattr(tiny.loop.draft, "propose", wrong)
    expected = ids_of(tiny, PROMPTS[0], 150, options=PLAIN)
    tries = []
    for _ in range(3):
        rounds.tries = []
        assert ids_of(tiny, PROMPTS[0], 150, options=DRAFTED) == expected
        tries.append(sum(rounds.tries))
    # Some in the beginning. What another sequence found out holds for the next one.
    assert tries[0] == 3 and sum(tries[1:]) <= 2


def test_a_command_line_says_in_one_line_that_no_drafts_can_be_verified(tiny_artifact, capsys):
    for draft in tiny_artifact, "nowhere":
        arguments = "--artifact", tiny_artifact, "--speculate", draft, "a"
        assert main([str(argument) for argument in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("tokenloop run: error: ")
        assert "has no rounds for another model's drafts: export it with --device cuda" in line


def test_what_does_not_fit_is_refused_by_name(tiny, rounds, tiny_artifact, tmp_path, monkeypatch):
    def refused(match, **changes):
        directory = altered(tiny_artifact, tmp_path / f"{len([*tmp_path.iterdir()])}", **changes)
        with pytest.raises(RunnerError, match=match):
            tiny.use_draft(directory)
        assert tiny.loop.draft is None

    refused("has vocab_size 300; it must be 259", vocab_size=300)
    refused("has 100 positions, and this one 200: export it with --max-seq-len 200",
            max_seq_len=100)  # fmt: skip
    with pytest.raises(RunnerError, match="call use_draft"):
        tiny.generate([2], options=DRAFTED)
    with pytest.raises(RunnerError, match="no such|is missing|not"):
        tiny.use_draft(tmp_path / "nothing")
    with monkeypatch.context() as patch:
        names = iter(["a", "a", "b", "c"])
        patch.setattr(Tokenizer, "token_name", lambda *_: next(names))
        with pytest.raises(RunnerError, match="another vocabulary: its token 1 is 'c', and"):
            tiny.use_draft(tiny_artifact)
    monkeypatch.setattr(tiny.loop.program, "verifies", False)
    with pytest.raises(RunnerError, match="no rounds for another model's drafts: export it with"):
        tiny.use_draft(tiny_artifact)
