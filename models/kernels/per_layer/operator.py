"""Per-layer embeddings on CUDA, each operator in one launch."""

import triton
from torch import Tensor, empty_like

from tokenloop.models.kernels.launch import check_contiguous
from tokenloop.models.kernels.launch.launches import launch, operator
from tokenloop.models.kernels.per_layer.triton import gate_input_kernel, layer_inputs_kernel
from tokenloop.models.per_layer import HALF

BLOCK_P = 1024


@operator("layer_inputs")
def layer_inputs(
    projected: Tensor, own: Tensor, norm_weight: Tensor, count: Tensor | None = None, *,
    eps: float, offset: float = 0.0,
) -> Tensor:  # fmt: skip
    """See reference.layer_inputs. All is contiguous. ValueError tells of rows that are not as many
    whole layers for both, or of other dtypes."""
    check_contiguous(projected=projected, own=own, norm_weight=norm_weight)
    rows, width = projected.shape
    size = len(norm_weight)
    if own.shape != projected.shape or own.dtype != projected.dtype or width % size:
        raise ValueError(
            f"projections {tuple(projected.shape)} of {projected.dtype} and own vectors "
            f"{tuple(own.shape)} of {own.dtype} for layers of {size}"
        )
    y = empty_like(projected)
    launch(layer_inputs_kernel, (rows, width // size))(
        projected, own, norm_weight, count, y, size, eps, offset, HALF,
        BLOCK_P=triton.next_power_of_2(size), num_warps=1 if size <= 256 else 4,
    )  # fmt: skip
    return y


@operator("gate_input")
def gate_input(
    gate: Tensor, given: Tensor, count: Tensor | None = None, *, activation: str
) -> Tensor:
    """See reference.gate_input. The rows of `given` may be any distance apart; ValueError tells of
    one whose elements do not lie side by side, or of another shape or dtype."""
    check_contiguous(gate=gate)
    if given.shape != gate.shape or given.dtype != gate.dtype or given.stride(1) != 1:
        raise ValueError(
            f"an input {tuple(given.shape)} of {given.dtype} and strides {given.stride()} for a "
            f"gate {tuple(gate.shape)} of {gate.dtype}"
        )
    rows, size = gate.shape
    y = empty_like(gate)
    block = min(BLOCK_P, triton.next_power_of_2(size))
    launch(gate_input_kernel, (rows, triton.cdiv(size, block)))(
        gate, given, count, y, size, given.stride(0), ACTIVATION=activation, BLOCK_P=block,
        num_warps=1 if block <= 256 else 4,
    )  # fmt: skip
    return y
