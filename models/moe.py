"""Routed experts (arXiv:1701.06538), named as in transformers.

Weights of all experts are stacked, [E, ...]. Shapes: N tokens, E experts, k of them chosen for each
token, D hidden size, I an expert's own size.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenloop.models.layers import MLP, RMSNorm, gated


@dataclass(frozen=True)
class MoeConfig:
    """`num_experts` of `moe_intermediate_size`, `num_experts_per_tok` for each token. The weights
    of those chosen add up to one with `norm_topk_prob`. `activation` is one of layers.gated. With
    `bias` the router and the experts have biases."""

    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    norm_topk_prob: bool
    activation: str = "silu"
    bias: bool = False


class Experts(nn.Module):
    """Gated feed-forwards: x [N, D], each token's chosen experts int64 [N, k] and their
    weights [N, k] -> [N, D].

    `forward` and `all` are both exact. `forward` is for few tokens, and `all` is for many.
    """

    def __init__(self, hidden_size: int, config: MoeConfig):
        super().__init__()
        count, size = config.num_experts, config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(count, 2 * size, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(count, hidden_size, size))
        self.activation = config.activation
        self.gate_up_proj_bias = self.down_proj_bias = None
        if config.bias:
            self.gate_up_proj_bias = nn.Parameter(torch.empty(count, 2 * size))
            self.down_proj_bias = nn.Parameter(torch.empty(count, hidden_size))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Reads the experts chosen, each as often as it is chosen, and no others."""
        tokens, count = chosen.shape
        gate_up = self.gate_up_proj.index_select(0, chosen.flatten())
        down = self.down_proj.index_select(0, chosen.flatten())
        repeated = x[:, None].expand(-1, count, -1).reshape(tokens * count, -1, 1)
        gate_up = torch.bmm(gate_up, repeated)
        if self.gate_up_proj_bias is not None:
            biases = self.gate_up_proj_bias.index_select(0, chosen.flatten())
            gate_up = gate_up + biases[..., None]
        out = torch.bmm(down, self._gated(gate_up))
        if self.down_proj_bias is not None:
            out = out + self.down_proj_bias.index_select(0, chosen.flatten())[..., None]
        return (out.view(tokens, count, -1) * weights[..., None]).sum(1)

    def all(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Reads every expert once, and computes all of them for every token. A chunk's tokens
        together choose nearly all of them."""
        dense = weights.new_zeros(x.shape[0], self.gate_up_proj.shape[0])
        dense = dense.scatter(1, chosen, weights)
        columns = x.t()[None].expand(self.gate_up_proj.shape[0], -1, -1)
        gate_up = torch.bmm(self.gate_up_proj, columns)
        if self.gate_up_proj_bias is not None:
            gate_up = gate_up + self.gate_up_proj_bias[..., None]
        hidden = self._gated(gate_up) * dense.t()[:, None]
        out = torch.bmm(self.down_proj, hidden).sum(0).t()
        return out if self.down_proj_bias is None else out + dense @ self.down_proj_bias

    def _gated(self, gate_up: Tensor) -> Tensor:
        """activation(gate) * up of [..., 2 I, N] -> [..., I, N]."""
        return gated(*gate_up.chunk(2, dim=-2), self.activation)


def route(scores: Tensor, config: MoeConfig) -> tuple[Tensor, Tensor]:
    """The experts chosen, int64 [N, k], and their weights float32 [N, k], out of `scores`
    [N, E]."""
    probabilities = F.softmax(scores, dim=-1, dtype=torch.float32)
    weights, chosen = torch.topk(probabilities, config.num_experts_per_tok, dim=-1)
    if config.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    return chosen, weights


def run_experts(
    experts: Experts, config: MoeConfig, x: Tensor, routed: tuple[Tensor, Tensor]
) -> Tensor:
    """What the experts give for x [B, T, D], whose B * T tokens are `routed`."""
    # Sizes that are known when a method is traced decide. A step has one token in each row.
    few = x.shape[1] == 1 and x.shape[0] * config.num_experts_per_tok < config.num_experts
    run = experts if few else experts.all
    return run(x.reshape(-1, x.shape[-1]), *routed).view(x.shape)


class SparseMoe(nn.Module):
    """A feed-forward whose tokens choose their experts: x [B, T, D] -> [B, T, D].

    With `shared_size` there is one more expert, of that size. Every token has it, with a weight of
    the token's own. As a block's feed-forward it declares `moe`, the config of its routed experts,
    and `dense`, the shared expert or None. `routers` stay floating point where other layers do not:
    their scores decide more than they weigh.
    """

    reads_residual = False

    def __init__(self, hidden_size: int, config: MoeConfig, shared_size: int | None = None):
        super().__init__()
        self.moe = config
        self.gate = nn.Linear(hidden_size, config.num_experts, bias=config.bias)
        self.experts = Experts(hidden_size, config)
        if shared_size is not None:
            self.shared_expert = MLP(hidden_size, shared_size, "silu")
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False)
        self.is_shared = shared_size is not None
        self.routers = ("gate",) + ("shared_expert_gate",) * self.is_shared

    @property
    def dense(self) -> MLP | None:
        return self.shared_expert if self.is_shared else None

    def route(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The experts chosen, int64 [N, k], and their weights [N, k], out of `scores` [N, E]."""
        chosen, weights = route(scores, self.moe)
        return chosen, weights.to(scores.dtype)

    def forward(self, x: Tensor) -> Tensor:
        routed = self.route(self.gate(x.reshape(-1, x.shape[-1])))
        out = run_experts(self.experts, self.moe, x, routed)
        return out + self.beside(x) if self.is_shared else out

    def read(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """What the experts read, and the router's scores of them [B, T, E]."""
        return x, self.gate(x)

    def beside(self, x: Tensor) -> Tensor | None:
        """What every token has beside its experts, if it has anything."""
        if not self.is_shared:
            return None
        return self.shared_expert_gate(x).sigmoid() * self.shared_expert(x)

    def given(self, out: Tensor) -> Tensor:
        """What is added of what the experts give."""
        return out


class MlpBesideMoe(MLP):
    """A feed-forward of every token, and routed experts beside it that read the residual:
    dense_branch_norm(mlp(x)) + experts_branch_norm(experts(experts_norm(residual))).

    The router reads router_norm(residual), and expert e's weight is multiplied by expert_scales[e].
    As a block's feed-forward it declares what SparseMoe does; `dense` is itself.
    """

    reads_residual = True

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, config: MoeConfig,
        norm: Callable[..., RMSNorm],
    ):  # fmt: skip
        """`norm` makes the norms, given their `scale`."""
        super().__init__(hidden_size, intermediate_size, activation)
        self.moe, self.routers = config, ("gate",)
        self.gate = nn.Linear(hidden_size, config.num_experts, bias=False)
        self.router_norm = norm(scale=hidden_size**-0.5)
        self.expert_scales = nn.Parameter(torch.empty(config.num_experts))
        self.experts_norm, self.experts_branch_norm = norm(), norm()
        self.dense_branch_norm = norm()
        self.experts = Experts(hidden_size, config)

    def route(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """As SparseMoe's."""
        chosen, weights = route(scores, self.moe)
        return chosen, (weights * self.expert_scales[chosen].float()).to(scores.dtype)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x is the norm of `residual`, both [B, T, D]."""
        scores = self.gate(self.router_norm(residual))
        routed = self.route(scores.flatten(0, -2))
        out = run_experts(self.experts, self.moe, self.experts_norm(residual), routed)
        return self.beside(x) + self.given(out)

    def read(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """As SparseMoe's."""
        return self.experts_norm(residual), self.gate(self.router_norm(residual))

    def beside(self, x: Tensor) -> Tensor:
        """As SparseMoe's."""
        return self.dense_branch_norm(super().forward(x))

    def given(self, out: Tensor) -> Tensor:
        """As SparseMoe's."""
        return self.experts_branch_norm(out)
