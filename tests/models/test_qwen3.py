"""What only Qwen promises: experts, and what its configs leave out."""

import pytest
import torch

from tests.models.tiny_models import keys
from tokenloop.models.layers import RopeConfig, Shard
from tokenloop.models.moe import MoeConfig, SparseMoe
from tokenloop.models.qwen3 import Qwen3Config, checkpoint_name

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_reading_the_chosen_experts_gives_what_reading_all_gives(tokens):
    torch.manual_seed(tokens)
    moe = SparseMoe(24, MoeConfig(11, 4, 6, norm_topk_prob=False)).requires_grad_(False)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(tokens, 24)
    routed = moe.route(moe.gate(x))
    torch.testing.assert_close(moe.experts(x, *routed), moe.experts.all(x, *routed))


def test_experts_that_are_not_chosen_are_not_read():
    moe = SparseMoe(8, MoeConfig(6, 2, 4, norm_topk_prob=True)).requires_grad_(False)
    for parameter in moe.experts.parameters():
        torch.nn.init.normal_(parameter)
        parameter[[0, 2, 4, 5]] = torch.nan
    chosen, weights = torch.tensor([[3, 1]]), torch.tensor([[0.6, 0.4]])
    assert moe.experts(torch.ones(1, 8), chosen, weights).isfinite().all()


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("a.mlp.experts.12.gate_proj.weight", Shard("a.mlp.experts.gate_up_proj", 0, 2, 12)),
        ("a.mlp.experts.12.up_proj.weight", Shard("a.mlp.experts.gate_up_proj", 1, 2, 12)),
        ("a.mlp.experts.0.down_proj.weight", Shard("a.mlp.experts.down_proj", 0, 1, 0)),
        ("a.mlp.experts.up_proj.weight", Shard("a.mlp.experts.gate_up_proj", 1, 2, None)),
    ],
)
def test_experts_are_pieces_of_what_is_stacked(name, target):
    assert checkpoint_name(name) == target


@pytest.mark.parametrize(
    ("model_type", "head_dim"), [("qwen2", 2), ("qwen3", 128), ("qwen3_moe", 2)]
)
def test_a_config_that_says_little_has_its_model_type_s_head_size(model_type, head_dim):
    said = {"hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 1}
    config = Qwen3Config.from_dict(said | {"model_type": model_type})
    assert (config.head_dim, config.rope) == (head_dim, RopeConfig(10_000.0))


def test_linear_rope_divides_positions():
    assert Qwen3Config.from_dict(keys("qwen3, linear rope")).rope == RopeConfig(700.0, 3.0)
