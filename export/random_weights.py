"""A network that is only a config.json, to measure how fast the network would be.

The runner makes the weights up when it loads them. The network's tokens are bytes.
"""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

from tokenloop.export.checkpoint import Checkpoint, read_config


def open_config(path: Path) -> Checkpoint:
    """The text model's config of a config.json, as a checkpoint without tensors.

    Errors: ExportError naming the file and what is wrong with it.
    """
    return Checkpoint(path, "safetensors", read_config(path), (path,), {})


def write_byte_tokenizer(directory: Path) -> dict:
    """Write a tokenizer.json whose ids 0 to 255 are the bytes, and return the manifest's entry."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))
    return {
        "file": "tokenizer.json",
        "bos_token_id": None,
        "eos_token_ids": [],
        "prefix_ids": [],
        "suffix_ids": [],
        "shown_ids": [],
        "rstrip_ids": [],
        "special_tokens": {},
        "chat_template": None,
        "tool_template": None,
    }


def make_parameters(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Replace the parameters of a model on the meta device by uninitialized ones of the same
    shapes. Parameters that are shared stay shared."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter not in made:
                empty = torch.empty(parameter.shape, dtype=dtype, device=device)
                made[parameter] = nn.Parameter(empty, requires_grad=False)
            setattr(module, name, made[parameter])
