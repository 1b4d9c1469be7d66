"""The weights that a decode step reads, packed: those that are read together lie together.

The rows of queries, keys and values are packed, and those of gate and up. They are floating point,
or packed as the kernels read them, integers or float8. The network's own layers, which prefill
uses, become views of them. Everything is found in what blocks declare (models/decoder.py). Shapes:
B rows of a batch, D hidden size, H heads, N outputs and K inputs of a linear layer.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.export.errors import ExportError
from tokenloop.export.kept_weights import Keeping, Layout, codes_and_scales, grid_of
from tokenloop.export.packed_experts import packed_experts
from tokenloop.export.recipes import FP8, PACKING
from tokenloop.export.tensors_in_files import copied, empty
from tokenloop.models.decoder import Block, CausalLM
from tokenloop.models.delta_net import PROJECTIONS
from tokenloop.models.kernels.linear.packing import (
    pack as pack_words,
)
from tokenloop.models.kernels.linear.packing import (
    pack_float8,
    quantize_float8,
    quantize_int4,
    quantize_int8,
)
from tokenloop.models.kernels.linear.reference import dequantize

LINEAR_ATTENTION, SHORT_CONV = "linear_attention", "conv"
# Weights that are made integers at a time.
BLOCK_ELEMENTS = 1 << 24


class PackedLinear(nn.Module):
    """The weights of linear layers, one below the other: float [N, K], or words of
    models/kernels/linear/packing.py with its scales.

    With `bits` None they are floats that are put together when they are written: `weight` is only
    a place until then, which takes no memory, and `parts` are what it consists of.
    """

    def __init__(self, linears: list[nn.Linear], bits: int | str | Layout | None):
        super().__init__()
        self.parts: list[Tensor] = []
        self.inputs = linears[0].weight.shape[1]
        if isinstance(bits, Layout):
            weight, scale = kept(linears, bits)
        else:
            parts, scale = [linear.weight for linear in linears], None
            rows = sum(linear.out_features for linear in linears)
            if bits:
                weight, scale = quantized(parts, bits)
            elif bits is not None:
                weight = torch.cat(parts)
            elif len(parts) == 1:
                weight = parts[0]
            else:
                weight, self.parts = parts[0].new_empty(rows, self.inputs), parts
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


class PackedHead(nn.Module):
    """An output head whose weights are packed: hidden [B, 1, D] -> logits float32 [B, 1, V]. An
    embedding that was tied to it keeps the weights as they were."""

    def __init__(self, rows: PackedLinear):
        super().__init__()
        self.rows = rows

    def forward(self, hidden: Tensor) -> Tensor:
        weight, scale = self.rows.weight, self.rows.scale
        return F.linear(hidden.float(), dequantize(weight, scale, self.rows.inputs))


def pack_head(network: CausalLM, bits: int | str | Keeping | None) -> None:
    """Pack the network's head, in integers of 8 bits or as it is kept. One that is not packed
    stays."""
    head = network.lm_head
    if isinstance(bits, Keeping):
        # A head without a layout would be copied for nothing.
        if layout := bits.layout([head]):
            network.lm_head = PackedHead(PackedLinear([head], layout))
    elif bits:
        network.lm_head = PackedHead(PackedLinear([head], 8))


def check_recipe(network: CausalLM, quant: str) -> None:
    """Errors: ExportError for experts that would have to be integers."""
    is_integers = PACKING[quant] in (4, 8)
    if is_integers and any(block.mlp.moe is not None for block in network.model.layers):
        raise ExportError(
            f"--quant {quant} is not for experts with --backend inductor or launches; bf16, fp32 "
            "and with launches fp8 are"
        )


def quantized(parts: Sequence[Tensor], bits: int | str) -> tuple[Tensor, Tensor]:
    """Words and scales of weights [N, K], one below the other, in 8 bits or FP8, or in 4 bits by
    groups of 128 inputs, or of 64 where 128 do not divide K. Errors: ExportError where neither
    does."""
    inputs = parts[0].shape[1]
    group_size = 64 if inputs % 128 else 128
    scales = []

    def convert(rows: Tensor) -> Tensor:
        if bits == FP8:
            words, scale = quantize_float8(rows)
        else:
            words, scale = quantize_int8(rows) if bits == 8 else quantize_int4(rows, group_size)
        scales.append(scale)
        return words

    try:
        words = words_of(parts, convert)
        # Strides of what has one row are in the manifest: those of the transpose of rows.
        return words, torch.cat([scale.T for scale in scales]).T.contiguous()
    except ValueError as error:
        raise ExportError(
            f"--quant int4 does not fit a linear layer of {inputs} inputs: {error}; int8 and bf16 "
            "take any"
        ) from None


def words_of(parts: Sequence[Tensor], convert: Callable[[Tensor], Tensor]) -> Tensor:
    """Words [N, W] of weights that lie one below the other. `convert` gives those of some rows, for
    which it may take several times their memory."""
    words, end = None, 0
    for part in parts:
        for rows in part.split(max(1, BLOCK_ELEMENTS // part.shape[1])):
            some = convert(rows)
            if words is None:
                count = sum(map(len, parts))
                words = empty((count, some.shape[1]), some.dtype, some.device)
            begin, end = end, end + len(rows)
            words[begin:end] = some
    return words


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


def kept(linears: list[nn.Linear], layout: Layout) -> tuple[Tensor, Tensor]:
    """Words and scales of layers that have them from the checkpoint. Scales of 4 bits are of the
    smallest dtype that has their values."""
    bits, group_size, is_float8 = layout
    codes, each = zip(*(codes_and_scales(linear, group_size) for linear in linears))
    convert = pack_float8 if is_float8 else lambda rows: pack_words(rows, bits)
    words, scales = words_of(codes, convert), torch.cat(each)
    dtypes = (torch.bfloat16, torch.float16) if bits == 4 else ()
    exact = next((dtype for dtype in dtypes if torch.equal(scales.to(dtype).float(), scales)), None)
    return words, scales.to(exact or torch.float32).T.contiguous()


def parts_by_storage(module: nn.Module) -> dict[int, list[Tensor]]:
    """Of the packed weights that are put together when they are written: their parts, by the
    storage of the place."""
    return {
        packed.weight.untyped_storage()._cdata: packed.parts
        for packed in module.modules()
        if isinstance(packed, PackedLinear) and packed.parts
    }


def pack(parent: nn.Module, names: Sequence[str], bits: int | str | Keeping | None) -> PackedLinear:
    """Pack the weights of the linear layers `names` of `parent`, which become views of them."""
    linears = [parent.get_submodule(name) for name in names]
    if isinstance(bits, Keeping):
        bits = bits.layout(linears) or 0
    packed = PackedLinear(linears, bits)
    for name, view in zip(names, packed.views(linears)):
        parent.set_submodule(name, view)
    return packed


class Beside(nn.Module):
    """The norms around experts that read the residual, and what their weights are multiplied by."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.router_norm, self.expert_scales = unscaled(mlp.router_norm), mlp.expert_scales
        self.experts_norm, self.experts_branch_norm = mlp.experts_norm, mlp.experts_branch_norm
        self.dense_branch_norm = mlp.dense_branch_norm


class PackedLayerInputs(nn.Module):
    """What makes the layers' inputs of embeddings and of the tokens' own vectors (per_layer.py)."""

    def __init__(self, per_layer: nn.Module, bits: int | Keeping | None):
        super().__init__()
        self.layers, self.size = per_layer.layers, per_layer.size
        self.projection = pack(per_layer, ["projection"], bits)
        self.norm = per_layer.projection_norm


class PackedBranch(nn.Module):
    """The branch of a layer's own input: what lets it in, and the projection and norm after it."""

    def __init__(self, branch: nn.Module, bits: int | Keeping | None):
        super().__init__()
        self.activation, self.norm = branch.activation, branch.norm
        self.input_gate = pack(branch, ["input_gate"], bits)
        self.projection = pack(branch, ["projection"], bits)


class PackedBlock(nn.Module):
    """What a decode step reads of a block, whose linear layers become views.

    `qkv` gives what the mixer takes, and `o` gives its branch. `gate_up` and `down` are the
    feed-forward that every token has. `moe` is the config of routed experts, which are float8 for
    FP8, are kept where they can be, and stay as they are for all else, and which `scores` choose.
    If `is_shared` the last row of `scores` weighs the result of `down`. What experts that read the
    residual have besides is `beside`, or None. Norms, `layer_scalar` and `cache` are the block's,
    None where it has none. `per_layer` is the branch of its own input, or None. `used_cache` is
    `cache`, or the one that another block has; one whose mixer has no keys of its own only reads
    it.
    """

    has_keys = True

    def __init__(self, block: Block, bits: int | str | Keeping | None, cache: nn.Module):
        super().__init__()
        mixer, mlp, dense = block.mixer, block.mlp, block.mlp.dense
        self.moe, self.beside = mlp.moe, None
        self.is_shared = mlp.moe is not None and dense is not None and not mlp.reads_residual
        if self.moe is not None:
            self.experts = packed_experts(mlp.experts, bits)
            self.scores = pack(mlp, mlp.routers, 0)
        if mlp.reads_residual:
            self.beside = Beside(mlp)
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
        # Not as a module of this one: its state has the names of the block that owns it.
        self._used = (cache,)
        self.per_layer = None
        if block.per_layer is not None:
            self.per_layer = PackedBranch(block.per_layer, bits)

    @property
    def used_cache(self) -> nn.Module:
        return self._used[0]

    @property
    def last_norm(self) -> nn.Module | None:
        """The norm of the block's last branch."""
        return self.post_mlp_norm if self.per_layer is None else self.per_layer.norm


class PackedAttention(PackedBlock):
    """A block whose mixer is attention. Rows of `qkv` are queries, keys and values, and gates where
    the layer has an output gate. Without `has_keys` there are only queries."""

    def __init__(self, block: Block, bits: int | str | Keeping | None, cache: nn.Module):
        super().__init__(block, bits, cache)
        attention = block.mixer
        self.has_keys = attention.has_keys
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm
        self.rotation, self.scale = attention.rotation, attention.scale
        self.whole_norms = attention.whole_norms
        self.kv_heads, self.head_dim = attention.kv_heads, attention.head_dim
        self.value_norm = attention.v_norm is not None
        self.values_are_keys = attention.values_are_keys
        self.output_gate, self.sinks = attention.output_gate, attention.sinks


class PackedDeltaNet(PackedBlock):
    """A block whose mixer is a gated delta net. Rows of `qkv` are inputs of the convolution, gates,
    b and a."""

    kv_heads = 0

    def __init__(self, block: Block, bits: int | str | Keeping | None, cache: nn.Module):
        super().__init__(block, bits, cache)
        net = block.mixer
        self.conv1d, self.norm = net.conv1d, net.norm
        self.A_log, self.dt_bias = net.A_log, net.dt_bias
        self.key_size, self.value_size, self.parts = net.key_size, net.value_size, net.parts


def pack_blocks(network: CausalLM, bits: int | str | Keeping | None) -> list[PackedBlock]:
    """All blocks, packed with `bits` bits, in the dtype that they have for 0, or as they are kept.
    None is as in PackedLinear. What the network computes stays the same but for the bits."""
    arrange(network)
    kinds = {LINEAR_ATTENTION: PackedDeltaNet, SHORT_CONV: PackedBlock}
    return [
        kinds.get(block.mixer.layer_type, PackedAttention)(block, bits, cache)
        for block, cache in zip(network.model.layers, network.model.caches())
    ]


def pack_inputs(network: CausalLM, bits: int | Keeping | None) -> PackedLayerInputs | None:
    """What makes the layers' inputs, packed as the blocks are. None where they have none."""
    per_layer = network.model.per_layer
    return None if per_layer is None else PackedLayerInputs(per_layer, bits)


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


def separate(network: CausalLM) -> None:
    """Make layers of their own of queries and output gates, and of a delta net's projections that
    are fused, without changing what the network computes."""
    for mixer in (block.mixer for block in network.model.layers):
        if mixer.layer_type == LINEAR_ATTENTION:
            if mixer.fused:
                _separate_projections(mixer)
        elif mixer.layer_type != SHORT_CONV and mixer.output_gate:
            _separate_gates(mixer, torch.arange(mixer.head_dim))


def _arrange_attention(attention: nn.Module, rotated: int) -> None:
    """`rotated` elements of each head are rotated."""
    size = attention.head_dim
    index = torch.arange(size, device=attention.q_proj.weight.device)
    first, second, rest = index.split([rotated // 2, rotated // 2, size - rotated])
    left, right = rest.chunk(2)
    order = torch.cat([first, left, second, right])
    rows = torch.arange(attention.q_proj.out_features, device=index.device)
    if attention.output_gate:
        _separate_gates(attention, order)
    else:
        queries = rows.unflatten(0, (-1, size))
        attention.q_proj = _rows(attention.q_proj, queries[:, order])
    if attention.has_keys:
        keys = rows[: attention.k_proj.out_features].unflatten(0, (-1, size))
        attention.k_proj = _rows(attention.k_proj, keys[:, order])
    for norm in (attention.q_norm, attention.k_norm):
        if norm is not None:
            heads = norm.weight.unflatten(0, (-1, size))[:, order]
            norm.weight = nn.Parameter(heads.flatten(), requires_grad=False)


def _separate_gates(attention: nn.Module, order: Tensor) -> None:
    """The elements of each query come in `order`."""
    rows = torch.arange(attention.q_proj.out_features, device=order.device)
    queries, gates = rows.unflatten(0, (-1, 2, attention.head_dim)).unbind(1)
    attention.q_proj = QueriesAndGates(
        _rows(attention.q_proj, queries[:, order]), _rows(attention.q_proj, gates),
        attention.head_dim,
    )  # fmt: skip
    attention.projections = "q_proj.queries", "k_proj", "v_proj", "q_proj.gates"


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
        layer = _linear(padded(linear.weight), padded(linear.bias))
        if grid := grid_of(linear):
            # Zeros are whole multiples of any scale.
            rows = torch.arange(linear.out_features).unflatten(0, (-1, old))
            layer.grid = grid.rows(F.pad(rows, (0, more)).flatten())
        attention.set_submodule(name, layer)
    output = attention.get_submodule(attention.output)
    attention.set_submodule(attention.output, _linear(padded(output.weight.T).T, output.bias))
    k, attention.head_dim = attention.cache.k, size
    cache = type(attention.cache)(*k.shape[:3], size, k.dtype)
    attention.cache = cache.to(k.device)


def _separate_projections(net: nn.Module) -> None:
    shared = net.value_heads // net.key_heads
    sizes = [net.key_size] * 2 + [shared * net.value_size] * 2
    weight = net.in_proj_qkvz.weight
    rows = torch.arange(len(weight), device=weight.device)
    grouped = rows.unflatten(0, (net.key_heads, -1))
    q, k, v, z = (part.flatten() for part in grouped.split(sizes, 1))
    rows = torch.arange(net.in_proj_ba.out_features, device=rows.device)
    b, a = rows.unflatten(0, (net.key_heads, -1)).split(shared, 1)
    net.in_proj_qkv = _rows(net.in_proj_qkvz, torch.cat([q, k, v]))
    net.in_proj_z = _rows(net.in_proj_qkvz, z)
    net.in_proj_b, net.in_proj_a = _rows(net.in_proj_ba, b), _rows(net.in_proj_ba, a)
    del net.in_proj_qkvz, net.in_proj_ba
    net.fused, net.projections = False, PROJECTIONS


def _rows(linear: nn.Linear, index: Tensor) -> nn.Linear:
    """A layer of those rows, in the order of `index`."""
    index = index.flatten()
    rows = _linear(linear.weight[index], None if linear.bias is None else linear.bias[index])
    if grid := grid_of(linear):
        rows.grid = grid.rows(index.cpu())
    return rows


def _linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    with torch.device("meta"):
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(copied(weight), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return linear
