"""The layers of a network as XNNPACK regions, each kind of which is traced once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.export import Dim

from tokenloop.export.pte import xnnpack_regions as xnnpack
from tokenloop.export.pte.running_regions import (
    LINEAR_ATTENTION,
    RUNNING,
    SHORT_CONV,
    BeforeDeltaNet,
    BeforeShortConv,
    InsideDeltaNet,
)
from tokenloop.export.pte.stream_regions import AfterStreams, BeforeStreams, Expanded


@dataclass(frozen=True)
class Regions:
    """The layers' regions before and after their mixers. By layer those between a delta net's
    convolution and its rule, and those after experts. `own_inputs` gives the layers' own inputs,
    where there are any, and `expanded` the streams but the first, where there are several."""

    before: list[nn.Module]
    after: list[nn.Module]
    inside: dict[int, nn.Module]
    ends: dict[int, nn.Module]
    own_inputs: nn.Module | None
    expanded: nn.Module | None


@dataclass(frozen=True)
class Traceable:
    """A layer's regions with what xnnpack.trace takes of them, and what else tells those of one
    kind."""

    before: tuple[nn.Module, Sequence[Tensor], Sequence]
    after: tuple[nn.Module, Sequence[Tensor], Sequence]
    kind: tuple
    inside: tuple[nn.Module, Sequence[Tensor], Sequence] | None = None


def lower_layers(
    model: nn.Module, layers: Sequence[nn.Module], traced: int, length: Dim | None,
    progress: Callable[[str], None], in_parts: bool = False,
) -> Regions:  # fmt: skip
    """The regions of `layers`, as in `lower`. These are `in_parts` if the others are to be."""
    hidden_size, inputs = model.config.hidden_size, model.model.per_layer
    streams = model.model.streams
    count = 1 if streams is None else streams.count
    own_size = 0 if inputs is None else inputs.size
    x = torch.zeros(1, traced, hidden_size)
    wide, tall = ({1: length}, {0: length}) if length is not None else ({}, {})

    # Tensors of their own: torch.export takes one that is passed twice for one argument.
    def zeros(count: int, size: int) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(1, traced, size) for _ in range(count))

    def of_short_conv(layer: nn.Module) -> Traceable:
        taps, size = layer.mixer.conv.width, hidden_size
        given = *zeros(taps + 1, size), *own(layer)
        return Traceable(
            (BeforeShortConv(layer), (x,), (wide,)),
            (xnnpack.AfterShortConv(layer), (x, *given), (wide, (wide,) * len(given))),
            (SHORT_CONV,),
        )

    def of_delta_net(layer: nn.Module) -> Traceable:
        net = layer.mixer
        taps, values = net.conv1d.width, net.value_heads * net.value_size
        given, after = zeros(taps, sum(net.parts)), (*zeros(2, values), *own(layer))
        return Traceable(
            (BeforeDeltaNet(layer), (x,), (wide,)),
            (
                xnnpack.AfterMixer(layer),
                (x, *after),
                (wide, wide, wide, (wide,) * len(own(layer)))[: 1 + len(after)],
            ),
            (LINEAR_ATTENTION,),
            (InsideDeltaNet(net), given, ((wide,) * taps,)),
        )

    def of_attention(layer: nn.Module) -> Traceable:
        mixer = layer.mixer
        rotated = 2 * model.model.rope[mixer.rotation].inv_freq.shape[0]
        cos, sin = (torch.zeros(traced, 1, rotated) for _ in range(2))
        heads, size = mixer.kv_heads, mixer.heads * mixer.head_dim
        attended = torch.zeros(heads, traced, size // heads)
        kind = rotated, heads, mixer.head_dim
        if streams is not None:
            before = *zeros(count, hidden_size), cos, sin
            after = *zeros(count, hidden_size), attended, *own(layer)
            return Traceable(
                (BeforeStreams(layer), before, ((wide,) * count + (tall, tall),)),
                (AfterStreams(layer), after, ((wide,) * len(after),)),
                kind,
            )
        given = *zeros(int(hasattr(mixer, "gates")), size), *own(layer)
        return Traceable(
            (xnnpack.BeforeAttention(layer), (x, cos, sin), (wide, tall, tall)),
            (
                xnnpack.AfterAttention(layer),
                (x, attended, *given),
                (wide, wide, (wide,) * len(given))[: 2 + len(given)],
            ),
            kind,
        )

    def own(layer: nn.Module) -> tuple[Tensor, ...]:
        """The layer's own input, where its last region reads that."""
        return () if layer.per_layer is None or xnnpack.adds_later(layer) else zeros(1, own_size)

    def after_experts(layer: nn.Module) -> tuple[nn.Module, Sequence[Tensor], Sequence]:
        beside = zeros(layer.mlp.dense is not None, hidden_size)
        given = *beside, *zeros(layer.per_layer is not None, own_size)
        shapes = wide, wide, (wide,) * len(given)
        return xnnpack.AfterExperts(layer), (*zeros(1, hidden_size), x, *given), shapes

    of = {SHORT_CONV: of_short_conv, LINEAR_ATTENTION: of_delta_net}
    regions, kinds = Regions([], [], {}, {}, None, None), {}
    if streams is not None:
        region = Expanded(xnnpack.in_parts(streams) if in_parts else streams, hidden_size)
        regions = replace(regions, expanded=xnnpack.trace(region, (x,), (wide,)).lower(region))
    if inputs is not None:
        region = xnnpack.PerLayerInputs(xnnpack.in_parts(inputs) if in_parts else inputs)
        given = x, *zeros(1, inputs.width)
        lowered = xnnpack.trace(region, given, (wide, wide)).lower(region)
        regions = replace(regions, own_inputs=lowered)
    for i, layer in enumerate(layers):
        progress(f"lowering layer {i + 1} of {len(layers)}")
        made = of.get(layer.mixer.layer_type, of_attention)(layer)
        kind = made.kind, xnnpack.tensors_of(layer)
        parts = [part for part in (made.before, made.after, made.inside) if part is not None]
        if xnnpack.adds_later(layer):
            parts.append(after_experts(layer))
        if kind not in kinds:
            kinds[kind] = [xnnpack.trace(*part) for part in parts]
        lowered = [traced.lower(part[0]) for traced, part in zip(kinds[kind], parts)]
        regions.before.append(lowered[0])
        regions.after.append(lowered[1])
        if made.inside is not None:
            regions.inside[i] = lowered[2]
        if xnnpack.adds_later(layer):
            regions.ends[i] = lowered[-1]
    return regions


def is_running(mixer: nn.Module) -> bool:
    """Whether the mixer's state goes on with every token."""
    return mixer.layer_type in RUNNING
