"""A decode step on CUDA by models/kernels. A layer takes five launches where its mixer is
attention, and seven where it is a gated delta net. Routed experts take one more, and an input of
the layer's own takes four more. The end takes one. (Wide rows, and integers beside experts, take
more: models/kernels.)"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from tokenloop.export import packed_weights as packed
from tokenloop.export.errors import ExportError
from tokenloop.export.kept_weights import Keeping
from tokenloop.export.launches.embedded import split
from tokenloop.export.packed_experts import ScaledExperts
from tokenloop.export.packed_weights import PackedBlock
from tokenloop.models.decoder import CausalLM
from tokenloop.models.kernels import cuda
from tokenloop.models.kernels.reduce_ranks.operator import SLOT_BYTES, SLOTS

# The names of a mailbox's tensors.
PEERS, EPOCHS = "peers", "epochs"
# Half a head is multiplied as a matrix, of at least 16 inputs.
HEAD_DIMS = 32, 64, 128, 256, 512


def fit_heads(attention: nn.Module) -> None:
    """Pad the heads of an attention to the next size that the kernels take, in place.

    Raises ExportError for heads that are too long, or whose norms and gates are for their size.
    """
    size = attention.head_dim
    if size in HEAD_DIMS:
        return
    norms = attention.q_norm, attention.k_norm, attention.v_norm
    fixed = attention.output_gate or any(norm is not None for norm in norms)
    if fixed or size > max(HEAD_DIMS):
        raise ExportError(
            f"a layer's head_dim is {size}; with --device cuda it must be one of "
            f"{', '.join(map(str, HEAD_DIMS))}"
        )
    packed.pad_heads(attention, next(each for each in HEAD_DIMS if each > size))


class Mailbox(nn.Module):
    """Where ranks write what they tell this one: `slots` of `slot_bytes` for each rank, twice, and
    a flag for each rank's slot. The runner has that memory, and tells the kernels where it is, in
    peers int64 [2 N + 1]; epochs int32 [slots] count (models/kernels/reduce_ranks)."""

    def __init__(self, ranks: int, slots: int, slot_bytes: int, device: torch.device):
        super().__init__()
        self.slots, self.slot_bytes = slots, slot_bytes
        peers = torch.zeros(2 * ranks + 1, dtype=torch.int64, device=device)
        epochs = torch.zeros(slots, dtype=torch.int32, device=device)
        self.register_buffer(PEERS, peers, persistent=False)
        self.register_buffer(EPOCHS, epochs, persistent=False)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.peers, self.epochs


class CudaStep(nn.Module):
    """hidden [B, 1, E], position int64 [B] -> logits float32 [B, V], as the network's
    decode_embedded. In memory hidden is as embedded.py has it.

    `bits` of the layers' weights are 4 or 8, or "fp8", and the head has then integers of 8. With 0
    both stay as the network has them; or both are kept. The embedding stays as it is. With None the
    step can be traced and written and not run (packed_weights.PackedLinear).

    `rows` are the most that `run` takes, by default those of the network. With several `ranks` the
    network is one's of tensor_parallel.shards. Branches are then parts, until the residual takes
    their sum, and logits are gathered: all ranks have the same.

    Raises ExportError as `fit_heads`.
    """

    def __init__(
        self, network: CausalLM, bits: int | str | Keeping | None = 0, rows: int | None = None,
        ranks: int = 1,
    ):  # fmt: skip
        super().__init__()
        backbone = network.model
        for mixer in (block.mixer for block in backbone.layers):
            if mixer.layer_type != packed.LINEAR_ATTENTION:
                fit_heads(mixer)
        self.rope, self.norm = backbone.rope, packed.unscaled(backbone.norm)
        self.layers = nn.ModuleList(packed.pack_blocks(network, bits))
        self.per_layer = packed.pack_inputs(network, bits)
        self.hidden_size = backbone.embed_tokens.embedding_dim
        packed.pack_head(network, bits)
        head = network.lm_head
        self.head: nn.Module = head.rows if isinstance(head, packed.PackedHead) else head
        self.soft_cap = network.soft_cap or 0.0
        linears = [part for part in self.modules() if isinstance(part, packed.PackedLinear)]
        widest = max(linear.weight.shape[0] for linear in (*linears, self.head))
        kv_heads = max(layer.kv_heads for layer in self.layers)
        size = cuda.semaphores_size(rows or network.batch, widest, kv_heads)
        semaphores = torch.zeros(size, dtype=torch.int32, device=self.head.weight.device)
        self.register_buffer("kernel_semaphores", semaphores, persistent=False)
        self.ranks, self.vocab_size = ranks, network.config.vocab_size
        if ranks > 1:
            device, weight = semaphores.device, network.model.embed_tokens.weight
            count = rows or network.batch
            self.sums = Mailbox(ranks, count, self.hidden_size * weight.element_size(), device)
            self.exchange = Mailbox(ranks, SLOTS, SLOT_BYTES, device)

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        x, own = split(hidden, self.hidden_size)
        return self.run(x, position, own)

    def run(
        self, x: Tensor, position: Tensor, own: Tensor | None = None,
        drafts: nn.ModuleList | None = None,
    ) -> Tensor:  # fmt: skip
        """`forward` of embeddings x [B, D], and of the tokens' own vectors [B, W], where there are
        any. With `drafts` (cuda_drafts.Drafts, for each layer) the rows are of one sequence, at
        consecutive positions."""
        given = None if own is None else self.inputs(x, own, self._linear)
        branch, before = None, None
        for i, (layer, each) in enumerate(zip(self.layers, self.by_layer(given))):
            x, projected = self._after(before, x, branch, layer.input_norm, layer.qkv)
            mixed = MIX[type(layer)](self, layer, projected, position, drafts and drafts[i])
            x, branch = self.finish(layer, x, mixed, each)
            before = layer
        return self.logits(x, branch)

    def mailboxes(self) -> dict[str, dict[str, int]]:
        """What the manifest says of the mailboxes, by the beginning of their tensors' names."""
        return {
            name: {"slots": box.slots, "slot_bytes": box.slot_bytes}
            for name, box in (("exchange", self.exchange), ("sums", self.sums))
        }

    def network_parameters(self) -> Iterable[Tensor]:
        """All weights but the head's."""
        yield from self.layers.parameters()
        if self.per_layer is not None:
            yield from self.per_layer.parameters()

    def inputs(
        self, x: Tensor, own: Tensor, linear: Callable[[Tensor, nn.Module], Tensor],
        count: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The layers' inputs [N, W] of embeddings x [N, D] and the tokens' own vectors [N, W].
        `linear` multiplies. Of a chunk the first `count` rows are."""
        norm, projected = self.per_layer.norm, linear(x, self.per_layer.projection)
        options = {"eps": norm.eps, "offset": norm.offset}
        return cuda.layer_inputs(projected, own, norm.weight, count, **options)

    def by_layer(self, given: Tensor | None) -> Sequence[Tensor | None]:
        """Views of the layers' inputs [N, W], one for each layer, or a None for each."""
        if given is None:
            return [None] * len(self.layers)
        return given.split(self.per_layer.size, 1)

    def logits(self, x: Tensor, branch: Tensor) -> Tensor:
        """float32 [B, V] of the residual [B, D] in the last layer and its feed-forward's branch."""
        options = {"out_float32": True, "soft_cap": self.soft_cap}
        logits = self._after(self.layers[-1], x, branch, self.norm, self.head, **options)[1]
        if self.ranks == 1:
            return logits
        return cuda.gather_columns(logits, *self.exchange.tensors, width=self.vocab_size)

    def finish(
        self, layer: PackedBlock, x: Tensor, mixed: Tensor, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The residual [B, D] ahead of the last branch, and that branch: the one of the layer's own
        input where it is `given`, and else the feed-forward's. The mixer's heads gave `mixed`."""
        x, branch = self._feed_forward(layer, x, self._linear(mixed, layer.o))
        if given is None:
            return x, branch
        return per_layer_branch(layer, x, branch, given, self._linear)

    def _feed_forward(self, layer: PackedBlock, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """The residual after the mixer, whose branch is given, and the feed-forward's branch."""
        added = x, branch, layer.post_attention_norm, None, layer.mlp_norm
        if layer.moe is None:
            x, gated = self._add_norm_linear(*added, layer.gate_up, activation=layer.activation)
            return x, self._linear(gated, layer.down)
        if layer.beside is not None:
            x, normed = self._add_norm(*added)
            gated = self._linear(normed, layer.gate_up, activation=layer.activation)
            return x, routed_experts(
                layer, x, normed, self._linear(gated, layer.down), self._linear
            )
        x, normed, scores, gated = self._add_norm_scores(layer, *added)
        beside = {}
        if layer.is_shared:
            if gated is None:
                gated = self._linear(normed, layer.gate_up, activation=layer.activation)
            if is_plain(layer.down):
                beside = {"shared": gated, "shared_down": layer.down.weight}
            else:
                beside = {"shared": self._linear(gated, layer.down)}
        return x, step_experts(layer, normed, scores, None, **beside)

    def _add_norm_scores(
        self, layer: PackedBlock, x: Tensor, branch: Tensor, post: nn.Module | None,
        scalar: Tensor | None, norm: nn.Module | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
        """The new residual of `add_norm`, its norm, the router's scores of that, and what gate and
        up of the expert that every token has give, or None where that is left to do."""
        fits = self.ranks == 1 and norm is not None and is_plain(layer.scores)
        if not fits or not cuda.fits_one_launch(self.hidden_size):
            x, normed = self._add_norm(x, branch, post, scalar, norm)
            return x, normed, self._linear(normed, layer.scores), None
        is_beside = layer.is_shared and is_plain(layer.gate_up)
        shared = (layer.gate_up.weight, layer.activation) if is_beside else (None, "silu")
        *given, gated = cuda.add_norm_scores(
            x, branch, weight_of(post), scalar, norm.weight, layer.scores.weight, *shared,
            eps=norm.eps, offset=norm.offset,
        )  # fmt: skip
        return *given, gated if is_beside else None

    def _after(
        self, before: PackedBlock | None, x: Tensor, branch: Tensor | None, norm: nn.Module | None,
        linear: nn.Module, **options,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The residual after the layer `before`, and what `linear` gives for its norm."""
        if before is not None:
            added = x, branch, before.last_norm, before.layer_scalar, norm
            return self._add_norm_linear(*added, linear, **options)
        if norm is None:
            return x, self._linear(x, linear, **options)
        tensors = *linear_tensors(linear), self.kernel_semaphores
        options |= {"eps": norm.eps, "offset": norm.offset}
        return x, cuda.norm_linear(x, norm.weight, *tensors, **options)

    def _add_norm_linear(
        self, x: Tensor, branch: Tensor, post: nn.Module | None, scalar: Tensor | None,
        norm: nn.Module | None, linear: nn.Module, **options,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """The new residual of `add_norm`, and what `linear` gives for its norm."""
        if norm is None or self.ranks > 1:
            x, normed = self._add_norm(x, branch, post, scalar, norm)
            return x, self._linear(normed, linear, **options)
        tensors = *linear_tensors(linear), self.kernel_semaphores
        options |= {"eps": norm.eps, "offset": norm.offset}
        residual = x, branch, weight_of(post), scalar, norm.weight
        return cuda.add_norm_linear(*residual, *tensors, **options)

    def _add_norm(
        self, x: Tensor, branch: Tensor, post: nn.Module | None, scalar: Tensor | None,
        norm: nn.Module | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """`add_norm` of the branch that is the sum of the ranks'."""
        if self.ranks == 1:
            return add_norm(x, branch, post, scalar, norm)
        weights, options = (weight_of(post), scalar), {"eps": norm.eps, "offset": norm.offset}
        return cuda.reduce_add_norm(x, branch, *weights, norm.weight, *self.sums.tensors, **options)

    def total(self, branch: Tensor, count: Tensor) -> Tensor:
        """The sum of the ranks' branches [T, D] of a chunk, of which the first `count` rows are."""
        if self.ranks == 1:
            return branch
        return cuda.sum_ranks(branch, *self.exchange.tensors, count)

    def _linear(self, x: Tensor, linear: nn.Module, **options) -> Tensor:
        return cuda.linear(x, *linear_tensors(linear), self.kernel_semaphores, **options)

    def _attend(
        self, layer: packed.PackedAttention, projected: Tensor, position: Tensor,
        drafts: nn.Module | None,
    ) -> Tensor:  # fmt: skip
        """What the layer's `o` takes after `qkv` gave projected [B, N]."""
        gates = None
        if layer.output_gate:
            size = layer.o.inputs
            projected, gates = projected.split([projected.shape[1] - size, size], 1)
        projected, norms, options = normed_heads(layer, projected)
        rope = self.rope[layer.rotation]
        cache, parts = layer.used_cache, {} if layer.has_keys else {"keys": False}
        attend, caches = cuda.attend_step, (cache.k, cache.v)
        if drafts is not None:
            attend, caches = cuda.attend_drafts, (*caches, drafts.draft_k, drafts.draft_v)
            parts |= {"stores": not cache.is_ring}
        attended = attend(
            projected, position, *caches, *norms,
            rope.inv_freq, self.kernel_semaphores, *sinks_of(layer), scale=layer.scale, **options,
            value_norm=layer.value_norm, values_are_keys=layer.values_are_keys,
            attention_factor=rope.attention_factor, **parts,
        )  # fmt: skip
        return attended if gates is None else cuda.sigmoid_gate(attended, gates)

    def _recur(
        self, layer: packed.PackedDeltaNet, projected: Tensor, position: Tensor, drafts: None
    ) -> Tensor:
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


def add_norm(
    x: Tensor, branch: Tensor, post: nn.Module | None, scalar: Tensor | None,
    norm: nn.Module | None, count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The new residual of cuda.add_norm, and its norm, or itself where there is no `norm`."""
    if norm is not None:
        options = {"eps": norm.eps, "offset": norm.offset}
        return cuda.add_norm(x, branch, weight_of(post), scalar, norm.weight, count, **options)
    eps, offset = (0.0, 0.0) if post is None else (post.eps, post.offset)
    x = cuda.add_branch(x, branch, weight_of(post), scalar, count, eps=eps, offset=offset)
    return x, x


def per_layer_branch(
    layer: PackedBlock, x: Tensor, branch: Tensor, given: Tensor,
    linear: Callable[[Tensor, nn.Module], Tensor], count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The residual after the feed-forward, whose branch is given, and the branch of the layer's own
    input `given` [N, P]. `linear` multiplies. Of a chunk the first `count` rows are."""
    own, post = layer.per_layer, layer.post_mlp_norm
    eps, offset = (0.0, 0.0) if post is None else (post.eps, post.offset)
    x = cuda.add_branch(x, branch, weight_of(post), None, count, eps=eps, offset=offset)
    gated = cuda.gate_input(linear(x, own.input_gate), given, count, activation=own.activation)
    return x, linear(gated, own.projection)


def normed_heads(
    layer: packed.PackedAttention, projected: Tensor, count: Tensor | None = None,
    queries: bool = True, keys: bool = True,
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None], dict[str, float]]:  # fmt: skip
    """Projections [B, N], the weights of the norms of queries and keys that are left to do, head by
    head, and their eps and offset. Norms of all heads at once are done here. `queries` and `keys`
    say which of the two there are."""
    q_norm, k_norm = layer.q_norm, layer.k_norm
    if q_norm is None:
        return projected, (None, None), {"eps": 0.0, "offset": 0.0}
    weights = q_norm.weight, weight_of(k_norm)
    options = {"eps": q_norm.eps, "offset": q_norm.offset}
    if not layer.whole_norms:
        return projected, weights, options
    weights = [weight if there else None for weight, there in zip(weights, (queries, keys))]
    return cuda.norm_heads(projected, *weights, count, **options), (None, None), options


def sinks_of(layer: packed.PackedAttention) -> tuple[Tensor, ...]:
    """The sinks of the heads, as an operator's last tensor, or nothing where there are none."""
    return () if layer.sinks is None else (layer.sinks,)


def routed_experts(
    layer: PackedBlock, x: Tensor, normed: Tensor, dense: Tensor | None,
    linear: Callable[[Tensor, nn.Module], Tensor], count: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The branch of a feed-forward with experts, of the residual x and its norm. `dense` is what
    the feed-forward that every token has gives, or None. Of a chunk the first `count` rows are."""
    config, beside = layer.moe, layer.beside
    inputs, router_inputs, scales = normed, normed, None
    if beside is not None:
        router_inputs, scales = _normed(x, beside.router_norm, count), beside.expert_scales
    scores = linear(router_inputs, layer.scores)
    if beside is not None:
        inputs = _normed(x, beside.experts_norm, count)
    if count is None:
        given = step_experts(layer, inputs, scores, scales)
    else:
        counts = config.num_experts, config.num_experts_per_tok, config.norm_topk_prob
        routed = cuda.route(scores, *counts, count, scales)
        tables = layer.experts.gate_up_proj, layer.experts.down_proj
        shared = (dense, scores) if layer.is_shared else ()
        given = cuda.experts_chunk(
            inputs, *routed, *tables, count, *shared, **expert_options(layer)
        )
    if beside is None:
        return given
    norm = beside.experts_branch_norm
    dense = _normed(dense, beside.dense_branch_norm, count)
    return cuda.add_branch(dense, given, norm.weight, None, count, eps=norm.eps, offset=norm.offset)


def step_experts(
    layer: PackedBlock, x: Tensor, scores: Tensor, scales: Tensor | None, **beside: Tensor
) -> Tensor:
    """What the experts of a step's rows x [B, D] give. `beside` has what is `shared`
    (models/kernels/experts/reference.py)."""
    weights, config = layer.experts, layer.moe
    return cuda.route_experts(
        x, scores, config.num_experts_per_tok, config.norm_topk_prob, scales,
        weights.gate_up_proj, weights.down_proj, **beside, **expert_options(layer),
    )  # fmt: skip


def is_plain(linear: nn.Module) -> bool:
    """Whether a linear layer is a matrix as it is, and nothing else."""
    return linear_tensors(linear)[1:] == (None, None)


def _normed(x: Tensor, norm: nn.Module, count: Tensor | None) -> Tensor:
    return cuda.norm(x, norm.weight, count, eps=norm.eps, offset=norm.offset)


def expert_options(layer: PackedBlock) -> dict[str, Tensor | str]:
    """What an operator takes of the layer's experts besides SiLU without biases and scales."""
    experts, options = layer.experts, {}
    if experts.gate_up_proj_bias is not None:
        options = {
            "gate_up_bias": experts.gate_up_proj_bias, "down_bias": experts.down_proj_bias,
        }  # fmt: skip
    if experts.activation != "silu":
        options["activation"] = experts.activation
    if isinstance(experts, ScaledExperts):
        options |= {"gate_up_scale": experts.gate_up_scale, "down_scale": experts.down_scale}
    return options


def weight_of(norm: nn.Module | None) -> Tensor | None:
    """A norm's weight, or None for no norm."""
    return None if norm is None else norm.weight


def linear_tensors(linear: nn.Module) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Weight, scale and bias. The network's own head has no scale."""
    scale = linear.scale if isinstance(linear, packed.PackedLinear) else None
    return linear.weight, scale, linear.bias
