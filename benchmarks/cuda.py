"""How fast is a network's decode step on a CUDA GPU, beside torch.compile's reduce-overhead and the
memory's own speed? `python -m benchmarks.cuda` prints the ceiling, the figures, where the time of a
step goes by kernel, and one JSON line.

Weights are random. The peer is the same network of models/, compiled whole with its argmax, with
random weights of its own, its caches static and as long. A step's bytes are the weights that it
reads and the filled part of the caches; shares are of the faster of a copy within the device and
cuBLAS's product of a large matrix with one vector.
"""

import argparse
import gc
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from benchmarks.cuda_common import (
    CONFIGS,
    after_prefill,
    copy_bandwidth,
    decode_ms,
    export,
    idle_share,
    kernel_times,
    origin,
    profiled,
    read_bandwidth,
    save,
)
from tokenloop import runner
from tokenloop.export.random_weights import make_parameters
from tokenloop.models import by_model_type
from tokenloop.runner import LoopOptions


def step_bytes(model, position: int) -> float:
    """Bytes that a step at `position` has to read: every weight once, but of an embedding that is
    not the head as well only a row; and what the caches hold."""
    manifest = model.manifest
    # An embedding that is the head as well goes by the head's name.
    entries = [
        entry
        for entry in manifest["weights"]["random"]
        if not entry["name"].endswith("embed_tokens.weight")
    ]
    size = sum(math.prod(e["shape"]) * getattr(torch, e["dtype"]).itemsize for e in entries)
    for entry in manifest["state"]:
        if len(entry["shape"]) == 4:
            rows, slots, *head = entry["shape"]
            filled = min(position + 1, slots)
            size += rows * filled * math.prod(head) * getattr(torch, entry["dtype"]).itemsize
    return size


def peer_network(manifest: dict) -> nn.Module:
    """The network of models/ that an artifact was made of, with random weights in bfloat16."""
    keys = json.loads((CONFIGS / manifest["checkpoint"]["file"]).read_text())
    module = by_model_type()[keys["model_type"]]
    with torch.device("meta"):
        network = module.Network(
            module.Config.from_dict(keys), manifest["max_seq_len"], manifest["batch"],
            torch.bfloat16,
        )  # fmt: skip
    make_parameters(network, torch.device("cuda"), torch.bfloat16)
    for parameter in network.parameters():
        parameter.normal_(std=0.02)
    return network.cuda().eval()


def peer_ms(network: nn.Module, position: int, steps: int, repeats: int) -> list[float]:
    """Milliseconds of a step of torch.compile's reduce-overhead, tokens kept on the GPU."""

    def step(token, position):
        logits = network.decode(token, position)
        return torch.argmax(logits, -1, keepdim=True), position + 1

    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    times = []
    with torch.no_grad():
        for i in range(repeats + 1):
            token = torch.full((network.batch, 1), 5, device="cuda")
            where = torch.full((network.batch,), position - steps // 2, device="cuda")
            for n in range(steps + 8):
                if n == 8:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                torch.compiler.cudagraph_mark_step_begin()
                token, where = (x.clone() for x in compiled(token, where))
            torch.cuda.synchronize()
            # The first generation compiles.
            if i:
                times.append((time.perf_counter() - start) * 1e3 / steps)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cuda", description=__doc__.split("?")[0]
    )
    parser.add_argument("--config", default="gemma3-270m", help="a name in benchmarks/configs")
    parser.add_argument("--quant", default="bf16", help="of the export (default: bf16)")
    parser.add_argument("--max-seq-len", type=int, default=2048, metavar="N")
    parser.add_argument("--batch", type=int, default=1, metavar="N")
    parser.add_argument("--positions", type=int, nargs="+", default=[256], metavar="N")
    parser.add_argument("--steps", type=int, default=128, metavar="N")
    parser.add_argument("--repeats", type=int, default=7, metavar="N")
    parser.add_argument("--peer", action="store_true", help="measure torch.compile as well")
    parser.add_argument("--artifact", type=Path, help="one that was exported before")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args()
    copied, read = copy_bandwidth(), read_bandwidth()
    bandwidth = max(copied, read)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; ", end="")
    print(f"a copy moves {copied / 1e12:.2f} TB/s, a product reads {read / 1e12:.2f}", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        artifact = options.artifact or export(
            options.config, Path(directory), "--quant", options.quant,
            "--max-seq-len", options.max_seq_len, "--batch", options.batch,
        )  # fmt: skip
        start = time.perf_counter()
        model = runner.load(artifact)
        first = model.generate([2, 70, 71], 1).run()
        load_s = time.perf_counter() - start
    model.tokenizer.eos_token_ids.clear()
    print(f"load and first token {load_s:.2f} s", flush=True)
    rows = []
    for position in options.positions:
        size = step_bytes(model, position)
        ms = statistics.median(
            decode_ms(model, position, options.steps, options.repeats, LoopOptions())
        )
        row = {"position": position, "bytes": size, "floor_ms": size / bandwidth * 1e3, "ms": ms}
        row["share"] = row["floor_ms"] / ms
        without = LoopOptions(overlap=False)
        row["without_overlap_ms"] = statistics.median(
            decode_ms(model, position, options.steps, options.repeats, without)
        )
        rows.append(row)
        print(
            f"position {position}: floor {row['floor_ms']:.3f} ms, ours {ms:.3f} ms, "
            f"{row['share']:.1%} of the ceiling; {row['without_overlap_ms']:.3f} ms where kernels "
            "do not overlap",
            flush=True,
        )
    prompt = [2, 70, 71]
    events = profiled(lambda: model.generate(prompt, 66).run())
    idle = idle_share(events, "next_positions")
    print(f"idle between steps {idle:.2%} (of a profiled run)")
    steps = kernel_times(after_prefill(events))
    kernels = [(name, n / 65, us / 65) for name, n, us in steps[:16]]
    for name, count, us in kernels:
        print(f"{us:9.2f} us  {count:6.1f} x  {name[:90]}")
    manifest = model.manifest
    if options.peer:
        # Before the peer's weights come.
        del model
        gc.collect()
        torch.cuda.empty_cache()
        network = peer_network(manifest)
        peer = [
            statistics.median(peer_ms(network, position, options.steps, options.repeats))
            for position in options.positions
        ]
        for row, ms in zip(rows, peer):
            row["peer_ms"] = ms
            print(
                f"position {row['position']}: torch.compile {ms:.3f} ms, "
                f"ours is {ms / row['ms']:.2f} x as fast",
                flush=True,
            )
    result = {
        **origin("cuda"),
        "copy_tb_s": copied / 1e12,
        "read_tb_s": read / 1e12,
        "config": manifest["checkpoint"]["file"].removesuffix(".json"),
        **{key: manifest[key] for key in ("quant", "batch", "max_seq_len")},
        "load_to_first_token_s": load_s,
        "first_token": first.token_ids,
        "rows": rows,
        "idle_share": idle,
        "kernels": kernels,
    }
    save(result, options.output)


if __name__ == "__main__":
    main()
