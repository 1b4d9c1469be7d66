"""One row for each module of models/: transformers' classes, tiny configs of odd sizes, and what
the module must make of configs and of tensors' names. A new architecture is a new row.

A case is a tiny config. Its name begins with its model_type; the first case of each model_type
stands for it where all of them would take long.
"""

from dataclasses import dataclass, field
from itertools import product
from types import ModuleType

import torch
import transformers

from tokenloop.models import (
    gemma3,
    gemma3n,
    gemma4,
    gpt_oss,
    granite,
    lfm2,
    llama,
    mistral,
    olmo2,
    phi3,
    qwen3,
    qwen3_5,
    smollm3,
)
from tokenloop.models.layers import Rearranged, Shard, Stacked

SLIDING, FULL, LINEAR = "sliding_attention", "full_attention", "linear_attention"


@dataclass(frozen=True)
class Architecture:
    """A module of models/, and what its tests are given.

    networks: the module. classes: transformers' config and model of each model_type.
    small: config.json's keys in every case. cases: what each case changes; None leaves a key out.
    weights: part of a parameter's name, mean, standard deviation; the first that fits counts. They
    are such that no part of a network drowns the others.
    max_seq_len, prompts, rows, chunks: of the cache, of single prompts, of the three prompts of a
    batch, and of a prompt's chunks, which are cut where the model allows no longer ones.
    max_chunk, states: of the first case with 2 rows of 50 positions in bfloat16, the longest chunk
    and the shapes of its states with their dtypes.
    required: what a config must say. says: what it must say beside sizes, if it says little.
    published: whole configs, as published or as transformers 4 wrote them.
    refused: a case, and changes that make it one that cannot be run, with what is then said.
    names: a tensor's name in a checkpoint -> the parameter's; None where there is no such one.
    multimodal: transformers' config and model around the text model, and the config's keys.
    shallow: changes of a case to one layer of each kind.
    scaled: a case whose rotary embedding is scaled, and the change that takes the scaling away.
    kin: whether the network is Llama's, models/dense.py's: what Llama's own row tests of its states
    and methods is not tested again.
    embed_scale: what our embeddings are of those of transformers' embedding layer.
    """

    networks: ModuleType
    classes: dict[str, tuple[type, type]]
    small: dict
    cases: dict[str, dict]
    weights: list[tuple[str, float, float]]
    max_seq_len: int
    prompts: tuple[int, ...]
    rows: tuple[int, int, int]
    chunks: tuple[int, ...]
    max_chunk: int
    states: dict[tuple[int, ...], torch.dtype]
    refused: tuple[str, list[tuple[dict, str]]]
    names: dict[str, str | Stacked | Shard | Rearranged | None]
    shallow: dict = field(default_factory=dict)
    required: tuple[str, ...] = ("hidden_size", "intermediate_size", "num_hidden_layers")
    says: dict = field(default_factory=dict)
    published: tuple[dict, ...] = ()
    multimodal: tuple[type, type, dict] | None = None
    scaled: tuple[str, dict] | None = None
    kin: bool = False
    embed_scale: float = 1.0

    @property
    def name(self) -> str:
        return self.networks.__name__.rpartition(".")[2]


# The heads' 4 * 16 values are not the hidden size, and 24 is not the head size. The root of 48 is
# another number in bfloat16, by 0.1 %.
GEMMA_3 = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "query_pre_attn_scalar": 24, "sliding_window": 7, "max_position_embeddings": 256,
    "layer_types": [SLIDING, FULL, SLIDING], "pad_token_id": 0,
}  # fmt: skip
GEMMA_3_LINEAR_ROPE = {
    FULL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 300_000.0},
    SLIDING: {"rope_type": "default", "rope_theta": 500.0},
}
# What google/gemma-3-4b-it's text_config says of the network, and all that it says.
GEMMA_3_4B = {
    "hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
    "num_hidden_layers": 34, "sliding_window": 1024,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
}  # fmt: skip
# google/gemma-3-1b-it's keys, as transformers 4 wrote them, with numbers of our own.
GEMMA_3_OF_TRANSFORMERS_4 = {k: v for k, v in GEMMA_3.items() if k != "layer_types"} | {
    "num_hidden_layers": 7, "sliding_window_pattern": 3, "rope_theta": 500_000,
    "rope_local_base_freq": 2_000, "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    "attn_logit_softcapping": None, "final_logit_softcapping": None, "attention_bias": False,
    "hidden_activation": "gelu_pytorch_tanh", "cache_implementation": "hybrid",
}  # fmt: skip

GEMMA_3_ROW = Architecture(
    networks=gemma3,
    classes={"gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM)},
    small=GEMMA_3,
    cases={
        "gemma3_text, one key head, 5 sliding to 1 full": {
            "num_key_value_heads": 1, "num_hidden_layers": 7, "layer_types": None,
        },
        "gemma3_text, two key heads, all sliding": {"layer_types": [SLIDING] * 3},
        "gemma3_text, four key heads, all full": {
            "num_key_value_heads": 4, "layer_types": [FULL] * 3,
        },
        "gemma3_text, linear rope": {"rope_parameters": GEMMA_3_LINEAR_ROPE, "vocab_size": 131},
        "gemma3_text, wide heads": {
            "head_dim": 34, "query_pre_attn_scalar": 101, "vocab_size": 53,
        },
        "gemma3_text, one layer, three query heads": {
            "num_hidden_layers": 1, "layer_types": [FULL], "num_attention_heads": 3,
            "num_key_value_heads": 1,
        },
        "gemma3_text, a window beyond the cache": {"sliding_window": 200},
        "gemma3_text, a window of one": {"sliding_window": 1},
        "gemma3_text, another epsilon": {"rms_norm_eps": 0.1},
    },
    weights=[
        ("post_", 1.0, 0.5), ("q_norm", 0.5, 0.5), ("k_norm", 0.5, 0.5),
        ("embed_tokens", 0.0, 0.25), ("", 0.0, 0.5),
    ],
    max_seq_len=80,
    prompts=(1, 2, 7, 8, 30),
    rows=(40, 2, 8),
    chunks=(5, 7, 1, 3, 7, 7, 2, 30),
    max_chunk=7,
    states={(2, 7, 1, 16): torch.bfloat16, (2, 50, 1, 16): torch.bfloat16},
    refused=("gemma3_text, another epsilon", [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"head_dim": None, "sliding_window": None}, "lacks head_dim, sliding_window"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"layer_types": []}, r"layer_types = \[\]: a list of strings, one for each layer"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for 3 layers"),
        ({"layer_types": [FULL, FULL, "chunked"]}, r"layer_types .*unknown kinds \['chunked'\]"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type = 'yarn' of full_.* lacks its factor"),
        ({"rope_parameters": {SLIDING: {"rope_type": "su"}}}, "rope_type = 'su' is not supported"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": False}},
            "truncate = False of one type of layer",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"rope_scaling": {"rope_type": "linear"}}, "full_attention lacks its factor"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0},
             "rope_parameters": {FULL: {"rope_type": "default"}}},
            "rope_scaling = .* and rope_parameters = .* differ",
        ),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters must have an entry for each"),
    ]),
    names={
        prefix + name: f"model.{name}"
        for prefix, name in product(
            ("model.", "language_model.model.", "model.language_model."),
            ("embed_tokens.weight", "norm.weight", "layers.11.self_attn.q_proj.weight"),
        )
    } | dict.fromkeys(
        # A tied head that is there must equal the embedding.
        ("lm_head.weight", "language_model.lm_head.weight"), "lm_head.weight"
    ) | dict.fromkeys((
        "vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight",
        "model.vision_tower.vision_model.embeddings.patch_embedding.bias",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.mm_input_projection_weight",
        "model.multi_modal_projector.mm_soft_emb_norm.weight",
    )),
    published=(GEMMA_3_4B, GEMMA_3_OF_TRANSFORMERS_4, GEMMA_3),
    multimodal=(transformers.Gemma3Config, transformers.Gemma3ForConditionalGeneration, {
        "text_config": GEMMA_3 | {"rope_parameters": GEMMA_3_LINEAR_ROPE},
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
            "num_attention_heads": 2, "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4, "image_token_index": 96, "boi_token_index": 94,
        "eoi_token_index": 95,
    }),
    shallow={"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
)  # fmt: skip


# Both kinds of layer differ in head size and heads, and no product of them is the hidden size,
# whose root is another number in bfloat16, by 0.1 %.
GEMMA_4 = {
    "vocab_size": 97, "hidden_size": 44, "intermediate_size": 78, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 3, "num_global_key_value_heads": 2,
    "head_dim": 14, "global_head_dim": 26, "attention_k_eq_v": True,
    "sliding_window": 7, "max_position_embeddings": 256, "final_logit_softcapping": 5.0,
    "layer_types": [SLIDING, FULL, SLIDING, FULL], "hidden_size_per_layer_input": 0,
    "use_bidirectional_attention": "vision", "pad_token_id": 0,
}  # fmt: skip
GEMMA_4_OTHER_ROTATIONS = {
    SLIDING: {
        "rope_type": "proportional",
        "partial_rotary_factor": 0.6,
        "rope_theta": 300.0,
        "factor": 3.0,
    },
    FULL: {"rope_type": "default", "rope_theta": 5_000.0},
}
# What google/gemma-4-31b's text_config says of the network, in the keys that it was published with.
GEMMA_4_31B = {
    "attention_bias": False, "attention_k_eq_v": True, "enable_moe_block": False,
    "final_logit_softcapping": 30.0, "global_head_dim": 512, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 5376,
    "hidden_size_per_layer_input": 0, "intermediate_size": 21504,
    "layer_types": ([SLIDING] * 5 + [FULL]) * 10, "max_position_embeddings": 262_144,
    "model_type": "gemma4_text", "num_attention_heads": 32, "num_global_key_value_heads": 4,
    "num_hidden_layers": 60, "num_key_value_heads": 16, "num_kv_shared_layers": 0,
    "rms_norm_eps": 1e-6, "sliding_window": 1024, "tie_word_embeddings": True,
    "use_bidirectional_attention": "vision", "use_double_wide_mlp": False, "vocab_size": 262_144,
    "rope_parameters": {
        FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional"},
        SLIDING: {"rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip

GEMMA_4_ROW = Architecture(
    networks=gemma4,
    classes={"gemma4_text": (transformers.Gemma4TextConfig, transformers.Gemma4ForCausalLM)},
    small=GEMMA_4,
    cases={
        "gemma4_text, 5 sliding to 1 full": {"num_hidden_layers": 7, "layer_types": None},
        "gemma4_text, values of their own, no cap": {
            "attention_k_eq_v": False, "final_logit_softcapping": None,
        },
        "gemma4_text, all full": {
            "layer_types": [FULL] * 3, "num_hidden_layers": 3, "num_key_value_heads": 1,
        },
        "gemma4_text, other rotations": {
            "rope_parameters": GEMMA_4_OTHER_ROTATIONS, "vocab_size": 131, "head_dim": 22,
        },
        "gemma4_text, experts beside": {
            "enable_moe_block": True, "num_experts": 7, "top_k_experts": 3,
            "moe_intermediate_size": 20,
        },
        "gemma4_text, per-layer inputs, shared keys": {
            "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 97,
            "num_hidden_layers": 6, "num_kv_shared_layers": 3, "use_double_wide_mlp": True,
            "layer_types": [SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
            "attention_k_eq_v": False,
        },
        "gemma4_text, per-layer inputs and experts, a window beyond the cache": {
            "hidden_size_per_layer_input": 12, "vocab_size_per_layer_input": 97,
            "sliding_window": 200, "num_kv_shared_layers": 1, "rms_norm_eps": 0.1,
            "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2,
            "moe_intermediate_size": 20,
        },
        "gemma4_text, a window beyond the cache": {"sliding_window": 200},
        "gemma4_text, a window of one, another epsilon": {
            "sliding_window": 1, "rms_norm_eps": 0.1,
        },
    },
    weights=[
        ("layer_scalar", 1.0, 0.2), ("norm", 1.0, 0.5), ("embed_tokens", 0.0, 0.25),
        ("scale", 1.0, 0.5), ("", 0.0, 0.5),
    ],
    max_seq_len=96,
    prompts=(1, 7, 8, 30),
    rows=(40, 2, 8),
    chunks=(5, 7, 1, 3, 7, 7, 2, 30),
    max_chunk=7,
    states={(2, 7, 3, 14): torch.bfloat16, (2, 50, 2, 26): torch.bfloat16},
    refused=("gemma4_text, a window beyond the cache", [
        ({"attention_bias": True}, "attention_bias = True"),
        (
            {"hidden_size_per_layer_input": 256, "vocab_size_per_layer_input": 50},
            "vocab_size_per_layer_input = 50",
        ),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers = 3 .* leaves no keys of full_"),
        ({"num_kv_shared_layers": 4}, "num_kv_shared_layers = 4 .* leaves no keys of full_"),
        ({"enable_moe_block": True}, "lacks top_k_experts"),
        ({"enable_moe_block": True, "top_k_experts": 2}, "lacks num_experts, moe_inter"),
        (
            {"enable_moe_block": True, "top_k_experts": 3, "num_experts": 2,
             "moe_intermediate_size": 9},
            "num_experts_per_tok = 3 is not among num_experts = 2",
        ),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention = 'all'"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping = 0"),
        ({"hidden_size": None, "head_dim": None}, "lacks hidden_size, head_dim"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_attention_heads = 6 .* 4 .* of sliding_attention"),
        ({"num_global_key_value_heads": 5}, "num_attention_heads = 6 .* 5 .* of full_attention"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for 4 layers"),
        ({"layer_types": [FULL, FULL, FULL, "chunked"]}, r"unknown kinds \['chunked'\]"),
        ({"per_layer_config": {"3": {"head_dim": 26}}}, "layer 3 {'head_dim': 26.*full_attention"),
        ({"per_layer_config": {"01": {"sliding_window": 9}}}, "sets sliding_window of layer 1"),
        ({"rope_parameters": {FULL: {"rope_theta": 1e6}}}, "lacks rope_theta of sliding_attention"),
        (
            {
                "rope_parameters": GEMMA_4_OTHER_ROTATIONS
                | {FULL: {"rope_type": "yarn", "rope_theta": 9.0}}
            },
            "rope_type = 'yarn' of full_attention lacks its factor",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling = {.*linear"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ]),
    names={
        prefix + name: f"model.{name}"
        for prefix, name in product(
            ("model.", "model.language_model."), ("norm.weight", "layers.11.layer_scalar")
        )
    } | {
        "model.embed_tokens_per_layer.weight": "model.per_layer.embed_tokens.weight",
        "model.layers.1.per_layer_projection.weight": "model.layers.1.per_layer.projection.weight",
        "model.language_model.layers.1.router.scale": "model.layers.1.mlp.router_norm.weight",
        "model.layers.1.experts.down_proj": "model.layers.1.mlp.experts.down_proj",
        "model.layers.1.post_feedforward_layernorm_2.weight":
            "model.layers.1.mlp.experts_branch_norm.weight",
    } | {"lm_head.weight": "lm_head.weight"} | dict.fromkeys((
        "model.vision_tower.encoder.layers.0.self_attn.q_proj.linear.weight",
        "model.embed_vision.embedding_projection.weight",
        "model.audio_tower.layers.0.norm_out.weight",
        "model.embed_audio.embedding_projection.weight",
    )),
    required=(),
    says={"hidden_size_per_layer_input": 0},
    published=(GEMMA_4_31B, {"hidden_size_per_layer_input": 0}),
    multimodal=(transformers.Gemma4Config, transformers.Gemma4ForConditionalGeneration, {
        "text_config": GEMMA_4,
        "vision_config": {
            "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "head_dim": 8,
            "num_attention_heads": 2, "num_key_value_heads": 2, "patch_size": 4,
            "position_embedding_size": 16,
        },
        "audio_config": None,
    }),
    shallow={"num_hidden_layers": 2, "layer_types": [SLIDING, FULL]},
)  # fmt: skip


EXPERTS = {"num_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 20}

QWEN_3_ROW = Architecture(
    networks=qwen3,
    classes={
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
        "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    },
    # The heads' 4 * 18 values are not the hidden size.
    small={
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 18,
        "max_position_embeddings": 256, "rope_theta": 700.0,
    },
    cases={
        "qwen2": {"head_dim": None, "tie_word_embeddings": True},
        "qwen2, untied, one key head": {"head_dim": None, "num_key_value_heads": 1},
        "qwen3": {},
        "qwen3, tied, as many key heads": {"tie_word_embeddings": True, "num_key_value_heads": 4},
        "qwen3, linear rope": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        "qwen3_moe": EXPERTS,
        "qwen3_moe, weights that add up to one": EXPERTS | {"norm_topk_prob": True},
        "qwen3_moe, all experts chosen": EXPERTS | {"num_experts_per_tok": 7},
    },
    weights=[("norm", 1.0, 0.4), ("embed_tokens", 0.0, 0.25), ("", 0.0, 0.4)],
    max_seq_len=80,
    prompts=(1, 2, 16),
    rows=(23, 1, 9),
    chunks=(1, 1, 7, 1, 33, 37),
    max_chunk=50,
    states={(2, 50, 2, 12): torch.bfloat16},
    refused=("qwen3_moe", [
        ({"model_type": "qwen2_moe"}, "model_type = 'qwen2_moe' is none of qwen2, qwen3"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_att"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step = 2"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers = \[0\]"),
        ({"num_experts_per_tok": 8}, "num_experts_per_tok = 8 is not among num_experts = 7"),
        ({"rope_scaling": {"type": "su", "factor": 4.0}}, "rope_type = 'su'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic' lacks its factor"),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks its factor"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"hidden_size": None, "head_dim": None}, "lacks hidden_size, head_dim"),
    ]),
    names={
        name: name
        for name in (
            "lm_head.weight",
            "model.layers.3.mlp.gate.weight",
            "model.layers.3.mlp.gate_proj.weight",
            "model.layers.3.mlp.experts.gate_up_proj",
        )
    },
    shallow={"num_hidden_layers": 1},
    scaled=("qwen3, linear rope", {"rope_scaling": None}),
)  # fmt: skip


# What google/gemma-3n-E2B-it's text_config says of the network.
GEMMA_3N_E2B = {
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 20, "altup_active_idx": 0,
    "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_num_inputs": 4,
    "attention_bias": False, "final_logit_softcapping": 30.0, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2048,
    "hidden_size_per_layer_input": 256, "intermediate_size": [8192] * 30, "laurel_rank": 64,
    "layer_types": ([SLIDING] * 4 + [FULL]) * 6, "max_position_embeddings": 32_768,
    "model_type": "gemma3n_text", "num_attention_heads": 8, "num_hidden_layers": 30,
    "num_key_value_heads": 2, "num_kv_shared_layers": 10, "rms_norm_eps": 1e-6,
    "rope_local_base_freq": 10_000.0, "rope_scaling": None, "rope_theta": 1_000_000.0,
    "sliding_window": 512, "vocab_size": 262_400, "vocab_size_per_layer_input": 262_144,
}  # fmt: skip

GEMMA_3N_ROW = Architecture(
    networks=gemma3n,
    classes={"gemma3n_text": (transformers.Gemma3nTextConfig, transformers.Gemma3nForCausalLM)},
    # The table of the layers' inputs has fewer tokens than the vocabulary.
    small={
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 14, "sliding_window": 7,
        "max_position_embeddings": 256, "final_logit_softcapping": 8.0, "pad_token_id": 0,
        "vocab_size_per_layer_input": 61, "hidden_size_per_layer_input": 10, "laurel_rank": 5,
        "num_kv_shared_layers": 2, "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "activation_sparsity_pattern": [0.7, 0.0, 0.4, 0.0],
    },
    cases={
        "gemma3n_text": {},
        "gemma3n_text, three streams, widths of layers, a full table": {
            "altup_num_inputs": 3, "altup_correct_scale": False,
            "intermediate_size": [80, 36, 56, 80], "vocab_size_per_layer_input": 97,
            "rope_parameters": GEMMA_3_LINEAR_ROPE,
        },
        "gemma3n_text, no keys shared, 4 sliding to 1 full, another epsilon": {
            "num_kv_shared_layers": 0, "num_hidden_layers": 5, "layer_types": None,
            "activation_sparsity_pattern": None, "rms_norm_eps": 0.1,
        },
    },
    weights=[
        ("norm", 1.0, 0.4), ("correct_output_scale", 1.0, 0.4), ("coefs", 0.0, 0.2),
        ("modality_router", 0.0, 8.0), ("embed_tokens", 0.0, 0.25), ("", 0.0, 0.4),
    ],
    max_seq_len=96,
    prompts=(1, 7, 8, 30),
    rows=(40, 2, 8),
    chunks=(5, 7, 1, 3, 7, 7, 2, 30),
    max_chunk=7,
    states={(2, 7, 2, 14): torch.bfloat16, (2, 50, 2, 14): torch.bfloat16},
    refused=("gemma3n_text", [
        ({"attention_bias": True}, "attention_bias = True"),
        ({"hidden_activation": "silu"}, "hidden_activation = 'silu'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings = False"),
        ({"altup_active_idx": 1}, "altup_active_idx = 1"),
        ({"altup_num_inputs": 1}, "altup_num_inputs = 1 .*at least 2 and 1 are right"),
        ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input = 0: at least 2 and 1"),
        ({"final_logit_softcapping": 0.0}, "final_logit_softcapping = 0"),
        ({"vocab_size_per_layer_input": 98}, "vocab_size_per_layer_input = 98 is more than"),
        ({"num_kv_shared_layers": 3}, "num_kv_shared_layers = 3 .* leaves no keys of full_"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"intermediate_size": [80, 80]}, r"intermediate_size = \[80, 80\]: one, or a list of one"),
        ({"intermediate_size": "odd"}, "intermediate_size = 'odd'"),
        ({"activation_sparsity_pattern": [0.5]}, r"activation_sparsity_pattern = \[0.5\]: a list"),
        ({"activation_sparsity_pattern": 0.5}, "activation_sparsity_pattern = 0.5: a list"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for 4 layers"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters must have an entry for each"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    ]),
    required=(),
    says={"num_kv_shared_layers": 2},
    names={
        prefix + name: f"model.{ours}"
        for prefix, (name, ours) in product(
            ("model.", "model.language_model."),
            (
                ("layers.11.altup.correct_output_scale",) * 2,
                ("layers.11.laurel.linear_left.weight",) * 2,
                ("altup_projections.1.weight", "streams.projections.1.weight"),
                ("altup_unembed_projections.2.weight", "streams.unembed_projections.2.weight"),
                ("embed_tokens_per_layer.weight", "per_layer.embed_tokens.weight"),
                ("layers.1.per_layer_projection.weight", "layers.1.per_layer.projection.weight"),
            ),
        )
    } | {"lm_head.weight": "lm_head.weight"} | dict.fromkeys((
        "model.vision_tower.timm_model.conv_stem.conv.weight",
        "model.embed_vision.embedding_projection.weight",
        "model.audio_tower.conformer.0.norm.weight", "model.embed_audio.embedding.weight",
    )),
    published=(GEMMA_3N_E2B,),
    shallow={
        "num_hidden_layers": 2, "layer_types": [SLIDING, FULL], "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.7, 0.0],
    },
)  # fmt: skip


QWEN_3_5_ROW = Architecture(
    networks=qwen3_5,
    classes={
        "qwen3_5_text": (transformers.Qwen3_5TextConfig, transformers.Qwen3_5ForCausalLM),
        "qwen3_5_moe_text": (transformers.Qwen3_5MoeTextConfig, transformers.Qwen3_5MoeForCausalLM),
        "qwen3_next": (transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM),
    },
    # Every size of a gated delta net is another one.
    small={
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24,
        "linear_num_key_heads": 2, "linear_num_value_heads": 6,
        "linear_key_head_dim": 10, "linear_value_head_dim": 14,
        "max_position_embeddings": 256, "pad_token_id": 0,
    },
    cases={
        "qwen3_5_text": {},
        "qwen3_5_text, tied, as many key heads": {
            "tie_word_embeddings": True, "linear_num_key_heads": 6, "linear_conv_kernel_dim": 2,
        },
        "qwen3_5_text, yarn of a part of a head": {
            "layer_types": [FULL, LINEAR], "num_hidden_layers": 2,
            "rope_scaling": {
                "rope_type": "yarn", "rope_theta": 700.0, "partial_rotary_factor": 0.5,
                "factor": 4.0, "original_max_position_embeddings": 32, "mrope_section": [2, 2, 2],
            },
        },
        "qwen3_5_text, half of a head turns": {
            "layer_types": [FULL, LINEAR], "num_hidden_layers": 2, "linear_conv_kernel_dim": 3,
            "rope_parameters": {
                "rope_type": "default", "rope_theta": 700.0, "partial_rotary_factor": 0.5,
                "mrope_interleaved": True, "mrope_section": [2, 2, 2],
            },
        },
        "qwen3_next": {"num_experts": 0},
        "qwen3_next, every other layer": {
            "num_experts": 4, "mlp_only_layers": [0, 1, 2, 3], "full_attention_interval": 2,
        },
        "qwen3_5_moe_text": {
            "num_experts": 7, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
        },
        "qwen3_next, experts in some layers": {
            "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 20, "decoder_sparse_step": 2,
            "norm_topk_prob": False,
        },
    },
    weights=[
        # Heads forget at different speeds.
        ("A_log", -2.0, 1.0), ("dt_bias", 0.0, 1.0), ("conv1d.weight", 0.0, 0.6),
        ("linear_attn.norm", 1.0, 0.4), ("", 0.0, 0.4),
    ],
    # Three chunks of the delta rule, which takes 64 tokens at once.
    max_seq_len=150,
    prompts=(1, 2, 67),
    rows=(66, 1, 9),
    chunks=(1, 1, 2, 3, 63, 64, 1, 15),
    max_chunk=50,
    states={
        (2, 2 * 20 + 84, 3): torch.bfloat16,
        (2, 6, 10, 14): torch.float32,
        (2, 50, 2, 24): torch.bfloat16,
    },
    refused=("qwen3_next", [
        ({"model_type": "qwen3_5_omni"}, "'qwen3_5_omni' is none of qwen3_5_text"),
        ({"num_experts": 4}, "num_experts_per_tok = 10 is not among num_experts = 4"),
        ({"num_experts": 4, "moe_intermediate_size": None}, "lacks moe_intermediate_size"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"attn_output_gate": False}, "attn_output_gate = False"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"linear_conv_kernel_dim": 5}, "linear_conv_kernel_dim = 5"),
        ({"linear_num_value_heads": 5}, "linear_num_value_heads = 5 .* linear_num_key_heads = 2"),
        ({"num_key_value_heads": 3}, "num_attention_heads = 4 .* num_key_value_heads = 3"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries for 4 layers"),
        ({"layer_types": [FULL] * 3 + ["chunked"]}, r"unknown kinds \['chunked'\]"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn' lacks its factor"),
        ({"hidden_size": None, "head_dim": None}, "lacks hidden_size, head_dim"),
    ]),
    names={
        "lm_head.weight": "lm_head.weight",
        "model.layers.3.mlp.up_proj.weight": "model.layers.3.mlp.up_proj.weight",
        "model.language_model.norm.weight": "model.norm.weight",
        "model.visual.blocks.0.attn.qkv.weight": None,
        "mtp.layers.0.mlp.up_proj.weight": None,
    },
    shallow={"num_hidden_layers": 2, "layer_types": [LINEAR, FULL]},
)  # fmt: skip

LLAMA_3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
# What meta-llama/Llama-3.2-1B's config.json says of the network.
LLAMA_3_2_1B = {
    "attention_bias": False, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 8192, "max_position_embeddings": 131_072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
    "rope_scaling": LLAMA_3_ROPE
    | {"factor": 32.0, "original_max_position_embeddings": 8192},
    "rope_theta": 500_000.0, "tie_word_embeddings": True, "vocab_size": 128_256,
}  # fmt: skip

LLAMA_ROW = Architecture(
    networks=llama,
    classes={"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM)},
    # The heads' 4 * 18 values are not the hidden size.
    small={
        "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 18,
        "max_position_embeddings": 256, "rope_theta": 700.0, "rms_norm_eps": 1e-5,
    },
    cases={
        "llama": {},
        "llama, tied, llama3 rope": {"tie_word_embeddings": True, "rope_scaling": LLAMA_3_ROPE},
        "llama, llama3 rope of parts of its own": {
            "rope_scaling": LLAMA_3_ROPE
            | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
        },
        "llama, biases, one key head": {
            "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1,
        },
        "llama, linear rope, as many key heads": {
            "rope_scaling": {"rope_type": "linear", "factor": 3.0}, "num_key_value_heads": 4,
        },
        "llama, yarn": {
            "rope_scaling": {"rope_type": "yarn", "factor": 4.0,
                             "original_max_position_embeddings": 64},
        },
        "llama, dynamic rope": {
            "rope_scaling": {"rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 65_536,
        },
        "llama, tied, no head size": {
            "head_dim": None, "tie_word_embeddings": True, "rms_norm_eps": 0.1,
        },
    },
    weights=[("norm", 1.0, 0.4), ("embed_tokens", 0.0, 0.25), ("", 0.0, 0.4)],
    max_seq_len=80,
    prompts=(1, 2, 16),
    rows=(23, 1, 9),
    chunks=(1, 1, 7, 1, 33, 37),
    max_chunk=50,
    states={(2, 50, 2, 18): torch.bfloat16},
    refused=("llama, tied, llama3 rope", [
        ({"model_type": "llama4"}, "model_type = 'llama4'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type = 'yarn' lacks its factor"),
        (
            {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}},
            "rope_type = 'dynamic' lacks its factor",
        ),
        ({"rope_scaling": {"factor": 4.0}}, "factor = 4.0 has no rope_type: linear or"),
        ({"rope_scaling": {"rope_type": "linear", "alpha": 4.0}}, "rope_scaling.alpha = 4.0 is"),
        ({"rope_parameters": {FULL: {"rope_theta": 700.0}}}, "has an entry for full_attention"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 2.0],
                              "long_factor": [1.0, 2.0]}},
            "short_factor of .* has 2 numbers; 9, one for",
        ),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 0.5}},
            "beta_fast = 0.5 must not be below beta_slow = 1.0",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, "lacks its factor"),
        ({"rope_scaling": LLAMA_3_ROPE | {"low_freq_factor": None}}, "lacks its low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 4.0},
             "rope_parameters": LLAMA_3_ROPE | {"rope_theta": 700.0}},
            "rope_scaling = .* and rope_parameters = .* differ",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"hidden_size": None, "head_dim": None}, "lacks hidden_size, head_dim"),
    ]),
    names={
        name: name
        for name in (
            "lm_head.weight",
            "model.embed_tokens.weight",
            "model.layers.3.self_attn.q_proj.bias",
            "model.layers.3.mlp.gate_proj.weight",
        )
    } | {"model.layers.0.self_attn.rotary_emb.inv_freq": None},
    published=(LLAMA_3_2_1B,),
    shallow={"num_hidden_layers": 1},
    scaled=("llama, tied, llama3 rope", {"rope_scaling": None}),
)  # fmt: skip

# What families like Llama's have in common: the heads' 4 * 18 values are not the hidden size.
DENSE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 18,
    "max_position_embeddings": 256, "rope_theta": 700.0, "rms_norm_eps": 1e-5,
}  # fmt: skip
DENSE_WEIGHTS = [("norm", 1.0, 0.4), ("embed_tokens", 0.0, 0.25), ("", 0.0, 0.4)]
DENSE_TESTS = {
    "kin": True, "weights": DENSE_WEIGHTS, "max_seq_len": 80, "prompts": (1, 16),
    "rows": (23, 1, 9), "chunks": (1, 1, 7, 1, 33, 37),
}  # fmt: skip
DENSE_NAMES = {
    name: name
    for name in (
        "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight",
        "model.layers.3.self_attn.q_proj.weight", "model.layers.3.mlp.gate_proj.weight",
    )
}  # fmt: skip

MISTRAL_ROW = Architecture(
    networks=mistral,
    classes={
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
        "ministral": (transformers.MinistralConfig, transformers.MinistralForCausalLM),
        "ministral3": (transformers.Ministral3Config, transformers.Ministral3ForCausalLM),
    },
    small=DENSE | {"sliding_window": 7},
    cases={
        "mistral, all sliding": {},
        "ministral, sliding and full": {"layer_types": [SLIDING, FULL, SLIDING]},
        "ministral3, tied": {
            "sliding_window": None, "rope_theta": None, "pad_token_id": 0,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "yarn", "rope_theta": 700.0, "factor": 2.0, "mscale": 0.7,
                "original_max_position_embeddings": 128, "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    },
    **DENSE_TESTS,
    max_chunk=7,
    states={(2, 7, 2, 18): torch.bfloat16},
    refused=("mistral, all sliding", [
        ({"model_type": "mixtral"}, "model_type = 'mixtral' is none of mistral, ministral"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"layer_types": [SLIDING, FULL, FULL]}, "layer_types has full_attention: only sliding_"),
        ({"layer_types": [SLIDING] * 2}, "layer_types has 2 entries for 3 layers"),
        (
            {"model_type": "ministral", "sliding_window": None, "layer_types": [SLIDING] * 3},
            "config lacks its sliding_window",
        ),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type = 'ntk'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        (
            {"model_type": "ministral3", "sliding_window": None,
             "rope_parameters": {"rope_type": "default", "llama_4_scaling_beta": 0.1}},
            "lacks original_max_position_embeddings",
        ),
    ]),
    required=(),
    names=DENSE_NAMES
    | {f"language_model.{name}": name for name in DENSE_NAMES}
    | {"vision_tower.ln_pre.weight": None, "multi_modal_projector.linear_1.weight": None},
)  # fmt: skip

SMOLLM_3_ROW = Architecture(
    networks=smollm3,
    classes={"smollm3": (transformers.SmolLM3Config, transformers.SmolLM3ForCausalLM)},
    small=DENSE | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    cases={
        "smollm3, every other layer rotates": {"no_rope_layer_interval": 2},
        "smollm3, untied, biases, a list": {
            "tie_word_embeddings": False, "no_rope_layers": [0, 1, 1], "attention_bias": True,
        },
    },
    **DENSE_TESTS,
    max_chunk=50,
    states={(2, 50, 2, 18): torch.bfloat16},
    refused=("smollm3, every other layer rotates", [
        ({"model_type": "smollm4"}, "model_type = 'smollm4'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"use_sliding_window": True}, "use_sliding_window = True"),
        ({"layer_types": [SLIDING] * 3}, "unknown kinds"),
        ({"no_rope_layers": [1]}, "no_rope_layers has 1 entries for 3 layers"),
        ({"no_rope_layers": [1, 2, 1]}, "no_rope_layers = .* zeros and ones"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type = 'ntk'"),
    ]),
    required=(),
    names=DENSE_NAMES,
)  # fmt: skip

# The 8B's numbers, but for the scores', which would be too small for heads of 18.
MULTIPLIERS = {
    "embedding_multiplier": 12.0, "attention_multiplier": 0.2, "residual_multiplier": 0.22,
    "logits_scaling": 0.6,
}  # fmt: skip
GRANITE_ROW = Architecture(
    networks=granite,
    classes={
        "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM),
        "granitemoehybrid": (
            transformers.GraniteMoeHybridConfig, transformers.GraniteMoeHybridForCausalLM,
        ),
    },
    small={key: value for key, value in DENSE.items() if key != "head_dim"} | MULTIPLIERS,
    cases={
        "granite, tied": {"tie_word_embeddings": True},
        "granite, biases, one key head": {
            "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 1,
            "rms_norm_eps": 0.1,
        },
        "granitemoehybrid, dense": {
            "layer_types": ["attention"] * 3, "num_local_experts": 0,
            "shared_intermediate_size": 56, "position_embedding_type": "rope", "mamba_n_heads": 3,
        },
        "granitemoehybrid, dense, no rotation": {
            "layer_types": [FULL] * 3, "num_local_experts": 0, "shared_intermediate_size": 56,
            "mamba_n_heads": 3,
        },
    },
    **DENSE_TESTS,
    max_chunk=50,
    states={(2, 50, 2, 12): torch.bfloat16},
    refused=("granitemoehybrid, dense", [
        ({"model_type": "granitemoe"}, "model_type = 'granitemoe'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"num_local_experts": 4}, "num_local_experts = 4"),
        ({"layer_types": ["attention", "mamba", "attention"]}, "layer_types has mamba: only att"),
        ({"layer_types": None}, "lacks layer_types"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type = 'alibi'"),
        ({"residual_multiplier": 0}, "residual_multiplier = 0"),
        ({"logits_scaling": None}, "lacks logits_scaling"),
    ]),
    required=(),
    says={"layer_types": [FULL] * 8, "num_local_experts": 0},
    names=DENSE_NAMES | {
        "model.layers.3.shared_mlp.input_linear.weight": Stacked(
            ("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight")
        ),
        "model.layers.3.shared_mlp.output_linear.weight": "model.layers.3.mlp.down_proj.weight",
    },
    # Ours are those before a residual whose branches are multiplied.
    embed_scale=12.0 / 0.22,
)  # fmt: skip

OLMO_2_ROW = Architecture(
    networks=olmo2,
    classes={
        "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM),
        "olmo3": (transformers.Olmo3Config, transformers.Olmo3ForCausalLM),
    },
    small={key: value for key, value in DENSE.items() if key != "rope_theta"}
    | {"pad_token_id": 0, "eos_token_id": 2},
    cases={
        "olmo2": {"rope_theta": 700.0},
        "olmo2, tied, biases, one key head": {
            "tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 1,
        },
        "olmo3, sliding and full": {
            "layer_types": [SLIDING, FULL, SLIDING], "sliding_window": 7,
            "rope_parameters": {
                SLIDING: {"rope_type": "default", "rope_theta": 300.0},
                FULL: {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
            },
        },
    },
    **DENSE_TESTS,
    max_chunk=50,
    states={(2, 50, 2, 18): torch.bfloat16},
    refused=("olmo3, sliding and full", [
        ({"model_type": "olmo"}, "model_type = 'olmo'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"rope_parameters": None, "rope_theta": 700.0}, "rope_theta = 700.0 is not supported"),
        ({"rope_parameters": {"rope_theta": 1e6}}, "rope_parameters must have an entry for each"),
        ({"sliding_window": None}, "config lacks its sliding_window"),
        ({"layer_types": [FULL, FULL, "chunked"]}, r"unknown kinds \['chunked'\]"),
    ]),
    required=(),
    names=DENSE_NAMES | {
        name: name
        for name in (
            "model.layers.3.self_attn.q_norm.weight",
            "model.layers.3.post_feedforward_layernorm.weight",
        )
    },
)  # fmt: skip

PHI_3_ROW = Architecture(
    networks=phi3,
    classes={"phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM)},
    small={key: value for key, value in DENSE.items() if key != "head_dim"}
    | {"hidden_size": 64, "pad_token_id": 0, "eos_token_id": 2},
    cases={
        "phi3, three quarters of a head turn": {"partial_rotary_factor": 0.75},
        "phi3, tied, all sliding, as many key heads": {
            "tie_word_embeddings": True, "sliding_window": 7, "num_key_value_heads": 4,
        },
    },
    **DENSE_TESTS,
    max_chunk=50,
    states={(2, 50, 2, 16): torch.bfloat16},
    refused=("phi3, three quarters of a head turn", [
        ({"model_type": "phi"}, "model_type = 'phi'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias = True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
        ({"rope_scaling": {"type": "su", "long_factor": [1.0]}}, "lacks its short_factor"),
        ({"partial_rotary_factor": 0.2}, "partial_rotary_factor = 3: an even number"),
    ]),
    required=(),
    names=DENSE_NAMES | {
        "model.layers.3.self_attn.qkv_proj.weight": Stacked(tuple(
            f"model.layers.3.self_attn.{name}_proj.weight" for name in "qkv"
        )),
        "model.layers.3.mlp.gate_up_proj.weight": Stacked(
            ("model.layers.3.mlp.gate_proj.weight", "model.layers.3.mlp.up_proj.weight")
        ),
    },
)  # fmt: skip

LFM_2_ROW = Architecture(
    networks=lfm2,
    classes={"lfm2": (transformers.Lfm2Config, transformers.Lfm2ForCausalLM)},
    # A third of 90 less is 60, which 8 divide as 64.
    small={key: value for key, value in DENSE.items() if key not in ("head_dim", "rms_norm_eps")}
    | {
        "intermediate_size": 90, "block_multiple_of": 8, "layer_types": ["conv", FULL, "conv"],
        "pad_token_id": 0,
    },
    cases={
        "lfm2": {},
        "lfm2, untied, biases, a width of 2": {
            "tie_word_embeddings": False, "conv_bias": True, "conv_L_cache": 2,
            "block_auto_adjust_ff_dim": False, "norm_eps": 0.1,
        },
    },
    weights=[
        ("conv.conv", 0.0, 0.6), ("_layernorm", 2.0, 0.5), ("norm", 1.0, 0.4),
        ("self_attn", 0.0, 0.8), ("embed_tokens", 0.0, 0.15), ("", 0.0, 0.4),
    ],
    max_seq_len=80,
    prompts=(1, 2, 16),
    rows=(23, 1, 9),
    chunks=(1, 1, 7, 1, 33, 37),
    max_chunk=50,
    states={(2, 48, 2): torch.bfloat16, (2, 50, 2, 12): torch.bfloat16},
    refused=("lfm2", [
        ({"model_type": "lfm2_moe"}, "model_type = 'lfm2_moe'"),
        ({"conv_L_cache": 5}, "conv_L_cache = 5: one of"),
        ({"block_ff_dim": 80}, "intermediate_size = 90 and block_ff_dim = 80 differ"),
        ({"layer_types": ["conv"]}, "layer_types has 1 entries for 3 layers"),
        ({"layer_types": ["conv", "conv", "mamba"]}, r"unknown kinds \['mamba'\]"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type = 'ntk'"),
    ]),
    required=(),
    names={
        "model.embedding_norm.weight": "model.norm.weight",
        "model.layers.3.operator_norm.weight": "model.layers.3.input_layernorm.weight",
        "model.layers.3.feed_forward.w2.weight": "model.layers.3.mlp.down_proj.weight",
        "model.layers.3.conv.conv.bias": "model.layers.3.conv.conv.bias",
        "model.layers.3.self_attn.out_proj.weight": "model.layers.3.self_attn.o_proj.weight",
    },
    shallow={"num_hidden_layers": 2, "layer_types": ["conv", FULL]},
)  # fmt: skip

# The 20B's rotary embedding with fewer positions: prompts are longer than the original length.
GPT_OSS_ROPE = {
    "rope_type": "yarn", "rope_theta": 700.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0,
    "truncate": False, "original_max_position_embeddings": 32,
}  # fmt: skip
# What openai/gpt-oss-20b says of the network.
GPT_OSS_20B = {
    "model_type": "gpt_oss", "vocab_size": 201_088, "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 24, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4,
    "attention_bias": True, "sliding_window": 128, "layer_types": [SLIDING, FULL] * 12,
    "hidden_act": "silu", "swiglu_limit": 7.0, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
    "max_position_embeddings": 131_072, "initial_context_length": 4096, "rope_theta": 150_000,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0,
        "truncate": False, "original_max_position_embeddings": 4096,
    },
}  # fmt: skip
GPT_OSS_ROW = Architecture(
    networks=gpt_oss,
    classes={"gpt_oss": (transformers.GptOssConfig, transformers.GptOssForCausalLM)},
    small={key: value for key, value in DENSE.items() if key != "rope_theta"} | {
        "intermediate_size": 20, "num_local_experts": 7, "num_experts_per_tok": 3,
        "sliding_window": 7, "rope_parameters": GPT_OSS_ROPE,
    },
    cases={
        "gpt_oss": {},
        "gpt_oss, tied, no biases, one key head, all full": {
            "tie_word_embeddings": True, "attention_bias": False, "num_key_value_heads": 1,
            "layer_types": [FULL] * 3, "num_experts_per_tok": 1,
        },
    },
    weights=[
        ("norm", 1.0, 0.4), ("sinks", 1.0, 2.0), ("experts", 0.0, 0.9), ("router", 0.0, 0.6),
        ("embed_tokens", 0.0, 0.25), ("", 0.0, 0.4),
    ],
    kin=True,
    max_seq_len=80,
    prompts=(1, 16),
    rows=(23, 1, 9),
    chunks=(1, 1, 7, 1, 33, 37),
    max_chunk=7,
    states={(2, 7, 2, 18): torch.bfloat16, (2, 50, 2, 18): torch.bfloat16},
    refused=("gpt_oss", [
        ({"model_type": "gpt_oss_moe"}, "model_type = 'gpt_oss_moe'"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"swiglu_limit": 5.0}, "swiglu_limit = 5.0"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha = 1.0"),
        ({"mlp_bias": True}, "mlp_bias = True"),
        ({"experts_per_token": 2}, "experts_per_token = 2 and num_experts_per_tok = 3 differ"),
        ({"num_experts_per_tok": 8}, "num_experts_per_tok = 8 is not among"),
        ({"layer_types": [SLIDING]}, "layer_types has 1 entries for 3 layers"),
        ({"sliding_window": None}, "config lacks its sliding_window"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3"),
        ({"rope_parameters": {"rope_type": "ntk"}}, "rope_type = 'ntk'"),
    ]),
    required=(),
    names=DENSE_NAMES | {
        "model.layers.3.mlp.router.bias": "model.layers.3.mlp.gate.bias",
        "model.layers.3.self_attn.sinks": "model.layers.3.self_attn.sinks",
        "model.layers.3.mlp.experts.gate_up_proj": Rearranged(
            "model.layers.3.mlp.experts.gate_up_proj", transposed=True, interleaved=True
        ),
        "model.layers.3.mlp.experts.gate_up_proj_bias": Rearranged(
            "model.layers.3.mlp.experts.gate_up_proj_bias", interleaved=True
        ),
        "model.layers.3.mlp.experts.down_proj": Rearranged(
            "model.layers.3.mlp.experts.down_proj", transposed=True
        ),
        # GGUF's.
        "model.layers.3.mlp.experts.up_proj.bias": Shard(
            "model.layers.3.mlp.experts.gate_up_proj_bias", 1, 2, None, axis=-1
        ),
        "model.layers.3.mlp.experts.down_proj.weight": "model.layers.3.mlp.experts.down_proj",
    },
    published=(GPT_OSS_20B, {"model_type": "gpt_oss"}),
    shallow={"num_hidden_layers": 2},
)  # fmt: skip

ARCHITECTURES = [
    GEMMA_3_ROW, GEMMA_3N_ROW, GEMMA_4_ROW, LLAMA_ROW, QWEN_3_ROW, QWEN_3_5_ROW, MISTRAL_ROW,
    SMOLLM_3_ROW, GRANITE_ROW, OLMO_2_ROW, PHI_3_ROW, LFM_2_ROW, GPT_OSS_ROW,
]  # fmt: skip
