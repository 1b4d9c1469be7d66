"""Checkpoints, GGUF or Hugging Face, as one thing: a config, tensors and a tokenizer."""

from tokenloop.export.checkpoint.contents import Checkpoint, StoredTensor
from tokenloop.export.checkpoint.loading import load_weights
from tokenloop.export.checkpoint.opening import open_checkpoint
from tokenloop.export.checkpoint.safetensors_directory import read_config, read_json

__all__ = [
    "Checkpoint", "StoredTensor", "load_weights", "open_checkpoint", "read_config", "read_json",
]  # fmt: skip
