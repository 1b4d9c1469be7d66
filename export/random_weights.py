"""A network that is only a config.json, to measure how fast the network would be.

The runner makes the weights up when it loads them. The network's first 256 tokens are bytes.
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


def write_byte_tokenizer(directory: Path, vocab_size: int = 256) -> dict:
    """Write a tokenizer.json whose ids 0 to 255 are the bytes, and return the manifest's entry. The
    others are no text's, and each is printed as its number after a space: outputs differ, and a
    server has something to send."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {byte: i for i, byte in enumerate(alphabet)}
    # Ġ is the byte of a space.
    vocabulary |= {f"Ġ{i}": i for i in range(len(alphabet), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
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
