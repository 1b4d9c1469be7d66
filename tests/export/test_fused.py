"""The decode step of Triton kernels gives the network's own logits, dense and with experts."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tests.models.tiny_models import (  # noqa: E402
    DENSE_NETWORKS,
    PER_LAYER,
    ROW_OF,
    dense_network,
    make_reference,
    network_of,
)
from tokenloop.export.errors import ExportError  # noqa: E402
from tokenloop.export.launches.cuda_step import CudaStep  # noqa: E402
from tokenloop.export.launches.methods import Lookup  # noqa: E402
from tokenloop.models import qwen3  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

SHAPE = {
    "vocab_size": 37,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "norm_topk_prob": True,
}
pytestmark = pytest.mark.usefixtures("one_thread", "interpreted_ranges")


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("model_type", "rope_scaling"), [("qwen2", YARN), ("qwen3", None), ("qwen3_moe", None)]
)
def test_steps_give_the_networks_logits(model_type, rope_scaling):
    changes = {"model_type": model_type, "rope_scaling": rope_scaling}
    config = qwen3.Config.from_dict(SHAPE | changes)
    torch.manual_seed(0)
    plain, fused = (qwen3.Network(config, 9, batch=2).requires_grad_(False) for _ in range(2))
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    fused.load_state_dict(plain.state_dict())
    check_steps(plain, fused)


@pytest.mark.parametrize("name", DENSE_NETWORKS)
def test_steps_of_llama_s_kin_give_the_networks_logits(name):
    plain, fused = (dense_network(name, 12, 2) for _ in range(2))
    # From one end of a ring to the other.
    check_steps(plain, fused, range(6, 8))
    with torch.no_grad():
        # What the step did to the network's weights and caches, the network takes, too.
        token, position = torch.tensor([[5], [6]]), torch.tensor([8, 11])
        actual = fused.decode(token.to(DEVICE), position.to(DEVICE)).cpu()
        torch.testing.assert_close(actual, plain.decode(token, position), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("gpt_oss", {"head_dim": 32}),
        ("gemma4_text, experts beside", {"head_dim": 32, "global_head_dim": 64}),
        (PER_LAYER, {"head_dim": 32, "global_head_dim": 64}),
    ],
)
def test_a_step_of_what_one_family_has_gives_the_networks_logits(case, changes):
    hf = make_reference(case, **changes)
    check_steps(*(network_of(ROW_OF[case], hf, 12, 2) for _ in range(2)), range(6, 7))


def check_steps(plain: torch.nn.Module, fused: torch.nn.Module, steps: range = range(4)) -> None:
    """That the CUDA step of `fused` gives the logits of `plain`, an equal network."""
    step, embed = CudaStep(fused.to(DEVICE)), Lookup(fused.model)
    tokens = torch.randint(plain.config.vocab_size, (len(steps), 2, 1))
    with torch.no_grad():
        for position, token in zip(steps, tokens):
            where = torch.tensor([position, position + 3])
            expected = plain.decode(token, where)
            actual = step(embed(token.to(DEVICE)), where.to(DEVICE)).cpu()
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert not step.kernel_semaphores.any()


@pytest.mark.parametrize("size", [16, 96])
def test_heads_that_the_kernels_cannot_take_are_refused(size):
    config = qwen3.Config.from_dict(SHAPE | {"model_type": "qwen3", "head_dim": size})
    with pytest.raises(ExportError, match=f"a layer's head_dim is {size}; .* one of 32, 64, 128"):
        CudaStep(qwen3.Network(config, 9))
