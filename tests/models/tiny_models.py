"""Tiny models of every case of architectures.py: transformers' own, with random weights, and the
network of models/ with the same."""

import functools
from functools import partial
from pathlib import Path

import torch

from tests.models.architectures import ARCHITECTURES, Architecture
from tests.models.eager import prompt
from tokenloop.export.checkpoint import Checkpoint, StoredTensor, load_weights
from tokenloop.export.checkpoint.network import names_of
from tokenloop.models import dense, olmo2
from tokenloop.models.layers import RopeConfig

ROW_OF = {case: row for row in ARCHITECTURES for case in row.cases}
CASES = list(ROW_OF)


def model_type_of(case: str) -> str:
    return case.split(",")[0]


# A case with an input of each layer's own, whose last layers have no keys.
PER_LAYER = "gemma4_text, per-layer inputs, shared keys"
# The first case of each model_type.
TYPICAL = list({model_type_of(case): case for case in reversed(CASES)}.values())[::-1]


def keys(case: str, **changes) -> dict:
    """config.json's keys; None leaves one out."""
    row = ROW_OF[case]
    merged = {"model_type": model_type_of(case)} | row.small | row.cases[case] | changes
    return {key: value for key, value in merged.items() if value is not None}


def randomize(model: torch.nn.Module, row: Architecture) -> None:
    """Random weights that bfloat16 holds."""
    generator = torch.Generator().manual_seed(5)
    saved = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in saved:
            mean, std = next(rule[1:] for rule in row.weights if rule[0] in name)
            values = torch.empty(tensor.shape).normal_(mean, std, generator=generator)
            tensor.data.copy_(values.bfloat16())


def make_reference(
    case: str, dtype: torch.dtype = torch.float32, attention: str = "eager", **changes
) -> torch.nn.Module:
    """transformers' model of a case, with `changes` of its config: the same weights in every
    dtype. What is computed "eager" is written out in transformers' own files."""
    row = ROW_OF[case]
    config_class, model_class = row.classes[model_type_of(case)]
    config = config_class(**keys(case, **changes))
    model = model_class._from_config(
        config, attn_implementation=attention, experts_implementation="eager", dtype=dtype
    )
    randomize(model, row)
    return model.eval().requires_grad_(False)


reference = functools.cache(make_reference)


def network_of(
    row: Architecture,
    hf: torch.nn.Module,
    max_seq_len: int,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """The network of models/ with the config and the weights of transformers' model."""
    config = row.networks.Config.from_dict(hf.config.to_dict())
    with torch.device("meta"):
        model = row.networks.Network(config, max_seq_len, batch, dtype)
    stored = {
        name: StoredTensor(tuple(tensor.shape), "F32", partial(torch.clone, tensor))
        for name, tensor in hf.state_dict().items()
    }
    checkpoint = Checkpoint(Path("tiny"), "safetensors", {}, (), stored)
    load_weights(model, checkpoint, names_of(row.networks, model), dtype=dtype)
    return model.eval().requires_grad_(False)


def ours(
    case: str,
    max_seq_len: int | None = None,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> torch.nn.Module:
    """The network of models/ with the weights of `reference`."""
    row = ROW_OF[case]
    hf = reference(case) if dtype == torch.float32 else reference(case, dtype)
    return network_of(row, hf, max_seq_len or row.max_seq_len, batch, dtype)


def shallow(case: str, batch: int = 1) -> torch.nn.Module:
    """The network of models/ with one layer of each kind, which torch.export takes quickly."""
    row = ROW_OF[case]
    return network_of(row, make_reference(case, **row.shallow), row.max_seq_len, batch)


@functools.cache
def logits_of_one_pass(case: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A prompt of the whole cache, and transformers' logits [T, V] after each of its tokens."""
    tokens = prompt(ROW_OF[case].max_seq_len)
    return tokens, reference(case)(tokens).logits[0]


def states(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What a model remembers of its rows [B, ...], by name."""
    return {name: buffer for name, buffer in model.named_buffers() if buffer.ndim > 1}


# Networks of models/dense.py that have all between them that its families have.
NORMED_AFTER, PADDED = "dense, normed after", "dense, padded heads"
_DENSE = {
    "vocab_size": 53, "hidden_size": 40, "intermediate_size": 56, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 256,
    "tie_word_embeddings": False, "attention_bias": True, "sliding_window": 7,
}  # fmt: skip
DENSE_NETWORKS = {
    # Norms after, of all heads at once, and a layer that does not rotate.
    NORMED_AFTER: (olmo2.Olmo2, _DENSE | {
        "head_dim": 32, "rotary_dim": 32, "mlp_bias": False, "attention_multiplier": 0.2,
        "layer_types": (dense.SLIDING, dense.FULL), "rotations": (dense.SLIDING, dense.UNROTATED),
        "rope": {
            dense.SLIDING: RopeConfig(700.0), dense.UNROTATED: RopeConfig(1.0, partial=0.0),
        },
    }),
    # Heads of no kernel's size, of which a part rotates, and multipliers.
    PADDED: (dense.Dense, _DENSE | {
        "head_dim": 24, "rotary_dim": 18, "mlp_bias": True, "attention_multiplier": 0.3,
        "layer_types": (dense.FULL, dense.SLIDING), "rotations": (dense.FULL, dense.FULL),
        "rope": {dense.FULL: RopeConfig(700.0)}, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "logits_scaling": 0.6,
    }),
}  # fmt: skip


def dense_network(name: str, max_seq_len: int, batch: int, **changes: object) -> torch.nn.Module:
    """One of DENSE_NETWORKS with random weights, the same every time, and changes of its config."""
    network_class, config = DENSE_NETWORKS[name]
    network = network_class(dense.DenseConfig(**config | changes), max_seq_len, batch)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in network.named_parameters():
        mean, std = (1.0, 0.4) if "norm" in name else (0.0, 0.25)
        parameter.data.normal_(mean, std, generator=generator)
    return network.eval().requires_grad_(False)
