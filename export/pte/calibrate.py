"""What a short text shows of a model's activations, so that less is lost when it is quantized.

Calibration evens out channels (SmoothQuant, arXiv:2211.10438). Eight bits for a whole row of
activations are few where some channels are forty times as large as others. Dividing a channel by s
and multiplying the weights that read it by s changes nothing. Every s is a power of two. The
divisions go into what produces the channels, so they cost nothing when the model runs. Calibration
also gives the mean of what each linear layer reads. quantize.py makes up for the errors of
quantized weights with that mean (bias correction, arXiv:1906.04721).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenloop.export.pte.running_regions import RUNNING
from tokenloop.export.tensors_in_files import empty

TEXT = Path(__file__).with_name("calibration.txt")
TOKENS = 512
TINY = 1e-5
# Weights whose columns are looked at together. Sums of fewer columns than these round otherwise.
BLOCK_ELEMENTS, COLUMNS_TOGETHER = 1 << 22, 256


def calibrate(model: nn.Module, ids: Sequence[int]) -> dict[nn.Module, Tensor]:
    """Rescale, in place, the channels that the blocks' linear layers read, but for those of the
    residual itself, which a block without a norm reads. Returns the mean float32
    [K] of what every linear layer then reads.

    `ids` are a text's tokens and begin as the model's texts do. The first TOKENS are run in
    float32. The means have no more digits than they are good for, so that another processor gives
    the same.
    """
    seen = observe(model, ids)
    for layer in model.model.layers:
        attention, mlp = layer.mixer, layer.mlp
        # With several streams more than projections read what the norm gives.
        if layer.norm("mixer") is not None and model.model.streams is None:
            inputs = [attention.get_submodule(name) for name in attention.projections]
            _divide_norm(layer.norm("mixer"), _rescale(inputs, seen))
        # Experts' activations are not quantized.
        if mlp.moe is None:
            if layer.norm("mlp") is not None:
                inputs = [mlp.gate_proj, mlp.up_proj]
                _divide_norm(layer.norm("mlp"), _rescale(inputs, seen))
            _divide_rows(mlp.up_proj, _rescale([mlp.down_proj], seen))
        if attention.layer_type in RUNNING:
            continue
        if attention.v_norm is not None or attention.values_are_keys or not attention.has_keys:
            continue
        # Heads that share a value head share its channels.
        heads = attention.kv_heads, -1, attention.head_dim
        _divide_rows(attention.v_proj, _rescale([attention.o_proj], seen, heads))
    return {linear: moments.mean.bfloat16().float() for linear, moments in seen.items()}


@dataclass
class Moments:
    """The mean and the mean square, float32 [K], of a linear layer's input over the tokens."""

    mean: Tensor
    square: Tensor


def observe(model: nn.Module, ids: Sequence[int]) -> dict[nn.Module, Moments]:
    """What every linear layer reads while the model sees the text.

    The text's first token is left out, because its activations are like no other's.
    """
    count = min(len(ids), TOKENS, model.max_seq_len)
    seen: dict[nn.Module, Moments] = {}

    def add(linear: nn.Module, x: Tensor) -> None:
        rows = x.flatten(0, -2).float()
        if linear not in seen:
            rows = rows[1:]
            seen[linear] = Moments(*(torch.zeros(rows.shape[1]) for _ in range(2)))
        weight = 1 / max(count - 1, 1)
        seen[linear].mean += rows.sum(0) * weight
        seen[linear].square += rows.square().sum(0) * weight

    hooks = [
        module.register_forward_pre_hook(lambda linear, arguments: add(linear, arguments[0]))
        for module in model.model.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        tokens, positions = torch.tensor([list(ids[:count])]), torch.arange(count)
        row = torch.zeros(1, dtype=torch.int64) if model.batch > 1 else None
        # --max-prefill does not count here: another division of the text rounds differently.
        for start in range(0, count, model.longest_chunk):
            chunk = slice(start, start + model.longest_chunk)
            hidden = model.model.prefill(tokens[:, chunk], positions[chunk], row)
            # The head itself would make a row of the vocabulary's size for every token.
            add(model.lm_head, model.model.norm(hidden))
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _rescale(
    readers: Sequence[nn.Linear], seen: dict[nn.Module, Moments],
    shape: tuple[int, int, int] | None = None,
) -> Tensor:  # fmt: skip
    """Multiply the columns of the readers' weights by s [K] and return s. It makes activations and
    weights equally uneven (the paper's alpha of one half). With `shape` [A, B, C] for [K], s is the
    same along B and is returned as [A C]."""
    size = seen[readers[0]].square
    weight = mean_squares([reader.weight for reader in readers])
    if shape is not None:
        size, weight = (x.view(shape).mean(1).flatten() for x in (size, weight))
    # Both are squares. The logarithm is halved once for their roots and once for alpha.
    ratio = (size.clamp(min=TINY**2) / weight.clamp(min=TINY**2)).log2() / 4
    scale = torch.exp2((ratio - ratio.mean()).round())
    columns = scale
    if shape is not None:
        columns = scale.view(shape[0], 1, shape[2]).expand(len(scale) // shape[2], -1, -1)
        columns = columns.expand(-1, readers[0].in_features // len(scale), -1).flatten()
    for reader in readers:
        _replace(reader, torch.mul, columns)
        seen[reader].mean /= columns
    return scale


def mean_squares(weights: Sequence[Tensor]) -> Tensor:
    """float32 [K] of each column of weights [N, K], one below the other."""
    rows = sum(map(len, weights))
    count = max(BLOCK_ELEMENTS // rows // COLUMNS_TOGETHER, 1) * COLUMNS_TOGETHER
    parts = zip(*(weight.split(count, 1) for weight in weights))
    return torch.cat([torch.cat(part).float().square().mean(0) for part in parts])


def _replace(linear: nn.Linear, function: Callable, factor: Tensor) -> None:
    """Make the layer's weight `function` of it and `factor`. In place it would be changed in memory
    where it is mapped from the checkpoint."""
    weight = empty(linear.weight.shape, linear.weight.dtype)
    function(linear.weight.detach(), factor, out=weight)
    linear.weight = nn.Parameter(weight, requires_grad=False)


def _divide_norm(norm: nn.Module, scale: Tensor) -> None:
    norm.weight.copy_((norm.offset + norm.weight) / scale - norm.offset)


def _divide_rows(linear: nn.Linear, scale: Tensor) -> None:
    _replace(linear, torch.div, scale[:, None])
    if linear.bias is not None:
        linear.bias /= scale
