"""Memory that the export of a large checkpoint takes: python -m benchmarks.export_memory

A random checkpoint is written: bfloat16 or float32 in shards of about a gigabyte, or one GGUF file.
The floor is the memory of the importing process. What is measured is the largest memory of an
export's processes that belongs to no file (Pss_Anon and Pss_Shmem, sampled), for pages of files are
given back when others need memory. What processes share counts once: a process that has just begun
as a copy of another one shares all of its memory.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.common import finish, machine, print_machine
from tests.tiny_checkpoints import add_values, sentencepiece_keys, write_byte_tokenizer
from tokenloop.export.checkpoint.gguf_architectures import ARCHITECTURES, NAMES
from tokenloop.models import llama

SHARD_BYTES = 1 << 30
EXPORT = "import sys; from tokenloop.export.command import main; sys.exit(main(sys.argv[1:]))"
SIZES = {
    "300m": {
        "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000,
    },
    "4gb": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32_000,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128_256,
    },
}  # fmt: skip
DIRECTORIES = {"bf16": torch.bfloat16, "fp32": torch.float32}
KINDS = *DIRECTORIES, "F16", "Q8_0", "Q4_0"
# Inductor compiles each layer anew.
SIZES["8b-4-layers"] = SIZES["8b"] | {"num_hidden_layers": 4}
SIZES["1b"] = SIZES["300m"] | {"num_hidden_layers": 16}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.export_memory", description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="4gb")
    parser.add_argument("--kind", choices=KINDS, default="bf16", help="of the checkpoint")
    parser.add_argument("--directory", type=Path, help="where there is space for it, twice")
    parser.add_argument("--keep", type=Path, help="where it is written, or was before, and stays")
    parser.add_argument("--save", type=Path, help="a file for the JSON line")
    parser.add_argument("export", nargs="*", help="flags of the export; by default --device cuda")
    options = parser.parse_args()
    found = machine()
    print_machine(found)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        directory = Path(directory)
        is_gguf = options.kind not in DIRECTORIES
        checkpoint = options.keep or directory / ("model.gguf" if is_gguf else "checkpoint")
        if not checkpoint.exists():
            write = write_gguf if is_gguf else write_checkpoint
            write(checkpoint, SIZES[options.size], options.kind)
        files = [checkpoint] if is_gguf else [*checkpoint.glob("*.safetensors")]
        sizes = [file.stat().st_size for file in files]
        size, largest = sum(sizes), max(sizes)
        arguments = options.export or ["--device", "cuda"]
        floor, _ = measure(["-c", "import torch, tokenloop.export.packed_weights"])
        print(f"checkpoint  {size / 1e9:.1f} GB, the largest shard {largest / 1e9:.1f} GB")
        print(f"floor       {floor / 1e9:.2f} GB: torch and the exporter, imported")
        command = ["-c", EXPORT, "--model", str(checkpoint)]
        command += ["--output", str(directory / "artifact"), *arguments]
        peak, seconds = measure(command)
        written = sum(file.stat().st_size for file in (directory / "artifact").iterdir())
    print(f"artifact    {written / 1e9:.1f} GB")
    print(f"peak        {peak / 1e9:.2f} GB in {seconds:.0f} s with {' '.join(arguments)}")
    result = {
        "benchmark": "export_memory", "machine": found, "size": options.size,
        "kind": options.kind, "bytes": size, "largest_shard": largest, "artifact": written,
        "export": arguments, "floor_anonymous_bytes": floor, "peak_anonymous_bytes": peak,
        "seconds": round(seconds),
    }  # fmt: skip
    finish(result, options.save)
    return 0


def config_of(shape: dict) -> dict:
    return {
        "model_type": "llama", **shape, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 5e5, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def parameters_of(shape: dict) -> dict[str, torch.Size]:
    with torch.device("meta"):
        network = llama.Network(llama.Config.from_dict(config_of(shape)), 1)
    return {name: parameter.shape for name, parameter in network.named_parameters()}


def some_numbers() -> torch.Tensor:
    """Random numbers take longer than everything else: these are repeated."""
    return torch.empty(1 << 24).normal_(std=0.02, generator=torch.Generator().manual_seed(0))


def write_checkpoint(path: Path, shape: dict, kind: str) -> None:
    """A Llama of that shape with random weights, a shard at a time."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config_of(shape)))
    write_byte_tokenizer(path / "tokenizer.json")
    (path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    weight_map, shard, n_bytes = {}, {}, 0

    def flush() -> None:
        name = f"model-{len(set(weight_map.values())) + 1:05}.safetensors"
        save_file(shard, path / name)
        weight_map.update(dict.fromkeys(shard, name))
        shard.clear()

    numbers = some_numbers().to(DIRECTORIES[kind])
    for name, size in parameters_of(shape).items():
        count = size.numel()
        shard[name] = numbers.repeat(-(-count // len(numbers)))[:count].view(size)
        n_bytes += shard[name].nbytes
        if n_bytes >= SHARD_BYTES:
            flush()
            n_bytes = 0
    if shard:
        flush()
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def write_gguf(path: Path, shape: dict, kind: str) -> None:
    """The same as GGUF. Norms are float32, and all else is of that type."""
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    header = {
        "block_count": shape["num_hidden_layers"], "context_length": 8192,
        "embedding_length": shape["hidden_size"], "feed_forward_length": shape["intermediate_size"],
        "attention.head_count": shape["num_attention_heads"],
        "attention.head_count_kv": shape["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 5e5,
    }  # fmt: skip
    keys = sentencepiece_keys()
    more = shape["vocab_size"] - len(keys["tokens"])
    keys |= {
        "tokens": [*keys["tokens"], *(f"t{i}" for i in range(more))],
        "scores": -np.arange(shape["vocab_size"], dtype=np.float32),
        "token_type": np.append(keys["token_type"], np.ones(more, np.int32)),
    }
    values = {f"llama.{key}": value for key, value in header.items()}
    add_values(writer, values | {f"tokenizer.ggml.{key}": value for key, value in keys.items()})
    whole = {name: key for key, name in reversed(NAMES.items())}
    parts = {name: key for key, name in ARCHITECTURES["llama"].block_names.items()}
    quantization = gguf.GGMLQuantizationType[kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[quantization]
    numbers = some_numbers().numpy().reshape(-1, 32)
    blocks = gguf.quantize(numbers, quantization).view(np.uint8).reshape(-1, block_bytes)
    for name, size in parameters_of(shape).items():
        key = whole.get(name)
        if key is None:
            layer, part = name.removeprefix("model.layers.").split(".", 1)
            key = f"blk.{layer}.{parts[part.removesuffix('.weight')]}.weight"
        if len(size) == 1:
            writer.add_tensor(key, np.ones(size, np.float32))
        else:
            data = np.resize(blocks, (size.numel() // block, block_bytes))
            writer.add_tensor(key, data.reshape(size[0], -1), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(arguments: list[str]) -> tuple[int, float]:
    """The largest `anonymous` of a Python process and its children together, and seconds."""
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
    """Bytes of a process that belong to no file, and its part of those that it shares."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    kinds = "Pss_Anon:", "Pss_Shmem:"
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


if __name__ == "__main__":
    sys.exit(main())
