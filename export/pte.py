"""The ExecuTorch program: methods around the XNNPACK regions, and state shared between them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from executorch.exir import (
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge,
)
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn
from torch.export import Dim

from export import attention, xnnpack
from export.attention import UNIT, BlockCache, Slots
from export.quantize import Shortlist, ShortlistHead
from export.xnnpack_graph import GraphBuilder, GraphDelegate
from sampler.greedy import greedy

# Any length but 0 and 1, which torch.export takes for constants.
TRACED_LENGTH = 3


class DelegatedMethod(nn.Module):
    """What prefill and decode share: embedding, regions, and the caches between them."""

    def __init__(self, model: nn.Module, lowered: "Lowered"):
        super().__init__()
        config = model.config
        self.embed_tokens = model.model.embed_tokens
        self.rope = model.model.rope
        self.kinds = [layer.self_attn.kind for layer in model.model.layers]
        self.embed_scale = model.model.embed_scale
        self.before = nn.ModuleList(lowered.before)
        self.after = nn.ModuleList(lowered.after)
        self.lm_head = lowered.head
        # Methods share the buffers that have equal names.
        self.caches = nn.ModuleList(lowered.caches)
        self.slots = nn.ModuleDict(lowered.slots)
        self.shortlist, self.rescore = lowered.shortlist, lowered.rescore
        self.kv_heads = config.num_key_value_heads
        self.group = config.num_attention_heads // self.kv_heads
        self.head_dim = config.head_dim

    def run(self, tokens: Tensor, positions: Tensor, attend: Callable, last: Callable) -> Tensor:
        """Logits [1, V]; attend(kind, cache, q, k, v) is the attention, and last(x) picks from
        [1, T, ...] the position whose logits are wanted."""
        rope = {kind: self.rope[kind](positions) for kind in dict.fromkeys(self.kinds)}
        x = self.embed_tokens(tokens) * self.embed_scale
        layers = list(zip(self.kinds, self.before, self.caches, self.after))
        for kind, before, cache, after in layers:
            attended = attend(kind, cache, *before(x, *rope[kind]))
            if after is layers[-1][-1]:
                x, attended = last(x), last(attended)
            (x,) = after(x, attended)
        logits, hidden = self.lm_head(x)
        if self.shortlist is None:
            return logits
        return self.shortlist(logits, hidden, lambda *rows: self.rescore(*rows)[0])


class Prefill(DelegatedMethod):
    """tokens int64 [1, T], positions int64 [T] -> logits float32 [1, V] after the last token."""

    def __init__(self, model: nn.Module, lowered: "Lowered", traced: int):
        super().__init__(model, lowered)
        shape = self.kv_heads, self.group, self.head_dim
        self.attention = nn.ModuleDict(
            {
                kind: attention.PrefillAttention(slots, *shape, traced)
                for kind, slots in self.slots.items()
            }
        )

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        rows = (positions.float() * UNIT)[:, None]
        newest = (rows + UNIT / 2).expand(-1, self.group).reshape(-1, 1)
        shared, indices = {}, {}
        for kind, slots in self.slots.items():
            shared[kind] = attention.Chunk(
                begin=positions[0],
                positions=rows.view(1, -1),
                newest=newest,
                oldest=newest - slots.count * UNIT,
                held=slots.held(positions),
            )
            indices[kind] = slots.indices(positions)

        def attend(kind, cache, q, k, v):
            attended = self.attention[kind](q, k, v, cache, shared[kind])
            cache.store(k, v, indices[kind])
            return attended

        return self.run(tokens, positions, attend, lambda x: x[:, -1:])


class Decode(DelegatedMethod):
    """token int64 [1, 1], position int64 [1] -> logits float32 [1, V]."""

    def __init__(self, model: nn.Module, lowered: "Lowered"):
        super().__init__(model, lowered)
        shape = self.kv_heads, self.group, self.head_dim
        self.attention = nn.ModuleDict(
            {kind: attention.DecodeAttention(slots, *shape) for kind, slots in self.slots.items()}
        )

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        newest = ((position.float() + 0.5) * UNIT)[:, None]
        indices = {kind: slots.indices(position) for kind, slots in self.slots.items()}

        def attend(kind, cache, q, k, v):
            cache.store(k, v, indices[kind])
            return self.attention[kind](q, cache, self.slots[kind], position[0], newest)

        return self.run(token, position, attend, lambda x: x)


class PlainPrefill(nn.Module):
    """The model's own prefill, for kernels that take ATen's operators as they are."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.network = model

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        return self.network.prefill(tokens, positions)


class PlainDecode(PlainPrefill):
    """The model's own decode."""

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        return self.network.decode(token, position)


class Greedy(nn.Module):
    """logits float32 [1, V] -> token int64 [1, 1]: sampler.greedy, at the cost of one argmax
    unless there is a NaN, which argmax takes for the greatest."""

    def forward(self, logits: Tensor) -> Tensor:
        token = torch.argmax(logits, dim=-1, keepdim=True)
        has_nan = torch.isnan(torch.gather(logits, 1, token))[0, 0]
        token = torch.cond(has_nan, greedy, lambda _: token.clone(), (logits,))
        # A branch's result lies in planned memory, which the next method overwrites; an operator's
        # result outside the branches does not.
        return token.clamp(min=0)


def build_program(
    model: nn.Module,
    backend: str,
    max_prefill: int,
    constants: dict[str, int | bool | list[int]],
    progress: Callable[[str], None],
) -> ExecutorchProgramManager:
    """The multi-method program of a model whose weights are loaded and quantized.

    `backend` is "xnnpack" (which changes modules of `model` in place) or "portable"; `constants`
    become metadata methods; `progress` is called with what begins.
    """
    # One token at most is no dynamic size.
    length = Dim("T", min=1, max=max_prefill) if max_prefill > 1 else None
    traced = min(TRACED_LENGTH, max_prefill)
    if backend == "xnnpack":
        xnnpack.prepare(model)
        lowered = lower(model, traced, length, progress)
        prefill, decode = Prefill(model, lowered, traced), Decode(model, lowered)
    else:
        prefill, decode = PlainPrefill(model), PlainDecode(model)
    progress("tracing the methods")
    token, position = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    tokens, positions = torch.zeros(1, traced, dtype=torch.int64), torch.arange(traced)
    shapes = ({1: length}, {0: length}) if length is not None else None
    logits = torch.zeros(1, model.config.vocab_size)
    methods = {
        "prefill": torch.export.export(prefill, (tokens, positions), dynamic_shapes=shapes),
        "decode": torch.export.export(decode, (token, position)),
        "greedy": torch.export.export(Greedy(), (logits,)),
    }
    progress("converting the methods")
    edge = to_edge(methods, constant_methods=constants, compile_config=xnnpack.COMPILE_CONFIG)
    progress("planning memory")
    return edge.to_executorch(
        ExecutorchBackendConfig(
            # Caches are written where they are.
            run_reinplace_pass=True,
            # Outputs of their own outlive the next method's run; inputs are the caller's memory.
            memory_planning_pass=MemoryPlanningPass(
                alloc_graph_input=False, alloc_graph_output=False, share_mutable_buffers=True
            ),
        )
    )


@dataclass(frozen=True)
class Lowered:
    """What both methods of a model are made of; `slots` by kind of layer; `shortlist` and what it
    scores with, or None."""

    before: list[nn.Module]
    after: list[nn.Module]
    head: nn.Module
    caches: list[BlockCache]
    slots: dict[str, Slots]
    shortlist: Shortlist | None
    rescore: GraphDelegate | None


def lower(
    model: nn.Module, traced: int, length: Dim | None, progress: Callable[[str], None]
) -> Lowered:
    """The model's regions as delegate calls, traced with `traced` tokens: for 1 to `length` at
    once, or without it for just as many; and the caches between them."""
    config, backbone = model.config, model.model
    kv_heads, heads, size = (
        config.num_key_value_heads,
        config.num_attention_heads,
        config.head_dim,
    )
    x = torch.zeros(1, traced, config.hidden_size)
    attended = torch.zeros(kv_heads, traced, heads // kv_heads * size)
    # Two tensors: torch.export takes one that is passed twice for one argument.
    cos, sin = (torch.zeros(traced, 1, size) for _ in range(2))
    wide, tall = ({1: length}, {0: length}) if length is not None else ({}, {})

    before, after = [], []
    kinds = None
    for i, layer in enumerate(backbone.layers, 1):
        progress(f"lowering layer {i} of {len(backbone.layers)}")
        regions = xnnpack.BeforeAttention(layer), xnnpack.AfterAttention(layer)
        kinds = kinds or (
            xnnpack.trace(regions[0], (x, cos, sin), (wide, tall, tall)),
            xnnpack.trace(regions[1], (x, attended), (wide, wide)),
        )
        before.append(kinds[0].lower(regions[0]))
        after.append(kinds[1].lower(regions[1]))
    progress("lowering the head")
    linear = model.lm_head
    shortlist = linear.shortlist if isinstance(linear, ShortlistHead) else None
    head = xnnpack.Head(backbone.norm, linear.approximate if shortlist else linear)
    head = xnnpack.trace(head, (x[:, :1],), None).lower(head)

    layers = [layer.self_attn for layer in backbone.layers]
    slots = {layer.kind: Slots(layer.cache) for layer in layers}
    return Lowered(
        before,
        after,
        head,
        [BlockCache(layer.cache, slots[layer.kind]) for layer in layers],
        slots,
        shortlist,
        rescore(shortlist) if shortlist else None,
    )


def rescore(shortlist: Shortlist) -> GraphDelegate:
    """export.quantize.dot_products as one delegate call."""
    count, (_, size) = shortlist.SIZE, shortlist.embedding.weight.shape
    groups = shortlist.embedding.scales.shape[1]
    graph = GraphBuilder()
    codes, scales = graph.int8_input(count, size), graph.input(count, groups)
    hidden = graph.input(1, 1, size)
    codes = graph.reshape(codes, count, groups, size // groups)
    rows = graph.multiply(codes, graph.reshape(scales, count, groups, 1))
    scores = graph.matmul(hidden, graph.reshape(rows, 1, count, size), transpose_b=True)
    binary = graph.serialize(graph.reshape(scores, 1, count))
    return GraphDelegate(binary, lambda codes, *_: [torch.empty(1, len(codes))])


def state_entries(model: nn.Module) -> list[dict]:
    """Name, shape and dtype of every buffer that outlives a method's run, for the manifest."""
    return [
        {"name": f"caches.{i}.{name}", "shape": list(buffer.shape), "dtype": "float32"}
        for i, layer in enumerate(model.model.layers)
        for name, buffer in layer.self_attn.cache.named_buffers()
    ]
