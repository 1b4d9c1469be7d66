"""Tiny checkpoints of every kind give transformers' greedy ids on every backend of a CPU:
python -m tests.compare_backends --backend portable xnnpack

A checkpoint of each model_type as Hugging Face has it, and of each architecture as GGUF, is
exported in float32 as a user would, and runs a prompt in chunks and some steps. Its pooled output
is the last hidden state, where the backend gives one. What a backend does not take is counted as
refused, with the reason.

Prints a line for each and a table, and writes JSON with --save. An export takes 3 to 60 seconds.
"""

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

from tests.conftest import VOCAB_SIZE, write_byte_tokenizer
from tests.export.programs import GreedyExport
from tests.export.test_gguf_architectures import MODELS, gguf_tensors, tiny, write
from tests.models.tiny_models import TYPICAL, make_reference, model_type_of
from tests.tiny_checkpoints import byte_level_keys
from tokenloop.export import command
from tokenloop.export.errors import ExportError
from tokenloop.export.pte import pte_artifact
from tokenloop.runner import load

BACKENDS = "portable", "xnnpack", "inductor"
PROMPT, STEPS, MAX_PREFILL = 19, 8, 5


class Case(NamedTuple):
    """A checkpoint's name, what writes it to a path, and transformers' model of it."""

    name: str
    path: Path
    model: torch.nn.Module


def directories(parent: Path) -> Iterator[Case]:
    """A Hugging Face directory of each model_type."""
    for case in TYPICAL:
        path = parent / model_type_of(case)
        changes = {"vocab_size": VOCAB_SIZE}
        model = make_reference(case, **changes)
        model.save_pretrained(path)
        write_byte_tokenizer(path, ["<|endoftext|>", "<|im_end|>", "<|im_start|>"])
        (path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
        yield Case(f"{model_type_of(case)}, Hugging Face", path, model)


def files(parent: Path) -> Iterator[Case]:
    """A GGUF file of each architecture, and of each kind of model that is one."""
    keys = {f"/tokenizer.ggml.{key}": value for key, value in byte_level_keys().items()}
    keys["/tokenizer.ggml.token_type"] = keys["/tokenizer.ggml.token_type"].tolist()
    count = len(keys["/tokenizer.ggml.tokens"])
    for i, case in enumerate(MODELS):
        sizes = {"vocab_size": count}
        if case.changes.get("vocab_size_per_layer_input") == 97:
            sizes["vocab_size_per_layer_input"] = count
        model = tiny(case._replace(changes=case.changes | sizes))
        tensors = gguf_tensors(model, case.permuted, case.architecture)
        values = {"attention.key_length": case.changes.get("head_dim")} | case.header | keys
        path = write(parent / f"{i}.gguf", case.architecture, tensors, **values)
        yield Case(f"{case.architecture}, GGUF of {model.config.model_type}", path, model)


def outcome_of(case: Case, backend: str, directory: Path) -> tuple[str, str]:
    """(same, refused or wrong; what is to be said of it)."""
    output = directory / "artifact"
    arguments = [
        "--model", case.path, "--backend", backend, "--quant", "fp32", "--output", output,
        "--max-seq-len", PROMPT + STEPS + 3, "--max-prefill", MAX_PREFILL,
    ]  # fmt: skip
    pooled = backend in command.POOLING
    arguments += ["--pooled"] * pooled
    options = command.parse_arguments(command.ANY, [str(each) for each in arguments])
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")
            patch.setattr(pte_artifact, "SelectionExport", GreedyExport)
            command.export(command.ANY, options, lambda _: None)
    except ExportError as error:
        return "refused", str(error)
    vocab_size = case.model.config.vocab_size
    ids = torch.randint(4, vocab_size, (PROMPT,), generator=torch.Generator().manual_seed(1))
    expected = greedy(case.model, ids.tolist())
    model = load(output)
    ends = set(model.manifest["tokenizer"]["eos_token_ids"])
    count = next((i for i, token in enumerate(expected) if token in ends), STEPS)
    found = list(model.generate(ids.tolist(), max_new_tokens=STEPS).run().token_ids)
    if found != expected[:count]:
        return "wrong", f"{found}, not {expected[:count]}"
    if pooled:
        with torch.no_grad():
            last = case.model.model(ids[None]).last_hidden_state[:, -1]
        off = np.abs(model.embed([ids.numpy()]) - F.normalize(last, dim=-1).numpy()).max()
        if off > 1e-4:
            return "wrong", f"the pooled output is off by {off}"
    return "same", f"{count} ids, {len(set(found))} different"


@torch.no_grad()
def greedy(model: torch.nn.Module, ids: list[int]) -> list[int]:
    """The next tokens, each after a pass over all before."""
    given = len(ids)
    for _ in range(STEPS):
        ids = [*ids, int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())]
    return ids[given:]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.compare_backends", description=__doc__)
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, default=BACKENDS)
    parser.add_argument("--only", default="", help="a part of the checkpoints' names")
    parser.add_argument("--save", type=Path, help="a file for the JSON line")
    options = parser.parse_args()
    found: dict[str, dict[str, str]] = {}
    wrong, start = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        parent = Path(directory)
        for case in (*directories(parent), *files(parent)):
            if options.only not in case.name:
                continue
            for backend in options.backend:
                with tempfile.TemporaryDirectory() as output:
                    outcome, said = outcome_of(case, backend, Path(output))
                print(f"{outcome:8} {case.name}, {backend} {said}", flush=True)
                found.setdefault(case.name, {})[backend] = outcome
                wrong += outcome == "wrong"
    result = {
        "script": "compare_backends", "transformers": transformers.__version__,
        "seconds": round(time.perf_counter() - start, 1), "outcomes": found,
    }  # fmt: skip
    print(json.dumps(result))
    if options.save is not None:
        options.save.write_text(json.dumps(result) + "\n", encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
