"""GGUF files, written as llama.cpp's converter writes them, are the models that they came from."""

import math
import re
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Ministral3Config,
    Ministral3ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from tests.models.eager import assert_near, prefill, prompt
from tokenloop.export.checkpoint import load_weights, open_checkpoint
from tokenloop.export.errors import ExportError
from tokenloop.models import by_model_type

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rope_theta": 5e5,
}  # fmt: skip
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
EMBEDDING = {"token_embd.weight": np.zeros((97, 48), np.float32)}


class Model(NamedTuple):
    """One of transformers' models, with a few changes of its config, and what a header has of it
    beside what `write` gives every header."""

    architecture: str
    config: type
    model: type
    changes: dict
    permuted: bool = False
    header: dict = {}


LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
# Of 6 pairs, as float32 has them.
LONGROPE = [1 + i / 8 for i in range(6)]
FULL, SLIDING = "full_attention", "sliding_attention"
GEMMA_4 = {
    "head_dim": 14, "global_head_dim": 24, "layer_types": [SLIDING, FULL], "pad_token_id": 0,
    "sliding_window": 5, "final_logit_softcapping": 20.0, "hidden_size_per_layer_input": 0,
    "num_global_key_value_heads": 1, "attention_k_eq_v": True, "rope_parameters": {
        FULL: {"rope_type": "proportional", "rope_theta": 5e5, "partial_rotary_factor": 0.25},
        SLIDING: {"rope_type": "default", "rope_theta": 700.0},
    },
}  # fmt: skip
GEMMA_4_HEADER = {
    "attention.head_count_kv": [2, 1], "attention.key_length": 24, "attention.value_length": 24,
    "attention.key_length_swa": 14, "attention.value_length_swa": 14, "rope.dimension_count": 24,
    "rope.dimension_count_swa": 14, "attention.sliding_window": 5,
    "attention.sliding_window_pattern": [True, False], "attention.shared_kv_layers": 0,
    "embedding_length_per_layer_input": 0, "final_logit_softcapping": 20.0,
    "rope.freq_base_swa": 700.0,
}  # fmt: skip
# Standard deviations that leave 5 and 30 of 100 gates, and all.
GEMMA_3N = {
    "head_dim": 14, "layer_types": [SLIDING, FULL, SLIDING, FULL], "num_hidden_layers": 4,
    "pad_token_id": 0, "sliding_window": 5, "final_logit_softcapping": 20.0, "laurel_rank": 5,
    "hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": 61, "rms_norm_eps": 1e-6,
    "num_kv_shared_layers": 2, "intermediate_size": [80, 80, 36, 80],
    "activation_sparsity_pattern": [0.95, 0.7, 0.0, 0.0], "rope_parameters": {
        FULL: {"rope_type": "default", "rope_theta": 5e5},
        SLIDING: {"rope_type": "default", "rope_theta": 700.0},
    },
}  # fmt: skip
GEMMA_3N_HEADER = {
    "block_count": 4, "feed_forward_length": [80, 80, 36, 80], "attention.value_length": 14,
    "attention.sliding_window": 5, "attention.sliding_window_pattern": [True, False] * 2,
    "attention.shared_kv_layers": 2, "embedding_length_per_layer_input": 10,
    "final_logit_softcapping": 20.0, "rope.freq_base_swa": 700.0, "altup.active_idx": 0,
    "altup.num_inputs": 4, "activation_sparsity_scale": [1.6448536, 0.5244005, *[-math.inf] * 2],
}  # fmt: skip
MODELS = [
    Model("llama", LlamaConfig, LlamaForCausalLM, {}, permuted=True),
    Model(
        "llama", LlamaConfig, LlamaForCausalLM,
        {"head_dim": 18, "rope_parameters": LLAMA_3, "tie_word_embeddings": True}, permuted=True,
    ),
    Model("qwen2", Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    Model("qwen3", Qwen3Config, Qwen3ForCausalLM, {"head_dim": 18}),
    Model(
        "qwen3moe", Qwen3MoeConfig, Qwen3MoeForCausalLM,
        EXPERTS | {"head_dim": 18, "norm_topk_prob": True},
    ),
    # llama.cpp's converter makes a Llama of a Mistral that does not slide.
    Model(
        "llama", MistralConfig, MistralForCausalLM, {"sliding_window": None, "head_dim": 18},
        permuted=True,
    ),
    Model(
        "smollm3", SmolLM3Config, SmolLM3ForCausalLM,
        {"tie_word_embeddings": True, "num_hidden_layers": 4, "pad_token_id": 0}, permuted=True,
        header={"block_count": 4},
    ),
    Model(
        "granite", GraniteConfig, GraniteForCausalLM,
        {"tie_word_embeddings": True, "attention_multiplier": 0.3, "embedding_multiplier": 7.0,
         "residual_multiplier": 0.5, "logits_scaling": 0.75},
        permuted=True,
        header={"attention.scale": 0.3, "embedding_scale": 7.0, "residual_scale": 0.5,
                "logit_scale": 0.75},
    ),
    Model(
        "gpt-oss", GptOssConfig, GptOssForCausalLM,
        {"intermediate_size": 24, "num_local_experts": 5, "num_experts_per_tok": 2,
         "head_dim": 18, "sliding_window": 5, "rms_norm_eps": 1e-6, "rope_parameters": {
             "rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "truncate": False,
             "original_max_position_embeddings": 64,
         }},
        header={"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 24,
                "feed_forward_length": 24, "attention.sliding_window": 5,
                "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64},
    ),
    Model(
        "lfm2", Lfm2Config, Lfm2ForCausalLM,
        {"layer_types": ["conv", "full_attention"], "norm_eps": 1e-6, "pad_token_id": 0,
         "block_auto_adjust_ff_dim": False, "conv_bias": True},
        header={"attention.head_count_kv": [0, 2], "shortconv.l_cache": 3},
    ),
    Model(
        "phi3", Phi3Config, Phi3ForCausalLM,
        {"hidden_size": 64, "partial_rotary_factor": 0.5, "pad_token_id": 0, "rms_norm_eps": 1e-6},
        header={"embedding_length": 64, "rope.dimension_count": 8,
                "rope.scaling.original_context_length": 4096, "attention.sliding_window": 0},
    ),
    Model(
        "phi3", Phi3Config, Phi3ForCausalLM,
        {"pad_token_id": 0, "rms_norm_eps": 1e-6, "original_max_position_embeddings": 128,
         "sliding_window": 7, "tie_word_embeddings": True,
         "rope_scaling": {
             "type": "longrope", "attention_factor": 1.25, "short_factor": LONGROPE,
             "long_factor": LONGROPE[::-1],
         }},
        header={"rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.25,
                "attention.sliding_window": 7},
    ),
    Model("olmo2", Olmo2Config, Olmo2ForCausalLM, {"pad_token_id": 0, "rms_norm_eps": 1e-6}),
    Model(
        "olmo2", Olmo3Config, Olmo3ForCausalLM,
        {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"],
         "rms_norm_eps": 1e-6, "pad_token_id": 0},
        header={"attention.sliding_window": 5, "attention.sliding_window_pattern": [True, False]},
    ),
    Model("gemma3n", Gemma3nTextConfig, Gemma3nForCausalLM, GEMMA_3N, header=GEMMA_3N_HEADER),
    # As files were written at first; and with what llama.cpp takes for what is not there.
    Model(
        "gemma3n", Gemma3nTextConfig, Gemma3nForCausalLM,
        GEMMA_3N | {
            "num_hidden_layers": 7, "layer_types": ([SLIDING] * 4 + [FULL]) + [SLIDING] * 2,
            "num_kv_shared_layers": 1, "intermediate_size": 80,
            "activation_sparsity_pattern": [0.7] * 7, "rope_parameters": None,
            "vocab_size_per_layer_input": 97,
        },
        header=GEMMA_3N_HEADER | {
            "block_count": 7, "feed_forward_length": 80, "attention.shared_kv_layers": 1.0,
            "attention.sliding_window_pattern": None, "rope.freq_base_swa": None,
            "altup.active_idx": None, "altup.num_inputs": None,
            "activation_sparsity_scale": [0.5244005] * 7,
        },
    ),
    Model("gemma4", Gemma4TextConfig, Gemma4ForCausalLM, GEMMA_4, header=GEMMA_4_HEADER),
    Model(
        "gemma4", Gemma4TextConfig, Gemma4ForCausalLM,
        GEMMA_4 | {
            "layer_types": [SLIDING, FULL] * 2, "num_hidden_layers": 4, "attention_k_eq_v": False,
            "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
            "hidden_size_per_layer_input": 10, "vocab_size_per_layer_input": 97,
        },
        header=GEMMA_4_HEADER | {
            "block_count": 4, "attention.head_count_kv": 2, "attention.shared_kv_layers": 2,
            "attention.sliding_window_pattern": [True, False] * 2,
            "embedding_length_per_layer_input": 10, "feed_forward_length": [80, 80, 160, 160],
        },
    ),
    Model(
        "gemma4", Gemma4TextConfig, Gemma4ForCausalLM,
        GEMMA_4 | EXPERTS | {"enable_moe_block": True, "top_k_experts": 2},
        header=GEMMA_4_HEADER
        | {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 24},
    ),
    Model(
        "mistral3", Ministral3Config, Ministral3ForCausalLM,
        {"head_dim": 18, "pad_token_id": 0, "rms_norm_eps": 1e-6, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "beta_fast": 16.0,
            "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
            "original_max_position_embeddings": 64,
        }},
        permuted=True,
        header={"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 64, "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0, "rope.scaling.yarn_log_multiplier": 1.0,
                "attention.temperature_scale": 0.1},
    ),
]  # fmt: skip
BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "model.embedding_norm.weight": "token_embd_norm.weight",
    "lm_head.weight": "output.weight",
    "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}
# Gemma 3n's matrices of streams, which llama.cpp's converter stacks.
STREAM_NAME = re.compile(r"model\.altup_(unembed_)?projections\.\d+\.weight")
# Gemma 3n's and 4's tensors of a block whose kinds are no weight and bias of a module.
WHOLE_NAMES = {
    "altup.correct_output_scale": "altup_correct_scale.weight",
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(case: Model) -> torch.nn.Module:
    torch.manual_seed(3)
    config = case.config(**SMALL | case.changes)
    # Another one needs sizes that are multiples of four.
    model = case.model._from_config(config, experts_implementation="eager").eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if "norm" in name:
            parameter.data += 1.0
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.75)
    return model


def permute(data: np.ndarray, heads: int) -> np.ndarray:
    """The rows i and i + head_dim / 2 of each head next to each other."""
    halves = data.reshape(heads, 2, -1, *data.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(data.shape)


def block_names(architecture: str) -> dict[str, str]:
    """llama.cpp's names of a block's tensors, by Hugging Face's."""
    post_norms = {
        "post_attention_layernorm": "post_attention_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    }
    stacked = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
    lfm2 = {
        "operator_norm": "attn_norm", "ffn_norm": "ffn_norm", "feed_forward.w1": "ffn_gate",
        "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up", "conv.conv": "shortconv.conv",
        "conv.in_proj": "shortconv.in_proj", "conv.out_proj": "shortconv.out_proj",
        "self_attn.out_proj": "attn_output", "self_attn.q_layernorm": "attn_q_norm",
        "self_attn.k_layernorm": "attn_k_norm",
    }  # fmt: skip
    gpt_oss = {
        "post_attention_layernorm": "post_attention_norm", "mlp.router": "ffn_gate_inp",
        "self_attn": "attn_sinks",
    }  # fmt: skip
    per_layer = post_norms | {
        "pre_feedforward_layernorm": "ffn_norm", "per_layer_input_gate": "inp_gate",
        "per_layer_projection": "proj", "post_per_layer_input_norm": "post_norm",
    }  # fmt: skip
    gemma3n = {
        "altup.correction_coefs": "altup_correct_coef",
        "altup.prediction_coefs": "altup_predict_coef", "altup.modality_router": "altup_router",
        "altup.router_norm": "altup_router_norm", "laurel.linear_left": "laurel_l",
        "laurel.linear_right": "laurel_r", "laurel.post_laurel_norm": "laurel_post_norm",
    }  # fmt: skip
    gemma4 = {
        "router.proj": "ffn_gate_inp",
        "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
        "post_feedforward_layernorm_1": "post_ffw_norm_1",
        "post_feedforward_layernorm_2": "post_ffw_norm_2",
    }  # fmt: skip
    own = {
        "olmo2": post_norms, "phi3": stacked, "lfm2": lfm2, "gpt-oss": gpt_oss,
        "gemma3n": per_layer | gemma3n, "gemma4": per_layer | gemma4,
    }  # fmt: skip
    return BLOCK_NAMES | own.get(architecture, {})


def gguf_tensors(
    model: torch.nn.Module, permuted: bool, architecture: str = "llama"
) -> dict[str, np.ndarray]:
    """The model's tensors in llama.cpp's names; gate and up of all experts apart."""
    config, rope = model.config, model.config.rope_parameters
    names = block_names(architecture)
    heads = {}
    if permuted:
        heads = {
            "self_attn.q_proj": config.num_attention_heads,
            "self_attn.k_proj": config.num_key_value_heads,
        }
    tensors = {}
    if rope.get("rope_type") == "longrope":
        for length in ("short", "long"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            tensors[f"rope_factors_{length}.weight"] = factors
    if rope.get("rope_type") == "llama3":
        scaled = model.model.rotary_emb.inv_freq.numpy()
        plain = 1.0 / SMALL["rope_theta"] ** np.linspace(0, 1, len(scaled), endpoint=False)
        tensors["rope_freqs.weight"] = (plain / scaled).astype(np.float32)
    if architecture == "gemma4":
        # Full layers' pairs: those that rotate, and the others.
        turn = round(12 * rope[FULL]["partial_rotary_factor"])
        tensors["rope_freqs.weight"] = np.array([1.0] * turn + [1e30] * (12 - turn), np.float32)
    parameters = dict(model.named_parameters())
    parameters |= {name: x for name, x in model.named_buffers() if name.endswith("layer_scalar")}
    for name, parameter in parameters.items():
        data = parameter.detach().numpy()
        if name in NAMES:
            tensors[NAMES[name]] = data
            continue
        if stream := STREAM_NAME.fullmatch(name):
            stacked = f"altup_{'unembd_' if stream[1] else ''}proj.weight"
            parts = [tensors[stacked]] if stacked in tensors else []
            tensors[stacked] = np.concatenate([*parts, data[None]])
            continue
        layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name).groups()
        if architecture == "gpt-oss" and ".experts." in rest:
            tensors |= gpt_oss_experts(layer, rest.removeprefix("mlp.experts."), data)
        elif rest in WHOLE_NAMES:
            tensors[f"blk.{layer}.{WHOLE_NAMES[rest]}"] = data
        elif rest == "mlp.experts.gate_up_proj":
            for part, half in zip(("gate", "up"), np.split(data, 2, axis=1)):
                tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = np.ascontiguousarray(half)
        elif rest == "mlp.experts.down_proj":
            tensors[f"blk.{layer}.ffn_down_exps.weight"] = data
        else:
            module, kind = rest.rsplit(".", 1)
            data = permute(data, heads[module]) if module in heads else data
            # llama.cpp's converter squeezes a convolution's weight.
            data = data[:, 0] if rest == "conv.conv.weight" else data
            kind = "weight" if kind == "sinks" else kind
            tensors[f"blk.{layer}.{names[module]}.{kind}"] = data
    return tensors


def gpt_oss_experts(layer: str, name: str, data: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of one of a layer's experts' parameters: gates and ups, which take turns in it,
    apart; and matrices as they multiply."""
    kind = "bias" if name.endswith("_bias") else "weight"
    data = data if kind == "bias" else data.swapaxes(1, 2)
    parts = {"down": data}
    if name.startswith("gate_up"):
        parts = {"gate": data[:, ::2], "up": data[:, 1::2]}
    return {
        f"blk.{layer}.ffn_{part}_exps.{kind}": np.ascontiguousarray(values)
        for part, values in parts.items()
    }


def write(path: Path, architecture: str, tensors: dict[str, np.ndarray], **values) -> Path:
    """`values` override the header's keys; None leaves one out, and one after "/" is no
    architecture's."""
    writer = gguf.GGUFWriter(path, architecture)
    header = {
        "embedding_length": 48, "block_count": 2, "feed_forward_length": 80,
        "context_length": 256, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 5e5,
    }  # fmt: skip
    if architecture == "qwen3moe":
        header |= {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 24}
    for key, value in (header | values).items():
        add = {
            int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
            bool: writer.add_bool, list: writer.add_array,
        }  # fmt: skip
        if value is not None:
            name = key[1:] if key.startswith("/") else f"{architecture}.{key}"
            add[type(value)](name, value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("case", MODELS, ids=lambda case: "-".join([case[0], *case.changes]))
def test_a_file_gives_the_logits_of_the_model_it_came_from(tmp_path, case):
    hf = tiny(case)
    tensors = gguf_tensors(hf, case.permuted, case.architecture)
    values = {"attention.key_length": case.changes.get("head_dim")} | case.header
    path = write(tmp_path / "tiny.gguf", case.architecture, tensors, **values)
    checkpoint = open_checkpoint(path)
    network = by_model_type()[checkpoint.config["model_type"]]
    theirs = {network.checkpoint_name(name): values for name, values in hf.state_dict().items()}
    for name, stored in checkpoint.stored.items():
        # A mixture's experts are stacked in another way.
        same = ".experts." in name or torch.equal(
            stored.read(), theirs[network.checkpoint_name(name)]
        )
        assert same and stored.read().shape == stored.shape, name
    config = network.Config.from_dict(checkpoint.config)
    # llama.cpp's converter keeps what the rotary embedding's scaling comes to, not its kind.
    if "rope_freqs.weight" not in tensors:
        expected = by_model_type()[hf.config.model_type].Config.from_dict(hf.config.to_dict())
        assert vars(config) == approximately(vars(expected))
    with torch.device("meta"):
        model = network.Network(config, 32)
    load_weights(model, checkpoint, network.checkpoint_name)
    tokens = prompt(11)
    with torch.no_grad():
        expected = hf(tokens).logits[0]
    assert (expected.amax(-1) - expected.amin(-1)).min() > 2.0
    assert_near(torch.cat(prefill(model, tokens, [4, 11])), expected[[3, 10]])


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"attention.sliding_window_pattern": [True, True]}, "pattern is .* false for the last"),
        ({"attention.sliding_window_pattern": 2}, "pattern is 2; a list of flags is right"),
        ({"attention.head_count_kv": [2, 1, 1]}, "head_count_kv has 3 values; one for each of 2"),
        ({"rope.dimension_count_swa": 12}, "rope.dimension_count_swa is 12; 14, the size"),
        ({"attention.value_length": 14}, "attention.value_length is 14; 24, the size"),
        ({"feed_forward_length": [80, 160]}, r"feed_forward_length is \[80, 160\]; one number, or"),
        ({"final_logit_softcapping": None}, "has no key gemma4.final_logit_softcapping"),
        ({"attention.key_length_swa": None}, "has no key gemma4.attention.key_length_swa"),
        ({"rope.scaling.factor": 4.0}, r"rope_freqs.weight must divide .* it is \[4.0"),
        ({"attention.scale": 0.5}, "has the key gemma4.attention.scale, which is not supported"),
        ({"suppress_tokens": [3]}, "has the key gemma4.suppress_tokens, which is not supported"),
    ],
)
def test_what_a_gemma_4_file_may_not_ask_for_is_refused_by_name(tmp_path, header, message):
    case = next(case for case in MODELS if case.architecture == "gemma4")
    tensors = gguf_tensors(tiny(case), False, "gemma4")
    with pytest.raises(ExportError, match=message) as raised:
        open_checkpoint(write(tmp_path / "a.gguf", "gemma4", tensors, **GEMMA_4_HEADER | header))
    assert "\n" not in str(raised.value)
    del tensors["rope_freqs.weight"]
    with pytest.raises(ExportError, match="rope_freqs.weight must divide .* it is None"):
        open_checkpoint(write(tmp_path / "b.gguf", "gemma4", tensors, **GEMMA_4_HEADER))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"rope.scaling.factor": 4.0}, "gemma3n's positions are scaled, .*4.0.*; no scaling"),
        ({"attention.shared_kv_layers": 1.5}, "shared_kv_layers is 1.5; a whole number"),
        ({"attention.shared_kv_layers": None}, "has no key gemma3n.attention.shared_kv_layers"),
        ({"final_logit_softcapping": None}, "has no key gemma3n.final_logit_softcapping"),
        ({"activation_sparsity_scale": None}, "has no key gemma3n.activation_sparsity_scale"),
        ({"activation_sparsity_scale": [1.0] * 3}, "has 3 values; one for each of 4 layers"),
        ({"activation_sparsity_scale": [math.inf] * 4}, "is inf; a number, or minus infinity"),
        ({"altup.correct_scale": False}, "the key gemma3n.altup.correct_scale, which is not"),
        ({"attention.scale": 0.5}, "has the key gemma3n.attention.scale, which is not supported"),
    ],
)  # fmt: skip
def test_what_a_gemma_3n_file_may_not_ask_for_is_refused_by_name(
    tmp_path, gemma3n, header, message
):
    values = GEMMA_3N_HEADER | {"attention.key_length": 14} | header
    with pytest.raises(ExportError, match=message) as raised:
        open_checkpoint(write(tmp_path / "a.gguf", "gemma3n", gemma3n, **values))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "altup_proj.weight",
            np.zeros((48, 48), np.float32),
            r"has the shape \(48, 48\); a matrix",
        ),
        ("per_layer_token_embd.weight", None, "has no tensor per_layer_token_embd.weight"),
        ("blk.0.laurel_l.weight", None, "has no tensor blk.0.laurel_l.weight"),
    ],
)
def test_tensors_that_a_gemma_3n_cannot_do_with_are_refused(tmp_path, gemma3n, name, data, message):
    tensors = {key: value for key, value in (gemma3n | {name: data}).items() if value is not None}
    values = GEMMA_3N_HEADER | {"attention.key_length": 14}
    with pytest.raises(ExportError, match=message):
        open_checkpoint(write(tmp_path / "a.gguf", "gemma3n", tensors, **values))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"rope.scaling.yarn_log_multiplier": None}, "yarn_log_multiplier is None; 1 is supported"),
        ({"rope.scaling.yarn_log_multiplier": 0.5}, "yarn_log_multiplier is 0.5; 1 is supported"),
        ({"rope.scaling.attn_factor": 2.0}, "rope.scaling.attn_factor is 2.0; 1 is supported"),
        ({"attention.temperature_length": 64}, "temperature_length, which is not supported"),
        ({"expert_count": 8}, "expert_count is 8; a mixture of experts is not supported"),
        (
            {"rope.scaling.type": None, "rope.scaling.factor": None,
             "rope.scaling.yarn_beta_fast": None, "rope.scaling.yarn_beta_slow": None,
             "rope.scaling.yarn_log_multiplier": None,
             "rope.scaling.original_context_length": None},
            "has no key mistral3.rope.scaling.original_context_length",
        ),
    ],
)  # fmt: skip
def test_what_a_mistral_3_file_may_not_ask_for_is_refused_by_name(tmp_path, header, message):
    case = next(case for case in MODELS if case.architecture == "mistral3")
    with pytest.raises(ExportError, match=message):
        open_checkpoint(write(tmp_path / "a.gguf", "mistral3", EMBEDDING, **case.header | header))


@pytest.fixture(scope="module")
def gemma3n():
    """A Gemma 3n's tensors."""
    case = next(case for case in MODELS if case.architecture == "gemma3n")
    return gguf_tensors(tiny(case), False, "gemma3n")


def approximately(fields: dict) -> dict:
    """Fields whose numbers may be those of float32, as a header has them."""

    def is_inexact(value) -> bool:
        return isinstance(value, float) or isinstance(value, tuple) and all(map(is_inexact, value))

    return {
        name: pytest.approx(value) if is_inexact(value) else value for name, value in fields.items()
    }


def test_two_tensors_of_one_meaning_are_refused(tmp_path):
    norms = {f"{name}_norm.weight": np.ones(48, np.float32) for name in ("output", "token_embd")}
    with pytest.raises(ExportError, match="token_embd_norm.weight and another tensor are both mod"):
        open_checkpoint(write(tmp_path / "a.gguf", "llama", EMBEDDING | norms))


def test_a_permuted_files_biases_come_back_in_order_too(tmp_path):
    biased = {"attention_bias": True, "mlp_bias": True}
    hf = tiny(Model("llama", LlamaConfig, LlamaForCausalLM, biased))
    path = write(tmp_path / "a.gguf", "llama", gguf_tensors(hf, permuted=True))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config["attention_bias"] and checkpoint.config["mlp_bias"]
    tensors = {name: t.read() for name, t in checkpoint.stored.items()}
    assert tensors.keys() == dict(hf.named_parameters()).keys()
    assert all(torch.equal(tensors[name], value) for name, value in hf.named_parameters())


def test_a_llama_without_optional_keys_has_llama_cpps_defaults(tmp_path):
    absent = {"rope.freq_base": None, "attention.head_count_kv": None}
    config = open_checkpoint(write(tmp_path / "a.gguf", "llama", EMBEDDING, **absent)).config
    assert (config["rope_theta"], config["num_key_value_heads"]) == (10000.0, 4)
    assert config["head_dim"] == 12 and config["tie_word_embeddings"]
    assert not config["attention_bias"] and not config["mlp_bias"]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "gemma3"])
def test_every_architecture_without_optional_keys_has_llama_cpps_defaults(tmp_path, architecture):
    absent = {"rope.freq_base": None, "attention.head_count_kv": None}
    own = {"attention.key_length": 12, "attention.sliding_window": 8}
    values = absent | (own if architecture == "gemma3" else {})
    config = open_checkpoint(write(tmp_path / "a.gguf", architecture, EMBEDDING, **values)).config
    assert (config["rope_theta"], config["num_key_value_heads"]) == (10000.0, 4)


def test_lists_of_one_value_for_all_layers_and_keys_that_do_nothing_are_read(tmp_path):
    values = {
        "attention.head_count": [4, 4], "attention.head_count_kv": [2, 2],
        "feed_forward_length": [80, 80], "vocab_size": 97, "rope.dimension_count": 12,
        "rope.scaling.finetuned": True, "attention.causal": True, "expert_count": 0,
        "expert_used_count": 0, "rope.scaling.attn_factor": 1.0, "pooling_type": 0,
    }  # fmt: skip
    plain = open_checkpoint(write(tmp_path / "a.gguf", "llama", EMBEDDING)).config
    assert open_checkpoint(write(tmp_path / "b.gguf", "llama", EMBEDDING, **values)).config == plain


def test_a_window_s_pattern_may_be_a_list_of_flags(tmp_path):
    own = {"attention.key_length": 12, "attention.sliding_window": 8}
    values = own | {"attention.sliding_window_pattern": [False, True]}
    config = open_checkpoint(write(tmp_path / "a.gguf", "gemma3", EMBEDDING, **values)).config
    assert config["layer_types"] == ["full_attention", "sliding_attention"]


@pytest.mark.parametrize("changes", [{}, {"beta_fast": 8, "beta_slow": 2}], ids=str)
def test_yarn_s_keys_are_transformers_yarn_past_the_original_length(tmp_path, changes):
    """llama.cpp multiplies cosines by 0.1 ln(factor) + 1, as transformers does."""
    scaling = {
        "rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    case = Model("qwen3", Qwen3Config, Qwen3ForCausalLM, {"rope_parameters": scaling | changes})
    hf = tiny(case)
    tensors = gguf_tensors(hf, permuted=False)
    keys = {f"rope.scaling.yarn_{key}": float(value) for key, value in changes.items()}
    values = {
        "attention.key_length": 128, "rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16, **keys,
    }  # fmt: skip
    checkpoint = open_checkpoint(write(tmp_path / "a.gguf", "qwen3", tensors, **values))
    network = by_model_type()["qwen3"]
    config = network.Config.from_dict(checkpoint.config)
    with torch.device("meta"):
        model = network.Network(config, 64)
    load_weights(model, checkpoint, network.checkpoint_name)
    tokens = prompt(40)
    with torch.no_grad():
        expected = hf(tokens).logits[0]
    assert_near(torch.cat(prefill(model, tokens, [4, 40])), expected[[3, 39]])
    # An attention factor of the file multiplies this one.
    values |= {"rope.scaling.attn_factor": 0.5}
    other = open_checkpoint(write(tmp_path / "b.gguf", "qwen3", tensors, **values)).config
    halves = [c["rope_scaling"]["attention_factor"] for c in (other, checkpoint.config)]
    assert halves[0] == 0.5 * halves[1]


@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(rng=st.randoms(use_true_random=False))
def test_a_file_of_sizes_at_random_is_the_model_it_came_from(tmp_path, rng):
    # Those whose header has no more than these sizes.
    plain = LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig, Olmo2Config
    some = [model for model in MODELS if model.config in plain and not model.header]
    case = rng.choice([model for model in some if model.changes.get("rope_parameters") is None])
    heads = rng.choice((1, 2, 4))
    sizes = {
        "num_attention_heads": heads, "hidden_size": heads * rng.choice((6, 10)),
        "num_key_value_heads": rng.choice([n for n in (1, 2, 4) if heads % n == 0]),
        "num_hidden_layers": rng.randint(1, 3), "intermediate_size": rng.choice((8, 21)),
        "vocab_size": rng.randint(50, 99), "rms_norm_eps": rng.choice((1e-6, 1e-5, 0.1)),
        "tie_word_embeddings": rng.random() < 0.5, "max_position_embeddings": rng.choice((32, 90)),
    }  # fmt: skip
    if case.architecture != "qwen2":
        sizes["head_dim"] = rng.choice((8, 14))
    theta = rng.choice((300.0, 10_000.0))
    factor, original = rng.choice((2.0, 8.0)), rng.choice((8, 16))
    kind = rng.choice(("default", "linear", "yarn"))
    scaling = {"rope_type": kind, "rope_theta": theta}
    scaling |= {} if kind == "default" else {"factor": factor}
    scaling |= {"original_max_position_embeddings": original} if kind == "yarn" else {}
    hf = tiny(case._replace(changes=case.changes | sizes | {"rope_parameters": scaling}))
    names = {
        "embedding_length": "hidden_size", "block_count": "num_hidden_layers",
        "feed_forward_length": "intermediate_size", "context_length": "max_position_embeddings",
        "attention.head_count": "num_attention_heads", "attention.key_length": "head_dim",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    }  # fmt: skip
    values = {key: sizes.get(name) for key, name in names.items()} | {"rope.freq_base": theta}
    if kind != "default":
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "linear" and rng.random() < 0.5:
        values |= {"rope.scaling.type": None, "rope.scaling.factor": None}
        values["rope.scale_linear"] = factor
    if kind == "yarn":
        values["rope.scaling.original_context_length"] = original
    # What llama.cpp takes a file without these to mean.
    if theta == 10_000.0:
        values["rope.freq_base"] = None
    if sizes["num_key_value_heads"] == heads:
        values["attention.head_count_kv"] = None
    elif rng.random() < 0.3:
        count = sizes["num_hidden_layers"]
        values["attention.head_count_kv"] = [sizes["num_key_value_heads"]] * count
    tensors = gguf_tensors(hf, case.permuted, case.architecture)
    checkpoint = open_checkpoint(write(tmp_path / "a.gguf", case.architecture, tensors, **values))
    network = by_model_type()[checkpoint.config["model_type"]]
    config = network.Config.from_dict(checkpoint.config)
    assert config == network.Config.from_dict(hf.config.to_dict())
    with torch.device("meta"):
        model = network.Network(config, 20)
    load_weights(model, checkpoint, network.checkpoint_name)
    tokens = prompt(20)
    with torch.no_grad():
        expected = hf(tokens).logits[0]
    assert_near(torch.cat(prefill(model, tokens, [4, 20])), expected[[3, 19]])


# Parts


def write_parts(directory: Path, changes: dict[int, dict] | None = None) -> list[Path]:
    """A Llama in three parts, as llama.cpp's gguf-split writes them: the first has the metadata.
    `changes` are those of a part's own keys."""
    tensors = gguf_tensors(tiny(MODELS[0]), permuted=True)
    paths = [directory / f"a-0000{i + 1}-of-00003.gguf" for i in range(3)]
    for i, path in enumerate(paths):
        own = {"split.no": i, "split.count": 3, "split.tensors.count": len(tensors)}
        own |= (changes or {}).get(i, {})
        names = sorted(tensors)[i::3]
        write_part(path, {name: tensors[name] for name in names}, own, whole=i == 0)
    return paths


def write_part(path: Path, tensors: dict[str, np.ndarray], own: dict, whole: bool) -> None:
    values = {} if whole else dict.fromkeys(
        ("embedding_length", "block_count", "feed_forward_length", "context_length",
         "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
         "rope.freq_base")
    )  # fmt: skip
    write(path, "llama", tensors, **values, **{f"/{key}": value for key, value in own.items()})


def test_the_parts_of_a_model_are_the_whole_model_whichever_is_given(tmp_path):
    case = MODELS[0]
    whole = open_checkpoint(
        write(tmp_path / "whole.gguf", "llama", gguf_tensors(tiny(case), permuted=True))
    )
    paths = write_parts(tmp_path)
    for path in paths:
        checkpoint = open_checkpoint(path)
        assert checkpoint.config == whole.config and checkpoint.weight_files == tuple(paths)
        assert checkpoint.stored.keys() == whole.stored.keys()
        for name, stored in checkpoint.stored.items():
            assert torch.equal(stored.read(), whole.stored[name].read()), name


def test_parts_that_are_no_whole_model_are_refused_by_what_is_wrong(tmp_path):
    def refused(message: str) -> None:
        with pytest.raises(ExportError, match=message) as raised:
            open_checkpoint(tmp_path / "a-00001-of-00003.gguf")
        assert "\n" not in str(raised.value)

    write_parts(tmp_path, {1: {"split.no": 2}})
    refused("a-00002-of-00003.gguf: split.no is 2 and split.count 3; 1 and 3 are right")
    write_parts(tmp_path, {1: {"split.count": 4}})
    refused("a-00002-of-00003.gguf: split.no is 1 and split.count 4; 1 and 3 are right")
    write_parts(tmp_path, {0: {"split.tensors.count": 99}})
    refused("its 3 parts have 99 tensors; they have 21")
    paths = write_parts(tmp_path)
    paths[2].write_bytes(paths[1].read_bytes())
    refused("a-00003-of-00003.gguf: split.no is 1")
    paths[2].unlink()
    refused("a-00003-of-00003.gguf is missing; a-00001-of-00003.gguf is one of 3 parts")
    first = write_parts(tmp_path)[0]
    write_part(paths[1], {"output_norm.weight": np.ones(48, np.float32)} | {
        "token_embd.weight": np.zeros((97, 48), np.float32)
    }, {"split.no": 1, "split.count": 3}, whole=False)  # fmt: skip
    refused("another part has the tensor")
    other = tmp_path / "b.gguf"
    first.rename(other)
    with pytest.raises(ExportError, match="b.gguf is one of 3 parts, which are found by their nam"):
        open_checkpoint(other)


@pytest.mark.parametrize(
    ("architecture", "values", "message"),
    [
        ("qwen3moe", {"rope.scaling.type": "su"}, "scaling.type is 'su'; none, linear and yarn"),
        ("qwen3", {"rope.scaling.attn_factor": 1.5}, "the key qwen3.rope.scaling.attn_factor"),
        (
            "qwen3",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.yarn_ext_factor": 0.5,
            },
            "qwen3.rope.scaling.yarn_ext_factor is 0.5; 1 is supported",
        ),
        (
            "qwen3",
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.yarn_log_multiplier": 0.1,
            },
            "the key qwen3.rope.scaling.yarn_log_multiplier, which is not",
        ),
        ("qwen2", {"rope.dimension_sections": [2, 2, 2, 0]}, "key qwen2.rope.dimension_sections"),
        ("qwen3moe", {"expert_count": None}, "has no key qwen3moe.expert_count"),
        ("qwen3moe", {"expert_feed_forward_length": None}, "qwen3moe.expert_feed_forward_length"),
        ("qwen3moe", {"embedding_length": None}, "has no key qwen3moe.embedding_length"),
        ("llama", {"expert_count": 8}, "llama.expert_count is 8; a mixture of experts is not"),
        ("granite", {}, "has no key granite.logit_scale"),
        ("lfm2", {}, "lfm2.attention.head_count_kv is 2; one for each layer is right"),
        ("lfm2", {"attention.head_count_kv": [4, 2]}, "0 and one more are supported"),
        (
            "granite",
            {"logit_scale": 2.0, "rope.scaling.finetuned": False},
            "granite.rope.scaling.finetuned is false",
        ),
        ("phi3", {"rope.scaling.type": "ntk"}, "scaling.type is 'ntk'"),
        ("phi3", {"rope.scaling.attn_factor": 1.2}, "attn_factor alone; rope_factors_short"),
        ("olmo2", {"attention.sliding_window": 5}, "sliding_window_pattern is None; a list of"),
        (
            "olmo2",
            {"attention.sliding_window": 5, "attention.sliding_window_pattern": [True]},
            "sliding_window_pattern is .* one for each of 2 layers",
        ),
    ],
)
def test_a_header_that_cannot_be_run_is_refused_by_its_key(tmp_path, architecture, values, message):
    path = write(tmp_path / "tiny.gguf", architecture, EMBEDDING, **values)
    with pytest.raises(ExportError, match=message):
        open_checkpoint(path)
