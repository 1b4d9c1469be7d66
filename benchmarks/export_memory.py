"""Memory that the export of a large checkpoint takes: python -m benchmarks.export_memory

A random checkpoint in bfloat16 is written, of shards of about a gigabyte. The floor is the memory
of the importing process. What is measured is the largest memory of an export's processes that
belongs to no file (RssAnon, sampled), for pages of files are given back when others need memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import finish, machine, print_machine
from tests.tiny_checkpoints import write_byte_tokenizer
from tokenloop.models import llama

SHARD_BYTES = 1 << 30
EXPORT = "import sys; from tokenloop.export.command import main; sys.exit(main(sys.argv[1:]))"
SIZES = {
    "4gb": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
# Inductor compiles each layer anew.
SIZES["8b-4-layers"] = SIZES["8b"] | {"num_hidden_layers": 4}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_memory", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="4gb")
    parser.add_argument("--directory", type=Path, help="where there is space for it, twice")
    parser.add_argument("--keep", type=Path, help="where it is written, or was before, and stays")
    parser.add_argument("--save", type=Path, help="a file for the JSON line")
    parser.add_argument("export", nargs="*", help="flags of the export; by default --device cuda")
    options = parser.parse_args()
    found = machine()
    print_machine(found)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        directory = Path(directory)
        checkpoint = options.keep or directory / "checkpoint"
        if not checkpoint.is_dir():
            write_checkpoint(checkpoint, SIZES[options.size])
        size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        largest = max(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
        arguments = options.export or ["--device", "cuda"]
        floor, _ = measure(["-c", "import torch, tokenloop.export.packed_weights"])
        print(f"checkpoint  {size / 1e9:.1f} GB, the largest shard {largest / 1e9:.1f} GB")
        print(f"floor       {floor / 1e9:.2f} GB: torch and the exporter, imported")
        command = ["-c", EXPORT, "--model", str(checkpoint)]
        command += ["--output", str(directory / "artifact"), *arguments]
        peak, seconds = measure(command)
        written = (directory / "artifact" / "model.safetensors").stat().st_size
    print(f"artifact    {written / 1e9:.1f} GB of weights")
    print(f"peak        {peak / 1e9:.2f} GB in {seconds:.0f} s with {' '.join(arguments)}")
    result = {
        "benchmark": "export_memory", "machine": found, "size": options.size, "bytes": size,
        "largest_shard": largest, "export": arguments, "floor_anonymous_bytes": floor,
        "peak_anonymous_bytes": peak, "seconds": round(seconds),
    }  # fmt: skip
    finish(result, options.save)
    return 0


def write_checkpoint(path: Path, shape: dict) -> None:
    """A Llama of that shape with random weights, a shard at a time."""
    path.mkdir()
    config = {
        "model_type": "llama", **shape, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    write_byte_tokenizer(path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    with torch.device("meta"):
        network = llama.Network(llama.Config.from_dict(config), 1)
    weight_map, shard, n_bytes = {}, {}, 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, path / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    generator = torch.Generator().manual_seed(0)
    # Random numbers take longer than everything else: a few are repeated.
    numbers = torch.empty(1 << 24).normal_(std=0.02, generator=generator).bfloat16()
    for name, parameter in network.named_parameters():
        count = parameter.numel()
        repeated = numbers.repeat(-(-count // len(numbers)))[:count]
        shard[name] = repeated.view(parameter.shape)
        n_bytes += 2 * count
        if n_bytes >= SHARD_BYTES:
            flush()
            n_bytes = 0
    if shard:
        flush()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def measure(arguments: list[str]) -> tuple[int, float]:
    """The largest RssAnon, in bytes, of a Python process and its children together, and seconds."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments])
    peak = 0
    while process.poll() is None:
        peak = max(peak, sum(anonymous(pid) for pid in family(process.pid)))
        time.sleep(0.1)
    if process.returncode:
        raise SystemExit(f"{' '.join(arguments)} ended with {process.returncode}")
    return peak, time.perf_counter() - start


def family(pid: int) -> list[int]:
    """The process and all that descend from it."""
    found = [pid]
    for parent in found:
        try:
            tasks = Path(f"/proc/{parent}/task").iterdir()
            children = [(task / "children").read_text().split() for task in tasks]
        except FileNotFoundError:
            continue  # It has ended.
        found += [int(child) for some in children for child in some]
    return found


def anonymous(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


if __name__ == "__main__":
    sys.exit(main())
