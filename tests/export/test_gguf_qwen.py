"""Qwen's GGUF files, named as llama.cpp's converter names them, are the models that they came
from."""

import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.models.eager import assert_near, prefill, prompt
from tokenloop.export.checkpoint.checkpoint import load_weights, open_checkpoint
from tokenloop.export.errors import ExportError
from tokenloop.models import qwen3

SMALL = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "rope_theta": 5e5,
}  # fmt: skip
EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": True}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 18}),
    "qwen3moe": (
        Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS | {"head_dim": 18, "norm_topk_prob": True},
    ),
}  # fmt: skip
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
    "lm_head.weight": "output.weight",
}

pytestmark = pytest.mark.usefixtures("one_thread")


def tiny(architecture: str) -> torch.nn.Module:
    config_class, model_class, changes = MODELS[architecture]
    torch.manual_seed(3)
    model = model_class(config_class(**SMALL | changes)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        if "norm" in name:
            parameter.data += 1.0
    return model


def gguf_tensors(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The model's tensors in llama.cpp's names; gate and up of all experts apart."""
    tensors = {}
    for name, parameter in model.named_parameters():
        data = parameter.detach().numpy()
        if name in NAMES:
            tensors[NAMES[name]] = data
            continue
        layer, rest = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name).groups()
        if rest == "mlp.experts.gate_up_proj":
            for part, half in zip(("gate", "up"), np.split(data, 2, axis=1)):
                tensors[f"blk.{layer}.ffn_{part}_exps.weight"] = np.ascontiguousarray(half)
        elif rest == "mlp.experts.down_proj":
            tensors[f"blk.{layer}.ffn_down_exps.weight"] = data
        else:
            module, kind = rest.rsplit(".", 1)
            tensors[f"blk.{layer}.{BLOCK_NAMES[module]}.{kind}"] = data
    return tensors


def write(path: Path, architecture: str, tensors: dict[str, np.ndarray], **values) -> Path:
    """`values` override the header's keys; None leaves one out."""
    writer = gguf.GGUFWriter(path, architecture)
    header = {
        "embedding_length": 48, "block_count": 2, "feed_forward_length": 80,
        "context_length": 256, "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 5e5,
    }  # fmt: skip
    if architecture != "qwen2":
        header["attention.key_length"] = 18
    if architecture == "qwen3moe":
        header |= {"expert_count": 5, "expert_used_count": 2, "expert_feed_forward_length": 24}
    for key, value in (header | values).items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    for name, data in tensors.items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", MODELS)
def test_a_file_gives_the_logits_of_the_model_it_came_from(tmp_path, architecture):
    hf = tiny(architecture)
    path = write(tmp_path / "tiny.gguf", architecture, gguf_tensors(hf))
    checkpoint = open_checkpoint(path)
    config = qwen3.Qwen3Config.from_dict(checkpoint.config)
    assert config == qwen3.Qwen3Config.from_dict(hf.config.to_dict())
    with torch.device("meta"):
        model = qwen3.Qwen3(config, 32)
    load_weights(model, checkpoint, qwen3.checkpoint_name)
    tokens = prompt(11)
    with torch.no_grad():
        expected = hf(tokens).logits[0]
    assert (expected.amax(-1) - expected.amin(-1)).min() > 2.0
    assert_near(torch.cat(prefill(model, tokens, [4, 11])), expected[[3, 10]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope.scaling.type": "yarn"}, "qwen3moe.rope.scaling.type is 'yarn'; none and linear"),
        ({"expert_count": None}, "has no key qwen3moe.expert_count"),
        ({"expert_feed_forward_length": None}, "no key qwen3moe.expert_feed_forward_length"),
        ({"embedding_length": None}, "has no key qwen3moe.embedding_length"),
    ],
)
def test_a_header_that_cannot_be_run_is_refused_by_its_key(tmp_path, values, message):
    embedding = {"token_embd.weight": np.zeros((97, 48), np.float32)}
    path = write(tmp_path / "tiny.gguf", "qwen3moe", embedding, **values)
    with pytest.raises(ExportError, match=message):
        open_checkpoint(path)
