"""Train the small hybrid of tests/data/austen on Jane Austen's six novels, on a GPU, in minutes.

The text is Debian's package r-cran-janeaustenr 1.0.0-1 (public domain, from Project Gutenberg):

    apt-get download r-cran-janeaustenr && dpkg -x r-cran-janeaustenr_*.deb novels
    python -m benchmarks.train_hybrid --text $(find novels -name Rdata.rdb)

The end of the last novel is held out. The network is models/qwen3_5.py's, its delta rule the
chunked form in torch; what is written is a Hugging Face directory of bfloat16 weights.
"""

import argparse
import json
import math
import struct
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn

from tokenloop.models.decoder import Block
from tokenloop.models.kernels.gated_delta_rule import gated_delta_rule
from tokenloop.models.qwen3_5 import FULL, Qwen3_5, Qwen3_5Config

OUTPUT = Path(__file__).resolve().parents[1] / "tests" / "data" / "austen"
END = "<|endoftext|>"
CONFIG = {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "vocab_size": 2048,
    "hidden_size": 384,
    "intermediate_size": 640,
    "num_hidden_layers": 8,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.25,
    },
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "dtype": "bfloat16",
}  # fmt: skip
HELD_OUT = 20_000  # characters
PROMPT = "The morning was fine, and Emma"


def read_novels(path: Path) -> list[str]:
    """The texts in an R lazy-load database of character vectors: of each object its length in four
    bytes, then R's XDR serialization, deflated."""
    data, novels = path.read_bytes(), []
    while data:
        inflate = zlib.decompressobj()
        novels.append("\n".join(_strings(inflate.decompress(data[4:]))))
        data = inflate.unused_data
    return novels


def _strings(data: bytes) -> list[str]:
    """Of "X\n", a version with what it says of R and, from 3 on, of an encoding, and a vector."""
    (version,) = struct.unpack_from(">i", data, 2)
    offset = 14
    if version >= 3:
        offset += 4 + struct.unpack_from(">i", data, offset)[0]
    flags, count = struct.unpack_from(">ii", data, offset)
    if flags & 0xFF != 16:
        raise ValueError(f"an object of R's type {flags & 0xFF}; a character vector (16) is right")
    offset += 8
    strings = []
    for _ in range(count):
        _, length = struct.unpack_from(">ii", data, offset)
        offset += 8
        strings.append(data[offset : offset + length].decode("utf-8"))
        offset += length
    return strings


def unwrapped(novel: str) -> str:
    """Paragraphs in one line each, so that where a line ended needs not be learnt."""
    paragraphs = (" ".join(lines.split()) for lines in novel.split("\n\n"))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def train_tokenizer(text: str, size: int) -> Tokenizer:
    """Byte-level BPE of so many tokens, the first of which ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def initialize(model: nn.Module) -> None:
    """Small normal weights; decays as in Mamba (arXiv:2312.00752), from 1 to 1600 tokens."""
    for name, parameter in model.named_parameters():
        if name.endswith("A_log"):
            parameter.data.uniform_(1, 16).log_()
        elif name.endswith("dt_bias"):
            step = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(0.1)).exp()
            parameter.data.copy_(step + torch.log(-torch.expm1(-step)))
        elif "conv1d" in name:
            parameter.data.uniform_(-0.5, 0.5)
        elif parameter.dim() > 1:
            last = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight"))
            parameter.data.normal_(std=0.02 / (4 if last else 1))
        else:
            parameter.data.fill_(1.0 if "linear_attn.norm" in name else 0.0)


def mixed(layer: Block, x: Tensor, rope: dict) -> Tensor:
    """What a block's mixer adds to x [B, T, D], of whole sequences that begin anew."""
    mixer = layer.mixer
    inputs, gate = layer.project(x, rope)
    if mixer.layer_type == FULL:
        q, k, v = (part.transpose(1, 2).to(x.dtype) for part in inputs)
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=mixer.scale, enable_gqa=True
        )
        return mixer.combine(out.transpose(1, 2), gate)
    qkv, a, b = inputs
    keep = mixer.conv1d.kernel_size[0] - 1
    with torch.autocast(x.device.type, enabled=False):
        convolved = F.silu(mixer.conv1d(F.pad(qkv.float().mT, (keep, 0)))).mT
        rows, heads = x.shape[0], mixer.value_heads
        state = x.new_zeros(rows, heads, mixer.key_size, mixer.value_size, dtype=torch.float32)
        new = torch.zeros(rows, dtype=torch.bool, device=x.device)
        gates = a, b, mixer.A_log, mixer.dt_bias
        out = gated_delta_rule(*mixer.split(convolved), *gates, state, None, new)
    return mixer.combine(out, gate)


def logits_of(model: Qwen3_5, tokens: Tensor, dropout: float = 0.0) -> Tensor:
    """Logits [B, T, V] of whole sequences, tokens int64 [B, T]; `dropout` is of what blocks add."""
    x = model.embed(tokens)
    rope = model.model.rotations(torch.arange(tokens.shape[1], device=tokens.device))
    for layer in model.model.layers:
        x = x + F.dropout(mixed(layer, x, rope), dropout)
        x = x + F.dropout(layer.mlp(layer.norm("mlp")(x)), dropout)
    return model.lm_head(model.model.norm(x))


def loss_of(model: Qwen3_5, tokens: Tensor, dropout: float = 0.0) -> Tensor:
    """Mean nats of each token but the first, tokens int64 [B, T + 1]."""
    with torch.autocast(tokens.device.type, torch.bfloat16):
        logits = logits_of(model, tokens[:, :-1], dropout)
    return F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def held_out_loss(model: Qwen3_5, ids: Tensor, length: int) -> float:
    """Of consecutive windows of `length` tokens."""
    windows = ids[: len(ids) // length * length].view(-1, length)
    return loss_of(model, windows).item()


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.1)


def train(model: Qwen3_5, ids: Tensor, held_out: Tensor, options: argparse.Namespace) -> None:
    """Adam with a warm-up and a cosine, on windows that begin anywhere."""
    optimizer = optimizer_of(model)
    generator = torch.Generator().manual_seed(1)
    offsets = torch.arange(options.length + 1)
    start = time.perf_counter()
    for step in range(options.steps):
        share = step / options.steps
        rate = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * (0.5 + 0.5 * math.cos(math.pi * share)))
        for group in optimizer.param_groups:
            group["lr"] = options.rate * rate
        begins = torch.randint(len(ids) - options.length, (options.rows, 1), generator=generator)
        loss = loss_of(model, ids[(begins + offsets).to(ids.device)], options.dropout)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % options.report == 0 or step + 1 == options.steps:
            nats = held_out_loss(model, held_out, options.length)
            print(
                f"step {step + 1}: loss {loss.item():.3f}, held out {nats:.3f} "
                f"(perplexity {math.exp(nats):.2f}), {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def save(model: Qwen3_5, tokenizer: Tokenizer, held_out: str, directory: Path) -> None:
    """A Hugging Face directory, and the text that was held out."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
        for name, tensor in model.named_parameters()
    }
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}) + "\n")
    (directory / "held_out.txt").write_text(held_out, encoding="utf-8")


@torch.no_grad()
def continuation(model: Qwen3_5, tokenizer: Tokenizer, prompt: str, count: int) -> str:
    """The prompt and so many greedy tokens."""
    ids = tokenizer.encode(prompt).ids
    device = model.lm_head.weight.device
    for _ in range(count):
        ids.append(logits_of(model, torch.tensor([ids], device=device))[0, -1].argmax().item())
    return tokenizer.decode(ids)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_hybrid",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True, help="the package's Rdata.rdb")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="directory of the checkpoint")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--rows", type=int, default=32, help="windows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--rate", type=float, default=2e-3, help="the highest learning rate")
    parser.add_argument("--dropout", type=float, default=0.2, help="of what each block adds")
    parser.add_argument("--report", type=int, default=250, help="steps between two reports")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    novels = [unwrapped(novel) for novel in read_novels(options.text)]
    held_out, novels[-1] = novels[-1][-HELD_OUT:], novels[-1][:-HELD_OUT]
    text = END.join(novels)
    tokenizer = train_tokenizer(text, CONFIG["vocab_size"])
    ids, other = (
        torch.tensor(tokenizer.encode(part).ids, device=options.device) for part in (text, held_out)
    )
    config = Qwen3_5Config.from_dict(CONFIG)
    model = Qwen3_5(config, options.length).to(options.device)
    initialize(model)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"{len(novels)} novels, {len(text)} characters, {len(ids)} tokens; {size} parameters")
    train(model, ids, other, options)
    save(model, tokenizer, held_out, options.output)
    nats = held_out_loss(model, other, options.length) * len(other) / len(held_out.encode())
    print(f"held out: {nats / math.log(2):.3f} bits per byte")
    print(continuation(model, tokenizer, PROMPT, 60))


if __name__ == "__main__":
    main()
