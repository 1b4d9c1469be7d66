"""Weights in 8 or 4 bits, written so that XNNPACK's partitioner recognizes the pattern.

Linear layers multiply in integers: activations are quantized per token when the method runs
(int8, asymmetric), weights when the artifact is made (symmetric). The embedding is a table of int8
rows with a scale for each group of values.
"""

import torch
import torch.nn.functional as F
import torchao  # noqa: F401  (registers torch.ops.torchao)
from executorch.exir.passes import _quant_patterns_and_replacements  # noqa: F401  (embedding_byte)
from torch import Tensor, nn

from export.recipes import Recipe

torchao_ops = torch.ops.torchao
decomposed = torch.ops.quantized_decomposed


EMBEDDING_GROUP_SIZE = 32


def quantize_rows(weight: Tensor, bits: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Symmetric quantization of weight float [N, K] -> int8 [N, K], scales float32 [N, K / G].

    Raises ValueError when K is not a multiple of the group size G.
    """
    if weight.shape[1] % group_size:
        raise ValueError(f"rows of {weight.shape[1]} values are not whole groups of {group_size}")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(weight.shape[0], weight.shape[1] // group_size)
    # In blocks, so that no second float copy of an embedding table is needed.
    for start in range(0, weight.shape[0], 16384):
        block = weight[start : start + 16384].detach().float().unflatten(1, (-1, group_size))
        if bits == 8:
            scale = block.abs().amax(-1) / high
        else:
            # With so few codes, half a step lost at either end costs less than a wider step.
            scale = torch.maximum(block.amax(-1) / (high + 0.5), block.amin(-1) / (low - 0.5))
            # XNNPACK keeps the scales of groups as bfloat16, so codes are made for such a scale:
            # the next one up (half a unit of its last place is at most 2^-8 of it).
            scale = (scale * (1 + 2**-8)).bfloat16().float()
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        codes = (block / scale[..., None]).round_().clamp_(low, high)
        values[start : start + 16384] = codes.flatten(1)
        scales[start : start + 16384] = scale
    return values, scales


class QuantizedLinear(nn.Module):
    """y = dequantize(quantize(x)) @ dequantize(weight)^T for x float32 [B, T, K]."""

    def __init__(self, linear: nn.Linear, bits: int, group_size: int | None):
        super().__init__()
        if linear.bias is not None:
            raise ValueError("a linear layer with a bias cannot be quantized: none has one here")
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size = bits, group_size
        values, scales = quantize_rows(linear.weight, bits, group_size or self.in_features)
        self.register_buffer("weight", values)
        self.register_buffer("scales", scales if group_size else scales[:, 0].contiguous())
        zeros = torch.zeros(self.scales.shape, dtype=torch.int64)
        self.register_buffer("zero_points", zeros)

    def forward(self, x: Tensor) -> Tensor:
        rows, kind = [1, 1, self.in_features], (torch.int8, -128, 127)
        scale, zero_point = torchao_ops.choose_qparams_affine(
            x, "ASYMMETRIC", rows, *kind, None, torch.float32, torch.int8
        )
        x = torchao_ops.quantize_affine(x, rows, scale, zero_point, *kind)
        x = torchao_ops.dequantize_affine(x, rows, scale, zero_point, *kind)
        return F.linear(x, self.dequantized())

    def dequantized(self) -> Tensor:
        """The weight as float32 [N, K]."""
        low, high = -(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1
        if self.group_size is None:
            return decomposed.dequantize_per_channel(
                self.weight, self.scales, self.zero_points, 0, low, high, torch.int8
            )
        return torchao_ops.dequantize_affine(
            self.weight, [1, self.group_size], self.scales, self.zero_points, torch.int8, low, high
        )


class QuantizedEmbedding(nn.Module):
    """Rows of int8 [V, D] with a scale for each group of 32: tokens int64 -> float32 [..., D]."""

    def __init__(self, embedding: nn.Embedding):
        super().__init__()
        size = embedding.embedding_dim
        group_size = EMBEDDING_GROUP_SIZE if size % EMBEDDING_GROUP_SIZE == 0 else size
        values, scales = quantize_rows(embedding.weight, 8, group_size)
        self.register_buffer("weight", values)
        self.register_buffer("scales", scales)

    def forward(self, tokens: Tensor) -> Tensor:
        return decomposed.embedding_byte(self.weight, self.scales, None, -128, 127, tokens)


def quantize(model: nn.Module, recipe: Recipe | None) -> None:
    """Replace, in place, the linear layers and the embedding of `model` as `recipe` says."""
    if recipe is None:
        return
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and name == "lm_head":
                setattr(module, name, QuantizedLinear(child, recipe.head_bits, None))
            elif isinstance(child, nn.Linear):
                setattr(module, name, QuantizedLinear(child, recipe.bits, recipe.group_size))
            elif isinstance(child, nn.Embedding):
                setattr(module, name, QuantizedEmbedding(child))
