"""What is a draft model worth? Qwen3-0.6B's shape with random weights in bf16, on a CUDA GPU, and
drafts of models with its first layers: milliseconds of a token with and without them.

No checkpoints agree as a small and a large one of a family do, so agreement is made: the layers
after the draft's first ones add nothing in the network that it drafts for, which takes no less
time for it. Drafts of other weights never hold. A model that drafts for itself always agrees, and
costs as much as what it saves. `python -m benchmarks.draft_model` prints a row for each, greedy and
sampled, and one JSON line. All ids must be those of the plain loop. The target is 0.97 x at least.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.cuda_common import CONFIGS, PROMPT, ROOT, origin, save
from benchmarks.speculation import measure, table
from tokenloop import runner
from tokenloop.runner import Request

CONFIG, LAYERS = "qwen3-0.6b", 4
TEXTS = {"greedy": {}, "temperature 1": {"temperature": 1.0}}


def exported(directory: Path, drafts: int) -> tuple[Path, Path]:
    """Artifacts of the network and of one with its first layers."""
    config = json.loads((CONFIGS / f"{CONFIG}.json").read_text(encoding="utf-8"))
    found, running = [], []
    for layers, flags in (config["num_hidden_layers"], ["--draft-tokens", drafts]), (LAYERS, []):
        path = directory / f"{layers}.json"
        path.write_text(json.dumps(config | {"num_hidden_layers": layers}), encoding="utf-8")
        output = directory / f"layers-{layers}"
        found.append(output)
        if output.exists():
            continue
        command = [sys.executable, ROOT / "export/qwen3.py", "--device", "cuda"]
        command += ["--random-weights", path, "--output", output, "--max-seq-len", 1024, *flags]
        running.append(subprocess.Popen([str(part) for part in command]))
    for process in running:
        if process.wait():
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
    return found[0], found[1]


def agree(tensors: dict, draft: dict) -> None:
    """Give the network the draft's layers, after which the others add nothing."""
    for name, tensor in draft.items():
        if name in tensors and tensor.is_floating_point() and "cache" not in name:
            tensors[name].copy_(tensor)
    for name, tensor in tensors.items():
        part = name.split(".")
        if part[0] == "layers" and int(part[1]) >= LAYERS and part[2] in ("o", "down"):
            tensor.zero_()
    torch.cuda.synchronize()


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.draft_model", description=__doc__.split("?")[0]
    )
    parser.add_argument("--draft-tokens", type=int, default=7, metavar="K")
    parser.add_argument("--tokens", type=int, default=257, metavar="N")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument(
        "--artifacts", type=Path, metavar="DIR", help="where they are, or are exported to"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    requests = {name: Request(PROMPT, options.tokens, **kind) for name, kind in TEXTS.items()}
    rows, costs = [], {}
    with tempfile.TemporaryDirectory() as made:
        directory = options.artifacts or Path(made)
        directory.mkdir(exist_ok=True)
        network, first = exported(directory, options.draft_tokens)
        model = runner.load(network)
        model.tokenizer.eos_token_ids.clear()
        tensors = model.loop.program.tensors
        for name, path in {"other weights": first, "its layers": first, "itself": network}.items():
            model.use_draft(path)
            draft = model.loop.draft
            own = draft.program.tensors
            if name == "its layers":
                agree(tensors, own)
            elif name == "itself":
                for key, tensor in own.items():
                    tensor.copy_(tensors[key])
                torch.cuda.synchronize()
            costs[name] = draft.cost
            most = (1 + options.draft_tokens) / draft.cost
            print(f"{name}: a round costs {draft.cost:.2f} steps; at most {most:.2f} x", flush=True)
            found = measure(model, requests, options.repeats, "draft")
            rows += [{"model": name} | row for row in found]
    Console(width=110).print(table(rows))
    save({**origin("draft model"), "draft_cost": costs, "rows": rows}, options.output)
    return 0 if all(row["identical"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
