"""Networks of tiny checkpoints for tests of packed weights."""

from collections.abc import Iterator
from pathlib import Path

import torch

from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.export.checkpoint.network import describe
from tokenloop.export.packed_weights import PackedBlock, PackedLinear


def loaded(path: Path, dtype: torch.dtype, slots: int = 16, batch: int = 1):
    """The checkpoint and its network, with grids."""
    checkpoint = open_checkpoint(path)
    described = describe(checkpoint, ("llama", "qwen3", "qwen3_5", "gpt_oss"), "tests")
    with torch.device("meta"):
        network = described.architecture.Network(described.config, slots, batch, dtype)
    rename = described.architecture.checkpoint_name
    with torch.no_grad():
        load_weights(network, checkpoint, rename, dtype=dtype, grids=True)
    return checkpoint, network.eval().requires_grad_(False)


def packed_layers(network) -> list[PackedLinear]:
    return [part for part in network.modules() if isinstance(part, PackedLinear)]


def layers_by_names(blocks: list[PackedBlock]) -> Iterator[tuple[list[str], PackedLinear]]:
    """The packed layers of dense attention blocks, each with the names of the checkpoint's weights
    that it has, in their order."""
    for i, block in enumerate(blocks):
        parts = {
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj": block.qkv,
            "self_attn.o_proj": block.o, "mlp.gate_proj mlp.up_proj": block.gate_up,
            "mlp.down_proj": block.down,
        }  # fmt: skip
        for names, packed in parts.items():
            yield [f"model.layers.{i}.{name}.weight" for name in names.split()], packed
