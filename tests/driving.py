"""What tests of whole packages share: prompts, variants of the loop, and what comes of them."""

import itertools
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import torch

from tokenloop.export.artifact import seal
from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.runner import LoopOptions, Request

# Chunks are of 7 tokens and the window is 16: within one, across both, and the least.
PROMPTS = [[2], [2, 70, 71], [2, *range(60, 79)], [2, *(i * 37 % 256 + 3 for i in range(50))]]
SAMPLED = {"temperature": 0.9, "top_k": 60, "top_p": 0.9, "seed": 7}


def variants(
    feeds: Iterable[str] = ("embed", "alias", "host"), graphs: Iterable[bool] = (True,)
) -> list[LoopOptions]:
    """Every way to feed a step and give it its position, with double buffering and without; steps
    that run ahead; and, where there are graphs, one whose kernels do not overlap."""
    ways = itertools.product(graphs, feeds, ("device", "host"), (True, False))
    every = [LoopOptions(*way, run_ahead=1, graph=graph) for graph, *way in ways]
    every += [LoopOptions(double_buffering=ahead, run_ahead=4) for ahead in (True, False)]
    return every + [LoopOptions(overlap=False)] * (False in graphs)


def ids_of(model, prompt, count=60, options=None, **parameters) -> list[int]:
    return model.generate(prompt, count, options=options, **parameters).run().token_ids


def assert_rows_are_those_alone(several, alone, options: Iterable[LoopOptions]) -> None:
    """Rows of `several` that join and leave, greedy and sampled, give what the model `alone` gives
    each of them."""
    kinds = [SAMPLED if i % 2 else {} for i in range(2 * len(PROMPTS))]
    counts = [9 + 5 * i for i in range(len(kinds))]
    cases = list(zip(PROMPTS + PROMPTS[::-1], counts, kinds))
    expected = [ids_of(alone, prompt, count, **kind) for prompt, count, kind in cases]
    requests = [Request(prompt, count, **kind) for prompt, count, kind in cases]
    for one in options:
        results = several.generate_batch(requests, one).run()
        assert [result.token_ids for result in results] == expected, one


def eager_ids(networks: ModuleType, directory: Path, prompt: list[int], count: int) -> list[int]:
    """The greedy ids of a checkpoint's network itself, of a module of models/, on the CPU."""
    checkpoint = open_checkpoint(directory)
    with torch.device("meta"):
        network = networks.Network(networks.Config.from_dict(checkpoint.config), 200)
    load_weights(network, checkpoint, networks.checkpoint_name)
    ids = []
    with torch.no_grad():
        for position in range(len(prompt) + count - 1):
            token = (prompt + ids)[position]
            logits = network.decode(torch.tensor([[token]]), torch.tensor([position]))
            if position >= len(prompt) - 1:
                ids.append(logits.argmax().item())
    return ids


def altered(artifact: Path, copy: Path, **entries) -> Path:
    """The artifact's copy with these entries in its manifest, as if an export had written it."""
    shutil.copytree(artifact, copy)
    seal(copy, read_manifest(copy) | entries)
    return copy


def read_manifest(artifact: Path) -> dict:
    return json.loads((artifact / "manifest.json").read_text(encoding="utf-8"))


def resealed(artifact: Path) -> Path:
    """The artifact, whose manifest now says what its files are."""
    seal(artifact, read_manifest(artifact))
    return artifact
