"""A decode step on CUDA by models/kernels. A layer takes five launches where its mixer is
attention, and seven where it is a gated delta net. Routed experts take three more, or five more
where one of them is every token's. The end takes one."""

import torch
from torch import Tensor, nn

from tokenloop.export import packed_weights as packed
from tokenloop.export.errors import ExportError
from tokenloop.export.kept_weights import Keeping
from tokenloop.export.packed_weights import PackedBlock
from tokenloop.models.decoder import CausalLM
from tokenloop.models.kernels import cuda

# Half a head is multiplied as a matrix, of at least 16 inputs.
HEAD_DIMS = 32, 64, 128, 256, 512


class CudaStep(nn.Module):
    """hidden [B, 1, D], position int64 [B] -> logits float32 [B, V], as the network's
    decode_embedded.

    `bits` of the layers' weights are 4 or 8, and the head's are then 8. With 0 both stay as the
    network has them; or both are kept. The embedding stays as it is. With None the step can be
    traced and written and not run (packed_weights.PackedLinear).

    Raises ExportError for heads that the kernels cannot take.
    """

    def __init__(self, network: CausalLM, bits: int | Keeping | None = 0):
        super().__init__()
        backbone = network.model
        for mixer in (block.mixer for block in backbone.layers):
            if mixer.layer_type != packed.LINEAR_ATTENTION and mixer.head_dim not in HEAD_DIMS:
                size = mixer.head_dim
                raise ExportError(f"head_dim is {size}; with --device cuda it must be {HEAD_DIMS}")
        self.rope, self.norm = backbone.rope, backbone.norm
        self.layers = nn.ModuleList(packed.pack_blocks(network, bits))
        packed.pack_head(network, bits)
        head = network.lm_head
        self.head: nn.Module = head.rows if isinstance(head, packed.IntegerHead) else head
        self.soft_cap = network.soft_cap or 0.0
        linears = [part for part in self.layers.modules() if isinstance(part, packed.PackedLinear)]
        widest = max(linear.weight.shape[0] for linear in (*linears, self.head))
        kv_heads = max(layer.kv_heads for layer in self.layers)
        size = cuda.semaphores_size(network.batch, widest, kv_heads)
        semaphores = torch.zeros(size, dtype=torch.int32, device=self.head.weight.device)
        self.register_buffer("kernel_semaphores", semaphores, persistent=False)

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        x, branch, before = hidden[:, 0], None, None
        for layer in self.layers:
            x, projected = self._after(before, x, branch, layer.input_norm, layer.qkv)
            mixed = MIX[type(layer)](self, layer, projected, position)
            branch = self._linear(mixed, layer.o)
            x, branch = self._feed_forward(layer, x, branch)
            before = layer
        return self.logits(x, branch)

    def logits(self, x: Tensor, branch: Tensor) -> Tensor:
        """float32 [B, V] of the residual [B, D] in the last layer and its feed-forward's branch."""
        options = {"out_float32": True, "soft_cap": self.soft_cap}
        return self._after(self.layers[-1], x, branch, self.norm, self.head, **options)[1]

    def _feed_forward(self, layer: PackedBlock, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """The residual after the mixer, whose branch is given, and the feed-forward's branch."""
        norm = layer.mlp_norm
        residual = x, branch, weight_of(layer.post_attention_norm), None, norm.weight
        options = {"eps": norm.eps, "offset": norm.offset}
        if layer.moe is None:
            tensors = *linear_tensors(layer.gate_up), self.kernel_semaphores
            options["activation"] = layer.activation
            x, gated = cuda.add_norm_linear(*residual, *tensors, **options)
            return x, self._linear(gated, layer.down)
        x, normed = cuda.add_norm(*residual, **options)
        config, weights = layer.moe, layer.experts
        scores = self._linear(normed, layer.scores)
        counts = config.num_experts, config.num_experts_per_tok
        routed = cuda.route(scores, *counts, config.norm_topk_prob)
        shared = ()
        if layer.is_shared:
            gated = self._linear(normed, layer.gate_up, activation=layer.activation)
            shared = self._linear(gated, layer.down), scores
        tables = weights.gate_up_proj, weights.down_proj
        return x, cuda.experts(normed, *routed, *tables, *shared)

    def _after(
        self, before: PackedBlock | None, x: Tensor, branch: Tensor | None, norm: nn.Module,
        linear: nn.Module, **options,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The residual after the layer `before`, and what `linear` gives for its norm."""
        options = {"eps": norm.eps, "offset": norm.offset} | options
        tensors = *linear_tensors(linear), self.kernel_semaphores
        if before is None:
            return x, cuda.norm_linear(x, norm.weight, *tensors, **options)
        post = weight_of(before.post_mlp_norm)
        return cuda.add_norm_linear(
            x, branch, post, before.layer_scalar, norm.weight, *tensors, **options
        )

    def _linear(self, x: Tensor, linear: nn.Module, **options) -> Tensor:
        return cuda.linear(x, *linear_tensors(linear), self.kernel_semaphores, **options)

    def _attend(self, layer: packed.PackedAttention, projected: Tensor, position: Tensor) -> Tensor:
        """What the layer's `o` takes after `qkv` gave projected [B, N]."""
        gates = None
        if layer.output_gate:
            size = layer.o.inputs
            projected, gates = projected.split([projected.shape[1] - size, size], 1)
        q_norm, k_norm = layer.q_norm, layer.k_norm
        eps, offset = (0.0, 0.0) if q_norm is None else (q_norm.eps, q_norm.offset)
        attended = cuda.attend_step(
            projected, position, layer.cache.k, layer.cache.v, weight_of(q_norm), weight_of(k_norm),
            self.rope[layer.layer_type].inv_freq, self.kernel_semaphores,
            scale=layer.scale, eps=eps, offset=offset,
            value_norm=layer.value_norm, values_are_keys=layer.values_are_keys,
        )  # fmt: skip
        return attended if gates is None else cuda.sigmoid_gate(attended, gates)

    def _recur(self, layer: packed.PackedDeltaNet, projected: Tensor, position: Tensor) -> Tensor:
        """As `_attend`, for a gated delta net."""
        # A row begins anew at position 0, and nowhere else.
        cache, started = layer.cache, position
        qkv, z, b, a = projected.split(layer.sizes, 1)
        mixed = cuda.causal_conv1d_update(
            qkv, layer.conv1d.weight[:, 0], None, cache.conv, None, started, "silu"
        )
        q, k, v = mixed.split(layer.parts, 1)
        keys, values = (-1, layer.key_size), (-1, layer.value_size)
        out = cuda.gated_delta_rule_update(
            q.unflatten(1, keys), k.unflatten(1, keys), v.unflatten(1, values),
            a, b, layer.A_log, layer.dt_bias, cache.recurrent, None, started,
        )  # fmt: skip
        norm, z = layer.norm, z.unflatten(1, values)
        return cuda.gated_rms_norm(out, z, norm.weight, norm.eps).flatten(1)


MIX = {packed.PackedAttention: CudaStep._attend, packed.PackedDeltaNet: CudaStep._recur}


def weight_of(norm: nn.Module | None) -> Tensor | None:
    """A norm's weight, or None for no norm."""
    return None if norm is None else norm.weight


def linear_tensors(linear: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, scale and bias. The network's own head has no scale."""
    scale = linear.scale if isinstance(linear, packed.PackedLinear) else None
    return linear.weight, scale, linear.bias
