"""The network that a checkpoint describes, found by its model_type."""

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch

from tokenloop.export.checkpoint.contents import Checkpoint
from tokenloop.export.checkpoint.loading import Target
from tokenloop.export.errors import ExportError
from tokenloop.models import by_model_type
from tokenloop.models.config_fields import shown
from tokenloop.models.decoder import CausalLM


class Described(NamedTuple):
    """A module of models/ and the config of its Network."""

    model_type: str
    architecture: ModuleType
    config: Any


def describe(checkpoint: Checkpoint, architectures: tuple[str, ...], exporter: str) -> Described:
    """Read the checkpoint's config. `architectures` are the modules that the `exporter` takes.

    Errors: ExportError for another model_type, for a config that cannot be run, and for more layers
    than the checkpoint has tensors, if it has any.
    """
    model_type, known = checkpoint.config["model_type"], by_model_type(architectures)
    if model_type not in known:
        raise ExportError(
            f"{checkpoint.path} is a {shown(model_type)[1:-1]} model; {exporter} exports "
            f"{', '.join(known)}"
        )
    try:
        config = known[model_type].Config.from_dict(checkpoint.config)
    except ValueError as error:
        raise ExportError(f"{checkpoint.path}: {error}") from error
    layers = checkpoint.config.get("num_hidden_layers")
    # Layers that nothing stands for would take a while to make.
    if checkpoint.stored and layers is not None and layers > len(checkpoint.stored):
        raise ExportError(
            f"{checkpoint.path} has {len(checkpoint.stored)} tensors, too few for "
            f"num_hidden_layers = {layers}"
        )
    return Described(model_type, known[model_type], config)


def names_of(architecture: ModuleType, network: CausalLM) -> Callable[[str], Target]:
    """What a checkpoint's tensor is in the network; None for one of a parameter that is left
    out."""

    def rename(name: str) -> Target:
        target = architecture.checkpoint_name(name)
        return None if target in network.left_out else target

    return rename


def without_memory(described: Described) -> CausalLM:
    """The network on the meta device, of one position and no rows: its caches take no memory,
    whatever the config says. What it declares and its parameters' shapes are the network's own."""
    with torch.device("meta"):
        return described.architecture.Network(described.config, 1, batch=0)
