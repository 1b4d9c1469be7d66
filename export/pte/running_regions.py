"""XNNPACK regions of layers whose state goes on with every token: short convolutions and gated
delta nets. Between regions running_state.py moves the state.

A convolution's inputs come as W tensors, its taps, from the oldest to the newest. XNNPACK could not
cut them out of one tensor, whose length varies. Shapes: T tokens, or rows of a step; D hidden size,
C channels, W a convolution's width; of a delta net G key heads and H value heads of sizes K and V.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.models.delta_net import RMSNormGated
from tokenloop.models.kernels.gated_delta_rule.reference import L2_EPS

LINEAR_ATTENTION, SHORT_CONV = "linear_attention", "conv"
RUNNING = LINEAR_ATTENTION, SHORT_CONV


class DelegatedConvolution(nn.Module):
    """A depthwise convolution of its taps, each [1, T, C] -> [1, T, C]."""

    def __init__(self, convolution: nn.Conv1d):
        super().__init__()
        self.width = convolution.kernel_size[0]
        for i, weight in enumerate(convolution.weight.detach()[:, 0].T.float()):
            self.register_buffer(f"weight{i}", weight.contiguous())
        bias = convolution.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float())

    def forward(self, *taps: Tensor) -> Tensor:
        parts = [tap * getattr(self, f"weight{i}") for i, tap in enumerate(taps)]
        out = sum(parts[1:], parts[0])
        return out if self.bias is None else out + self.bias


class DelegatedLength(nn.Module):
    """x [..., K] / sqrt(sum of squares + eps) * scale: XNNPACK has no sum over the last axis."""

    def __init__(self, size: int, scale: float = 1.0, eps: float = L2_EPS):
        super().__init__()
        # With both divided by scale squared the root has the scale.
        self.register_buffer("ones", torch.full((1, size), scale**-2))
        self.register_buffer("eps", torch.tensor([eps * scale**-2]))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(F.linear(x * x, self.ones, self.eps))


class DelegatedGatedNorm(nn.Module):
    """delta_net.RMSNormGated of x and gate [1, T, H V] -> [1, T, H V]."""

    def __init__(self, norm: RMSNormGated, heads: int):
        super().__init__()
        self.heads, self.size = heads, norm.weight.numel()
        self.register_buffer("average", torch.full((1, self.size), 1.0 / self.size))
        self.register_buffer("eps", torch.tensor([norm.eps]))
        self.register_buffer("weight", norm.weight.detach().float())

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = x.view(1, -1, self.heads, self.size)
        x = x * torch.rsqrt(F.linear(x * x, self.average, self.eps)) * self.weight
        return x.view(1, -1, self.heads * self.size) * (gate * torch.sigmoid(gate))


def prepare_running(mixer: nn.Module) -> None:
    """As xnnpack_regions.prepare, of a mixer of type RUNNING."""
    if mixer.layer_type == SHORT_CONV:
        mixer.conv = DelegatedConvolution(mixer.conv)
        return
    mixer.conv1d = DelegatedConvolution(mixer.conv1d)
    mixer.norm = DelegatedGatedNorm(mixer.norm, mixer.value_heads)
    mixer.q_length = DelegatedLength(mixer.key_size, mixer.key_size**-0.5)
    mixer.k_length = DelegatedLength(mixer.key_size, 1.0)


class BeforeShortConv(nn.Module):
    """x [1, T, D] -> the convolution's input and what its result is multiplied by, both
    [1, T, D]."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixer, norm = self.layer.mixer, self.layer.norm("mixer")
        projected = mixer.in_proj(x if norm is None else norm(x))
        size = projected.shape[-1] // 3
        b, c, x = (projected[..., i * size : (i + 1) * size] for i in range(3))
        return b * x, c


class BeforeDeltaNet(nn.Module):
    """x [1, T, D] -> the convolution's input [1, T, C], a and b [1, T, H], and gates [1, T, H V].
    The layer's projections are separate."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        net, norm = self.layer.mixer, self.layer.norm("mixer")
        x = x if norm is None else norm(x)
        return net.in_proj_qkv(x), net.in_proj_a(x), net.in_proj_b(x), net.in_proj_z(x)


class InsideDeltaNet(nn.Module):
    """The taps, each [1, T, C] -> what the delta rule takes of them: queries and keys [T, G, K],
    with their lengths, and values [T, H, V]."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, *taps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net = self.net
        mixed = net.conv1d(*taps)
        mixed = mixed * torch.sigmoid(mixed)
        keys = net.parts[0]
        q, k, v = mixed[..., :keys], mixed[..., keys : 2 * keys], mixed[..., 2 * keys :]
        q, k = (x.view(-1, net.key_heads, net.key_size) for x in (q, k))
        return net.q_length(q), net.k_length(k), v.view(-1, net.value_heads, net.value_size)
