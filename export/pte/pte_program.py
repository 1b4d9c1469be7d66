"""The ExecuTorch program: methods around the XNNPACK regions, and state shared between them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from executorch.exir import (
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge,
)
from executorch.exir._serialize._cord import Cord
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from tokenloop.export.background import Background
from tokenloop.export.methods import (
    DecodeEmbedded,
    Embed,
    Pool,
    Prefill,
    integers,
    prompt_chunk,
    prompt_length,
)
from tokenloop.export.pte import block_cache as attention
from tokenloop.export.pte import xnnpack_regions as xnnpack
from tokenloop.export.pte.block_cache import UNIT, BlockCache, SlotLayout
from tokenloop.export.pte.composite_operators import composite_operators_once
from tokenloop.export.pte.constants_in_files import constants_in_files
from tokenloop.export.pte.lazy_graphs import lazy_graphs
from tokenloop.export.pte.linking import link
from tokenloop.export.pte.lowered_experts import LoweredExperts
from tokenloop.export.pte.lowered_layers import Regions, is_running, lower_layers
from tokenloop.export.pte.quantize import Shortlist, ShortlistHead
from tokenloop.export.pte.running_regions import (
    LINEAR_ATTENTION,
    SHORT_CONV,
)
from tokenloop.export.pte.running_state import DeltaRule, RunningState, chunk_taps, step_taps
from tokenloop.export.pte.state_places import state_places
from tokenloop.export.pte.stream_regions import Merged, OfMerged, prepare_streams
from tokenloop.export.pte.xnnpack_graph import GraphBuilder, GraphDelegate
from tokenloop.models.decoder import CausalLM


class Mix(NamedTuple):
    """What a method does with layers' state. attend(i, cache, sinks, q, own) is the attention of
    layer i, whose `own` keys and values are None where it sees another one's. taps(cache, x) gives
    a convolution's taps of its inputs x [1, T, C], and rule(i, cache, q, k, v, a, b) is the gated
    delta rule of layer i."""

    attend: Callable
    taps: Callable
    rule: Callable


class DelegatedMethod(nn.Module):
    """What prefill and decode share: embedding, regions, and the caches between them."""

    def __init__(self, model: nn.Module, lowered: "Lowered", layers: "Regions"):
        super().__init__()
        self.embed_tokens, self.embed = model.model.embed_tokens, model.model.embed
        # What `embed` looks up besides, and the region of the layers' own inputs.
        inputs = model.model.per_layer
        self.own_tokens = None if inputs is None else inputs.embed_tokens
        self.own_size = 0 if inputs is None else inputs.size
        self.hidden_size, self.own_inputs = model.config.hidden_size, layers.own_inputs
        self.expanded = layers.expanded
        self.rope = model.model.rope
        mixers = [layer.mixer for layer in model.model.layers]
        self.layer_types = [mixer.layer_type for mixer in mixers]
        self.rotations = [None if is_running(mixer) else mixer.rotation for mixer in mixers]
        self.before = nn.ModuleList(layers.before)
        self.inside = nn.ModuleDict({str(i): region for i, region in layers.inside.items()})
        self.after = nn.ModuleList(layers.after)
        self.ends = nn.ModuleDict({str(i): region for i, region in layers.ends.items()})
        mixtures = [i for i, x in enumerate(model.model.layers) if x.mlp.moe is not None]
        self.mixtures = {layer: number for number, layer in enumerate(mixtures)}
        self.experts = nn.ModuleList(LoweredExperts(model.model.layers[i].mlp) for i in mixtures)
        self.lm_head = lowered.head
        # Methods share the buffers that have equal names.
        self.caches = nn.ModuleDict({str(i): cache for i, cache in lowered.caches.items()})
        self.slots = nn.ModuleDict(lowered.slots)
        self.shortlist, self.rescore = lowered.shortlist, lowered.rescore
        # Layers of a type have the same shape.
        attending = {i: mixer for i, mixer in enumerate(mixers) if not is_running(mixer)}
        self.shapes = {
            m.layer_type: (m.kv_heads, m.heads // m.kv_heads, m.head_dim)
            for m in attending.values()
        }
        self.has_sinks = {m.layer_type: m.sinks is not None for m in attending.values()}
        nets = {i: m for i, m in enumerate(mixers) if m.layer_type == LINEAR_ATTENTION}
        self.rule = DeltaRule(nets, self.CHUNKS) if nets else None
        for i, mixer in attending.items():
            sinks = None if mixer.sinks is None else mixer.sinks.detach().float()
            self.register_buffer(f"sinks{i}", sinks)
        # A layer's cache, its own or that of the last before it which shares its own.
        self.owners = [model.model.caches().index(cache) for cache in model.model.caches()]
        self.rows = model.batch
        self.soft_cap = None if model.soft_cap is None else soft_cap(model.config.vocab_size)
        self.cap = model.soft_cap

    def run(self, x: Tensor, positions: Tensor, mix: Mix, last: Callable) -> Tensor:
        """`result` of embeddings x [1, T, E]: logits [N, V]. last(x) picks the N positions that it
        is wanted of from [1, T, ...]."""
        owns = None
        if self.own_inputs is not None:
            x, owns = x[..., : self.hidden_size], x[..., self.hidden_size :]
            (owns,) = self.own_inputs(x, owns)
        # A hidden state, or streams of them.
        xs = [x] if self.expanded is None else [x, *self.expanded(x)]
        rotations = [name for name in dict.fromkeys(self.rotations) if name is not None]
        rope = {name: self.rope[name](positions) for name in rotations}
        for i, name in enumerate(self.layer_types):
            cache = self.caches[str(self.owners[i])]
            if name == LINEAR_ATTENTION:
                x_in, a, b, *gates = self.before[i](*xs)
                given = self.inside[str(i)](*mix.taps(cache, x_in))
                mixed = [mix.rule(i, cache, *given, a, b)]
            elif name == SHORT_CONV:
                x_in, *gates = self.before[i](*xs)
                mixed = mix.taps(cache, x_in)
            else:
                q, *gates = self.before[i](*xs, *rope[self.rotations[i]])
                own_keys = None
                if self.owners[i] == i:
                    *own_keys, gates = gates[0], gates[1], gates[2:]
                mixed = [mix.attend(i, cache, getattr(self, f"sinks{i}"), q, own_keys)]
            if len(xs) > 1:
                # The layer has said what it predicts of them.
                xs, gates = gates, []
            own = []
            if owns is not None:
                own = [owns[..., i * self.own_size : (i + 1) * self.own_size]]
            if i == len(self.layer_types) - 1:
                xs, own, mixed, gates = (list(map(last, each)) for each in (xs, own, mixed, gates))
            is_later = str(i) in self.ends
            given = self.after[i](*xs, *mixed, *gates, *([] if is_later else own))
            xs, routed = given[: len(xs)], given[len(xs) :]
            if routed:
                (x,) = xs
                hidden, scores, *beside = routed
                out = self.experts[self.mixtures[i]](hidden, scores)
                xs = [self.ends[str(i)](out, x, *beside, *own)[0] if is_later else x + out]
        return self.result(*xs)

    def result(self, *xs: Tensor) -> Tensor:
        """What the method gives of hidden states [1, N, D], those of the N positions, or of streams
        of them."""
        logits, hidden = self.lm_head(*xs)
        if self.shortlist is not None:
            size = hidden.shape[-1]
            logits = self.shortlist(
                logits, hidden.view(-1, 1, size), lambda *rows: self.rescore[len(logits)](*rows)[0]
            )
        if self.soft_cap is None:
            return logits
        cap = torch.full((1,), self.cap)
        return self.soft_cap(logits, 1 / cap, cap)[0]


class DelegatedPrefill(DelegatedMethod):
    """tokens int64 [1, T], positions int64 [T] (and row int64 [1], where there are several) ->
    logits float32 [1, V] after the last token."""

    CHUNKS = True

    def __init__(self, model: nn.Module, lowered: "Lowered", traced: int):
        super().__init__(model, lowered, lowered.prefill)
        self.attention = nn.ModuleDict(
            {
                name: attention.PrefillAttention(
                    slots, *self.shapes[name], traced, self.has_sinks[name]
                )
                for name, slots in self.slots.items()
            }
        )

    def forward(self, tokens: Tensor, positions: Tensor, row: Tensor | None = None) -> Tensor:
        column = (positions.float() * UNIT)[:, None]
        newest = {
            group: (column + UNIT / 2).expand(-1, group).reshape(-1, 1)
            for group in dict.fromkeys(group for _, group, _ in self.shapes.values())
        }
        shared, places = {}, {}
        first = {name: self.caches[str(self.layer_types.index(name))] for name in self.slots}
        for name, slots in self.slots.items():
            _, group, _ = self.shapes[name]
            shared[name] = attention.Chunk(
                begin=positions[0],
                positions=column.view(1, -1),
                newest=newest[group],
                oldest=newest[group] - slots.count * UNIT,
                held=slots.held(positions),
                row=row,
            )
            # Layers of a type have equal caches.
            one = row if row is not None else torch.zeros(1, dtype=torch.int64)
            places[name] = first[name].places(slots.indices(positions), one)

        # What is shared is stored when no layer needs any more what was there.
        waiting = {}

        def attend(i, cache, sinks, q, own):
            name, owner = self.layer_types[i], self.owners[i]
            k, v = waiting[owner] if own is None else own
            attended = self.attention[name](q, k, v, cache, shared[name], sinks)
            waiting[owner] = k, v
            if owner not in self.owners[i + 1 :]:
                cache.store(k, v, places[name])
            return attended

        running = row if row is not None else torch.zeros(1, dtype=torch.int64)
        started = positions[:1] > 0

        def taps(cache, x):
            return chunk_taps(cache, x, running, started)

        def rule(i, cache, *given):
            return self.rule.chunk(i, cache, *given, positions, running, started)

        mix = Mix(attend, taps, rule)
        return self.run(self.embed(tokens), positions, mix, lambda x: x[:, -1:])


class DelegatedPool(DelegatedPrefill):
    """tokens int64 [1, T], positions int64 [T] -> the pooled output float32 [1, D]."""

    def __init__(self, model: nn.Module, lowered: "Lowered", traced: int):
        super().__init__(model, lowered, traced)
        # The head is no part of this method.
        self.lm_head = self.shortlist = self.soft_cap = None
        head = xnnpack.PooledHead(model.model.norm, self.hidden_size)
        self.head = lower_head(model, head, 1)

    def result(self, *xs: Tensor) -> Tensor:
        return self.head(*xs)[0].view(1, self.hidden_size)


class DelegatedDecodeEmbedded(DelegatedMethod):
    """hidden float32 [B, 1, D], position int64 [B] -> logits float32 [B, V]."""

    CHUNKS = False

    def __init__(self, model: nn.Module, lowered: "Lowered"):
        super().__init__(model, lowered, lowered.decode)
        self.attention = nn.ModuleDict(
            {
                name: attention.DecodeAttention(
                    slots, *self.shapes[name], self.rows, self.has_sinks[name]
                )
                for name, slots in self.slots.items()
            }
        )

    def forward(self, hidden: Tensor, position: Tensor) -> Tensor:
        column = ((position.float() + 0.5) * UNIT)[:, None]
        newest = dict.fromkeys((heads for heads, _, _ in self.shapes.values()), column)
        if self.rows > 1:
            newest = {
                heads: column[None].expand(heads, -1, -1).reshape(-1, 1, 1) for heads in newest
            }
        furthest = position.amax()
        first = {name: self.caches[str(self.layer_types.index(name))] for name in self.slots}
        places = {
            name: first[name].places(slots.indices(position)) for name, slots in self.slots.items()
        }

        def attend(i, cache, sinks, q, own):
            name = self.layer_types[i]
            if own is not None:
                cache.store(*own, places[name])
            heads, _, _ = self.shapes[name]
            given = cache, self.slots[name], furthest, newest[heads]
            return self.attention[name](q, *given, sinks)

        started = position > 0

        def taps(cache, x):
            return step_taps(cache, x, started)

        def rule(i, cache, *given):
            return self.rule.step(i, cache, *given, started)

        # Regions take a step's rows in place of a chunk's tokens.
        mix = Mix(attend, taps, rule)
        return self.run(hidden.transpose(0, 1), position, mix, lambda x: x)


@composite_operators_once()
@lazy_graphs()
def build_program(
    model: CausalLM, backend: str, constants: dict[str, int | bool | list[int]],
    selection: Background, progress: Callable[[str], None], pooled: bool = False,
) -> tuple[Cord, list[str], list[dict]]:  # fmt: skip
    """The multi-method program of a model whose weights are loaded and quantized: a file's bytes,
    its methods' names, and where its state is (state_places).

    `backend` is "xnnpack" (which changes modules of `model` in place) or "portable". `constants`
    become metadata methods. `progress` is called with what begins. With `pooled` there is a method
    `pool` besides.
    """
    caches, pool = None, Pool(model)
    if backend == "xnnpack":
        length, traced = prompt_length(model.max_chunk)
        xnnpack.prepare(model)
        prepare_streams(model)
        lowered = lower(model, traced, length, progress)
        prefill = DelegatedPrefill(model, lowered, traced)
        decode, caches = DelegatedDecodeEmbedded(model, lowered), lowered.caches
        pool = DelegatedPool(model, lowered, traced) if pooled else None
    else:
        # Plain kernels take ATen's operators as they are.
        prefill, decode = Prefill(model), DecodeEmbedded(model)
    progress("tracing the methods")
    batch = model.batch
    hidden = torch.zeros(batch, 1, model.model.embedded_size)
    chunk, shapes = prompt_chunk(batch, model.max_chunk)
    methods = {
        "prefill": torch.export.export(prefill, chunk, dynamic_shapes=shapes),
        "embed": torch.export.export(Embed(model.model), (integers(batch, 1),)),
        "decode_embedded": torch.export.export(decode, (hidden, integers(batch))),
    }
    if pooled:
        methods["pool"] = torch.export.export(pool, chunk, dynamic_shapes=shapes)
    program = to_program(methods, constants, backend == "xnnpack", progress)
    places = state_places(program, model, caches)
    progress("adding the selection methods")
    return *link(program, selection.result()), places


@composite_operators_once()
@lazy_graphs()
@constants_in_files()
def to_program(
    methods: dict[str, ExportedProgram], constants: dict[str, int | bool | list[int]],
    in_place: bool, progress: Callable[[str], None],
) -> ExecutorchProgramManager:  # fmt: skip
    """One program of `methods`, with `constants` as metadata methods. The kernel that writes a
    cache `in_place` takes one index at most, and the network's own caches need two."""
    progress("converting the methods")
    edge = to_edge(methods, constant_methods=constants, compile_config=xnnpack.COMPILE_CONFIG)
    progress("planning memory")
    return edge.to_executorch(
        ExecutorchBackendConfig(
            # Caches are written where they are.
            run_reinplace_pass=in_place,
            # Unplanned outputs outlive the next method's run. Inputs are the caller's memory.
            memory_planning_pass=MemoryPlanningPass(
                alloc_graph_input=False, alloc_graph_output=False, share_mutable_buffers=True
            ),
        )
    )


@dataclass(frozen=True)
class Lowered:
    """What both methods of a model are made of. `caches` are by layer, and `slots` are by type of
    layer. `rescore` has what the
    `shortlist`, if there is one, scores with, by the number of rows."""

    prefill: Regions
    decode: Regions
    head: nn.Module
    caches: dict[int, BlockCache | RunningState]
    slots: dict[str, SlotLayout]
    shortlist: Shortlist | None
    rescore: dict[int, GraphDelegate]


def lower(
    model: nn.Module, traced: int, length: Dim | None, progress: Callable[[str], None]
) -> Lowered:
    """The model's regions as delegate calls, and the caches between them. Regions are traced with
    `traced` tokens. They take 1 to `length` tokens at once, or just `traced` without `length`."""
    backbone, batch = model.model, model.batch
    prefill = lower_layers(model, backbone.layers, traced, length, progress)
    decode = prefill
    if batch > 1:
        layers = [xnnpack.in_parts(layer) for layer in backbone.layers]
        decode = lower_layers(model, layers, batch, None, progress, in_parts=True)
    progress("lowering the head")
    linear = model.lm_head
    shortlist = linear.shortlist if isinstance(linear, ShortlistHead) else None
    head = xnnpack.Head(backbone.norm, linear.approximate if shortlist else linear)
    head = lower_head(model, head, batch)

    mixers = [layer.mixer for layer in backbone.layers]
    slots = {m.layer_type: SlotLayout(m.cache) for m in mixers if not is_running(m) and m.has_keys}

    def cache_of(mixer: nn.Module) -> BlockCache | RunningState:
        if is_running(mixer):
            return RunningState(mixer.cache)
        return BlockCache(mixer.cache, slots[mixer.layer_type])

    return Lowered(
        prefill,
        decode,
        head,
        {i: cache_of(mixer) for i, mixer in enumerate(mixers) if mixer.cache is not None},
        slots,
        shortlist,
        {n: rescore(shortlist, n) for n in (1, batch)} if shortlist else {},
    )


def lower_head(model: CausalLM, head: xnnpack.Head | xnnpack.PooledHead, rows: int) -> nn.Module:
    """A head of the network's hidden states or streams, of the last of a prompt's tokens, or of one
    token of each of the `rows`."""
    size, streams, count = model.config.hidden_size, model.model.streams, 1
    if streams is not None:
        head, count = OfMerged(Merged(streams, size), head), streams.count
    examples, shapes = [torch.zeros(1, rows, size) for _ in range(count)], None
    if rows > 1:
        one = {1: Dim("N", min=1, max=rows)}
        shapes = (one if streams is None else (one,) * count,)
    return xnnpack.trace(head, examples, shapes).lower(head)


def soft_cap(vocab_size: int) -> GraphDelegate:
    """logits [N, V], 1 / cap [1] and cap [1] -> (tanh(logits / cap) * cap,)."""
    graph = GraphBuilder()
    logits, inverse, cap = graph.input(1, vocab_size), graph.input(1), graph.input(1)
    capped = graph.multiply(graph.tanh(graph.multiply(logits, inverse)), cap)
    return GraphDelegate(graph.serialize(capped), lambda x, *_: [torch.empty_like(x)])


def rescore(shortlist: Shortlist, rows: int) -> GraphDelegate:
    """quantize.dot_products for `rows` rows as one delegate call."""
    count, (_, size) = shortlist.SIZE, shortlist.embedding.weight.shape
    groups = shortlist.embedding.scales.shape[1]
    graph = GraphBuilder()
    codes, scales = graph.int8_input(rows, count, size), graph.input(rows, count, groups)
    hidden = graph.input(rows, 1, size)
    codes = graph.reshape(codes, rows * count, groups, size // groups)
    values = graph.multiply(codes, graph.reshape(scales, rows * count, groups, 1))
    scores = graph.matmul(hidden, graph.reshape(values, rows, count, size), transpose_b=True)
    binary = graph.serialize(graph.reshape(scores, rows, count))
    return GraphDelegate(binary, lambda *_: [torch.empty(rows, count)])


def state_entries(model: nn.Module) -> list[dict]:
    """Name, shape and dtype of every buffer that outlives a method's run, for the manifest."""
    return [
        {
            "name": f"caches.{i}.{name.split('.cache.')[-1]}",
            "shape": list(buffer.shape),
            "dtype": "float32",
        }
        for i, layer in enumerate(model.model.layers)
        for name, buffer in layer.named_buffers()
        if ".cache." in name
    ]
