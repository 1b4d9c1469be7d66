"""What kernels that read whole rows ask of their arguments."""

from torch import Tensor


def check_contiguous(**tensors: Tensor | None) -> None:
    """Raise ValueError, with its name and strides, for a tensor that is not contiguous."""
    for name, x in tensors.items():
        if x is not None and not x.is_contiguous():
            raise ValueError(f"{name} of strides {x.stride()} is not contiguous")
