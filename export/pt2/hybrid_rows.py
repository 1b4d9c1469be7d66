"""A hybrid's weights that are read together, put together, as export/rows.py does it.

A decode step's kernels read rows in another order than checkpoints have them, so `arrange` changes
the network to that order first. Shapes: B rows, D hidden size, H heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.export.pt2.packed_weights import FusedMlp, fuse
from tokenloop.models.delta_net import GatedDeltaNet
from tokenloop.models.qwen3_5 import FULL, Attention, Block, Qwen3_5


class QueriesAndGates(nn.Module):
    """A q_proj whose queries and gates are layers of their own: x [..., D] -> [..., 2 * H *
    head_dim], of each head its query and then its gate."""

    def __init__(self, queries: nn.Module, gates: nn.Module, head_dim: int):
        super().__init__()
        self.queries, self.gates, self.head_dim = queries, gates, head_dim

    def forward(self, x: Tensor) -> Tensor:
        parts = (
            layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.queries, self.gates)
        )
        return torch.cat(list(parts), -1).flatten(-2)


def arrange(network: Qwen3_5) -> None:
    """Reorder weights, without changing what the network computes.

    Queries and gates are two layers. Elements of queries' and keys' heads that are rotated together
    lie half a head apart, and others have an angle of 0. Of Qwen3-Next's layout becomes Qwen3.5's.
    """
    rope = network.model.rope[FULL]
    for layer in network.model.layers:
        if isinstance(layer.mixer, Attention):
            _arrange_attention(layer.mixer, 2 * rope.inv_freq.shape[0])
        elif layer.mixer.fused:
            _separate_projections(layer.mixer)
    half = network.config.head_dim // 2
    rope.inv_freq = F.pad(rope.inv_freq, (0, half - rope.inv_freq.shape[0]))


def _arrange_attention(attention: Attention, turning: int) -> None:
    """`turning` elements of each head are rotated."""
    size = attention.head_dim
    index = torch.arange(size, device=attention.k_proj.weight.device)
    first, second, rest = index.split([turning // 2, turning // 2, size - turning])
    left, right = rest.chunk(2)
    order = torch.cat([first, left, second, right])
    queries, gates = attention.q_proj.weight.unflatten(0, (-1, 2, size)).unbind(1)
    keys = attention.k_proj.weight.unflatten(0, (-1, size))
    attention.q_proj = QueriesAndGates(
        _linear(queries[:, order].flatten(0, 1)), _linear(gates.flatten(0, 1)), size
    )
    attention.k_proj = _linear(keys[:, order].flatten(0, 1))
    for norm in (attention.q_norm, attention.k_norm):
        norm.weight = nn.Parameter(norm.weight[order], requires_grad=False)


def _separate_projections(net: GatedDeltaNet) -> None:
    shared = net.value_heads // net.key_heads
    sizes = [net.key_size] * 2 + [shared * net.value_size] * 2
    grouped = net.in_proj_qkvz.weight.unflatten(0, (net.key_heads, -1))
    q, k, v, z = (part.flatten(0, 1) for part in grouped.split(sizes, 1))
    b, a = net.in_proj_ba.weight.unflatten(0, (net.key_heads, -1)).split(shared, 1)
    net.in_proj_qkv, net.in_proj_z = _linear(torch.cat([q, k, v])), _linear(z)
    net.in_proj_b, net.in_proj_a = _linear(b.flatten(0, 1)), _linear(a.flatten(0, 1))
    del net.in_proj_qkvz, net.in_proj_ba
    net.fused = False


def _linear(weight: Tensor) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    return linear


class HybridLayer(FusedMlp):
    """What a decode step's launches read of a block of an arranged network."""

    def __init__(self, block: Block, bits: int):
        super().__init__(block.mlp, bits)
        self.input_norm, self.mlp_norm = block.input_layernorm, block.post_attention_layernorm
        self.post_attention_norm = self.post_mlp_norm = self.layer_scalar = None
        self.cache = block.mixer.cache


class AttentionLayer(HybridLayer):
    """Rows of `qkv`: queries, keys, values, gates."""

    value_norm = values_are_keys = False

    def __init__(self, block: Block, bits: int):
        super().__init__(block, bits)
        attention = block.self_attn
        names = ["q_proj.queries", "k_proj", "v_proj", "q_proj.gates"]
        self.qkv = fuse(attention, names, bits)
        self.o = fuse(attention, ["o_proj"], bits)
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.kind, self.scale = attention.kind, attention.scale
        self.kv_heads = attention.cache.k.shape[2]


class DeltaNetLayer(HybridLayer):
    """Rows of `qkv`: inputs of the convolution, gates, b, a."""

    kv_heads = 0

    def __init__(self, block: Block, bits: int):
        super().__init__(block, bits)
        net = block.linear_attn
        names = ["in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"]
        self.sizes = [getattr(net, name).out_features for name in names]
        self.qkv = fuse(net, names, bits)
        self.o = fuse(net, ["out_proj"], bits)
        self.conv1d, self.norm = net.conv1d, net.norm
        self.A_log, self.dt_bias = net.A_log, net.dt_bias
        self.key_size, self.value_size, self.parts = net.key_size, net.value_size, net.parts


def fuse_layers(network: Qwen3_5, bits: int) -> list[HybridLayer]:
    """What a step reads of the blocks, which are changed: their linear layers, which prefill uses,
    become views."""
    arrange(network)
    kinds = {True: AttentionLayer, False: DeltaNetLayer}
    return [kinds[isinstance(b.mixer, Attention)](b, bits) for b in network.model.layers]
