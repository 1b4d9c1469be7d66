"""Llama's kin and Gemma 4 E2B on a GPU give the ids of transformers in float32, alone and beside
other rows."""

import pytest
import torch

from tests.driving import PROMPTS
from tests.models.tiny_models import PER_LAYER, ROW_OF, TYPICAL, make_reference
from tests.tiny_checkpoints import write_byte_tokenizer
from tokenloop import runner
from tokenloop.export import command

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
KIN = ["llama"] + [case.split(",")[0] for case in TYPICAL if ROW_OF[case].kin]
SIZES = {"vocab_size": 300, "hidden_size": 384, "intermediate_size": 640}
COUNT = 60
# Heads of 96, of which a part rotates, and of 64.
HEADS = {"phi3": 4}
# Their heads are parts of the hidden size.
PARTED = ("phi3", "granite", "granitemoehybrid")
S, F = "sliding_attention", "full_attention"
# As E2B's: the last layers of its first fifteen have the keys that twenty share.
E2B = {
    "head_dim": 64, "global_head_dim": 128, "num_attention_heads": 6, "num_key_value_heads": 1,
    "num_global_key_value_heads": 1, "vocab_size_per_layer_input": 300, "sliding_window": 40,
    "hidden_size_per_layer_input": 32, "num_hidden_layers": 8, "num_kv_shared_layers": 4,
    "layer_types": [S, F, S, F, S, S, S, F],
}  # fmt: skip


def reference(model_type: str) -> torch.nn.Module:
    if model_type == PER_LAYER:
        model = make_reference(PER_LAYER, **SIZES | E2B)
        # A head that is tied to longer embeddings would say the last token again.
        model.model.embed_tokens.weight.data *= 0.05
        return model
    case = next(case for case in TYPICAL if case.split(",")[0] == model_type)
    model = make_reference(
        case, **SIZES, num_attention_heads=HEADS.get(model_type, 6), num_key_value_heads=2,
        head_dim=None if model_type in PARTED else 64,
    )  # fmt: skip
    for parameter in model.parameters():
        if parameter.dim() > 1 and not model_type.startswith("granite"):
            parameter.data *= 0.25
    return model


@pytest.mark.parametrize("model_type", [*KIN, PER_LAYER])
def test_float32_gives_the_ids_of_transformers(tmp_path, model_type):
    hf = reference(model_type)
    hf.save_pretrained(tmp_path / "checkpoint")
    write_byte_tokenizer(tmp_path / "checkpoint/tokenizer.json")
    artifact = tmp_path / "artifact"
    arguments = ["--model", tmp_path / "checkpoint", "--output", artifact, "--device", "cuda"]
    arguments += ["--quant", "fp32", "--max-seq-len", 128, "--max-prefill", 64, "--batch", 3]
    assert command.main([str(argument) for argument in arguments]) == 0
    model = runner.load(artifact)
    model.tokenizer.eos_token_ids.clear()
    requests = [runner.Request(prompt, COUNT) for prompt in PROMPTS]
    results = [result.token_ids for result in model.generate_batch(requests).run()]
    assert model.generate_batch(requests[-1:]).run()[0].token_ids == results[-1]
    for prompt, ids in zip(PROMPTS, results):
        with torch.no_grad():
            logits = hf(torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
        chosen = logits.gather(1, torch.tensor(ids)[:, None])[:, 0]
        # Two of them can be equal but for rounding.
        assert ((logits.amax(1) - chosen) / logits.std(1)).max() < 1e-3
        assert len(set(ids)) > 10
