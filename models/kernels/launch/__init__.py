"""What the kernels of several operators share about how they are launched and run."""

from torch import Tensor


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raise ValueError, with its name and strides, for a tensor that is not contiguous."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} of strides {x.stride()} is not contiguous")
