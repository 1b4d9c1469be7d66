"""A network's decode step on CUDA by models/kernels: five launches a layer, and two for its ends.

Weights that are read together lie together: queries', keys' and values' rows, and gate's and up's.
The network's own layers, which prefill uses, become views of them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.kernels import cuda
from models.kernels.packing import quantize_int4, quantize_int8
from models.kernels.reference import dequantize

QUANTIZERS = {4: quantize_int4, 8: quantize_int8}
ACTIVATIONS = {nn.GELU: "gelu_tanh", nn.SiLU: "silu"}


class Rows(nn.Module):
    """The weights of linear layers, one below the other: float [N, K], or words of
    models/kernels/packing.py with scales float32 [N, K / G]."""

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

        def split(tensor: Tensor | None) -> list[Tensor | None]:
            if tensor is None:
                return [None] * len(sizes)
            return [nn.Parameter(part, requires_grad=False) for part in tensor.split(sizes)]

        parts = zip(*(split(tensor) for tensor in (self.weight, self.scale, self.bias)))
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


class FusedLayer(nn.Module):
    """What a layer's launches read. `block` is changed: its linear layers become views."""

    def __init__(self, block: nn.Module, bits: int):
        super().__init__()
        attention, mlp = block.self_attn, block.mlp
        projections = [name for name in ("q_proj", "k_proj", "v_proj") if hasattr(attention, name)]
        self.qkv = _fuse(attention, projections, bits)
        self.o = _fuse(attention, ["o_proj"], bits)
        self.gate_up = _fuse(mlp, ["gate_proj", "up_proj"], bits)
        self.down = _fuse(mlp, ["down_proj"], bits)
        self.block = block
        self.activation = ACTIVATIONS[type(mlp.act)]


class FusedDecode(nn.Module):
    """token int64 [B, 1], position int64 [B] -> logits float32 [B, V], as the network's decode.

    `bits` of the layers' weights are 4 or 8, or 0 for those that the network has; the embedding and
    the head stay as they are.
    """

    def __init__(self, network: nn.Module, bits: int = 0):
        super().__init__()
        backbone = network.model
        self.network = network
        self.layers = nn.ModuleList(FusedLayer(block, bits) for block in backbone.layers)
        # nn.Linear's own weight: it may be the embedding's.
        self.head = network.lm_head
        widest = max(layer.gate_up.weight.shape[0] for layer in self.layers)
        kv_heads = max(block.self_attn.cache.k.shape[2] for block in backbone.layers)
        size = cuda.counters_size(network.batch, max(widest, self.head.out_features), kv_heads)
        counters = torch.zeros(size, dtype=torch.int32, device=self.head.weight.device)
        self.register_buffer("counters", counters, persistent=False)

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        backbone = self.network.model
        x, branch, before = self.network.embed(token)[:, 0], None, None
        for layer in self.layers:
            block = layer.block
            x, qkv = self._after(before, x, branch, block.input_layernorm, layer.qkv)
            attended = self._attend(block.self_attn, backbone.rope, qkv, position)
            branch = self._linear(attended, layer.o)
            post = block.branch_norms[0]
            x, hidden = cuda.add_norm_linear(
                x, branch, weight_of(post), None, block.mlp_norm.weight,
                *_tensors(layer.gate_up), self.counters,
                eps=block.mlp_norm.eps, offset=block.mlp_norm.offset, activation=layer.activation,
            )  # fmt: skip
            branch = self._linear(hidden, layer.down)
            before = block
        options = {"wide": True, "soft_cap": getattr(self.network, "soft_cap", None) or 0.0}
        return self._after(before, x, branch, backbone.norm, self.head, **options)[1]

    def _after(
        self,
        before: nn.Module | None,
        x: Tensor,
        branch: Tensor | None,
        norm: nn.Module,
        rows: nn.Module,
        **options,
    ) -> tuple[Tensor, Tensor]:
        """The residual after the block `before`, and the linear layer of its norm."""
        options = {"eps": norm.eps, "offset": norm.offset} | options
        tensors = *_tensors(rows), self.counters
        if before is None:
            return x, cuda.norm_linear(x, norm.weight, *tensors, **options)
        post, scalar = before.branch_norms[1], getattr(before, "layer_scalar", None)
        return cuda.add_norm_linear(
            x, branch, weight_of(post), scalar, norm.weight, *tensors, **options
        )

    def _linear(self, x: Tensor, rows: Rows) -> Tensor:
        return cuda.linear(x, *_tensors(rows), self.counters)

    def _attend(
        self, attention: nn.Module, rope: nn.ModuleDict, qkv: Tensor, position: Tensor
    ) -> Tensor:
        cache, q_norm = attention.cache, attention.q_norm
        normed = not isinstance(q_norm, nn.Identity)
        return cuda.attend_step(
            qkv, position, cache.k, cache.v, weight_of(q_norm), weight_of(attention.k_norm),
            rope[attention.kind].inv_freq, self.counters,
            scale=attention.scale,
            eps=q_norm.eps if normed else 0.0, offset=q_norm.offset if normed else 0.0,
            value_norm=hasattr(attention, "v_norm"),
            values_are_keys=getattr(attention, "keys_are_values", False),
        )  # fmt: skip


def weight_of(norm: nn.Module | None) -> Tensor | None:
    """A norm's weight; None for none."""
    return getattr(norm, "weight", None)


def _fuse(parent: nn.Module, names: list[str], bits: int) -> Rows:
    linears = [getattr(parent, name) for name in names]
    rows = Rows(linears, bits)
    for name, view in zip(names, rows.views(linears)):
        setattr(parent, name, view)
    return rows


def _tensors(rows: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return rows.weight, getattr(rows, "scale", None), rows.bias
