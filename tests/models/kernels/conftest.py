"""What all tests of the operators share."""

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def small_tensors(one_thread, interpreted_ranges):
    """All tests here have tensors that one thread is best for, and run kernels."""


@pytest.fixture
def semaphores():
    """Zeros, which every kernel must leave zero."""
    semaphores = torch.zeros(4096, dtype=torch.int32, device=DEVICE)
    yield semaphores
    assert not semaphores.any()


@pytest.fixture
def normal():
    """A function (*shape, dtype, scale) -> normal numbers on the device."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.float32, scale: float = 1.0):
        return (torch.randn(shape, generator=generator) * scale).to(DEVICE, dtype)

    return normal
