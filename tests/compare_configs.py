"""Configs at random give transformers' logits, or are refused by a field's name:
python -m tests.compare_configs

A config of tests/random_configs.py is read by models/ and by transformers. If models/ reads it, a
prompt in two chunks and some steps give the logits of transformers' one pass over random weights.
If not, the refusal is one line that names a key of the config, or one that it lacks. Where only
transformers refuses, there is nothing to compare with, and it is counted.

Prints what differs, a table, and one JSON line. 1,000 configs take about a minute on one core.
"""

import argparse
import json
import re
import time
import traceback
from collections import Counter
from functools import partial
from pathlib import Path
from random import Random

import torch
import transformers

from tests.models.eager import feed, prefill, prompt
from tests.models.tiny_models import ROW_OF, randomize
from tests.random_configs import MODEL_TYPES, random_config
from tokenloop.export.checkpoint import Checkpoint, StoredTensor, load_weights
from tokenloop.export.checkpoint.network import names_of
from tokenloop.models.config_fields import FIELDS, ROPE_FIELDS

LENGTH, CHUNKED = 20, 14
NAMES = FIELDS.keys() | ROPE_FIELDS.keys()
ROWS = {name: row for row in ROW_OF.values() for name in row.classes}


def outcome_of(config: dict) -> tuple[str, str]:
    """(read, refused, only ours, or wrong; what is to be said of it)."""
    row = ROWS[config["model_type"]]
    try:
        row.networks.Config.from_dict(config)
    except ValueError as error:
        message = str(error)
        named = set(re.findall(r"\w+", message)) & (NAMES | config.keys() | {"alpha"})
        return ("refused" if named and "\n" not in message else "wrong"), message
    except Exception:
        return "wrong", traceback.format_exc(limit=-3)
    try:
        hf = reference(config)
        expected = hf(prompt(LENGTH, vocabulary=31)).logits[0]
    # Whatever it cannot run, it says in ways of its own.
    except Exception as error:
        return "only ours", f"{type(error).__name__}: {error}"
    if not expected.isfinite().all():
        return "only ours", "no finite logits"
    try:
        return compared(config, hf, expected)
    except Exception:
        return "wrong", traceback.format_exc(limit=-3)


def reference(config: dict) -> torch.nn.Module:
    """transformers' model of a config, with random weights."""
    row = ROWS[config["model_type"]]
    config_class, model_class = row.classes[config["model_type"]]
    given = {key: value for key, value in config.items() if key != "model_type"}
    model = model_class._from_config(
        config_class.from_dict(json.loads(json.dumps(given))), attn_implementation="eager",
        experts_implementation="eager", dtype=torch.float32,
    )  # fmt: skip
    randomize(model, row)
    return model.eval().requires_grad_(False)


def compared(config: dict, hf: torch.nn.Module, expected: torch.Tensor) -> tuple[str, str]:
    row = ROWS[config["model_type"]]
    read = row.networks.Config.from_dict(config)
    with torch.device("meta"):
        model = row.networks.Network(read, LENGTH)
    stored = {
        name: StoredTensor(tuple(tensor.shape), "F32", partial(torch.clone, tensor))
        for name, tensor in hf.state_dict().items()
    }
    checkpoint = Checkpoint(Path("random"), "safetensors", config, (), stored)
    load_weights(model, checkpoint, names_of(row.networks, model))
    tokens = prompt(LENGTH, vocabulary=31)
    size = min(model.max_chunk, 9)
    ends = [*range(size, CHUNKED, size), CHUNKED]
    logits = torch.cat(prefill(model, tokens, ends) + feed(model, tokens, CHUNKED))
    wanted = expected[[end - 1 for end in ends] + list(range(CHUNKED, LENGTH))]
    largest = wanted.abs().max().item()
    difference = (logits - wanted).abs().max().item()
    if difference <= 2e-4 * max(largest, 1.0):
        return "read", ""
    return "wrong", f"logits differ by {difference} of {largest}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="configs; 1000")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the first; 0")
    parser.add_argument("--save", type=Path, metavar="FILE", help="the JSON line, in a file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    counts = {name: Counter() for name in MODEL_TYPES}
    begin, wrong = time.perf_counter(), []
    for seed in range(options.seed, options.seed + options.count):
        rng = Random(seed)
        model_type = rng.choice(MODEL_TYPES)
        config = random_config(rng, model_type)
        outcome, said = outcome_of(config)
        counts[model_type][outcome] += 1
        if outcome == "wrong":
            wrong.append({"seed": seed, "config": config, "said": said})
            print(f"{seed} {json.dumps(config)}\n  {said}", flush=True)
    for name, counter in counts.items():
        print(f"{name:20}", dict(counter))
    result = {
        "script": "compare_configs", "transformers": transformers.__version__,
        "count": options.count, "seed": options.seed,
        "seconds": round(time.perf_counter() - begin, 1),
        "outcomes": {name: dict(counter) for name, counter in counts.items()}, "wrong": wrong,
    }  # fmt: skip
    line = json.dumps(result)
    print(line)
    if options.save:
        options.save.write_text(line + "\n")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
