"""Alternating updates (AltUp, NeurIPS 2023, "Alternating Updates for Efficient Transformers") and
learned augmented residuals (LAuReL, arXiv:2411.07501), as Gemma 3n has them, named as in
transformers: a token has several hidden states, its streams, of which a layer works on the first.

Shapes: B rows, T tokens, N streams, D hidden size, P the size of a layer's input.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tokenloop.models.decoder import SANDWICH_NORMS, Block
from tokenloop.models.per_layer import PerLayerBranch

# Of what is divided by it, the mean square is no less.
LEAST_MEAN_SQUARE = 1e-5


def mean_square(x: Tensor) -> Tensor:
    """float32 [..., 1] of x [..., D]."""
    return x.float().square().mean(-1, keepdim=True)


class Streams(nn.Module):
    """The first stream of a token is its embedding, and the others are projections of that. In the
    end they come together again. All are as long as the first."""

    def __init__(self, hidden_size: int, streams: int):
        super().__init__()
        self.count = streams

        def projections() -> nn.ModuleList:
            one = (nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(streams - 1))
            return nn.ModuleList(one)

        self.projections, self.unembed_projections = projections(), projections()

    def expand(self, x: Tensor) -> Tensor:
        """Streams [B, T, N, D] of embeddings x [B, T, D]."""
        others = [_as_long(projection(x), x) for projection in self.projections]
        return torch.stack([x, *others], 2)

    def merge(self, streams: Tensor) -> Tensor:
        """Hidden states [B, T, D] of streams [B, T, N, D]."""
        first, *others = streams.unbind(2)
        others = [
            _as_long(project(x), first) for project, x in zip(self.unembed_projections, others)
        ]
        return torch.stack([first, *others], 2).mean(2)


def _as_long(x: Tensor, model: Tensor) -> Tensor:
    length = (mean_square(model) / mean_square(x).clamp(min=LEAST_MEAN_SQUARE)).sqrt()
    return (x.float() * length).to(x.dtype)


class AltUp(nn.Module):
    """How a layer's streams go on: all are predicted, the layer works on the first of the
    predictions, and what it adds to that corrects them all."""

    def __init__(self, hidden_size: int, streams: int, norm: Callable[..., nn.Module]):
        """`norm` makes a norm, given its size and what its result is multiplied by."""
        super().__init__()
        self.streams = streams
        self.router_norm = norm(hidden_size, scale=1 / hidden_size)
        self.modality_router = nn.Linear(hidden_size, streams, bias=False)
        self.prediction_coefs = nn.Linear(streams, streams**2, bias=False)
        self.correction_coefs = nn.Linear(streams, streams, bias=False)
        self.correct_output_scale = nn.Parameter(torch.empty(hidden_size))

    def predict(self, streams: Tensor) -> Tensor:
        """Predictions [B, T, N, D] of streams [B, T, N, D]."""
        weights = self.prediction_coefs(self._modalities(streams[:, :, 0]))
        weights = weights.unflatten(-1, (self.streams, self.streams))
        return streams + torch.matmul(weights, streams)

    def correct(self, predictions: Tensor, activated: Tensor) -> Tensor:
        """Streams [B, T, N, D] of predictions, of which the layer made `activated` [B, T, D] of the
        first."""
        weights = self.correction_coefs(self._modalities(activated)) + 1.0
        innovation = activated - predictions[:, :, 0]
        return predictions + weights[..., None] * innovation[:, :, None]

    def _modalities(self, x: Tensor) -> Tensor:
        """[B, T, N] of a stream x [B, T, D]."""
        return torch.tanh(self.modality_router(self.router_norm(x)).float()).to(x.dtype)


class Laurel(nn.Module):
    """x + norm(right(left(x))), for x [B, T, D]: a residual of low rank."""

    def __init__(self, hidden_size: int, rank: int, norm: nn.Module):
        super().__init__()
        self.linear_left = nn.Linear(hidden_size, rank, bias=False)
        self.linear_right = nn.Linear(rank, hidden_size, bias=False)
        self.post_laurel_norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return x + self.post_laurel_norm(self.linear_right(self.linear_left(x)))


class AltUpBlock(Block):
    """A block of several streams x [B, T, N, D]. Its mixer and feed-forward work on the first,
    beside a Laurel, and its own input `given` [B, T, P] goes to the others. `scales` says whether
    what lets that in sees the first stream scaled."""

    def __init__(
        self, mixer: nn.Module, mlp: nn.Module, norm: Callable[[], nn.Module], altup: AltUp,
        laurel: Laurel, per_layer: PerLayerBranch, scales: bool,
    ):  # fmt: skip
        super().__init__(mixer, mlp, norm, SANDWICH_NORMS, per_layer=per_layer)
        self.altup, self.laurel, self.scales = altup, laurel, scales

    def begin(self, x: Tensor) -> Tensor:
        return self.altup.predict(x)

    def project(self, x: Tensor, rope: dict) -> tuple[tuple[Tensor, ...], Tensor | None]:
        return super().project(x[:, :, 0], rope)

    def finish(
        self, x: Tensor, mixed: Tensor, gate: Tensor | None, given: Tensor | None = None
    ) -> Tensor:
        first = x[:, :, 0]
        beside = self.laurel(self._normed("mixer", first))
        attended = (self.add_mixed(first, mixed, gate) + beside) / 2**0.5
        branch = self._normed("mlp_branch", self.mlp(self._normed("mlp", attended)))
        x = self.altup.correct(x, attended + branch)
        first, others = x[:, :, :1], x[:, :, 1:]
        scale = self.altup.correct_output_scale if self.scales else 1.0
        own = self.per_layer.branch(first[:, :, 0] * scale, given)
        return torch.cat([first, others + own[:, :, None]], 2)
