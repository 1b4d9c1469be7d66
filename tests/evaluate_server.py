"""lm-eval's client against the server, and lm-eval's transformers on the same checkpoint: do they
give the same numbers?

    pip install 'lm-eval[api,hf]'
    python -m tests.evaluate_server --checkpoint CHECKPOINT --artifact ARTIFACT --save lm_eval.json

ARTIFACT is CHECKPOINT's in float32. The tasks are those of tests/data/evaluation: ends of sentences
to choose from, how likely whole sentences are, and text up to a stop. The server is asked in every
way that lm-eval has: one prompt at a time and several, several requests at a time, prompts as ids
and as texts. Log probabilities must be those of transformers but for rounding, generated texts must
be equal, and all ways must give the same bits. The exit status is 1 if not.

lm-eval brings 45 packages, so `.[test]` leaves it out.
"""

import argparse
import datetime
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.serving import running
from tokenloop.runner import Model, load

DATA = Path(__file__).resolve().parent / "data" / "evaluation"
# Sums of up to 150 float32 log probabilities, which the two compute in different orders.
RELATIVE = 2e-5
WAYS = {
    "ids, one at a time": {"batch_size": 1},
    "ids, five at a time": {"batch_size": 5},
    "ids, three requests of two at a time": {"batch_size": 2, "num_concurrent": 3},
    "texts, five at a time": {"batch_size": 5, "tokenized_requests": False},
}

# The answers to each task's requests, in their order: (log probability, whether it is what greedy
# decoding gives), a log probability, or a text.
Answers = dict[str, list[Any]]


def tasks() -> list[dict[str, Any]]:
    """What lm-eval is told of the tasks. Their data lie beside them."""
    import yaml

    found = []
    for path in sorted(DATA.glob("*.yaml")):
        task = yaml.safe_load(path.read_text(encoding="utf-8"))
        files = task["dataset_kwargs"]["data_files"]
        task["dataset_kwargs"]["data_files"] = {k: str(DATA / name) for k, name in files.items()}
        found.append(task)
    return found


def answers_of(kind: str, arguments: dict[str, Any], batch_size: int) -> tuple[Answers, dict]:
    """What a model of lm-eval's answers, and the metrics of that by task."""
    # Nothing is looked for on the hub, and nothing of the user's is touched.
    with tempfile.TemporaryDirectory() as cache:
        os.environ |= {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        os.environ |= {"HF_DATASETS_CACHE": cache, "TOKENIZERS_PARALLELISM": "false"}
        from lm_eval import simple_evaluate

        found = simple_evaluate(
            kind, arguments, tasks=tasks(), batch_size=batch_size, device="cpu", bootstrap_iters=0
        )
    answers = {}
    for task, samples in found["samples"].items():
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        answers[task] = [resps[0] for sample in samples for resps in sample["resps"]]
    metrics = {
        task: {k.split(",")[0]: v for k, v in values.items() if isinstance(v, float)}
        for task, values in found["results"].items()
    }
    return answers, metrics


def served(port: int, tokenizer: str, model: Model, bos: bool, batch_size: int, **arguments):
    """As `answers_of`, of the server."""
    arguments |= {
        "model": "toy", "base_url": f"http://127.0.0.1:{port}/v1/completions", "max_retries": 1,
        "tokenizer": tokenizer, "tokenizer_backend": "huggingface", "add_bos_token": bos,
        "max_length": model.max_seq_len,
    }  # fmt: skip
    return answers_of("local-completions", arguments, batch_size)


def write_tokenizer(checkpoint: Path, directory: Path) -> None:
    """The checkpoint's tokenizer.json as it stands: transformers may make another tokenizer of it
    by the model's type."""
    from transformers import PreTrainedTokenizerFast

    config = json.loads((checkpoint / "tokenizer_config.json").read_text(encoding="utf-8"))
    names = {name: config[name] for name in ("bos_token", "eos_token") if name in config}
    file = str(checkpoint / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file, **names).save_pretrained(directory)


def difference(found: Answers, expected: Answers) -> dict[str, dict[str, float]]:
    """By task: how many requests, how many answers of them are other ones, and how far log
    probabilities are apart."""
    assert found.keys() == expected.keys()
    differences = {}
    for task, right in expected.items():
        assert len(found[task]) == len(right) > 0
        others, apart = 0, 0.0
        for a, b in zip(found[task], right):
            if isinstance(b, str):
                others += a != b
                continue
            (a, greedy), (b, right_greedy) = (
                one if isinstance(one, tuple) else (one, None) for one in (a, b)
            )
            others += greedy != right_greedy or abs(a - b) > RELATIVE * abs(b)
            apart = max(apart, abs(a - b))
        differences[task] = {"requests": len(right), "others": others, "largest": apart}
    return differences


def compare(checkpoint: Path, artifact: Path) -> dict[str, Any]:
    """What transformers and the server answer, in all ways."""
    with tempfile.TemporaryDirectory() as tokenizer:
        write_tokenizer(checkpoint, Path(tokenizer))
        return compare_with(checkpoint, artifact, tokenizer)


def compare_with(checkpoint: Path, artifact: Path, tokenizer: str) -> dict[str, Any]:
    """As `compare`, with the directory of lm-eval's tokenizer."""
    model = load(artifact)
    # As the artifact's tokenizer begins a text.
    bos = len(model.tokenizer.encode("")) > 0
    reference = {"pretrained": str(checkpoint), "dtype": "float32", "add_bos_token": bos}
    reference |= {"max_length": model.max_seq_len, "tokenizer": tokenizer}
    expected, metrics = answers_of("hf", reference, 1)
    result = {"artifact": artifact.name, "rows": model.batch, "metrics": {"transformers": metrics}}
    first = None
    with running(model) as server:
        for way, arguments in WAYS.items():
            if bos and not arguments.get("tokenized_requests", True):
                continue  # lm-eval's texts have the token, and the server puts one before them.
            found, metrics = served(server.port, tokenizer, model, bos, **arguments)
            if first is None:
                first, result["tasks"] = found, difference(found, expected)
                result["metrics"]["server"] = metrics
            result.setdefault("ways_with_the_same_bits", {})[way] = found == first
    return result


def is_right(result: dict[str, Any]) -> bool:
    same = all(result["ways_with_the_same_bits"].values())
    return same and not any(task["others"] for task in result["tasks"].values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--checkpoint", type=Path, action="append", required=True)
    parser.add_argument("--artifact", type=Path, action="append", required=True)
    parser.add_argument("--save", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    from importlib.metadata import version

    results = [compare(*pair) for pair in zip(options.checkpoint, options.artifact, strict=True)]
    found = {
        "lm_eval": version("lm_eval"), "transformers": version("transformers"),
        "results": results, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    line = json.dumps(found)
    print(line)
    if options.save is not None:
        options.save.write_text(line + "\n", encoding="utf-8")
    return 0 if all(map(is_right, results)) else 1


if __name__ == "__main__":
    sys.exit(main())
