"""The weights that a decode step reads, packed: those that are read together lie together.

The rows of queries, keys and values are packed, and those of gate and up. They are floating point,
or integers in the words that the kernels read. The network's own layers, which prefill uses, become
views of them. Everything is found in what blocks declare (models/decoder.py). Shapes: B rows of a
batch, D hidden size, H heads, N outputs and K inputs of a linear layer.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.export.errors import ExportError
from tokenloop.export.recipes import INTEGER_BITS
from tokenloop.models.decoder import Block, CausalLM
from tokenloop.models.delta_net import PROJECTIONS
from tokenloop.models.kernels.linear.packing import quantize_int4, quantize_int8
from tokenloop.models.kernels.linear.reference import dequantize

LINEAR_ATTENTION, SHORT_CONV = "linear_attention", "conv"


class PackedLinear(nn.Module):
    """The weights of linear layers, one below the other: float [N, K], or words of
    models/kernels/linear/packing.py with its scales."""

    def __init__(self, linears: list[nn.Linear], bits: int):
        super().__init__()
        weight = torch.cat([linear.weight for linear in linears])
        self.inputs = weight.shape[1]
        weight, scale = quantized(weight, bits) if bits else (weight, None)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        biases = [linear.bias for linear in linears if linear.bias is not None]
        self.bias = nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None

    def views(self, linears: list[nn.Linear]) -> list[nn.Module]:
        """Layers like those that were packed, in the same memory."""
        sizes = [linear.out_features for linear in linears]

        def split(tensor: Tensor | None, axis: int) -> list[Tensor | None]:
            if tensor is None:
                return [None] * len(sizes)
            return [nn.Parameter(part, requires_grad=False) for part in tensor.split(sizes, axis)]

        parts = zip(split(self.weight, 0), split(self.scale, 1), split(self.bias, 0))
        return [LinearView(self.inputs, *part) for part in parts]


class LinearView(nn.Module):
    """A linear layer whose weights are some of a PackedLinear's: x [..., K] -> [..., N]."""

    def __init__(self, inputs: int, weight: Tensor, scale: Tensor | None, bias: Tensor | None):
        super().__init__()
        self.in_features, self.out_features = inputs, weight.shape[0]
        self.weight, self.scale, self.bias = weight, scale, bias

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight
        if self.scale is not None:
            weight = dequantize(weight, self.scale, self.in_features).to(x.dtype)
        return F.linear(x, weight, self.bias)


class IntegerHead(nn.Module):
    """An output head whose weights are int8: hidden [B, 1, D] -> logits float32 [B, 1, V]. An
    embedding that was tied to it keeps the weights as they were."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.rows = PackedLinear([linear], 8)

    def forward(self, hidden: Tensor) -> Tensor:
        weight, scale = self.rows.weight, self.rows.scale
        return F.linear(hidden.float(), dequantize(weight, scale, self.rows.inputs))


def check_recipe(network: CausalLM, quant: str) -> None:
    """Errors: ExportError for experts that would have to be integers."""
    if INTEGER_BITS[quant] and any(block.mlp.moe is not None for block in network.model.layers):
        raise ExportError(
            f"--quant {quant} is not for experts with --backend inductor or launches; bf16 and "
            "fp32 are"
        )


def quantized(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Words and scales of weight [N, K], in 4 bits by groups of 128 inputs, or of 64 where 128 do
    not divide K. Errors: ExportError where neither does."""
    if bits == 8:
        return quantize_int8(weight)
    inputs = weight.shape[1]
    try:
        return quantize_int4(weight, 64 if inputs % 128 else 128)
    except ValueError as error:
        raise ExportError(
            f"--quant int4 does not fit a linear layer of {inputs} inputs: {error}; int8 and bf16 "
            "take any"
        ) from None


def unscaled(norm: nn.Module) -> nn.Module:
    """A norm without a scale, which is in its weights instead: float32, so that they lose nothing.
    The norm itself where it has no scale."""
    if norm.scale == 1.0:
        return norm
    with torch.device("meta"):
        folded = type(norm)(norm.weight.shape[0], norm.eps, norm.offset)
    weight = (norm.offset + norm.weight.float()) * norm.scale - norm.offset
    folded.weight = nn.Parameter(weight, requires_grad=False)
    return folded


def pack(parent: nn.Module, names: Sequence[str], bits: int) -> PackedLinear:
    """Pack the weights of the linear layers `names` of `parent`, which become views of them."""
    linears = [parent.get_submodule(name) for name in names]
    packed = PackedLinear(linears, bits)
    for name, view in zip(names, packed.views(linears)):
        parent.set_submodule(name, view)
    return packed


class PackedBlock(nn.Module):
    """What a decode step reads of a block, whose linear layers become views.

    `qkv` gives what the mixer takes, and `o` gives its branch. `gate_up` and `down` are the
    feed-forward that every token has. `moe` is the config of routed experts, which stay as they are
    whatever the bits, and which `scores` choose. If `is_shared` the last row of `scores` weighs the
    result of `down`. Norms, `layer_scalar` and `cache` are the block's, None where it has none.
    """

    def __init__(self, block: Block, bits: int):
        super().__init__()
        mixer, mlp, dense = block.mixer, block.mlp, block.mlp.dense
        self.moe, self.is_shared = mlp.moe, mlp.moe is not None and dense is not None
        if self.moe is not None:
            self.experts = mlp.experts
            self.scores = pack(mlp, mlp.routers, 0)
        if dense is not None:
            self.gate_up = pack(dense, ["gate_proj", "up_proj"], bits)
            self.down = pack(dense, ["down_proj"], bits)
            self.activation = dense.activation
        self.projections = mixer.projections
        self.sizes = [mixer.get_submodule(name).out_features for name in mixer.projections]
        self.qkv = pack(mixer, mixer.projections, bits)
        self.o = pack(mixer, [mixer.output], bits)
        self.input_norm, self.mlp_norm = block.norm("mixer"), block.norm("mlp")
        self.post_attention_norm = block.norm("mixer_branch")
        self.post_mlp_norm = block.norm("mlp_branch")
        self.layer_scalar, self.cache = block.layer_scalar, mixer.cache


class PackedAttention(PackedBlock):
    """A block whose mixer is attention. Rows of `qkv` are queries, keys and values, and gates where
    the layer has an output gate."""

    def __init__(self, block: Block, bits: int):
        super().__init__(block, bits)
        attention = block.mixer
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.rotation, self.scale = attention.rotation, attention.scale
        self.whole_norms = attention.whole_norms
        self.kv_heads, self.head_dim = attention.kv_heads, attention.head_dim
        self.value_norm = attention.v_norm is not None
        self.values_are_keys = attention.values_are_keys
        self.output_gate = attention.output_gate


class PackedDeltaNet(PackedBlock):
    """A block whose mixer is a gated delta net. Rows of `qkv` are inputs of the convolution, gates,
    b and a."""

    kv_heads = 0

    def __init__(self, block: Block, bits: int):
        super().__init__(block, bits)
        net = block.mixer
        self.conv1d, self.norm = net.conv1d, net.norm
        self.A_log, self.dt_bias = net.A_log, net.dt_bias
        self.key_size, self.value_size, self.parts = net.key_size, net.value_size, net.parts


def pack_blocks(network: CausalLM, bits: int) -> list[PackedBlock]:
    """All blocks, packed with `bits` bits, or in the dtype that they have for 0. What the network
    computes stays the same but for the bits."""
    arrange(network)
    kinds = {LINEAR_ATTENTION: PackedDeltaNet, SHORT_CONV: PackedBlock}
    return [
        kinds.get(block.mixer.layer_type, PackedAttention)(block, bits)
        for block in network.model.layers
    ]


class QueriesAndGates(nn.Module):
    """A q_proj whose queries and gates are layers of their own: x [..., D] ->
    [..., 2 * H * head_dim], each head's query and then its gate."""

    def __init__(self, queries: nn.Module, gates: nn.Module, head_dim: int):
        super().__init__()
        self.queries, self.gates, self.head_dim = queries, gates, head_dim

    def forward(self, x: Tensor) -> Tensor:
        parts = (
            layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.queries, self.gates)
        )
        return torch.cat(list(parts), -1).flatten(-2)


def arrange(network: CausalLM) -> None:
    """Reorder weights as the kernels read them, without changing what the network computes.

    The queries and gates of an output-gated attention become two layers. Elements of queries' and
    keys' heads that are rotated together come to lie half a head apart, and others get an angle of
    0. Projections of a delta net that are fused by key head are separated.
    """
    rope = network.model.rope
    for block in network.model.layers:
        mixer = block.mixer
        if mixer.layer_type == LINEAR_ATTENTION and mixer.fused:
            _separate_projections(mixer)
        if mixer.layer_type in (LINEAR_ATTENTION, SHORT_CONV):
            continue
        rotated = 2 * rope[mixer.rotation].inv_freq.shape[0]
        if mixer.output_gate or rotated < mixer.head_dim:
            _arrange_attention(mixer, rotated)
    for block in network.model.layers:
        mixer = block.mixer
        if mixer.layer_type not in (LINEAR_ATTENTION, SHORT_CONV):
            frequencies = rope[mixer.rotation]
            short = mixer.head_dim // 2 - frequencies.inv_freq.shape[0]
            if short:
                frequencies.inv_freq = F.pad(frequencies.inv_freq, (0, short))
                if frequencies.lengths is not None:
                    frequencies.lengths = F.pad(frequencies.lengths, (0, short), value=1.0)


def _arrange_attention(attention: nn.Module, rotated: int) -> None:
    """`rotated` elements of each head are rotated."""
    size = attention.head_dim
    index = torch.arange(size, device=attention.k_proj.weight.device)
    first, second, rest = index.split([rotated // 2, rotated // 2, size - rotated])
    left, right = rest.chunk(2)
    order = torch.cat([first, left, second, right])

    def ordered(rows: Tensor | None) -> Tensor | None:
        return None if rows is None else rows.unflatten(0, (-1, size))[:, order].flatten(0, 1)

    if attention.output_gate:
        queries, gates = attention.q_proj.weight.unflatten(0, (-1, 2, size)).unbind(1)
        queries = _linear(ordered(queries.flatten(0, 1)))
        attention.q_proj = QueriesAndGates(queries, _linear(gates.flatten(0, 1)), size)
        attention.projections = "q_proj.queries", "k_proj", "v_proj", "q_proj.gates"
    else:
        attention.q_proj = _linear(*map(ordered, (attention.q_proj.weight, attention.q_proj.bias)))
    attention.k_proj = _linear(*map(ordered, (attention.k_proj.weight, attention.k_proj.bias)))
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            norm.weight = nn.Parameter(ordered(norm.weight), requires_grad=False)


def pad_heads(attention: nn.Module, size: int) -> None:
    """Make the attention's heads `size` elements long, without changing what it computes: zeros are
    added to queries, keys and values, and its empty cache is made anew."""
    old, more = attention.head_dim, size - attention.head_dim

    def padded(rows: Tensor | None) -> Tensor | None:
        if rows is None:
            return None
        heads = rows.unflatten(0, (-1, old))
        return F.pad(heads, (0, 0) * (rows.ndim - 1) + (0, more)).flatten(0, 1)

    for name in attention.projections:
        linear = attention.get_submodule(name)
        attention.set_submodule(name, _linear(padded(linear.weight), padded(linear.bias)))
    output = attention.get_submodule(attention.output)
    attention.set_submodule(attention.output, _linear(padded(output.weight.T).T, output.bias))
    k, attention.head_dim = attention.cache.k, size
    cache = type(attention.cache)(*k.shape[:3], size, k.dtype)
    attention.cache = cache.to(k.device)


def _separate_projections(net: nn.Module) -> None:
    shared = net.value_heads // net.key_heads
    sizes = [net.key_size] * 2 + [shared * net.value_size] * 2
    grouped = net.in_proj_qkvz.weight.unflatten(0, (net.key_heads, -1))
    q, k, v, z = (part.flatten(0, 1) for part in grouped.split(sizes, 1))
    b, a = net.in_proj_ba.weight.unflatten(0, (net.key_heads, -1)).split(shared, 1)
    net.in_proj_qkv, net.in_proj_z = _linear(torch.cat([q, k, v])), _linear(z)
    net.in_proj_b, net.in_proj_a = _linear(b.flatten(0, 1)), _linear(a.flatten(0, 1))
    del net.in_proj_qkvz, net.in_proj_ba
    net.fused, net.projections = False, PROJECTIONS


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return linear
