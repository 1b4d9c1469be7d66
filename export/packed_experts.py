"""The matrices of routed experts as the kernels read them (models/kernels/experts/packing.py)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tokenloop.export.kept_weights import EXPERT_TABLES, Keeping, expert_codes_and_scales
from tokenloop.export.recipes import FP8
from tokenloop.export.tensors_in_files import empty
from tokenloop.models.kernels.experts.packing import EXPONENT_BIAS, FIELDS, pack_float4
from tokenloop.models.kernels.linear.packing import FLOAT8, round_float8
from tokenloop.models.moe import Experts


class ScaledExperts(nn.Module):
    """Routed experts whose matrices have scales: what an operator takes of them. The network's own
    stay as they are. `tables` are matrices and scales by the experts' names of the parameters."""

    def __init__(self, experts: Experts, tables: Mapping[str, tuple[Tensor, Tensor]]):
        super().__init__()
        gate_up, down = (
            [nn.Parameter(tensor, requires_grad=False) for tensor in tables[name]]
            for name in EXPERT_TABLES
        )
        self.gate_up_proj, self.gate_up_scale = gate_up
        self.down_proj, self.down_scale = down
        self.gate_up_proj_bias = experts.gate_up_proj_bias
        self.down_proj_bias = experts.down_proj_bias
        self.activation = experts.activation


def packed_experts(experts: Experts, bits: int | str | Keeping | None) -> nn.Module:
    """The experts in float8 for FP8, as they are kept where they are, and themselves for all
    else."""
    if bits == FP8:
        return ScaledExperts(
            experts, {name: _float8_table(getattr(experts, name)) for name in EXPERT_TABLES}
        )
    if isinstance(bits, Keeping) and (groups := bits.expert_groups(experts)):
        kept = {name: _kept_table(experts, name, groups[name]) for name in EXPERT_TABLES}
        return ScaledExperts(experts, kept)
    return experts


def _float8_table(table: Tensor) -> tuple[Tensor, Tensor]:
    """float8 [E, N, K] and scales float32 [E, N] of experts' matrices."""
    values = empty(table.shape, FLOAT8, table.device)
    scales = table.new_empty(table.shape[:2], dtype=torch.float32)
    for expert, matrix in enumerate(table):
        values[expert], scales[expert] = round_float8(matrix)
    return values, scales


def _kept_table(experts: Experts, name: str, group_size: int) -> tuple[Tensor, Tensor]:
    """The matrices and scales that the checkpoint has."""
    count, outputs, inputs = experts.get_parameter(name).shape
    codes, scales = expert_codes_and_scales(experts, name, group_size)
    shape = count, outputs, -1
    if codes.dtype == FLOAT8:
        return codes.view(shape), scales.view(shape if group_size < inputs else shape[:2])
    words = empty((count * outputs, inputs // FIELDS), torch.int16)
    for rows in range(0, len(codes), outputs):
        words[rows : rows + outputs] = pack_float4(codes[rows : rows + outputs])
    # A power of 2 is 0.5 times one of the next exponent.
    exponents = scales.frexp().exponent - 1 + EXPONENT_BIAS
    return words.view(shape), exponents.to(torch.uint8).view(shape)
