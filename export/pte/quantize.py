"""Weights in 8 or 4 bits, written so that XNNPACK's partitioner recognizes the pattern.

Linear layers multiply in integers. Activations are quantized per token when the method runs (int8,
asymmetric). Weights are quantized when the artifact is made (symmetric). The embedding is a table
of int8 rows with a scale for each group of values.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
import torchao  # noqa: F401  (registers torch.ops.torchao)
from torch import Tensor, nn

from tokenloop.export.kept_weights import Keeping, codes_and_scales
from tokenloop.export.pte.running_regions import LINEAR_ATTENTION
from tokenloop.export.recipes import Recipe
from tokenloop.export.tensors_in_files import empty
from tokenloop.models.moe import Experts

torchao_ops = torch.ops.torchao
decomposed = torch.ops.quantized_decomposed


EMBEDDING_GROUP_SIZE = 32
# Weights that are worked on at a time, which takes several times their memory as floats.
BLOCK_ELEMENTS = 1 << 22
# Of some processors' matrix products the last rows round otherwise, where they are fewer.
ROWS_TOGETHER = 64


def blocks_of(weight: Tensor) -> Iterator[slice]:
    """The rows of weight [N, K], some at a time."""
    rows = max(BLOCK_ELEMENTS // weight.shape[1] // ROWS_TOGETHER, 1) * ROWS_TOGETHER
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def quantize_rows(
    weight: Tensor, bits: int, group_size: int, half: bool = False
) -> tuple[Tensor, Tensor]:
    """Symmetric quantization of weight float [N, K] -> int8 [N, K], scales float32 [N, K / G].

    With `half` the scales have float16 values, and the codes are made for those. Raises ValueError
    when K is not a multiple of the group size G.
    """
    if weight.shape[1] % group_size:
        raise ValueError(f"rows of {weight.shape[1]} values are not whole groups of {group_size}")
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    values = empty(weight.shape, torch.int8)
    scales = empty((weight.shape[0], weight.shape[1] // group_size), torch.float32)
    for rows in blocks_of(weight):
        block = weight[rows].detach().float().unflatten(1, (-1, group_size))
        if bits == 8:
            scale = block.abs().amax(-1) / high
        else:
            # With so few codes, half a step lost at either end costs less than a wider step.
            scale = torch.maximum(block.amax(-1) / (high + 0.5), block.amin(-1) / (low - 0.5))
            # XNNPACK keeps the scales of groups as bfloat16, so codes are made for the next
            # bfloat16 up. Half a unit of the last place is at most 2^-8 of a scale.
            scale = (scale * (1 + 2**-8)).bfloat16().float()
        if half:
            scale = scale.clamp(min=torch.finfo(torch.float16).smallest_normal).half().float()
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
        codes = (block / scale[..., None]).round_().clamp_(low, high)
        values[rows] = codes.flatten(1)
        scales[rows] = scale
    return values, scales


def restore(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 [..., K] of codes int8 [..., K] and the scales [..., K / G] of their groups."""
    groups = codes.float().unflatten(-1, (scales.shape[-1], -1))
    return (groups * scales.float()[..., None]).flatten(-2)


class QuantizedLinear(nn.Module):
    """y = dequantize(quantize(x)) @ dequantize(weight)^T + bias for x float32 [B, T, K].

    The bias makes up for the rounding of the weights where x is `mean`, float32 [K]. That is added
    to the layer's own bias, if it has one. The error left is that of the deviations from the mean.
    """

    def __init__(
        self, linear: nn.Linear, bits: int, group_size: int | None, mean: Tensor | None = None,
        kept: bool = False,
    ):  # fmt: skip
        """With `kept` the integers are the checkpoint's own, of so many bits and such groups."""
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bits, self.group_size = bits, group_size
        size = group_size or self.in_features
        if kept:
            values, scales = codes_and_scales(linear, size)
        else:
            values, scales = quantize_rows(linear.weight, bits, size)
        self.register_buffer("weight", values)
        self.register_buffer("scales", scales if group_size else scales[:, 0].contiguous())
        zeros = torch.zeros(self.scales.shape, dtype=torch.int64)
        self.register_buffer("zero_points", zeros)
        bias = None if linear.bias is None else linear.bias.detach().float()
        if mean is not None:
            error = self._error(linear.weight, mean)
            bias = error if bias is None else bias + error
        self.register_buffer("bias", bias)

    def _error(self, weight: Tensor, mean: Tensor) -> Tensor:
        """What rounding takes from weight [N, K] @ mean [K], float32 [N]."""
        missing = []
        for rows in blocks_of(weight):
            codes = self.weight[rows]
            kept = restore(codes, self.scales[rows].view(len(codes), -1))
            missing.append((weight[rows] - kept).double() @ mean.double())
        return torch.cat(missing).float()

    def forward(self, x: Tensor) -> Tensor:
        rows, kind = [1, 1, self.in_features], (torch.int8, -128, 127)
        scale, zero_point = torchao_ops.choose_qparams_affine(
            x, "ASYMMETRIC", rows, *kind, None, torch.float32, torch.int8
        )
        x = torchao_ops.quantize_affine(x, rows, scale, zero_point, *kind)
        x = torchao_ops.dequantize_affine(x, rows, scale, zero_point, *kind)
        return F.linear(x, self.dequantized(), self.bias)

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
    """Rows of int8 [V, D] with a float16 scale for each group of 32, as in llama.cpp's Q8_0:
    tokens int64 -> float32 [..., D]."""

    def __init__(self, table: nn.Embedding | nn.Linear):
        super().__init__()
        size = table.weight.shape[1]
        group_size = EMBEDDING_GROUP_SIZE if size % EMBEDDING_GROUP_SIZE == 0 else size
        values, scales = quantize_rows(table.weight, 8, group_size, half=True)
        self.register_buffer("weight", values)
        self.register_buffer("scales", scales.half())

    def lookup(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Codes int8 [..., D] and scales float32 [..., D / G] of tokens int64 [...]."""
        return F.embedding(tokens, self.weight), F.embedding(tokens, self.scales).float()

    def forward(self, tokens: Tensor) -> Tensor:
        return restore(*self.lookup(tokens))


class QuantizedExperts(Experts):
    """Routed experts of int8 rows with a scale for each row. Activations stay float32."""

    def __init__(self, experts: Experts):
        nn.Module.__init__(self)
        self.activation = experts.activation
        self.gate_up_proj_bias, self.down_proj_bias = (
            experts.gate_up_proj_bias, experts.down_proj_bias,
        )  # fmt: skip
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(experts, name)
            codes, scales = quantize_rows(weight.flatten(0, 1), 8, weight.shape[-1])
            self.register_buffer(f"{name}_codes", codes.view(weight.shape))
            self.register_buffer(f"{name}_scales", scales.view(weight.shape[:2]))

    @property
    def gate_up_proj(self) -> Tensor:
        """float32 [E, 2 I, D]."""
        return self.gate_up_proj_codes * self.gate_up_proj_scales[..., None]

    @property
    def down_proj(self) -> Tensor:
        """float32 [E, D, I]."""
        return self.down_proj_codes * self.down_proj_scales[..., None]


class ShortlistHead(nn.Module):
    """The output head in two passes. The first gives logits of all tokens from 4-bit weights. The
    second scores the best tokens again from int8 rows, the embedding's own where the head is tied.

    Half of the vocabulary's bytes are read. The tokens that matter keep the logits of the 8-bit
    weights, without even the activations' rounding.
    """

    # Larger groups are read faster. The tokens that matter are scored again anyway.
    GROUP_SIZES = (128, 64, 32)

    def __init__(
        self, linear: nn.Linear, embedding: QuantizedEmbedding, mean: Tensor | None = None
    ):
        super().__init__()
        group_size = next(size for size in self.GROUP_SIZES if linear.in_features % size == 0)
        self.approximate = QuantizedLinear(linear, 4, group_size, mean)
        self.shortlist = Shortlist(embedding)

    @classmethod
    def fits(cls, linear: nn.Linear) -> bool:
        """Whether the vocabulary is large enough, and both sizes come in whole groups."""
        return (
            linear.out_features >= Shortlist.TOKENS_PER_GROUP * Shortlist.SIZE
            and linear.out_features % Shortlist.TOKENS_PER_GROUP == 0
            and linear.in_features % cls.GROUP_SIZES[-1] == 0
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits float32 [N, 1, V] of hidden [N, 1, D]."""
        logits = self.approximate(hidden)[:, 0]
        return self.shortlist(logits, hidden, dot_products)[:, None]


class Shortlist(nn.Module):
    """Replaces the largest of approximate logits by exact ones."""

    SIZE = 256
    TOKENS_PER_GROUP = 64

    def __init__(self, embedding: QuantizedEmbedding):
        super().__init__()
        self.embedding = embedding

    def forward(
        self, logits: Tensor, hidden: Tensor, score: Callable[[Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """`logits` float32 [N, V], the largest replaced by the exact ones of hidden [N, 1, D].

        `score` is dot_products or its equal.
        """
        ids = self.largest(logits)
        return logits.scatter(1, ids, score(*self.embedding.lookup(ids), hidden))

    def largest(self, logits: Tensor) -> Tensor:
        """The ids int64 [N, SIZE] of the largest of `logits` [N, V].

        A top-k of all is slow, so there are two steps. The largest logits lie in the groups whose
        own largest are the largest.
        """
        rows, count = logits.shape[0], logits.shape[1] // self.TOKENS_PER_GROUP
        groups = logits.view(rows, count, self.TOKENS_PER_GROUP)
        best = torch.topk(groups.amax(2), self.SIZE).indices
        of_all = best + torch.arange(rows)[:, None] * count
        candidates = F.embedding(of_all, groups.view(-1, self.TOKENS_PER_GROUP)).flatten(1)
        chosen = torch.topk(candidates, self.SIZE).indices
        group = torch.div(chosen, self.TOKENS_PER_GROUP, rounding_mode="floor")
        first = best.gather(1, group) * self.TOKENS_PER_GROUP
        return first + chosen - group * self.TOKENS_PER_GROUP


def dot_products(codes: Tensor, scales: Tensor, hidden: Tensor) -> Tensor:
    """Products [N, M] of each hidden float32 [N, 1, D] with M quantized rows of its own, which are
    codes int8 [N, M, D] with scales float32 [N, M, D / G]."""
    return (hidden @ restore(codes, scales).transpose(1, 2))[:, 0]


def quantize(
    model: nn.Module, recipe: Recipe | None, means: dict[nn.Module, Tensor] | None = None
) -> None:
    """Replace, in place, the linear layers and the embedding of `model` as `recipe` says.

    `means` is what calibrate.calibrate returned, if that is known. Its entries are used up. Raises
    ValueError for a layer whose rows are not whole groups.
    """
    if recipe is None:
        return
    means = means if means is not None else {}
    head: nn.Linear = model.lm_head
    tied = head.weight is model.model.embed_tokens.weight
    embedding = QuantizedEmbedding(model.model.embed_tokens)
    model.model.embed_tokens = embedding
    if (inputs := model.model.per_layer) is not None:
        inputs.embed_tokens = QuantizedEmbedding(inputs.embed_tokens)
    if recipe.head_bits == 4 and ShortlistHead.fits(head):
        rows = embedding if tied else QuantizedEmbedding(head)
        model.lm_head = ShortlistHead(head, rows, means.pop(head, None))
    else:
        model.lm_head = QuantizedLinear(head, 8, None, means.pop(head, None))
    exact = exact_layers(model)
    for mlp in (layer.mlp for layer in model.model.layers if layer.mlp.moe is not None):
        mlp.experts = QuantizedExperts(mlp.experts)
    for module in list(model.model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear) and child not in exact:
                quantized = QuantizedLinear(child, *recipe.of(name), means.pop(child, None))
                setattr(module, name, quantized)


def exact_layers(model: nn.Module) -> set[nn.Module]:
    """Layers that stay floating point: a small error in a score can choose another expert, and one
    in how much a delta net forgets and writes goes on with every token. What mixes a token's
    streams is small, too."""
    mlps = [layer.mlp for layer in model.model.layers if layer.mlp.moe is not None]
    exact = {mlp.get_submodule(name) for mlp in mlps for name in mlp.routers}
    mixers = [layer.mixer for layer in model.model.layers]
    nets = [mixer for mixer in mixers if mixer.layer_type == LINEAR_ATTENTION]
    if model.model.streams is not None:
        parts = [part for layer in model.model.layers for part in (layer.altup, layer.laurel)]
        exact |= {module for part in (model.model.streams, *parts) for module in part.modules()}
    return exact | {layer for net in nets for layer in (net.in_proj_a, net.in_proj_b)}


def keep(model: nn.Module, keeping: Keeping) -> None:
    """Replace, in place, the linear layers of `model` whose integers are kept. All else stays as it
    is, the embedding, the head and experts among it."""
    exact = exact_layers(model)
    for name, linear in list(model.named_modules()):
        if not isinstance(linear, nn.Linear) or linear in exact:
            continue
        if layout := keeping.layout([linear]):
            group_size = None if layout.group_size == linear.in_features else layout.group_size
            quantized = QuantizedLinear(linear, layout.bits, group_size, kept=True)
            model.set_submodule(name, quantized)
