"""The operators of linear-attention layers: on CUDA their Triton kernels, elsewhere torch's.

The torch functions are the definition. They are made of plain tensor operations without sizes
that depend on data, so a program exported for the CPU holds nothing but those.
"""

import functools
from collections.abc import Callable

from torch import Tensor

from tokenloop.models.operators import conv1d, delta_rule
from tokenloop.models.operators.delta_rule import gated_delta_rule

__all__ = [
    "causal_conv1d",
    "causal_conv1d_update",
    "gated_delta_rule",
    "gated_delta_rule_update",
]


def _by_device(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(reference)
    def operator(x: Tensor, *args, **options) -> Tensor:
        if not x.is_cuda:
            return reference(x, *args, **options)
        # Triton, which installations for the CPU lack.
        from tokenloop.models.operators import cuda

        return getattr(cuda, reference.__name__)(x, *args, **options)

    return operator


causal_conv1d = _by_device(conv1d.causal_conv1d)
causal_conv1d_update = _by_device(conv1d.causal_conv1d_update)
gated_delta_rule_update = _by_device(delta_rule.gated_delta_rule_update)
