"""JSON of random schemas, from a model that babbles: each output must be JSON that fits.

    python -m tests.random_schemas --artifact ARTIFACT --count 1000 --seed 0

Any artifact will do: one of random weights babbles by itself, another at a high --temperature.
Rows without a grammar run beside those with one, and must give what they give alone. The exit
status is 1 if any output does not fit, is cut short, or differs. The last line is JSON.
"""

import argparse
import json
import random
import string
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema

from tokenloop import runner
from tokenloop.runner import Model, Request

MAX_NEW_TOKENS = 6000


def random_schema(draw: random.Random, depth: int = 3) -> dict[str, Any]:
    """A schema whose documents have an end: no string, list or object of any length."""
    kinds = [a_text, a_choice, an_integer, a_number, a_truth, a_pattern]
    if depth:
        kinds += [an_array, an_object, an_object, an_alternative]
    return draw.choice(kinds)(draw, depth)


def a_text(draw, depth):
    low = draw.randint(0, 4)
    return {"type": "string", "minLength": low, "maxLength": low + draw.randint(0, 12)}


def a_pattern(draw, depth):
    patterns = r"^[a-z]{1,5}$", r"^\d{4}-\d{2}$", r"^(ab|ö|\\\\|\")+x{2}$", r"^.{0,3}$"
    formats = "date", "uuid", "ipv4", "time"
    if draw.random() < 0.5:
        return {"type": "string", "format": draw.choice(formats)}
    return {"type": "string", "pattern": draw.choice(patterns)}


def a_choice(draw, depth):
    values = ["a", 'quote " and \\', "ö😀", "", 0, -7, 1.5, True, None, [], {"k": [1]}, "a b"]
    if draw.random() < 0.3:
        return {"const": draw.choice(values)}
    return {"enum": draw.sample(values, draw.randint(1, 4))}


def an_integer(draw, depth):
    low = draw.randint(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 10**6)}


def a_number(draw, depth):
    return {"type": "number"} | draw.choice([{}, {"minimum": 0}, {"minimum": -1, "maximum": 2.5}])


def a_truth(draw, depth):
    return {"type": draw.choice(["boolean", "null", ["boolean", "null"]])}


def an_array(draw, depth):
    low = draw.randint(0, 2)
    sizes = {"minItems": low, "maxItems": low + draw.randint(0, 3)}
    return {"type": "array", "items": random_schema(draw, depth - 1)} | sizes


def an_object(draw, depth):
    letters = string.ascii_letters + 'é "_-$'
    names = {
        "".join(draw.choices(letters, k=draw.randint(1, 8))) for _ in range(draw.randint(0, 4))
    }
    names = sorted(names)
    return {
        "type": "object", "additionalProperties": False,
        "properties": {name: random_schema(draw, depth - 1) for name in names},
        "required": [name for name in names if draw.random() < 0.6],
    }  # fmt: skip


def an_alternative(draw, depth):
    return {"anyOf": [random_schema(draw, depth - 1) for _ in range(draw.randint(2, 3))]}


def with_definition(draw: random.Random, schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as one that refers to it, as pydantic writes them."""
    properties = {"one": {"$ref": "#/$defs/D"}, "two": {"$ref": "#/$defs/D"}}
    return {
        "$defs": {"D": schema}, "type": "object", "properties": properties,
        "required": draw.choice([["one"], ["one", "two"]]), "additionalProperties": False,
    }  # fmt: skip


def requests_of(count: int, seed: int, temperature: float) -> list[Request]:
    """Requests for JSON of random schemas, and a plain one after each fourth."""
    found = []
    for number in range(count):
        draw = random.Random(f"{seed} {number}")
        schema = random_schema(draw)
        if draw.random() < 0.2:
            schema = with_definition(draw, schema)
        choosing = {
            "temperature": temperature * draw.choice((1, 1, 0.5)), "seed": draw.getrandbits(63),
            "top_k": draw.choice((0, 0, 40)), "frequency_penalty": draw.choice((0, 0, 0.2)),
        }  # fmt: skip
        found.append(
            Request(f"Document {number}: ", MAX_NEW_TOKENS, json_schema=schema, **choosing)
        )
        if number % 4 == 0:
            found.append(Request(f"Text {number}: ", 40, temperature=temperature, seed=number))
    return found


def run(model: Model, requests: list[Request]) -> Counter[str]:
    """How the outputs ended: those of schemas "fits", and those of plain requests "same". Whatever
    else there is must not be."""
    plain = [request for request in requests if request.json_schema is None]
    alone = {request.prompt: model.generate(request).run().token_ids for request in plain}
    found: Counter[str] = Counter()
    for result in model.generate_batch(requests).run():
        request = result.request
        if request.json_schema is None:
            same = result.token_ids == alone[request.prompt]
            found["same" if same else "another text"] += 1
        else:
            found[judged(result)] += 1
            found["tokens"] += len(result.token_ids)
    return found


def judged(result) -> str:
    if result.finish_reason != "stop":
        return result.error or result.finish_reason
    try:
        jsonschema.validate(json.loads(result.text), result.request.json_schema)
    except (ValueError, jsonschema.ValidationError) as error:
        print(f"{result.text}\n{result.request.json_schema}\n{error}", file=sys.stderr)
        return type(error).__name__
    return "fits"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--artifact", type=Path, required=True)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=1.0)
    options = parser.parse_args()
    model, start = runner.load(options.artifact), time.process_time()
    requests = requests_of(options.count, options.seed, options.temperature)
    found = run(model, requests)
    right = found["fits"] == options.count and not set(found) - {"fits", "same", "tokens"}
    seconds = round(time.process_time() - start, 1)
    print(
        json.dumps(
            {
                "count": options.count, "seed": options.seed, "temperature": options.temperature,
                "rows": model.batch, "vocabulary": model.vocab_size, **found,
                "processor_s": seconds, "llguidance": version("llguidance"),
            }
        )
    )  # fmt: skip
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
