"""Prefill of a packed chunk of prompts on CUDA, by models/kernels and the decode step's weights.

Shapes: T tokens of up to B sequences, one after the other, of which the chunk says how many there
are; D hidden size, H query heads of size Dh, N outputs of a linear layer, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

from torch import Tensor, nn

from tokenloop.export.launches.cuda_step import (
    CudaStep,
    add_norm,
    linear_tensors,
    normed_heads,
    per_layer_branch,
    routed_experts,
    sinks_of,
)
from tokenloop.export.launches.embedded import Tables
from tokenloop.export.packed_weights import PackedAttention, PackedBlock, PackedDeltaNet
from tokenloop.models.decoder import CausalLM
from tokenloop.models.kernels import cuda
from tokenloop.models.kernels.linear.packing import leaves_scale


class Chunk(NamedTuple):
    """Sequence i has the tokens from starts[i] to starts[i + 1], the caches' row rows[i], or -1
    where there is no such sequence, and positions from first[i] on. int32 [B + 1], [B] and [B]."""

    starts: Tensor
    rows: Tensor
    first: Tensor

    @property
    def count(self) -> Tensor:
        """How many tokens there are, int32 [1]. What is beyond them is anything."""
        return self.starts[-1:]


class CudaPrefill(Tables):
    """A chunk's tokens int64 [T] -> logits float32 [B, V] after the last token of each sequence. A
    sequence without tokens has any logits.

    `last_starts` and `last_first` are starts and first of the chunk of those last tokens alone. All
    weights and caches are those of `step`, but for the network's embedding. No bit of a sequence's
    logits depends on T, B, the other sequences, or the chunks that its prompt comes in.
    """

    def __init__(self, step: CudaStep, network: CausalLM):
        super().__init__(network.model)
        self.step, kinds = step, [layer.has_keys for layer in step.layers]
        # From here on no layer has keys of its own, so nobody reads more than the last tokens.
        self.tail = kinds.index(False) if False in kinds else len(kinds)

    def forward(
        self, tokens: Tensor, starts: Tensor, rows: Tensor, first: Tensor, last_starts: Tensor,
        last_first: Tensor,
    ) -> Tensor:  # fmt: skip
        chunk, last = Chunk(starts, rows, first), Chunk(last_starts, rows, last_first)
        table = self.embed_tokens.weight
        x = cuda.embed_chunk(tokens, table, chunk.count, scale=self.scale)
        given, last_given = self._inputs(x, tokens, chunk)
        branch, before = None, None
        *layers, final = self.step.layers[: self.tail]
        for layer, each in zip(layers, given):
            x, normed = self._norm(before, x, branch, layer.input_norm, chunk.count)
            x, branch = self._finish(layer, x, self._mix(layer, normed, chunk), chunk.count, each)
            before = layer
        x, normed = self._norm(before, x, branch, final.input_norm, chunk.count)
        if isinstance(final, PackedAttention) and not final.cache.is_ring:
            mixed = self._attend_last(final, normed, chunk, last)
        else:
            mixed = cuda.last_tokens(self._mix(final, normed, chunk), starts)
        x = cuda.last_tokens(x, starts)
        x, branch = self._end(final, x, mixed, last.count, last_given[len(layers)])
        before, seen = final, {}
        for layer, each in zip(self.step.layers[self.tail :], last_given[self.tail :]):
            x, normed = self._norm(before, x, branch, layer.input_norm, last.count)
            mixed = self._see(layer, normed, last, seen)
            x, branch = self._end(layer, x, mixed, last.count, each)
            before = layer
        return self.step.logits(x, branch)

    def _inputs(
        self, x: Tensor, tokens: Tensor, chunk: Chunk
    ) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Each layer's input [T, P], and that of the last tokens [B, P], or a None for each."""
        given, last = None, None
        if self.own is not None:
            own = cuda.embed_chunk(tokens, self.own, chunk.count, scale=self.own_scale)
            linear = partial(self._linear, count=chunk.count)
            given = self.step.inputs(x, own, linear, chunk.count)
            last = cuda.last_tokens(given, chunk.starts)
        return self.step.by_layer(given), self.step.by_layer(last)

    def _norm(
        self, before: PackedBlock | None, x: Tensor, branch: Tensor | None, norm: nn.Module | None,
        count: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The residual after the layer `before`, and its norm."""
        if before is not None:
            branch = self.step.total(branch, count)
            return add_norm(x, branch, before.last_norm, before.layer_scalar, norm, count)
        if norm is None:
            return x, x
        return x, cuda.norm(x, norm.weight, count, eps=norm.eps, offset=norm.offset)

    def _end(
        self, layer: PackedBlock, x: Tensor, mixed: Tensor, count: Tensor, given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As `_finish`, of the last tokens [B, D]: rows as a step has them. With few of them its
        kernels are faster."""
        if layer.moe is None:
            return self.step.finish(layer, x, mixed, given)
        # Where there is no sequence there is anything, which no router may see.
        return self._finish(layer, x, mixed, count, given)

    def _finish(
        self, layer: PackedBlock, x: Tensor, mixed: Tensor, count: Tensor, given: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The residual ahead of the last branch, and that branch: the one of the layer's own input
        where it is `given`, and else the feed-forward's. The mixer's heads gave `mixed`."""
        branch = self._linear(mixed, layer.o, count)
        x, branch = self._feed_forward(layer, x, branch, count)
        if given is None:
            return x, branch
        linear = partial(self._linear, count=count)
        return per_layer_branch(layer, x, branch, given, linear, count)

    def _feed_forward(
        self, layer: PackedBlock, x: Tensor, branch: Tensor, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual after the mixer, whose branch is given, and the feed-forward's branch."""
        branch = self.step.total(branch, count)
        x, normed = add_norm(x, branch, layer.post_attention_norm, None, layer.mlp_norm, count)
        if layer.moe is None:
            return x, self._dense(layer, normed, count)
        dense = None
        if layer.is_shared or layer.beside is not None:
            dense = self._dense(layer, normed, count)
        linear = partial(self._linear, count=count)
        return x, routed_experts(layer, x, normed, dense, linear, count)

    def _dense(self, layer: PackedBlock, normed: Tensor, count: Tensor) -> Tensor:
        """What the feed-forward that every token has gives."""
        gated = self._linear(normed, layer.gate_up, count, activation=layer.activation)
        return self._linear(gated, layer.down, count)

    def _linear(self, x: Tensor, linear: nn.Module, count: Tensor, **options) -> Tensor:
        return cuda.linear_chunk(x, *linear_tensors(linear), count, **options)

    def _mix(self, layer: PackedBlock, normed: Tensor, chunk: Chunk) -> Tensor:
        """What the layer's `o` takes."""
        projected = self._linear(normed, layer.qkv, chunk.count)
        if isinstance(layer, PackedDeltaNet):
            return self._recur(layer, projected, chunk)
        # Views, whose rows lie as far apart as the projections'.
        size = sum(layer.sizes[:-1]) if layer.output_gate else projected.shape[1]
        q, kv = self._rotate(layer, projected[:, :size], chunk)
        attended = self._attend(layer, q, kv, chunk)
        if layer.cache.is_ring:
            cuda.store_ring(kv, *chunk, layer.cache.k, layer.cache.v)
        if not layer.output_gate:
            return attended
        return cuda.sigmoid_gate(attended, projected[:, size:], chunk.count)

    def _rotate(
        self, layer: PackedAttention, qkv: Tensor, chunk: Chunk, **parts: bool
    ) -> tuple[Tensor, Tensor]:
        """Queries, normed and rotated, and keys and values for a ring. A cache that is no ring has
        them now. `parts` say which of the two there are."""
        cache, rope = layer.used_cache, self.step.rope[layer.rotation]
        qkv, norms, options = normed_heads(layer, qkv, chunk.count, **parts)
        return cuda.rotate_chunk(
            qkv, *chunk, cache.k, cache.v, *norms, rope.inv_freq,
            value_norm=layer.value_norm, values_are_keys=layer.values_are_keys,
            is_ring=cache.is_ring, attention_factor=rope.attention_factor, **options, **parts,
        )  # fmt: skip

    def _attend(self, layer: PackedAttention, q: Tensor, kv: Tensor, chunk: Chunk) -> Tensor:
        cache = layer.cache
        options = {"scale": layer.scale, "is_ring": cache.is_ring}
        return cuda.attend_chunk(q, kv, *chunk, cache.k, cache.v, *sinks_of(layer), **options)

    def _attend_last(
        self, layer: PackedAttention, normed: Tensor, chunk: Chunk, last: Chunk
    ) -> Tensor:
        """As `_mix` of the last tokens [B, H * Dh]: nobody reads more of the last layer than their
        results, and every token's keys and values."""
        weight, scale, bias = linear_tensors(layer.qkv)
        if scale is not None and not leaves_scale(weight, scale):
            # Scales of groups lie side by side for all rows.
            weight, scale = cuda.dequantize(weight, scale, layer.qkv.inputs), None

        def rows(begin: int, end: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
            """The weights of the outputs from `begin` to `end`, their scales and biases."""
            scales = None if scale is None else scale[:, begin:end]
            return weight[begin:end], scales, None if bias is None else bias[begin:end]

        end = sum(layer.sizes)
        queries, gates = layer.sizes[0], end - layer.sizes[-1] if layer.output_gate else end
        kv = cuda.linear_chunk(normed, *rows(queries, gates), chunk.count)
        self._rotate(layer, kv, chunk, queries=False)
        normed = cuda.last_tokens(normed, chunk.starts)
        project, semaphores = partial(cuda.linear, normed), self.step.kernel_semaphores
        q = project(*rows(0, queries), semaphores)
        q, kv = self._rotate(layer, q, last, keys=False)
        attended = self._attend(layer, q, kv, last)
        if not layer.output_gate:
            return attended
        return cuda.sigmoid_gate(attended, project(*rows(gates, end), semaphores), last.count)

    def _see(
        self, layer: PackedAttention, normed: Tensor, last: Chunk, seen: dict[int, Tensor]
    ) -> Tensor:
        """What the `o` of a layer without keys takes, of the last tokens [B, D]. `seen` keeps how
        much of rings is filled, by their slots."""
        cache = layer.used_cache
        q, kv = self._rotate(layer, self._linear(normed, layer.qkv, last.count), last, keys=False)
        if cache.is_ring:
            # By now a ring has just what the last tokens see, whatever its order.
            if cache.slots not in seen:
                seen[cache.slots] = cuda.filled_slots(last.first, cache.slots)
            last = last._replace(first=seen[cache.slots])
        options = {"scale": layer.scale, "is_ring": False}
        return cuda.attend_chunk(q, kv, *last, cache.k, cache.v, *sinks_of(layer), **options)

    def _recur(self, layer: PackedDeltaNet, projected: Tensor, chunk: Chunk) -> Tensor:
        """What the layer's `o` takes after `qkv` gave projected [T, N]."""
        cache = layer.cache
        qkv, z, b, a = projected.split(layer.sizes, 1)
        mixed = cuda.causal_conv1d(
            qkv.T, layer.conv1d.weight[:, 0], None, chunk.starts, cache.conv, chunk.rows,
            chunk.first, "silu",
        ).T  # fmt: skip
        q, k, v = mixed.split(layer.parts, 1)
        keys, values = (-1, layer.key_size), (-1, layer.value_size)
        out = cuda.gated_delta_rule_chunk(
            q.unflatten(1, keys), k.unflatten(1, keys), v.unflatten(1, values),
            a, b, layer.A_log, layer.dt_bias, cache.recurrent, *chunk,
        )  # fmt: skip
        norm, z = layer.norm, z.unflatten(1, values)
        return cuda.gated_rms_norm(out, z, norm.weight, norm.eps, chunk.count).flatten(1)
