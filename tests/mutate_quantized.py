"""Changed quantized checkpoints are read or refused in one line: python -m tests.mutate_quantized

Each is a file of tests/data/quantized with a setting or a tensor that is another or missing. It is
opened, and its weights and grids are read, in this process. A fault is an exception that is no
ExportError, a message of several lines, and a weight or scales of another shape than was said.
Prints the faults and one JSON line.
"""

import argparse
import json
import random
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from tests.quantized_references import DIRECTORY, LAYER
from tokenloop.export.checkpoint import open_checkpoint
from tokenloop.export.errors import ExportError

REFERENCES = sorted(DIRECTORY.glob("*.safetensors"))
NAME = f"{LAYER}.weight"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutate_quantized", description=__doc__)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(options.seed, options.seed + options.count):
            try:
                outcomes[outcome(mutated(Path(temporary, "model"), seed))] += 1
            except Exception:
                print(f"seed {seed}:\n{traceback.format_exc()}")
                outcomes["fault"] += 1
    print(json.dumps({"count": options.count, "seed": options.seed, "outcomes": outcomes}))
    return 1 if outcomes["fault"] else 0


def directory(path: Path, config: dict, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint of these tensors, whose quantization_config is `config`."""
    path.mkdir(exist_ok=True)
    config = {"model_type": "llama", "quantization_config": config}
    (path / "config.json").write_text(json.dumps(config))
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, path / "model.safetensors"
    )
    return path


def reference(file: Path) -> tuple[dict, dict[str, torch.Tensor], torch.Tensor]:
    """quantization_config, tensors and the expected weight of a file of REFERENCES."""
    with safe_open(file, "pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in sorted(opened.keys())}
        config = json.loads(opened.metadata()["config"])
    return config, tensors, tensors.pop("expected")


def mutated(path: Path, seed: int) -> Path:
    """A reference with a setting or a tensor that is another or missing."""
    rng = random.Random(seed)
    config, tensors, _ = reference(rng.choice(REFERENCES))
    name = rng.choice(sorted(tensors))
    match rng.randrange(6):
        case 0:
            del tensors[name]
        case 1:
            size = lambda: rng.choice([0, 1, 2, 4, 32, 33, 128, 129])  # noqa: E731
            shape = [size() for _ in range(rng.randrange(4))]
            tensors[name] = torch.zeros(shape, dtype=tensors[name].dtype)
        case 2:
            dtypes = torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.float32
            tensors[name] = tensors[name].float().to(rng.choice(dtypes))
        case 3:
            raw = tensors[name].clone().flatten().view(torch.uint8)
            raw[rng.randrange(len(raw))] = rng.randrange(256)
            tensors[name] = raw.view(tensors[name].dtype).view(tensors[name].shape)
        case 4:
            inner = config
            while True:
                key = rng.choice(sorted(inner))
                if not (isinstance(inner[key], dict) and inner[key] and rng.random() < 0.8):
                    break
                inner = inner[key]
            values = None, True, -1, 0, 1, 2, 3, 10**30, 0.5, "x", "group", "tensor", [], [16], {}
            inner[key] = rng.choice(values)
        case 5:
            tensors[name + rng.choice(["_scale", ".absmax", "_blocks", "x"])] = torch.zeros(2)
    return directory(path, config, tensors)


def outcome(path: Path) -> str:
    """What comes of the checkpoint: "read" or "refused". Raises AssertionError for a fault."""
    try:
        for tensor in open_checkpoint(path).stored.values():
            assert tuple(tensor.read().shape) == tensor.shape
            if tensor.grid is not None and (grid := tensor.grid()) is not None:
                groups = tensor.shape[1] // grid.group_size
                assert grid.scales().shape == (tensor.shape[0], groups)
    except ExportError as error:
        assert "\n" not in str(error)
        return "refused"
    return "read"


if __name__ == "__main__":
    sys.exit(main())
