"""How fast is a hybrid's decode step on a CUDA GPU, beside transformers' own model compiled, and
what does it cost against the context? `python -m benchmarks.hybrid` prints the ceiling, the figures
and one JSON line.

The shapes are transformers' defaults of Qwen3.5's text models: the dense one, about 9 B parameters,
and the one of 256 experts, about 35 B, of which a token reads 3. Weights are random. The peer is
transformers' model with its static cache, compiled whole with its argmax by torch.compile's
reduce-overhead; where that fails, this project's eager network compiled so, and the JSON says which
and why. Shares are of the memory's speed, as it can be read or copied: the weights that a step
reads, what the KV caches hold, and the states of the delta nets, read and written.
"""

import argparse
import inspect
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.cuda_common import (
    CONFIGS,
    after_prefill,
    config_argument,
    copies,
    copy_bandwidth,
    decode_ms,
    export,
    idle_share,
    kernel_times,
    launches,
    origin,
    profiled,
    read_bandwidth,
    save,
)
from tokenloop import runner
from tokenloop.export.random_weights import make_parameters
from tokenloop.models import qwen3_5
from tokenloop.runner import LoopOptions

CONTEXTS = 256, 1024, 4096, 16_384, 32_000
LINEAR_KERNELS = "causal_conv1d", "gated_delta_rule"
HEADER = f"{'context':>8}{'floor ms':>10}{'ms':>8}{'share':>8}{'linear us':>11}{'attention us':>14}"


def step_bytes(model, keys: dict, position: int) -> float:
    """Bytes that a step at `position` has to move: every weight but the embedding, of which it
    reads a row, and the experts that are not chosen; keys and values up to there; and states of any
    length, read and written. `keys` is the network's config."""
    manifest = model.manifest
    entries = [e for e in manifest["weights"]["random"] if "embed_tokens" not in e["name"]]
    size = sum(map(_bytes_of, entries))
    experts = sum(_bytes_of(entry) for entry in entries if ".experts." in entry["name"])
    if experts:
        size -= experts * (1 - keys["num_experts_per_tok"] / keys["num_experts"])
    for entry in manifest["state"]:
        if entry["name"].endswith((".conv", ".recurrent")):
            size += 2 * _bytes_of(entry)
        elif len(entry["shape"]) == 4:
            size += _bytes_of(entry) * (position + 1) / entry["shape"][1]
    return size


def _bytes_of(entry: dict) -> int:
    return math.prod(entry["shape"]) * getattr(torch, entry["dtype"]).itemsize


def measure(model, keys: dict, position: int, bandwidth: float, steps: int, repeats: int) -> dict:
    """A row of figures at a context."""
    size = step_bytes(model, keys, position)
    ms = statistics.median(decode_ms(model, position, steps, repeats, LoopOptions()))
    prompt = [i * 37 % 250 + 3 for i in range(position)]
    events = after_prefill(profiled(lambda: model.generate(prompt, 34).run()))
    kernels = [(name, n / 33, us / 33) for name, n, us in kernel_times(events)]
    row = {"context": position, "bytes": size, "floor_ms": size / bandwidth * 1e3, "ms": ms}
    row["share"] = row["floor_ms"] / ms
    row["linear_us"] = sum(us for n, _, us in kernels if any(k in n for k in LINEAR_KERNELS))
    row["attention_us"] = sum(us for name, _, us in kernels if "attend" in name)
    row["kernels"] = kernels[:12]
    print(
        f"{position:>8}{row['floor_ms']:>10.3f}{ms:>8.3f}{row['share']:>8.1%}"
        f"{row['linear_us']:>11.1f}{row['attention_us']:>14.1f}",
        flush=True,
    )
    return row


def crossings(model) -> dict:
    """Of one step, from the difference of two lengths: launches and copies that the profiler
    saw, and of a run the share of time that the GPU waits for a step."""
    prompt, found = [i * 37 % 250 + 3 for i in range(19)], []
    for count in (17, 81):
        events = profiled(lambda count=count: model.generate(prompt, count).run())
        found.append((launches(events), copies(events)))
    (few, few_copies), (many, many_copies) = found
    return {
        "launches": {name: (many[name] - few[name]) / 64 for name in many},
        "copies": {
            name: (many_copies[name]["count"] - few_copies[name]["count"]) / 64
            for name in many_copies
        },
        "idle_share": idle_share(events, "next_positions"),
    }


def timed(step, token, position, steps: int, repeats: int) -> list[float]:
    """Milliseconds of a step that gives the next token and position, which stay on the GPU."""
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    times = []
    with torch.no_grad():
        for i in range(repeats + 1):
            t, p = token.clone(), position.clone()
            for n in range(steps + 8):
                if n == 8:
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                torch.compiler.cudagraph_mark_step_begin()
                t, p = (x.clone() for x in compiled(t, p))
            torch.cuda.synchronize()
            # The first generation compiles.
            if i:
                times.append((time.perf_counter() - start) * 1e3 / steps)
    return times


def transformers_ms(keys: dict, position: int, steps: int, repeats: int) -> list[float]:
    """transformers' model, its static cache filled up to `position` less half the steps."""
    import transformers

    name = "Qwen3_5Moe" if "num_experts" in keys else "Qwen3_5"
    config = getattr(transformers, f"{name}TextConfig")(**keys)
    with torch.device("cuda"):
        network = getattr(transformers, f"{name}ForCausalLM")
        model = network._from_config(config, dtype=torch.bfloat16).eval()
    cache = transformers.StaticCache(config=config, max_cache_len=2048)
    parameters = inspect.signature(model.forward).parameters
    options = {"cache" if "cache" in parameters else "past_key_values": cache, "use_cache": True}
    begin = position - steps // 2
    with torch.no_grad():
        model(input_ids=torch.full((1, begin), 5, device="cuda"), **options)

    def step(token, position):
        logits = model(input_ids=token, position_ids=position, **options).logits
        return logits[:, -1].argmax(-1, keepdim=True), position + 1

    where = torch.full((1, 1), begin, device="cuda")
    return timed(step, torch.full((1, 1), 5, device="cuda"), where, steps, repeats)


def network_ms(keys: dict, position: int, steps: int, repeats: int) -> list[float]:
    """This project's eager network."""
    config = qwen3_5.Config.from_dict(keys)
    with torch.device("meta"):
        network = qwen3_5.Network(config, 2048, 1, torch.bfloat16)
    make_parameters(network, torch.device("cuda"), torch.bfloat16)
    for parameter in network.parameters():
        parameter.normal_(std=0.02)
    network.to("cuda").eval()

    def step(token, position):
        return network.decode(token, position).argmax(-1, keepdim=True), position + 1

    where = torch.full((1,), position - steps // 2, device="cuda")
    return timed(step, torch.full((1, 1), 5, device="cuda"), where, steps, repeats)


def measure_peer(keys: dict, position: int, steps: int, repeats: int) -> dict:
    failed = None
    for name, function in (("transformers", transformers_ms), ("network", network_ms)):
        try:
            ms = statistics.median(function(keys, position, steps, repeats))
            return {"peer": name, "context": position, "ms": ms, "transformers_failed": failed}
        # What cannot be compiled, or is not installed, fails in many ways.
        except Exception as error:
            if name == "network":
                raise
            failed = f"{type(error).__name__}: {str(error)[:500]}"
            print(f"transformers' model cannot be measured: {failed}", flush=True)
        torch.compiler.reset()
        torch.cuda.empty_cache()
    return {}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hybrid", description=__doc__)
    config_argument(parser, "qwen3.5-9b")
    parser.add_argument("--quant", default="bf16", help="of the export (default: bf16)")
    parser.add_argument("--steps", type=int, default=64, metavar="N", help="(default: 64)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="(default: 5)")
    parser.add_argument("--no-peer", action="store_true", help="measure this project alone")
    parser.add_argument("--artifact", type=Path, help="one that was exported before")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    return options


def main() -> None:
    options = parse()
    keys = json.loads((CONFIGS / f"{options.config}.json").read_text())
    copied, read, device = copy_bandwidth(), read_bandwidth(), torch.cuda.get_device_name()
    bandwidth = max(copied, read)
    print(
        f"{device}, torch {torch.__version__}; a copy moves {copied / 1e12:.2f} TB/s, "
        f"{read / 1e12:.2f} can be read"
    )
    answer = {
        **origin("hybrid"),
        "copy_tb_s": copied / 1e12,
        "read_tb_s": read / 1e12,
        "config": options.config,
        "quant": options.quant,
        "batch": 1,
    }
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        artifact = options.artifact or export(
            options.config, Path(directory), "--quant", options.quant,
            "--max-seq-len", 32_768,
        )  # fmt: skip
        answer["export_s"] = time.perf_counter() - start
        model = runner.load(artifact)
        model.tokenizer.eos_token_ids.clear()
        answer["step"] = crossings(model)
        print(f"a step: {answer['step']}\n{HEADER}", flush=True)
        answer["rows"] = [
            measure(model, keys, context, bandwidth, options.steps, options.repeats)
            for context in CONTEXTS
        ]
    for name, count, us in answer["rows"][0]["kernels"]:
        print(f"{us:9.2f} us  {count:6.1f} x  {name[:90]}")
    if options.output is not None:
        save(answer, options.output)
    if not options.no_peer:
        del model
        torch.cuda.empty_cache()
        answer["peer"] = measure_peer(keys, CONTEXTS[0], options.steps, options.repeats)
        answer["peer"]["ratio"] = answer["peer"]["ms"] / answer["rows"][0]["ms"]
        print(f"{answer['peer']}")
    save(answer, options.output)


if __name__ == "__main__":
    main()
