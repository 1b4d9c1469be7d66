"""A hybrid's decode step on CUDA: export/fused.py's, with gated delta nets by models/kernels
between the same launches: three of their own, the last of which is the norm and gate."""

from torch import Tensor

from tokenloop.export.pt2.cuda_step import FusedDecode
from tokenloop.export.pt2.hybrid_rows import AttentionLayer, DeltaNetLayer, fuse_layers
from tokenloop.models.kernels import cuda


class HybridDecode(FusedDecode):
    """As FusedDecode, of a hybrid."""

    fuse_layers = staticmethod(fuse_layers)

    def _attend(
        self, layer: AttentionLayer | DeltaNetLayer, projected: Tensor, position: Tensor
    ) -> Tensor:
        """What the layer's `o` takes after `qkv` gave projected [B, N]."""
        if isinstance(layer, DeltaNetLayer):
            return _delta_net(layer, projected, position)
        gates = layer.o.inputs
        qkv, gates = projected.split([projected.shape[1] - gates, gates], 1)
        return super()._attend(layer, qkv.contiguous(), position) * gates.sigmoid()


def _delta_net(layer: DeltaNetLayer, projected: Tensor, position: Tensor) -> Tensor:
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
    norm = layer.norm
    return cuda.gated_rms_norm(out, z.unflatten(1, values), norm.weight, norm.eps).flatten(1)
