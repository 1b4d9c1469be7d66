"""Grammars, penalties and biases restrict their row, in every engine and variant, and no other."""

import json
import threading
from functools import partial

import numpy as np
import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

from tests.driving import PROMPTS, altered, read_manifest, variants
from tests.threads import yielding_model
from tokenloop import runner
from tokenloop.runner import LoopOptions, Request, RunnerError
from tokenloop.runner.grammar import Grammars, grammar_of
from tokenloop.runner.restriction import Restriction, mask_bytes
from tokenloop.sampler.sample import sample

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["a", "bc", 3, None]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "kind", "size"],
    "additionalProperties": False,
}
PROMPT = PROMPTS[1]
JSON = Request(PROMPT, 120, json_schema=SCHEMA)
JSON_SAMPLED = Request(PROMPT, 120, json_schema=SCHEMA, temperature=1.3, top_p=0.95, seed=5)
PENALIZED = Request(
    PROMPTS[3], 40, temperature=0.8, seed=-3, repetition_penalty=1.3, presence_penalty=0.5,
    frequency_penalty=-0.25, logit_bias={70: 2.5, 258: -100.0, 3: 0.1},
)  # fmt: skip
ALL = Request(
    PROMPT, 120, json_schema=SCHEMA, temperature=1.0, seed=2, frequency_penalty=1.5,
    logit_bias={100: 4},
)  # fmt: skip
RESTRICTED = [JSON, JSON_SAMPLED, PENALIZED, ALL]
PLAIN = [
    Request(prompt, 11 + 7 * i, temperature=(0.0, 0.9)[i % 2], top_k=50, seed=i)
    for i, prompt in enumerate(PROMPTS)
]


@pytest.fixture(scope="module")
def rows_package_artifact(export_artifact, tiny_checkpoint):
    """A package of three rows."""
    arguments = ("--model", tiny_checkpoint, "--backend", "inductor", "--batch", 3)
    return export_artifact(
        "tiny-inductor-batch", *arguments, "--max-seq-len", 200, "--max-prefill", 7
    )


ENGINES = ("tiny_artifact", "batch_artifact", "rows_package_artifact", "portable_artifact")


@pytest.fixture(scope="module")
def engine(request):
    return runner.load(request.getfixturevalue(request.param))


every_engine = pytest.mark.parametrize("engine", ENGINES, indirect=True)
# A .pte of plain kernels is driven as the others are, and slow.
every_driver = pytest.mark.parametrize("engine", ENGINES[:3], indirect=True)


def outcome(result) -> tuple:
    return result.token_ids, result.text, result.finish_reason


def alone(model, requests, options=None) -> list[tuple]:
    return [outcome(model.generate(request, options=options).run()) for request in requests]


@every_engine
def test_the_output_fits_the_schema_however_little_sense_it_makes(engine):
    for ids, text, reason in alone(engine, [JSON, JSON_SAMPLED, ALL]):
        found = json.loads(text)
        assert list(found) == ["name", "kind", "size"] and len(found["name"]) <= 5
        assert found["kind"] in ("a", "bc", 3, None) and found["size"] in range(100)
        assert reason == "stop" and len(ids) < 120


@every_driver
def test_every_variant_of_the_loop_gives_the_same(engine):
    expected = alone(engine, RESTRICTED)
    assert len({ids[0] for ids, *_ in expected}) > 1
    for options in variants() if engine.batch == 1 else variants()[::4]:
        if options.feed != "embed" or engine.loop.program.embeds:
            assert alone(engine, RESTRICTED, options) == expected, options


@pytest.mark.parametrize("engine", ENGINES[1:3], indirect=True)
def test_rows_beside_a_restricted_one_keep_their_bytes_and_so_does_it(engine):
    requests = [r for pair in zip(PLAIN, RESTRICTED) for r in pair] + PLAIN[:2]
    expected = alone(engine, requests)
    for options in None, LoopOptions(run_ahead=4), LoopOptions("host", double_buffering=False):
        results = engine.generate_batch(requests, options).run()
        assert [outcome(result) for result in results] == expected, options


class Spy:
    """What selection of row 0 was given before it was changed, and what it chose."""

    def __init__(self, program, monkeypatch):
        self.given: list[np.ndarray] = []
        for name in ("select", "select_row"):
            monkeypatch.setattr(program, name, partial(self._call, getattr(program, name)))

    def _call(self, method, logits, *arguments):
        self.given.append(np.array(logits[0]))
        return method(logits, *arguments)


def changed(logits, request, prompt_ids, output_ids) -> np.ndarray:
    """The logits as transformers' processor and the formula of OpenAI's reference change them."""
    scores = torch.from_numpy(logits)[None]
    seen = torch.tensor([[*prompt_ids, *output_ids]])
    x = RepetitionPenaltyLogitsProcessor(request.repetition_penalty)(seen, scores)[0].numpy()
    counts = np.bincount(np.array(output_ids, np.int64), minlength=len(x))
    added = -(request.frequency_penalty * counts) - request.presence_penalty * (counts > 0)
    for token_id, bias in (request.logit_bias or {}).items():
        added[token_id] += bias
    return x + added.astype(np.float32)


@every_engine
@pytest.mark.parametrize(
    "parameters",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 0.6, "temperature": 0.9, "top_k": 9},
        {"presence_penalty": 1.5},
        {"frequency_penalty": 0.7, "temperature": 1.2, "top_p": 0.8},
        {"logit_bias": {7: 3.0}},
        {"logit_bias": {i: (i % 13) / 4 for i in range(250)}, "temperature": 1.0},
        {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 0.3,
         "logit_bias": {2: -100.0, 90: 1e30, 91: -1e30}},
    ],
    ids=str,
)  # fmt: skip
def test_tokens_are_those_of_logits_that_the_formula_changes(engine, monkeypatch, parameters):
    request = Request(PROMPTS[3], 30, seed=11, **parameters)
    spy = Spy(engine.loop.program, monkeypatch)
    monkeypatch.setattr(engine.tokenizer, "eos_token_ids", [])
    options = LoopOptions(double_buffering=False)
    ids = engine.generate(request, options=options).run().token_ids
    assert len(ids) == len(spy.given) == 30
    for step, (token_id, logits) in enumerate(zip(ids, spy.given)):
        x = torch.from_numpy(changed(logits, request, request.prompt, ids[:step]))[None]
        position = torch.tensor([len(request.prompt) + step - 1])
        settings = [
            torch.tensor([value])
            for value in (request.temperature, request.top_k, request.top_p, request.seed)
        ]
        assert sample(x, *settings, position).item() == token_id


@every_engine
def test_log_probabilities_are_those_of_the_logits_as_they_came(engine, monkeypatch):
    spy = Spy(engine.loop.program, monkeypatch)
    request = Request(PROMPT, 9, logprobs=2, json_schema=SCHEMA, frequency_penalty=1.0)
    result = engine.generate(request, options=LoopOptions(double_buffering=False)).run()
    assert len(result.logprobs) == 9
    for token_id, logits, found in zip(result.token_ids, spy.given, result.logprobs):
        expected = torch.from_numpy(logits).double().log_softmax(0)
        assert found.logprob == pytest.approx(expected[token_id].item(), abs=1e-5)
        assert found.top[0][0] == logits.argmax()


@every_engine
def test_a_row_with_a_grammar_uploads_its_bits_and_others_nothing(engine, monkeypatch):
    monkeypatch.setattr(engine.tokenizer, "eos_token_ids", [])

    def uploaded(request, count=8):
        plain = [Request(PROMPT, count)] * (engine.batch - 1)
        batch = engine.generate_batch([request, *plain])
        batch.run()
        return tuple(batch.stats.transfers["host_to_device"].values())

    count, size = uploaded(Request(PROMPT, 8))
    monkeypatch.setattr(engine.tokenizer, "eos_token_ids", [1])
    with_grammar = uploaded(Request(PROMPT, 8, grammar="start: /[a-z]{50}/"))
    assert with_grammar == (count + 8, size + 8 * mask_bytes(engine.vocab_size))


@pytest.mark.parametrize("method, parameters", [
    ("mask_row", {"json_schema": True}), ("mask_row", {"grammar": "start: /a/"}),
    ("adjust_row", {"repetition_penalty": 1.1}), ("adjust_row", {"logit_bias": {3: 1}}),
])  # fmt: skip
def test_an_artifact_that_lacks_the_method_refuses_by_the_parameters_name(
    tiny_artifact, tmp_path, method, parameters
):
    methods = [name for name in read_manifest(tiny_artifact)["methods"] if name != method]
    older = runner.load(altered(tiny_artifact, tmp_path / "older", methods=methods))
    (name,) = parameters
    with pytest.raises(RunnerError, match=f"^{name} is given; .* no method {method}: export it"):
        older.generate(PROMPT, 5, **parameters)
    assert len(older.generate(PROMPT, 5).run().token_ids) == 5


# Without an artifact: a vocabulary of bytes


class Bytes:
    """A token for each printable byte, after an end and one of two bytes."""

    eos_token_ids = [0]
    data = [None, b'{"', *(bytes([i]) for i in range(32, 127))]

    def token_bytes(self, token_id):
        return self.data[token_id]

    def encode(self, text, add_special_tokens=True):
        return [self.data.index(bytes([byte])) for byte in text.encode()]


def grammars() -> Grammars:
    return Grammars(Bytes(), 97)


def allowed(restriction) -> set[int]:
    bits = np.unpackbits(restriction.allowed(mask_bytes(97)), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def restriction_of(**parameters) -> Restriction:
    request = Request([5], **parameters)
    return Restriction(request, [5], grammars().matcher(request))


def test_a_token_is_allowed_whatever_it_is_cut_from_and_control_tokens_never():
    start = Bytes.data.index(b"{")
    restriction = restriction_of(json_schema={"const": {"!": 1}})
    assert allowed(restriction) == {start, 1}
    restriction.see(1)
    assert allowed(restriction) == {Bytes.data.index(b"!")}


def test_after_its_end_only_an_end_token_is_allowed_and_then_anything():
    restriction = restriction_of(grammar='start: "A"')
    restriction.see(Bytes.data.index(b"A"))
    assert allowed(restriction) == {0} and restriction.masks
    restriction.see(0)
    assert not restriction.masks and restriction.fault is None


@pytest.mark.parametrize(
    "parameters, reason",
    [
        ({"json_schema": {"type": "strin"}}, "json_schema cannot be followed: Invalid type: strin"),
        ({"json_schema": {"not": {}}}, 'json_schema cannot .* Unimplemented keys: ."not".'),
        ({"json_schema": {"type": "string", "pattern": "("}}, "json_schema cannot be followed: "),
        ({"json_schema": {"$ref": "https://localhost/"}}, "json_schema cannot .* not fetch"),
        ({"json_schema": False}, "json_schema cannot be followed: "),
        ({"grammar": "nonsense"}, "grammar cannot be followed: "),
    ],
)
def test_a_grammar_that_is_none_is_refused_in_one_line(parameters, reason):
    with pytest.raises(RunnerError, match=reason) as refused:
        restriction_of(**parameters)
    assert "\n" not in str(refused.value)


def test_a_schema_that_goes_down_deep_ends_no_process():
    """llguidance's stack is used up by it, if that is a usual one."""
    definitions = {
        f"d{i}": {"type": "array", "items": {"$ref": f"#/$defs/d{i + 1}"}} for i in range(5000)
    }
    schema = {"$ref": "#/$defs/d0", "$defs": definitions | {"d5000": {"type": "null"}}}
    assert restriction_of(json_schema=schema).masks
    assert threading.stack_size() == 0


def test_without_an_end_token_there_is_no_grammar(monkeypatch):
    monkeypatch.setattr(Bytes, "eos_token_ids", [])
    with pytest.raises(RunnerError, match="no token that ends a text"):
        restriction_of(json_schema=True)


@pytest.mark.parametrize(
    "parameters, reason",
    [
        ({"logit_bias": {"5": 1}}, "logit_bias is "),
        ({"logit_bias": {5: float("inf")}}, "finite number for each"),
        ({"logit_bias": {-1: 1}}, "logit_bias is "),
        ({"logit_bias": {97: 1}}, "logit_bias has the token id 97; ids are 0 to 96"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a finite number above 0"),
        ({"repetition_penalty": True}, "repetition_penalty is True"),
        ({"presence_penalty": "x"}, "presence_penalty is 'x'; it must be a finite number"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty is nan"),
        ({"json_schema": "{}"}, "json_schema is '{}'; it must be a JSON schema, an object or True"),
        ({"grammar": 5}, "grammar is 5; it must be a text"),
        ({"grammar": "start: /a/", "json_schema": True}, "json_schema and grammar are given"),
    ],
)
def test_wrong_values_are_refused(parameters, reason):
    model = yielding_model()
    with pytest.raises(RunnerError, match=reason):
        model.generate([5], **parameters)


def test_what_asks_for_nothing_is_no_restriction():
    request = Request(
        [5], repetition_penalty=1, presence_penalty=0, frequency_penalty=0.0, logit_bias={}
    )
    assert request.adjusts == request.masks == [] and grammar_of(request) is None


def test_a_row_whose_grammar_is_broken_ends_alone(monkeypatch):
    model = yielding_model()
    model.tokenizer.eos_token_ids = [0]
    model.grammars = grammars()
    plain = [Request([5 + i], 9) for i in range(2)]
    expected = [model.generate(request).run().token_ids for request in plain]
    # As if no token that is allowed had a number above -inf.
    monkeypatch.setattr("tests.threads.CHANGED", {"mask": lambda logits, allowed: logits})
    wrong = Request([7], 9, grammar='start: "AAAA"')
    with pytest.raises(RunnerError, match="does not allow the token"):
        model.generate(wrong).run()
    results = model.generate_batch([plain[0], wrong, plain[1]]).run()
    assert results[1].finish_reason == "error" and "does not allow" in results[1].error
    assert results[1].token_ids == []
    assert [results[0].token_ids, results[2].token_ids] == expected
