"""A decode step on CUDA by models/kernels: five launches a layer, and two for the ends."""

import torch
from torch import Tensor, nn

from export.rows import FusedLayer, Rows
from models.kernels import cuda


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
        cap = getattr(self.network.config, "final_logit_softcapping", None)
        options = {"wide": True, "soft_cap": cap or 0.0}
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


def _tensors(rows: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return rows.weight, getattr(rows, "scale", None), rows.bias
