"""Weights that are read together, put together: queries', keys' and values' rows, gate's and up's.

As floating point, or as integers in words that models/kernels reads. The network's own layers,
which prefill uses, become views of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.models.kernels.linear.packing import quantize_int4, quantize_int8
from tokenloop.models.kernels.linear.reference import dequantize
from tokenloop.models.moe import SharedSparseMoe, SparseMoe

QUANTIZERS = {4: quantize_int4, 8: quantize_int8}
ACTIVATIONS = {nn.GELU: "gelu_tanh", nn.SiLU: "silu"}


class Rows(nn.Module):
    """The weights of linear layers, one below the other: float [N, K], or words of
    models/kernels/linear/packing.py with its scales."""

    def __init__(self, linears: list[nn.Linear], bits: int):
        super().__init__()
        weight = torch.cat([linear.weight for linear in linears])
        self.inputs = weight.shape[1]
        weight, scale = QUANTIZERS[bits](weight) if bits else (weight, None)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None

    def views(self, linears: list[nn.Linear]) -> list[nn.Module]:
        """Layers like those that these rows were made of, in the same memory."""
        sizes = [linear.out_features for linear in linears]

        def split(tensor: Tensor | None, axis: int) -> list[Tensor | None]:
            if tensor is None:
                return [None] * len(sizes)
            return [nn.Parameter(part, requires_grad=False) for part in tensor.split(sizes, axis)]

        parts = zip(split(self.weight, 0), split(self.scale, 1), split(self.bias, 0))
        return [RowsView(self.inputs, *part) for part in parts]


class RowsView(nn.Module):
    """A linear layer whose weights are some of Rows: x [..., K] -> [..., N]."""

    def __init__(self, inputs: int, weight: Tensor, scale: Tensor | None, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = inputs, weight.shape[0]
        self.weight, self.scale, self.bias = weight, scale, bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.scale is not None:
            weight = dequantize(weight, self.scale, self.in_features).to(x.dtype)
        return F.linear(x, weight, self.bias)


class IntegerHead(nn.Module):
    """An output head whose weights are int8: hidden [B, 1, D] -> logits float32 [B, 1, V]. The
    embedding that it may have shared its weights with keeps its own."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.rows = Rows([linear], 8)

    def forward(self, hidden: Tensor) -> Tensor:
        weight, scale = self.rows.weight, self.rows.scale
        if not hidden.is_cuda:
            return F.linear(hidden.float(), dequantize(weight, scale, self.rows.inputs))
        from tokenloop.models.kernels import cuda

        size = cuda.semaphores_size(len(hidden), len(weight), 1)
        semaphores = torch.zeros(size, dtype=torch.int32, device=hidden.device)
        arguments = hidden[:, 0], weight, scale, None, semaphores
        return cuda.linear(*arguments, out_float32=True)[:, None]


class FusedMlp(nn.Module):
    """What a decode step's launches read of a feed-forward, which is changed: its linear layers,
    which prefill uses, become views.

    With routed experts, `moe` is their config, and they stay as they are, whatever the bits. Rows
    of `scores` choose them; the last one weighs the expert that every token has, if there is one,
    whose rows are then those of `gate_up` and `down`.
    """

    def __init__(self, mlp: nn.Module, bits: int):
        super().__init__()
        self.moe, self.shared, dense = None, False, mlp
        if isinstance(mlp, SparseMoe):
            self.shared = isinstance(mlp, SharedSparseMoe)
            self.moe, self.experts = mlp.config, mlp.experts
            self.scores = fuse(mlp, ["gate"] + ["shared_expert_gate"] * self.shared, 0)
            dense = mlp.shared_expert if self.shared else None
        if dense is not None:
            self.gate_up = fuse(dense, ["gate_proj", "up_proj"], bits)
            self.down = fuse(dense, ["down_proj"], bits)
            self.activation = ACTIVATIONS[type(dense.act)]


class FusedLayer(FusedMlp):
    """What a decode step's launches read of a block, which is changed as FusedMlp says."""

    def __init__(self, block: nn.Module, bits: int):
        super().__init__(block.mlp, bits)
        attention = block.self_attn
        projections = [name for name in ("q_proj", "k_proj", "v_proj") if hasattr(attention, name)]
        self.qkv = fuse(attention, projections, bits)
        self.o = fuse(attention, ["o_proj"], bits)
        self.input_norm, self.mlp_norm = block.input_layernorm, block.mlp_norm
        self.post_attention_norm, self.post_mlp_norm = block.branch_norms
        self.layer_scalar = getattr(block, "layer_scalar", None)
        self.cache, self.q_norm, self.k_norm = attention.cache, attention.q_norm, attention.k_norm
        self.kind, self.scale = attention.kind, attention.scale
        self.kv_heads = attention.cache.k.shape[2]
        self.value_norm = hasattr(attention, "v_norm")
        self.values_are_keys = getattr(attention, "keys_are_values", False)


def fuse(parent: nn.Module, names: list[str], bits: int) -> Rows:
    """The weights of the linear layers of those names in `parent`, which become views."""
    linears = [parent.get_submodule(name) for name in names]
    rows = Rows(linears, bits)
    for name, view in zip(names, rows.views(linears)):
        parent.set_submodule(name, view)
    return rows


def fuse_layers(network: nn.Module, bits: int) -> list[FusedLayer]:
    """Of all blocks."""
    return [FusedLayer(block, bits) for block in network.model.layers]
