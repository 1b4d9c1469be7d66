"""A decode step on CUDA by models/kernels: five launches a layer, eight with routed experts, or ten
where one of them is every token's, and one for the end."""

import torch
from torch import Tensor, nn

from tokenloop.export.errors import ExportError
from tokenloop.export.pt2.packed_weights import FusedLayer, IntegerHead, Rows, fuse_layers
from tokenloop.models.cache import KVCache
from tokenloop.models.kernels import cuda


class FusedDecode(nn.Module):
    """hidden [B, 1, D], position int64 [B] -> logits float32 [B, V], as the network's
    decode_embedded.

    `bits` of the layers' weights are 4 or 8, and the head's then 8, or 0 for those that the network
    has; the embedding stays as it is. Nothing of the network that only prefill reads is in here:
    what is compiled may not take two tensors of one memory where it writes to any.

    Raises ExportError for heads that the kernels cannot take.
    """

    fuse_layers = staticmethod(fuse_layers)

    def __init__(self, network: nn.Module, bits: int = 0):
        super().__init__()
        backbone = network.model
        self.rope, self.norm = backbone.rope, backbone.norm
        self.layers = nn.ModuleList(self.fuse_layers(network, bits))
        for part in self.layers.modules():
            if isinstance(part, KVCache):
                check_head_dim(part.k.shape[-1])
        if bits:
            network.lm_head = IntegerHead(network.lm_head)
        self.head: nn.Module = network.lm_head.rows if bits else network.lm_head
        self.soft_cap = getattr(network.config, "final_logit_softcapping", None) or 0.0
        linears = (part for part in self.layers.modules() if isinstance(part, (Rows, nn.Linear)))
        widest = max(linear.weight.shape[0] for linear in (*linears, self.head))
        kv_heads = max(layer.kv_heads for layer in self.layers)
        size = cuda.semaphores_size(network.batch, widest, kv_heads)
        semaphores = torch.zeros(size, dtype=torch.int32, device=self.head.weight.device)
        self.register_buffer("semaphores", semaphores, persistent=False)

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        x, branch, before = hidden[:, 0], None, None
        for layer in self.layers:
            x, qkv = self._after(before, x, branch, layer.input_norm, layer.qkv)
            branch = self._linear(self._attend(layer, qkv, position), layer.o)
            x, branch = self._feed_forward(layer, x, branch)
            before = layer
        options = {"out_float32": True, "soft_cap": self.soft_cap}
        return self._after(before, x, branch, self.norm, self.head, **options)[1]

    def _feed_forward(self, layer: FusedLayer, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """The residual after the attention, whose branch is given, and the feed-forward's own."""
        norm = layer.mlp_norm
        residual = x, branch, weight_of(layer.post_attention_norm), None, norm.weight
        options = {"eps": norm.eps, "offset": norm.offset}
        if layer.moe is None:
            tensors = *_tensors(layer.gate_up), self.semaphores
            options["activation"] = layer.activation
            x, gated = cuda.add_norm_linear(*residual, *tensors, **options)
            return x, self._linear(gated, layer.down)
        x, normed = cuda.add_norm(*residual, **options)
        config, weights = layer.moe, layer.experts
        scores = self._linear(normed, layer.scores)
        counts = config.num_experts, config.num_experts_per_tok
        routed = cuda.route(scores, *counts, config.norm_topk_prob)
        shared = ()
        if layer.shared:
            gated = self._linear(normed, layer.gate_up, activation=layer.activation)
            shared = self._linear(gated, layer.down), scores
        tables = weights.gate_up_proj, weights.down_proj
        return x, cuda.experts(normed, *routed, *tables, *shared)

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
        tensors = *_tensors(rows), self.semaphores
        if before is None:
            return x, cuda.norm_linear(x, norm.weight, *tensors, **options)
        post = weight_of(before.post_mlp_norm)
        return cuda.add_norm_linear(
            x, branch, post, before.layer_scalar, norm.weight, *tensors, **options
        )

    def _linear(self, x: Tensor, rows: nn.Module, **options) -> Tensor:
        return cuda.linear(x, *_tensors(rows), self.semaphores, **options)

    def _attend(self, layer: FusedLayer, qkv: Tensor, position: Tensor) -> Tensor:
        cache, q_norm = layer.cache, layer.q_norm
        return cuda.attend_step(
            qkv, position, cache.k, cache.v, weight_of(q_norm), weight_of(layer.k_norm),
            self.rope[layer.kind].inv_freq, self.semaphores,
            scale=layer.scale, eps=getattr(q_norm, "eps", 0.0),
            offset=getattr(q_norm, "offset", 0.0),
            value_norm=layer.value_norm, values_are_keys=layer.values_are_keys,
        )  # fmt: skip


def check_head_dim(size: int) -> None:
    """Of half a head there are products of matrices, of at least 16 inputs."""
    if size < 32 or size & (size - 1):
        raise ExportError(f"head_dim is {size}; with --device cuda it must be 32, 64, 128, ...")


def weight_of(norm: nn.Module | None) -> Tensor | None:
    """A norm's weight; None for none."""
    return getattr(norm, "weight", None)


def _tensors(rows: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    return rows.weight, getattr(rows, "scale", None), rows.bias
