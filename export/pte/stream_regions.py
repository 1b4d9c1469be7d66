"""XNNPACK regions of networks with several hidden states of a token (models/altup.py). Each is a
tensor of its own, [1, T, D]: XNNPACK could not cut them out of one whose length varies.

Shapes: T tokens, or rows of a step; D hidden size, N streams.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.export.pte.xnnpack_regions import AfterAttention, BeforeAttention, Head, PooledHead
from tokenloop.models.altup import LEAST_MEAN_SQUARE, AltUp, Streams
from tokenloop.models.decoder import CausalLM


class DelegatedSparsity(nn.Module):
    """models.layers.MLP's sparse gates [1, T, I]: those above `cutoff` standard deviations from
    their mean, less that."""

    def __init__(self, size: int, cutoff: float):
        super().__init__()
        self.register_buffer("average", torch.full((1, size), 1.0 / size))
        self.register_buffer("cutoff", torch.tensor([cutoff]))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - F.linear(x, self.average)
        deviation = torch.sqrt(F.linear(centred * centred, self.average))
        return torch.relu(centred - deviation * self.cutoff)


def prepare_streams(model: CausalLM) -> None:
    """As xnnpack_regions.prepare, which comes before, of what only such networks have."""
    if model.model.streams is None:
        return
    for layer in model.model.layers:
        if (cutoff := layer.mlp.cutoff) is not None:
            sparsity = DelegatedSparsity(layer.mlp.gate_proj.out_features, cutoff)
            layer.mlp.act, layer.mlp.cutoff = nn.Sequential(sparsity, layer.mlp.act), None
        # A region's constants are buffers.
        scale = layer.altup.correct_output_scale.detach().float()
        del layer.altup.correct_output_scale
        layer.altup.register_buffer("correct_output_scale", scale if layer.scales else None)
        layer.altup.register_buffer("one", torch.ones(1))
        layer.laurel.register_buffer("factor", torch.tensor([0.5**0.5]))


def modalities(altup: AltUp, x: Tensor) -> Tensor:
    """[1, T, N] of a stream x."""
    return torch.tanh(altup.modality_router(altup.router_norm(x)))


def predicted(altup: AltUp, streams: Sequence[Tensor]) -> list[Tensor]:
    """AltUp.predict of streams."""
    weights = altup.prediction_coefs(modalities(altup, streams[0]))
    count, predictions = len(streams), []
    for i, stream in enumerate(streams):
        for j, other in enumerate(streams):
            at = i * count + j
            stream = stream + weights[..., at : at + 1] * other
        predictions.append(stream)
    return predictions


def corrected(altup: AltUp, predictions: Sequence[Tensor], activated: Tensor) -> list[Tensor]:
    """AltUp.correct of predictions."""
    weights = altup.correction_coefs(modalities(altup, activated)) + altup.one
    innovation = activated - predictions[0]
    return [x + weights[..., i : i + 1] * innovation for i, x in enumerate(predictions)]


class BeforeStreams(BeforeAttention):
    """Streams, cos and sin [T, 1, head_dim] -> what BeforeAttention gives, and the predictions of
    all streams."""

    def forward(self, *streams_cos_and_sin: Tensor) -> tuple[Tensor, ...]:
        *streams, cos, sin = streams_cos_and_sin
        predictions = predicted(self.layer.altup, streams)
        return *self._heads(predictions[0], cos, sin), *predictions

    def _project(self, x: Tensor, rope: dict) -> tuple[Tensor, ...]:
        return self.layer.mixer.project(self.layer.norm("mixer")(x), rope)[0]


class AfterStreams(AfterAttention):
    """Predictions of all streams, attended [K, T, G head_dim], and the layer's own input [1, T, P]
    -> the streams after the layer."""

    def forward(self, *predictions_attended_and_own: Tensor) -> tuple[Tensor, ...]:
        *predictions, attended, own = predictions_attended_and_own
        layer, first = self.layer, predictions[0]
        beside = layer.laurel(layer.norm("mixer")(first))
        mixed = layer.add_mixed(first, self._joined(attended), None) + beside
        mixed = mixed * layer.laurel.factor
        branch = layer.norm("mlp_branch")(layer.mlp(layer.norm("mlp")(mixed)))
        first, *others = corrected(layer.altup, predictions, mixed + branch)
        scale = layer.altup.correct_output_scale
        branch = layer.per_layer.branch(first if scale is None else first * scale, own)
        return first, *(x + branch for x in others)


class StreamsOf(nn.Module):
    """Linear layers of streams, whose results are as long as another tensor."""

    def __init__(self, projections: nn.ModuleList, hidden_size: int):
        super().__init__()
        self.projections = projections
        self.register_buffer("average", torch.full((1, hidden_size), 1.0 / hidden_size))
        self.register_buffer("least", torch.tensor([LEAST_MEAN_SQUARE]))

    def _as_long(self, x: Tensor, model: Tensor) -> Tensor:
        own = torch.maximum(F.linear(x * x, self.average), self.least)
        return x * torch.sqrt(F.linear(model * model, self.average) / own)


class Expanded(StreamsOf):
    """The first stream -> the N - 1 others."""

    def __init__(self, streams: Streams, hidden_size: int):
        super().__init__(streams.projections, hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._as_long(projection(x), x) for projection in self.projections)


class Merged(StreamsOf):
    """Streams -> one hidden state."""

    def __init__(self, streams: Streams, hidden_size: int):
        super().__init__(streams.unembed_projections, hidden_size)
        self.register_buffer("share", torch.tensor([1 / (1 + len(streams.projections))]))

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        total = first
        for projection, x in zip(self.projections, others):
            total = total + self._as_long(projection(x), first)
        return total * self.share


class OfMerged(nn.Module):
    """A head (Head or PooledHead) of streams [1, N, D]."""

    def __init__(self, merged: Merged, head: Head | PooledHead):
        super().__init__()
        self.merged, self.head = merged, head

    def forward(self, *streams: Tensor) -> tuple[Tensor, ...]:
        return self.head(self.merged(*streams))
