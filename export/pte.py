"""The ExecuTorch program: methods around the XNNPACK regions, and state shared between them."""

import itertools
from collections.abc import Callable

import executorch.extension.llm.custom_ops.custom_ops  # noqa: F401  (registers torch.ops.llama)
import executorch.kernels.quantized  # noqa: F401  (the out variant of embedding_byte)
import torch
from executorch.exir import (
    ExecutorchBackendConfig,
    ExecutorchProgramManager,
    to_edge_transform_and_lower,
)
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn
from torch.export import Dim

from export import xnnpack
from models.cache import SlidingCache
from sampler.greedy import greedy

llama = torch.ops.llama
# Any length but 0 and 1, which torch.export takes for constants.
TRACED_LENGTH = 3


class DelegatedMethod(nn.Module):
    """What prefill and decode share: embedding, regions, and the caches between them."""

    def __init__(self, model: nn.Module, regions: list[nn.Module]):
        super().__init__()
        self.embed_tokens = model.model.embed_tokens
        self.rope = model.model.rope
        self.regions = nn.ModuleList(regions)
        # Methods share the buffers that have equal names.
        self.caches = nn.ModuleList(layer.self_attn.cache for layer in model.model.layers)
        self.kinds = [layer.self_attn.kind for layer in model.model.layers]
        self.scale = model.model.layers[0].self_attn.scale

    def run(self, tokens: Tensor, positions: Tensor, attend: Callable, last: Callable) -> Tensor:
        """Logits [1, V]; attend(cache, q, k, v) is the attention, and last(x) picks from
        [1, T, ...] the position whose logits are wanted."""
        rope = {kind: self.rope[kind](positions) for kind in dict.fromkeys(self.kinds)}
        first, *middle, end = self.regions
        x, q, k, v = first(self.embed_tokens(tokens), *rope[self.kinds[0]])
        for cache, kind, region in zip(self.caches, self.kinds[1:], middle, strict=False):
            x, q, k, v = region(x, attend(cache, q, k, v), *rope[kind])
        (logits,) = end(last(x), last(attend(self.caches[-1], q, k, v)))
        return logits


class Prefill(DelegatedMethod):
    """tokens int64 [1, T], positions int64 [T] -> logits float32 [1, V] after the last token."""

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        length = tokens.shape[1]
        full = [c for c in self.caches if not isinstance(c, SlidingCache)]
        rings = [c for c in self.caches if isinstance(c, SlidingCache)]
        if full:
            start = positions[0].item()
            torch._check(start >= 0)
            torch._check(start + length <= full[0].slots)
        if rings:
            # Finite, because a block of keys may be masked whole: exp(-inf - -inf) is NaN.
            mask = torch.where(rings[0].visible_in_prefill(positions), 0.0, -1e30)
            slots = (positions % rings[0].slots)[None]

        def attend(cache, q, k, v):
            if isinstance(cache, SlidingCache):
                keys, values = torch.cat([cache.k, k], 1), torch.cat([cache.v, v], 1)
                out = llama.custom_sdpa(q, keys, values, 0, mask, 0.0, False, self.scale)
                llama.update_cache_with_indices(k, cache.k, 0, slots)
                llama.update_cache_with_indices(v, cache.v, 0, slots)
                return out
            return _append_and_attend(cache, q, k, v, start, start, self.scale)

        return self.run(tokens, positions, attend, lambda x: x[:, -1:])


class Decode(DelegatedMethod):
    """token int64 [1, 1], position int64 [1] -> logits float32 [1, V]."""

    def forward(self, token: Tensor, position: Tensor) -> Tensor:
        write_and_newest = {}
        for cache in self.caches:
            if cache.slots not in write_and_newest:
                write, newest = position, position
                if isinstance(cache, SlidingCache):
                    # A full ring is attended whole: the order of its slots does not matter.
                    write = position % cache.slots
                    newest = position.clamp(max=cache.slots - 1)
                write, newest = write[0].item(), newest[0].item()
                for slot in (write, newest):
                    torch._check(slot >= 0)
                    torch._check(slot < cache.slots)
                write_and_newest[cache.slots] = write, newest

        def attend(cache, q, k, v):
            return _append_and_attend(cache, q, k, v, *write_and_newest[cache.slots], self.scale)

        return self.run(token, position, attend, lambda x: x)


def _append_and_attend(cache, q, k, v, write, newest, scale):
    """Store k, v from slot `write` on; attend causally, the first query seeing slots 0..newest."""
    llama.update_cache(k, cache.k, write)
    llama.update_cache(v, cache.v, write)
    return llama.custom_sdpa(q, cache.k, cache.v, newest, None, 0.0, True, scale)


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
        regions = lower_regions(model, traced, length, progress)
        prefill, decode = Prefill(model, regions), Decode(model, regions)
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
    edge = to_edge_transform_and_lower(
        methods, constant_methods=constants, compile_config=xnnpack.COMPILE_CONFIG
    )
    progress("planning memory")
    return edge.to_executorch(
        ExecutorchBackendConfig(
            # Outputs of their own outlive the next method's run; inputs are the caller's memory.
            memory_planning_pass=MemoryPlanningPass(
                alloc_graph_input=False, alloc_graph_output=False, share_mutable_buffers=True
            )
        )
    )


def lower_regions(
    model: nn.Module, traced: int, length: Dim | None, progress: Callable[[str], None]
) -> list[nn.Module]:
    """The model's regions as delegate calls, traced with `traced` tokens: for 1 to `length` at
    once, or without it for just as many."""
    config, backbone = model.config, model.model
    x = torch.zeros(1, traced, config.hidden_size)
    attended = torch.zeros(1, traced, config.num_attention_heads, config.head_dim)
    # Two tensors: torch.export takes one that is passed twice for one argument.
    cos, sin = (torch.zeros(traced, 1, config.head_dim) for _ in range(2))
    progress("lowering the first layer")
    first, last = xnnpack.FirstRegion(backbone), xnnpack.LastRegion(model)
    lowered = [xnnpack.trace(first, (x, cos, sin), length).lower(first)]
    kind = None
    for i, (before, after) in enumerate(itertools.pairwise(backbone.layers), 2):
        progress(f"lowering layer {i} of {len(backbone.layers)}")
        region = xnnpack.MiddleRegion(before, after)
        kind = kind or xnnpack.trace(region, (x, attended, cos, sin), length)
        lowered.append(kind.lower(region))
    lowered.append(xnnpack.trace(last, (x[:, :1], attended[:, :1]), None).lower(last))
    return lowered


def state_entries(model: nn.Module) -> list[dict]:
    """Name, shape and dtype of every buffer that outlives a method's run, for the manifest."""
    return [
        {"name": f"caches.{i}.{name}", "shape": list(buffer.shape), "dtype": "float32"}
        for i, layer in enumerate(model.model.layers)
        for name, buffer in layer.self_attn.cache.named_buffers()
    ]
