"""The operators of a network, a folder for each: reference.py says in plain torch what it gives,
operator.py gives that on CUDA, and triton.py, or triton_*.py, are the kernels that do it.

Operators on CUDA are torch.ops.tokenloop.*, whose kernels, and whose changes to their arguments,
torch.export sees. Launches depend on shapes alone and nothing is read back, so they
can be captured in a CUDA graph. cuda.py lists them all. launch/ is what kernels share.
"""

import functools
from collections.abc import Callable

from torch import Tensor


def by_device(reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that is `reference`, and on CUDA the operator of its name.

    The reference is made of plain tensor operations without sizes that depend on data, so a program
    exported for the CPU holds nothing but those.
    """

    @functools.wraps(reference)
    def operator(x: Tensor, *args, **options) -> Tensor:
        if not x.is_cuda:
            return reference(x, *args, **options)
        # Triton, which installations for the CPU lack.
        from tokenloop.models.kernels import cuda

        return getattr(cuda, reference.__name__)(x, *args, **options)

    return operator
