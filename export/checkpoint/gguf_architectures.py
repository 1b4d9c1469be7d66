"""GGUF models in Hugging Face's terms: config.json's keys, and its names and values of tensors.

There is one `Architecture` for each `general.architecture`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tokenloop.export.checkpoint.contents import Checkpoint, Grid, StoredTensor
from tokenloop.export.checkpoint.gguf_configs import (
    LONGROPE_FACTORS,
    ROPE_FACTORS,
    gpt_oss_config,
    granite_config,
    lfm2_config,
    llama_config,
    mistral3_config,
    olmo2_config,
    phi3_config,
    qwen_config,
)
from tokenloop.export.checkpoint.gguf_gemma import gemma3_config, gemma3n_config, gemma4_config
from tokenloop.export.checkpoint.gguf_keys import Keys
from tokenloop.export.checkpoint.gguf_parts import read_parts
from tokenloop.export.checkpoint.gguf_reader import GRIDS, GgufTensor
from tokenloop.export.errors import ExportError
from tokenloop.models.config_fields import shown

# The tensor of a convolution that has a channel for each of its own.
CONVOLUTION = ".shortconv.conv.weight"
NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "token_embd_norm.weight": "model.norm.weight",  # LFM2's
    "output.weight": "lm_head.weight",
    # Gemma 3n's and 4's, where each layer has an input of its own.
    "per_layer_token_embd.weight": "model.embed_tokens_per_layer.weight",
    "per_layer_model_proj.weight": "model.per_layer_model_projection.weight",
    "per_layer_proj_norm.weight": "model.per_layer_projection_norm.weight",
    ROPE_FACTORS: None,  # the config has these
    **dict.fromkeys(LONGROPE_FACTORS),
}
# Tensors of a matrix for each stream of a token but the first (Gemma 3n's).
STREAMS = {
    "altup_proj.weight": "model.altup_projections.{}.weight",
    "altup_unembd_proj.weight": "model.altup_unembed_projections.{}.weight",
}
# blk.N.<key>.weight -> model.layers.N.<value>.weight; or .bias. A key that ends in a kind itself
# is of a whole name, and its value too.
BLOCK_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Architecture(NamedTuple):
    """How one `general.architecture` reads in Hugging Face's terms.

    llama.cpp's converter adds `norm_offset` to the weights of norms. Where it is `permuted`, it
    puts the rows of queries and keys that rotate together next to each other; Hugging Face has them
    half a head apart.
    """

    config: Callable[[Keys, dict[str, GgufTensor]], dict[str, Any]]
    block_names: Mapping[str, str] = BLOCK_NAMES
    norm_offset: float = 0.0
    permuted: bool = False


POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
GEMMA3 = Architecture(
    gemma3_config,
    BLOCK_NAMES | {"ffn_norm": "pre_feedforward_layernorm"} | POST_NORMS,
    norm_offset=1.0,
)
PER_LAYER = {
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
}
GEMMA3N = Architecture(
    gemma3n_config,
    GEMMA3.block_names
    | PER_LAYER
    | {
        "altup_correct_coef": "altup.correction_coefs",
        "altup_correct_scale.weight": "altup.correct_output_scale",
        "altup_predict_coef": "altup.prediction_coefs",
        "altup_router": "altup.modality_router",
        "altup_router_norm": "altup.router_norm",
        "laurel_l": "laurel.linear_left",
        "laurel_r": "laurel.linear_right",
        "laurel_post_norm": "laurel.post_laurel_norm",
    },
)
GEMMA4 = Architecture(
    gemma4_config,
    GEMMA3.block_names
    | PER_LAYER
    | {
        "layer_output_scale.weight": "layer_scalar",
        "ffn_gate_inp": "router.proj",
        "ffn_gate_inp.scale": "router.scale",
        "ffn_gate_up_exps.weight": "experts.gate_up_proj",
        "ffn_down_exps.weight": "experts.down_proj",
        "ffn_down_exps.scale": "router.per_expert_scale",
        "pre_ffw_norm_2": "pre_feedforward_layernorm_2",
        "post_ffw_norm_1": "post_feedforward_layernorm_1",
        "post_ffw_norm_2": "post_feedforward_layernorm_2",
    },
)
EXPERTS = {
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.gate_proj",
    "ffn_up_exps": "mlp.experts.up_proj",
    "ffn_down_exps": "mlp.experts.down_proj",
}
QWEN = Architecture(qwen_config, BLOCK_NAMES | EXPERTS)
ARCHITECTURES = {
    "gemma3": GEMMA3,
    "gemma3n": GEMMA3N,
    "gemma4": GEMMA4,
    "gpt-oss": Architecture(
        gpt_oss_config,
        BLOCK_NAMES
        | EXPERTS
        | {"attn_sinks": "self_attn.sinks", "post_attention_norm": "post_attention_layernorm"},
    ),
    "granite": Architecture(granite_config, permuted=True),
    "lfm2": Architecture(
        lfm2_config,
        BLOCK_NAMES
        | {
            "shortconv.conv": "conv.conv",
            "shortconv.in_proj": "conv.in_proj",
            "shortconv.out_proj": "conv.out_proj",
        },
    ),
    "llama": Architecture(llama_config, permuted=True),
    "mistral3": Architecture(mistral3_config, permuted=True),
    "olmo2": Architecture(olmo2_config, BLOCK_NAMES | POST_NORMS),
    "phi3": Architecture(
        phi3_config,
        BLOCK_NAMES | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "qwen2": QWEN,
    "qwen3": QWEN,
    "qwen3moe": QWEN,
    # Every fourth layer does not rotate, in llama.cpp as by SmolLM3Config's default.
    "smollm3": Architecture(llama_config, permuted=True),
}


def open_gguf(path: Path) -> Checkpoint:
    """Open the GGUF file `path`, or all parts of a model of which it is one. Tensors are read as
    float32.

    Errors: those of `read_parts`, and ExportError for an unknown architecture, a missing key, a key
    or a tensor that the architecture does not have.
    """
    metadata, tensors, files = read_parts(path)
    if (kind := metadata.get("general.type", "model")) != "model":
        raise ExportError(f"{path}: general.type is {shown(kind)}; a model is right")
    name = metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        raise ExportError(
            f"{path} has the architecture {shown(name)}; supported in GGUF: "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture, keys = ARCHITECTURES[name], Keys(path, metadata, name, set())
    config = architecture.config(keys, tensors)
    keys.check_asked()
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    stored = {}
    for hf_name, tensor in _renamed(architecture, tensors.values()):
        if hf_name in stored:
            raise ExportError(f"{path}: {tensor.name} and another tensor are both {hf_name}")
        if hf_name is not None:
            permuted = heads.get(tensor.name.split(".")[-2]) if architecture.permuted else None
            read = partial(_read, tensor, architecture.norm_offset, permuted)
            grid = partial(_grid, tensor, permuted) if tensor.type in GRIDS else None
            shape = tensor.shape
            if tensor.name.endswith(CONVOLUTION):
                shape, read = (shape[0], 1, *shape[1:]), partial(_of_channels, read)
                grid = None
            stored[hf_name] = StoredTensor(shape, "F32", read, grid)
    return Checkpoint(path, "gguf", config, files, stored, metadata)


def _renamed(
    architecture: Architecture, tensors: Iterable[GgufTensor]
) -> Iterator[tuple[str | None, GgufTensor]]:
    """The tensors with Hugging Face's names, each of several matrices as those."""
    for tensor in tensors:
        if tensor.name not in STREAMS:
            yield _hf_name(architecture, tensor), tensor
            continue
        if len(tensor.shape) != 3:
            raise ExportError(
                f"{tensor.path}: {tensor.name} has the shape {tensor.shape}; a matrix for each of "
                "a token's streams but the first is right"
            )
        for i, matrix in enumerate(tensor.unstacked()):
            yield STREAMS[tensor.name].format(i), matrix


def _hf_name(architecture: Architecture, tensor: GgufTensor) -> str | None:
    if tensor.name in NAMES:
        return NAMES[tensor.name]
    match tensor.name.split("."):
        case ["blk", layer, *parts] if (name := ".".join(parts)) in architecture.block_names:
            return f"model.layers.{layer}.{architecture.block_names[name]}"
        case ["blk", layer, *parts, "weight" | "bias" as kind]:
            if (part := ".".join(parts)) in architecture.block_names:
                return f"model.layers.{layer}.{architecture.block_names[part]}.{kind}"
    raise ExportError(f"{tensor.path} has a tensor of no known meaning: {tensor.name}")


def _of_channels(read: Callable[[], torch.Tensor]) -> torch.Tensor:
    """A convolution's weight [D, W] as torch has it, [D, 1, W]."""
    return read()[:, None]


def _read(tensor: GgufTensor, norm_offset: float, permuted_heads: int | None) -> torch.Tensor:
    values = tensor.dequantize()
    if permuted_heads is not None:
        return _permuted(values, permuted_heads)
    return values.sub_(norm_offset) if tensor.name.endswith("norm.weight") else values


def _permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of pairs as Hugging Face has them, half a head apart."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def _grid(tensor: GgufTensor, permuted_heads: int | None) -> Grid:
    least, most, size, _ = GRIDS[tensor.type]

    def scales() -> torch.Tensor:
        found = tensor.scales()
        return found if permuted_heads is None else _permuted(found, permuted_heads)

    return Grid(least, most, size, scales)
