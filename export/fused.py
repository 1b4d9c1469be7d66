"""A decode step on CUDA by models/kernels: five launches a layer, and two for the ends."""

import torch
from torch import Tensor, nn

from export.rows import FusedLayer, Rows, fuse_layers
from models.kernels import cuda


class FusedDecode(nn.Module):
    """token int64 [B, 1], position int64 [B] -> logits float32 [B, V], as the network's decode.

    `bits` of the layers' weights are 4 or 8, or 0 for those that the network has; the embedding and
    the head stay as they are. Nothing of the network that only prefill reads is in here: what is
    compiled may not take two tensors of one memory where it writes to any.
    """

    fuse_layers = staticmethod(fuse_layers)

    def __init__(self, network: nn.Module, bits: int = 0):
        super().__init__()
        backbone, head = network.model, network.lm_head
        self.embed_tokens, self.embed = backbone.embed_tokens, backbone.embed
        self.rope, self.norm, self.head = backbone.rope, backbone.norm, head
        self.layers = nn.ModuleList(self.fuse_layers(network, bits))
        self.soft_cap = getattr(network.config, "final_logit_softcapping", None) or 0.0
        widest = max(layer.gate_up.weight.shape[0] for layer in self.layers)
        kv_heads = max(layer.kv_heads for layer in self.layers)
        size = cuda.counters_size(network.batch, max(widest, head.out_features), kv_heads)
        counters = torch.zeros(size, dtype=torch.int32, device=head.weight.device)
        self.register_buffer("counters", counters, persistent=False)

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        x, branch, before = self.embed(token)[:, 0], None, None
        for layer in self.layers:
            x, qkv = self._after(before, x, branch, layer.input_norm, layer.qkv)
            branch = self._linear(self._attend(layer, qkv, position), layer.o)
            x, hidden = cuda.add_norm_linear(
                x, branch, weight_of(layer.post_attention_norm), None, layer.mlp_norm.weight,
                *_tensors(layer.gate_up), self.counters,
                eps=layer.mlp_norm.eps, offset=layer.mlp_norm.offset, activation=layer.activation,
            )  # fmt: skip
            branch, before = self._linear(hidden, layer.down), layer
        options = {"wide": True, "soft_cap": self.soft_cap}
        return self._after(before, x, branch, self.norm, self.head, **options)[1]

    def _after(
        self,
        before: FusedLayer | None,
        x: Tensor,
        branch: Tensor | None,
        norm: nn.Module,
        rows: nn.Module,
        **options,
    ) -> tuple[Tensor, Tensor]:
        """The residual after the layer `before`, and the linear layer of its norm."""
        options = {"eps": norm.eps, "offset": norm.offset} | options
        tensors = *_tensors(rows), self.counters
        if before is None:
            return x, cuda.norm_linear(x, norm.weight, *tensors, **options)
        post = weight_of(before.post_mlp_norm)
        return cuda.add_norm_linear(
            x, branch, post, before.layer_scalar, norm.weight, *tensors, **options
        )

    def _linear(self, x: Tensor, rows: Rows) -> Tensor:
        return cuda.linear(x, *_tensors(rows), self.counters)

    def _attend(self, layer: FusedLayer, qkv: Tensor, position: Tensor) -> Tensor:
        cache, q_norm = layer.cache, layer.q_norm
        return cuda.attend_step(
            qkv, position, cache.k, cache.v, weight_of(q_norm), weight_of(layer.k_norm),
            self.rope[layer.kind].inv_freq, self.counters,
            scale=layer.scale, eps=getattr(q_norm, "eps", 0.0),
            offset=getattr(q_norm, "offset", 0.0),
            value_norm=layer.value_norm, values_are_keys=layer.values_are_keys,
        )  # fmt: skip


def weight_of(norm: nn.Module | None) -> Tensor | None:
    """A norm's weight; None for none."""
    return getattr(norm, "weight", None)


def _tensors(rows: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return rows.weight, getattr(rows, "scale", None), rows.bias
