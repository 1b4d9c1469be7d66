"""How long is it from a prompt to its first token on a CUDA GPU, beside transformers and the GPU's
own speed? `python -m benchmarks.prefill --config qwen3-4b` prints the floor, the figures, where the
time goes by kernel, and one JSON line.

Weights are random. The time is from the request until the host has the token, the median of
`--repeats` runs after one that warms up. The floor is the multiplications of the layers and of
causal attention at the rate of a large product of this GPU, measured first, or the weights' bytes
at the rate of a copy, if that takes longer. The peer is transformers' model with sdpa, eager,
logits of the last position alone. With --together N, prompts of 512 tokens begin in N rows at once.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.cuda_common import (
    CONFIGS,
    config_argument,
    copy_bandwidth,
    device_us,
    export,
    kernel_times,
    origin,
    profiled,
    save,
)
from tokenloop import runner
from tokenloop.models import by_model_type
from tokenloop.runner import LoopOptions, Request

TOGETHER = 512


def product_rate() -> float:
    """FLOP/s of cuBLAS's product of two matrices of 8192 x 8192 in bfloat16."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    return (
        2 * 8192**3 / (statistics.median(device_us(lambda: torch.mm(a, b, out=out), 1, 20)) / 1e6)
    )


def operations(keys: dict, lengths: list[int]) -> tuple[float, float]:
    """FLOP of the layers' linear weights that a token uses, and of causal attention, for prompts of
    these lengths."""
    module = by_model_type()[keys["model_type"]]
    with torch.device("meta"):
        network = module.Network(module.Config.from_dict(keys), max(lengths) + 1)
    linear = attention = 0.0
    for block in network.model.layers:
        mixer, moe = block.mixer, block.mlp.moe
        count = sum(p.numel() for p in block.parameters() if p.dim() == 2)
        if moe is not None:
            experts = block.mlp.experts.parameters()
            used = moe.num_experts_per_tok / moe.num_experts
            count += used * sum(p.numel() for p in experts)
        linear += 2.0 * count * sum(lengths)
        if hasattr(mixer, "head_dim"):
            window = mixer.cache.slots if mixer.cache.is_ring else max(lengths)
            pairs = sum(
                n * (n + 1) / 2 - max(0, n - window) * (n - window + 1) / 2 for n in lengths
            )
            attention += 4.0 * pairs * mixer.heads * mixer.head_dim
    return linear, attention


def weight_bytes(model) -> float:
    """Bytes of the weights that are read but for the embedding."""
    entries = [e for e in model.manifest["weights"]["random"] if "embed_tokens" not in e["name"]]
    return sum(
        torch.Size(e["shape"]).numel() * getattr(torch, e["dtype"]).itemsize for e in entries
    )


def first_token_ms(model, lengths: list[int], repeats: int, overlap: bool = True) -> list[float]:
    """Milliseconds until all prompts of these lengths have their first token, which begin at once.
    Every run has other prompts. `overlap` says whether kernels begin early."""
    generator, times, options = random.Random(1), [], LoopOptions(overlap=overlap)
    for _ in range(repeats + 1):
        prompts = [[generator.randrange(5, model.vocab_size) for _ in range(n)] for n in lengths]
        torch.cuda.synchronize()
        start = time.perf_counter()
        if len(lengths) == 1:
            model.generate(prompts[0], 1, options=options).run()
        else:
            model.generate_batch([Request(prompt, 1) for prompt in prompts], options).run()
        times.append((time.perf_counter() - start) * 1e3)
    return times[1:]


def peer_ms(keys: dict, lengths: list[int], repeats: int) -> dict[int, float]:
    """The same of transformers' model, by length."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "config.json").write_text(json.dumps(keys))
        config = AutoConfig.from_pretrained(directory)
    with torch.device("cuda"):
        torch.set_default_dtype(torch.bfloat16)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        torch.set_default_dtype(torch.float32)
    found = {}
    with torch.no_grad():
        for length in lengths:
            times = []
            for _ in range(repeats + 1):
                ids = torch.randint(5, keys["vocab_size"], (1, length), device="cuda")
                torch.cuda.synchronize()
                start = time.perf_counter()
                logits = model(ids, use_cache=True, logits_to_keep=1).logits
                logits.argmax(-1).item()
                times.append((time.perf_counter() - start) * 1e3)
            found[length] = statistics.median(times[1:])
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.prefill", description=__doc__.split("?")[0]
    )
    config_argument(parser, "qwen3-4b")
    parser.add_argument("--quant", default="bf16", help="of the export (default: bf16)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 1024, 8192], metavar="N")
    parser.add_argument("--together", type=int, default=0, metavar="N", help="rows of 512 tokens")
    parser.add_argument(
        "--no-overlap", action="store_true", help="measure it without overlap of kernels as well"
    )
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    parser.add_argument("--peer", action="store_true", help="measure transformers as well")
    parser.add_argument("--kernels", type=int, default=0, metavar="N", help="print the N longest")
    parser.add_argument("--artifact", type=Path, help="one that was exported before")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON there as well")
    options = parser.parse_args(arguments)
    for name, least in {"tokens": 1, "together": 0, "repeats": 1, "kernels": 0}.items():
        value = min(given) if isinstance(given := getattr(options, name), list) else given
        if value < least:
            parser.error(f"--{name} is {value}; it must be at least {least}")
    if not torch.cuda.is_available():
        parser.error("torch sees no CUDA GPU")
    return options


def main() -> None:
    options = parse()
    keys = json.loads((CONFIGS / f"{options.config}.json").read_text())
    bandwidth, rate = copy_bandwidth(), product_rate()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; a copy moves "
        f"{bandwidth / 1e12:.2f} TB/s, a product does {rate / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    result = origin("prefill") | {
        "config": options.config, "quant": options.quant, "copy_tb_s": bandwidth / 1e12,
        "product_tflop_s": rate / 1e12, "rows": [],
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        artifact = options.artifact
        if artifact is None:
            flags = ["--quant", options.quant, "--max-seq-len", max(options.tokens) + 64]
            flags += ["--batch", options.together] * bool(options.together)
            artifact = export(options.config, Path(directory), *flags)
        model = runner.load(artifact)
    model.tokenizer.eos_token_ids.clear()
    result["load_s"] = model.load_s
    cases = [[n] for n in options.tokens if n < model.max_seq_len]
    if options.together:
        cases.append([TOGETHER] * options.together)
    size = weight_bytes(model)
    for lengths in cases:
        linear, attention = operations(keys, lengths)
        floor = max((linear + attention) / rate, size / bandwidth) * 1e3
        times = first_token_ms(model, lengths, options.repeats)
        ms = statistics.median(times)
        row = {
            "lengths": lengths, "ms": ms, "all_ms": times, "floor_ms": floor,
            "share": floor / ms, "tflop_s": (linear + attention) / ms / 1e9,
            "tflop_s_of_weights": linear / ms / 1e9,
        }  # fmt: skip
        if options.no_overlap:
            without = first_token_ms(model, lengths, options.repeats, overlap=False)
            row["without_overlap_ms"] = statistics.median(without)
        result["rows"].append(row)
        if options.kernels:
            events = profiled(lambda n=lengths: first_token_ms(model, n, 1))
            for name, count, us in kernel_times(events)[: options.kernels]:
                print(f"{us / 2:10.0f} us {count // 2:6} {name[:90]}", flush=True)
    if options.peer:
        del model
        torch.cuda.empty_cache()
        singles = [row for row in result["rows"] if len(row["lengths"]) == 1]
        found = peer_ms(keys, [row["lengths"][0] for row in singles], options.repeats)
        for row in singles:
            row["peer_ms"] = found[row["lengths"][0]]
    print(
        f"{'tokens':>12}{'floor ms':>10}{'ms':>10}{'share':>8}{'TFLOP/s':>9}{'no overlap':>12}"
        f"{'peer ms':>10}"
    )
    for row in result["rows"]:
        lengths = row["lengths"]
        name = f"{lengths[0]}" if len(lengths) == 1 else f"{len(lengths)} x {lengths[0]}"
        others = (("without_overlap_ms", 12), ("peer_ms", 10))
        more = "".join(f"{row[key]:{w}.2f}" if key in row else " " * w for key, w in others)
        print(
            f"{name:>12}{row['floor_ms']:10.2f}{row['ms']:10.2f}{row['share']:8.1%}"
            f"{row['tflop_s']:9.0f}{more}"
        )
    save(result, options.output)


if __name__ == "__main__":
    main()
