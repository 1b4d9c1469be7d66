"""Tiny models of every case of architectures.py: transformers' own, with random weights, and the
network of models/ with the same."""

import functools

import torch

from tests.models.architectures import ARCHITECTURES, Architecture
from tests.models.eager import prompt

ROW_OF = {case: row for row in ARCHITECTURES for case in row.cases}
CASES = list(ROW_OF)


def model_type_of(case: str) -> str:
    return case.split(",")[0]


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
    model = row.networks.Network(config, max_seq_len, batch, dtype)
    # Not `to`: what is computed in float32 stays so.
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.load_state_dict(hf.state_dict())
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
