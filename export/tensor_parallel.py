"""A network as N smaller ones, one for each rank of a group, which together give what it gives.

Each rank has some heads, some columns of the feed-forwards and their experts, and some of the
vocabulary; the residual, the norms and the routers are every rank's. All ranks have the same
shapes, so one program is theirs: they differ in their tensors alone. What a rank adds once for all,
such as the bias of a sum, is zero on the others. docs/distributed.md has the plan.
"""

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.export.errors import ExportError
from tokenloop.export.packed_weights import LINEAR_ATTENTION, SHORT_CONV
from tokenloop.export.tensors_in_files import copied
from tokenloop.models.decoder import CausalLM
from tokenloop.models.ranks import gather, reduce

# What --tensor-parallel may be: what one host has.
MOST_RANKS = 16
# Rows of a step that a sum on CUDA takes at once (models/kernels/reduce_ranks).
MOST_ROWS = 128


class Part(NamedTuple):
    """The rank number `rank` of `ranks`."""

    rank: int
    ranks: int

    def of(self, groups: int) -> slice:
        """Which of so many groups, such as heads, it has: some, or one that it shares with its
        neighbours where there are fewer than ranks."""
        begin = self.rank * groups // self.ranks
        return slice(begin, begin + max(1, groups // self.ranks))


def shards(network: CausalLM, ranks: int, whole_embedding: bool = False) -> list[CausalLM]:
    """The networks of all ranks, of copies of the network's weights, before anything is packed.
    With `whole_embedding` every rank has the embedding, and looks up by itself.

    Errors: ExportError, with the numbers that would do, where `ranks` do not divide the network.
    """
    check(network, ranks)
    return [_local(network, Part(rank, ranks), whole_embedding) for rank in range(ranks)]


def check(network: CausalLM, ranks: int) -> None:
    """Errors: ExportError as of `shards`, and for a network that cannot be divided at all."""
    if network.model.streams is not None:
        raise ExportError(
            f"--tensor-parallel {ranks} is not for networks with alternating updates (Gemma 3n)"
        )
    sizes = dict.fromkeys(_sizes(network))
    faults = [f"{size} {what}" for what, size, shares in sizes if not _fits(size, shares, ranks)]
    if not faults:
        return
    possible = [
        str(n)
        for n in range(2, MOST_RANKS + 1)
        if all(_fits(size, shares, n) for _, size, shares in sizes)
    ]
    raise ExportError(
        f"--tensor-parallel {ranks} does not divide the {' and the '.join(faults)} of a layer: "
        + (f"{', '.join(possible)} would do" if possible else "no number does")
    )


def connect(network: CausalLM, ranks: int) -> None:
    """Let the network of a rank sum what the ranks have parts of, and gather the logits. After
    packing, which replaces linear layers."""
    total = partial(reduce, ranks=ranks)
    for block in network.model.layers:
        mixer, mlp = block.mixer, block.mlp
        _after(mixer.get_submodule(mixer.output), total)
        if mlp.moe is None or mlp.reads_residual:
            _after(mlp.dense.get_submodule("down_proj"), total)
        if mlp.reads_residual:
            mlp.experts_branch_norm.register_forward_pre_hook(lambda _, given: total(given[0]))
        elif mlp.moe is not None:
            _after(mlp, total)
    vocab_size = network.config.vocab_size
    # [N, B, 1, V / N], of which the last rows of the last ranks stand for no token.
    _after(
        network.lm_head,
        lambda part: gather(part, ranks).movedim(0, -2).flatten(-2)[..., :vocab_size],
    )


def _after(module: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    module.register_forward_hook(lambda module, given, result: function(result))


def _fits(size: int, shares: bool, ranks: int) -> bool:
    return size % ranks == 0 or shares and ranks % size == 0


def _sizes(network: CausalLM) -> Iterator[tuple[str, int, bool]]:
    """What must be divided: its name, its size, and whether ranks may share one of it."""
    for block in network.model.layers:
        mixer, mlp = block.mixer, block.mlp
        if mixer.layer_type == LINEAR_ATTENTION:
            yield "key heads of a delta net", mixer.key_heads, False
        elif mixer.layer_type == SHORT_CONV:
            yield "channels", mixer.conv.in_channels, False
        else:
            yield "query heads", mixer.heads, False
            yield "key/value heads", mixer.kv_heads, True
        if mlp.dense is not None:
            yield "columns of the feed-forward", mlp.dense.gate_proj.out_features, False
        if mlp.moe is not None:
            yield "columns of an expert", mlp.moe.moe_intermediate_size, False


def check_launches(network: CausalLM, ranks: int) -> None:
    """Errors: ExportError as of `check`, and for what CUDA's step has no sum for."""
    check(network, ranks)
    blocks = network.model.layers
    missing = {
        "layers' inputs of their own": network.model.per_layer is not None,
        "experts beside a feed-forward": any(block.mlp.reads_residual for block in blocks),
        "norms of all heads at once": any(
            getattr(block.mixer, "whole_norms", False) for block in blocks
        ),
        "layers without a norm ahead of them": any(
            block.norm(role) is None for block in blocks for role in ("mixer", "mlp")
        ),
    }
    if found := [what for what, there in missing.items() if there]:
        raise ExportError(
            f"--tensor-parallel {ranks} with --device cuda is not for {' and '.join(found)}: "
            "--backend inductor is right"
        )
    if network.batch > MOST_ROWS:
        raise ExportError(
            f"--batch is {network.batch}; with --tensor-parallel and --device cuda at most "
            f"{MOST_ROWS} are possible"
        )


def _local(network: CausalLM, part: Part, whole_embedding: bool) -> CausalLM:
    tensors = [*network.parameters(), *network.buffers()]
    # A copy of all but the tensors, of which those that are divided are copied below.
    local = copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
    divide = {LINEAR_ATTENTION: _delta_net, SHORT_CONV: _short_conv}
    for block in local.model.layers:
        mixer, mlp = block.mixer, block.mlp
        divide.get(mixer.layer_type, _attention)(mixer, part)
        if mlp.dense is not None:
            _feed_forward(mlp.dense, part)
        if mlp.moe is not None:
            _experts(mlp.experts, part)
    _vocabulary(local, part, whole_embedding)
    return local


def _attention(attention: Any, part: Part) -> None:
    heads, kv_heads = attention.heads, attention.kv_heads
    queries, keys = part.of(heads), part.of(kv_heads)
    attention.q_proj = _rows(attention.q_proj, [heads], [queries])
    for name in attention.projections[1:]:
        attention.set_submodule(name, _rows(attention.get_submodule(name), [kv_heads], [keys]))
    attention.o_proj = _columns(attention.o_proj, heads, queries, part)
    if attention.sinks is not None:
        attention.sinks = _of(attention.sinks, [heads], [queries])
    attention.heads = heads // part.ranks
    attention.kv_heads = keys.stop - keys.start
    if attention.whole_norms:
        attention.q_norm = NormOfParts(attention.q_norm, heads, queries, part.ranks)
        attention.k_norm = NormOfParts(attention.k_norm, kv_heads, keys, part.ranks)
    if attention.cache is not None:
        _resize(attention.cache, 2, attention.kv_heads)


def _delta_net(net: Any, part: Part) -> None:
    keys, values = part.of(net.key_heads), part.of(net.value_heads)
    by_key, by_value = ([net.key_heads], [keys]), ([net.value_heads], [values])
    # Channels are queries, keys and values.
    channels = [net.key_heads] * 2 + [net.value_heads], [keys] * 2 + [values]
    sizes = [*net.parts]
    if net.fused:
        net.in_proj_qkvz = _rows(net.in_proj_qkvz, *by_key)
        net.in_proj_ba = _rows(net.in_proj_ba, *by_key)
    else:
        net.in_proj_qkv = _rows(net.in_proj_qkv, *channels, sizes)
        for name in ("in_proj_z", "in_proj_b", "in_proj_a"):
            net.set_submodule(name, _rows(net.get_submodule(name), *by_value))
    net.conv1d = _conv(net.conv1d, *channels, sizes)
    net.dt_bias, net.A_log = _of(net.dt_bias, *by_value), _of(net.A_log, *by_value)
    net.out_proj = _columns(net.out_proj, net.value_heads, values, part)
    net.parts = tuple(size // part.ranks for size in sizes)
    net.key_heads //= part.ranks
    net.value_heads //= part.ranks
    _resize(net.cache, 1, sum(net.parts), "conv")
    _resize(net.cache, 1, net.value_heads, "recurrent")


def _short_conv(mixer: Any, part: Part) -> None:
    size = mixer.conv.in_channels
    own = part.of(size)
    # The gates and the convolution's input.
    mixer.in_proj = _rows(mixer.in_proj, [size] * 3, [own] * 3, [size] * 3)
    mixer.conv = _conv(mixer.conv, [size], [own], [size])
    mixer.out_proj = _columns(mixer.out_proj, size, own, part)
    _resize(mixer.cache, 1, size // part.ranks, "conv")


def _feed_forward(mlp: Any, part: Part) -> None:
    size = mlp.gate_proj.out_features
    own = part.of(size)
    mlp.gate_proj = _rows(mlp.gate_proj, [size], [own])
    mlp.up_proj = _rows(mlp.up_proj, [size], [own])
    mlp.down_proj = _columns(mlp.down_proj, size, own, part)


def _experts(experts: Any, part: Part) -> None:
    """Some columns of every expert: ranks that had some experts each would wait for one another."""
    size = experts.down_proj.shape[2]
    own = part.of(size)

    def halves(x: Tensor) -> nn.Parameter:
        """Of gates and ups [E, 2 I, ...]."""
        return _parameter(x.unflatten(1, (2, size))[:, :, own].flatten(1, 2))

    experts.gate_up_proj = halves(experts.gate_up_proj)
    experts.down_proj = _parameter(experts.down_proj[:, :, own])
    if experts.gate_up_proj_bias is not None:
        experts.gate_up_proj_bias = halves(experts.gate_up_proj_bias)
        experts.down_proj_bias = _once(experts.down_proj_bias, part)


def _vocabulary(network: CausalLM, part: Part, whole_embedding: bool) -> None:
    backbone, head = network.model, network.lm_head
    if whole_embedding:
        network.lm_head = _linear(_rows_of_vocabulary(head.weight, part))
        return
    is_tied = head.weight is backbone.embed_tokens.weight
    backbone.embed_tokens = VocabularyPart(backbone.embed_tokens.weight, part)
    if is_tied:
        network.lm_head = _linear(backbone.embed_tokens.weight)
    else:
        network.lm_head = _linear(_rows_of_vocabulary(head.weight, part))
    own = backbone.per_layer
    if own is not None:
        own.embed_tokens = VocabularyPart(own.embed_tokens.weight, part)


class VocabularyPart(nn.Module):
    """Some rows of an embedding's table, from `start` on: tokens int64 [B, T] -> [B, T, D], which
    the rank with the token's row gives to all."""

    def __init__(self, table: Tensor, part: Part):
        super().__init__()
        self.ranks = part.ranks
        self.weight = _rows_of_vocabulary(table, part)
        start = torch.tensor([part.rank * len(self.weight)], device=table.device)
        self.register_buffer("start", start, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        row = tokens - self.start
        is_here = (row >= 0) & (row < self.weight.shape[0])
        x = F.embedding(torch.where(is_here, row, 0), self.weight)
        return reduce(torch.where(is_here[..., None], x, 0.0), self.ranks)


class NormOfParts(nn.Module):
    """A norm of all heads at once, of which each rank has some. Those that several ranks have
    count as often each, so the mean of the squares is the same."""

    def __init__(self, norm: nn.Module, groups: int, chosen: slice, ranks: int):
        super().__init__()
        self.eps, self.offset, self.scale, self.ranks = norm.eps, norm.offset, norm.scale, ranks
        self.weight = _of(norm.weight, [groups], [chosen])

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        mean = reduce(x32.pow(2).mean(-1, keepdim=True), self.ranks) / self.ranks
        weight = (self.offset + self.weight.float()) * self.scale
        return (x32 * torch.rsqrt(mean + self.eps) * weight).to(x.dtype)


def _rows_of_vocabulary(table: Tensor, part: Part) -> nn.Parameter:
    """As many rows for each rank; the last may have rows of zeros, which stand for no token."""
    count = -(-len(table) // part.ranks)
    rows = table[part.rank * count : (part.rank + 1) * count]
    return _parameter(F.pad(rows, (0, 0, 0, count - len(rows))))


def _parameter(x: Tensor) -> nn.Parameter:
    return nn.Parameter(copied(x), requires_grad=False)


def _of(
    x: Tensor, groups: list[int], chosen: list[slice], sizes: list[int] | None = None
) -> nn.Parameter:
    """Of each part of x along its first axis, of `sizes`, so many groups of equal size, and of
    those the chosen ones."""
    parts = x.split(sizes or [len(x)])
    taken = [
        each.unflatten(0, (count, -1))[some].flatten(0, 1)
        for each, count, some in zip(parts, groups, chosen)
    ]
    return _parameter(torch.cat(taken))


def _rows(linear: nn.Linear, *which: Any) -> nn.Linear:
    """A linear layer of some outputs, as `_of` takes them."""
    return _linear(
        _of(linear.weight, *which), None if linear.bias is None else _of(linear.bias, *which)
    )


def _columns(linear: nn.Linear, groups: int, chosen: slice, part: Part) -> nn.Linear:
    """A linear layer of some groups of inputs, whose result is a part of a sum."""
    weight = linear.weight.unflatten(1, (groups, -1))[:, chosen].flatten(1)
    bias = None if linear.bias is None else _once(linear.bias, part)
    return _linear(_parameter(weight), bias)


def _once(bias: Tensor, part: Part) -> nn.Parameter:
    """What one of the ranks adds."""
    return _parameter(bias if part.rank == 0 else torch.zeros_like(bias))


def _linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def _conv(conv: nn.Conv1d, *which: Any) -> nn.Conv1d:
    """A depthwise convolution of some channels."""
    weight = _of(conv.weight, *which)
    with torch.device("meta"):
        local = nn.Conv1d(
            len(weight), len(weight), conv.kernel_size, groups=len(weight), bias=False
        )
    local.weight = weight
    if conv.bias is not None:
        local.bias = _of(conv.bias, *which)
    return local


def _resize(cache: nn.Module, axis: int, count: int, *names: str) -> None:
    """Give a cache's tensors another size along an axis."""
    for name in names or ("k", "v"):
        shape = list(getattr(cache, name).shape)
        shape[axis] = count
        setattr(cache, name, getattr(cache, name).new_zeros(shape))
