"""Networks of tiny checkpoints for tests of packed weights."""

from pathlib import Path

import torch

from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.export.checkpoint.network import describe
from tokenloop.export.packed_weights import PackedLinear


def loaded(path: Path, dtype: torch.dtype, slots: int = 16, batch: int = 1):
    """The checkpoint and its network, with grids."""
    checkpoint = open_checkpoint(path)
    described = describe(checkpoint, ("llama", "qwen3", "qwen3_5"), "tests")
    with torch.device("meta"):
        network = described.architecture.Network(described.config, slots, batch, dtype)
    rename = described.architecture.checkpoint_name
    with torch.no_grad():
        load_weights(network, checkpoint, rename, dtype=dtype, grids=True)
    return checkpoint, network.eval().requires_grad_(False)


def packed_layers(network) -> list[PackedLinear]:
    return [part for part in network.modules() if isinstance(part, PackedLinear)]
